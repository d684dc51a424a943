"""`vcposim plan`: the arithmetic of time to target, what is never made up, and one-line errors."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kit.statistical import assert_quantile_equals, near
from vcposim.commands.main import main
from vcposim.errors import InputError
from vcposim.pipeline import plan
from vcposim.pipeline.lengths import fixed, log_normal
from vcposim.pipeline.plan import Cluster, Option, fastest, from_intervals, from_runs, judge
from vcposim.pipeline.simulator import Outcome

JOB = [
    *("--devices", "4", "--groups", "4", "--group-size", "2", "--tokens-per-s", "8", "--slots", "4"),
    *("--train-s", "6", "--train-devices", "2", "--sync-s", "1"),
]
LAW = ["--length-mean", "20", "--length-sd", "20", "--max-tokens", "200"]
QUICK = ["--lags", "1", "3", "--seeds", "2", "--steps", "6"]
CURVE = ["--efficiency", "1:1.1", "3:1.5:1.4:1.6"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    try:
        code = main(["plan", *map(str, arguments)])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, *capsys.readouterr()


def found(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    code, out, err = run(capsys, *JOB, *LAW, *QUICK, "--json", *arguments)
    assert (code, err) == (0, "")
    return json.loads(out)


def outcome(steps_per_s: float, lag: float = 0.0) -> Outcome:
    return Outcome(1.0, steps_per_s, steps_per_s, 1.0, 1.0, np.array([1.0]), lag, 0.0)


def option(lag: float, *steps_per_s: float, generators: int | None = 1) -> Option:
    return Option(math.ceil(lag), generators, tuple(outcome(x, lag) for x in steps_per_s))


REFERENCE = option(0, 1.0, 1.0, generators=None)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_time_is_steps_needed_over_steps_per_second() -> None:
    curve = from_intervals([(2, 1.5, 1.5, 1.5), (4, 3.0, 3.0, 3.0)], "test")
    judged = judge([REFERENCE, option(2, 2.0, 2.0), option(4, 4.0, 4.0), option(3, 2.0, 2.0), option(5, 9, 9)], curve)
    times = [one.time and one.time[1] for one in judged]
    assert times[:4] == near([1, 1.5 / 2, 3 / 4, math.sqrt(1.5 * 3) / 2])
    assert times[4] is None  # beyond the curve: nothing is extrapolated, however fast
    assert [one.speed[1] for one in judged] == near([1, 2, 4, 2, 9])
    assert fastest(judged) in judged[1:3]
    assert [one.best for one in judged][3:] == [0, 0]


def test_without_a_curve_the_most_steps_win_and_no_time_is_claimed() -> None:
    judged = judge([REFERENCE, option(2, 2.0, 2.1), option(4, 3.0, 3.1)], None)
    assert all(one.time is None for one in judged)
    assert fastest(judged) is judged[2]
    assert judged[2].best > 0.9


def test_a_curve_steep_enough_says_stay_synchronous() -> None:
    judged = judge([REFERENCE, option(2, 2.0, 2.0)], from_intervals([(2, 2.5, 2.4, 2.6)], "test"))
    assert fastest(judged) is judged[0]
    assert judged[0].best == 1


def test_intervals_come_from_the_curve_and_from_the_seeds() -> None:
    sure = judge([REFERENCE, option(1, 2.0, 2.0)], from_intervals([(1, 1.2, 1.2, 1.2)], "test"))[1]
    assert sure.time == near((0.6, 0.6, 0.6))
    curve = judge([REFERENCE, option(1, 2.0, 2.0)], from_intervals([(1, 1.2, 1.0, 1.44)], "test"), draws=20000)[1]
    # a log-normal ratio whose 95% interval is 1.0 to 1.44, so its density at the ends is that of a normal at 1.96
    sd = math.log(1.44) / (2 * 1.959964)
    log_time = dict(zip((0.025, 0.975), np.log([curve.time[0], curve.time[2]]), strict=True))  # type: ignore[index]
    for share, end in ((0.025, 0.5), (0.975, 0.72)):
        density = math.exp(-(1.959964**2) / 2) / math.sqrt(2 * math.pi) / sd
        assert_quantile_equals(log_time[share], math.log(end), share, draws=20000, density=density, detect=0.02)
    assert curve.time[1] == near(0.6)  # type: ignore[index]
    # two seeds, log speeds log 2 -+ d: Student's interval of one degree of freedom, 12.7 d
    d = 0.01
    pair = option(1, 2.0 * math.exp(d), 2.0 * math.exp(-d))
    seeds = judge([REFERENCE, pair], None, draws=40000)[1]
    low, value, high = np.log(np.array(seeds.speed) / 2)
    assert value == near(0)
    density = 1 / (math.pi * (1 + 12.7062**2)) / d
    for share, found, end in ((0.025, low, -12.7062 * d), (0.975, high, 12.7062 * d)):
        assert_quantile_equals(found, end, share, draws=40000, density=density, detect=4 * d)


def test_seeds_are_paired() -> None:
    """The same luck for both: which one is faster is not in doubt."""
    luck = np.array([0.5, 1.0, 2.0])
    options = [Option(1, 1, tuple(outcome(x) for x in luck * speed)) for speed in (1.0, 1.1, 1.2)]
    judged = judge(options, None)
    assert judged[2].speed == near((1.2, 1.2, 1.2))
    assert judged[2].best == 1
    # luck that the reference does not have is shared by the others still
    steady = Option(0, None, (outcome(1.0),) * 3)
    judged = judge([steady, *options[1:]], None)
    assert judged[1].speed[0] < 0.5 < 2 < judged[1].speed[2]
    assert judged[1].best == 0


def test_runs_that_never_reached_the_target_count() -> None:
    runs: list[tuple[float, float | None]] = [(4, 1.0), (4, None), (4, None), (2, 1.0), (2, 1.1), (2, None)]
    curve = from_runs(runs, "test")
    assert np.exp(curve.log_ratio).tolist() == near([1, 1.1, math.inf])
    judged = judge([REFERENCE, option(2, 2.0, 2.0), option(4, 9.0, 9.0), option(3, 9.0, 9.0)], curve)
    assert judged[1].time is not None
    assert judged[1].time[1] == near(1.1 / 2)
    assert judged[1].time[2] == math.inf  # in some draws it never arrives
    assert judged[2].time is not None
    assert judged[2].time[1] == math.inf
    assert fastest(judged) is judged[1]


def test_devices_are_split_and_training_scales() -> None:
    cluster = Cluster(fixed(10), 6, 4, 4.0, 4, 2, train_s=6.0, train_devices=2, sync_s=1.0)
    split, together = cluster.split(2, 3), cluster.synchronous()
    assert (split.workers, split.train_s, split.max_lag) == (2, 3.0, 3)
    assert (together.workers, together.train_s, together.max_lag) == (6, 2.0, 0)
    reference, *options = plan.survey(cluster, [1], [5], steps=5, seeds=2)
    assert reference.steps_per_s == near([1 / (10 + 2 + 1)] * 2)
    assert options[0].generators == 5
    assert plan.generator_counts(2) == [1]
    assert plan.generator_counts(8) == [1, 2, 3, 4, 5, 6, 7]
    assert plan.generator_counts(64)[-1] == 63
    assert len(plan.generator_counts(64)) == 7


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Cluster(fixed(1), 1, 1, 1.0, 1, 1, 1.0, 1, 1.0), "devices"),
        (lambda: Cluster(fixed(1), 2, 1, 1.0, 1, 1, 1.0, 0, 1.0), "train_devices"),
        (lambda: Cluster(log_normal(5, 5), 2, 1, 1.0, 1, 1, 1.0, 1, 1.0).split(2, 1), "generators"),
        (lambda: from_intervals([], "curve"), "curve"),
        (lambda: from_runs([], "curve"), "curve"),
        (lambda: from_runs([(1, math.nan)], "curve"), "nan"),
        (lambda: judge([REFERENCE, option(9, 1.0, 1.0)], from_intervals([(2, 1, 1, 1)], "c")), "outside"),
    ],
)
def test_bad_plans_get_one_line(make: Any, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        make()
    assert "\n" not in str(caught.value)


# --- the command ------------------------------------------------------------------------------------------------------


def test_throughput_only_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    answer = found(capsys)
    assert answer["efficiency"] is None
    assert all(row["time"] is None for row in answer["options"])
    assert "throughput only" in answer["notes"][0]
    out = run(capsys, *JOB, *LAW, *QUICK, "--no-figure")[1]
    assert "throughput only" in " ".join(out.split())
    assert "time to target:" not in " ".join(out.split())


def test_json_holds_every_choice_and_the_best_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    answer = found(capsys, *CURVE)
    assert len(answer["options"]) == 2 * 3
    assert {row["generators"] + row["trainers"] for row in answer["options"]} == {4}
    known = [row for row in [answer["reference"], *answer["options"]] if row["time"]]
    assert answer["best"] == min(known, key=lambda row: row["time"]["value"])
    for row in answer["options"]:
        ratio = math.exp(np.interp(row["token_lag"], [0, 1, 3], np.log([1, 1.1, 1.5])))
        assert row["time"]["value"] == near(ratio / row["speed"]["value"])
        assert row["largest_lag"] <= row["max_lag"]
    assert sum(row["best"] for row in known) == near(1)
    assert found(capsys, *CURVE) == answer
    assert found(capsys, *CURVE, "--seed", 1) != answer


def test_admission_and_hours_reach_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    answer = found(capsys, *CURVE, "--admission", "drop", "--in-flight", "--steps-to-target", 3600)
    assert answer["reference_hours"] == near(1 / answer["reference"]["steps_per_s"])
    assert max(row["dropped_share"] for row in answer["options"]) > 0
    assert max(row["largest_lag"] for row in answer["options"]) <= 3


@pytest.mark.parametrize(
    "flag",
    [
        ["--in-flight"],
        ["--batching", "static"],
        ["--admission", "pace"],
        ["--single-tokens-per-s", "8"],
        ["--sync-s", "2"],
        ["--train-s", "9"],
        ["--slots", "3"],
        ["--max-tokens", "100"],
    ],
)
def test_every_number_reaches_the_simulation(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plain, changed = found(capsys, "--lags", "1", "3"), found(capsys, *flag)
    assert plain["options"] != changed["options"]
    plain.pop("options"), changed.pop("options")
    together = ("--in-flight", "--admission", "--batching")
    if flag[0] not in together:  # they also change the synchronous reference
        assert plain["reference"] != changed["reference"]


def test_measured_lengths_from_a_list_and_from_a_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "lengths.txt"
    numbers.write_text("10\n10\n10\n")
    common = [*JOB, *QUICK, "--json"]
    answer = json.loads(run(capsys, *common, "--lengths", numbers)[1])
    assert answer["lengths"]["mean"] == 10
    # 8 responses in 16 slots, 2 tokens/s each: 5 s; then 6 * 2 / 4 and 1
    assert answer["reference"]["steps_per_s"] == near(1 / 9)
    dump = tmp_path / "dump.jsonl"
    row = {"group": 0, "reward": 1, "log_prob": -1.0, "behavior_log_prob": -1.0, "length": 10}
    dump.write_text("".join(json.dumps({**row, "group": g}) + "\n" for g in (0, 0, 1)))
    again = json.loads(run(capsys, *common, "--lengths", dump)[1])
    assert again["reference"]["steps_per_s"] == answer["reference"]["steps_per_s"]


def test_a_time_that_may_never_come_is_told_in_hours_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.jsonl"
    ratios = [(0, 1.0), (0, 1.0), (8, 1.1), (8, 1.1), (8, None)]
    file.write_text("".join(json.dumps({"lag": lag, "steps_ratio": x}) + "\n" for lag, x in ratios))
    out = run(capsys, *JOB, *QUICK, *LAW, "--efficiency-file", file, "--steps-to-target", "500", "--no-figure")[1]
    assert re.search(r"of synchronous, \S+ \[\S+, never\] h;", " ".join(out.split()))


def test_a_file_of_runs_is_read_by_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.jsonl"
    rows: list[dict[str, Any]] = [{"other": 1}]
    rows += [{"method": "a", "lag": k, "steps_ratio": 1 + 0.1 * k} for k in (1, 3)]
    rows += [{"method": "b", "lag": k, "steps_ratio": None} for k in (1, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = found(capsys, "--efficiency-file", file, "--method", "a")
    assert answer["efficiency"] == f"{file} (a)"
    row = answer["options"][0]
    ratio = math.exp(np.interp(row["token_lag"], [0, 1, 3], np.log([1, 1.1, 1.3])))
    assert row["time"]["value"] == near(ratio / row["speed"]["value"])
    answer = found(capsys, "--efficiency-file", file, "--method", "b")
    assert answer["best"]["synchronous"]
    assert answer["options"][0]["time"] == {"low": None, "value": None, "high": None}
    assert (
        "Stay synchronous"
        in run(capsys, *JOB, *LAW, *QUICK, "--no-figure", "--efficiency-file", file, "--method", "b")[1]
    )
    assert "choose one with --method: a, b" in run(capsys, *JOB, *LAW, "--efficiency-file", file)[2]
    assert "it has: a, b" in run(capsys, *JOB, *LAW, "--efficiency-file", file, "--method", "c")[2]


@pytest.mark.parametrize("curve", [[], CURVE])
def test_a_figure_by_default(curve: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, *JOB, *LAW, *QUICK, *curve)
    assert code == 0
    assert "figure: vcposim-plan.png" in out
    assert [p.name for p in tmp_path.iterdir()] == ["vcposim-plan.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", "1"], ["devices", "1"]),
        (["--devices", "x"], ["--devices", "x"]),
        (["--tokens-per-s", "0"], ["tokens_per_s", "0"]),
        (["--tokens-per-s", "nan"], ["tokens_per_s", "nan"]),
        (["--train-s", "-1"], ["train_s", "-"]),
        (["--train-devices", "0"], ["train_devices", "0"]),
        (["--sync-s", "inf"], ["sync_s", "inf"]),
        (["--slots", "0"], ["slots", "0"]),
        (["--groups", "0"], ["groups", "0"]),
        (["--single-tokens-per-s", "0.1"], ["single_tokens_per_s", "0.1"]),
        (["--length-mean", "0"], ["length mean", "0"]),
        (["--length-sd", "-3"], ["length sd", "-3"]),
        (["--length-tail", "1.5"], ["--length-sd", "--length-tail"]),
        (["--lengths", "none.txt"], ["--lengths", "together"]),
        (["--max-tokens", "0"], ["max_tokens", "0"]),
        (["--lags", "-1"], ["max_lag", "-1"]),
        (["--lags", "2", "2"], ["--lags", "2", "twice"]),
        (["--generators", "4"], ["generators", "4"]),
        (["--generators", "1", "1"], ["--generators", "twice"]),
        (["--admission", "paec"], ["paec", "did you mean 'pace'"]),
        (["--batching", "statik"], ["statik", "did you mean 'static'"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--seeds", "1"], ["seeds", "1"]),
        (["--efficiency", "1"], ["--efficiency", "'1'", "LAG:RATIO"]),
        (["--efficiency", "1:x"], ["--efficiency", "1:x"]),
        (["--efficiency", "1:2:3:4"], ["--efficiency", "ratio 2"]),
        (["--efficiency", "1:1.1", "1:1.2"], ["lag 1", "twice"]),
        (["--efficiency", "-1:1.1"], ["--efficiency"]),
        (["--efficiency", "0.5:1.1"], ["outside the curve"]),
        (["--efficiency", "1:1.1", "--efficiency-file", "f"], ["--efficiency-file", "one"]),
        (["--efficiency-file", "none.jsonl"], ["none.jsonl", "cannot be read"]),
        (["--efficiency-file", "bad.jsonl"], ["bad.jsonl", "line 2", "not a JSON object"]),
        (["--efficiency-file", "empty.jsonl"], ["empty.jsonl", "no line has steps_ratio"]),
        (["--efficiency-file", "word.jsonl"], ["word.jsonl", "line 1", "lag", "'two'"]),
        (["--efficiency-file", "negative.jsonl"], ["negative.jsonl", "-2"]),
        (["--method", "a"], ["--method", "--efficiency-file"]),
        (["--steps-to-target", "0"], ["--steps-to-target", "0"]),
        (["--figure", "no/such/folder/f.png"], ["no/such/folder"]),
        (["--figure", "figure.txt"], ["figure.txt", ".png"]),
    ],
)
def test_bad_options_get_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"lag": 1, "steps_ratio": 1.2}\n[1]\n')
    Path("empty.jsonl").write_text('{"lag": 1}\n')
    Path("word.jsonl").write_text('{"lag": "two", "steps_ratio": 1.2}\n')
    Path("negative.jsonl").write_text('{"lag": 1, "steps_ratio": -2}\n')
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = run(capsys, *JOB, *LAW, *QUICK, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_missing_numbers_get_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *JOB[2:], *LAW)
    assert (code, err.count("\n")) == (2, 1)
    assert "--devices" in err
    code, _, err = run(capsys, *JOB)
    assert (code, err.count("\n")) == (2, 1)
    assert "--length-mean" in err
