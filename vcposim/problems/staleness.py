"""Staleness: which version of the policy sampled what the learner now trains on.

A **lag law** is the distribution of the lag, the number of learner updates between the snapshot that sampled and the
target. Synchronous training has lag 0; a pipeline of fixed depth a fixed lag; a queue that mixes batches of several
ages a mixture. A **path** is finer: the lag of each token of a trajectory, for samplers that take new weights in the
middle of one (in-flight weight updates). Its behavior log-probability is the sum of each token's own version.

A **mismatch** is not staleness: it is what sampler and learner compute differently from the *same* weights, by
rounding, temperature or noise. It is there at lag 0.

Laws, paths and mismatches are data (probabilities, tables), so exact moments work under all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError, unknown_name
from vcposim.problems.environments import require_probability
from vcposim.problems.policies import Policy, TabularSoftmax


@dataclass(frozen=True)
class LagLaw:
    """P(lag = k), k = 0..max_lag: `probability` (max_lag + 1,).

    Raises `InputError` if these are no probabilities.
    """

    probability: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "probability", np.asarray(self.probability, dtype=float))
        require_probability("lag probability", self.probability)

    @property
    def max_lag(self) -> int:
        """The largest lag that occurs."""
        return int(np.flatnonzero(self.probability)[-1])

    @property
    def mean(self) -> float:
        """E[lag], updates."""
        return float(self.probability @ np.arange(self.probability.size))

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Independent lags, integers, of the shape asked for: -> (...)."""
        return rng.choice(self.probability.size, size=shape, p=self.probability)


def fixed_lag(lag: int) -> LagLaw:
    """Always the same lag: a pipeline of fixed depth."""
    _require_count("lag", lag)
    return LagLaw(np.eye(lag + 1)[lag])


def uniform_lag(max_lag: int) -> LagLaw:
    """0..max_lag, all alike."""
    _require_count("max_lag", max_lag)
    return LagLaw(np.full(max_lag + 1, 1 / (max_lag + 1)))


def mixed_queue(max_lag: int, turnover: float, admission: str = "wait") -> LagLaw:
    """A queue from which each update takes every waiting batch with probability q = `turnover`.

    P(k) = q (1 - q)^k for k < max_lag. A batch that has waited `max_lag` updates is taken without fail (`wait`: the
    sampler is held back until it is), or with probability q and else thrown away (`drop`: truncated, renormalized).

    Raises `InputError` for a turnover out of (0, 1], or an admission nobody knows.
    """
    _require_count("max_lag", max_lag)
    if not 0 < turnover <= 1:
        raise InputError(f"turnover: {turnover} is not in (0, 1]; it is the share of waiting batches an update takes")
    prob = turnover * (1 - turnover) ** np.arange(max_lag + 1)
    if admission == "wait":
        prob[-1] = (1 - turnover) ** max_lag
    elif admission != "drop":
        raise unknown_name("admission", admission, ("wait", "drop"))
    return LagLaw(prob / prob.sum())


@dataclass(frozen=True)
class LagPaths:
    """The lag of each token: `lag` (M, T) integers >= 0, path m taken with `probability` (M,)."""

    lag: Array
    probability: Array


def whole_trajectory(law: LagLaw, length: int) -> LagPaths:
    """One version for all `length` tokens of a trajectory."""
    lag = np.flatnonzero(law.probability)
    return LagPaths(np.repeat(lag[:, None], length, axis=1), law.probability[lag])


def in_flight(law: LagLaw, length: int, tokens_per_update: int) -> LagPaths:
    """New weights arrive every `tokens_per_update` tokens, at a uniformly random phase; sampling goes on with them.

    lag_t = max(0, first - floor((t + phase) / tokens_per_update)); `law` is that of the first token's lag at phase 0.

    Raises `InputError` for `tokens_per_update` below 1.
    """
    if tokens_per_update < 1:
        raise InputError(f"tokens_per_update: {tokens_per_update} is less than 1; weights arrive between tokens")
    phase = np.arange(tokens_per_update)
    arrived = (np.arange(length) + phase[:, None]) // tokens_per_update
    first = np.flatnonzero(law.probability)
    lag = np.maximum(0, first[:, None, None] - arrived).reshape(-1, length)
    weight = np.repeat(law.probability[first] / tokens_per_update, tokens_per_update)
    paths, which = np.unique(lag, axis=0, return_inverse=True)
    return LagPaths(paths, np.bincount(which.reshape(-1), weight))


