"""From estimators to records on disk: units of work with any number of workers or shards, killed and resumed.

A folder holds

    provenance.json            written once: what computes the records, and what was asked for
    records/<unit>.json        one measurement of one estimator, and a second line with its SHA-256
    comparison.json            everything, written when the last record is there
    comparison.html            the page
    cost.js                    CPU times, the one thing here that is not the same twice

A unit (estimator x setting) depends on nothing but itself and the source, and a record appears whole or not at all. So
a run that was killed, resumed, computed by any number of workers, or in shards that shared a folder or had their
`records/` copied into one, ends in the same bytes. Workers come through `concurrent.futures.Executor`.
"""

import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

from vcposim import __version__
from vcposim.catalogue import CATALOGUE, entry
from vcposim.catalogue.loading import source_of
from vcposim.comparison import transformers
from vcposim.comparison.design import REFERENCE, MeasureSetting, Size, canonical, digest
from vcposim.comparison.measure import Measured, measured
from vcposim.comparison.workers import interrupts_held, write_atomically
from vcposim.errors import InputError

SCHEMA = "vcposim.comparison/1"
PACKAGES = ("numpy", "scipy", "array-api-compat", "hypothesis")
SAME = {
    "schema": "another format",
    "size": "another size",
    "settings_sha256": "other settings",
    "estimators": "other estimators, or estimators that have changed since",
    "source_sha256": "another version of vcposim",
    "packages": "other package versions",
    "python": "another Python",
}
NOT_COMPUTING = ("commands", "pages", "replay", "pipeline")
"""rooms that no measurement passes through"""


class RunSource(TypedDict):
    """What a run is computed by."""

    schema: str
    size: str
    settings_sha256: str
    vcposim: str
    source_sha256: str
    packages: dict[str, str | None]
    python: str


class RunIdentity(RunSource):
    """What determines the records of a run, as provenance.json has it: estimators with their hashes too."""

    estimators: dict[str, str]


@dataclass(frozen=True)
class WorkUnit:
    """One measurement of one estimator."""

    estimator: str
    setting: MeasureSetting

    @property
    def name(self) -> str:
        """As a file name, no other unit's: letters and digits of both, and a hash where others stand."""

        def plain(text: str) -> str:
            safe = re.sub(r"[^A-Za-z0-9_.]+", "-", text)
            return safe if safe == text else f"{safe}-{digest(text)[:8]}"

        return f"{plain(self.estimator)}/{plain(self.setting.name)}"


