"""Never silently wrong: every kind of mistake that public reports describe, made from scratch, with its right value.

The files those reports were made into are read as well where they are at hand (`../shared/data/reports`).
"""

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.kit.statistical import assert_near, near
from tests.vcposim.replay.fixtures import FIXTURES, Record, Rollout, batch, mask_of, padded
from vcposim.batch import Batch, ScoreNorms
from vcposim.catalogue import CATALOGUE
from vcposim.commands.main import main
from vcposim.errors import InputError
from vcposim.estimators import Estimator, Resolved
from vcposim.replay import Dump, corrections, first_alarms, rank, read_dump, replay, summary, to_json
from vcposim.surrogates import Clip

REPORTS = Path(__file__).parents[4] / "shared" / "data" / "reports"


def write(tmp_path: Path, rows: list[Record], name: str = "d.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(b: list[Rollout]) -> list[Record]:
    return [{k: v for k, v in row.items() if k != "step"} for row in FIXTURES["vcposim"].rows(b)]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["replay", *map(str, arguments)])
    return code, *capsys.readouterr()


def expected_log_ratio(b: list[Rollout]) -> list[float]:
    return [r.log_ratio for r in b]


# --------------------------------------------------------------------------------------------- columns that change it


@pytest.mark.parametrize("name", ["loss_mask", "response_mask", "action_mask", "assistant_masks"])
def test_the_only_column_that_can_be_a_mask_is_used_and_said(name: str, tmp_path: Path) -> None:
    b, size = batch(), 40
    padding = [
        {
            "group": r.prompt,
            "reward": r.reward,
            "behavior_log_prob": padded(r.sampler, size, 0.0),
            "log_prob": padded(r.learner, size, -5.0),
            name: mask_of(r.sampler, size),
        }
        for r in b
    ]
    path = write(tmp_path, padding)
    dump = read_dump(path)
    assert_near(dump.log_ratio, expected_log_ratio(b))
    assert any(f"column {name!r} is used as such" in note for note in dump.notes)
    ignored = read_dump(path, {"mask": "none"})
    assert "exact zeros" in [f.check for f in ignored.findings]
    with pytest.raises(InputError, match="could both be the mask"):
        read_dump(write(tmp_path, [{**row, "token_mask": row[name]} for row in padding]))
    unknown = read_dump(write(tmp_path, [{**row, "keep": row[name]} for row in [dict(x) for x in padding]], "u.jsonl"))
    assert not any("'keep'" in note for note in unknown.notes)  # the mask is known already
    for row in padding:
        row["keep"] = row.pop(name)
    assert any(
        "'keep' holds 0 and 1 a token and is not used" in note for note in read_dump(write(tmp_path, padding)).notes
    )


def test_a_length_that_contradicts_the_lists_is_no_detail(tmp_path: Path) -> None:
    padding = [{**row, "response_length": len(row["log_prob"]) - 1} for row in rows(batch())]
    with pytest.raises(InputError, match=r"response_length: \d+ says how long the response is"):
        read_dump(write(tmp_path, padding))
    read_dump(write(tmp_path, padding), {"length": "none"})


def test_a_null_mask_is_all_tokens_and_an_empty_response_has_weight_one(tmp_path: Path) -> None:
    b = batch()
    table = [{**row, "mask": [1] * len(row["log_prob"])} for row in rows(b)]
    table[2]["mask"] = None
    table[5] |= {"log_prob": [], "behavior_log_prob": [], "mask": []}
    dump = read_dump(write(tmp_path, table))
    expected = expected_log_ratio(b)
    expected[5] = 0.0
    assert_near(dump.log_ratio, expected)
    assert dump.length[5] == 0
    assert any("1 masks are null" in note for note in dump.notes)
    assert any("1 responses are empty" in note for note in dump.notes)
    json.dumps(to_json(replay(dump, resamples=100, corrections=True)), allow_nan=False)


def test_a_learner_that_never_says_it_is_weight_zero_and_a_sampler_that_did_is_refused(tmp_path: Path) -> None:
    b = batch(prompts=6, responses=6)
    table = rows(b)
    table[4]["log_prob"][1] = -math.inf
    dump = read_dump(write(tmp_path, table))
    assert dump.log_ratio[4] == -math.inf
    found = to_json(replay(dump, resamples=100, corrections=True))
    w = np.exp([x if i != 4 else -math.inf for i, x in enumerate(expected_log_ratio(b))])
    assert found["diagnostics"]["mean_weight"] == near(w.mean())
    assert found["diagnostics"]["ess_fraction"]["sequence"] == near(w.sum() ** 2 / (w**2).sum() / w.size)
    assert any("1 trajectories have weight 0" in note for note in found["notes"])
    table[4]["behavior_log_prob"][1] = -math.inf
    with pytest.raises(InputError, match="gave no chance"):
        read_dump(write(tmp_path, table))


def test_bad_records_are_left_out_on_request_counted_and_placed(tmp_path: Path) -> None:
    b = batch(prompts=4, responses=4)
    right = expected_log_ratio(b)
    table = rows(b)
    table[1]["log_prob"][0] = None
    table[6]["behavior_log_prob"][2] = math.nan
    table[7]["reward"] = None
    table[9]["log_prob"].append(-1.0)
    path = write(tmp_path, table)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(InputError, match="line 2"):
        read_dump(path)
    dump = read_dump(path, skip_bad=True)
    kept = [i for i in range(16) if i not in (1, 6, 7, 9)]
    assert_near(dump.log_ratio, [right[i] for i in kept])
    assert dump.skipped == {
        "log_prob: null": ["line 2"],
        "behavior_log_prob: not finite": ["line 7"],
        "reward: null": ["line 8"],
        "behavior_log_prob: lists of different lengths": ["line 10"],
        "not JSON": ["line 17"],
    }
    assert any(note.startswith("5 of 17 records are left out") for note in dump.notes)


def test_equal_rewards_are_read_off_the_rewards(tmp_path: Path) -> None:
    # one weight e^400 beside weights of 1: every other second moment underflows beside it, no reward becomes equal
    table = [
        {"group": g, "reward": float(i % 2), "log_prob": -100.0 if g == i == 0 else -499.0, "behavior_log_prob": -500.0}
        for g in range(12)
        for i in range(4)
    ]
    table = [{**row, "length": 50} for row in table]
    found = replay(read_dump(write(tmp_path, table)))
    assert found.informative == 12
    assert not any("equal rewards" in note for note in found.notes)
    masked = replay(read_dump(write(tmp_path, table)), weighting="mask", cap=2.0, floor=0.5)
    assert masked.informative == 12
    assert not any("equal rewards" in note for note in masked.notes)
    assert "a few carry everything" in [f.check for f in found.findings]


