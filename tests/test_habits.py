"""What CONTRIBUTING, CHANGELOG and CITATION say is so."""

import ast
import importlib.util
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import vcposim

ROOT = Path(__file__).parents[1]
PACKAGES = ("vcposim", "simulations", "llm_bridge", "proofs")
SOURCES = {path: path.read_text() for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
parsed = cache(ast.parse)
"""each file once for all tests"""
SHARED_NAMES: dict[str, str] = {}
"""classes of one name in two files -> why that cannot be misread"""
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MOVED = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("before", "now"), MOVED)
def test_a_module_is_where_the_changelog_says_and_no_longer_where_it_was(before: str, now: str) -> None:
    def place(name: str) -> Path | None:
        module, package = (ROOT / f"{name.replace('.', '/')}{end}" for end in (".py", "/__init__.py"))
        return module if module.exists() else package if package.exists() else None

    assert place(now) is not None
    assert before == now or place(before) is None or (place(before) or ROOT).name == "__init__.py"


def test_all_moves_are_listed() -> None:
    assert len(MOVED) > 60


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vcposim.__version__"}
    assert f"\nversion: {vcposim.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {vcposim.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_files_that_contributing_names_exist() -> None:
    paths = set(re.findall(r"`((?:vcposim|llm_bridge|simulations|tests|proofs)/[\w/]+(?:\.py|/))`", CONTRIBUTING))
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
    rooms = set(re.findall(r"^\| `(\w+)/` \|", CONTRIBUTING, re.MULTILINE))
    assert rooms == {path.name for path in (ROOT / "vcposim").iterdir() if (path / "__init__.py").exists()}


@pytest.mark.parametrize("tool", ["ruff", "mypy", "pre_commit", "pytest", "xdist"])
def test_tools_of_contributing_are_in_the_extra_dev(tool: str) -> None:
    named = {"xdist": "pytest-xdist", "pre_commit": "pre-commit"}.get(tool, tool)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    assert any(line.startswith(f"{named}>") for line in extra)
    assert tool in CONTRIBUTING.replace("pre-commit", "pre_commit").replace("-n 3", "xdist")
    assert importlib.util.find_spec(tool) or tool == "pre_commit"


def public_classes(tree: ast.Module) -> list[str]:
    """Classes, and aliases that are named like one (`Row = dict[str, Any]`), but for those private to their file."""
    aliases = [
        target.id
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in getattr(statement, "targets", [getattr(statement, "target", None)])
        if isinstance(target, ast.Name) and re.fullmatch("[A-Z]+[a-z][A-Za-z]*", target.id)
    ]
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] + aliases
    return [name for name in found if not name.startswith("_")]


def clashes(sources: dict[Path, str]) -> dict[str, list[str]]:
    """Names of two or more classes, with their files."""
    places: dict[str, list[str]] = {}
    for path, text in sources.items():
        for name in public_classes(parsed(text)):
            places.setdefault(name, []).append(path.name)
    return {name: files for name, files in places.items() if len(files) > 1}


@pytest.mark.slow
def test_no_two_classes_share_a_name() -> None:
    assert clashes(SOURCES).keys() == SHARED_NAMES.keys()
    planted = {**SOURCES, Path("planted.py"): "Batch = dict[str, int]\nclass Weighting: ...\nclass _Log: ..."}
    assert clashes(planted).keys() - SHARED_NAMES.keys() == {"Batch", "Weighting"}


# ------------------------------------------------------------------------------------------- what travels, and what not

ENTRY_POINTS = (
    "simulations/__main__.py",
    "llm_bridge/train.py",
    "llm_bridge/campaign.py",
    "llm_bridge/models/__main__.py",
)
"""beside the subcommands: files in which a command line ends"""


