"""`vcposim advise`: read off the nearest place, with a baseline that survives a shift of rewards where it must."""

import json
from typing import Any

import pytest

from tests.kit.statistical import near
from vcposim.commands import advise as advise_command
from vcposim.commands.advise import AskedRegime, advise, evidence, plainly, ranked
from vcposim.commands.main import main
from vcposim.commands.replay import SAMPLE
from vcposim.replay.reading import read_dump


def cell(values: dict[str, list[float]], **place: Any) -> dict[str, Any]:
    core = {"prompts": 16, "lag": 16, "length": 8, "base_rate": 0.1, "low": 0.0, "group_size": 8, "optimizer": "adam"}
    methods = {
        name: {"own_best": v, "own_best_step": [0.02], "ess": 0.5, "by_step": [v[0]] * 3, "lost": [0, 0, 0]}
        for name, v in values.items()
    }
    return {**core, "step_sizes": [0.01, 0.02, 0.04], "seeds": 2, "methods": methods, **place}


NONE, N2, MEAN, VCPO = (
    f"{name} step" for name in ("none / TIS / ESS", "n2 / no ratio / full", "mean / TIS / full", "OPOB / TIS / ESS")
)
CELLS = [
    cell({NONE: [0.9, 0.91], N2: [0.8, 0.81], MEAN: [0.5, 0.51], VCPO: [0.7, 0.71]}),
    cell({NONE: [0.1, 0.11], N2: [0.8, 0.81], MEAN: [0.5, 0.51], VCPO: [0.7, 0.71]}, low=-1.0),
    cell({NONE: [0.2, 0.21], N2: [0.3, 0.31], MEAN: [0.6, 0.61], VCPO: [0.4, 0.41]}, lag=64),
]


def test_the_nearest_place_decides() -> None:
    assert advise(AskedRegime(lag=20), CELLS)["choice"] == NONE
    far = advise(AskedRegime(lag=60), CELLS)
    assert far["choice"] == MEAN
    assert far["octaves"] < 0.2


def test_no_baseline_is_never_advised_where_rewards_are_shifted() -> None:
    found = advise(AskedRegime(lag=16, shifted=True), CELLS)
    assert found["choice"] == found["any_reward"] == N2
    assert advise(AskedRegime(lag=16), CELLS)["any_reward"] == N2
    alone = advise(AskedRegime(lag=16, shifted=True), CELLS[:1])  # no place of that kind: said, and still a baseline
    assert alone["choice"] == N2
    assert alone["warnings"] == ["no place with such rewards was measured"]


def test_it_says_what_would_change_the_advice() -> None:
    (change,) = advise(AskedRegime(lag=16), CELLS[::2])["changes"]
    assert change["better"] == MEAN
    assert change["by"] == near(0.3)


def test_far_away_and_low_ess_are_warned_of() -> None:
    found = advise(AskedRegime(prompts=512, lag=16, ess=0.1), CELLS)
    assert [w.split()[1] for w in found["warnings"]] == ["regime", "ESS"]


def test_the_committed_evidence_is_whole() -> None:
    for place in evidence():
        assert all(len(m["own_best"]) == place["seeds"] for m in place["methods"].values())
        assert VCPO in place["methods"]
        assert len(ranked(place)) == len(place["methods"])


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["advise", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    place = ("--prompts", "16", "--lag", "16")
    assert json.loads(told(capsys, *place, "--json"))["octaves"] == 0
    said = told(capsys, *place)
    assert "Take: " in said
    assert "How sure: over VCPO" in said
    assert "not known, so not compared: length, ess" in said


def test_a_dump_is_answered_on_one_page_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """What it says of the rollouts that come along is what they are; every method it names is explained."""
    said, dump = told(capsys, "--sample"), read_dump(SAMPLE)
    prompts, length = len(set(dump.group.tolist())), float(dump.length.mean())
    assert said.startswith(f"Yours: {prompts} prompts, lag 4, {length:.3g} tokens a response, ESS ")
    assert len(said.splitlines()) <= 40
    taken = next(line for line in said.splitlines() if line.startswith("Take: "))
    assert not any(method in taken for method in evidence()[0]["methods"])


def test_every_method_has_plain_words() -> None:
    for place in evidence():
        for method in place["methods"]:
            assert plainly(method).count(",") >= 2


def test_numbers_are_those_of_the_evidence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other evidence, other numbers: none is typed."""
    monkeypatch.setattr(advise_command, "evidence", lambda: CELLS)
    said = told(capsys, "--prompts", "16", "--lag", "16")
    assert "over VCPO (OPOB / TIS / ESS step) +0.200 [0.200, 0.200]" in said
    assert "mean / TIS / full step is better than n2 / no ratio / full step by 0.300 [0.300, 0.300]" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing is known of your regime"),
        (["--lag", "-1"], "--lag: -1 is out of range"),
        (["--ess", "2"], "--ess: 2 is not in (0, 1]"),
        (["--sample", "rollouts.jsonl"], "FILE: rollouts.jsonl and --sample; give one of them"),
        (["--lag", "1", "--rewards", "x"], "--rewards: 'x' is neither zero-one nor shifted"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *arguments]) == 2
    assert says in capsys.readouterr().err
