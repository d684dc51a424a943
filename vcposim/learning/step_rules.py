"""Step rules as data: what a learner does to its step, by name and parameters.

The formulas are `vcposim.control`'s; here they get their inputs from what a learner sees in one update of many runs.
A rule gives a multiplier (run,) on the step size; `gradient_alignment` turns the gradient instead, with multiplier 1.
Two controls carry no information about the batch at all, which is what they are for: `constant` and `replay`, the
latter repeating a schedule of multipliers that another run chose.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vcposim import control
from vcposim.arrays import Array
from vcposim.errors import InputError, unknown_name

RULES = ("none", "constant", "replay", "ess", "snr", "lag", "skip_spike", "gradient_alignment")


class Seen(NamedTuple):
    """What a rule may look at in one update of r runs."""

    step: int
    ess_fraction: Array
    """(r,), of untruncated sequence weights over the whole batch"""
    lag: Array
    """(r,), mean over the batch, in updates"""
    norm: Array
    """(r,), of the gradient before any clipping"""
    typical_norm: Array
    """(r,), running mean of norms before this update; infinite at the first"""
    group_gradient: Array | None
    """(r, groups, p), given if the rule is `snr`"""


@dataclass(frozen=True)
class Control:
    """A step rule: `rule` of `RULES` and the numbers it needs.

    `exponent` and `reference` belong to `ess`; `value` is the constant, the factor of `skip_spike`, or the largest
    cosine of `gradient_alignment`; `schedule` belongs to `replay` and its last entry stays.

    Raises `InputError` for unknown rules and missing numbers.
    """

    rule: str = "none"
    exponent: float = 0.5
    reference: float = 1.0
    value: float = 1.0
    schedule: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown_name("rule", self.rule, RULES)
        if self.rule == "replay" and not self.schedule:
            raise InputError("schedule: empty; replay needs the multipliers of another run")
        if self.rule == "constant" and not 0 <= self.value < float("inf"):
            raise InputError(f"value: {self.value} is not a finite non-negative number")

    def scale(self, seen: Seen) -> Array:
        """The multiplier on the step size: (r,)."""
        one = np.ones_like(seen.norm)
        if self.rule == "constant":
            return self.value * one
        if self.rule == "replay":
            return self.schedule[min(seen.step, len(self.schedule) - 1)] * one
        if self.rule == "ess":
            return control.step_scale(seen.ess_fraction, reference=self.reference, exponent=self.exponent)
        if self.rule == "lag":
            return control.lag_scale(seen.lag)
        if self.rule == "skip_spike":
            return control.spike_scale(seen.norm, seen.typical_norm, self.value)
        if self.rule == "snr":
            assert seen.group_gradient is not None
            return control.snr_scale(snr_of_groups(seen.group_gradient))
        return one

    def turned(self, gradient: Array, previous: Array) -> Array:
        """The gradient to follow: (r, p), (r, p) -> (r, p)."""
        if self.rule != "gradient_alignment":
            return gradient
        return control.limit_alignment(gradient, previous, limit=self.value)


def snr_of_groups(group_gradient: Array) -> Array:
    """||E g||^2 / tr Cov g of the mean over m groups, both estimated without bias from them: (r, m, p) -> (r,).

    0 where the estimate of ||E g||^2 is negative, or nothing is known (one group, or no gradient at all).
    """
    count = group_gradient.shape[1]
    if count < 2:
        return np.zeros(len(group_gradient))
    mean = group_gradient.mean(axis=1)
    noise = group_gradient.var(axis=1, ddof=1).sum(axis=-1) / count
    signal = np.maximum((mean * mean).sum(axis=-1) - noise, 0)
    return np.divide(signal, noise, out=np.zeros_like(signal), where=noise > 0)
