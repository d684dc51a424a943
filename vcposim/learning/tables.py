"""Policies of many runs at once, as tables (run, row, token) of log-probabilities, with explicit scores.

Four families make logits from parameters theta (run, p):

    Tabular    logit = theta                                   p = rows V; rows are independent
    Linear     logit[row, v] = <feature[row, v], theta>        rows share parameters
    OneLayer   logit[row] = x[row] W                           the same with one x for all tokens of a row
    TwoLayer   logit[row] = tanh(x[row] W1) W2                 a small network; rows share a hidden layer

The score of a token is J(row, v) - E_pi J(row, .), J the Jacobian of the logits. A gradient sum c s needs only the sums
of c on each (row, token) and one product with J; only norms of whole trajectories need more. For `Tabular` these are
lookups; layers have them from Gram matrices of a trajectory's tokens, or, where tokens are many, from the gradients
themselves; `Linear` writes one vector a trajectory, by one matrix product a run.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from scipy.sparse import csr_array

from vcposim.arrays import Array
from vcposim.learning.optimizers import AdamMoments, adam_direction
from vcposim.problems.policies import log_and_softmax, log_softmax


class Family(Protocol):
    """How logits come from parameters."""

    @property
    def orthogonal(self) -> bool:
        """Whether different rows have orthogonal scores."""
        ...

    def parameters(self, logit: Array) -> Array:
        """Parameters that start at (or nearest to) given logits: (rows, V) -> (p,)."""
        ...

    def logit(self, theta: Array) -> Array:
        """(run, p) -> (run, rows, V)."""
        ...

    def jacobian(self, theta: Array) -> Array:
        """d logit / d theta: (run, p) -> (run, rows, V, p)."""
        ...

    def pull_back(self, theta: Array, weight: Array) -> Array:
        """sum_{row, v} weight J(row, v): (run, p), (run, rows, V) -> (run, p)."""
        ...


@dataclass(frozen=True)
class Tabular:
    """One free logit for each row and token."""

    rows: int
    vocabulary: int
    orthogonal: bool = True

    def parameters(self, logit: Array) -> Array:
        """The logits themselves: (rows, V) -> (p,)."""
        return logit.reshape(-1)

    def logit(self, theta: Array) -> Array:
        """See `Family`."""
        return theta.reshape(-1, self.rows, self.vocabulary)

    def jacobian(self, theta: Array) -> Array:
        """The identity: the slow twin of what `orthogonal` allows: (run, p) -> (run, rows, V, p)."""
        size = self.rows * self.vocabulary
        one = np.eye(size).reshape(1, self.rows, self.vocabulary, size)
        return np.broadcast_to(one, (len(theta), *one.shape[1:]))

    def pull_back(self, theta: Array, weight: Array) -> Array:
        """See `Family`."""
        return weight.reshape(len(theta), -1)


@dataclass(frozen=True)
class Linear:
    """Logits linear in shared parameters: `feature` (rows, V, p)."""

    feature: Array
    orthogonal: bool = False

    def parameters(self, logit: Array) -> Array:
        """Least squares: exact where the features span the logits up to a constant a row: (rows, V) -> (p,)."""
        centered = self.feature - self.feature.mean(axis=1, keepdims=True)
        goal = logit - logit.mean(axis=1, keepdims=True)
        return np.linalg.lstsq(centered.reshape(-1, self.feature.shape[-1]), goal.reshape(-1), rcond=None)[0]

    def logit(self, theta: Array) -> Array:
        """See `Family`."""
        return np.einsum("tvp,rp->rtv", self.feature, theta)

    def jacobian(self, theta: Array) -> Array:
        """The features: (run, p) -> (run, rows, V, p)."""
        return np.broadcast_to(self.feature, (len(theta), *self.feature.shape))

    def pull_back(self, theta: Array, weight: Array) -> Array:
        """See `Family`."""
        return np.einsum("rtv,tvp->rp", weight, self.feature)


@dataclass(frozen=True)
class OneLayer:
    """logit[row] = x[row] W, no bias: inputs `x` (rows, d), V tokens; theta = W.

    `Linear` whose features are one for all tokens of a row: norms of trajectories cost pairs of tokens, not vectors.
    """

    x: Array
    vocabulary: int
    orthogonal: bool = False

    def parameters(self, logit: Array) -> Array:
        """Least squares: exact where the inputs of rows are linearly independent: (rows, V) -> (p,)."""
        return np.linalg.lstsq(self.x, logit - logit.mean(axis=1, keepdims=True), rcond=None)[0].reshape(-1)

    def logit(self, theta: Array) -> Array:
        """See `Family`."""
        return self.x @ theta.reshape(len(theta), -1, self.vocabulary)

    def jacobian(self, theta: Array) -> Array:
        """Inputs on each token's own columns: (run, p) -> (run, rows, V, p)."""
        one = np.einsum("td,vu->tvdu", self.x, np.eye(self.vocabulary)).reshape(len(self.x), self.vocabulary, -1)
        return np.broadcast_to(one, (len(theta), *one.shape))

    def pull_back(self, theta: Array, weight: Array) -> Array:
        """See `Family`."""
        return (self.x.T @ weight).reshape(len(theta), -1)

    def sq_norm(self, theta: Array, row: Array, push: Array) -> Array:
        """||sum_t sum_v push_tv J(row_t, v)||^2: (run, p), (run, i, time), (run, i, time, V) -> (run, i)."""
        return sq_norm_of_outer(self.x, row, push)


