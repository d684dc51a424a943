"""From a batch of rollouts to p.grad: log-probabilities, the kernel's coefficients, one weighted backward.

    read         the learner's log-probabilities of the queued tokens, and score norms if the estimator needs them
    gather       a few numbers a token from every rank, so that the kernel sees the whole batch
    coefficient  the estimator of the catalogue, the very function that is proved and simulated
    descend      p.grad = -sum_i c_i grad log pi(tau_i), summed over ranks

Three routes lead to the same gradient:

    one pass    a rank's rows fit one forward (`micro_batch` 0): norms on a `ScoreTape` without a second backward (with
                one where coefficients are per token, as PPO's with an n^2 baseline), or plain autograd on the
                surrogate where the estimator needs no norms
    by group    `micro_batch` is one group, and the coefficient is affine in the group's one unknown, its baseline
                (OPOB and its kin): each group is finished by itself, and the tape keeps two sums, not activations
    two passes  anything else, and sharded parameters: one pass that reads, one that descends. A forward more (for
                norms, a backward too), exact for every estimator: some look at the whole batch before any coefficient
                is known
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_bridge.diagnostics import to_numpy
from llm_bridge.distributed import Gathered, gather_batch, gathered_rows, sum_gradients, world_size
from llm_bridge.loss import mean_coefficient, surrogate
from llm_bridge.ratios import present, trajectory_batch
from llm_bridge.rollouts import Rollouts
from llm_bridge.scores import ScoreTape, tape_for
from llm_bridge.training.config import TrainConfig
from llm_bridge.training.queue import picked
from llm_bridge.training.reading import Reading, first_read, policy_log_prob, policy_logits, read
from vcposim.arrays import Array
from vcposim.baselines import baseline
from vcposim.batch import Batch
from vcposim.errors import InputError
from vcposim.estimators import Estimator, Resolved
from vcposim.learning.run_records import remembered_baseline


@dataclass(frozen=True)
class BatchGradient:
    """A gradient in p.grad, and what it was made of."""

    reading: Reading
    """of this rank's rows"""
    record: Batch
    """the kernel's record of this rank's rows, (n,)"""
    every: Gathered
    """the whole batch, all ranks, on (group, sample) axes"""
    coefficient: Tensor
    """(n,) or (n, t), of this rank's rows, measure included"""
    finite: bool
    """whether there is a gradient: false if a coefficient is no number"""


