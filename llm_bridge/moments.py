"""Group statistics that add up: what micro-batches and ranks exchange when a prompt's responses are split among them.

An off-policy optimal baseline is a ratio of two sums over a prompt's responses, b = sum a R / sum a with a = w^2
||s||^2.
A rank that holds some of the responses contributes its part of the sums; `merge` adds parts, in any order and grouping.
Three things keep that exact where adding up raw numbers is not:

    scale          a is e^(hundreds) under drift; each group carries its largest log a, and sums are relative to it
    deviations     the reward's spread travels as sum (R - mean)^2 around the part's own mean (Chan, Golub & LeVeque
    1979),
                   never as E[R^2] - E[R]^2, so equal rewards have spread 0
    others         a leave-one-out baseline is the sum over the *other* samples, never the total minus one's own: where
                   one sample dominates, that difference has no correct digit left

A part without trajectories is neutral. Overlapping parts are not detected: every trajectory must be in exactly one.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from llm_bridge.ratios import log_weight
from vcposim.arrays import LOG, Array, indistinguishable, safe_divide
from vcposim.baselines import leverage_damped
from vcposim.batch import Batch
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.weights import at_level


class GroupSums(NamedTuple):
    """Additive sums of G groups, each (G,); true sums of a are `weight` and `weighted_reward` times e^log_scale."""

    log_scale: Array
    """largest log a of the group; -inf where no sample has weight"""
    count: Array
    """number of trajectories"""
    mean_reward: Array
    """mean of R; 0 without trajectories"""
    sq_deviation: Array
    """sum (R - mean)^2"""
    weight: Array
    """sum a"""
    weighted_reward: Array
    """sum a R"""

    def merge(self, other: Self) -> "GroupSums":
        """The sums of both parts: associative and commutative up to rounding; empty parts are neutral."""
        scale = torch.maximum(self.log_scale, other.log_scale)
        top = _finite_or_zero(scale)
        mine, theirs = torch.exp(self.log_scale - top), torch.exp(other.log_scale - top)
        count = self.count + other.count
        gap = other.mean_reward - self.mean_reward
        share = safe_divide(other.count, count, 0.0)
        return GroupSums(
            scale,
            count,
            self.mean_reward + gap * share,
            self.sq_deviation + other.sq_deviation + gap * gap * self.count * share,
            self.weight * mine + other.weight * theirs,
            self.weighted_reward * mine + other.weighted_reward * theirs,
        )

    def weighted_mean(self) -> Tensor:
        """sum a R / sum a; the plain mean where no sample has weight: (G,)."""
        return safe_divide(self.weighted_reward, self.weight, self.mean_reward)

    def reward_std(self) -> Tensor:
        """Population standard deviation of the rewards, exactly 0 where all are equal: (G,)."""
        std = torch.sqrt(safe_divide(self.sq_deviation, self.count, 0.0))
        return torch.where(indistinguishable(std, self.mean_reward.abs()), 0.0, std)


def group_sums(reward: Tensor, log_a: Tensor, group: Tensor, groups: int, present: Tensor | None = None) -> GroupSums:
    """Sums of this part's rows: reward, log a, index in [0, groups) and presence: (n,) -> sums; n may be 0.

    Raises `InputError` for a group index out of range.
    """
    if group.numel() and not bool(((group >= 0) & (group < groups)).all()):
        found = f"{int(group.min())}..{int(group.max())}"
        raise InputError(f"group: {found} is not within 0..{groups - 1}; number the groups of all ranks together")
    here = torch.ones_like(group, dtype=torch.bool) if present is None else present > 0
    log_a = torch.where(here, log_a, -math.inf)
    top = log_a.new_full((groups,), -math.inf).scatter_reduce(0, group, log_a, "amax")
    weight = torch.exp(log_a - _finite_or_zero(top)[group])

    def total(x: Tensor) -> Tensor:
        return log_a.new_zeros(groups).index_add(0, group, torch.where(here, x, 0.0).to(log_a.dtype))

    count = total(here)
    mean = safe_divide(total(reward), count, 0.0)
    deviation = reward - mean[group]
    return GroupSums(top, count, mean, total(deviation * deviation), total(weight), total(weight * reward))


def weighted_mean_of_others(
    reward: Tensor, log_a: Tensor, group: Tensor, rest: GroupSums, present: Tensor | None = None
) -> Tensor:
    """b_{-i} = sum_{j != i} a_j R_j / sum_{j != i} a_j over this part's rows and the `rest` of the groups: -> (n,).

    `rest` are the sums of all *other* parts. Without weight among the others, their plain mean; without others, R_i
    itself.
    Costs n^2 additions in this part, and no subtraction.
    """
    here = torch.ones_like(group, dtype=torch.bool) if present is None else present > 0
    other = (group[:, None] == group[None, :]) & here[None, :]
    other.fill_diagonal_(False)
    log_a = torch.where(here, log_a, -math.inf)
    # the peak among the *others* of each sample: a dominating sample must not push them under the smallest float
    peak = torch.where(other, log_a[None, :], -math.inf).amax(-1) if len(group) else log_a
    top = _finite_or_zero(torch.maximum(peak, rest.log_scale[group]))
    weight = torch.where(other, torch.exp(log_a[None, :] - top[:, None]), 0.0)
    scale = torch.exp(rest.log_scale[group] - top)
    known = torch.where(here, reward, 0.0).to(log_a.dtype)
    count = other.sum(-1) + rest.count[group]
    plain = safe_divide(other.to(log_a.dtype) @ known + (rest.count * rest.mean_reward)[group], count, known)
    mass = weight.sum(-1) + rest.weight[group] * scale
    return safe_divide(weight @ known + rest.weighted_reward[group] * scale, mass, plain)


LOG_A: dict[str, Callable[[Estimator, Batch], Tensor]] = {
    "group_mean": lambda e, batch: batch.reward * 0,
    "leave_one_out": lambda e, batch: batch.reward * 0,
    "length_weighted": lambda e, batch: torch.log(batch.token_length()),
    "on_policy_optimal": lambda e, batch: _log_score_sq(batch),
    "opob": lambda e, batch: log_opob_weight(e, batch),
    "opob_leave_one_out": lambda e, batch: log_opob_weight(e, batch),
    "leverage_damped_mean": lambda e, batch: log_opob_weight(e, batch),
    "opob_released": lambda e, batch: log_opob_weight(e, batch) + 2 * at_level(batch, "sequence", LOG),
}
"""baseline -> log a of each row, for the baselines of `vcposim.baselines` that are a weighted mean of rewards"""


def log_opob_weight(estimator: Estimator, batch: Batch) -> Tensor:
    """log w_i^2 ||s_i||^2, w after the estimator's treatment: (n,).

    Raises `InputError` at token level, where trajectory norms do not say what ||sum_t w_t s_t|| is.
    """
    log_w = log_weight(estimator.weighting, batch)
    if log_w.ndim > batch.reward.ndim:
        raise InputError("level: token weights change the norm within a trajectory; use 'sequence' or 'geometric'")
    return 2 * log_w + _log_score_sq(batch)


LEAVE_ONE_OUT = ("leave_one_out", "opob_leave_one_out")
LOCAL_NORMALIZER = {"none": "none", "length": "length", "group_std": "none", "group_std_length": "length"}
"""normalizer -> the part of it that looks at one trajectory"""


def split_coefficient(
    estimator: Estimator, batch: Batch, group: Tensor, total: GroupSums, rest: GroupSums | None = None
) -> Tensor:
    """c_i of this part's rows, its groups completed by other parts: (n,), or (n, t) with token weights.

    `batch` holds this part's rows (n,), `group` their index into the G groups of `total`, the merged sums of all parts;
    `rest`, those of all other parts, is needed for leave-one-out baselines. The baseline and the group's standard
    deviation come from the sums, everything else from the kernel's own `Estimator.coefficients`.

    Raises `InputError` for estimators that compare trajectories in other ways: use `gather_batch` for these.
    """
    require_additive(estimator)
    known = replace(batch, population_baseline=_baseline(estimator, batch, group, total, rest))
    rewired = replace(estimator, baseline="population", normalizer=LOCAL_NORMALIZER[estimator.normalizer])
    c = rewired.coefficients(known)
    if "group_std" not in estimator.normalizer:
        return c
    scale = safe_divide(torch.ones_like(total.count), total.reward_std() + estimator.epsilon, 0.0)[group]
    return c * (scale if c.ndim == 1 else scale[:, None])


def part_sums(estimator: Estimator, batch: Batch, group: Tensor, groups: int) -> GroupSums:
    """The sums that `split_coefficient` needs of a part's rows: (n,) -> sums. Raises `InputError` as it does."""
    require_additive(estimator)
    log_a = LOG_A[estimator.baseline](estimator, batch) if estimator.baseline in LOG_A else batch.reward * 0
    return group_sums(batch.reward, log_a, group, groups, batch.measure)