def sq_norm_of_outer(x: Array, row: Array, u: Array) -> Array:
    """||sum_t x[row_t] u_t^T||_F^2: (rows, d), (run, i, time), (run, i, time, k) -> (run, i).

    Pairs of tokens, sum_{t, t'} <x_t, x_t'> <u_t, u_t'>, take time^2 numbers a trajectory, the sum itself d k of them.
    Inputs that are mostly zeros (one-hot) make it a product with a sparse matrix, cheap however large d is.
    """
    run, i, time = row.shape
    if time <= LONG:
        return np.einsum("...tu,...tu->...", (x @ x.T)[row[..., :, None], row[..., None, :]], _gram(u))
    used = csr_array(x)[row.reshape(-1)]  # one line a token; its columns become those of its own trajectory
    own = np.repeat(np.arange(run * i), time) * x.shape[1]
    shifted = used.indices + np.repeat(own, np.diff(used.indptr))
    spread = csr_array((used.data, shifted, used.indptr), shape=(run * i * time, run * i * x.shape[1]))
    total = spread.T @ u.reshape(run * i * time, -1)
    return np.sum((total * total).reshape(run, i, -1), axis=-1)


LONG = 64
"""tokens of a trajectory above which norms are made from gradients instead of pairs of tokens"""


def _gram(y: Array) -> Array:
    return y @ np.swapaxes(y, -1, -2)


FIT_STEP = 0.02
"""Adam's step size in a network's supervised start"""


