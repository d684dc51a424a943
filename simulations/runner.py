"""From settings to records on disk: sweep with workers, survive being killed, never overwrite.

A run folder holds

    provenance.json         written once, at the start: what computes the records, and what was asked for
    records/<number>.jsonl  raw records of one finished setting, and a last line with their number and SHA-256
    results.jsonl           all records in setting order; written last, so a folder that has it is complete
    errors/<number>.txt     traceback of a setting that failed (removed when it later succeeds)
    damaged/                record files that did not match their last line, set aside when a run resumes

A record file appears whole or not at all (temporary file, fsync, rename), and depends on nothing but the setting and
the source: no times, no host names, no worker count. So a run killed at any moment and started again, with any number
of workers, ends in the same bytes. `SAME` lists what has to agree before a run resumes.

Settings are computed through the `concurrent.futures.Executor` interface, so a pool of local processes and a cluster
(`cluster_executor`) are the same to `sweep`.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulations.protocol import (
    EXTRAS,
    OWN,
    Experiment,
    Record,
    Setting,
    canonical,
    digest,
    encode,
    one_line,
    settings_of,
    source_files,
    source_hash,
)
from vcposim.comparison.workers import cluster_executor, interrupts_held, local_executor, write_atomically
from vcposim.errors import InputError

__all__ = ["cluster_executor", "interrupts_held", "local_executor", "write_atomically"]

PACKAGES = ("vcposim", "numpy", "scipy", "array-api-compat")
SAME = {
    "experiment": "another experiment",
    "size": "another size",
    "settings_sha256": "other settings",
    "source_sha256": "another version of the source",
    "packages": "other package versions",
    "python": "another Python",
}


# --- one setting, computed in a worker ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SettingOutcome:
    """What a worker sends back: the records as JSON lines, or why there are none."""

    body: bytes = b""
    error: str = ""
    traceback: str = ""


def execute(run: Callable[[Setting], list[Record]], setting: Setting, setting_id: str) -> SettingOutcome:
    """One setting's `SettingOutcome`; an exception of `run` becomes a part of it."""
    try:
        return SettingOutcome(encode(run(setting), setting_id))
    except Exception as error:
        return failed(error)


def failed(error: BaseException) -> SettingOutcome:
    """The `SettingOutcome` of an exception: one line for the terminal, everything for the file."""
    return SettingOutcome(error=one_line(error), traceback="".join(traceback.format_exception(error)))


# --- the run folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """One experiment at one size, and the folder its records are in (or will be)."""

    path: Path
    experiment: Experiment
    size: str
    settings: list[Setting] = field(default_factory=list)

    @classmethod
    def plan(cls, path: Path, experiment: Experiment, size: str) -> "RunFolder":
        """The run folder of `experiment` at `path`; nothing is written yet."""
        return cls(path, experiment, size, settings_of(experiment, size))

    def name(self, number: int) -> str:
        """`experiment/number`, as messages name a setting."""
        return f"{self.experiment.id}/{number}"

    def record_file(self, number: int) -> Path:
        """Where the records of setting `number` are."""
        return self.path / "records" / f"{number}.jsonl"

    def error_file(self, number: int) -> Path:
        """Where the traceback of setting `number` is, if it failed."""
        return self.path / "errors" / f"{number}.txt"

    @property
    def results(self) -> Path:
        """All records in one file, in the order of settings."""
        return self.path / "results.jsonl"

    def sealed(self, number: int, body: bytes) -> bytes:
        """The bytes of a record file: the records, and a last line that only these records of this setting have."""
        seal = {
            "end": self.name(number),
            "setting": self.settings[number],
            "records": body.count(b"\n"),
            "sha256": digest(body),
        }
        return body + canonical(seal).encode() + b"\n"

    def body(self, number: int) -> bytes | None:
        """The records of a setting as JSON lines; None if the file is cut short or altered."""
        data = self.record_file(number).read_bytes()
        body = data[: data.rfind(b"\n", 0, len(data) - 1) + 1]
        return body if data == self.sealed(number, body) else None

    def missing(self) -> list[int]:
        """Numbers of the settings without a record file."""
        return [number for number in range(len(self.settings)) if not self.record_file(number).exists()]

    def identity(self) -> dict[str, Any]:
        """What determines the records; two runs that agree here end in the same bytes."""
        return {
            "experiment": self.experiment.id,
            "size": self.size,
            "settings_sha256": digest(canonical(self.settings)),
            "source_sha256": source_hash(self.experiment),
            "packages": {name: _version(name) for name in (*PACKAGES, *EXTRAS.get(self.experiment.extra, ()))},
            "python": platform.python_version(),
        }

    def state(self) -> str:
        """ "new", "partial" or "complete".

        Raises:
            InputError: if the folder holds something else, or a run that differs in one of `SAME`.
        """
        remedy = "choose another --out, or delete the folder"
        if not (self.path / "provenance.json").exists():
            if self.path.is_dir() and any(p.suffix != ".tmp" for p in self.path.iterdir()):
                raise InputError(f"--out: {self.path} is not empty and holds no run; choose another --out")
            return "new"
        recorded, mine = read_provenance(self.path), self.identity()
        for key, words in SAME.items():
            if recorded.get(key) != mine[key]:
                state = "a complete" if self.results.exists() else "an incomplete"
                raise InputError(f"--out: {self.path} holds {state} run of {words}; {remedy}")
        return "complete" if self.results.exists() else "partial"

    def start(self, command: Sequence[str]) -> None:
        """Create the folder and write provenance.json; what a killed start left half written goes."""
        for left in self.path.glob("provenance.json*.tmp"):
            left.unlink()
        (self.path / "records").mkdir(parents=True, exist_ok=True)
        about = {
            "question": self.experiment.question,
            "reproduce": f"python -m simulations run {self.experiment.id} --size {self.size}{_own(self.settings)}",
            "command": list(command),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "git": git_state(),
            "platform": f"{platform.system()} {platform.machine()}",
            "source_files": list(source_files(self.experiment)),
            "settings": self.settings,
        }
        text = json.dumps(self.identity() | about, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.path / "provenance.json", text.encode())

    def set_aside_damaged(self) -> list[str]:
        """Move record files that are cut short or altered to damaged/, so that they are computed again."""
        moved = []
        for number in set(range(len(self.settings))) - set(self.missing()):
            if self.body(number) is None:
                aside = self.path / "damaged"
                aside.mkdir(exist_ok=True)
                target = next(p for n in range(10**6) if not (p := aside / f"{number}-{n}.jsonl").exists())
                os.rename(self.record_file(number), target)
                moved.append(self.name(number))
        return moved

    def keep(self, number: int, outcome: SettingOutcome) -> None:
        """Write what a worker sent back: a record file, or the traceback."""
        if outcome.error:
            self.error_file(number).parent.mkdir(exist_ok=True)
            write_atomically(self.error_file(number), outcome.traceback.encode())
            return
        write_atomically(self.record_file(number), self.sealed(number, outcome.body))
        self.error_file(number).unlink(missing_ok=True)

    def finish(self) -> None:
        """Merge the record files, in setting order, into results.jsonl."""
        write_atomically(self.results, b"".join(self.bodies()))

    def bodies(self) -> Iterator[bytes]:
        """The records of every setting, in order.

        Raises:
            InputError: at a record file that is missing or damaged.
        """
        for number in range(len(self.settings)):
            body = self.body(number) if self.record_file(number).exists() else None
            if body is None:
                raise InputError(
                    f"{self.record_file(number)}: missing, cut short or altered; delete {self.results} and run "
                    "again: only such settings are recomputed"
                )
            yield body

    def records(self) -> list[Record]:
        """Every record, in setting order, read from the verified record files."""
        return [json.loads(line) for body in self.bodies() for line in body.splitlines()]


