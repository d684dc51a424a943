"""Any function of a batch has exact moments: those of all K^N batches written out, one at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.kit.statistical import assert_near
from vcposim.arrays import Array
from vcposim.batch import Batch, DenseScores
from vcposim.catalogue import CATALOGUE, entry
from vcposim.comparison.design import problem as strings
from vcposim.errors import InputError
from vcposim.estimators import PER_TOKEN, Estimator, FunctionEstimator, estimator_of
from vcposim.laboratory import exact, monte_carlo
from vcposim.laboratory.standard_problems import standard_problem
from vcposim.laboratory.strangers import part
from vcposim.learning.lags import Lag
from vcposim.learning.learner import Learner
from vcposim.learning.run_records import Run
from vcposim.learning.tasks import task
from vcposim.problems.rollouts import (
    PROBLEM_MEMBERS,
    Problem,
    bandit_problem,
    contextual_bandit_problem,
    require_problem,
)
from vcposim.surrogates import Clip, Product, QuadraticPull
from vcposim.weights import Weight, Weighting

Function = Callable[[Batch], Array]


def soft(batch: Batch) -> Array:
    """As a newcomer writes it: means over samples as they come, no measure."""
    w = np.exp(batch.log_ratio)
    return w / (1 + w) * (batch.reward - batch.reward.mean(axis=-1, keepdims=True))


def first_is_baseline(batch: Batch) -> Array:
    """Looks at the order of samples."""
    return np.minimum(np.exp(batch.log_ratio), 2) * (batch.reward - batch.reward[..., :1])


def by_norm(batch: Batch) -> Array:
    """Reads scores and lengths."""
    a = batch.scored().sq_norm(np.exp(batch.log_ratio)) / batch.token_length()
    return batch.reward - (a * batch.reward).sum(axis=-1, keepdims=True) / a.sum(axis=-1, keepdims=True)


def token_clip(batch: Batch) -> Array:
    """One a token."""
    r = np.exp(batch.log_ratio)
    advantage = batch.reward - np.median(batch.reward, axis=-1, keepdims=True)
    return np.clip(r, 0.8, 1.5) * advantage[..., None] * batch.token_mask


token_clip.needs = ("tokens",)  # type: ignore[attr-defined]


class Halved(Estimator):
    """Overrides what makes an estimator."""

    def coefficients(self, batch: Batch) -> Array:
        c = super().coefficients(batch)
        return np.where(batch.reward > batch.reward.mean(axis=-1, keepdims=True), c, c / 2)


class Medians(Estimator):
    """Overrides a part."""

    def _baseline(self, batch: Batch, weight: Weight) -> Array:
        return np.median(batch.reward, axis=-1, keepdims=True)


class Ranks(Weighting):
    """A weighting of one's own: ratios by rank."""

    def __call__(self, batch: Batch) -> Weight:
        rank = 1.0 + np.argsort(np.argsort(batch.log_ratio, axis=-1), axis=-1)
        return Weight(rank, rank)


@dataclass(frozen=True)
class Unweighted:
    """A surrogate that averages samples as they come."""

    needs = ()

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        w = np.exp(batch.log_ratio)
        return np.where(w > w.mean(axis=-1, keepdims=True), 1.0, w)


class Pulled(QuadraticPull):
    """Overrides what is added alone, by a mean over samples as they come; `__call__` is ours."""

    def penalty(self, batch: Batch, advantage: Array) -> Array:
        return 0.1 * (batch.log_ratio.mean(axis=-1, keepdims=True) - batch.log_ratio)


def over_everything(batch: Batch) -> Array:
    """Forgets that there may be several groups."""
    return np.exp(batch.log_ratio) * (batch.reward - batch.reward.mean()) / (1 + batch.reward.std())


def one_batch_alone(batch: Batch) -> Array:
    """Can do no more than one, as a loop over its samples; reads scores."""
    norm = batch.scored().sq_norm(np.ones(batch.reward.shape[-1]))
    best = max(float(r) for r in batch.reward)
    return np.array([r / n if r == best else -0.1 for r, n in zip(batch.reward, norm, strict=True)])


def by_std(batch: Batch) -> Array:
    """0/0 where rewards agree."""
    return (batch.reward - batch.reward.mean(-1, keepdims=True)) / batch.reward.std(-1, keepdims=True)


