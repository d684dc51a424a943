"""Metrics that a run logged, where nobody dumped its rollouts: the gauges they hold, and what cannot be told from them.

    TensorBoard event files (extra `tensorboard`), or a folder of them
    JSON lines: verl's file logger, prime-rl's file monitor, a trainer's own
    `trainer_state.json` of transformers and TRL
    exports of W&B and trackio: CSV, JSON, Parquet, as a row a step, or a JSON text of metrics a row

`KEYS` is the one table: which key of which framework is which gauge, and where that was read. Limits are those of
`vcposim.gauges.panel`. A KL a token is no KL a trajectory, so it is judged times the mean length where that is logged
(under mu the mean of either estimator of a token's KL, summed over a trajectory, is the trajectory's KL). Where a key
is of truncated weights or of another policy, the answer says so.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vcposim.control import step_scale
from vcposim.errors import InputError, unknown_name
from vcposim.gauges.panel import HALF, leverage_diagnostic, sample_panel
from vcposim.learning.collapse import NOT_COLLAPSED, collapse_step
from vcposim.replay.containers import read_records
from vcposim.replay.inputs import find_inputs, natural, require_names
from vcposim.replay.items import one_line
from vcposim.replay.names import FIELDS, LOG_PROBS, OTHER_NAMES
from vcposim.replay.tracks import Track


class Key(NamedTuple):
    """One metric of one framework."""

    gauge: str
    framework: str
    key: str
    """its name in the log; `*` stands for anything"""
    source: str
    """file of the framework's repository that logs it"""
    what: str = ""
    """how it differs from the gauge"""


