"""`TrainConfig`: everything that decides what a run computes, checked before any work.

Two runs with equal configurations produce equal metrics to the bit on one machine with one number of threads. What
does not decide the numbers (where the output goes, loggers, how often progress is shown) is not here.

A configuration is read from flags, or from a TOML or JSON file with these names as keys.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from vcposim.catalogue.loading import estimator_named
from vcposim.control import EXPONENTS, STEP_RULES
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import Estimator, Resolved
from vcposim.learning.lags import LAG_LAWS, Lag
from vcposim.learning.run_records import require_memory
from vcposim.learning.step_rules import Control

NORMS = ("exact", "sketch", "last_block", "logit", "length")
"""what stands for ||s_i||^2: exact, or one of the named approximations of `llm_bridge.scores.approximate`"""
NORM_METHODS = ("gram", "block", "batch", "fused", "auto", "loop")
"""how exact norms are taken, see `ScoreTape`"""
OPTIMIZERS = ("adamw", "adam", "sgd")
PRECISIONS = ("float32", "float64", "bf16")
SHARDINGS = ("none", "fsdp2")


@dataclass(frozen=True)
class TrainConfig:
    """One run. Raises `InputError` for an unknown name or a number out of range; the nearest name is suggested."""

    task: Annotated[str, "what to learn: a name of llm_bridge.tasks"] = "addition"
    task_options: Annotated[Mapping[str, Any], "options of the task"] = field(default_factory=dict)
    model: Annotated[str, "char, smollm2, or the folder of a Hugging Face causal language model"] = "char"
    base_rate: Annotated[float | None, "success rate the char model is warmed up to (0.3); 0: untrained"] = None
    model_seed: Annotated[int, "of the char model's start and warm-up, which runs of all seeds share"] = 0

    estimator: Annotated[str | Resolved, "a name of `vcposim catalogue`, or yours: file.py:function"] = "vcpo"
    baseline: Annotated[str, "instead of the estimator's own, as on_policy_optimal (n^2) for ppo_clip"] = ""
    memory: Annotated[float, "what a baseline keeps of a prompt's past responses when it comes again, in [0, 1)"] = 0.0
    norm: Annotated[str, "score norms where the estimator needs them: " + ", ".join(NORMS)] = "exact"
    norm_method: Annotated[
        str, "of exact norms: gram, block, batch, fused (a C kernel), auto (timed: last bits may differ) or loop"
    ] = "gram"
    step_rule: Annotated[str, "what scales the step: " + ", ".join(STEP_RULES)] = "none"
    ess_reference: Annotated[float | str, "ESS fraction of a full step: in (0, 1], first or running"] = 1.0
    step_value: Annotated[
        float, "; ".join(f"{rule.value} of {name}" for name, rule in STEP_RULES.items() if rule.value)
    ] = 1.0
    step_schedule: Annotated[tuple[float, ...], "multipliers that replay takes, in order; the last one stays"] = ()

    lag: Annotated[int, "updates between the version that samples and the one that learns"] = 0
    lag_law: Annotated[str, "fixed, uniform on 0..lag, or in_flight: versions mixed inside a trajectory"] = "fixed"

    updates: Annotated[int, "updates to make"] = 200
    extend: Annotated[bool, "also sample for updates beyond the last, so that a resumed run may go on"] = True
    problems: Annotated[int, "prompts to train on, which take turns; 0: none comes twice"] = 0
    groups: Annotated[int, "prompts of an update, over all ranks"] = 8
    group_size: Annotated[int, "responses to a prompt"] = 8
    max_new_tokens: Annotated[int, "the policy's own tokens in a trajectory, at most"] = 12
    temperature: Annotated[float, "of the policy, when it samples and when it learns"] = 1.0
    seed: Annotated[int, "of problems, tokens and lags"] = 0

    optimizer: Annotated[str, ", ".join(OPTIMIZERS)] = "adamw"
    lr: Annotated[float, "learning rate"] = 3e-4
    weight_decay: Annotated[float, "decoupled in adamw, added to the gradient otherwise"] = 0.0
    clip_norm: Annotated[float, "limit of the gradient's global norm; inf for none"] = 1.0

    dtype: Annotated[str, "float32, float64, or bf16: autocast around float32 weights"] = "float32"
    micro_batch: Annotated[int, "trajectories of one forward pass; 0: all of a rank's at once"] = 0
    sharding: Annotated[str, "none: a replica on every rank; fsdp2: gradients and optimizer sharded"] = "none"

    checkpoint_every: Annotated[int, "updates between checkpoints; 0: only at the end"] = 50
    keep: Annotated[int, "checkpoints to keep"] = 2
    evaluate_every: Annotated[int, "updates between measurements on held-out problems; 0: only at the end"] = 0
    evaluate_problems: Annotated[int, "held-out problems of a measurement, one response each"] = 256

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", OPTIMIZERS), ("dtype", PRECISIONS), ("norm", NORMS), ("norm_method", NORM_METHODS),
            ("step_rule", STEP_RULES), ("lag_law", LAG_LAWS), ("sharding", SHARDINGS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        for name, least in (
            ("updates", 1), ("groups", 1), ("group_size", 1), ("max_new_tokens", 0), ("seed", 0), ("model_seed", 0),
            ("micro_batch", 0), ("checkpoint_every", 0), ("keep", 1), ("evaluate_every", 0), ("evaluate_problems", 1),
            ("problems", 0),
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
        if self.lag < 0:
            raise InputError(f"lag: {self.lag} is negative; it counts updates, 0 for on policy")
        try:
            self.control()
        except InputError as error:
            raise InputError(f"step_{error}") from None
        if self.norm_method == "fused":
            from llm_bridge.scores.fused import require_kernel  # torch, which --help can do without

            require_kernel(self.norm_method, "norm_method")
        self.resolved().require(self.group_size)
        require_memory(self.memory, self.resolved())
        if self.memory and not self.problems:
            raise InputError(f"memory: {self.memory} where no prompt comes twice; say how many take turns (problems)")

    def resolved(self) -> Resolved:
        """The estimator itself; a function that is written for NumPy is fed with NumPy's arrays.

        Raises `InputError` for a baseline beside a function of one's own.
        """
        given = self.estimator
        found = estimator_named(given, library="torch") if isinstance(given, str) else given
        if not self.baseline:
            return found
        if not isinstance(found, Estimator):
            raise InputError(f"baseline: {self.baseline!r} with a function of your own, whose baseline is its affair")
        return replace(found, baseline=self.baseline)

    def changed(self, **changes: Any) -> "TrainConfig":
        """The same with other values for some fields."""
        return replace(self, **changes)

    def control(self, exponent: float = EXPONENTS["adam"], reference: float = 1.0) -> Control:
        """The step rule with its numbers; the optimizer knows the exponent, the batches may set the reference."""
        return Control(self.step_rule, exponent, reference, self.step_value, tuple(self.step_schedule))

    @property
    def law(self) -> Lag:
        """The lag law, as the laboratory has it."""
        return Lag(self.lag, self.lag_law)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file; an estimator that has no name is written by its representation."""
        named = self.estimator if isinstance(self.estimator, str) else repr(self.estimator)
        out = asdict(self) | {"task_options": dict(self.task_options), "step_schedule": list(self.step_schedule)}
        return out | {
            "estimator": named,
            "clip_norm": self.clip_norm if math.isfinite(self.clip_norm) else str(self.clip_norm),
        }

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
    kind = get_type_hints(TrainConfig)[name]
    try:
        return _convert(kind, value)
    except (TypeError, ValueError, KeyError):
        raise InputError(f"{name}: {value!r} is not {_CALLED.get(kind, 'of the right kind')}") from None


def about(name: str) -> str:
    """What a field is, in a line."""
    (text,) = get_args(get_type_hints(TrainConfig, include_extras=True)[name])[1:]
    return str(text)


_CALLED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a name",
    float | None: "a number",
    tuple[float, ...]: "a list of numbers",
}


def _convert(kind: Any, value: Any) -> Any:
    match kind:
        case _ if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[value.lower()]
        case _ if kind is int:
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError(value)
            return int(value)
        case _ if kind is float:
            return float(value)
        case _ if kind is str:
            return _name(value)
        case _ if kind == float | None:
            return None if value is None or value == "none" else float(value)
        case _ if kind == float | str:
            try:
                return float(value)
            except ValueError:
                return value
        case _ if kind == tuple[float, ...]:
            return tuple(float(x) for x in value)
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
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
