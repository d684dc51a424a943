"""What the catalogue says of every estimator: host at lag 0, shift invariance, needs, sources; special baselines.

Tests run over the whole table, so an entry added there is tested here. Slow twins are loops over their definitions.
"""

import doctest
import math
from dataclasses import replace
from inspect import signature
from itertools import product

import numpy as np
import pytest

from tests.kit.rivals import GROUP, PROMPTS, TIME, draw
from tests.kit.statistical import assert_near, near
from vcposim.batch import Batch, DenseScores
from vcposim.catalogue import CATALOGUE, STEP_RULES, Unbiased, cite, entries
from vcposim.catalogue.references import SOURCES
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.surrogates import Penalized
from vcposim.weights import Weighting

HOSTS = {
    "sequence_is": "reinforce",
    "topr": "reinforce",
    "prefix_is": "reinforce",
    "sequence_is_leave_one_out": "rloo",
    "sequence_is_opob_leave_one_out": "on_policy_optimal_leave_one_out",
    "vcpo_leave_one_out": "on_policy_optimal_leave_one_out",
    "vcpo": "on_policy_optimal",
    "vcpo_released": "on_policy_optimal",
    "otb": "otb_on_policy",
    "otb_outside": "otb_on_policy",
    **dict.fromkeys(
        [
            *("sequence_tis", "sequence_tis_of_tokens", "token_tis", "aipo", "cispo", "cispo_two_sided"),
            *("sequence_mis", "token_mis", "icepop", "self_normalized", "pareto_smoothed"),
            *("sequence_rejection", "token_rejection", "geometric_mis"),
            *("negative_advantage_mask", "ppo_negative_advantage_mask"),
            *("m2po", "m2po_any_sign", "m2po_clip"),
            *("ppo_clip", "clip_higher", "dual_clip", "decoupled_ppo", "topr_centered"),
            *("dppo_binary_tv", "dppo_binary_kl", "dppo_binary_kl_anchor", "dppo_symmetric_tv"),
            *("gipo", "vespo", "vespo_docstring"),
            *("sapo", "luspo", "drpo", "prime_rl_ipo", "kimi_k15", "kimi_k15_token", "ctpo", "ctpo_released"),
            "ctpo_geometric",
            *("cppo", "kpo", "max_k3_mask", "p3o", "p3o_released", "p4o", "bapo", "kl_cov"),
            *("a3po", "a3po_uncorrected", "open_instruct_tv", "minpro", "dispo"),
        ],
        "dr_grpo",
    ),
}
"""rival -> the named estimator that it is where pi = mu"""

HOST_APART = {
    "gspo": ("dr_grpo", "/ L"),
    "gmpo": ("dr_grpo", "/ L"),
    "vcpo_released_length": ("on_policy_optimal", "/ L"),
    "vcpo_group_std": ("on_policy_optimal", "/ std"),
    "vcpo_released_script": ("on_policy_optimal", "/ std / L"),
}
"""rival -> a named estimator and what divides it where pi = mu"""

OWN_HOST = {
    *("vcpo_stratified", "vcpo_truncation_aware", "leverage_damped_mean"),
    *("vcpo_released_median", "vcpo_released_winsorized", "clip_cov", "gepo"),
}
"""rivals whose value where pi = mu has no name in the catalogue"""

ON_POLICY_METHODS = {
    *("reinforce", "grpo", "grpo_length", "dr_grpo", "rloo", "opo"),
    *("on_policy_optimal", "on_policy_optimal_leave_one_out", "otb_on_policy", "otb_on_policy_zero_tail"),
    *("shrinkage", "shrinkage_in_sample"),
    *("reinforce_plus_plus", "reinforce_plus_plus_baseline"),
    *("reinforce_plus_plus_token", "reinforce_plus_plus_baseline_token", "asymre", "tba"),
    *("delta_l", "maxrl", "mc_grpo"),
}
"""estimators that ignore the ratio"""

RIVALS = [name for name, entry in CATALOGUE.items() if entry.host is not None]
WITHOUT_RATIOS = [name for name, entry in CATALOGUE.items() if entry.host is None]

