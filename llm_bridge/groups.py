"""Prompt groups of a flat batch: rows in, `(group, sample)` axes out, and back.

A framework hands over rows in any order, each with the id of its prompt. The kernel wants the responses to one prompt
side by side on the last axis. Ragged groups are padded; which entries are real is said by the measure, never by zeros.

>>> groups = Groups.of(torch.tensor([7, 3, 7, 7]))
>>> groups.lift(torch.tensor([10.0, 20.0, 30.0, 40.0]))
tensor([[20.,  0.,  0.],
        [10., 30., 40.]])
>>> groups.flat(groups.lift(torch.tensor([10.0, 20.0, 30.0, 40.0])))
tensor([10., 20., 30., 40.])
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from vcposim.errors import InputError


@dataclass(frozen=True)
class Groups:
    """Where each row of a flat batch sits in the `(group, sample)` layout; groups are in ascending order of their
    ids."""

    slot: Tensor
    """(n,) index into the flattened (G, N) layout"""
    shape: tuple[int, int]
    """(G, N): groups, and samples of the largest one"""

    @classmethod
    def of(cls, group: Tensor) -> Self:
        """From the integer id of each row's `group` (n,); samples keep the order of their rows.

        Raises `InputError` unless ids are a non-empty vector of integers.
        """
        if group.dim() != 1 or not group.numel() or group.is_floating_point():
            raise InputError(
                f"group: {group.dtype} of shape {tuple(group.shape)}; give one integer id for each row, (n,)"
            )
        _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
        order = torch.argsort(index, stable=True)
        start = count.cumsum(0) - count
        place = torch.empty_like(index)
        place[order] = torch.arange(len(index), device=index.device) - start[index[order]]
        size = int(count.max())
        return cls(index * size + place, (len(count), size))

    def lift(self, x: Tensor) -> Tensor:
        """(n, ...) -> (G, N, ...), zeros where there is no row."""
        out = x.new_zeros((self.shape[0] * self.shape[1], *x.shape[1:]))
        return out.index_copy(0, self.slot, x).unflatten(0, self.shape)

    def flat(self, x: Tensor) -> Tensor:
        """(G, N, ...) -> (n, ...), the inverse of `lift`."""
        return x.flatten(0, 1)[self.slot]