def travelling(name: str, text: str) -> list[str]:
    """Functions that an `argparse.Namespace` reaches although it should have been read before.

    A command line ends in `run`, `main` or `..._command` of a file for that. What these hand it to reads it into
    values and takes nothing else, but the name of a default: what computes takes those values.
    """
    ends = name.startswith("vcposim/commands/") or name in ENTRY_POINTS
    found = []
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            said = [ast.unparse(one.annotation) if one.annotation else "" for one in given]
            if not any(re.search(r"\bNamespace\b", one) for one in said):
                continue
            entry = re.fullmatch(r"_?(run|main)|\w+_command", node.name)
            if not ends or not (entry or all(one in ("argparse.Namespace", "str") for one in said)):
                found.append(f"{name}: {node.name}")
    return found


def test_no_namespace_travels_into_computation() -> None:
    names = {path.relative_to(ROOT).as_posix(): text for path, text in SOURCES.items()}
    assert [line for name, text in names.items() for line in travelling(name, text)] == []
    planted = "def survey(cluster: Cluster, a: argparse.Namespace) -> int: ..."
    assert travelling("vcposim/commands/plan.py", planted) == ["vcposim/commands/plan.py: survey"]
    assert travelling("vcposim/learning/tasks.py", "def run(arguments: Namespace) -> int: ...")
    assert not travelling("vcposim/commands/plan.py", "def lengths_of(a: argparse.Namespace) -> Lengths: ...")


BOUNDARIES = {
    "vcposim/results.py": "records of a result, which are rows of a table",
    "vcposim/problems/problem_file.py": "a problem file, as JSON gives it",
    "vcposim/testing/report_card.py": "rows of moments, printed as a table or as JSON",
    "vcposim/pages/": "Vega-Lite, which is JSON",
    "vcposim/replay/as_json.py": "answers of `replay --json`",
    "vcposim/replay/items.py": "a record, as its file has it",
    "vcposim/replay/containers.py": "the same, of slime and miles",
    "vcposim/replay/layouts.py": "the same",
    "vcposim/replay/columns.py": "the same: the first one says which column is which field",
    "vcposim/replay/unfolding.py": "the same, before it is one rollout",
    "vcposim/replay/records.py": "the same; what leaves it are numbers",
    "vcposim/replay/metrics.py": "rows of a log; what leaves its reader are numbers",
    "vcposim/commands/": "answers of `--json` and lines of tables; options of a page's plots",
    "simulations/protocol.py": "settings and records, which are JSON by contract",
    "simulations/runner.py": "provenance.json",
    "simulations/summaries.py": "summary.json",
    "simulations/verdicts.py": "a rule in summary.json",
    "simulations/drawing.py": "plots as data",
    "simulations/claims.py": "proofs.json, and rows of `claims --json`",
    "simulations/log.py": "the same rows",
    "simulations/report.py": "the same rows; options of the page's plots",
    "simulations/bench/": "records of what was timed, and configurations of Hugging Face",
    "llm_bridge/train.py": "what a file of settings says, before `TrainConfig` reads it",
    "llm_bridge/training/config.py": "the same, and config.json",
    "llm_bridge/training/folder.py": "the same",
    "llm_bridge/training/checkpoints.py": "what torch saves",
    "llm_bridge/training/sharding.py": "what an optimizer saves",
    "llm_bridge/training/dumps.py": "records of rollouts, as they are written",
    "llm_bridge/training/trainer.py": "the same",
    "llm_bridge/campaign.py": "campaign.json",
    "llm_bridge/campaign_report.py": "campaign.json",
    "llm_bridge/models/store.py": "about.json",
    "llm_bridge/tasks/": "options of Reasoning Gym's datasets, and their items",
    "llm_bridge/adapters/trl.py": "TRL's batches",
    "llm_bridge/adapters/verl.py": "verl's metrics",
    "proofs/": "values of a theorem's symbols by name",
}
"""where a dict of anything may be taken or returned -> what it is: JSON read or written, or another library's"""

ANYTHING = re.compile(r"\b(dict|Mapping|MutableMapping)\[str, (Any|object)\]")


