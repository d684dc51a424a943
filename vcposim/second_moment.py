"""M2PO, three times: keeping the second moment of log r within a budget.

M2PO (arXiv 2510.01161) bounds mean (log r)^2 instead of each ratio: a few tokens may be far off if the rest is close.
Under one name three rules are in use, and they differ in what is dropped:

    the paper's     harmful tokens only, masked, largest |log r| first          `SecondMomentMask`
    AReaL's         any token, whatever the sign of A, masked                   `SecondMomentMaskAnySign`
    authors' code   PPO's clip, with a range found from the budget              `SecondMomentClip`

Unlike a clip, these gates look at all tokens of a **pool**: the group, or all prompts of a `grouped` batch. Equal
values stand or fall together, which can only drop more than dropping one at a time.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from vcposim.arrays import Array, namespace
from vcposim.batch import Batch, over_tokens
from vcposim.surrogates import Needs, bounded, log_ratio_at, only, require_not_negative, weight_of


@dataclass(frozen=True)
class SecondMomentMask:
    """r 1[kept]: harmful tokens are dropped, largest |log r| first, until their mean (log r)^2 is <= budget.

    Harmful: A > 0 and r > 1, or A < 0 and r < 1; only they count in the mean, only they are dropped (arXiv 2510.01161,
    Algorithm 1 and its budget of 0.04).
    """

    budget: float = 0.04
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("mask", "pooled")

    def __post_init__(self) -> None:
        require_not_negative(budget=self.budget)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        counted = harmful(x, over_tokens(advantage, x)) & real(batch, x)
        square, eligible = pooled(bounded(x) * bounded(x), batch), pooled(counted, batch)
        keep = ~eligible | (square < first_dropped(square, eligible, self.budget))
        return only(unpooled(keep, x), weight_of(x, batch))


@dataclass(frozen=True)
class SecondMomentMaskAnySign:
    """r 1[kept]: tokens are dropped, largest |log r| first, until mean (log r)^2 <= budget; the smallest always stays.

    AReaL takes this mean between behavior and proximal policy; this is the case proximal = target.
    """

    budget: float = 0.04
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("mask", "pooled")

    def __post_init__(self) -> None:
        require_not_negative(budget=self.budget)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        xp, square, eligible = namespace(x), pooled(bounded(x) * bounded(x), batch), pooled(real(batch, x), batch)
        smallest = xp.min(xp.where(eligible, square, math.inf), axis=-1, keepdims=True)
        keep = (square < first_dropped(square, eligible, self.budget)) | (square == smallest)
        return only(unpooled(keep, x), weight_of(x, batch))


@dataclass(frozen=True)
class SecondMomentClip:
    """r 1[not (harmful and |log r| > cap)], cap solving mean min(|log r|, cap)^2 = budget over harmful tokens.

    PPO's gate with a range found from the data; under budget nothing is clipped. The code's lower limits on the range
    ("miniclip") are off, as in its configuration.
    """

    budget: float = 0.04
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("clip", "pooled")

    def __post_init__(self) -> None:
        require_not_negative(budget=self.budget)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        counted = harmful(x, over_tokens(advantage, x)) & real(batch, x)
        square, eligible = pooled(bounded(x) * bounded(x), batch), pooled(counted, batch)
        keep = ~eligible | (square <= cap_of_mean(square, eligible, self.budget))
        return only(unpooled(keep, x), weight_of(x, batch))


def harmful(log_ratio: Array, advantage: Array) -> Array:
    """Where a step along A moves the ratio further from 1: same -> same."""
    return ((advantage > 0) & (log_ratio > 0)) | ((advantage < 0) & (log_ratio < 0))


def first_dropped(x: Array, counted: Array, budget: float) -> Array:
    """The least x dropped when the largest go until the mean is <= budget, inf if none: (..., m) -> (..., 1).

    The rule is about order, so they are sorted, unless all of them together are within the budget. Means of the
    smallest never decrease with their number, so the paper's loop is one comparison.
    """
    if under_budget(x, counted, budget):
        return namespace(x).ones_like(x[..., :1]) * math.inf
    xp, (ordered, before, count) = namespace(x), _ascending(x, counted)
    over = before + ordered > budget * count
    return xp.min(xp.where(over, ordered, math.inf), axis=-1, keepdims=True)


def cap_of_mean(x: Array, counted: Array, budget: float) -> Array:
    """The cap with mean min(x, cap) = budget; above every x if their mean is below budget: (..., m) -> (..., 1).

    Of m values, sum min(x, cap) is the least of S_j + (m - j) cap over j < m, S_j the sum of the j smallest. So the cap
    is the largest of (m budget - S_j) / (m - j), without iteration.
    """
    if under_budget(x, counted, budget):
        return namespace(x).ones_like(x[..., :1]) * math.inf
    xp, (_, before, count) = namespace(x), _ascending(x, counted)
    m = xp.max(count, axis=-1, keepdims=True)
    candidate = (m * budget - before) / xp.where(count > 0, m - count + 1, 1.0)
    return xp.max(xp.where(count > 0, candidate, -math.inf), axis=-1, keepdims=True)


def under_budget(x: Array, counted: Array, budget: float) -> bool:
    """Whether the mean of the counted is below the budget in every pool, beyond rounding: (..., m) -> bool."""
    xp = namespace(x)
    total, count = (xp.sum(xp.where(counted, y, 0.0), axis=-1) for y in (x, xp.ones_like(x)))
    return bool(xp.all(total < (1 - 1e-6) * budget * count))


def _ascending(x: Array, counted: Array) -> tuple[Array, Array, Array]:
    # the counted values (>= 0) in ascending order, the sum before each, its rank from 1; the others first, as zeros
    xp = namespace(x)
    ordered = xp.sort(xp.where(counted, x, -1.0), axis=-1)
    present = ordered >= 0
    ordered = xp.where(present, ordered, 0.0)
    before = xp.cumulative_sum(ordered, axis=-1, include_initial=True)[..., :-1]
    return ordered, before, xp.cumulative_sum(xp.where(present, ordered * 0 + 1, 0.0), axis=-1)


def pooled(x: Array, batch: Batch) -> Array:
    """Tokens of a pool (a group, of a `grouped` batch all groups) on one axis: (..., n, t) -> (*pool, m)."""
    return namespace(x).reshape(x, (*x.shape[: -3 if batch.grouped else -2], -1))


def unpooled(x: Array, like: Array) -> Array:
    """The inverse of `pooled`: x (*pool, m), like (..., n, t) -> (..., n, t)."""
    return namespace(x).reshape(x, tuple(like.shape))


def real(batch: Batch, x: Array) -> Array:
    """Where a token is the policy's, its trajectory counts, and x is a number: (..., n, t)."""
    counts = (over_tokens(batch.measure, x) > 0) & (x == x)
    return counts if batch.token_mask is None else counts & (batch.token_mask > 0)
