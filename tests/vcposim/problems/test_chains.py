"""Token-chain problems: dynamic programming against enumeration, fast scores against dense ones, draws against both."""

from typing import Any

import numpy as np
import pytest

from tests.kit import slow_exact
from tests.kit.statistical import assert_mean_equals, assert_near, near
from tests.vcposim.laboratory.test_monte_carlo import check
from vcposim.batch import Batch, DenseScores
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.laboratory import exact, monte_carlo
from vcposim.moments import batch_sums
from vcposim.moments import moments as moments_of_sums
from vcposim.problems.chains import ChainProblem, chain_problem
from vcposim.problems.policies import Policy, TabularSoftmax, drifted, random_linear, random_tabular
from vcposim.problems.rollouts import bandit_problem
from vcposim.problems.token_chains import TokenChain, modular_sum, with_end
from vcposim.weights import Weighting


def problem(*, linear: bool, ends: bool, seed: int = 0, paths: int = 2) -> ChainProblem:
    rng = np.random.default_rng(seed)
    chain = modular_sum(3, 3, 4, 1, prompts=(0, 2))
    if ends:
        chain = with_end(chain, unfinished=0.25)
    policy: Policy = random_linear(rng, chain.shape, 5) if linear else random_tabular(rng, chain.shape)
    behaviors = [drifted(policy, rng, 0.4) for _ in range(paths)]
    # one path that changes its version at the second token
    tables = [np.concatenate([behaviors[0].log_prob[:1], behaviors[-1].log_prob[1:]]), behaviors[-1].log_prob][:paths]
    return chain_problem(chain, policy, tables, [0.3, 0.7][:paths] if paths > 1 else None)


KINDS = [(linear, ends) for linear in (False, True) for ends in (False, True)]
IDS = ["tabular", "tabular, ends", "linear", "linear, ends"]
WEIGHTINGS = [
    Weighting("none"),
    Weighting("importance"),
    Weighting("importance", "token"),
    Weighting("truncate", "token", cap=1.1),
    Weighting("mask", "token", cap=1.1),
    Weighting("clip", "token", floor=0.9, cap=1.1),
]


def dense_score(found: ChainProblem, edge: np.ndarray) -> np.ndarray:
    """(..., t, p): the score of each token by the policy's own `score`, zeros for padding."""
    _, states, _ = found.chain.shape
    width = found.table.width
    out = np.zeros((*edge.shape, found.gradient.size))
    for index in np.ndindex(edge.shape):
        row, token = divmod(int(edge[index]), width)
        t, state = divmod(row, states)
        if not found.chain.done[state]:
            out[index] = found.target.score((t, state), token)  # type: ignore[attr-defined]
    return np.moveaxis(out, 0, -2)


def covered(problem: ChainProblem, estimator: Estimator) -> bool:
    """Whether there is a form that lists no trajectories."""
    return problem.contribution_moments(estimator, np.zeros(len(problem.group_probability))) is not None


@pytest.mark.parametrize("baseline", ["zero", 0.3, "population"])
@pytest.mark.parametrize("rule", WEIGHTINGS, ids=[f"{w.treatment}, {w.level}" for w in WEIGHTINGS])
@pytest.mark.parametrize(("linear", "ends"), KINDS, ids=IDS)
def test_dynamic_programming_equals_enumeration(linear: bool, ends: bool, rule: Weighting, baseline: Any) -> None:
    found, estimator = problem(linear=linear, ends=ends), Estimator(rule, baseline)
    assert covered(found, estimator)
    fast = exact.moments(found, estimator, 4)
    slow = moments_of_sums(exact.single_sample_sums(found, estimator, 4), found.gradient, drawn=False)
    assert_near(fast.mean, slow.mean)
    assert_near(fast.variance_per_sample, slow.variance_per_sample, scale=0)
    assert_near(fast.variance_of_mean, slow.variance_of_mean, scale=0)