def dicts_of_anything(text: str) -> list[str]:
    """Parameters, results, fields and names for types that are a dict of anything; what stays in a function may be.

    `state_dict` and its like are torch's protocol.
    """
    tree = parsed(text)

    def loose(annotation: ast.expr | None) -> bool:
        return annotation is not None and bool(ANYTHING.search(ast.unparse(annotation)))

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "state_dict" not in node.name:
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found += [f"{node.name}({one.arg})" for one in given if loose(one.annotation)]
            found += [f"{node.name} ->"] if loose(node.returns) else []
        if isinstance(node, ast.ClassDef | ast.Module):
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and loose(part.annotation):
                    found.append(ast.unparse(part.target))
                if isinstance(part, ast.Assign) and isinstance(part.value, ast.Subscript) and loose(part.value):
                    found.append(ast.unparse(part.targets[0]))
                if isinstance(part, ast.ClassDef) and any(map(loose, part.bases)):
                    found.append(part.name)
    return found


def test_no_dict_of_anything_travels_into_computation() -> None:
    names = {path.relative_to(ROOT).as_posix(): dicts_of_anything(text) for path, text in SOURCES.items()}
    inside = {name: found for name, found in names.items() if not any(map(name.startswith, BOUNDARIES))}
    computing = [f"{name}: {one}" for name, found in inside.items() for one in found]
    assert not computing, f"take a dataclass, a TypedDict or plain arguments: {computing}"
    idle = [place for place in BOUNDARIES if not any(found and name.startswith(place) for name, found in names.items())]
    assert idle == []
    planted = "Row = dict[str, Any]\nclass A:\n    x: Mapping[str, object]\n    def f(self, y: dict[str, Any]): ..."
    assert sorted(dicts_of_anything(planted)) == ["Row", "f(y)", "x"]


# ---------------------------------------------------------------------------------------------------- what it refuses

SAYS_SO = re.compile(r"\b([Rr]aises?|[Rr]efuse[sd]?|[Rr]efusing|[Ff]ails)\b|[a-z]Error\b")


def silent(text: str) -> list[str]:
    """Public functions, methods and classes that raise in their own body, and whose docstring has no word of it.

    `run` and `main` are programs: what they refuse is a line of their output.
    """

    def own(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
                yield child
                yield from own(child)

    def raises(function: ast.FunctionDef) -> bool:
        errors = (ast.unparse(node.exc) for node in own(function) if isinstance(node, ast.Raise) and node.exc)
        return any(not error.startswith(("SystemExit", "NotImplementedError", "AssertionError")) for error in errors)

    found = []
    tree = parsed(text)
    for holder in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]:
        about = "" if isinstance(holder, ast.Module) else ast.get_docstring(holder) or ""
        for node in holder.body:
            if isinstance(node, ast.FunctionDef) and raises(node):
                of_class = node.name in ("__init__", "__post_init__", "__new__", "__call__")
                public = of_class or not (node.name.startswith("_") or node.name in ("run", "main"))
                if public and not SAYS_SO.search((ast.get_docstring(node) or "") + (about if of_class else "")):
                    found.append(getattr(holder, "name", "") + "." + node.name)
    return found


def test_what_raises_says_so() -> None:
    names = {path.relative_to(ROOT).as_posix(): text for path, text in SOURCES.items()}
    names.pop("simulations/__main__.py")  # a program throughout
    assert [f"{name}: {one}" for name, text in names.items() for one in silent(text)] == []
    spoken = 'def g(x):\n    """x. Raises."""\n    raise x'
    planted = f'def f(x):\n    """x."""\n    if x:\n        raise ValueError(x)\n\n\n{spoken}'
    assert silent(planted) == [".f"]


# ------------------------------------------------------------------------------------------- helpers that are used once

SHORT = 15
MOST_USED_ONCE = {"vcposim": 0.05, "llm_bridge": 0.102, "simulations": 0.235, "proofs": 0.24}
"""folder, without those named beside it -> share of its private functions that may be short and used once.

None of the few in rlax is. Above the share, write a helper where it is used, with a comment in the place of its name,
or let it say something that is said twice. Shares above 0.05 were counted, not chosen: they only fall."""