@dataclass(frozen=True)
class TwoLayer:
    """logit[row] = tanh(x[row] W1) W2, no biases: inputs `x` (rows, d), `hidden` units, V tokens; theta = (W1, W2).

    The start is the least-squares second layer behind a fixed random first one. With about as many rows as hidden
    units that has huge weights, which the smallest step upsets, and with more it is far from what was asked for: `fit`
    steps of Adam on the cross-entropy, from a second layer of zeros, move both layers instead (supervised fine-tuning).
    """

    x: Array
    hidden: int
    vocabulary: int
    orthogonal: bool = False
    fit: int = 0

    def _split(self, theta: Array) -> tuple[Array, Array]:
        d = self.x.shape[1]
        cut = d * self.hidden
        return theta[:, :cut].reshape(-1, d, self.hidden), theta[:, cut:].reshape(-1, self.hidden, self.vocabulary)

    def parameters(self, logit: Array) -> Array:
        """A fixed random first layer and the least-squares second, or both after `fit` steps: (rows, V) -> (p,)."""
        first = np.random.default_rng(0).standard_normal((self.x.shape[1], self.hidden)) / np.sqrt(self.x.shape[1])
        active = np.tanh(self.x @ first)
        goal = logit - logit.mean(axis=1, keepdims=True)
        second = np.linalg.lstsq(active, goal, rcond=None)[0]
        if not self.fit:
            return np.concatenate([first.reshape(-1), second.reshape(-1)])
        theta = np.concatenate([first.reshape(-1), 0 * second.reshape(-1)])[None]
        wanted, memory = log_and_softmax(logit)[1][None], AdamMoments.zeros(theta.shape)
        for _ in range(self.fit):
            uphill = self.pull_back(theta, wanted - log_and_softmax(self.logit(theta))[1])
            theta = theta + FIT_STEP * adam_direction(memory, uphill)
        return theta[0]

    def logit(self, theta: Array) -> Array:
        """See `Family`."""
        first, second = self._split(theta)
        return np.tanh(self.x @ first) @ second

    def jacobian(self, theta: Array) -> Array:
        """See `Family`."""
        first, second = self._split(theta)
        active = np.tanh(self.x @ first)
        inner = np.einsum("td,rth,rhv->rtvdh", self.x, 1 - active**2, second)
        outer = np.einsum("rth,vu->rtvhu", active, np.eye(self.vocabulary))
        lead = inner.shape[:3]
        return np.concatenate([inner.reshape(*lead, -1), outer.reshape(*lead, -1)], axis=-1)

    def pull_back(self, theta: Array, weight: Array) -> Array:
        """See `Family`: back-propagation."""
        first, second = self._split(theta)
        active = np.tanh(self.x @ first)
        outer = np.swapaxes(active, 1, 2) @ weight
        inner = self.x.T @ ((weight @ np.swapaxes(second, 1, 2)) * (1 - active**2))
        return np.concatenate([inner.reshape(len(theta), -1), outer.reshape(len(theta), -1)], axis=-1)

    def sq_norm(self, theta: Array, row: Array, push: Array) -> Array:
        """||sum_t sum_v push_tv J(row_t, v)||^2: (run, p), (run, i, time), (run, i, time, V) -> (run, i).

        With hidden values a_t and what arrives there u_t = (push_t W2^T) (1 - a_t^2), the gradient is (sum_t x_t u_t^T,
        sum_t a_t push_t^T), and its square is a sum over pairs of tokens:
        sum_{t, t'} <x_t, x_t'> <u_t, u_t'> + <a_t, a_t'> <push_t, push_t'>.
        """
        first, second = self._split(theta)
        active = np.tanh(self.x @ first)
        hidden = active[np.arange(len(theta))[:, None, None], row]
        arriving = (push @ np.swapaxes(second, 1, 2)[:, None]) * (1 - hidden**2)
        inner = sq_norm_of_outer(self.x, row, arriving)
        if row.shape[-1] <= LONG:
            return inner + np.einsum("...tu,...tu->...", _gram(hidden), _gram(push))
        outer = np.swapaxes(hidden, -1, -2) @ push
        return inner + np.einsum("...hv,...hv->...", outer, outer)


def gradient(family: Family, theta: Array, prob: Array, weight: Array) -> Array:
    """sum_{row, v} weight s(row, v): (run, p), (run, rows, V), (run, rows, V) -> (run, p)."""
    return family.pull_back(theta, weight - prob * np.einsum("rtv->rt", weight)[..., None])


