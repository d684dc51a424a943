"""Alias tables hold exactly the probabilities they were given."""

import numpy as np
import pytest

from tests.kit.statistical import assert_mean_equals
from vcposim.problems.alias import AliasTable, alias_table, words


def mass_of(table: AliasTable, rows: int, size: int) -> np.ndarray:
    """The integer mass of each choice, summed over columns: what the table draws, exactly."""
    columns = 1 << table.column_bits
    capacity = 1 << (table.bits - table.column_bits)
    own = table.last + 1 - np.tile(np.arange(columns) * capacity, rows)
    assert own.min() >= 0
    assert own.max() <= capacity
    mass = np.zeros((rows, columns), dtype=object)
    for cell in range(rows * columns):
        mass[cell // columns, table.choice[0, cell]] += int(own[cell])
        mass[cell // columns, table.choice[1, cell]] += capacity - int(own[cell])
    assert not mass[:, size:].any(), "padding is drawn"
    return mass[:, :size]


@pytest.mark.parametrize("bits", [32, 62])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 31, 32, 33])
def test_a_table_holds_the_probabilities_to_the_last_bit(size: int, bits: int) -> None:
    prob = np.random.default_rng(size).dirichlet(np.full(size, 0.3), 4)
    prob[0] = np.eye(size)[size // 2]
    mass = mass_of(alias_table(prob, bits), 4, size)
    assert np.all(mass.sum(axis=1) == 2**bits)
    assert mass[0, size // 2] == 2**bits
    error = np.abs(mass.astype(float) / 2.0**bits - prob)
    assert error.max() <= size * 2.0**-bits + 2e-16


@pytest.mark.parametrize("bits", [32, 62])
def test_draws_follow_their_row(bits: int) -> None:
    prob = np.array([[0.1, 0.2, 0.7], [0.6, 0.4, 0.0]])
    table, rng = alias_table(prob, bits), np.random.default_rng(0)
    row = np.repeat([0, 1], 100_000)
    drawn = table.draw(words(rng, row.shape, bits), row)
    for g in (0, 1):
        hits = np.eye(3)[drawn[row == g]]
        assert_mean_equals(hits, prob[g], detect=0.017, support=(0, 1))


def test_words_fill_their_bits() -> None:
    rng = np.random.default_rng(0)
    for bits in (32, 62):
        w = words(rng, (2001,), bits)
        assert w.shape == (2001,)
        assert 2.0**bits * 0.99 < float(w.max()) < 2.0**bits


def test_all_words_together_draw_the_exact_counts() -> None:
    prob = np.array([[0.125, 0.25, 0.625], [1.0, 0.0, 0.0]])
    table = alias_table(prob, bits=8)
    word = np.arange(256)
    for row in (0, 1):
        drawn = table.draw(word, np.full(256, row))
        np.testing.assert_array_equal(np.bincount(drawn, minlength=3), 256 * prob[row])
