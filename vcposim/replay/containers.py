"""Any container of rollouts -> records, one at a time, in bounded memory.

    JSON lines, one JSON array, or JSON columns; plain, gz, zst, bz2, xz or lz4; from a file or a pipe (`-`)
    Parquet, Arrow (file, stream, Feather), Hugging Face dataset folders
    PyTorch files (`.pt`), loaded with `weights_only`: a pickle is never executed
    folders and globs of all of these, in natural order: step_2 before step_10

An input is opened once and read forwards. What it is, is decided by its first bytes, never by its name; what it is not
is said by name. A record is a dict; a broken one comes as an `InputError` in its place, for the reader to count. Rows
of a columnar file come as a `Block` of columns, for a reader that can take many at once.

The parser is orjson: 177 MB/s on lists of floats, against 38 (json), 41 (pyarrow.json), 44 (duckdb) and 85 (polars,
which infers one type a column and would turn a stray string into a null); `simulations/bench/rollouts.py` measures it.
orjson knows no NaN and no Infinity, so a line that it refuses goes to the standard library before it is called broken.
"""

import bisect
import contextlib
import io
import itertools
import json
import lzma
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vcposim.errors import InputError
from vcposim.replay.columnar import arrow, parquet
from vcposim.replay.items import CUT_OFF, Block, Item, Wanted, broken, kind, one_line

