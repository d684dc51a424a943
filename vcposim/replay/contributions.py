"""The size of gradient contributions under competing baselines, group by group, with intervals for their ratios.

All that a dump permits: from norms ||s_i|| alone, the second moment sum_i (w_i (R_i - b) ||s_i||)^2 of each group, in
sample and held out (see `vcposim.replay.replay` for why both), and bootstrap intervals of ratios of their sums.

Groups of one size are evaluated together: ragged groups need no padding, and no group's numbers depend on another's.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vcposim.baselines import Evidence, baseline
from vcposim.batch import Batch, ScoreNorms
from vcposim.diagnostics import ess_fraction
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.replay.dumps import Dump
from vcposim.results import Interval
from vcposim.weights import Weight, Weighting

SCALE_FREE = frozenset({"importance", "self_normalize", "pareto_smooth"})
"""treatments that commute with a factor on all ratios, which may then be chosen free of overflow"""


TOGETHER = 4096
"""groups that are evaluated at once"""
MOST_DRAWN = 8192
"""units that the bootstrap draws; more groups than that are put together at random, some to a unit"""


class Table(NamedTuple):
    """Per-group results: k baselines, g groups."""

    per_group: np.ndarray
    """(k, g)"""
    in_sample: np.ndarray
    """(k, 2, g): second moments of the baseline and of the group mean; 0, 0 where the baseline does not exist"""
    held_out: np.ndarray
    """(k, 2, g): the same, each without the sample"""
    mean_reward: np.ndarray
    ess_fraction: np.ndarray
    max_leverage: np.ndarray
    group_mean: np.ndarray
    """(g,) the group mean's second moment in sample"""
    differ: np.ndarray
    """(g,) whether rewards differ: read off the rewards alone, for weights may underflow to 0"""

    @property
    def informative(self) -> int:
        """Groups in which rewards differ, so that the group mean leaves an advantage."""
        return int(self.differ.sum())

    @property
    def carrying(self) -> int:
        """Groups in which that advantage also has a weight above 0."""
        return int((self.group_mean > 0).sum())


def tabulate(dump: Dump, size: Any, names: Sequence[str], weighting: Weighting) -> Table:
    """Every baseline on every group, groups of one size together; `size` (g,) counts their samples."""
    k, g = len(names), len(size)
    table = Table(np.empty((k, g)), np.zeros((k, 2, g)), np.zeros((k, 2, g)), *(np.empty(g) for _ in range(5)))
    # second moments enter as ratios: one factor on all weights (where the treatment allows it) and one on all norms
    # keep the squares in range at any log-ratio
    top = dump.log_ratio.max()
    shift = top if weighting.treatment in SCALE_FREE and top > -math.inf else 0.0
    sq_norm = dump.score_sq_norm / (dump.score_sq_norm.max() or 1.0)
    order = np.argsort(dump.group, kind="stable")
    start = np.cumsum(size) - size
    for groups in _alike(size):
        n = int(size[groups[0]])
        index = order[start[groups][:, None] + np.arange(n)]
        batch = Batch(
            reward=dump.reward[index],
            log_ratio=dump.log_ratio[index] - shift,
            scores=ScoreNorms(sq_norm[index]),
            length=dump.length[index],
        )
        table.mean_reward[groups] = batch.reward.mean(axis=-1)
        table.differ[groups] = batch.reward.max(axis=-1) > batch.reward.min(axis=-1)
        log_ratio = dump.log_ratio[index] - shift
        weighty = log_ratio.max(axis=-1) > -math.inf  # a group of weights 0 alone has no effective sample
        table.ess_fraction[groups] = 0.0
        table.ess_fraction[groups[weighty]] = ess_fraction(log_ratio[weighty]) if weighty.any() else 0.0
        table.max_leverage[groups] = Estimator(weighting).leverage(batch).max(axis=-1)
        weight = weighting(batch)
        mean = baseline("group_mean")(Evidence(batch, weight))
        table.group_mean[groups] = second_moment(weight.value, batch.reward - mean, sq_norm[index])
        for i, name in enumerate(names):
            _fill(table, i, groups, batch, weight, name, sq_norm[index])
    return table


