"""Metrics alone: every framework's log in every container gives the same gauges and alarms, or is refused in a line.

TRL, verl and prime-rl are not installed here: their logs are written after the files that `KEYS` names as sources.
"""

import csv
import gzip
import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.statistical import assert_near, near
from vcposim.commands.main import main
from vcposim.errors import InputError
from vcposim.replay import LoggedRun, read_dump, read_metrics
from vcposim.replay.as_json import metrics_json
from vcposim.replay.metrics import KEYS, find_metrics, metrics_summary

Row = dict[str, Any]

VERL = {
    "ess_fraction": "rollout_corr/rollout_is_eff_sample_size",
    "mean_weight": "rollout_corr/rollout_is_mean",
    "chi2": "rollout_corr/chi2_seq",
    "kl_token": "rollout_corr/kl",
    "length": "response_length/mean",
    "clip_fraction": "actor/pg_clipfrac",
    "grad_norm": "actor/grad_norm",
    "reward": "critic/score/mean",
}
VERL_06 = {name: key.replace("rollout_corr/", "mismatch/") for name, key in VERL.items() if name != "chi2"} | {
    "kl_token": "mismatch/mismatch_kl"
}
TRL = {
    "mean_weight": "sampling/importance_sampling_ratio/mean",
    "kl_reference_token": "kl",
    "length": "completions/mean_length",
    "clip_fraction": "clip_ratio/region_mean",
    "grad_norm": "grad_norm",
    "reward": "reward",
}
PRIME = {
    "kl_token": "mismatch_kl/all/mean",
    "length": "train/agg/effective/agent/num_output_tokens/mean",
    "clip_fraction": "is_masked/mean",
    "lag": "off_policy/mean",
    "grad_norm": "optim/grad_norm",
    "reward": "train/agg/effective/agent/reward/mean",
}
OWN = {name: f"vcpo/{name}" for name in ("ess_fraction_sequence", "mean_weight", "khat", "max_share", "lag")}
FRAMEWORKS = {"verl": VERL, "verl 0.6": VERL_06, "trl": TRL, "prime-rl": PRIME, "vcposim": OWN}


def course(names: Sequence[str], steps: int = 30, seed: int = 0) -> list[Row]:
    """A value of every gauge at every step, by gauge; float32 numbers, which every log keeps."""
    rng = random.Random(seed)

    def short(x: float) -> float:
        return float(struct.unpack("f", struct.pack("f", x))[0])

    return [{"step": 1 + k} | {name: short(rng.uniform(0.01, 1.5)) for name in names} for k in range(steps)]


def logged(table: list[Row], keys: dict[str, str], prefix: str = "") -> list[Row]:
    return [{(prefix + keys[n] if n in keys else n): v for n, v in row.items()} for row in table]


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _text(rows: list[Row]) -> str:
    return json.dumps({k: v for k, v in rows[0].items() if k != "step"})


def _jsonl(folder: Path, rows: list[Row]) -> Path:
    return _put(folder / "m.jsonl", _lines([{"time": 1.0, **row} for row in rows]))


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _verl_file(folder: Path, rows: list[Row]) -> Path:
    return _put(folder / "run.jsonl", _lines([{"step": r["step"], "data": r} for r in rows]))


def _gz(folder: Path, rows: list[Row]) -> Path:
    return _put(folder / "m.jsonl.gz", gzip.compress(_lines(rows)))


def _scattered(folder: Path, rows: list[Row]) -> Path:
    """A row a metric, as prime-rl's monitors write them."""
    single = [{"step": r["step"], k: v} for r in rows for k, v in r.items() if k != "step"]
    return _put(folder / "m.jsonl", _lines(single))


def _state(folder: Path, rows: list[Row]) -> Path:
    history = [{**r, "epoch": 0.5} for r in rows] + [{"train_runtime": 3.0, "step": rows[-1]["step"]}]
    state = {"global_step": 1, "log_history": history}
    return _put(folder / "trainer_state.json", json.dumps(state, indent=1).encode())