VALUE_LIMIT = 128 << 20
"""bytes of the largest single JSON value that is held in memory"""
CHUNK = 1 << 20
SHORT = 1 << 12
"""bytes in which counting all colons takes less than looking for one after another"""
DTYPES = [getattr(np.dtypes, f"{name}DType") for name in ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool")]

UNREADABLE: tuple[tuple[bytes, str, str], ...] = (
    (b"\x80\x02", "a pickle", "which could run any code and is never loaded; write JSON lines or Parquet instead"),
    (b"\x80\x03", "a pickle", "which could run any code and is never loaded; write JSON lines or Parquet instead"),
    (b"\x80\x04", "a pickle", "which could run any code and is never loaded; write JSON lines or Parquet instead"),
    (b"\x80\x05", "a pickle", "which could run any code and is never loaded; write JSON lines or Parquet instead"),
    (b"\xff\xfe\0\0", "UTF-32 text", "convert it: iconv -f utf-32 -t utf-8 FILE"),
    (b"\0\0\xfe\xff", "UTF-32 text", "convert it: iconv -f utf-32 -t utf-8 FILE"),
    (b"{\0", "UTF-16 text", "convert it: iconv -f utf-16le -t utf-8 FILE"),
    (b"[\0", "UTF-16 text", "convert it: iconv -f utf-16le -t utf-8 FILE"),
    (b"\0{", "UTF-16 text", "convert it: iconv -f utf-16be -t utf-8 FILE"),
    (b"\0[", "UTF-16 text", "convert it: iconv -f utf-16be -t utf-8 FILE"),
    (b"\xff\xfe", "UTF-16 text", "convert it: iconv -f utf-16 -t utf-8 FILE"),
    (b"\xfe\xff", "UTF-16 text", "convert it: iconv -f utf-16 -t utf-8 FILE"),
    (b"\x93NUMPY", "a NumPy array", "write a dict of columns as JSON lines or Parquet"),
    (b"\x89HDF", "an HDF5 file", "write its tables as Parquet: pandas.read_hdf(FILE).to_parquet(...)"),
    (b"SQLite format 3", "an SQLite database", "write its table as Parquet: pandas.read_sql(...).to_parquet(...)"),
    (b"ORC", "an ORC file", "write it as Parquet: pyarrow.orc.read_table(FILE)"),
    (b"Obj\x01", "an Avro file", "write its records as JSON lines"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"\x89PNG", "a PNG picture", "pass the rollouts themselves"),
    (b":W&B", "a W&B run's own log", "export its history as CSV or Parquet: wandb.Api().run(...).history()"),
    (b"%PDF", "a PDF", "pass the rollouts themselves"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file", "fetch what it points to: git lfs pull"),
    (b"<!doctype", "a web page", "in place of a download that asked for a login or failed; download the file again"),
    (b"<html", "a web page", "in place of a download that asked for a login or failed; download the file again"),
    (b"<?xml", "XML", "as storage answers in place of a file that is not there; download the file again"),
    (b"\x1e", "a JSON text sequence", "whose marks go off with: tr -d '\\036' < FILE"),
)
"""first bytes, what they begin, and the way out"""


@dataclass
class Progress:
    """Bytes and records so far, on a terminal's stderr at most once a second; silent otherwise."""

    shown: bool = field(default_factory=lambda: sys.stderr.isatty())
    bytes: int = 0
    records: int = 0
    total: int = 0
    position: Callable[[], int] | None = None
    """where the file being read is, if it can say"""
    _next: float = field(default_factory=lambda: time.monotonic() + 1)
    _drawn: bool = False

    def tick(self, count: int = 1) -> None:
        """So many more records."""
        self.records += count
        if self.shown and (count > 1 or not self.records % 64) and time.monotonic() > self._next:
            if self.position is not None:
                with contextlib.suppress(ValueError):  # it was closed
                    self.bytes = self.position()
            of = f" of {self.total / 1e6:,.0f}" if self.total else ""
            sys.stderr.write(f"\r{self.records:,} rollouts, {self.bytes / 1e6:,.0f}{of} MB")
            sys.stderr.flush()
            self._next, self._drawn = time.monotonic() + 1, True

    def done(self) -> None:
        """Wipe the line."""
        if self._drawn:
            sys.stderr.write("\r" + " " * 60 + "\r")


STEP_IN_NAME = re.compile(r"(?:^|[/_.-])(?:(?:global_)?step|iter(?:ation)?)[=_-]?(\d+)")
"""the training step in a file's or folder's name: step_3, global_step_3, step=3 (a partition), iter_0000003"""


def read_items(files: Sequence[str], wanted: Wanted, progress: Progress) -> Iterator[Item | Block]:
    """All records of the files, in order; a record learns `step` from `STEP_IN_NAME` if it says none itself."""
    progress.total = sum(Path(f).stat().st_size for f in files if f != "-" and Path(f).is_file())
    for name in files:
        steps = [int(step) for step in STEP_IN_NAME.findall(name)]
        with _opened(name) as raw:
            for one in _records(name, raw, wanted, progress):
                if isinstance(one, Block):
                    if steps:
                        one.columns.setdefault("step", np.full(one.rows, steps[-1]))
                    progress.tick(one.rows)
                    yield one
                    continue
                place, record = one
                if steps and isinstance(record, dict):
                    record.setdefault("step", steps[-1])
                progress.tick()
                yield Item(name, place, record)


def read_records(name: str) -> Iterator[Item]:
    """The records of one file, one by one."""
    for one in read_items([name], Wanted(), Progress(shown=False)):
        if isinstance(one, Block):
            yield from one.items()
        else:
            yield one


@contextlib.contextmanager
def _opened(name: str) -> Iterator[Any]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(name, "rb", buffering=0)  # noqa: SIM115 - closed below, after the records are read
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({one_line(error)}); check its name and permissions") from None
    with file:
        yield file


class _Stream(io.RawIOBase):
    """Bytes from a function, after those already taken to see what they are; a broken source is an `InputError`."""

    def __init__(self, name: str, head: bytes, read: Callable[[int], bytes], progress: Progress | None = None):
        self.name, self.head, self.read_more, self.progress = name, head, read, progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.head:
            data, self.head = self.head[: len(buffer)], self.head[len(buffer) :]
        else:
            try:
                data = self.read_more(len(buffer)) or b""
            except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise InputError(
                    f"{self.name}: its compressed data is cut off or damaged ({one_line(error)}); copy or dump it again"
                ) from None
        if self.progress is not None:
            self.progress.bytes += len(data)
        buffer[: len(data)] = data
        return len(data)


def _records(name: str, raw: Any, wanted: Wanted, progress: Progress, packed: bool = False) -> Iterator[Any]:
    head = _head(name, raw)
    stream: Any
    if isinstance(raw, io.FileIO) and raw.seekable():  # a file needs nobody between it and its buffer
        raw.seek(0)
        progress.position = raw.tell
        stream = io.BufferedReader(raw, CHUNK)
    else:
        source: Any = _Stream(name, head, raw.read, None if packed else progress)
        stream = io.BufferedReader(source, CHUNK)
    unpacked = _unpacked(head, stream)
    if unpacked is not None:
        if packed:
            raise InputError(f"{name}: compressed twice; unpack it once")
        yield from _records(name, unpacked, wanted, progress, packed=True)
    elif head.startswith(b"PAR1"):
        yield from parquet(name, _seekable(name, stream, packed), wanted)
    elif head.startswith(b"ARROW1"):
        yield from arrow(name, _seekable(name, stream, packed), wanted, stream=False)
    elif head.startswith(b"\xff\xff\xff\xff"):
        yield from arrow(name, stream, wanted, stream=True)
    elif head.startswith(b"PK\x03\x04"):
        yield from _torch(name, _seekable(name, stream, packed), wanted)
    else:
        for magic, what, remedy in UNREADABLE:
            if head.startswith(magic) or (magic[:1] == b"<" and head.lstrip()[:16].lower().startswith(magic)):
                raise InputError(f"{name}: is {what}, {remedy}")
        if head[8:10] in (b'{"', b"{ ") and int.from_bytes(head[:8], "little") < VALUE_LIMIT:
            raise InputError(f"{name}: is a safetensors file, which holds no rewards; save its tensors with torch.save")
        if b"brain.Event:" in head[:64]:
            raise InputError(f"{name}: is a TensorBoard event file, metrics and no rollouts; read it with --metrics")
        if head[257:262] == b"ustar":
            raise InputError(f"{name}: is a tar archive; unpack it and pass the folder")
        control = sum(byte < 32 and byte not in b"\t\n\r" for byte in head)  # one may be damage, text has none
        if control > len(head) / 20:
            raise InputError(f"{name}: is binary, and no kind of file that is known; write JSON lines or Parquet")
        yield from _json(name, stream)


def _head(name: str, raw: Any) -> bytes:
    # a pipe gives what it has: wait for as much as tells the kinds apart, and keep it
    head = b""
    read = getattr(raw, "read1", raw.read)
    try:
        while len(head) < 512:
            more = read(512 - len(head))
            if not more:
                break
            head += more
            if len(head) >= 8 and b"\n" in head:
                break
    except InputError:
        raise
    except IsADirectoryError:
        raise InputError(f"{name}: is a directory that cannot be listed; pass its files") from None
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{name}: cannot be read, or its compressed data is cut off or damaged ({one_line(error)}); dump it again"
        ) from None
    return head


def _unpacked(head: bytes, stream: Any) -> Any:
    if head.startswith(b"\x1f\x8b"):
        import gzip

        return gzip.GzipFile(fileobj=stream)
    if head.startswith(b"BZh"):
        import bz2

        return bz2.BZ2File(stream)
    if head.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(stream)
    kind = "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") else "lz4" if head.startswith(b"\x04\x22\x4d\x18") else None
    if kind is None:
        return None
    import pyarrow as pa  # JSON lines need none of it, and it takes a while

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), kind)


