"""A cheap estimate of ||left_i^T right_i||^2, unbiased and not exact.

The d columns of an operand are signed at random and added up in K buckets: x S, where each row of S (d, K) has one
sign and E S S^T = 1 (CountSketch; Charikar, Chen & Farach-Colton, ICALP 2002). Both operands are, independently:

    E ||S_l^T left^T right S_r||^2 = ||left^T right||^2,        relative variance at most about 4 / K

That costs an addition an entry, where random signs in every entry of S would cost K, at the same variance. K is twice
the `columns` asked for, rounded up to a power of two.
"""

import torch
from torch import Tensor

from llm_bridge.scores.fused import LEAST, fold, folded_sq_norms, kernel_takes
from llm_bridge.scores.layout import Layout
from llm_bridge.scores.norms import Recent, Scratch, batch_sq_norms, square_sum

_DRAW = 1 << 14


class Sketch:
    """Random signs and buckets of columns; layers that read the same input get the same ones, as if they were one wide
    layer."""

    def __init__(self, columns: int, generator: torch.Generator, compiled: bool = True) -> None:
        self.compiled = compiled
        """whether the kernel may be used, where there is one; its last bits are not those of torch's products"""
        self.buckets = max(LEAST, 1 << (2 * columns - 1).bit_length())
        self.generator, self.at_once, self._recent = generator, _DRAW, Recent(1)
        self._sign, self._turn, self._at = torch.empty(0), torch.empty(0, dtype=torch.int32), 0

    def remembered(self, x: Tensor) -> Tensor:
        """`folded`(x) again if x is the last input again: (N, d) -> (N, buckets)."""
        return self._recent.of(x, self.folded)

    def folded(self, x: Tensor) -> Tensor:
        """x S for a fresh S: (N, d) -> (N, buckets)."""
        sign, turn = self.drawn(x)
        if self.takes(x):
            return fold(x, sign, turn)
        # column j of a block goes to bucket j xor the block's turn
        bucket = torch.arange(self.buckets, device=x.device) ^ turn[:, None]
        spread = torch.zeros(*sign.shape, self.buckets, device=x.device, dtype=x.dtype)
        spread.scatter_(2, bucket[..., None].long(), sign[..., None])
        return x @ spread.flatten(0, 1)[: x.shape[1]]

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel is used for an operand `x` (N, d)."""
        return self.compiled and kernel_takes(x.device, x.dtype)

    def drawn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh signs of the columns of `x` (N, d) and turns of their blocks: (blocks, buckets), (blocks,)."""
        blocks = -(-x.shape[1] // self.buckets)
        # cut from a larger draw: on an accelerator every draw is a row of launches
        if len(self._turn) < self._at + blocks or self._sign.dtype != x.dtype:
            self._draw(max(blocks, self.at_once // self.buckets), x)
        mine = slice(self._at, self._at + blocks)
        self._at = mine.stop
        return self._sign[mine], self._turn[mine]

    def _draw(self, blocks: int, like: Tensor) -> None:
        shape, where = (blocks, self.buckets), self.generator.device
        word = torch.randint(0, 2 * self.buckets, shape, generator=self.generator, device=where, dtype=torch.int32)
        self._sign = (1 - 2 * (word & 1)).to(like.device, like.dtype)
        self._turn, self._at = (word[:, 0] >> 1).to(like.device), 0


def sketch_sq_norms(left: Tensor, right: Tensor, layout: Layout, sketch: Sketch, scratch: Scratch) -> Tensor:
    """Unbiased estimates of the norms: `left` (N, out), `right` (N, in) -> (n,)."""
    other = sketch.remembered(right)
    if sketch.takes(left):
        return folded_sq_norms(left, *sketch.drawn(left), other, layout)
    first = sketch.folded(left)
    if layout.owner is None:
        return batch_sq_norms(first, other, layout, None, scratch)
    pairs = zip(layout.split(first), layout.split(other), strict=True)
    return torch.stack([square_sum(first_i.t() @ other_i) for first_i, other_i in pairs])
