"""Calls on some of the rows: a model that runs on a chunk of the batch after the other, or a head that a loss runs so.

The arrays of such a call hold the rows of its chunk and do not say which. They are kept until the backward has come
past all chunks, and are put together in the order in which the forward made the calls. That this is the order of
trajectories is believed, as it is of the rows of a whole batch, and seen to by the same comparison with autograd.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_bridge.scores.layout import Layout
from llm_bridge.scores.norms import Loan


class Place(NamedTuple):
    """When a call was made: in which call of the model, and after how many others of its parts."""

    model: int
    part: int


class Piece(NamedTuple):
    """What a call on some of the rows reports: its output gradients (rows, time, ..., d) and what belongs to them."""

    name: str
    place: Place | None
    """None inside a reentrant checkpoint, where calls are made again in the order of the backward"""
    arrays: tuple[Tensor, ...]
    rest: Any = None
    may_be_all: bool = True
    """whether it can hold all rows; false for one look-up that all rows might share"""
    loans: tuple[Loan, ...] = ()
    """of the arrays, which wait"""

    def rows(self, dims: int) -> int:
        """How many rows it has among pieces of so many axes; one axis less is one row without its axis."""
        return self.arrays[0].shape[0] if self.arrays[0].dim() == dims else 1


def gathered(pieces: Sequence[Piece], layout: Layout) -> list[Piece] | None:
    """Pieces of all rows, one for each time that the calls have gone through them; None where they do not add up."""
    if any(piece.place is None for piece in pieces):
        return None
    pieces = sorted(pieces, key=lambda piece: piece.place or ())
    for lanes in _lanes(pieces, *layout.lead):
        whole = [_joined(lane, *layout.lead) for lane in lanes]
        if all(piece is not None for piece in whole):
            return [piece for piece in whole if piece is not None]
    return None


def _lanes(pieces: Sequence[Piece], rows: int, steps: int) -> Iterator[list[list[Piece]]]:
    """Ways to deal pieces to passes through all rows: by the model's calls, or one pass after the other."""
    calls: dict[int, list[Piece]] = {}
    for piece in pieces:
        calls.setdefault(piece.place.model if piece.place else 0, []).append(piece)
    if len(calls) > 1 and len({len(call) for call in calls.values()}) == 1:
        yield [list(lane) for lane in zip(*calls.values(), strict=True)]
    dims = max(piece.arrays[0].dim() for piece in pieces)
    for target in (rows * steps, rows) if dims == 2 else (rows,):
        lanes, due = list[list[Piece]](), 0
        for piece in pieces:
            if due == 0:
                lanes.append([])
                due = target
            lanes[-1].append(piece)
            due -= piece.rows(dims)
        if due == 0:
            yield lanes
    if len(pieces) % rows == 0:
        yield [list(pieces[start : start + rows]) for start in range(0, len(pieces), rows)]


def _joined(lane: Sequence[Piece], rows: int, steps: int) -> Piece | None:
    """One piece of all rows: chunks of rows, of tokens (N, d), or one (time, d) a row; shorter ones are padded."""
    first = lane[0]
    if len(lane) == 1 and not first.may_be_all:
        return None
    dims = max(piece.arrays[0].dim() for piece in lane)
    count = sum(piece.rows(dims) for piece in lane)
    if dims == 2 and count not in (rows, rows * steps):
        dims, count = 3, len(lane)
    elif dims == 2 and any(piece.arrays[0].dim() < 2 for piece in lane):
        return None
    if dims > 2 and (count != rows or any(piece.arrays[0].dim() < dims - 1 for piece in lane)):
        return None
    parts = [[x.unsqueeze(0) for x in piece.arrays] if piece.arrays[0].dim() < dims else piece.arrays for piece in lane]
    if dims > 2:
        time = max(part[0].shape[1] for part in parts)
        parts = [[F.pad(x, (*[0] * (2 * x.dim() - 3), time - x.shape[1])) for x in part] for part in parts]
    sides = list(zip(*parts, strict=True))
    if any(x.shape[1:] != side[0].shape[1:] for side in sides for x in side):
        return None
    return Piece(first.name, first.place, tuple(torch.cat(side) for side in sides), first.rest)
