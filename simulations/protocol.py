"""What an experiment is: load, sweep, analyse (after google-deepmind/bsuite).

An experiment asks one question. `settings(size)` lists what is swept, as plain dicts; `run(setting)` turns one setting
into raw records and is a pure function of it (the seed is one of its entries), so a setting can be computed anywhere,
in any order, and again; `analyse(records)` turns all records, in setting order, into verdicts on claims and figures.
Setting number 3 of `variance_vs_lag` is called `variance_vs_lag/3`, everywhere.

    def settings(size: str) -> list[Setting]:
        return [{"lag": lag, "seed": 0} for lag in ((0, 4) if size == "reduced" else range(17))]

    def run(setting: Setting) -> list[Record]:
        rng = np.random.default_rng(setting["seed"])
        ...
        return [{"lag": setting["lag"], "variance_per_sample": value}]

    def analyse(records: list[Record]) -> Analysis:
        growth = of_seeds((r["seed"], r["variance_per_sample"]) for r in records if r["lag"] == 4)
        rule = Rule("variance per sample at lag 4", ">", 0.0, margin=0.1)
        asked = [Question("grows", "C1", "it grows", rule, [Comparison("lag 4", growth)])]
        return Analysis(judge(asked), [Figure("variance", plot, "Variance against lag.")])

Verdicts are not written but judged: `simulations.verdicts` has the rule and the five words, `simulations.stats` makes
estimates with intervals over seeds, `simulations.drawing` says what a plot is. The test of
tampering asks for a `world`: records in which a question is true, false and pure noise (`tests/simulations/worlds.py`).

    EXPERIMENT = Experiment("variance_vs_lag", "How does ...?", ("C1", "C4"), settings, run, analyse)

Records and settings are plain JSON values. A NaN or an infinity is an error that names the setting and the field: a
moment that does not exist is recorded as None or as a word, never as a number.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simulations.verdicts import WITNESSES, WORDS, Comparison, Question, Rule, Verdict, judge
from vcposim.catalogue.loading import estimator_named, source_of
from vcposim.errors import InputError, unknown_name

__all__ = [
    "WITNESSES",
    "WORDS",
    "Analysis",
    "Comparison",
    "Experiment",
    "Figure",
    "Question",
    "Record",
    "Rule",
    "Setting",
    "Verdict",
    "judge",
]

Setting = dict[str, Any]
Record = dict[str, Any]

SIZES = ("reduced", "full")
SETTING_ID = "setting_id"  # the runner adds this field to every record; `run` must not
OWN = "estimators"
"""the entry of a setting that names estimators beside the experiment's own methods, with the digests of their files"""
EXTRAS = {"llm": ("torch", "transformers", "reasoning_gym")}
"""optional extra of the project -> the modules that an experiment which needs it imports, inside its functions only"""


def _is_claim(claim: str) -> bool:
    return re.fullmatch(r"C[1-9]\d*", claim) is not None


@dataclass(frozen=True)
class Figure:
    """A picture of the records: a plot as data (`simulations.drawing.plot`), which is shown in light and dark and to be
    explored; or a matplotlib figure, or a function that draws one from the records, which is shown as it is.

    `alt` is what a reader who cannot see the picture needs: what is on the axes and what they show. Without it the
    caption serves.
    """

    name: str
    draw: Any
    caption: str
    alt: str = ""


