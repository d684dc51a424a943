"""Models by name: `load_model("char", task=task, base_rate=0.3)`."""

from llm_bridge.language_model import CharTokenizer, LanguageModel, char_llama
from llm_bridge.tasks.base import Task
from llm_bridge.warmup import warm_up
from vcposim.errors import InputError

__all__ = ["LanguageModel", "load_model"]


def load_model(spec: str, *, task: Task | None = None, seed: int = 0, base_rate: float = 0.3) -> LanguageModel:
    """`char`: a character-level Llama warmed up on the task."""
    if spec != "char":
        raise InputError(f"model: {spec!r} is unknown; take 'char'")
    tokenizer = CharTokenizer()
    lm = LanguageModel(char_llama(tokenizer, seed=seed), tokenizer, spec)
    if task is not None:
        warm_up(lm, task, base_rate, seed=seed)
    return lm
