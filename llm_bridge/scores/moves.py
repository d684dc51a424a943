"""What a graph does with the rows of a batch by an index, as far as its nodes tell.

A model may sort its rows by length, deal them to buckets, or put pictures where the data says. In a pass that is
compared with autograd they may happen to be in order; so a pass whose indices do what none did before is compared too.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


def moves(nodes: Sequence[Any], names: Sequence[str], rows: int) -> frozenset[Hashable]:
    """What indices along the first axis do, in the graph of these nodes: the kind of each, and a hash.

    No move are rows in order; tokens picked once, row after row, unless they are as many as `rows`; the same put back;
    and what is put there without a gradient. Two choices, each in order, are two parts of a batch in another.
    """
    kinds = _KINDS.keys() & set(names)
    found = [(node, *_KINDS[name]) for node, name in zip(nodes, names, strict=True) if name in kinds]
    picked, put, out = list[Hashable](), list[tuple[Hashable, Hashable]](), set[Hashable]()
    for node, read, source in found:
        if source is not None and node.next_functions[source][0] is None:
            continue
        index = read(node)
        if index is None:
            continue
        place = tuple(x.cpu().numpy().tobytes() for x in index)
        move = node.name(), hash(place)
        whole = _is_range(index[0])
        if not _ascends(index) or (source is None and len(index[0]) == rows and not whole):
            out.add(move)
        elif source is None and not (whole and len(index[0]) == rows):
            picked.append(place)
        elif source is not None and not whole:
            put.append((place, move))
    if len({*picked}) > 1:
        out.add(hash(tuple(picked)))  # which part comes when
    return frozenset(out.union(move for place, move in put if place not in picked))


_Index = tuple[Tensor, ...]
"""positions along the first axis, or the first two: (k,) each"""


def _is_range(x: Tensor) -> bool:
    return torch.equal(x, torch.arange(len(x), device=x.device))


def _ascends(index: _Index) -> bool:
    """Whether positions come in order, row after row, and none twice."""
    if len(index) == 1:
        return bool((index[0][1:] > index[0][:-1]).all())
    row, step = (x.diff() for x in index)
    return bool(((row > 0) | ((row == 0) & (step > 0))).all())


def _of_mask(mask: Tensor) -> _Index:
    """Of a `mask` (row, ...) or (token,): where it is true, by row and step."""
    return mask.flatten(2)[..., 0].nonzero(as_tuple=True) if mask.dim() > 2 else mask.nonzero(as_tuple=True)


def _of_indices(node: Any) -> _Index | None:
    first, *others = node._saved_indices
    if first is None:
        return None
    if first.dtype in (torch.bool, torch.uint8):
        return _of_mask(first)
    second = others[0] if others else None
    if first.dim() != 1 or (second is not None and second.shape != first.shape):
        return (first.flatten(),)
    return (first,) if second is None else (first, second)


def _of_index(node: Any) -> _Index | None:
    axis = node._saved_dim if node._saved_dim < 1 << 63 else node._saved_dim - (1 << 64)  # told without a sign
    if axis > 0:
        return None
    index: Tensor = node._saved_indices if hasattr(type(node), "_saved_indices") else node._saved_index
    dims = len(node._saved_self_sym_sizes) if hasattr(type(node), "_saved_self_sym_sizes") else index.dim()
    if axis not in (0, -getattr(node, "_saved_source_dim", dims)):
        return None
    return (index.flatten(1)[:, 0] if index.dim() > 1 and _alike(index) else index.flatten(),)


def _alike(index: Tensor) -> bool:
    """Whether an index (row, ...) says the same of all that a row holds."""
    flat = index.flatten(1)
    return bool((flat == flat[:, :1]).all())


def _of_axes(node: Any) -> _Index | None:
    return (torch.tensor([1, 0]),) if 0 in node._saved_dims else None


def _of_flat(node: Any) -> _Index | None:
    return (node._saved_index.flatten(),)


_KINDS: dict[str, tuple[Callable[[Any], _Index | None], int | None]] = {
    f"{name}Backward0": (read, source)
    for read, source, names in (
        (_of_indices, None, ("Index",)),
        (_of_indices, 1, ("IndexPut",)),
        (_of_index, None, ("IndexSelect", "Gather", "Sort", "Topk")),
        (_of_index, 1, ("IndexAdd", "IndexCopy", "IndexReduce", "Scatter", "ScatterAdd", "ScatterReduce")),
        (lambda node: _of_mask(node._saved_mask), None, ("MaskedSelect",)),
        (lambda node: _of_mask(node._saved_mask), 1, ("MaskedScatter",)),
        (_of_flat, None, ("Take",)),
        (_of_flat, 1, ("Put",)),
        (_of_axes, None, ("Flip", "Roll", "Rot90")),
    )
    for name in names
}
"""of operators: how to read the index, and which of their inputs is put in its places; None where rows are picked"""
