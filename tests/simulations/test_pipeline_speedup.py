"""The arithmetic of `pipeline_speedup`: what counts as time, what never arriving means, how step sizes are chosen."""

from typing import Any

import numpy as np
import pytest

from simulations.drawing import draw
from simulations.protocol import Record, encode, settings_of
from simulations.questions import pipeline_speedup as experiment
from simulations.questions.pipeline_speedup import COMMON, HOST, REFERENCES, STALE, STEP_SIZES, RealizedLag
from tests.kit.statistical import near
from vcposim.pipeline.plan import from_runs

PLACE = {"task": "t", "tail": "even", "admission": "pace", "max_lag": 2}
PIPELINE = {"kind": "pipeline", **PLACE, "speed": 2.0}


def learned(method: str, step: float, *hits: int | None, **changes: Any) -> list[Record]:
    rows = [{"kind": "learning", "method": method, "step_size": step, "updates": 50, **PLACE, **changes}]
    return [{**rows[0], "seed": seed, "hit": hit} for seed, hit in enumerate(hits)]


def test_speedup_is_throughput_times_the_ratio_of_steps() -> None:
    records = learned("VCPO", COMMON, 10, 5, None) + learned(REFERENCES[0], COMMON, 20, 5, 10, tail="other", max_lag=9)
    found = experiment.speedups(PIPELINE, records, "VCPO", REFERENCES[0], own=False)
    assert found == {0: 2 * 20 / 10, 1: 2 * 5 / 5, 2: 0.0}
    # a reference that never arrives is given the length of the run, not infinity
    records = learned("VCPO", COMMON, 10) + learned(REFERENCES[0], COMMON, None)
    assert experiment.speedups(PIPELINE, records, "VCPO", REFERENCES[0], own=False) == {0: 2 * 50 / 10}
    # other pipelines' runs do not count
    records += learned("VCPO", COMMON, 1, max_lag=8)
    assert experiment.speedups(PIPELINE, records, "VCPO", REFERENCES[0], own=False) == {0: 2 * 50 / 10}


def test_own_step_sizes_are_chosen_on_even_seeds_and_judged_on_odd_ones() -> None:
    low, mid, high = STEP_SIZES
    mine = learned("VCPO", low, 30, 31, 30, 31) + learned("VCPO", mid, 20, 40, 20, 40) + learned("VCPO", high, 25, 1)
    assert experiment._hits(mine, "VCPO", own=True) == {1: 40, 3: 40}
    # a step size that ruins a run does not win by the others
    mine = learned("VCPO", low, 30, 31, 30, 31) + learned("VCPO", mid, 9, 9, None, 9) + learned("VCPO", high, 99, 1)
    assert experiment._hits(mine, "VCPO", own=True) == {1: 31, 3: 31}


def test_lags_are_drawn_with_their_shares() -> None:
    lag = RealizedLag(3, share=(0.0, 0.25, 0.5, 0.25))
    drawn = lag.of_tokens(np.array([[0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999]]), 3)
    assert drawn[0].tolist() == [[k] * 3 for k in (1, 1, 2, 2, 3, 3)]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    found = []
    for number, setting in enumerate(settings_of(experiment.EXPERIMENT, "reduced")[:2]):
        small = {**setting, "seeds": 2, "updates": 45, "steps": 4, "splits": [5]}
        found += experiment.run(small)
        assert encode(experiment.run(small), f"pipeline_speedup/{number}")  # finite, plain, and without surprise
    return found


def test_records_hold_every_method_once(records: list[Record]) -> None:
    for k, names in ((1, (*REFERENCES, *STALE)), (2, STALE)):
        mine = [(r["method"], r["step_size"], r["seed"]) for r in records if r.get("max_lag") == k and "hit" in r]
        assert sorted(mine) == sorted((name, step, seed) for name in names for step in STEP_SIZES for seed in range(2))
    pipelines = [r for r in records if r["kind"] == "pipeline"]
    for pipeline in pipelines:
        share = np.array(pipeline["lag_share"])
        assert share.sum() == near(1)
        assert share @ np.arange(share.size) == near(pipeline["mean_lag"])
        assert pipeline["beyond"] == near(share[pipeline["max_lag"] + 1 :].sum())


def test_at_lag_zero_a_stale_method_is_its_host(records: list[Record]) -> None:
    """The exported curve starts where every estimator is on policy: run it there, update by update."""
    place = {key: records[0][key] for key in ("task", "tail", "admission", "max_lag")}
    setting = {**place, "reference": True, "seeds": 1, "updates": 25}
    found = experiment.learning(setting, place, RealizedLag(0), {"mean_lag": 0.0})
    hits = {(r["method"], r["step_size"]): (r["hit"], r["final"]) for r in found if r["kind"] == "learning"}
    for name, host in HOST.items():
        for step in STEP_SIZES:
            assert hits[name, step][0] == hits[REFERENCES[host], step][0]
            assert hits[name, step][1] == near(hits[REFERENCES[host], step][1])


def test_the_export_is_a_curve_for_the_plan(records: list[Record]) -> None:
    for name in STALE:
        runs = [(r["lag"], r["steps_ratio"]) for r in records if r.get("method") == name and "steps_ratio" in r]
        curve = from_runs(runs, name)
        assert curve.lag[0] == 0
        if HOST[name] == 0:
            assert curve.log_ratio[0] == 0  # its own reference


def test_the_whole_analysis_runs_on_few_records(records: list[Record]) -> None:
    analysis = experiment.analyse(records)
    assert {verdict.claim for verdict in analysis.verdicts} == {"C15", "C16"}
    for figure in analysis.figures:
        assert draw(figure.draw).axes
