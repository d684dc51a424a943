"""A run's folder: what may be started or resumed there, and the files that grow.

    config.json                 what was asked for
    estimator.py                the file of an estimator of your own, as it was when the run began
    metrics.jsonl               a record a line; after kill -9 and --resume the same bytes as without
    checkpoints/update-...      the last few (`llm_bridge.training.checkpoints`)
    model/                      at the end: weights and tokenizer, a folder that --model reads

A checkpoint knows how long the growing files were when it was written. Resuming cuts them back to there, and what
follows is written again, byte by byte the same.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_bridge.training.config import TrainConfig, read_config
from vcposim.catalogue.loading import source_of
from vcposim.errors import InputError

CONFIG, METRICS, CHECKPOINTS, MODEL = "config.json", "metrics.jsonl", "checkpoints", "model"
ESTIMATOR = "estimator.py"
FREE = ("updates", "checkpoint_every", "keep")
"""settings that a resumed run may change: they change no number of it"""


def main_process() -> bool:
    """Whether this is the process that writes; known before ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def check_new(folder: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a new run. Raises `InputError` if the folder holds one already."""
    if main_process() and (folder / CONFIG).exists():
        raise InputError(f"--output: {folder} already holds a run; add --resume to go on, or name another folder")
    return TrainConfig.from_dict(given)


def claim(folder: Path, config: TrainConfig) -> None:
    """Make the folder this run's. Raises `InputError` if it cannot be written to, or another run was faster."""
    if not main_process():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / CONFIG).open("x") as file:
            file.write(json.dumps(config.as_dict(), indent=1) + "\n")
        if (source := _source(config)) is not None:
            (folder / ESTIMATOR).write_bytes(source)
    except FileExistsError:
        raise InputError(f"--output: {folder} is another run's by now; name another folder") from None
    except OSError as error:
        raise InputError(f"--output: {folder} cannot be written to ({error.strerror}); name another") from None


def check_resume(folder: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of the run in a folder; `given` may repeat it, and change what changes no number.

    Raises `InputError` if there is no run, or it has other settings.
    """
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"--resume: {folder} holds no run (no {CONFIG}); name its folder with --output")
    own = TrainConfig.from_dict(read_config(path))
    asked = TrainConfig.from_dict(own.as_dict() | dict(given))
    for name in given:
        if name not in FREE and getattr(asked, name) != getattr(own, name):
            raise InputError(
                f"{name}: {getattr(asked, name)!r} asked for, {getattr(own, name)!r} in {path}; a resumed run "
                "keeps its settings, start another in another folder"
            )
    kept, source = folder / ESTIMATOR, _source(asked)
    if source is not None and (not kept.exists() or kept.read_bytes() != source):
        raise InputError(
            f"estimator: the file of {asked.estimator} is not what this run began with ({kept}); a resumed run keeps "
            "its estimator, put it back or start another in another folder"
        )
    return asked


def _source(config: TrainConfig) -> bytes | None:
    path = source_of(config.estimator) if isinstance(config.estimator, str) else None
    return None if path is None or not path.is_file() else path.read_bytes()


class GrowingFile:
    """A text file that is only appended to, and cut back on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, lines: Iterable[str]) -> None:
        """Write whole lines and hand them to the system."""
        with self.path.open("a") as file:
            file.writelines(lines)

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Back to `size` bytes. Raises `InputError` if there are fewer."""
        if self.size() < size:
            raise InputError(
                f"{self.path}: shorter than at the checkpoint ({self.size()} bytes of {size}); put it back"
            )
        if self.path.exists():
            os.truncate(self.path, size)