_VERL = "verl-project/verl@1dda039b: verl/trainer/ppo"
_VERL_06 = "volcengine/verl@99990520: verl/trainer/ppo/mismatch_helper.py"
_TRL = "huggingface/trl@f2cd5771: trl"
_PRIME = "PrimeIntellect-ai/prime-rl@559b4477: src/prime_rl"
_OWN = "llm_bridge/diagnostics.py"
KEYS = (
    Key("ess_fraction_sequence", "vcposim", "vcpo/ess_fraction_sequence", _OWN),
    Key(
        "ess_fraction",
        "verl",
        "rollout_corr/rollout_is_eff_sample_size",
        f"{_VERL}/rollout_corr_helper.py",
        "of the truncated weights that were applied, at the level of rollout_is: an optimist beside untruncated ones",
    ),
    Key(
        "ess_fraction",
        "verl",
        "mismatch/rollout_is_eff_sample_size",
        _VERL_06,
        "of the truncated weights that were applied, at the level of rollout_is: an optimist beside untruncated ones",
    ),
    Key("ess_fraction_token", "vcposim", "vcpo/ess_fraction_token", _OWN),
    Key("mean_weight", "vcposim", "vcpo/mean_weight", _OWN),
    Key(
        "mean_weight",
        "verl",
        "rollout_corr/rollout_is_mean",
        f"{_VERL}/rollout_corr_helper.py",
        "of truncated weights, at the level of rollout_is",
    ),
    Key(
        "mean_weight",
        "verl",
        "mismatch/rollout_is_mean",
        _VERL_06,
        "of truncated weights, at the level of rollout_is",
    ),
    Key(
        "mean_weight",
        "trl",
        "sampling/importance_sampling_ratio/mean",
        f"{_TRL}/trainer/grpo_trainer.py",
        "of capped weights, learner before its update over sampler",
    ),
    Key("mean_weight", "trl", "ratio", f"{_TRL}/experimental/async_grpo/async_grpo_trainer.py", "a token"),
    Key("khat", "vcposim", "vcpo/khat", _OWN),
    Key("max_share", "vcposim", "vcpo/max_share", _OWN),
    Key("max_leverage", "vcposim", "vcpo/max_leverage", _OWN),
    Key("chi2", "vcposim", "vcpo/chi2", _OWN),
    Key("chi2", "verl", "rollout_corr/chi2_seq", f"{_VERL}/rollout_corr_helper.py", "E[w^2] - 1 of whole trajectories"),
    Key("kl_behavior_target", "vcposim", "vcpo/kl_behavior_target", _OWN),
    Key("kl_token", "verl", "rollout_corr/kl", f"{_VERL}/rollout_corr_helper.py"),
    Key("kl_token", "verl", "rollout_corr/k3_kl", f"{_VERL}/rollout_corr_helper.py"),
    Key("kl_token", "verl", "mismatch/mismatch_kl", _VERL_06),
    Key("kl_token", "verl", "mismatch/mismatch_k3_kl", _VERL_06),
    Key("kl_token", "prime-rl", "mismatch_kl/all/mean", f"{_PRIME}/trainer/rl/train.py"),
    Key("kl_anchor_token", "verl", "actor/ppo_kl", f"{_VERL}/core_algos.py", "to the policy before the update"),
    Key("kl_reference_token", "verl", "actor/kl_loss", f"{_VERL}/core_algos.py", "to the reference of the penalty"),
    Key("kl_reference_token", "trl", "kl", f"{_TRL}/trainer/grpo_trainer.py", "to the reference of the penalty"),
    Key("clip_fraction", "verl", "actor/pg_clipfrac", f"{_VERL}/core_algos.py"),
    Key("clip_fraction", "trl", "clip_ratio/region_mean", f"{_TRL}/trainer/grpo_trainer.py"),
    Key("clip_fraction", "trl", "cispo_clip_ratio", f"{_TRL}/trainer/grpo_trainer.py"),
    Key("clip_fraction", "trl", "clip_ratio", f"{_TRL}/trainer/grpo_trainer.py", "the Liger kernel's"),
    Key("clip_fraction", "prime-rl", "is_masked/mean", f"{_PRIME}/trainer/rl/loss.py", "masked, not clipped"),
    Key("lag", "vcposim", "vcpo/lag", "llm_bridge/adapters/trl.py"),
    Key("lag", "prime-rl", "off_policy/mean", f"{_PRIME}/orchestrator/orchestrator.py"),
    Key("length", "verl", "response_length/mean", f"{_VERL}/metric_utils.py"),
    Key("length", "trl", "completions/mean_length", f"{_TRL}/trainer/grpo_trainer.py"),
    Key("length", "prime-rl", "train/agg/effective/*num_output_tokens/mean", f"{_PRIME}/orchestrator/metrics.py"),
    Key("grad_norm", "verl", "actor/grad_norm", f"{_VERL}/ray_trainer.py"),
    Key("grad_norm", "prime-rl", "optim/grad_norm", f"{_PRIME}/trainer/rl/train.py"),
    Key("grad_norm", "trl", "grad_norm", "huggingface/transformers: src/transformers/trainer.py"),
    Key("reward", "verl", "critic/score/mean", f"{_VERL}/metric_utils.py"),
    Key("reward", "verl", "critic/rewards/mean", f"{_VERL}/metric_utils.py", "minus the KL penalty"),
    Key("reward", "prime-rl", "train/agg/effective/*reward/mean", f"{_PRIME}/orchestrator/metrics.py"),
    Key("reward", "trl", "reward", f"{_TRL}/trainer/grpo_trainer.py"),
)
"""of several keys of one gauge the first that is logged counts"""

STEPS = ("step", "train/global_step", "training/global_step", "trainer/global_step", "global_step", "Step", "_step")
"""names of the step, best first: W&B's own `_step` counts calls of its log, and is the step only where nothing else is
"""
RUNS = ("run_name", "run", "run_id", "Name")
NO_ROLLOUT = frozenset(k.key for k in KEYS if "/" in k.key)
"""keys that no record of a rollout has"""
OF_A_TRAINER = frozenset({"grad_norm", "reward"})
"""keys that stand together in logs of TRL, and in no rollout beside plain numbers alone"""
LOGGED = {"reward", "step", "lag", "length", *OTHER_NAMES["length"], *STEPS}
"""names of rollouts' columns that logs have too, of means"""
ROLLOUT = {*FIELDS, *(n for names in OTHER_NAMES.values() for n in names)} - LOGGED
NEEDS_ROLLOUTS = {
    "khat": "whether the tail of the weights can be trusted",
    "max_share": "which trajectories carry the weight",
    "max_leverage": "how far a group's baseline is one sample's",
    "data checks": "whether the two policies' log-probabilities were written right",
    "corrections": "which estimator would have done better",
}
"""what only rollouts can tell, where the log does not hold it"""
OF_N = ("khat", "max_share")
"""gauges whose limit depends on the number of samples: judged where the log has the limit beside them"""
NO_LIMIT = {
    "clip_fraction": "how much clipping is too much depends on the clip range",
    "grad_norm": "its scale is the model's",
    "lag": "what matters is what it does to the ESS",
    "kl_anchor_token": "it is within one batch, not between sampler and learner",
    "kl_reference_token": "the reference is neither the sampler nor the learner",
    "kl_token": "its limit holds for a trajectory, and the log has no mean length",
}
"""gauges that are shown and not judged, and why"""


