"""Moments without sampling error.

Three ways, chosen by what the estimator looks at:

*One sample at a time.* If the weight is a function of the sample and the baseline a constant, the contributions of a
group are independent and identically distributed: their mean and second moment are two sums over outcomes, and
variance_of_mean = variance_per_sample / N within a context. A million arms take about a second.

*Count vectors.* In-batch baselines, self-normalized weights and a group's standard deviation see the whole group. All
they see of it is how often each outcome occurred, so the expectation runs over the compositions of N into K counts with
their multinomial probability: binom(N+K-1, K-1) terms instead of K^N. Each is one batch of the kernel, with measure
counts / N and unit 1 / N.

*Chains.* Trajectories are never enumerated unless few: see `vcposim.laboratory.chain_moments`.

Where none of these is feasible the error says how many terms it would take and how to ask for Monte Carlo.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import comb, log10

import numpy as np
from scipy.special import gammaln, xlogy

from vcposim.arrays import Array, expectation
from vcposim.batch import Batch
from vcposim.diagnostics import chi2_of_weights, kl_behavior_target
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.laboratory import chain_moments
from vcposim.moments import Moments, Sums, batch_sums, sq_norm
from vcposim.moments import moments as moments_of_sums
from vcposim.problems.chains import LARGEST_ENUMERATION as LARGEST_LIST
from vcposim.problems.chains import ChainProblem
from vcposim.problems.rollouts import Problem
from vcposim.weights import Weighting

CONSTANT_BASELINES = frozenset({"zero", "population"})
SAMPLE_TREATMENTS = frozenset({"none", "importance", "truncate", "clip", "mask"})
SAMPLE_NORMALIZERS = frozenset({"none", "length"})
PER_TOKEN = ("log_prob", "collision", "token_mask")

LARGEST_ENUMERATION = 2 * 10**8
"""numbers in all count vectors together; about a minute"""

CHUNK = 2**20
"""numbers in the count vectors of one chunk; bounds memory"""


def moments(problem: Problem, estimator: Estimator, group_size: int) -> Moments:
    """Exact moments of an estimator on groups of `group_size` samples.

    The context of a group is random too: variances are over contexts and samples.

    Raises `InputError` if there is no exact form or it is infeasible; the message says what to call instead.
    """
    estimator.require(group_size)
    if estimator.weighting.smooth is not None:
        raise InputError(f"weighting: a smoothed weight has no exact moments; {monte_carlo_call(group_size)}")
    _require_ours(estimator)
    if isinstance(problem, ChainProblem) and sees_one_sample(estimator) and chain_moments.covers(problem, estimator):
        baseline = constant_baseline(problem, estimator)
        mean, square = chain_moments.contribution_moments(problem, estimator, baseline)
        sums = independent_sums(mean, square, problem.group_probability, group_size)
    elif sees_one_sample(estimator):
        _require_listable(problem, group_size)
        sums = single_sample_sums(problem, estimator, group_size)
    else:
        sums = enumerated_sums(problem, estimator, group_size)
    return moments_of_sums(sums, problem.gradient, drawn=False)


def sees_one_sample(estimator: Estimator) -> bool:
    """Whether the coefficient of a sample is a function of that sample alone."""
    constant = not isinstance(estimator.baseline, str) or estimator.baseline in CONSTANT_BASELINES
    per_sample = estimator.weighting.treatment in SAMPLE_TREATMENTS and estimator.normalizer in SAMPLE_NORMALIZERS
    plain = estimator.surrogate is None and not estimator.reference_penalty
    return constant and per_sample and plain and estimator.weighting.smooth is None


def constant_baseline(problem: Problem, estimator: Estimator) -> Array:
    """The baseline of an estimator whose baseline is a constant of the prompt: (G,)."""
    zero = np.zeros(problem.group_probability.shape[0])
    if not isinstance(estimator.baseline, str):
        return zero + estimator.baseline + estimator.baseline_shift
    known = population_baseline(problem, estimator.weighting) if estimator.baseline == "population" else zero
    return known + estimator.baseline_shift


def diagnostics(problem: Problem) -> dict[str, float]:
    """Population values: `ess_fraction` = 1 / (1 + chi2), `chi2` = chi2(pi||mu), `kl` = KL(mu||pi) in nats.

    Of a contextual problem, E[w]^2 / E[w^2] and the averages over contexts.
    """
    if isinstance(problem, ChainProblem):
        return chain_moments.diagnostics(problem)
    batch = problem.outcomes()
    weight = Weighting("importance")(batch).value
    rho = problem.group_probability
    mean, square = rho @ expectation(weight, batch.measure), rho @ expectation(weight * weight, batch.measure)
    return {
        "ess_fraction": float(mean * mean / square),
        "chi2": float(rho @ chi2_of_weights(weight, batch.measure)),
        "kl": float(rho @ kl_behavior_target(batch.log_ratio, batch.measure)),
    }


def population_baseline(problem: Problem, weighting: Weighting) -> Array:
    """The oracle OPOB E[w^2 n^2 R] / E[w^2 n^2] of each context, w being the weighting's weights: (G,).

    Smoothing is a rule for samples, not for populations: smoothed weights get the oracle of the untouched ones.
    """
    if weighting.smooth is not None:
        weighting = replace(weighting, treatment="importance", smooth=None)
    if isinstance(problem, ChainProblem) and chain_moments.factors(problem, weighting) is not None:
        return chain_moments.population_baseline(problem, weighting)
    return Estimator(weighting, "opob").baseline_value(problem.outcomes())[..., 0]


def with_population(batch: Batch, problem: Problem, estimator: Estimator) -> Batch:
    """The batch of all groups (G, n), knowing its population baseline if the estimator asks for it."""
    if estimator.baseline != "population":
        return batch
    return replace(batch, population_baseline=population_baseline(problem, estimator.weighting)[:, None])


def single_sample_sums(problem: Problem, estimator: Estimator, group_size: int) -> Sums:
    """Sums over one group of N independent contributions x: E||mean||^2 = ||E x||^2 + (E||x||^2 - ||E x||^2) / N."""
    batch = with_population(problem.outcomes(), problem, estimator)
    coefficient = estimator.coefficients(batch)
    measure = batch.measure if coefficient.ndim == batch.reward.ndim else batch.measure[..., None]
    mean = batch.scored().combine(coefficient * measure)
    square = expectation(batch.scored().sq_norm(coefficient), batch.measure)
    return independent_sums(mean, square, problem.group_probability, group_size)


def independent_sums(mean: Array, square: Array, group_probability: Array, group_size: int) -> Sums:
    """The sums of groups of independent contributions with E x = `mean` (G, p) and E||x||^2 = `square` (G,)."""
    signal = sq_norm(mean)
    return Sums(
        mass=np.sum(group_probability),
        estimate=group_probability @ mean,
        estimate_sq_norm=group_probability @ (signal + (square - signal) / group_size),
        contribution_sq_norm=group_probability @ square,
    )


def enumerated_sums(problem: Problem, estimator: Estimator, group_size: int) -> Sums:
    """Sums over all count vectors of all contexts, with their probability."""
    _require_listable(problem, group_size)
    _require_feasible(problem, problem.outcome_count, estimator, group_size)
    population = with_population(problem.outcomes(), problem, estimator)
    total: Sums | None = None
    for group, rho in enumerate(problem.group_probability):
        support = np.flatnonzero(population.measure[group])
        if rho == 0:
            continue
        _require_feasible(problem, support.size, estimator, group_size)
        for counts in count_vectors(group_size, support.size, max(1, CHUNK // support.size)):
            mass = rho * multinomial(counts, population.measure[group, support])
            batch = counted_batch(problem, population, group, support, counts)
            part = batch_sums(batch, estimator.coefficients(batch), mass)
            total = part if total is None else total.merge(part)
    assert total is not None  # probabilities sum to one, so some group has one
    return total


def counted_batch(problem: Problem, population: Batch, group: int, support: Array, counts: Array) -> Batch:
    """The groups in which outcome support[j] occurs counts[m, j] times: axes (m, n)."""

    def at(x: Array) -> Array:
        values = x[group, support]
        return np.broadcast_to(values, (counts.shape[0], *values.shape))

    size = int(counts[0].sum())
    known = population.population_baseline
    return Batch(
        reward=at(population.reward),
        log_ratio=at(population.log_ratio),
        scores=problem.restricted(group, support),
        length=at(population.token_length()),
        measure=counts / size,
        unit=1 / size,
        population_baseline=None if known is None else known[group],
        **{name: at(getattr(population, name)) for name in PER_TOKEN if getattr(population, name) is not None},
    )


def count_vectors(total: int, parts: int, chunk: int) -> Iterator[Array]:
    """All compositions of `total` into `parts` counts, in lexicographic order, in chunks (<= chunk, parts)."""
    # tails[q][n] = number of compositions of n into q + 1 parts
    tails = [np.array([comb(n + q, q) for n in range(total + 1)], dtype=np.int64) for q in range(parts)]
    count = int(tails[-1][total])
    for start in range(0, count, chunk):
        rank = np.arange(start, min(start + chunk, count), dtype=np.int64)
        left = np.full(rank.shape, total)
        out = np.empty((rank.size, parts), dtype=np.int64)
        for part in range(parts - 1):
            tail = tails[parts - 1 - part]
            # after c in this part, tail[left] - tail[left - c] compositions are behind us
            after = np.searchsorted(tail, tail[left] - rank, side="left")
            out[:, part] = left - after
            rank, left = rank - (tail[left] - tail[after]), after
        out[:, -1] = left
        yield out


def multinomial(counts: Array, prob: Array) -> Array:
    """N! prod_k p_k^n_k / n_k!: (m, K), (K,) -> (m,)."""
    size = np.sum(counts, axis=-1)
    return np.exp(gammaln(size + 1) + np.sum(xlogy(counts, prob) - gammaln(counts + 1), axis=-1))


def _require_ours(estimator: Estimator) -> None:
    if "grouped" in estimator.needs:
        raise InputError(
            f"baseline: {estimator.baseline!r} with normalizer {estimator.normalizer!r} looks at several prompts at "
            "once; moments here are of one group, so choose another"
        )


def _require_listable(problem: Problem, group_size: int) -> None:
    if isinstance(problem, ChainProblem) and problem.outcome_count > LARGEST_LIST:
        raise InputError(
            f"method: exact moments with this weighting need all {rounded(problem.outcome_count)} trajectories "
            f"(limit {LARGEST_LIST}); {monte_carlo_call(group_size)}"
        )


def _require_feasible(problem: Problem, outcomes: int, estimator: Estimator, group_size: int) -> None:
    batches = comb(group_size + outcomes - 1, group_size)
    if batches * outcomes * problem.group_probability.shape[0] > LARGEST_ENUMERATION:
        why = estimator.baseline if not sees_one_sample(replace(estimator, weighting=Weighting())) else "its weighting"
        raise InputError(
            f"method: exact moments with {why} need {rounded(batches)} count vectors over {outcomes} outcomes "
            f"for each group; {monte_carlo_call(group_size)}"
        )


def rounded(count: int) -> str:
    """A count of any size in a few characters: 54, 1.2e+24, 10^5021."""
    return f"{count:.3g}" if count < 10**300 else f"10^{log10(count):.0f}"


def monte_carlo_call(group_size: int, samples: int = 100_000) -> str:
    """The remedy in words: which call, which flags."""
    return (
        f"use --method monte-carlo --samples {samples} --seed 0, or monte_carlo.moments(problem, estimators, "
        f"group_size={group_size}, samples={samples}, seed=0)"
    )