@pytest.mark.parametrize(
    "estimator",
    [Estimator(Weighting("importance", "geometric")), Estimator(normalizer="length"), Estimator(baseline_shift=0.2)],
    ids=["geometric", "length", "shift"],
)
def test_dynamic_programming_of_a_fixed_length(estimator: Estimator) -> None:
    found = problem(linear=True, ends=False)
    assert covered(found, estimator)
    fast = exact.moments(found, estimator, 4)
    slow = moments_of_sums(exact.single_sample_sums(found, estimator, 4), found.gradient, drawn=False)
    assert_near(fast.mean, slow.mean)
    assert_near(fast.variance_of_mean, slow.variance_of_mean, scale=0)
    ending = problem(linear=True, ends=True)
    assert covered(ending, estimator) == (estimator.baseline_shift > 0)


@pytest.mark.parametrize("baseline", ["zero", "opob", "opob_leave_one_out", "length_weighted", "opob_truncated"])
@pytest.mark.parametrize("ends", [False, True])
def test_chain_moments_equal_all_ordered_batches(ends: bool, baseline: str) -> None:
    chain = modular_sum(2, 2, 2, 1)
    chain = with_end(chain) if ends else chain
    rng = np.random.default_rng(1)
    policy = random_linear(rng, chain.shape, 3)
    found = chain_problem(chain, policy, [drifted(policy, rng, 0.5)])
    draw, measure = found._listed
    batch = found.outcomes()
    score = dense_score(found, draw.edge).sum(axis=-2)[0]
    outcomes = [
        {
            "prob": float(measure[0, i]),
            "w": float(np.exp(np.sum(batch.log_ratio[0, i] * batch.token_mask[0, i]))),
            "reward": float(batch.reward[0, i]),
            "length": float(batch.length[0, i]),
            "score": score[i].tolist(),
        }
        for i in range(measure.shape[1])
    ]
    assert sum(o["prob"] for o in outcomes) == near(1)
    mean, per_sample, of_mean = slow_exact.moments(outcomes, 3, "importance", baseline)
    got = exact.moments(found, Estimator(baseline=baseline), 3)
    assert_near(got.mean, mean)
    assert_near(got.variance_per_sample, per_sample)
    assert_near(got.variance_of_mean, of_mean)


@pytest.mark.parametrize(("linear", "ends"), KINDS, ids=IDS)
def test_diagnostics_and_gradient_equal_enumeration(linear: bool, ends: bool) -> None:
    found = problem(linear=linear, ends=ends)
    batch, rho = found.outcomes(), found.group_probability
    assert_near(batch.measure.sum(axis=-1), 1, scale=0)
    weight = np.exp(np.sum(batch.log_ratio * batch.token_mask, axis=-1))
    square = rho @ np.sum(batch.measure * weight**2, axis=-1)
    got = exact.diagnostics(found)
    assert got["ess_fraction"] == near(1 / square)
    assert got["chi2"] == near(square - 1)
    assert got["kl"] == near(rho @ np.sum(batch.measure * -np.log(weight), axis=-1))
    assert found.value == near(rho @ np.sum(batch.measure * weight * batch.reward, axis=-1))
    assert_near(exact.moments(found, Estimator(), 2).mean, found.gradient)
    assert batch.reward.shape[-1] == found.outcome_count


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("linear", "ends"), KINDS, ids=IDS)
def test_fast_scores_equal_dense_scores(linear: bool, ends: bool, size: int) -> None:
    found, rng = problem(linear=linear, ends=ends), np.random.default_rng(size)
    draw = found.draw(rng, 7, size)
    fast = found.batch(draw).scores
    dense = DenseScores(dense_score(found, draw.edge), per_token=True)
    for shape in ((7, size), (7, size, 3)):
        weight = rng.normal(size=shape)
        expected = dense.combine(weight)
        assert_near(fast.combine(weight), expected)
        assert_near(fast.sq_norm(weight), dense.sq_norm(weight))
        assert_near(fast.combine_total(weight), expected.sum(axis=0))
        assert_near(fast.combined_sq_norm(weight), np.sum(expected**2, axis=-1))