def centers_in_place(batch: Batch) -> Array:
    """Changes what it is shown."""
    centered = batch.reward
    centered += np.abs(batch.log_ratio)
    return centered


class Counting:
    """Remembers."""

    calls = 0

    def __call__(self, batch: Batch) -> Array:
        self.calls += 1
        return batch.reward * self.calls


class Needy(Estimator):
    """Its class alone is no estimator."""

    def __init__(self, of: float) -> None:
        super().__init__(baseline=of)


THEIRS: dict[str, Any] = {
    "over everything": over_everything,
    "one batch alone": one_batch_alone,
    "changes what it is shown": centers_in_place,
    "a class": Halved,
    "a function": soft,
    "of the order": first_is_baseline,
    "of norms and lengths": by_norm,
    "subclass, coefficients": Halved(baseline="opob"),
    "subclass, baseline": Medians(Weighting("truncate", cap=2.0)),
    "weighting": Estimator(Ranks(), "group_mean"),
    "surrogate": Estimator(Weighting("none"), "group_mean", surrogate=Unweighted()),
    "product with a surrogate": Estimator(Weighting("none"), surrogate=Product((Clip(level="sequence"), Unweighted()))),
    "product in a product": Estimator(
        Weighting("none"), "group_mean", surrogate=Product((Product((Unweighted(),)), Clip(level="sequence")))
    ),
    "penalty of one's own": Estimator(Weighting("none"), "group_mean", surrogate=Pulled(level="sequence")),
}


def subclass(own: Callable[[Estimator, Batch], object], **fields: object) -> Estimator:
    """An instance of a subclass of theirs, `Theirs`, with coefficients of its own."""
    return type("Theirs", (Estimator,), {"coefficients": own, **fields})()  # type: ignore[no-any-return]


class Broken:
    """A surrogate of theirs."""

    needs: frozenset[str] = frozenset()

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        raise ValueError("no budget")


def bandit(seed: int, k: int) -> Problem:
    rng = np.random.default_rng(seed)
    target, behavior = rng.dirichlet(np.ones(k), size=2)
    return bandit_problem(target, behavior, rng.normal(size=k), rng.integers(1, 6, k).astype(float))


def written_out(problem: Problem, function: Function, n: int) -> tuple[Array, float, float]:
    """Mean, variance of a contribution and of a group's mean, over all batches of draws of all contexts."""
    known = problem.outcomes()
    mean, square, one = 0.0, 0.0, 0.0
    for g, rho in enumerate(problem.group_probability):
        k = known.reward.shape[-1]
        score = problem.restricted(g, np.arange(k)).combine(np.eye(k))
        for chosen in product(range(k), repeat=n):
            at = (g, list(chosen))
            batch = Batch(
                reward=known.reward[at][None],
                log_ratio=known.log_ratio[at][None],
                length=known.token_length()[at][None],
                scores=DenseScores(score[list(chosen)][None]),
            )
            x = function(batch)[0][:, None] * score[list(chosen)]
            p = rho * known.measure[at].prod()
            mean = mean + p * x.mean(0)
            square, one = square + p * (x.mean(0) ** 2).sum(), one + p * (x**2).sum(-1).mean()
    size = float((np.asarray(mean) ** 2).sum())
    return np.asarray(mean), float(one) - size, float(square) - size


def assert_same(found: Any, want: tuple[Array, float, float]) -> None:
    assert_near(found.mean, want[0])
    assert_near(found.variance_per_sample, want[1])
    assert_near(found.variance_of_mean, want[2])


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize(("seed", "k", "n"), [(0, 2, 1), (1, 3, 3), (2, 4, 4)])
def test_exact_moments_of_anything_equal_all_batches(name: str, seed: int, k: int, n: int) -> None:
    problem, theirs = bandit(seed, k), THEIRS[name]

    def of_one(batch: Batch) -> Array:
        return np.asarray(estimator_of(theirs).coefficients(part(batch, 0)))[None]

    assert_same(exact.moments(problem, theirs, n), written_out(problem, of_one, n))