SEEDS = (0, 1, 2)


def per_token(coefficient, batch):
    c = coefficient if coefficient.ndim == 3 else coefficient[..., None]
    return np.where(batch.token_mask > 0, c, 0.0)


def on_policy(seed):
    return draw(seed, lag=0.0).batch()


def divisor(text, batch):
    mean = batch.reward.mean(-1, keepdims=True)
    std = np.sqrt(((batch.reward - mean) ** 2).mean(-1, keepdims=True))
    length = batch.token_mask.sum(-1)
    return {"/ L": length, "/ std": std, "/ std / L": std * length}[text]


def test_these_tables_pin_what_the_entries_say():
    """An entry of yours needs no place here: tests below hold it to its own words. These hold ours to the papers'."""
    tables = [set(HOSTS), set(HOST_APART), OWN_HOST, ON_POLICY_METHODS]
    assert set().union(*tables) <= set(CATALOGUE)
    assert len(set().union(*tables)) == sum(map(len, tables))
    assert {name for name, entry in CATALOGUE.items() if entry.host is None} >= ON_POLICY_METHODS


@pytest.mark.parametrize(("name", "host"), HOSTS.items())
def test_lag_zero_is_the_host(name, host):
    for seed in SEEDS:
        batch = on_policy(seed)
        rival, hosted = (per_token(CATALOGUE[key].estimator.coefficients(batch), batch) for key in (name, host))
        assert_near(rival, hosted)
        assert np.abs(hosted).max() > 0.1


@pytest.mark.parametrize(("name", "host"), HOST_APART.items())
def test_lag_zero_is_the_host_up_to_a_divisor(name, host):
    for seed in SEEDS:
        batch = on_policy(seed)
        rival = per_token(CATALOGUE[name].estimator.coefficients(batch), batch)
        hosted = CATALOGUE[host[0]].estimator.coefficients(batch) / divisor(host[1], batch)
        assert_near(rival, per_token(hosted, batch))


@pytest.mark.parametrize("name", RIVALS)
def test_lag_zero_is_what_the_entry_says(name):
    entry = CATALOGUE[name]
    assert entry.host.weighting.treatment == "none"
    if entry.host.surrogate is not None:  # then it is one that reads no ratio
        lagged = draw(0).batch()
        apart = replace(lagged, log_ratio=lagged.log_ratio * 2)
        np.testing.assert_array_equal(*(entry.host.coefficients(batch) for batch in (lagged, apart)))
    for seed in SEEDS:
        batch = on_policy(seed)
        rival, hosted = (per_token(e.coefficients(batch), batch) for e in (entry.estimator, entry.host))
        assert_near(rival, hosted)


@pytest.mark.parametrize("name", RIVALS)
def test_under_lag_a_rival_is_not_its_host(name):
    batch = draw(0).batch()
    entry = CATALOGUE[name]
    rival, hosted = (per_token(e.coefficients(batch), batch) for e in (entry.estimator, entry.host))
    if name == "pareto_smoothed":  # too few samples to fit a tail: it is self-effacing, and then equals sequence IS
        hosted = per_token(Estimator(Weighting("importance"), "group_mean").coefficients(batch), batch)
        assert_near(rival, hosted, scale=0)
        return
    apart = np.abs(rival - hosted).max()
    if name == "kpo":  # at its released noise the filter passes next to nothing of five tokens
        assert 0 < apart < 1e-3
    else:
        assert apart > 1e-3


@pytest.mark.parametrize("name", WITHOUT_RATIOS)
def test_an_on_policy_method_ignores_the_ratio(name):
    assert CATALOGUE[name].host is None
    lagged = draw(0)
    batch = lagged.batch()
    blind = replace(batch, log_ratio=batch.log_ratio * 0)
    a, b = (CATALOGUE[name].estimator.coefficients(x) for x in (batch, blind))
    np.testing.assert_array_equal(a, b)


