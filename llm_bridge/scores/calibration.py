"""Which exact norm is fastest for a layer, here, now: measured, never assumed.

Counting multiplications says "Gram when T (rows + cols) < rows cols", but the winner also depends on how well the
device multiplies matrices with a short inner dimension, on its cache and on the cost of a launch, and flips between
machines. So each method is timed once per (device, dtype, shape, route) on random operands of a few trajectories, in
CPU time on a single thread, and the fastest is remembered for the life of the process. T is rounded to a quarter
octave so that batches of varying length share measurements, and a very wide layer is timed on a band of it.

The choice can differ between runs, and with it the last bits of a norm. Where bits must repeat (resume tests), name
one method: `ScoreTape(model, method="block")`.
"""

import math
import time
from collections.abc import Set
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from llm_bridge.scores.fused import fused_sq_norms, half_gram_sq_norms, kernel_takes
from llm_bridge.scores.layout import Layout
from llm_bridge.scores.norms import (
    Recent,
    Scratch,
    batch_sq_norms,
    block_sq_norms,
    gram_sq_norms,
)
from llm_bridge.scores.routes import KERNEL, RUNS, WHOLE, Affine, General, Line, Route
from llm_bridge.scores.sketch import Sketch, sketch_sq_norms

Choice = tuple[str, int]
METHODS = ("block", "batch", "gram", "fused")
BLOCK_SIZES = (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
KEPT = 8
"""times the smaller operand's memory that blocks may take instead of operands"""
_TRAJECTORIES, _BAND, _REPEATS = 4, 2048, 3


class Workspace:
    """What a pass reuses from layer to layer: working memory, the last input's Gram matrices, the sketch's signs.

    split: parameters of which ranks hold parts, with signs of their own: what ranks draw for whole ones must agree,
    however many parts each has.
    """

    def __init__(
        self,
        columns: int = 16,
        generator: torch.Generator | None = None,
        compiled: bool = True,
        split: Set[nn.Parameter] = frozenset(),
        apart: torch.Generator | None = None,
    ) -> None:
        self.scratch, self.gram, self.half_gram = Scratch(), Recent(2), Recent(2)
        whole, parts = generator or torch.Generator().manual_seed(0), apart or torch.Generator().manual_seed(1)
        self._sketch, self._parts = Sketch(columns, whole, compiled), Sketch(columns, parts, compiled)
        self._split = split

    def sketch(self, weight: nn.Parameter) -> Sketch:
        """The signs for a weight."""
        return self._parts if weight in self._split else self._sketch


def take(
    choice: Choice, weight: nn.Parameter, left: Tensor, right: Tensor, layout: Layout, route: Route, work: Workspace
) -> Tensor:
    """Squared norms of left^T right, one a trajectory: (N, out), (N, into) -> (n,).

    By `choice`: block with entries, or another method with the way that sums come where it makes none: WHOLE, RUNS or
    KERNEL. The route gets the instantiated blocks or, where there are none, the operands.
    """
    method, how = choice
    if method == "kept":
        block = left.new_empty(layout.n, left.shape[1], right.shape[1])
        route.blocks(weight, block)
        return fused_sq_norms(left, right, layout, None, work.scratch, block)
    if method in ("block", "batch", "fused"):
        sink = route.sink(weight)
        if method == "fused":
            norm = fused_sq_norms(left, right, layout, sink, work.scratch)
        elif method == "batch":
            norm = batch_sq_norms(left, right, layout, sink, work.scratch)
        else:
            norm = block_sq_norms(left, right, layout, sink, work.scratch, how)
        if sink is not None:
            return norm
    route.matrix(weight, left, right, layout, how)  # first: it brings the operands into cache
    if method == "gram":
        return gram_sq_norms(left, right, layout, work.gram)
    if method == "half gram":
        return half_gram_sq_norms(left, right, layout, work.half_gram)
    if method == "sketch":
        return sketch_sq_norms(left, right, layout, work.sketch(weight), work.scratch)
    return norm


def fastest(method: str, left: Tensor, right: Tensor, layout: Layout, route: Route, sketched: bool = False) -> Choice:
    """The choice for a layer, `left` (rows, out) and `right` (rows, into), and a route that asks for so many sums.

    sketched: an estimate will do.
    """
    rows, cols = left.shape[1], right.shape[1]
    limit = 1 << (22 if left.device.type == "cpu" else 26)
    fits = layout.owner is None and layout.n * rows * cols <= limit
    steps = _rounded(max(1, left.shape[0] // layout.n))
    shape = (route.run >= 2, steps, min(rows, _BAND), min(cols, _BAND), min(2, math.ceil(route.sinks)), route.keeps)
    compiled = kernel_takes(left.device, left.dtype)
    small = layout.n * max(rows, cols) <= KEPT * len(left)
    return _fastest(method, fits, compiled, small, sketched, left.device, left.dtype, torch.get_num_threads(), *shape)


@lru_cache(maxsize=4096)
def _fastest(method: str, fits: bool, compiled: bool, small: bool, sketched: bool, *key: Any) -> Choice:
    options = candidates(method, fits, compiled, key[-1], small, sketched)
    return options[0] if len(options) == 1 else min(options, key=lambda choice: seconds(choice, *key))


def candidates(
    method: str, fits: bool, compiled: bool, keeps: bool = False, small: bool = False, sketched: bool = False
) -> list[Choice]:
    """The choices that `method` leaves; "batch" only where all trajectories' blocks fit in memory, "fused" only where
    the kernel is `compiled` for such operands. Where the route `keeps` things for any coefficients, these are blocks if
    they are `small`, at most `KEPT` times the memory of the smaller operand (the larger may be one that other maps hold
    as well); else operands, whose product torch or the kernel forms.

    A named method has one, so that its bits repeat: a clock decides for "auto" alone.

    >>> candidates("gram", False, False)
    [('gram', 1)]
    """
    by_kernel = [KERNEL] if compiled and keeps else []
    if sketched:
        ways = [("sketch", how) for how in (RUNS, *by_kernel)]
        return ways if method == "auto" else ways[-1:] if method == "fused" else ways[:1]
    block, batch = [("block", size) for size in BLOCK_SIZES], [("batch", WHOLE)] if fits else []
    one_pass = [("fused", KERNEL)] if compiled else []
    named = {
        "block": block[2:3],
        "batch": batch or block[2:3],
        "fused": one_pass or block[2:3],
        "gram": [("gram", RUNS)],
    }
    if method in named:
        return named[method]
    # sums in runs took 0.46 to 1.11 of the time of whole ones at 60 shapes, on one thread of a CPU (2026-11-29)
    half = [("half gram", how) for how in (by_kernel or [RUNS]) + [WHOLE]] if compiled else []
    kept = [("kept", WHOLE)] if by_kernel and small else []
    torchs = [("fused", WHOLE)] if by_kernel else []
    return [*block, *batch, *one_pass, *torchs, *half, *kept, ("gram", WHOLE), ("gram", RUNS)]


@lru_cache(maxsize=4096)
def seconds(
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    paired: bool,
    steps: int,
    rows: int,
    cols: int,
    sinks: int,
    keeps: bool,
) -> float:
    """Best of a few timings of one layer's norms and sums on `device`."""
    del threads  # part of the key only
    layout = Layout(_TRAJECTORIES, (_TRAJECTORIES, steps))
    own = torch.Generator(device).manual_seed(0)  # measuring must not move the stream that a sampler draws from
    shapes = ((_TRAJECTORIES * steps, d) for d in (rows, cols))
    left, right = (torch.randn(shape, generator=own, device=device, dtype=dtype) for shape in shapes)
    weight = nn.Parameter(torch.empty(rows, cols, device=device, dtype=dtype))
    place = torch.arange(_TRAJECTORIES, device="cpu")
    reward = (place // 2 if paired else place) % 2 + (0.1 * place if sinks > 1 else 0)
    line = Line.of(reward, torch.ones_like(place), _TRAJECTORIES)
    best = math.inf
    for _ in range(1 + _REPEATS):
        route = Affine(layout, line) if sinks else General(layout) if keeps else Route(layout)
        work, weight.grad = Workspace(), None
        start = _clock(device)
        take(choice, weight, left, right, layout, route, work)
        if keeps:
            route.finish(torch.ones(_TRAJECTORIES, device=device))
        best = min(best, _clock(device) - start)
    return best


def _rounded(steps: int) -> int:
    """The nearest quarter octave.

    >>> [_rounded(steps) for steps in (1, 7, 64, 100, 130, 1000)]
    [1, 7, 64, 96, 128, 1024]
    """
    unit = max(1, 2 ** (steps.bit_length() - 3))
    return unit * round(steps / unit)


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
