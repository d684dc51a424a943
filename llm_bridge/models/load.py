"""Models by name: `load_model("char", task=task, base_rate=0.3)`, `load_model("smollm2")`, `load_model("path/to/it")`.

Converted and warmed-up models lie in the platform's cache folder, or in `--cache`.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_bridge.models import smollm2, store
from llm_bridge.models.char import warmed_up
from llm_bridge.models.language_model import CHARACTERS, CharTokenizer, HubTokenizer, LanguageModel
from llm_bridge.models.warmup import STANDARD, Recipe, ReportProgress
from llm_bridge.tasks.base import Task
from vcposim.errors import InputError, unknown_name

__all__ = ["LanguageModel", "load_folder", "load_model"]

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
    report: ReportProgress = lambda step, rate: None,
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
        folder = smollm2.folder(cache)
        if not folder.exists():
            raise InputError(f"model: 'smollm2' is not at {folder} yet; get it once with: {smollm2.COMMAND}")
        try:
            store.check(folder)
        except InputError as error:
            raise InputError(f"{error}, then run: {smollm2.COMMAND}") from None
        return load_folder(folder, str(spec)).to(dtype)
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
