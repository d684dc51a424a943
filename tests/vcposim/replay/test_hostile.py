"""Kinds of files that people really have: the right numbers, a refusal that names what is wrong, or a note that does.

Each case is the same batch, spoiled in one way. `SAME` has to come back with the numbers written (and the words, where
there are some, among the notes), `REFUSED` in one line with the words in it, `SAID` with words in the notes.
"""

import gzip
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.statistical import assert_near
from tests.vcposim.replay.fixtures import Record, batch, mask_of, padded
from vcposim.commands.main import main
from vcposim.errors import InputError
from vcposim.replay import read_dump
from vcposim.replay.containers import NamedTwice, parse

BATCH = batch(1, prompts=8, responses=8)
Change = Callable[[int, Record], Record]


def rows(change: Change = lambda i, row: row) -> list[Record]:
    """The batch, each row changed."""
    plain = [
        {"group": r.prompt, "reward": r.reward, "behavior_log_prob": [*r.sampler], "log_prob": [*r.learner]}
        for r in BATCH
    ]
    return [change(i, row) for i, row in enumerate(plain)]


def with_(**columns: Any) -> Change:
    """Columns more, each a value or a function of (i, row)."""
    return lambda i, row: row | {name: x(i, row) if callable(x) else x for name, x in columns.items()}


def only(at: int, **columns: Any) -> Change:
    return lambda i, row: with_(**columns)(i, row) if i == at else row


def lines(table: list[Record]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table).encode()


def table(content: list[Record]) -> pa.Table:
    return pa.Table.from_pylist(content)


def tokens(row: Record) -> int:
    return len(row["log_prob"])


def in_two(name: str) -> Callable[[int, Record], list[list[float]]]:
    return lambda i, row: [row[name][:2], row[name][2:]]


def longer(i: int, row: Record) -> Record:
    """One token more, which is not the policy's."""
    return row | {"log_prob": [*row["log_prob"], -3.0], "behavior_log_prob": [*row["behavior_log_prob"], 0.0]}


SAME, REFUSED, SAID = "same", "refused", "said"

