"""Many records -> their numbers at once, the same that `RecordReader.read` finds in each one.

Rows of columnar files come as blocks of columns; short records of JSON lines are put into such blocks. Plain are
numbers, strings and lists of numbers in which nothing is wrong, one of each a trajectory. What is not, or may not be,
is for `read` to say, record by record: it is the slow twin that the tests compare with, to the last bit.
"""

import contextlib
import itertools
import math
import struct
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from vcposim.replay.checks import moments
from vcposim.replay.items import Block, Column, Item, Lists
from vcposim.replay.names import BESIDE, TRAJECTORY
from vcposim.replay.records import LARGEST, ROUNDING, RecordReader, Rows, doubles


class NotPlain(Exception):
    """A block holds something that has to be looked at record by record."""


def block_of(items: Sequence[Item]) -> Block | None:
    """Records of one file as a block; None where they have not all the same names, or lists of anything but numbers."""
    records: list[dict[str, Any]] = [item.record for item in items if isinstance(item.record, dict)]
    names = records[0].keys()
    if not all(record.keys() == names for record in records):
        return None
    try:
        columns = {name: _column([record[name] for record in records]) for name in names}
    except NotPlain:
        return None
    return Block(items[0].path, 1, len(items), columns, items)


def _column(values: list[Any]) -> Column:
    """Lists of numbers after each other, as doubles; numbers as an array; any other values as they are."""
    kinds = {*map(type, values)}
    if kinds == {list}:
        numbers = list(itertools.chain.from_iterable(values))
        try:
            flat = np.frombuffer(doubles(len(numbers)).pack(*numbers))
        except struct.error:
            raise NotPlain from None
        # packing takes false for 0: booleans are taken as such where they are all there is
        zero = flat == 0
        if zero.any() and bool in {*map(type, map(numbers.__getitem__, zero.nonzero()[0].tolist()))}:
            if not (zero | (flat == 1)).all():
                raise NotPlain
            flat = flat.astype(bool)
        return Lists(flat, np.cumsum([0, *map(len, values)]))
    if kinds <= {int, float}:
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=np.int64 if kinds == {int} else np.float64)
    return values


def read_block(reader: RecordReader, block: Block) -> Rows | None:
    """The numbers of all rows; None where one of them is not plain."""
    try:
        rows = _rows(reader, block)
    except NotPlain:
        return None
    reader.records += block.rows
    return rows


def _rows(reader: RecordReader, block: Block) -> Rows:
    columns, mapping, n = reader.columns, reader.columns.mapping, block.rows
    if columns.watched.intersection(block.columns) or {"sample_mask", *BESIDE}.intersection(mapping):
        raise NotPlain
    nothing = [math.nan] * n
    rows = Rows(block.path, log_ratio=nothing, norm=nothing, reference=nothing, mixed=[False] * n)
    rows.place = block.places
    grouped = columns.group_columns or [mapping[name] for name in ("group",) if name in mapping]
    if columns.group_size is not None:
        rows.label = [k // columns.group_size for k in range(reader.records, reader.records + n)]
    elif not grouped:
        rows.label = [k + 1 for k in range(reader.records, reader.records + n)]
    elif not columns.group_columns and columns.layout is not None and columns.layout.group_suffixes:
        raise NotPlain
    else:
        parts = [_names(block, name) for name in grouped]
        rows.label = parts[0] if len(parts) == 1 else list(zip(*parts, strict=True))
    rows.reward = _numbers(block, mapping["reward"]).tolist() if "reward" in mapping else nothing
    if columns.norm_source != "length":
        norm = _numbers(block, mapping[columns.norm_source])
        if norm.min() < 0:
            raise NotPlain
        rows.norm = norm.tolist()
    rows.marks = {name: _names(block, column) for name, (column, _) in columns.slice_columns.items()}
    if "trajectory" in mapping:
        rows.marks[TRAJECTORY] = _names(block, mapping["trajectory"])
    names = ("log_ratio",) if "log_ratio" in mapping else ("log_prob", "behavior_log_prob")
    if reader.kinds == (True,) * len(names):
        _add_tokens(reader, block, names, rows)
    elif reader.kinds == (False,) * len(names):
        first, *other = (_numbers(block, mapping[name]) for name in names)
        length = _numbers(block, mapping["length"])
        if length.min() < 1 or (length % 1).any() or (other and max(first.max(), other[0].max()) > ROUNDING):
            raise NotPlain
        if other:
            reader.sums += moments(length, first)
        rows.log_ratio, rows.length = (first - other[0] if other else first).tolist(), length.tolist()
    else:
        raise NotPlain
    return rows


def _add_tokens(reader: RecordReader, block: Block, names: Sequence[str], rows: Rows) -> None:
    """Lengths, and the tokens that count."""
    columns, mapping = reader.columns, reader.columns.mapping
    lists = [_lists(block, mapping[name]) for name in names]
    size = counted = lists[0].size
    tokens = [one.flat for one in lists]
    if not {x.dtype.kind for x in tokens} <= set("fiu") or (size != lists[-1].size).any():
        raise NotPlain
    if "mask" in mapping:
        mask = _lists(block, mapping["mask"])
        keep = mask.flat == 1
        if (mask.size != size).any() or not (keep | (mask.flat == 0)).all():
            raise NotPlain
        counted = np.diff(np.concatenate([[0], np.cumsum(keep)])[mask.ends - mask.ends[0]])
        tokens = [x[keep] for x in tokens]
    else:
        said = [mapping["length"]] if "length" in mapping else []
        said += [columns.other_length] if columns.other_length in block.columns else []
        if any((_numbers(block, column) != size).any() for column in said):
            raise NotPlain
    rows.size, rows.length = counted.tolist(), counted.tolist()
    rows.beside = [{}] * block.rows
    rows.learner = [tokens[0]]
    rows.sampler = [tokens[1] if len(tokens) == 2 else np.zeros(tokens[0].size)]
    reader.listed += lists[0].flat.size
    reader.masked_tokens += lists[0].flat.size - tokens[0].size


def _lists(block: Block, name: str) -> Lists:
    column = block.columns.get(name)
    if not isinstance(column, Lists):
        raise NotPlain
    return column


def _numbers(block: Block, name: str) -> np.ndarray:
    """A column of finite numbers, as doubles."""
    column = block.columns.get(name)
    if not isinstance(column, np.ndarray) or column.dtype.kind not in "fiu":
        raise NotPlain
    found = column.astype(np.float64)
    if not (np.abs(found) <= LARGEST).all():
        raise NotPlain
    return found


def _names(block: Block, name: str) -> list[Hashable]:
    """A column of whole numbers or strings."""
    column = block.columns.get(name)
    if isinstance(column, np.ndarray) and column.dtype.kind in "iu":
        return column.tolist()  # type: ignore[no-any-return]
    if not isinstance(column, list) or not {*map(type, column)} <= {str, int}:
        raise NotPlain
    return column
