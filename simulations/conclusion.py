"""What `run quick` concluded, so that asking again need not judge and draw again.

`conclusion.json`, beside the report, holds the judged sections without their figures, and hashes: of everything they
were computed from (sources, summaries, versions of all packages, every file of every run), of the report, and of the
sections themselves. It is believed only while all of that is as it was; anything else, a byte edited by hand included,
is made again.
"""

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulations.protocol import canonical, digest
from simulations.runner import RunFolder, write_atomically
from simulations.summaries import Section, of_json, to_json

FILE = "conclusion.json"
ROOT = Path(__file__).parent.parent
OURS = ("simulations", "vcposim", "llm_bridge")
"""packages whose code, texts and committed summaries decide what is concluded, or the report's looks"""
SUFFIXES = (".py", ".json", ".jsonl", ".md", ".toml", ".mplstyle")


def _hashed(folder: Path, paths: Iterable[Path]) -> str:
    return digest(canonical([[str(path.relative_to(folder)), digest(path.read_bytes())] for path in sorted(paths)]))


def sources() -> str:
    """A hash of the code and the committed files that conclude, of Python, and of the versions of all packages."""
    files = (path for package in OURS for path in (ROOT / package).rglob("*") if path.suffix in SUFFIXES)
    versions = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    return digest(canonical([_hashed(ROOT, files), versions, platform.python_version()]))


def _seal(source: str, folders: Sequence[RunFolder], report: Path, sections: list[Any]) -> dict[str, str]:
    runs = [[f.experiment.id, f.size, _hashed(f.path, (p for p in f.path.rglob("*") if p.is_file()))] for f in folders]
    return {
        "inputs": digest(canonical([source, runs])),
        "report": digest(report.read_bytes()),
        "sections": digest(canonical(sections)),
    }


def keep(source: str, folders: Sequence[RunFolder], report: Path, sections: Sequence[Section]) -> None:
    """Write down what was concluded from `folders` by `source` (of `sources`) and stands in `report`."""
    told = [to_json(replace(section, figures=[])) for section in sections]
    about = _seal(source, folders, report, told) | {"told": told}
    write_atomically(report.parent / FILE, (json.dumps(about, ensure_ascii=False, indent=1) + "\n").encode())


def kept(source: str, folders: Sequence[RunFolder], report: Path) -> list[Section] | None:
    """The sections as `keep` wrote them; None if there are none, or if anything is not as it was then."""
    try:
        about = json.loads((report.parent / FILE).read_bytes())
        told = about.pop("told")
        return [of_json(section) for section in told] if about == _seal(source, folders, report, told) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
