"""Trust, but verify: one trajectory's norm, and the gradient along a random direction, against plain autograd.

A tape believes that row i of an activation is trajectory i. A model that permutes rows, sorts the batch or lays time
first breaks that belief without an error. One ordinary backward of one trajectory knows nothing of rows: what it says
of every parameter's norm, the tape must have said. The gradient is compared along a random direction, so that nothing
of its size is kept twice.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llm_bridge.scores.norms import square_sum
from vcposim.errors import InputError

EVERY = 100
"""passes from one check to the next"""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""relative, by the coarsest type an output gradient came in"""
_FLOOR = 1e-3
_WHY = "its rows are not trajectories one by one (permuted, sorted, time first, or mixed)"


def ordinary(out: Tensor, seed: Tensor, params: Sequence[Tensor], reentrant: bool) -> list[Tensor | None]:
    """Plain gradients of sum(seed out); the graph survives and p.grad is left alone.

    Reentrant checkpointing admits only a backward into p.grad, which is put aside meanwhile.
    """
    if not reentrant:
        return list(torch.autograd.grad(out, params, seed, retain_graph=True, allow_unused=True))
    aside = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        torch.autograd.backward(out, seed, retain_graph=True)
        return [p.grad for p in params]
    finally:
        for p, kept in zip(params, aside, strict=True):
            p.grad = kept


def squares(grads: Sequence[Tensor | None]) -> list[float]:
    """||g||^2 of each, 0 where there is none."""
    return [0.0 if g is None else float(square_sum(g.float() if g.dtype == torch.float16 else g)) for g in grads]


def check_norms(
    named: Sequence[tuple[str, nn.Parameter]],
    expected: Sequence[float],
    part: Mapping[nn.Parameter, Tensor],
    i: int,
    dtype: torch.dtype,
    advise: Callable[[str], str],
) -> None:
    """Raise InputError if trajectory i's squared norm of any parameter differs from the expected one."""
    whole, worst, told = sum(expected), TOLERANCE[dtype], None
    for (name, p), b in zip(named, expected, strict=True):
        a = float(part[p][i]) if p in part else 0.0
        off = abs(a - b) / (max(a, b) + _FLOOR * whole + 1e-300)
        if not off <= worst:
            worst, told = off, (name, a, b)
    if told is not None:
        name, a, b = told
        raise InputError(
            f"ScoreTape: {name}: squared score norm of trajectory {i} is {a:.6g}, and {b:.6g} by autograd: {_WHY}; "
            f"give the model one trajectory a row, or {advise(name.rpartition('.')[0])}"
        )


class Projection:
    """<p.grad, r> of every parameter for one random r, before and after a tape adds to it."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], seed: int, advise: Callable[[str], str]) -> None:
        self.named, self.seed, self.advise = named, seed, advise
        self.before = self._of([p.grad for _, p in named])

    def _of(self, grads: Sequence[Tensor | None]) -> list[float]:
        found = []
        for k, g in enumerate(grads):
            if g is None:
                found.append(0.0)
                continue
            own = torch.Generator(g.device).manual_seed(self.seed + k)
            wide = torch.promote_types(g.dtype, torch.float32)
            r = torch.randn(g.shape, generator=own, device=g.device, dtype=wide)
            found.append(float((g.to(wide) * r).sum()))
        return found

    def compare(self, expected: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """Raise InputError if what was added differs from `expected` along r."""
        after, right, size = self._of([p.grad for _, p in self.named]), self._of(expected), squares(expected)
        whole, tolerance = sum(size) ** 0.5, 10 * TOLERANCE[dtype]
        for (name, _), a, start, b, square in zip(self.named, after, self.before, right, size, strict=True):
            scale = square**0.5 + _FLOOR * whole + torch.finfo(dtype).eps * abs(start) + 1e-300
            overflown = b - b != 0.0  # a gradient that a GradScaler will find and skip
            if not overflown and not abs(a - start - b) <= tolerance * scale:
                raise InputError(
                    f"ScoreTape: {name}: its gradient along a random direction is {a - start:.6g}, and {b:.6g} by "
                    f"autograd, so p.grad is wrong, take no step: {_WHY}; {self.advise(name.rpartition('.')[0])}"
                )