RECORDS: dict[str, tuple[Change, str, str]] = {
    "arrays in an encoding": (
        with_(log_prob=lambda i, row: {"dtype": "float64", "shape": [tokens(row)], "data": "AAAAAAAAAACa"}),
        REFUSED, "array.tolist",
    ),
    "versions as strings": (with_(version=lambda i, row: str(i % 3), learner_version="5"), SAME, ""),
    "versions that are names": (with_(version="v1", learner_version="v5"), SAME, "'v1' and 'v5' are no numbers"),
    "versions exchanged": (with_(version=5, learner_version=3), SAME, "lag is negative in 64 trajectories"),
    "versions a token, as strings": (with_(versions=lambda i, row: ["9", "10"] + ["10"] * (tokens(row) - 2)), SAME, ""),
    "versions of verl's asynchronous trainer": (
        with_(param_version_start=3, param_version_end=lambda i, row: 3 + i % 2), SAME, "FINDING mixed versions",
    ),
    "lags a token": (
        with_(staleness=lambda i, row: [2] * 3 + [1] * (tokens(row) - 3)), SAME, "FINDING mixed versions",
    ),
    "lags that are objects": (with_(lag={"of": 3}), SAME, ""),
    "a step a row": (with_(epoch=lambda i, row: 0.1 * i), SAME, "differs within every group, so it is no training"),
    "a mask a trajectory": (
        with_(overlong_filter_mask=lambda i, row: i % 2), SAME,
        "if it is 0 for trajectories that were left out, --column sample_mask=overlong_filter_mask",
    ),
    "masks of zeros": (with_(response_mask=lambda i, row: [0] * tokens(row)), SAID, "FINDING no tokens"),
    "responses without tokens": (with_(log_prob=[], behavior_log_prob=[]), SAID, "FINDING no tokens"),
    "names of what pandas took apart": (
        lambda i, row: {"a.group": row["group"], "a.reward": row["reward"], "a.b.log_prob": row["log_prob"],
                        "a.behavior_log_prob": row["behavior_log_prob"]},
        REFUSED, "use --column log_prob=a.b.log_prob --column behavior_log_prob=a.behavior_log_prob",
    ),
    "a version nobody knows": (with_(gen_step=lambda i, row: i % 3), SAME, "--column version=gen_step"),
    "staleness in an object": (
        with_(metadata=lambda i, row: {"staleness": i % 3, "schema_version": 1}), SAME,
        "'metadata.staleness' may tell versions or lags, and is not used: name the sampler's version, the learner's or "
        "their lag, as in --column lag=metadata.staleness",
    ),
    "fewer tokens by their count": (
        with_(num_generated_tokens=lambda i, row: tokens(row) - 3), REFUSED, "12 says how long .* 15 tokens are listed",
    ),
    "fewer tokens by their numbers": (
        with_(output_token_ids=lambda i, row: [7] * (tokens(row) - 3)), SAME, "lists 12 tokens beside 15 log-prob",
    ),
    "as many tokens by their numbers": (with_(completion_tokens=lambda i, row: [7] * tokens(row)), SAME, ""),
    "a step that is null once": (lambda i, row: row | {"step": None if i == 3 else 1}, SAID, "step is null in 1 of 64"),
    "groups of 2^64": (with_(group=lambda i, row: 2**64 - 9 + row["group"]), SAME, ""),
    "groups of 10^30": (with_(group=lambda i, row: 10**30 + row["group"]), REFUSED, "is rounded"),
    "groups as objects, keys in any order": (
        with_(group=lambda i, row: {"a": 1, "b": row["group"]} if i % 2 else {"b": row["group"], "a": 1}), SAME, "",
    ),
    "groups with spaces behind some": (
        with_(group=lambda i, row: f"p{row['group']}{' ' * (i % 2)}"), SAID, "differ in spaces alone",
    ),
    "groups spelled in two ways": (
        with_(group=lambda i, row: ("\u00e9" if i % 2 else "e\u0301") + str(row["group"])), SAID, "how Unicode spells",
    ),
    "trajectories as numbers and strings": (
        with_(rollout_id=lambda i, row: str(i // 2) if i % 2 else i // 2), SAID, "trajectories 0 and '0' are two here",
    ),
    "a sample mask of zeros": (with_(sample_loss_mask=0), REFUSED, "64 trajectories have a sample mask of 0"),
    "groups null once": (only(3, group=None), REFUSED, "line 4: group: null"),
    "a mask of floats": (lambda i, row: longer(i, row) | {"response_mask": [1.0] * tokens(row) + [0.0]}, SAME, ""),
    "a mask in a batch of one": (with_(mask=lambda i, row: [[1] * tokens(row)]), SAME, ""),
    "a mask named as in Java": (lambda i, row: longer(i, row) | {"responseMask": [1] * tokens(row) + [0]}, SAME, ""),
    "a mask of padding": (
        lambda i, row: longer(i, row) | {"padding_mask": [0] * tokens(row) + [1]}, SAID, "if 1 marks padding",
    ),
    "a mask of the prompt too": (
        with_(loss_mask=lambda i, row: [0] * 9 + [1] * tokens(row)), REFUSED, "24 entries: does not match the 15",
    ),
    "a mask as text": (with_(mask=lambda i, row: "1" * tokens(row)), REFUSED, "does not match the 15 tokens"),
    "a mask of indices": (with_(loss_mask=[0, 5]), REFUSED, "2 entries: does not match"),
    "a mask with null in it": (
        with_(mask=lambda i, row: [None] + [1] * (tokens(row) - 1)), REFUSED, "null at token 1 is neither",
    ),
    "padded with NaN": (
        with_(log_prob=lambda i, row: padded(row["log_prob"], 40, math.nan),
              behavior_log_prob=lambda i, row: padded(row["behavior_log_prob"], 40, math.nan)),
        REFUSED, "NaN is not finite",
    ),
    "filled with 1": (
        with_(log_prob=lambda i, row: padded(row["log_prob"], 40, 1.0),
              behavior_log_prob=lambda i, row: padded(row["behavior_log_prob"], 40, 1.0)),
        REFUSED, "where 1 fills what is no token of the policy .*, give its mask",
    ),
    "padded on the left with zeros": (
        with_(log_prob=lambda i, row: [0.0] * (40 - tokens(row)) + row["log_prob"],
              behavior_log_prob=lambda i, row: [0.0] * (40 - tokens(row)) + row["behavior_log_prob"]),
        SAID, "FINDING padding",
    ),
    "an array printed by NumPy": (
        with_(log_prob=lambda i, row: str(np.array(row["log_prob"]))), REFUSED, "a printed array.*write x.tolist",
    ),
    "a tensor printed by torch": (with_(log_prob="tensor([-0.1, -0.2])"), REFUSED, "a printed array"),
    "a list in a string": (with_(log_prob=lambda i, row: json.dumps(row["log_prob"])), REFUSED, "json.loads"),
    "numbers in strings": (with_(log_prob=lambda i, row: [*map(str, row["log_prob"])]), REFUSED, "is a string"),
    "tokens by number": (
        with_(log_prob=lambda i, row: {str(k): x for k, x in enumerate(row["log_prob"])}),
        REFUSED, "write a list of its numbers",
    ),
    "pairs of number and token": (
        with_(log_prob=lambda i, row: [[x, 5] for x in row["log_prob"]]), REFUSED, r"log_prob=log_prob\.\*\.0",
    ),
    "vLLM's objects": (
        with_(behavior_log_prob=lambda i, row: [{"17": {"logprob": x, "rank": 1}} for x in row["behavior_log_prob"]]),
        REFUSED, "the sampled token's number alone",
    ),
    "turns": (
        with_(log_prob=in_two("log_prob"), behavior_log_prob=in_two("behavior_log_prob")), SAME, "turns of a",
    ),
    "turns of other lengths": (
        with_(log_prob=in_two("log_prob"), behavior_log_prob=lambda i, row: [row["behavior_log_prob"][:1],
                                                                             row["behavior_log_prob"][1:]]),
        REFUSED, r"\[1, 14\] tokens a turn, where log_prob has \[2, 13\]",
    ),
    "the learner's -inf in a string": (
        only(2, log_prob=lambda i, row: ["-inf", *row["log_prob"][1:]]), REFUSED, 'line 3: .* "-inf" is a string',
    ),
    "false for a token": (
        only(1, log_prob=lambda i, row: [False, *row["log_prob"][1:]]), REFUSED, "line 2: log_prob: false is a boolean",
    ),
    "the sampler's -10000": (
        only(2, behavior_log_prob=lambda i, row: [-10000.0, *row["behavior_log_prob"][1:]]), SAID, "FINDING sentinel",
    ),
    "a mask from the tenth record on": (
        lambda i, row: row | ({"mask": [1] * tokens(row)} if i >= 9 else {}), REFUSED, "line 10: mask: is here",
    ),
    "a reward in a list": (with_(reward=lambda i, row: [row["reward"]]), SAME, ""),
    "a reward of 400 digits": (only(1, reward=10**400), REFUSED, "line 2: reward: .* is not finite"),
    "log-probabilities of two samplers": (
        lambda i, row: {k: v for k, v in row.items() if k != "behavior_log_prob"}
        | {"rollout_log_probs": row["behavior_log_prob"], "inference_logprobs": row["behavior_log_prob"]},
        REFUSED, "inference_logprobs: may be meant instead of rollout_log_probs",
    ),
    "a record that is none": (lambda i, row: {"loss": 0.3} if i == 5 else row, REFUSED, "line 6: none of the columns"),
    "half a token": (with_(log_prob=-3.0, behavior_log_prob=-3.1, length=2.5), REFUSED, "no whole number of tokens"),
    "prompts as messages": (
        lambda i, row: {**{k: v for k, v in row.items() if k != "group"},
                        "prompt": [{"role": "user", "content": f"q{row['group']}"}]},
        REFUSED, "--column group=prompt",
    ),
}  # fmt: skip
"""name -> change, what must come of it, words"""


def check(path: Any, outcome: str, words: str, **options: Any) -> None:
    """Read, and compare with what must come of it."""
    if outcome == REFUSED:
        with pytest.raises(InputError, match=words) as caught:
            read_dump(path, **options)
        assert "\n" not in str(caught.value)
        return
    dump = read_dump(path, **options)
    said = [*dump.notes, *(f"FINDING {one.check}" for one in dump.findings)]
    assert any(words in one for one in said) or not words, said
    if outcome == SAME:
        assert_near(dump.log_ratio, [r.log_ratio for r in BATCH])
        np.testing.assert_array_equal(dump.reward, [r.reward for r in BATCH])
        prompts = np.array([r.prompt for r in BATCH])
        np.testing.assert_array_equal(dump.group[:, None] == dump.group, prompts[:, None] == prompts)


@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str, tmp_path: Path) -> None:
    change, outcome, words = RECORDS[name]
    (tmp_path / "r.jsonl").write_bytes(lines(rows(change)))
    check(tmp_path / "r.jsonl", outcome, words)


def test_versions_of_programs_and_of_the_file_are_no_policys(tmp_path: Path) -> None:
    own = with_(schema_version=3, metadata={"vllm_version": "0.11"}, model="m")
    (tmp_path / "r.jsonl").write_bytes(lines(rows(own)))
    assert not any("version" in note for note in read_dump(tmp_path / "r.jsonl").notes)


def test_a_count_of_rows_is_no_axis_of_the_run_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(lines(rows(with_(epoch=lambda i, row: 0.1 * i))))
    assert "step" not in read_dump(tmp_path / "r.jsonl").slices
    assert "step" in read_dump(tmp_path / "r.jsonl", by=["step"]).slices


def in_halves(change: Change = lambda i, row: row) -> list[Record]:
    """Each trajectory in two rows that follow each other, without a group."""
    found = []
    for i, row in enumerate(rows()):
        cut = tokens(row) // 2
        for k, part in enumerate((slice(0, cut), slice(cut, None))):
            lists = {name: row[name][part] for name in ("log_prob", "behavior_log_prob")}
            found.append(change(k, {"reward": row["reward"], "traj_uid": f"t{i}", **lists}))
    return found


def mapped(**names: str) -> Record:
    return {"columns": names}


def without(*names: str) -> Change:
    return lambda i, row: {name: x for name, x in row.items() if name not in names}


def both(*changes: Change) -> Change:
    def change(i: int, row: Record) -> Record:
        for one in changes:
            row = one(i, row)
        return row

    return change


def episodes(i: int, row: Record) -> Record:
    """The row with its trajectory under a name that no framework uses."""
    return {"episode" if name == "traj_uid" else name: x for name, x in row.items()}


def in_steps(i: int, row: Record) -> Record:
    """The tokens in two objects, each with the reward."""
    parts = (slice(0, 2), slice(2, None))
    names = ("log_prob", "behavior_log_prob")
    return row | {"steps": [{"reward": row["reward"]} | {n: row[n][part] for n in names} for part in parts]}


def batches(**more: str) -> list[Record]:
    """A prompt a line, its answers in columns; `more` are columns more, each by the name of the row's own."""
    table = rows()
    names = {"rewards": "reward", "trainer_logprobs": "log_prob", "inference_logprobs": "behavior_log_prob"} | more
    return [{to: [row[own] for row in table[k : k + 8]] for to, own in names.items()} for k in range(0, 64, 8)]


def in_object(**names: str) -> list[Record]:
    """The whole batch in columns under `batch`, what is no tensor beside it (as verl's DataProto)."""
    table = rows()
    columns = {name: [row[own] for row in table] for name, own in names.items()}
    return [{"batch": columns, "non_tensor_batch": {"uid": [f"u{row['group']}" for row in table]}, "meta_info": {}}]


GROUPS_AND_REWARDS: dict[str, tuple[list[Record], Record, str, str]] = {
    "columns beside those of the batch": (
        in_object(old_log_probs="log_prob", rollout_log_probs="behavior_log_prob", score="reward"), {}, SAME, "",
    ),
    "columns beside those of one rollout": (
        [{"batch": without("group")(0, row), "non_tensor_batch": {"uid": f"u{row['group']}"}, "meta_info": {}}
         for row in rows()], mapped(group="uid"), SAME, "the rollouts are read out of 'batch'",
    ),
    "groups of trajectories in a file": (
        [{"global_step": 1, "trajectory_groups": [
            {"group_id": g, "trajectories": [without("group")(0, row) for row in rows()[8 * g : 8 * g + 8]]}
            for g in range(8)
        ]}], mapped(group="group_id"), SAME, "read out of 'trajectory_groups.trajectories'",
    ),
    "answers beside a prompt of messages": (
        [{"prompt": [{"role": "user", "content": f"q{g}"}], "answers": [
            without("group")(0, row) for row in rows()[8 * g : 8 * g + 8]
        ]} for g in range(8)], mapped(group="prompt"), SAME, "",
    ),
    "two prompts by name": (
        [{name: [without("group")(0, row) for row in rows()[:8]] for name in ("q1", "q2")}], {},
        REFUSED, "an object of 2 rollouts, or lists of them",
    ),
    "steps, joined by their paths": (
        rows(both(in_steps, without("log_prob", "behavior_log_prob"))),
        mapped(log_prob="steps.*.log_prob", behavior_log_prob="steps.*.behavior_log_prob"), SAME, "",
    ),
    "steps with a reward each": (
        rows(both(in_steps, without("log_prob", "behavior_log_prob", "reward"))), {},
        SAID, "name what it is joined of, as in --column 'log_prob=steps.*.log_prob', and the reward of the whole",
    ),
    "a prompt a line and no group": (
        batches(), mapped(log_prob="trainer_logprobs", behavior_log_prob="inference_logprobs", reward="rewards"),
        SAID, "if those of one record answer one prompt, --group-size 8 says so",
    ),
    "a prompt a line, counted": (
        batches(), {"group_size": 8} | mapped(
            log_prob="trainer_logprobs", behavior_log_prob="inference_logprobs", reward="rewards"
        ), SAME, "",
    ),
    "trajectories in rows, counted": (in_halves(), {"group_size": 8}, SAME, "128 rows are 64 trajectories"),
    "trajectories in rows, not counted": (
        in_halves(), {"group_size": 9}, REFUSED, "128 rows are 64 trajectories .*, no multiple of 9: it counts traj",
    ),
    "trajectories in rows under another name": (
        in_halves(episodes), {}, SAID, "if they share it, --trajectory episode",
    ),
    "trajectories in rows under another name, and their turns": (
        in_halves(lambda k, row: episodes(k, row) | {"turn": k}), {}, SAID, "share with --trajectory episode",
    ),
    "trajectories in rows under that name": (
        in_halves(episodes), {"trajectory": "episode", "group_size": 8}, SAME, "",
    ),
    "parts of trajectories under two versions": (
        in_halves(lambda k, row: row | {"policy_version": 3 + k}), {"group_size": 8}, SAME, "FINDING mixed versions",
    ),
    "rows that are no trajectories, counted": (
        rows(both(without("group"), with_(rollout_id=7))), {"group_size": 7}, REFUSED, "64 records are no multiple",
    ),
    "prompts that take turns, counted": (
        rows(both(without("group"), with_(prompt=lambda i, row: f"q{i % 8}"))), {"group_size": 8},
        SAID, "8 of 8 groups of 8 hold several values of 'prompt': are the rows in order? --group prompt groups by it",
    ),
    "prompts in order, counted": (
        rows(both(without("group"), with_(prompt=lambda i, row: f"q{i // 8}"))), {"group_size": 8}, SAME, "",
    ),
    "rewards that merge nothing": (rows(), {"merge_reward": "last"}, SAME, "nothing is merged, no column says"),
    "one column for both policies": (
        rows(), mapped(behavior_log_prob="log_prob"), REFUSED, "'log_prob' cannot be both log_prob and behavior_log",
    ),
    "a reward that is null": (rows(with_(reward=None)), {}, REFUSED, "weights alone: --column reward=none"),
    "a reward that is null in all rows but the last": (
        in_halves(lambda k, row: row if k else row | {"reward": None}), {},
        REFUSED, "0 in all rows .* --merge-reward sum",
    ),
    "a reward within an object, returns of tokens": (
        rows(both(with_(returns=lambda i, row: row["log_prob"], info=lambda i, row: {"reward": row["reward"]}),
        without("reward"))), {}, SAID, "is it 'info.reward'? then --column reward=info.reward",
    ),
    "rewards in parts": (
        rows(with_(reward=lambda i, row: [row["reward"], 0.5])), {}, REFUSED, "as in --column reward=reward.0",
    ),
    "rewards in parts, one of them named": (
        rows(with_(reward=lambda i, row: [row["reward"], 0.5])), mapped(reward="reward.0"), SAME, "",
    ),
    "a reward a token": (
        rows(both(with_(step_rewards=lambda i, row: [0.0] * (tokens(row) - 1) + [row["reward"]]), without("reward"))),
        {}, SAID, "'step_rewards' has a number a token: write their sum as the reward of each trajectory",
    ),
    "one entry of a mask": (rows(with_(mask=lambda i, row: [1] * (tokens(row) - 1) + [2])), {},
        REFUSED, r"mask: 2 at token \d+ is neither 0 nor 1; write 1 .* --column mask=none",
    ),
    "a slice that comes later": (
        rows(lambda i, row: row | ({"task": "a"} if i else {})), {"by": ["task"]}, SAME, "",
    ),
    "log-probabilities in one of several objects": (
        rows(both(with_(turns=lambda i, row: [
            {"logprobs": {"content": [{"logprob": x} for x in row["behavior_log_prob"]]}}, {"role": "user"},
        ]), without("behavior_log_prob"))), {}, REFUSED, "'behavior_log_prob' not found",
    ),
    "log-probabilities in one place": (
        rows(both(with_(meta_info=lambda i, row: {
            "output_token_logprobs": [[x, 17, None] for x in row["behavior_log_prob"]],
        }), without("behavior_log_prob"))), {},
        REFUSED, r"use --column 'behavior_log_prob=meta_info.output_token_logprobs.\*.0'",
    ),
}  # fmt: skip
"""name -> rows, options, what must come of it, words"""


@pytest.mark.parametrize("name", GROUPS_AND_REWARDS)
def test_groups_and_rewards(name: str, tmp_path: Path) -> None:
    table, options, outcome, words = GROUPS_AND_REWARDS[name]
    (tmp_path / "r.jsonl").write_bytes(lines(table))
    check(tmp_path / "r.jsonl", outcome, words, **options)


@pytest.mark.parametrize("broken", [b"{}\n", b"not JSON\n", b"[3]\n", b'{"reward": 1.0, "reward": 2.0}\n', b"7\n"])
def test_rows_that_cannot_be_read_count_where_rows_are_counted(broken: bytes, tmp_path: Path) -> None:
    """Otherwise the groups behind them would move up by as many rows, in silence where these are a whole group's."""
    table = lines(rows(without("group"))).splitlines(keepends=True)
    table[3:11] = [broken] * 8
    (tmp_path / "r.jsonl").write_bytes(b"".join(table))
    dump = read_dump(tmp_path / "r.jsonl", group_size=8, skip_bad=True)
    kept = [r for i, r in enumerate(BATCH) if not 3 <= i < 11]
    assert [dump.labels[g] for g in dump.group] == [r.prompt for r in kept]
    assert any(note.startswith("8 of 64 records are left out") for note in dump.notes)


TWICE = {
    "in plain numbers": rows(),
    "beside texts": rows(with_(prompt='a: "b": c\n', completion=": é" * 40)),
    "beside texts longer than a page": rows(with_(completion="x = {1: 2}\n" * 900)),
    "beside lists of texts and objects": rows(with_(tags=[["a:", ":"]], info=[{"k": {"a": ":"}}, 3, None])),
    "beside names with colons": rows(with_(**{"val:reward": 1.0, "a:b": ":", 'q"': "c"})),
    "beside NaN": rows(with_(loss=math.nan)),
}


@pytest.mark.parametrize("at", [0, 40, 63])
@pytest.mark.parametrize("name", TWICE)
def test_a_name_twice_in_any_record_is_refused_or_left_out_and_counted(name: str, at: int, tmp_path: Path) -> None:
    table = lines(TWICE[name]).splitlines(keepends=True)
    table[at] = table[at].replace(b"}\n", b', "reward": 7.0}\n')
    (tmp_path / "r.jsonl").write_bytes(b"".join(table))
    words = f'line {at + 1}: "reward" stands twice in one object; write each name once'
    check(tmp_path / "r.jsonl", REFUSED, words)
    check(tmp_path / "r.jsonl", SAID, f"1 a name twice in one object (line {at + 1})", skip_bad=True)
    (tmp_path / "r.json").write_bytes(b"[" + b",\n".join(table) + b"]")
    check(tmp_path / "r.json", REFUSED, '"reward" stands twice')


def test_a_name_twice_within_an_object_of_the_record_and_spelled_in_two_ways_is_refused(tmp_path: Path) -> None:
    for inner in (b'"r": {"acc": 1, "acc": 2}', b'"r": [{"acc": ":"}, {"acc": 1, "acc": 2}]', b'"gr\\u006fup": 3'):
        (tmp_path / "r.jsonl").write_bytes(lines(rows()).replace(b"}\n", b", " + inner + b"}\n"))
        check(tmp_path / "r.jsonl", REFUSED, "(acc|group).* stands twice")


class Pairs(list[tuple[str, Any]]):
    """An object as it is written, any name any number of times."""


JSON_TEXTS = st.text(':"\\\\ {},é\n\ud7ffa', max_size=6)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers(-(2**70), 2**70) | JSON_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(JSON_TEXTS, inner), max_size=4).map(Pairs),
    max_leaves=12,
)