@pytest.mark.parametrize("name", ["over everything", "one batch alone"])
def test_who_mixes_groups_is_shown_each_alone_by_monte_carlo_too(name: str) -> None:
    """The same draws, shown by hand: a problem whose scores are an array, and one whose scores have no rows."""
    for problem in (bandit(1, 3), standard_problem("stale")):
        theirs, seen = THEIRS[name], []

        def by_hand(batch: Batch, theirs: Any = theirs, seen: Any = seen) -> Array:
            seen.append(batch.reward.shape)
            rows = [part(batch, i) for i in range(len(batch.reward))] if batch.reward.ndim > 1 else [batch]
            return np.stack([theirs(row) for row in rows]).reshape(batch.reward.shape)

        given = {"theirs": theirs, "by hand": by_hand}
        found = monte_carlo.moments(problem, given, group_size=3, samples=600, seed=2)
        for statistic in monte_carlo.STATISTICS:
            assert_near(*(getattr(found[who].moments, statistic) for who in given))
        assert max(shape[0] for shape in seen if len(shape) > 1) > 2


TOKENWISE = (
    "ppo_clip",
    "cispo",
    "token_tis",
    "gmpo",
    "dppo_binary_kl",
    "m2po",
    "gepo",
    "minpro",
    "dispo",
    "otb",
    "kl_cov",
)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_arm_is_a_token_to_who_reads_tokens(seed: int) -> None:
    """All K^N batches by hand, in two contexts, for functions and for ours; of drawn ones, both levels are one."""
    rng = np.random.default_rng(seed)
    target, behavior = rng.dirichlet(np.ones(3), size=(2, 2))
    reward, rho, n = rng.normal(size=(2, 3)), [0.3, 0.7], 3
    problem = contextual_bandit_problem(target, behavior, reward, rho)

    def by_hand(estimator: Any) -> tuple[Array, float, float]:
        mean, square, one = np.zeros(6), 0.0, 0.0
        for g, chosen in product(range(2), product(range(3), repeat=n)):
            at = (g, list(chosen))
            score = np.zeros((n, 2, 3))
            score[:, g] = np.eye(3)[at[1]] - target[g]
            batch = Batch(
                reward=reward[at],
                log_ratio=np.log(target / behavior)[at][:, None],
                token_mask=np.ones((n, 1)),
                log_prob=np.log(target)[at][:, None],
                collision=np.full((n, 1), (target[g] ** 2).sum()),
                scores=DenseScores(score.reshape(n, 1, 6), per_token=True),
            )
            x = np.reshape(estimator_of(estimator).coefficients(batch), (n, 1)) * score.reshape(n, 6)
            p = rho[g] * behavior[at].prod()
            mean, square = mean + p * x.mean(0), square + p * (x.mean(0) ** 2).sum()
            one += p * (x**2).sum(-1).mean()
        size = float((mean**2).sum())
        return mean, float(one) - size, float(square) - size

    theirs = {name: entry(name).estimator for name in TOKENWISE} | {"a function": token_clip}
    for name in ("bapo", "clip_cov"):  # they count tokens one by one, however deep in a product
        ours = entry(name).estimator
        theirs |= {name: ours, f"{name} in products": replace(ours, surrogate=Product((Product((ours.surrogate,)),)))}
    for estimator in theirs.values():
        assert_same(exact.moments(problem, estimator, n), by_hand(estimator))
    one_level = {level: Estimator(Weighting("importance", level), "group_mean") for level in ("token", "sequence")}
    drawn = monte_carlo.moments(problem, one_level, group_size=n, samples=300, seed=seed)
    for statistic in monte_carlo.STATISTICS:
        assert_near(*(getattr(drawn[level].moments, statistic) for level in one_level))


def test_names_and_torch_functions_go_where_functions_go() -> None:
    torch = pytest.importorskip("torch")

    def theirs(batch: Batch) -> Any:
        return torch.sigmoid(batch.log_ratio) * (batch.reward - batch.reward.mean(-1, keepdim=True))

    problem = bandit(4, 3)
    assert_same(exact.moments(problem, theirs, 4), written_out(problem, soft, 4))
    by_name, ours = exact.moments(problem, "vcpo", 3), exact.moments(problem, entry("vcpo").estimator, 3)
    np.testing.assert_array_equal(by_name.mean, ours.mean)
    drawn = monte_carlo.moments(
        problem, {"c": centers_in_place, "t": theirs, "n": soft, "v": "vcpo"}, group_size=4, samples=400, seed=1
    )
    assert_near(drawn["t"].moments.mean, drawn["n"].moments.mean)
    runs = [Run(e, seed=3, lag=Lag(2), step_size=0.1) for e in (theirs, soft)]
    *_, last = Learner(task("contextual_bandit"), runs).updates(5)
    assert_near(last.value[0], last.value[1])


