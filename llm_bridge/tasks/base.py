"""What a task is: problems by number, an environment that answers, and a reward of 0 or 1 that anyone can verify.

An episode alternates: prompt, response, reply, response, ... The policy writes responses, the environment replies, and
a reply of None ends the episode. `TaskProblem.answer` is the task's own business. Nothing a policy writes may raise.

Problems, extraction and scoring come from reasoning-gym. What its users must know, and this module does for them:

- item i of a data set with seed s is drawn by Random(s + i): seeds 0 and 1 hold the same problems, shifted by one.
  Here the seeds lie `STRIDE` apart.
- scores are often partial (0.05 for a well-formed wrong answer): a reward is 1 above `THRESHOLD` and 0 otherwise.
- verifiers raise, or evaluate what they are given: an exception is a reward of 0, and no answer longer than
  `LONGEST_ANSWER` reaches a verifier.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import reasoning_gym
from reasoning_gym.utils import extract_answer

from vcposim.errors import InputError, unknown_name

STRIDE = 10_000_000
"""distance of the seeds of two tasks: so many different problems each"""
THRESHOLD = 0.99
LONGEST_ANSWER = 200
"""characters"""

DatasetItem = dict[str, Any]
"""an item of a reasoning-gym data set: question, answer, metadata"""


@dataclass(frozen=True)
class TaskProblem:
    """One question. `answer` is opaque to everyone but the task it came from."""

    index: int
    prompt: str
    answer: Any


class Task(Protocol):
    """What the sampler and the trainer know of a task."""

    @property
    def name(self) -> str:
        """As in the table of tasks."""

    @property
    def kind(self) -> str:
        """math, reasoning or tool"""

    @property
    def options(self) -> dict[str, Any]:
        """What `load_task` was told: name, seed and options; two tasks with equal options are the same task."""

    @property
    def max_turns(self) -> int:
        """Turns of the policy in an episode at most; 1 for a single answer."""

    def problem(self, index: int) -> TaskProblem:
        """Problem number `index`, a function of the task's seed and the index."""

    def reply(self, problem: TaskProblem, responses: Sequence[str]) -> str | None:
        """What the environment says after the last response; None ends the episode."""

    def reward(self, problem: TaskProblem, responses: Sequence[str]) -> float:
        """0.0 or 1.0, whatever the policy wrote."""

    def demonstration(self, problem: TaskProblem) -> list[str]:
        """An oracle's responses, one for each turn; InputError if there is none."""


@dataclass(frozen=True)
class Form:
    """How an entry is put to a policy, and how its response is read.

    `prompt` and `response` (the oracle's) write; `read` turns a response into the answer that the verifier expects.
    """

    prompt: Callable[[DatasetItem], str]
    response: Callable[[DatasetItem], str]
    read: Callable[[str, DatasetItem], str]


@dataclass(frozen=True)
class GymTask:
    """One answer to one question of a reasoning-gym data set; `score` replaces the data set's own verifier."""

    name: str
    kind: str
    dataset: Any = field(repr=False)
    form: Form = field(repr=False)
    options: dict[str, Any]
    score: Callable[[str, DatasetItem], float] | None = field(default=None, repr=False)
    max_turns: int = 1

    def problem(self, index: int) -> TaskProblem:
        """Item `index` of the dataset, in this task's words."""
        entry = item(self.dataset, index)
        return TaskProblem(index, self.form.prompt(entry), entry)

    def reply(self, problem: TaskProblem, responses: Sequence[str]) -> None:
        """None: one turn."""
        return None

    def reward(self, problem: TaskProblem, responses: Sequence[str]) -> float:
        """The dataset's own verdict on the last response, 0 or 1; 0 without one."""
        return verified(self._score, responses[-1], problem.answer) if responses else 0.0

    def demonstration(self, problem: TaskProblem) -> list[str]:
        """The dataset's answer as a response; InputError where it has none."""
        if problem.answer["answer"] is None:
            raise InputError(f"task {self.name!r}: no oracle answer to learn from; warm up on another task")
        return [self.form.response(problem.answer)]

    def _score(self, response: str, entry: DatasetItem) -> float:
        answer = self.form.read(response, entry)[:LONGEST_ANSWER]
        return self.dataset.score_answer(answer, entry) if self.score is None else self.score(answer, entry)


def make_dataset(name: str, seed: int, config: dict[str, Any]) -> Any:
    """A reasoning-gym data set whose problems no other seed has; InputError if the configuration does not suit it."""
    try:
        return reasoning_gym.create_dataset(name, seed=seed * STRIDE, size=STRIDE, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"options: {config} do not suit {name!r}: {error}") from None


@lru_cache(maxsize=16384)
def item(dataset: Any, index: int) -> DatasetItem:
    """Item `index` of a data set; some take milliseconds to make, and every user of a problem asks for it.

    Raises `InputError` for an index out of range.
    """
    if not 0 <= index < STRIDE:
        raise InputError(f"index: {index} is no problem; use 0 to {STRIDE - 1}")
    return dataset[index]


def verified(score: Callable[..., float], *args: Any) -> float:
    """1.0 if the score is above `THRESHOLD`, else 0.0; a verifier that raises says 0.

    >>> verified(float, "1"), verified(float, "0.98"), verified(float, "nonsense")
    (1.0, 0.0, 0.0)
    """
    try:
        return float(score(*args) > THRESHOLD)
    except Exception:
        return 0.0


def final_answer(text: str) -> str:
    """The answer in a response: between <answer> tags, or the last line.

    >>> final_answer("So <answer> 12 </answer>."), final_answer("Let me see.\\n12")
    ('12', '12')
    """
    tagged = extract_answer(text)
    return tagged if tagged is not None else text.strip().rpartition("\n")[2].strip()


def final_number(text: str) -> str:
    """The number in a response: between <answer> tags, or the last one; empty if there is none.

    >>> final_number("12 + 7 = 19."), final_number("<answer>1,019</answer> or so, 7 times"), final_number("no")
    ('19', '1,019', '')
    """
    tagged = extract_answer(text)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text if tagged is None else tagged)
    return numbers[-1] if numbers else ""


def choose_form(style: str, forms: dict[str, Form]) -> Form:
    """The form of a style; InputError names the nearest."""
    if style not in forms:
        raise unknown_name("style", style, forms)
    return forms[style]


def instruction(read: Callable[[str], str] = final_answer) -> Form:
    """The data set's own question, for models that follow instructions; the answer is looked for in the response."""
    ask = "\nGive the final answer between <answer> and </answer>."
    return Form(
        prompt=lambda e: e["question"].strip() + ask,
        response=lambda e: f"<answer>{e['answer']}</answer>",
        read=lambda text, _: read(text),
    )
