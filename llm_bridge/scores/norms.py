"""||left_i^T right_i||^2 for every trajectory i: five ways to one number (an estimate of it: `sketch`).

The weight gradient of a linear map is left^T right, with `left` the rows of one operand (say the output gradients)
and `right` the rows of the other (the inputs). Per trajectory its squared norm is

    sum_ab (sum_t left_ta right_tb)^2                     instantiated: form the block, square it ("block", "batch")
    = sum_ts <left_t, left_s> <right_t, right_s>          Gram matrices, the "ghost" norm ("gram")

An instantiated block lies in cache when it has just been squared, and adding it to one or two weight-gradient sums
there (`Sink`) costs next to nothing: that is what makes the affine route exact without a second backward. Gram
matrices win for trajectories short against the layer's width. Which is faster is measured, see `calibration`.

Ghost norms: Goodfellow, arXiv 1510.01799; sequences: Li et al., arXiv 2110.05679. Squares accumulate in at least
float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llm_bridge.scores.layout import Layout
from vcposim.errors import InputError

Step = tuple[int, float, bool]
CANCELLED = 1e-2
"""a norm from Gram matrices that is smaller than so much of the product of theirs is taken another way"""


@dataclass(frozen=True, eq=False)
class SumPlan:
    """Which sums of trajectories' blocks are wanted: sum_k = sum_i factor_ki block_i, the same of every weight."""

    factor: Tensor
    row: tuple[tuple[float, ...], ...]
    """the factors of each sum"""
    step: Sequence[Sequence[Step]]
    """what each trajectory enters, see `sink_plan`"""

    @classmethod
    def of(cls, factor: Tensor) -> "SumPlan":
        """From `factor` (m, n)."""
        return cls(factor, tuple(map(tuple, factor.tolist())), sink_plan(factor))


NO_SUMS = SumPlan(torch.empty(0, 0), (), ())


class Sink:
    """One weight's sums, to which its blocks are added.

    Buffers come uninitialized; the first trajectory of a sum overwrites, which saves a pass over memory.
    """

    def __init__(self, buffer: Sequence[Tensor], sums: SumPlan) -> None:
        self.buffer, self.sums = buffer, sums
        for total, row in zip(buffer, sums.row, strict=True):
            if not any(row):
                total.zero_()

    def add(self, i: int, target: Sequence[Tensor], block: Tensor) -> None:
        """Add trajectory i's `block` (rows, cols) to `target`, the part of each buffer it covers; i comes in order."""
        for k, factor, first in self.sums.step[i]:
            if first:
                torch.mul(block, factor, out=target[k])
            else:
                target[k].add_(block, alpha=factor)

    def set(self, block: Tensor) -> None:
        """All at once: `block` (n, rows, cols)."""
        total = self.sums.factor.to(block.device, block.dtype) @ block.flatten(1)
        for buffer, row in zip(self.buffer, total, strict=True):
            buffer.copy_(row.view_as(buffer))


def sink_plan(factor: Tensor) -> list[list[Step]]:
    """For each trajectory of `factor` (m, n) the sums it enters: (sum, factor, whether it is that sum's first).

    >>> sink_plan(torch.tensor([[2.0, 0.0, 3.0], [0.0, 4.0, 5.0]]))
    [[(0, 2.0, True)], [(1, 4.0, True)], [(0, 3.0, False), (1, 5.0, False)]]
    """
    first = [next((i for i, f in enumerate(row) if f), -1) for row in factor.tolist()]
    each = factor.t().tolist()
    return [[(k, f, i == first[k]) for k, f in enumerate(column) if f] for i, column in enumerate(each)]


class Loan(NamedTuple):
    """An array of somebody else's that is kept as it is, and the version it had."""

    array: Tensor
    version: int

    @classmethod
    def of(cls, array: Tensor) -> "Loan":
        """Of `array` (...) as it is now."""
        return cls(array, array._version)

    def back(self) -> Tensor:
        """The array, -> (...). Raises InputError if it was written to since, as autograd does of what it saved."""
        if self.array._version != self.version:
            raise InputError(
                f"ScoreTape: an input or output gradient of shape {tuple(self.array.shape)} was written to after the "
                "tape kept it, by the next batch in its place or by an operator that reuses memory; write after "
                "`backward`, to a copy, or use ScoreTape(model, method='loop')"
            )
        return self.array


