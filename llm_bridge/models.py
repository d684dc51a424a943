"""Models by name: `load_model("char", task=task, base_rate=0.3)`, `load_model("smollm2")`, `load_model("path/to/it")`.

    python -m llm_bridge.models smollm2            download, verify and convert SmolLM2-135M-Instruct, once
    python -m llm_bridge.models char --task gcd    warm up a character model, and keep it
    python -m llm_bridge.models table              base rates and the CPU seconds they take

Converted and warmed-up models lie in the platform's cache folder, or in `--cache`.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_bridge import smollm2, store
from llm_bridge.language_model import CHARACTERS, CharTokenizer, HubTokenizer, LanguageModel, char_llama
from llm_bridge.tasks import TASKS, load_task
from llm_bridge.tasks.base import Task
from llm_bridge.warmup import STANDARD, Recipe, success_rate, warm_up
from vcposim.errors import InputError, unknown_name

__all__ = ["LanguageModel", "load_model"]

SPECS = ("char", "smollm2")
Report = Callable[[int, float], None]


def load_model(
    spec: str | Path,
    *,
    task: Task | None = None,
    seed: int = 0,
    base_rate: float | None = None,
    cache: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    recipe: Recipe = STANDARD,
    report: Report = lambda step, rate: None,
    **size: int,
) -> LanguageModel:
    """The model of a name or of a local folder, in evaluation mode.

    `char` is warmed up on `task` to `base_rate` (0.3), or with base rate 0 as it was initialised; `size` (hidden,
    layers, heads, length) is its own. Other models are taken as they are.

    Raises InputError for an unknown name or folder, for `smollm2` before it is installed, and if a base rate is asked
    for where nothing is warmed up.
    """
    if spec == "char":
        return _char(task, seed, 0.3 if base_rate is None else base_rate, cache, recipe, report, size).to(dtype)
    if base_rate is not None or size:
        raise InputError(f"model: {str(spec)!r} is taken as it is; base_rate and sizes are for 'char'")
    if spec == "smollm2":
        return load_folder(_installed(cache), str(spec)).to(dtype)
    if not Path(spec).is_dir():
        hint = unknown_name("model", str(spec), SPECS)
        raise InputError(f"{hint}, or the folder of a Hugging Face model (there is none at this path)")
    return load_folder(Path(spec), str(spec)).to(dtype)


def load_folder(folder: Path, name: str) -> LanguageModel:
    """A Hugging Face causal language model from disk, never from a hub; InputError if it is none."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        characters = (folder / CHARACTERS).exists()
        inner = None if characters else AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library meets in a folder of someone else's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model: {folder} holds no causal language model with its tokenizer: {reason}") from None
    return LanguageModel(
        model.eval(), CharTokenizer.from_pretrained(folder) if inner is None else HubTokenizer(inner), name
    )


def _installed(cache: str | Path | None) -> Path:
    folder = smollm2.folder(cache)
    if not folder.exists():
        raise InputError(f"model: 'smollm2' is not at {folder} yet; get it once with: {smollm2.COMMAND}")
    try:
        store.check(folder)
    except InputError as error:
        raise InputError(f"{error}, then run: {smollm2.COMMAND}") from None
    return folder


def _char(
    task: Task | None,
    seed: int,
    base_rate: float,
    cache: str | Path | None,
    recipe: Recipe,
    report: Report,
    size: dict[str, int],
) -> LanguageModel:
    """From the cache if it is there and whole, else warmed up and kept."""
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
            return load_folder(folder, "char")
        except InputError as error:
            print(f"{error}: warming up again", file=sys.stderr)
    about["measured"] = warm_up(lm, task, base_rate, seed=seed, recipe=recipe, report=report)
    store.save(folder, lm.save_pretrained, about)
    return lm


TABLE = ("addition", "knights_knaves", "calculator")
"""one task of each kind"""
RATES = (0.1, 0.3, 0.5)


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llm_bridge.models", description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", help="folder of models (default: the platform's cache folder)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("smollm2", help="download, verify and convert SmolLM2-135M-Instruct, once")
    table = commands.add_parser("table", help="base rates and the CPU seconds that they take")
    table.add_argument("--task", nargs="+", default=TABLE, help="one of each kind")
    table.add_argument("--base-rate", nargs="+", type=float, default=RATES, help="%(default)s")
    char = commands.add_parser("char", help="warm up a character model on a task, and keep it")
    char.add_argument("--task", default="addition", help=f"one of {', '.join(TASKS)}")
    char.add_argument("--base-rate", type=float, default=0.3, help="success rate of sampled answers (%(default)s)")
    char.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    try:
        print(_run(chosen))
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(chosen: argparse.Namespace) -> str:
    if chosen.command == "smollm2":
        return f"SmolLM2-135M-Instruct: {smollm2.install(chosen.cache)}"
    if chosen.command == "table":
        return base_rates(chosen.task, chosen.base_rate)
    report: Report = lambda step, rate: print(f"step {step}: success rate {rate:.2f}", file=sys.stderr)  # noqa: E731
    task = load_task(chosen.task)
    lm = load_model("char", task=task, seed=chosen.seed, base_rate=chosen.base_rate, cache=chosen.cache, report=report)
    return f"{task.name}: character model of {lm.model.num_parameters()} parameters is in the cache"


if __name__ == "__main__":
    sys.exit(main())
