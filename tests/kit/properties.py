"""The laws of the kernel, each a function of the implementation it judges.

`@law(of=true_function, given=strategy)` registers one. The module tests run every law on the true function; the mutants
of `mutants.py` are run through the same laws, and each must die by the one named for it. A law that kills nothing
proves nothing.

Laws about functions of the kernel take that function; laws about estimators take `coefficients: Batch -> c`, so that
any estimator can be judged by them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.kit import slow
from tests.kit.backends import NUMPY
from tests.kit.statistical import assert_mean_equals, assert_rounding_only
from tests.kit.strategies import (
    Arms,
    Case,
    arrays_of,
    as_float,
    bandits,
    cases,
    exact,
    extreme_log_ratio,
    grid,
    probability,
    ratio,
)
from vcposim import arrays, baselines, batch, control, diagnostics, estimators, moments, weights
from vcposim.batch import Batch, DenseScores
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.weights import Weighting


@dataclass(frozen=True)
class Law:
    name: str
    module: str
    statement: str
    of: Callable[..., Any]
    given: st.SearchStrategy[Any]
    check: Callable[[Any, Any], None]

    def run(self, implementation: Callable[..., Any] | None = None, *, examples: int = 30, shrink: bool = True) -> None:
        """Try the law on an implementation (default: the true one); an `AssertionError` when it is broken."""
        judged = self.of if implementation is None else implementation
        phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

        @settings(max_examples=examples, phases=phases, report_multiple_bugs=False)
        @given(self.given)
        def trial(case: Any) -> None:
            self.check(judged, case)

        trial()


LAWS: dict[str, Law] = {}


def law(of: Callable[..., Any], given: st.SearchStrategy[Any], module: Any) -> Callable[[Callable], Callable]:
    def register(check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        name = check.__name__
        statement = " ".join((check.__doc__ or "").split())
        LAWS[name] = Law(name, module.__name__.split(".")[-1], statement, of, given, check)
        return check

    return register


def laws_of(module: str) -> list[Law]:
    return [one for one in LAWS.values() if one.module == module]


vectors = st.integers(1, 5).flatmap(lambda n: arrays_of(grid(-4, 4, 3), (n,)))


@st.composite
def weighted_vectors(draw: st.DrawFn, smallest: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, Fraction]:
    """reward, weight >= 0 (zeros likely), measure, unit of one group of draws."""
    n = draw(st.integers(smallest, 5))
    weight = draw(arrays_of(st.one_of(st.just(Fraction(0)), grid(0, 5, 2)), (n,)))
    unit = Fraction(1, n)
    return draw(arrays_of(grid(-4, 4, 3), (n,))), weight, exact([unit] * n), unit


# ---------------------------------------------------------------------------------------------------------- arrays


@law(arrays.sum_of_others, vectors, arrays)
def sum_of_others_is_a_loop(sum_of_others, x):
    """sum_of_others(x)_i = sum of x_j over j != i, exactly."""
    want = [sum((x[j] for j in range(len(x)) if j != i), Fraction(0)) for i in range(len(x))]
    assert list(sum_of_others(x)) == want


@law(
    arrays.sum_of_others,
    st.tuples(st.lists(st.floats(0.5, 2), min_size=2, max_size=6), st.integers(0, 300), st.integers(0, 5)),
    arrays,
)
def sum_of_others_keeps_every_digit(sum_of_others, case):
    """Where one non-negative element dominates by any factor, the sum of the others has full precision."""
    values, power, where = case
    x = np.array(values)
    x[where % len(x)] *= 10.0**power
    want = [math.fsum(v for j, v in enumerate(x) if j != i) for i in range(len(x))]
    assert_rounding_only(sum_of_others(x), np.array(want), ulp=16)


log_cases = st.integers(1, 5).flatmap(lambda n: st.tuples(extreme_log_ratio(n), probability(n)))


@law(arrays.log_expectation, log_cases, arrays)
def log_expectation_is_the_log_of_the_expectation(log_expectation, case):
    """log E[e^x] = max + log sum m_i e^(x_i - max), finite however large x; -inf only where all x are."""
    x, measure = case
    m = as_float(measure)
    if np.all(x == -np.inf):
        return  # log of zero: test_arrays.py
    top = x.max()
    want = top + math.log(math.fsum(m_i * math.exp(x_i - top) for m_i, x_i in zip(m, x, strict=True)))
    assert_rounding_only(np.asarray(log_expectation(x, m)), np.asarray(want), ulp=32, scale=1.0)


@law(arrays.saturating_exp, st.integers(1, 6).flatmap(extreme_log_ratio), arrays)
def saturating_exp_is_exp_and_finite(saturating_exp, x):
    """exp(x) where |x| <= 340; monotone, finite and positive-or-zero everywhere."""
    y = saturating_exp(x)
    inside = np.abs(x) <= 340
    assert_rounding_only(y[inside], np.exp(x[inside]), ulp=4)
    assert np.all(np.isfinite(y))
    assert np.all(y >= 0)
    assert np.all(np.diff(y[np.argsort(x)]) >= 0)
    assert np.all(y[x > 340] >= np.exp(340))


# ----------------------------------------------------------------------------------------------------------- batch


@law(batch.sample_measure, st.lists(st.booleans(), min_size=1, max_size=6).filter(any), batch)
def sample_measure_is_one_over_the_real_samples(sample_measure, mask):
    """1/n_g on each of the n_g real samples, 0 on padding; the unit is 1/n_g."""
    measure, unit = sample_measure(exact([int(x) for x in mask]))
    assert list(measure) == [Fraction(int(x), sum(mask)) for x in mask]
    assert list(unit) == [Fraction(1, sum(mask))]


@st.composite
def token_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """scores (n, t, p) and token weights (n, t)"""
    n, t, p = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return draw(arrays_of(grid(-2, 2, 3), (n, t, p))), draw(arrays_of(grid(0, 3, 2), (n, t)))


@law(DenseScores, token_scores(), batch)
def token_scores_are_loops(scores_type, case):
    """combine = sum_i sum_t w_it s_it; sq_norm_i = ||sum_t w_it s_it||^2: the sum is squared, not its terms."""
    score, w = case
    n, t, p = score.shape
    ws = [[sum(w[i, u] * score[i, u, k] for u in range(t)) for k in range(p)] for i in range(n)]
    scores = scores_type(score, per_token=True)
    assert list(scores.combine(w)) == [sum(row[k] for row in ws) for k in range(p)]
    assert list(scores.sq_norm(w)) == [sum(x * x for x in row) for row in ws]
    whole = scores_type(score.sum(axis=1))
    assert list(scores.sq_norm(w[:, 0])) == list(whole.sq_norm(w[:, 0]))
    assert list(scores.combine(w[:, 0])) == list(whole.combine(w[:, 0]))


# --------------------------------------------------------------------------------------------------------- weights

limits = st.tuples(
    st.integers(1, 5).flatmap(ratio), st.builds(Fraction, st.integers(31, 90), st.just(31)), st.just(Fraction(13, 37))
)


def both_scales(treatment: Callable[..., Any], x: np.ndarray, **limit: Any) -> list[tuple[np.ndarray, Any]]:
    """The treatment on ratios and on log-ratios, both as ratios; (value, is exact)."""
    linear = treatment(x, arrays.LINEAR, **limit)
    log = treatment(np.log(as_float(x)), arrays.LOG, **{k: float(v) for k, v in limit.items()})
    return [(linear, True), (np.exp(log), False)]


def equal(got: np.ndarray, want: list, is_exact: bool) -> None:
    if is_exact:
        assert list(got) == want
    else:
        assert_rounding_only(got, np.array(want, dtype=np.float64), ulp=64)


ratios = st.integers(1, 5).flatmap(lambda n: ratio((n,)))
# limits are primes over primes that no generated ratio hits, so no tie is decided by rounding
caps = st.sampled_from([Fraction(37, 31), Fraction(47, 31), Fraction(61, 31)])


@law(weights.truncate, st.tuples(ratios, caps), weights)
def truncate_is_a_minimum(truncate, case):
    """min(w, cap): never above the cap, untouched below it, on both scales."""
    x, cap = case
    for got, is_exact in both_scales(truncate, x, cap=cap):
        equal(got, [cap if w > cap else w for w in x], is_exact)


@law(weights.clip, st.tuples(ratios, caps), weights)
def clip_is_two_sided(clip, case):
    """max(floor, min(w, cap)) on both scales."""
    x, cap = case
    floor = Fraction(13, 37)
    for got, is_exact in both_scales(clip, x, cap=cap, floor=floor):
        equal(got, [cap if w > cap else floor if w < floor else w for w in x], is_exact)


@law(weights.mask, st.tuples(ratios, caps, st.booleans()), weights)
def mask_keeps_or_drops(mask, case):
    """w where floor <= w <= cap, else 0 (not the limit), on both scales."""
    x, cap, two_sided = case
    floor = Fraction(13, 37)
    for got, is_exact in both_scales(mask, x, cap=cap, **({"floor": floor} if two_sided else {})):
        equal(got, [w if w <= cap and (w >= floor or not two_sided) else 0 for w in x], is_exact)


@law(
    weights.self_normalize,
    st.integers(1, 5).flatmap(lambda n: st.tuples(ratio((n,)), probability(n), grid(1, 9, 2))),
    weights,
)
def self_normalized_weights_average_to_one(self_normalize, case):
    """E[w'] = 1 under the measure, w' proportional to w, whatever the scale of w."""
    x, measure, k = case
    linear = self_normalize(x, arrays.LINEAR, measure)
    assert sum(linear * measure) == 1
    assert all(linear * x[0] == x * linear[0])
    log = self_normalize(np.log(as_float(k * x)), arrays.LOG, as_float(measure))
    assert_rounding_only(np.exp(log), as_float(linear), ulp=128)


token_cases = cases(lead=(), per_token=True, smallest=1)


def at_level(batch: Batch, level: str) -> Any:
    return weights.Weighting("importance", level)(batch).value


@law(at_level, token_cases, weights)
def sequence_level_is_the_product_of_real_tokens(level_weight, case):
    """w_i = prod over real tokens of r_it; masked tokens do not enter, whatever they hold."""
    want = [slow.product(list(case.ratio[i]), list(case.token_mask[i])) for i in range(case.size)]
    assert list(level_weight(case.batch(), "sequence")) == want
    assert_rounding_only(level_weight(case.batch(NUMPY), "sequence"), np.array(want, dtype=np.float64), ulp=128)


@law(at_level, token_cases, weights)
def geometric_level_is_a_root_of_the_sequence_weight(level_weight, case):
    """(w^(1/L))^L = w: a geometric mean, not an arithmetic one, over real tokens only."""
    root = level_weight(case.batch(NUMPY), "geometric")
    length = as_float(case.token_mask.sum(axis=-1))
    whole = level_weight(case.batch(NUMPY), "sequence")
    assert_rounding_only(root**length, whole, ulp=512)


@law(at_level, token_cases, weights)
def token_level_weighs_tokens(level_weight, case):
    """One weight a token, its own ratio; 0 on masked tokens."""
    value = level_weight(case.batch(), "token")
    assert value.shape == case.ratio.shape
    assert all((value == case.ratio * case.token_mask).ravel())


# ------------------------------------------------------------------------------------------------------- baselines


@law(baselines.weighted_mean, weighted_vectors(), baselines)
def weighted_mean_is_a_loop(weighted_mean, case):
    """b = sum a_i R_i / sum a_i, exactly; the plain mean where no sample has weight."""
    r, a, m, _ = case
    assert list(weighted_mean(r, a, m)) == [slow.average(list(r), list(a), list(m))]


@law(baselines.weighted_mean, st.tuples(weighted_vectors(), grid(-9, 9, 2), grid(1, 9, 2)), baselines)
def weighted_mean_follows_shifts_and_scales(weighted_mean, case):
    """b(k R + d) = k b(R) + d, also where no sample has weight; b does not change with the scale of the weight."""
    (r, a, m, _), d, k = case
    b = weighted_mean(r, a, m)
    assert list(weighted_mean(k * r + d, a, m)) == list(k * b + d)
    assert list(weighted_mean(r, k * a, m)) == list(b)


@law(baselines.weighted_mean_of_others, weighted_vectors(), baselines)
def leave_one_out_is_a_loop(others, case):
    """b_{-i} = sum_{j != i} a_j R_j / sum_{j != i} a_j, exactly; their plain mean where they have no weight."""
    r, a, m, unit = case
    want = [slow.average_of_others(list(r), list(a), list(m), unit, i) for i in range(len(r))]
    assert list(others(r, a, m, unit)) == want


@law(baselines.weighted_mean_of_others, st.tuples(weighted_vectors(2), grid(1, 9, 1)), baselines)
def leave_one_out_does_not_look_at_its_own_reward(others, case):
    """b_{-i} is unchanged when R_i changes: that is what keeps the estimate unbiased."""
    (r, a, m, unit), d = case
    before = others(r, a, m, unit)
    for i in range(len(r)):
        changed = r.copy()
        changed[i] += d
        assert others(changed, a, m, unit)[i] == before[i]


@law(baselines.leverage, weighted_vectors(2), baselines)
def leverage_identity(leverage, case):
    """R_i - b = (1 - h_i)(R_i - b_{-i}), exactly (claim C8), wherever the others have weight."""
    r, a, m, unit = case
    h, b = leverage(a, m, unit), baselines.weighted_mean(r, a, m)
    others = baselines.weighted_mean_of_others(r, a, m, unit)
    for i in range(len(r)):
        if sum(a) - a[i] > 0 or a[i] == 0:
            assert r[i] - b[0] == (1 - h[i]) * (r[i] - others[i])
        else:
            assert h[i] == 1
            assert b[0] == r[i]


@law(baselines.leverage, weighted_vectors(), baselines)
def leverages_are_shares(leverage, case):
    """0 <= h_i <= 1 and sum_i h_i = 1."""
    _, a, m, unit = case
    h = leverage(a, m, unit)
    assert all((h >= 0) & (h <= 1))
    assert sum(h) == 1


@law(baselines.leverage_damped, st.tuples(weighted_vectors(), grid(-3, 3, 2)), baselines)
def damping_multiplies_the_advantage(damped, case):
    """R_i - b_i = (1 - h_i)(R_i - b) for any b."""
    (r, a, _, _), b = case
    h = a / (1 + a.sum())
    assert list(r - damped(r, exact([b]), h)) == [(1 - h_i) * (r_i - b) for h_i, r_i in zip(h, r, strict=True)]


@law(
    baselines.minimum_variance,
    st.integers(2, 4).flatmap(
        lambda n: st.tuples(
            arrays_of(grid(-3, 3, 2), (n, 2)), arrays_of(grid(-3, 3, 2), (n,)), probability(n), grid(-4, 4, 2)
        )
    ),
    baselines,
)
def minimum_variance_has_the_least_variance(minimum_variance, case):
    """tr Cov of (R - b) v at any b exceeds its minimum by (b - b*)^2 tr Cov v, exactly: (b, b*) of a parabola."""
    v, r, m, b = case
    a = (v * v).sum(axis=-1)
    best = minimum_variance(
        exact([sum(m * a * r)]), exact([sum(m * a)]), m * r @ v, m @ v, baselines.weighted_mean(r, a, m)
    )[0]

    def variance(at: Fraction) -> Fraction:
        return moments.trace_covariance((r - at)[:, None] * v, m)

    assert variance(b) - variance(best) == (b - best) ** 2 * moments.trace_covariance(v, m)


# ------------------------------------------------------------------------------------------------------ estimators
# the implementation is `coefficients: Batch -> c`


def estimator(baseline: str | float, treatment: str = "importance", normalizer: str = "none", **kw: Any) -> Callable:
    return Estimator(Weighting(treatment, **kw), baseline, normalizer).coefficients


def contribution_variance(coefficients: Callable, outcome: Batch) -> Any:
    c = coefficients(outcome)
    return moments.trace_covariance(c[..., None] * outcome.scores.score, outcome.measure)  # type: ignore[union-attr]


@law(estimator("opob"), st.tuples(bandits(), grid(-4, 4, 3)), estimators)
def opob_has_the_least_variance_of_all_baselines(coefficients, case):
    """For every constant b: variance_per_sample(b) >= this estimator's, under the population measure (claim C6)."""
    bandit, b = case
    outcome = bandit.population()
    mine = contribution_variance(coefficients, outcome)
    for other in (estimator(b), estimator("group_mean"), estimator("on_policy_optimal"), estimator("length_weighted")):
        rival = Batch(**{**vars(outcome), "length": bandit.reward * 0 + 3})
        assert mine <= contribution_variance(other, rival)


@law(estimator("opob_truncated", "truncate", cap=Fraction(47, 31)), st.tuples(bandits(), grid(-4, 4, 3)), estimators)
def truncation_aware_has_the_least_variance_under_truncation(coefficients, case):
    """With weights truncated at 47/31, no constant baseline, OPOB's included, has less variance."""
    bandit, b = case
    cap = {"cap": Fraction(47, 31)}
    outcome = bandit.population()
    mine = contribution_variance(coefficients, outcome)
    for name in (b, "opob", "group_mean", "opob_released"):
        assert mine <= contribution_variance(estimator(name, "truncate", **cap), outcome)


small_bandits = st.tuples(bandits(largest=3), st.integers(2, 3))


def mean_over_all_batches(coefficients: Callable, bandit: Arms, n: int) -> list[Fraction]:
    outcome, probability_of = bandit.all_batches(n)
    sums = moments.batch_sums(outcome, coefficients(outcome), probability_of)
    assert sums.mass == 1
    return list(sums.estimate)


@law(estimator("opob_leave_one_out"), small_bandits, estimators)
def unbiased_by_enumeration(coefficients, case):
    """E[(1/n) sum c_i s_i] over every batch of n draws is the exact gradient, in rationals (claims C2, C7)."""
    bandit, n = case
    assert mean_over_all_batches(coefficients, bandit, n) == list(bandit.gradient)


@law(estimator("group_mean"), small_bandits, estimators)
def group_mean_shrinks_the_gradient_by_one_sample(coefficients, case):
    """With full importance weights the in-batch mean gives exactly (1 - 1/n) times the gradient (claim C8)."""
    bandit, n = case
    want = [(1 - Fraction(1, n)) * g for g in bandit.gradient]
    # E[w_i s_i R_i] appears in the mean too: (1/n) E[w s R] is what is lost
    assert mean_over_all_batches(coefficients, bandit, n) == want


@law(estimator("opob"), st.tuples(cases(), grid(-9, 9, 2)), estimators)
def reward_shift_changes_nothing(coefficients, case):
    """c(R + d) = c(R), exactly: only differences of rewards matter."""
    batch_case, d = case
    moved = Case(**{**vars(batch_case), "reward": batch_case.reward + d})
    assert_rounding_only(coefficients(moved.batch()), coefficients(batch_case.batch()))


@law(estimator("opob"), st.tuples(cases(), grid(1, 9, 2)), estimators)
def reward_scale_scales(coefficients, case):
    """c(k R) = k c(R), exactly."""
    batch_case, k = case
    scaled = Case(**{**vars(batch_case), "reward": batch_case.reward * k})
    assert_rounding_only(coefficients(scaled.batch()), k * coefficients(batch_case.batch()))


@law(estimator("opob"), st.tuples(cases(), grid(1, 9, 2)), estimators)
def weight_scale_scales(coefficients, case):
    """c(k w) = k c(w), exactly: the baseline and the normalizer do not see the scale of the weights."""
    batch_case, k = case
    scaled = Case(**{**vars(batch_case), "ratio": batch_case.ratio * k})
    assert_rounding_only(coefficients(scaled.batch()), k * coefficients(batch_case.batch()))


@law(estimator("opob_leave_one_out"), cases(lead=(2,), largest=3), estimators)
def groups_do_not_see_each_other(coefficients, case):
    """Each group's coefficients are those it has alone."""
    together = coefficients(case.batch())
    for row, group in zip(together, case.groups(), strict=True):
        assert_rounding_only(row, coefficients(group.batch()))


@law(estimator("opob_leave_one_out"), st.tuples(cases(), st.randoms(use_true_random=False)), estimators)
def samples_have_no_order(coefficients, case):
    """Permuting the samples permutes the coefficients."""
    batch_case, random = case
    order = list(range(batch_case.size))
    random.shuffle(order)
    moved = coefficients(batch_case.take(order).batch())
    assert_rounding_only(moved, coefficients(batch_case.batch())[..., order])


@law(estimator("opob_leave_one_out"), st.tuples(cases(lead=(), smallest=3, largest=5), st.integers(2, 3)), estimators)
def padding_is_inert(coefficients, case):
    """Coefficients of the real samples are those of the group without its padding, whatever the padding holds."""
    batch_case, real = case
    mask = exact([int(i < real) for i in range(batch_case.size)])
    padded = Case(**{**vars(batch_case), "sample_mask": mask})
    alone = batch_case.take(list(range(real)))
    assert_rounding_only(coefficients(padded.batch())[:real], coefficients(alone.batch()))


@law(estimator("opob_leave_one_out"), cases(per_token=True, lead=()), estimators)
def masked_tokens_are_inert(coefficients, case):
    """Ratios of masked tokens (of the environment, or padding) do not matter."""
    noise = Fraction(977, 3)
    changed = Case(**{**vars(case), "ratio": case.ratio * (case.token_mask + noise * (1 - case.token_mask))})
    assert_rounding_only(coefficients(changed.batch()), coefficients(case.batch()))


@law(estimator("opob"), cases(), estimators)
def on_policy_it_is_its_host(coefficients, case):
    """At lag 0 (all ratios 1) the off-policy optimal baseline is the on-policy optimal one, without weights."""
    fresh = Case(**{**vars(case), "ratio": case.ratio * 0 + 1}).batch()
    assert_rounding_only(coefficients(fresh), estimator("on_policy_optimal", "none")(fresh))


@law(estimator("opob"), cases(lead=()), estimators)
def opob_is_its_formula(coefficients, case):
    """c_i = w_i (R_i - sum w_j^2 ||s_j||^2 R_j / sum w_j^2 ||s_j||^2), by loops."""
    want, _ = slow.coefficients(case, {"treatment": "importance"}, "opob", "none", "sequence")
    assert list(coefficients(case.batch())) == want


@law(
    estimator("opob"),
    st.integers(2, 5).flatmap(lambda n: st.tuples(extreme_log_ratio(n), arrays_of(grid(-2, 2, 2), (n, 3)))),
    estimators,
)
def finite_under_extreme_log_ratios(coefficients, case):
    """Log-ratios of +-10^4 and -inf give finite coefficients."""
    log_ratio, numbers = case
    numbers = as_float(numbers)
    outcome = Batch(reward=numbers[:, 0], log_ratio=log_ratio, scores=DenseScores(numbers[:, 1:]))
    assert np.all(np.isfinite(coefficients(outcome)))


@law(estimators.group_std, st.integers(1, 5).flatmap(lambda n: arrays_of(grid(-4, 4, 3), (n,))), estimators)
def group_std_is_the_population_one(group_std, r):
    """sqrt of the mean squared deviation: division by n, not n - 1."""
    mean = sum(r) / len(r)
    want = math.sqrt(sum((x - mean) ** 2 for x in r) / len(r))
    got = group_std(as_float(r), np.full(len(r), 1 / len(r)))
    assert_rounding_only(got, np.array([want]), ulp=64, scale=float(max(abs(r))))


# --------------------------------------------------------------------------------------------------------- moments


def moments_of(outcome: Batch, c: Any, mass: Any, gradient: Any) -> moments.Moments:
    return moments.moments(moments.batch_sums(outcome, c, mass), gradient, drawn=False)


@law(moments_of, bandits(largest=3), moments)
def moments_are_the_textbook_ones(moments_of, bandit):
    """mean, both variances, bias and MSE over all batches of two draws equal sums over outcomes, two passes."""
    outcome, mass = bandit.all_batches(2)
    c = estimator("group_mean")(outcome)
    contribution = c[..., None] * outcome.scores.score  # (batch, sample, parameter)
    estimate = contribution.mean(axis=1)
    mean = mass @ estimate
    per_sample = sum(mass[k] * sum((contribution[k, i] - mean) ** 2) / 2 for k in range(len(mass)) for i in range(2))
    of_mean = sum(mass[k] * sum((estimate[k] - mean) ** 2) for k in range(len(mass)))
    mse = sum(mass[k] * sum((estimate[k] - bandit.gradient) ** 2) for k in range(len(mass)))
    numeric = Batch(
        reward=as_float(outcome.reward),
        log_ratio=np.log(as_float(outcome.ratio)),
        scores=DenseScores(as_float(outcome.scores.score)),
    )
    got = moments_of(numeric, as_float(c), as_float(mass), as_float(bandit.gradient))
    size = float(sum(mass[k] * sum(contribution[k, i] ** 2) for k in range(len(mass)) for i in range(2)))
    size += float(sum(bandit.gradient**2))
    tolerance = {"ulp": 512, "scale": size}
    assert_rounding_only(got.mean, as_float(mean), ulp=512, scale=math.sqrt(size))
    assert_rounding_only(got.bias, as_float(mean - bandit.gradient), ulp=512, scale=math.sqrt(size))
    assert_rounding_only(got.variance_per_sample, np.float64(per_sample), **tolerance)
    assert_rounding_only(got.variance_of_mean, np.float64(of_mean), **tolerance)
    assert_rounding_only(got.mse, np.float64(mse), **tolerance)


@law(moments.Sums.merge, st.tuples(cases(lead=(3,)), cases(lead=(1,))), moments)
def merged_sums_are_the_sums_of_the_whole(merge, case):
    """Batches cut in parts, in any order and grouping: the merged sums are those of the whole, exactly."""
    whole, _ = case
    sums = [moments.batch_sums(g.batch(), estimator("opob")(g.batch())) for g in whole.groups()]
    total = moments.batch_sums(whole.batch(), estimator("opob")(whole.batch()))
    for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        a, b, c = (sums[k] for k in order)
        for merged in (merge(merge(a, b), c), merge(a, merge(b, c))):
            for got, want in zip(merged, total, strict=True):
                assert np.all(np.asarray(got) == np.asarray(want))


@law(moments.moments, st.just(None), moments)
def moments_of_draws_are_unbiased(moments_of_sums, _):
    """From 3 drawn batches of 2 correlated samples, both variances and the MSE average to their exact values.

    4000 repetitions; false-fail rate 1e-9, detects an error of 12%: a missing Bessel correction is one of 33%.
    """
    rng = np.random.default_rng(20260217)
    bandit = Arms(
        *(exact(x) for x in ([Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)], [Fraction(1, 3)] * 3, [1, 0, 2]))
    )
    outcome, mass = bandit.all_batches(2)
    make = estimator("group_mean")
    truth = exact_moments(outcome, make(outcome), mass, bandit.gradient)
    arm = rng.choice(3, p=as_float(bandit.behavior), size=(4000, 3, 2))
    reward, log_ratio, score = (as_float(bandit.reward), np.log(as_float(bandit.ratio)), as_float(bandit.score))
    draw = []
    for a in arm:
        drawn = Batch(reward=reward[a], log_ratio=log_ratio[a], scores=DenseScores(score[a]))
        m = moments_of_sums(moments.batch_sums(drawn, make(drawn)), as_float(bandit.gradient), drawn=True)
        draw.append([m.variance_per_sample, m.variance_of_mean])
    assert_mean_equals(draw, truth, detect=0.12 * np.array(truth))


