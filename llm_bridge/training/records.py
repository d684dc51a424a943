"""What one update looked like: a flat record, the same names for every method, ready for a logger or a table."""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llm_bridge.diagnostics import diagnose
from llm_bridge.distributed import gathered_rows
from llm_bridge.ratios import present
from llm_bridge.rollouts import Rollouts
from llm_bridge.training.gradient import BatchGradient
from vcposim.estimators import group_std

TrainingRecord = dict[str, float]

GAUGES = (
    "trajectories", "unusable", "ess_fraction_sequence", "ess_fraction_sequence_truncated", "ess_fraction_token",
    "ess_fraction_geometric", "ess_fraction_gradient", "khat", "mean_weight", "log_mean_weight", "max_share",
    "kl_behavior_target", "kl_low_variance", "chi2", "max_leverage",
)  # fmt: skip
"""`vcposim.gauges.panel`'s, over the whole batch; NaN where a batch does not permit one"""


def update_record(step: int, rollouts: Rollouts, made: BatchGradient) -> TrainingRecord:
    """The record of an update before its step; a collective on all ranks, equal on each.

    `reward` is the mean of the batch, which stale versions sampled; `lag` (updates), `entropy` (nats) and
    `behavior_entropy` (nats: mean of -log mu) are means over the policy's own tokens; `length` counts them;
    `equal_groups` is the share of prompts whose responses all have one reward.
    """
    batch = made.every.batch
    gauges = diagnose(batch, prefix="")
    filled = batch.given("measure").sum(-1) > 0
    equal = (group_std(batch.reward, batch.measure)[..., 0] == 0) & filled
    return (
        {"step": float(step)}
        | _means(step, rollouts, made)
        | {"equal_groups": _over(float(equal.sum()), float(filled.sum()))}
        | {name: gauges.get(name, math.nan) for name in GAUGES}
    )


def to_json(record: Mapping[str, float]) -> str:
    """One line of strict JSON: whole numbers without a point, null for what is not finite.

    >>> to_json({"step": 3.0, "reward": 0.5, "khat": math.nan})
    '{"step": 3, "reward": 0.5, "khat": null}'
    """
    return json.dumps({name: _plain(name, x) for name, x in record.items()}, allow_nan=False)


def _plain(name: str, x: float) -> float | int | None:
    return None if not math.isfinite(x) else int(x) if name == "step" else x


def _means(step: int, rollouts: Rollouts, made: BatchGradient) -> TrainingRecord:
    own, here = rollouts.mask > 0, present(rollouts.mask)

    def total(x: Tensor) -> Tensor:
        return torch.where(own, x.double(), 0.0).sum(-1)

    lag = total(step - rollouts.version)
    columns = [
        here, rollouts.reward * here, rollouts.finished * here, own.sum(-1), lag, total(made.reading.entropy),
        -total(rollouts.behavior_log_prob),
    ]  # fmt: skip
    rows = gathered_rows(torch.stack([x.double() for x in columns], -1))
    rows_n, reward, finished, tokens, lag_sum, entropy, surprise = rows.sum(0).tolist()
    most = torch.where(own, step - rollouts.version, 0).max().double().reshape(1)
    return {
        "reward": _over(reward, rows_n),
        "finished": _over(finished, rows_n),
        "length": _over(tokens, rows_n),
        "lag": _over(lag_sum, tokens),
        "largest_lag": float(gathered_rows(most).max()),
        "entropy": _over(entropy, tokens),
        "behavior_entropy": _over(surprise, tokens),
    }


def _over(x: float, count: float) -> float:
    return x / count if count else math.nan