def _seekable(name: str, stream: Any, packed: bool) -> Any:
    """The file itself, or the copy of a pipe on disk: these formats keep their index at the end."""
    if name != "-" and not packed and Path(name).is_file():
        return name
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the reader holds it
    while block := stream.read(CHUNK):
        copy.write(block)
    copy.seek(0)
    return copy


# ------------------------------------------------------------------------------------------------------------- JSON


class NamedTwice(ValueError):
    """An object of JSON has a name twice: parsers keep the last value of it and say nothing."""


def parse(text: bytes) -> Any:
    """A JSON value, with NaN and Infinity as Python writes them.

    Raises `NamedTwice` where an object has one name twice, and any other `ValueError` where this is no JSON.
    """
    try:
        value = orjson.loads(text)
    except ValueError:
        return json.loads(text, object_pairs_hook=_object)
    if not (isinstance(value, dict) and _names_stand_once(text, value)):
        json.loads(text, object_pairs_hook=_object, parse_float=bool, parse_int=bool)  # a seventh of orjson's speed
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise NamedTwice(f"{json.dumps(twice)} stands twice in one object; write each name once")
    return value


def _names_stand_once(text: bytes, record: dict[str, Any]) -> bool:
    """Whether a text has one colon a name of its record, and those of its values: a name read twice leaves one over.

    Numbers have none, so one colon is looked for a name, past strings as they are written, and then one more: a
    sixteenth of what reading lists of numbers takes. Where that finds one, as in an object in the record, names and
    values are written again and all are counted.
    """
    if len(text) < SHORT and text.count(b":") == len(record):
        return True
    at = 0
    for value in record.values():
        at = text.find(b":", at) + 1
        if type(value) is str:
            string = orjson.dumps(value)
            at += text.startswith(b" ", at)
            if not text.startswith(string, at):
                break  # written in another way, or the last of two values
            at += len(string)
    else:
        if text.find(b":", at) < 0:
            return True
    worded = []  # a list that begins with a number has no colons, or is read again
    for value in record.values():
        inner = value
        while isinstance(inner, list) and inner:
            inner = inner[0]
        if isinstance(inner, str | dict):
            worded.append(value)
    try:
        return len(record) + orjson.dumps([list(record), *worded]).count(b":") == text.count(b":")
    except orjson.JSONEncodeError:  # it is too deep
        return False