@dataclass(frozen=True)
class LoggedRun:
    """A run as its metrics tell it."""

    steps: list[float]
    """whole numbers, or whatever numbers the log counts by"""
    gauges: list[Track]
    """those with a limit first"""
    keys: dict[str, Key]
    """gauge -> the key it was read from"""
    reward: Track | None
    collapsed_at: float | None = None
    """the step from which the reward stays below half of its best, at least 20 steps to the end"""
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def gauge(self, *names: str) -> Track | None:
        """The first of these that is there."""
        return next((one for name in names for one in self.gauges if one.name == name), None)

    @property
    def first_alarms(self) -> dict[str, float]:
        """gauge -> the first step at which it alarms."""
        return {one.name: at for one in self.gauges if (at := one.first_alarm) is not None}

    @property
    def unjudged(self) -> dict[str, str]:
        """What the log cannot tell, and why."""
        logged = {one.name for one in self.gauges}
        shown = {name: why for name, why in NO_LIMIT.items() if name in logged}
        return shown | {name: f"needs rollouts: {why}" for name, why in NEEDS_ROLLOUTS.items() if name not in logged}


# ---------------------------------------------------------------------------------------------------------- finding


def find_metrics(arguments: Sequence[str | Path], *, sure: bool = False) -> list[str]:
    """The files of metrics behind some arguments, empty if these are rollouts; `sure`: they are metrics, as was said.

    A pipe is not looked into: reading it is all there is of it. Raises `InputError` for what is not there, if `sure`.
    """
    files: list[str] = []
    require_names(arguments)
    for argument in map(str, arguments):
        path = Path(argument)
        inside = sorted((f for f in path.rglob("*") if f.is_file()), key=natural) if path.is_dir() else []
        if path.is_dir():
            events = [f for f in inside if "tfevents" in f.name]
            states = [f for f in inside if f.name == "trainer_state.json"][-1:]  # each holds all of its run so far
            logs = [f for f in inside if f.name == "metrics.jsonl" or f.suffix == ".csv"]
            other = [] if events or states or logs or not sure else inside
            if not sure and not events and not states and _beside_rollouts(path):
                return []
            files += map(str, events or states or logs or other)
        elif sure or (path.is_file() and _of_metrics(argument)):
            files.append(argument)
        else:
            return []
    if sure and not files:
        raise InputError(f"--metrics: no event file, trainer_state.json, metrics.jsonl or CSV in {arguments[0]}")
    return files