def _csv_file(folder: Path, names: list[str], rows: list[list[Any]]) -> Path:
    with open(folder / "export.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return folder / "export.csv"


def _csv(folder: Path, rows: list[Row]) -> Path:
    names = ["_step", "_runtime", *(k for k in rows[0] if k != "step")]
    return _csv_file(folder, names, [[r.get("step" if n == "_step" else n, 7.5) for n in names] for r in rows])


def _panel(folder: Path, rows: list[Row]) -> Path:
    """A panel of W&B: run and key in the header, with bounds beside."""
    keys = [k for k in rows[0] if k != "step"]
    names = ["Step", *(f"brave-river-7 - {k}{end}" for k in keys for end in ("", "__MIN", "__MAX"))]
    return _csv_file(folder, names, [[r["step"], *(r[k] for k in keys for _ in "abc")] for r in rows])


def _trackio(folder: Path, rows: list[Row]) -> Path:
    out = [{"run_id": "a1", "timestamp": "2026-01-01", "step": r["step"], "metrics": _text([r])} for r in rows]
    pq.write_table(pa.Table.from_pylist(out), folder / "metrics.parquet")
    return folder / "metrics.parquet"


def _history(folder: Path, rows: list[Row]) -> Path:
    out = [{"_step": r["step"], **{k: v for k, v in r.items() if k != "step"}} for r in rows]
    pq.write_table(pa.Table.from_pylist(out), folder / "history.parquet")
    return folder / "history.parquet"


def _array(folder: Path, rows: list[Row]) -> Path:
    return _put(folder / "history.json", json.dumps(rows).encode())


def _tensorboard(folder: Path, rows: list[Row]) -> Path:
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(folder / "tb"))
    for r in rows:
        for key, value in r.items():
            if key != "step":
                writer.add_scalar(key, value, r["step"])
    writer.close()
    return folder / "tb"


CONTAINERS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "json lines": _jsonl,
    "verl's file logger": _verl_file,
    "gz": _gz,
    "a row a metric": _scattered,
    "trainer_state": _state,
    "csv": _csv,
    "csv of a panel": _panel,
    "trackio parquet": _trackio,
    "history parquet": _history,
    "json array": _array,
    "tensorboard": _tensorboard,
}


def assert_same(found: LoggedRun, table: list[Row], keys: dict[str, str]) -> None:
    """The values that were logged, under their gauges."""
    assert found.steps == [row["step"] for row in table]
    right = {name: [row[name] for row in table] for name in keys}
    reward, length, kl = (right.pop(name, None) for name in ("reward", "length", "kl_token"))
    if kl is not None and length is not None:
        right["kl_behavior_target"] = [a * b for a, b in zip(kl, length, strict=True)]
    assert {one.name for one in found.gauges} == set(right)
    for one in found.gauges:
        assert_near(one.value, right[one.name])
    if reward is not None:
        assert found.reward is not None
        assert_near(found.reward.value, reward)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_framework_by_container(framework: str, container: str, tmp_path: Path) -> None:
    keys = FRAMEWORKS[framework]
    table = course(list(keys), steps=4)
    path = CONTAINERS[container](tmp_path, logged(table, keys))
    assert find_metrics([path])  # recognized without being told
    assert_same(read_metrics([path]), table, keys)


