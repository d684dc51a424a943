"""Which version of the policy samples what: lag as a plan, fixed before the first token is drawn.

Update u (0, 1, ...) takes the policy from version u to u + 1 and learns from `groups` slots, one prompt each. The
prompt of slot g is problem u * groups + g, whatever the lag, so methods and lags are compared on the same problems, and
the sampler's random numbers belong to the problem: on the same numbers too.

    fixed       slot (u, g) is sampled at version u - k: a pipeline of fixed depth
    uniform     at version u - l(u, g), l drawn from 0..k by a counter: a queue that mixes versions
    in_flight   begun at version u - k, and continued by every version up to u, ceil(T / (k + 1)) tokens each

As the plan is known beforehand, at version v exactly the slots with u - l(u, g) = v are sampled: the law is exact, and
no old weights are kept. **Warm-up**: before version 0 there is nothing, so lags are cut at u: the first update is on
policy, and the lag ramps up by one each update. No batch is ever served twice (the first batch served k times over, as
some loops do, has an ESS fraction of 1/k by construction).

Laws and random streams are the small learner's (`vcposim.learning.lags`, `streams`): a seed has the same lags there.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

from vcposim.learning.lags import Lag
from vcposim.learning.streams import RandomNumbers


class Slot(NamedTuple):
    """One prompt of one update."""

    update: int
    group: int


@dataclass(frozen=True)
class Schedule:
    """The plan of a run. `last`: the number of updates, or None to plan beyond them, so that the run may go on."""

    law: Lag
    groups: int
    seed: int
    last: int | None = None

    @cached_property
    def _numbers(self) -> RandomNumbers:
        return RandomNumbers([self.seed], self.groups, 1, 1)

    def lags(self, update: int) -> list[int]:
        """The lag of each slot's first token, in updates: (groups,).

        >>> [Schedule(Lag(2), groups=2, seed=0).lags(u) for u in range(4)]
        [[0, 0], [1, 1], [2, 2], [2, 2]]
        """
        if self.law.law != "uniform":
            return [min(self.law.k, update)] * self.groups
        drawn = self.law.of_tokens(self._numbers.lags(update)[0], 1)[:, 0]
        return [min(int(lag), update) for lag in drawn]

    def due(self, version: int) -> list[Slot]:
        """What is begun at this version, in the order in which it will be learned from.

        >>> Schedule(Lag(1), groups=1, seed=0).due(0)
        [Slot(update=0, group=0), Slot(update=1, group=0)]
        """
        latest = version + self.law.k if self.last is None else min(version + self.law.k, self.last - 1)
        return [
            Slot(update, group)
            for update in range(version, latest + 1)
            for group, lag in enumerate(self.lags(update))
            if update - lag == version
        ]

    def problem(self, slot: Slot) -> int:
        """Index of the slot's problem."""
        return slot.update * self.groups + slot.group

    def slice_of(self, update: int, tokens: int) -> int:
        """Tokens that one version adds to a trajectory in flight to `update`.

        >>> [Schedule(Lag(3, "in_flight"), 1, 0).slice_of(u, tokens=12) for u in range(4)]
        [12, 6, 4, 3]
        """
        return max(1, ceil(tokens / (min(self.law.k, update) + 1)))