@pytest.mark.parametrize("rare", [False, True], ids=["32 bits", "62 bits"])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.slow
def test_drawn_trajectories_follow_the_behavior(ends: bool, rare: bool) -> None:
    found = problem(linear=False, ends=ends)
    if rare:
        behavior = found.behavior.copy()
        behavior[:, 0, :, 0] = np.log(1e-6)
        behavior[:, 0, :, 1:] -= np.log(np.exp(behavior[:, 0, :, 1:]).sum(axis=-1, keepdims=True) / (1 - 1e-6))
        found = chain_problem(found.chain, found.target, list(behavior), [0.3, 0.7])
    assert found._sampler.bits == (62 if rare else 32)
    draw = found.draw(np.random.default_rng(0), 100_000, 2)
    listed, measure = found._listed
    joint = {}
    for g in range(2):
        for i in range(measure.shape[1]):
            key = (g, int(listed.path[g, i]), *listed.edge[:, g, i].tolist())
            joint[key] = joint.get(key, 0) + 0.5 * measure[g, i]
    column = {key: j for j, key in enumerate(joint)}
    group = np.broadcast_to(draw.group, draw.path.shape)
    rows = np.concatenate([group[None], draw.path[None], draw.edge]).reshape(5, -1).T
    keys, which = np.unique(rows, axis=0, return_inverse=True)
    kind = np.array([column[tuple(key)] for key in keys.tolist()])[which]
    # samples of a group share a prompt: average the two, so that rows are independent
    hits = np.zeros((100_000, len(joint)))
    np.add.at(hits, (np.arange(100_000).repeat(2), kind), 0.5)
    assert_mean_equals(hits, np.array(list(joint.values())), detect=0.02, support=(0, 1))
    edge_state = draw.edge[-1] // found.table.width % found.chain.shape[1]
    token = draw.edge[-1] % found.table.width
    np.testing.assert_array_equal(draw.final, found.chain.transition[-1][edge_state, token])


def test_the_last_word_of_a_cell_keeps_it_and_the_next_takes_the_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = modular_sum(1, 3, 1)
    policy = TabularSoftmax(np.log([[[0.1, 0.3, 0.6]]]))
    sampler = chain_problem(chain, policy, [policy])._sampler
    # columns that hold some of both: their own token's words, then the alias's
    cells = [c for c in range(4) if all(int(sampler.last[0, c]) + k >> sampler.shift == c for k in (0, 1))]
    assert len(cells) >= 2
    for c in cells:
        last = int(sampler.last[0, c])
        pair = np.array([[last, last + 1]], dtype=np.uint32)
        monkeypatch.setattr("vcposim.problems.chains.words", lambda rng, shape, bits, pair=pair: pair)
        cell = np.empty((1, 2), dtype=np.int64)
        sampler.walk(np.random.default_rng(0), np.zeros(2, dtype=np.int64), cell)
        np.testing.assert_array_equal(cell[0], sampler.either[0, 2 * c : 2 * c + 2])


@pytest.mark.parametrize(("linear", "ends"), KINDS, ids=IDS)
@pytest.mark.slow
def test_monte_carlo_agrees_with_exact_chain_moments(linear: bool, ends: bool) -> None:
    found = problem(linear=linear, ends=ends, paths=1)
    estimators = {
        "sequence": Estimator(),
        "token": Estimator(Weighting("truncate", "token", cap=1.1), 0.3),
        "population": Estimator(baseline="population"),
    }
    drawn = monte_carlo.moments(found, estimators, group_size=3, samples=150_000, seed=2)
    for name, estimator in estimators.items():
        expected = exact.moments(found, estimator, 3)
        check(drawn[name], expected)
        with pytest.raises(AssertionError):
            check(drawn[name], exact.moments(found, estimator, 4))


def test_drawn_sums_equal_the_kernel_s() -> None:
    found = problem(linear=False, ends=True)
    draw = found.draw(np.random.default_rng(0), 20, 3)
    batch = found.batch(draw)
    plain = Batch(**(vars(batch) | {"scores": DenseScores(dense_score(found, draw.edge), per_token=True)}))
    for estimator in (Estimator(baseline="opob"), Estimator(Weighting("truncate", "token", cap=1.1), "otb")):
        fast = monte_carlo.drawn_sums(batch, estimator.coefficients(batch))
        slow = batch_sums(plain, estimator.coefficients(plain))
        for a, b in zip(fast, slow, strict=True):
            assert_near(a, b)