def test_entries_that_leave_their_host_say_so():
    for name in {*HOST_APART, *OWN_HOST} - {"vcpo_group_std", "vcpo_released_length", "vcpo_released_script"}:
        if not name.startswith("vcpo_released"):
            assert "lag 0" in CATALOGUE[name].note
    assert "lag 0" in CATALOGUE["asymre"].note


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_reward_shift_changes_nothing_exactly_where_the_entry_says(name):
    entry, batch = CATALOGUE[name], draw(1).batch()
    moved = replace(batch, reward=batch.reward + 3.7)
    change = np.abs(entry.estimator.coefficients(moved) - entry.estimator.coefficients(batch)).max()
    size = np.abs(entry.estimator.coefficients(batch)).max()
    if entry.shift_invariant:
        assert change < 1e-10 * max(size, 1.0)
    else:
        assert change > 0.1


FIELDS = {
    "tokens": ("log_ratio", "token_mask", "log_prob", "collision", "anchor_log_ratio"),
    "length": ("length",),
    "scores": ("scores",),
    "log_prob": ("log_prob",),
    "collision": ("collision",),
    "anchor_log_ratio": ("anchor_log_ratio",),
    "reference_log_ratio": ("reference_log_ratio",),
    "grouped": ("grouped",),
}


def fed_only(needs):
    """A batch that has the needed fields and nothing else."""
    full = draw(2).batch()
    length = full.token_mask.sum(-1)
    log_ratio = np.where(full.token_mask > 0, full.log_ratio, 0.0)
    tokens = "tokens" in needs
    fields = {
        "log_ratio": full.log_ratio if tokens else log_ratio.sum(-1),
        "token_mask": full.token_mask if tokens else None,
        "length": length if "length" in needs else None,
        "grouped": "grouped" in needs,
        "scores": None,
    }
    if "scores" in needs:
        score = np.where(full.token_mask[..., None] > 0, full.scores.score, 0.0)
        fields["scores"] = full.scores if tokens else DenseScores(score.sum(-2))
    for name in ("log_prob", "collision", "anchor_log_ratio", "reference_log_ratio"):
        fields[name] = getattr(full, name) if name in needs else None
    return Batch(reward=full.reward, **fields)


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_estimator_needs_what_it_says_and_nothing_else(name):
    estimator = CATALOGUE[name].estimator
    assert np.isfinite(estimator.coefficients(fed_only(estimator.needs))).all()
    for need in estimator.needs:
        without = estimator.needs - {need}
        if need == "tokens":
            without -= {"log_prob", "collision", "anchor_log_ratio"}
        with pytest.raises(InputError) as caught:
            estimator.coefficients(fed_only(without))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_entry_says_what_is_known_of_it(name):
    entry = CATALOGUE[name]
    assert entry.references
    assert set(entry.references) <= set(SOURCES)
    assert entry.formula
    assert entry.unbiased
    assert cite(name).count("@misc{") == len(entry.references)


def test_the_references_of_step_rules_resolve():
    assert {key for rule in STEP_RULES.values() for key in rule.references} <= set(SOURCES)


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_library_gives_the_same_numbers(name, library):
    xp = pytest.importorskip(library)
    if name == "pareto_smoothed" and library == "array_api_strict":
        pytest.skip("Pareto smoothing goes through NumPy")
    estimator, sample = CATALOGUE[name].estimator, draw(0)
    expected = estimator.coefficients(sample.batch())
    found = estimator.coefficients(sample.batch(convert=xp.asarray))
    assert_near(np.asarray(found), expected)


