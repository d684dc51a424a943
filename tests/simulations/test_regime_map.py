"""The map of regimes, the mechanism, what is beyond VCPO: verdicts on records made by hand, and what is watched."""

from typing import Any

import numpy as np

from simulations.methods import at_edge, ess_told
from simulations.questions import beyond_vcpo, mechanism, regime_factors, regime_map
from tests.kit.statistical import assert_near, near
from vcposim.batch import Batch, DenseScores
from vcposim.catalogue import CATALOGUE


def world(value: Any) -> list[dict[str, Any]]:
    """Records of one cell: value(method, step size, seed), and a run is lost below 0.1."""
    out = []
    for method in regime_map.METHODS:
        for step in (0.01, 0.02, 0.04):
            for seed in range(6):
                v = value(method, step, seed) + 1e-3 * ((len(method) * 7 + seed * 3) % 5)
                numbers = {"final": v, "average": v, "ess": 0.5, "scale": 1.0, "start": 0.1}
                lost = 50 if v < 0.1 else None
                record = {"method": method, "step_size": step, "seed": seed, "collapse": lost}
                out.append({**regime_map.CORE._asdict(), **record, **numbers})
    return out


def words(records: list[dict[str, Any]]) -> dict[str, str]:
    return {v.key: v.verdict for v in regime_map.analyse(records).verdicts}


def test_a_world_where_the_baseline_decides() -> None:
    found = words(world(lambda m, step, seed: (0.5 if m.startswith("mean") else 0.9) - 4 * abs(step - 0.02)))
    assert found["baseline_before_ratio"] == found["rivals_gain_from_n2"] == found["n2_alone_own_best"] == "holds"
    assert found["vcpo_beats_rivals_with_n2"] == "fails"
    assert found["stratified"] == "fails"


def test_a_world_where_the_ratio_decides() -> None:
    found = words(world(lambda m, step, seed: 0.9 if " TIS " in m else 0.4))
    assert found["baseline_before_ratio"] == found["n2_alone_own_best"] == "fails"


def test_own_best_is_chosen_by_cell_and_the_summary_holds_every_seed() -> None:
    records = world(lambda m, step, seed: 0.9 - abs(step - 0.02))
    other = [{**r, "lag": 64, "average": 0.05 + r["step_size"], "collapse": 9} for r in records]
    first, second = regime_map.summary(records + other)
    vcpo = first["methods"][regime_map.VCPO]
    assert vcpo["own_best_step"] == [0.02]
    assert len(vcpo["own_best"]) == first["seeds"] == 6
    assert vcpo["lost"] == [0, 0, 0]
    assert second["methods"][regime_map.VCPO]["own_best_step"] == [0.04]
    assert second["methods"][regime_map.VCPO]["lost"] == [6, 6, 6]


def test_without_ratio_opob_still_weighs_by_ratios() -> None:
    """The factorial's "no ratio" leaves c = R - b, and b = sum w^2 n^2 R / sum w^2 n^2."""
    rng = np.random.default_rng(0)
    batch = Batch(
        reward=np.array([1.0, 0.0, 0.0]), log_ratio=np.log([0.5, 2.0, 9.0]), scores=DenseScores(rng.normal(size=(3, 4)))
    )
    square = np.minimum([0.5, 2.0, 9.0], 8) ** 2 * (batch.scores.score**2).sum(-1)  # type: ignore[union-attr]
    found = regime_map.factorial("OPOB", "no ratio").coefficients(batch)
    assert_near(found, batch.reward - square[0] / square.sum(), scale=0)
    tis = regime_map.factorial("OPOB", "TIS")
    assert_near(tis.coefficients(batch), CATALOGUE["vcpo"].estimator.coefficients(batch), scale=0)


def test_what_is_watched_by_hand() -> None:
    """Two responses of unit scores 1 and 2: c = (1/2, -1/2), so shares 1/2 and pushes (1 - 4) / (1 + 4)."""
    scores = DenseScores(np.array([[[[1.0], [2.0]]]]))
    batch = Batch(reward=np.array([[[1.0, 0.0]]]), log_ratio=np.zeros((1, 1, 2)), scores=scores)
    watch = mechanism.Watch(CATALOGUE["dr_grpo"].estimator)
    assert_near(watch(batch), [[[0.5, -0.5]]], scale=0)
    (seen,) = watch.seen
    assert seen["negative share"][0] == near(0.5)
    assert seen["self push"][0] == near(-3 / 5)
    assert seen["baseline below mean"][0] == near(0)
    n2 = mechanism.Watch(CATALOGUE["on_policy_optimal"].estimator)
    n2(batch)
    assert n2.seen[0]["self push"][0] == near(0)
    assert n2.seen[0]["baseline below mean"][0] == near(1 / 2 - 1 / 5)


def test_scaled_negatives_leave_the_positives_alone() -> None:
    batch = Batch(reward=np.array([1.0, 0.0, 0.0]), log_ratio=np.zeros(3))
    found = mechanism.INTERVENTIONS["negatives x 0.25"].estimator.coefficients(batch)  # type: ignore[union-attr]
    assert_near(found, [2 / 3, -1 / 12, -1 / 12], scale=0)


# --- beyond VCPO ------------------------------------------------------------------------------------------------------


def halves(value: Any) -> list[dict[str, Any]]:
    """Records of one place: value(method, half, step size, seed)."""
    return [
        {"prompts": 4, "lag": 16, "half": half, "method": m, "step_size": e, "seed": s, "collapse": None, "ess": 0.5}
        | {"average": value(m, half, e, s) + 1e-3 * (s % 3)}
        for half in beyond_vcpo.HALVES
        for m in (*beyond_vcpo.RIVALS, *beyond_vcpo.CANDIDATES)
        for e in (0.01, 0.02, 0.04)
        for s in range(6)
    ]


