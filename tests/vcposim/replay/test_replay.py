"""`vcposim replay`: numbers against plain loops, the JSON contract, the bootstrap against SciPy, every bad input."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.kit.statistical import SEARCHED, assert_near, assert_within_errors, near
from vcposim.baselines import baseline
from vcposim.commands.main import main
from vcposim.diagnostics import ess_fraction
from vcposim.errors import InputError
from vcposim.replay import Dump, contributions, parse_columns, read_dump, to_json
from vcposim.replay.contributions import Interval, bootstrap_ratios
from vcposim.replay.replay import DEFAULT_BASELINES, replay, verdict
from vcposim.weights import Weighting

Record = dict[str, Any]


def records(sizes: tuple[int, ...] = (4, 1, 7, 4), seed: int = 0, spread: float = 0.5) -> list[Record]:
    """Ragged groups in shuffled order, with every field."""
    rng = np.random.default_rng(seed)
    out = []
    for group, size in enumerate(sizes):
        for _ in range(size):
            behavior = -30 * rng.random() - 20
            out.append(
                {
                    "group": f"prompt {group}",
                    "reward": float(rng.random() < 0.5),
                    "length": int(rng.integers(1, 40)),
                    "behavior_log_prob": behavior,
                    "log_prob": behavior + spread * rng.normal(),
                    "score_sq_norm": float(rng.lognormal(3, 1)),
                    "logit_proxy": float(rng.lognormal()),
                }
            )
    return [out[i] for i in rng.permutation(len(out))]


def write(path: Path, rows: list[Record]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "dump.jsonl", records())


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["replay", *map(str, arguments)])
    return code, *capsys.readouterr()


def grouped(rows: list[Record]) -> dict[str, list[Record]]:
    out: dict[str, list[Record]] = {}
    for row in rows:
        out.setdefault(row["group"], []).append(row)
    return out


def plain_baseline(name: str, rows: list[Record], without: int | None = None) -> list[float]:
    """b_i of each sample by loops over the definition; `without` leaves that sample out of weighted means."""
    ratio = [math.exp(r["log_prob"] - r["behavior_log_prob"]) for r in rows]
    weights = {
        "group_mean": [1.0 for _ in rows],
        "length_weighted": [r["length"] for r in rows],
        "on_policy_optimal": [r["score_sq_norm"] for r in rows],
        "opob": [w**2 * r["score_sq_norm"] for w, r in zip(ratio, rows, strict=True)],
        "opob_released": [w**4 * r["score_sq_norm"] for w, r in zip(ratio, rows, strict=True)],
    }

    def mean(a: list[float], skip: int | None = None) -> float:
        kept = [j for j in range(len(rows)) if j != skip]
        return sum(a[j] * rows[j]["reward"] for j in kept) / sum(a[j] for j in kept)

    n = range(len(rows))
    if name == "zero":
        return [0.0 for _ in n]
    if name == "leave_one_out":
        return [mean(weights["group_mean"], i) for i in n]
    if name == "opob_leave_one_out":
        return [mean(weights["opob"], i) for i in n]
    if name == "leverage_damped_mean":
        a, b = weights["opob"], mean(weights["group_mean"])
        return [rows[i]["reward"] - (1 - a[i] / sum(a)) * (rows[i]["reward"] - b) for i in n]
    return [mean(weights[name], without) for _ in n]


def plain_moment(b: list[float], rows: list[Record]) -> float:
    return sum(
        (math.exp(r["log_prob"] - r["behavior_log_prob"]) * (r["reward"] - b[i])) ** 2 * r["score_sq_norm"]
        for i, r in enumerate(rows)
    )


def plain_held_out(name: str, rows: list[Record]) -> list[float]:
    alias = {"leave_one_out": "group_mean", "opob_leave_one_out": "opob"}.get(name, name)
    return [plain_baseline(alias, rows, without=i)[i] for i in range(len(rows))]


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6).map(tuple), seed=st.integers(0, 50))
def test_every_number_is_its_definition(sizes: tuple[int, ...], seed: int, tmp_path_factory: Any) -> None:
    rows = records(sizes, seed)
    groups = grouped(rows)
    found = replay(read_dump(write(tmp_path_factory.mktemp("d") / "d.jsonl", rows)), resamples=100)
    assert found.labels == list(groups)
    for row in found.rows:
        alone = row.baseline in ("leave_one_out", "opob_leave_one_out")
        sums, held = np.zeros(2), np.zeros(2)
        for value, members in zip(row.per_group, groups.values(), strict=True):
            if alone and len(members) == 1:
                assert math.isnan(value)
                continue
            b = plain_baseline(row.baseline, members)
            assert value == near(sum(b) / len(b))
            sums += plain_moment(b, members), plain_moment(plain_baseline("group_mean", members), members)
            if len(members) > 1 and baseline(row.baseline).weight is not None:
                pair = (plain_held_out(name, members) for name in (row.baseline, "group_mean"))
                held += [plain_moment(b, members) for b in pair]
        for interval, (top, bottom) in ((row.second_moment_ratio, sums), (row.held_out_ratio, held)):
            if interval is not None and baseline(row.baseline).weight is not None:
                assert interval.value == near(top / bottom if bottom > 1e-12 else math.nan, nan_ok=True)


def test_per_group_columns_are_their_definitions(file: Path) -> None:
    found = replay(read_dump(file))
    for i, members in enumerate(grouped(records()).values()):
        log_w = np.array([r["log_prob"] - r["behavior_log_prob"] for r in members])
        a = np.exp(2 * log_w) * [r["score_sq_norm"] for r in members]
        assert found.size[i] == len(members)
        assert found.mean_reward[i] == near(np.mean([r["reward"] for r in members]))
        assert found.ess_fraction[i] == near(ess_fraction(log_w))
        assert found.max_leverage[i] == near(a.max() / a.sum())
    assert found.diagnostics["max_leverage"].value == found.max_leverage.max()


def test_opob_minimizes_in_sample_and_can_lose_held_out() -> None:
    # noise alone: rewards, norms and weights are independent, so nothing beats the mean; in sample OPOB "wins"
    found = replay(as_dump(records((12,) * 400, seed=4, spread=1.0)))
    opob = found.row("opob")
    assert opob is not None
    assert opob.held_out_ratio is not None
    assert opob.second_moment_ratio.high < 1
    assert opob.held_out_ratio.low > 1
    assert "would have hurt" in verdict(found)


def test_a_dump_in_which_opob_helps_says_yes() -> None:
    # every norm is huge where the reward is 1 and the weight is 1: the optimal baseline is near 1, the mean is not
    rows = records((16,) * 30, seed=2, spread=0.0)
    for row in rows:
        row["score_sq_norm"] = 50.0 if row["reward"] else 1.0
    assert "Yes" in verdict(replay(as_dump(rows)))


def as_dump(rows: list[Record], **changes: Any) -> Dump:
    code: dict[str, int] = {}
    group = np.array([code.setdefault(r["group"], len(code)) for r in rows])
    column = {name: np.array([float(r[name]) for r in rows]) for name in ("reward", "length", "score_sq_norm")}
    log_ratio = np.array([r["log_prob"] - r["behavior_log_prob"] for r in rows])
    fields = {"path": "memory", "labels": list(code), "group": group, "log_ratio": log_ratio, **column}
    return Dump(**{**fields, "norm_source": "score_sq_norm", "tokens": None, **changes})


def ratios(found: Any) -> dict[str, float]:
    return {row.baseline: row.second_moment_ratio.value for row in found.rows}


@given(shift=st.sampled_from([-5000.0, 3000.0, 2e4]), factor=st.sampled_from([1e-80, 1e80]))
def test_ratios_do_not_feel_the_scale_of_weights_or_norms(shift: float, factor: float) -> None:
    rows = records()
    plain = as_dump(rows)
    moved = as_dump(rows, log_ratio=plain.log_ratio + shift, score_sq_norm=plain.score_sq_norm * factor)
    assert ratios(replay(moved, resamples=100)) == near(ratios(replay(plain, resamples=100)), allow=SEARCHED)


def test_extreme_weights_leave_valid_json() -> None:
    rows = records((8, 8, 8), seed=1)
    dump = as_dump(rows, log_ratio=np.random.default_rng(0).normal(size=24) * 1e4)
    for weighting in ("importance", "truncate", "self_normalize", "pareto_smooth", "none", "mask"):
        json.dumps(to_json(replay(dump, weighting=weighting)), allow_nan=False)


def test_weighting_is_the_one_asked_for() -> None:
    # at a cap below every weight, truncated weights are constant: OPOB becomes the on-policy optimal baseline
    found = replay(as_dump(records()), weighting="truncate", cap=0.05)
    opob, on_policy = found.row("opob"), found.row("on_policy_optimal")
    assert opob is not None
    assert on_policy is not None
    assert_near(opob.per_group, on_policy.per_group, scale=0)
    assert any("not variances" in note for note in found.notes)


@pytest.mark.parametrize(("weighting", "cap"), [("truncate", 1.1), ("mask", 1.1), ("none", 8.0)])
def test_treated_weights_enter_the_second_moment(weighting: str, cap: float) -> None:
    # untouched ratios scaled into the moment instead would pass every scale-free test above
    rows = records((6, 5, 8))
    found = replay(as_dump(rows), weighting=weighting, cap=cap, baselines=["zero", "on_policy_optimal"])
    sums = {"zero": 0.0, "on_policy_optimal": 0.0, "group_mean": 0.0}
    for members in grouped(rows).values():
        w = np.exp([r["log_prob"] - r["behavior_log_prob"] for r in members])
        treated = {"truncate": np.minimum(w, cap), "mask": np.where(w <= cap, w, 0), "none": w * 0 + 1}[weighting]
        for name in sums:
            advantage = np.array([r["reward"] for r in members]) - plain_baseline(name, members)
            sums[name] += np.sum((treated * advantage) ** 2 * [r["score_sq_norm"] for r in members])
    for row in found.rows:
        assert row.second_moment_ratio.value == near(sums[row.baseline] / sums["group_mean"])


def test_numbers_of_a_group_do_not_depend_on_the_others() -> None:
    rows = records((5, 3, 5, 9))
    groups, found = grouped(rows), replay(as_dump(rows))
    for i, members in enumerate(groups.values()):
        alone = replay(as_dump(members))
        for row, one in zip(found.rows, alone.rows, strict=True):
            assert row.per_group[i] == near(one.per_group[0])


def test_bootstrap_is_scipys_percentile_bootstrap() -> None:
    rng = np.random.default_rng(0)
    y = rng.lognormal(size=40)
    x = y * rng.lognormal(size=40, sigma=0.3)
    found = bootstrap_ratios(np.array([[x, y]]), np.array([40]), 20_000, np.random.default_rng(1))[0]
    twin = stats.bootstrap(
        (x, y),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert found.value == x.sum() / y.sum()
    width = twin.high - twin.low
    # Monte Carlo error of a 2.5% quantile: 0.6% of the width, of both
    assert_within_errors([found.low, found.high], [twin.low, twin.high], 0.0085 * width, degrees=20_000)


def test_intervals_are_paired_and_no_baseline_moves_another() -> None:
    dump = as_dump(records((6,) * 20))

    def interval(name: str, **changes: Any) -> Interval:
        row = replay(dump, **changes).row(name)
        assert row is not None
        return row.second_moment_ratio

    assert interval("opob") == interval("opob", baselines=["opob"])
    assert interval("opob") != interval("opob", seed=1)
    assert interval("group_mean") == (1, 1, 1)


def test_a_few_groups_are_no_verdict() -> None:
    found = replay(as_dump(records((8,) * 9)))
    assert "Too few groups to tell" in verdict(found)
    assert any("9 groups are few" in note for note in found.notes)


def test_json_is_the_contract_and_deterministic(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, file, "--json")
    again = run(capsys, file, "--json")[1]
    assert code == 0
    assert out == again
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["n"], found["groups"]) == (16, 4)
    assert {"sequence", "sequence_truncated", "geometric", "gradient"} <= set(found["diagnostics"]["ess_fraction"])
    for name in ("mean_weight", "max_share", "kl_behavior_target", "max_leverage"):
        assert isinstance(found["diagnostics"][name], float)
    assert found["diagnostics"]["khat"] is None  # 16 samples have no tail
    assert [row["baseline"] for row in found["rows"]] == list(DEFAULT_BASELINES)
    for row in found["rows"]:
        assert len(row["per_group"]) == 4
        assert set(row["second_moment_ratio"]) == {"value", "low", "high"}
    rows = {row["baseline"]: row for row in found["rows"]}
    assert None in rows["leave_one_out"]["per_group"]
    assert None not in rows["opob"]["per_group"]
    assert set(found["thresholds"]) >= {"khat", "ess_fraction_sequence"}
    assert found["norm_source"] == "score_sq_norm"


def test_people_get_tables_a_sentence_and_a_figure(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, file)
    assert (code, err) == (0, "")
    for words in (
        "prompt 2",
        "opob_leave_one_out",
        "held out",
        "Would OPOB have helped here?",
        "ALARM",
        "score_sq_norm",
    ):
        assert words in out
    assert "figure: vcposim-replay.png" in out
    first = Path("vcposim-replay.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert "vcposim-replay-2.png" in run(capsys, file)[1]  # nothing is replaced unasked
    assert Path("vcposim-replay-2.png").read_bytes() == first
    run(capsys, file, "--figure", "vcposim-replay.png", "--baseline", "opob")
    assert Path("vcposim-replay.png").read_bytes() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dump.jsonl", "vcposim-replay-2.png", "vcposim-replay.png"]


def test_parquet_is_the_same_dump(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "dump.parquet"
    pq.write_table(pa.Table.from_pylist(records()), path)
    expected = without_summary(replay(read_dump(file)))  # which names the line, or the row
    assert without_summary(replay(read_dump(path))) == expected
    disguised = path.rename(tmp_path / "dump.bin")
    assert without_summary(replay(read_dump(disguised))) == expected


def without_summary(found: Any) -> Record:
    return {key: value for key, value in to_json(found).items() if key != "summary"}


def test_columns_of_other_names(tmp_path: Path, file: Path) -> None:
    renamed = {"reward": "score", "behavior_log_prob": "rollout_log_probs", "log_prob": "lp", "group": "uid"}
    rows = [{renamed.get(key, key): value for key, value in row.items()} for row in records()]
    path = write(tmp_path / "other.jsonl", rows)
    columns = parse_columns(f"{field}={name}" for field, name in renamed.items())
    found = to_json(replay(read_dump(path, columns)))
    assert found | {"layout": "vcposim"} == to_json(replay(read_dump(file)))
    with pytest.raises(
        InputError, match="columns 'log_prob', 'behavior_log_prob', 'group', 'reward' not found"
    ) as all_of:
        read_dump(path)
    for option in ("group=uid", "reward=score", "behavior_log_prob=rollout_log_probs"):
        assert f"--column {option}" in str(all_of.value)  # all that is missing, in one message
    assert "names the prompt in verl, a single response elsewhere" in str(all_of.value)
    del columns["behavior_log_prob"]
    with pytest.raises(InputError, match="did you mean 'rollout_log_probs'"):
        read_dump(path, columns)


def with_tokens(seed: int = 0) -> tuple[list[Record], list[Record]]:
    """The same rollouts as token lists with masked garbage, and as sums."""
    rng = np.random.default_rng(seed)
    lists, sums = [], []
    for row in records(seed=seed):
        mask = np.concatenate([[1], rng.integers(0, 2, size=9)])
        behavior, target = -rng.random((2, 10))
        row.pop("length")
        garbage = [None, math.inf, 3.0, "pad"]
        tokens = {
            name: [float(x) if keep else garbage[i % 4] for i, (x, keep) in enumerate(zip(values, mask, strict=True))]
            for name, values in (("behavior_log_prob", behavior), ("log_prob", target))
        }
        lists.append({**row, **tokens, "mask": mask.tolist()})
        total = {"behavior_log_prob": float(behavior @ mask), "log_prob": float(target @ mask)}
        sums.append({**row, **total, "length": int(mask.sum())})
    return lists, sums


def test_token_lists_are_summed_under_their_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists, sums = with_tokens()
    path = write(tmp_path / "t.jsonl", lists)
    found, twin = read_dump(path), read_dump(write(tmp_path / "s.jsonl", sums))
    assert_near(found.log_ratio, twin.log_ratio)
    np.testing.assert_array_equal(found.length, twin.length)
    log_ratio = [
        a - b
        for row in lists
        for a, b, keep in zip(row["log_prob"], row["behavior_log_prob"], row["mask"], strict=True)
        if keep
    ]
    expected = ess_fraction(np.array(log_ratio))
    assert replay(found).diagnostics["ess_fraction_token"].value == near(expected)
    assert "ess_fraction_token" not in replay(twin).diagnostics
    monkeypatch.setattr("vcposim.replay.reading.TOKENS_AT_ONCE", 7)
    assert replay(read_dump(path)).diagnostics["ess_fraction_token"].value == near(expected)


@pytest.mark.parametrize(("dropped", "source"), [((), "logit_proxy"), (("logit_proxy",), "length")])
def test_a_stand_in_for_the_norm_is_never_silent(
    dropped: tuple[str, ...], source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("score_sq_norm", *dropped)} for row in records()]
    path = write(tmp_path / "d.jsonl", rows)
    found = json.loads(run(capsys, path, "--json")[1])
    assert found["norm_source"] == source
    assert any(f"{source} stands in" in note for note in found["notes"])
    assert f"{source} stands in" in " ".join(run(capsys, path, "--no-figure")[1].split())
    by_name = {row["baseline"]: row["per_group"] for row in found["rows"]}
    if source == "length":
        assert by_name["on_policy_optimal"] == near(by_name["length_weighted"])


def test_equal_rewards_leave_a_null_ratio_and_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "reward": 1.0} for row in records()]
    found = json.loads(run(capsys, write(tmp_path / "d.jsonl", rows), "--json")[1])
    for row in found["rows"]:
        assert row["second_moment_ratio"] == {"value": None, "low": None, "high": None}
        expected = 0 if row["baseline"] == "zero" else 1
        assert all(b is None or b == near(expected) for b in row["per_group"])
    assert any("equal rewards" in note for note in found["notes"])
    assert "cannot be told" in run(capsys, tmp_path / "d.jsonl", "--no-figure")[1]


def test_small_groups_are_left_out_on_request(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, file, "--json", "--min-group", 4)[1])
    assert (found["n"], found["groups"]) == (15, 3)
    assert "prompt 1" not in found["per_group"]["group"]
    assert any("1 groups with fewer than 4" in note for note in found["notes"])
    kept = [row for row in records() if row["group"] != "prompt 1"]
    assert found["rows"] == to_json(replay(as_dump(kept)))["rows"]


def test_a_baseline_that_needs_scores_is_left_out_with_a_note(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, file, "--json", "--baseline", "opob", "opob_truncated")[1])
    assert [row["baseline"] for row in found["rows"]] == ["opob"]
    assert any("opob_truncated is left out" in note for note in found["notes"])


def changed(field: str, value: Any, line: int = 5) -> bytes:
    rows = records()
    if value is KeyError:
        del rows[line - 1][field]
    else:
        rows[line - 1][field] = value
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def everywhere(drop: str) -> bytes:
    return "".join(json.dumps({k: v for k, v in row.items() if k != drop}) + "\n" for row in records()).encode()


GOOD = "".join(json.dumps(row) + "\n" for row in records()).encode()
BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["empty file"]),
    "blank": (b"\n\n", ["empty file"]),
    "malformed": (GOOD.replace(b'"reward"', b"reward", 1), ["line 1", "not JSON"]),
    "cut_off": (GOOD[:-30], ["line 16", "cut off"]),
    "array": (b"[" + GOOD.replace(b"\n", b",") + b"{}]\n", ["line 1, item 17", "group", "none of the columns"]),
    "not_object": (b"3\n", ["line 1", "number"]),
    "binary": (bytes(range(256)), ["is binary", "JSON lines or Parquet"]),
    "missing_columns": (
        everywhere("reward").replace(b'"log_prob"', b'"lp"').replace(b'"group"', b'"prompt_idx"'),
        ["line 1", "'log_prob', 'group' not found", "--column group=prompt_idx", "--column log_prob=NAME"],
    ),
    "no_length": (everywhere("length"), ["'length' not found"]),
    "field_lost": (changed("log_prob", KeyError), ["line 5", "log_prob", "missing"]),
    "null": (changed("behavior_log_prob", None), ["line 5", "behavior_log_prob", "null"]),
    "nan": (changed("log_prob", math.nan), ["line 5", "log_prob", "NaN", "not finite"]),
    "infinite": (changed("behavior_log_prob", -math.inf), ["line 5", "behavior_log_prob", "-Infinity"]),
    "positive": (changed("log_prob", 3.5), ["line 5", "log_prob", "3.5", "positive"]),
    "string": (changed("reward", "1.0"), ["line 5", "reward", "string"]),
    "huge_integer": (changed("reward", 10**400), ["line 5", "reward", "not finite"]),
    "negative_length": (changed("length", -2), ["line 5", "length", "-2"]),
    "zero_length": (changed("length", 0), ["line 5", "length", "0"]),
    "negative_norm": (changed("score_sq_norm", -1.0), ["line 5", "score_sq_norm", "-1.0"]),
    "norm_in_part": (changed("score_sq_norm", KeyError), ["line 5", "score_sq_norm"]),
    "norm_later": (changed("score_sq_norm", KeyError, line=1), ["line 2", "score_sq_norm", "all of them or in none"]),
    "group_nan": (changed("group", math.nan), ["line 5", "group", "NaN"]),
    "group_null": (changed("group", None), ["line 5", "group"]),
    "tokens_unequal": (
        json.dumps({**records()[0], "log_prob": [-1, -2], "behavior_log_prob": [-1]}).encode() + b"\n",
        ["line 1", "behavior_log_prob", "1 tokens", "2"],
    ),
    "tokens_length": (
        json.dumps({**records()[0], "log_prob": [-1, -2], "behavior_log_prob": [-1, -2], "length": 9}).encode() + b"\n",
        ["line 1", "length", "mask"],
    ),
    "mask_short": (
        json.dumps({**records()[0], "log_prob": [-1, -2], "behavior_log_prob": [-1, -2], "mask": [1]}).encode() + b"\n",
        ["line 1", "mask"],
    ),
    "token_nan": (
        json.dumps({**records()[0], "log_prob": [-1, math.nan], "behavior_log_prob": [-1, -2], "length": 2}).encode()
        + b"\n",
        ["line 1", "log_prob", "NaN"],
    ),
    "cut_off.parquet": (b"PAR1 this is no table", ["Parquet", "dump it again"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_get_one_line_that_says_where_and_what(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, words = BAD_FILES[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(content)
    code, out, err = run(capsys, path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in [name, *words]:
        assert word in err, err
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no figure, no half of one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline", "oppb"], ["oppb", "did you mean 'opob'"]),
        (["--baseline", "opob", "opob"], ["opob", "twice"]),
        (["--baseline", "population"], ["norms"]),
        (["--weighting", "importanse"], ["importanse", "did you mean 'importance'"]),
        (["--column", "reward"], ["--column", "FIELD=NAME"]),
        (["--column", "rewrd=score"], ["rewrd", "did you mean 'reward'"]),
        (["--column", "reward=a", "--column", "reward=b"], ["reward", "twice"]),
        (["--column", "reward=scroe"], ["'scroe' not found"]),
        (["--cap", "0"], ["cap"]),
        (["--cap", "nan"], ["cap"]),
        (["--bootstrap", "5"], ["bootstrap", "5"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--min-group", "0"], ["min_group", "0"]),
        (["--min-group", "99"], ["min_group", "99", "7"]),
        (["--figure", "no/such/folder/f.png"], ["no/such/folder"]),
        (["--figure", "figure.txt"], ["figure.txt", ".png"]),
        (["--figure", "."], ["."]),
    ],
)
def test_bad_options_get_one_line(
    arguments: list[str], words: list[str], file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(file.parent)
    code, out, err = run(capsys, file, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("watched", [[], ["--watch", "5"]], ids=["once", "watched"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--bootstrap", "5"],
        ["--seed", "-1"],
        ["--min-group", "0"],
        ["--cap", "0"],
        ["--weighting", "importanse"],
        ["--weighting", "clip"],
        ["--baseline", "oppb"],
        ["--estimator", "oppo"],
        ["--column", "rewrd=score"],
        ["--layout", "verll"],
        ["--group-size", "0"],
        ["--merge-reward", "most"],
        ["--floor", "0.5"],
    ],
    ids=" ".join,
)
def test_options_are_checked_before_anything_is_read(
    arguments: list[str], watched: list[str], file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("vcposim.commands.replay.find_metrics", lambda *_, **__: pytest.fail("a file was opened"))
    code, out, err = run(capsys, file, *arguments, *watched)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert arguments[0].strip("-").replace("-", "_") in err.replace("-", "_")


def test_missing_file_directory_and_cut_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in run(capsys, tmp_path / "none.jsonl")[2]
    assert "a folder without rollouts" in run(capsys, tmp_path)[2]
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(records()), path)
    whole = path.read_bytes()
    for end in (4, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:end])
        code, out, err = run(capsys, path)
        assert (code, out, err.count("\n")) == (2, "", 1), err
    pq.write_table(pa.Table.from_pylist([{**row, "reward": None} for row in records()]), path)
    assert "row 1" in run(capsys, path)[2]
    pq.write_table(pa.table({"score": [1.0], "uid": [2]}), path)
    assert "--column group=uid" in run(capsys, path)[2]


def test_groups_put_together_give_the_same_ratio_and_an_interval_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = np.random.default_rng(1).gamma(1.0, size=(2, 2, 4000))
    held = np.array([4000, 4000])
    alone = contributions.bootstrap_ratios(pair, held, 1000, np.random.default_rng(0))
    monkeypatch.setattr(contributions, "MOST_DRAWN", 500)
    rng = np.random.default_rng(0)
    unit = contributions.units(4000, rng)
    together = np.array([[np.bincount(unit, one) for one in two] for two in pair])
    assert together.shape == (2, 2, 500)
    for one, other in zip(contributions.bootstrap_ratios(together, held, 1000, rng), alone, strict=True):
        assert one.value == near(other.value)
        # a width is that of quantiles of 1,000 resamples over 500 units: a standard error of about 0.05
        assert_within_errors((one.high - one.low) / (other.high - other.low), 1.0, 0.05, degrees=1000)


def test_groups_tabulated_by_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dump = read_dump(Path(contributions.__file__).parent / "sample.jsonl")
    size = np.bincount(dump.group)
    unit = np.arange(size.size)
    whole = contributions.tabulate(dump, size, ("group_mean", "opob"), Weighting("importance"), unit)
    monkeypatch.setattr(contributions, "TOGETHER", 3 * 24)
    parts = contributions.tabulate(dump, size, ("group_mean", "opob"), Weighting("importance"), unit)
    for one, other in zip(vars(parts).values(), vars(whole).values(), strict=True):
        np.testing.assert_array_equal(one, other)