def exact_moments(outcome: Batch, c: Any, mass: Any, gradient: Any) -> tuple[float, float]:
    """(variance_per_sample, variance_of_mean) over enumerated batches, two passes, exactly."""
    contribution = c[..., None] * outcome.scores.score  # type: ignore[union-attr]
    n = contribution.shape[1]
    estimate = contribution.sum(axis=1) / n
    mean = mass @ estimate
    flat = contribution.reshape(-1, contribution.shape[-1])
    per_sample = moments.trace_covariance(flat, np.repeat(mass, n) / Fraction(n))
    return float(per_sample), float(sum(mass * ((estimate - mean) ** 2).sum(axis=-1)))


@law(
    moments.trace_covariance,
    st.integers(1, 4).flatmap(lambda n: st.tuples(arrays_of(grid(-4, 4, 3), (n, 2)), probability(n))),
    moments,
)
def trace_covariance_is_a_loop(trace_covariance, case):
    """sum_i m_i ||x_i - mean||^2, exactly."""
    x, m = case
    mean = [sum(m[i] * x[i, k] for i in range(len(m))) for k in range(2)]
    assert trace_covariance(x, m) == sum(m[i] * sum((x[i, k] - mean[k]) ** 2 for k in range(2)) for i in range(len(m)))


# ----------------------------------------------------------------------------------------------------- diagnostics

