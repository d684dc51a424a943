"""Estimates with intervals, made from the unit that was randomised: the seed.

Runs that share a seed share an initialisation, a data stream and often a policy, so they are not independent: whatever
varies within a seed is averaged first, and the interval comes from the scatter between seeds (Student's, or a bootstrap
that resamples seeds). Quantities with bounds get intervals within them: they are made on a scale without bounds
(logarithm, logit) and carried back.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from vcposim.comparison.statistics import LEVEL
from vcposim.comparison.statistics import holm as holm
from vcposim.comparison.statistics import interquartile_mean as interquartile_mean
from vcposim.results import Interval

POWER = 0.8
"""of the number of seeds that would decide"""


@dataclass(frozen=True)
class Estimate:
    """A number estimated from seeds: its standard error is on the scale given, the value in its own unit.

    Attributes:
        value: the estimate.
        error: standard error on the scale; 0 for what was computed exactly.
        seeds: how many independent units it comes from.
        scale: "real", "log" (positive), or "bounded" (logit of the place between `bounds`).
        bounds: of a "bounded" quantity; a "real" one is clipped to them.
    """

    value: float
    error: float = 0.0
    seeds: int = 1
    scale: str = "real"
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def exact(self) -> bool:
        """Whether it was computed and not estimated."""
        return self.error == 0.0

    @property
    def df(self) -> float:
        """Degrees of freedom of Student's distribution."""
        return max(self.seeds - 1, 1)

    def onto(self, value: float) -> float:
        """A value of the quantity, on the scale; its bounds lie far out but not at infinity."""
        if self.scale == "log":
            return math.log(max(value, 1e-300))
        if self.scale == "bounded":
            low, high = self.bounds
            share = min(max((value - low) / (high - low), 1e-12), 1 - 1e-12)
            return math.log(share / (1 - share))
        return value

    def back(self, place: float) -> float:
        """The inverse of `onto`."""
        if self.scale == "log":
            return math.exp(min(place, 700.0))
        if self.scale == "bounded":
            low, high = self.bounds
            return low + (high - low) / (1 + math.exp(min(-place, 700.0)))
        return min(max(place, self.bounds[0]), self.bounds[1])

    @property
    def interval(self) -> Interval:
        """95%, within the bounds."""
        if self.exact:
            return Interval(value=self.value, low=self.value, high=self.value)
        half = float(stdtrit(self.df, 1 - LEVEL / 2)) * self.error
        at = self.onto(self.value)
        return Interval(value=self.value, low=self.back(at - half), high=self.back(at + half))

    def distance(self, boundary: float) -> float:
        """From a boundary, in standard errors; infinite for what is exact."""
        gap = self.onto(self.value) - self.onto(boundary)
        return gap / self.error if self.error else math.copysign(math.inf, self.value - boundary)

    def p(self, boundary: float) -> float:
        """Two-sided p-value of "the truth is the boundary"."""
        return 2 * float(stdtr(self.df, -abs(self.distance(boundary))))

    def needed(self, boundary: float) -> int | None:
        """Seeds that would decide on which side of the boundary it lies with probability 0.8, if the estimate stays.

        None where that cannot be said: it lies on the boundary.
        """
        gap = abs(self.onto(self.value) - self.onto(boundary))
        if self.exact or gap == 0:
            return None if gap == 0 else self.seeds
        return max(3, math.ceil(self.seeds * ((ndtri(1 - LEVEL / 2) + ndtri(POWER)) * self.error / gap) ** 2))

    def power(self, boundary: float, truth: float) -> float:
        """Probability that so many seeds exclude the boundary if the truth is `truth` (uncorrected 5%)."""
        if self.exact:
            return 1.0
        gap = abs(self.onto(truth) - self.onto(boundary)) / self.error
        return float(stdtr(self.df, gap - stdtrit(self.df, 1 - LEVEL / 2)))

    def __str__(self) -> str:
        return f"{self.value:.3g}" if self.exact else str(self.interval)


Sample = tuple[Hashable, float]
"""a seed, and a number measured with it"""
UNIT, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
"""bounds of a probability, and of a difference of two"""