@pytest.mark.parametrize("size", [50.0, 2000.0])
@pytest.mark.parametrize("name", CATALOGUE)
def test_no_estimator_overflows(name, size):
    sample = draw(0)
    rng = np.random.default_rng(0)
    extreme = {key: size * rng.normal(size=sample.mask.shape) for key in ("log_ratio", "anchor_log_ratio")}
    with np.errstate(over="ignore", under="ignore"):
        assert np.isfinite(CATALOGUE[name].estimator.coefficients(sample.batch(**extreme))).all()


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_group_of_equal_rewards_and_padding_of_any_kind(name):
    sample = draw(0)
    estimator = CATALOGUE[name].estimator
    a, b = (estimator.coefficients(sample.batch(padding=x)) for x in (float("nan"), -1e300))
    np.testing.assert_array_equal(a, b)
    equal = sample.batch(reward=np.full((PROMPTS, GROUP), 0.7), reference_log_ratio=np.zeros((PROMPTS, GROUP)))
    c = estimator.coefficients(equal)
    assert np.isfinite(c).all()
    if CATALOGUE[name].shift_invariant and name != "asymre" and not isinstance(estimator.surrogate, Penalized):
        assert c == near(c * 0)  # grpo divides rounding of the mean by its epsilon of 1e-4


def test_whitening_is_a_standard_score_over_the_batch():
    batch = on_policy(0)
    found = CATALOGUE["reinforce_plus_plus"].estimator.coefficients(batch)
    epsilon = CATALOGUE["reinforce_plus_plus"].estimator.epsilon
    spread = batch.reward.std()
    assert_near([found.mean(), found.std()], [0, spread / (spread + epsilon)])
    assert_near(found, (batch.reward - batch.reward.mean()) / (spread + epsilon))


def test_token_whitening_counts_a_response_once_per_token():
    batch = on_policy(0)
    length = batch.token_mask.sum(-1).astype(int)
    values = np.repeat(batch.reward.reshape(-1), length.reshape(-1))
    found = CATALOGUE["reinforce_plus_plus_token"].estimator.coefficients(batch)
    epsilon = CATALOGUE["reinforce_plus_plus_token"].estimator.epsilon
    assert_near(found, (batch.reward - values.mean()) / (values.std() + epsilon))


def test_zero_tail_is_otb_but_where_one_response_is_alone():
    batch = on_policy(0)
    mask = batch.token_mask > 0
    alone = mask.sum(axis=-2, keepdims=True) == 1
    assert np.any(alone & mask)
    plain, kept = (CATALOGUE[f"otb_on_policy{x}"].estimator.coefficients(batch) for x in ("", "_zero_tail"))
    expected = np.where(alone & mask, batch.reward[..., None], plain)
    assert_near(kept, expected)
    assert np.abs(kept - plain).max() > 0.1


def test_stratified_opob_written_as_loops():
    """Reward levels share the batch's mean of w^2 ||s||^2: two prompts of three, one of them twice as heavy."""
    reward = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    ratio = np.array([[0.5, 2.0, 1.0], [3.0, 0.25, 20.0]])
    score = np.random.default_rng(0).normal(size=(2, 3, 4))
    batch = Batch(reward=reward, log_ratio=np.log(ratio), scores=DenseScores(score), grouped=True)
    weight = np.minimum(ratio, 8) ** 2 * (score**2).sum(-1)
    level = {r: weight[reward == r].mean() for r in (0.0, 1.0)}
    expected = [[sum(level[r] * r for r in row) / sum(level[r] for r in row)] for row in reward]
    found = CATALOGUE["vcpo_stratified"].estimator.baseline_value(batch)
    assert_near(found, expected, scale=0)
    alone = Batch(reward=reward[:1], log_ratio=np.log(ratio[:1]), scores=DenseScores(score[:1]), grouped=True)
    opob, own = (CATALOGUE[name].estimator.baseline_value(alone) for name in ("vcpo", "vcpo_stratified"))
    assert_near(own, opob, scale=0)  # one group has nobody to share with
    assert np.abs(found[0] - opob[0]) > 0.01


def test_stratified_opob_survives_log_ratios_of_a_thousand():
    log_ratio = np.array([[1000.0, -1000.0, 0.0], [1000.0, 0.0, -5.0]])
    score = np.random.default_rng(0).normal(size=(2, 3, 4))
    batch = Batch(
        reward=np.array([[1.0, 0, 0], [1.0, 1, 0]]), log_ratio=log_ratio, scores=DenseScores(score), grouped=True
    )
    value = Estimator(Weighting("importance"), "opob_stratified").baseline_value(batch)
    assert_near(value, 1.0, scale=0)  # all the weight of a level lies on successes