def test_the_half_that_judges_has_no_say_in_the_choice() -> None:
    """`n2, memory` leads where one chooses and is last where one judges; at the step size of the first half."""

    def value(m: str, half: str, step: float, seed: int) -> float:
        lead = 0.3 if m == "n2, memory" else 0.0
        return 0.5 + (lead if half == "choose" else -lead) - 5 * abs(step - (0.02 if half == "choose" else 0.04))

    found = {v.key: v for v in beyond_vcpo.analyse(halves(value)).verdicts}
    assert "than n2, memory, which was chosen" in found["vcpo_not_worse"].statement
    assert found["vcpo_not_worse"].verdict == "holds"
    assert found["beats_rivals"].verdict == "fails"
    (compared,) = (c for c in found["vcpo_not_worse"].comparisons if "own best" in c["name"])
    assert compared["value"] == near(0.3)
    assert "grid's edge, so bounds from below: none" in found["matches_synchronous"].note


def test_a_best_step_at_the_edge_is_said() -> None:
    edge = beyond_vcpo.analyse(halves(lambda m, half, step, seed: 0.5 + step * (m == "n2"))).verdicts
    assert "n2 at 4 prompts, lag 16" in next(v for v in edge if v.key == "matches_synchronous").note


def test_of_tied_step_sizes_the_smallest_is_taken() -> None:
    """A ceiling reached at 0.02 and 0.04 is no reason to say that the best lies at the edge."""
    flat = halves(lambda m, half, step, seed: 0.9 if step >= 0.02 else 0.5)
    assert set(beyond_vcpo.step_sizes([r for r in flat if r["half"] == "choose"]).values()) == {0.02}


def test_choose_and_test_share_neither_tasks_nor_seeds() -> None:
    full = beyond_vcpo.settings("full")
    seen = {
        half: {(s["draw"], seed) for s in full if s["half"] == half for seed in s["seeds"]}
        for half in ("choose", "test")
    }
    draws, seeds = ({half: {x[i] for x in seen[half]} for half in seen} for i in (0, 1))
    assert not draws["choose"] & draws["test"]
    assert not seeds["choose"] & seeds["test"]
    assert {(s["prompts"], s["lag"]) for s in full} == {(p, k) for p in (1, 4, 16) for k in (16, 64)}
    assert all(len({s["step_size"] for s in full if s["prompts"] == p}) == 7 for p in (1, 4, 16))


# --- regime factors ---------------------------------------------------------------------------------------------------


def test_the_design_covers_every_level_and_lets_no_two_factors_go_together() -> None:
    """All pairs of prompts and lag; no factor's level tells another's: else their effects could not be told apart."""
    cells = [c._asdict() for c in regime_factors.DESIGN]
    levels = {f: {c[f] for c in cells} for f in regime_factors.FACTORS}
    assert levels["prompts"] == {1, 4, 16, 64}
    assert levels["length"] == {8, 32, 128, 512}
    assert levels["family"] == {"linear", "network"}
    assert levels["rewards"] == set(regime_factors.LOWEST)
    assert len({(c["prompts"], c["lag"]) for c in cells}) == 16
    for f in levels:
        for g in set(levels) - {f}:
            assert any(len({c[g] for c in cells if c[f] == x}) > 1 for x in levels[f]), (f, g)
    assert all(min(sum(c[f] == x for c in cells) for x in levels[f]) >= 2 for f in levels)


def test_the_factor_that_was_planted_is_found() -> None:
    """n^2 gains 0.3 over the mean with 16 and 64 prompts, and nothing else matters: prompts move it by 0.3."""

    def record(cell: dict[str, Any], method: str, seed: int) -> dict[str, Any]:
        gain = 0.3 if method == "n2" and cell["prompts"] >= 16 else 0.0
        return {
            **cell,
            "method": method,
            "step_size": 0.1,
            "seed": seed,
            "average": 0.5 + gain + 1e-3 * seed,
            "ess": 0.5,
        }

    records = [
        record(c._asdict(), m, s) for c in regime_factors.DESIGN for m in regime_factors.METHODS for s in range(6)
    ]
    found = regime_factors.effects(regime_factors.differences(records, *regime_factors.CONTRASTS["n^2 over the mean"]))
    assert regime_factors.moved(found["prompts"]) == near(0.3)
    assert all(regime_factors.moved(found[f]) < 0.25 for f in regime_factors.FACTORS if f != "prompts")
    caption = regime_factors.analyse(records).figures[0].caption
    assert "n^2 over the mean: prompts" in caption


# --- what stands beside verdicts --------------------------------------------------------------------------------------


def test_edges_are_those_of_each_places_own_grid() -> None:
    """The same step size is the last of one grid and within another."""
    grids = {"here": (0.01, 0.02, 0.04), "there": (0.02, 0.04, 0.08)}
    among = {p: [{"method": "n2", "step_size": e} for e in sizes] for p, sizes in grids.items()}
    best = {key: [{"method": "n2", "step_size": 0.04}] for key in grids}
    assert at_edge(best, among).endswith("bounds from below: n2 at here")
    assert at_edge({key: [] for key in grids}, among).endswith("bounds from below: none")


def test_ess_is_told_by_place_and_where_it_is_the_papers() -> None:
    best = {
        p: [{"method": "n2", "ess": x}, {"method": "n2", "ess": x + 0.1}, {"method": "mean", "ess": 0.2}]
        for p, x in {"near": 0.7, "far": 0.15, "farther": 0.0}.items()
    }
    assert ess_told(best, "n2") == (
        "ESS / n of n2: near 0.75; far 0.20; farther 0.05; within the paper's 0.1 to 0.3: far"
    )
