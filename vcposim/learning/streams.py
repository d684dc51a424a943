"""Random numbers of runs that advance together: one stream for each seed and purpose, whoever else is there.

Each (seed, purpose) has a generator of its own, and each update its place in that generator's sequence: what a run
draws at an update is a function of these alone. Adding, removing or reordering runs, or resuming in the middle, changes
no bit; runs of one seed see the same numbers under every method.
"""

from collections.abc import Sequence

import numpy as np

from vcposim.arrays import Array

CHUNK = 16
"""updates whose random numbers are drawn at once"""
TOKENS, LAGS, START = range(3)
"""purposes of random numbers"""


def generator(seed: int, purpose: int, skipped: int = 0) -> np.random.Generator:
    """The generator of that seed and purpose, after so many uniform numbers."""
    bits = np.random.PCG64DXSM(np.random.SeedSequence([seed, purpose]))
    return np.random.Generator(bits.advance(skipped))


class _Stream:
    """Uniform numbers of one purpose: (seed, update, *shape), a chunk of updates at a time in memory."""

    def __init__(self, seeds: Sequence[int], purpose: int, shape: tuple[int, ...]) -> None:
        self._seeds, self._purpose, self._size = seeds, purpose, CHUNK * int(np.prod(shape))
        self._drawn = np.empty((len(seeds), CHUNK, *shape))
        self._next, self._generators = -1, list[np.random.Generator]()

    def at(self, step: int) -> Array:
        """The numbers of one update: (seed, *shape)."""
        number, within = divmod(step, CHUNK)
        if number + 1 != self._next:
            if number != self._next:  # not the chunk that follows: go there
                self._generators = [generator(s, self._purpose, number * self._size) for s in self._seeds]
            for one, out in zip(self._generators, self._drawn, strict=True):
                one.random(out=out)
            self._next = number + 1
        return self._drawn[:, within]


class RandomNumbers:
    """Uniform numbers of runs, one of `seeds` each, the same whoever else is there."""

    def __init__(self, seeds: Sequence[int], groups: int, group_size: int, time: int) -> None:
        distinct = sorted(set(seeds))
        # one seed a run, in order, is the common case: a view instead of a copy
        self._stream = slice(None) if distinct == list(seeds) else np.array([distinct.index(seed) for seed in seeds])
        self._tokens = _Stream(distinct, TOKENS, (time, groups, group_size))
        self._lags = _Stream(distinct, LAGS, (groups,))

    def tokens(self, step: int) -> Array:
        """Numbers that draw tokens, of one update: (time, run, group, n)."""
        return np.ascontiguousarray(self._tokens.at(step)[self._stream].swapaxes(0, 1))

    def lags(self, step: int) -> Array:
        """Numbers that draw lags, of one update: (run, group)."""
        return self._lags.at(step)[self._stream]


def invert(cumulative: Array, uniform: Array) -> Array:
    """Choices by inverse CDF, how many cumulative are <= uniform: (..., V - 1), (...) -> (...). Few, long columns."""
    count = np.zeros(uniform.shape, dtype=np.int8 if cumulative.shape[-1] < 128 else np.int64)
    for v in range(cumulative.shape[-1]):
        count += uniform >= cumulative[..., v]
    return count.astype(np.int64)


def cumulative(prob: Array) -> Array:
    """Cumulative probabilities without the last, which is 1 up to rounding: (..., V) -> (..., V - 1)."""
    out = prob[..., :-1].copy()
    for v in range(1, out.shape[-1]):  # by columns, as above
        out[..., v] += out[..., v - 1]
    return out