def test_contexts_are_averaged_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    problem = contextual_bandit_problem(
        rng.dirichlet(np.ones(3), 2), rng.dirichlet(np.ones(3), 2), rng.normal(size=(2, 3)), [0.3, 0.7]
    )
    want = written_out(problem, first_is_baseline, 3)
    for chunk in (1, 100, 2**20):
        monkeypatch.setattr("vcposim.laboratory.enumeration.CHUNK", chunk)
        assert_same(exact.moments(problem, first_is_baseline, 3), want)


def test_a_group_of_eight() -> None:
    problem = bandit(5, 3)
    assert_same(exact.moments(problem, soft, 8), written_out(problem, soft, 8))


NOT_HERE = {"grouped", "reference_log_ratio", "anchor_log_ratio"}
"""needs that no problem of one prompt and two policies meets"""


ASKED = {name: one.estimator for name, one in CATALOGUE.items() if not one.estimator.needs & NOT_HERE}


@pytest.mark.parametrize("name", [name for name, e in ASKED.items() if e.weighting.smooth is None])
def test_ours_as_a_function_is_ours(name: str) -> None:
    """What is shown batches as drawn and what is shown counts give one number, for all of the catalogue."""
    ours = entry(name).estimator
    mine = FunctionEstimator(ours.coefficients, ours.needs)
    for where, n in ((strings("strings", 0), 4), (strings("arms", 16), 3), (bandit(11, 3), 4)):
        if where.outcomes().per_token or not ours.needs & PER_TOKEN:
            a, b = exact.moments(where, ours, n), exact.moments(where, mine, n)
            size = max(1.0, float(a.variance_per_sample))
            for statistic in ("mean", "variance_per_sample", "variance_of_mean"):
                assert_near(getattr(b, statistic), getattr(a, statistic), scale=size)


def test_tokens_of_a_chain_equal_all_batches() -> None:
    problem = standard_problem("stale")
    known = problem.outcomes()
    score = problem.restricted(0, np.arange(4)).score  # type: ignore[attr-defined]
    mean, square = 0.0, 0.0
    for chosen in product(range(4), repeat=3):
        at = (0, list(chosen))
        batch = Batch(
            reward=known.reward[at][None],
            log_ratio=known.log_ratio[at][None],
            token_mask=np.ones((1, 3, 2)),
            scores=DenseScores(score[list(chosen)][None], per_token=True),
        )
        x = np.einsum("nt,ntp->np", token_clip(batch)[0], score[list(chosen)])
        p = known.measure[at].prod()
        mean, square = mean + p * x.mean(0), square + p * (x.mean(0) ** 2).sum()
    found = exact.moments(problem, token_clip, 3)
    assert_near(found.mean, mean)
    assert_near(found.variance_of_mean, square - (mean**2).sum())


def test_multisets_are_enough_for_who_promises_and_keeps_it() -> None:
    problem, every = bandit(6, 4), exact.moments(bandit(6, 4), by_norm, 5)
    found = exact.moments(problem, FunctionEstimator(by_norm, exchangeable=True), 5)
    assert_same(found, (every.mean, float(every.variance_per_sample), float(every.variance_of_mean)))
    with pytest.raises(InputError, match="exchangeable: coefficients of first_is_baseline depend on the order"):
        exact.moments(problem, FunctionEstimator(first_is_baseline, exchangeable=True), 3)
    # 12^8 orders are too many, binom(19, 8) multisets are not
    larger = bandit(7, 12)
    with pytest.raises(InputError, match=r"need all 4.3e\+08 batches of 8 out of 12 outcomes .*monte_carlo.moments"):
        exact.moments(larger, soft, 8)
    assert np.isfinite(exact.moments(larger, FunctionEstimator(soft, exchangeable=True), 8).mse)


def ends_are_baseline(batch: Batch) -> Array:
    """Minds the order of samples, and not that they come backwards."""
    return batch.reward - (batch.reward[..., :1] + batch.reward[..., -1:]) / 2


def of_all_rows(batch: Batch) -> Array:
    """Right of one group alone, and of none beside another."""
    return batch.reward - batch.reward.mean()


def second_is_special(batch: Batch) -> Array:
    """Minds what few orders show: which of the two largest rewards comes last."""
    first_two = np.sort(batch.reward, axis=-1)[..., -2:]
    return batch.reward + 1.0 * (batch.reward[..., -1:] == first_two[..., :1])


