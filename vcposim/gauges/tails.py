"""How heavy is the tail of the weights? Pareto k-hat and Pareto smoothing.

The largest importance weights are fitted by a generalized Pareto distribution with shape k. Moments of order 1/k and
above are infinite: k < 1/2 a variance, k < 1 a mean. So k-hat says what no function of the weights' own mean square
can: whether the effective sample size read from n samples is itself to be trusted. **Smoothing** replaces the fitted
tail by its expected order statistics: a data-driven truncation (Vehtari, Simpson, Gelman, Yao & Gabry, JMLR 25(72),
2024, arXiv 1507.02646).

The fit is the empirical Bayes estimate of Zhang & Stephens (Technometrics 51(3), 2009) with the prior of Vehtari et
al. It is written here although `arviz-stats` has it: that library takes 1 to 2 s to import, for what is 20 lines of
arithmetic. The tests hold the two together to rounding. What k-hat is where there is nothing to fit:

    nan    fewer than 25 positive weights (a tail of 5), or too few distinct values: not estimable, hence alarming
    -inf   the top weights are all equal: there is no tail, nothing to worry about
    +inf   the heaviest weight puts its own tail out of float range: no number of samples would do
"""

import math
from typing import NamedTuple

import numpy as np

from vcposim.arrays import Array, namespace, require_weights
from vcposim.diagnostics import Diagnostic

MIN_SAMPLES = 25
"""the tail is a fifth of a small sample, and a fit needs five tail samples"""


class Fit(NamedTuple):
    """Smoothed log-weights (n,), and the shape of their tail."""

    log_weight: Array
    khat: float


