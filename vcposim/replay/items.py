"""What containers give: a record, or rows of a columnar file by the block; and words for what is wrong with one."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vcposim.errors import InputError

LISTED = (list, np.ndarray)
"""what a list of numbers comes as: JSON's own, or a view of a column"""


class Item(NamedTuple):
    """One record, or what is wrong in its place."""

    path: str
    place: str
    """line, row or item, as a reader counts them"""
    record: dict[str, Any] | InputError


class Lists(NamedTuple):
    """A column of k lists of numbers, none of them null."""

    values: np.ndarray
    ends: np.ndarray
    """(k + 1,) list i is values[ends[i] : ends[i + 1]]"""

    @property
    def flat(self) -> np.ndarray:
        """The numbers of all lists after each other: (m,)."""
        return self.values[self.ends[0] : self.ends[-1]]

    @property
    def size(self) -> np.ndarray:
        """How many numbers each list has: (k,)."""
        return self.ends[1:] - self.ends[:-1]


Column = Lists | np.ndarray | list[Any]
"""of a columnar file: lists of numbers, numbers without a null, or whatever else as Python values"""


class Block(NamedTuple):
    """Rows of a columnar file after each other, column by column."""

    path: str
    first: int
    """number of its first row, as a reader counts them"""
    rows: int
    columns: dict[str, Column]
    source: Sequence[Item] = ()
    """the records that it was made of, where it was"""

    @property
    def places(self) -> list[str]:
        """Where each row stands."""
        if self.source:
            return [item.place for item in self.source]
        return [f"row {k}" for k in range(self.first, self.first + self.rows)]

    def part(self, start: int, stop: int) -> "Block":
        """The rows from `start` up to `stop`, counted from 0 in this block."""
        part = {
            name: Lists(x.values, x.ends[start : stop + 1]) if isinstance(x, Lists) else x[start:stop]
            for name, x in self.columns.items()
        }
        return Block(self.path, self.first + start, stop - start, part, self.source[start:stop])

    def items(self) -> Iterator[Item]:
        """Its rows one by one; a list of numbers is a view of its column."""
        if self.source:
            yield from self.source
            return
        columns = []
        for x in self.columns.values():
            if isinstance(x, Lists):
                columns.append([x.values[a:b] for a, b in itertools.pairwise(x.ends.tolist())])
            else:
                columns.append(x.tolist() if isinstance(x, np.ndarray) else x)
        for k in range(self.rows):
            record = {name: column[k] for name, column in zip(self.columns, columns, strict=True)}
            yield Item(self.path, f"row {self.first + k}", record)


@dataclass
class Wanted:
    """The columns a columnar file has to deliver; None until the reader has seen the first record and decides."""

    names: set[str] | None = None
    seen: set[tuple[Any, Any]] = field(default_factory=set)
    """(step, sample) already read, where ranks write the same samples"""


CUT_OFF = "cut off"
"""reason of a record that is not all there: the last one of a file that was not written to its end"""


class BadRecord(InputError):
    """Something wrong with one record; `reason` says what without its value, for counting."""

    reason = ""


def broken(message: str, reason: str) -> BadRecord:
    """A `BadRecord` with its reason."""
    error = BadRecord(message)
    error.reason = reason
    return error


def kind(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    names |= {complex: "complex number", np.complex128: "complex number", np.complex64: "complex number"}
    return names.get(type(value), "list" if hasattr(value, "__len__") else "number")


def one_line(text: Any) -> str:
    """Without line breaks."""
    return " ".join(str(text).split())