@pytest.mark.parametrize("container", ["json lines", "csv", "tensorboard"])
def test_the_prefix_of_transformers_reporters_is_seen_through(container: str, tmp_path: Path) -> None:
    table = course(list(TRL), steps=3)
    path = CONTAINERS[container](tmp_path, logged(table, TRL, prefix="train/"))
    assert_same(read_metrics([path]), table, TRL)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 40),
    framework=st.sampled_from(sorted(FRAMEWORKS)),
    container=st.sampled_from(sorted(CONTAINERS.keys() - {"tensorboard"})),
)
def test_random_runs_come_back(
    seed: int, steps: int, framework: str, container: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = FRAMEWORKS[framework]
    table = course(list(keys), steps, seed)
    assert_same(read_metrics([CONTAINERS[container](tmp_path_factory.mktemp("m"), logged(table, keys))]), table, keys)


def test_alarms_come_at_the_panels_limits_and_the_rest_is_said_to_be_unjudged(tmp_path: Path) -> None:
    table = course(list(VERL), steps=6)
    for k, row in enumerate(table):
        row |= {
            "ess_fraction": 0.9 - 0.1 * k,
            "mean_weight": 0.9,
            "chi2": 0.5,
            "kl_token": 1e-4 * (k + 1),
            "length": 900.0,
        }
    found = read_metrics([_jsonl(tmp_path, logged(table, VERL))])
    # 0.9, 0.8, 0.7, 0.6, 0.5, 0.4 against above one half, which 0.5 is not; 0.09 a step against (log 2) / 2 = 0.347
    assert found.first_alarms == {"ess_fraction": 5, "kl_behavior_target": 4}
    limits = {one.name: one.limit for one in found.gauges}
    assert limits["kl_behavior_target"] == [math.log(2) / 2] * 6
    assert limits["clip_fraction"] is limits["grad_norm"] is None
    assert {"clip_fraction", "grad_norm", "khat", "corrections"} <= set(found.unjudged)
    assert "ess_fraction" not in found.unjudged
    short = [{k: v for k, v in row.items() if "length" not in k} for row in logged(table, VERL)]
    without = read_metrics([_jsonl(tmp_path, short)])
    kl = without.gauge("kl_token")
    assert kl is not None
    assert kl.limit is None  # a token's KL has no limit of a trajectory's
    assert "no mean length" in without.unjudged["kl_token"]
    heads = [line.split(":")[0] for line in metrics_summary(found)]
    assert heads == ["Data", "Staleness", "Dominates", "Change", "How sure"]
    assert "0.63 (square root of the last ESS)" in metrics_summary(found)[3]  # sqrt(0.4)


def test_a_limit_that_is_logged_beside_its_gauge_is_used(tmp_path: Path) -> None:
    rows = [{"step": k, "vcpo/khat": 0.4 + 0.1 * k, "vcpo/khat/threshold": 0.55} for k in range(4)]
    found = read_metrics([_jsonl(tmp_path, rows)])
    assert found.first_alarms == {"khat": 2}
    bare = read_metrics([_jsonl(tmp_path, [{k: v for k, v in r.items() if "thr" not in k} for r in rows])])
    assert bare.first_alarms == {}  # it depends on the number of samples, which is not logged


def test_a_reward_that_stays_below_half_of_its_best_has_collapsed(tmp_path: Path) -> None:
    table = course(list(VERL), steps=60)
    for row in table:
        row["reward"] = 0.8 if row["step"] < 35 else 0.3
    assert read_metrics([_jsonl(tmp_path, logged(table, VERL))]).collapsed_at == 35
    for row in table[50:]:
        row["reward"] = 0.7  # it recovers
    assert read_metrics([_jsonl(tmp_path, logged(table, VERL))]).collapsed_at is None


def test_several_runs_are_refused_by_name_and_one_can_be_asked_for(tmp_path: Path) -> None:
    both = {name: course(list(TRL), steps=3, seed=k) for k, name in enumerate(("a", "b"))}
    rows = [{"run_name": n, "step": r["step"], "metrics": _text([r])} for n, t in both.items() for r in logged(t, TRL)]
    path = tmp_path / "trackio.jsonl"
    path.write_bytes(_lines(rows))
    with pytest.raises(InputError, match=r"metrics of 2 runs \(a, b\); name one with --run"):
        read_metrics([path])
    for name, table in both.items():
        assert_same(read_metrics([path], run=name), table, TRL)
    with pytest.raises(InputError, match="--run"):
        read_metrics([path], run="c")
    key = VERL["ess_fraction"]
    panel = _csv_file(tmp_path, ["Step", f"a - {key}", f"b - {key}"], [[1, 0.9, 0.3], [2, 0.8, ""]])
    assert read_metrics([panel], run="b").first_alarms == {"ess_fraction": 1}
    assert read_metrics([panel], run="a").first_alarms == {}


def test_two_folders_of_one_run_are_joined_and_two_runs_are_refused(tmp_path: Path) -> None:
    def folders(name: str, *parts: list[Row]) -> Path:
        for k, rows in enumerate(parts):
            (tmp_path / name / f"part_{k}").mkdir(parents=True)
            (tmp_path / name / f"part_{k}" / "metrics.jsonl").write_bytes(_lines(rows))
        return tmp_path / name

    table = logged(course(list(VERL)), VERL)
    some = [{k: v for k, v in row.items() if k != VERL["reward"]} for row in table]
    rest = [{k: v for k, v in row.items() if k in ("step", VERL["reward"])} for row in table]
    for name, parts in (("by metric", (some, rest)), ("restarted", (table[:18], table[15:]))):
        assert_same(read_metrics([folders(name, *parts)]), course(list(VERL)), VERL)
    with pytest.raises(InputError, match=r"part_0 and .*part_1 log the same metrics at the same steps: two runs"):
        read_metrics([folders("two", table, logged(course(list(VERL), seed=1), VERL))])


@pytest.mark.parametrize(
    "row", [{"step": 1, "train/loss": 0.3, "lr": 1e-6}, {"rollout/step": 1, "train/ppo_kl": 0.1, "perf/note": "x"}]
)
def test_metrics_that_nobody_knows_are_called_metrics_and_listed(row: Row, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(_lines([row]))
    with pytest.raises(InputError, match="are metrics, not rollouts, and none is a gauge that is known"):
        read_dump(tmp_path / "m.jsonl")
    with pytest.raises(InputError, match=f"none of its metrics is a gauge .*; it has {', '.join(sorted(row))}"):
        read_metrics([tmp_path / "m.jsonl"])


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_log_of_trl_with_its_lengths_is_a_log_and_a_rollout_with_lists_is_none(prefix: str, tmp_path: Path) -> None:
    table = [{"step": k, "reward": 0.5, "kl": 0.1 * k, "completion_length": 300.0, "grad_norm": 1.0} for k in range(4)]
    table = [{key if key == "step" else prefix + key: x for key, x in row.items()} for row in table]
    names = list(table[0])
    (tmp_path / "m.jsonl").write_bytes(_lines(table))
    csv_file = _csv_file(tmp_path, names, [list(row.values()) for row in table])
    for path in (tmp_path / "m.jsonl", csv_file):
        assert find_metrics([path]) == [str(path)]
        kl = read_metrics([path]).gauge("kl_reference_token")
        assert kl is not None
        assert_near(kl.value, [0.1 * k for k in range(4)])
    (tmp_path / "r.jsonl").write_bytes(_lines([{**row, "pi_logp": [-1.0], "mu_logp": [-1.1]} for row in table]))
    assert find_metrics([tmp_path / "r.jsonl"]) == []


def test_the_trainers_step_counts_and_not_the_number_of_log_calls(tmp_path: Path) -> None:
    key = VERL["ess_fraction"]
    names = ["_step", "train/global_step", key]
    path = _csv_file(tmp_path, names, [[0, 10, 0.9], [1, "", ""], [2, 20, 0.8], [3, "", 0.7]])
    found = read_metrics([path])
    assert found.steps == [10, 20]
    assert any("1 rows of metrics are left out: their step is empty" in note for note in found.notes)


def test_restarts_and_rows_without_a_step_are_said(tmp_path: Path) -> None:
    table = logged(course(list(VERL), steps=5), VERL)
    again = [*table, *[{**row, VERL["ess_fraction"]: 0.9} for row in table[3:]]]
    found = read_metrics([_jsonl(tmp_path, again)])
    assert found.steps == [1, 2, 3, 4, 5]
    ess = found.gauge("ess_fraction")
    assert ess is not None
    assert ess.value[3:] == [0.9, 0.9]
    assert any("2 values were logged again" in note for note in found.notes)
    bare = read_metrics([_jsonl(tmp_path, [{k: v for k, v in r.items() if k != "step"} for r in table])])
    assert bare.steps == [0, 1, 2, 3, 4]
    assert any("5 rows name no step" in note for note in bare.notes)


@pytest.mark.parametrize(
    ("value", "words"),
    [("high", "no number"), ([0.5], "no number"), (True, "no number"), ({"a": 1}, "no number"), (10**400, "no number")],
)
def test_a_metric_that_is_no_number_is_refused_or_left_out_on_request(value: Any, words: str, tmp_path: Path) -> None:
    rows = logged(course(list(VERL), steps=3), VERL)
    rows[1][VERL["ess_fraction"]] = value
    path = _jsonl(tmp_path, rows)
    with pytest.raises(InputError, match=words) as caught:
        read_metrics([path])
    assert "line 2" in str(caught.value)
    assert "\n" not in str(caught.value)
    found = read_metrics([path], skip_bad=True)
    ess = found.gauge("ess_fraction")
    assert ess is not None
    assert ess.at == [1, 3]
    assert sum(map(len, found.skipped.values())) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("_step,actor/ppo_kl,actor/ppo_kl\n0,1,2\n", "several columns called 'actor/ppo_kl'"),
        ('{"step": 100000000000000000001, "actor/ppo_kl": 1}\n', "is too large to tell it from the next"),
        ('{"step": 1, "reward": 1, "log_prob": [-1.0]}\n', "these are rollouts, not metrics"),
    ],
)
def test_what_would_be_read_for_something_else_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(InputError, match=words):
        read_metrics([tmp_path / "m"])


