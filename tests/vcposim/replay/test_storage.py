"""What grows with the file waits on disk: the same numbers as in memory, in memory that does not grow.

The slow twin of everything here holds it all at once: a few bytes and a few rows a piece against the whole.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.statistical import near
from tests.vcposim.replay.fixtures import batch
from vcposim.commands.main import main
from vcposim.diagnostics import WeightSums, weight_sums
from vcposim.replay import as_json, contributions, read_dump, reading, replay, storage, to_json
from vcposim.replay.dumps import pooled
from vcposim.replay.storage import Codes, NumberColumn, Stored, by_code, coded, counts, distinct, empty, pieces

KEYS = st.one_of(
    st.integers(-(2**62), 2**62),
    st.integers(-3, 3),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.none(),
    st.tuples(st.integers(0, 3), st.text(max_size=2)),
)


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, a few rows are a large file."""

    def call() -> None:
        monkeypatch.setattr(storage, "IN_MEMORY", 64)
        monkeypatch.setattr(storage, "PIECE", 7)
        monkeypatch.setattr(storage, "MOST_KEYS", 3)
        monkeypatch.setattr(reading, "COMPARED", 9)
        monkeypatch.setattr(reading, "ROWS_AT_ONCE", 5)
        monkeypatch.setattr(contributions, "TOGETHER", 10)
        monkeypatch.setattr(as_json, "AT_ONCE", 3)

    return call


def test_sums_of_pieces_are_the_sums_of_all_tokens(spilled: Callable[[], None]) -> None:
    """Trajectories of scales e^30 apart, some without a weight above 0, in pieces and out of order."""
    spilled()
    rng = np.random.default_rng(4)
    tokens = [rng.normal(scale * rng.normal(), 1, size=3) for scale in [15.0] * 40]
    tokens[5][:] = tokens[20][:] = -np.inf
    each = WeightSums(*(np.array(column) for column in zip(*(weight_sums(x) for x in tokens), strict=True)))
    rows = rng.permutation(40)[:25]
    for chosen in (None, range(40), rows, np.array([5, 20])):
        found, of = pooled(each, chosen), range(40) if chosen is None else chosen
        whole = weight_sums(np.concatenate([tokens[i] for i in of]))
        assert found.log_scale == whole.log_scale
        assert [*found[1:]] == [near(x) for x in whole[1:]]


def test_columns_come_back_from_disk(spilled: Callable[[], None]) -> None:
    spilled()
    values = np.random.default_rng(0).standard_normal(1000)
    for kind in ("d", "i4"):
        column = NumberColumn(kind)
        for start in range(0, 1000, 13):
            column.extend(
                values[start : start + 13].tolist() if kind == "d" else list(range(start, min(start + 13, 1000)))
            )
        assert len(column) == 1000
        found = column.array()
        np.testing.assert_array_equal(found, values if kind == "d" else np.arange(1000))
        rows = [len(x) for (x,) in pieces(found)]
        assert sum(rows) == 1000
        assert set(rows) == {7, 6}
        np.testing.assert_array_equal(
            np.concatenate([x for (x,) in pieces(found, rows=np.arange(999, -1, -1))]), found[::-1]
        )
        np.testing.assert_array_equal(np.concatenate([x for (x,) in pieces(found, rows=range(5, 90))]), found[5:90])


def test_a_full_array_is_written_through(spilled: Callable[[], None]) -> None:
    spilled()
    found = empty((3, 40))
    assert not found.any()
    found[1] = np.arange(40)
    storage.forget(found)
    np.testing.assert_array_equal(found[1], np.arange(40))
    assert found.shape == (3, 40)