class GradientMaker:
    """Forms the gradient of one estimator.

    `model` is read (and sampled from) whole; `trained` holds the parameters that learn: the same module, or its sharded
    twin. `older` holds models of other versions: `anchor` (one update ago) and `reference` (the start), where the
    estimator asks for ratios to them. `want_proxy`: also read the logit proxy, for dumps.
    """

    def __init__(
        self, model: nn.Module, trained: nn.Module, config: TrainConfig, older: dict[str, nn.Module] | None = None
    ) -> None:
        self.model, self.trained, self.config, self.older = model, trained, config, older or {}
        self.estimator = config.resolved()
        self.per_token = token_coefficients(self.estimator, config.group_size)
        self.want_proxy = False
        self.remembered = np.zeros((config.problems, 2))
        """sums of each prompt's past responses, for a baseline with a memory"""

    @property
    def sharded(self) -> bool:
        """Whether the parameters that learn are spread over ranks."""
        return self.trained is not self.model

    def __call__(self, rollouts: Rollouts, step: int) -> BatchGradient:
        """p.grad of `trained`, from these rows and those of the other ranks; what was there before is dropped."""
        self.trained.zero_grad(set_to_none=True)
        parts = self._parts(rollouts)
        if self._affine(parts):
            made = self._by_group(parts, rollouts, step)
        elif len(parts) == 1 and not self.sharded:
            with self._tape(step) as tape:
                log_prob, reading = self._read(rollouts, tape, keep=True)
                made = self._made(rollouts, reading)
                if made.finite:
                    _descend(made.coefficient, log_prob, rollouts, tape)
        else:  # coefficients need all rows: one pass to read them, another with a graph for each part in turn
            readings = []
            for part in parts:
                with self._tape(step) as tape, torch.set_grad_enabled(tape is not None):
                    readings.append(self._read(part, tape, keep=False)[1])
            made = self._made(rollouts, Reading.of(readings))
            if made.finite:
                factor = world_size() if self.sharded else 1  # sharded gradients are averaged over ranks
                for part, c in zip(parts, made.coefficient.split(len(parts[0])), strict=True):
                    _descend(c * factor, self.log_prob(self.trained, part), part, None)
        if made.finite and not self.sharded:
            sum_gradients(self.trained.parameters())
        return made

    def group_gradients(self, rollouts: Rollouts, made: BatchGradient) -> Tensor:
        """Each group's own gradient, flat: (groups, p), a forward and backward each; p.grad is left alone."""
        size, params, out = self.config.group_size, list(self.trained.parameters()), []
        groups = made.coefficient.split(size)
        for part, c in zip(_rows(rollouts, size), groups, strict=True):
            loss = surrogate(c * len(groups), self.log_prob(self.trained, part), part.mask)
            out.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, params)]))
        return torch.stack(out)

    def log_prob(self, model: nn.Module, rollouts: Rollouts) -> Tensor:
        """log pi of each token, nats: (n, t)."""
        logits = policy_logits(model, rollouts, self.config.temperature, first_read(rollouts))
        return policy_log_prob(logits, rollouts)

    # --- passes -------------------------------------------------------------------------------------------------------

    def _by_group(self, parts: Sequence[Rollouts], rollouts: Rollouts, step: int) -> BatchGradient:
        filled = gathered_rows(torch.stack([present(part.mask).any() for part in parts])).sum().clamp(min=1)
        readings = []
        for part in parts:
            with self._tape(step) as tape:
                log_prob, reading = self._read(part, None, keep=False)
                assert isinstance(self.estimator, Estimator)  # else it is not affine
                at_0, at_1 = (
                    self._own(part, reading, replace(self.estimator, baseline=b)) / filled for b in (0.0, 1.0)
                )
                line = (at_0, at_1 - at_0)
                finite = bool(torch.isfinite(torch.stack(line)).all())
                norm = tape.score_sq_norms(log_prob, part.mask, affine=line if finite else None, keep=finite)
                readings.append(replace(reading, score_sq_norm=norm))
                c = self._own(part, readings[-1], self.estimator) / filled
                if finite and bool(torch.isfinite(c).all()):
                    tape.backward(c)
        return self._made(rollouts, Reading.of(readings))

    def _read(self, rollouts: Rollouts, tape: ScoreTape | None, keep: bool) -> tuple[Tensor, Reading]:
        logits = policy_logits(self.model, rollouts, self.config.temperature, first_read(rollouts))
        log_prob = policy_log_prob(logits, rollouts)
        norm = (
            None if tape is None else tape.score_sq_norms(log_prob, rollouts.mask, keep=keep, per_token=self.per_token)
        )
        proxy = self.want_proxy or self._norm_kind == "logit"
        reading = read(logits, log_prob, rollouts, proxy=proxy, score_sq_norm=norm)
        return log_prob, reading

    def _made(self, rollouts: Rollouts, reading: Reading) -> BatchGradient:
        record = self._record(rollouts, reading)
        every = gather_batch(record, rollouts.group)
        batch, estimator, sums = every.batch, self.estimator, self.remembered
        if self.config.memory and isinstance(estimator, Estimator):
            prompt = torch.unique(gathered_rows(rollouts.group)).cpu().numpy() % self.config.problems
            b, sums = remembered_baseline(estimator, to_numpy(batch), sums, prompt, np.array(self.config.memory))
            batch = replace(batch, population_baseline=torch.from_numpy(b).to(batch.reward))
            estimator = replace(estimator, baseline="population")
        c = mean_coefficient(estimator.coefficients(batch), batch)
        finite = bool(torch.isfinite(c).all())
        self.remembered = sums if finite else self.remembered
        return BatchGradient(reading, record, every, every.local(c), finite)

    def _own(self, group: Rollouts, reading: Reading, estimator: Resolved) -> Tensor:
        """Coefficients of the rows of one group, as if it were the batch: (n,)."""
        record = replace(self._record(group, reading), grouped=False)
        return mean_coefficient(estimator.coefficients(record), record)

    def _record(self, rollouts: Rollouts, reading: Reading) -> Batch:
        """The kernel's record of these rows, (n,)."""
        norm = {"logit": reading.logit_proxy, "length": rollouts.mask.sum(-1)}.get(
            self._norm_kind, reading.score_sq_norm
        )
        record = trajectory_batch(
            rollouts.reward,
            reading.log_prob,
            rollouts.behavior_log_prob,
            rollouts.mask,
            score_sq_norm=norm,
        )
        fields: dict[str, Array] = {}  # the optional ones that the estimator asks for
        needs = self.estimator.needs
        if "log_prob" in needs:
            fields["log_prob"] = reading.log_prob
        if "collision" in needs:
            fields["collision"] = reading.collision
        if "anchor_log_ratio" in needs:
            fields["anchor_log_ratio"] = self._ratio_to("anchor", rollouts, reading)
        if "reference_log_ratio" in needs:
            fields["reference_log_ratio"] = self._ratio_to("reference", rollouts, reading).sum(-1)
        return replace(record, **fields)

    @torch.no_grad()
    def _ratio_to(self, version: str, rollouts: Rollouts, reading: Reading) -> Tensor:
        before = torch.cat([self.log_prob(self.older[version], part) for part in self._parts(rollouts)])
        return torch.where(rollouts.mask > 0, reading.log_prob - before, 0.0)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _affine(self, parts: Sequence[Rollouts]) -> bool:
        e, one_group = self.estimator, len(parts[0]) == self.config.group_size
        if not isinstance(e, Estimator):
            return False  # a function says nothing of what it is made of
        local = e.surrogate is None and "grouped" not in e.needs and e.weighting.level != "token"
        on_tape = self._norm_kind in ("exact", "sketch") and not self.sharded
        local = local and not self.config.memory
        return one_group and local and on_tape and isinstance(e.baseline, str) and baseline(e.baseline).one_unknown

    @property
    def _norm_kind(self) -> str:
        return self.config.norm if "scores" in self.estimator.needs else "none"

    def _tape(self, step: int) -> AbstractContextManager[Any]:
        made = tape_for(self.model, self._norm_kind, method=self.config.norm_method, seed=self.config.seed + step)
        return nullcontext() if made is None else made

    def _parts(self, rollouts: Rollouts) -> list[Rollouts]:
        return _rows(rollouts, self.config.micro_batch or len(rollouts))