@pytest.mark.parametrize("function", [soft, by_norm, token_clip, of_all_rows])
def test_who_does_not_mind_the_order_is_known_by_all_orders(function: Function) -> None:
    problem = standard_problem("stale") if function is token_clip else bandit(6, 3)
    assert exact.exchangeable(problem, function, 4)
    every, few = exact.moments(problem, function, 4), exact.moments(problem, function, 4, any_order=True)
    assert_same(few, (every.mean, float(every.variance_per_sample), float(every.variance_of_mean)))


@pytest.mark.parametrize("function", [first_is_baseline, ends_are_baseline, second_is_special])
def test_who_minds_the_order_is_known_too_and_held_to_a_promise(function: Function) -> None:
    assert not exact.exchangeable(bandit(6, 3), function, 4)
    with pytest.raises(InputError, match="depend on the order of samples"):
        exact.moments(bandit(6, 3), function, 4, any_order=True)
    assert exact.exchangeable(bandit(6, 3), "rloo", 4)
    with pytest.raises(InputError, match="method: exact moments of a function need all"):
        exact.exchangeable(bandit(7, 12), function, 8)


def test_monte_carlo_and_the_learner_take_functions_and_draw_as_for_ours() -> None:
    problem, rloo = bandit(8, 4), entry("rloo").estimator
    found = monte_carlo.moments(
        problem, {"ours": rloo, "theirs": rloo.coefficients}, group_size=4, samples=4000, seed=1
    )
    for name in monte_carlo.STATISTICS:
        a, b = (getattr(found[who].moments, name) for who in ("ours", "theirs"))
        np.testing.assert_array_equal(a, b)
    runs = [Run(e, seed=3, lag=Lag(2), step_size=0.1) for e in ("rloo", rloo.coefficients)]
    learner = Learner(task("contextual_bandit"), runs)
    *_, last = learner.updates(5)
    assert last.value[0] == last.value[1] != 0


def test_an_oracle_is_given_to_who_needs_it() -> None:
    problem = bandit(9, 3)

    def oracle(batch: Batch) -> Array:
        return np.exp(batch.log_ratio) * (batch.reward - batch.population_baseline)

    oracle.needs = "population_baseline"  # type: ignore[attr-defined]
    ours = exact.moments(problem, Estimator(baseline="population"), 3)
    assert_same(
        exact.moments(problem, oracle, 3), (ours.mean, float(ours.variance_per_sample), float(ours.variance_of_mean))
    )


def test_a_subclass_that_changes_nothing_is_what_it_was() -> None:
    class Named(Estimator):
        pass

    problem, ours = bandit(10, 3), entry("vcpo").estimator
    named = Named(ours.weighting, ours.baseline)
    a, b = exact.moments(problem, ours, 4), exact.moments(problem, named, 4)
    assert_same(b, (a.mean, float(a.variance_per_sample), float(a.variance_of_mean)))
    halved = exact.moments(problem, Halved(ours.weighting, ours.baseline), 4)
    assert float(halved.variance_of_mean) < 0.8 * float(a.variance_of_mean)


def test_all_of_the_catalogue_is_ours() -> None:
    """So that none of it pays K^N by accident."""
    assert all(exact.reads_counts(e.estimator) for e in CATALOGUE.values() if e.estimator.weighting.smooth is None)


