"""The accelerator's benchmark, dry on a processor: nothing lost in a kill, nothing wrong called right."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_bridge.scores import score_pass
from simulations.bench import gpu, scores
from simulations.bench.score_records import half_spread
from tests.kit.statistical import near
from vcposim.errors import InputError

pytestmark = pytest.mark.slow

CASE = "tiny:4:16"
METHODS = {*gpu.FIRST, *gpu.SECOND}


def _run(path: Path, *more: str) -> tuple[int, dict]:
    code = gpu.main(["--tiny", "--case", CASE, "--rounds", "2", "--device", "cpu", "--out", str(path), *more])
    return code, json.loads(path.read_text())


def _at(data: dict, kind: str) -> dict[str, dict]:
    return {row["what"]: row for row in data["cells"] if row["kind"] == kind}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    code, data = _run(path)
    assert code == 0
    return path, data


def test_the_result_holds_every_cell_and_where_it_was_measured(finished: tuple[Path, dict]) -> None:
    data = finished[1]
    assert data["torch"] == torch.__version__
    assert data["machine"]
    assert data["transformers"]
    assert (data["device"], data["dtype"], data["not_run"]) == ("cpu", "bfloat16", [])
    time = _at(data, "time")
    assert time.keys() == METHODS
    for row in time.values():
        assert row["count"] == len(row["ratios"]) == 2
        assert row["plain_s"] > 0
        assert row["median"] == near(sum(row["ratios"]) / 2)
        assert row["half_iqr"] == near(half_spread(row["ratios"]))
    right = _at(data, "right")
    assert right.keys() == set(gpu.PRECISIONS)
    for row in right.values():
        assert row["errors"].keys() == set(gpu.JUDGED)
        assert all(error["right"] for error in row["errors"].values())


def test_the_errors_are_of_the_size_that_each_precision_allows(finished: tuple[Path, dict]) -> None:
    right = _at(finished[1], "right")
    for method in gpu.JUDGED:
        assert right["float32"]["errors"][method]["gradient"] < 1e-5
        assert 1e-4 < right["bfloat16"]["errors"][method]["gradient"] < 0.1
    # the loop in float32 is the reference itself, up to the order of the last sum
    assert right["float32"]["rounding"]["loop in the same precision"]["norm"] == 0
    assert right["float32"]["errors"]["sketch"]["norm"] > 1e-4, "sketched norms are estimates"


def test_the_tables_tell_the_result(finished: tuple[Path, dict], capsys: pytest.CaptureFixture[str]) -> None:
    path, data = finished
    assert gpu.main(["--markdown", str(path)]) == 0
    told = capsys.readouterr().out
    assert data["machine"] in told
    assert "WRONG" not in told
    for method, row in _at(data, "time").items():
        assert f"| {method} | {row['median']:.3f} ± {row['half_iqr']:.3f} (2) |" in told


def test_the_tables_tell_device_time_and_memory_where_the_device_counts(finished: tuple[Path, dict]) -> None:
    counted = {"device_s": 0.003, "plain_device_s": 0.002, "peak": 3 << 30, "peak_plain": 2 << 30, "weights": 1 << 29}
    cells = [{**row, **counted} if row["kind"] == "time" else row for row in finished[1]["cells"]]
    cells[1]["device_s"] = "RuntimeError: no profiler"
    told = gpu.markdown({**finished[1], "cells": cells})
    assert told.count("| 1.500 |") == len(METHODS) - 1
    assert told.count("| not told |") == 1
    assert told.count("| 1.50 x, +2.00 gradients |") == len(METHODS) - 1
    assert "| plain, GiB | 2.00 |" in told


def test_a_second_run_measures_nothing_again(finished: tuple[Path, dict]) -> None:
    path, data = finished
    before = path.with_suffix(".jsonl").read_text()
    assert _run(path) == (0, data)
    assert path.with_suffix(".jsonl").read_text() == before


def test_a_killed_run_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, timed, begun = tmp_path / "gpu.json", gpu.timed, []

    def killed(*args: object) -> dict:
        begun.append(args)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return timed(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu, "timed", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(path)
    lines = path.with_suffix(".jsonl")
    whole = lines.read_text()
    assert len(json.loads(path.read_text())["cells"]) == 2
    lines.write_text(whole + '{"kind": "time", "ca')  # the kill came in the middle of a line
    code, data = _run(path)
    assert code == 0
    assert lines.read_text().startswith(whole)
    assert len(data["cells"]) == len(gpu.cells((CASE,)))
    assert data["not_run"] == []
    assert len(begun) == 3 + len(METHODS) - 2


@pytest.mark.parametrize("key", ["machine", "torch", "code"])
def test_results_of_another_machine_or_code_are_not_mixed_in(
    finished: tuple[Path, dict], tmp_path: Path, key: str
) -> None:
    path = tmp_path / "gpu.json"
    head, rest = finished[0].with_suffix(".jsonl").read_text().split("\n", 1)
    path.with_suffix(".jsonl").write_text(json.dumps({**json.loads(head), key: "another"}) + "\n" + rest)
    with pytest.raises(InputError, match="another"):
        _run(path)


def test_a_wrong_norm_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """The tied head's cross term left out, in the tape itself: exact norms are wrong, each gradient follows its own."""
    monkeypatch.setattr(score_pass, "tied_cross_term", lambda at_token, hidden, grad: torch.zeros(len(grad)))
    code, data = _run(tmp_path / "gpu.json")
    assert code == 1
    errors = _at(data, "right")["float32"]["errors"]
    for method in ("affine", "general", "ghost, two backwards"):
        assert errors[method]["right"] is False
        assert errors[method]["norm"] > gpu.TOLERANCE
        assert errors[method]["gradient"] < 1e-5
    assert errors["sketch"]["right"] is True
    assert "WRONG: " in capsys.readouterr().out


