"""From token log-probabilities to the kernel's `Batch`: masked log-ratios, summed in at least float32.

The log-ratio of a token is log pi - log mu, the difference of two numbers that nearly cancel, summed over thousands of
tokens. So both are brought to float32 *before* they are subtracted (bfloat16 has three digits), and nothing that
stands on a masked token, a NaN included, is ever looked at. No ratio carries a gradient.

A row without a single token of the policy is **absent**: it has measure zero, counts in no mean, and is no evidence
that the batch is on policy. (Summing its masked log-ratio would give a weight of 1: a batch of such rows would read as
perfectly fresh.)
"""

from typing import Any

import torch
from torch import Tensor

from llm_bridge.groups import Groups
from vcposim.arrays import LOG
from vcposim.batch import Batch, ScoreNorms, sample_measure
from vcposim.errors import InputError, unknown_name
from vcposim.weights import LEVELS, TREATMENTS, Weighting, at_level


def upcast(x: Tensor) -> Tensor:
    """x in float32, or float64 where it already is, detached; integers and booleans too: same -> same."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def token_log_ratio(log_prob: Tensor, behavior_log_prob: Tensor, mask: Tensor) -> Tensor:
    """log pi - log mu of each token, nats, exactly 0 on masked tokens: (n, t), (n, t), (n, t) -> (n, t), no gradient.

    Raises `InputError` if the shapes differ.
    """
    for name, x in (("behavior_log_prob", behavior_log_prob), ("mask", mask)):
        if x.shape != log_prob.shape:
            raise InputError(
                f"{name}: shape {tuple(x.shape)} differs from log_prob's {tuple(log_prob.shape)}; align them"
            )
    return torch.where(mask > 0, upcast(log_prob) - upcast(behavior_log_prob), 0.0)


def log_ratio(log_prob: Tensor, behavior_log_prob: Tensor, mask: Tensor, level: str = "sequence") -> Tensor:
    """Log-ratio at a level, nats: (n, t) for `token`, the sum over tokens (n,) for `sequence`, their mean for
    `geometric`.

    Rows without tokens come out as 0: ask `present` which they are. Raises `InputError` for an unknown level.
    """
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    token = token_log_ratio(log_prob, behavior_log_prob, mask)
    return at_level(Batch(reward=token.sum(-1), log_ratio=token, token_mask=_zero_one(mask, token)), level, LOG)


def present(mask: Tensor) -> Tensor:
    """Which rows have a token of the policy at all: (n, t) -> (n,) bool."""
    return (mask > 0).any(-1)


def trajectory_batch(
    reward: Tensor,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    mask: Tensor,
    *,
    groups: Groups | None = None,
    score_sq_norm: Tensor | None = None,
    level: str = "token",
    **fields: Tensor,
) -> Batch:
    """The kernel's record of a batch of trajectories, on `groups`' axes (G, N) if given, else one group (n,).

    `reward` and `score_sq_norm` (||s_i||^2, from `ScoreTape`) are (n,); the rest is (n, t). With level `token` the
    batch keeps the ratios of the tokens; `sequence` sums them first, which is all that trajectory-level estimators
    need.
    `fields` are further fields of `Batch`, (n, ...). Everything is detached and at least float32; absent rows get
    measure zero, and zeros: reward (n,), score_sq_norm (n,), log_prob (n, t), behavior_log_prob (n, t), mask (n, t)
    -> batch.

    Raises `InputError` on shapes that disagree.
    """
    token = token_log_ratio(log_prob, behavior_log_prob, mask)
    here = present(mask)
    if reward.shape != here.shape:
        raise InputError(f"reward: shape {tuple(reward.shape)} for {tuple(here.shape)} trajectories; give one each")
    if level not in ("token", "sequence"):
        raise unknown_name("level", level, ("token", "sequence"))
    sequence = level == "sequence"
    real = _zero_one(mask, token)
    column: dict[str, Any] = {
        "reward": torch.where(here, upcast(reward).to(token.dtype), 0.0),
        "log_ratio": token.sum(-1) if sequence else token,
        "length": real.sum(-1),
        "token_mask": None if sequence else real,
        "scores": None if score_sq_norm is None else torch.where(here, upcast(score_sq_norm).to(token.dtype), 0.0),
        **{name: upcast(x).to(token.dtype) for name, x in fields.items()},
    }
    column = {name: x if x is None or groups is None else groups.lift(x) for name, x in column.items()}
    presence = here.to(token.dtype) if groups is None else groups.lift(here.to(token.dtype))
    measure, unit = sample_measure(presence)
    norms = column.pop("scores")
    scores = None if norms is None else ScoreNorms(norms)
    return Batch(**column, scores=scores, measure=measure, unit=unit, grouped=groups is not None)


def log_weight(weighting: Weighting, batch: Batch) -> Tensor:
    """log w after the treatment, nats: (..., n), or (..., n, t) at token level; free of overflow.

    Raises `InputError` for treatments that compare trajectories: their weights are no function of one of them.
    """
    if weighting.of_group:
        raise InputError(
            f"weighting: {weighting.treatment!r} compares trajectories; gather them first (`gather_batch`)"
        )
    limits = {name: x for name in ("cap", "floor") if (x := getattr(weighting, name)) is not None}
    return TREATMENTS[weighting.treatment].function(at_level(batch, weighting.level, LOG), LOG, **limits)


def _zero_one(mask: Tensor, like: Tensor) -> Tensor:
    return (mask > 0).to(like.dtype)