def _alike(size: Any) -> Iterator[Any]:
    """Groups of one size, no more than `TOGETHER` at once: what they take does not grow with the file."""
    for n in np.unique(size):
        groups = np.flatnonzero(size == n)
        yield from np.array_split(groups, -(-groups.size // TOGETHER))


def _fill(table: Table, i: int, groups: Any, batch: Batch, weight: Weight, name: str, sq_norm: Any) -> None:
    n, e = batch.reward.shape[-1], Evidence(batch, weight)
    if n < 2 and baseline(name).needs_two:
        table.per_group[i, groups] = math.nan
        return

    def moment(b: Any) -> Any:
        return second_moment(weight.value, batch.reward - b, sq_norm)

    try:
        b = baseline(name)(e)
    except InputError as error:
        raise InputError(f"baseline: {name!r} cannot be replayed from a dump ({error}); leave it out") from None
    table.per_group[i, groups] = b[:, 0] if b.shape[-1] == 1 else b.mean(axis=-1)
    table.in_sample[i][:, groups] = moment(b), table.group_mean[groups]
    if n >= 2:
        table.held_out[i][:, groups] = moment(_without(name, e)), moment(_without("group_mean", e))


def _without(name: str, e: Evidence) -> Any:
    """The baseline of sample i computed without it: (g, n); nothing is shown of those that have none."""
    return baseline(name).held_out(e) if baseline(name).has_held_out else e.reward * 0


def second_moment(weight: Any, advantage: Any, sq_norm: Any) -> Any:
    """sum_i (w_i A_i ||s_i||)^2 of each group: (..., n) -> (...)."""
    return np.sum(weight * weight * advantage * advantage * sq_norm, axis=-1)


def bootstrap_ratios(pair: Any, resamples: int, seed: int) -> list[Interval]:
    """sum_g x_g / sum_g y_g of each pair, with percentile intervals over groups: (k, 2, g) -> k intervals.

    Groups are resampled once for all pairs, so intervals are comparable and adding a pair moves no other. A group with
    x_g = y_g = 0 carries no information; a resample of such groups alone is left out. Fewer than two groups with
    y_g > 0: no interval; none: no value. Of more than `MOST_DRAWN` groups, as many units of g / `MOST_DRAWN` groups
    each, put together at random, are drawn: sums of independent groups, so the variance that is estimated is the same.
    """
    rng = np.random.default_rng(seed)
    flat = pair.reshape(-1, pair.shape[-1])
    if flat.shape[-1] > MOST_DRAWN:
        unit = rng.permutation(flat.shape[-1]) % MOST_DRAWN
        flat = np.stack([np.bincount(unit, one, MOST_DRAWN) for one in flat])
    groups = flat.shape[-1]
    drawn = np.empty((resamples, *pair.shape[:2]))
    for sums in drawn:
        count = np.bincount(rng.integers(groups, size=groups), minlength=groups)
        sums[:] = (flat @ count.astype(np.float64)).reshape(sums.shape)
    return [_interval(one, drawn[:, k]) for k, one in enumerate(pair)]


def _interval(pair: Any, drawn: Any) -> Interval:
    total, informative = pair.sum(axis=-1), int((pair[1] > 0).sum())
    if informative == 0:
        return Interval(value=math.nan, low=math.nan, high=math.nan)
    value = float(total[0] / total[1])
    if informative < 2:
        return Interval(value=value, low=math.nan, high=math.nan)
    usable = drawn[drawn.sum(axis=-1) > 0]
    with np.errstate(divide="ignore"):  # a numerator alone: that resample's ratio is infinite
        low, high = np.quantile(usable[:, 0] / usable[:, 1], (0.025, 0.975), method="inverted_cdf")
    return Interval(value=value, low=float(low), high=float(high))