@dataclass(frozen=True)
class TableScores:
    """Scores of trajectories through `cell` (run, group, n, time): where in a table (run, rows, V) each token is.

    Fastest where time is the slowest axis of `cell` in memory.
    """

    family: Family
    theta: Array
    prob: Array
    """(run, rows, V)"""
    cell: Array

    def part(self, runs: slice) -> "TableScores":
        """The scores of some of the runs."""
        cell = self.cell[runs] - runs.start * self.prob[0].size
        return TableScores(self.family, self.theta[runs], self.prob[runs], cell)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(run, group, n)"""
        return tuple(self.cell.shape[:-1])

    def at(self, table: Array) -> Array:
        """What a table says of each token: (run, rows, V) or (run, rows, 1) -> (run, group, n, time)."""
        flat, index = table.reshape(-1), time_first(self.cell)
        return time_last(flat.take(index if table.shape == self.prob.shape else index // self.prob.shape[-1]))

    @cached_property
    def collision(self) -> Array:
        """sum_v pi(v)^2 of each row: (run, rows, 1)."""
        return np.einsum("rtv,rtv->rt", self.prob, self.prob)[..., None]

    @cached_property
    def _token_sq_norm(self) -> Array:
        return self.at(1 - 2 * self.prob + self.collision)

    @cached_property
    def _score(self) -> Array:
        jacobian = self.family.jacobian(self.theta)
        mean = np.einsum("rtv,rtvp->rtp", self.prob, jacobian)
        return (jacobian - mean[:, :, None]).reshape(len(self.theta), -1, self.theta.shape[1])

    def _placed(self, weight: Array, per: int) -> Array:
        # sums of weights on each (row, token), for each of the first `per` axes: (..., n[, t]) -> (*lead, rows V)
        weight = np.broadcast_to(weight[..., None] if weight.ndim < self.cell.ndim else weight, self.cell.shape)
        lead, size, index = self.cell.shape[:per], self.prob[0].size, self.cell
        if per > 1:
            first = np.arange(int(np.prod(lead))).reshape(*lead, *(1,) * (4 - per))
            index = index + (first - np.arange(lead[0])[:, None, None, None]) * size
        index, weight = (time_first(x).reshape(-1) for x in (index, weight))
        return np.bincount(index, weight, int(np.prod(lead)) * size).reshape(*lead, size)

    def _vectors(self, weight: Array) -> Array:
        run, group, n, _ = self.cell.shape
        return (self._placed(weight, 3).reshape(run, group * n, -1) @ self._score).reshape(run, group, n, -1)

    def sq_norm(self, weight: Array) -> Array:
        """||weight_i s_i||^2, or ||sum_t weight_it s_it||^2: -> (run, group, n)."""
        if isinstance(self.family, OneLayer | TwoLayer):
            # rows passed and w_t (e_token - pi(row)) on their logits: (run, group n, time), (run, group n, time, V)
            run, time, (rows, vocabulary) = len(self.cell), self.cell.shape[-1], self.prob.shape[1:]
            cell = self.cell.reshape(run, -1, time) - np.arange(run)[:, None, None] * (rows * vocabulary)
            row, token = cell // vocabulary, cell % vocabulary
            push = -self.prob[np.arange(run)[:, None, None], row]
            np.put_along_axis(push, token[..., None], np.take_along_axis(push, token[..., None], -1) + 1, -1)
            weight = np.broadcast_to(weight[..., None] if weight.ndim < self.cell.ndim else weight, self.cell.shape)
            push = push * weight.reshape(run, -1, time)[..., None]
            return self.family.sq_norm(self.theta, row, push).reshape(self.sample_shape)
        if not self.family.orthogonal:
            return np.sum(self._vectors(weight) ** 2, axis=-1)
        if weight.ndim < self.cell.ndim:
            return weight * weight * np.sum(self._token_sq_norm, axis=-1)
        return np.sum(weight * weight * self._token_sq_norm, axis=-1)

    def combine(self, weight: Array) -> Array:
        """sum_i weight_i s_i of each group: -> (run, group, p)."""
        run, group = self.cell.shape[:2]
        placed = self._placed(weight, 2).reshape(run * group, *self.prob.shape[1:])
        # one pull back for each group, as if it were a run: no Jacobian of the whole table
        theta, prob = (np.repeat(x, group, axis=0) for x in (self.theta, self.prob))
        return gradient(self.family, theta, prob, placed).reshape(run, group, -1)

    def total(self, weight: Array) -> Array:
        """The same over all groups: -> (run, p)."""
        return gradient(self.family, self.theta, self.prob, self._placed(weight, 1).reshape(self.prob.shape))


def table_log_prob(family: Family, theta: Array) -> Array:
    """log pi: (run, p) -> (run, rows, V), nats."""
    return log_softmax(family.logit(theta))


def time_first(x: Array) -> Array:
    """(run, group, n, time) -> (time, run, group, n), the same memory: sums over time become sums of long rows."""
    return x.transpose(3, 0, 1, 2)


def time_last(x: Array) -> Array:
    """The way back, the order in which every formula counts: (time, run, group, n) -> (run, group, n, time)."""
    return x.transpose(1, 2, 3, 0)
