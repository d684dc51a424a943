"""What a reader needs of a run without its records: verdicts, numbers, provenance and the data behind each figure.

A full run writes `summary.json` beside its records; `python -m simulations keep DIR` copies it to
`simulations/results/`, which is committed, and from which report and claims are rebuilt without a run.
"""

import base64
import gzip
import json
import re
import traceback as tracebacks
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from simulations.claims import RESULTS
from simulations.drawing import adaptive, draw
from simulations.methods import standing
from simulations.protocol import OWN, Analysis, Experiment, Record, Verdict, digest, one_line, plain, source_hash
from simulations.runner import RunFolder, read_provenance
from vcposim.errors import InputError, unknown_name

KEPT = ("reproduce", "git", "source_sha256", "settings_sha256", "python", "platform", "packages")
VECTOR_LIMIT = 45_000
"""bytes; a figure of an experiment's own drawing with very many points is smaller, and faster to show, as pixels"""
UNESCAPED = " <>/=:;,.()'-+*!?@[]{}|^`~$"
"""what a data URI in double quotes holds as it is"""


@dataclass(frozen=True)
class Section:
    """One experiment at one size: from a run, or from a summary of one.

    Figures are dicts with name, caption, alt and either `plot` (data) or `image` (a data URI), or `error`.
    """

    id: str
    question: str
    claims: tuple[str, ...]
    size: str
    provenance: dict[str, Any]
    settings: int
    records: int
    verdicts: list[Verdict]
    figures: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None
    error: str = ""
    traceback: str = ""
    source_changed: bool = False
    beside: "Section | None" = None
    """the reduced run of the same experiment, if this one is full"""
    estimators: tuple[str, ...] = ()
    """what `run --estimator` added to its methods; such a run is beside the experiment, and settles no claim"""
    standing: list[list[str]] = field(default_factory=list)
    """with estimators: every method from best to worst, rows of `simulations.methods.standing`"""

    @property
    def name(self) -> str:
        """`C4 (quick)`: experiment and size, and whose estimators were added."""
        own = f", with {', '.join(self.estimators)}" if self.estimators else ""
        return f"{self.id} ({self.size}{own})"

    @property
    def settles(self) -> bool:
        """Whether its verdicts are the experiment's own."""
        return self.size == "full" and not self.error and not self.estimators


def load_section(path: Path, experiments: Mapping[str, Experiment]) -> Section:
    """Read one complete run back from its record files, and analyse it.

    Raises:
        InputError: if it is of an unknown experiment, or its provenance or a record file is damaged.
    """
    provenance = read_provenance(path)
    try:
        name, size, settings = (provenance[key] for key in ("experiment", "size", "settings"))
    except KeyError as error:
        raise InputError(f"{path / 'provenance.json'}: has no {error}; choose another folder") from None
    if not isinstance(settings, list):
        raise InputError(f"{path / 'provenance.json'}: its settings are no list; choose another folder")
    if name not in experiments:
        raise unknown_name(f"{path / 'provenance.json'}: experiment", str(name), experiments)
    experiment = experiments[name]
    records = RunFolder(path, experiment, size, settings).records()
    estimators = tuple(settings[0].get(OWN, ())) if settings and isinstance(settings[0], dict) else ()
    section = Section(
        name,
        experiment.question,
        experiment.claims,
        size,
        {key: provenance.get(key) for key in KEPT},
        len(settings),
        len(records),
        [],
        path=path,
        source_changed=provenance.get("source_sha256") != source_hash(experiment),
        estimators=estimators,
        standing=standing(records, estimators) if estimators else [],
    )
    try:
        analysis = experiment.analyse(records)
    except Exception as error:
        return replace(section, error=one_line(error), traceback=tracebacks.format_exc())
    return replace(section, verdicts=analysis.verdicts, figures=figures_of(analysis, records))


def figures_of(analysis: Analysis, records: list[Record]) -> list[dict[str, Any]]:
    """The figures as data: a plot as it is, another as its picture, one that cannot be drawn as its error."""
    out = []
    for figure in analysis.figures:
        about = {"name": figure.name, "caption": figure.caption, "alt": figure.alt or figure.caption}
        try:
            if isinstance(figure.draw, dict):
                out.append({**about, "plot": plain(figure.draw, figure.name)})
            else:
                out.append({**about, "image": image(figure.draw(records) if callable(figure.draw) else figure.draw)})
        except Exception as error:
            out.append({**about, "error": one_line(error), "traceback": tracebacks.format_exc()})
    return out


def image(drawn: Any) -> str:
    """A matplotlib figure as a data URI: vector if small, pixels if not; equal figures give equal bytes."""
    vector = svg(drawn)
    if len(vector) <= VECTOR_LIMIT:
        return vector_uri(vector)
    drawn.set_layout_engine("none")  # it is laid out
    return f"data:image/png;base64,{base64.b64encode(png(drawn)).decode()}"


