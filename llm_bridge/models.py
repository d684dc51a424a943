"""Models by name: `load_model("char", task=task, base_rate=0.3)`, `load_model("smollm2")`, `load_model("path/to/it")`.

    python -m llm_bridge.models smollm2            download, verify and convert SmolLM2-135M-Instruct, once
    python -m llm_bridge.models char --task gcd    warm up a character model, and keep it
    python -m llm_bridge.models table              base rates and the CPU seconds they take

Converted and warmed-up models lie in the platform's cache folder, or in `--cache`.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_bridge import smollm2, store
from llm_bridge.char import RATES, TABLE, base_rates, warmed_up
from llm_bridge.language_model import CHARACTERS, CharTokenizer, HubTokenizer, LanguageModel
from llm_bridge.tasks import TASKS, load_task
from llm_bridge.tasks.base import Task
from llm_bridge.warmup import STANDARD, Recipe, Report
from vcposim.errors import InputError, unknown_name

__all__ = ["LanguageModel", "load_model"]

SPECS = ("char", "smollm2")


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
        rate = 0.3 if base_rate is None else base_rate
        return warmed_up(task, rate, seed=seed, cache=cache, recipe=recipe, report=report, **size).to(dtype)
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
