"""Scores of token chains, from the edges that trajectories pass.

An edge is a token at a state at a position. Trajectories are stored as edges, and everything an estimator needs is a
lookup: norms of scores, sums of scores (count the weights on each edge, then `policy.combine` once).

For a tabular policy, scores at different (position, state) are orthogonal. So ||s_i||^2 is a sum over tokens, and
<s_i, s_j> has a term only where both trajectories are in the same state at the same time:

    <s_i, s_j> = sum_t 1{same state} (1{same token} - pi(v_i) - pi(v_j) + sum_u pi(u)^2)

That gives ||sum_i c_i s_i||^2 of a group without a gradient of p numbers for each. A linear policy shares parameters
over positions; there a trajectory's score is one vector of d numbers, summed over its tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vcposim.arrays import Array
from vcposim.problems.policies import LinearSoftmax, Policy
from vcposim.problems.token_chains import TokenChain


@dataclass(frozen=True)
class EdgeTables:
    """What is known of each edge, flat over (T, S, C); C >= V is a power of two, and unused tokens are never passed."""

    chain: TokenChain
    policy: Policy
    width: int

    def spread(self, table: Array, fill: float = 0.0) -> Array:
        """A table as one over edges: (..., T, S, V) -> (..., E)."""
        length, states, vocabulary = self.chain.shape
        out = np.full((*table.shape[:-3], length, states, self.width), fill)
        out[..., :vocabulary] = table
        return out.reshape(*table.shape[:-3], -1)

    @property
    def count(self) -> int:
        """T S C."""
        return self.chain.shape[0] * self.chain.shape[1] * self.width

    @cached_property
    def prob(self) -> Array:
        """pi of the token; 0 for padding, so that padding has no score: (edges,)."""
        return self.spread(self.chain.emitted(np.exp(self.policy.log_prob)))

    @cached_property
    def collision(self) -> Array:
        """sum_u pi(u)^2 at the edge's row: (edges,)."""
        prob = self.chain.emitted(np.exp(self.policy.log_prob))
        return self.spread(np.broadcast_to(np.sum(prob**2, axis=-1, keepdims=True), prob.shape))

    @cached_property
    def alive(self) -> Array:
        """1 for a token of the policy, 0 for padding: (edges,)."""
        return self.spread(self.chain.emitted(np.ones(self.chain.shape)))

    @cached_property
    def score_sq_norm(self) -> Array:
        """||s||^2 of the token: (edges,)."""
        return self.spread(self.chain.emitted(self.policy.score_sq_norm()))

    @cached_property
    def score(self) -> Array:
        """s of the token for a linear policy: (edges, d)."""
        assert isinstance(self.policy, LinearSoftmax)
        table = np.moveaxis(self.policy.score_table, -1, 0)
        return np.ascontiguousarray(self.spread(self.chain.emitted(table)).T)

    def combine(self, weight: Array) -> Array:
        """sum over edges of weight * s: (edges,) -> (p,)."""
        length, states, vocabulary = self.chain.shape
        table = weight.reshape(length, states, self.width)[..., :vocabulary]
        return self.policy.combine(self.chain.emitted(table))


