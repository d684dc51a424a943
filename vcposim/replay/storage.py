"""What grows with the file, kept on disk beyond a quarter of a megabyte, so that memory does not.

    NumberColumn    numbers, appended as they come; an array afterwards, mapped from a file without a name
    Stored          strings and other JSON values, likewise; a sequence afterwards
    Codes           distinct values -> 0, 1, ... in order of appearance

Pages of a mapped file count as memory of the process from when they are touched until it lets go of them. So loops over
a whole column go by `pieces`, and whoever has picked rows of one out of order calls `forget`. Pieces have one size
whatever the file was read in: sums over them are the same for any container.
"""

import array
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import tempfile
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from typing import IO, Any, overload

import numpy as np

from vcposim.errors import InputError

IN_MEMORY = 1 << 18
"""bytes of a column that are held in memory"""
PIECE = 1 << 16
"""rows that are looked at together"""
MOST_KEYS, MOST_TEXT = 1 << 16, 8 << 20
"""distinct values, and letters of them, that are held as they are"""


class _Bytes:
    """Bytes that are appended: in memory first, then in a temporary file without a name."""

    def __init__(self) -> None:
        self.size = 0
        self.waiting = bytearray()
        self.file: IO[bytes] | None = None

    def append(self, data: bytes) -> None:
        self.size += len(data)
        self.waiting += data
        if len(self.waiting) > IN_MEMORY:
            self.flush()

    def flush(self) -> None:
        with _disk():
            if self.file is None:
                self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as its bytes
            rest = memoryview(bytes(self.waiting))
            while rest:
                rest = rest[self.file.write(rest) :]
        self.waiting.clear()

    def read(self, start: int, stop: int) -> bytes:
        if self.file is None:
            return bytes(self.waiting[start:stop])
        if self.waiting:
            self.flush()
        self.file.seek(start)
        return self.file.read(stop - start)


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"temporary files: {tempfile.gettempdir()} cannot hold the numbers of a large file ({error.strerror}); "
            "free some space there, or name another folder in TMPDIR"
        ) from None


class NumberColumn:
    """Numbers of one type, appended."""

    def __init__(self, kind: str = "d"):
        self.kind, self.bytes = np.dtype(kind), _Bytes()

    def __len__(self) -> int:
        return self.bytes.size // self.kind.itemsize

    def extend(self, values: Sequence[float] | np.ndarray) -> None:
        """More of them, (k,)."""
        self.bytes.append(np.asarray(values, dtype=self.kind).tobytes())

    def array(self) -> np.ndarray:
        """All of them: (n,); nothing is appended afterwards."""
        if self.bytes.file is None:
            return np.frombuffer(self.bytes.waiting, dtype=self.kind)
        self.bytes.flush()
        return _mapped(self.bytes.file, (len(self),), self.kind)


def _mapped(file: IO[bytes], shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """A file as an array; the pages are the file's own, so that none is lost by letting go of it."""
    return np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=kind).reshape(shape)


def empty(shape: int | tuple[int, ...], kind: str = "d") -> np.ndarray:
    """An array of zeros to be filled, in memory or in a file: (...)."""
    shape = shape if isinstance(shape, tuple) else (shape,)
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    if size <= IN_MEMORY:
        return np.zeros(shape, kind)
    with _disk(), tempfile.TemporaryFile() as file:  # mapped, it outlives its handle
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a page that the disk has no room for would end the process
        else:
            file.truncate(size)
        return _mapped(file, shape, kind)


def forget(*columns: np.ndarray | None) -> None:
    """Let go of the pages of mapped columns; they are read again when they are needed."""
    for column in columns:
        base: Any = column
        while isinstance(base, np.ndarray):
            base = base.base
        base = base.obj if isinstance(base, memoryview) else base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


def give_back() -> None:
    """Let go of memory that is free already, which glibc keeps for later: to be asked between two kinds of work."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def pieces(*columns: np.ndarray, rows: np.ndarray | range | None = None) -> Iterator[tuple[np.ndarray, ...]]:
    """Columns (n,) side by side, `PIECE` rows at a time: of all, or of `rows` (k,) in that order."""
    for start in range(0, len(columns[0] if rows is None else rows), PIECE):
        here: Any = slice(start, start + PIECE)
        if rows is not None:
            some = rows[here]
            if not isinstance(some, range):  # all over the file: the pages of one column at a time
                yield tuple(picked(column, some) for column in columns)
                continue
            here = slice(some.start, some.stop)
        yield tuple(column[here] for column in columns)
        forget(*columns)


def numbered(*columns: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """The same of all rows, with the number of the first row of each."""
    first = 0
    for piece in pieces(*columns):
        yield first, piece
        first += len(piece[0])


def picked(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Entries of a column: (n,), (...) -> (...)."""
    found: np.ndarray = column[rows]
    forget(column)
    return found


