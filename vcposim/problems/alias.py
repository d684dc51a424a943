"""Drawing from many small distributions at once: alias tables in integers (Walker 1977; Vose 1991).

A distribution over K choices is cut into 2^b >= K columns of equal mass, each shared by at most two choices: its own
and its alias. One random word then draws a choice: the high bits pick the column, the rest is compared with a
threshold. No search, no floating point, and the same cost for any K.

Probabilities are rounded down to multiples of 2^-bits (62 or 32), the rest goes to the likeliest choice: far below
anything a simulation can see.

The tables are built without a loop over choices: light columns (less mass than a column holds) are filled from heavy
ones in order, and who fills whom is a search in two prefix sums (the sweep of Huebschle-Schneider and Sanders, 2019).
"""

from dataclasses import dataclass

import numpy as np

from vcposim.arrays import Array


def quantized(prob: Array, bits: int) -> Array:
    """Integers proportional to `prob` that sum to 2^bits in each row; zero stays zero: (rows, K) -> (rows, K)."""
    exact = prob / np.sum(prob, axis=-1, keepdims=True)
    mass = np.floor(exact * 2.0**bits).astype(np.int64)
    top = np.argmax(mass, axis=-1)[:, None]
    missing = 2**bits - np.sum(mass, axis=-1, keepdims=True)
    np.put_along_axis(mass, top, np.take_along_axis(mass, top, -1) + missing, -1)
    return mass


@dataclass(frozen=True)
class AliasTable:
    """Alias tables of `rows` distributions, each of 2^column_bits columns.

    `last` (rows * columns,) is the last word (of `bits` bits) that draws the column's own choice; `choice`
    (2, rows * columns) holds the own choices, then the aliases.
    """

    bits: int
    column_bits: int
    last: Array
    choice: Array

    def draw(self, word: Array, row: Array) -> Array:
        """The choices that words (integers below 2^bits) draw from rows: same -> same."""
        cell = (row << self.column_bits) + (word >> (self.bits - self.column_bits)).astype(np.int64)
        alias = word.astype(np.int64) > self.last[cell]
        return self.choice[alias.astype(np.int64), cell]


def alias_table(prob: Array, bits: int = 62) -> AliasTable:
    """Tables for the distributions of `prob` (rows, K)."""
    rows, size = prob.shape
    column_bits = max(0, int(size - 1).bit_length())
    columns, capacity = 1 << column_bits, 1 << (bits - column_bits)
    mass = np.zeros((rows, columns), dtype=np.int64)
    mass[:, :size] = quantized(prob, bits)
    threshold, alias = mass.copy(), np.tile(np.arange(columns, dtype=np.int64), (rows, 1))
    for row in range(rows):
        # columns whose own mass is not more than a column's are light and are filled by the heavy ones, in order
        light, heavy = np.flatnonzero(mass[row] <= capacity), np.flatnonzero(mass[row] > capacity)
        if heavy.size == 0:
            continue
        taken = np.concatenate([[0], np.cumsum(capacity - mass[row, light])])
        given = np.cumsum(mass[row, heavy] - capacity)
        # a light column takes from the first heavy one that still has something to give
        alias[row, light] = heavy[np.minimum(np.searchsorted(given, taken[:-1], side="right"), heavy.size - 1)]
        # a heavy column that gave too much becomes a light one of the next heavy column
        overdrawn = taken[np.searchsorted(taken, given, side="left")] - given
        threshold[row, heavy] = capacity - overdrawn
        alias[row, heavy[:-1]] = heavy[1:]
    first = np.arange(columns, dtype=np.int64) * capacity
    own = np.broadcast_to(np.arange(columns, dtype=np.int64), alias.shape)
    return AliasTable(bits, column_bits, (first + threshold - 1).reshape(-1), np.stack([own, alias]).reshape(2, -1))


def words(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> Array:
    """Random words below 2^bits, of the shape asked for, -> (...): uint32 for 32 bits, else int64."""
    count = int(np.prod(shape))
    if bits == 32:
        return _raw(rng, (count + 1) // 2).view(np.uint32)[:count].reshape(shape)
    return (_raw(rng, count) >> np.uint64(64 - bits)).view(np.int64).reshape(shape)


def _raw(rng: np.random.Generator, count: int) -> Array:
    # the same 64-bit words by the shorter way, where the generator's own words have 64 bits
    if isinstance(rng.bit_generator, np.random.Philox | np.random.PCG64 | np.random.SFC64):
        return rng.bit_generator.random_raw(count)
    return rng.integers(0, 2**64 - 1, size=count, dtype=np.uint64, endpoint=True)