def khat_threshold(n: float) -> float:
    """min(1 - 1 / log10 n, 0.7): below it, n samples are enough (Vehtari et al. 2024, Eq. 13 and their 0.7 cap).

    >>> khat_threshold(100), khat_threshold(1e6)
    (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(n), 0.7) if n > 1 else -math.inf


def required_samples(khat: float) -> float:
    """10^(1 / (1 - max(0, k))): samples that tame a tail of shape k (Vehtari et al. 2024, Eq. 11).

    Infinite from k = 1 on, where the mean itself is; `MIN_SAMPLES` where k is unknown (NaN).

    >>> required_samples(0.0), required_samples(0.5), required_samples(1.0)
    (10.0, 100.0, inf)
    """
    if math.isnan(khat):
        return MIN_SAMPLES
    exponent = math.inf if khat >= 1 else 1 / (1 - max(0.0, khat))
    return 10.0**exponent if exponent < 308 else math.inf


def tail_length(n: int) -> int:
    """Samples in the fitted tail, min(n / 5, 3 sqrt n) rounded down (Vehtari et al. 2024; the library's rule).

    >>> tail_length(100), tail_length(10_000)
    (20, 300)
    """
    return n // 5 if n <= 225 else math.floor(3 * math.sqrt(n))


def pareto_smooth(log_weight: Array, measure: Array) -> Array:
    """log-weights with their top tail replaced by expected order statistics of its Pareto fit: (..., n) -> (..., n).

    Each leading index is smoothed by itself. Samples of measure zero are padding and, like weights of zero (-inf),
    are left alone; nothing exceeds the largest weight there was. Where k-hat is not finite (too few samples, no tail,
    no fit) the weights come back as they are. Meant as `Weighting("pareto_smooth", smooth=pareto_smooth)`; the
    measure says which samples are real, not how much they count: a tail is fitted to draws.

    Raises `InputError` on NaN, +inf, or an empty array.
    """
    require_weights("log_weight", log_weight)
    xp, x = namespace(log_weight), np.asarray(log_weight)
    present = np.broadcast_to(np.asarray(measure) > 0, x.shape)
    smoothed = x.reshape(-1, x.shape[-1]).astype(np.float64)
    for row, real in zip(smoothed, present.reshape(smoothed.shape), strict=True):
        row[real] = fit(row[real]).log_weight
    return xp.asarray(smoothed.reshape(x.shape).astype(x.dtype))


def tail_index(log_weight: Array) -> float:
    """k-hat of one sample, draws of zero weight (-inf) left out: `log_weight` (n,), nats."""
    x = np.asarray(log_weight, dtype=np.float64)
    sample = Heaviest(x.size)
    sample.add(x)
    return sample.tail_index()


class Heaviest:
    """The largest log-weights of a sample of at most n that comes in pieces: all that its k-hat depends on."""

    def __init__(self, n: int):
        self.kept = tail_length(n) + 1
        self.count = 0
        """positive weights so far"""
        self.largest = np.zeros(0)

    def add(self, log_weight: Array) -> None:
        """A piece: (m,), nats."""
        positive = log_weight[log_weight > -math.inf]
        self.count += positive.size
        every = np.concatenate([self.largest, positive]) if self.largest.size else positive
        self.largest = every if every.size <= self.kept else np.partition(every, -self.kept)[-self.kept :]

    def tail_index(self) -> float:
        """k-hat of all pieces."""
        tail = _tail(self.largest, self.count)
        return tail.khat if isinstance(tail, Tail) else tail


def khat(log_weight: Array, measure: Array | None = None) -> Diagnostic:
    """k-hat of all samples of positive measure, with its threshold and the n it asks for: (..., n) -> one diagnostic.

    Raises `InputError` on NaN, +inf, or an empty array.
    """
    require_weights("log_weight", log_weight)
    x = np.asarray(log_weight)
    present = np.ones(x.shape, bool) if measure is None else np.broadcast_to(np.asarray(measure) > 0, x.shape)
    return khat_diagnostic(tail_index(x[present]), int(present.sum()))


def khat_diagnostic(shape: float, n: int) -> Diagnostic:
    """The k-hat `shape` of n samples, with its threshold and the n it asks for."""
    return Diagnostic(
        name="khat",
        value=shape,
        threshold=khat_threshold(n),
        high_is_bad=True,
        required=required_samples(shape),
        meaning="shape of the weights' tail: no finite variance from 0.5 on, no mean from 1 on",
    )


def fit(log_weight: Array) -> Fit:
    """Fit the top tail of one sample and smooth it: `log_weight` (n,). What has no fit: see the module."""
    x = np.asarray(log_weight, dtype=np.float64)
    positive = np.flatnonzero(x > -math.inf)
    tail = _tail(x[positive], positive.size)
    if not isinstance(tail, Tail):
        return Fit(x, tail)
    length = tail.excess.size
    # the quantiles of the fitted tail at (z - 1/2) / length, z = 1, ..., length (Vehtari et al. 2024)
    p = (np.arange(length) + 0.5) / length
    with np.errstate(all="ignore"):
        rise = -np.log1p(-p) if tail.khat == 0 else np.expm1(-tail.khat * np.log1p(-p)) / tail.khat
        quantile = np.minimum(np.log(tail.cutoff + tail.scale * rise), 0.0)
    if not np.isfinite(quantile).all():
        return Fit(x, math.inf)
    smoothed = x.copy()
    highest = positive[np.argsort(x[positive])[-length:]]
    smoothed[highest] = quantile + tail.top
    return Fit(smoothed, tail.khat)


class Tail(NamedTuple):
    """The largest weights of a sample, relative to the largest of all, and their generalized Pareto distribution."""

    top: float
    """log of the largest weight"""
    cutoff: float
    """the largest weight below the tail"""
    excess: Array
    """(m,) what the tail's weights have above the cutoff, ascending"""
    khat: float
    scale: float


def _tail(log_weight: Array, n: int) -> Tail | float:
    """The fitted tail of n positive weights, of which the largest ones are given, or what k-hat is without one."""
    if n < MIN_SAMPLES:
        return math.nan
    length = tail_length(n)
    highest = np.sort(np.partition(log_weight, -length - 1)[-length - 1 :])
    top = float(highest[-1])
    highest = highest - top
    # the fit divides by the tail's lower quartile; where that is zero it returns a finite k-hat all the same (0.08 for
    # log-weights of spread 1000, measured), so the cases are told apart here, before it
    quartile = highest[lower_quartile(length) + 1]
    if highest[1] == 0:
        return -math.inf
    if quartile < math.log(1e-300):
        return math.inf
    weight = np.exp(highest)
    if weight[lower_quartile(length) + 1] == weight[0]:
        return math.nan
    excess = weight[1:] - weight[0]
    with np.errstate(all="ignore"):
        shape, scale = pareto_fit(excess)
    return Tail(top, float(weight[0]), excess, shape, scale) if math.isfinite(shape) else math.inf


def lower_quartile(n: int) -> int:
    """Index of the lower quartile of n ascending values, floor(n / 4 + 1/2) counted from 1 (Zhang & Stephens 2009)."""
    return int(n / 4 + 0.5) - 1


def pareto_fit(excess: Array) -> tuple[float, float]:
    """Shape k and scale sigma of a generalized Pareto distribution, from excesses over its threshold: (n,) ascending.

    With b = -k / sigma the likelihood has a closed profile k(b) = mean log(1 - b x); the estimate is the posterior mean
    of b over a grid of 30 + sqrt(n) points (Zhang & Stephens, Technometrics 51(3), 2009), their sign of k turned, and
    k is then pulled to 1/2 as ten more observations of it would (Vehtari et al. 2024).

    >>> shape, scale = pareto_fit(np.arange(1, 6.0))
    >>> round(shape, 3), round(scale, 3)
    (0.127, 4.384)
    """
    n = excess.size
    points = 30 + int(math.sqrt(n))
    b = (1 - np.sqrt(points / (np.arange(1, points + 1) - 0.5))) / (3 * excess[lower_quartile(n)]) + 1 / excess[-1]
    k = np.log1p(-b[:, None] * excess).mean(axis=1)
    log_likelihood = n * (np.log(-b / k) - k - 1)
    weight = np.exp(log_likelihood - log_likelihood.max())
    weight /= weight.sum()
    weight[weight < 10 * np.finfo(float).eps] = 0.0
    mean = float(np.sum(b * weight) / weight.sum())
    shape = float(np.log1p(-mean * excess).mean())
    return (n * shape + 10 * 0.5) / (n + 10), -shape / mean
