"""Lag laws against simulated queues, paths against their definition, number formats against their tables."""

from itertools import pairwise

import numpy as np
import pytest

from tests.kit.statistical import assert_mean_equals, assert_near, near
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.laboratory import exact
from vcposim.problems.environments import BanditEnvironment
from vcposim.problems.policies import TabularSoftmax, random_tabular
from vcposim.problems.runs import policies_of_a_run, problem_of, stale_problem
from vcposim.problems.staleness import (
    LagLaw,
    PolicyHistory,
    fixed_lag,
    in_flight,
    mixed_queue,
    noisy,
    round_to_bfloat16,
    round_to_float8,
    rounded,
    tempered,
    uniform_lag,
    whole_trajectory,
)
from vcposim.problems.token_chains import modular_sum
from vcposim.weights import Weighting


def simulated_queue(rng: np.random.Generator, updates: int, max_lag: int, turnover: float, admission: str) -> list[int]:
    """Lags of consumed batches: one batch enters per update, each waiting one is taken with probability turnover."""
    waiting: list[int] = []
    lags = []
    for now in range(updates):
        waiting.append(now)
        kept = []
        for born in waiting:
            age = now - born
            if rng.random() < turnover or (age == max_lag and admission == "wait"):
                lags.append(age)
            elif age < max_lag:
                kept.append(born)
        waiting = kept
    return lags


@pytest.mark.parametrize("admission", ["wait", "drop"])
@pytest.mark.parametrize("turnover", [0.3, 0.8])
def test_the_mixed_queue_has_the_lags_of_a_queue(turnover: float, admission: str) -> None:
    lags = np.array(simulated_queue(np.random.default_rng(0), 40_000, 3, turnover, admission))
    law = mixed_queue(3, turnover, admission)
    assert_mean_equals(np.eye(4)[lags], law.probability, detect=0.04, support=(0, 1))
    other = mixed_queue(3, turnover, "drop" if admission == "wait" else "wait")
    if turnover == 0.3:
        with pytest.raises(AssertionError, match="is not"):
            assert_mean_equals(np.eye(4)[lags], other.probability, detect=0.04, support=(0, 1))


def test_laws() -> None:
    np.testing.assert_array_equal(fixed_lag(2).probability, [0, 0, 1])
    assert_near(uniform_lag(3).probability, 0.25, scale=0)
    assert fixed_lag(2).max_lag == 2
    assert fixed_lag(2).mean == 2
    assert uniform_lag(3).mean == 1.5
    law = LagLaw([0.2, 0.5, 0.3])
    drawn = law.sample(np.random.default_rng(0), (100_000,))
    assert_mean_equals(np.eye(3)[drawn], law.probability, detect=0.02, support=(0, 1))


def test_in_flight_updates_arrive_every_so_many_tokens_at_any_phase() -> None:
    paths = in_flight(fixed_lag(2), 6, tokens_per_update=2)
    found = {tuple(lag): p for lag, p in zip(paths.lag.tolist(), paths.probability, strict=True)}
    assert found == {(2, 2, 1, 1, 0, 0): 0.5, (2, 1, 1, 0, 0, 0): 0.5}
    rng = np.random.default_rng(0)
    law = uniform_lag(2)
    paths = in_flight(law, 5, tokens_per_update=3)
    drawn = np.zeros((50_000, 5))
    for i in range(50_000):  # by walking: a counter that rolls over every 3 tokens
        lag, counter = int(law.sample(rng, ())), int(rng.integers(3))
        for t in range(5):
            if counter == 3:
                lag, counter = max(0, lag - 1), 0
            drawn[i, t] = lag
            counter += 1
    assert_mean_equals(drawn, paths.probability @ paths.lag, detect=0.045, support=(0, 2))
    assert paths.probability.sum() == near(1)
    slow = in_flight(law, 5, tokens_per_update=10**4)
    assert slow.probability[np.all(slow.lag == slow.lag[:, :1], axis=1)].sum() > 0.999


