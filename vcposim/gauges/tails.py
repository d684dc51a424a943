"""How heavy is the tail of the weights? Pareto k-hat and Pareto smoothing, thin over the library that has them.

The largest importance weights are fitted by a generalized Pareto distribution with shape k. Moments of order 1/k and
above are infinite: k < 1/2 a variance, k < 1 a mean. So k-hat says what no function of the weights' own mean square
can: whether the effective sample size read from n samples is itself to be trusted. **Smoothing** replaces the fitted
tail by its expected order statistics: a data-driven truncation (Vehtari, Simpson, Gelman, Yao & Gabry, JMLR 25(72),
2024, arXiv 1507.02646).

The fit is `arviz-stats`'s. What k-hat is where there is nothing to fit:

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
    return fit(log_weight).khat


def khat(log_weight: Array, measure: Array | None = None) -> Diagnostic:
    """k-hat of all samples of positive measure, with its threshold and the n it asks for: (..., n) -> one diagnostic.

    Raises `InputError` on NaN, +inf, or an empty array.
    """
    require_weights("log_weight", log_weight)
    x = np.asarray(log_weight)
    present = np.ones(x.shape, bool) if measure is None else np.broadcast_to(np.asarray(measure) > 0, x.shape)
    shape = tail_index(x[present])
    return Diagnostic(
        name="khat",
        value=shape,
        threshold=khat_threshold(int(present.sum())),
        high_is_bad=True,
        required=required_samples(shape),
        meaning="shape of the weights' tail: no finite variance from 0.5 on, no mean from 1 on",
    )


def fit(log_weight: Array) -> Fit:
    """Fit the top tail of one sample and smooth it: `log_weight` (n,). What has no fit: see the module."""
    x = np.asarray(log_weight, dtype=np.float64)
    positive = x > -math.inf
    if not positive.all():
        smoothed, shape = fit(x[positive])
        out = x.copy()
        out[positive] = smoothed
        return Fit(out, shape)
    if x.size < MIN_SAMPLES:
        return Fit(x, math.nan)
    # the library's fit divides by the tail's lower quartile; where that is zero it returns a finite k-hat all the same
    # (0.08 for log-weights of spread 1000, measured), so the cases are told apart here, before it
    length = tail_length(x.size)
    top = np.sort(np.partition(x, x.size - length - 1)[-length - 1 :])
    cutoff, tail = top[0], top[1:] - top[-1]
    quartile = tail[int(length / 4 + 0.5) - 1]
    if tail[0] == tail[-1]:
        return Fit(x, -math.inf)
    if quartile < math.log(1e-300):
        return Fit(x, math.inf)
    if np.exp(quartile) == np.exp(cutoff - top[-1]):
        return Fit(x, math.nan)
    # imported here because it takes most of a second (it brings scipy.stats), and most commands fit no tail
    from arviz_stats.base import array_stats

    with np.errstate(all="ignore"):
        smoothed, shape = array_stats.psislw(-x)  # it expects log-likelihoods of leave-one-out: minus log-weights
    shape = float(shape)
    if not (math.isfinite(shape) and np.isfinite(smoothed).all()):
        return Fit(x, math.inf)
    # the library returns normalized log-weights; the smallest one is never in the tail, so it gives the constant back
    bottom = int(np.argmin(x))
    return Fit(smoothed + (x[bottom] - smoothed[bottom]), shape)
