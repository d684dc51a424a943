"""A step rule with its numbers: what a learner does to its step.

The rules themselves are the table `vcposim.control.STEP_RULES`, here they get the numbers they read. A rule gives a
multiplier (run,) on the step size, and may turn the gradient. Two controls carry no information about the batch at
all, which is what they are for: `constant` and `replay`, the latter repeating the multipliers that another run chose.
"""

from dataclasses import dataclass

import numpy as np

from vcposim.arrays import Array
from vcposim.control import EXPONENTS, STEP_RULES, Seen, StepRule, multiplier, step_rule
from vcposim.errors import InputError, unknown_name


@dataclass(frozen=True)
class Control:
    """A rule of `STEP_RULES` and its numbers.

    `exponent` and `reference` belong to `ess`; `value` is what the rule's entry says it is, such as the constant of
    `constant`; `schedule` belongs to `replay` and its last entry stays.

    Raises `InputError` for unknown rules, and for numbers that the rule's formula refuses: before any update.
    """

    rule: str = "none"
    exponent: float = EXPONENTS["adam"]
    reference: float = 1.0
    value: float = 1.0
    schedule: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in STEP_RULES:
            raise unknown_name("rule", self.rule, STEP_RULES)
        if self.entry.scheduled and not self.schedule:
            raise InputError(f"schedule: empty; {self.rule} needs the multipliers of another run")
        for name, numbers in (("value", (self.value,)), ("schedule", self.schedule)):
            for x in numbers:
                if not 0 <= x < float("inf"):
                    raise InputError(f"{name}: {x} is not a finite non-negative number")
        one = np.ones(1)
        try:  # a formula refuses what it cannot use: ask it now, not at the first update
            self.scale(Seen(0, one, one, one, one, np.ones((1, 2, 1)), one, one[None]))
            self.turned(one[None], one[None])
        except InputError as error:
            named = f"value: {self.value} is {self.entry.value} of {self.rule}; " if self.entry.value else ""
            raise InputError(f"{named}{error}") from None

    @property
    def entry(self) -> StepRule:
        """What the table says of the rule."""
        return step_rule(self.rule)

    def scale(self, seen: Seen) -> Array:
        """The multiplier on the step size: (r,)."""
        return multiplier(self.rule, seen, self)

    def turned(self, gradient: Array, previous: Array) -> Array:
        """The gradient to follow: (r, p), (r, p) -> (r, p)."""
        turn = self.entry.turn
        return gradient if turn is None else turn(gradient, previous, self)
