"""The record every estimator reads: defaults, shapes, scores."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.kit.backends import FLOAT_BACKENDS, Backend, name_of
from tests.kit.properties import Law, laws_of
from tests.kit.statistical import as_numpy, assert_rounding_only
from tests.kit.strategies import exact
from vcposim.batch import Batch, DenseScores, ScoreNorms, sample_measure
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.weights import Weighting


@pytest.mark.parametrize("law", laws_of("batch"), ids=lambda x: x.name)
def test_law(law: Law):
    law.run()


def batch(**changes: Any) -> Batch:
    given: dict[str, Any] = {"reward": np.zeros((2, 3)), "log_ratio": np.zeros((2, 3))}
    return Batch(**{**given, **changes})


def test_default_measure_is_one_over_n():
    given = batch()
    assert given.measure.tolist() == [[1 / 3] * 3] * 2  # type: ignore[union-attr]
    assert given.unit.tolist() == [[1 / 3]] * 2  # type: ignore[union-attr]


def test_default_measure_of_fractions_is_exact():
    given = Batch(reward=exact([1, 2, 3]), ratio=exact([1, 1, 1]))
    assert list(given.measure) == [Fraction(1, 3)] * 3  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", [0.25, np.array([0.25])], ids=["number", "array"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "opob_leave_one_out", "leverage_damped_mean"])
def test_unit_may_be_a_number_or_an_array(unit: Any, baseline: str):
    rng = np.random.default_rng(0)
    reward, log_ratio, score = rng.normal(size=4), rng.normal(size=4), DenseScores(rng.normal(size=(4, 2)))
    plain = Batch(reward=reward, log_ratio=log_ratio, scores=score)
    stated = Batch(reward=reward, log_ratio=log_ratio, scores=score, measure=np.full(4, 0.25), unit=unit)
    want = Estimator(baseline=baseline).coefficients(plain)
    assert_rounding_only(Estimator(baseline=baseline).coefficients(stated), want, ulp=4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ratio": np.ones((2, 3))}, "log_ratio: give exactly one of log_ratio .* and ratio"),
        ({"log_ratio": None}, "log_ratio: give exactly one of log_ratio .* and ratio"),
        ({"measure": np.full((2, 3), 1 / 3)}, "unit: give the mass of one draw along with measure"),
        ({"length": np.ones(3)}, r"length: shape \(3,\) does not match reward's \(2, 3\)"),
        ({"measure": np.ones((2, 1)), "unit": 1}, r"measure: shape \(2, 1\) does not match reward's \(2, 3\)"),
        ({"log_ratio": np.zeros((2, 4))}, r"log_ratio: shape \(2, 4\) is neither \(2, 3\) nor \(2, 3\) \+ \(t,\)"),
        ({"log_ratio": np.zeros((2, 3, 1, 1))}, r"log_ratio: shape \(2, 3, 1, 1\) is neither"),
        ({"log_ratio": None, "ratio": np.ones(3)}, r"ratio: shape \(3,\) is neither"),
        ({"log_ratio": np.zeros((2, 3, 4)), "token_mask": np.ones((2, 3))}, r"token_mask: shape \(2, 3\) does not"),
        ({"scores": DenseScores(np.ones((2, 1, 5)))}, r"scores: shape \(2, 1\) of the samples does not match"),
        ({"scores": ScoreNorms(np.ones((2, 4)))}, r"scores: shape \(2, 4\) of the samples does not match"),
        ({"reward": np.float64(0), "log_ratio": np.float64(0)}, r"reward: shape \(\); pass at least one reward"),
        ({"reward": np.zeros((2, 0)), "log_ratio": np.zeros((2, 0))}, r"reward: shape \(2, 0\); pass at least one"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says) as caught:
        batch(**changes)
    assert "\n" not in str(caught.value)


def test_token_length_is_given_or_counted_or_refused():
    tokens = np.zeros((2, 3, 4))
    assert batch(length=np.full((2, 3), 9.0)).token_length().tolist() == [[9.0] * 3] * 2
    assert batch(log_ratio=tokens).token_length().tolist() == [[4.0] * 3] * 2
    mask = np.ones((2, 3, 4))
    mask[0, 0, 2:] = 0
    assert batch(log_ratio=tokens, token_mask=mask).token_length().tolist() == [[2.0, 4.0, 4.0], [4.0] * 3]
    with pytest.raises(InputError, match="length: this needs the number of tokens of each trajectory; pass length"):
        batch().token_length()


def test_missing_scores_are_refused_only_when_needed():
    Estimator(baseline="group_mean").coefficients(batch())
    with pytest.raises(InputError, match=r"scores: this needs score norms; pass DenseScores\(score\)"):
        Estimator(baseline="opob").coefficients(batch())


def test_norms_alone_serve_opob_but_not_a_gradient():
    rng = np.random.default_rng(1)
    score = rng.normal(size=(2, 3, 5))
    log_ratio, reward = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    whole = batch(reward=reward, log_ratio=log_ratio, scores=DenseScores(score))
    norms = batch(reward=reward, log_ratio=log_ratio, scores=ScoreNorms((score**2).sum(axis=-1)))
    opob = Estimator(baseline="opob")
    assert_rounding_only(opob.coefficients(norms), opob.coefficients(whole), ulp=64)
    with pytest.raises(InputError, match="scores: only norms are known"):
        norms.scored().combine(reward)


def test_token_weights_need_token_scores():
    tokens = batch(log_ratio=np.zeros((2, 3, 4)), scores=DenseScores(np.ones((2, 3, 5))))
    with pytest.raises(InputError, match="token-level weights need per-token scores"):
        Estimator(Weighting("importance", "token"), "opob").coefficients(tokens)
    norms = batch(log_ratio=np.zeros((2, 3, 4)), scores=ScoreNorms(np.ones((2, 3))))
    with pytest.raises(InputError, match="token-level weights need per-token scores"):
        Estimator(Weighting("importance", "token"), "opob").coefficients(norms)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("baseline", ["opob", "on_policy_optimal", "opob_truncated"])
def test_scores_of_masked_tokens_are_inert(level: str, baseline: str):
    """Whatever stands in the scores and ratios of masked tokens, the coefficients stay."""
    rng = np.random.default_rng(2)
    shape = (2, 4, 3)
    mask = (np.arange(3) < rng.integers(1, 4, size=(2, 4))[..., None]).astype(float)
    clean, log_ratio = rng.normal(size=(*shape, 2)), rng.normal(size=shape)
    noise = 1e3 * (1 - mask)

    def coefficients(score: np.ndarray, log: np.ndarray) -> np.ndarray:
        return Estimator(Weighting("truncate", level, cap=2.0), baseline).coefficients(
            Batch(
                reward=np.arange(8.0).reshape(2, 4),
                log_ratio=log,
                token_mask=mask,
                scores=DenseScores(score, per_token=True),
            )
        )

    want = coefficients(clean * mask[..., None], log_ratio * mask)
    assert_rounding_only(coefficients(clean + noise[..., None], log_ratio + noise), want, ulp=16)


def test_masked_scores_of_fractions_stay_fractions():
    score = exact([[[1], [2]], [[3], [4]]])
    masked = DenseScores(score, per_token=True).masked(exact([[1, 0], [1, 1]]))
    assert all(isinstance(x, Fraction | int) for x in masked.score.ravel())


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_measure_of_ragged_groups(backend: Backend):
    measure, unit = sample_measure(backend.floats([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert as_numpy(measure).tolist() == [[0.5, 0.5, 0, 0], [0.25] * 4, [0] * 4]
    assert as_numpy(unit).tolist() == [[0.5], [0.25], [0]]


def test_a_batch_is_frozen():
    with pytest.raises(AttributeError):
        batch().reward = np.ones((2, 3))  # type: ignore[misc]


def test_half_precision_is_refused_wherever_it_comes_from():
    torch = pytest.importorskip("torch")
    for half, name in ((np.float16, "float16"), (torch.bfloat16, "bfloat16")):
        one = np.ones(2, dtype=half) if half is np.float16 else torch.ones(2, dtype=half)
        wide = np.ones(2, dtype=np.float32) if half is np.float16 else torch.ones(2)
        for field, given in (("reward", (one, wide)), ("log_ratio", (wide, one))):
            with pytest.raises(InputError, match=rf"^{field}: .*{name} has too few digits .*; widen it to float32"):
                Batch(reward=given[0], log_ratio=given[1])
    with pytest.raises(InputError, match="ratio: float16"):
        Batch(reward=np.ones(2), ratio=np.ones(2, dtype=np.float16))
    assert Batch(reward=torch.tensor([1, 0]), log_ratio=torch.zeros(2)).reward.dtype == torch.int64