def test_shrinkage_is_the_paper_formula_written_as_loops():
    reward = on_policy(0).reward
    n, m = reward.shape
    expected = np.empty_like(reward)
    for i in range(n):
        others = [reward[k] for k in range(n) if k != i]
        center = np.mean([r.mean() for r in others])
        error = np.mean([r.var(ddof=1) / m for r in others])
        spread = np.mean([(r.mean() - center) ** 2 for r in others])
        share = (n - 1) / n * error / (error + spread)
        for j in range(m):
            expected[i, j] = (1 - share) * np.delete(reward[i], j).mean() + share * center
    found = Estimator(Weighting("none"), "shrinkage").baseline_value(on_policy(0))
    assert_near(found, expected, scale=0)


def test_shrinkage_of_one_prompt_is_leave_one_out():
    batch = Batch(reward=np.array([[1.0, 0.0, 2.0]]), log_ratio=np.zeros((1, 3)), grouped=True)
    found, rloo = (CATALOGUE[name].estimator.coefficients(batch) for name in ("shrinkage", "rloo"))
    assert_near(found, rloo, scale=0)


def test_in_sample_shrinkage_written_as_loops():
    batch = on_policy(1)
    mean = batch.reward.mean(-1)
    error = np.mean([r.var(ddof=1) / len(r) for r in batch.reward])
    share = error / (error + mean.var())
    expected = (1 - share) * mean + share * mean.mean()
    found = Estimator(Weighting("none"), "shrinkage_in_sample").baseline_value(batch)
    assert_near(found[..., 0], expected, scale=0)


def test_prompts_without_samples_do_not_count_in_the_batch():
    reward = np.array([[1.0, 0.0, 5.0], [2.0, 4.0, 6.0], [9.0, 9.0, 9.0]])
    measure = np.array([[0.5, 0.5, 0.0], [1 / 3] * 3, [0.0] * 3])
    unit = np.array([[0.5], [1 / 3], [0.0]])
    batch = Batch(reward=reward, log_ratio=reward * 0, measure=measure, unit=unit, grouped=True)
    for name, expected in (("batch_mean", (0.5 + 4.0) / 2),):
        found = Estimator(Weighting("none"), name).baseline_value(batch)
        assert_near(found, expected, scale=0)
    loo = Estimator(Weighting("none"), "shrinkage").baseline_value(batch)
    # one other prompt: its spread is 0, so lam = (n - 1) / n = 1/2 of its mean
    assert_near(loo[0, :2], 0.5 * np.array([0.0, 1.0]) + 0.5 * 4.0, scale=0)
    assert_near(loo[1], 0.5 * np.array([5.0, 4.0, 3.0]) + 0.5 * 0.5, scale=0)


def optimal_token_baseline_loops(batch, weight, outside):
    expected = np.zeros((PROMPTS, 1, TIME))
    for g in range(PROMPTS):
        for t in range(TIME):
            top = bottom = 0.0
            for i in range(GROUP):
                if batch.token_mask[g, i, t] == 0:
                    continue
                energy = [1 - 2 * math.exp(batch.log_prob[g, i, j]) + batch.collision[g, i, j] for j in range(t + 1)]
                square = [weight[g, i, j] ** 2 for j in range(t + 1)]
                total = square[t] * sum(energy) if outside else sum(a * b for a, b in zip(square, energy, strict=True))
                top, bottom = top + total * batch.reward[g, i], bottom + total
            expected[g, 0, t] = top / bottom
    return expected


@pytest.mark.parametrize("name", ["otb", "otb_outside", "otb_on_policy"])
def test_the_optimal_token_baseline_written_as_loops(name):
    batch = draw(0).batch()
    weight = np.ones((PROMPTS, GROUP, TIME)) if name == "otb_on_policy" else np.minimum(np.exp(batch.log_ratio), 2.0)
    expected = optimal_token_baseline_loops(batch, weight, outside=name == "otb_outside")
    assert_near(CATALOGUE[name].estimator.baseline_value(batch), expected, scale=0)