@dataclass(frozen=True)
class ChainScores:
    """Scores of trajectories given by their edges, time first: `edge` (t, ..., n), integers."""

    table: EdgeTables
    edge: Array

    @property
    def linear(self) -> bool:
        """Whether rows share parameters."""
        return isinstance(self.table.policy, LinearSoftmax)

    def _steps(self, weight: Array) -> list[tuple[Array, Array]]:
        # (edges, weights) of each position; weights per trajectory are the same at all of them
        per_token = weight.ndim == self.edge.ndim
        return [(edge, weight[..., t] if per_token else weight) for t, edge in enumerate(self.edge)]

    @cached_property
    def _sq_norm(self) -> Array:
        if self.linear:
            return np.sum(self.vectors(np.ones(self.edge.shape[1:])) ** 2, axis=-1)
        return sum(self.table.score_sq_norm.take(edge) for edge in self.edge)  # type: ignore[return-value]

    def vectors(self, weight: Array) -> Array:
        """sum_t weight_it s_it of each trajectory: -> (..., n, d); linear policies only."""
        return sum(w[..., None] * self.table.score[edge] for edge, w in self._steps(weight))  # type: ignore[return-value]

    def sq_norm(self, weight: Array) -> Array:
        """||weight_i s_i||^2, or ||sum_t weight_it s_it||^2: -> (..., n)."""
        if weight.ndim < self.edge.ndim:
            return weight * weight * self._sq_norm
        if self.linear:
            return np.sum(self.vectors(weight) ** 2, axis=-1)
        return sum(w * w * self.table.score_sq_norm.take(edge) for edge, w in self._steps(weight))  # type: ignore[return-value]

    def combine_total(self, weight: Array) -> Array:
        """sum over all groups and samples: -> (p,)."""
        # edges of position t are numbered from t * size
        size = self.table.count // self.table.chain.shape[0]
        count = [
            np.bincount(edge.reshape(-1) - t * size, np.ascontiguousarray(w).reshape(-1), minlength=size)
            for t, (edge, w) in enumerate(self._steps(weight))
        ]
        return self.table.combine(np.concatenate(count))

    def combine(self, weight: Array) -> Array:
        """sum_i weight_i s_i, or sum_it weight_it s_it: -> (..., p)."""
        lead = self.edge.shape[1:-1]
        if self.linear:
            return np.sum(self.vectors(weight), axis=-2)
        flat = [(edge.reshape(-1, edge.shape[-1]), w.reshape(-1, w.shape[-1])) for edge, w in self._steps(weight)]
        out = []
        for g in range(int(np.prod(lead))):
            edge, placed = (np.concatenate([step[k][g] for step in flat]) for k in (0, 1))
            out.append(self.table.combine(np.bincount(edge, placed, minlength=self.table.count)))
        return np.stack(out).reshape(*lead, -1)

    def combined_sq_norm(self, weight: Array) -> Array:
        """||combine(weight)||^2 of each group (R, N): -> (R,)."""
        if self.linear:
            return np.sum(self.combine(weight) ** 2, axis=-1)
        own = np.sum(self.sq_norm(weight), axis=-1)
        if self.edge.shape[-1] == 1:
            return own
        if weight.ndim == self.edge.ndim:
            return own + sum(np.sum(factor * pair, axis=-1) for factor, pair in zip(*self._pairs(weight), strict=True))
        factors, pairs = self._plain_pairs
        for shift, (factor, pair) in enumerate(zip(factors, pairs, strict=True), start=1):
            own = own + factor * np.sum(weight * np.roll(weight, -shift, axis=-1) * pair, axis=-1)
        return own

    @cached_property
    def _plain_pairs(self) -> tuple[list[float], list[Array]]:
        return self._pairs(None)

    def _pairs(self, weight: Array | None) -> tuple[list[float], list[Array]]:
        """<s_i, s_{i+d}> for d = 1..N/2, weighted per token if asked, and how often each counts in the double sum."""
        size = self.edge.shape[-1]
        shifts = range(1, size // 2 + 1)
        pairs = [sum_of_matches(self.table, self.edge, shift, weight) for shift in shifts]
        return [1.0 if 2 * shift == size else 2.0 for shift in shifts], pairs


def sum_of_matches(table: EdgeTables, edge: Array, shift: int, weight: Array | None) -> Array:
    """sum_t w_it w_jt <s_it, s_jt>, j = i + shift around the group, tabular: (t, R, N), (R, N, t) -> (R, N)."""
    out = np.zeros(edge.shape[1:]).reshape(-1)
    bits = table.width.bit_length() - 1
    for t, one in enumerate(edge):
        other = np.roll(one, -shift, axis=-1).reshape(-1)
        flat = one.reshape(-1)
        match = np.flatnonzero((flat >> bits) == (other >> bits))
        a, b = flat[match], other[match]
        # padding has probability and collision zero, and must not count as the same token
        term = table.alive[a] * (a == b) - table.prob[a] - table.prob[b] + table.collision[a]
        if weight is not None:
            w = weight[..., t]
            term = term * w.reshape(-1)[match] * np.roll(w, -shift, axis=-1).reshape(-1)[match]
        out[match] += term
    return out.reshape(edge.shape[1:])