def test_a_judged_method_that_breaks_is_not_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_pass, "tied_cross_term", None)
    code, data = _run(tmp_path / "gpu.json")
    errors = _at(data, "right")["bfloat16"]["errors"]
    assert code == 1
    assert all(error["right"] is False and error["reason"].startswith("TypeError") for error in errors.values())
    assert "| affine | TypeError |" in gpu.markdown(data)


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_a_wrong_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def off(case: scores.Workload) -> torch.Tensor:
        norm = scores.sketch(case)
        for p in case.model.parameters():
            assert p.grad is not None
            p.grad.mul_(factor)
        return norm

    monkeypatch.setitem(gpu.METHODS, "sketch", off)
    code, data = _run(tmp_path / "gpu.json")
    assert code == 1
    assert [m for m, e in _at(data, "right")["float32"]["errors"].items() if not e["right"]] == ["sketch"]


def test_a_method_that_cannot_run_is_recorded_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(case: scores.Workload) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setitem(gpu.METHODS, "general", full)
    code, data = _run(tmp_path / "gpu.json")
    time = _at(data, "time")
    assert code == 0
    assert data["not_run"] == []
    assert time["general"]["reason"].startswith("OutOfMemoryError: CUDA out of memory")
    assert "median" in time["sketch"]
    assert "reason" in _at(data, "right")["float32"]["errors"]["general"]
    assert "| general | OutOfMemoryError |" in gpu.markdown(data)


def test_a_lost_device_ends_the_run_and_blames_no_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(case: scores.Workload) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu.METHODS, "general", lost)
    with pytest.raises(RuntimeError, match="illegal"):
        _run(tmp_path / "gpu.json")
    assert [row["what"] for row in json.loads((tmp_path / "gpu.json").read_text())["cells"]] == list(gpu.FIRST[:2])


def test_no_cell_is_begun_that_does_not_fit_into_the_budget(tmp_path: Path) -> None:
    code, data = _run(tmp_path / "gpu.json", "--budget-s", "0")
    assert code == 0
    assert data["cells"] == []
    assert len(data["not_run"]) == len(gpu.cells((CASE,)))


def test_the_important_cells_come_first() -> None:
    order = gpu.cells(gpu.CASES)
    head = [(cell.case, cell.what) for cell in order[: 3 * len(gpu.FIRST)]]
    assert {case.split(":")[0] for case, _ in head} == {"135M", "0.5B", "1.5B"}
    assert {method for _, method in head} == set(gpu.FIRST)
    assert len({cell.key for cell in order}) == len(order)


def test_the_plan_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert gpu.main(["--plan"]) == 0
    assert f"{len(gpu.cells(gpu.CASES))} cells" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["tiny:4:16", "1M:2:24"])
def test_the_plan_counts_what_the_model_does(case: str) -> None:
    """Against the library's own counter; attention apart, of which its processor kernel is not counted."""
    own = scores.make_case(case)
    assert gpu.parameters(case)[1] == sum(p.numel() for p in own.model.parameters())
    with FlopCounterMode(display=False) as counter:
        scores.plain(own)
    n, t = own.batch.token.shape
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 6 * n * t * gpu.parameters(case)[0]


def test_no_accelerator_and_no_tiny_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tiny"):
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")])
