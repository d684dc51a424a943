"""Every verdict of every experiment can be flipped by its records, and edits that fix or bend it are found."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from simulations import verdicts
from simulations.protocol import Analysis, Verdict, discover
from simulations.verdicts import EXACT, Rule
from tests.kit.statistical import OPERATION, near
from tests.simulations.worlds import BETWEEN, OF_THEIR_OWN, world, worlds_of

WORLDS = worlds_of(discover())
EXPECTED = {"true": "holds", "opposite": "fails", "noise": "undecided"}


def module_of(name: str) -> Any:
    return importlib.import_module(f"simulations.questions.{name}")


@cache
def keys_of(name: str) -> tuple[str, ...]:
    return tuple(v.key for v in module_of(name).analyse(world(name, "true", "")).verdicts)


def verdict(name: str, mode: str, key: str) -> Verdict:
    analysis: Analysis = module_of(name).analyse(world(name, mode, key))
    return next(v for v in analysis.verdicts if v.key == key)


def surprises(name: str, modes: tuple[str, ...] = ("true", "opposite", "noise", "between")) -> list[str]:
    """Questions whose word is not that of the world; the empty list for an honest analysis."""
    found = []
    for mode in modes:
        by_key = {key: world(name, mode, key) for key in keys_of(name) if key in OF_THEIR_OWN}
        plain = module_of(name).analyse(world(name, mode, "")).verdicts
        for v in plain:
            if v.key in by_key:
                v = next(w for w in module_of(name).analyse(by_key[v.key]).verdicts if w.key == v.key)
            want = BETWEEN.get(name, {}).get(v.key) if mode == "between" else EXPECTED[mode]
            exact = v.rule is None or "none" in v.rule["method"]
            if want is None or (mode == "noise" and exact):  # what is computed exactly has no noise
                continue
            if v.verdict != want:
                found.append(f"{mode} {v.key}: {v.verdict}, not {want} ({v.number})")
    return found


def test_every_experiment_that_judges_has_worlds() -> None:
    assert set(discover()) == set(WORLDS)


@pytest.mark.parametrize("name", WORLDS)
def test_records_decide_the_word(name: str) -> None:
    assert surprises(name) == []


@pytest.mark.parametrize("name", ["ablation", "async_learning", "best_step_size"])
def test_one_seed_decides_nothing(name: str) -> None:
    records = [r for r in world(name, "true") if r["seed"] == 0]
    assert {v.verdict for v in module_of(name).analyse(records).verdicts} == {"not judged"}


def flipped(*fields: Any, **named: Any) -> Rule:
    rule = Rule(*fields, **named)
    return replace(rule, side="<" if rule.side == ">" else ">")


def without_margin(*fields: Any, **named: Any) -> Rule:
    rule = Rule(*fields, **named)
    return rule if rule.method == EXACT else replace(rule, margin=0.0)


def fixed(word: str) -> Callable[[Any], list[Verdict]]:
    return lambda asked: [replace(v, verdict=word, condition="x") for v in verdicts.judge(asked)]


EDITS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "side flipped": ({"Rule": flipped}, ("true", "opposite")),
    "always holds": ({"judge": fixed("holds")}, ("opposite",)),
    "always fails": ({"judge": fixed("fails")}, ("true",)),
    "always holds if": ({"judge": fixed("holds if")}, ("true",)),
    "undecided for ever": ({"judge": fixed("undecided")}, ("true",)),
}
"""name -> what stands in the place of what, and worlds that show it"""


# an analysis each; of the edits that fix a word the fast selection leaves out all
@pytest.mark.parametrize("edit", ["side flipped", *(pytest.param(e, marks=pytest.mark.slow) for e in [*EDITS][1:])])
@pytest.mark.parametrize("name", WORLDS)
def test_planted_edits_of_an_analysis_die(name: str, edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set(keys_of(name))
    changes, modes = EDITS[edit]
    for attribute, value in changes.items():
        monkeypatch.setattr(module_of(name), attribute, value)
    found = surprises(name, modes)
    assert {line.split()[1].rstrip(":") for line in found} == keys  # not one verdict survives it


@pytest.mark.parametrize("name", BETWEEN)
def test_a_margin_ignored_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of(name), "Rule", without_margin)
    found = {line.split()[1].rstrip(":") for line in surprises(name, ("between",))}
    assert found == set(BETWEEN[name])


@pytest.mark.parametrize("name", [n for n in WORLDS if hasattr(module_of(n), "gain")])
def test_a_difference_taken_the_wrong_way_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gain = module_of(name).gain
    monkeypatch.setattr(module_of(name), "gain", lambda records, a, b, *field: gain(records, b, a, *field))
    assert surprises(name, ("true",))


ONE_RECORD = {"ess_reliability", "pipeline_speedup"}
"""their comparisons are one a record, which holds a whole sample or pipeline"""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(WORLDS) - ONE_RECORD))
def test_runs_of_one_seed_are_not_independent(name: str) -> None:
    """The same runs twice, under the same seeds, say nothing more: no interval gets narrower."""
    once, twice = (module_of(name).analyse(world(name, "noise", "") * times).verdicts for times in (1, 2))
    for a, b in zip(once, twice, strict=True):
        for c, d in zip(a.comparisons, b.comparisons, strict=True):
            assert d.get("seeds") == c.get("seeds")
            if c.get("low") is not None and c["low"] != c["high"]:
                assert d["high"] - d["low"] == near(c["high"] - c["low"], allow=OPERATION, scale=0)