def test_the_longest_response_alone_gets_no_gradient_from_otb():
    batch = draw(0).batch(
        reward=np.array([[1.0, 0.0]] * 1),
        log_ratio=np.zeros((1, 2, 3)),
        token_mask=np.array([[[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]]),
        log_prob=np.full((1, 2, 3), -1.0),
        collision=np.full((1, 2, 3), 0.5),
        anchor_log_ratio=None,
        reference_log_ratio=None,
        scores=None,
    )
    c = CATALOGUE["otb_on_policy"].estimator.coefficients(batch)
    assert_near(c, [[[0.5, 0.5, 0.0], [-0.5, -0.5, 0.0]]], scale=0)


def test_the_token_energy_is_the_squared_norm_of_the_logit_score():
    sample = draw(0)
    pi = np.exp(sample.feature @ sample.theta)
    pi /= pi.sum(-1, keepdims=True)
    score = np.eye(pi.shape[-1])[sample.token] - pi
    batch = sample.batch()
    energy = 1 - 2 * np.exp(batch.log_prob) + batch.collision
    keep = sample.mask > 0
    assert_near(energy[keep], (score**2).sum(-1)[keep], scale=0)


def lower_quantile(values, weights, q):
    order = np.argsort(values)
    cumulated = np.cumsum(np.asarray(weights)[order])
    return np.asarray(values)[order][np.searchsorted(cumulated, q * cumulated[-1])]


@pytest.mark.parametrize("seed", SEEDS)
def test_aggregations_of_the_released_code_written_with_a_sort(seed):
    batch = draw(seed).batch()
    sq_norm = batch.scored().sq_norm(batch.reward * 0 + 1)
    w = np.exp(np.where(batch.token_mask > 0, batch.log_ratio, 0).sum(-1))
    weight = np.minimum(w, 8) ** 2 * w**2 * sq_norm
    median, winsorized = (
        CATALOGUE[f"vcpo_released_{kind}"].estimator.baseline_value(batch) for kind in ("median", "winsorized")
    )
    for g in range(PROMPTS):
        assert median[g, 0] == lower_quantile(batch.reward[g], weight[g], 0.5)
        low, high = (lower_quantile(batch.reward[g], weight[g], q) for q in (0.05, 0.95))
        held = np.clip(batch.reward[g], low, high)
        assert winsorized[g, 0] == near((weight[g] * held).sum() / weight[g].sum())


def test_a_penalty_is_a_reward():
    batch = draw(0).batch()
    shaped = replace(batch, reward=batch.reward - 0.3 * batch.reference_log_ratio)
    penalized = Estimator(Weighting("truncate", cap=8.0), "opob", "group_std", reference_penalty=0.3)
    plain = replace(penalized, reference_penalty=0.0)
    np.testing.assert_array_equal(penalized.coefficients(batch), plain.coefficients(shaped))
    np.testing.assert_array_equal(penalized.baseline_value(batch), plain.baseline_value(shaped))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Estimator(normalizer="withen"), "normalizer: unknown name 'withen'; did you mean 'whiten'"),
        (lambda: Estimator(baseline="shrinkag"), "baseline: unknown name 'shrinkag'; did you mean 'shrinkage'"),
        (lambda: Estimator(reference_penalty=-1.0), "reference_penalty: -1.0 is not"),
        (lambda: Estimator(baseline_shift=float("nan")), "baseline_shift: nan is not finite"),
        (
            lambda: Estimator(baseline="otb", normalizer="whiten"),
            "normalizer: 'whiten' is for one advantage a response",
        ),
        (lambda: Estimator(baseline="shrinkage").require(1), "group_size: 1 leaves nobody"),
        (lambda: draw(0).batch(log_prob=np.zeros((3, 6))), r"log_prob: shape \(3, 6\) is not that of token ratios"),
        (lambda: Batch(reward=np.zeros(3), log_ratio=np.zeros(3), grouped=True), "grouped: rewards of shape"),
        (
            lambda: Batch(reward=np.zeros(3), log_ratio=np.zeros(3), reference_log_ratio=np.zeros(2)),
            "reference_log_ratio: shape",
        ),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def all_groups(log_pi, log_mu, reward, size):
    """Every group of `size` one-token responses, with its probability under mu, ready for any estimator."""
    arms = np.stack(np.meshgrid(*[np.arange(len(log_pi))] * size, indexing="ij"), -1).reshape(-1, 1, size)
    pi, log_reference = np.exp(log_pi), np.log(np.full(len(log_pi), 1 / len(log_pi)))
    score = np.eye(len(pi)) - pi
    log_ratio = (log_pi - log_mu)[arms]
    batch = Batch(
        reward=reward[arms],
        log_ratio=log_ratio[..., None],
        token_mask=np.ones((*arms.shape, 1)),
        scores=DenseScores(score[arms][..., None, :], per_token=True),
        log_prob=log_pi[arms][..., None],
        collision=np.full((*arms.shape, 1), (pi**2).sum()),
        anchor_log_ratio=log_ratio[..., None],
        reference_log_ratio=(log_pi - log_reference)[arms],
        grouped=True,
    )
    return batch, np.exp(log_mu[arms].sum((-2, -1)))