log_weights = st.integers(1, 6).flatmap(extreme_log_ratio).filter(lambda x: np.any(x > -np.inf))


@law(diagnostics.ess, log_weights, diagnostics)
def ess_is_its_definition(ess, x):
    """(sum w)^2 / sum w^2 after the largest weight is divided out, for log-weights of any magnitude."""
    w = [math.exp(v - x.max()) for v in x]
    want = math.fsum(w) ** 2 / math.fsum(v * v for v in w)
    assert_rounding_only(np.asarray(ess(x)), np.asarray(want), ulp=32)


@law(diagnostics.ess, st.tuples(log_weights, st.sampled_from([1e4, -1e4, 700.0, -0.5])), diagnostics)
def ess_ignores_the_scale_of_the_weights(ess, case):
    """ess(log w + k) = ess(log w); up to the rounding of log w + k itself."""
    x, k = case
    shifted = (x + k) - k  # what the shift leaves of the digits
    assert_rounding_only(np.asarray(ess(x + k)), np.asarray(ess(shifted)), ulp=64)


@law(diagnostics.ess, st.tuples(st.integers(1, 5), st.integers(0, 5), st.sampled_from([1e4, -1e4, 0.0])), diagnostics)
def ess_counts_the_equal_heavy_ones(ess, case):
    """k equal weights among weights e^-10000 lighter: exactly k of them count, at most n, at least 1."""
    k, light, level = case
    x = np.array([level] * k + [level - 1e4] * light)
    assert_rounding_only(np.asarray(ess(x)), np.asarray(float(k)), ulp=8)


