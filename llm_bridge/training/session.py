"""A trainer at work: records to files and loggers, progress, checkpoints, and a clean end when it is interrupted."""

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.stats import binomtest

from llm_bridge.distributed import gathered, world_size
from llm_bridge.training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from llm_bridge.training.dumps import lines
from llm_bridge.training.folder import CHECKPOINTS, METRICS, MODEL, GrowingFile, main_process
from llm_bridge.training.records import TrainingRecord, to_json
from llm_bridge.training.trainer import Trainer
from vcposim.errors import InputError, unknown_name

SHOWN = {"reward": "reward", "ESS": "ess_fraction_sequence", "k-hat": "khat", "step scale": "step_scale"}
"""what progress shows, besides the number of updates"""
LINES = 10
"""lines of progress where there is no terminal"""


def accelerator_for(folder: Path, report_to: Sequence[str] = ()) -> Accelerator:
    """Device, ranks and loggers. Raises `InputError` for a logger that is unknown or not installed."""
    for name in report_to:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown_name("--report-to", name, LOGGER_TYPE_TO_CLASS)
        if name not in [str(x) for x in get_available_trackers()]:
            raise InputError(f"--report-to: {name} is not installed; install it with pip, or leave it out")
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, log_with=list(report_to) or None, project_dir=folder)


@dataclass
class Session:
    """A trainer with a folder; `dump`: also write every trajectory to this file."""

    trainer: Trainer
    folder: Path
    console: Console
    dump: Path | None = None
    signals: list[int] = field(default_factory=list)
    """interrupts received"""

    def __post_init__(self) -> None:
        self.metrics = GrowingFile(self.folder / METRICS)
        self.trajectories = None if self.dump is None else GrowingFile(self.dump)
        self.trainer.maker.want_proxy = self.dump is not None

    def resume(self) -> None:
        """Go on from the newest checkpoint, or from the start if there is none yet.

        Raises `InputError` if the checkpoint, or a file that grew since, is not whole.
        """
        found = checkpoints(self.folder / CHECKPOINTS)
        state: dict[str, Any] = load_checkpoint(found[-1]) if found else {"metrics": 0, "dump": 0}
        if found:
            self.trainer.load_state_dict(state["trainer"])
        if main_process():
            self.metrics.cut(state["metrics"])
            if self.trajectories is not None:
                self.trajectories.cut(state["dump"])
        self.say(f"resumed at update {self.trainer.version}" if found else "no checkpoint yet: starting again")

    def run(self) -> int:
        """Train to the end; returns the exit code: 0, or 128 plus the signal after an interrupt, with all saved."""
        config, started, first = self.trainer.config, time.perf_counter(), self.trainer.version
        if self.trainer.accelerator.log_with:
            plain = {name: x if isinstance(x, int | float | str) else str(x) for name, x in config.as_dict().items()}
            again = {"tensorboard": {"purge_step": first}}
            self.trainer.accelerator.init_trackers("log", config=plain, init_kwargs=again)
        with self._interruptible(), self._warnings_in_a_line(), self._progress() as show:
            for record in self.trainer.updates():
                self._write(record)
                show(record)
                if config.checkpoint_every and self.trainer.version % config.checkpoint_every == 0:
                    self.save()
                if self._interrupted():
                    self.save()
                    self.say(f"interrupted after update {self.trainer.version}, saved; go on with --resume")
                    return 128 + (self.signals or [signal.SIGINT])[0]
            self.save()
        seconds, n = time.perf_counter() - started, config.evaluate_problems
        found = self.trainer.evaluate(n)
        if main_process():
            self.trainer.lm.save_pretrained(self.folder / MODEL)
        self.trainer.accelerator.end_training()
        low, high = binomtest(round(found["success_rate"] * n), n).proportion_ci(method="wilson")
        self.say(
            f"{self.trainer.version - first} updates in {seconds:.0f} s; held-out success rate "
            f"{found['success_rate']:.2f}, 95% interval {low:.2f} to {high:.2f} ({n} problems); everything is in "
            f"{self.folder}"
        )
        return 0

    def save(self) -> None:
        """A checkpoint of now; a collective on all ranks."""
        state = {"trainer": self.trainer.state_dict(), "metrics": self.metrics.size()}
        state["dump"] = 0 if self.trajectories is None else self.trajectories.size()
        if main_process():
            save_checkpoint(self.folder / CHECKPOINTS, self.trainer.version, state, self.trainer.config.keep)

    def say(self, text: str) -> None:
        """A line, from one rank."""
        if main_process():
            self.console.print(text, highlight=False, soft_wrap=True)

    # --- output -------------------------------------------------------------------------------------------------------

    def _write(self, record: TrainingRecord) -> None:
        if main_process():
            self.metrics.append([to_json(record) + "\n"])
        finite = {name: x for name, x in record.items() if math.isfinite(x) and name != "step"}
        self.trainer.accelerator.log(finite, step=int(record["step"]))
        if self.trajectories is not None:
            records = self.trainer.dump_records()
            if main_process():
                self.trajectories.append(lines(records))

    @contextmanager
    def _progress(self) -> Iterator[Callable[[TrainingRecord], None]]:
        """Something to show each record with: a bar on a terminal, else a few lines."""
        total = self.trainer.config.updates
        if not self.console.is_terminal or not main_process():
            yield lambda record: self._line(record, total)
            return
        gauges = TextColumn("{task.fields[gauges]}")
        bar = Progress(
            TextColumn("update"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), gauges, console=self.console
        )
        with bar:
            task = bar.add_task("", total=total, completed=self.trainer.version, gauges="")
            yield lambda record: bar.update(task, completed=self.trainer.version, gauges=gauges_of(record))

    def _line(self, record: TrainingRecord, total: int) -> None:
        if self.trainer.version % max(1, total // LINES) == 0:
            self.say(f"update {self.trainer.version}/{total}  {gauges_of(record)}")

    # --- interrupts and warnings --------------------------------------------------------------------------------------

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the update under way; a second one at once."""
        kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self.signals.append(number)
            for name, handler in kept.items():
                signal.signal(name, handler)

        for number in kept:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _interrupted(self) -> bool:
        """Whether any rank was told to stop."""
        if world_size() == 1:
            return bool(self.signals)
        mine = torch.tensor(len(self.signals), device=self.trainer.accelerator.device)
        return bool(gathered(mine).any())

    @contextmanager
    def _warnings_in_a_line(self) -> Iterator[None]:
        def show(message: Any, *where: Any) -> None:
            self.say(f"warning: {message}")

        with warnings.catch_warnings():
            warnings.simplefilter("always", RuntimeWarning)
            warnings.showwarning = show  # type: ignore[assignment]
            yield


def gauges_of(record: TrainingRecord) -> str:
    """The numbers that progress shows."""
    return "  ".join(f"{name} {record[key]:.2f}" for name, key in SHOWN.items())