@dataclass(frozen=True)
class Folder:
    """What is compared at which size, and the folder its records are in (or will be).

    `estimators` are measured; `witness` adds one unit of the group mean, by which a leaderboard is recognized. Where
    transformers are trained, the group mean's are too: no leaderboard has them.
    """

    path: Path
    estimators: tuple[str, ...]
    size: Size
    witness: bool = False

    @cached_property
    def settings(self) -> list[MeasureSetting]:
        """The settings of the size."""
        return self.size.settings()

    @cached_property
    def units(self) -> list[WorkUnit]:
        """Every unit of work; shard i of n takes each n-th, and so a bit of every setting."""
        found = [WorkUnit(name, setting) for setting in self.settings for name in self.estimators]
        if REFERENCE not in self.estimators:
            found += [WorkUnit(REFERENCE, setting) for setting in self.size.transformers]
            found += [self.witness_unit()] * self.witness
        return found

    def witness_unit(self) -> WorkUnit:
        """The group mean in the cheapest regime."""
        return WorkUnit(REFERENCE, self.size.learning()[0])

    @cached_property
    def identity(self) -> RunIdentity:
        """Two runs that agree here end in the same bytes."""
        packages = (*PACKAGES, *transformers.PACKAGES) if self.size.transformers else PACKAGES
        return {
            "schema": SCHEMA,
            "size": self.size.name,
            "settings_sha256": self.size.digest(),
            "estimators": {name: fingerprint(name) for name in self.estimators},
            "vcposim": __version__,
            "source_sha256": source_hash(bool(self.size.transformers)),
            "packages": {name: _version(name) for name in packages},
            "python": platform.python_version(),
        }

    def start(self) -> None:
        """Create the folder, or find a run in it that this one goes on with. Shards may all do so at once.

        Raises `InputError` if it holds something else, or a run that differs in one of `SAME`.
        """
        file = self.path / "provenance.json"
        if not file.exists():
            # begun by another shard, or by one that was killed: provenance.json and what is written on the way to it
            foreign = self.path.is_file() or (
                self.path.is_dir() and not all(known.name.startswith(file.name) for known in self.path.iterdir())
            )
            if foreign and not file.exists():
                raise InputError(f"--out: {self.path} is not empty and holds no comparison; choose another --out")
            if not foreign:
                self.path.mkdir(parents=True, exist_ok=True)
                write_atomically(file, (json.dumps(self.identity, indent=1, ensure_ascii=False) + "\n").encode())
        try:
            known = json.loads(file.read_bytes())
        except ValueError as error:
            raise InputError(f"{file}: cannot be read ({error}); choose another --out") from None
        now: Mapping[str, object] = self.identity
        for key, words in SAME.items():
            if known.get(key) != now[key]:
                raise InputError(
                    f"--out: {self.path} holds a comparison of {words}; choose another --out, or delete that folder"
                )

    def file(self, unit: WorkUnit) -> Path:
        """Where the record of a unit is."""
        return self.path / "records" / f"{unit.name}.json"

    def keep(self, unit: WorkUnit, record: Measured) -> None:
        """Write a record, whole."""
        path, line = self.file(unit), canonical(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{line}\n{self._seal(unit, line)}\n".encode())

    def record(self, unit: WorkUnit) -> Measured | None:
        """The record of a unit; None if there is none, or it is cut short or altered."""
        try:
            line, seal, end = self.file(unit).read_text().split("\n")
        except (OSError, ValueError):
            return None
        known: Measured | None = json.loads(line) if seal == self._seal(unit, line) and not end else None
        return known

    def _seal(self, unit: WorkUnit, line: str) -> str:
        return digest(canonical([unit.estimator, asdict(unit.setting), line]))

    def missing(self) -> list[WorkUnit]:
        """Units without a sound record."""
        return [unit for unit in self.units if self.record(unit) is None]

    def records(self) -> dict[str, dict[str, Measured]]:
        """Estimator -> name of a setting -> record, of a folder that misses none."""
        found: dict[str, dict[str, Measured]] = {name: {} for name in self.estimators}
        for unit in self.units:
            record = self.record(unit)
            assert record is not None
            found.setdefault(unit.estimator, {})[unit.setting.name] = record
        return found


def fingerprint(name: str) -> str:
    """A hash of what an estimator is: the entry's own data, or the bytes of the file that its function is in."""
    if name in CATALOGUE:
        return digest(re.sub(r" at 0x[0-9a-f]+", "", repr(entry(name).estimator)))
    source = source_of(name)
    return sha256(source.read_bytes()).hexdigest() if source is not None and source.is_file() else digest(name)


def source_hash(trained: bool = False) -> str:
    """SHA-256 over names and contents of all that can change a record; of llm_bridge where transformers are trained."""
    root = Path(__file__).parents[1]
    paths = sorted(path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in NOT_COMPUTING)
    if trained:
        paths += sorted((root.parent / "llm_bridge").rglob("*.py"))
        root = root.parent
    return digest("".join(f"{path.relative_to(root).as_posix()} {digest(path.read_text())}\n" for path in paths))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def sweep(
    folder: Folder,
    executor: Callable[[], Any],
    *,
    shard: tuple[int, int] = (1, 1),
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> int:
    """Compute what is missing of a shard, keep each record as soon as it is there; how many units others still owe.

    `executor` makes a context of `concurrent.futures.Executor`, and is not asked if nothing is missing. Raises
    `InputError` if a worker died; what had finished is kept.
    """
    number, count = shard
    mine = folder.units[number - 1 :: count]
    todo = [unit for unit in mine if folder.record(unit) is None]
    progress(len(mine) - len(todo), len(mine), "")
    if todo:
        with executor() as pool:
            with interrupts_held():
                waiting: dict[Future[Measured], WorkUnit] = {
                    pool.submit(measured, unit.estimator, unit.setting): unit for unit in todo
                }
            for done, job in enumerate(_finished(waiting), 1 + len(mine) - len(todo)):
                folder.keep(waiting[job], job.result())
                progress(done, len(mine), waiting[job].name)
    return len(folder.missing())


def _finished(waiting: dict[Future[Measured], WorkUnit]) -> Iterator[Future[Measured]]:
    for job in as_completed(waiting):
        error = job.exception()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                f"{waiting[job].name}: a worker ended before its work (out of memory?); what had finished is kept: "
                "run the same command again, with fewer --workers"
            ) from None
        yield job