def test_nan_and_infinity_are_gaps_and_said(tmp_path: Path) -> None:
    rows = logged(course(list(VERL), steps=4), VERL)
    rows[1][VERL["ess_fraction"]], rows[2][VERL["grad_norm"]] = math.nan, math.inf
    found = read_metrics([_jsonl(tmp_path, rows)])
    ess = found.gauge("ess_fraction")
    assert ess is not None
    assert ess.at == [1, 3, 4]
    assert any("grad_norm is infinite at 1 steps" in note for note in found.notes)
    json.dumps(metrics_json(found), allow_nan=False)


def test_rollouts_beside_metrics_are_said_not_to_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "kl": 0.1, "clip_ratio": 0.0}]}))
    assert not any("rollouts too" in note for note in read_metrics([folder]).notes)
    rollout = {"group": 1, "reward": 1.0, "log_prob": [-1.0], "behavior_log_prob": [-1.0]}
    (folder / "r.jsonl").write_bytes(_lines([rollout] * 4))
    assert any(f"{folder} holds rollouts too, which are not read" in note for note in read_metrics([folder]).notes)


def test_rollouts_are_no_metrics_and_metrics_no_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollout = {"group": 1, "reward": 1.0, "kl": 0.1, "grad_norm": 1.0, "log_prob": [-1.0], "behavior_log_prob": [-1.0]}
    path = tmp_path / "r.jsonl"
    path.write_bytes(_lines([rollout] * 4))
    assert find_metrics([path]) == []
    (tmp_path / "x.jsonl").write_bytes(_lines([{"step": 1, "loss": 2.0}]))
    assert main(["replay", str(tmp_path / "x.jsonl"), "--metrics"]) == 2
    assert "none of its metrics is a gauge that is known" in capsys.readouterr().err
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "rollouts.jsonl").write_bytes(_lines([rollout] * 4))
    assert find_metrics([folder]) == []
    (folder / "metrics.jsonl").write_bytes(_lines([{"step": 1, "loss": 2.0}]))
    assert find_metrics([folder]) == []
    assert find_metrics([folder], sure=True) == [str(folder / "metrics.jsonl")]


