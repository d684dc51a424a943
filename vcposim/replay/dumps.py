"""What was read from a dump of rollouts: a handful of numbers a trajectory, whatever framework wrote it.

`vcposim.replay.reading.read_dump` makes one.
"""

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

import numpy as np

from vcposim.diagnostics import WeightSums
from vcposim.replay.checks import Finding


class Tokens(NamedTuple):
    """The tokens of one trajectory, (t,) each, in nats."""

    row: int
    """which trajectory"""
    log_prob: np.ndarray
    behavior_log_prob: np.ndarray
    beside: dict[str, np.ndarray]
    """what else the file has a token: `anchor_log_prob`, `collision`"""


class Places(Sequence[str]):
    """Where trajectories stand in the file, a string each; kept in pieces, a tenth of what as many strings take."""

    def __init__(self, places: Sequence[str] = ()):
        self.pieces: list[str] = []
        self.ends: list[int] = []
        self.extend(places)

    def extend(self, places: Sequence[str]) -> None:
        """More of them, a piece: few enough to be taken apart again for one."""
        if places:
            self.ends.append(len(self) + len(places))
            self.pieces.append("\0".join(place.replace("\0", " ") for place in places))

    def take(self, rows: np.ndarray) -> "Places":
        """Those of `rows` (k,), in that order."""
        every = list(self)
        return Places([every[i] for i in rows])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            yield from piece.split("\0")

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i: int | slice) -> str | Sequence[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = int(i) + (len(self) if i < 0 else 0)
        if not 0 <= i < len(self):
            raise IndexError(f"place {i} of {len(self)}")
        piece = bisect_right(self.ends, i)
        return self.pieces[piece].split("\0")[i - (self.ends[piece - 1] if piece else 0)]


@dataclass(frozen=True)
class Dump:
    """What a file held: n trajectories, groups coded 0, 1, ... in order of appearance."""

    path: str
    labels: list[Hashable]
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
    slices: dict[str, tuple[np.ndarray, list[Any]]] = field(default_factory=dict)
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
            place=Places([p for p, here in zip(self.place, rows, strict=False) if here]),
        )

    def take(self, rows: np.ndarray) -> "Dump":
        """The numbers of the trajectories `rows` (k,), and nothing else; groups keep their codes."""
        return replace(
            self,
            tokens=None if self.tokens is None else WeightSums(*(x[rows] for x in self.tokens)),
            reference_log_ratio=None if self.reference_log_ratio is None else self.reference_log_ratio[rows],
            slices={},
            kept=(),
            place=(),
            **{name: getattr(self, name)[rows] for name in ("group", "reward", "log_ratio", "length", "score_sq_norm")},
        )


def pooled(tokens: WeightSums) -> WeightSums:
    """Sums over all trajectories of sums (n,) each, on the largest scale."""
    top = tokens.log_scale.max(initial=-math.inf)
    if top == -math.inf:
        return WeightSums(top, tokens.count.sum(), np.float64(0), np.float64(0))
    factor = np.exp(tokens.log_scale - top)
    return WeightSums(top, tokens.count.sum(), (tokens.total * factor).sum(), (tokens.square * factor * factor).sum())