def test_chi2_is_withheld_where_the_mean_weight_is_not_near_one(tmp_path: Path) -> None:
    table = [{**row, "log_prob": [x - 0.2 for x in row["log_prob"]]} for row in rows(batch(prompts=8))]
    found = replay(read_dump(write(tmp_path, table)))
    assert math.isnan(found.diagnostics["chi2"].value)
    assert "withheld" in found.diagnostics["chi2"].meaning
    assert not math.isnan(replay(read_dump(write(tmp_path, rows(batch(prompts=8))))).diagnostics["chi2"].value)


def test_gauges_run_without_groups_and_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = batch(prompts=8)
    table = [{k: row[k] for k in ("behavior_log_prob", "log_prob")} for row in rows(b)]
    code, out, _ = run(capsys, write(tmp_path, table), "--json")
    found = json.loads(out)
    w = np.exp(expected_log_ratio(b))
    assert code == 0
    assert found["diagnostics"]["mean_weight"] == near(w.mean())
    assert found["rows"] == []
    assert any("no group in the file" in note for note in found["notes"])
    code, out, _ = run(capsys, tmp_path / "d.jsonl", "--figure", tmp_path / "f.png")
    assert code == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_ambiguous_names_are_explained_and_the_suggestions_are_the_right_way_round(tmp_path: Path) -> None:
    b = batch()
    table = [{"group_id": r.prompt, "reward": r.reward, "logprobs": r.sampler, "new_logprobs": r.learner} for r in b]
    with pytest.raises(InputError) as caught:
        read_dump(write(tmp_path, table))
    said = str(caught.value)
    assert "the sampler's in OpenAI-style servers" in said
    options = dict(word.split("=") for word in said.split() if "=" in word and word.split("=")[0] in FIELDS)
    assert options == {"log_prob": "new_logprobs", "behavior_log_prob": "logprobs", "group": "group_id"}
    assert_near(read_dump(write(tmp_path, table), options).log_ratio, expected_log_ratio(b))
    only = [{"group": r.prompt, "reward": r.reward, "logprobs": r.sampler, "old_log_probs": r.learner} for r in b]
    with pytest.raises(InputError) as caught:
        read_dump(write(tmp_path, only))
    assert "--column log_prob=NAME" in str(caught.value)  # of two ambiguous names none is guessed
    assert "in verl and ROLL" in str(caught.value)


FIELDS = ("group", "reward", "log_prob", "behavior_log_prob")


@pytest.mark.parametrize("inside", ["rows", "columns"])
def test_rollouts_under_one_name_are_read_out_of_it_and_that_is_said(inside: str, tmp_path: Path) -> None:
    b = batch()
    table = rows(b)
    held: Any = table if inside == "rows" else {name: [row[name] for row in table] for name in table[0]}
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"rollouts": held, "config": {"lr": 1}, "step": 4}, indent=1))
    dump = read_dump(path)
    assert_near(dump.log_ratio, expected_log_ratio(b))
    np.testing.assert_array_equal(dump.reward, [r.reward for r in b])
    assert "the rollouts are read out of 'rollouts'" in dump.notes
    several = write(tmp_path, [{"rollouts": table[:8], "step": 1}, {"rollouts": table[8:], "step": 2}])
    whole = read_dump(several)
    assert_near(whole.log_ratio, expected_log_ratio(b))
    bare = [{k: v for k, v in row.items() if k != "group"} for row in table]
    prompts = [{"group": g, "responses": bare[4 * g : 4 * g + 4]} for g in range(4)]
    by_prompt = read_dump(write(tmp_path, prompts, "p.jsonl"))
    assert_near(by_prompt.log_ratio, expected_log_ratio(b))
    np.testing.assert_array_equal(by_prompt.group, [r.prompt for r in b])
    if inside == "rows":
        assert whole.slices["step"][1] == [1, 2]
        assert whole.place[8] == "line 2, rollout 1"


def options_of(error: Exception) -> dict[str, str]:
    """The --column options that an error suggests."""
    said = re.findall(r"--column (?:'([^']+)'|([^\s;]+))", str(error))
    return dict((quoted or plain).split("=") for quoted, plain in said)


def test_what_lies_deeper_is_suggested_with_its_path_and_turns_follow_each_other(tmp_path: Path) -> None:
    b = batch()
    turns = [
        {"group": r.prompt, "reward": r.reward, "turns": [
            {"behavior_log_prob": r.sampler[:2], "log_prob": r.learner[:2]},
            {"behavior_log_prob": r.sampler[2:], "log_prob": r.learner[2:]},
        ]}
        for r in b
    ]  # fmt: skip
    path = write(tmp_path, turns)
    with pytest.raises(InputError) as caught:
        read_dump(path)
    dump = read_dump(path, options_of(caught.value))
    assert_near(dump.log_ratio, expected_log_ratio(b))
    assert dump.group.size == len(b)
    objects = [
        {"group": r.prompt, "reward": r.reward, "logprobs": {"content": [{"logprob": x} for x in r.sampler]},
         "trainer_logprobs": r.learner}
        for r in b
    ]  # fmt: skip
    path = write(tmp_path, objects)
    with pytest.raises(InputError) as caught:
        read_dump(path)
    assert_near(read_dump(path, options_of(caught.value)).log_ratio, expected_log_ratio(b))
    structs = [{**row, "log_prob": [{"logprob": x} for x in row["log_prob"]]} for row in rows(b)]
    path = write(tmp_path, structs)
    with pytest.raises(InputError, match="is an object, not a number") as caught:
        read_dump(path)
    assert_near(read_dump(path, options_of(caught.value)).log_ratio, expected_log_ratio(b))


def test_rewards_that_never_reached_the_trainer_leave_the_weights_to_read(tmp_path: Path) -> None:
    """prime-rl's token_export.py writes null at each token where its batch has no rewards."""
    b = batch()
    table = [{**row, "rewards": [None] * len(row["rewards"])} for row in FIXTURES["prime_rl"].rows(b)]
    dump = read_dump(write(tmp_path, table))
    assert_near(dump.log_ratio, expected_log_ratio(b))
    assert not dump.has_reward
    assert "'rewards' (reward) is null at every token of the first record: not used" in dump.notes
    table[0] = FIXTURES["prime_rl"].rows(b)[0]
    with pytest.raises(InputError, match=r"line 2: rewards .*is null at every token; .*--column reward=none"):
        read_dump(write(tmp_path, table))


