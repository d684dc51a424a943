"""Monte Carlo moments: right within their own stated error, and the same bits however the work is cut."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.kit.statistical import FALSE_FAIL, assert_mean_equals, assert_near, assert_within_errors, near
from vcposim.batch import Batch, DenseScores
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.laboratory import exact, monte_carlo
from vcposim.laboratory.leaves import BLOCKS, generator, jackknife, leaves, tasks
from vcposim.moments import batch_sums
from vcposim.problems.environments import BanditEnvironment
from vcposim.problems.policies import drifted, random_linear
from vcposim.problems.rollouts import bandit_problem, bandit_problem_of, contextual_bandit_problem
from vcposim.weights import Weighting

ESTIMATORS = {
    "zero": Estimator(),
    "truncated": Estimator(Weighting("truncate", cap=1.5), "group_mean"),
    "opob": Estimator(baseline="opob"),
    "loo": Estimator(baseline="opob_leave_one_out"),
    "normalized": Estimator(Weighting("self_normalize"), "population", "group_std"),
}
SCALARS = ("variance_per_sample", "variance_of_mean", "mse", "snr", "cosine", "relative_bias")
# The interval below is that of a normal with an estimated standard error (31 degrees of freedom): a nominal rate.
LIMIT = float(stats.t.isf(FALSE_FAIL / 2, BLOCKS - 1))


def contextual() -> Any:
    rng = np.random.default_rng(4)
    target, behavior = rng.dirichlet(np.ones(4), 3), rng.dirichlet(np.full(4, 5.0), 3)
    return contextual_bandit_problem(target, behavior, rng.normal(size=(3, 4)), [0.2, 0.5, 0.3])


def versions() -> Any:
    rng = np.random.default_rng(5)
    policy = random_linear(rng, (2, 3), d=2)
    environment = BanditEnvironment(rng.normal(size=(2, 3)), np.array([0.4, 0.6]))
    return bandit_problem_of(environment, policy, [drifted(policy, rng, 0.5) for _ in range(2)], [0.3, 0.7])


def check(found: monte_carlo.EstimatedMoments, expected: Any) -> None:
    """Every moment within its own standard errors, and those small enough to mean something."""
    for name in ("mean", *SCALARS):
        value, error, truth = getattr(found.moments, name), found.standard_error[name], getattr(expected, name)
        scale = np.max(np.abs(expected.mean)) if name == "mean" else np.abs(truth)
        scale = max(float(scale), 0.5) if name == "relative_bias" else scale
        assert np.all(error <= 0.1 * scale), f"{name}: standard error {error} cannot tell a 10% error; draw more"
        assert_within_errors(value, truth, error, name, degrees=BLOCKS - 1)


@pytest.mark.parametrize("problem", [contextual(), versions()], ids=["contextual", "versions"])
def test_moments_agree_with_exact_ones_within_their_standard_errors(problem: Any) -> None:
    found = monte_carlo.moments(problem, ESTIMATORS, group_size=3, samples=200_000, seed=1)
    for name, estimator in ESTIMATORS.items():
        check(found[name], exact.moments(problem, estimator, 3))


def test_that_check_rejects_the_moments_of_another_estimator() -> None:
    problem = contextual()
    found = monte_carlo.moments(problem, ESTIMATORS, group_size=3, samples=200_000, seed=1)
    for name in ("zero", "truncated", "opob", "loo"):
        wrong = "loo" if name == "opob" else "opob"
        with pytest.raises(AssertionError, match="is not"):
            check(found[name], exact.moments(problem, ESTIMATORS[wrong], 3))
    with pytest.raises(AssertionError, match="variance_of_mean"):
        check(found["zero"], exact.moments(problem, ESTIMATORS["zero"], 4))


@pytest.mark.slow
def test_standard_errors_are_the_spread_of_repeated_runs() -> None:
    problem, name = bandit_problem([0.5, 0.3, 0.2], [0.3, 0.3, 0.4], [1, 0, 2]), "opob"
    runs = [
        monte_carlo.moments(problem, {name: ESTIMATORS[name]}, group_size=2, samples=300, seed=seed)[name]
        for seed in range(250)
    ]
    for statistic in ("variance_of_mean", "mse", "relative_bias"):
        value = np.array([float(getattr(run.moments, statistic)) for run in runs])
        error = np.array([float(run.standard_error[statistic]) for run in runs])
        # a ratio of variances: its relative standard error is about sqrt(2/250) = 9%, on either side
        assert 0.6 < np.mean(error**2) / np.var(value) < 1.6, statistic


def same_bits(a: dict[str, monte_carlo.EstimatedMoments], b: dict[str, monte_carlo.EstimatedMoments]) -> bool:
    def numbers(found: monte_carlo.EstimatedMoments) -> list[Any]:
        return [getattr(found.moments, n) for n in SCALARS] + [found.moments.mean, *found.standard_error.values()]

    return list(a) == list(b) and all(
        np.array_equal(x, y) for n in a for x, y in zip(numbers(a[n]), numbers(b[n]), strict=True)
    )


@pytest.mark.slow
def test_results_do_not_depend_on_chunks_workers_or_company() -> None:
    problem, given = contextual(), {"group_size": 4, "samples": 30_001, "seed": 7}
    whole = monte_carlo.moments(problem, ESTIMATORS, **given)
    for chunk in (1, 1000, 10**9):
        assert same_bits(whole, monte_carlo.moments(problem, ESTIMATORS, chunk=chunk, **given))
    assert same_bits(whole, monte_carlo.moments(problem, ESTIMATORS, workers=2, chunk=2000, **given))
    alone = monte_carlo.moments(problem, {"opob": ESTIMATORS["opob"]}, **given)
    assert same_bits(alone, {"opob": whole["opob"]})
    backwards = monte_carlo.moments(problem, dict(reversed(ESTIMATORS.items())), **given)
    assert same_bits(whole, {name: backwards[name] for name in ESTIMATORS})
    assert not same_bits(whole, monte_carlo.moments(problem, ESTIMATORS, **(given | {"seed": 8})))


@pytest.mark.parametrize(("groups", "numbers"), [(1, 1), (33, 10), (100_000, 5000)])
def test_leaves_hold_all_groups_and_tasks_all_leaves(groups: int, numbers: int) -> None:
    cut = list(leaves(groups, numbers))
    assert sum(leaf.groups for leaf in cut) == groups
    assert [leaf.number for leaf in cut] == list(range(len(cut)))
    assert max(leaf.groups for leaf in cut) * numbers <= max(2**18, numbers)
    for size in (1, 50, 10**6):
        assert [leaf for task in tasks(groups, numbers, size, 5) for leaf in task] == cut


def test_a_longer_run_starts_with_the_same_leaves() -> None:
    short, long = list(leaves(1000, 10)), list(leaves(5000, 10))
    assert short[:-1] == long[: len(short) - 1]
    draws = {generator(seed, leaf).random() for seed in (0, 1) for leaf in short}
    assert len(draws) == 2 * len(short)


def test_the_jackknife_of_a_mean_is_its_textbook_error() -> None:
    x = np.random.default_rng(0).normal(size=12)
    without = np.array([np.delete(x, i).mean() for i in range(12)])
    assert jackknife(x.mean(), without, np.ones(12)) == near(x.std(ddof=1) / math.sqrt(12))
    # blocks of 1, 2 and 9: the expected squared error of a mean is 1/12 whatever the blocks
    rng, mass = np.random.default_rng(1), np.array([1.0, 2.0, 9.0])
    found = []
    for _ in range(4000):
        block = [rng.normal(size=int(m)) for m in mass]
        rest = [np.concatenate(block[:j] + block[j + 1 :]).mean() for j in range(3)]
        found.append(float(jackknife(np.concatenate(block).mean(), np.array(rest), mass)) ** 2)
    assert_mean_equals(np.array(found), 1 / 12, detect=0.02)


def test_drawn_sums_equal_the_kernel_s() -> None:
    problem = contextual()
    batch = problem.sample(np.random.default_rng(0), 50, 4)
    eye = np.eye(4)
    group = problem.draw(np.random.default_rng(0), 50, 4).group
    dense = np.zeros((50, 4, 3, 4))
    for r in range(50):
        for i in range(4):
            dense[r, i, group[r, 0]] = eye[batch.scores.choice[r, i]] - problem.target[group[r, 0]]
    plain = Batch(batch.reward, batch.log_ratio, scores=DenseScores(dense.reshape(50, 4, 12)), length=batch.length)
    for estimator in (ESTIMATORS["zero"], ESTIMATORS["opob"]):
        found = monte_carlo.drawn_sums(batch, estimator.coefficients(batch))
        for a, b in zip(found, batch_sums(plain, estimator.coefficients(plain)), strict=True):
            assert_near(a, b)


def test_progress_ends_at_one_and_an_interrupt_stops() -> None:
    seen: list[float] = []
    given = {"group_size": 4, "samples": 5000, "seed": 0}
    monte_carlo.moments(contextual(), ESTIMATORS, progress=seen.append, **given)
    assert seen == sorted(seen)
    assert seen[-1] == 1

    def interrupt(fraction: float) -> None:
        raise KeyboardInterrupt

    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            monte_carlo.moments(contextual(), ESTIMATORS, progress=interrupt, workers=workers, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 4}, r"samples: 4 make one group of 4.*use 8 or more"),
        ({"samples": 0}, r"samples: 0 is less than 1"),
        ({"workers": 0}, r"workers: 0 is less than 1"),
        ({"chunk": -1}, r"chunk: -1 is less than 1"),
        ({"seed": -1}, r"seed: -1 is not in"),
        ({"group_size": 1}, r"group_size: 1 leaves nobody"),
        ({"estimators": {}}, r"estimators: none given"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"estimators": ESTIMATORS, "group_size": 4, "samples": 100, "seed": 0}
    with pytest.raises(InputError, match=message):
        monte_carlo.moments(contextual(), **(given | change))


def test_noise_in_many_dimensions_is_not_mistaken_for_bias() -> None:
    rng = np.random.default_rng(0)
    target, behavior = rng.dirichlet(np.full(400, 20.0)), rng.dirichlet(np.full(400, 20.0))
    problem = bandit_problem(target, behavior, rng.normal(size=400))
    found = monte_carlo.moments(problem, {"zero": Estimator()}, group_size=4, samples=8000, seed=0)["zero"]
    expected = exact.moments(problem, Estimator(), 4)
    plugged_in = float(np.linalg.norm(found.moments.bias) / np.linalg.norm(problem.gradient))
    assert plugged_in > 0.2
    assert found.moments.relative_bias < plugged_in / 2
    for name in SCALARS:
        value, error = getattr(found.moments, name), found.standard_error[name]
        assert_within_errors(value, getattr(expected, name), error, name, degrees=BLOCKS - 1)
    assert LIMIT * found.standard_error["mse"] < expected.mse / 2  # so the comparison above says something


@pytest.mark.slow
def test_relative_biases_of_an_unbiased_estimator_lie_within_their_errors() -> None:
    problem = bandit_problem([0.5, 0.3, 0.2], [0.3, 0.3, 0.4], [1, 0, 2])
    runs = [
        monte_carlo.moments(problem, {"zero": Estimator()}, group_size=2, samples=500, seed=seed)["zero"]
        for seed in range(100)
    ]
    z = np.array([float(run.moments.relative_bias / run.standard_error["relative_bias"]) for run in runs])
    # half are zero; beyond two standard errors lie a few of a hundred, as in a normal's upper tail
    assert 0.2 < np.mean(z == 0) < 0.8
    assert np.mean(z > 2) <= 0.12
    assert np.max(z) < LIMIT


@pytest.mark.parametrize(("square", "error", "expected"), [(4.0, 1e-4, 2.5e-5), (0.0, 0.01, 0.1), (-1.0, 0.01, 0.1)])
def test_error_of_a_root(square: float, error: float, expected: float) -> None:
    assert f"{float(monte_carlo.root_error(np.array(square), np.array(error))):.3g}" == f"{expected:.3g}"


def test_two_groups_have_moments_and_no_standard_error() -> None:
    found = monte_carlo.moments(contextual(), {"zero": Estimator()}, group_size=2, samples=4, seed=0)["zero"]
    assert math.isfinite(found.moments.variance_of_mean)
    assert math.isnan(found.standard_error["variance_of_mean"])