def vector_uri(vector: bytes) -> str:
    """As text: base64 takes a fifth more. What ends an attribute, an entity or a URL is escaped."""
    return "data:image/svg+xml," + quote(vector.replace(b"\n", b" "), safe=UNESCAPED)


def svg(drawn: Any) -> bytes:
    """A matplotlib figure as a vector, its places to hundredths of a point; its words stay as they are."""
    import io

    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "vcposim", "svg.fonttype": "none"}):
        drawn.savefig(file, format="svg", metadata={"Date": None})
    short = re.sub(rb"<[^>]+>", lambda tag: re.sub(rb"(\.\d\d)\d+", rb"\1", tag[0]), file.getvalue())
    return re.sub(rb"\s*\n\s*", b"\n", short)


def png(drawn: Any) -> bytes:
    """A matplotlib figure in pixels of few colors: lines and letters need no more."""
    import io

    from PIL import Image

    file, few = io.BytesIO(), io.BytesIO()
    drawn.savefig(file, format="png", dpi=130, metadata={"Software": None})
    Image.open(file).convert("RGB").quantize(64).save(few, format="png", optimize=True)
    return few.getvalue()


def picture(figure: Mapping[str, Any]) -> str:
    """The figure as a data URI that shows it on light and on dark paper, as the reader's screen asks for."""
    if "image" in figure:
        return figure["image"]
    return vector_uri(adaptive(svg(draw(figure["plot"])).decode()).encode())


def against_full(section: Section, full: Section | None) -> Section:
    """What a run that does not settle may say: what the full one says, or that it does not decide."""
    if section.size == "full" and not section.estimators:
        return section
    known = {v.key: v.verdict for v in full.verdicts} if full else {}

    def word(v: Verdict) -> Verdict:
        if v.verdict in ("undecided", "not judged"):
            return v
        if v.key and known.get(v.key) == v.verdict:
            return replace(v, number=f"{v.number}; agrees with the full run")
        return replace(v, verdict="undecided", condition="", number=f"{v.number}; only a full run settles it")

    return replace(section, verdicts=[word(v) for v in section.verdicts])


# --- files ------------------------------------------------------------------------------------------------------------


def to_json(section: Section) -> dict[str, Any]:
    """The summary of a run."""
    about = {k: getattr(section, k) for k in ("id", "question", "claims", "size", "provenance", "settings", "records")}
    figures = [f for f in section.figures if "error" not in f]
    return {
        **about,
        "claims": list(section.claims),
        "verdicts": [vars(v) for v in section.verdicts],
        "figures": figures,
    }


def of_json(data: Mapping[str, Any]) -> Section:
    """A section from its summary."""
    fields = {k: data[k] for k in ("id", "question", "size", "provenance", "settings", "records", "figures")}
    return Section(**fields, claims=tuple(data["claims"]), verdicts=[Verdict(**v) for v in data["verdicts"]])


def dump(section: Section) -> bytes:
    """The summary's bytes; equal sections give equal bytes."""
    lines = [f'"{k}": {json.dumps(v, ensure_ascii=False, allow_nan=False)}' for k, v in to_json(section).items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read(path: Path) -> Section:
    """A summary file, plain or gzipped.

    Raises:
        InputError: if it is not one.
    """
    try:
        data = path.read_bytes()
        return of_json(json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a summary of a run ({one_line(error)}); run and keep it again") from None


def committed(names: Iterable[str], folder: Path = RESULTS) -> dict[str, Section]:
    """The committed summaries of these experiments, by id."""
    return {name: read(path) for name in sorted(names) if (path := folder / f"{name}.json").exists()}


def once_each(sections: Iterable[Section]) -> list[Section]:
    """An experiment in both sizes appears once, as the full run with the reduced one beside it; those with estimators
    of anyone's follow, all of them."""
    by_id: dict[str, dict[str, Section]] = {}
    own = []
    for s in sections:
        if s.estimators:
            own.append(s)
        else:
            by_id.setdefault(s.id, {}).setdefault(s.size, s)
    out = []
    for name in sorted(by_id):
        sizes = by_id[name]
        if "full" in sizes:
            out.append(replace(sizes["full"], beside=sizes.get("reduced")))
        else:
            out.append(next(iter(sizes.values())))
    return out + own


def of_settings(section: Section, experiment: Experiment, settings: list[dict[str, Any]]) -> bool:
    """Whether a summary is of these settings, so that it is what `run` would compute."""
    from simulations.protocol import canonical

    return section.provenance.get("settings_sha256") == digest(canonical(settings))
