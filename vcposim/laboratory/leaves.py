"""How Monte Carlo work is cut: leaves, blocks, and the order in which sums are added.

The groups to draw are cut into **leaves**. Leaf k always holds the same groups: its size is a function of k and of the
problem alone, and its randomness is a Philox generator keyed by (seed, k) (Salmon et al. 2011). The sums of leaves are
added in the order of k. Nothing else enters, so results are bit-identical however leaves are handed to workers.

Leaf k belongs to **block** k mod 32. Leaving out one block at a time gives standard errors of any function of the sums
(jackknife). Leaves start with one group and grow eightfold every 32 leaves until they fill the cache: short runs have
blocks enough for a standard error, long ones have few leaves.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vcposim.arrays import Array

BLOCKS = 32
LEAF_NUMBERS = 2**18
"""numbers that one array of a full leaf may hold (2 MB)"""


class Leaf(NamedTuple):
    """`groups` groups, drawn by generator (seed, `number`)."""

    number: int
    groups: int

    @property
    def block(self) -> int:
        """Which of the `BLOCKS` of the jackknife it belongs to."""
        return self.number % BLOCKS


def leaves(groups: int, numbers_per_group: int) -> Iterator[Leaf]:
    """The leaves that hold `groups` groups, the last one cut short.

    >>> [leaf.groups for leaf in leaves(40, 1)][-3:]
    [1, 1, 8]
    """
    largest = max(1, LEAF_NUMBERS // numbers_per_group)
    number = 0
    while groups > 0:
        size = min(8 ** min(number // BLOCKS, 10), largest, groups)
        yield Leaf(number, size)
        groups -= size
        number += 1


def tasks(groups: int, numbers_per_group: int, groups_per_task: int, leaves_per_task: int) -> Iterator[list[Leaf]]:
    """Consecutive leaves, handed out together: at least one, until either number is reached."""
    task: list[Leaf] = []
    for leaf in leaves(groups, numbers_per_group):
        task.append(leaf)
        if sum(part.groups for part in task) >= groups_per_task or len(task) >= leaves_per_task:
            yield task
            task = []
    if task:
        yield task


def generator(seed: int, leaf: Leaf) -> np.random.Generator:
    """The random numbers of a leaf, and of no other."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, leaf.number], dtype=np.uint64)))


def jackknife(whole: Array, without: Array, mass: Array) -> Array:
    """Standard error of a statistic from its values without each of g blocks: (...), (g, ...), (g,) -> (...).

    Blocks may differ in size: delete-m_j jackknife of Busing, Meijer and van der Leeden (1999), eq. for the variance
    with h_j = n / m_j and pseudo-values h_j T - (h_j - 1) T_(-j). NaN for a single block.
    """
    if without.shape[0] < 2:
        return whole * float("nan")
    ratio = (np.sum(mass) / mass).reshape(-1, *[1] * np.ndim(whole))
    pseudo = ratio * whole - (ratio - 1) * without
    center = without.shape[0] * whole - np.sum((1 - 1 / ratio) * without, axis=0)
    return np.sqrt(np.mean((pseudo - center) ** 2 / (ratio - 1), axis=0))