def exact_mean(estimator, batch, probability):
    c = estimator.coefficients(batch)
    estimate = batch.scored().combine(c / batch.reward.shape[-1])[:, 0]
    return (probability[:, None] * estimate).sum(0)


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_the_entry_says_of_its_mean_holds_exactly(name):
    """By enumeration of all groups: no sampling, no tolerance beyond rounding."""
    size, reward = 3, np.array([0.3, -1.2, 0.8, 2.0])
    pi, mu = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.02, 0.08, 0.4, 0.5])  # ratios from 0.1 to 25: all caps bind
    log_pi = np.log(pi)
    entry = CATALOGUE[name]
    beta = entry.estimator.reference_penalty
    shaped = reward - beta * (log_pi + np.log(4))
    gradient = pi * (shaped - pi @ shaped)
    on, off = (
        exact_mean(entry.estimator, *all_groups(log_pi, log_mu, reward, size)) for log_mu in (log_pi, np.log(mu))
    )
    if entry.unbiased is Unbiased.ALWAYS:
        assert_near(off, gradient)
    elif name != "prefix_is":  # which is sequence_is for responses of one token; of two it is not, see test_surrogates
        assert np.abs(off - gradient).max() > 1e-3
    if entry.unbiased in (Unbiased.ALWAYS, Unbiased.ON_POLICY):
        assert_near(on, gradient)
    if entry.unbiased is Unbiased.ON_POLICY_SHRUNK:
        assert_near(on, (1 - 1 / size) * gradient)


def test_the_worked_example_passes_every_test_of_the_catalogue_when_pasted(monkeypatch):
    """The docstring that teaches how to add an entry is run, and its entry put through every test above."""
    example = doctest.DocTestParser().get_doctest(entries.__doc__, dict(vars(entries)), "entries", None, 0)
    for line in example.examples:
        exec(line.source, example.globs)
    monkeypatch.setitem(CATALOGUE, "mine", example.globs["mine"])
    of_one_entry = [
        test
        for name, test in globals().items()
        if name.startswith("test_")
        for mark in getattr(test, "pytestmark", [])
        if mark.name == "parametrize" and mark.args[0] == "name" and mark.args[1] in (CATALOGUE, RIVALS)
    ]
    assert len(of_one_entry) >= 9
    for test in of_one_entry:
        libraries = ["array_api_strict", "torch"] if "library" in signature(test).parameters else [None]
        sizes = [50.0, 2000.0] if "size" in signature(test).parameters else [None]
        for library, size in product(libraries, sizes):
            given = {"library": library, "size": size}
            test(name="mine", **{key: value for key, value in given.items() if value is not None})