def _beside_rollouts(folder: Path) -> bool:
    """Whether a folder holds tables or lines of rollouts too, which then count."""
    tables = (".jsonl", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst")
    with contextlib.suppress(InputError):
        found = [f for f in find_inputs([folder])[0] if f.endswith(tables)]
        return bool(found) and not _of_metrics(found[0])
    return False


def _of_metrics(name: str) -> bool:
    with open(name, "rb") as file:
        head = file.read(1 << 16)
    if b"brain.Event:" in head[:64] or _csv_header(head):
        return True
    with contextlib.suppress(InputError):
        for item in read_records(name):
            return isinstance(item.record, dict) and is_log(item.record)
    return False


def is_log(record: Mapping[str, Any]) -> bool:
    """Whether a record is a row of metrics, and no rollout."""
    if isinstance(record.get("log_history"), list):
        return True
    _, row = _row(record)
    own = {_plain_key(key.partition(" - ")[2] or key) for key in row}
    numbers = not any(isinstance(value, list | dict) for value in row.values())
    return _is_log(own) and not ROLLOUT & own and (numbers or not own >= OF_A_TRAINER)


def _is_log(own: set[str]) -> bool:
    """Whether some names are those of a log's columns: what no rollout has, or what a trainer logs together."""
    return any(fnmatchcase(name, key) for name in own for key in NO_ROLLOUT) or own >= OF_A_TRAINER


def _csv_header(head: bytes) -> list[str]:
    line = head.partition(b"\n")[0].removeprefix(b"\xef\xbb\xbf")
    if line.lstrip().startswith((b"{", b"[")):
        return []
    with contextlib.suppress(UnicodeDecodeError, csv.Error):
        names = next(csv.reader([line.decode()]), [])
        own = {_plain_key(n.partition(" - ")[2] or n) for n in names}
        if len(names) > 1 and _is_log(own) and not ROLLOUT & own:
            return names
    return []


# ---------------------------------------------------------------------------------------------------------- reading


def read_metrics(
    arguments: Sequence[str | Path], *, run: str | None = None, skip_bad: bool = False, files: Sequence[str] = ()
) -> LoggedRun:
    """The gauges of a run's metrics; `run` names one of several in one export.

    Raises `InputError`, one line, on files that cannot be read, that hold no known metric, or several runs, and on
    values that are no numbers (`skip_bad` leaves these out and counts them).
    """
    files = list(files) or find_metrics(arguments, sure=True)
    table: dict[float, dict[str, float]] = {}
    found = _Rows(run, skip_bad)
    for folder in (one for one in map(Path, arguments) if one.is_dir() and _beside_rollouts(one)):
        found.notes.append(f"{folder} holds rollouts too, which are not read here: name their files to replay them")
    for name in files:
        found.folder = str(Path(name).parent)
        for place, record in _records(name, found):
            found.take(name, place, record, table)
    found.require_one_run(files[0])
    keys = _chosen({key for row in table.values() for key in row})
    if not keys:
        known = ", ".join(dict.fromkeys(k.framework for k in KEYS))
        seen = ", ".join(sorted(found.seen)[:8]) or "nothing"
        raise InputError(
            f"{files[0]}: none of its metrics is a gauge that is known (of {known}); it has {seen}; "
            "see KEYS of vcposim.replay.metrics, or dump rollouts"
        )
    return _judged(table, keys, found)


class _Rows:
    """Takes rows of metrics, and merges those of one step."""

    def __init__(self, run: str | None, skip_bad: bool):
        self.run, self.skip_bad = run, skip_bad
        self.runs: dict[str, int] = {}
        self.notes: list[str] = []
        self.skipped: dict[str, list[str]] = {}
        self.unnumbered = self.twice = self.stepless = 0
        self.seen: set[str] = set()
        """names of all columns, known or not"""
        self.folder = ""
        """of the rows at hand"""
        self.folders: dict[str, set[tuple[str, float]]] = {}
        """folder -> the (metric, step) that its files logged"""

    def take(self, name: str, place: str, record: Mapping[str, Any], table: dict[float, dict[str, float]]) -> None:
        of, row = _row(record)
        self.seen.update(row)
        columns = {run for key in row if _known(key) and " - " in key for run in [key.partition(" - ")[0]]}
        for one in columns or ({of} if of else set()):
            self.runs[one] = self.runs.get(one, 0) + 1
        if self.run is not None and not columns and of != self.run:
            return
        counter = next((key for key in STEPS if key in row), None)
        step = None if counter is None or row[counter] == "" else row[counter]
        if counter is not None and step is None:
            self.stepless += any(_known(key) and row[key] not in (None, "") for key in row)
            return
        if step is None:
            step = self.unnumbered
            self.unnumbered += 1
        at = self._number(name, place, "step", step)
        if at is None:
            return
        if abs(at) >= 2**53:
            raise InputError(f"{name}: {place}: step: {step} is too large to tell it from the next; count from 0")
        values = table.setdefault(int(at) if at == int(at) else at, {})
        for key, value in row.items():
            run, dash, own = key.partition(" - ")
            if not _known(key) or value is None or value == "" or (dash and self.run not in (None, run)):
                continue
            plain = _plain_key(own if dash else key)
            number = self._number(name, place, key, value)
            if number is None:
                continue
            self.folders.setdefault(self.folder, set()).add((plain, at))
            self.twice += plain in values and values[plain] != number
            values[plain] = number

    def _number(self, name: str, place: str, key: str, value: Any) -> float | None:
        number = math.nan
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                number = float(value)
        elif isinstance(value, str):
            with contextlib.suppress(ValueError):
                number = float(value)
        text = isinstance(value, str) and value.strip().lower() in ("nan", "inf", "-inf", "infinity", "-infinity")
        logged = (isinstance(value, float | np.floating) or text) and (key != "step" or math.isfinite(number))
        if math.isfinite(number) or logged:
            return number
        if not self.skip_bad:
            shown = one_line(json.dumps(value, default=str))[:60]
            raise InputError(f"{name}: {place}: {key}: {shown} is no number; mend it, or leave it out with --skip-bad")
        self.skipped.setdefault(f"{key}: no number", []).append(place)
        return None

    def require_one_run(self, name: str) -> None:
        """Refuse several runs in one file, unless one of them was asked for."""
        if self.run is not None and self.run not in self.runs:
            raise (
                unknown_name("--run", self.run, self.runs)
                if self.runs
                else InputError(f"--run: {name} names no runs; leave it out")
            )
        if self.run is None and len(self.runs) > 1:
            raise InputError(f"{name}: metrics of {len(self.runs)} runs ({', '.join(self.runs)}); name one with --run")
        for (one, logged), (other, more) in itertools.combinations(self.folders.items(), 2):
            if len(logged & more) > 0.5 * min(len(logged), len(more)):  # a run that goes on elsewhere repeats a few
                raise InputError(f"{one} and {other} log the same metrics at the same steps: two runs; name one folder")


def _records(name: str, found: _Rows) -> Iterator[tuple[str, Mapping[str, Any]]]:
    head = b""
    if name != "-":
        try:
            with open(name, "rb") as file:
                head = file.read(1 << 16)
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({one_line(error)}); check its name and permissions") from None
    if b"brain.Event:" in head[:64]:
        yield from _events(name, found)
        return
    if _csv_header(head):
        yield from _csv(name)
        return
    for item in read_records(name):
        if isinstance(item.record, InputError):
            if not found.skip_bad:
                raise item.record
            found.skipped.setdefault("not JSON", []).append(item.place)
            continue
        if any(isinstance(item.record.get(column), list) for column in LOG_PROBS):
            raise InputError(f"{name}: {item.place}: these are rollouts, not metrics; leave --metrics out")
        history = item.record.get("log_history")
        if isinstance(history, list):
            for k, row in enumerate(history):
                if not isinstance(row, dict):
                    raise InputError(f"{name}: log_history, item {k + 1}: no object; dump it again")
                yield f"log_history, item {k + 1}", row
        else:
            yield item.place, item.record


def _row(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The run a row names, and its metrics, flat: out of `data` (verl) or of the JSON text in `metrics` (trackio)."""
    row = dict(record)
    for column in ("data", "metrics"):
        inner = row.get(column)
        if isinstance(inner, str):
            with contextlib.suppress(ValueError):
                inner = json.loads(inner)
        if isinstance(inner, dict):
            row = {**{k: v for k, v in row.items() if k != column}, **inner}
    of = next((str(row[name]) for name in RUNS if isinstance(row.get(name), str)), "")
    return of, row


def _csv(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(name, "rb") as raw:
        try:
            reader = csv.DictReader(io.TextIOWrapper(raw, "utf-8-sig", newline=""), restkey="", strict=True)
            names = list(reader.fieldnames or ())
            twice = next((one for one in names if names.count(one) > 1), None)
            if twice is not None:
                raise InputError(f"{name}: has several columns called {twice!r}; rename or drop all but one")
            for row in reader:
                if row.get("") or None in row.values():
                    raise InputError(
                        f"{name}: line {reader.line_num}: not as many cells as the header; export it again"
                    )
                yield f"line {reader.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{name}: not a readable CSV file ({one_line(error)}); export it again") from None


def _events(name: str, found: _Rows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scalars of an event file: records of (length, its checksum, an event, its checksum)."""
    try:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
        from tensorboard.util import tensor_util
    except ImportError:
        raise InputError(
            f"{name}: is a TensorBoard event file, and TensorBoard is not installed: pip install 'vcposim[tensorboard]'"
        ) from None
    with open(name, "rb") as file:
        for number in range(1, 1 << 62):
            head = file.read(12)
            if not head:
                return
            size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
            whole = len(head) == 12
            if whole and masked_crc32c(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise InputError(f"{name}: event {number}: its checksum is wrong; the file is damaged, copy it again")
            data, check = (file.read(size), file.read(4)) if whole else (b"", b"")
            if len(data) < size or len(check) < 4:
                found.notes.append(f"{Path(name).name} is cut off in event {number}: a run that goes on, or that died")
                return
            if masked_crc32c(data) != struct.unpack("<I", check)[0]:
                raise InputError(f"{name}: event {number}: its checksum is wrong; the file is damaged, copy it again")
            event = event_pb2.Event.FromString(data)
            row: dict[str, Any] = {}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    row[value.tag] = value.simple_value
                elif _known(value.tag) and value.HasField("tensor"):
                    array = np.asarray(tensor_util.make_ndarray(value.tensor))
                    row[value.tag] = float(array) if array.ndim == 0 and array.dtype.kind in "fiu" else array.tolist()
            if row:
                yield f"event {number}", {"step": event.step, **row}


def _plain_key(key: str) -> str:
    """Without the prefix that transformers' reporters put in front of everything."""
    return key.removeprefix("train/") if not any(fnmatchcase(key, one.key) for one in KEYS) else key


def _known(key: str) -> bool:
    """Whether a column is a metric of the table, under whatever run and prefix."""
    own = _plain_key(key.partition(" - ")[2] or key).removesuffix("/threshold")
    return any(fnmatchcase(own, one.key) for one in KEYS)


def _chosen(logged: Iterable[str]) -> dict[str, tuple[Key, str]]:
    """gauge -> its key of the table and its name in the log."""
    logged = sorted(logged)
    chosen: dict[str, tuple[Key, str]] = {}
    for one in KEYS:
        name = next((key for key in logged if fnmatchcase(key, one.key)), None)
        if name is not None and one.gauge not in chosen:
            chosen[one.gauge] = (one, name)
    return chosen


# ---------------------------------------------------------------------------------------------------------- judging


def _judged(table: Mapping[float, Mapping[str, float]], keys: Mapping[str, tuple[Key, str]], found: _Rows) -> LoggedRun:
    steps = sorted(table)
    column = {gauge: [table[s].get(name, math.nan) for s in steps] for gauge, (_, name) in keys.items()}
    notes = [f"{gauge}: {key.key} of {key.framework} is {key.what}" for gauge, (key, _) in keys.items() if key.what]
    if "kl_token" in column and "length" in column and "kl_behavior_target" not in column:
        column["kl_behavior_target"] = [a * b for a, b in zip(column["kl_token"], column["length"], strict=True)]
        notes.append(f"kl_behavior_target is {keys['kl_token'][1]} a token times {keys['length'][1]}")
        del column["kl_token"]
    if found.unnumbered:
        notes.append(f"{found.unnumbered} rows name no step: they are counted in their order")
    if found.stepless:
        notes.append(f"{found.stepless} rows of metrics are left out: their step is empty")
    if found.twice:
        notes.append(f"{found.twice} values were logged again at the same step (a restart?): the last one counts")
    for reason, places in found.skipped.items():
        notes.append(f"{len(places)} left out (--skip-bad): {reason} ({', '.join(places[:5])})")
    limits, gauges = sample_panel([0.0, 0.0], length=[1, 1], norm=[1.0, 1.0]), []  # whatever the samples
    limits |= dict.fromkeys(("ess_fraction", "ess_fraction_token"), limits["ess_fraction_sequence"])
    limits["max_leverage"] = leverage_diagnostic(0)
    for name, values in column.items():
        if name in ("reward", "length") or not any(map(math.isfinite, values)):
            continue
        here = [(s, v) for s, v in zip(steps, values, strict=True) if not math.isnan(v)]
        broken = sum(math.isinf(v) for v in values)
        notes += [f"{name} is infinite at {broken} steps"] if broken else []
        logged = [table[at].get(f"{keys[name][1]}/threshold", math.nan) for at, _ in here] if name in keys else []
        limit = limits.get(name)
        own = bool(logged) and all(map(math.isfinite, logged))
        gauges.append(
            Track(
                name=name,
                at=[s for s, _ in here],
                value=[v for _, v in here],
                limit=logged if own else None if limit is None or name in OF_N else [limit.threshold] * len(here),
                high_is_bad=True if limit is None else limit.high_is_bad,
                meaning=NO_LIMIT.get(name, "") if limit is None else limit.meaning,
            )
        )
    gauges.sort(key=lambda one: one.limit is None)
    reward, collapsed = None, None
    if "reward" in column:
        here = [(s, v) for s, v in zip(steps, column["reward"], strict=True) if math.isfinite(v)]
        reward = Track("reward", [s for s, _ in here], [v for _, v in here], None)
        if len(here) >= 20 and min(reward.value) >= 0:
            at = int(collapse_step(np.array(reward.value)[:, None])[0])
            collapsed = None if at == NOT_COLLAPSED else here[at][0]
    chosen = {gauge: key for gauge, (key, _) in keys.items()}
    return LoggedRun(steps, gauges, chosen, reward, collapsed, [*found.notes, *notes], found.skipped)


def metrics_summary(found: LoggedRun) -> list[str]:
    """Five plain lines: what was read, how stale, what dominates, what to change, how sure."""
    frameworks = ", ".join(dict.fromkeys(key.framework for key in found.keys.values()))
    span = f"{len(found.steps)} steps, {found.steps[0]} to {found.steps[-1]}"
    lines = [f"Data: metrics alone, of {frameworks}: {span}. Whether they were computed right only rollouts can show."]
    ess = found.gauge("ess_fraction_sequence", "ess_fraction", "ess_fraction_token")
    told = [_course(one) for one in (ess, found.gauge("mean_weight"), found.gauge("kl_behavior_target")) if one]
    alarms = found.first_alarms
    first = min(alarms, key=lambda name: alarms[name], default=None)
    said = f"; first alarm at step {alarms[first]} ({first})" if first else "; no alarm" if told else ""
    lines.append(f"Staleness: {'; '.join(told) or 'no gauge of it is logged'}{said}.")
    share = found.gauge("max_share")
    unknown = "cannot be told, metrics do not say which samples count"
    lines.append(f"Dominates: {_course(share) if share else unknown}.")
    collapsed = f" The reward collapsed at step {found.collapsed_at}." if found.collapsed_at is not None else ""
    if ess is not None:
        last = [x for x in ess.value if math.isfinite(x)][-1]
        scale = float(step_scale(np.asarray(min(max(last, 0.0), 1.0)), exponent=0.5)) if last > 0 else 0.0
        change = f"Change: scale the step by {scale:.2f} (square root of the last ESS)"
        change += "; cap the lag where the ESS falls below one half" if last < HALF else ""
    else:
        change = "Change: log the ESS of sequence weights, or dump rollouts; without it nothing can be said"
    lines.append(f"{change}.{collapsed}")
    lines.append(
        "How sure: not at all of a single step: the samples behind it and the tail of their weights (k-hat) are not "
        "logged."
        if found.gauge("khat") is None
        else f"How sure: {_course(found.gauge('khat'))}."
    )
    return lines


def _course(one: Track | None) -> str:
    assert one is not None
    values = [(s, v) for s, v in zip(one.at, one.value, strict=True) if math.isfinite(v)]
    (a, first), (b, last) = values[0], values[-1]
    return f"{one.name.replace('_', ' ')} {first:.3g} at step {a}" + (f", {last:.3g} at step {b}" if a != b else "")