def as_text(value: Any, between: str, colon: str, escape: bool) -> str:
    """JSON with those separators, letters beyond ASCII escaped or not."""
    if isinstance(value, Pairs):
        written = (as_text(k, "", "", escape) + colon + as_text(x, between, colon, escape) for k, x in value)
        return "{" + between.join(written) + "}"
    if isinstance(value, list):
        return "[" + between.join(as_text(x, between, colon, escape) for x in value) + "]"
    return json.dumps(value, ensure_ascii=escape)


@given(
    st.lists(st.tuples(JSON_TEXTS, JSON_VALUES), max_size=6).map(Pairs),
    st.sampled_from([(",", ":"), (", ", ": "), (" , ", " :\t")]),
    st.booleans(),
    st.sampled_from(["", "x" * 5000, "x: " * 2000]),
)
def test_a_name_twice_is_found_wherever_the_slow_parser_finds_one(
    pairs: Pairs, separators: tuple[str, str], escape: bool, long: str
) -> None:
    text = as_text(Pairs([*pairs, ("long", long)]), *separators, escape)
    doubled = []

    def see(found: list[tuple[str, Any]]) -> dict[str, Any]:
        doubled.append(len(dict(found)) < len(found))
        return dict(found)

    plain = json.loads(text, object_pairs_hook=see)
    if any(doubled):
        with pytest.raises(NamedTwice, match="stands twice"):
            parse(text.encode())
    else:
        assert parse(text.encode()).keys() == plain.keys()