@law(diagnostics.ess, st.tuples(log_weights, st.integers(0, 5), st.sampled_from([math.nan, math.inf])), diagnostics)
def ess_refuses_what_is_no_weight(ess, case):
    """NaN and +inf raise `InputError`, wherever they stand; never a silent 1 (claim C18)."""
    x, where, bad = case
    x = x.copy()
    x[where % len(x)] = bad
    try:
        value = ess(x)
    except InputError:
        return
    raise AssertionError(f"ess({x}) returned {value} instead of refusing {bad}")


@law(diagnostics.ess_fraction_of_weights, bandits(), diagnostics)
def ess_fraction_is_one_over_one_plus_chi2(ess_fraction_of_weights, bandit):
    """Under the population measure rho = 1 / (1 + chi2(pi || mu)), exactly (claim C3)."""
    chi2 = sum(bandit.target**2 / bandit.behavior) - 1
    got = ess_fraction_of_weights(exact([bandit.ratio]), exact([bandit.behavior]))
    assert list(got) == [1 / (1 + chi2)]


@law(
    diagnostics.WeightSums.merge,
    st.tuples(log_weights, st.lists(st.integers(0, 6), min_size=2, max_size=2)),
    diagnostics,
)
def merged_weight_sums_are_those_of_the_whole(merge, case):
    """Log-weights cut in three parts (some empty) and merged in any order: the ESS and mean of the whole."""
    x, cuts = case
    lo, hi = sorted(min(c, len(x)) for c in cuts)
    a, b, c = (diagnostics.weight_sums(part) for part in (x[:lo], x[lo:hi], x[hi:]))
    want = np.asarray(diagnostics.ess_fraction(x))
    mean = np.asarray(arrays.log_expectation(x, np.full(len(x), 1 / len(x))))
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, b), a)):
        assert_rounding_only(np.asarray(merged.ess_fraction()), want, ulp=64)
        assert_rounding_only(np.asarray(merged.log_mean()), mean, ulp=64, scale=1.0)
        assert merged.count == len(x)


