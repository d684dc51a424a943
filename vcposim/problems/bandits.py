"""Bandit problems: target, behavior, reward, and everything about them known.

The behavior may be a mixture: each sample is drawn by one of M versions, and its ratio is that of its own version, as
in a queue that mixes lags. An outcome is then a pair (version, choice), with probability version_probability * mu_m.

`recorded` is what the learner believes the behavior to be, where that is not what sampled (a sampler in other numerics
than the trainer's): ratios are computed with it, samples come from `behavior`.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vcposim.arrays import Array
from vcposim.batch import Batch, DenseScores, Scores
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.problems.alias import AliasTable, alias_table, words
from vcposim.problems.environments import place, require_finite, require_probability
from vcposim.problems.scores import OneTokenScores, SharedScores, SoftmaxScores
from vcposim.weights import Weighting


class BanditDraw(NamedTuple):
    """Drawn samples: the context of each group (R, 1), version and choice of each sample (R, N)."""

    group: Array
    version: Array
    choice: Array


@dataclass(frozen=True)
class BanditProblem:
    """G contexts of K choices; M behavior versions.

    `target` (G, K), `behavior` (M, G, K), `reward` (G, K), `group_probability` (G,), `version_probability` (M,);
    optional `recorded` (M, G, K), `length` (G, K) in tokens (default 1) and `score` (G, K, p), the scores of a policy
    that is not tabular.

    Raises `InputError` (by name and index) for what is no probability, or a behavior of zero where the target is not.
    """

    target: Array
    behavior: Array
    reward: Array
    group_probability: Array
    version_probability: Array
    recorded: Array | None = None
    length: Array | None = None
    score: Array | None = None

    def __post_init__(self) -> None:
        shape = self.target.shape
        for name in ("target", "behavior", "group_probability", "version_probability"):
            require_probability(name, getattr(self, name))
        require_finite("reward", self.reward)
        if self.behavior.shape[1:] != shape or self.reward.shape != shape:
            raise InputError(
                f"behavior: shape {self.behavior.shape[1:]} and reward {self.reward.shape} are not {shape}"
            )
        for name, table in (("behavior", self.behavior), ("recorded", self._recorded)):
            require_support(name, self.target, table, self.behavior)

    @property
    def _recorded(self) -> Array:
        return self.behavior if self.recorded is None else self.recorded

    @property
    def outcome_count(self) -> int:
        """Outcomes of one group: M K."""
        return self.behavior.shape[0] * self.target.shape[1]

    listable = True
    """see `Problem`: outcomes are rows of tables that are in memory anyway"""

    def contribution_moments(self, estimator: Estimator, baseline: Array) -> None:
        """See `Problem`: no shorter way than the list of outcomes."""

    def population_baseline(self, weighting: Weighting) -> None:
        """See `Problem`: no shorter way than the list of outcomes."""

    def diagnostics(self) -> None:
        """See `Problem`: no shorter way than the list of outcomes."""

    @cached_property
    def value(self) -> float:
        """E_pi[R]."""
        return float(self.group_probability @ np.sum(self.target * self.reward, axis=-1))

    @cached_property
    def gradient(self) -> Array:
        """sum_g rho_g E_pi[R s | g]: (p,)."""
        weight = self.group_probability[:, None] * self.target * self.reward
        choice = np.arange(self.target.shape[1])
        return np.sum(self._scores(self._rows, choice).combine(weight), axis=0)

    @cached_property
    def log_ratio(self) -> Array:
        """log pi/mu of each version as the learner sees it: (M, G, K), nats; 0 where nothing is ever sampled."""
        # an outcome that is never sampled has measure zero; its ratio may be 0/0 and must not be a NaN
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.log(self.target) - np.log(self._recorded)
        return np.where(self.behavior > 0, log_ratio, 0.0)

    def outcomes(self) -> Batch:
        """All outcomes (version, choice) with their exact probability in each group: axes (G, M K)."""
        copies = self.behavior.shape[0]
        measure = self.version_probability[:, None, None] * self.behavior
        choice = np.tile(np.arange(self.target.shape[1]), copies)
        return Batch(
            reward=np.tile(self.reward, copies),
            log_ratio=_side_by_side(self.log_ratio),
            scores=self._scores(self._rows, choice),
            length=np.tile(self._length, copies),
            measure=_side_by_side(measure),
            unit=0.0,
        )

    def restricted(self, group: int, outcome: Array) -> Scores:
        """The scores of some outcomes of one group, `outcome` (n,) indices, for many batches (..., n) of them."""
        choice = outcome % self.target.shape[1]
        if self.score is not None:
            return SharedScores(self.score[group, choice])
        return SoftmaxScores(self.target, np.array([group]), choice)

    def sample(self, rng: np.random.Generator, replications: int, group_size: int) -> Batch:
        """Independent groups, each of one context drawn by `group_probability`: axes (replications, group_size)."""
        return self.batch(self.draw(rng, replications, group_size))

    def draw(self, rng: np.random.Generator, replications: int, group_size: int) -> BanditDraw:
        """The random part of `sample`."""
        shape = (replications, group_size)
        group = _drawn(self._group_table, rng, (replications, 1), np.zeros((replications, 1), np.int64))
        version = _drawn(self._version_table, rng, shape, np.zeros(shape, np.int64))
        row = version * self.target.shape[0] + group
        return BanditDraw(group, version, _drawn(self._choice_table, rng, shape, row))

    def batch(self, draw: BanditDraw, *, per_token: bool = False) -> Batch:
        """The batch of drawn samples; `per_token` changes nothing: see `OneTokenBandit`."""
        at = (np.broadcast_to(draw.group, draw.choice.shape), draw.choice)
        return Batch(
            reward=self.reward[at],
            log_ratio=self.log_ratio[(draw.version, *at)],
            scores=self._scores(draw.group, draw.choice),
            length=self._length[at],
        )

    def numbers_per_group(self, group_size: int) -> int:
        """Numbers that the largest array of a drawn group holds: what bounds a leaf of Monte Carlo."""
        if self.score is not None:
            return group_size * self.score.shape[-1]
        return max(group_size, self.target.shape[1])

    @property
    def _rows(self) -> Array:
        return np.arange(self.target.shape[0])[:, None]

    @cached_property
    def _length(self) -> Array:
        return np.ones(self.target.shape) if self.length is None else self.length

    def _scores(self, row: Array, choice: Array) -> Scores:
        if self.score is None:
            return SoftmaxScores(self.target, row, choice)
        return DenseScores(self.score[row, choice])

    @cached_property
    def _group_table(self) -> AliasTable:
        return alias_table(self.group_probability[None])

    @cached_property
    def _version_table(self) -> AliasTable:
        return alias_table(self.version_probability[None])

    @cached_property
    def _choice_table(self) -> AliasTable:
        return alias_table(self.behavior.reshape(-1, self.behavior.shape[-1]))


class OneTokenBandit(BanditProblem):
    """A bandit whose arms are responses of one token: its batches also have a time axis, of one."""

    def outcomes(self) -> Batch:
        """See `BanditProblem`; per token: axes (G, M K, 1)."""
        copies, choices = self.behavior.shape[0], self.target.shape[1]
        row, choice = np.broadcast_arrays(self._rows, np.tile(np.arange(choices), copies))
        return self._by_token(super().outcomes(), row, choice)

    def restricted(self, group: int, outcome: Array) -> Scores:
        """See `BanditProblem`."""
        return OneTokenScores(super().restricted(group, outcome), 2)

    def batch(self, draw: BanditDraw, *, per_token: bool = False) -> Batch:
        """See `BanditProblem`; ratios (R, N, 1) if `per_token`."""
        found = super().batch(draw)
        return (
            self._by_token(found, np.broadcast_to(draw.group, draw.choice.shape), draw.choice) if per_token else found
        )

    def _by_token(self, batch: Batch, row: Array, choice: Array) -> Batch:
        collision = np.sum(self.target**2, axis=-1)
        # an arm that is never played has measure zero; its logarithm must not be an infinity
        played = np.where(self.target > 0, self.target, 1.0)
        return replace(
            batch,
            log_ratio=batch.given_ratio[..., None],
            token_mask=np.ones((*batch.reward.shape, 1)),
            log_prob=np.log(played)[row, choice][..., None],
            collision=collision[row][..., None],
            scores=OneTokenScores(batch.scores, batch.reward.ndim),
        )


def by_token(problem: Any) -> Any:
    """The problem for estimators that read tokens: a bandit whose arms have no other length is one of one token."""
    one = type(problem) is BanditProblem and (problem.length is None or bool(np.all(problem.length == 1)))
    return OneTokenBandit(**{f.name: getattr(problem, f.name) for f in fields(problem)}) if one else problem


def _side_by_side(table: Array) -> Array:
    # (M, G, K) -> (G, M K)
    return np.moveaxis(table, 0, 1).reshape(table.shape[1], -1)


def _drawn(table: AliasTable, rng: np.random.Generator, shape: tuple[int, ...], row: Array) -> Array:
    return table.draw(words(rng, shape, table.bits), row)


LARGEST_LOG_RATIO = 340.0
"""nats; beyond, squares of ratios leave the range of doubles"""


def require_support(name: str, target: Array, recorded: Array, sampled: Array) -> None:
    """Refuse probability zero where the target is not zero or something is sampled, and ratios beyond any number.

    `target`, `recorded` and `sampled` are same -> nothing.
    """
    broken = (recorded == 0) & ((target > 0) | (sampled > 0))
    if np.any(broken):
        index = tuple(int(i) for i in np.argwhere(broken)[0])
        value = float(np.broadcast_to(target, recorded.shape)[index])
        raise InputError(
            f"{place(name, index)}: 0 where target is {value!r}: the ratio is infinite; "
            "give it a positive probability, or set target to 0 there"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.log(target) - np.log(recorded)
    if np.any(log_ratio > LARGEST_LOG_RATIO):
        index = tuple(int(i) for i in np.argwhere(log_ratio > LARGEST_LOG_RATIO)[0])
        raise InputError(
            f"{place(name, index)}: {float(recorded[index])!r} makes a ratio of e^{log_ratio[index]:.0f}, whose square "
            f"is no double; keep ratios below e^{LARGEST_LOG_RATIO:.0f}"
        )
