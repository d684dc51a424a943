"""Gauges against what a run counts by: value and limit at each step (or lag, or task), and where each first alarms."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from vcposim.diagnostics import Diagnostic


@dataclass(frozen=True)
class Slice:
    """The trajectories with one value of a column."""

    value: Any
    n: int
    groups: int
    mean_reward: float
    """NaN where the file has no rewards"""
    diagnostics: dict[str, Diagnostic]


@dataclass(frozen=True)
class Track:
    """One gauge along an axis; all lists have one entry a point, in the axis' order."""

    name: str
    at: list[Any]
    """values of the axis"""
    value: list[float]
    limit: list[float] | None
    """None: nothing says from where on it is bad"""
    high_is_bad: bool = True
    enough: list[bool] | None = None
    """whether a point has the samples that the gauge requires; None: that is not known, or nothing is required"""
    meaning: str = ""

    @property
    def alarms(self) -> list[bool]:
        """Where it is on the wrong side of its limit, with enough samples to tell; what does not exist never is."""
        if self.limit is None:
            return [False] * len(self.value)
        wrong = [
            not math.isnan(x) and not (x < limit if self.high_is_bad else x > limit)
            for x, limit in zip(self.value, self.limit, strict=True)
        ]
        return wrong if self.enough is None else [a and b for a, b in zip(wrong, self.enough, strict=True)]

    @property
    def first_alarm(self) -> Any | None:
        """The axis' value at its first alarm, or None."""
        return next((at for at, alarm in zip(self.at, self.alarms, strict=True) if alarm), None)


def tracks(slices: Sequence[Slice]) -> list[Track]:
    """Every gauge of some slices, in the order of the first one's gauges."""
    found = []
    for name in dict.fromkeys(name for one in slices for name in one.diagnostics):
        here = [one for one in slices if name in one.diagnostics]
        gauges = [one.diagnostics[name] for one in here]
        found.append(
            Track(
                name=name,
                at=[one.value for one in here],
                value=[gauge.value for gauge in gauges],
                limit=[gauge.threshold for gauge in gauges],
                high_is_bad=gauges[0].high_is_bad,
                enough=[one.n >= gauge.required for one, gauge in zip(here, gauges, strict=True)],
                meaning=next((g.meaning for g in gauges if not math.isnan(g.value)), gauges[0].meaning),
            )
        )
    return found


def first_alarms(slices: Sequence[Slice]) -> dict[str, Hashable]:
    """gauge -> the first value of a column, in its order, at which it alarms; gauges that never do are left out.

    What a slice is too small to tell (fewer samples than the gauge requires) is no alarm.
    """
    return {one.name: one.first_alarm for one in tracks(slices) if any(one.alarms)}
