"""`Trainer`: sample, wait, learn. One update of the policy from trajectories that older versions of it drew.

    trainer = Trainer(TrainConfig(task="addition", estimator="vcpo", step_rule="ess_sqrt", lag=16))
    for record in trainer.updates():
        print(record["step"], record["reward"], record["ess_fraction_sequence"], record["step_scale"])
    print(trainer.evaluate(256)["success_rate"])

A record is flat: names to floats, the same names for every method (NaN where a number does not exist). Everything is a
function of the configuration: problems, tokens and lags come from counters, so a run that is stopped and resumed goes
on to the bit, and runs that differ in one setting are compared on the same problems and random numbers.

What is defined for batches that say little: a group of equal rewards contributes nothing under a centered baseline (the
optimizer still takes its step: momentum goes on); a response without tokens is absent from every mean; a batch without
any token, and whatever is no number, is no step, a warning, and a record with `step_scale` 0.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from llm_bridge.distributed import gathered_rows, rank, world_size
from llm_bridge.models import load_model
from llm_bridge.models.language_model import LanguageModel
from llm_bridge.models.warmup import LESSONS, ReportProgress
from llm_bridge.ratios import log_ratio, present
from llm_bridge.rollouts import Rollouts, Sampler
from llm_bridge.tasks import load_task
from llm_bridge.tasks.base import STRIDE, Task, TaskProblem
from llm_bridge.training.config import TrainConfig
from llm_bridge.training.dumps import dump_records
from llm_bridge.training.gradient import BatchGradient, GradientMaker, token_coefficients
from llm_bridge.training.queue import RolloutQueue, moved
from llm_bridge.training.records import TrainingRecord, update_record
from llm_bridge.training.schedule import Schedule
from llm_bridge.training.sharding import load_moments, load_weights, moments, sharded, synchronize, weights
from llm_bridge.training.steps import Stepped, Steps, make_optimizer
from vcposim.control import step_rule
from vcposim.diagnostics import weight_sums
from vcposim.errors import InputError

HELD_OUT = STRIDE // 10 * 9
"""first problem of those that measure the policy; training starts at 0, warm-up lies in between"""
PRECISION = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
"""of the weights; bf16 is autocast around float32"""


@dataclass(frozen=True)
class Repeated:
    """`inner`, whose problems to train on are the `chosen` ones in turn; those to learn from before, and those held
    out, stay what they are. A problem that comes again has a number, and so random numbers, of its own."""

    inner: Task
    chosen: Sequence[int]

    def __getattr__(self, name: str) -> Any:
        """Everything else is the inner task's."""
        if name == "inner":  # a copy asks before it has one
            raise AttributeError(name)
        return getattr(self.inner, name)

    def problem(self, index: int) -> TaskProblem:
        """Problem number `index`."""
        known = self.chosen[index % len(self.chosen)] if index < LESSONS else index
        return replace(self.inner.problem(known), index=index)


def training_task(config: TrainConfig, task: Task | None = None) -> Task:
    """The task of a configuration, or another in its place; with as many problems as it says."""
    found = load_task(config.task, seed=config.seed, **config.task_options) if task is None else task
    return Repeated(found, range(config.problems)) if config.problems else found


