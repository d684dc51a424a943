"""The size of gradient contributions under competing baselines, group by group, with intervals for their ratios.

All that a dump permits: from norms ||s_i|| alone, the second moment sum_i (w_i (R_i - b) ||s_i||)^2 of each group, in
sample and held out (see `vcposim.replay.replay` for why both), and bootstrap intervals of ratios of their sums.

Groups of one size are evaluated together: ragged groups need no padding, and no group's numbers depend on another's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vcposim.baselines import Evidence, baseline
from vcposim.batch import Batch, ScoreNorms
from vcposim.diagnostics import ess_fraction
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.replay.dumps import Dump
from vcposim.replay.storage import by_code, empty, forget, largest, picked
from vcposim.results import Interval
from vcposim.weights import Weighting

SCALE_FREE = frozenset({"importance", "self_normalize", "pareto_smooth"})
"""treatments that commute with a factor on all ratios, which may then be chosen free of overflow"""

TOGETHER = 1 << 15
"""trajectories that are evaluated at once, in whole groups"""
MOST_DRAWN = 8192
"""units that the bootstrap draws; more groups than that are put together at random, some to a unit"""

DRAWN_AT_ONCE = 64
"""resamples that are added up together"""


@dataclass
class Table:
    """Results of k baselines on g groups; second moments are summed over the u units that the bootstrap draws."""

    per_group: np.ndarray
    """(k, g)"""
    in_sample: np.ndarray
    """(k, 2, u): second moments of the baseline and of the group mean; 0, 0 where the baseline does not exist"""
    held_out: np.ndarray
    """(k, 2, u): the same, each without the sample"""
    held: np.ndarray
    """(2, k): groups whose group mean has a second moment, in sample and held out"""
    mean_reward: np.ndarray
    ess_fraction: np.ndarray
    max_leverage: np.ndarray
    """(g,), as the two before it"""
    informative: int = 0
    """groups in which rewards differ: read off the rewards alone, for weights may underflow to 0"""
    carrying: int = 0
    """those of them in which this also has a weight above 0, so that the group mean has a second moment"""


def units(groups: int, rng: np.random.Generator) -> np.ndarray:
    """The unit that each group is drawn in by the bootstrap: itself, or one of `MOST_DRAWN` at random: (g,)."""
    if groups <= MOST_DRAWN:
        return np.arange(groups)
    return rng.permutation(groups).astype(np.int32) % MOST_DRAWN


def tabulate(dump: Dump, size: Any, names: Sequence[str], weighting: Weighting, unit: Any) -> Table:
    """Every baseline on every group, groups of one size together; `size` (g,) counts their samples, `unit` (g,) is
    where each is summed."""
    k, g, u = len(names), len(size), int(unit.max()) + 1
    sums, held = np.zeros((2, k, 2, u)), np.zeros((2, k), int)
    table = Table(empty((k, g)), sums[0], sums[1], held, empty(g), empty(g), empty(g))
    # second moments enter as ratios: one factor on all weights (where the treatment allows it) and one on all norms
    # keep the squares in range at any log-ratio
    top = largest(dump.log_ratio)
    shift = top if weighting.treatment in SCALE_FREE and top > -math.inf else 0.0
    norm_scale = largest(dump.score_sq_norm) or 1.0
    order = by_code(dump.group, size)
    start = np.cumsum(size) - size
    for groups in _alike(size):
        n = int(size[groups[0]])
        index = start[groups][:, None] + np.arange(n)
        index = index if isinstance(order, range) else picked(order, index)
        sq_norm = picked(dump.score_sq_norm, index) / norm_scale
        log_ratio = picked(dump.log_ratio, index) - shift
        batch = Batch(
            reward=picked(dump.reward, index),
            log_ratio=log_ratio,
            scores=ScoreNorms(sq_norm),
            length=picked(dump.length, index),
        )
        table.mean_reward[groups] = batch.reward.mean(axis=-1)
        table.informative += int(np.sum(batch.reward.max(axis=-1) > batch.reward.min(axis=-1)))
        weighty = log_ratio.max(axis=-1) > -math.inf  # a group of weights 0 alone has no effective sample
        table.ess_fraction[groups] = 0.0
        table.ess_fraction[groups[weighty]] = ess_fraction(log_ratio[weighty]) if weighty.any() else 0.0
        table.max_leverage[groups] = Estimator(weighting).leverage(batch).max(axis=-1)
        weight = weighting(batch)
        e = Evidence(batch, weight)
        mean = second_moment(weight.value, batch.reward - baseline("group_mean")(e), sq_norm)
        table.carrying += int(np.sum(mean > 0))
        without = n >= 2 and second_moment(weight.value, batch.reward - _without("group_mean", e), sq_norm)
        for i, name in enumerate(names):
            _fill(table, i, groups, unit[groups], e, name, sq_norm, mean, without)
            forget(table.per_group)  # groups of one size may be anywhere
        forget(table.mean_reward, table.ess_fraction, table.max_leverage)
    return table


def _alike(size: Any) -> Iterator[Any]:
    """Groups of one size, as many as have `TOGETHER` trajectories: what they take does not grow with the file."""
    for n in np.unique(size):
        groups = np.flatnonzero(size == n)
        at_once = max(TOGETHER // int(n), 1)
        for first in range(0, groups.size, at_once):
            yield groups[first : first + at_once]


def _fill(
    table: Table, i: int, groups: Any, unit: Any, e: Evidence, name: str, sq_norm: Any, mean: Any, without: Any
) -> None:
    n, reward = e.reward.shape[-1], e.reward
    if n < 2 and baseline(name).needs_two:
        table.per_group[i, groups] = math.nan
        return
    try:
        b = baseline(name)(e)
    except InputError as error:
        raise InputError(f"baseline: {name!r} cannot be replayed from a dump ({error}); leave it out") from None
    table.per_group[i, groups] = b[:, 0] if b.shape[-1] == 1 else b.mean(axis=-1)

    def add(where: int, b: Any, of_mean: Any) -> None:
        sums = (table.in_sample, table.held_out)[where][i]
        for row, moment in zip(sums, (second_moment(e.weight.value, reward - b, sq_norm), of_mean), strict=True):
            row += np.bincount(unit, moment, row.size)
        table.held[where, i] += np.count_nonzero(of_mean > 0)

    add(0, b, mean)
    if n >= 2:
        add(1, _without(name, e), without)


def _without(name: str, e: Evidence) -> Any:
    """The baseline of sample i computed without it: (g, n); nothing is shown of those that have none."""
    return baseline(name).held_out(e) if baseline(name).has_held_out else e.reward * 0


def second_moment(weight: Any, advantage: Any, sq_norm: Any) -> Any:
    """sum_i (w_i A_i ||s_i||)^2 of each group: (..., n) -> (...)."""
    return np.sum(weight * weight * advantage * advantage * sq_norm, axis=-1)


def bootstrap_ratios(pair: np.ndarray, held: np.ndarray, resamples: int, rng: np.random.Generator) -> list[Interval]:
    """sum_g x_g / sum_g y_g of each pair, with percentile intervals over groups: (k, 2, g), (k,) -> k intervals.

    Groups are resampled once for all pairs, so intervals are comparable and adding a pair moves no other. A group with
    x_g = y_g = 0 carries no information; a resample of such groups alone is left out. `held` groups have y_g > 0: fewer
    than two give no interval, none gives no value. Of more than `MOST_DRAWN` groups, as many `units` of some groups
    each are given and drawn: sums of independent groups, so the variance that is estimated is the same.
    """
    drawn = resampled(pair.reshape(-1, pair.shape[-1]), resamples, rng).reshape(resamples, *pair.shape[:2])
    return [_interval(one, int(held[k]), drawn[:, k]) for k, one in enumerate(pair)]


def resampled(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Totals (resamples, k) of `sums` (k, g) over g groups drawn with replacement, the same ones for all k."""
    groups = sums.shape[-1]
    rows = max(DRAWN_AT_ONCE * 256 // groups, 1)
    found = np.empty((resamples, len(sums)))
    for first in range(0, resamples, DRAWN_AT_ONCE):
        several = found[first : first + DRAWN_AT_ONCE]
        count = np.empty((len(several), groups))
        for start in range(0, len(several), rows):
            drawn = rng.integers(groups, size=count[start : start + rows].shape)
            drawn += groups * np.arange(len(drawn))[:, None]
            count[start : start + rows] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        several[:] = count @ sums.T
    return found


def in_units(sums: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Sums (k, g) of groups added up in their units (g,): (k, u)."""
    if unit.size <= MOST_DRAWN:
        return sums
    return np.stack([np.bincount(unit, one, MOST_DRAWN) for one in sums])


def _interval(pair: Any, held: int, drawn: Any) -> Interval:
    total = pair.sum(axis=-1)
    if held == 0:
        return Interval(value=math.nan, low=math.nan, high=math.nan)
    value = float(total[0] / total[1])
    if held < 2:
        return Interval(value=value, low=math.nan, high=math.nan)
    usable = drawn[drawn.sum(axis=-1) > 0]
    with np.errstate(divide="ignore"):  # a numerator alone: that resample's ratio is infinite
        low, high = np.quantile(usable[:, 0] / usable[:, 1], (0.025, 0.975), method="inverted_cdf")
    return Interval(value=value, low=float(low), high=float(high))
