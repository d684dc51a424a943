"""Models by name: `load_model("char", task=task)`, `load_model("smollm2")`, `load_model("path/to/it")`."""

from llm_bridge.models.language_model import LanguageModel
from llm_bridge.models.load import load_model

__all__ = ["LanguageModel", "load_model"]
