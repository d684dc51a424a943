"""Versions of a policy that learns: which one sampled which token, and the memory of past ones.

A **lag** is counted in learner updates, from the version that sampled to the version that learns. Three laws:

    fixed       every token has lag k                          one slow sampler
    uniform     each group draws its lag from 0..k             a queue that mixes versions
    in_flight   k at the first token, falling along the response   weights are swapped while it is generated

A run that is younger than its lag samples from its start: lags are cut at the number of updates made.

`History` is a ring of the last versions of many runs' tables: the only memory that grows with the lag.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError, unknown_name
from vcposim.problems.staleness import LagPaths, fixed_lag, in_flight, uniform_lag, whole_trajectory

LAG_LAWS = ("fixed", "uniform", "in_flight")


@dataclass(frozen=True)
class Lag:
    """A lag law with its largest lag k >= 0. Raises `InputError` for an unknown law or a negative k."""

    k: int = 0
    law: str = "fixed"

    def __post_init__(self) -> None:
        if self.law not in LAG_LAWS:
            raise unknown_name("law", self.law, LAG_LAWS)
        if self.k < 0:
            raise InputError(f"k: {self.k} is negative; a lag is a number of updates, 0 for on policy")

    def of_tokens(self, uniform: Array, length: int) -> Array:
        """Lags from one uniform number for each group: (..., group) -> (..., group, length)."""
        paths = _paths(self, length)
        return paths.lag[np.searchsorted(np.cumsum(paths.probability)[:-1], uniform, side="right")]


@lru_cache
def _paths(lag: Lag, length: int) -> LagPaths:
    if lag.law == "uniform":
        return whole_trajectory(uniform_lag(lag.k), length)
    if lag.law == "in_flight":
        return in_flight(fixed_lag(lag.k), length, max(1, length // max(lag.k, 1)))
    return whole_trajectory(fixed_lag(lag.k), length)


class History:
    """The last versions of a table (run, ...): `push` appends a copy, `slot` finds the version of a given lag."""

    def __init__(self, table: Array, max_lag: int) -> None:
        self.size = max_lag + 1
        self.ring = np.zeros((self.size, *table.shape))
        self.pushed = 0
        self.push(table)

    def push(self, table: Array) -> None:
        """Append a version, `table` (run, ...), as a copy: later changes of the learner do not rewrite the past."""
        self.ring[self.pushed % self.size] = table
        self.pushed += 1

    @property
    def newest(self) -> Array:
        """The last version: (run, ...)."""
        return self.ring[(self.pushed - 1) % self.size]

    def slot(self, lag: Array) -> Array:
        """Where in the ring the version `lag` updates ago is, same -> same; the oldest there is for younger runs.

        Raises `InputError` for a lag that the ring does not reach, rather than returning a newer version.
        """
        if np.max(lag) >= self.size:
            raise InputError(f"lag: {int(np.max(lag))} is beyond this history of {self.size} versions; give max_lag")
        return (self.pushed - 1 - np.minimum(lag, self.pushed - 1)) % self.size
