"""Token-chain problems: a chain, the target policy, the policies that sampled.

The behavior is a mixture of M **paths**. A path says which version of the policy samples each position: a constant path
is one stale version, a path that steps is a trajectory during which the weights were updated in flight. Each path is a
table of log-probabilities over (position, state, token); a trajectory follows one path, drawn by `path_probability`,
and its behavior log-probability is the sum of each token's own version.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vcposim.arrays import Array
from vcposim.batch import Batch, Scores
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.problems import chain_moments
from vcposim.problems.alias import AliasTable, alias_table, words
from vcposim.problems.bandits import require_support
from vcposim.problems.chain_scores import ChainScores, EdgeTables
from vcposim.problems.environments import require_probability
from vcposim.problems.policies import LinearSoftmax, Policy
from vcposim.problems.scores import SharedScores
from vcposim.problems.token_chains import TokenChain
from vcposim.weights import Weighting

LARGEST_ENUMERATION = 200_000
"""trajectories that `outcomes` lists at most"""

RARE = 2.0**-16
"""below this token probability draws take 62 bits instead of 32"""

COLUMN = 8192
"""trajectories drawn side by side, so that the arrays at work stay in cache; part of what a seed means"""


class ChainDraw(NamedTuple):
    """Drawn trajectories: prompt of each group (R, 1), path (R, N), edges (t, R, N), final state (R, N)."""

    group: Array
    path: Array
    edge: Array
    final: Array


@dataclass(frozen=True)
class ChainProblem:
    """A token chain with its policies: `behavior` and optional `recorded` are log-probabilities (M, T, S, V).

    `recorded` is what the learner believes the behavior to be, where that is not what sampled.

    Raises `InputError` for shapes that do not match, or a behavior of zero where the target is not.
    """

    chain: TokenChain
    target: Policy
    behavior: Array
    path_probability: Array
    recorded: Array | None = None
    group_probability: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_probability", self.chain.group_probability)
        require_probability("path_probability", self.path_probability)
        shape = (len(self.path_probability), *self.chain.shape)
        for name, table in (("behavior", self.behavior), ("recorded", self._recorded)):
            if table.shape != shape:
                raise InputError(f"{name}: shape {table.shape}; expected paths, positions, states, tokens {shape}")
            prob = self.chain.padded(np.exp(table))
            require_probability(name, prob, tolerance=1e-7)
            require_support(name, self.pi, prob, self.mu)

    @property
    def _recorded(self) -> Array:
        return self.behavior if self.recorded is None else self.recorded

    @cached_property
    def pi(self) -> Array:
        """The target's probabilities, with padding: (T, S, V)."""
        return self.chain.padded(np.exp(self.target.log_prob))

    @cached_property
    def mu(self) -> Array:
        """The behavior's probabilities, with padding: (M, T, S, V)."""
        return self.chain.padded(np.exp(self.behavior))

    @cached_property
    def log_ratio(self) -> Array:
        """log pi/mu of each token as the learner sees it, 0 for padding: (M, T, S, V), nats."""
        with np.errstate(invalid="ignore"):
            log_ratio = self.target.log_prob - self._recorded
        return np.where(self.mu > 0, self.chain.emitted(log_ratio), 0.0)

    @cached_property
    def value(self) -> float:
        """E_pi[R]."""
        return self.chain.value(self.target)

    @cached_property
    def gradient(self) -> Array:
        """grad E_pi[R]: (p,)."""
        return self.chain.gradient(self.target)

    @cached_property
    def table(self) -> EdgeTables:
        """What is known of each edge."""
        return EdgeTables(self.chain, self.target, 1 << (self.chain.shape[2] - 1).bit_length())

    @cached_property
    def outcome_count(self) -> int:
        """Trajectories of one prompt times paths, as an exact integer (V^T for a fixed length)."""
        alive = np.asarray(np.any(self.mu > 0, axis=0), dtype=object)
        count = np.array([1] * self.chain.shape[1], dtype=object)
        for step, to in zip(alive[::-1], self.chain.transition[::-1], strict=True):
            count = np.sum(np.where(step, 1, 0).astype(object) * count[to], axis=-1)
        return int(max(count[self.chain.start])) * len(self.path_probability)

    @property
    def listable(self) -> bool:
        """Whether `outcomes` lists them: at most `LARGEST_ENUMERATION`."""
        return self.outcome_count <= LARGEST_ENUMERATION

    def contribution_moments(self, estimator: Estimator, baseline: Array) -> tuple[Array, Array] | None:
        """See `Problem`: by sums over positions and states, where the weighting is a product over tokens."""
        return chain_moments.contribution_moments(self, estimator, baseline)

    def population_baseline(self, weighting: Weighting) -> Array | None:
        """See `Problem`."""
        return chain_moments.population_baseline(self, weighting)

    def diagnostics(self) -> dict[str, float] | None:
        """See `Problem`."""
        return chain_moments.diagnostics(self)

    def outcomes(self) -> Batch:
        """All trajectories of all paths with their exact probability, per token: axes (G, n), ratios (G, n, T).

        Raises `InputError` beyond `LARGEST_ENUMERATION` of them.
        """
        if not self.listable:
            raise InputError(
                f"outcomes: {float(self.outcome_count):.3g} trajectories are too many to list (limit "
                f"{LARGEST_ENUMERATION}); use monte_carlo.moments, or --method monte-carlo"
            )
        draw, measure = self._listed
        batch = self.batch(draw, per_token=True)
        return Batch(**(vars(batch) | {"measure": measure, "unit": 0.0}))

    def restricted(self, group: int, outcome: Array) -> Scores:
        """The scores of some outcomes of one group, `outcome` (n,) indices, for many batches (..., n) of them."""
        edge = self._listed[0].edge[:, group, outcome]
        used, position = np.unique(edge, return_inverse=True)
        dense = np.stack([self.table.combine(np.bincount([e], minlength=self.table.count)) for e in used])
        return SharedScores(np.moveaxis(dense[position.reshape(edge.shape)], 0, 1))

    @cached_property
    def _listed(self) -> tuple[ChainDraw, Array]:
        """Every trajectory of every prompt and path as a draw (G, n), and its probability; padded with measure 0."""
        alive = np.any(self.mu > 0, axis=0)
        strings = [self._strings(start, alive) for start in self.chain.start]
        most = max(edge.shape[1] for edge, _ in strings)
        pads = [most - edge.shape[1] for edge, _ in strings]
        edge = np.stack([np.pad(e, ((0, 0), (0, k)), mode="edge") for (e, _), k in zip(strings, pads, strict=True)], 1)
        final = np.stack([np.pad(f, (0, k), mode="edge") for (_, f), k in zip(strings, pads, strict=True)])
        real = np.arange(most) < most - np.array(pads)[:, None]
        prob = self.table.spread(self.mu)[:, edge]
        measure = self.path_probability[:, None, None] * np.prod(prob, axis=1) * real
        paths = len(self.path_probability)
        path = np.broadcast_to(np.repeat(np.arange(paths), most), (len(strings), paths * most))
        draw = ChainDraw(
            group=np.arange(len(strings))[:, None],
            path=path,
            edge=np.tile(edge, (1, 1, paths)),
            final=np.tile(final, (1, paths)),
        )
        return draw, np.moveaxis(measure, 0, 1).reshape(len(strings), -1)

    def _strings(self, start: int, alive: Array) -> tuple[Array, Array]:
        """All strings from a start state: edges (T, n) and final states (n,)."""
        length, states, _ = self.chain.shape
        state, path = np.array([start]), np.empty((0, 1), dtype=np.int64)
        for t in range(length):
            parent, token = np.nonzero(alive[t][state])
            edge = ((t * states + state[parent]) * self.table.width) + token
            path = np.concatenate([path[:, parent], edge[None]])
            state = self.chain.transition[t][state[parent], token]
        return path, state

    def sample(self, rng: np.random.Generator, replications: int, group_size: int) -> Batch:
        """Independent groups, each of one prompt drawn by `group_probability`: axes (replications, group_size[, T])."""
        return self.batch(self.draw(rng, replications, group_size), per_token=True)

    def draw(self, rng: np.random.Generator, replications: int, group_size: int) -> ChainDraw:
        """The random part of `sample`."""
        shape = (replications, group_size)
        group, path = np.zeros((replications, 1), dtype=np.int64), np.zeros(shape, dtype=np.int64)
        if len(self.group_probability) > 1:
            group = self._group_table.draw(words(rng, group.shape, 62), group)
        if len(self.path_probability) > 1:
            path = self._path_table.draw(words(rng, shape, 62), path)
        length, states, _ = self.chain.shape
        width, size = self.table.width, states * self.table.width
        first = (path * size + self.chain.start[group] * width).reshape(-1)
        edge, end = np.empty((length, first.size), dtype=np.int64), np.empty_like(first)
        for begin in range(0, first.size, COLUMN):
            part = slice(begin, begin + COLUMN)
            end[part] = self._sampler.walk(rng, first[part], edge[:, part])
        if len(self.path_probability) > 1:  # cells are numbered by path too, edges are not
            edge = edge % size + np.arange(length)[:, None] * size
        return ChainDraw(group, path, edge.reshape(-1, *shape), (end // width % states).reshape(shape))

    def batch(self, draw: ChainDraw, *, per_token: bool = True) -> Batch:
        """The batch of drawn trajectories, with ratios per token or per trajectory."""
        table, edge = self.table, draw.edge
        at = self._edge_log_ratio.reshape(-1)
        offset = draw.path * table.count if len(self.path_probability) > 1 else None
        steps = (at.take(e if offset is None else e + offset) for e in edge)
        fields = {"reward": self.chain.reward[draw.final], "scores": ChainScores(table, edge)}
        if np.any(self.chain.done):
            fields["length"] = sum(table.alive.take(e) for e in edge)
        else:
            fields["length"] = np.full(draw.final.shape, float(len(edge)))
        if not per_token:
            return Batch(log_ratio=sum(steps), **fields)  # type: ignore[arg-type]
        time_last = np.moveaxis(edge, 0, -1)
        prob, alive = table.prob[time_last], table.alive[time_last]
        return Batch(
            log_ratio=np.stack(list(steps), axis=-1),
            token_mask=alive,
            log_prob=np.log(np.where(prob > 0, prob, 1.0)),
            collision=table.collision[time_last],
            **fields,  # type: ignore[arg-type]
        )

    def numbers_per_group(self, group_size: int) -> int:
        """Numbers that the largest array of a drawn group holds: what bounds a leaf of Monte Carlo."""
        width = len(self.gradient) if isinstance(self.target, LinearSoftmax) else 1
        return group_size * max(self.chain.shape[0], width)

    @cached_property
    def _edge_log_ratio(self) -> Array:
        return self.table.spread(self.log_ratio)

    @cached_property
    def _group_table(self) -> AliasTable:
        return alias_table(self.chain.group_probability[None])

    @cached_property
    def _path_table(self) -> AliasTable:
        return alias_table(self.path_probability[None])

    @cached_property
    def _sampler(self) -> "ChainSampler":
        return ChainSampler.of(self)


@dataclass(frozen=True)
class ChainSampler:
    """Alias tables of a chain, one for each position, over cells (path, state, column).

    A cell's column is also a token, so the cell drawn is the edge passed: `last` (T, cells) is the last word that keeps
    the cell, `either` (T, 2 cells) the cell itself and its alias side by side, numbered over all positions; `onward`
    (T cells,) is the first cell of the next state. `shift` takes a word to its column.
    """

    bits: int
    shift: int
    last: Array
    either: Array
    onward: Array

    @classmethod
    def of(cls, problem: ChainProblem) -> "ChainSampler":
        """The tables of a problem's behavior."""
        paths, length, states, vocabulary = problem.mu.shape
        width = problem.table.width
        bits = 32 if np.min(problem.mu, where=problem.mu > 0, initial=1.0) > RARE else 62
        table = alias_table(np.moveaxis(problem.mu, 1, 0).reshape(-1, vocabulary), bits)
        cells = paths * states * width
        to = np.zeros((length, paths, states, width), dtype=np.int64)
        to[..., :vocabulary] = np.arange(paths)[:, None, None] * states + problem.chain.transition[:, None]
        own, alias = np.broadcast_to(np.arange(cells), (length, cells)), table.choice[1].reshape(length, cells)
        return cls(
            bits=bits,
            shift=bits - table.column_bits,
            last=table.last.reshape(length, cells).astype(np.uint32 if bits == 32 else np.int64),
            either=np.stack([own, own - own % width + alias], axis=-1).reshape(length, -1)
            + np.arange(length)[:, None] * cells,
            onward=to.reshape(-1) * width,
        )

    def walk(self, rng: np.random.Generator, first: Array, cell: Array) -> Array:
        """Trajectories from their first cells: (n,), (t, n) -> (n,). Writes `cell`, returns where they end."""
        word = words(rng, cell.shape, self.bits)
        shift = word.dtype.type(min(self.shift, self.bits - 1))
        for t, (last, either) in enumerate(zip(self.last, self.either, strict=True)):
            drawn = first + (word[t] >> shift) if self.shift < self.bits else first.copy()
            alias = word[t] > last.take(drawn)
            drawn <<= 1
            drawn += alias
            either.take(drawn, out=cell[t], mode="clip")
            first = self.onward.take(cell[t])
        return first


def chain_problem(
    chain: TokenChain,
    target: Policy,
    behaviors: Sequence[Policy | Array],
    path_probability: Sequence[float] | None = None,
    recorded: Sequence[Policy | Array] | None = None,
) -> ChainProblem:
    """A chain problem from policies, or tables of log-probabilities (T, S, V), one for each path of the mixture.

    `path_probability` is uniform by default; `recorded` as in `ChainProblem`.
    """

    def stacked(policies: Sequence[Policy | Array]) -> Array:
        return np.stack([p if isinstance(p, np.ndarray) else p.log_prob for p in policies])

    count = len(behaviors)
    return ChainProblem(
        chain=chain,
        target=target,
        behavior=stacked(behaviors),
        path_probability=np.asarray([1 / count] * count if path_probability is None else path_probability, float),
        recorded=None if recorded is None else stacked(recorded),
    )