def test_numbers_in_strings_sums_without_lengths_and_probabilities_are_explained(tmp_path: Path) -> None:
    table = rows(batch())
    for change, words in (
        ({"log_prob": json.dumps(table[0]["log_prob"])}, "a list in a string, not log-probabilities; json.loads"),
        ({"log_prob": -3.0, "behavior_log_prob": -2.0}, "a sum needs the number of tokens it is over; name it with"),
        ({"log_prob": [math.exp(x) for x in table[0]["log_prob"]]}, "or take the logarithm of a probability"),
        ({"log_prob": [-x * 9 for x in table[0]["log_prob"]]}, "check its sign"),
    ):
        with pytest.raises(InputError, match=words):
            read_dump(write(tmp_path, [{**row, **change} for row in table]))
    del table[3]["log_prob"]
    with pytest.raises(InputError, match="line 4: log_prob: is missing, other records have it"):
        read_dump(write(tmp_path, table))
    (tmp_path / "t.csv").write_text("group,reward,log_prob\n1,0,-3\n")
    with pytest.raises(InputError, match="looks like a table with ','"):
        read_dump(tmp_path / "t.csv")


def test_evaluations_among_the_rows_and_copies_of_rows_are_noted(tmp_path: Path) -> None:
    table = rows(batch(prompts=8, responses=8))
    mixed = read_dump(write(tmp_path, [{**row, "split": "eval" if i % 4 else "train"} for i, row in enumerate(table)]))
    assert any("column 'split' has several values (train, eval)" in note for note in mixed.notes)
    assert [one.value for one in replay(mixed, resamples=100, by=["split"]).slices["split"]] == ["eval", "train"]
    clean = read_dump(write(tmp_path, [{**row, "split": "train"} for row in table]))
    assert not any("split" in note for note in clean.notes)
    assert not clean.findings
    copied = read_dump(write(tmp_path, table + table[:16]))
    (one,) = copied.findings
    assert one.check == "copies"
    assert one.evidence.startswith("15 of 80 trajectories are exact copies of earlier ones (line 65")


# ------------------------------------------------------------------------------------------------- groups and slices