def test_history_counts_lags_back_and_stops_at_version_zero() -> None:
    policies = [TabularSoftmax(np.array([float(v), 0.0])) for v in range(5)]
    history = PolicyHistory((policies[0],), 0, capacity=3)
    for policy in policies[1:3]:
        history = history.pushed(policy)
    assert [history.at(k) for k in (0, 1, 2, 7)] == [policies[2], policies[1], policies[0], policies[0]]
    history = history.pushed(policies[3])
    assert history.version == 3
    assert history.at(2) is policies[1]
    with pytest.raises(InputError, match="lag: 3 reaches a version no longer kept; raise capacity above 3"):
        history.at(3)


def test_tables_take_each_token_from_its_own_version() -> None:
    policies = [random_tabular(np.random.default_rng(v), (4, 2, 3)) for v in range(3)]
    paths = in_flight(fixed_lag(2), 4, tokens_per_update=2)
    tables = PolicyHistory.of_run(policies).tables(paths)
    for lag, table in zip(paths.lag, tables, strict=True):
        for t in range(4):
            np.testing.assert_array_equal(table[t], policies[2 - lag[t]].log_prob[t])
    constant = PolicyHistory.of_run(policies).tables(whole_trajectory(fixed_lag(1), 4))
    np.testing.assert_array_equal(constant, [policies[1].log_prob])


def test_rounding_equals_the_number_formats() -> None:
    torch = pytest.importorskip("torch")
    x = np.concatenate([np.random.default_rng(0).normal(size=2000) * 10.0 ** np.arange(-3, 1).repeat(500), [0, 1.0625]])
    single = torch.tensor(x.astype(np.float32))
    np.testing.assert_array_equal(round_to_bfloat16(single.double().numpy()), single.bfloat16().double().numpy())
    eighth = single.to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(round_to_float8(single.double().numpy()), eighth)


def test_rounding_by_hand() -> None:
    np.testing.assert_array_equal(
        round_to_bfloat16(np.array([1 + 2**-8, 1 + 3 * 2**-8, -np.inf])), [1, 1.015625, -np.inf]
    )
    np.testing.assert_array_equal(
        round_to_float8(np.array([1.0625, 1.1875, 1e6, 2**-10, -3.3])), [1, 1.25, 448, 0, -3.25]
    )


def test_mismatches() -> None:
    policy = random_tabular(np.random.default_rng(0), (2, 5))
    assert_near(tempered(policy, 2.0).logit, policy.logit / 2, scale=0)
    np.testing.assert_array_equal(rounded(policy, "bfloat16").logit, round_to_bfloat16(policy.logit))
    rng = np.random.default_rng(1)
    calls = np.array([noisy(policy, rng, 0.1).logit - policy.logit for _ in range(2000)]).reshape(2000, -1)
    assert_mean_equals(calls, 0.0, detect=0.03)
    assert_mean_equals(calls**2, 0.01, detect=0.004)


def test_a_run_follows_the_exact_gradient_and_learns() -> None:
    chain = modular_sum(3, 3, 3, 1)
    start = random_tabular(np.random.default_rng(0), chain.shape)
    run = policies_of_a_run(chain, start, steps=30, step_size=2.0)
    assert len(run) == 31
    assert_near(run[1].parameter, start.parameter + 2.0 * chain.gradient(start), scale=0)
    value = [chain.value(policy) for policy in run]
    assert all(b > a for a, b in pairwise(value))
    assert value[-1] > 0.9


@pytest.mark.slow
def test_a_sampled_run_goes_along_the_gradient_on_average() -> None:
    bandit = BanditEnvironment(np.array([[1.0, 0.0, 0.5]]), np.ones(1))
    start = random_tabular(np.random.default_rng(0), (1, 3))
    rng = np.random.default_rng(1)
    step = np.array(
        [
            policies_of_a_run(bandit, start, steps=1, step_size=1.0, rng=rng, groups=4, group_size=4)[1].parameter
            for _ in range(3000)
        ]
    )
    assert_mean_equals(step - start.parameter, bandit.gradient(start), detect=0.02)


