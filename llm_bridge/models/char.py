"""Character-level policies that are warmed up once and kept: the small language model of experiments on a CPU."""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_model as load_weights

from llm_bridge.models import store
from llm_bridge.models.language_model import CharTokenizer, LanguageModel, char_llama
from llm_bridge.models.warmup import STANDARD, Recipe, ReportProgress, success_rate, warm_up
from llm_bridge.tasks import load_task
from llm_bridge.tasks.base import Task
from vcposim.errors import InputError

TABLE = ("addition", "knights_knaves", "calculator")
"""one task of each kind"""
RATES = (0.1, 0.3, 0.5)


def warmed_up(
    task: Task | None,
    base_rate: float,
    *,
    seed: int = 0,
    cache: str | Path | None = None,
    recipe: Recipe = STANDARD,
    report: ReportProgress = lambda step, rate: None,
    **size: int,
) -> LanguageModel:
    """From the cache if it is there and whole, else warmed up and kept; as initialised for base rate 0.

    A damaged folder is named on stderr and made again. Raises InputError as `warm_up` does.
    """
    tokenizer = CharTokenizer()
    lm = LanguageModel(char_llama(tokenizer, seed=seed, **size).eval(), tokenizer, "char")
    if base_rate == 0:
        return lm
    if task is None:
        raise InputError("task: a character model is warmed up on one; give a task, or base_rate=0")
    made = {name: version(name) for name in ("torch", "transformers", "reasoning-gym")}
    about = {
        "task": task.options, "seed": seed, "base_rate": base_rate, "recipe": asdict(recipe), "size": size,
        "alphabet": tokenizer.alphabet, "made with": made,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = store.cache_folder(cache) / f"char-{task.name}-{key}"
    if folder.exists():
        try:
            store.check(folder)
            load_weights(lm.model, folder / "model.safetensors")
            return lm
        except InputError as error:
            print(f"{error}: warming up again", file=sys.stderr)
    about["measured"] = warm_up(lm, task, base_rate, seed=seed, recipe=recipe, report=report)
    store.save(folder, lm.save_pretrained, about)
    return lm


def base_rates(tasks: Sequence[str], rates: Sequence[float], seed: int = 0, checks: int = 2048) -> str:
    """Each row: base rate asked for, rate of a second measurement on `checks` other samples, CPU seconds; as Markdown.

    Every row warms up from scratch, on one thread.
    """
    torch.set_num_threads(1)
    lines = ["| task | asked | measured again | steps | CPU seconds |", "|---|---|---|---|---|"]
    for task in map(load_task, tasks):
        for rate in rates:
            taken: list[int] = []
            started = time.process_time()
            lm = LanguageModel(char_llama(CharTokenizer(), seed=seed).eval(), CharTokenizer(), "char")
            warm_up(lm, task, rate, seed=seed, report=lambda step, _: taken.append(step))  # noqa: B023
            spent = time.process_time() - started
            again = success_rate(lm, task, checks, seed + 1, 64)
            lines.append(f"| {task.name} | {rate} | {again:.2f} | {taken[-1]} | {spent:.0f} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)
