"""Mean, bias, variance and MSE of a gradient estimate, taken once, in one place.

Two variances, never confused: `variance_per_sample` is the trace of the covariance of one contribution c_i s_i,
`variance_of_mean` that of the group's average (1/n) sum_i c_i s_i. With an in-batch baseline contributions are
dependent and the second is not the first over n.

Every moment is a function of four additive `Sums`; chunks, micro-batches, processes and ranks merge sums, nothing else.
Enumerated batches come with their probability as `mass`, drawn ones with mass 1 each: the same code.
"""

from dataclasses import dataclass
from typing import NamedTuple

from vcposim.arrays import Array, expectation, namespace, safe_divide, where
from vcposim.batch import Batch
from vcposim.results import Records, Result

SCALARS = {
    "relative_bias": "|mean - gradient| / |gradient|: 0 is unbiased, 1 as wrong as not moving at all",
    "variance_per_sample": "total variance (trace of the covariance) of one contribution c s",
    "variance_of_mean": "total variance of the group's mean, the gradient estimate itself",
    "mse": "variance of the mean + |bias|^2: the expected squared error of the estimate",
    "descent_efficiency": "share of |gradient|^2 / 2L that its best step is sure to gain; shrinking it changes nothing",
    "snr": "|mean|^2 / variance of the mean: below 1, one estimate is more noise than signal",
    "cosine": "of the angle between mean and gradient: 1 points uphill, 0 sideways, below 0 downhill",
}
"""the numbers of `Moments`, and what each says"""


class Sums(NamedTuple):
    """Additive sums over batches k of mass p_k with estimate g_k = sum_i measure_i c_i s_i."""

    mass: Array
    """sum_k p_k: ()"""
    estimate: Array
    """sum_k p_k g_k: (p,)"""
    estimate_sq_norm: Array
    """sum_k p_k ||g_k||^2: ()"""
    contribution_sq_norm: Array
    """sum_k p_k sum_i measure_i ||c_i s_i||^2: ()"""

    def merge(self, other: "Sums") -> "Sums":
        """Component-wise sum: associative and commutative."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


def batch_sums(batch: Batch, coefficient: Array, mass: Array | None = None) -> Sums:
    """The sums of one or many batches: axes before the samples are replications of `mass` (default 1 each).

    Shapes: coefficient (..., n) or (..., n, t), mass (...) -> sums.
    """
    xp, scores = namespace(coefficient), batch.scored()
    measure = batch.measure if coefficient.ndim == batch.reward.ndim else batch.measure[..., None]
    estimate = scores.combine(coefficient * measure)
    square = xp.sum(estimate * estimate, axis=-1)
    contribution = expectation(scores.sq_norm(coefficient), batch.measure)
    mass = xp.ones_like(square) if mass is None else mass
    axes = tuple(range(estimate.ndim - 1))
    weighted = estimate * mass[..., None]
    return Sums(
        mass=xp.sum(mass),
        estimate=xp.sum(weighted, axis=axes) if axes else weighted,
        estimate_sq_norm=xp.sum(mass * square),
        contribution_sq_norm=xp.sum(mass * contribution),
    )


@dataclass(frozen=True)
class Moments(Result):
    """First two moments of an estimator, beside the gradient it is meant to estimate."""

    gradient: Array
    """the exact gradient: (p,)"""
    mean: Array
    """E[(1/n) sum_i c_i s_i]: (p,)"""
    variance_per_sample: Array
    """tr Cov(c_i s_i): ()"""
    variance_of_mean: Array
    """tr Cov((1/n) sum_i c_i s_i): ()"""

    @property
    def bias(self) -> Array:
        """mean - gradient: (p,)"""
        return self.mean - self.gradient

    @property
    def relative_bias(self) -> Array:
        """||mean - gradient|| / ||gradient||, infinite where only the gradient is zero: ()."""
        size = norm(self.bias)
        return safe_divide(size, norm(self.gradient), where(size > 0, float("inf"), size))

    @property
    def mse(self) -> Array:
        """E||g - gradient||^2 = variance_of_mean + ||bias||^2: ()."""
        return self.variance_of_mean + sq_norm(self.bias)

    @property
    def snr(self) -> Array:
        """||mean||^2 / variance_of_mean; infinite for a noiseless estimate, 0 for one that is always zero: ()."""
        signal = sq_norm(self.mean)
        return safe_divide(signal, self.variance_of_mean, where(signal > 0, float("inf"), signal))

    @property
    def cosine(self) -> Array:
        """cos(mean, gradient), 0 where either vanishes: ()."""
        dot = namespace(self.mean).sum(self.mean * self.gradient)
        return safe_divide(dot, norm(self.mean) * norm(self.gradient), 0.0)

    @property
    def descent_efficiency(self) -> Array:
        """D of the group's estimate, see `descent_efficiency`: (); from draws too large by O(1 / number of batches)."""
        dot = namespace(self.mean).sum(self.mean * self.gradient)
        return descent_efficiency(dot, sq_norm(self.gradient), self.variance_of_mean + sq_norm(self.mean))

    def records(self) -> Records:
        """One row: the numbers of `SCALARS`."""
        return Records([{name: float(getattr(self, name)) for name in SCALARS}])


