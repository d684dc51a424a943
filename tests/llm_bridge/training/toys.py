"""A task that an untrained model solves now and then, and a model small enough to train in milliseconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_bridge.models.language_model import CharTokenizer, LanguageModel, char_llama
from llm_bridge.tasks.base import TaskProblem
from llm_bridge.training import TrainConfig, Trainer


@dataclass(frozen=True)
class Letters:
    """Say a letter of the first half of the alphabet first; prompts have two lengths. Random policies succeed by a
    quarter."""

    name: str = "letters"
    kind: str = "reasoning"
    max_turns: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def problem(self, index: int) -> TaskProblem:
        return TaskProblem(index, "say=" if index % 2 else "please say=", "abcdefghijklm")

    def reply(self, problem: TaskProblem, responses: Sequence[str]) -> None:
        return None

    def reward(self, problem: TaskProblem, responses: Sequence[str]) -> float:
        return float(bool(responses) and responses[0][:1] != "" and responses[0][:1] in problem.answer)

    def demonstration(self, problem: TaskProblem) -> list[str]:
        return ["a"]


@dataclass(frozen=True)
class Constant(Letters):
    """Everything earns the same."""

    value: float = 1.0

    def reward(self, problem: TaskProblem, responses: Sequence[str]) -> float:
        return self.value


def tiny(seed: int = 0) -> LanguageModel:
    """A two-layer Llama of width 32, in float32."""
    tokenizer = CharTokenizer()
    model = char_llama(tokenizer, hidden=32, heads=2, length=48, seed=seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return LanguageModel(model, tokenizer, "char")


def config(**changes: Any) -> TrainConfig:
    """A run of seconds."""
    small = {"updates": 4, "groups": 3, "group_size": 4, "max_new_tokens": 4, "lr": 3e-3, "clip_norm": float("inf")}
    return TrainConfig(**(small | changes))


def trainer(task: Any = None, **changes: Any) -> Trainer:
    """A trainer of the toy task, or another."""
    return Trainer(config(**changes), task=task or Letters(), lm=tiny())