@law(diagnostics.kl_low_variance, st.lists(st.floats(-3, 3), min_size=1, max_size=4).map(np.array), diagnostics)
def kl_low_variance_is_k3(kl, x):
    """E[w - 1 - log w], never negative, 0 on policy."""
    m = np.full(len(x), 1 / len(x))
    want = math.fsum(m[0] * (math.expm1(v) - v) for v in x)
    assert_rounding_only(np.asarray(kl(x, m)), np.asarray(want), ulp=64, scale=1.0)
    assert kl(x, m) >= -1e-16
    assert kl(x * 0, m) == 0


@law(
    diagnostics.max_share_of_weights,
    st.integers(1, 5).flatmap(lambda n: st.tuples(ratio((n,)), probability(n))),
    diagnostics,
)
def max_share_is_the_largest_share(max_share, case):
    """max_i m_i w_i / sum_j m_j w_j, exactly."""
    w, m = case
    mass = [a * b for a, b in zip(w, m, strict=True)]
    assert list(max_share(exact([w]), exact([m]))) == [max(mass) / sum(mass)]


# --------------------------------------------------------------------------------------------------------- control

fractions_of_one = st.one_of(st.floats(2**-40, 1), st.sampled_from([1.0, 0.25]))


@law(control.step_scale, st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.5, 1.5, 1e300]), control)
def a_brake_fails_closed(step_scale, bad):
    """Whatever is not a fraction in (0, 1] gives a step of zero, whatever stands beside it (claim C18)."""
    assert float(np.asarray(step_scale(np.array([bad, 1.0])))[0]) == 0.0
    assert float(np.asarray(step_scale(np.array([bad]), reference=0.5, exponent=1.0))[0]) == 0.0
    assert float(np.asarray(step_scale(np.array([bad]), exponent=0.0))[0]) == 0.0


@law(
    control.step_scale,
    st.tuples(fractions_of_one, st.sampled_from([0.1, 0.55, 1.0]), st.sampled_from([0.0, 0.5, 1.0, 2.0])),
    control,
)
def step_scale_is_a_clipped_power(step_scale, case):
    """min(1, rho / reference)^exponent: 1 at and above the reference, the power law below."""
    rho, reference, exponent = case
    got = float(np.asarray(step_scale(np.array([rho]), reference=reference, exponent=exponent))[0])
    want = 1.0 if rho >= reference else (rho / reference) ** exponent
    assert_rounding_only(np.asarray(got), np.asarray(want), ulp=8)
    assert 0 < got <= 1


@law(control.step_scale, st.tuples(fractions_of_one, fractions_of_one, st.sampled_from([0.3, 1.0])), control)
def step_scale_is_monotone(step_scale, case):
    """More effective samples, never a smaller step; a larger exponent, never a larger one."""
    low, high = sorted(case[:2])
    a, b = np.asarray(step_scale(np.array([low, high]), reference=case[2]))
    assert a <= b
    assert np.asarray(step_scale(np.array([low]), reference=case[2], exponent=1.0))[0] <= a