def split_measure(batch: Batch, group: Tensor, total: GroupSums) -> Tensor:
    """measure_i / G of each row: 1/(n_g G) over the groups that have a trajectory, 0 for absent rows: (n,)."""
    filled = (total.count > 0).sum().clamp(min=1)
    here = (batch.given("measure") > 0).to(total.count.dtype)
    return safe_divide(here, total.count[group], 0.0) / filled


def require_additive(estimator: Estimator) -> None:
    """Refuse, by name, what no group sum can express."""
    other: dict[str, object] = {
        "baseline": isinstance(estimator.baseline, str) and estimator.baseline not in (*LOG_A, "zero"),
        "normalizer": estimator.normalizer not in LOCAL_NORMALIZER,
        "surrogate": estimator.surrogate is not None,
        "reference_penalty": estimator.reference_penalty,
    }
    for name in (name for name, refused in other.items() if refused):
        value = getattr(estimator, name)
        raise InputError(f"{name}: {value!r} is no function of a group's sums; gather the batch first (`gather_batch`)")


def _baseline(estimator: Estimator, batch: Batch, group: Tensor, total: GroupSums, rest: GroupSums | None) -> Tensor:
    name = estimator.baseline
    if not isinstance(name, str) or name == "zero":
        value = batch.reward * 0 + (0.0 if isinstance(name, str) else name)
    elif name in LEAVE_ONE_OUT:
        if rest is None:
            raise InputError(f"rest: baseline {name!r} needs the sums of the other parts; pass rest")
        value = weighted_mean_of_others(batch.reward, LOG_A[name](estimator, batch), group, rest, batch.measure)
    elif name == "leverage_damped_mean":
        own = torch.exp(log_opob_weight(estimator, batch) - _finite_or_zero(total.log_scale)[group])
        equal = safe_divide(torch.ones_like(own), total.count[group], 0.0)  # where no weight is known
        share = safe_divide(own, total.weight[group], equal)
        value = leverage_damped(batch.reward, total.mean_reward[group], share)
    else:
        value = total.weighted_mean()[group]
    return value


def _log_score_sq(batch: Batch) -> Tensor:
    return torch.log(batch.scored().sq_norm(batch.reward * 0 + 1))


def _finite_or_zero(log_scale: Tensor) -> Tensor:
    return torch.where(log_scale == -math.inf, 0.0, log_scale)
