"""Columnar files and short JSON lines are read by the block; the slow twin reads them one by one, to the last bit.

The twin is the reader itself with blocks refused, so that it takes every row as it takes a line of JSON.
"""

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vcposim.replay.fixtures import CONTAINERS, FIXTURES, Record, batch, mask_of
from vcposim.errors import InputError
from vcposim.replay import Dump, columnar, read_dump, reading
from vcposim.replay.blocks import read_block
from vcposim.replay.items import Block
from vcposim.replay.records import RecordReader, Rows

COLUMNAR = ["parquet", "arrow stream", "arrow file", "dataset folder"]
BLOCKS = [*COLUMNAR, "jsonl", "array", "gz", "shards"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are many blocks, and many pieces of each."""
    monkeypatch.setattr(columnar, "BATCH_BYTES", 3000)
    monkeypatch.setattr(reading, "TOKENS_AT_ONCE", 100)
    monkeypatch.setattr(reading, "ROWS_AT_ONCE", 9)
    monkeypatch.setattr(reading, "TOKENS_WAITING", 80)
    monkeypatch.setattr(reading, "LONG", 35)


def by_block_and_by_row(path: Path, **options: Any) -> tuple[Dump | str, Dump | str, int]:
    """What either reading says, errors in their words; and how many rows the first took by the block."""
    taken = 0

    def counting(reader: RecordReader, block: Block) -> Rows | None:
        nonlocal taken
        rows = read_block(reader, block)
        taken += 0 if rows is None else block.rows
        return rows

    answers: list[Dump | str] = []
    for read in (counting, lambda reader, block: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "read_block", read)
            try:
                answers.append(read_dump(path, **options))
            except InputError as error:
                answers.append(str(error))
    return answers[0], answers[1], taken


def plain(value: Any) -> Any:
    """With arrays as bytes: equal means equal to the last bit, NaN included."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, tuple | list):
        return [plain(x) for x in value]
    return {k: plain(x) for k, x in value.items()} if isinstance(value, dict) else value


def assert_identical(a: Dump | str, b: Dump | str) -> None:
    if isinstance(a, str) or isinstance(b, str):
        assert a == b
        return
    for field in fields(Dump):
        assert plain(getattr(a, field.name)) == plain(getattr(b, field.name)), field.name


def rows(seed: int, prompts: int = 6, responses: int = 4, longest: int = 40) -> list[Record]:
    """Own format with all that a block may hold; some responses are empty, some masks leave nothing."""
    rng, out = np.random.default_rng(seed), []
    for i, r in enumerate(batch(seed, prompts, responses, longest)):
        empty = rng.random() < 0.1
        mask = [int(x) for x in rng.random(len(r.sampler)) < 0.8] if rng.random() < 0.9 else [0] * len(r.sampler)
        out.append(
            {
                "group": f"p{r.prompt}",
                "reward": r.reward,
                "behavior_log_prob": [] if empty else r.sampler,
                "log_prob": [] if empty else r.learner,
                "mask": [] if empty else mask,
                "score_sq_norm": float(rng.random()),
                "step": 1 + i // 12,
                "version": i % 3,
                "task": "ab"[i % 2],
                "trajectory_id": i,
            }
        )
    return out


@pytest.mark.parametrize("container", BLOCKS)
@pytest.mark.parametrize("name", [name for name, one in FIXTURES.items() if not one.stock])
def test_every_layout_reads_the_same_by_the_block(name: str, container: str, tmp_path: Path) -> None:
    fixture = FIXTURES[name]
    path = CONTAINERS[container](tmp_path, fixture.rows(batch(len(name), prompts=5)))
    by_block, by_row, taken = by_block_and_by_row(path, **fixture.options)
    assert_identical(by_block, by_row)
    assert isinstance(by_block, Dump)
    if name in ("vcposim", "openrlhf", "slime_train", "log_ratio") and container in COLUMNAR:
        assert taken == by_block.group.size - 1  # the first row decides what the columns are


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    container=st.sampled_from(BLOCKS),
    float32=st.booleans(),
    left_out=st.sets(st.sampled_from(["mask", "score_sq_norm", "step", "version", "task", "trajectory_id", "reward"])),
    options=st.sampled_from([{}, {"by": ["task"]}, {"group": ["step", "group"]}, {"by": ["file"]}, {"group_size": 4}]),
)
def test_random_batches_read_the_same_by_the_block(
    seed: int,
    container: str,
    float32: bool,
    left_out: set[str],
    options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    table = [{k: v for k, v in row.items() if k not in left_out} for row in rows(seed)]
    if float32 and container in COLUMNAR:
        for row in table:
            for name in ("log_prob", "behavior_log_prob"):
                row[name] = np.array(row[name], dtype=np.float32)
    path = CONTAINERS[container](tmp_path_factory.mktemp("b"), table)
    by_block, by_row, taken = by_block_and_by_row(path, **options)
    assert_identical(by_block, by_row)
    assert taken or isinstance(by_block, str)


STRANGE: dict[str, list[Any]] = {
    "log_prob": [None, [], [0.5, -1.0], [float("nan")], [-float("inf")] * 3, [-1e200], [None, -1.0]],
    "behavior_log_prob": [None, [-float("inf")] * 3, [-1.0]],
    "reward": [None, float("nan"), float("inf"), 1e200, True],
    "group": [None, "", "ü"],
    "mask": [None, [1], [2, 0], [None]],
    "score_sq_norm": [None, -1.0, float("nan")],
    "step": [None, -(2**62)],
    "version": [None],
    "task": [None],
    "trajectory_id": [None, 0],
}


@settings(max_examples=80)
@given(seed=st.integers(0, 10**6), container=st.sampled_from(BLOCKS), skip_bad=st.booleans(), broken=st.integers(1, 4))
def test_damaged_rows_read_the_same_by_the_block(
    seed: int, container: str, skip_bad: bool, broken: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, table = random.Random(seed), rows(seed)
    for _ in range(broken):
        row, name = rng.choice(table), rng.choice(sorted(STRANGE))
        row[name] = rng.choice(STRANGE[name])
    path = CONTAINERS[container](tmp_path_factory.mktemp("d"), table)
    by_block, by_row, _ = by_block_and_by_row(path, skip_bad=skip_bad)
    assert_identical(by_block, by_row)


@pytest.mark.slow
def test_damaged_bytes_read_the_same_by_the_block(tmp_path: Path) -> None:
    rng, read = random.Random(3), 0
    names = [*COLUMNAR[:3], "jsonl"]
    whole = {name: CONTAINERS[name](tmp_path, rows(5)).read_bytes() for name in names}
    for k in range(400):
        data = bytearray(whole[names[k % 4]])
        for _ in range(rng.choice((1, 2))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path = tmp_path / "damaged"
        path.write_bytes(data)
        by_block, by_row, _ = by_block_and_by_row(path, skip_bad=bool(k % 2))
        assert_identical(by_block, by_row)
        read += isinstance(by_block, Dump)
    assert 30 < read < 370


def test_shards_of_which_one_has_a_column_more_or_none_of_them_are_refused(tmp_path: Path) -> None:
    table = [{k: row[k] for k in ("group", "reward", "log_prob", "behavior_log_prob")} for row in rows(0)]
    masked = [{**row, "loss_mask": mask_of(row["log_prob"], len(row["log_prob"]))} for row in table]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a_0.parquet")
    for name, other, words in (
        ("more", masked, "loss_mask: is here, but not in the first record"),
        ("none", [{"text": "a"}] * 3, "row 1: none of the columns of the rollouts"),
        ("fewer", [{k: v for k, v in row.items() if k != "reward"} for row in table], "reward: is missing"),
    ):
        pq.write_table(pa.Table.from_pylist(other), tmp_path / "a_1.parquet")
        by_block, by_row, _ = by_block_and_by_row(tmp_path)
        assert_identical(by_block, by_row)
        assert words in str(by_block), name


@pytest.mark.parametrize("container", ["parquet", "jsonl"])
@pytest.mark.parametrize("column", ["length", "response_length"])
def test_a_length_that_is_wrong_once_is_refused_in_its_place(column: str, container: str, tmp_path: Path) -> None:
    table = [{k: v for k, v in row.items() if k != "mask"} | {column: len(row["log_prob"])} for row in rows(0)]
    table[17][column] += 1
    by_block, by_row, _ = by_block_and_by_row(CONTAINERS[container](tmp_path, table))
    assert_identical(by_block, by_row)
    assert "18: " in str(by_block)
    assert column in str(by_block)


def test_a_mask_of_booleans_and_more_is_refused(tmp_path: Path) -> None:
    table = [{**row, "mask": [bool(x) for x in row["mask"]]} for row in rows(0)]
    by_block, by_row, taken = by_block_and_by_row(CONTAINERS["jsonl"](tmp_path, table))
    assert_identical(by_block, by_row)
    assert taken
    table[17]["mask"][:2] = [False, 2]
    by_block, by_row, _ = by_block_and_by_row(CONTAINERS["jsonl"](tmp_path, table))
    assert_identical(by_block, by_row)
    assert "line 18: mask: " in str(by_block)