def _stream(content: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=9)
    return sink.getvalue()


def _parquet(content: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(content, sink)
    return sink.getvalue()


def _typed(of: Callable[[pa.DataType], pa.DataType]) -> pa.Table:
    numbers = {"group": pa.int64(), "reward": pa.float64()}
    schema = pa.schema(numbers | dict.fromkeys(("log_prob", "behavior_log_prob"), of(pa.float64())))
    return pa.Table.from_pylist(rows(), schema=schema)


def _twice() -> pa.Table:
    return table(rows()).append_column("reward", pa.array([7.0] * len(BATCH)))


def _blobs() -> pa.Table:
    return table(rows(with_(log_prob=lambda i, row: np.array(row["log_prob"]).tobytes())))


def _fixed() -> pa.Table:
    padding = [
        {"group": r.prompt, "reward": r.reward, "log_prob": padded(r.learner, 30, -1.0),
         "behavior_log_prob": padded(r.sampler, 30, 0.0), "mask": mask_of(r.sampler, 30)}
        for r in BATCH
    ]  # fmt: skip
    lists = dict.fromkeys(("log_prob", "behavior_log_prob"), pa.list_(pa.float64(), 30))
    schema = {"group": pa.int64(), "reward": pa.float64(), **lists, "mask": pa.list_(pa.int8(), 30)}
    return pa.Table.from_pylist(padding, schema=pa.schema(schema))


BYTES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "records in strings": (
        lambda: "".join(json.dumps(json.dumps(row)) + "\n" for row in rows()).encode(),
        REFUSED,
        "dumped twice",
    ),
    "verl's console": (
        lambda: b"(TaskRunner pid=1) step:1 - actor/kl_loss:0.1 - critic/score/mean:0.5\n" * 3,
        REFUSED,
        "a line of a trainer's console, not JSON; its metrics stand in files too",
    ),
    "TRL's console": (
        lambda: b"{'loss': 0.1, 'grad_norm': 1.5, 'reward': 0.5, 'epoch': 0.01}\n" * 3,
        REFUSED,
        "a dict that a trainer printed, not JSON; .* trainer_state.json",
    ),
    "a JSON text sequence": (lambda: b"\x1e" + lines(rows()).replace(b"\n", b"\n\x1e"), REFUSED, "JSON text sequence"),
    "a web page": (lambda: b"\n<!DOCTYPE html><html><body>Sign in</body></html>", REFUSED, "is a web page"),
    "an answer of a storage": (lambda: b'<?xml version="1.0"?><Error>NoSuchKey</Error>', REFUSED, "is XML"),
    "a pointer of Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
        REFUSED,
        "git lfs pull",
    ),
    "a first line that was cut off": (
        lambda: lines(rows())[:60] + b"\n" + lines(rows()),
        REFUSED,
        "line 1: not JSON .*; every line is one JSON object",
    ),
    "a last line that was cut off behind a comma": (
        lambda: lines(rows())[: lines(rows()).rindex(b",") + 1],
        REFUSED,
        "line 64: the file is cut off here",
    ),
    "objects over several lines": (
        lambda: "".join(json.dumps(row, indent=1) + "\n" for row in rows()).encode(),
        SAME,
        "",
    ),
    "objects whose second line is one": (
        lambda: b'{"data": [\n' + b",\n".join(lines(rows()).splitlines()) + b"\n]}\n",
        SAME,
        "read out of 'data'",
    ),
    "Parquet with a map beside": (
        lambda: _parquet(
            table(rows()).append_column("info", pa.array([[("a", 1.0)]] * 64, pa.map_("string", "double")))
        ),
        SAME,
        "",
    ),
    "an array behind a byte-order mark": (lambda: b"\xef\xbb\xbf" + json.dumps(rows()).encode(), SAME, ""),
    "old Mac line breaks": (lambda: lines(rows()).replace(b"\n", b"\r"), REFUSED, "several JSON values"),
    "UTF-16": (lambda: lines(rows()).decode().encode("utf-16"), REFUSED, "UTF-16 text, convert it"),
    "UTF-16 without a mark": (lambda: lines(rows()).decode().encode("utf-16-le"), REFUSED, "iconv -f utf-16le"),
    "UTF-16, the other way": (lambda: lines(rows()).decode().encode("utf-16-be"), REFUSED, "iconv -f utf-16be"),
    "UTF-32": (lambda: lines(rows()).decode().encode("utf-32"), REFUSED, "UTF-32 text"),
    "Latin-1": (lambda: lines(rows()).replace(b'"group"', b'"gr\xf6up"'), REFUSED, "not UTF-8 text"),
    "a comma behind each line": (lambda: lines(rows()).replace(b"}\n", b"},\n"), REFUSED, "a comma ends the line"),
    "Python's dicts": (lambda: "".join(f"{row}\n" for row in rows()).encode(), REFUSED, "as Python prints it"),
    "no line breaks": (lambda: lines(rows()).replace(b"\n", b""), REFUSED, "several JSON values stand in one line"),
    "zeros behind the end": (lambda: lines(rows()) + bytes(4096), REFUSED, "line 65: the file is cut off"),
    "nothing": (lambda: b"", REFUSED, "no rollouts in it"),
    "a byte-order mark alone": (lambda: b"\xef\xbb\xbf", REFUSED, "no rollouts in it"),
    "an empty array": (lambda: b"[]", REFUSED, "no rollouts in it"),
    "a line about the run first": (
        lambda: b'{"model": "x"}\n' + lines(rows()),
        REFUSED,
        "line 1: columns .* not found",
    ),
    "two gzip members": (lambda: gzip.compress(lines(rows()[:30])) + gzip.compress(lines(rows()[30:])), SAME, ""),
    "gzip, cut off": (lambda: gzip.compress(lines(rows()))[:-40], REFUSED, "cut off or damaged"),
    "gzip of nothing": (lambda: gzip.compress(b""), REFUSED, "no rollouts in it"),
    "gzip of gzip": (lambda: gzip.compress(gzip.compress(lines(rows()))), REFUSED, "compressed twice"),
    "gzip of Parquet": (lambda: gzip.compress(_parquet(table(rows()))), SAME, ""),
    "zstd of Arrow": (lambda: pa.compress(_stream(table(rows())), codec="zstd", asbytes=True), SAME, ""),
    "Arrow, cut off": (lambda: _stream(table(rows()))[:-3000], REFUSED, "not a readable Arrow file"),
    "Parquet, cut off": (lambda: _parquet(table(rows()))[:-20], REFUSED, "not a readable Parquet file"),
    "Parquet of large lists": (lambda: _parquet(_typed(pa.large_list)), SAME, ""),
    "Parquet of fixed lists": (lambda: _parquet(_fixed()), SAME, ""),
    "Arrow of list views": (lambda: _stream(_typed(pa.list_view)), SAME, ""),
    "Parquet of bytes": (lambda: _parquet(_blobs()), REFUSED, "is bytes, .* numpy.frombuffer"),
    "Parquet with a column twice": (lambda: _parquet(_twice()), REFUSED, "several columns called 'reward'"),
    "Arrow with a column twice": (lambda: _stream(_twice()), REFUSED, "several columns called 'reward'"),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name: str, tmp_path: Path) -> None:
    content, outcome, words = BYTES[name]
    (tmp_path / "file").write_bytes(content())
    check(tmp_path / "file", outcome, words)