NAMED = (ast.Name, ast.Attribute)
LAZY = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@cache
def uses(text: str) -> Counter[str]:
    """How often each name is read, as a variable, an attribute or an import."""
    nodes = list(ast.walk(parsed(text)))
    read = [node.id if isinstance(node, ast.Name) else node.attr for node in nodes if isinstance(node, NAMED)]
    return Counter([*read, *(one.name for node in nodes if isinstance(node, ast.ImportFrom) for one in node.names)])


def private_functions(node: ast.AST) -> Iterator[ast.FunctionDef]:
    """Those of a module and of its classes; a function within a function is part of that."""
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from private_functions(inner)
        elif re.match("_(?!_)", inner.name) and isinstance(inner, ast.FunctionDef):
            yield inner


def pieces(text: str, elsewhere: Callable[[str], int] = lambda name: 0) -> tuple[int, list[str]]:
    """The number of private functions of a file, and those that are only a piece of one other function.

    That is: at most `SHORT` lines, called at one place, and neither in the file nor elsewhere (tests: a slow twin, a
    planted mistake) named again. What Python cannot write in the place of the call is no piece: what is called for each
    element of a comprehension or in a lambda, what is passed by name, a generator, a decorated function, an override.
    """
    nodes = list(ast.walk(parsed(text)))
    lazily = {inner for node in nodes if isinstance(node, LAZY) for inner in ast.walk(node)}
    called = [node.func for node in nodes if isinstance(node, ast.Call) and node not in lazily]
    written = {f.id if isinstance(f, ast.Name) else f.attr for f in called if isinstance(f, NAMED)}
    private = list(private_functions(parsed(text)))
    found = []
    for node in private:
        short = (node.end_lineno or 0) - node.lineno < SHORT
        whole = node.decorator_list or any(
            isinstance(one, ast.Yield | ast.YieldFrom) or (isinstance(one, ast.Name) and one.id == "super")
            for one in ast.walk(node)
        )
        if short and not whole and node.name in written and uses(text)[node.name] == 1 and not elsewhere(node.name):
            found.append(node.name)
    return len(private), found


@cache
def named_in_tests() -> Counter[str]:
    """As `uses`, of all tests."""
    found = Counter[str]()
    for path in (ROOT / "tests").rglob("*.py"):
        found.update(uses(path.read_text()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("folder", MOST_USED_ONCE)
def test_few_helpers_are_a_piece_of_one_function(folder: str) -> None:
    apart = tuple(f"{other}/" for other in MOST_USED_ONCE if other.startswith(f"{folder}/"))
    count, found = 0, []
    for path, text in SOURCES.items():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(f"{folder}/") and not name.startswith(apart):
            private, here = pieces(text, lambda one: named_in_tests()[one])
            count, found = count + private, found + [f"{name}: {one}" for one in here]
    assert len(found) <= MOST_USED_ONCE[folder] * count, "\n".join([f"{len(found)} of {count}:", *found])


def test_what_is_a_piece() -> None:
    use = "\n\n\ndef f(x):\n    return "
    assert pieces(f"def _g(x):\n    return x{use}_g(x)") == (1, ["_g"])
    assert pieces(f"class A:\n    def _g(self):\n        return 1{use}x._g()") == (1, ["_g"])
    long = "    x += 1\n" * SHORT
    assert pieces(f"def _g(x):\n{long}    return x{use}_g(x)") == (1, [])
    for other in ("_g(x) + _g(2)", "map(_g, x)", "[_g(one) for one in x]", "lambda: _g(x)"):
        assert pieces(f"def _g(x):\n    return x{use}{other}") == (1, [])
    for kept in ("def _g(x):\n    yield x", "@cache\ndef _g(x):\n    return x"):
        assert pieces(f"{kept}{use}_g(x)") == (1, [])
    assert pieces(f"def _g(x):\n    return x{use}_g(x)", {"_g": 1}.__getitem__) == (1, [])