@settings(max_examples=100)
@given(lists=st.lists(st.lists(KEYS, max_size=8), max_size=12), most=st.integers(0, 6))
def test_codes_are_those_of_a_dictionary(lists: list[list[Any]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "MOST_KEYS", most)
        patch.setattr(storage, "IN_MEMORY", 32)
        codes, twin = Codes(), {}
        for values in lists:
            assert codes.codes(values) == [twin.setdefault(value, len(twin)) for value in values]
        assert len(codes) == len(twin)
        assert list(codes.values()) == list(twin)
        assert all(value in codes for value in twin)
        assert "not there at all" not in codes


@pytest.mark.slow
def test_many_codes_outgrow_their_table() -> None:
    count = 400_000
    codes = Codes()
    for start in range(0, count, 10_000):
        assert codes.codes([f"prompt {k}" for k in range(start, start + 10_000)]) == list(range(start, start + 10_000))
    some = random.Random(0).sample(range(count), 1000)
    assert codes.codes([f"prompt {k}" for k in some]) == some
    assert len(codes) == count
    assert codes.stored is not None
    assert codes.values()[count - 1] == f"prompt {count - 1}"


def test_stored_values_are_a_sequence() -> None:
    names = [f"line {k}" for k in range(7)]
    stored = Stored()
    for part in (names[:3], [], names[3:4], names[4:]):
        stored.extend(part)
    assert list(stored) == names == [stored[i] for i in range(7)] == list(stored[:])
    assert stored[-1] == "line 6"
    assert list(stored.take(np.array([5, 0]))) == ["line 5", "line 0"]
    with pytest.raises(IndexError):
        stored[7]


@settings(max_examples=60)
@given(code=st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_rows_by_code_are_a_stable_sort(code: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "PIECE", 7)
        x = np.array(code, dtype=np.int32)
        size = counts(x)
        np.testing.assert_array_equal(size, np.bincount(x))
        np.testing.assert_array_equal(np.asarray(by_code(x, size)), np.argsort(x, kind="stable"))
        np.testing.assert_array_equal(distinct(x, key=lambda v: v % 4), np.unique(x % 4))
        values, first, again = coded(x, key=lambda v: v % 4)
        twin = list(dict.fromkeys((x % 4).tolist()))
        assert values.tolist() == twin
        assert first.tolist() == [(x % 4).tolist().index(value) for value in twin]
        np.testing.assert_array_equal(values[again], x % 4)
        np.testing.assert_array_equal(storage.heaviest(x.astype(float), 9), np.argsort(-x, kind="stable")[:9])


def rows_of(seed: int, prompts: int) -> list[dict[str, Any]]:
    found = []
    for k, r in enumerate(batch(seed, prompts)):
        found.append(
            {
                "step": k % 3, "group": f"what is {r.prompt}?", "reward": r.reward, "task": "ab"[k % 2],
                "log_prob": r.learner, "behavior_log_prob": r.sampler, "episode": k // 2 * 2 + (k % 4 == 3),
            }
        )  # fmt: skip
    return found


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_alike(a, b, f"{where}.{k}")
    elif isinstance(one, float):
        assert one == near(other), where
    else:
        assert one == other, where


@pytest.mark.parametrize(
    "options",
    [{}, {"by": ["task", "group"]}, {"group": ["step", "group"]}, {"trajectory": "episode", "merge_reward": "sum"}],
    ids=str,
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_spilled_file_says_the_same(
    options: dict[str, Any], shuffled: bool, spilled: Callable[[], None], tmp_path: Path
) -> None:
    rows = rows_of(4, 12)
    rows += rows[3:5]  # copies, which are named
    rows += [{**rows[0], "group": " what is 0?"}, {**rows[1], "group": 7}, {**rows[1], "group": "7"}]
    if shuffled:
        random.Random(1).shuffle(rows)
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer() -> Any:
        dump = read_dump(path, **options)
        found = replay(dump, by=options.get("by", ()), corrections=True, resamples=200)
        assert "".join(as_json.json_text(found)) == json.dumps(to_json(found), allow_nan=False)
        return to_json(found) | {"place": list(found.place), "log_ratio": found.log_ratio.tolist()}

    whole = answer()
    spilled()
    assert_alike(answer(), whole)


def test_a_disk_that_is_full_is_one_line(
    spilled: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spilled()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(4, 12)))
    assert main(["replay", str(path), "--no-figure"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "TMPDIR" in error


MEASURE = """
import re, sys
from vcposim.commands.main import main
from vcposim.diagnostics import WeightSums, weight_sums
main(["replay", sys.argv[1], "--no-figure", "--json", "--no-corrections", "--bootstrap", "100"])
sys.stderr.write(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_trajectories(tmp_path: Path) -> None:
    """Four times the trajectories; the 200 bytes that each took once would be 48 MB more."""
    peak = []
    for count in (80_000, 320_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("wb") as file:
            for k in range(count):
                row = {
                    "group": f"the question number {k // 8}",
                    "reward": k % 2,
                    "log_prob": -1.0 - k % 7 / 10,
                    "length": 3,
                }
                file.write(orjson.dumps(row | {"behavior_log_prob": -1.25}) + b"\n")
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
        peak.append(int(re.findall(r"\d+", done.stderr)[-1]) / 1024)
    assert peak[1] - peak[0] < 25


def test_what_is_final_holds_no_table() -> None:
    codes = Codes()
    for start in range(0, 200_000, 1024):
        codes.codes(list(range(start, start + 1024)))
    assert codes.key.nbytes > 1 << 20  # more than are held as they are
    values = codes.final()
    assert codes.key.base is None  # a slice of nothing would keep all of it
    assert codes.key.nbytes == codes.code.nbytes == 0
    assert values[123_456] == 123_456
