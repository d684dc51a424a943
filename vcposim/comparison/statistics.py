"""What runs over seeds say: interquartile means, performance profiles, ranks, paired differences, and a word for each.

The unit is the seed: it is what was randomised, and what every bootstrap resamples. Runs of one seed share their random
numbers under every estimator, so differences are paired by seed, and a resample takes the same seeds for everybody.

Aggregates are those of Agarwal et al. 2021 (arXiv 2108.13264); comparisons of one page are corrected together (Holm
1979), so that all its sure words are wrong together with probability at most `LEVEL`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from vcposim.arrays import Array
from vcposim.results import Interval

LEVEL = 0.05
"""intervals are 1 - LEVEL; comparisons of one page are wrong together with at most this probability"""
WORDS = ("holds", "holds if", "fails", "undecided", "not judged")
"""all that a claim can come to"""
RESAMPLES = 1000


def interquartile_mean(values: Array) -> Array:
    """Mean of the middle half (Agarwal et al.), steadier than a median, less moved than a mean: (..., n) -> (...).

    >>> float(interquartile_mean([0, 1, 2, 3, 4, 5, 6, 100]))
    3.5
    """
    x = np.sort(np.asarray(values, dtype=float), axis=-1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(axis=-1)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family (Holm 1979): below 0.05 together are wrong with probability at most 0.05.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def verdict(words: Sequence[str], *, over: str = "all") -> str:
    """One word for several comparisons that a sentence rests on, each `holds`, `fails`, `undecided` or `not judged`.

    `over="where"`: the sentence may depend on the place, and holds if some condition is met; `"all"`: it says it of
    every one, and one failure is enough.

    >>> verdict(["holds", "fails", "undecided"], over="where"), verdict(["holds", "fails"])
    ('holds if', 'fails')
    """
    known = {word for word in words if word != "not judged"}
    if not known:
        return "not judged"
    if known == {"holds"} and "not judged" not in words:
        return "holds"
    if over == "where" and {"holds", "fails"} <= known:
        return "holds if"
    return "fails" if "fails" in known and (over == "all" or "holds" not in known) else "undecided"


def resampled_seeds(seeds: int, resamples: int = RESAMPLES) -> Array:
    """Which seeds each resample takes: (resample, seed), the same for everybody."""
    return np.random.default_rng(0).integers(seeds, size=(resamples, seeds))


class RankedScores(NamedTuple):
    """Scores of estimators (the IQM over regimes and seeds) and their ranks from 1, with 95% intervals over seeds."""

    score: list[Interval]
    rank: list[Interval]


def ranking(values: Array) -> RankedScores:
    """Scores and ranks, seeds resampled: (estimator, regime, seed) -> scores.

    A bootstrap is too narrow by (n - 1) / n, so replicates are spread about the score by sqrt(n / (n - 1)). Ties share
    the better rank.
    """
    from scipy.stats import rankdata  # here because it takes a second to load, in every process that measures

    estimators, _, seeds = values.shape
    draws = resampled_seeds(seeds)
    score = interquartile_mean(values.reshape(estimators, -1))
    again = np.stack([interquartile_mean(one[:, draws].transpose(1, 0, 2).reshape(len(draws), -1)) for one in values])
    again = score[:, None] + (again - score[:, None]) * np.sqrt(seeds / max(seeds - 1, 1))
    rank, ranks = rankdata(-score, "min"), rankdata(-again, "min", axis=0)

    def intervals(value: Array, replicate: Array) -> list[Interval]:
        low, high = np.quantile(replicate, (LEVEL / 2, 1 - LEVEL / 2), axis=1)
        return [
            Interval(low=float(min(a, v)), value=float(v), high=float(max(b, v)))
            for a, v, b in zip(low, value, high, strict=True)
        ]

    return RankedScores(intervals(score, again), intervals(rank, ranks))


PROFILE_AT = np.linspace(0, 1, 41)
"""values at which profiles are taken"""


def profile(values: Array) -> list[float]:
    """Performance profile, the share of runs above each of `PROFILE_AT`: (...) -> list."""
    return [round(float(np.mean(values > at)), 4) for at in PROFILE_AT]


def own_best(average: Array) -> tuple[Array, list[int]]:
    """Values at the best step size, each half of the seeds' chosen on the other half: (step, seed) -> (seed,).

    So no run takes part in choosing the step size it is judged at. Also which step sizes: of even seeds, of odd ones.
    """
    seed = np.arange(average.shape[1])
    chosen = [int(average[:, seed % 2 != half].mean(axis=1).argmax()) for half in (0, 1)]
    return average[np.array(chosen)[seed % 2], seed], chosen


class Difference(NamedTuple):
    """A paired difference with its 95% interval over seeds, and the p-value of "it is on the boundary"."""

    value: float
    low: float
    high: float
    p: float | None
    """None where seeds do not differ at all: computed exactly, or a single seed"""


def difference(first: Array, second: Array, boundary: float) -> Difference:
    """Mean over paired seeds, Student's interval, p-value against the boundary: (seed,), (seed,) -> difference."""
    d = np.asarray(first) - np.asarray(second)
    n, mean = len(d), float(d.mean())
    error = float(d.std(ddof=1)) / np.sqrt(n) if n > 1 else float("inf")
    if not np.isfinite(error):
        return Difference(mean, -1.0, 1.0, 1.0)
    if error < 1e-12:
        return Difference(mean, mean, mean, None)
    half = float(stdtrit(n - 1, 1 - LEVEL / 2)) * error
    return Difference(mean, mean - half, mean + half, 2 * float(stdtr(n - 1, -abs(mean - boundary) / error)))