def test_sequence_results_do_not_depend_on_token_company() -> None:
    found, given = problem(linear=False, ends=True), {"group_size": 3, "samples": 999, "seed": 0}
    alone = monte_carlo.moments(found, {"a": Estimator(baseline="opob")}, **given)["a"]
    both = {"b": Estimator(Weighting("truncate", "token", cap=1.1)), "a": Estimator(baseline="opob")}
    company = monte_carlo.moments(found, both, **given, workers=2, chunk=100)["a"]
    assert float(alone.moments.mse) == float(company.moments.mse)
    np.testing.assert_array_equal(alone.moments.mean, company.moments.mean)


def test_recorded_behavior_changes_ratios_only() -> None:
    found = problem(linear=False, ends=False, paths=1)
    believed = chain_problem(found.chain, found.target, list(found.behavior), recorded=[found.target])
    np.testing.assert_array_equal(believed.outcomes().log_ratio, 0)
    np.testing.assert_array_equal(believed.outcomes().measure, found.outcomes().measure)
    blind, none = (exact.moments(p, Estimator(Weighting(w)), 2) for p, w in ((believed, "importance"), (found, "none")))
    assert_near(blind.mean, none.mean)


def test_a_chain_of_one_token_is_a_bandit() -> None:
    rng = np.random.default_rng(0)
    chain = modular_sum(1, 3, 3, 1)
    policy = random_tabular(rng, chain.shape)
    found = chain_problem(chain, policy, [drifted(policy, rng, 0.5)])
    row = np.exp(policy.log_prob[0, 0]), np.exp(found.behavior[0, 0, 0])
    bandit = bandit_problem(*row, [0.0, 1.0, 0.0])
    for baseline in ("zero", "opob", "population"):
        a, b = (exact.moments(p, Estimator(baseline=baseline), 3) for p in (found, bandit))
        assert_near(a.variance_of_mean, b.variance_of_mean, scale=0)
        assert_near(a.mean[:3], b.mean)


def large() -> ChainProblem:
    chain = modular_sum(16, 32, 32)
    policy = random_tabular(np.random.default_rng(0), chain.shape)
    return chain_problem(chain, policy, [drifted(policy, np.random.default_rng(1), 0.1)])


def test_large_chains_are_exact_where_a_product_and_refused_with_the_remedy_elsewhere() -> None:
    found = large()
    assert found.outcome_count == 32**16
    got = exact.moments(found, Estimator(baseline="population"), 8)
    assert_near(got.mean, found.gradient)
    with pytest.raises(InputError, match=r"1.21e\+24 trajectories.*--method monte-carlo --samples .*group_size=8"):
        exact.moments(found, Estimator(Weighting("truncate", cap=8)), 8)
    with pytest.raises(InputError, match=r"1.21e\+24 trajectories.*--method monte-carlo"):
        exact.moments(found, Estimator(baseline="opob"), 8)
    with pytest.raises(InputError, match="too many to list"):
        found.outcomes()


def test_refusals() -> None:
    chain: TokenChain = modular_sum(2, 3, 4)
    policy = random_tabular(np.random.default_rng(0), chain.shape)
    with pytest.raises(InputError, match=r"behavior: shape \(1, 2, 4, 2\); expected"):
        chain_problem(chain, policy, [policy.log_prob[..., :2]])
    logit = policy.logit.copy()
    logit[1, 2, 0] = -np.inf
    with pytest.raises(InputError, match=r"behavior\[0\]\[1\]\[2\]\[0\]: 0 where target is"):
        chain_problem(chain, policy, [TabularSoftmax(logit)])
    with pytest.raises(InputError, match=r"path_probability: sums to 0.5"):
        chain_problem(chain, policy, [policy], [0.5])
    with pytest.raises(InputError, match="several prompts"):
        exact.moments(chain_problem(chain, policy, [policy]), Estimator(baseline="batch_mean"), 2)
