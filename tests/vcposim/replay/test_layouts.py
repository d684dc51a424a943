"""Every layout in every container gives back the numbers that were written; stock files are refused in words."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.statistical import assert_near
from tests.vcposim.replay.fixtures import (
    CHANGED,
    COLUMNS,
    CONTAINERS,
    FIXTURES,
    Rollout,
    batch,
)
from vcposim.commands.main import main
from vcposim.errors import InputError
from vcposim.replay import Dump, read_dump, replay, to_json
from vcposim.replay.layouts import LAYOUTS, recognized

REPLAYABLE = [name for name, one in FIXTURES.items() if not one.stock]


def assert_same(dump: Dump, b: list[Rollout]) -> None:
    """The numbers that were written, in their order; groups as a partition, whatever their names."""
    assert_near(dump.log_ratio, [r.log_ratio for r in b])
    np.testing.assert_array_equal(dump.reward, [r.reward for r in b])
    np.testing.assert_array_equal(dump.length, [len(r.sampler) for r in b])
    prompts = np.array([r.prompt for r in b])
    assert dump.has_group
    same = dump.group[:, None] == dump.group[None, :]
    np.testing.assert_array_equal(same, prompts[:, None] == prompts[None, :])


def test_every_layout_has_a_fixture_and_a_source() -> None:
    assert set(FIXTURES) == set(LAYOUTS)
    for name, one in LAYOUTS.items():
        assert "/" in one.source, name
        assert one.read_on, name
        assert bool(one.missing) == bool(one.change), name
        assert one.missing or not FIXTURES[name].stock, name


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", REPLAYABLE)
def test_layout_by_container(name: str, container: str, tmp_path: Path) -> None:
    b, fixture = batch(seed=len(name)), FIXTURES[name]
    path = CONTAINERS[container](tmp_path, fixture.rows(b))
    dump = read_dump(path, **fixture.options)
    assert_same(dump, b)
    if "layout_name" not in fixture.options:
        assert dump.layout == name
        assert name == "vcposim" or any(f"layout {name}" in note for note in dump.notes)


@pytest.mark.parametrize("name", [n for n in REPLAYABLE if n not in ("openai_chat", "nemo_rl")])
def test_columns_of_rollouts(name: str, tmp_path: Path) -> None:
    # every field a list over the rollouts, as a framework that dumps its batch at once does
    b, fixture = batch(seed=3), FIXTURES[name]
    assert_same(read_dump(COLUMNS(tmp_path, fixture.rows(b)), **fixture.options), b)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    prompts=st.integers(2, 5),
    responses=st.integers(2, 5),
    name=st.sampled_from(REPLAYABLE),
    container=st.sampled_from(sorted(CONTAINERS)),
)
def test_random_batches_come_back(
    seed: int, prompts: int, responses: int, name: str, container: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    b, fixture = batch(seed, prompts, responses), FIXTURES[name]
    options = fixture.options | ({"group_size": responses} if "group_size" in fixture.options else {})
    path = CONTAINERS[container](tmp_path_factory.mktemp("m"), fixture.rows(b))
    assert_same(read_dump(path, **options), b)


@pytest.mark.parametrize("name", [name for name, one in FIXTURES.items() if one.stock])
def test_a_stock_file_that_cannot_be_replayed_says_so_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONTAINERS["jsonl"](tmp_path, FIXTURES[name].rows(batch()))
    by_name = ["--layout", name] if "layout_name" in FIXTURES[name].options else []
    code = main(["replay", str(path), *by_name])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert LAYOUTS[name].what in err
    assert "log-probabilities" in err
    assert LAYOUTS[name].change in err


@pytest.mark.parametrize("name", CHANGED)
def test_after_the_change_it_can_be_replayed(name: str, tmp_path: Path) -> None:
    b = batch(seed=5)
    assert_same(read_dump(CONTAINERS["jsonl"](tmp_path, CHANGED[name].rows(b))), b)


def test_the_longest_sight_wins_and_our_own_names_come_first() -> None:
    for name, fixture in FIXTURES.items():
        found = recognized(fixture.rows(batch())[0])
        assert found is not None
        assert "layout_name" in fixture.options or found.name == name
    both = {**FIXTURES["verl_dataproto"].rows(batch())[0], "log_prob": [], "behavior_log_prob": []}
    assert recognized(both).name == "vcposim"  # type: ignore[union-attr]


def test_layouts_are_listed_and_unknown_names_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["replay", "--layouts"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in LAYOUTS)
    path = CONTAINERS["jsonl"](tmp_path, FIXTURES["vcposim"].rows(batch()))
    assert main(["replay", str(path), "--layout", "verll_rollout"]) == 2
    assert "did you mean 'verl_rollout'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- pipes and folders


def through_a_pipe(data: bytes, first: int, pause: float = 0.3) -> str:
    """A path that reads `data` from a writer who pauses after `first` bytes."""
    end, start = os.pipe()

    def write() -> None:
        with os.fdopen(start, "wb") as sink:
            sink.write(data[:first])
            sink.flush()
            time.sleep(pause)
            sink.write(data[first:])

    threading.Thread(target=write, daemon=True).start()
    return f"/dev/fd/{end}"


@pytest.mark.parametrize("container", ["jsonl", "gz", "zst", "array, pretty", "parquet", "arrow stream", "arrow file"])
@pytest.mark.parametrize("first", [1, 3, 600])
def test_a_slow_pipe_loses_nothing(container: str, first: int, tmp_path: Path) -> None:
    b = batch(seed=1)
    data = CONTAINERS[container](tmp_path, FIXTURES["vcposim"].rows(b)).read_bytes()
    assert_same(read_dump(through_a_pipe(data, first)), b)


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = batch(seed=2)
    path = CONTAINERS["gz"](tmp_path, FIXTURES["vcposim"].rows(b))
    with path.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert_same(read_dump("-"), b)


def test_folders_globs_and_several_files_are_one_dump_in_natural_order(tmp_path: Path) -> None:
    b = batch(seed=4)
    rows = [{k: v for k, v in row.items() if k != "step"} for row in FIXTURES["vcposim"].rows(b)]
    for k, step in enumerate((2, 10)):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        CONTAINERS["jsonl"](folder, rows[8 * k : 8 * k + 8])
    whole = read_dump(tmp_path)
    assert_same(whole, b)
    assert whole.slices["step"][1] == [2, 10]
    assert whole.place[8] == "r.jsonl: line 1"
    assert_same(read_dump(str(tmp_path / "step_*" / "*.jsonl")), b)
    assert_same(read_dump([tmp_path / "step_2", tmp_path / "step_10" / "r.jsonl"]), b)
    (tmp_path / "readme.txt").write_text("what this is")
    assert any("readme.txt" in note for note in read_dump(tmp_path).notes)


def test_torch_files_are_read_without_executing_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    b = batch(seed=6)
    samples = FIXTURES["slime_train"].rows(b)
    for sample in samples:
        sample["log_probs"] = torch.tensor(sample["log_probs"], dtype=torch.float64)
        del sample["local_raw_reward"]
    shared = {"rollout_id": 3, "rank": 0, "samples": samples, "raw_reward": [r.reward for r in b], "dp_shards": []}
    torch.save(shared, tmp_path / "train_3.pt")
    dump = read_dump(tmp_path / "train_3.pt")
    assert_same(dump, b)
    size = max(len(r.sampler) for r in b)
    columns = {
        "group": torch.tensor([r.prompt for r in b]),
        "reward": torch.tensor([r.reward for r in b]),
        "log_prob": torch.tensor([r.learner + [0.0] * (size - len(r.learner)) for r in b], dtype=torch.float64),
        "behavior_log_prob": torch.tensor(
            [r.sampler + [0.0] * (size - len(r.sampler)) for r in b], dtype=torch.float64
        ),
        "mask": torch.tensor([[1] * len(r.sampler) + [0] * (size - len(r.sampler)) for r in b]),
    }
    torch.save(columns, tmp_path / "columns.pt")
    assert_same(read_dump(tmp_path / "columns.pt"), b)
    # numbers of NumPy are what custom reward functions leave behind
    torch.save({**shared, "raw_reward": [np.float64(r.reward) for r in b]}, tmp_path / "numpy.pt")
    assert_same(read_dump(tmp_path / "numpy.pt"), b)
    jagged = {
        name: torch.nested.nested_tensor([torch.tensor(x, dtype=torch.float64) for x in lists], layout=torch.jagged)
        for name, lists in (("behavior_log_prob", [r.sampler for r in b]), ("log_prob", [r.learner for r in b]))
    }
    plain = {"group": [r.prompt for r in b], "reward": [r.reward for r in b]}
    torch.save({**plain, **jagged}, tmp_path / "jagged.pt")
    assert_same(read_dump(tmp_path / "jagged.pt"), b)
    torch.save({"samples": [Path("/")]}, tmp_path / "objects.pt")
    with pytest.raises(InputError, match="never loaded"):
        read_dump(tmp_path / "objects.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04\x95", "a pickle"),
        (b"\xff\xfe{\x00", "UTF-16"),
        (b"\x00\x01\x02", "binary"),
        (bytes(range(256)) * 4, "binary"),
        (b"\x93NUMPY", "NumPy array"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"SQLite format 3\x00", "SQLite"),
        (b"PK\x03\x04rest", "damaged archive"),
        (b"\x1f\x8bnot gzip at all", "cut off or damaged"),
        (b"PAR1 and nothing else", "not a readable Parquet"),
        (b"ARROW1\x00\x00 and nothing else", "not a readable Arrow"),
        (b"id,reward\n1,2\n", "not JSON"),
        ((64).to_bytes(8, "little") + b'{"log_prob":{"dtype":"F32"}}', "safetensors"),
    ],
)
def test_what_is_not_read_is_named_by_what_it_is(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_dump(path)
    assert "\n" not in str(caught.value)


def test_a_dataset_of_several_splits_asks_which(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="splits train, test; pass one"):
        read_dump(tmp_path)


def test_the_answer_does_not_depend_on_the_container(tmp_path: Path) -> None:
    rows = FIXTURES["vcposim"].rows(batch(seed=8, prompts=6, responses=6))

    def answer(name: str) -> Any:
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        found = to_json(replay(read_dump(CONTAINERS[name](folder, rows)), resamples=100))
        return {k: v for k, v in found.items() if k != "summary"}  # it names the line, or the row

    first = answer("jsonl")
    for name in ("gz", "array", "parquet", "arrow stream", "dataset folder"):
        assert answer(name) == first, name


def test_slime_details_are_joined_and_ranks_of_miles_are_not_counted_twice(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    b = batch(seed=7)
    train = [{k: v for k, v in row.items() if k != "group_index"} for row in FIXTURES["slime_train"].rows(b)]
    for k, row in enumerate(train):
        row["rollout_position"] = k
    (tmp_path / "train_data").mkdir()
    (tmp_path / "rollout_data").mkdir()
    torch.save({"rollout_id": 3, "samples": FIXTURES["slime_rollout"].rows(b)}, tmp_path / "rollout_data" / "3.pt")
    torch.save({"format_version": 2, "rollout_id": 3, "samples": train}, tmp_path / "train_data" / "3.pt")
    dump = read_dump(tmp_path)
    assert_same(dump, b)
    assert dump.slices["version"][1] == ["3"]

    order = list(reversed(range(len(b))))  # a rank's samples are a permutation of the batch
    columns = {
        "sample_indices": order,
        "partition": order,
        "response_lengths": [len(b[i].sampler) for i in order],
        "loss_masks": [[1] * len(b[i].sampler) for i in order],
        "rollout_log_probs": [b[i].sampler for i in order],
        "log_probs": [b[i].learner for i in order],
        "rewards": [b[i].reward - 0.5 for i in order],
        "raw_reward": [r.reward for r in b],
        "prompt_group_sizes": [4, 4, 4, 4],
    }
    folder = tmp_path / "miles"
    folder.mkdir()
    for rank in (0, 1):
        saved = {"rollout_id": 3, "rank": rank, "rollout_data": columns, "cp_rank": 0, "cp_size": 1}
        torch.save(saved, folder / f"3_{rank}.pt")
    assert_same(read_dump(folder), [b[i] for i in order])
    torch.save({"rollout_id": 3, "rollout_data": columns, "cp_size": 2}, folder / "3_0.pt")
    with pytest.raises(InputError, match="context parallelism"):
        read_dump(folder)
