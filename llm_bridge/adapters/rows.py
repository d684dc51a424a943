"""From rows, as a framework hands them over, to an estimator's coefficients: what the adapters share.

A framework has rows (one trajectory each) in any order, a prompt's responses torn over microbatches and ranks, and the
id of each row's prompt. An estimator wants whole groups. `row_coefficient` gathers, asks `Estimator.coefficients` and
hands every row its own number back. `require` refuses an estimator whose needs the framework does not meet, by the
table of `vcposim.catalogue.trainers` and by asking it once on a batch of eight tokens, before any work is lost.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llm_bridge.distributed import gather_batch
from llm_bridge.ratios import trajectory_batch
from vcposim.batch import Batch
from vcposim.catalogue.loading import estimator_named
from vcposim.catalogue.trainers import require_met
from vcposim.estimators import PER_TOKEN, Resolved


@dataclass(frozen=True)
class RowCoefficient:
    """An estimator's answer for this rank's rows, and the batch of all ranks it was computed on."""

    coefficient: Tensor
    """(n,), or (n, t) at token level; without the measure; 0 for absent rows"""
    batch: Batch
    """all rows of all ranks, on group axes"""
    finite: bool
    """whether all coefficients of all ranks are numbers: the same on every rank"""


def estimator_of(name: str | Resolved) -> Resolved:
    """The estimator of a catalogue name or of `file.py:function`, or the estimator itself.

    Raises `InputError` for unknown names, and for a function that answers no small batch.
    """
    return estimator_named(name, library="torch") if isinstance(name, str) else name


def require(estimator: Resolved, trainer: str, name: str | None = None) -> None:
    """Refuse an estimator, called `name`, that needs what a `trainer` of `SWITCHES` does not give.

    Raises `InputError` with the need's name and where to train it instead.
    """
    require_met(trainer, estimator, name)
    zero, one = torch.zeros(4, 2), torch.ones(4, 2)
    batch = trajectory_batch(zero[:, 0], zero, zero, one, score_sq_norm=one[:, 0])
    given = estimator.needs & {"log_prob", "collision", "anchor_log_ratio", "reference_log_ratio"}
    fields: dict[str, Any] = {need: zero if need in PER_TOKEN else zero[:, 0] for need in given}
    row_coefficient(estimator, replace(batch, **fields), torch.tensor([0, 0, 1, 1]))


def row_coefficient(estimator: Resolved, batch: Batch, group: Tensor) -> RowCoefficient:
    """c_i of this rank's flat rows; `group` (n,) is the id of each row's prompt, unique over all ranks.

    A collective over all ranks. Raises `InputError` as `gather_batch` and the estimator do.
    """
    gathered = gather_batch(batch, group)
    here = gathered.batch.given("measure") > 0
    everyone = estimator.coefficients(gathered.batch)
    everyone = torch.where(here if everyone.ndim == here.ndim else here[..., None], everyone, 0.0)
    mine = gathered.local(everyone)
    if mine.ndim > 1:
        mine = mine[:, : batch.given_ratio.shape[1]]  # another rank's rows may be longer
    return RowCoefficient(mine, gathered.batch, bool(torch.isfinite(everyone).all()))


def usable(batch: Batch) -> bool:
    """Whether no trajectory's ratio is NaN or +inf; the same on every rank for the batch of all ranks."""
    ratio = batch.given_ratio.sum(-1) if batch.per_token else batch.given_ratio
    broken = torch.isnan(ratio) | (ratio == torch.inf)
    return not bool((broken & (batch.given("measure") > 0)).any())
