"""Moments without sampling error.

Three ways, chosen by what the estimator looks at:

*One sample at a time.* If the weight is a function of the sample and the baseline a constant, the contributions of a
group are independent and identically distributed: their mean and second moment are two sums over outcomes, and
variance_of_mean = variance_per_sample / N within a context. A million arms take about a second.

*Count vectors.* In-batch baselines, self-normalized weights and a group's standard deviation see the whole group. All
they see of it is how often each outcome occurred, so the expectation runs over the compositions of N into K counts with
their multinomial probability: binom(N+K-1, K-1) terms instead of K^N. Each is one batch of the kernel, with measure
counts / N and unit 1 / N.

*What the problem knows.* Some problems have sums that list no outcomes (`Problem.contribution_moments`): token chains
sum over positions and states, see `vcposim.problems.chain_moments`.

*Every batch.* Of a function that is not ours nothing is known: it is shown each of the K^N ordered batches as drawn
(`vcposim.laboratory.enumeration`), or each multiset if it says it is `exchangeable`. A subclass of `Estimator`, and a
surrogate or a weighting from elsewhere, are such functions too. Of ours, those that count tokens or responses one by
one are shown each multiset.

Where none of these is feasible the error says how many terms it would take and how to ask for Monte Carlo.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import comb, log10

import numpy as np

from vcposim.arrays import Array, expectation
from vcposim.baselines import baseline
from vcposim.batch import Batch, DenseScores
from vcposim.catalogue.loading import on_numpy
from vcposim.diagnostics import chi2_of_weights, kl_behavior_target
from vcposim.errors import InputError
from vcposim.estimators import NORMALIZERS, AnyEstimator, Estimator, FunctionEstimator, Resolved
from vcposim.estimators import PER_TOKEN as TOKENS
from vcposim.laboratory import enumeration
from vcposim.laboratory.enumeration import CHUNK, count_vectors, multinomial
from vcposim.laboratory.strangers import Asked
from vcposim.moments import Moments, Sums, batch_sums, sq_norm
from vcposim.moments import moments as moments_of_sums
from vcposim.problems.bandits import by_token
from vcposim.problems.rollouts import Problem, require_problem
from vcposim.weights import Weighting

PER_TOKEN = ("log_prob", "collision", "token_mask")

LARGEST_ENUMERATION = 2 * 10**8
"""numbers in all batches together; about a minute"""


def moments(
    problem: Problem, estimator: str | AnyEstimator, group_size: int, *, any_order: bool | None = None
) -> Moments:
    """Exact moments of an estimator, its name, or any function of a `Batch`, on groups of `group_size` samples.

    The context of a group is random too: variances are over contexts and samples. What a function may say of itself:
    see `vcposim.estimators.FunctionEstimator`. `any_order` promises that the order of samples does not matter, as
    `exchangeable` on the function does (default: what that says): the same moments from multisets of outcomes alone.

    Raises `InputError` if there is no exact form or it is infeasible; the message says what to call instead.

    >>> from vcposim.problems.rollouts import bandit_problem
    >>> problem = bandit_problem([0.5, 0.5], [0.25, 0.75], [1.0, 0.0])
    >>> moments(problem, lambda batch: batch.reward - batch.reward.mean(axis=-1, keepdims=True), 2).mean
    array([ 0.09375, -0.09375])
    """
    problem, estimator = _looked_up(problem, estimator, group_size)
    if isinstance(estimator, FunctionEstimator) or not reads_counts(estimator) or counts_heads(estimator):
        ordered = not (takes_any_order(estimator) if any_order is None else any_order)
        sums = shown_sums(problem, estimator, group_size, ordered=ordered)
        return moments_of_sums(sums, problem.gradient, drawn=False)
    if estimator.weighting.smooth is not None:
        raise InputError(f"weighting: a smoothed weight has no exact moments; {monte_carlo_call(group_size)}")
    if not sees_one_sample(estimator):
        return moments_of_sums(enumerated_sums(problem, estimator, group_size), problem.gradient, drawn=False)
    known = problem.contribution_moments(estimator, constant_baseline(problem, estimator))
    if known is None:
        _require_listable(problem, group_size)
        sums = single_sample_sums(problem, estimator, group_size)
    else:
        sums = independent_sums(*known, problem.group_probability, group_size)
    return moments_of_sums(sums, problem.gradient, drawn=False)


def exchangeable(problem: Problem, estimator: str | AnyEstimator, group_size: int) -> bool:
    """Whether the order of samples does not matter to an estimator in any batch of this problem: all are tried.

    Each is shown as drawn, with its first two samples exchanged, and turned by one; these two moves make every order.
    Worth its price, that of three sums over all batches, where many problems of one kind are to come: see `any_order`
    of `moments`. One that breaks ties by the place of a sample is said to mind the order, though no moment shows it.

    Raises `InputError` as `moments` does.
    """
    problem, estimator = _looked_up(problem, estimator, group_size)
    if takes_any_order(estimator):
        return True
    asked, place = Asked(estimator), np.arange(group_size)
    swapped = np.concatenate([place[1::-1], place[2:]])
    return all(
        _follow(asked, batch, asked.coefficients(batch), order)
        for batch, _ in _shown(problem, estimator, group_size, ordered=True)
        for order in (swapped, np.roll(place, 1))
    )


def takes_any_order(estimator: Resolved) -> bool:
    """Whether an estimator is known not to mind the order of samples: ours, and functions that say so."""
    return estimator.exchangeable if isinstance(estimator, FunctionEstimator) else reads_counts(estimator)


def _looked_up(problem: Problem, estimator: str | AnyEstimator, group_size: int) -> tuple[Problem, Resolved]:
    """What is to be computed: the problem by tokens if they are read, and an estimator of one group."""
    require_problem(problem)
    estimator = on_numpy(estimator)
    estimator.require(group_size)
    if estimator.needs & TOKENS:
        problem = by_token(problem)
    if "grouped" in estimator.needs:
        if isinstance(estimator, FunctionEstimator):
            what = f"estimator: {estimator.name}"
        else:
            what = f"baseline: {estimator.baseline!r} with normalizer {estimator.normalizer!r}"
        raise InputError(f"{what} looks at several prompts at once; moments here are of one group")
    return problem, estimator


def reads_counts(estimator: Estimator) -> bool:
    """Whether the estimator's formulas are ours, which weigh outcomes by their `measure`: counts can stand for draws.

    Anyone else's may take means over samples as they come, so a subclass is shown batches as drawn, whatever it
    changes; a surrogate is judged by where its formula was written.
    """
    written, factors = True, [estimator.surrogate]
    while factors:
        factor = factors.pop()
        # the class, not its __call__ alone: a subclass may change a part that __call__ reads
        written &= factor is None or type(factor).__module__.partition(".")[0] == "vcposim"
        factors += getattr(factor, "factors", ())
    return written and type(estimator) is Estimator and type(estimator.weighting) is Weighting


def counts_heads(estimator: Estimator) -> bool:
    """Whether it counts tokens or responses one by one, so that no measure of 2/N can stand for two draws."""
    by_baseline = isinstance(estimator.baseline, str) and baseline(estimator.baseline).counts_heads
    return by_baseline or getattr(estimator.surrogate, "counts_heads", False)


def sees_one_sample(estimator: Estimator) -> bool:
    """Whether the coefficient of a sample is a function of that sample alone."""
    constant = not isinstance(estimator.baseline, str) or baseline(estimator.baseline).constant
    per_sample = NORMALIZERS[estimator.normalizer].per_sample and not estimator.weighting.of_group
    return constant and per_sample and estimator.surrogate is None and not estimator.reference_penalty


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
    require_problem(problem)
    known = problem.diagnostics()
    if known is not None:
        return known
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
    known = problem.population_baseline(weighting)
    if known is not None:
        return known
    return Estimator(weighting, "opob").baseline_value(problem.outcomes())[..., 0]


def with_population(batch: Batch, problem: Problem, estimator: Resolved) -> Batch:
    """The batch of all groups (G, n), knowing its population baseline if the estimator asks for it."""
    if "population_baseline" not in estimator.needs:
        return batch
    return replace(batch, population_baseline=oracle(problem, estimator)[:, None])


def oracle(problem: Problem, estimator: Resolved) -> Array:
    """The population baseline under the estimator's weighting; a function's is that of full weights: (G,)."""
    weighting = Weighting() if isinstance(estimator, FunctionEstimator) else estimator.weighting
    return population_baseline(problem, weighting)


def shown_sums(problem: Problem, estimator: Resolved, group_size: int, *, ordered: bool = True) -> Sums:
    """Sums over all batches as drawn, with their probability: right for any function of a batch.

    `ordered=False` shows one order of each multiset, and holds the estimator to it that order does not matter.
    Raises `InputError` where there are too many batches to list.
    """
    asked, total, rng = Asked(estimator), None, np.random.default_rng(0)
    for batch, mass in _shown(problem, estimator, group_size, ordered=ordered):
        coefficient = asked.coefficients(batch)
        if not ordered:
            shuffled = rng.permuted(np.broadcast_to(np.arange(group_size), batch.reward.shape), axis=-1)
            for order in (np.arange(group_size)[::-1], shuffled):
                if not _follow(asked, batch, coefficient, order):
                    raise InputError(
                        f"exchangeable: coefficients of {asked.name} depend on the order of samples; do not promise it"
                    )
        with np.errstate(over="ignore"):
            part = batch_sums(batch, coefficient, mass)
        total = part if total is None else total.merge(part)
    assert total is not None  # probabilities sum to one, so some group has one
    if not np.isfinite(total.contribution_sq_norm):
        raise InputError(f"estimator: {asked.name} returns coefficients too large to be squared; use other units")
    return total


def _shown(problem: Problem, estimator: Resolved, group_size: int, *, ordered: bool) -> Iterator[tuple[Batch, Array]]:
    """Batches (m, n) of every context as drawn, or one order of each multiset, with their probability (m,)."""
    _require_listable(problem, group_size)
    population = with_population(problem.outcomes(), problem, estimator)
    for group, rho in enumerate(problem.group_probability):
        if rho == 0:
            continue
        outcomes = int(np.count_nonzero(population.measure[group]))
        count = enumeration.number_of_batches(outcomes, group_size, ordered)
        if count * group_size * problem.group_probability.shape[0] > LARGEST_ENUMERATION:
            raise InputError(
                f"method: exact moments of a function need all {rounded(count)} batches of {group_size} out of "
                f"{outcomes} outcomes (exchangeable = True on the function: multisets alone); "
                f"{monte_carlo_call(group_size)}"
            )
        per_token = bool(estimator.needs & TOKENS)
        for batch, mass in enumeration.batches(
            problem, population, group, group_size, per_token=per_token, ordered=ordered
        ):
            yield batch, rho * mass


def _follow(asked: Asked, batch: Batch, coefficient: Array, order: Array) -> bool:
    """Whether the samples in another order, (n,) or one a group (m, n), have the same coefficients in that order."""

    def moved(x: Array) -> Array:
        return np.take_along_axis(x, order.reshape(*(1,) * (2 - order.ndim), *order.shape, *(1,) * (x.ndim - 2)), 1)

    scores = batch.scored()
    assert isinstance(scores, DenseScores)
    known = {name: moved(x) for name, x in vars(batch).items() if name in _PER_SAMPLE and x is not None}
    found = asked.coefficients(replace(batch, **known, scores=replace(scores, score=moved(scores.score))))
    size = np.max(np.abs(coefficient), initial=0.0)
    return np.allclose(found, moved(coefficient), rtol=0, atol=1e-9 * size, equal_nan=True)


_PER_SAMPLE = ("reward", "length", "log_ratio", "token_mask", "log_prob", "collision")


def single_sample_sums(problem: Problem, estimator: Estimator, group_size: int) -> Sums:
    """Sums over one group of N independent contributions x: E||mean||^2 = ||E x||^2 + (E||x||^2 - ||E x||^2) / N."""
    batch = with_population(problem.outcomes(), problem, estimator)
    coefficient = estimator.coefficients(batch)
    measure = batch.measure if coefficient.ndim == batch.reward.ndim else batch.measure[..., None]
    mean = batch.scored().combine(coefficient * measure)
    square = expectation(batch.scored().sq_norm(coefficient), batch.measure)
    return independent_sums(mean, square, problem.group_probability, group_size)


def independent_sums(mean: Array, square: Array, group_probability: Array, group_size: int) -> Sums:
    """The sums of groups of independent contributions with means of x and ||x||^2: (G, p), (G,), (G,) -> sums."""
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
    """The groups in which outcome support[j] occurs counts[m, j] times: (j,), (m, j) -> batch."""

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


def _require_listable(problem: Problem, group_size: int) -> None:
    if not problem.listable:
        raise InputError(
            f"method: exact moments of this estimator need to list all {rounded(problem.outcome_count)} trajectories, "
            f"too many; {monte_carlo_call(group_size)}"
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
