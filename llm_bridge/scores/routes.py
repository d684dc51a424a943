"""From coefficients to the gradient -sum_i c_i grad log pi(tau_i), without a second backward.

The norms are known when the backward has reached the embedding; only then can coefficients be computed. What must be
kept until then?

*general*: any c. Keep each layer's input and output gradient, then form left^T diag(c) right. The activations a
backward would free stay alive. Or keep the blocks left_i^T right_i, where they are not large.

*affine*: c_i = u_i + a v_i with u, v known beforehand and the scalar a not (an off-policy optimal baseline b is a =
-b with u = w R, v = w). The gradient is then affine in a too, so two weight-gradient sums suffice. Which two is
free: we take the sums at two anchors a_0, a_1 and interpolate, with anchors where as many coefficients as possible
vanish. For rewards 0 and 1 those are b = 0 and b = 1, each trajectory enters one sum only, and the interpolation at
0 <= b <= 1 cannot cancel. Several groups in one call, c = u + sum_g a_g v_g, take one sum per group and one for u;
when groups are many, give each group its own pass.

Where a trajectory enters one sum only, its factor can go into the objective before the backward (`Line.fold`): the
operands arrive scaled, and neighbors in the batch that enter the same sum share one product. Norms are divided by
the fold.

Vectors (biases, norm scales) and embeddings are small or sparse per trajectory: both routes keep those as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm_bridge.scores.fused import fused_sq_norms
from llm_bridge.scores.layout import Layout
from llm_bridge.scores.norms import Loan, Recent, Scratch, Sink, SumPlan, sum_dtype
from llm_bridge.scores.shards import Giver
from vcposim.errors import InputError

WHOLE, RUNS, KERNEL = 0, 1, 2
"""sums in one product of weighted copies, in a product a run of neighbors with equal weights, or with any weights where
a compiled kernel makes each trajectory's block, which copies nothing"""