class Copied:
    """Room for an operand that a kernel copies into its own order, and the one that lies there.

    Query, key and value (gate and up) read the same input one after the other: it is copied once.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0)
        # Holding the operand keeps its memory from being reused, so an equal address means an equal array.
        self._last: tuple[Tensor, Layout, tuple[object, ...]] | None = None

    def room(self, x: Tensor, layout: Layout, size: int, reuse: bool) -> tuple[Tensor, bool]:
        """Room for a copy of x (N, d) in `size` numbers, (any,), and whether the copy is there; else it is to be made.

        reuse: whether what is made now will be the whole of it.
        """
        same = (*_identity(x), size)
        if self._last is not None and self._last[1] is layout and self._last[2] == same:
            return self._room, True
        if self._room.numel() < size or self._room.dtype != x.dtype:
            self._room = x.new_empty(size)
        self._last = (x, layout, same) if reuse else None
        return self._room, False


class Scratch:
    """One working array per dtype, reused from layer to layer: fresh memory costs page faults."""

    def __init__(self) -> None:
        self._array: dict[torch.dtype, Tensor] = {}
        self.copied = Copied()

    def take(self, size: int, like: Tensor) -> Tensor:
        """Uninitialized numbers, valid until the next call: (size,)."""
        return self.at_least(size, like)[:size]

    def at_least(self, size: int, like: Tensor) -> Tensor:
        """So many or more of them: (any,)."""
        array = self._array.get(like.dtype)
        if array is None or array.numel() < size:
            array = self._array[like.dtype] = like.new_empty(size)
        return array


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which squares and weight-gradient sums accumulate: float32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def square_sum(x: Tensor) -> Tensor:
    """Sum of squares of everything, in `sum_dtype`: (...) -> ()."""
    flat = x.reshape(-1)
    if flat.dtype != sum_dtype(flat.dtype):  # widened inside the reduction, without a copy
        return torch.linalg.vector_norm(flat, dtype=sum_dtype(flat.dtype)).square()
    return torch.dot(flat, flat)


def square_sums(x: Tensor) -> Tensor:
    """Sum of squares of each row, in `sum_dtype`: (n, d) -> (n,)."""
    if x.dtype != sum_dtype(x.dtype):
        return torch.linalg.vector_norm(x, dim=1, dtype=sum_dtype(x.dtype)).square()
    return torch.linalg.vecdot(x, x)


def block_sq_norms(
    left: Tensor, right: Tensor, layout: Layout, sink: Sink | None, scratch: Scratch, size: int
) -> Tensor:
    """Exact norms from blocks of about `size` entries: (N, out), (N, in) -> (n,).

    Each is squared and handed to the sink while in cache.
    """
    rows, cols = left.shape[1], right.shape[1]
    height = band_height(rows, cols, size)
    right_each, square, plain = layout.split(right), [], left.dtype == sum_dtype(left.dtype)
    for top in range(0, rows, height):
        band = slice(top, min(rows, top + height))
        flat = scratch.take((band.stop - top) * cols, left)
        block = flat.view(-1, cols)
        target = [] if sink is None else [total[band] for total in sink.buffer]
        for i, (left_i, right_i) in enumerate(zip(layout.split(left[:, band]), right_each, strict=True)):
            torch.mm(left_i.t(), right_i, out=block)
            square.append(torch.dot(flat, flat) if plain else square_sum(flat))
            if sink is not None:
                sink.add(i, target, block)
    return torch.stack(square).view(-1, layout.n).sum(0)


def band_height(rows: int, cols: int, size: int) -> int:
    """Rows of a block of about `size` entries that cuts (rows, cols) into equal bands.

    >>> [band_height(864, 320, size) for size in (1 << 14, 1 << 16, 1 << 17, 1 << 20)]
    [51, 216, 432, 864]
    """
    bands = max(1, min(rows // 16, round(rows * cols / size)))
    return -(-rows // bands)


def batch_sq_norms(left: Tensor, right: Tensor, layout: Layout, sink: Sink | None, scratch: Scratch) -> Tensor:
    """Exact norms from all trajectories' blocks at once: (N, out), (N, in) -> (n,).

    Few launches, n times the weight's memory.
    """
    n, rows, cols = layout.n, left.shape[1], right.shape[1]
    block = scratch.take(n * rows * cols, left).view(n, rows, cols)
    torch.bmm(_by_trajectory(left, n).mT, _by_trajectory(right, n), out=block)
    if sink is not None:
        sink.set(block)
    return square_sums(block.flatten(1))


def gram_sq_norms(left: Tensor, right: Tensor, layout: Layout, recent: "Recent") -> Tensor:
    """Exact norms from the trajectories' T x T Gram matrices: (N, out), (N, in) -> (n,).

    A weight-shaped array is never formed.
    """
    kind = sum_dtype(left.dtype)
    if layout.owner is None:
        first, second = ([recent.of(x, lambda x: _gram(x, layout.n).flatten(1).to(kind))] for x in (left, right))
    else:
        first, second = ([(x @ x.t()).flatten().to(kind) for x in layout.split(side)] for side in (left, right))
    return of_grams(first, second, left, right, layout)


def of_grams(first: Sequence[Tensor], second: Sequence[Tensor], left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    """Norms <first_i, second_i> from Gram matrices of the operands: `left` (N, out), `right` (N, in) -> (n,).

    first, second: the trajectories' flat Gram matrices, all in one array or an array each. The sum's terms have both
    signs. Where they cancel to less than a hundredth, as gradients that add up to nothing do on inputs that have much
    in common, the product is formed after all. On a CPU: elsewhere to ask would stall the queue of launches.
    """

    def dots(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        return torch.linalg.vecdot(x[0], y[0]) if x[0].dim() == 2 else torch.stack(list(map(torch.dot, x, y)))

    square = dots(first, second)
    if left.device.type == "cpu":
        sizes = dots(first, first) * dots(second, second)  # of eighth order, and so the first to vanish
        for i in ((square < CANCELLED * sizes.sqrt()) | (sizes < 1e-36)).nonzero().flatten().tolist():
            square[i] = square_sum(layout.split(left)[i].t() @ layout.split(right)[i])
    return square


def _gram(x: Tensor, n: int) -> Tensor:
    rows = _by_trajectory(x, n)
    return torch.bmm(rows, rows.mT)


class Recent:
    """A function's last few values: query, key and value (gate and up) read the same input one after the other."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        # Holding the operand itself keeps its memory from being reused, so an equal address means an equal array.
        self._last: list[tuple[Tensor, tuple[object, ...], Tensor]] = []

    def of(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(x), remembered for the `keep` most recently used x: x (...) -> (*any)."""
        same = _identity(x)
        for i, (_, of, _) in enumerate(self._last):
            if of == same:
                self._last.append(self._last.pop(i))
                return self._last[-1][2]
        self._last = [*self._last[len(self._last) + 1 - self.keep :], (x, same, function(x))]
        return self._last[-1][2]


def _identity(x: Tensor) -> tuple[object, ...]:
    """What is equal for two views of one array, as long as that is alive and nobody has written to it since."""
    return (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)


def _by_trajectory(x: Tensor, n: int) -> Tensor:
    return x.view(n, -1, x.shape[1])


def embedding_sq_norms(token: Tensor, grad: Tensor, layout: Layout, vocabulary: int) -> Tensor:
    """Exact norms of an embedding's gradient: (N,), (N, d) -> (n,).

    Rows of the same token in the same trajectory add up first.
    """
    owner = layout.per_row(torch.arange(1, layout.n + 1, device=token.device), token.numel()).squeeze(1)
    key, place = torch.unique(owner * vocabulary + token, return_inverse=True)
    grad = grad.to(sum_dtype(grad.dtype))
    total = grad.new_zeros(key.numel(), grad.shape[1]).index_add_(0, place, grad)
    norm = grad.new_zeros(layout.n + 1).index_add_(0, key // vocabulary, total.square().sum(1))
    return norm[1:]


def head_at_token(left: Sequence[Tensor], token: Sequence[Tensor]) -> list[Tensor]:
    """Output gradients of a head at the trajectory's own input tokens, (S, T) each: all that the cross term needs."""
    return [left_i.index_select(1, token_i) for left_i, token_i in zip(left, token, strict=True)]


def tied_cross_term(at_token: Sequence[Tensor], hidden: Sequence[Tensor], grad: Sequence[Tensor]) -> Tensor:
    """<g_embedding, g_head> of a weight used as both, sum_st left_s[token_t] <hidden_s, grad_t>: (n,)."""
    kind = sum_dtype(torch.promote_types(hidden[0].dtype, grad[0].dtype))
    return torch.stack(
        [
            (at.to(kind) * (hidden_i.to(kind) @ grad_i.to(kind).t())).sum()
            for at, hidden_i, grad_i in zip(at_token, hidden, grad, strict=True)
        ]
    )