def of_seeds(
    samples: Iterable[Sample], *, scale: str = "real", bounds: tuple[float, float] | None = None
) -> Estimate | None:
    """Mean over seeds of each seed's mean (geometric on the log scale); None without any, or of a single seed.

    One seed has no scatter to make an interval from. Given `bounds`, the interval lies within them (delta method).
    """
    by_seed: dict[Hashable, list[float]] = {}
    for seed, value in samples:
        by_seed.setdefault(seed, []).append(math.log(max(value, 1e-300)) if scale == "log" else value)
    if len(by_seed) < 2:
        return None
    means = np.array([np.mean(values) for values in by_seed.values()])
    n, mean, error = len(means), float(means.mean()), float(means.std(ddof=1)) / math.sqrt(len(means))
    if error < 1e-15 * max(1.0, abs(mean)):  # equal numbers, up to the rounding of their sum
        error = 0.0
    if scale == "log":
        return Estimate(math.exp(mean), error, n, "log")
    if bounds is None:
        return Estimate(mean, error, n)
    low, high = bounds
    slope = (high - low) / ((mean - low) * (high - mean)) if low < mean < high else 0.0
    return Estimate(mean, error * slope, n, "bounded", bounds)


def rate_difference(samples: Iterable[tuple[Hashable, bool, bool]]) -> Estimate | None:
    """Difference of two rates, first minus second, of runs that come in pairs and in seeds.

    Half a pair is added to each of the four outcomes (Agresti & Min 2005, Statistics in Medicine 24:729), so that
    "none of 48" does not count as certainty; pairs of one seed are averaged first.
    """
    by_seed: dict[Hashable, list[float]] = {}
    for seed, first, second in samples:
        by_seed.setdefault(seed, []).append(float(first) - float(second))
    n = len(by_seed)
    if n < 2:
        return None
    d = np.array([np.mean(values) for values in by_seed.values()])
    mean = float(d.sum()) / (n + 2)
    spread = (float((d * d).sum()) + 1.0) / (n + 2) - mean * mean  # of the added pairs, one half is +1 and one half -1
    return Estimate(mean, math.sqrt(spread / (n + 2)), n, "real", DIFFERENCE)


def rate(hits: float, of: int) -> Estimate:
    """A rate of independent trials, two successes and two failures added (Agresti & Coull 1998)."""
    share = (hits + 2) / (of + 4)
    error = math.sqrt(share * (1 - share) / (of + 4))
    return Estimate(share, error / (share * (1 - share)), of, "bounded", UNIT)


def of_replicates(
    value: float, replicates: Sequence[float] | np.ndarray, seeds: int, *, bounds: tuple[float, float] | None = None
) -> Estimate | None:
    """An estimate from what a bootstrap that resampled its seeds gave; widened by n / (n - 1), Student's with n - 1."""
    x = np.asarray(replicates, dtype=float)
    if seeds < 2 or x.size < 2:
        return None
    error = float(np.std(x, ddof=1)) * math.sqrt(seeds / (seeds - 1))
    if bounds is None:
        return Estimate(value, error, seeds)
    low, high = bounds
    slope = (high - low) / ((value - low) * (high - value)) if low < value < high else 0.0
    return Estimate(value, error * slope, seeds, "bounded", bounds)


def resampled(n: int, resamples: int = 400) -> np.ndarray:
    """Places of n seeds drawn with replacement, the same whenever asked: (resample, n)."""
    return np.random.default_rng(0).integers(n, size=(resamples, n))


# --- aggregates as the field reads them -------------------------------------------------------------------------------


def improvement(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], times: np.ndarray) -> np.ndarray:
    """Probability that a run of the first is above a run of the second, ties half (Agarwal et al. 2021).

    Runs of each seed, and how often each seed counts: (resample, seed) -> (resample,).

    >>> improvement([[1], [2]], [[1], [0]], np.array([[1, 1], [2, 0]]))
    array([0.875, 0.5  ])
    """
    a, b = (np.concatenate([np.asarray(runs, dtype=float) for runs in x]) for x in (first, second))
    often_a, often_b = (times.repeat([len(runs) for runs in x], axis=1) for x in (first, second))
    won = (np.sign(a[:, None] - b) + 1) / 2
    return ((often_a @ won) * often_b).sum(axis=1) / (often_a.sum(axis=1) * often_b.sum(axis=1))


def median_interval(values: Iterable[float], seed: int = 0) -> Interval:
    """Median and its 95% percentile-bootstrap interval; of fewer than three repeats, the range."""
    from scipy.stats import bootstrap  # here because it takes a second to load, in every process that computes

    x = np.asarray(list(values), dtype=float)
    if x.size < 3 or np.ptp(x) == 0:
        return Interval(value=float(np.median(x)), low=float(x.min()), high=float(x.max()))
    rng = np.random.default_rng(seed)
    found = bootstrap((x,), np.median, method="percentile", n_resamples=2000, rng=rng).confidence_interval
    return Interval(value=float(np.median(x)), low=float(found.low), high=float(found.high))


def share(flags: Iterable[bool]) -> str:
    """How many of how many."""
    flags = list(flags)
    return f"{sum(flags)} of {len(flags)}"
