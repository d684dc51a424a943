"""Models by name: `load_model("char", task=task)`, `load_model("smollm2")`, `load_model("path/to/it")`."""

from typing import TYPE_CHECKING, Any

from llm_bridge.models.language_model import LanguageModel

if TYPE_CHECKING:
    from llm_bridge.models.load import load_model

__all__ = ["LanguageModel", "load_model"]


def __getattr__(name: str) -> Any:
    # looked up when used: a warm-up samples, and the sampler needs `LanguageModel` from here
    if name == "load_model":
        from llm_bridge.models.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