def _json(name: str, stream: Any) -> Iterator[tuple[str, Any]]:
    for place, text, whole in _texts(name, stream):
        yield from _parsed(name, place, text, whole)


def _texts(name: str, stream: Any) -> Iterator[tuple[str, bytes, bool]]:
    """(place, text, whether it is all there) of each JSON value."""
    number = 0
    while line := stream.readline(VALUE_LIMIT):
        number += 1
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            break
    else:
        return
    cells = next((cut for cut in (b",", b"\t", b";") if line.count(cut)), None)
    if cells is not None and line.lstrip()[:1] not in (b"{", b"[") and not _is(str, line):
        raise InputError(
            f"{name}: line {number}: not JSON: this looks like a table with {cells.decode()!r} between its cells; "
            "write it as Parquet or JSON lines (pandas.read_csv(FILE).to_parquet(...)), one row a trajectory"
        )
    # an array, or a value that goes on in the next line, is cut into its rollouts; else a line is a rollout
    goes_on = line.lstrip().startswith(b"[")
    if line.endswith(b"\n") and line.lstrip().startswith(b"{"):
        tokens = (token.group() for token in _TOKEN.finditer(line))
        if sum({b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(token, 0) for token in tokens) > 0:
            # it was cut off where it stops amid a value and the next line is one by itself
            following, ended, _ = stream.peek(1).partition(b"\n")
            goes_on = line.rstrip()[-1:] in b"[{,:" or not (ended and _is(dict, following))
    if goes_on:
        for first, item, text in _values(name, line, stream, number):
            yield f"line {first}" + (f", item {item}" if item else ""), text, True
        return
    while line:
        if line.strip():
            yield f"line {number}", line, line.endswith(b"\n")
        if len(line) >= VALUE_LIMIT:
            raise InputError(f"{name}: line {number} {TOO_LARGE}")
        line = stream.readline(VALUE_LIMIT)
        number += 1


def _is(of: type, line: bytes) -> bool:
    """Whether a line is one JSON value of that kind: a record, or a string, as of a record dumped twice."""
    try:
        return isinstance(orjson.loads(line), of)
    except ValueError:
        return False


CONSOLE_LINE = re.compile(rb"step:\d+ - [\w/]+:")
CONSOLE = (
    "its metrics stand in files too: trainer_state.json or event files of TRL, verl's with "
    'trainer.logger=["console","file"], an export of W&B'
)
TOO_LARGE = f"is larger than {VALUE_LIMIT >> 20} MB; write one rollout a line (JSON lines), or Parquet"


def _parsed(name: str, place: str, text: bytes, whole: bool) -> Iterator[tuple[str, Any]]:
    where = f"{name}: {place}"
    try:
        value = parse(text)
    except NamedTwice as error:
        yield place, broken(f"{where}: {error}", "a name twice in one object")
        return
    except (ValueError, RecursionError) as error:
        if whole and text.rstrip().endswith(b","):
            wrong = "a comma ends the line; every line is one JSON object by itself (JSON lines)"
        elif text.lstrip().startswith(b"{'"):
            wrong = "a dict as Python prints it, not JSON; write json.dumps(record)"
            if b"'grad_norm'" in text:
                wrong = f"a dict that a trainer printed, not JSON; {CONSOLE}"
        elif CONSOLE_LINE.search(text):
            wrong = f"a line of a trainer's console, not JSON; {CONSOLE}"
        elif "Extra data" in str(error):
            wrong = "several JSON values stand in one line; end each with a line break (JSON lines)"
        elif not whole:
            wrong = "the file is cut off here; dump it again, or delete this last line"
        else:
            wrong = f"not JSON ({one_line(error)}); every line is one JSON object"
            if isinstance(error, UnicodeDecodeError):
                wrong = f"not UTF-8 text ({one_line(error)}); write it as UTF-8, as JSON is"
        yield place, broken(f"{where}: {wrong}", "not JSON" if whole else CUT_OFF)
        return
    if isinstance(value, dict):
        yield place, value
    elif isinstance(value, list):
        for k, element in enumerate(value):
            here = f"{place}, item {k + 1}"
            yield here, element if isinstance(element, dict) else _no_object(f"{name}: {here}", element)
    else:
        yield place, _no_object(where, value)


def _no_object(where: str, value: Any) -> InputError:
    if isinstance(value, str) and _is(dict, value.encode("utf-8", "replace")):
        return broken(f"{where}: a record in a string, dumped twice; json.loads() it once more", "no JSON object")
    return broken(f"{where}: a JSON {kind(value)}, not an object; a rollout is one object", "no JSON object")


_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)
"""what structures JSON: strings as a whole, brackets, and a quote that opens a string which is not all here yet"""


