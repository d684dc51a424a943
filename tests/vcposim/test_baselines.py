"""Baselines: what is subtracted, and what that does and does not change."""

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given

from tests.kit.backends import NUMPY
from tests.kit.properties import Law, laws_of, mean_over_all_batches, small_bandits
from tests.kit.rivals import GROUP, PROMPTS, TIME, draw
from tests.kit.statistical import assert_rounding_only, near
from tests.kit.strategies import Arms, as_float, bandits, exact
from vcposim.baselines import (
    BASELINES,
    Evidence,
    Monomial,
    baseline,
    leverage,
    weighted_mean,
    weighted_mean_of_others,
)
from vcposim.batch import Batch, DenseScores, ScoreNorms
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.moments import batch_sums, moments
from vcposim.weights import Weighting

ORDINARY = {name for name, b in BASELINES.items() if b.ordinary}
INDEPENDENT = {name for name in ORDINARY if BASELINES[name].independent}


@pytest.mark.parametrize("law", laws_of("baselines"), ids=lambda x: x.name)
def test_law(law: Law):
    law.run()


def test_worked_example():
    """Three samples with weights 1, 2, 4, unit scores, rewards 0, 1, 3, lengths 1, 1, 2; each number by hand."""
    batch = Batch(
        reward=exact([0, 1, 3]),
        ratio=exact([1, 2, 4]),
        scores=DenseScores(exact([[1], [-1], [1]])),
        length=exact([1, 1, 2]),
        population_baseline=exact([Fraction(7, 2)]),
    )
    want = {
        "zero": [0, 0, 0],
        "group_mean": [Fraction(4, 3)],
        "leave_one_out": [2, Fraction(3, 2), Fraction(1, 2)],
        "length_weighted": [Fraction(7, 4)],
        "on_policy_optimal": [Fraction(4, 3)],
        "half_optimal": [Fraction(4, 3)],  # halfway from the mean to it, which are equal here
        "opob": [Fraction(4 + 48, 21)],
        "opob_leave_one_out": [Fraction(52, 20), Fraction(48, 17), Fraction(4, 5)],
        "opob_released": [Fraction(16 + 768, 273)],
        "leverage_damped_mean": [
            0 - Fraction(20, 21) * (0 - Fraction(4, 3)),
            1 - Fraction(17, 21) * (1 - Fraction(4, 3)),
            3 - Fraction(5, 21) * (3 - Fraction(4, 3)),
        ],
        "population": [Fraction(7, 2)],
    }
    for name, value in want.items():
        assert list(Estimator(baseline=name).baseline_value(batch)) == value, name
    # ws = (1, -2, 4): E ws = 1, E (ws)^2 = 7; E (ws)^2 R = 52/3, <E wsR, E ws> = 10/3
    assert list(Estimator(baseline="opob_truncated").baseline_value(batch)) == [Fraction(42, 3) / 6]
    assert want.keys() | {"opob_truncated"} == ORDINARY


@given(small_bandits)
def test_independent_baselines_are_exactly_unbiased(case: tuple[Arms, int]):
    bandit, n = case
    for name in INDEPENDENT - {"population"}:
        assert mean_over_all_batches(Estimator(baseline=name).coefficients, bandit, n) == list(bandit.gradient), name


def test_the_other_baselines_are_biased_in_batch():
    """C7: for each in-batch baseline there is a bandit whose gradient it misses. So INDEPENDENT is not too small."""
    bandit = Arms(exact(["1/2", "1/3", "1/6"]), exact(["1/6", "1/3", "1/2"]), exact([1, 0, 2]))
    for name in ORDINARY - INDEPENDENT:
        batch, probability = bandit.all_batches(2)
        batch = Batch(**{**vars(batch), "length": batch.reward + 1})
        sums = batch_sums(batch, Estimator(baseline=name).coefficients(batch), probability)
        assert list(sums.estimate) != list(bandit.gradient), name


@given(bandits())
def test_a_population_has_nobody_to_leave_out(bandit: Arms):
    """With unit 0, leave-one-out baselines are their population values and nobody has leverage."""
    outcome = bandit.population()
    for plain, others in (("group_mean", "leave_one_out"), ("opob", "opob_leave_one_out")):
        b = Estimator(baseline=plain).baseline_value(outcome)
        assert set(Estimator(baseline=others).baseline_value(outcome)) == set(b)
    assert set(Estimator().leverage(outcome)) == {0}
    damped, mean = (Estimator(baseline=name).coefficients(outcome) for name in ("leverage_damped_mean", "group_mean"))
    assert list(damped) == list(mean)


@given(bandits())
def test_full_weights_need_no_truncation_aware_baseline(bandit: Arms):
    """Where E[w s] = 0 the truncation-aware optimum is the OPOB (claim C6)."""
    outcome = bandit.population()
    assert list(Estimator(baseline="opob_truncated").baseline_value(outcome)) == list(
        Estimator(baseline="opob").baseline_value(outcome)
    )