def marks(n: int) -> Tensor:
    """Factors of trajectories, undone where layers report or at the end, of 9 kinds, unlike neighbors: -> (n,).

    Two that have changed places are then not what they were, whatever their coefficients. Powers of two, so that a
    compared pass has the bits of any other, and none above 1, where half precision overflows.
    """
    place = torch.arange(n, device="cpu")
    return torch.exp2(-((5 * place + place // 9) % 9).double())


class Route:
    """Keeps what the gradient needs; this base keeps nothing."""

    sinks: float = 0.0
    """how many sums a trajectory's block enters on average; 0: norms only"""
    keeps = False
    """whether any coefficients may follow, for which a matrix' blocks could be kept"""
    run: float = 1.0
    """how many neighbors share a product on average"""
    fold: Tensor | None = None
    """(n,) what the objective of each trajectory is to be multiplied by before the backward"""
    mark: Tensor | None = None
    """(n,) what it is multiplied by in a pass that is compared, until a layer reports (`marks`)"""
    scale: float = 1.0
    """what it is multiplied by besides, against underflow"""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def weighed(self, tokens: Tensor) -> Tensor:
        """The objective whose backward is run, of weighted log-probabilities: (row, time) -> (row, time)."""
        tokens = tokens * self.scale
        for each in (self.fold, self.mark):
            if each is not None:
                factor = each.to(tokens.device, tokens.dtype)
                tokens = tokens * self.layout.per_row(factor, tokens.numel()).view_as(tokens)
        return tokens

    def unweighed(self, squares: Tensor) -> Tensor:
        """Squares as they are without those factors: (n,) -> (n,)."""
        squares = squares / self.scale**2
        return squares if self.fold is None else squares / self.fold.to(squares.device).square().to(squares.dtype)

    def sink(self, param: nn.Parameter) -> Sink | None:
        """SumPlan to add instantiated blocks of this weight to, if the route has any."""
        return None

    def matrix(self, param: nn.Parameter, left: Tensor, right: Tensor, layout: Layout, how: int) -> None:
        """Keep or add up left^T right of a weight without blocks in a sink: `left` (N, out), `right` (N, into).

        `layout` says whose the rows of this weight's operands are; `how` in which of three ways sums are formed, WHOLE,
        RUNS or KERNEL.
        """

    def blocks(self, param: nn.Parameter, block: Tensor) -> None:
        """Keep the per-trajectory gradients `block` (n, *param) of a weight."""
        raise NotImplementedError

    def vector(self, param: nn.Parameter, grad: Tensor) -> None:
        """Keep the per-trajectory gradients `grad` (n, d) of a bias or scale."""

    def embedding(self, param: nn.Parameter, token: Tensor, grad: Tensor) -> None:
        """Keep the output gradients `grad` (N, d) of the embedding of `token` (N,)."""

    def local(self, params: Sequence[nn.Parameter], weighted: Callable[[Tensor], list[Tensor | None]]) -> None:
        """Keep the graph of a module that was looped over: `weighted`(c) is sum_i c_i (its gradients of i)."""

    def check(self, coefficient: Tensor) -> None:
        """Raise `InputError` where `finish` could not take this `coefficient` (n,) or (row, time), and before it has
        added anything."""

    def finish(self, coefficient: Tensor) -> None:
        """Add -sum_i c_i (gradient of trajectory i) to p.grad: `coefficient` (n,), or (row, time) by tokens."""
        raise NotImplementedError


class NormsOnly(Route):
    """No gradient is to follow."""


class Again(Route):
    """Any coefficients by a second backward through the graph, which must have been retained.

    each: log pi of trajectories (n,) or of tokens (row, time), whichever the coefficients will be of.
    """

    def __init__(
        self, layout: Layout, each: Tensor, params: Sequence[nn.Parameter] | None, giver: Giver | None = None
    ) -> None:
        super().__init__(layout)
        self._each, self._params, self._giver = each, params, giver or Giver()

    def finish(self, coefficient: Tensor) -> None:
        """Runs that backward with `coefficient` (n,) or (row, time); `params` None means every leaf of the graph."""
        seed, whole = -coefficient.to(self._each.dtype), [p for p in self._giver.stored if p.requires_grad]
        if not whole:
            return torch.autograd.backward(self._each, seed, inputs=self._params)
        grads = torch.autograd.grad(
            self._each, whole, seed, allow_unused=True
        )  # FSDP2's own would be a mean over ranks
        found = {p: grad for p, grad in zip(whole, grads, strict=True) if grad is not None}
        self._giver.begin(found)
        for p, grad in found.items():
            self._giver.give(p, grad)
        self._giver.settle()


class Kept(Route):
    """Keeps of vectors (biases, norm scales), embeddings and looped modules what they are, for any coefficients."""

    def __init__(self, layout: Layout, giver: Giver | None = None) -> None:
        super().__init__(layout)
        self._giver = giver or Giver()
        self._vector: list[tuple[nn.Parameter, Tensor]] = []
        self._embedding: list[tuple[nn.Parameter, Tensor, Loan]] = []
        self._local: list[tuple[Sequence[nn.Parameter], Callable[[Tensor], list[Tensor | None]]]] = []

    def vector(self, param: nn.Parameter, grad: Tensor) -> None:
        """Keeps `grad` (n, d)."""
        self._vector.append((param, grad))

    def embedding(self, param: nn.Parameter, token: Tensor, grad: Tensor) -> None:
        """Keeps `token` (N,) and `grad` (N, d)."""
        self._embedding.append((param, token, Loan.of(grad)))

    def local(self, params: Sequence[nn.Parameter], weighted: Callable[[Tensor], list[Tensor | None]]) -> None:
        """Keeps it."""
        self._local.append((params, weighted))

    def check(self, coefficient: Tensor) -> None:
        """Raise `InputError` where an array of an embedding's was written to; any `coefficient` (n,) will do."""
        for _, _, loan in self._embedding:
            loan.back()

    def unfolded(self, coefficient: Tensor) -> Tensor:
        """`coefficient` (n,) of operands as they came, scaled and folded; at least float32, or a small one may be 0."""
        coefficient = coefficient.to(torch.promote_types(coefficient.dtype, torch.float32)) / self.scale
        return coefficient if self.fold is None else coefficient / self.fold.to(coefficient)

    def finish(self, coefficient: Tensor) -> None:
        """Add -sum_i c_i (gradient of trajectory i) to p.grad of every parameter kept: `coefficient` (n,)."""
        if self._giver.stored:
            vectors, embeddings = (p for p, _ in self._vector), (p for p, *_ in self._embedding)
            self._giver.begin([*vectors, *embeddings, *(p for ps, _ in self._local for p in ps), *self.matrices()])
            self._finish_rest(coefficient)  # so that a matrix has all that belongs to it when its turn comes
        self.finish_matrices(coefficient)
        if not self._giver.stored:
            self._finish_rest(coefficient)
        self._giver.settle()

    def matrices(self) -> list[nn.Parameter]:
        """Those whose sums, or what makes them, are kept."""
        return []

    def finish_matrices(self, coefficient: Tensor) -> None:
        """The part of `finish` for these: `coefficient` (n,)."""

    def _finish_rest(self, coefficient: Tensor) -> None:
        coefficient = self.unfolded(coefficient)
        of_kind = {kind: -coefficient.to(kind) for kind in {grad.dtype for _, grad in self._vector}}
        for param, grad in self._vector:
            self._giver.give(param, of_kind[grad.dtype] @ grad)
        for param, token, loan in self._embedding:
            grad = loan.back()
            scaled = grad * -self.layout.per_row(coefficient.to(grad.dtype), grad.shape[0])
            if param.grad is None:
                self._giver.give(param, torch.zeros_like(param).index_add_(0, token, scaled.to(param.dtype)))
            else:
                param.grad.index_add_(0, token, scaled.to(param.dtype))
        while self._local:
            params, weighted = self._local.pop()
            for param, found in zip(params, weighted(-coefficient), strict=True):
                if found is not None:  # two parameters may have one array, or one number at every place
                    self._giver.give(param, found.clone(memory_format=torch.contiguous_format))
        self._vector, self._embedding = [], []


class General(Kept):
    """Any coefficients: until they are known, operands of every matrix are kept, or their products.

    Products need no second one to form the gradient; for trajectories long against the layer's width their memory is
    bounded (`calibration.KEPT`).
    """

    keeps = True

    def __init__(self, layout: Layout, giver: Giver | None = None) -> None:
        super().__init__(layout, giver)
        self._matrix: list[tuple[nn.Parameter, Loan, Loan, Layout, int] | tuple[nn.Parameter, Tensor]] = []

    def blocks(self, param: nn.Parameter, block: Tensor) -> None:
        """Keeps `block` (n, *param)."""
        self._matrix.append((param, block))

    def matrix(self, param: nn.Parameter, left: Tensor, right: Tensor, layout: Layout, how: int) -> None:
        """Keeps the operands: `left` (N, out), `right` (N, into)."""
        self._matrix.append((param, Loan.of(left), Loan.of(right), layout, how))

    def matrices(self) -> list[nn.Parameter]:
        """Those whose operands or blocks are kept."""
        return [kept[0] for kept in self._matrix]

    def check(self, coefficient: Tensor) -> None:
        """Raise `InputError` where an operand was written to; any `coefficient` (n,) will do."""
        super().check(coefficient)
        for loan in (x for kept in self._matrix for x in kept if isinstance(x, Loan)):
            loan.back()

    def finish_matrices(self, coefficient: Tensor) -> None:
        """Adds -sum_i c_i s_i of every matrix to its `.grad`, given `coefficient` (n,), and drops what was kept."""
        if self._giver.stored:
            self._matrix.sort(key=lambda kept: -self._giver.place(kept[0]))
        own = self.unfolded(coefficient)
        scaled, scratch = Recent(1), Scratch()  # an input that several maps read is scaled, or copied, once
        sums: SumPlan | None = None
        spread: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}
        while self._matrix:
            kept = self._matrix.pop()
            self._giver.settle(before=kept[0])
            if len(kept) == 2:
                param, block = kept
                self._giver.give(param, -own.to(block.device, block.dtype) @ block.flatten(1))
                continue
            param, left, right, layout, how = kept[0], kept[1].array, kept[2].array, kept[3], kept[4]
            if how == KERNEL:
                if sums is None:
                    sums = SumPlan.of(-own.cpu().unsqueeze(0))
                total = left.new_empty(left.shape[1], right.shape[1])
                fused_sq_norms(left, right, layout, Sink([total], sums), scratch)
                self._giver.give(param, total)
                continue
            key = (id(layout), left.shape[0], left.dtype, left.device)
            if layout is not self.layout or key not in spread:  # most maps share the pass's layout, and so the rows
                spread[key] = -layout.per_row(own.to(left.device, left.dtype), left.shape[0])
            each = spread[key]
            if left.shape[1] < right.shape[1]:
                left = left * each
            else:
                right = scaled.of(right, partial(torch.mul, other=each))
            self._giver.give(param, left.t() @ right)


@dataclass(frozen=True)
class Line:
    """Coefficients c = u + a v (one unknown) or u + sum_g a_g v_g, as known rows `basis` (m, n) of the sums to form.

    basis = fold factor, see `_folded`.
    """

    known: NDArray[np.float64]
    slope: NDArray[np.float64]
    basis: Tensor
    fold: Tensor
    factor: Tensor
    anchor: tuple[float, float] | None

    @classmethod
    def of(cls, known: Tensor, slope: Tensor, n: int) -> "Line":
        """From u, `known` (n,), and v, `slope` (n,) or (groups, n), in float64 on the host.

        Raises `InputError` for arrays of another shape.
        """
        eps = max(torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps for x in (known, slope))
        u, v = (x.detach().to("cpu", torch.float64).numpy() for x in (known, torch.atleast_2d(slope)))
        for name, array, shape in (("u", u, (n,)), ("v", v, (len(v), n))):
            if array.shape != shape or not np.isfinite(array).all():
                raise InputError(
                    f"affine: {name} has shape {array.shape} or is not finite; "
                    f"give finite u ({n},), v ({n},) or (groups, {n})"
                )
        anchor = _anchors(u, v[0], eps) if len(v) == 1 else None
        basis = np.vstack([u, v]) if anchor is None else np.stack([_vanishing(u, v[0], a) for a in anchor])
        fold, factor = map(torch.from_numpy, _folded(basis))
        return cls(u, v, torch.from_numpy(basis), fold, factor, anchor)

    def unknown(self, coefficient: Tensor) -> NDArray[np.float64]:
        """a of the given c: (n,) -> (groups,). Raises InputError when c is off the line, beyond its dtype's steps."""
        c = coefficient.detach().to("cpu", torch.float64).numpy()
        a = np.asarray(np.linalg.lstsq(self.slope.T, c - self.known, rcond=None)[0], np.float64)
        off = np.abs(c - self.known - a @ self.slope)
        scale = np.abs(self.known) + np.abs(a) @ np.abs(self.slope)
        eps = torch.finfo(coefficient.dtype if coefficient.is_floating_point() else torch.float64).eps
        allowed = max(8 * eps, min(1e3 * eps, 1e-4)) * scale
        worst = int(np.argmax(off - allowed))
        if off[worst] > allowed[worst]:
            raise InputError(
                f"coefficient: {float(c[worst]):.6g} of trajectory {worst} is {float(off[worst]):.2g} from u + a v "
                "of score_sq_norms(affine=(u, v)); use the same u and v, or leave affine out"
            )
        return a

    def share(self, a: NDArray[np.float64]) -> list[float]:
        """Factors of the m basis rows that give c at `a` (groups,)."""
        if self.anchor is None:
            return [1.0, *a.tolist()]
        first, second = self.anchor
        s = (float(a[0]) - first) / (second - first)
        return [1.0 - s, s]


class Affine(Kept):
    """Coefficients on a known line: blocks are added to the line's sums at once, and nothing else is kept."""

    def __init__(self, layout: Layout, line: Line, giver: Giver | None = None) -> None:
        super().__init__(layout, giver)
        self.line = line
        self.sinks = float((line.basis != 0).sum()) / max(1, layout.n)
        self.fold = line.fold
        self._sums = SumPlan.of(-line.factor)  # the tape descends: sums carry the minus sign from the start
        runs = [len(_runs(row, [(i, i + 1) for i in range(layout.n)])) for row in self._sums.row]
        self.run = float((line.factor != 0).sum()) / max(1, sum(runs))
        self._sum: list[tuple[nn.Parameter, Sequence[Tensor]]] = []
        self._share: list[float] = []

    def sink(self, param: nn.Parameter) -> Sink:
        """A buffer (k, *param.shape) for the line's k sums of this parameter, which `finish` combines."""
        total = [torch.empty_like(param, dtype=sum_dtype(param.dtype)) for _ in self._sums.row]
        self._sum.append((param, total))
        return Sink(total, self._sums)

    def matrix(self, param: nn.Parameter, left: Tensor, right: Tensor, layout: Layout, how: int) -> None:
        """Adds `left` (N, out) and `right` (N, into) to the line's sums at once, and keeps neither."""
        bounds = layout.bounds(left.shape[0])
        runs = layout.once((self._sums, left.shape[0]), lambda: [_runs(row, bounds) for row in self._sums.row])
        if left.dtype == param.dtype and all(len(run) == 1 for run in runs):
            # Each sum is one product, rounded once as in an ordinary backward: no wider array, no pass to fill it.
            self._sum.append((param, [_product(left, right, *run[0]) for run in runs]))
            return
        total = self.sink(param).buffer
        # Picking out rows asks the device for their number, which would stall an accelerator's queue of launches.
        if how != RUNS and left.device.type == "cpu":
            # One product, of copies without the trajectories whose factor is zero.
            for each, factor in zip(total, self._sums.factor, strict=True):
                x, y, weight = left, right, layout.per_row(factor.to(left.device, left.dtype), left.shape[0])
                keep = factor != 0
                if not bool(keep.all()):
                    row = layout.per_row(keep.to(left.device), left.shape[0]).squeeze(1).nonzero().squeeze(1)
                    x, y, weight = left.index_select(0, row), right.index_select(0, row), weight[row]
                x, y = (x * weight, y) if x.shape[1] < y.shape[1] else (x, y * weight)
                if each.dtype == x.dtype:
                    torch.mm(x.t(), y, out=each)
                else:
                    each.copy_(x.t() @ y)
        else:
            # A product per run of neighbors with equal factors: copies nothing.
            for each, run in zip(total, runs, strict=True):
                if not run:
                    each.zero_()
                for i, (f, rows) in enumerate(run):
                    if each.dtype == left.dtype:
                        torch.addmm(each, left[rows].t(), right[rows], beta=int(i > 0), alpha=f, out=each)
                    elif i == 0:
                        each.copy_(_product(left, right, f, rows))
                    else:
                        each.add_(_product(left, right, f, rows))

    def finish(self, coefficient: Tensor) -> None:
        """Combines the line's sums into `.grad`, given `coefficient` (n,) on the line, which may be rounded."""
        a = self.line.unknown(coefficient)
        self._share = [s / self.scale for s in self.line.share(a)]
        exact = torch.from_numpy(self.line.known + a @ self.line.slope)
        super().finish(exact.to(coefficient.device, torch.promote_types(coefficient.dtype, torch.float32)))

    def matrices(self) -> list[nn.Parameter]:
        """Those whose sums were begun."""
        return [p for p, _ in self._sum]

    def check(self, coefficient: Tensor) -> None:
        """Raise `InputError` for a `coefficient` (n,) off the line."""
        super().check(coefficient)
        self.line.unknown(coefficient)

    def finish_matrices(self, coefficient: Tensor) -> None:
        """Combines the line's sums at the `coefficient` (n,) for which `finish` found the shares."""
        share = self._share
        if self._giver.stored:
            self._sum.sort(key=lambda kept: -self._giver.place(kept[0]))
        while self._sum:
            param, (first, *others) = self._sum.pop()
            self._giver.settle(before=param)
            if len(others) == 1 and share[0] == 1.0 - share[1]:  # one pass over memory
                first.lerp_(others[0], share[1])
            else:
                first.mul_(share[0])
                for other, factor in zip(others, share[1:], strict=True):
                    first.add_(other, alpha=factor)
            self._giver.give(param, first)


def _product(left: Tensor, right: Tensor, factor: float, rows: slice) -> Tensor:
    """factor left^T right of these rows, rounded once."""
    return torch.addmm(left.new_empty(()), left[rows].t(), right[rows], beta=0, alpha=factor)


def _runs(factor: Sequence[float], bounds: list[tuple[int, int]]) -> list[tuple[float, slice]]:
    """Neighboring rows of equal nonzero factors.

    >>> _runs([1.0, 1.0, 0.0, 2.0], [(0, 3), (3, 5), (5, 6), (6, 9)])
    [(1.0, slice(0, 5, None)), (2.0, slice(6, 9, None))]
    """
    runs: list[tuple[float, slice]] = []
    for f, (start, stop) in zip(factor, bounds, strict=True):
        if runs and runs[-1][0] == f and runs[-1][1].stop == start:
            start = runs.pop()[1].start
        if f:
            runs.append((f, slice(start, stop)))
    return runs


def _folded(basis: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(fold (n,), factor (m, n)) with basis = fold factor; a trajectory in one sum only has the common factor there.

    Not folded are trajectories in several sums or none, and factors so small that scaling would cost precision.
    """
    size = np.abs(basis)
    largest = size.max()
    single = ((basis != 0).sum(0) == 1) & (size.max(0) >= 1e-3 * largest)
    fold = np.where(single, basis.sum(0) / (largest or 1.0), 1.0)
    return fold, np.where(single, np.where(basis != 0, largest, 0.0), basis)


def _vanishing(known: NDArray[np.float64], slope: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """u + a v with entries that are zero up to rounding set to zero, so that their blocks are skipped."""
    value = known + a * slope
    return np.where(np.abs(value) <= 4 * np.finfo(np.float64).eps * np.abs(known), 0.0, value)


def _anchors(known: NDArray[np.float64], slope: NDArray[np.float64], eps: float) -> tuple[float, float]:
    """Two values of a at which most coefficients u + a v vanish, at least a percent of the range apart.

    Not two that differ by rounding, `eps` of one: where rewards are all 0.7, every coefficient vanishes at both.
    """
    root = -known[slope != 0] / slope[slope != 0]
    if len(root) == 0:
        return 0.0, 1.0
    value, count = np.unique(root, return_counts=True)
    first = float(value[count.argmax()])
    far = np.abs(value - first)
    apart = far >= max(1e-2 * (value[-1] - value[0]), 1e3 * eps * np.abs(value).max(), 1e-300)
    if not apart.any():
        return first, first + max(1.0, abs(first))
    rank = np.where(apart, count + far / (2 * far.max()), 0)
    return first, float(value[rank.argmax()])