def _values(name: str, buffer: bytes, stream: Any, line: int) -> Iterator[tuple[int, int, bytes]]:
    """The rollouts of arrays and of objects over several lines, as (line, item in its array or 0, text)."""
    at = start = gap = item = 0
    depth, inside, comma = 0, False, False  # `inside` an outer array; whether one must stand in the gap

    def gap_is_clean(end: int) -> None:
        between = buffer[gap:end].strip()
        if between != (b"," if comma and inside else b""):
            shown = one_line(between[:30].decode("utf-8", "replace")) or "nothing"
            raise InputError(f"{name}: line {line}: {shown} stands between two rollouts; this is no JSON array")

    while True:
        again = None
        for token in _TOKEN.finditer(buffer, at):
            text = token.group()
            if text == b'"':
                again = token.start()
                break
            at = token.end()
            if text[:1] == b'"':
                continue
            if text in b"[{":
                if depth == inside:
                    gap_is_clean(token.start())
                    if text == b"[" and not inside:
                        line += buffer.count(b"\n", gap, at)
                        inside, depth, gap, comma, item = True, 1, at, False, 0
                        continue
                    start = token.start()
                    line += buffer.count(b"\n", gap, start)
                depth += 1
                continue
            depth -= 1
            if depth == inside and not (inside and depth == 0):
                item += inside
                yield line, item, buffer[start:at]
                line += buffer.count(b"\n", start, at)
                gap, comma = at, True
            elif depth < inside:
                if buffer[gap : token.start()].strip():
                    gap_is_clean(token.start())
                line += buffer.count(b"\n", gap, at)
                inside, depth, gap, comma = False, 0, at, False
            if depth < 0:
                raise InputError(f"{name}: line {line}: a bracket closes what was never opened; dump it again")
        at = again if again is not None else len(buffer)
        keep = min(start if depth > inside else gap, at)
        buffer, at, start, gap = buffer[keep:], at - keep, start - keep, gap - keep
        if len(buffer) > VALUE_LIMIT:
            raise InputError(f"{name}: line {line}: a JSON value {TOO_LARGE}")
        more = stream.read1(CHUNK)
        if not more:
            break
        buffer += more
    if depth or inside:
        raise InputError(f"{name}: line {line}: the file is cut off here; dump it again")
    gap_is_clean(len(buffer))


# ------------------------------------------------------------------------------------------------------------ torch


