"""Small transformers in a comparison: what `vcposim compare --transformers` trains, a task at a time.

A character Llama is warmed up once to a known success rate and kept in the cache folder. From these weights every
estimator learns with the same problems and the same random numbers, all step sizes and seeds in lock-step
(`llm_bridge.training.lockstep`); what asks for things that a lock-step does not read is trained by `Trainer`, which is
the same to rounding. One thread, so that a run comes to the same bytes in whatever process.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import numpy as np
import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from llm_bridge.models import load_model
from llm_bridge.models.language_model import LanguageModel
from llm_bridge.models.warmup import Recipe
from llm_bridge.tasks import load_task
from llm_bridge.tasks.base import Task
from llm_bridge.training import TrainConfig, Trainer
from llm_bridge.training.lockstep import NOT_READ, LockStep
from vcposim.arrays import Array
from vcposim.comparison.design import TransformerSetting
from vcposim.comparison.measure import MeasuredTraining
from vcposim.learning.collapse import NOT_COLLAPSED, collapse_step

LASTING = 2
"""evaluations that a collapse lasts at least"""
RECIPE = Recipe(every=100, lessons=4096, batch=32, checks=256)


def trained(
    name: str, setting: TransformerSetting, *, task: Task | None = None, lm: LanguageModel | None = None
) -> MeasuredTraining:
    """Success rate on held-out problems averaged over training, and which runs were lost, by step size and seed.

    `task` and `lm` stand in for what the setting names. Raises `InputError` for an estimator that transformers cannot
    be trained with.
    """
    with one_thread():
        lm = policy(setting) if lm is None else lm
        runs = [config(name, setting, step, seed) for step in setting.step_sizes for seed in setting.seeds]
        if runs[0].resolved().needs & NOT_READ:
            each = [alone(one, lm, setting, task) for one in runs]
            rate, refused = (np.stack(x, axis=1) for x in zip(*each, strict=True))
        else:
            rate, refused = together(runs, lm, setting, task)
    shape = (len(setting.step_sizes), len(setting.seeds))
    lost = collapse_step(rate, stay=LASTING) != NOT_COLLAPSED
    return {
        "average": [[round(float(v), 4) for v in row] for row in rate.mean(axis=0).reshape(shape)],
        "lost": lost.reshape(shape).astype(int).tolist(),
        "refused": refused.sum(axis=0).reshape(shape).astype(int).tolist(),
        "start": fingerprint(lm),
    }


def config(name: str, setting: TransformerSetting, step_size: float, seed: int) -> TrainConfig:
    """The trainer's configuration of a run. Raises `InputError` for an estimator that it cannot serve."""
    return TrainConfig(
        task=setting.task,
        max_new_tokens=setting.tokens,
        estimator=name,
        lag=setting.lag,
        lr=step_size,
        optimizer="adam",
        updates=setting.updates,
        extend=False,
        groups=setting.groups,
        group_size=setting.group_size,
        seed=seed,
    )


def together(
    runs: Sequence[TrainConfig], lm: LanguageModel, setting: TransformerSetting, task: Task | None = None
) -> tuple[Array, Array]:
    """Success rates, and which updates were refused, without a finite gradient: -> (evaluation, run), (update, run)."""
    steps = LockStep(runs, lm=lm, task=task)
    rate, refused = [steps.evaluate(setting.held_out)], []
    for record in steps.updates():
        refused.append(~np.isfinite(record["gradient_norm"]))
        if steps.version % setting.every == 0:
            rate.append(steps.evaluate(setting.held_out))
    return np.stack(rate), np.stack(refused)


def alone(
    run: TrainConfig, lm: LanguageModel, setting: TransformerSetting, task: Task | None = None
) -> tuple[Array, Array]:
    """The same of one run, by `Trainer`: (evaluation,), (update,)."""
    trainer = Trainer(run, lm=deepcopy(lm), task=task, accelerator=Accelerator(cpu=True))
    rate, refused = [trainer.evaluate(setting.held_out)["success_rate"]], []
    for record in trainer.updates():
        refused.append(not np.isfinite(record["gradient_norm"]))
        if trainer.version % setting.every == 0:
            rate.append(trainer.evaluate(setting.held_out)["success_rate"])
    return np.array(rate), np.array(refused)


def prepare(settings: Sequence[TransformerSetting]) -> None:
    """Warm up the policies of these settings and keep them in the cache folder, so that no two processes do."""
    with one_thread():
        for setting in settings:
            policy(setting)


@cache
def policy(setting: TransformerSetting) -> LanguageModel:
    """The policy that the runs of a setting begin from; none changes it."""
    disable_progress_bar()  # of the library that writes weights; the command has one of its own
    return load_model(
        "char",
        task=load_task(setting.task),
        base_rate=setting.base_rate,
        recipe=RECIPE,
        hidden=setting.hidden,
        layers=setting.layers,
        heads=setting.heads,
        length=setting.length,
    )


def fingerprint(lm: LanguageModel) -> str:
    """SHA-256 of the weights."""
    found = hashlib.sha256()
    for name, weight in sorted(lm.model.state_dict().items()):
        found.update(name.encode() + weight.contiguous().numpy().tobytes())
    return found.hexdigest()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread: sums over more come to other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