@dataclass(frozen=True)
class PolicyHistory:
    """The last versions of a policy, newest last; `version` stamps the newest.

    A lag that reaches before version 0 means version 0: nothing older ever sampled.

    Raises `InputError` for no policies, or a negative version.
    """

    policies: tuple[Policy, ...]
    version: int
    capacity: int | None = None

    def __post_init__(self) -> None:
        if not self.policies or self.version < len(self.policies) - 1:
            raise InputError(
                f"version: {self.version} with {len(self.policies)} policies kept; give at least one policy, and count "
                "versions from 0"
            )

    @classmethod
    def of_run(cls, policies: Sequence[Policy]) -> "PolicyHistory":
        """All policies of a run, from version 0 on."""
        return cls(tuple(policies), len(policies) - 1)

    @property
    def newest(self) -> Policy:
        """The policy at lag 0: the target."""
        return self.policies[-1]

    def pushed(self, policy: Policy) -> "PolicyHistory":
        """The history after one more update; only the last `capacity` versions are kept."""
        kept = (*self.policies, policy)
        return PolicyHistory(kept[-self.capacity :] if self.capacity else kept, self.version + 1, self.capacity)

    def at(self, lag: int) -> Policy:
        """The policy `lag` updates ago, version 0 at the earliest.

        Raises `InputError` for a negative lag, or a version that is no longer kept.
        """
        _require_count("lag", lag)
        back = min(lag, self.version)
        if back >= len(self.policies):
            raise InputError(f"lag: {lag} reaches a version no longer kept; raise capacity above {self.capacity}")
        return self.policies[-1 - back]

    def tables(self, paths: LagPaths) -> list[Array]:
        """Log-probabilities (T, S, V) of each path: at every position the table of its own version."""
        positions = range(paths.lag.shape[1])
        return [np.stack([self.at(int(lag[t])).log_prob[t] for t in positions]) for lag in paths.lag]


def round_to_bfloat16(x: Array) -> Array:
    """The nearest bfloat16 (8 exponent bits, 7 of mantissa), ties to even: same -> same."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x).astype(float)


def round_to_float8(x: Array) -> Array:
    """The nearest float8 e4m3 (4 exponent bits, 3 of mantissa), ties to even, saturating at 448: same -> same."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    step = np.ldexp(1.0, exponent - 3)
    with np.errstate(invalid="ignore"):
        rounded = np.clip(np.round(x / step) * step, -448.0, 448.0)
    return np.where(np.isfinite(x), rounded, x)


ROUNDING = {"bfloat16": round_to_bfloat16, "float8": round_to_float8}


def rounded(policy: Policy, number_format: str) -> TabularSoftmax:
    """The policy as sampled from logits in another number format (`bfloat16`, `float8`).

    Raises `InputError` for a format nobody knows.
    """
    if number_format not in ROUNDING:
        raise unknown_name("number_format", number_format, ROUNDING)
    return TabularSoftmax(ROUNDING[number_format](policy.logit))


def tempered(policy: Policy, temperature: float) -> TabularSoftmax:
    """The policy as sampled at another temperature: logits / temperature.

    Raises `InputError` for a temperature that is not finite and positive.
    """
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature: {temperature} is not a positive finite number; 1 leaves the policy as it is")
    return TabularSoftmax(policy.logit / temperature)


def noisy(policy: Policy, rng: np.random.Generator, scale: float) -> TabularSoftmax:
    """The policy as one call of a nondeterministic sampler computes it: logits + Normal(0, scale^2)."""
    return TabularSoftmax(policy.logit + scale * rng.standard_normal(policy.logit.shape))


def _require_count(name: str, value: int) -> None:
    if value < 0 or value != int(value):
        raise InputError(f"{name}: {value} is not a count of updates; give an integer of 0 or more")
