"""Scores that know their structure: sums and norms of softmax scores without a matrix of scores.

The score of choice a in row g of a tabular softmax is e_a - pi_g, placed in the block of row g. So the sum of weighted
scores is the weights put where the choices are, minus pi times their total: O(K) for K choices, where a matrix of
scores takes K^2. `SoftmaxScores` serves enumerated outcomes (all groups share one list of choices) and drawn ones.

Beyond the two operations every batch needs (`vcposim.batch.Scores`), structured scores can add up over all groups
(`combine_total`) and square the estimate of each group (`combined_sq_norm`) without forming it.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vcposim.arrays import Array


@runtime_checkable
class SummableScores(Protocol):
    """Scores that reduce without writing one gradient for each group."""

    def combine(self, weight: Array) -> Array:
        """sum_i weight_i s_i of each group: (..., n) -> (..., p)."""
        ...

    def sq_norm(self, weight: Array) -> Array:
        """||weight_i s_i||^2: (..., n) -> (..., n)."""
        ...

    def combine_total(self, weight: Array) -> Array:
        """sum over all groups of `combine(weight)`: -> (p,)."""
        ...

    def combined_sq_norm(self, weight: Array) -> Array:
        """||combine(weight)||^2 of each group: -> (...)."""
        ...


@dataclass(frozen=True)
class SoftmaxScores:
    """Scores e_choice - pi_row of a tabular softmax.

    `prob` (G, K); `row` (..., 1) says which row each group of samples is in; `choice` (..., n), or (n,) where all
    groups share it.
    """

    prob: Array
    row: Array
    choice: Array

    @cached_property
    def score_sq_norm(self) -> Array:
        """1 - 2 pi(choice) + sum_a pi(a)^2: (..., n)."""
        spread = np.sum(self.prob * self.prob, axis=-1)
        return 1 - 2 * self.prob[self.row, self.choice] + spread[self.row]

    def sq_norm(self, weight: Array) -> Array:
        """||weight_i s_i||^2: -> (..., n)."""
        return weight * weight * self.score_sq_norm

    def blocks(self, weight: Array) -> Array:
        """The non-zero block of sum_i weight_i s_i, that of the group's row: (..., n) -> (..., K)."""
        total = np.sum(weight, axis=-1, keepdims=True)
        return scattered(weight, self.choice, self.prob.shape[-1]) - total * self.prob[self.row[..., 0]]

    def combine(self, weight: Array) -> Array:
        """sum_i weight_i s_i of G groups of K choices, p = G K: -> (..., p)."""
        block, rows = self.blocks(weight), self.prob.shape[0]
        if rows == 1:
            return block
        out = np.zeros((*block.shape[:-1], rows, block.shape[-1]))
        row = np.broadcast_to(self.row, (*block.shape[:-1], 1))
        np.put_along_axis(out, row[..., None], block[..., None, :], axis=-2)
        return out.reshape(*block.shape[:-1], -1)

    def combine_total(self, weight: Array) -> Array:
        """sum over groups of `combine(weight)`: -> (p,)."""
        rows, size = self.prob.shape
        row = np.broadcast_to(self.row, weight.shape).reshape(-1)
        index = row * size + np.broadcast_to(self.choice, weight.shape).reshape(-1)
        flat = np.ascontiguousarray(weight).reshape(-1)
        placed = np.bincount(index, flat, minlength=rows * size).reshape(rows, size)
        return (placed - np.sum(placed, axis=-1, keepdims=True) * self.prob).reshape(-1)

    def combined_sq_norm(self, weight: Array) -> Array:
        """||combine(weight)||^2: -> (...)."""
        return np.sum(self.blocks(weight) ** 2, axis=-1)


@dataclass(frozen=True)
class SharedScores:
    """A matrix of scores that all groups share, as when outcomes are enumerated: (n, p), or (n, t, p) per token."""

    score: Array

    @cached_property
    def _trajectory(self) -> Array:
        return self.score if self.score.ndim == 2 else np.sum(self.score, axis=1)

    @cached_property
    def _score_sq_norm(self) -> Array:
        return np.sum(self._trajectory**2, axis=-1)

    def _per_token(self, weight: Array) -> bool:
        # groups come as (m, n); one more axis is time
        return self.score.ndim == 3 and weight.ndim == 3

    def combine(self, weight: Array) -> Array:
        """sum_i weight_i s_i, or sum_it weight_it s_it: (m, n) or (m, n, t) -> (m, p)."""
        if self._per_token(weight):
            return weight.reshape(weight.shape[0], -1) @ self.score.reshape(-1, self.score.shape[-1])
        return weight @ self._trajectory

    def sq_norm(self, weight: Array) -> Array:
        """||weight_i s_i||^2, or ||sum_t weight_it s_it||^2: -> (m, n)."""
        if self._per_token(weight):
            return np.sum(np.einsum("mnt,ntp->mnp", weight, self.score) ** 2, axis=-1)
        return weight * weight * self._score_sq_norm


@dataclass(frozen=True)
class OneTokenScores:
    """Scores of responses of one token each, so that a weight may have a time axis of one: (..., n) or (..., n, 1)."""

    scores: Any
    samples: int
    """axes of the samples and what precedes them"""

    def _flat(self, weight: Array) -> Array:
        return weight[..., 0] if weight.ndim > self.samples else weight

    def combine(self, weight: Array) -> Array:
        """sum_i weight_i s_i: -> (..., p)."""
        return self.scores.combine(self._flat(weight))

    def sq_norm(self, weight: Array) -> Array:
        """||weight_i s_i||^2: -> (..., n)."""
        return self.scores.sq_norm(self._flat(weight))


def scattered(weight: Array, choice: Array, size: int) -> Array:
    """x_a = sum_{i: choice_i = a} weight_i: (..., n) -> (..., size)."""
    lead = weight.shape[:-1]
    if choice.ndim == 1:
        out = np.zeros((*lead, size))
        # within a run of growing choices none occurs twice, so a run can be added at once
        cuts = [0, *(np.flatnonzero(np.diff(choice) <= 0) + 1).tolist(), choice.shape[0]]
        for part in (slice(a, b) for a, b in pairwise(cuts)):
            out[..., choice[part]] += weight[..., part]
        return out
    count = int(np.prod(lead))
    index = np.arange(count)[:, None] * size + np.broadcast_to(choice, weight.shape).reshape(count, -1)
    flat = np.ascontiguousarray(weight).reshape(-1)
    return np.bincount(index.reshape(-1), flat, minlength=count * size).reshape(*lead, size)