def _torch(name: str, source: Any, wanted: Wanted) -> Iterator[tuple[str, Any]]:
    import zipfile

    try:
        members = zipfile.ZipFile(source).namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{name}: a damaged archive ({one_line(error)}); dump it again") from None
    if not any(member.endswith("data.pkl") for member in members):
        what = "a NumPy archive" if any(m.endswith(".npy") for m in members) else "a zip archive"
        raise InputError(f"{name}: is {what}; unpack it, and pass JSON lines or Parquet")
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{name}: is a PyTorch file, and PyTorch is not installed: pip install 'vcposim[torch]', or convert it"
        ) from None
    if not isinstance(source, str):
        source.seek(0)
    # arrays and numbers of NumPy are what custom rewards are made of; an allow-list of constructors runs nothing else
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    plain = [multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *DTYPES]
    try:
        with torch.serialization.safe_globals(plain):
            value = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        text = one_line(error)
        if "weights_only" in text or "Unsupported" in text or "GLOBAL" in text:
            raise InputError(
                f"{name}: holds pickled objects, which could run any code and are never loaded; "
                "write tensors, lists and numbers alone, or JSON lines"
            ) from None
        raise InputError(f"{name}: not a readable PyTorch file ({text[:120]}); dump it again") from None
    try:
        value = _plain(value)
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"{name}: holds a tensor without plain values ({one_line(error)[:120]}); save lists") from None
    other = Path(name).parents[1] / "rollout_data" / Path(name).name if len(Path(name).parents) > 1 else None
    if Path(name).parent.name == "train_data" and other is not None and other.is_file() and isinstance(value, dict):
        # slime's training dump has no groups: they are in the rollout dump of the same step, by position
        rollouts = [record for _, record in _torch(str(other), str(other), Wanted())]
        for sample in value.get("samples", []):
            at = sample.get("rollout_position")
            if isinstance(at, int) and 0 <= at < len(rollouts) and isinstance(rollouts[at], dict):
                for column in ("group_index", "weight_versions"):
                    if column in rollouts[at]:
                        sample.setdefault(column, rollouts[at][column])
    yield from _unfolded(name, value, wanted)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if getattr(value, "is_nested", False):
        return [x.tolist() for x in value.unbind()]
    return value.tolist() if hasattr(value, "tolist") else value


def _ranked(name: str, value: dict[str, Any], wanted: Wanted) -> Iterator[tuple[str, Any]]:
    """miles' training dump of one rank: columns of the rank's samples, and lists of the whole batch."""
    if value.get("cp_size", 1) != 1:
        raise InputError(
            f"{name}: was written under context parallelism (cp_size {value['cp_size']}): its lists are slices of "
            "sequences; dump with a context-parallel size of 1"
        )
    columns = value["rollout_data"]
    count = len(columns.get("response_lengths", []))
    partition = columns.get("partition")
    ends = list(itertools.accumulate(columns.get("prompt_group_sizes") or []))
    for k in range(count):
        sample = {c: v[k] for c, v in columns.items() if isinstance(v, list) and len(v) == count}
        sample["step"] = value.get("rollout_id")
        if isinstance(partition, list) and len(partition) == count:
            at = partition[k]
            raw = columns.get("raw_reward")
            sample |= {"raw_reward": raw[at]} if isinstance(raw, list) and at < len(raw) else {}
            sample |= {"group_index": bisect.bisect_right(ends, at)} if ends else {}
        number = sample.pop("sample_indices", None)
        if number is not None and (sample["step"], number) in wanted.seen:
            continue  # tensor- and pipeline-parallel ranks write the same samples
        wanted.seen.add((sample["step"], number))
        yield f"sample {k + 1}", sample


def _unfolded(name: str, value: Any, wanted: Wanted) -> Iterator[tuple[str, Any]]:
    """Samples in a list, alone or under `samples` beside what they share, or one dict of columns."""
    if isinstance(value, dict) and isinstance(value.get("rollout_data"), dict):
        yield from _ranked(name, value, wanted)
        return
    if isinstance(value, dict) and isinstance(value.get("samples"), list):
        samples = value["samples"]
        shared = {k: v for k, v in value.items() if k != "samples" and not isinstance(v, dict | list)}
        # slime's rollout_id counts training steps, one a file, and is no trajectory
        if "rollout_id" in shared:
            shared["step"] = shared.pop("rollout_id")
        columns = {k: v for k, v in value.items() if isinstance(v, list) and k != "samples" and len(v) == len(samples)}
        for k, sample in enumerate(samples):
            place = f"sample {k + 1}"
            if not isinstance(sample, dict):
                yield place, _no_object(f"{name}: {place}", sample)
                continue
            yield place, {**shared, **{c: v[k] for c, v in columns.items() if c != "dp_shards"}, **sample}
    elif isinstance(value, list):
        for k, sample in enumerate(value):
            place = f"sample {k + 1}"
            yield place, sample if isinstance(sample, dict) else _no_object(f"{name}: {place}", sample)
    elif isinstance(value, dict):
        yield "columns", value
    else:
        raise InputError(f"{name}: a PyTorch file of a {type(value).__name__}; save a list or a dict of rollouts")
