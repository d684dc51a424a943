"""What was read from a dump of rollouts: a handful of numbers a trajectory, whatever framework wrote it.

Columns of a large dump are mapped from a file: they are arrays like any other, but a loop over one goes by pieces.

`vcposim.replay.reading.read_dump` makes one.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from vcposim.diagnostics import WeightSums
from vcposim.replay.checks import Finding
from vcposim.replay.storage import Stored, picked, pieces


class Tokens(NamedTuple):
    """The tokens of one trajectory, (t,) each, in nats."""

    row: int
    """which trajectory"""
    log_prob: np.ndarray
    behavior_log_prob: np.ndarray
    beside: dict[str, np.ndarray]
    """what else the file has a token: `anchor_log_prob`, `collision`"""


@dataclass(frozen=True)
class Dump:
    """What a file held: n trajectories, groups coded 0, 1, ... in order of appearance."""

    path: str
    labels: Sequence[Hashable]
    """the file's name of each group"""
    group: np.ndarray
    """(n,) code of the group"""
    reward: np.ndarray
    """(n,) NaN where the file has none"""
    log_ratio: np.ndarray
    """(n,) log pi(tau) - log mu(tau), nats; -inf for weight 0"""
    length: np.ndarray
    """(n,) tokens"""
    score_sq_norm: np.ndarray
    """(n,) ||s_i||^2, or what stands in for it"""
    norm_source: str
    """which field `score_sq_norm` came from"""
    tokens: WeightSums | None
    """sums of token weights (n,), one a trajectory, where log-probabilities were lists"""
    has_group: bool = True
    """False: the file names no groups, and every trajectory stands alone in `group`"""
    has_reward: bool = True
    layout: str = ""
    notes: tuple[str, ...] = ()
    """what was used, and what was left out"""
    findings: tuple[Finding, ...] = ()
    slices: dict[str, tuple[np.ndarray, Sequence[Any]]] = field(default_factory=dict)
    """name -> code (n,) and the value of each code"""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """reason -> places of the records that were left out"""
    kept: tuple[Tokens, ...] = ()
    """tokens of the first groups"""
    reference_log_ratio: np.ndarray | None = None
    """(n,) log pi(tau) - log reference(tau), nats, where the file has the reference's log-probabilities"""
    place: Sequence[str] = ()
    """(n,) where each trajectory (its first row) stands"""

    def select(self, rows: np.ndarray) -> "Dump":
        """The trajectories where `rows` (n,) is true; groups that lose all of theirs go."""
        left = np.unique(self.group[rows])
        code = np.full(len(self.labels), -1)
        code[left] = np.arange(left.size)
        new = np.cumsum(rows) - 1
        taken = self.take(np.flatnonzero(rows))
        return replace(
            taken,
            labels=[self.labels[g] for g in left],
            group=code[taken.group],
            slices={name: (values[rows], names) for name, (values, names) in self.slices.items()},
            kept=tuple(one._replace(row=int(new[one.row])) for one in self.kept if rows[one.row]),
            place=Stored([p for p, here in zip(self.place, rows, strict=False) if here]),
        )

    def take(self, rows: np.ndarray) -> "Dump":
        """The numbers of the trajectories `rows` (k,), and nothing else; groups keep their codes."""
        return replace(
            self,
            tokens=None if self.tokens is None else WeightSums(*(picked(x, rows) for x in self.tokens)),
            reference_log_ratio=None if self.reference_log_ratio is None else picked(self.reference_log_ratio, rows),
            slices={},
            kept=(),
            place=(),
            group=picked(self.group, rows),
            reward=picked(self.reward, rows),
            log_ratio=picked(self.log_ratio, rows),
            length=picked(self.length, rows),
            score_sq_norm=picked(self.score_sq_norm, rows),
        )


def pooled(tokens: WeightSums, rows: np.ndarray | range | None = None) -> WeightSums:
    """Sums over all trajectories, or `rows` (k,) of them, of sums (n,) each, on the largest scale."""
    nothing = np.float64(0)
    found = WeightSums(np.float64(-math.inf), nothing, nothing, nothing)
    for piece in pieces(*tokens, rows=rows):
        scale, count, total, square = piece
        top = scale.max()
        factor = np.exp(scale - (top if top > -math.inf else 0.0))
        found = found.merge(WeightSums(top, count.sum(), (total * factor).sum(), (square * factor * factor).sum()))
    return found
