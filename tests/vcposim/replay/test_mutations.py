"""A thousand damaged files: no traceback, and no number that the bytes do not say.

The twin reads the same bytes with the standard library and plain loops. A damaged file is either refused in one line,
or it is read, and then every number is the twin's: what cannot be told from an undamaged value (a digit that became
another) counts as what it says.
"""

import gzip
import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.kit.statistical import assert_near
from tests.vcposim.replay.fixtures import Record, batch
from vcposim.errors import InputError
from vcposim.replay import Dump, read_dump, replay, to_json

FILES = 1000


def rows(seed: int) -> list[Record]:
    """Own format with a mask, a step and a version."""
    out: list[Record] = []
    for i, r in enumerate(batch(seed, prompts=3, responses=4, longest=12)):
        out.append(
            {
                "group": r.prompt,
                "reward": r.reward,
                "step": 1 + i % 2,
                "version": 3,
                "behavior_log_prob": [*r.sampler, 0.0],
                "log_prob": [*r.learner, -5.0],
                "loss_mask": [1] * len(r.sampler) + [0],
            }
        )
    return out


def key(value: object) -> object:
    """1 and 1.0 are one name; a list is another list's only if they are the same text."""
    return value if type(value) in (int, float, str) else json.dumps(value)


def twin(data: bytes) -> tuple[list[float], list[float], list[object]] | None:
    """log-ratios, rewards and (step, group) of every line, or None where a line does not have them."""
    ratios, rewards, groups, have = [], [], [], []
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            mask = record.get("loss_mask")
            mask = [1] * len(record["log_prob"]) if mask is None else mask
            pairs = zip(record["log_prob"], record["behavior_log_prob"], mask, strict=True)
            kept = [(a, b) for a, b, m in pairs if m]
            ratios.append(math.fsum(a for a, _ in kept) - math.fsum(b for _, b in kept))
            rewards.append(float(record["reward"]))
            groups.append((key(record.get("step", "none")), key(record["group"])))
            have.append(("step" in record, "loss_mask" in record))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
    # a column is there in all records or in none
    return (ratios, rewards, groups) if len(set(have)) == 1 else None


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _edited(data: bytes, rng: random.Random, edit: str) -> bytes:
    records = [json.loads(line) for line in data.splitlines()]
    chosen = records if rng.random() < 0.4 else [rng.choice(records)]
    a, b = rng.sample(sorted(records[0]), 2)
    strange = rng.choice([None, True, "7", [], {}, [[1.0]], -3, 1e308, 10**400, float("nan"), float("inf"), [None, 1]])
    for record in chosen:
        if edit == "swap":
            record[a], record[b] = record[b], record[a]
        elif edit == "drop":
            record.pop(a)
        elif edit == "type":
            record[a] = strange
        elif isinstance(record[a], list) and record[a]:
            record[a][rng.randrange(len(record[a]))] = strange
    return "".join(json.dumps(record) + "\n" for record in records).encode()


SAID = ("no group", "no reward", "null", "not used", "is a sum")
"""words of the notes that say a column is missing, empty or passed over"""
MUTATIONS = ("truncated", "flipped", "swap", "drop", "type", "token")


def mutated(data: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(MUTATIONS)
    if kind == "truncated":
        return truncated(data, rng)
    return flipped(data, rng) if kind == "flipped" else _edited(data, rng, kind)


def attempt(path: Path) -> Dump | None:
    """The dump, or None where the file is refused in one line that names it."""
    try:
        return read_dump(path)
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    assert str(path) in said
    return None


def assert_says_what_it_reads(path: Path, data: bytes) -> bool:
    """Whether the file was read; a refusal is one line, a reading is the twin's."""
    dump = attempt(path)
    if dump is None:
        return False
    expected = twin(data)
    noted = " ".join(dump.notes)
    if expected is None:
        # something is not as it was; then it has to be said
        assert any(word in noted for word in SAID), noted
        return True
    ratios, rewards, groups = expected
    finite = [x for x in ratios if math.isfinite(x)]
    assert_near(dump.log_ratio[np.isfinite(dump.log_ratio)], finite)
    if dump.has_reward:
        np.testing.assert_array_equal(dump.reward, rewards)
    if dump.has_group and "split" not in noted and "splits none" not in noted:
        assert len(set(dump.group.tolist())) in (len(set(groups)), len({g for _, g in groups}))
    json.dumps(to_json(replay(dump, resamples=100)), allow_nan=False)
    return True


@pytest.mark.slow
def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    read = 0
    for k in range(FILES):
        data = mutated("".join(json.dumps(row) + "\n" for row in rows(k % 7)).encode(), rng)
        path = tmp_path / "m.jsonl"
        path.write_bytes(data)
        read += assert_says_what_it_reads(path, data)
    assert FILES / 20 < read < FILES * 0.9  # neither everything is refused nor everything believed


@pytest.mark.slow
def test_damaged_archives_and_tables_are_refused_or_unchanged(tmp_path: Path) -> None:
    rng = random.Random(1)
    table = rows(0)
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in table).encode())
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "t.parquet", write_page_checksum=True)
    whole = {"g.jsonl.gz": packed, "t.parquet": (tmp_path / "t.parquet").read_bytes()}
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
        right = read_dump(tmp_path / name)
        for _ in range(150):
            (tmp_path / name).write_bytes(flipped(data, rng) if rng.random() < 0.6 else truncated(data, rng))
            dump = attempt(tmp_path / name)
            # a column whose name was hit is another column: then that is said
            if dump is not None and not any(word in n for n in dump.notes for word in SAID):
                np.testing.assert_array_equal(dump.log_ratio, right.log_ratio)
