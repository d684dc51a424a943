"""Token log-ratios to levels and batches: padding inert, float32 before the subtraction, absent rows absent."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from llm_bridge.groups import Groups  # noqa: E402
from llm_bridge.ratios import log_ratio, log_weight, present, token_log_ratio, trajectory_batch  # noqa: E402
from tests.kit.statistical import assert_rounding_only  # noqa: E402
from vcposim.batch import Batch  # noqa: E402
from vcposim.catalogue import entry  # noqa: E402
from vcposim.errors import InputError  # noqa: E402
from vcposim.weights import Weighting  # noqa: E402

GARBAGE = (float("nan"), math.inf, -math.inf, 1e30)


def problem(n: int = 6, t: int = 7, seed: int = 0):
    """Log-probs of both policies and a ragged mask whose third row is empty; float64."""
    generator = torch.Generator().manual_seed(seed)
    log_prob, behavior = (-3 * torch.rand(n, t, generator=generator, dtype=torch.float64) for _ in range(2))
    length = torch.tensor([t, 1, 0, 3, t - 1, 2])
    return log_prob, behavior, (torch.arange(t) < length[:, None]).double()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_levels_are_sums_over_the_policys_own_tokens(level: str) -> None:
    log_prob, behavior, mask = problem()
    found = log_ratio(log_prob, behavior, mask, level)
    token = np.where(mask.numpy() > 0, (log_prob - behavior).numpy(), 0.0)
    total, length = token.sum(1), mask.numpy().sum(1)
    expected = {"token": token, "sequence": total, "geometric": total / np.maximum(length, 1)}[level]
    assert_rounding_only(found, expected, scale=10.0)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_is_inert(garbage: float) -> None:
    log_prob, behavior, mask = problem()
    dirty = torch.where(mask > 0, log_prob, garbage), torch.where(mask > 0, behavior, -garbage)
    group, reward = Groups.of(torch.tensor([0, 1, 0, 1, 0, 1])), torch.arange(6.0).double()
    norm = torch.arange(1.0, 7.0).double()
    vcpo = entry("vcpo").estimator
    for level in ("token", "sequence"):
        clean, found = (
            trajectory_batch(reward, *pair, mask, groups=group, score_sq_norm=norm, level=level)
            for pair in ((log_prob, behavior), dirty)
        )
        assert torch.equal(found.log_ratio, clean.log_ratio)
        assert torch.equal(vcpo.coefficients(found), vcpo.coefficients(clean))


def test_a_row_without_tokens_is_absent_whatever_it_holds() -> None:
    log_prob, behavior, mask = problem()
    reward, norm = torch.arange(6.0).double(), torch.arange(1.0, 7.0).double()
    whole = trajectory_batch(
        torch.where(present(mask), reward, float("nan")),
        log_prob, behavior, mask, score_sq_norm=torch.where(present(mask), norm, float("nan")),
    )  # fmt: skip
    kept = [0, 1, 3, 4, 5]
    without = trajectory_batch(reward[kept], log_prob[kept], behavior[kept], mask[kept], score_sq_norm=norm[kept])
    for name in ("vcpo", "rloo", "grpo", "sequence_is_opob_leave_one_out", "self_normalized"):
        c = entry(name).estimator.coefficients(whole)
        assert_rounding_only(c[kept], entry(name).estimator.coefficients(without), scale=10.0)
        assert float(c[2] * whole.measure[2]) == 0.0  # type: ignore[index]
    assert whole.measure.tolist() == [0.2, 0.2, 0.0, 0.2, 0.2, 0.2]  # type: ignore[union-attr]


def test_an_empty_batch_of_rows_gives_zero_coefficients_not_nan() -> None:
    log_prob, behavior, mask = problem()
    batch = trajectory_batch(torch.ones(6), log_prob, behavior, mask * 0, score_sq_norm=torch.ones(6))
    for name in ("vcpo", "vcpo_group_std", "rloo", "grpo", "sequence_is_opob_leave_one_out"):
        assert torch.equal(entry(name).estimator.coefficients(batch) * batch.measure, torch.zeros(6).double()), name


def accumulated_in_float32(log_prob, behavior, mask):
    return log_ratio(log_prob, behavior, mask, "sequence")


def accumulated_in_bfloat16(log_prob, behavior, mask):
    return torch.where(mask > 0, log_prob - behavior, 0.0).sum(-1)


def subtracted_in_bfloat16(log_prob, behavior, mask):
    return torch.where(mask > 0, (log_prob - behavior).float(), 0.0).sum(-1)


@pytest.mark.parametrize(
    ("sum_of", "good"),
    [(accumulated_in_float32, True), (accumulated_in_bfloat16, False), (subtracted_in_bfloat16, False)],
)
def test_bfloat16_is_upcast_before_the_subtraction(sum_of, good: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    # far apart: the difference of two bfloat16 within a factor of 2 happens to be exact
    behavior, log_prob = (-5 * torch.rand(2, 4, 2000, generator=generator)).bfloat16()
    found = sum_of(log_prob, behavior, torch.ones(4, 2000))
    exact = (log_prob.double() - behavior.double()).sum(-1)  # bfloat16 numbers are exact in float64
    error = float((found.double() - exact).abs().max())
    assert (error < 1e-3) == good, error


def test_no_ratio_carries_a_gradient() -> None:
    log_prob, behavior, mask = problem()
    log_prob.requires_grad_()
    behavior.requires_grad_()
    norm = torch.ones(6, requires_grad=True)
    collision = log_prob.exp()
    batch = trajectory_batch(torch.ones(6), log_prob, behavior, mask, score_sq_norm=norm, collision=collision)
    assert not token_log_ratio(log_prob, behavior, mask).requires_grad
    assert not batch.log_ratio.requires_grad  # type: ignore[union-attr]
    assert not batch.collision.requires_grad  # type: ignore[union-attr]
    assert not batch.scores.sq_norm(batch.reward * 0 + 1).requires_grad  # type: ignore[union-attr]
    assert not entry("vcpo").estimator.coefficients(batch).requires_grad


def test_groups_there_and_back() -> None:
    generator = torch.Generator().manual_seed(3)
    group = torch.randint(-2, 5, (40,), generator=generator)
    groups = Groups.of(group)
    x = torch.arange(120.0).reshape(40, 3)
    assert torch.equal(groups.flat(groups.lift(x)), x)
    lifted, filled = groups.lift(group[:, None].double()), groups.lift(torch.ones(40))
    assert int(filled.sum()) == 40
    for row, real, identity in zip(lifted[..., 0], filled, torch.unique(group), strict=True):
        assert row[real > 0].unique().tolist() == [int(identity)]  # every slot of a group holds that group's rows
    assert torch.equal(groups.lift(x)[0][filled[0] > 0], x[group == group.min()])  # in the order of the rows


def test_grouped_batch_is_the_groups_one_by_one() -> None:
    log_prob, behavior, mask = problem()
    ids, reward = torch.tensor([4, 4, 1, 1, 4, 1]), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 1.0]).double()
    norm = torch.arange(1.0, 7.0).double()
    groups = Groups.of(ids)
    batch = trajectory_batch(reward, log_prob, behavior, mask, groups=groups, score_sq_norm=norm)
    for name in ("vcpo", "token_tis", "vcpo_leave_one_out"):
        found = groups.flat(entry(name).estimator.coefficients(batch))
        for one in (1, 4):
            at = ids == one
            alone = trajectory_batch(reward[at], log_prob[at], behavior[at], mask[at], score_sq_norm=norm[at])
            assert_rounding_only(found[at], entry(name).estimator.coefficients(alone), scale=1.0)


WEIGHTINGS = [
    Weighting(),
    Weighting("none"),
    Weighting("truncate", cap=8),
    Weighting("clip", cap=2, floor=0.5),
    Weighting("mask", cap=2, floor=0.5),
    Weighting("truncate", "token", cap=2),
    Weighting("truncate", "geometric", cap=1.1),
]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_log_weight_is_the_log_of_the_weight(weighting: Weighting) -> None:
    log_prob, behavior, mask = problem()
    batch = trajectory_batch(torch.ones(6), log_prob, behavior, mask)
    real = batch.measure > 0 if weighting.level != "token" else mask > 0
    assert_rounding_only(torch.exp(log_weight(weighting, batch))[real], weighting(batch).value[real])


def test_refusals_are_one_line() -> None:
    log_prob, behavior, mask = problem()
    batch = Batch(reward=torch.ones(3), log_ratio=torch.zeros(3))
    calls = {
        "behavior_log_prob": lambda: token_log_ratio(log_prob, behavior[:, 1:], mask),
        "mask": lambda: token_log_ratio(log_prob, behavior, mask[1:]),
        "reward": lambda: trajectory_batch(torch.ones(5), log_prob, behavior, mask),
        "sequence": lambda: log_ratio(log_prob, behavior, mask, "sequnce"),
        "level": lambda: trajectory_batch(torch.ones(6), log_prob, behavior, mask, level="geometric"),
        "gather": lambda: log_weight(Weighting("self_normalize"), batch),
        "group": lambda: Groups.of(torch.ones(3)),
        "integer": lambda: Groups.of(torch.ones(0, dtype=torch.long)),
    }
    for word, call in calls.items():
        with pytest.raises(InputError, match=word) as error:
            call()
        assert "\n" not in str(error.value)
