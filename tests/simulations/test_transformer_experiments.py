"""What the transformer experiments conclude from records made by hand: the true verdict, whatever it is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from simulations.drawing import draw
from simulations.methods import chosen
from simulations.questions import acceptance, proxy_quality, transformer_collapse
from simulations.questions.proxy_quality import EXACT, PROXIES, WAYS, loss_of, moments, pareto
from simulations.questions.transformer_collapse import RIVALS, outcome, settings
from tests.kit.statistical import near
from vcposim.errors import InputError


def world(of: Any) -> list[dict[str, Any]]:
    gauges = {"ess_fraction": 0.5, "mean_weight": 1.0, "step_scale": 0.7}
    return [
        {**s, "task": transformer_collapse.TASKS[s["kind"]][0], **outcome(of(s), s["every"]), **gauges}
        for s in settings("full")
    ]


def rises(start: float, end: float, seed: int) -> list[float]:
    return list(np.linspace(start, end, 9) + 0.01 * np.sin(np.arange(9) + seed))


def as_in_the_paper(s: dict[str, Any]) -> list[float]:
    if s["method"] == "VCPO" or s["method"].startswith("synchronous"):
        return rises(0.3, 0.95, s["seed"])
    return rises(0.3, 0.05 if s["method"] in RIVALS else 0.6, s["seed"])


def test_a_run_that_never_arrives_gives_no_speed() -> None:
    found = {v.key: v for v in transformer_collapse.analyse(world(lambda s: rises(0.3, 0.35, s["seed"]))).verdicts}
    assert found["as_few_updates"].verdict == "not judged"
    assert found["as_few_updates"].note == "0 of 9 pairs of runs reach the target"


def test_controls_take_the_multipliers_of_a_run_of_vcpo(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def learned(setting: dict[str, Any], name: str, **step: Any) -> Any:
        runs.append((name, setting["seed"], step))
        return [0.3] * 4, [dict.fromkeys(transformer_collapse.GAUGES, 1.0) | {"step_scale": s} for s in (1, 0.5)]

    monkeypatch.setattr(transformer_collapse, "learned", learned)
    constant, replay = (
        next(s for s in settings("full") if s["method"] == name and s["seed"] == 2)
        for name in transformer_collapse.CONTROLS
    )
    transformer_collapse.run(constant)
    transformer_collapse.run(replay)
    assert runs == [
        ("VCPO", 2, {}),
        ("VCPO", 2, {"step_rule": "constant", "step_value": 0.75}),
        ("VCPO", 3, {}),
        ("VCPO", 2, {"step_rule": "replay", "step_schedule": (1, 0.5)}),
    ]


def test_an_outcome_in_updates() -> None:
    assert outcome([0.2, 0.6, 0.7, 0.1, 0.1, 0.1], 10)["collapse"] == 30
    assert outcome([0.2, 0.6, 0.7, 0.1, 0.1, 0.7], 10)["collapse"] is None
    assert outcome([0.2, 0.25, 0.3, 0.7], 10)["hit"] == 20
    assert outcome([0.2, 0.25, 0.25, 0.25], 10)["hit"] is None


def test_figures_are_drawn_from_both_sizes_of_records() -> None:
    records = world(as_in_the_paper)
    for some in (records, chosen(records, kind="math", seed=0, step_size=transformer_collapse.COMMON)):
        assert draw(transformer_collapse.curve_figure(some)).axes
        assert draw(transformer_collapse.rank_figure(some)).axes


# --- stand-ins for the norm -------------------------------------------------------------------------------------------


def groups(stand_in: Any, count: int = 12, n: int = 16) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        exact = np.exp(rng.normal(size=n))
        reward = (rng.random(n) < 0.4).astype(float)
        group = {"model": "toy", "seed": number, "reward": reward, "log_ratio": 0.3 * rng.normal(size=n), EXACT: exact}
        cost = {name: 1.0 + 0.1 * k for k, name in enumerate((EXACT, *PROXIES))}
        found.append(group | {name: stand_in(exact, rng) for name in PROXIES} | {"cost": cost})
    return found


def test_a_stand_in_that_is_a_multiple_of_the_norm_loses_nothing() -> None:
    records = groups(lambda exact, rng: 3 * exact)
    for name in PROXIES:
        for way in WAYS:
            estimate = loss_of(records, name, way)
            assert estimate is not None
            assert estimate.value == near(1)
    assert {v.verdict for v in proxy_quality.analyse(records).verdicts} == {"holds"}


def test_a_stand_in_without_information_is_no_better_than_that_and_the_exact_norm_cannot_lose_in_sample() -> None:
    records = groups(lambda exact, rng: np.exp(2 * rng.normal(size=exact.size)))
    for name in (*PROXIES, "mean"):
        estimate = loss_of(records, name, "in sample")
        assert estimate is not None
        assert estimate.value > 1


def test_what_nothing_beats_in_cost_and_loss() -> None:
    """A dear stand-in with the cheap one's loss is beaten, and so is one that loses more and costs more."""
    records = groups(lambda exact, rng: exact * np.exp(rng.normal(size=exact.size)))
    for r in records:
        r["length"] = r[EXACT]  # as good as the exact norm
        r["cost"] = dict.fromkeys(r["cost"], 1.5) | {EXACT: 1.1, "length": 1.05}
    found = pareto(records, "in sample")
    assert list(found) == ["mean", "length"]
    assert found["mean"][0] == 1.0
    assert found["length"] == near((1.05, 1.0))
    assert draw(proxy_quality.cost_figure(records)).axes


def test_second_moments_by_hand() -> None:
    """Two responses, weights 1, norms 1 and 3, rewards 1 and 0: b = 1/4 from the norms, 1/2 from a flat stand-in."""
    group = {"reward": [1.0, 0.0], "log_ratio": [0.0, 0.0], EXACT: [1.0, 3.0], "length": [5, 5]}
    assert moments(group, EXACT).tolist() == near([0.75**2 + 3 * 0.25**2, 1 + 3])
    assert moments(group, "length").tolist() == near([0.25 + 3 * 0.25, 1 + 3])
    assert moments(group, "mean").tolist() == near([0.25 + 3 * 0.25, 1 + 3])


# --- acceptance -------------------------------------------------------------------------------------------------------


def test_the_set_holds_what_the_start_solves_sometimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Success rates planted by problem: never, always and in between; what is trained on are the last, in order."""

    class Start:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def success(self, index: Sequence[int], responses: int) -> np.ndarray:
            assert responses == acceptance.TRIED
            return np.array([[(0.0, 0.2, 0.5, 0.81, 1.0)[i % 5] for i in index]])

    monkeypatch.setattr("llm_bridge.training.lockstep.LockStep", Start)
    monkeypatch.setattr(acceptance, "policy", lambda: None)
    acceptance.problems.cache_clear()
    found = acceptance.problems(30)
    acceptance.problems.cache_clear()
    assert found.chosen == tuple(i for i in range(1024) if i % 5 in (1, 2))[:30]
    assert found.problem(31).prompt == found.inner.problem(found.chosen[1]).prompt  # they take turns
    with pytest.raises(InputError, match="problems: 410 of 2000 are solved 20% to 80% of the time"):
        acceptance.problems(2000)