@dataclass(frozen=True)
class Analysis:
    """What an experiment concludes."""

    verdicts: list[Verdict]
    figures: list[Figure] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """One question and how it is answered. `id` is the name of its module; `claims` are rows of the claims table.

    `extra` names the optional dependencies that `run` needs, a key of `EXTRAS`; "" for the base installation.

    Raises:
        InputError: if `id` is not a lower-case identifier (or is `quick`), a claim is not written like `C4`, or nobody
            knows the extra.
    """

    id: str
    question: str
    claims: tuple[str, ...]
    settings: Callable[[str], list[Setting]]
    run: Callable[[Setting], list[Record]]
    analyse: Callable[[list[Record]], Analysis]
    extra: str = ""
    takes_estimators: bool = False
    """whether `run` also runs the methods of `simulations.methods.own_methods(setting)`"""
    no_estimators: str = ""
    """why not, as what the experiment does"""
    world: Callable[[str, str], list[Record]] | None = None
    """`world(mode, key)`: records in which the answer to question `key` is known, for the tests of its analysis; the
    modes are those of `tests/simulations/worlds.py`, which has the worlds of the experiments without"""

    def __post_init__(self) -> None:
        if self.extra and self.extra not in EXTRAS:
            raise unknown_name(f"{self.id}.extra", self.extra, EXTRAS)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.id) or self.id == "quick":
            raise InputError(f"Experiment.id: {self.id!r} cannot be used; choose a lower-case identifier but 'quick'")
        if self.takes_estimators and self.no_estimators:
            raise InputError(f"{self.id}.no_estimators: it takes some; drop the reason why not")
        for claim in self.claims:
            if not _is_claim(claim):
                raise InputError(f"{self.id}.claims: {claim!r} is not a claim of the project; write it like 'C4'")

    def with_estimators(self, names: Iterable[str]) -> "Experiment":
        """The same with estimators of anyone's among its methods: each setting also names them and their source.

        Records bear the names. The digest of a function's file makes a run of another version another run.

        Raises:
            InputError: for a name given twice, and what is no estimator.
        """
        names = list(names)
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"--estimator: {name!r} is given twice")
        own = {name: digest_of(name) for name in names}
        listed = self.settings
        return replace(self, settings=lambda size: [{**setting, OWN: own} for setting in listed(size)])

    @property
    def missing(self) -> list[str]:
        """Modules of its extra that are not installed."""
        return [name for name in EXTRAS.get(self.extra, ()) if importlib.util.find_spec(name) is None]


def plain(value: Any, place: str) -> Any:
    """`value` in JSON's own types: NumPy scalars and arrays become numbers and lists, tuples become lists.

    Raises:
        InputError: at a NaN, an infinity, a key that is not a string, or a type JSON does not have; it names `place`.

    >>> plain({"lag": (1, 2)}, "toy/0")
    {'lag': [1, 2]}
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{place}: key {key!r} is not a string; JSON has only string keys")
        return {key: plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{place}: {value!r} is not a JSON number; record None or a word that says why")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"{place}: {type(value).__name__} is not a JSON value; record numbers, strings, lists or dicts")


def canonical(value: Any) -> str:
    """One JSON line, keys in the order given, floats by `repr`: the same value always gives the same bytes."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def digest(text: str | bytes) -> str:
    """SHA-256, as hexadecimal digits."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def digest_of(estimator: str) -> str:
    """SHA-256 of the file that an estimator's name leads to; empty for a name of the catalogue.

    Raises:
        InputError: for what is no estimator.
    """
    estimator_named(estimator)
    source = source_of(estimator)
    return "" if source is None else digest(source.read_bytes())


def one_line(error: BaseException) -> str:
    """An exception as one line; our own input errors already name everything."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def encode(records: list[Record], setting_id: str) -> bytes:
    """Records as JSON lines, each starting with the id of its setting.

    Raises:
        InputError: if there is none, or one is not a dict of finite JSON values; it names setting, record and field.
    """
    if not isinstance(records, list) or not records:
        raise InputError(f"{setting_id}: run returned {records!r:.60}; return a non-empty list of records")
    lines = []
    for number, record in enumerate(records):
        place = f"{setting_id} record {number}"
        if not isinstance(record, dict) or SETTING_ID in record:
            raise InputError(f"{place}: {record!r:.60} is not a dict without the field {SETTING_ID!r}; return dicts")
        lines.append(canonical({SETTING_ID: setting_id, **plain(record, place)}) + "\n")
    return "".join(lines).encode()


def settings_of(experiment: Experiment, size: str) -> list[Setting]:
    """The settings of one size in plain JSON, checked.

    Raises:
        InputError: if the list is empty, two settings are equal, or one is not a dict of JSON values.
    """
    try:
        listed = list(experiment.settings(size))
    except Exception as error:
        raise InputError(f"{experiment.id}: settings({size!r}) raised {one_line(error)}; mend it") from error
    settings = [plain(setting, f"{experiment.id}/{number}") for number, setting in enumerate(listed)]
    if not settings:
        raise InputError(f"{experiment.id}: settings({size!r}) is empty; list at least one setting")
    seen: dict[str, int] = {}
    for number, setting in enumerate(settings):
        if not isinstance(setting, dict):
            raise InputError(f"{experiment.id}/{number}: the setting is a {type(setting).__name__}; make it a dict")
        first = seen.setdefault(canonical(setting), number)
        if first != number:
            raise InputError(f"{experiment.id}/{number}: equals {experiment.id}/{first}; give each its own seed")
    return settings


