"""Problem files: what is read, and what a user sees when something is wrong with one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kit.statistical import near
from vcposim.errors import InputError
from vcposim.laboratory import exact
from vcposim.problems.problem_file import load as load_problem
from vcposim.problems.rollouts import bandit_problem

GOOD = {"kind": "bandit", "target": [0.5, 0.3, 0.2], "behavior": [0.2, 0.3, 0.5], "reward": [1, 0, 2]}


def written(path: Path, fields: Any) -> Path:
    file = path / "problem.json"
    file.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return file


def test_a_bandit_file_is_the_bandit(tmp_path: Path) -> None:
    problem = load_problem(written(tmp_path, GOOD))
    np.testing.assert_array_equal(problem.gradient, bandit_problem(*(GOOD[k] for k in list(GOOD)[1:])).gradient)
    assert problem.value == near(0.9)


def test_a_contextual_bandit_file(tmp_path: Path) -> None:
    fields = {
        "kind": "contextual_bandit",
        "target": [[0.5, 0.5], [0.9, 0.1]],
        "behavior": [[0.25, 0.75], [0.8, 0.2]],
        "reward": [[1, 0], [0, 1]],
    }
    problem = load_problem(written(tmp_path, fields))
    assert problem.value == near(0.5 * 0.5 + 0.5 * 0.1)
    np.testing.assert_array_equal(problem.group_probability, [0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behavior": [0.2, 0.3, float("nan")]}, r"behavior\[2\]: nan is not a finite number"),
        ({"reward": [1, float("inf"), 0]}, r"reward\[1\]: inf is not a finite number"),
        ({"behavior": [1.2, 0.3, -0.5]}, r"behavior\[2\]: -0.5 is negative"),
        ({"target": [0.5, 0.3, 0.1]}, r"target: sums to 0.9, not 1; divide by the sum"),
        ({"behavior": [0.5, 0.5, 0.0]}, r"behavior\[2\]: 0 where target is 0.2.*positive probability"),
        ({"behavior": [0.5, 0.5, 1e-300]}, r"behavior\[2\]: 1e-300 makes a ratio of e\^689.*keep ratios below e\^340"),
        ({"reward": [1, 0]}, r"reward: shape \(2,\) for a target of \(3,\)"),
        ({"target": []}, r"target: empty"),
        ({"target": "0.5"}, r"target: not a list of numbers; got '0.5'"),
        ({"target": [0.5, "a", 0.5]}, r"target\[1\]: 'a' is not a number"),
        ({"target": [0.5, True, 0.5]}, r"target\[1\]: True is not a number"),
        ({"length": [1, 0, 2]}, r"length\[1\]: 0.0 tokens; lengths are positive"),
        ({"rewards": [1]}, r"field: unknown name 'rewards'; did you mean 'reward'"),
        ({"kind": "bandid"}, r"kind: unknown name 'bandid'; did you mean 'bandit'"),
        ({"kind": 3}, r"kind: unknown name '3'"),
        ({"kind": "contextual_bandit"}, r"target\[0\]: not a list of numbers; got 0.5"),
    ],
)
def test_errors_name_file_field_value_and_remedy(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = written(tmp_path, GOOD | change)
    with pytest.raises(InputError, match=message) as caught:
        load_problem(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "bandit",\n "target": [0.5,}', r"problem.json:2: malformed JSON at column 17"),
        ("[1, 2]", "problem: list instead of an object"),
        ('{"target": [1]}', "kind: missing; add one of"),
        ('{"kind": "bandit", "target": [1]}', "behavior: missing; required are target, behavior, reward"),
        ('{"kind": "bandit", "kind": "chain"}', "kind: given twice"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_problem(written(tmp_path, text))


CHAIN = {
    "kind": "chain",
    "task": "modular_sum",
    "length": 3,
    "vocabulary": 3,
    "modulus": 4,
    "prompts": [0, 2],
    "policy": {"form": "linear", "features": 4, "trained_steps": 5},
    "behavior": {"chi2": 0.5},
}


def test_a_chain_file(tmp_path: Path) -> None:
    problem = load_problem(written(tmp_path, CHAIN))
    assert exact.diagnostics(problem)["chi2"] == near(0.5)
    assert problem.gradient.shape == (4,)
    lagged = load_problem(written(tmp_path, CHAIN | {"behavior": {"lag": 5}, "end_of_sequence": True}))
    assert 0 < exact.diagnostics(lagged)["ess_fraction"] < 1
    plain = {"kind": "chain", "vocabulary": 3, "behavior": {"drift": 0.1}}
    for task in (
        {"task": "exact_match", "target": [1, 2]},
        {"task": "any_match", "targets": [[1, 2], [0]], "length": 4, "end_of_sequence": True},
        {"task": "partial_credit", "target": [0, 1, 2], "policy": {"scale": 0.5, "seed": 3}},
    ):
        assert load_problem(written(tmp_path, plain | task)).value > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "modular_sun"}, "task: unknown name 'modular_sun'; did you mean 'modular_sum'"),
        ({"task": "exact_match"}, "field: unknown name 'modulus'"),
        ({"length": 0}, "length: 0 is not an integer of 1 or more"),
        ({"vocabulary": 2.5}, "vocabulary: 2.5 is not an integer"),
        ({"prompts": [0, "a"]}, r"prompts\[1\]: 'a' is not an integer"),
        ({"end_of_sequence": 1}, "end_of_sequence: 1 is neither true nor false"),
        ({"policy": {"form": "deep"}}, "policy.form: unknown name 'deep'"),
        ({"policy": {"form": "linear"}}, "policy.features: missing"),
        ({"policy": {"scale": -1}}, "policy.scale: -1 is not a finite non-negative"),
        ({"policy": 3}, "policy: 3 is not an object"),
        ({"behavior": {}}, "behavior: 0 of drift, chi2, kl, lag given; give exactly one"),
        ({"behavior": {"drift": 0.1, "kl": 1}}, "behavior: 2 of drift"),
        ({"behavior": {"lag": 6}}, "behavior.lag: 6 is more than policy.trained_steps 5; train longer"),
        ({"behavior": {"drift": 0.1, "seed": -1}}, "behavior.seed: -1 is not an integer of 0 or more"),
        ({"behavior": {"chi2": "1"}}, "behavior.chi2: '1' is not a finite"),
        ({"behavior": {"drfit": 1}}, "field: unknown name 'drfit'; did you mean 'drift'"),
    ],
)
def test_chain_errors_name_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_problem(written(tmp_path, CHAIN | change))
    assert "\n" not in str(caught.value)


def test_a_target_shorter_than_the_string_needs_an_end(tmp_path: Path) -> None:
    fields = {"kind": "chain", "task": "exact_match", "target": [1, 2], "vocabulary": 3, "behavior": {"drift": 0.1}}
    with pytest.raises(InputError, match="length: 3 for a target of 2 tokens; make them equal, or set end_of_sequence"):
        load_problem(written(tmp_path, fields | {"length": 3}))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_problem(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_problem(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_problem(tmp_path / "binary.json")
