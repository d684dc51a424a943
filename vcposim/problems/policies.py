"""Policies small enough to know everything about: tables of softmax rows.

A policy here is a table of log-probabilities (*row, V): one row for each situation it can be in (a bandit has one row,
a contextual bandit one per context, a token chain one per position and state), V choices in each. Two ways of making
the table from parameters:

    tabular   logit[row, v] = theta[row, v]                p = rows * V, scores of different rows are orthogonal
    linear    logit[row, v] = <feature[row, v], theta>     p = d, rows share parameters, as in a network

The score of one choice is the gradient of its log-probability, grad log pi(v|row) = feature[row, v] - E_pi feature,
with feature = one-hot for the tabular policy. Nobody needs all scores at once: `combine` sums weighted scores over the
whole table, `score_sq_norm` is the table of their squared norms.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self, TypeVar

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError


def log_softmax(logit: Array) -> Array:
    """log(e^x / sum e^x) over the last axis: same -> same; -inf (a choice never made) may be, a row of it not."""
    return log_and_softmax(logit)[0]


def log_and_softmax(logit: Array) -> tuple[Array, Array]:
    """log(e^x / sum e^x) and e^x / sum e^x over the last axis, from one exponential: (..., V) -> (..., V), (..., V)."""
    columns = np.ascontiguousarray(np.moveaxis(logit, -1, 0))  # NumPy reduces many short rows slowly
    shifted = logit - np.max(columns, axis=0)[..., None]
    weight = np.exp(shifted)
    total = np.einsum("...v->...", weight)[..., None]
    return shifted - np.log(total), weight / total


class Policy(Protocol):
    """What problems ask of a policy; `logit` and `log_prob` are (*row, V), nats."""

    @property
    def logit(self) -> Array:
        """What the softmax is of: (*row, V)."""
        ...

    @property
    def log_prob(self) -> Array:
        """log pi of each token in each row: (*row, V)."""
        ...

    @property
    def parameter(self) -> Array:
        """What scores are gradients in: (p,)."""
        ...

    def with_parameter(self, parameter: Array) -> Self:
        """The same policy with another `parameter` (p,)."""
        ...

    def combine(self, weight: Array) -> Array:
        """sum over rows and tokens of weight * score: (..., *row, V) -> (..., p)."""
        ...

    def score_sq_norm(self) -> Array:
        """||s||^2 of each token in each row: (*row, V)."""
        ...


P = TypeVar("P", bound=Policy)


@dataclass(frozen=True)
class TabularSoftmax:
    """One free logit for each row and choice: `logit` (*row, V), nats.

    Raises `InputError` if a logit is NaN or +inf, or a row has no choice left.
    """

    logit: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit", np.asarray(self.logit, dtype=float))
        _require_logit(self.logit)

    @cached_property
    def log_prob(self) -> Array:
        """log pi(v | row): (*row, V), nats."""
        return log_softmax(self.logit)

    @cached_property
    def prob(self) -> Array:
        """pi(v | row): (*row, V)."""
        return np.exp(self.log_prob)

    @property
    def parameter(self) -> Array:
        """The logits, flat: (p,)."""
        return self.logit.reshape(-1)

    def with_parameter(self, parameter: Array) -> Self:
        """The same policy with other logits, `parameter` (p,)."""
        return replace(self, logit=np.reshape(parameter, self.logit.shape))

    def combine(self, weight: Array) -> Array:
        """sum_{row, v} weight s(row, v), where s = onehot(v) - pi(.|row): (*row, V) -> (p,)."""
        total = np.sum(weight, axis=-1, keepdims=True)
        return (weight - self.prob * total).reshape(-1)

    def score_sq_norm(self) -> Array:
        """||s(row, v)||^2 = 1 - 2 pi(v) + sum_u pi(u)^2: (*row, V)."""
        return 1 - 2 * self.prob + np.sum(self.prob**2, axis=-1, keepdims=True)

    def score(self, row: tuple[int, ...], choice: int) -> Array:
        """grad log pi(choice | row): (p,), dense; for tests and small problems."""
        weight = np.zeros(self.logit.shape)
        weight[(*row, choice)] = 1
        return self.combine(weight)


@dataclass(frozen=True)
class LinearSoftmax:
    """Logits linear in shared parameters: `feature` (*row, V, d), `theta` (d,).

    Raises `InputError` if shapes do not match or a logit is not finite.
    """

    feature: Array
    theta: Array

    def __post_init__(self) -> None:
        for name in ("feature", "theta"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        if self.theta.shape != self.feature.shape[-1:]:
            raise InputError(f"theta: shape {self.theta.shape} does not match feature's last axis {self.feature.shape}")
        _require_logit(self.logit)

    @cached_property
    def logit(self) -> Array:
        """<feature, theta>: (*row, V), nats."""
        return self.feature @ self.theta

    @cached_property
    def log_prob(self) -> Array:
        """log pi(v | row): (*row, V), nats."""
        return log_softmax(self.logit)

    @property
    def parameter(self) -> Array:
        """theta: (p,)."""
        return self.theta

    def with_parameter(self, parameter: Array) -> Self:
        """The same features with another `parameter` (p,)."""
        return replace(self, theta=parameter)

    @cached_property
    def score_table(self) -> Array:
        """s(row, v) = feature - E_pi feature: (*row, V, p)."""
        mean = np.einsum("...v,...vd->...d", np.exp(self.log_prob), self.feature)
        return self.feature - mean[..., None, :]

    def combine(self, weight: Array) -> Array:
        """sum_{row, v} weight s(row, v): (*row, V) -> (p,)."""
        return weight.reshape(-1) @ self.score_table.reshape(-1, self.theta.size)

    def score_sq_norm(self) -> Array:
        """||s(row, v)||^2: (*row, V)."""
        return np.sum(self.score_table**2, axis=-1)

    def score(self, row: tuple[int, ...], choice: int) -> Array:
        """grad log pi(choice | row): (p,)."""
        return self.score_table[(*row, choice)]


def _require_logit(logit: Array) -> None:
    if logit.ndim < 1 or logit.shape[-1] < 1:
        raise InputError(f"logit: shape {logit.shape} holds no choice; the last axis is the choices, at least one")
    if np.any(np.isnan(logit)) or np.any(logit == np.inf):
        raise InputError("logit: holds NaN or +inf; logits are finite, or -inf for a choice that is never made")
    if np.any(np.max(logit, axis=-1) == -np.inf):
        raise InputError("logit: a row is -inf everywhere; leave it at least one choice")


def sample(policy: Policy, rng: np.random.Generator, row: tuple[Array, ...]) -> Array:
    """Choices drawn from rows of a policy, by inverse CDF: integers, -> (...), shaped as the index arrays.

    The plain way; problems draw by the alias method (`vcposim.problems.alias`), and tests hold the two together.
    """
    cumulative = np.cumsum(np.exp(policy.log_prob), axis=-1)[row]
    uniform = rng.random(cumulative.shape[:-1])[..., None] * cumulative[..., -1:]
    return np.sum(uniform >= cumulative[..., :-1], axis=-1)


def random_tabular(rng: np.random.Generator, shape: tuple[int, ...], scale: float = 1.0) -> TabularSoftmax:
    """Logits drawn from Normal(0, scale^2): a policy that was never trained, of shape (*row, V)."""
    return TabularSoftmax(scale * rng.standard_normal(shape))


def random_linear(rng: np.random.Generator, shape: tuple[int, ...], d: int, scale: float = 1.0) -> LinearSoftmax:
    """Features Normal(0, 1/d), parameters Normal(0, scale^2): logits of standard deviation about `scale`."""
    feature = rng.standard_normal((*shape, d)) / np.sqrt(d)
    return LinearSoftmax(feature, scale * rng.standard_normal(d))


def moved(policy: P, direction: Array, scale: float) -> P:
    """theta + scale * direction; `direction` (p,)."""
    return policy.with_parameter(policy.parameter + scale * direction)


def drifted(policy: P, rng: np.random.Generator, scale: float) -> P:
    """theta + scale * Normal(0, 1): staleness as undirected drift of the parameters."""
    return moved(policy, rng.standard_normal(policy.parameter.shape), scale)


def drifted_to(
    policy: P, direction: Array, divergence: Callable[[P], float], value: float, *, largest: float = 1e3
) -> P:
    """theta + x * `direction` (p,) with x > 0 such that divergence(moved policy) = value, to 1e-10 relative.

    `divergence` is zero at `policy` and grows along the direction, as chi2 and KL do; see
    `environments.divergence`.

    Raises `InputError` if `value` is not positive or is not reached within `largest` steps of the direction.
    """
    if not 0 < value < float("inf"):
        raise InputError(f"divergence: {value} is not a positive finite number; use drift 0 for no divergence")

    def excess(scale: float) -> float:
        return float(np.log(max(divergence(moved(policy, direction, scale)), 1e-300) / value))

    high = 1e-3
    while excess(high) < 0:
        high *= 2
        if high > largest:
            raise InputError(f"divergence: {value} is not reached along this direction; ask for less, or turn it")
    low = high / 2
    while excess(low) > 0:
        low /= 2
    from scipy.optimize import brentq  # here because it takes longer to load than all else that a bandit needs

    return moved(policy, direction, float(brentq(excess, low, high, xtol=1e-14, rtol=1e-13)))