def _shards(folder: Path, suffix: str = "jsonl", count: int = 4) -> None:
    for k in range(count):
        (folder / f"data-{k:05d}-of-00004.{suffix}").write_bytes(lines(rows()[16 * k : 16 * k + 16]))


def _saved(folder: Path, state: Record, count: int = 4) -> None:
    for k in range(count):
        part = table(rows()[16 * k : 16 * k + 16])
        (folder / f"data-{k:05d}-of-00004.arrow").write_bytes(_stream(part))
    (folder / "state.json").write_text(json.dumps(state))


def _steps(folder: Path) -> None:
    (folder / "step_10.jsonl").write_bytes(lines(rows()[32:]))
    (folder / "step_9.jsonl").write_bytes(lines(rows()[:32]))


def _beside(name: str, content: bytes = b"x") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "a.jsonl").write_bytes(lines(rows()))
        (folder / name).write_bytes(content)

    return write


def _linked(to: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "a.jsonl").write_bytes(lines(rows()))
        (folder / "0_latest.jsonl").symlink_to(folder / to)

    return write


def _piped(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(lines(rows()))
    os.mkfifo(folder / "b.jsonl")


def _hub(folder: Path) -> None:
    for name in ("test", "train"):
        (folder / f"{name}-00000-of-00001.parquet").write_bytes(_parquet(table(rows())))


def _copied(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(lines(rows()))
    shutil.copy(folder / "a.jsonl", folder / "a (1).jsonl")


def _renamed(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(lines(rows()[:32]))
    other = [{"rollout_log_probs" if k == "behavior_log_prob" else k: v for k, v in row.items()} for row in rows()[32:]]
    (folder / "b.jsonl").write_bytes(lines(other))


FOLDERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "step 9 before step 10": (_steps, SAME, ""),
    "all parts": (_shards, SAME, ""),
    "a part that is not there": (
        lambda f: _shards(f, count=3), SAID, "1 of the 4 files data-*-of-00004.jsonl, which are not there",
    ),
    "a saved dataset": (lambda f: _saved(f, {"_data_files": []}), SAME, ""),
    "a saved dataset of selected rows": (
        lambda f: _saved(f, {"_indices_files": [{"filename": "i.arrow"}]}), REFUSED, "flatten_indices",
    ),
    "splits of a dataset": (_hub, REFUSED, "files of the splits test, train; pass one, as '.*/train-"),
    "a checkpoint beside": (_beside("optimizer.pt", b"\x80\x02"), SAME, "not read in"),
    "settings beside": (_beside("args.json", b"{}"), SAME, "args.json"),
    "a text beside": (_beside("README.md"), SAME, "README.md"),
    "an empty file beside": (_beside("b.jsonl", b""), SAME, "b.jsonl (empty)"),
    "half a file beside": (_beside("b.jsonl", lines(rows())[:-50]), REFUSED, "b.jsonl: line 64: the file is cut off"),
    "other JSON beside": (_beside("run.json", b'{"seed": 3}'), REFUSED, "run.json: line 1: none of the columns"),
    "metrics beside": (_beside("log.jsonl", b'{"step": 1, "loss": 0.3}\n'), REFUSED, "log.jsonl: line 1"),
    "a link to the same file": (_linked("a.jsonl"), SAME, "1 of 2 files are others once more: read once"),
    "a link to nothing": (_linked("nowhere"), SAME, "0_latest.jsonl (a link to nothing)"),
    "a pipe": (_piped, SAME, "b.jsonl (no file, a pipe or a device)"),
    "a copy": (_copied, SAID, "FINDING copies"),
    "another name in another file": (_renamed, REFUSED, "b.jsonl: line 1: rollout_log_probs: is here, but not"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    write, outcome, words = FOLDERS[name]
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder)
    check(folder, outcome, words)


def test_a_reward_in_a_map_of_parquet_is_reached_by_its_path(tmp_path: Path) -> None:
    rewards = pa.array([[("acc", r.reward), ("format", 9.0)] for r in BATCH], pa.map_(pa.string(), pa.float64()))
    pq.write_table(table(rows()).drop(["reward"]).append_column("reward", rewards), tmp_path / "r.parquet")
    check(tmp_path / "r.parquet", SAME, "", columns={"reward": "reward.acc"})
    check(tmp_path / "r.parquet", REFUSED, "name its part, as in --column reward=reward.acc")


def test_a_pattern_of_folders_is_all_that_is_in_them(tmp_path: Path) -> None:
    for k in range(4):
        (tmp_path / f"step_{k}").mkdir()
        (tmp_path / f"step_{k}" / "rank_0.jsonl").write_bytes(lines(rows()[16 * k : 16 * k + 16]))
    check(tmp_path / "step_*", SAME, "")


def test_a_complex_tensor_is_called_so(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    spoiled = rows(with_(log_prob=lambda i, row: torch.tensor(row["log_prob"]) + 0j))
    torch.save(spoiled, tmp_path / "r.pt")
    check(tmp_path / "r.pt", REFUSED, "is a complex number, not a number")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a" * 300], "no file can have such a name"),
        (["R", "--html", "a" * 300 + ".html"], "no file can have so long a name"),
        (["R", "--figure", "a" * 300 + ".png"], "no file can have so long a name"),
        (["R", "--html", ""], "--html: is empty"),
        (["R", "--by", "log_prob"], "--by: 'log_prob' holds log_prob of each token"),
    ],
    ids=str,
)
def test_arguments(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "R").write_bytes(lines(rows()))
    figure = [] if "--figure" in arguments else ["--no-figure"]
    assert main(["replay", *arguments, *figure]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_file_named_twice_is_read_once_and_a_name_of_two_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows()))
    check([path, tmp_path, path], SAME, "2 of 3 files are others once more: read once")
    shutil.copy(path, tmp_path / "a\nb.jsonl")
    check(tmp_path / "a\nb.jsonl", REFUSED, "cannot be shown in a line")


@pytest.mark.parametrize("content", [lines(rows()), _parquet(table(rows())), gzip.compress(lines(rows()))])
def test_a_named_pipe_is_read_to_its_end(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    check(path, SAME, "")
    writer.join()
