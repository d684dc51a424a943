"""Tool use: a chain of sums that the policy works out over several turns with a calculator.

The calculator takes one operation a call, so a problem of k terms is k - 1 calls and an answer. A response that is
neither a call nor an answer, a call that the calculator refuses, a tool that raises: each gets an error as a reply, and
the episode goes on until the turns are used up.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_bridge.tasks.arithmetic import terms_and_digits
from llm_bridge.tasks.base import TaskProblem, item, make_dataset, verified
from llm_bridge.tasks.calculator import CalculatorError, calculate, operations_in

Tool = Callable[[str], object]


@dataclass(frozen=True)
class Wording:
    """What calls, answers and replies look like: regular expressions to read, formats to write."""

    prompt: str
    call: str
    answer: str
    write_call: str
    write_answer: str
    result: str
    error: str


SHORT = Wording("{}?", r"c(.*)", r"a(.*)", "c{}", "a{}", "={};", "!{};")
INSTRUCT = Wording(
    "Work out {}. To use the calculator, which does one operation at a time, write only `calc: ` and the operation, "
    "for example `calc: 12 + 7`. When you know the result, write only `answer: ` and the number.",
    r".*calc:\s*([^\n`]*).*",
    r".*answer:\s*([^\n`]*).*",
    "calc: {}",
    "answer: {}",
    "= {}",
    "error: {}",
)
WORDINGS = {"short": SHORT, "instruct": INSTRUCT}


def one_operation(text: str) -> object:
    """The calculator of these tasks: one operation of two numbers.

    Raises `CalculatorError` for anything else.
    """
    if operations_in(text) > 1:
        raise CalculatorError("too long")
    return calculate(text)


@dataclass(frozen=True)
class CalculatorTask:
    """Sums of up to `max_terms` terms, in `max_turns` turns; `tool` may be any function of a text."""

    name: str
    dataset: Any = field(repr=False)
    wording: Wording = field(repr=False)
    options: dict[str, Any]
    max_turns: int
    tool: Tool = field(default=one_operation, repr=False)
    kind: str = "tool"

    def problem(self, index: int) -> TaskProblem:
        """A sum of several terms, number `index` of the dataset."""
        entry = item(self.dataset, index)
        expression = entry["metadata"]["expression"]
        shown = expression.replace(" ", "") if self.wording is SHORT else expression
        return TaskProblem(index, self.wording.prompt.format(shown), entry)

    def reply(self, problem: TaskProblem, responses: Sequence[str]) -> str | None:
        """The calculator's result or its error message; None after an answer or the last turn."""
        if len(responses) >= self.max_turns or self._answer(responses[-1]) is not None:
            return None
        call = _match(self.wording.call, responses[-1])
        if call is None:
            return self.wording.error.format("format")
        try:
            return self.wording.result.format(self.tool(call))
        except CalculatorError as error:
            return self.wording.error.format(error)
        except Exception:  # no tool can end a run
            return self.wording.error.format("tool")

    def reward(self, problem: TaskProblem, responses: Sequence[str]) -> float:
        """1 if the last response states the right answer, else 0; calls are not rewarded."""
        answer = self._answer(responses[-1]) if responses else None
        return 0.0 if answer is None else verified(self.dataset.score_answer, answer, problem.answer)

    def demonstration(self, problem: TaskProblem) -> list[str]:
        """One call a term, from left to right, then the answer."""
        first, *steps = re.findall(r"(?:[+-] )?\d+", problem.answer["metadata"]["expression"])
        value, responses = int(first), []
        for step in steps:
            call = f"{value}{step.replace(' ', '')}"
            responses.append(self.wording.write_call.format(call))
            value = int(calculate(call))
        return [*responses, self.wording.write_answer.format(value)]

    def _answer(self, response: str) -> str | None:
        return _match(self.wording.answer, response)


def calculator(*, seed: int, style: str, options: dict[str, Any], terms: int = 3, digits: int = 2) -> CalculatorTask:
    """Sums of so many `terms` of so many `digits`, with a calculator that takes two numbers at a time."""
    data = make_dataset("chain_sum", seed, terms_and_digits(terms, digits))
    return CalculatorTask("calculator", data, WORDINGS[style], options, max_turns=terms + 1)


def _match(pattern: str, text: str) -> str | None:
    found = re.fullmatch(pattern, text, flags=re.DOTALL)
    return None if found is None else found.group(1).strip()
