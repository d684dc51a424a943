"""What a graph does with the rows of a batch by an index, as far as its nodes tell.

A model may sort its rows by length, deal them to buckets, or put pictures where the data says. In a pass that is
compared with autograd they may happen to be in order; so a pass whose indices do what none did before is compared too.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


def moves(nodes: Sequence[Any], names: Sequence[str]) -> frozenset[Hashable]:
    """What indices along the first axis do, in the graph of these nodes: the kind of each, and a hash.

    Rows in order, and tokens picked row after row, are no move.
    """
    picks = _PICKS.keys() & set(names)
    found = (_PICKS[name](node) for node, name in zip(nodes, names, strict=True) if name in picks)
    return frozenset(move for move in found if move is not None)


def _digest(node: Any, index: Tensor) -> Hashable:
    if index.dtype == torch.bool:
        index = index.flatten(1).sum(1) if index.dim() > 1 else index.nonzero().squeeze(1)
    elif index.dim() == 1 and torch.equal(index, torch.arange(len(index), device=index.device)):
        return None
    return node.name(), tuple(index.shape), hash(index.cpu().numpy().tobytes())


def _of_indices(node: Any) -> Hashable:
    first, *others = node._saved_indices
    if first is None:
        return None
    tokens = first.dim() == 1 and first.dtype != torch.bool and any(x is not None for x in others)
    return None if tokens and bool((first[1:] >= first[:-1]).all()) else _digest(node, first)


def _of_index(node: Any) -> Hashable:
    axis = node._saved_dim if node._saved_dim < 1 << 63 else node._saved_dim - (1 << 64)  # told without a sign
    if axis > 0:
        return None
    index: Tensor = node._saved_indices if hasattr(type(node), "_saved_indices") else node._saved_index
    dims = len(node._saved_self_sym_sizes) if hasattr(type(node), "_saved_self_sym_sizes") else index.dim()
    return _digest(node, index) if axis in (0, -getattr(node, "_saved_source_dim", dims)) else None


def _of_any(node: Any) -> Hashable:
    return _digest(node, node._saved_mask if hasattr(type(node), "_saved_mask") else node._saved_index)


def _of_axes(node: Any) -> Hashable:
    return node.name() if 0 in node._saved_dims else None


_PICKS: dict[str, Callable[[Any], Hashable]] = {
    f"{name}Backward0": read
    for read, names in {
        _of_indices: ("Index", "IndexPut"),
        _of_index: (
            *("IndexSelect", "IndexAdd", "IndexCopy", "IndexReduce", "Gather", "Scatter", "ScatterAdd"),
            *("ScatterReduce", "Sort", "Topk"),
        ),
        _of_any: ("MaskedScatter", "MaskedSelect", "Take", "Put"),
        _of_axes: ("Flip", "Roll", "Rot90"),
    }.items()
    for name in names
}
