"""The coefficient: weighting, baseline and normalizer together."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.backends import FLOAT_BACKENDS, NUMPY, Backend, name_of
from tests.kit.properties import LAWS, Law, laws_of
from tests.kit.statistical import as_numpy, assert_rounding_only
from tests.kit.strategies import Case, cases, exact, extreme_log_ratio
from vcposim.baselines import BASELINES
from vcposim.batch import Batch, DenseScores
from vcposim.errors import InputError
from vcposim.estimators import NORMALIZERS, Estimator, group_std
from vcposim.moments import batch_sums
from vcposim.weights import TREATMENTS, Weighting

LIMITS: dict[str, dict[str, Any]] = {
    "truncate": {"cap": Fraction(47, 31)},
    "clip": {"cap": Fraction(47, 31), "floor": Fraction(31, 53)},
    "mask": {"cap": Fraction(47, 31)},
}
WEIGHTINGS = [Weighting(name, **LIMITS.get(name, {})) for name in TREATMENTS]
ORDINARY = sorted(name for name, b in BASELINES.items() if b.ordinary)
IN_BATCH = sorted({*ORDINARY} - {"population"})
OF_GROUP = [name for name, normalizer in NORMALIZERS.items() if "grouped" not in normalizer.needs]


@pytest.mark.parametrize("law", laws_of("estimators"), ids=lambda x: x.name)
def test_law(law: Law):
    law.run()


def holds(law: str, estimator: Estimator) -> None:
    """A law registered on one estimator, here on another."""
    LAWS[law].run(estimator.coefficients, examples=10)


SHIFTED = [b for b in IN_BATCH if b != "zero"]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: w.treatment)
def test_every_baseline_ignores_a_reward_shift(weighting: Weighting):
    for name in SHIFTED[WEIGHTINGS.index(weighting) % 2 :: 2]:
        holds("reward_shift_changes_nothing", Estimator(weighting, name))


EQUIVARIANT = ("reward_scale_scales", "samples_have_no_order", "groups_do_not_see_each_other", "padding_is_inert")


@pytest.mark.parametrize("name", IN_BATCH)
@pytest.mark.parametrize("law", EQUIVARIANT)
def test_every_baseline_scales_with_rewards_and_keeps_samples_and_groups_apart(law: str, name: str):
    """Each baseline under one of the weightings, in turn (all pairs meet their slow twin in test_backends.py)."""
    weighting = WEIGHTINGS[(IN_BATCH.index(name) + EQUIVARIANT.index(law)) % len(WEIGHTINGS)]
    holds(law, Estimator(weighting, name, "length"))


@pytest.mark.parametrize("name", IN_BATCH)
def test_importance_weights_scale_the_coefficient_and_self_normalized_ones_do_not(name: str):
    holds("weight_scale_scales", Estimator(baseline=name))

    @settings(max_examples=12)
    @given(cases())
    def trial(case: Case) -> None:
        c = Estimator(Weighting("self_normalize"), name).coefficients
        scaled = Case(**{**vars(case), "ratio": case.ratio * Fraction(7, 3)})
        assert_rounding_only(c(scaled.batch()), c(case.batch()))

    trial()


@pytest.mark.parametrize("normalizer", OF_GROUP)
@pytest.mark.parametrize("name", IN_BATCH)
@given(x=extreme_log_ratio(4), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_every_estimator_is_finite_under_extreme_log_ratios(name: str, normalizer: str, x: np.ndarray, seed: int):
    rng = np.random.default_rng(seed)
    batch = Batch(
        reward=rng.integers(0, 2, size=4).astype(float),
        log_ratio=x,
        scores=DenseScores(rng.normal(size=(4, 2))),
        length=rng.integers(1, 9, size=4).astype(float),
    )
    for weighting in WEIGHTINGS:
        c = Estimator(weighting, name, normalizer).coefficients(batch)
        assert np.all(np.isfinite(c)), (weighting.treatment, c)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@given(case=cases(per_token=True, ragged=True, smallest=1))
@settings(max_examples=10)
def test_garbage_in_padding_is_inert_through_to_the_sums(level: str, case: Case):
    """Padded samples with log-ratios of 10^4 and -inf, large rewards and scores: same sums, no NaN, no warning."""
    batch = case.batch(NUMPY)
    pad = batch.measure == 0
    noise = np.where(pad[..., None], np.where(np.arange(case.ratio.shape[-1]) % 2, 1e4, -np.inf), batch.log_ratio)  # type: ignore[arg-type]
    loud = np.where(pad, 1e6, batch.reward)
    score = np.where(pad[..., None, None], 1e6, batch.scores.score)  # type: ignore[union-attr]
    scores = DenseScores(score, per_token=True)
    changed = Batch(**{**vars(batch), "log_ratio": noise, "reward": loud, "scores": scores})
    for name in ("opob", "leave_one_out", "opob_truncated"):
        for weighting in (Weighting("importance", level), Weighting("truncate", level, cap=2.0)):
            estimator = Estimator(weighting, name)
            got = batch_sums(changed, estimator.coefficients(changed))
            want = batch_sums(batch, estimator.coefficients(batch))
            size = float(want.contribution_sq_norm) + 1
            for a, b in zip(got, want, strict=True):
                assert_rounding_only(np.asarray(a), np.asarray(b), ulp=2**10, scale=size)


def test_a_padded_group_counts_for_nothing():
    """A group of padding only: coefficients are finite, its estimate is zero."""
    rng = np.random.default_rng(0)
    batch = Batch(
        reward=rng.normal(size=(2, 3)),
        log_ratio=rng.normal(size=(2, 3)),
        scores=DenseScores(rng.normal(size=(2, 3, 2))),
        length=np.ones((2, 3)),
        measure=np.array([[1 / 3] * 3, [0.0] * 3]),
        unit=np.array([[1 / 3], [0.0]]),
    )
    for name in IN_BATCH:
        for normalizer in OF_GROUP:
            c = Estimator(baseline=name, normalizer=normalizer, epsilon=1e-6).coefficients(batch)
            assert np.all(np.isfinite(c))
            assert np.all(batch.scores.combine(c * batch.measure)[1] == 0)  # type: ignore[union-attr]


@given(cases(lead=()))
def test_leverage_identity_through_the_estimator(case: Case):
    """R_i - b = (1 - h_i)(R_i - b_{-i}), with h from `Estimator.leverage` (claim C8)."""
    batch = case.batch()
    h = Estimator().leverage(batch)
    opob, others = (Estimator(baseline=name).coefficients(batch) for name in ("opob", "opob_leave_one_out"))
    assert list(opob) == list((1 - h) * others)


@given(cases(lead=(), per_token=True))
def test_one_token_trajectories_have_one_level(case: Case):
    """With a single token, token, sequence and geometric level are the same estimator."""
    one = Case(
        **{
            **vars(case),
            "ratio": case.ratio[..., :1],
            "score": case.score[..., :1, :],
            "token_mask": case.token_mask[..., :1],  # type: ignore[index]
        }
    )
    batch = one.batch(NUMPY)
    for name in IN_BATCH:
        c = {
            level: Estimator(Weighting("importance", level), name).coefficients(batch)
            for level in ("token", "sequence")
        }
        size = np.abs(c["sequence"]).max() + 30
        assert_rounding_only(c["token"][..., 0], c["sequence"], ulp=64, scale=size)
        geometric = Estimator(Weighting("importance", "geometric"), name).coefficients(batch)
        assert_rounding_only(geometric, c["sequence"], ulp=64, scale=size)


@given(cases(lead=(), per_token=True))
def test_without_correction_levels_do_not_matter(case: Case):
    """Treatment `none` at token level is the same gradient as at sequence level."""
    batch = case.batch()
    for name in IN_BATCH:
        estimate = [
            batch.scored().combine(Estimator(Weighting("none", level), name).coefficients(batch))
            for level in ("token", "sequence")
        ]
        assert list(estimate[0]) == list(estimate[1])


@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3, 1e6 + 0.1, -5.0, 0.0])
@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_constant_rewards_have_no_advantage_after_division_by_their_std(backend: Backend, reward: float):
    """Rounding of the mean must not become an advantage of 1 (0.1 five times: mean 0.1 + 1 ulp, std 1 ulp)."""
    for n in range(1, 12):
        batch = Batch(reward=backend.floats(np.full(n, reward)), log_ratio=backend.floats(np.zeros(n)))
        c = as_numpy(Estimator(baseline="group_mean", normalizer="group_std").coefficients(batch))
        assert np.all(c == 0), (n, c)


def test_group_std_with_epsilon_is_grpo():
    reward = np.array([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    c = Estimator(Weighting("none"), "group_mean", "group_std", epsilon=1e-4).coefficients(
        Batch(reward=reward, log_ratio=reward * 0)
    )
    want = (reward - reward.mean(axis=1, keepdims=True)) / (reward.std(axis=1, keepdims=True) + 1e-4)
    assert_rounding_only(c, want, ulp=8)


def test_group_std_ignores_padding():
    measure = np.array([0.5, 0.5, 0.0])
    assert group_std(np.array([1.0, 3.0, 1e6]), measure).tolist() == [1.0]


def test_group_std_is_scale_free():
    """c(k R + d) = c(R): that is what the division is for."""
    rng = np.random.default_rng(1)
    reward, log_ratio = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    c = Estimator(baseline="group_mean", normalizer="group_std").coefficients
    want = c(Batch(reward=reward, log_ratio=log_ratio))
    got = c(Batch(reward=4 * reward - 2, log_ratio=log_ratio))
    assert_rounding_only(got, want, ulp=256, scale=np.abs(want).max())


def test_length_normalizer_divides_each_trajectory_by_its_tokens():
    batch = Batch(reward=exact([1, 2]), ratio=exact([3, 1]), length=exact([4, 5]))
    assert list(Estimator(normalizer="length").coefficients(batch)) == [Fraction(3, 4), Fraction(2, 5)]


def test_a_number_is_a_baseline():
    batch = Batch(reward=exact([1, 2]), ratio=exact([3, 1]))
    assert list(Estimator(baseline=Fraction(1, 2)).coefficients(batch)) == [Fraction(3, 2), Fraction(3, 2)]  # type: ignore[arg-type]
    zero, named = Estimator(baseline=0.0), Estimator(baseline="zero")
    assert list(zero.coefficients(batch)) == list(named.coefficients(batch))


@pytest.mark.parametrize("reward", [np.array([0, 1, 1, 0]), np.array([False, True, True, False])], ids=["int", "bool"])
def test_integer_and_boolean_rewards_are_numbers(reward: np.ndarray):
    rng = np.random.default_rng(3)
    given = {"log_ratio": rng.normal(size=4), "scores": DenseScores(rng.normal(size=(4, 2))), "length": np.full(4, 3)}
    for name in IN_BATCH:
        for normalizer in OF_GROUP:
            c = Estimator(baseline=name, normalizer=normalizer).coefficients
            want = c(Batch(reward=reward.astype(float), **given))
            assert_rounding_only(c(Batch(reward=reward, **given)), want, ulp=4)


def test_the_surrogate_of_a_detached_coefficient_has_the_estimator_as_gradient():
    """grad of sum_i m_i c_i.detach() log_prob_i is sum_i m_i c_i s_i; without detach it is something else."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    score = torch.tensor(rng.normal(size=(5, 3)))
    reward = torch.tensor(rng.normal(size=5))
    theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    log_prob = score @ theta
    batch = Batch(reward=reward, log_ratio=log_prob + torch.tensor(rng.normal(size=5)), scores=DenseScores(score))
    c = Estimator(baseline="opob").coefficients(batch)
    want = batch.scores.combine(c * batch.measure).detach()  # type: ignore[union-attr]
    (detached,) = torch.autograd.grad((batch.measure * c.detach() * log_prob).sum(), theta, retain_graph=True)
    assert_rounding_only(detached, want, ulp=64, scale=1.0)
    (leaking,) = torch.autograd.grad((batch.measure * c * log_prob).sum(), theta)
    with pytest.raises(AssertionError):
        assert_rounding_only(leaking, want, ulp=64, scale=1.0)
    with torch.no_grad():
        assert_rounding_only(Estimator(baseline="opob").coefficients(batch), c.detach(), ulp=1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"baseline": "group-mean"},
            "baseline: unknown name 'group-mean'; did you mean 'group_mean' or 'group_median'?",
        ),
        ({"normalizer": "std"}, "normalizer: unknown name 'std'; did you mean 'group_std'?"),
        ({"baseline": math.nan}, "baseline: nan is not finite"),
        ({"baseline": math.inf}, "baseline: inf is not finite"),
        ({"epsilon": -1.0}, "epsilon: -1.0 is not a finite non-negative number"),
        ({"epsilon": math.nan}, "epsilon: nan is not a finite non-negative number"),
    ],
)
def test_wrong_settings_are_refused_by_name(given: dict[str, Any], says: str):
    with pytest.raises(InputError) as caught:
        Estimator(**given)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ORDINARY)
def test_a_group_too_small_is_refused_before_any_work(name: str):
    estimator = Estimator(baseline=name)
    estimator.require(2)
    with pytest.raises(InputError, match="group_size: 0 is not positive; use 1 or more"):
        estimator.require(0)
    if name in ("leave_one_out", "opob_leave_one_out"):
        with pytest.raises(InputError, match=f"group_size: 1 leaves nobody for baseline '{name}'; use 2 or more"):
            estimator.require(1)
    else:
        estimator.require(1)


def test_coefficients_are_deterministic():
    rng = np.random.default_rng(6)
    batch = Batch(
        reward=rng.normal(size=(3, 4)),
        log_ratio=rng.normal(size=(3, 4)),
        scores=DenseScores(rng.normal(size=(3, 4, 2))),
    )
    for name in sorted({*ORDINARY} - {"population", "length_weighted"}):
        c = Estimator(baseline=name)
        np.testing.assert_array_equal(c.coefficients(batch), c.coefficients(batch))
