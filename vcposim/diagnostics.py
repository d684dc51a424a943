"""Is this batch still about the target policy? Effective sample size and its companions.

ESS = (sum w)^2 / sum w^2 (Kish 1965; Kong 1992), in [1, n]; as a fraction it estimates 1 / (1 + chi2(pi||mu)). It is
scale-invariant, so it cannot see a mode of the target that the behavior policy never samples: `mean_weight` (1 in
expectation) can. Its plug-in value is optimistic under heavy tails: k-hat (`vcposim.gauges.tails`) says when.

Six quantities go by the name ESS in the field's frameworks: token, clamped-sequence and sequence ratios, truncated
or not. So level and treatment are explicit here: they are the `Weighting` that made the weights.

A `Diagnostic` travels with its threshold and the number of samples it needs to mean anything.
"""

from dataclasses import dataclass
from typing import NamedTuple

from vcposim.arrays import (
    Array,
    expectation,
    log_expectation,
    namespace,
    peak,
    require_weights,
    safe_divide,
    supported,
)
from vcposim.errors import InputError
from vcposim.results import Records, Result


@dataclass(frozen=True)
class Diagnostic(Result):
    """A value with the threshold that gives it meaning."""

    name: str
    value: float
    threshold: float
    high_is_bad: bool
    required: float = 1
    """samples below which the value is not to be trusted"""
    meaning: str = ""

    @property
    def alarming(self) -> bool:
        """Whether the value is on the wrong side of its threshold; a NaN always is."""
        return not (self.value < self.threshold if self.high_is_bad else self.value > self.threshold)

    def records(self) -> Records:
        """One row: name, value, the limit it has to keep, whether it does, and what that means."""
        limit = f"{'<' if self.high_is_bad else '>'} {self.threshold:.3g}"
        row = {"diagnostic": self.name, "value": float(self.value), "limit": limit, "alarming": bool(self.alarming)}
        return Records([row | {"required": float(self.required), "meaning": self.meaning}])


def ess_fraction_of_weights(weight: Array, measure: Array) -> Array:
    """rho = E[w]^2 / E[w^2]: (..., n) -> (...), in (0, 1]; 0 where no sample has weight.

    Under the population measure it is 1 / (1 + chi2(pi || mu)).
    """
    mean, square = expectation(weight, measure), expectation(weight * weight, measure)
    return safe_divide(mean * mean, square, 0)


def ess_of_weights(weight: Array) -> Array:
    """ESS = (sum_i w_i)^2 / sum_i w_i^2: (..., n) -> (...), in [1, n] for non-negative weights."""
    xp = namespace(weight)
    total, square = xp.sum(weight, axis=-1), xp.sum(weight * weight, axis=-1)
    return safe_divide(total * total, square, 0)


def chi2_of_weights(weight: Array, measure: Array) -> Array:
    """chi2(pi || mu) = E[(w - 1)^2]: (..., n) -> (...); E[w^2] = 1 + chi2 when E[w] = 1."""
    return expectation((weight - 1) * (weight - 1), measure)


def max_share_of_weights(weight: Array, measure: Array) -> Array:
    """max_i m_i w_i / sum_j m_j w_j: (..., n) -> (...), the share of the heaviest sample."""
    xp = namespace(weight, measure)
    mass = weight * measure
    return safe_divide(xp.max(mass, axis=-1), xp.sum(mass, axis=-1), 0)


def ess(log_weight: Array) -> Array:
    """ESS from log-weights, exact at |log w| of 10^4 and beyond: (..., n) -> (...), in [1, n].

    Raises `InputError` on NaN, +inf, an empty batch, or a batch in which no sample has weight.

    >>> import numpy as np
    >>> ess(np.array([-9999.0, -9999.0, -9999.0])), ess(np.array([0.0, 10_000.0]))
    (np.float64(3.0), np.float64(1.0))
    """
    size = ess_fraction(log_weight) * log_weight.shape[-1]
    return namespace(log_weight).maximum(size, 1.0)