def _own(settings: Sequence[Setting]) -> str:
    names = list(settings[0].get(OWN, ())) if settings else []
    return f" --estimator {' '.join(names)}" if names else ""


def read_provenance(path: Path) -> dict[str, Any]:
    """provenance.json of a run folder.

    Raises:
        InputError: if it cannot be read as JSON.
    """
    try:
        provenance = json.loads((path / "provenance.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'provenance.json'}: cannot be read ({error}); choose another folder") from None
    if not isinstance(provenance, dict):
        raise InputError(f"{path / 'provenance.json'}: not a JSON object; choose another folder")
    return provenance


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # a look must not take the index lock
        done = subprocess.run(
            ["git", *arguments], cwd=here, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a second run out of a folder; the lock goes with the process, however it ends.

    Raises:
        InputError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on this system; the two runs would write equal bytes
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out: another run is writing to {path}; wait for it, or choose another --out") from None
        yield
    finally:
        os.close(descriptor)


# --- the sweep ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A setting that raised: its id, one line, and the file with the traceback."""

    setting_id: str
    error: str
    file: Path


def sweep(
    folders: Sequence[RunFolder], executor: Executor, finished: Callable[[RunFolder, int], None] = lambda f, n: None
) -> list[Failure]:
    """Compute every missing setting of every folder; keep each as soon as it is done, and merge folders that are full.

    A setting that raises does not stop the others; it is among the failures returned.

    Raises:
        BrokenProcessPool: if a worker died; what had finished is kept.
    """
    remaining = {folder.path: set(folder.missing()) for folder in folders}
    waiting: dict[Future[SettingOutcome], tuple[RunFolder, int]] = {}
    with interrupts_held():
        for folder in folders:
            for number in sorted(remaining[folder.path]):
                job = executor.submit(execute, folder.experiment.run, folder.settings[number], folder.name(number))
                waiting[job] = (folder, number)
    for folder in folders:
        if not remaining[folder.path]:  # killed between the last setting and the merge
            folder.finish()
    failures = []
    for job in as_completed(waiting):
        folder, number = waiting.pop(job)
        error = job.exception()
        if isinstance(error, BrokenProcessPool):
            raise error
        outcome = failed(error) if error else job.result()
        folder.keep(number, outcome)
        if outcome.error:
            failures.append(Failure(folder.name(number), outcome.error, folder.error_file(number)))
        else:
            remaining[folder.path].discard(number)
            if not remaining[folder.path]:
                folder.finish()
        finished(folder, number)
    return failures