@given(bandits())
def test_excess_variance_of_a_baseline(bandit: Arms):
    """variance_per_sample(b) - minimum = (b - b*)^2 E[w^2 ||s||^2], exactly (claim C6)."""
    outcome = bandit.population()
    second = sum(bandit.behavior * bandit.ratio**2 * (bandit.score**2).sum(axis=-1))

    def of(b: str | Fraction) -> tuple[Fraction, Fraction]:
        estimator = Estimator(baseline=b)  # type: ignore[arg-type]
        m = moments(batch_sums(outcome, estimator.coefficients(outcome)), bandit.gradient, drawn=False)
        return m.variance_per_sample, estimator.baseline_value(outcome)[0]

    least, best = of("opob")
    for b in (Fraction(0), Fraction(-3, 2), "group_mean", "on_policy_optimal", "opob_released"):
        variance, value = of(b)
        assert variance - least == (value - best) ** 2 * second


@given(bandits())
def test_damping_turns_the_leave_one_out_baseline_into_the_in_batch_one(bandit: Arms):
    """In-batch OPOB = leave-one-out OPOB times the soft mask 1 - h (claim C8), on every batch of three."""
    batch, _ = bandit.all_batches(3) if len(bandit.target) < 4 else bandit.all_batches(2)
    h = Estimator().leverage(batch)
    opob, others = (Estimator(baseline=name).coefficients(batch) for name in ("opob", "opob_leave_one_out"))
    # where the others have no score, both sides vanish: h = 1, and R_i is the in-batch baseline
    assert np.all(opob == (1 - h) * others)


@pytest.mark.parametrize("n", range(1, 10))
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 0.0])
@pytest.mark.parametrize("name", sorted(ORDINARY - {"zero", "population"}))
def test_draws_of_one_arm_carry_no_signal(name: str, reward: float, n: int):
    """All draws alike: the baseline is the reward, up to rounding, never a 0/0 that rounding decides."""
    batch = Batch(
        reward=np.full(n, reward),
        log_ratio=np.full(n, 0.3),
        scores=DenseScores(np.tile([0.9, -0.3, -0.6], (n, 1))),
        length=np.full(n, 7.0),
    )
    b = Estimator(baseline=name).baseline_value(batch)
    assert_rounding_only(b, np.full(b.shape, reward), ulp=8)


def test_a_dominating_sample_costs_the_others_no_digit():
    """Weights e^40 apart: the leave-one-out baseline of the dominating sample is the weighted mean of the others."""
    rng = np.random.default_rng(5)
    reward, weight = rng.normal(size=6), rng.uniform(1, 2, size=6)
    weight[2] = 1e30
    keep = [0, 1, 3, 4, 5]
    got = weighted_mean_of_others(reward, weight, np.full(6, 1 / 6), 1 / 6)[2]
    assert_rounding_only(got, np.average(reward[keep], weights=weight[keep]), ulp=32, scale=1.0)


def test_fallbacks():
    """No weight: the plain mean. Others without weight: their plain mean. No others: R itself, so no step."""
    r, zero, third = exact([1, 2, 6]), exact([0, 0, 0]), exact([Fraction(1, 3)] * 3)
    assert list(weighted_mean(r, zero, third)) == [3]
    assert list(weighted_mean_of_others(r, zero, third, Fraction(1, 3))) == [4, Fraction(7, 2), Fraction(3, 2)]
    assert list(leverage(zero, third, Fraction(1, 3))) == [Fraction(1, 3)] * 3
    one = exact([1])
    assert list(weighted_mean_of_others(exact([5]), one, one, 1)) == [5]
    empty = exact([0, 0, 0])  # a group of padding only
    assert list(weighted_mean(r, exact([1, 1, 1]), empty)) == [0]


def test_no_weight_at_all_gives_coefficients_of_zero():
    batch = Batch(
        reward=np.array([1.0, 2.0]), log_ratio=np.array([-np.inf, -np.inf]), scores=DenseScores(np.ones((2, 2)))
    )
    for name in ORDINARY - {"population", "length_weighted"}:
        assert Estimator(baseline=name).coefficients(batch).tolist() == [0, 0], name


def test_released_weight_uses_the_untruncated_ratio():
    """wbar^2 w^2 ||s||^2: under truncation the released weight still sees the full ratio (claim C9)."""
    batch = Batch(reward=exact([0, 1]), ratio=exact([1, 10]), scores=DenseScores(exact([[1], [1]])))
    truncated = Estimator(Weighting("truncate", cap=2), "opob_released")
    assert list(truncated.baseline_value(batch)) == [Fraction(4 * 100, 4 * 100 + 1)]