def test_a_lag_is_a_problem_with_the_old_policy() -> None:
    chain = modular_sum(3, 3, 3, 1)
    run = policies_of_a_run(chain, random_tabular(np.random.default_rng(0), chain.shape), steps=4, step_size=1.0)
    history = PolicyHistory.of_run(run)
    stale = stale_problem(chain, history, fixed_lag(3))
    np.testing.assert_array_equal(stale.behavior, [run[1].log_prob])
    assert exact.diagnostics(stale)["chi2"] == near(chain.divergence(run[4], run[1]))
    fresh = stale_problem(chain, history, fixed_lag(0))
    assert exact.diagnostics(fresh)["ess_fraction"] == near(1)
    in_between = stale_problem(chain, history, fixed_lag(3), tokens_per_update=1)
    chi2 = [exact.diagnostics(p)["chi2"] for p in (fresh, in_between, stale)]
    assert chi2 == sorted(chi2)
    mixed = stale_problem(chain, history, uniform_lag(2))
    parts = [chain.divergence(run[4], run[4 - k]) for k in range(3)]
    assert exact.diagnostics(mixed)["chi2"] == near(np.mean(parts))


@pytest.mark.parametrize(
    "environment", [BanditEnvironment(np.array([[1.0, 0.0, 0.5]]), np.ones(1)), modular_sum(2, 3, 3, 1)]
)
def test_a_mismatch_is_corrected_only_if_it_is_recorded(environment: BanditEnvironment) -> None:
    shape = (1, 3) if isinstance(environment, BanditEnvironment) else environment.shape
    history = PolicyHistory.of_run([random_tabular(np.random.default_rng(0), shape)])

    def at(recorded: bool) -> float:
        problem = stale_problem(
            environment,
            history,
            fixed_lag(0),
            mismatch=lambda policy: tempered(policy, 1.5),
            recorded_by_sampler=recorded,
        )
        return float(exact.moments(problem, Estimator(), 4).relative_bias)

    assert at(True) == near(0)
    assert at(False) > 0.01
    plain = problem_of(environment, tempered(history.newest, 1.5), [tempered(history.newest, 1.5)])
    assert float(exact.moments(plain, Estimator(Weighting("none")), 2).relative_bias) == near(0)


def test_refusals() -> None:
    with pytest.raises(InputError, match="lag: -1 is not a count"):
        fixed_lag(-1)
    with pytest.raises(InputError, match=r"turnover: 0 is not in \(0, 1\]"):
        mixed_queue(3, 0)
    with pytest.raises(InputError, match="admission: unknown name 'wiat'; did you mean 'wait'"):
        mixed_queue(3, 0.5, "wiat")
    with pytest.raises(InputError, match=r"lag probability: sums to 0.5"):
        LagLaw([0.5])
    with pytest.raises(InputError, match="tokens_per_update: 0 is less than 1"):
        in_flight(fixed_lag(1), 3, 0)
    with pytest.raises(InputError, match="number_format: unknown name 'bf16'; did you mean 'bfloat16'"):
        rounded(random_tabular(np.random.default_rng(0), (1, 2)), "bf16")
    with pytest.raises(InputError, match="temperature: 0 is not a positive"):
        tempered(random_tabular(np.random.default_rng(0), (1, 2)), 0)
    with pytest.raises(InputError, match="version: 0 with 2 policies"):
        PolicyHistory((random_tabular(np.random.default_rng(0), (1, 2)),) * 2, 0)
    bandit = BanditEnvironment(np.array([[1.0, 0.0]]), np.ones(1))
    policy = random_tabular(np.random.default_rng(0), (1, 2))
    with pytest.raises(InputError, match="tokens_per_update: a bandit has one token"):
        stale_problem(bandit, PolicyHistory.of_run([policy]), fixed_lag(0), tokens_per_update=2)
    with pytest.raises(InputError, match="steps: -1"):
        policies_of_a_run(bandit, policy, steps=-1, step_size=1.0)