class Partial:
    """A problem that only knows two things."""

    value = 1.0

    def outcomes(self) -> Batch:
        raise AssertionError("asked before it was refused")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exact.moments(bandit(0, 3), 3, 3), "estimator: 3 is no Estimator and no function"),  # type: ignore[arg-type]
        (lambda: exact.moments(bandit(0, 3), "vcpoo", 3), "estimator: unknown name 'vcpoo'; did you mean 'vcpo'"),
        (lambda: exact.moments(bandit(0, 3), Needy, 3), r"estimator: Needy\(\) raises TypeError: .* pass an instance"),
        (lambda: exact.moments(bandit(0, 3), lambda b: [1.0] * 3, 3), "<lambda> returned a list; return an array like"),
        (lambda: exact.moments(bandit(0, 3), lambda b: b.reward + 1j, 3), "coefficients of dtype complex128; return"),
        (lambda: exact.moments(bandit(0, 3), lambda b: b.reward.astype(str), 3), "coefficients of dtype <U32; return"),
        (lambda: exact.moments(bandit(0, 3), lambda b: b.reward.astype(object), 3), "coefficients of dtype object; r"),
        (lambda: exact.moments(bandit(0, 3), lambda b: b.reward.astype("f2"), 3), "dtype float16; return real numbers"),
        (
            lambda: exact.moments(bandit(0, 3), by_std, 2),
            r"by_std returns a coefficient that is no number, as for rewards \[.*\] with log-ratios \[.*\]; say what",
        ),
        (
            lambda: monte_carlo.moments(bandit(0, 3), {"a": by_std}, group_size=2, samples=64, seed=0),
            "by_std returns a coefficient that is no number",
        ),
        (
            lambda: exact.moments(bandit(0, 3), subclass(lambda self, b: b.rewards), 3),
            r"estimator: Theirs raises AttributeError: .* \(line \d+ of test_any_estimator\.py\), on rewards of shape",
        ),
        (
            lambda: monte_carlo.moments(
                bandit(0, 3), {"a": subclass(lambda self, b: b.reward.tolist())}, group_size=2, samples=8, seed=0
            ),
            "estimator: Theirs returned a list; return an array like batch.reward",
        ),
        (
            lambda: subclass(lambda self, b: b.reward.sum()).coefficients(bandit(0, 3).outcomes()),
            r"estimator: Theirs returned coefficients of shape \(\) for rewards \(1, 3\)",
        ),
        (
            lambda: subclass(lambda self, b: exit(0)).coefficients(bandit(0, 3).outcomes()),
            "estimator: Theirs raises SystemExit: 0",
        ),
        (
            lambda: exact.moments(bandit(0, 3), Estimator(surrogate=Broken()), 3),
            "estimator: Estimator raises ValueError: no budget",
        ),
        (
            lambda: exact.moments(bandit(0, 3), lambda b: b.reward * 1e308, 3),
            "estimator: <lambda> returns coefficients too large to be squared",
        ),
        (lambda: exact.moments(bandit(0, 3), Counting(), 3), "Counting gives two answers to one batch: it keeps"),
        (
            lambda: exact.moments(bandit(0, 3), lambda b: b.rewards, 3),
            r"raises AttributeError: .* \(line \d+ of test_any",
        ),
        (
            lambda: exact.moments(bandit(0, 3), lambda b: b.reward[..., :1], 3),
            r"estimator: <lambda> returned coefficients of shape \(1,\) for rewards \(3,\)",
        ),
        (lambda: exact.moments(bandit(0, 3), lambda b: 1.0, 3), "<lambda> returned a float; return an array like"),
        (lambda: exact.moments(bandit(0, 3), token_clip, 3), "tokens: this needs log-ratios of shape"),
        (lambda: FunctionEstimator(soft, frozenset({"token"})), "needs: unknown name 'token'; did you mean 'tokens'"),
        (
            lambda: exact.moments(bandit(0, 3), FunctionEstimator(soft, frozenset({"reference_log_ratio"})), 3),
            "reference_log_ratio: this needs the reference policy",
        ),
        (
            lambda: exact.moments(bandit(0, 3), FunctionEstimator(soft, frozenset({"grouped"})), 3),
            "estimator: soft looks at several prompts at once",
        ),
        (lambda: exact.moments(bandit(0, 3), soft, 0), "group_size: 0 is not positive"),
        (lambda: exact.moments(Partial(), soft, 3), "problem: Partial has no gradient, group_probability, .* draw"),
        (lambda: exact.diagnostics(Partial()), "problem: Partial has no gradient"),
        (
            lambda: monte_carlo.moments(Partial(), {"a": soft}, group_size=2, samples=8, seed=0),
            "problem: Partial has no gradient",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_every_member_of_the_protocol_is_documented_and_asked_for() -> None:
    for problem in (bandit(0, 2), standard_problem("stale")):
        require_problem(problem)
    assert {"gradient", "outcomes", "listable", "contribution_moments"} <= set(PROBLEM_MEMBERS)
    for name in PROBLEM_MEMBERS:
        assert len(getattr(Problem, name).__doc__ or "") > 20
        lacking = type("Lacking", (), {member: 0.0 for member in PROBLEM_MEMBERS if member != name})
        with pytest.raises(InputError, match=f"problem: Lacking has no {name};"):
            require_problem(lacking())
