"""Policies: scores are gradients, samples follow probabilities, drift hits its divergence."""

import numpy as np
import pytest

from tests.kit.statistical import SEARCHED, assert_mean_equals, assert_near
from vcposim.errors import InputError
from vcposim.problems.environments import BanditEnvironment
from vcposim.problems.policies import (
    LinearSoftmax,
    Policy,
    TabularSoftmax,
    drifted,
    drifted_to,
    log_softmax,
    moved,
    random_linear,
    random_tabular,
    sample,
)

STEP = 1e-6


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


POLICIES = [random_tabular(rng(), (2, 3)), random_linear(rng(), (2, 3), d=4)]
NAMES = ["tabular", "linear"]


def finite_difference(policy: Policy, weight: np.ndarray) -> np.ndarray:
    """d/dtheta of sum weight * log pi by central differences."""

    def total(parameter: np.ndarray) -> float:
        return float(np.sum(weight * policy.with_parameter(parameter).log_prob))

    theta = policy.parameter
    return np.array([(total(theta + STEP * e) - total(theta - STEP * e)) / (2 * STEP) for e in np.eye(theta.size)])


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_combine_is_the_gradient_of_weighted_log_probabilities(policy: Policy) -> None:
    weight = rng().normal(size=policy.log_prob.shape)
    assert_near(policy.combine(weight), finite_difference(policy, weight), allow=SEARCHED)


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_scores_and_their_norms(policy: TabularSoftmax | LinearSoftmax) -> None:
    norms = policy.score_sq_norm()
    for g in range(2):
        for k in range(3):
            weight = np.zeros((2, 3))
            weight[g, k] = 1
            score = policy.score((g,), k)
            assert_near(score, finite_difference(policy, weight), allow=SEARCHED)
            assert_near(norms[g, k], score @ score, scale=0)
    mean = sum(np.exp(policy.log_prob[0, k]) * policy.score((0,), k) for k in range(3))
    assert_near(mean, 0)


def test_log_softmax_of_extreme_and_forbidden_logits() -> None:
    found = log_softmax(np.array([[1e4, 1e4 - 1.0], [-np.inf, 3.0]]))
    assert_near(found[0], [-np.log1p(np.exp(-1)), -1 - np.log1p(np.exp(-1))], scale=0)
    np.testing.assert_array_equal(found[1], [-np.inf, 0])


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_samples_follow_the_policy(policy: Policy) -> None:
    row = np.repeat([0, 1], 100_000)
    drawn = sample(policy, rng(), (row,))
    for g in (0, 1):
        assert_mean_equals(np.eye(3)[drawn[row == g]], np.exp(policy.log_prob[g]), detect=0.017, support=(0, 1))


def test_a_choice_of_probability_zero_is_never_sampled() -> None:
    policy = TabularSoftmax(np.array([[-np.inf, 0.0, -np.inf]]))
    assert set(sample(policy, rng(), (np.zeros(1000, dtype=int),)).tolist()) == {1}


@pytest.mark.parametrize(("kind", "value"), [("chi2", 1e-6), ("chi2", 0.5), ("chi2", 1e6), ("kl", 1e-6), ("kl", 0.5)])
def test_drift_reaches_the_divergence_asked_for(kind: str, value: float) -> None:
    policy, environment = POLICIES[0], BanditEnvironment(np.zeros((2, 3)), np.array([0.3, 0.7]))
    direction = np.random.default_rng(8).normal(size=6)
    behavior = drifted_to(policy, direction, lambda mu: environment.divergence(policy, mu, kind), value)
    pi, mu = np.exp(policy.log_prob), np.exp(behavior.log_prob)
    each = np.sum(pi**2 / mu, axis=1) - 1 if kind == "chi2" else np.sum(mu * np.log(mu / pi), axis=1)
    assert_near([0.3, 0.7] @ each, value, allow=SEARCHED, scale=0)
    offset = behavior.parameter - policy.parameter
    assert_near(offset / offset[0], direction / direction[0], scale=0)
    assert offset[0] * direction[0] > 0


def test_drift_has_the_stated_scale() -> None:
    policy = random_tabular(rng(), (100, 50))
    offset = drifted(policy, rng(), 0.3).parameter - policy.parameter
    assert_mean_equals(offset**2 / 0.09, 1.0, detect=0.2)
    np.testing.assert_array_equal(moved(policy, np.ones(5000), 2.0).parameter, policy.parameter + 2)


def test_refusals() -> None:
    with pytest.raises(InputError, match="logit: holds NaN"):
        TabularSoftmax(np.array([0.0, np.nan]))
    with pytest.raises(InputError, match="a row is -inf everywhere"):
        TabularSoftmax(np.array([[0.0, 1.0], [-np.inf, -np.inf]]))
    with pytest.raises(InputError, match=r"logit: shape \(2, 0\) holds no choice"):
        TabularSoftmax(np.zeros((2, 0)))
    with pytest.raises(InputError, match=r"theta: shape \(3,\) does not match"):
        LinearSoftmax(np.zeros((2, 3, 4)), np.zeros(3))
    with pytest.raises(InputError, match="divergence: 0 is not a positive"):
        drifted_to(POLICIES[0], np.ones(6), lambda mu: 1.0, 0)
    environment = BanditEnvironment(np.zeros((2, 3)), np.array([0.3, 0.7]))
    with pytest.raises(InputError, match="is not reached along this direction"):
        # the same number on every logit moves no probability
        drifted_to(POLICIES[0], np.ones(6), lambda mu: environment.divergence(POLICIES[0], mu), 0.5)