def ess_fraction(log_weight: Array, measure: Array | None = None) -> Array:
    """ESS / n from log-weights (default measure 1/n): (..., n) -> (...), in [1/n, 1].

    Raises `InputError` as `ess` does.
    """
    require_weights("log_weight", log_weight)
    xp = namespace(log_weight)
    if measure is None:
        measure = xp.ones_like(log_weight) / log_weight.shape[-1]
    shifted = xp.exp(supported(log_weight, measure) - peak(log_weight, measure))
    fraction = ess_fraction_of_weights(shifted, measure)
    if not bool(xp.all(fraction > 0)):
        raise InputError("log_weight: a group has no weight at all (all -inf or masked); drop it, or check the ratios")
    return xp.minimum(fraction, 1.0)


def max_share(log_weight: Array, measure: Array | None = None) -> Array:
    """Share of the heaviest sample in the total weight: (..., n) -> (...), in [1/n, 1]."""
    require_weights("log_weight", log_weight)
    xp = namespace(log_weight)
    if measure is None:
        measure = xp.ones_like(log_weight) / log_weight.shape[-1]
    return max_share_of_weights(xp.exp(supported(log_weight, measure) - peak(log_weight, measure)), measure)


def log_mean_weight(log_weight: Array, measure: Array | None = None) -> Array:
    """log E[w], 0 in expectation for untouched ratios: (..., n) -> (...), nats."""
    require_weights("log_weight", log_weight)
    if measure is None:
        measure = namespace(log_weight).ones_like(log_weight) / log_weight.shape[-1]
    return log_expectation(log_weight, measure)


def kl_behavior_target(log_ratio: Array, measure: Array) -> Array:
    """KL(mu || pi) estimated by E[-log w], nats: (..., n) -> (...), unbiased under mu, can be negative in a sample."""
    return expectation(-_counted(log_ratio, measure), measure)


def kl_low_variance(log_ratio: Array, measure: Array) -> Array:
    """KL(mu || pi) estimated by E[w - 1 - log w], nats, never negative (Schulman's k3): (..., n) -> (...)."""
    log_ratio = _counted(log_ratio, measure)
    return expectation(namespace(log_ratio).expm1(log_ratio) - log_ratio, measure)


def _counted(log_ratio: Array, measure: Array) -> Array:
    return namespace(log_ratio).where(measure > 0, log_ratio, 0.0)


class WeightSums(NamedTuple):
    """Additive sums of weights on a log scale: what ranks exchange to agree on one ESS.

    True sums are `total` e^log_scale and `square` e^(2 log_scale). A part without samples is the neutral element: a
    rank without trajectories must not read ESS 0.
    """

    log_scale: Array
    count: Array
    total: Array
    square: Array

    def merge(self, other: "WeightSums") -> "WeightSums":
        """Sums of both parts, on the larger scale: associative and commutative up to rounding."""
        xp = namespace(self.log_scale)
        scale = xp.maximum(self.log_scale, other.log_scale)
        top = xp.where(scale == -float("inf"), 0.0, scale)
        a, b = xp.exp(self.log_scale - top), xp.exp(other.log_scale - top)
        return WeightSums(
            scale,
            self.count + other.count,
            self.total * a + other.total * b,
            self.square * a * a + other.square * b * b,
        )

    def ess_fraction(self) -> Array:
        """ESS / n of everything merged: (...); NaN when there is nothing, so that a brake can fail closed."""
        nothing = self.total * 0 + float("nan")
        return safe_divide(self.total * self.total, self.square * self.count, nothing)

    def log_mean(self) -> Array:
        """log of the mean weight, nats: (...); NaN when there is nothing."""
        mean = safe_divide(self.total, self.count, self.total * 0 + float("nan"))
        return namespace(self.total).log(mean) + self.log_scale


def weight_sums(log_weight: Array, measure: Array | None = None) -> WeightSums:
    """Sums over all axes of log-weights, each counted `measure` times (default once; 0 for padding): same -> sums."""
    xp = namespace(log_weight)
    flat = xp.reshape(log_weight, (-1,))
    here = xp.ones_like(flat) if measure is None else xp.reshape(measure, (-1,))
    kept = supported(flat, here)
    log_scale = xp.max(kept) if flat.shape[0] else xp.sum(flat) - float("inf")
    top = xp.where(log_scale == -float("inf"), 0.0, log_scale)
    weight = xp.exp(kept - top)
    return WeightSums(log_scale, xp.sum(here), xp.sum(here * weight), xp.sum(here * weight * weight))
