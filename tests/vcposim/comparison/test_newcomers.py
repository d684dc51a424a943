"""What a newcomer does: three functions of under 15 lines through every command, and their moments by brute force."""

import inspect
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.kit.statistical import assert_near
from tests.vcposim.comparison import newcomers
from vcposim.batch import Batch, DenseScores
from vcposim.catalogue.loading import estimator_named
from vcposim.commands.main import main
from vcposim.comparison.design import problem
from vcposim.comparison.measure import moments_on
from vcposim.estimators import FunctionEstimator, Resolved
from vcposim.moments import Moments
from vcposim.problems.rollouts import Problem, bandit_problem

FILE = Path(newcomers.__file__)
NAMES = ("soft", "gated", "torch_soft")
N = 3


def by_definition(place: Problem, estimator: Resolved, tokens: bool) -> tuple[np.ndarray, float]:
    """E g and E||g||^2 over all K^N batches of one prompt, each made by hand and shown alone."""
    every = place.outcomes()
    score = every.scored().combine(np.eye(place.outcome_count)[None]) if not tokens else None
    mean, square = 0.0, 0.0
    per_token = np.asarray(place.restricted(0, np.arange(place.outcome_count)).score) if tokens else None  # type: ignore[attr-defined]
    for outcome in product(range(place.outcome_count), repeat=N):
        at = list(outcome)
        mass = float(np.prod(every.measure[0, at]))
        ratio = every.given_ratio[0, at]
        if tokens:
            assert per_token is not None
            s = per_token[at]
            batch = Batch(reward=every.reward[0, at], log_ratio=ratio, scores=DenseScores(s, per_token=True),
                          token_mask=every.token_mask[0, at], length=every.token_length()[0, at])  # fmt: skip
            g = (estimator.coefficients(batch)[..., None] * s).sum(axis=(0, 1)) / N
        else:
            s = np.asarray(score).reshape(place.outcome_count, -1)[at]
            batch = Batch(reward=every.reward[0, at], log_ratio=ratio, scores=DenseScores(s), length=np.ones(N))
            g = (estimator.coefficients(batch)[:, None] * s).sum(axis=0) / N
        mean, square = mean + mass * g, square + mass * float(g @ g)
    return np.asarray(mean), square


@pytest.mark.parametrize("name", NAMES)
def test_a_newcomers_function_is_short(name: str) -> None:
    assert len(inspect.getsource(getattr(newcomers, name)).splitlines()) < 15


@pytest.mark.parametrize("name", NAMES)
def test_exact_moments_are_those_of_all_ordered_batches(name: str) -> None:
    estimator = estimator_named(f"{FILE}:{name}")
    rng = np.random.default_rng(0)
    tokens = "tokens" in estimator.needs
    places: list[Problem] = [problem("strings", lag) for lag in (0, 4, 16)]
    if not tokens:
        draws = (rng.dirichlet(np.ones(4), size=2) for _ in range(3))
        places = [bandit_problem(pi.tolist(), mu.tolist(), rng.standard_normal(4).tolist()) for pi, mu in draws]
    for place in places:
        found: Moments = moments_on(place, estimator, N)
        mean, square = by_definition(place, estimator, tokens)
        assert_near(found.mean, mean)
        assert_near(found.variance_of_mean, square - float(mean @ mean))


@pytest.mark.slow
def test_variance_check_and_replay_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bandit = {"kind": "bandit", "target": [0.7, 0.2, 0.1], "behavior": [0.2, 0.4, 0.4], "reward": [1, 0, 0]}
    (tmp_path / "p.json").write_text(json.dumps(bandit))
    own = [f"{FILE}:{name}" for name in ("soft", "torch_soft")]
    assert main(["variance", str(tmp_path / "p.json"), "--estimator", *own, "--group-size", "3", "--json"]) == 0
    assert [row["estimator"] for row in json.loads(capsys.readouterr().out)["rows"]] == own
    for name in NAMES:
        assert main(["check", f"{FILE}:{name}", "--examples", "2", "--json"]) == 0, name
        assert json.loads(capsys.readouterr().out)["passed"]
    all_three = [f"{FILE}:{name}" for name in NAMES]
    assert main(["replay", "--sample", "--no-figure", "--json", "--estimator", *all_three]) == 0
    ranked = json.loads(capsys.readouterr().out)
    assert all(name in json.dumps(ranked) for name in all_three)


@pytest.mark.slow
def test_compare_takes_them_in_quick_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [f"{FILE}:{name}" for name in NAMES]
    assert main(["compare", *own, "--out", str(tmp_path / "out"), "--workers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["estimators"]}
    assert [name for name in rows if rows[name]["named"]] == own
    assert len(rows) > 50  # the rest of the catalogue stands beside them, and was not run
    for name in own:
        assert rows[name]["words"]["laws"] == "holds"
        assert not rows[name]["not_judged"]
        assert rows[name]["words"]["own"] != "not judged"
        assert rows[name]["summary"]["own"]["best_of"] > 50
    assert (tmp_path / "out" / "comparison.html").read_text().startswith("<!doctype html>")


def test_spanning_prompts_changes_no_moment_of_a_function_that_does_not() -> None:
    """The group mean, shown batches of one prompt: the same numbers as shown the prompt alone."""
    place = problem("strings", 16)
    alone, among = (
        moments_on(place, FunctionEstimator(newcomers.soft, frozenset(needs)), N) for needs in ((), ("grouped",))
    )
    for name in ("mean", "variance_of_mean", "variance_per_sample"):
        assert_near(getattr(among, name), getattr(alone, name), name)