def descent_efficiency(inner: Array, gradient_sq_norm: Array, second_moment: Array) -> Array:
    """D = <g, E x>^2 / (||g||^2 E||x||^2) in [0, 1], of an estimate x of g, biased or not: same -> same; 0 of no step.

    With its own best step on an L-smooth objective, x is sure to gain D ||g||^2 / (2 L) if <g, E x> > 0 (T15.gain); and
    min over kappa of E||kappa x - g||^2 = (1 - D) ||g||^2 (T15.shrink). So D is what the mean squared error says once
    nobody is paid for making x smaller. Of an unbiased x, D = snr / (1 + snr).
    """
    return safe_divide(inner * inner, gradient_sq_norm * second_moment, inner * 0)


def sq_norm(x: Array) -> Array:
    """||x||^2 over the last axis: (..., p) -> (...)."""
    return namespace(x).sum(x * x, axis=-1)


def norm(x: Array) -> Array:
    """||x|| over the last axis: (..., p) -> (...)."""
    return namespace(x).sqrt(sq_norm(x))


def trace_covariance(vector: Array, measure: Array) -> Array:
    """tr Cov x = E||x - E x||^2 for vectors (..., n, p) under a measure (..., n): -> (...).

    The textbook definition, two passes; `moments` is the one-pass form for sums, and tests hold them equal.
    """
    xp = namespace(vector, measure)
    mean = xp.sum(vector * measure[..., None], axis=-2, keepdims=True)
    deviation = vector - mean
    return expectation(xp.sum(deviation * deviation, axis=-1), measure)


def moments(sums: Sums, gradient: Array, *, drawn: bool) -> Moments:
    """Moments from sums, exact of enumerated batches, unbiased of `drawn` ones (mass: how many): (p,) -> moments.

    tr Cov = E||x||^2 - ||E x||^2; of m draws, ||mean||^2 exceeds ||E x||^2 by variance_of_mean / m on average, which is
    given back here. One draw alone has no variance (NaN), never a silent 0.
    """
    mean = sums.estimate / sums.mass
    mean_sq = sq_norm(mean)
    variance_of_mean = sums.estimate_sq_norm / sums.mass - mean_sq
    excess = mean_sq * 0
    if drawn:
        variance_of_mean = safe_divide(variance_of_mean * sums.mass, sums.mass - 1, mean_sq * 0 + float("nan"))
        excess = variance_of_mean / sums.mass
    variance_per_sample = sums.contribution_sq_norm / sums.mass - mean_sq + excess
    return Moments(gradient, mean, _positive(variance_per_sample), _positive(variance_of_mean))


def _positive(x: Array) -> Array:
    # a variance; rounding of E||x||^2 - ||E x||^2 can leave -1e-17 where it is zero. NaN stays NaN.
    return where(x < 0, x * 0, x)