def largest(column: np.ndarray) -> float:
    """Of a column (n,)."""
    return max(float(x.max()) for (x,) in pieces(column))


def heaviest(column: np.ndarray, most: int) -> np.ndarray:
    """Rows of the largest values of a column (n,), descending, the first of equal ones first: at most `most`."""
    rows, values = np.zeros(0, dtype=np.int64), np.zeros(0)
    for first, (x,) in numbered(column):
        here = np.argsort(-x, kind="stable")[:most]
        rows, values = np.concatenate([rows, first + here]), np.concatenate([values, x[here]])
        best = np.argsort(-values, kind="stable")[:most]
        rows, values = rows[best], values[best]
    return rows


def counts(code: np.ndarray, least: int = 0) -> np.ndarray:
    """How often each of the codes 0, 1, ... comes up: (n,) -> (g,), as `numpy.bincount`."""
    found = np.zeros(least, dtype=np.int64)
    for (x,) in pieces(code):
        more = np.bincount(x)
        found, more = (found, more) if found.size >= more.size else (more, found)
        found[: more.size] += more
    return found


def distinct(*columns: np.ndarray, key: Any, rows: np.ndarray | range | None = None) -> np.ndarray:
    """Distinct values of `key`, a function of columns (n,), ascending: (k,)."""
    found = np.zeros(0, dtype=np.int64)
    waiting: list[np.ndarray] = []
    size = 0
    for x in pieces(*columns, rows=rows):
        waiting.append(_unique(np.array(key(*x))))
        size += waiting[-1].size
        if size > max(found.size, 1 << 18):
            found, waiting, size = _unique(np.concatenate([found, *waiting])), [], 0
    return _unique(np.concatenate([found, *waiting]))


def _unique(values: np.ndarray) -> np.ndarray:
    """Distinct ones, ascending, of an array that is not needed any more: (n,) -> (k,)."""
    # numpy's own hashes whole numbers, and takes fifty times as long over multiples of one number
    if values.dtype.kind == "f":
        return np.unique(values)
    values.sort()
    return values[np.concatenate([[True], values[1:] != values[:-1]])[: values.size]]


