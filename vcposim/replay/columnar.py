"""Parquet and Arrow -> blocks of columns, in bounded memory.

Until the reader has seen one record and decided, a block is one row with all of its columns; then those it wants.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vcposim.errors import InputError
from vcposim.replay.items import Block, Column, Lists, Wanted, one_line

BATCH_BYTES = 4 << 20
"""bytes of columnar data that are in memory at a time, about"""
BUFFER = 1 << 20


def parquet(name: str, source: Any, wanted: Wanted) -> Iterator[Block]:
    """The rows of a Parquet file, page by page.

    Raises `InputError` for one that is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # read page by page: a row group may be as large as the file
        with pq.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True) as file:
            meta = file.metadata
            _require_one_of_each(name, file.schema_arrow.names)
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)) / max(meta.num_rows, 1)
            rows = int(min(max(BATCH_BYTES / max(size, 1), 1), 8192))
            seen = 0
            if wanted.names is None and meta.num_rows:
                for batch in file.iter_batches(batch_size=1):
                    yield _block(name, batch, 0)
                    break
                seen = 1
            columns = None if wanted.names is None else [c for c in file.schema_arrow.names if c in wanted.names]
            skip, at = seen, 0
            for batch in _ahead(file.iter_batches(batch_size=rows, columns=columns)):
                batch, skipped = batch.slice(skip), min(skip, batch.num_rows)
                at, skip = at + skipped, skip - skipped
                if batch.num_rows:
                    yield _block(name, batch, at)
                at += batch.num_rows
        pa.default_memory_pool().release_unused()  # some 50 MB, which nobody needs from here on
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise InputError(f"{name}: not a readable Parquet file ({one_line(error)}); dump it again") from None


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same, each read while the one before is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def arrow(name: str, source: Any, wanted: Wanted, *, stream: bool) -> Iterator[Block]:
    """The rows of an Arrow stream or file (Feather), record batch by record batch.

    Raises `InputError` for one that is damaged.
    """
    import pyarrow as pa

    try:
        if stream:
            with pa.ipc.open_stream(source) as reader:
                yield from _batches(name, reader, wanted)
        else:
            with (
                pa.memory_map(source) if isinstance(source, str) else pa.PythonFile(source, mode="r") as file,
                pa.ipc.open_file(file) as reader,
            ):
                yield from _batches(name, (reader.get_batch(i) for i in range(reader.num_record_batches)), wanted)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, EOFError, MemoryError) as error:
        raise InputError(f"{name}: not a readable Arrow file ({one_line(error)}); dump it again") from None


def _batches(name: str, batches: Any, wanted: Wanted) -> Iterator[Block]:
    at = 0
    for batch in batches:
        batch.validate(full=True)
        _require_one_of_each(name, batch.schema.names)
        step = int(min(max(BATCH_BYTES * batch.num_rows / max(batch.nbytes, 1), 1), 8192))
        done = 0
        while done < batch.num_rows:
            part = batch.slice(done, 1 if wanted.names is None else step)
            if wanted.names is not None:
                part = part.select([c for c in part.schema.names if c in wanted.names])
            rows = part.num_rows
            yield _block(name, part, at + done)
            done += rows
        at += batch.num_rows


def _require_one_of_each(name: str, columns: Sequence[str]) -> None:
    twice = [column for column in dict.fromkeys(columns) if columns.count(column) > 1]
    if twice:
        raise InputError(f"{name}: has several columns called {twice[0]!r}; rename or drop all but one")


def _block(name: str, batch: Any, at: int) -> Block:
    """The rows of a record batch, of which `at` came before."""
    columns = {column: _column(batch.column(i)) for i, column in enumerate(batch.schema.names)}
    return Block(name, at + 1, batch.num_rows, columns)


def _column(array: Any) -> Column:
    import pyarrow as pa

    t = array.type
    if _number(t) and not array.null_count:
        return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    if (pa.types.is_list(t) or pa.types.is_large_list(t)) and _number(t.value_type) and not array.values.null_count:
        lists = Lists(array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy())
        if not array.null_count:
            return lists
        pairs = zip(itertools.pairwise(lists.ends.tolist()), array.is_valid().to_pylist(), strict=True)
        return [lists.values[a:b] if here else None for (a, b), here in pairs]
    if pa.types.is_map(t):
        return [x if x is None else dict(x) for x in array.to_pylist()]
    return array.to_pylist()  # type: ignore[no-any-return]


def _number(t: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(t) or pa.types.is_integer(t) or pa.types.is_boolean(t))