def records_in_process(experiment: Experiment, size: str) -> list[Record]:
    """All records of a sweep in setting order, as `analyse` receives them, without workers or files: for tests."""
    body = b""
    for number, setting in enumerate(settings_of(experiment, size)):
        body += encode(experiment.run(setting), f"{experiment.id}/{number}")
    return [json.loads(line) for line in body.splitlines()]


def discover(package: str = "simulations.questions") -> dict[str, Experiment]:
    """Every `EXPERIMENT` in the modules of `package`, by id, in alphabetical order.

    Raises:
        InputError: if a module cannot be imported, or its experiment does not bear the module's name.
    """
    found = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.ispkg or info.name.startswith("_"):
            continue
        try:
            experiment = getattr(importlib.import_module(f"{package}.{info.name}"), "EXPERIMENT", None)
        except Exception as error:
            where = f"{package.replace('.', '/')}/{info.name}.py"
            raise InputError(f"{where}: cannot be imported ({one_line(error)}); mend or remove it") from error
        if experiment is None:
            continue
        if experiment.id != info.name:
            raise InputError(
                f"{package.replace('.', '/')}/{info.name}.py: its id is {experiment.id!r}; name both alike"
            )
        found[experiment.id] = experiment
    return found


def source_files(experiment: Experiment) -> dict[str, Path]:
    """The modules that decide what an experiment computes: its own and all of ours that they import, by name.

    "Ours" is vcposim, llm_bridge and the top-level package of the experiment. Imports are read from the syntax tree, so
    those inside functions count as well; what other packages do is recorded by their versions.
    """
    functions: list[Any] = [experiment.settings, experiment.run, experiment.analyse]
    roots = [(f.func if isinstance(f, functools.partial) else f).__module__ for f in functions]
    ours = {"vcposim", "llm_bridge", *(name.partition(".")[0] for name in roots)}
    files: dict[str, Path] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        path = _module_file(name) if name not in files and name.partition(".")[0] in ours else None
        if path is not None:
            files[name] = path
            waiting.extend(_imports(name, path.name == "__init__.py", path.read_bytes()))
    return dict(sorted(files.items()))


def _module_file(name: str) -> Path | None:
    """Where a module's source is; None for what is not a module (`from m import f` may name a function)."""
    try:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec else None
    except (ImportError, ValueError):  # the parent is no package; or `__main__`, which has no spec
        origin = getattr(sys.modules.get(name), "__file__", None)
    return Path(origin) if origin and origin.endswith(".py") else None


@functools.cache  # experiments share most modules: each is parsed once, unless it changes
def _imports(name: str, is_package: bool, source: bytes) -> tuple[str, ...]:
    """Names a module may import, too many rather than too few: for `from a import b`, `a` and `a.b`."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = [".".join(package[:depth]) for depth in range(1, len(package) + 1)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found += [alias.name[: match.start()] for match in re.finditer(r"\.|$", alias.name)]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [base[: match.start()] for match in re.finditer(r"\.|$", base)]
            found += [f"{base}.{alias.name}" for alias in node.names]
    return tuple(dict.fromkeys(found))


def source_hash(experiment: Experiment) -> str:
    """SHA-256 over names and contents of `source_files`; it changes when what computes the records may have."""
    return digest("".join(f"{name} {digest(path.read_bytes())}\n" for name, path in source_files(experiment).items()))


def select(names: list[str], experiments: Mapping[str, Experiment]) -> list[Experiment]:
    """The experiments named, once each, in the order given; `quick` stands for all whose extra is installed.

    Raises:
        InputError: for a name nobody has (it suggests the nearest), or one whose extra is not installed.
    """
    chosen: dict[str, Experiment] = {}
    for name in names:
        if name != "quick" and name not in experiments:
            raise unknown_name("experiment", name, [*experiments, "quick"])
        if name != "quick" and (missing := experiments[name].missing):
            remedy = f"python -m pip install -e '.[{experiments[name].extra}]'"
            raise InputError(f"{name}: needs {', '.join(missing)}; install with: {remedy}")
        able = {key: e for key, e in experiments.items() if not e.missing}
        chosen.update(able if name == "quick" else {name: experiments[name]})
    return list(chosen.values())
