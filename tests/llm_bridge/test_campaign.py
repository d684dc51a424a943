"""The campaign, dry: pieces of weights, order of runs, chunks that go on to the bit, the report."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from llm_bridge import campaign
from llm_bridge.campaign import Plan, join, main, pack
from llm_bridge.campaign_report import held_out, report
from vcposim.errors import InputError

SMALL: dict[str, Any] = {
    "model": "char", "dtype": "float32", "updates": 4, "groups": 2, "group_size": 4, "max_new_tokens": 4,
    "evaluate_every": 2, "evaluate_problems": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task for a model without words."""
    monkeypatch.setitem(campaign.TASKS, "letters", ("letter_counting", {"style": "short", "words": 1}))


def dry(**changes: Any) -> Plan:
    chosen: dict[str, Any] = {
        "tasks": ("letters",),
        "methods": ("vcpo",),
        "lags": (2,),
        "seeds": (0,),
        "lrs": (1e-2,),
    } | changes
    return Plan(**chosen, settings=SMALL)


def run(plan: Plan, folder: Path, budget_s: float = 1e6, processes: int = 0) -> dict[str, Any]:
    campaign.run(plan, model="char", out=folder / "out", state=folder / "state", budget_s=budget_s, processes=processes)
    return json.loads((folder / "out" / campaign.RESULT).read_text())


def numbers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything but seconds."""
    timed = ("seconds", *(f"s_{part}" for part in campaign.PHASES))
    return [{name: x for name, x in one["columns"].items() if name not in timed} for one in result["runs"]]


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_pieces_come_together_again(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(bytes(range(256)) * 5)
    pieces = pack(source, tmp_path / "pieces", size=500)
    assert [path.stat().st_size for path in pieces] == [500, 500, 280]
    assert join(tmp_path / "pieces", tmp_path / "joined").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("harm", ["flip", "cut", "drop", "manifest"])
def test_a_damaged_piece_is_one_clear_line(tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").write_bytes(bytes(1000))
    piece = pack(tmp_path / "weights", tmp_path / "pieces", size=400)[1]
    if harm == "flip":
        piece.write_bytes(b"\1" + piece.read_bytes()[1:])
    elif harm == "cut":
        piece.write_bytes(piece.read_bytes()[:-1])
    elif harm == "drop":
        piece.unlink()
    else:
        (tmp_path / "pieces" / "manifest.json").unlink()
    assert main(["unpack", str(tmp_path / "pieces"), "--model", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert ("manifest.json" if harm == "manifest" else piece.name) in said[0]
    assert not (tmp_path / "model").exists()


# --- plan -------------------------------------------------------------------------------------------------------------


def test_whatever_is_finished_is_balanced() -> None:
    """After any whole number of blocks, all methods and lags have equally many seeds of a task."""
    plan = Plan()
    cells, block = plan.cells(), len(plan.methods) * len(plan.lags)
    assert len(set(cells)) == len(cells) == block * len(plan.seeds) * len(plan.tasks)
    for i in range(0, len(cells), block):
        part = cells[i : i + block]
        assert len({(c.task, c.seed) for c in part}) == 1
        assert {(c.method, c.lag) for c in part} == {(m, k) for m in plan.methods for k in plan.lags}
    assert [(c.task, c.seed) for c in cells[::block]] == [(t, s) for t in plan.tasks for s in plan.seeds]


def test_what_does_not_exist_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vcpo"):
        Plan(methods=("vcppo",))
    with pytest.raises(InputError, match="seeds"):
        Plan(seeds=())
    with pytest.raises(InputError, match="no folder"):
        campaign.run(dry(), model=str(tmp_path / "x"), out=tmp_path, state=tmp_path / "s", budget_s=1, processes=0)


def test_expected_cost_comes_from_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"device": {"name": "a GPU"}, "profile": {"vcpo": {"seconds": 0.5}}}
    (tmp_path / "c.json").write_text(json.dumps(measured))
    flags = ["--tasks", "addition", "--methods", "vcpo", "--seeds", "0", "--set", "updates=10"]
    assert main(["plan", *flags, "--processes", "3", "--profile", str(tmp_path / "c.json")]) == 0
    said = capsys.readouterr().out
    assert "3 runs: 15 s of runs, 5 s with 3 at once" in said
    assert "a GPU" in said
    assert main(["plan", *flags, "--methods", "tis", "--profile", str(tmp_path / "c.json")]) == 2
    assert "nothing measured for 'tis'" in capsys.readouterr().err
    assert main(["plan", *flags]) == 0
    assert "3 runs; give --profile" in capsys.readouterr().out


# --- runs -------------------------------------------------------------------------------------------------------------


def test_chunks_go_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that ends after every update, and a whole one, write the same numbers."""
    plan = dry(methods=("vcpo", "none"))
    whole = run(plan, tmp_path / "whole")
    assert all(one["finished"] for one in whole["runs"])
    clock = iter(range(10**6))
    monkeypatch.setattr(campaign.time, "time", lambda: float(next(clock)))
    parts: dict[str, Any] = {"runs": []}
    chunks = 0
    while len(parts["runs"]) < 2 or not all(one["finished"] for one in parts["runs"]):
        parts, chunks = run(plan, tmp_path / "parts", budget_s=4), chunks + 1
        assert chunks < 30
    assert chunks > 3
    assert numbers(parts) == numbers(whole)


