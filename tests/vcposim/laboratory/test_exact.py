"""Exact moments against all K^N batches written out, on random rational bandits."""

from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest

from tests.kit import slow_exact
from tests.kit.statistical import assert_near, near
from vcposim.baselines import BASELINES
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.laboratory import exact
from vcposim.problems.bandits import BanditProblem
from vcposim.problems.environments import BanditEnvironment
from vcposim.problems.policies import drifted, random_linear, random_tabular
from vcposim.problems.rollouts import bandit_problem, bandit_problem_of, contextual_bandit_problem
from vcposim.weights import TREATMENTS, Weighting

SAMPLE_BASELINES = [
    "zero",
    "group_mean",
    "leave_one_out",
    "length_weighted",
    "on_policy_optimal",
    "opob",
    "opob_leave_one_out",
    "opob_truncated",
    "opob_released",
    "leverage_damped_mean",
    "population",
]
TREATMENT_NAMES = ["none", "importance", "truncate", "clip", "mask", "self_normalize"]


def rational_probability(rng: np.random.Generator, k: int) -> list[Fraction]:
    mass = [Fraction(int(x)) for x in rng.integers(1, 12, k)]
    return [m / sum(mass) for m in mass]


def rational_bandit(seed: int, k: int) -> tuple[BanditProblem, list[slow_exact.Outcome]]:
    """A random bandit with rational numbers, as a problem and as a list of outcomes."""
    rng = np.random.default_rng(seed)
    target, behavior = rational_probability(rng, k), rational_probability(rng, k)
    reward = [Fraction(int(x), 4) for x in rng.integers(-8, 9, k)]
    length = [Fraction(int(x)) for x in rng.integers(1, 6, k)]
    outcomes = [
        {
            "prob": behavior[a],
            "w": target[a] / behavior[a],
            "reward": reward[a],
            "length": length[a],
            "score": [Fraction(int(a == j)) - target[j] for j in range(k)],
        }
        for a in range(k)
    ]
    floats = [[float(x) for x in values] for values in (target, behavior, reward, length)]
    return bandit_problem(*floats), outcomes


def weighting(name: str) -> tuple[Weighting, dict[str, Any]]:
    limits = {"truncate": {"cap": 1.25}, "clip": {"cap": 1.25, "floor": 0.75}, "mask": {"cap": 1.25}}.get(name, {})
    return Weighting(name, **limits), {key: Fraction(value) for key, value in limits.items()}


def assert_same(found: Any, expected: tuple[Any, Any, Any]) -> None:
    mean, per_sample, of_mean = expected
    assert_near(found.mean, np.array(mean, dtype=float))
    assert_near(float(found.variance_per_sample), float(per_sample))
    assert_near(float(found.variance_of_mean), float(of_mean))


def test_the_lists_below_hold_every_baseline_and_treatment_of_a_bandit() -> None:
    assert set(TREATMENT_NAMES) == set(TREATMENTS)
    assert set(SAMPLE_BASELINES) <= set(BASELINES)


@pytest.mark.parametrize(
    ("baseline", "k", "size"),
    [
        (baseline, k, size)
        for baseline in SAMPLE_BASELINES
        for k, size in [(2, 1), (2, 4), (3, 2), (3, 3), (4, 3)]
        if size > 1 or not BASELINES[baseline].needs_two
    ],
)
@pytest.mark.parametrize("treatment", TREATMENT_NAMES)
def test_bandit_moments_equal_all_ordered_batches(baseline: str, treatment: str, k: int, size: int) -> None:
    problem, outcomes = rational_bandit(1000 * k + size, k)
    rule, limits = weighting(treatment)
    expected = slow_exact.moments(outcomes, size, treatment, baseline, **limits)
    assert_same(exact.moments(problem, Estimator(rule, baseline), size), expected)


@pytest.mark.parametrize("normalizer", ["length", "group_std"])
@pytest.mark.parametrize("baseline", ["zero", "group_mean", "opob"])
def test_normalizers_equal_all_ordered_batches(baseline: str, normalizer: str) -> None:
    problem, outcomes = rational_bandit(7, 3)
    expected = slow_exact.moments(outcomes, 3, "importance", baseline, normalizer=normalizer)
    assert_same(exact.moments(problem, Estimator(baseline=baseline, normalizer=normalizer), 3), expected)


@pytest.mark.parametrize("baseline", ["zero", 0.7, "population"])
@pytest.mark.parametrize("treatment", ["none", "importance", "truncate", "clip", "mask"])
def test_one_sample_at_a_time_equals_count_vectors(baseline: str | float, treatment: str) -> None:
    target, behavior = (
        random_tabular(np.random.default_rng(0), (3, 4)),
        random_tabular(np.random.default_rng(1), (3, 4)),
    )
    problem = contextual_bandit_problem(
        np.exp(target.log_prob),
        np.exp(behavior.log_prob),
        np.random.default_rng(2).normal(size=(3, 4)),
        [0.2, 0.5, 0.3],
    )
    estimator = Estimator(weighting(treatment)[0], baseline)
    one = exact.single_sample_sums(problem, estimator, 3)
    counted = exact.enumerated_sums(problem, estimator, 3)
    for a, b in zip(one, counted, strict=True):
        assert_near(a, b)


