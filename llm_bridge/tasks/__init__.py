"""Tasks with verifiable rewards, of three kinds: `load_task("addition")`.

    math        addition, chain_sum, products, gcd, countdown, running_sum
    reasoning   letter_counting, syllogism, knights_knaves, shortest_path
    tool        calculator: two or more turns

Each has two styles: `short` (`12+7=`, for a character model) and `instruct` (the question in words). Any other
single-answer data set of reasoning-gym is `gym:NAME`, if its verifier passes a trial: it must know its own answer and
must not accept nonsense.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reasoning_gym.factory import DATASETS

from llm_bridge.tasks import arithmetic, reasoning
from llm_bridge.tasks.base import DatasetItem, Form, GymTask, Task, TaskProblem, choose_form, make_dataset, verified
from llm_bridge.tasks.tool import WORDINGS, CalculatorTask, calculator
from vcposim.errors import InputError, unknown_name

__all__ = ["TASKS", "CalculatorTask", "GymTask", "Task", "TaskProblem", "load_task"]


@dataclass(frozen=True)
class Single:
    """A curated single-answer task: kind, data set, its forms, options -> the data set's configuration."""

    kind: str
    dataset: str
    short: Form
    instruct: Form
    configure: Callable[..., dict[str, Any]]
    score: Callable[[str, DatasetItem], float] | None = None

    def __call__(self, name: str, *, seed: int, style: str, options: dict[str, Any], **chosen: Any) -> Task:
        form = choose_form(style, {"short": self.short, "instruct": self.instruct})
        data = make_dataset(self.dataset, seed, self.configure(**chosen))
        return GymTask(name, self.kind, data, form, options, self.score)


@dataclass(frozen=True)
class Several:
    """The multi-turn task. Calling it raises `InputError` for a style nobody knows."""

    kind: str = "tool"
    configure: Callable[..., Any] = calculator

    def __call__(self, name: str, *, seed: int, style: str, options: dict[str, Any], **chosen: Any) -> Task:
        if style not in WORDINGS:
            raise unknown_name("style", style, WORDINGS)
        return calculator(seed=seed, style=style, options=options, **chosen)


TASKS: dict[str, Single | Several] = {
    "addition": Single(
        "math", "basic_arithmetic", arithmetic.short_expression(), arithmetic.NUMBERS, arithmetic.addition
    ),
    "chain_sum": Single(
        "math", "chain_sum", arithmetic.short_expression(), arithmetic.NUMBERS, arithmetic.terms_and_digits
    ),
    "products": Single(
        "math", "products", arithmetic.short_expression(), arithmetic.NUMBERS, arithmetic.terms_and_digits
    ),
    "gcd": Single("math", "gcd", arithmetic.short_gcd(), arithmetic.NUMBERS, arithmetic.gcd),
    "countdown": Single(
        "math",
        "countdown",
        arithmetic.short_countdown(),
        reasoning.TEXT,
        arithmetic.countdown,
        arithmetic.countdown_score,
    ),
    "running_sum": Single(
        "math", "running_sum", arithmetic.short_running_sum(), arithmetic.NUMBERS, arithmetic.running_sum
    ),
    "letter_counting": Single(
        "reasoning", "letter_counting", reasoning.short_letter_counting(), reasoning.COUNT, reasoning.letter_counting
    ),
    "syllogism": Single(
        "reasoning", "syllogism", reasoning.short_syllogism(), reasoning.TEXT, reasoning.syllogism
    ),
    "knights_knaves": Single(
        "reasoning", "knights_knaves", reasoning.short_knights_knaves(), reasoning.TEXT, reasoning.knights_knaves
    ),
    "shortest_path": Single(
        "reasoning", "shortest_path", reasoning.short_shortest_path(), reasoning.TEXT, reasoning.shortest_path
    ),
    "calculator": Several(),
}  # fmt: skip
"""names -> factory"""

GYM = "gym:"


def load_task(name: str, *, seed: int = 0, style: str = "short", **options: Any) -> Task:
    """The task `name`: its problems are a function of the seed and the options.

    >>> task = load_task("addition")
    >>> task.problem(0).prompt, task.demonstration(task.problem(0))
    ('5+33=', ['38'])

    Raises InputError for unknown names, styles and options, and for a data set without a verifier to trust.
    """
    if seed < 0:
        raise InputError(f"seed: {seed}; give a whole number of at least 0")
    described = {"name": name, "seed": seed, "style": style, **options}
    if name.startswith(GYM):
        dataset = name.removeprefix(GYM)
        if dataset not in DATASETS:
            raise unknown_name("task", name, [GYM + d for d in DATASETS])
        data = make_dataset(dataset, seed, options)
        for entry in (data[i] for i in range(5)):  # its verifier accepts its own answers and nothing else, on these
            if entry["answer"] is None or not verified(data.score_answer, str(entry["answer"]), entry):
                raise InputError(
                    f"task {name!r}: its verifier does not know its own answer; take one of {', '.join(TASKS)}"
                )
            if any(verified(data.score_answer, text, entry) for text in ("", "nonsense", "?")):
                raise InputError(f"task {name!r}: its verifier accepts nonsense; take one of {', '.join(TASKS)}")
        return GymTask(name, "reasoning", data, reasoning.TEXT, {**described, "style": "instruct"})
    if name not in TASKS:
        raise unknown_name("task", name, [*TASKS, *(GYM + d for d in DATASETS if GYM in name)])
    known = set(inspect.signature(TASKS[name].configure).parameters) - {"seed", "style", "options"}
    for option in set(options) - known:
        raise unknown_name(f"option of task {name!r}", option, known | {"style", "seed"})
    return TASKS[name](name, seed=seed, style=style, options=described, **options)