def test_a_prompt_at_two_steps_is_two_groups_and_group_pools_them(tmp_path: Path) -> None:
    table = [{**row, "group": row["group"] % 2, "step": 1 + row["group"] // 2} for row in rows(batch(prompts=4))]
    path = write(tmp_path, table)
    dump = read_dump(path)
    assert len(dump.labels) == 4
    assert any("4 groups" in note for note in dump.notes)
    assert len(read_dump(path, group=["group"]).labels) == 2
    assert len(read_dump(path, group=["step", "group"]).labels) == 4
    turns = [{**row, "step": i % 4} for i, row in enumerate(rows(batch(prompts=4)))]
    dump = read_dump(write(tmp_path, turns))
    assert len(dump.labels) == 4  # a step that differs inside every group is a turn
    assert any("no training step" in note for note in dump.notes)


def test_any_json_names_a_group_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    names = [[{"role": "user", "content": "a"}], [{"content": "a", "role": "user"}], {"id": 3}, "a", 3, 3.0, None]
    table = [{**row, "prompt": names[i % 7]} for i, row in enumerate(rows(batch(prompts=7)))]
    assert len(read_dump(write(tmp_path, table[:5]), {"group": "prompt"}).labels) == 4
    assert len(read_dump(write(tmp_path, table[:6]), {"group": "prompt"}).labels) == 4
    with pytest.raises(InputError, match="line 7"):
        read_dump(write(tmp_path, table), {"group": "prompt"})


def test_group_size_counts_rows_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    table = [{k: v for k, v in row.items() if k != "group"} for row in rows(batch(prompts=3, responses=4))]
    dump = read_dump(write(tmp_path, table), group_size=4)
    np.testing.assert_array_equal(dump.group, np.repeat([0, 1, 2], 4))
    with pytest.raises(InputError, match="12 records are no multiple of 5"):
        read_dump(write(tmp_path, table), group_size=5)


def test_groups_of_one_are_a_wrong_key(tmp_path: Path) -> None:
    dump = read_dump(write(tmp_path, [{**row, "group": i} for i, row in enumerate(rows(batch()))]))
    assert any("is no key of groups" in note for note in dump.notes)
    first, _, dominates, change, _ = summary(replay(dump, resamples=100))
    assert first.endswith("every group has a single response: a wrong key, and nothing said of groups means anything.")
    assert "leverage" not in dominates
    assert "corrects best" not in change


def test_ratios_in_place_of_their_logarithms_are_named(tmp_path: Path) -> None:
    b = batch(prompts=8)
    table = [{"group": r.prompt, "reward": r.reward} for r in b]
    ratios = [np.exp(np.subtract(r.learner, r.sampler)).tolist() for r in b]
    wrong = read_dump(write(tmp_path, [{**row, "log_ratio": x} for row, x in zip(table, ratios, strict=True)]))
    assert ["every log-ratio is positive" in one.cause for one in wrong.findings] == [True]
    logs = [np.log(x).tolist() for x in ratios]
    assert not read_dump(write(tmp_path, [{**r, "log_ratio": x} for r, x in zip(table, logs, strict=True)])).findings


def in_parts(b: list[Rollout]) -> list[Record]:
    out = []
    for i, (r, row) in enumerate(zip(b, rows(b), strict=True)):
        cut = len(r.sampler) // 2
        for part in (slice(None, cut), slice(cut, None)):
            lists = {"behavior_log_prob": r.sampler[part], "log_prob": r.learner[part]}
            out.append({**row, **lists, "rollout_id": i})
    return out


def test_rows_of_one_trajectory_are_one_trajectory(tmp_path: Path) -> None:
    b = batch(prompts=5)
    table = in_parts(b)
    dump, whole = read_dump(write(tmp_path, table)), read_dump(write(tmp_path, rows(b), "w.jsonl"))
    assert_near(dump.log_ratio, expected_log_ratio(b))
    np.testing.assert_array_equal(dump.length, whole.length)
    one, other = (replay(x, resamples=100).diagnostics["ess_fraction_token"].value for x in (dump, whole))
    assert one == near(other)
    assert any("40 rows are 20 trajectories" in note for note in dump.notes)
    assert read_dump(tmp_path / "d.jsonl", trajectory="none").group.size == 40
    # a counter of the run that has the same name merges nothing
    counter = [{**row, "rollout_id": 3} for row in rows(b)]
    dump = read_dump(write(tmp_path, counter))
    assert dump.group.size == 20
    assert any("a counter of the run" in note for note in dump.notes)


@pytest.mark.parametrize(("how", "right"), [("sum", 1.5), ("last", 0.5)])
def test_rewards_of_merged_rows_are_asked_for(how: str, right: float, tmp_path: Path) -> None:
    table = in_parts(batch())
    for k, row in enumerate(table):
        row["reward"] = (1.0, 0.5)[k % 2]
    path = write(tmp_path, table)
    with pytest.raises(InputError, match="--merge-reward sum or last"):
        read_dump(path)
    np.testing.assert_array_equal(read_dump(path, merge_reward=how).reward, right)


def test_lags_are_sliced_unasked_and_other_columns_on_request(tmp_path: Path) -> None:
    recent, far = batch(0, 6, 6), batch(1, 6, 6)
    table = rows(recent) + [{**row, "group": row["group"] + 6} for row in rows(far)]
    for i, row in enumerate(table):
        row |= {"version": 5 if i < 36 else 1, "learner_version": 5, "data_source": "ab"[i % 2]}
        if i >= 36:
            row["log_prob"] = [x - 0.05 for x in row["log_prob"]]
    path = write(tmp_path, table)
    found = replay(read_dump(path), resamples=100)
    assert [one.value for one in found.slices["lag"]] == [0, 4]
    alone = replay(read_dump(write(tmp_path, table[36:], "far.jsonl")), resamples=100)
    for name, gauge in found.slices["lag"][1].diagnostics.items():
        assert gauge.value == near(alone.diagnostics[name].value, nan_ok=True), name
    assert [one.value for one in replay(read_dump(path), resamples=100, by=["task"]).slices["task"]] == ["a", "b"]
    with pytest.raises(InputError, match="to slice by: version"):
        replay(read_dump(path), by=["temper"])


def test_null_versions_leave_a_lag_that_stands_apart(tmp_path: Path) -> None:
    table = rows(batch(0, 6, 6))
    for i, row in enumerate(table):
        row |= {"version": None if i % 6 == 0 else 3 + i % 2, "learner_version": 5}
    found = replay(read_dump(write(tmp_path, table)), resamples=100, by=["lag"])
    assert {one.value: one.n for one in found.slices["lag"]} == {1: 18, 2: 12, None: 6}
    assert any("lag is null in 6 of 36" in note for note in found.notes)


# ------------------------------------------------------------------------------------------------------ corrections


def test_the_ranking_is_its_definition(tmp_path: Path) -> None:
    """bias, spread and risk of three estimators by loops over the definition."""
    b = batch(3, prompts=5, responses=4)
    found = rank(read_dump(write(tmp_path, rows(b))), resamples=100)
    assert found is not None
    assert found.per_token
    mean = {p: np.mean([r.reward for r in b if r.prompt == p]) for p in range(5)}
    advantage = np.array([r.reward - mean[r.prompt] for r in b])
    weight = np.exp([r.log_ratio for r in b])
    target = weight * advantage
    size = np.sqrt([len(r.sampler) for r in b])
    coefficient = {
        "dr_grpo": [np.full(len(r.sampler), advantage[i]) for i, r in enumerate(b)],
        "sequence_tis": [np.full(len(r.sampler), min(weight[i], 8) * advantage[i]) for i, r in enumerate(b)],
        "token_tis": [np.minimum(np.exp(np.array(r.learner) - r.sampler), 2) * advantage[i] for i, r in enumerate(b)],
    }
    for name, c in coefficient.items():
        row = next(one for one in found.rows if one.name == name)
        own = sum((x**2).sum() for x in c)
        alpha = sum((x * target[i]).sum() for i, x in enumerate(c)) / own
        whole = (np.abs(target) * size).sum()
        off = sum(math.sqrt(((alpha * x - target[i]) ** 2).sum()) for i, x in enumerate(c))
        assert row.bias == near(off / whole)
        assert row.spread == near(alpha**2 * own / whole**2)
        assert row.risk.value == near(row.bias**2 + row.spread)
        assert row.risk.low <= row.risk.value <= row.risk.high
        assert row.second_moment_ratio == near(own / (target**2 * size**2).sum())
    order = [(float(f"{row.risk.value:.12g}"), list(CATALOGUE).index(row.name)) for row in found.rows]
    assert order == sorted(order)  # equal risks in the catalogue's order, not in that of their rounding


def test_held_out_moments_by_scaling_are_those_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged groups, one of them alone; a clip of yours by the size of the advantage takes the long way."""

    @dataclass(frozen=True)
    class Sized(Clip):
        def __call__(self, batch: Batch, advantage: Any) -> Any:
            return super().__call__(batch, advantage) * (np.abs(advantage) < 0.6)[..., None]

    b = batch(7, prompts=9, responses=5)
    table = [row for k, row in enumerate(with_others(b)) if k % 7 and k not in (1, 2, 3, 4)]
    dump = read_dump(write(tmp_path, table))
    everything: dict[str, Resolved] = {name: entry.estimator for name, entry in CATALOGUE.items()}
    everything["yours"] = Estimator(baseline="group_mean", surrogate=Sized())
    fast = rank(dump, 100, estimators=everything)
    assert sum(map(corrections.scales_with_advantage, everything.values())) > 60
    monkeypatch.setattr(corrections, "scales_with_advantage", lambda estimator: False)
    slow = rank(dump, 100, estimators=everything)
    assert fast is not None
    assert slow is not None
    twin = {row.name: row.held_out_ratio for row in slow.rows}
    assert {row.name for row in fast.rows} == set(twin)
    for row in fast.rows:
        assert row.held_out_ratio == (None if twin[row.name] is None else near(twin[row.name])), row.name


@pytest.mark.parametrize("name", [n for n, e in CATALOGUE.items() if getattr(e.estimator, "surrogate", None)])
def test_surrogates_look_at_signs_alone_unless_listed(name: str, tmp_path: Path) -> None:
    b = batch(8, prompts=12, responses=6)
    rewards = np.random.default_rng(1).random(len(b))
    table = [{**row, "reward": float(x)} for row, x in zip(with_others(b), rewards, strict=True)]
    found, _ = corrections._batch(read_dump(write(tmp_path, table)))
    assert found is not None
    estimator = CATALOGUE[name].estimator
    assert isinstance(estimator, Estimator)
    assert estimator.surrogate is not None
    advantage = found.reward - found.reward.mean(axis=-1, keepdims=True)
    factor = estimator.surrogate(found, advantage)
    larger = np.random.default_rng(2).lognormal(size=(20, *advantage.shape))
    same = all(np.array_equal(estimator.surrogate(found, advantage * x), factor) for x in larger)
    assert same != isinstance(estimator.surrogate, corrections.BY_SIZE)


def test_every_estimator_is_ranked_or_said_to_lack_a_column(tmp_path: Path) -> None:
    table = rows(batch(prompts=6))
    found = rank(read_dump(write(tmp_path, table)), resamples=100)
    assert found is not None
    absent = {name for names in found.absent.values() for name in names}
    assert {row.name for row in found.rows} | absent == set(CATALOGUE)
    sums = [{**r, "log_prob": sum(r["log_prob"]), "behavior_log_prob": sum(r["behavior_log_prob"])} for r in table]
    sums = [{**row, "length": len(r["log_prob"])} for row, r in zip(sums, table, strict=True)]
    less = rank(read_dump(write(tmp_path, sums)), resamples=100)
    assert less is not None
    assert not less.per_token
    assert "token_tis" in less.absent["log_prob and behavior_log_prob a token"]
    assert all(len(names) == len(set(names)) for names in less.absent.values())
    same = {row.name: row.risk.value for row in found.rows}
    for row in less.rows:  # what looks at whole trajectories says the same without tokens
        if row.name in ("sequence_tis", "vcpo", "dr_grpo", "self_normalized"):
            assert row.risk.value == near(same[row.name])


def with_others(b: list[Rollout], seed: int = 0) -> list[Record]:
    """Rows with the anchor's and the reference's log-probabilities, a collision, and padding of garbage."""
    rng = np.random.default_rng(seed)
    out = []
    for r, row in zip(b, rows(b), strict=True):
        size = len(r.sampler)
        anchor, reference = (np.minimum(np.array(r.learner) + 0.2 * rng.standard_normal(size), -1e-9) for _ in "ab")
        lists = {"prox_logprobs": anchor, "ref_log_prob": reference, "collision": rng.uniform(0.1, 1, size)}
        padding = {name: padded(list(x), size + 3, -2.5) for name, x in lists.items()}
        tokens = {name: padded(row[name], size + 3, -7.0) for name in ("log_prob", "behavior_log_prob")}
        out.append({**row, **tokens, **padding, "mask": mask_of(r.sampler, size + 3)})
    return out


def test_other_policies_columns_reach_the_estimators_that_need_them(tmp_path: Path) -> None:
    b = batch(5, prompts=6, responses=4)
    table = with_others(b)
    dump = read_dump(write(tmp_path, table))
    assert any("anchor_log_prob: column 'prox_logprobs' is used" in note for note in dump.notes)
    assert any("reference_log_prob: column 'ref_log_prob' is used" in note for note in dump.notes)
    sizes = [len(r.sampler) for r in b]
    reference = [
        math.fsum(r.learner) - math.fsum(row["ref_log_prob"][:n]) for r, row, n in zip(b, table, sizes, strict=True)
    ]
    assert dump.reference_log_ratio is not None
    assert_near(dump.reference_log_ratio, reference)
    found = rank(dump, resamples=100)
    assert found is not None
    assert {row.name for row in found.rows} | {n for names in found.absent.values() for n in names} == set(CATALOGUE)
    ranked = {row.name: row for row in found.rows}
    assert {"tba", "decoupled_ppo", "otb"} <= set(ranked)
    # the catalogue's own answer on a batch built by hand, against the one that the dump led to
    assert ranked["decoupled_ppo"].bias == near(by_hand(b, table, "decoupled_ppo"))
    assert ranked["tba"].bias == near(by_hand(b, table, "tba"))
    without = rank(read_dump(tmp_path / "d.jsonl", {"anchor_log_prob": "none", "reference_log_prob": "none"}), 100)
    assert without is not None
    assert not {"tba", "decoupled_ppo"} & {row.name for row in without.rows}
    same = {row.name: row.risk.value for row in without.rows}
    for name, row in ranked.items():  # they change no other number
        assert name not in same or row.risk.value == same[name]


def by_hand(b: list[Rollout], table: list[Record], name: str) -> float:
    """The bias of an entry: coefficients of one group at a time, distances by loops."""
    off = whole = 0.0
    pieces = []
    for prompt in sorted({r.prompt for r in b}):
        mine = [(r, row) for r, row in zip(b, table, strict=True) if r.prompt == prompt]
        t = max(len(r.sampler) for r, _ in mine)

        def padding(values: list[list[float]], t: int = t) -> np.ndarray:
            return np.array([list(x) + [0.0] * (t - len(x)) for x in values])[None]

        pi, mu = padding([r.learner for r, _ in mine]), padding([r.sampler for r, _ in mine])
        anchor = padding([row["prox_logprobs"][: len(r.sampler)] for r, row in mine])
        mask = padding([[1.0] * len(r.sampler) for r, _ in mine])
        reference = [math.fsum(r.learner) - math.fsum(row["ref_log_prob"][: len(r.sampler)]) for r, row in mine]
        length = mask.sum(-1)
        one = Batch(
            reward=np.array([[r.reward for r, _ in mine]]),
            log_ratio=pi - mu,
            log_prob=pi,
            anchor_log_ratio=pi - anchor,
            reference_log_ratio=np.array([reference]),
            token_mask=mask,
            length=length,
            scores=ScoreNorms(length),
            grouped=True,
        )
        c = np.asarray(CATALOGUE[name].estimator.coefficients(one))
        c = (c[..., None] if c.ndim == 2 else c) * mask
        weight = np.exp(((pi - mu) * mask).sum(-1))
        target = (weight * (one.reward - one.reward.mean()))[..., None] * mask
        pieces.append((c, target))
    alpha = sum((c * t).sum() for c, t in pieces) / sum((c * c).sum() for c, _ in pieces)
    for c, target in pieces:
        off += np.sqrt(((alpha * c - target) ** 2).sum(-1)).sum()
        whole += np.sqrt((target**2).sum(-1)).sum()
    return float(off / whole)


def test_another_policys_column_that_does_not_fit_is_named(tmp_path: Path) -> None:
    table = with_others(batch(prompts=3))
    for row in table:
        row["ref_log_prob"] = None
    dump = read_dump(write(tmp_path, table))
    assert dump.reference_log_ratio is None
    assert any("'ref_log_prob' (reference_log_prob) is not used: it holds null" in note for note in dump.notes)
    table = with_others(batch(prompts=3))
    table[4]["prox_logprobs"] = table[4]["prox_logprobs"][:-1]
    with pytest.raises(InputError, match=r"line 5: prox_logprobs .*does not match .*--column anchor_log_prob=none"):
        read_dump(write(tmp_path, table))
    sums = [
        {**row, "log_prob": sum(row["log_prob"]), "behavior_log_prob": sum(row["behavior_log_prob"])}
        for row in rows(batch())
    ]
    sums = [{**row, "length": 9, "ref_logp": row["log_prob"] - 0.5} for row in sums]
    reference = read_dump(write(tmp_path, sums)).reference_log_ratio
    assert reference is not None
    assert_near(reference, [0.5] * len(sums))


MINE = """
import numpy as np
def soft(batch):
    return np.exp(np.minimum(batch.log_ratio, np.log(8))) * (batch.reward - batch.reward.mean(-1, keepdims=True))
def half(batch):
    return batch.log_ratio * 0 + 0.5 * (batch.reward - batch.reward.mean(-1, keepdims=True))[..., None]
half.needs = ("tokens",)
def falls_over(batch):
    return batch.reward if batch.reward.shape[-1] == 2 else 1 / 0
"""


def test_estimators_by_name_restrict_the_ranking_and_functions_join_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mine = write(tmp_path, rows(batch(prompts=6))), tmp_path / "rivals_of_mine.py"
    mine.write_text(MINE)
    soft, half = f"{mine}:soft", f"{mine}:half"

    def ranked(*names: str) -> dict[str, Any]:
        code, out, err = run(capsys, path, "--json", "--bootstrap", "100", *(["--estimator", *names] if names else []))
        assert code == 0, err
        return {row["name"]: row for row in json.loads(out)["corrections"]["rows"]}

    everybody = ranked()
    assert ranked("vcpo", "dr_grpo") == {name: everybody[name] for name in ("vcpo", "dr_grpo")}  # alone, unchanged
    two = ranked("sequence_tis", soft)
    assert set(two) == {"sequence_tis", soft}
    assert two[soft]["risk"] == two["sequence_tis"]["risk"]  # it is that formula
    both = ranked(soft, half)
    assert set(both) == {*everybody, soft, half}
    assert both[half]["bias"] == near(everybody["dr_grpo"]["bias"])  # a constant factor is no difference
    out = run(capsys, path, "--no-figure", "--estimator", half)[1]
    assert half in out.replace("\n", "")
    assert run(capsys, path, "--estimator", "vcpoo")[2].count("did you mean") == 1
    assert (
        "falls_over raises ZeroDivisionError: division by zero"
        in run(capsys, path, "--estimator", f"{mine}:falls_over")[2]
    )
    bare = write(tmp_path, [{k: r[k] for k in ("log_prob", "behavior_log_prob")} for r in rows(batch())], "b.jsonl")
    assert "cannot be ranked" in " ".join(run(capsys, bare, "--no-figure", "--estimator", "vcpo")[1].split())


def test_on_policy_every_centered_rival_has_no_bias_and_extremes_stay_finite(tmp_path: Path) -> None:
    b = [Rollout(r.prompt, r.reward, r.sampler, r.sampler) for r in batch(prompts=6)]
    found = rank(read_dump(write(tmp_path, rows(b))), resamples=100)
    assert found is not None
    for name in ("dr_grpo", "token_tis", "icepop", "ppo_clip", "sequence_mis"):
        assert next(r for r in found.rows if r.name == name).bias == near(0)
    wild = [{**row, "log_prob": [x - 900.0 * (i == 3) for x in row["log_prob"]]} for i, row in enumerate(rows(b))]
    json.dumps(to_json(replay(read_dump(write(tmp_path, wild)), resamples=100, corrections=True)), allow_nan=False)


def test_the_first_step_at_which_a_gauge_alarms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = []
    for step in range(4):
        for row in rows(batch(step, prompts=8, responses=8)):
            worse = [x - 0.1 * (step >= 2) for x in row["log_prob"]]
            table.append({**row, "group": row["group"] + 8 * step, "log_prob": worse, "global_step": step})
    path = write(tmp_path, table)
    found = replay(read_dump(path), resamples=100, by=["step"])
    assert [one.value for one in found.slices["step"]] == [0, 1, 2, 3]
    alarms = first_alarms(found.slices["step"])
    assert alarms["mean_weight"] == alarms["kl_behavior_target"] == 2
    assert "mean_weight at step 2" in " ".join(run(capsys, path, "--by", "step", "--no-figure")[1].split())


def test_a_live_folder_is_read_again_when_it_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder, rows(batch(0)), "step_1.jsonl")
    naps = iter(("nothing", "grow", "stop"))

    def nap(seconds: float) -> None:
        what = next(naps)
        if what == "grow":
            write(folder, rows(batch(1)), "step_2.jsonl")
        if what == "stop":
            raise KeyboardInterrupt

    monkeypatch.setattr("vcposim.commands.replay.time.sleep", nap)
    code, out, _ = run(capsys, folder, "--watch", "5")
    assert code == 130
    assert out.count("Data:") == 2
    assert "16 trajectories in 1 files" in out
    assert "32 trajectories in 2 files" in out
    assert run(capsys, "-", "--watch", "5")[0] == 2


def test_a_live_folder_that_is_half_written_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty at first, a line that is not all there, half a Parquet file, everything gone, all of it again."""
    folder = tmp_path / "run"
    folder.mkdir()
    table = rows(batch(0))
    whole = "".join(json.dumps(row) + "\n" for row in table)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "b.parquet")
    half = (tmp_path / "b.parquet").read_bytes()[:-60]
    naps = iter(
        (
            lambda: (folder / "a.jsonl").write_text(whole[:-40]),
            lambda: (folder / "a.jsonl").write_text(whole),
            lambda: (folder / "b.parquet").write_bytes(half),
            lambda: [path.unlink() for path in folder.iterdir()],
            lambda: (folder / "c.jsonl").write_text(whole),
        )
    )

    def nap(seconds: float) -> None:
        step = next(naps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr("vcposim.commands.replay.time.sleep", nap)
    code, out, _ = run(capsys, folder, "--watch", "5")
    assert code == 130
    told = [line[9:] for line in out.splitlines() if line[2:3] == line[5:6] == ":"]
    assert len(told) == 6
    assert "waiting: " in told[0]
    assert "without rollouts" in told[0]
    assert told[1] == "15 trajectories in 1 files"
    assert told[2] == "16 trajectories in 1 files"
    assert "b.parquet: not a readable Parquet file" in told[3]
    assert "without rollouts" in told[4]
    assert told[5] == "16 trajectories in 1 files"
    assert "1 of 16 records are left out (not finished yet): 1 cut off (line 16)" in out
    assert run(capsys, tmp_path / "none", "--watch", "5")[0] == 2


def test_five_plain_lines_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, rows(batch(prompts=8, responses=8)))
    found = replay(read_dump(path), corrections=True)
    lines = summary(found)
    assert [line.split(":")[0] for line in lines] == ["Data", "Staleness", "Dominates", "Change", "How sure"]
    out = " ".join(run(capsys, path, "--no-figure")[1].split())
    assert out.index("Data:") < out.index("Is this batch still about")
    assert all(" ".join(line.split()) in out for line in lines)
    copied = [{**row, "log_prob": row["behavior_log_prob"]} for row in rows(batch(prompts=8, responses=8))]
    assert "NOT sound" in summary(replay(read_dump(write(tmp_path, copied))))[0]


def test_the_sample_that_comes_along_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--sample", "--json")
    found = json.loads(out)
    assert (code, found["n"], found["groups"]) == (0, 336, 14)
    assert found["norm_source"] == "score_sq_norm"
    assert found["findings"] == []


# ------------------------------------------------------------------- what a second, hostile reading of files brought up


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_dump(path, **options)
    return str(caught.value)


def test_lists_in_lists_beside_one_reward_are_turns_and_without_rewards_are_refused(tmp_path: Path) -> None:
    b = batch()
    cut = ("log_prob", "behavior_log_prob", "mask")
    turns = [{**row, "mask": [1] * len(r.sampler)} for row, r in zip(rows(b), b, strict=True)]
    turns = [{k: [v[:2], v[2:]] if k in cut else v for k, v in row.items()} for row in turns]
    dump = read_dump(write(tmp_path, turns))
    assert_near(dump.log_ratio, expected_log_ratio(b))
    np.testing.assert_array_equal(dump.length, [len(r.sampler) for r in b])
    assert any("turns of a trajectory, joined" in note for note in dump.notes)
    unsure = [{k: v for k, v in row.items() if k != "reward"} for row in turns]
    assert "turns of a trajectory, or trajectories?" in refusal(write(tmp_path, unsure))


def test_a_prompt_a_line_with_its_answers_as_objects_follows_the_suggestion(tmp_path: Path) -> None:
    b = batch()
    answers = [{k: v for k, v in row.items() if k != "group"} for row in rows(b)]
    path = write(tmp_path, [{"prompt": f"q{g}", "completions": answers[4 * g : 4 * g + 4]} for g in range(4)])
    options = options_of(InputError(refusal(path)))
    assert options == {"group": "prompt"}
    dump = read_dump(path, options)
    assert_near(dump.log_ratio, expected_log_ratio(b))
    np.testing.assert_array_equal(dump.group, [r.prompt for r in b])


def test_names_in_another_spelling_are_suggested(tmp_path: Path) -> None:
    b = batch()
    spelled = [
        {"promptId": r.prompt, "Reward": r.reward, "rolloutLogProb": r.sampler, "trainer logprobs": r.learner}
        for r in b
    ]
    found = refusal(write(tmp_path, spelled))
    for option in (
        "group=promptId",
        "reward=Reward",
        "behavior_log_prob=rolloutLogProb",
        "'log_prob=trainer logprobs'",
    ):
        assert f"--column {option}" in found
    slime = [{"group": r.prompt, "reward": r.reward, "log_probs": r.learner, "rollout_log_probs": r.sampler} for r in b]
    assert options_of(InputError(refusal(write(tmp_path, slime)))) == {
        "log_prob": "log_probs",
        "behavior_log_prob": "rollout_log_probs",
    }
    nested = [{**row, "meta_info": {"output_token_logprobs": [[x, 7, None] for x in r.sampler]}}
              for row, r in zip(rows(b), b, strict=True)]  # fmt: skip
    for row in nested:
        del row["behavior_log_prob"]
    path = write(tmp_path, nested)
    assert "use --column 'behavior_log_prob=meta_info.output_token_logprobs.*.0'" in refusal(path)
    dump = read_dump(path, {"behavior_log_prob": "meta_info.output_token_logprobs.*.0"})
    assert_near(dump.log_ratio, expected_log_ratio(b))


def test_a_reward_or_group_under_a_name_of_its_own_is_asked_about(tmp_path: Path) -> None:
    b = batch()
    own = [{"question_text": f"q{r.prompt}", "accuracy_reward": r.reward, "advantages": 0.5, "log_prob": r.learner,
            "behavior_log_prob": r.sampler} for r in b]  # fmt: skip
    notes = " ".join(read_dump(write(tmp_path, own)).notes)
    assert "--column group=question_text" in notes
    assert "--column reward=accuracy_reward" in notes
    assert "advantages are no rewards" in notes


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"labels": [-100, -100, 5, 5, 5]}, "column 'labels' marks with -100"),
        ({"attention_mask": [1] * 9}, "column 'attention_mask' of 9 entries is not used"),
        ({"padding_mask": [0, 0, 0, 0, 1]}, "with 0 and 1 exchanged"),
        ({"mask": [1] * 5, "action_mask": [0] * 5}, "'action_mask' could be masks too"),
        ({"turn_idx": 1}, "column 'turn_idx' counts parts of a trajectory"),
    ],
)
def test_a_column_that_would_change_the_answer_is_named(column: Record, words: str, tmp_path: Path) -> None:
    own = [
        {"group": i // 4, "reward": i % 2, "log_prob": [-1.0] * 5, "behavior_log_prob": [-1.1] * 5} for i in range(8)
    ]
    assert not any(words in note for note in read_dump(write(tmp_path, own)).notes)
    notes = read_dump(write(tmp_path, [{**row, **column} for row in own])).notes
    assert any(words in note for note in notes), notes


def test_samples_removed_by_the_trainer_sessions_and_epochs_are_used_and_said(tmp_path: Path) -> None:
    b = batch()
    removed = read_dump(write(tmp_path, [{**row, "remove_sample": i == 3} for i, row in enumerate(rows(b))]))
    assert_near(removed.log_ratio, expected_log_ratio([r for i, r in enumerate(b) if i != 3]))
    parts = []
    for i, (row, r) in enumerate(zip(rows(b), b, strict=True)):
        for part in (slice(0, 2), slice(2, None)):
            lists = {"log_prob": r.learner[part], "behavior_log_prob": r.sampler[part]}
            parts.append({**row, **lists, "session_id": f"s{i}"})
    assert_near(read_dump(write(tmp_path, parts)).log_ratio, expected_log_ratio(b))
    prompts = read_dump(write(tmp_path, [{**row, "session_id": row["group"]} for row in rows(b)]))
    assert_near(prompts.log_ratio, expected_log_ratio(b))
    assert any("it may name the prompt" in note for note in prompts.notes)
    epochs = read_dump(
        write(tmp_path, [{**row, "group": row["group"] % 2, "epoch": row["group"] // 2} for row in rows(b)])
    )
    assert len(epochs.labels) == 4
    assert any("groups are (epoch, group)" in note for note in epochs.notes)


def test_counters_that_begin_anew_in_each_file_are_doubted_and_can_be_split(tmp_path: Path) -> None:
    table = [{**row, "group": row["group"] % 2} for row in rows(batch())]
    for k in range(2):
        write(tmp_path, table[8 * k : 8 * k + 8], f"rank_{k}.jsonl")
    pooled = read_dump(tmp_path)
    assert len(pooled.labels) == 2
    assert any("2 of 2 groups have responses in several files" in note for note in pooled.notes)
    split = read_dump(tmp_path, group=["file", "group"], by=["file"])
    assert len(split.labels) == 4
    assert [Path(name).name for name in split.slices["file"][1]] == ["rank_0.jsonl", "rank_1.jsonl"]
    for k, name in enumerate(("step=3", "step=4", "iter_0000005")):
        (tmp_path / "hive" / name).mkdir(parents=True)
        write(tmp_path / "hive" / name, table[:8] if k else table[8:], "part.jsonl")
    steps = read_dump(tmp_path / "hive")
    assert sorted(steps.slices["step"][1]) == [3, 4, 5]
    assert len(steps.labels) == 6
    mixed = [{**row, "group": str(row["group"]) if i % 2 else row["group"]} for i, row in enumerate(table)]
    assert any("a number and a string" in note for note in read_dump(write(tmp_path, mixed)).notes)


def test_tables_in_one_object_and_several_values_a_line_are_named(tmp_path: Path) -> None:
    table = rows(batch())
    path = tmp_path / "t.json"
    pandas = "to_json(FILE, orient='records', lines=True)"
    for content, words in (
        ({name: {str(i): row[name] for i, row in enumerate(table)} for name in table[0]}, pandas),
        ({"columns": list(table[0]), "index": [0], "data": [list(table[0].values())]}, pandas),
        ({str(i): row for i, row in enumerate(table)}, "an object of 16 rollouts"),
    ):
        path.write_text(json.dumps(content))
        assert words in refusal(path)
    path.write_text("".join(map(json.dumps, table)))
    assert "several JSON values stand in one line" in refusal(path)
    header = json.dumps({"schema": "mine", "run": 3})
    path.write_text("\n".join([header, *map(json.dumps, table)]))
    assert "line 1" in refusal(path)
    dump = read_dump(path, skip_bad=True)
    assert dump.group.size == len(table)
    assert dump.skipped == {"no rollout": ["line 1"]}


def test_decimal_rewards_are_numbers(tmp_path: Path) -> None:
    b = batch()
    columns = {name: [row[name] for row in rows(b)] for name in FIELDS}
    table = pa.table({**columns, "reward": pa.array([Decimal(str(r.reward)) for r in b], pa.decimal128(5, 2))})
    pq.write_table(table, tmp_path / "d.parquet")
    np.testing.assert_array_equal(read_dump(tmp_path / "d.parquet").reward, [r.reward for r in b])


def test_names_rounded_by_the_parser_lengths_in_columns_and_idle_ratios_are_said(tmp_path: Path) -> None:
    table = rows(batch())
    assert "is rounded" in refusal(write(tmp_path, [{**row, "group": 10**30 + row["group"]} for row in table]))
    path = tmp_path / "columns.json"
    columns: Record = {name: [row[name] for row in table] for name in FIELDS}
    path.write_text(json.dumps({**columns, "response_length": [len(row["log_prob"]) for row in table]}))
    assert read_dump(path).group.size == len(table)
    path.write_text(json.dumps({**columns, "response_length": [len(row["log_prob"]) - 1 for row in table]}))
    assert "response_length" in refusal(path)
    both = read_dump(write(tmp_path, [{**row, "log_ratio": 0.0} for row in table]))
    assert any("'log_ratio' is not used" in note for note in both.notes)


# ---------------------------------------------------------------------------------- the reports themselves, if at hand

COMMON = {"n": 64, "groups": 8, "sequence": 0.5418, "token": 0.9880, "geometric": 0.9996, "mean": 0.9108, "kl": 0.3987}
NEMO = {"group": "content"}
CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "openrlhf_experience.jsonl": ({"columns": {"group": "index"}}, COMMON),
    "verl_dataproto_rows.jsonl": ({}, COMMON),
    "verl_dataproto_scalar_reward.jsonl": ({}, COMMON),
    "tool_tokens_mask_named_loss_mask.jsonl": ({"columns": {"behavior_log_prob": "rollout_log_probs"}}, COMMON),
    "open_instruct_two_steps.jsonl": ({}, COMMON),
    "trajectory_in_several_rows.jsonl": ({}, COMMON),
    "nemo_rl_train_data_step.jsonl": ({"columns": NEMO}, COMMON),
    "nemo_unwrapped_by_hand.jsonl": ({"columns": NEMO}, COMMON),
    "slime_train_flat.jsonl": ({}, COMMON),
    "openai_chat_logprobs.jsonl": ({}, COMMON),
    "columnar_with_logprobs.json": ({}, COMMON),
    "group_is_chat_messages.jsonl": ({"columns": {"group": "prompt"}}, COMMON),
    "reward_is_dict.jsonl": ({"columns": {"reward": "reward.score"}}, COMMON),
    "shards": ({}, COMMON),
    "own_format.jsonl.gz": ({}, COMMON),
    "own_array_pretty.json": ({}, COMMON),
    "own_bom.jsonl": ({}, COMMON),
    "own_crlf.jsonl": ({}, COMMON),
    "own_float32.parquet": ({}, COMMON),
    "learner_minus_inf.jsonl": ({}, {"sequence": 0.5381, "mean": 0.9074}),
    "null_token.jsonl": ({"skip_bad": True}, {"n": 63}),
    "nan_token.jsonl": ({"skip_bad": True}, {"n": 63}),
    "mixed_staleness.jsonl": ({}, {"sequence": 0.573, "mean": 0.535}),
    "logprobs_is_the_samplers.jsonl": (
        {"columns": {"log_prob": "new_logprobs", "behavior_log_prob": "logprobs", "group": "group_id"}},
        {"sequence": 0.2840, "mean": 0.7914},
    ),
    "shifted_by_one.jsonl": ({}, {"sequence": 0.9902, "token": 0.00683}),
    "identical_columns.jsonl": ({}, {"sequence": 1.0, "mean": 1.0}),
    "top_p_095_equal_length.jsonl": ({}, {"sequence": 0.95474, "kl": 8.95503}),
}


@pytest.mark.skipif(not REPORTS.is_dir(), reason="the reports' files are not part of the repository")
@pytest.mark.parametrize("name", CASES)
def test_a_report_has_its_right_value(name: str) -> None:
    options, right = CASES[name]
    dump: Dump = read_dump(REPORTS / name, **options)
    found = to_json(replay(dump, resamples=100))
    levels = found["diagnostics"]["ess_fraction"]
    have = {"n": found["n"], "groups": found["groups"], **levels}
    have |= {"mean": found["diagnostics"]["mean_weight"], "kl": found["diagnostics"]["kl_behavior_target"]}
    for key, value in right.items():
        assert abs(have[key] - value) < (6e-4 if name == "mixed_staleness.jsonl" else 6e-5), key  # as printed