def test_the_command_prints_json_and_a_page_and_refuses_what_needs_rollouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = course(list(VERL), steps=30)
    path, page = _jsonl(tmp_path, logged(table, VERL)), tmp_path / "m.html"
    assert main(["replay", str(path), "--json", "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "metrics"
    assert found["keys"]["ess_fraction"]["key"] == VERL["ess_fraction"]
    text = page.read_text()
    for gauge, step in found["first_alarms"].items():
        assert f"{gauge} at step {step}" in text
    assert text.index("<strong>Data:</strong>") < text.index('id="run"') < text.index('id="unjudged"')
    assert main(["replay", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cannot be judged: khat" in out
    assert main(["replay", str(path), "--estimator", "vcpo"]) == 2
    assert "needs rollouts" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_every_key_has_a_source_and_a_gauge_that_is_judged_or_said_not_to_be() -> None:
    for key in KEYS:
        assert "/" in key.source, key
        assert key.framework in FRAMEWORKS, key


def test_an_event_file_that_is_cut_off_says_so_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    table = course(list(VERL), steps=6)
    folder = _tensorboard(tmp_path, logged(table, VERL))
    event = next(folder.iterdir())
    data = event.read_bytes()
    event.write_bytes(data[:-7])
    found = read_metrics([folder])
    assert any("cut off" in note for note in found.notes)
    rng = random.Random(0)
    for _ in range(40):
        broken = bytearray(data)
        at = rng.randrange(len(broken))
        broken[at] ^= 1 << rng.randrange(8)
        event.write_bytes(broken)
        now = attempt(event)  # a length that was hit is caught by its own checksum
        assert now is None or any("cut off" in note for note in now.notes)


def test_without_tensorboard_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder = _tensorboard(tmp_path, logged(course(list(VERL), steps=2), VERL))
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(InputError, match=r"pip install 'vcposim\[tensorboard\]'"):
        read_metrics([folder])


def attempt(path: Path) -> LoggedRun | None:
    """The run, or None where the file is refused in one line."""
    try:
        return read_metrics([path])
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    return None


@pytest.mark.slow
def test_three_hundred_damaged_logs_are_refused_or_say_what_their_bytes_say(tmp_path: Path) -> None:
    """The twin reads the same bytes with the standard library: a value that is read is a value that stands there."""
    rng = random.Random(0)
    rows = logged(course(list(VERL), steps=4), VERL)
    read = 0
    for k in range(300):
        name, data = rng.choice((("m.jsonl", _lines(rows)), ("m.csv", _csv(tmp_path, rows).read_bytes())))
        out = bytearray(data[: rng.randrange(len(data))] if k % 5 == 0 else data)
        for _ in range(rng.choice((1, 1, 3))):
            if out:
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        path = tmp_path / name
        path.write_bytes(out)
        found = attempt(path)
        if found is None:
            continue
        read += 1
        text = bytes(out).decode("utf-8", "replace")
        for one in [*found.gauges, *([found.reward] if found.reward else [])]:
            key = found.keys.get(one.name)
            if key is None:
                continue
            for value in one.value:
                assert any(near_text(word, value) for word in words(text)), (one.name, value)
        json.dumps(metrics_json(found), allow_nan=False)
    assert 30 < read < 290


def words(text: str) -> list[str]:
    for letter in ',:{}[]"\n\r ':
        text = text.replace(letter, " ")
    return text.split()


def near_text(word: str, value: float) -> bool:
    try:
        return bool(float(word) == near(value))
    except ValueError:
        return False