class Trainer:
    """Trains one policy as configured. `task` and `lm` replace what the configuration names, for those who bring their
    own; a model is trained in place. `report` is told the steps and success rates of a warm-up, the first time.
    `sampler`: `Sampler`, or the equal but faster one of `llm_bridge.static_sampler`. `phase(name)` is entered
    around the parts of an update, for who measures them.

    After an update, `rollouts` and `made` hold what this rank has just learned from. Under torchrun every rank makes
    the same calls and gets the same records; each samples and reads its own groups.

    Raises `InputError` for names that do not exist, an estimator that cannot be served, groups that do not divide over
    the ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        task: Task | None = None,
        lm: LanguageModel | None = None,
        accelerator: Accelerator | None = None,
        report: ReportProgress = lambda step, rate: None,
        sampler: Callable[..., Sampler] = Sampler,
    ) -> None:
        self.config = config
        self.phase: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
        self.accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
        ranks = world_size()
        share, rest = divmod(config.groups, ranks)
        if rest:
            raise InputError(f"groups: {config.groups} do not divide over {ranks} ranks; use a multiple of {ranks}")
        mine = range(rank() * share, (rank() + 1) * share)  # the groups of an update that this rank samples and reads
        token_coefficients(config.resolved(), config.group_size)
        rule = step_rule(config.step_rule)
        whole_gradient = "group_gradient" in rule.needs or rule.turn is not None
        if whole_gradient and (ranks > 1 or config.sharding != "none"):
            raise InputError(
                f"step_rule: {config.step_rule!r} looks at whole gradients of one process; use another, or start "
                "without torchrun"
            )
        self.task = training_task(config, task)
        if lm is None:
            with self.accelerator.main_process_first():  # one rank fills the cache, the others read it
                warm = load_task(config.task, seed=config.model_seed, **config.task_options)
                lm = load_model(
                    config.model, task=warm, seed=config.model_seed, base_rate=config.base_rate, report=report
                )
        self.lm = lm
        self.model: nn.Module = self.lm.model.to(self.accelerator.device, PRECISION[config.dtype]).eval()
        self.trained = sharded(copy.deepcopy(self.model)) if config.sharding == "fsdp2" else self.model
        self.optimizer = make_optimizer(config, list(self.trained.parameters()))
        self.steps = Steps(config, self.optimizer)
        # the policies that ratios are taken to besides mu: one update ago (itself on policy), and the start
        self.older: dict[str, nn.Module] = {}
        if "anchor_log_ratio" in config.resolved().needs:
            self.older["anchor"] = copy.deepcopy(self.model) if config.lag else self.model
        if "reference_log_ratio" in config.resolved().needs:
            self.older["reference"] = copy.deepcopy(self.model)
        self.maker = GradientMaker(self.model, self.trained, config, self.older)
        schedule = Schedule(config.law, config.groups, config.seed, None if config.extend else config.updates)
        self.sampler = sampler(self.task, config.group_size, config.max_new_tokens, config.seed, config.temperature)
        self.queue = RolloutQueue(self.sampler, schedule, mine)
        self.version = 0
        self.rollouts: Rollouts | None = None
        self.made: BatchGradient | None = None

    # --- the loop -----------------------------------------------------------------------------------------------------

    def updates(self, count: int | None = None) -> Iterator[TrainingRecord]:
        """Make `count` more updates (default: up to the configuration's), yielding a record of each.

        Stop and call again at will: nothing is lost.
        """
        last = self.config.updates if count is None else self.version + count
        while self.version < last:
            yield self.update()

    def update(self) -> TrainingRecord:
        """Sample what is due, take what was sampled for this update, and learn from it."""
        with self._precision():
            with self.phase("sampling"):
                self.queue.generate(self.lm, self.version)
            rollouts = moved(self.queue.take(self.version), self.accelerator.device)
            with self.phase("gradient"):
                made = self.maker(rollouts, self.version)
            with self.phase("record"):
                record = update_record(self.version, rollouts, made)
            with self.phase("step"):
                stepped = self._step(rollouts, made, record["lag"])
        self.rollouts, self.made = rollouts, made
        self.version += 1
        record |= {
            "gradient_norm": stepped.gradient_norm,
            "step_scale": stepped.step_scale,
            "lr": self.config.lr * stepped.step_scale,
        }
        every = self.config.evaluate_every
        with self.phase("evaluation"):
            if every and self.version % every == 0:
                found = self.evaluate(self.config.evaluate_problems)
                record |= {f"held_out_{name}": x for name, x in found.items()}
        return record

    def evaluate(self, problems: int = 256) -> TrainingRecord:
        """Means of reward, success (a reward of 1) and length on held-out problems, one response each.

        Sampled at the configuration's temperature, with the same random numbers at every version. Raises `InputError`
        for no problems.
        """
        if problems < 1:
            raise InputError(f"problems: {problems}; give at least 1")
        mine = list(range(HELD_OUT + rank(), HELD_OUT + problems, world_size()))
        found = torch.zeros(0, 3, dtype=torch.float64)
        if mine:
            with self._precision():
                one = replace(self.sampler, group_size=1)
                out = one.finished(self.lm, one.advance(self.lm, one.start(self.lm, mine), version=self.version))
            found = torch.stack([out.reward.double(), (out.reward >= 1).double(), out.mask.sum(-1).double()], -1)
        means = gathered_rows(found.to(self.accelerator.device)).mean(0).tolist()
        return dict(zip(("reward", "success_rate", "length"), means, strict=True))

    def dump_records(self) -> list[dict[str, Any]]:
        """The trajectories of the last update, all ranks', as `vcposim replay` reads them; a collective."""
        if self.rollouts is None or self.made is None:
            return []
        exact = self.config.norm in ("exact", "sketch")
        return gather_object(dump_records(self.version - 1, self.rollouts, self.made, exact_norms=exact))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next update reads: plain values and tensors. A collective; complete on every rank."""
        return {
            "version": self.version,
            "model": weights(self.trained),
            "optimizer": moments(self.optimizer),
            "steps": self.steps.state_dict(),
            "queue": gather_object([self.queue.state_dict()]),
            "remembered": torch.from_numpy(self.maker.remembered),
            "old": {name: weights(model) for name, model in self.older.items() if model is not self.model},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the number of ranks may be another."""
        load_weights(self.trained, state["model"])
        if self.maker.sharded:
            synchronize(self.model, self.trained)
        for name, kept in state["old"].items():
            load_weights(self.older[name], kept)
        load_moments(self.optimizer, state["optimizer"])
        self.steps.load_state_dict(state["steps"])
        self.queue.load_state_dict(*state["queue"])
        self.maker.remembered = state["remembered"].numpy()
        self.version = state["version"]

    # --- parts --------------------------------------------------------------------------------------------------------

    def _step(self, rollouts: Rollouts, made: BatchGradient, lag: float) -> Stepped:
        by_group = self.steps.wants_group_gradients and made.finite
        group_gradient = self.maker.group_gradients(rollouts, made) if by_group else None
        if "anchor" in self.older and self.older["anchor"] is not self.model:
            load_weights(self.older["anchor"], weights(self.model))
        log_w = log_ratio(made.reading.log_prob, rollouts.behavior_log_prob, rollouts.mask)
        every = made.every.batch
        token_ess = None
        if "token_ess_fraction" in self.steps.rule.needs:
            tokens, mask = every.given("log_ratio").flatten(), every.given("token_mask").flatten()
            token_ess = float(weight_sums(tokens, mask).ess_fraction())
        here = every.given("measure") > 0
        stepped = self.steps.step(
            self.version,
            lag,
            log_w,
            present(rollouts.mask),
            finite=made.finite,
            group_gradient=group_gradient,
            token_ess_fraction=token_ess,
            length=float(every.token_length()[here].mean()),
        )
        if self.maker.sharded:
            synchronize(self.model, self.trained)
        return stepped

    def _precision(self) -> AbstractContextManager[Any]:
        bf16 = self.config.dtype == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16)