def token_coefficients(estimator: Resolved, group_size: int) -> bool:
    """Whether coefficients come one a token; refuses, before any work, what a trainer cannot give.

    Asked of a batch of ones. Raises `InputError`, which says what is missing.
    """
    n = 2 * max(group_size, 2)
    one, tokens = torch.ones(n), torch.ones(n, 1)
    optional: dict[str, Any] = {"log_prob": -tokens, "collision": tokens, "anchor_log_ratio": tokens}
    optional["reference_log_ratio"] = one
    given = {name: x for name, x in optional.items() if name in estimator.needs}
    try:
        batch = trajectory_batch(one, -tokens, -tokens, tokens, score_sq_norm=one)
        every = gather_batch(replace(batch, **given), torch.arange(n) % 2).batch
        return estimator.coefficients(every).ndim > every.reward.ndim
    except InputError as error:
        raise InputError(f"estimator: cannot be served in training: {error}") from None


def _descend(coefficient: Tensor, log_prob: Tensor, rollouts: Rollouts, tape: ScoreTape | None) -> None:
    if tape is None:
        surrogate(coefficient, log_prob, rollouts.mask).backward()
    else:
        tape.backward(coefficient)


def _rows(rollouts: Rollouts, size: int) -> list[Rollouts]:
    return [picked(rollouts, slice(i, i + size)) for i in range(0, len(rollouts), size)]