def test_population_baseline_is_an_oracle():
    batch = Batch(reward=np.ones(2), log_ratio=np.zeros(2))
    with pytest.raises(InputError, match="baseline: 'population' is an oracle; it needs a problem with exact moments"):
        Estimator(baseline="population").coefficients(batch)


def test_unknown_baseline_suggests_the_nearest():
    with pytest.raises(InputError, match="baseline: unknown name 'opobb'; did you mean 'opob'"):
        baseline("opobb")


def test_what_the_table_says_of_a_baseline_is_what_it_does():
    """Shape, independence of the own reward, equivariance, and the twin without sample i, for every entry."""
    batch = draw(0).batch(population_baseline=np.full((PROMPTS, 1), 0.3))
    estimators = {name: Estimator(Weighting("none"), name) for name in BASELINES}
    shapes = {"group": (PROMPTS, 1), "sample": (PROMPTS, GROUP), "token": (PROMPTS, 1, TIME)}
    for name, entry in BASELINES.items():
        b = estimators[name].baseline_value(batch)
        if name == "batch_mean":
            assert b.shape == (1, 1)
        elif name != "zero":
            assert b.shape == shapes[entry.per], name
        moved = estimators[name].baseline_value(replace(batch, reward=batch.reward + 2.5))
        follows = near(b + 2.5) == moved
        assert follows == entry.equivariant, name
        if entry.per == "token":
            continue
        moves = 0.0
        for i, change in product(range(GROUP), (-4.0, 4.0)):
            reward = batch.reward.copy()
            reward[0, i] += change
            other = np.broadcast_to(estimators[name].baseline_value(replace(batch, reward=reward)), reward.shape)
            moves = max(moves, abs(other[0, i] - np.broadcast_to(b, reward.shape)[0, i]))
        assert moves == near(0) if entry.independent else moves > 1e-3, name
        weight = Weighting("none")(batch)
        if not entry.has_held_out:
            with pytest.raises(InputError, match="no weighted mean"):
                entry.held_out(Evidence(batch, weight))
            continue
        held = np.broadcast_to(entry.held_out(Evidence(batch, weight)), reward.shape)
        after = np.broadcast_to(entry.held_out(Evidence(replace(batch, reward=reward), weight)), reward.shape)
        assert held[0, -1] == after[0, -1]
        if entry.independent:
            np.testing.assert_array_equal(held, np.broadcast_to(b, held.shape))


def test_which_baselines_the_norms_alone_make_known():
    assert {name for name, b in BASELINES.items() if b.one_unknown} == {
        *(
            "on_policy_optimal",
            "half_optimal",
            "opob",
            "opob_released",
            "opob_released_median",
            "opob_released_winsorized",
        )
    }
    assert {name for name, b in BASELINES.items() if b.needs_two} == {
        "leave_one_out",
        "opob_leave_one_out",
        "shrinkage",
    }
    assert {name for name, b in BASELINES.items() if b.constant} == {"zero", "population"}


@pytest.mark.parametrize("weight", [b.weight for b in BASELINES.values() if b.weight is not None], ids=str)
def test_the_logarithm_of_a_weight_is_that_of_the_weight(weight: Monomial):
    rng = np.random.default_rng(4)
    norm, length, log_ratio = (
        rng.uniform(0.5, 2, (3, 6)),
        rng.integers(1, 9, (3, 6)).astype(float),
        rng.normal(size=(3, 6)),
    )
    flat = Batch(reward=log_ratio * 0, log_ratio=log_ratio, scores=ScoreNorms(norm**2), length=length)
    log_w = np.minimum(log_ratio, 0.2)
    e = Evidence(flat, Weighting("truncate", cap=float(np.exp(0.2)))(flat))
    want = weight.log(log_w, np.log(norm), log_ratio, np.log(length)) + np.zeros(log_w.shape)
    found = np.log(weight.of(e))
    # both up to one factor a group
    assert_rounding_only(found - found[:, :1], want - want[:, :1], ulp=2**8, scale=10.0)


def test_other_exponents_are_refused():
    for wrong in ({"weight": 2}, {"score": 1}, {"ratio": 4, "score": 2}, {"length": 2}):
        with pytest.raises(InputError, match="exponents: Monomial"):
            Monomial(**wrong)


@given(bandits())
def test_float_baselines_follow_their_exact_values(bandit: Arms):
    """On the population, floats through log-ratios give the exact OPOB up to rounding, even at ratios of 2^60."""
    got = Estimator(baseline="opob").baseline_value(bandit.population(NUMPY))
    want = as_float(Estimator(baseline="opob").baseline_value(bandit.population()))
    assert_rounding_only(got, want, ulp=2**12, scale=float(max(abs(bandit.reward))) or 1.0)
