"""The campaign, dry: pieces with checksums, runs that stop and go on to the bit, the table, the command line."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from llm_bridge import campaign  # noqa: E402
from llm_bridge.campaign import METHODS, Plan, collect, draw, join, main, pack, run, runs_of, table  # noqa: E402
from tests.llm_bridge.training.toys import Letters, tiny  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

SMALL = Plan(
    updates=4, groups=2, group_size=4, max_new_tokens=4, lr=3e-3, dtype="float32", evaluate_every=2, evaluate_problems=4
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(campaign, "TASKS", {"addition": {}})
    monkeypatch.setattr(
        "llm_bridge.training.trainer.load_task", lambda *_, **__: Letters()
    )  # one it learns in four updates
    tiny().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_pieces_are_joined_or_refused_by_name(tmp_path: Path):
    source = tmp_path / "weights.gguf"
    source.write_bytes(bytes(range(256)) * 400 + torch.randn(500).numpy().tobytes())
    files = pack(source, tmp_path / "carry", piece=1000)
    assert len(files) > 3
    assert max(path.stat().st_size for path in files[:-1]) <= 1000
    (tmp_path / "here").mkdir()
    assert join(tmp_path / "carry", tmp_path / "here").read_bytes() == source.read_bytes()
    body = files[1].read_bytes()
    files[1].write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(InputError, match=r"piece-01: damaged .* carry it again"):
        join(tmp_path / "carry", tmp_path / "here")
    files[1].unlink()
    with pytest.raises(InputError, match=r"piece-01: missing; carry all of piece-00, piece-01"):
        join(tmp_path / "carry", tmp_path / "here")


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_bit(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch):
    order = runs_of(["addition"], [0, 2], [0])
    whole = run(order, SMALL, model, tmp_path / "a", tmp_path / "a", 1e6, 1)
    assert [r["key"] for r in whole["runs"]] == [r.key for r in order]
    assert all(r["finished"] and r["updates"] == 4 for r in whole["runs"])
    ticks = iter(range(10**6))
    monkeypatch.setattr(campaign.time, "time", lambda: float(next(ticks)))
    calls = 0
    while True:
        data = run(order, SMALL, model, tmp_path / "b", tmp_path / "b", 4.5, 1)
        calls += 1
        if len(data["runs"]) == len(order) and all(r["finished"] for r in data["runs"]):
            break
        assert calls < 60
    assert calls > 3
    for one, other in zip(whole["runs"], data["runs"], strict=True):
        for columns in (one["columns"], other["columns"]):
            columns.pop("seconds")
        assert one == other


def test_stale_runs_differ_and_gauges_say_so(tmp_path: Path, model: str):
    data = run(runs_of(["addition"], [2], [0]), SMALL, model, tmp_path, tmp_path, 1e6, 1)
    by_method = {r["method"]: r for r in data["runs"]}
    assert set(by_method) == set(METHODS)
    assert all(r["columns"]["lag"][-1] == 2 for r in data["runs"])
    full = ("no correction", "sequence TIS")
    assert all(r["columns"]["step_scale"][-1] == 1 for r in data["runs"] if r["method"] in full)
    assert all(r["columns"]["ess_fraction_sequence"][0] > 0.999 for r in data["runs"])
    assert all(max(r["columns"]["reward"]) > 0 for r in data["runs"])
    assert by_method["VCPO"]["columns"]["step_scale"][-1] < 1
    draw(data, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    text = table(data)
    assert "4 runs of 4 updates, 0 unfinished" in text
    assert text.count("\n| addition | 2 |") == 4


def test_at_the_command_line(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    shared = [
        "--task",
        "addition",
        "--lag",
        "0",
        "--seeds",
        "1",
        "--updates",
        "2",
        "--groups",
        "2",
        "--group-size",
        "2",
        "--max-new-tokens",
        "2",
    ]
    shared += ["--evaluate-every", "1", "--evaluate-problems", "2", "--dtype", "float32"]
    assert main(["plan", *shared, "--seconds-per-update", "0.5", "--processes", "2"]) == 0
    assert "4 runs, 1 s each, 0.0 minutes" in capsys.readouterr().out
    places = ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    assert main(["run", *shared, *places, "--model", model]) == 0
    assert "4 runs of 2 updates, 0 unfinished" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "campaign.json").read_text())["device"]
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "campaign.png").exists()
    assert main(["unpack", str(tmp_path), "--model", str(tmp_path / "new")]) == 2
    assert "pieces.json: missing or unreadable" in capsys.readouterr().err


def test_an_unfinished_run_is_counted_and_not_in_the_table(tmp_path: Path, model: str):
    order = runs_of(["addition"], [0], [0])[:1]
    (tmp_path / "partial-00.json").write_text(
        json.dumps({"key": order[0].key, "task": "addition", "method": order[0].method, "lag": 0, "seed": 0,
                    "finished": False, "before": 0.0, "updates": 1, "columns": {"held_out_success_rate": [None]}})
    )  # fmt: skip
    data = collect(order, SMALL, tmp_path, tmp_path)
    assert "0 runs of 4 updates, 1 unfinished" in table(data)
