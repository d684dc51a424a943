"""`TrainConfig`: everything that decides what a run computes, checked before any work.

Two runs with equal configurations produce equal metrics to the bit on one machine with one number of threads. What
does not decide the numbers (where the output goes, loggers, how often progress is shown) is not here.

A configuration is read from flags, or from a TOML or JSON file with these names as keys.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vcposim.catalogue import entry
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import Estimator
from vcposim.versions import LAWS, Lag

NORMS = ("exact", "sketch", "last_block", "logit", "length")
"""what stands for ||s_i||^2: exact, or one of the named approximations of `llm_bridge.scores.approximate`"""
OPTIMIZERS = ("adamw", "adam", "sgd")
PRECISIONS = ("float32", "float64", "bf16")
SHARDINGS = ("none", "fsdp2")
STEP_RULES = (
    "none", "ess", "ess_sqrt", "ess_linear", "constant", "replay", "lag", "snr", "norm_clip", "skip_spike",
    "gradient_alignment",
)  # fmt: skip
"""`vcposim.catalogue.STEP_RULES` as a user writes them; see `llm_bridge.training.steps`"""


def _about(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """One run. Raises `InputError` for an unknown name or a number out of range; the nearest name is suggested."""

    task: str = _about("what to learn: a name of llm_bridge.tasks.TASKS", "addition")
    task_options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the task, NAME=VALUE (repeat the flag)"}
    )
    model: str = _about("char, smollm2, or the folder of a Hugging Face causal language model", "char")
    base_rate: float | None = _about("success rate that the character model is warmed up to (0.3); 0: untrained", None)
    model_seed: int = _about("of the character model's start and warm-up, which runs of all seeds share", 0)
    estimator: str | Estimator = _about("a name of `vcposim catalogue`", "vcpo")
    step_rule: str = _about("what scales the step: " + ", ".join(STEP_RULES), "none")
    step_value: float = _about(
        "the number of a step rule: the constant, the limit of norm_clip, the factor of skip_spike, the largest cosine "
        "of gradient_alignment",
        1.0,
    )
    step_schedule: tuple[float, ...] = _about("multipliers of step rule replay, in order; the last one stays", ())
    ess_reference: float | str = _about("ESS fraction of a full step: a number in (0, 1], first or running", 1.0)
    lag: int = _about("updates between the version that samples and the one that learns", 0)
    lag_law: str = _about("fixed, uniform on 0..lag, or in_flight (versions mixed inside a trajectory)", "fixed")
    updates: int = _about("updates to make", 200)
    extend: bool = _about("also sample for updates beyond the last, so that --resume can go on with more", True)
    groups: int = _about("prompts of an update, over all ranks", 8)
    group_size: int = _about("responses to each prompt", 8)
    max_new_tokens: int = _about("the policy's own tokens in a trajectory, at most", 12)
    temperature: float = _about("of the policy, when it samples and when it learns", 1.0)
    optimizer: str = _about("adamw, adam or sgd", "adamw")
    lr: float = _about("learning rate", 1e-3)
    weight_decay: float = _about("decoupled in adamw, added to the gradient otherwise", 0.0)
    clip_norm: float = _about("limit of the gradient's global norm; inf for none", 1.0)
    seed: int = _about("of problems, tokens and lags", 0)
    dtype: str = _about("float32, float64, or bf16 (autocast around float32 weights)", "float32")
    norm: str = _about("score norms, where the estimator needs them: " + ", ".join(NORMS), "exact")
    norm_method: str = _about(
        "how exact norms are formed: gram, block, batch, or auto (timed: last bits may differ between runs)", "gram"
    )
    micro_batch: int = _about("trajectories of one forward pass; 0: all of a rank's at once", 0)
    sharding: str = _about("none: a replica on every rank; fsdp2: parameters and optimizer sharded", "none")
    checkpoint_every: int = _about("updates between checkpoints; 0: only at the end", 50)
    keep: int = _about("checkpoints to keep", 2)
    evaluate_every: int = _about("updates between measurements on held-out problems; 0: never", 0)
    evaluate_problems: int = _about("held-out problems of one measurement, one response each", 64)

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", OPTIMIZERS), ("dtype", PRECISIONS), ("norm", NORMS), ("step_rule", STEP_RULES),
            ("lag_law", LAWS), ("sharding", SHARDINGS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        self._check_numbers()
        if self.lag < 0:
            raise InputError(f"lag: {self.lag} is negative; it counts updates, 0 for on policy")
        if self.step_rule == "replay" and not self.step_schedule:
            raise InputError("step_schedule: empty; step rule replay needs the multipliers of another run")
        self.resolved().require(self.group_size)

    def _check_numbers(self) -> None:
        for name, least in (
            ("updates", 1), ("groups", 1), ("group_size", 1), ("max_new_tokens", 0), ("seed", 0), ("model_seed", 0),
            ("micro_batch", 0), ("checkpoint_every", 0), ("keep", 1), ("evaluate_every", 0), ("evaluate_problems", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}: {value!r}; give a whole number of at least {least}")
        for name in ("temperature", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: {getattr(self, name)} is not a finite non-negative number")

    def resolved(self) -> Estimator:
        """The estimator itself."""
        return entry(self.estimator).estimator if isinstance(self.estimator, str) else self.estimator

    @property
    def law(self) -> Lag:
        """The lag law, as the laboratory has it."""
        return Lag(self.lag, self.lag_law)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file; an estimator that has no name is written by its representation."""
        named = self.estimator if isinstance(self.estimator, str) else repr(self.estimator)
        out = asdict(self) | {"task_options": dict(self.task_options), "step_schedule": list(self.step_schedule)}
        return out | {"estimator": named, "clip_norm": _finite(self.clip_norm)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `as_dict`. Raises `InputError` for a key that is no field, or a value of another type."""
        known = {f.name: f for f in fields(cls)}
        for name in given:
            if name not in known:
                raise unknown_name("config", name, known)
        return cls(**{name: typed(known[name].name, value) for name, value in given.items()})


def typed(name: str, value: Any) -> Any:
    """A value from a file or a flag as its field has it. Raises `InputError` where it cannot be.

    >>> typed("lag", "4"), typed("clip_norm", "inf"), typed("ess_reference", "first"), typed("lr", 1)
    (4, inf, 'first', 1.0)
    """
    kind = next(f.type for f in fields(TrainConfig) if f.name == name)
    try:
        return _convert(kind, value)
    except (TypeError, ValueError):
        raise InputError(f"{name}: {value!r} is not {_CALLED.get(kind, 'of the right kind')}") from None


_CALLED: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}


def _convert(kind: Any, value: Any) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[value.lower()] if isinstance(value, str) else bool(value)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
            raise ValueError
        return int(value)
    if kind is float:
        return float(value)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if kind == float | None:
        return None if value is None or value == "none" else float(value)
    if kind == float | str:
        return _number_or_name(value)
    if kind == tuple[float, ...]:
        return tuple(float(x) for x in value)
    return value


def _number_or_name(value: Any) -> Any:
    try:
        return float(value)
    except ValueError:
        return value


def read_config(path: str | Path) -> dict[str, Any]:
    """The keys of a TOML (`.toml`) or JSON file. Raises `InputError`, one line, if it cannot be read."""
    path = Path(path)
    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise InputError(f"--config: {path}: no such file") from None
    except (OSError, ValueError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise InputError(f"--config: {path}: not a readable {kind} file ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise InputError(f"--config: {path}: holds no table of names and values")
    return found


def _finite(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)