def coded(*columns: np.ndarray, key: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct values of `key`, a function of columns, in order of appearance, the row in which each comes up first,
    and the code of each row: (k,), (k,), (n,)."""
    n = len(columns[0])
    values = distinct(*columns, key=key)
    first = np.full(values.size, n, dtype=np.int64 if n >= 1 << 31 else np.int32)
    for start, x in numbered(*columns):
        here, row = np.unique(key(*x), return_index=True)
        at = np.searchsorted(values, here)
        first[at] = np.minimum(first[at], start + row)
    order = np.argsort(first)
    first, rank = first[order], np.empty(values.size, dtype=np.int32)
    rank[order] = np.arange(values.size, dtype=np.int32)
    code = empty(n, "i4")
    for start, x in numbered(*columns):
        code[start : start + len(x[0])] = rank[np.searchsorted(values, key(*x))]
        forget(code)
    del rank
    return values[order], first, code


def by_code(code: np.ndarray, size: np.ndarray) -> np.ndarray | range:
    """Rows in the order of their code (n,), and of the file within one; `size` (g,) is how often each comes up."""
    n = len(code)
    last, ordered = 0, True
    for (x,) in pieces(code):
        ordered = ordered and int(x[0]) >= last and not (np.diff(x) < 0).any()
        last = int(x[-1])
    if ordered:
        return range(n)
    free = np.cumsum(size) - size
    found = empty(n, "i8" if n >= 1 << 31 else "i4")
    for first, (x,) in numbered(code):
        order = np.argsort(x, kind="stable")
        here, starts, count = np.unique(x[order], return_index=True, return_counts=True)
        within = np.arange(x.size) - np.repeat(starts, count)
        found[np.repeat(free[here], count) + within] = first + order
        free[here] += count
        forget(found)
    return found


class Stored(Sequence[Any]):
    """Strings, numbers, None and tuples of these, appended; a piece of them is taken apart again for one."""

    def __init__(self, values: Sequence[Any] = ()):
        self.bytes = _Bytes()
        self.ends, self.offsets = array.array("q"), array.array("q")
        self.last: tuple[int, list[Any]] | None = None
        for start in range(0, len(values), 1024):
            self.extend(values[start : start + 1024])

    def extend(self, values: Sequence[Any]) -> None:
        """More of them, a piece: few enough to be taken apart for one."""
        if len(values):
            self.ends.append(len(self) + len(values))
            self.bytes.append(json.dumps(values).encode())
            self.offsets.append(self.bytes.size)

    def some(self, rows: np.ndarray) -> list[Any]:
        """Those of `rows` (k,), in that order; each piece is taken apart once."""
        found: list[Any] = [None] * len(rows)
        for k in np.argsort(rows, kind="stable").tolist():
            found[k] = self[int(rows[k])]
        return found

    def take(self, rows: np.ndarray) -> "Stored":
        """Those of `rows` (k,), stored again."""
        found = Stored()
        for start in range(0, len(rows), PIECE):
            several = self.some(rows[start : start + PIECE])
            for k in range(0, len(several), 1024):
                found.extend(several[k : k + 1024])
        return found

    def _piece(self, k: int) -> list[Any]:
        if self.last is None or self.last[0] != k:
            values = json.loads(self.bytes.read(self.offsets[k - 1] if k else 0, self.offsets[k]))
            self.last = k, [_hashable(value) for value in values]
        return self.last[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __iter__(self) -> Iterator[Any]:
        for k in range(len(self.ends)):
            yield from self._piece(k)

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Any]: ...
    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = int(i) + (len(self) if i < 0 else 0)
        if not 0 <= i < len(self):
            raise IndexError(f"entry {i} of {len(self)}")
        k = bisect_right(self.ends, i)
        return self._piece(k)[i - (self.ends[k - 1] if k else 0)]


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


class Codes:
    """Distinct values -> 0, 1, ... in order of appearance.

    The first ones are kept in a dictionary. Where there are many, 64 bits of a cryptographic hash stand for each, 12
    bytes with its code, and the values themselves are `Stored`: of ten million values two share one with probability
    3e-6.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, int] = {}
        self.letters = 0
        self.kinds: set[type] = set()
        self.stored: Stored | None = None
        self.key = np.zeros(0, dtype=np.uint64)
        self.code = np.zeros(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.known) if self.stored is None else len(self.stored)

    def __contains__(self, value: Hashable) -> bool:
        if self.stored is None:
            return value in self.known
        return bool(self.key[self._slot(_hashed(value))])

    def codes(self, values: Sequence[Hashable]) -> list[int]:
        """The code of each."""
        if self.stored is not None:
            return self._hashed_codes(values)
        known, before = self.known, len(self.known)
        found = [known.setdefault(value, len(known)) for value in values]
        if len(known) > before:
            new = [value for value in dict.fromkeys(values) if known[value] >= before]
            self.letters += sum(_letters(value) for value in new)
            self.kinds.update(map(type, new))
            if len(known) > MOST_KEYS or self.letters > MOST_TEXT:
                values, self.known = list(self.known), {}
                self.stored = Stored()
                for start in range(0, len(values), 1024):
                    self._hashed_codes(values[start : start + 1024])
        return found

    def _hashed_codes(self, values: Sequence[Hashable]) -> list[int]:
        assert self.stored is not None
        code: dict[Hashable, int] = {}
        new: list[Hashable] = []
        for value in dict.fromkeys(values):
            if 4 * (len(self.stored) + len(new)) >= 3 * self.key.size:
                self._grow()
            key = _hashed(value)
            at = self._slot(key)
            if not self.key[at]:
                self.key[at], self.code[at] = key, len(self.stored) + len(new)
                new.append(value)
            code[value] = int(self.code[at])
        self.stored.extend(new)
        self.kinds.update(map(type, new))
        return [code[value] for value in values]

    def _slot(self, key: int) -> int:
        """Where a key is, or the free place for it."""
        at, mask = key & (self.key.size - 1), self.key.size - 1
        while (found := int(self.key[at])) and found != key:
            at = (at + 1) & mask
        return at

    def _grow(self) -> None:
        key, code = self.key[self.key > 0], self.code[self.key > 0]
        size = max(2 * self.key.size, 1 << 18)
        self.key, self.code = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.int32)
        at = key & np.uint64(size - 1)
        while key.size:
            # of those that want one free place the last is written, and the others go on to the next
            free = self.key[at] == 0
            self.key[at[free]], self.code[at[free]] = key[free], code[free]
            left = self.key[at] != key
            key, code, at = key[left], code[left], (at[left] + np.uint64(1)) & np.uint64(size - 1)

    @property
    def written_twice(self) -> list[int | float]:
        """Numbers whose text is a value of its own."""
        if str not in self.kinds or not self.kinds & {int, float}:
            return []
        return [value for value in self.values() if isinstance(value, int | float) and str(value) in self]

    def values(self) -> Sequence[Any]:
        """All of them, in order of their codes."""
        return list(self.known) if self.stored is None else self.stored

    def final(self) -> Sequence[Any]:
        """The same where nothing will be looked up any more: the table goes."""
        found, self.known, self.stored = self.values(), {}, None
        self.key, self.code = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int32)  # a slice would hold all of it
        return found


def _letters(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(map(_letters, value))
    return len(value) if isinstance(value, str) else 1


def _hashed(value: Hashable) -> int:
    """64 bits that equal values share (1 and 1.0 are equal); never 0."""
    parts = value if isinstance(value, tuple) else (value,)
    text = repr([int(x) if isinstance(x, float) and x.is_integer() else x for x in parts])
    text += "," * isinstance(value, tuple)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