def test_importance_weights_are_unbiased_and_the_rest_of_the_table_is_known_to_differ() -> None:
    problem, _ = rational_bandit(3, 4)
    assert_near(exact.moments(problem, Estimator(), 5).bias, 0)
    loo = exact.moments(problem, Estimator(baseline="opob_leave_one_out"), 4)
    assert_near(loo.bias, 0)
    assert float(exact.moments(problem, Estimator(baseline="opob"), 4).relative_bias) > 1e-2
    assert float(exact.moments(problem, Estimator(Weighting("none")), 4).relative_bias) > 1e-2


def test_contextual_variance_includes_the_draw_of_the_context() -> None:
    # one arm matters in each context and samples are noiseless: all variance is that of the context
    problem = contextual_bandit_problem(
        [[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]], [[1, -1], [0, 0]], [0.25, 0.75]
    )
    # contribution in context 0: (+-1)(+-0.5)(1, -1) = (0.5, -0.5) always; in context 1: zero
    found = exact.moments(problem, Estimator(Weighting("none")), 2)
    assert_near(found.mean, [0.125, -0.125, 0, 0])
    assert_near(found.variance_of_mean, 0.25 * 0.5 - 2 * 0.125**2)
    assert_near(found.variance_per_sample, found.variance_of_mean)


def test_versions_mix_and_linear_scores_agree_with_all_ordered_batches() -> None:
    rng = np.random.default_rng(5)
    policy = random_linear(rng, (1, 3), d=2)
    behaviors = [drifted(policy, rng, 0.5) for _ in range(2)]
    environment = BanditEnvironment(rng.normal(size=(1, 3)), np.ones(1))
    problem = bandit_problem_of(environment, policy, behaviors, [0.3, 0.7])
    outcomes = [
        {
            "prob": float(q * np.exp(mu.log_prob[0, a])),
            "w": float(np.exp(policy.log_prob[0, a] - mu.log_prob[0, a])),
            "reward": float(environment.reward[0, a]),
            "length": 1.0,
            "score": [float(x) for x in policy.score((0,), a)],
        }
        for q, mu in zip([0.3, 0.7], behaviors, strict=True)
        for a in range(3)
    ]
    for baseline in ("zero", "opob", "opob_truncated", "leave_one_out"):
        expected = slow_exact.moments(outcomes, 3, "importance", baseline)
        assert_same(exact.moments(problem, Estimator(baseline=baseline), 3), expected)


def test_recorded_behavior_changes_ratios_but_not_what_is_sampled() -> None:
    environment = BanditEnvironment(np.array([[1.0, 0.0]]), np.ones(1))
    rng = np.random.default_rng(0)
    target, sampler, believed = (random_tabular(rng, (1, 2)) for _ in range(3))
    problem = bandit_problem_of(environment, target, [sampler], recorded=[believed])
    mean_weight = np.exp(sampler.log_prob) @ np.exp(target.log_prob - believed.log_prob).T
    batch = problem.outcomes()
    assert_near(np.sum(batch.measure * np.exp(batch.log_ratio)), mean_weight.item(), scale=0)
    assert abs(mean_weight.item() - 1) > 0.01


@pytest.mark.parametrize(("total", "parts"), [(1, 1), (3, 1), (1, 4), (4, 3), (6, 5)])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_count_vectors_are_all_compositions_once(total: int, parts: int, chunk: int) -> None:
    counts = np.concatenate(list(exact.count_vectors(total, parts, chunk)))
    assert len(counts) == comb(total + parts - 1, parts - 1) == len(np.unique(counts, axis=0))
    assert counts.min() >= 0
    assert np.all(counts.sum(axis=1) == total)
    prob = np.random.default_rng(0).dirichlet(np.ones(parts))
    assert_near(exact.multinomial(counts, prob).sum(), 1, scale=0)


def test_an_arm_nobody_plays_is_dropped() -> None:
    with_arm = bandit_problem([0.25, 0.75, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 9.0])
    without = bandit_problem([0.25, 0.75], [0.5, 0.5], [1.0, 0.0])
    for baseline in SAMPLE_BASELINES:
        a, b = (exact.moments(p, Estimator(baseline=baseline), 3) for p in (with_arm, without))
        assert_near(a.mean, [*b.mean, 0])
        assert_near(a.variance_of_mean, b.variance_of_mean)
    assert exact.diagnostics(with_arm) == near(exact.diagnostics(without))


def test_diagnostics_of_a_bandit_by_hand() -> None:
    found = exact.diagnostics(bandit_problem([0.25, 0.75], [0.5, 0.5], [1.0, 0.0]))
    assert found["chi2"] == near(0.25)  # 1/2 (1/2 - 1)^2 + 1/2 (3/2 - 1)^2
    assert found["ess_fraction"] == near(0.8)
    assert found["kl"] == near(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_refusals_say_what_to_do() -> None:
    prob = [1 / 64] * 64
    problem = bandit_problem(prob, prob, prob)
    with pytest.raises(
        InputError, match=r"count vectors over 64 outcomes.*--method monte-carlo --samples .*group_size=8"
    ):
        exact.moments(problem, Estimator(baseline="opob"), 8)
    with pytest.raises(InputError, match="group_size: 1 leaves nobody"):
        exact.moments(problem, Estimator(baseline="leave_one_out"), 1)
    with pytest.raises(InputError, match=r"smoothed weight has no exact moments.*monte-carlo"):
        exact.moments(problem, Estimator(Weighting("pareto", smooth=lambda x, m: x)), 8)


def test_counts_of_any_size_are_readable() -> None:
    assert [exact.rounded(n) for n in (54, 32**16, comb(10**24, 200))] == ["54", "1.21e+24", "10^4425"]