def test_columns_say_what_happened(tmp_path: Path) -> None:
    (one,) = run(dry(), tmp_path)["runs"]
    columns = one["columns"]
    assert columns["step"] == [-1, 0, 1, 2, 3]
    assert columns["lag"] == [None, 0, 1, 2, 2]
    assert [made for made, _ in held_out(one)] == [0, 2, 4]
    assert all(0 < x <= 1 for x in columns["ess_fraction_sequence"][1:])
    parts = [[x[j] for name, x in columns.items() if name.startswith("s_")] for j in range(1, 5)]
    assert all(0 < sum(spent) <= whole for spent, whole in zip(parts, columns["seconds"][1:], strict=True))


def test_settings_may_not_change_under_way(tmp_path: Path) -> None:
    run(dry(), tmp_path)
    other = Plan(("letters",), ("vcpo",), (2,), (0,), (1e-2,), SMALL | {"updates": 5})
    with pytest.raises(InputError, match="was begun with"):
        run(other, tmp_path)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    settings = SMALL | {"task_options": {"style": "short"}}  # other processes know no monkeypatch
    plan = Plan(("addition",), ("vcpo", "none"), (1,), (0,), (1e-2,), settings)
    assert numbers(run(plan, tmp_path / "one")) == numbers(run(plan, tmp_path / "two", processes=2))


def test_a_dry_run_needs_no_setting_of_its_own() -> None:
    """`run --model char`, all else as for the language model: tasks put what they ask in signs that it knows."""
    flags = ["run", "--model", "char", "--out", "o", "--state", "s"]
    plan = campaign.plan_of(campaign.parser().parse_args(flags))
    for cell in plan.cells():
        config = plan.config(cell)
        assert (config.model, config.task_options["style"]) == ("char", "short")
    other = campaign.plan_of(campaign.parser().parse_args([*flags[:2], "m", *flags[3:]]))
    assert {other.config(cell).task_options["style"] for cell in other.cells()} == {"instruct"}


@pytest.mark.slow
def test_runs_that_are_refused_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "char", "--out", str(tmp_path / "o"), "--state", str(tmp_path / "s"), "--lags", "0"]
    own = ["--tasks", "addition", "--seeds", "0", "--methods", "none", "--set", "updates=1"]
    assert main(["run", *flags, *own, "--set", 'task_options={"style":"instruct"}']) == 2
    assert "all 1 runs were refused; addition-none-lag0-seed0-lr2e-05: text: 'C' in" in capsys.readouterr().err


def test_report_renders(tmp_path: Path) -> None:
    run(dry(methods=("vcpo", "none"), seeds=(0, 1)), tmp_path)
    text = report(tmp_path / "out")
    assert text.count("| letters | 2 | 0.01 |") == 2
    assert "char on CPU" in text
    assert (tmp_path / "out" / "campaign.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "campaign.md").read_text().strip() == text.strip()


def test_no_result_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "campaign.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
