"""The flat dict for a logger is the panel, and a broken trajectory is counted, not raised."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from llm_bridge.diagnostics import diagnose, to_numpy  # noqa: E402
from llm_bridge.groups import Groups  # noqa: E402
from llm_bridge.ratios import trajectory_batch  # noqa: E402
from tests.kit.statistical import near  # noqa: E402
from vcposim.batch import Batch, ScoreNorms  # noqa: E402
from vcposim.errors import InputError  # noqa: E402
from vcposim.gauges.panel import panel  # noqa: E402

GAUGES = {
    "ess_fraction_sequence", "ess_fraction_sequence_truncated", "ess_fraction_geometric", "ess_fraction_token",
    "ess_fraction_gradient", "mean_weight", "log_mean_weight", "max_share", "khat", "kl_behavior_target",
    "kl_low_variance", "chi2", "max_leverage",
}  # fmt: skip


def columns(n: int = 48, t: int = 6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    behavior = -2 * torch.rand(n, t, generator=generator, dtype=torch.float64)
    log_prob = behavior + 0.4 * torch.randn(n, t, generator=generator, dtype=torch.float64)
    mask = (torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=generator)).double()
    norm = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    reward = (torch.rand(n, generator=generator) > 0.5).double()
    return [x.to(dtype) for x in (reward, log_prob, behavior, mask, norm)]


def batch_of(reward, log_prob, behavior, mask, norm, **options) -> Batch:
    groups = Groups.of(torch.arange(len(reward)) % 5)  # ragged: 48 rows in groups of 10 and 9
    return trajectory_batch(reward, log_prob, behavior, mask, groups=groups, score_sq_norm=norm, **options)


def test_every_gauge_with_its_threshold_as_plain_floats() -> None:
    out = diagnose(batch_of(*columns()))
    names = {name.removeprefix("vcpo/") for name in out}
    suffixes = ("", "/threshold", "/required", "/alarming")
    assert names == {g + s for g in GAUGES for s in suffixes} | {"trajectories", "unusable"}
    assert all(type(value) is float for value in out.values())
    assert out["vcpo/trajectories"] == 48.0
    assert out["vcpo/unusable"] == 0.0


def test_values_are_the_panels() -> None:
    batch = batch_of(*columns())
    out = diagnose(batch, cap=2.0, prefix="")
    for name, one in panel(to_numpy(batch), cap=2.0).items():
        assert (out[name], out[f"{name}/threshold"], out[f"{name}/alarming"]) == (
            one.value, one.threshold, float(one.alarming),
        )  # fmt: skip
    assert out["ess_fraction_sequence_truncated"] != diagnose(batch, prefix="")["ess_fraction_sequence_truncated"]


def test_gauges_against_their_definitions() -> None:
    reward, log_prob, behavior, mask, norm = columns()
    out = diagnose(batch_of(reward, log_prob, behavior, mask, norm), cap=2.0, prefix="")
    token = ((log_prob - behavior) * mask).numpy()
    w, real = np.exp(token.sum(1)), mask.numpy() > 0

    def fraction(x: np.ndarray) -> float:
        return x.sum() ** 2 / (x**2).sum() / len(x)

    length = mask.numpy().sum(1)
    expected = {
        "ess_fraction_sequence": fraction(w),
        "ess_fraction_sequence_truncated": fraction(np.minimum(w, 2)),
        "ess_fraction_geometric": fraction(w ** (1 / length)),
        "ess_fraction_token": fraction(np.exp(token[real])),
        "ess_fraction_gradient": fraction(w * np.sqrt(norm.numpy())),
        "mean_weight": w.mean(),
        "max_share": w.max() / w.sum(),
        "chi2": ((w - 1) ** 2).mean(),
        "kl_behavior_target": -np.log(w).mean(),
    }
    group = np.arange(48) % 5
    a = w**2 * norm.numpy()
    expected["max_leverage"] = max((a[group == g] / a[group == g].sum()).max() for g in range(5))
    for name, value in expected.items():
        assert out[name] == near(value), name
    assert len({round(out[name], 6) for name in expected}) == len(expected)  # no two gauges are the same number


def test_float32_and_extreme_batches_stay_finite_where_they_should() -> None:
    reward, log_prob, behavior, mask, norm = columns(dtype=torch.float32)
    out = diagnose(batch_of(reward, log_prob + 40.0 * (torch.arange(48) % 3 - 1)[:, None], behavior, mask, norm))
    for gauge in ("ess_fraction_sequence", "ess_fraction_gradient", "max_share", "log_mean_weight", "max_leverage"):
        assert math.isfinite(out[f"vcpo/{gauge}"]), gauge
    assert out["vcpo/ess_fraction_sequence/alarming"] == 1.0


@pytest.mark.parametrize("where", ["log_ratio", "norm"])
def test_broken_rows_are_counted_and_left_out(where: str) -> None:
    reward, log_prob, behavior, mask, norm = columns()
    log_prob, norm = log_prob.clone(), norm.clone()
    if where == "log_ratio":
        log_prob[3, 0], behavior[7, 0] = float("nan"), -math.inf
    else:
        norm[3], norm[7] = float("nan"), math.inf
    out = diagnose(batch_of(reward, log_prob, behavior, mask, norm))
    assert out.pop("vcpo/unusable") == 2.0
    assert out.pop("vcpo/trajectories") == 48.0
    kept = [i for i in range(48) if i not in (3, 7)]
    groups = Groups.of((torch.arange(48) % 5)[kept])
    clean = trajectory_batch(
        *(x[kept] for x in (reward, log_prob, behavior, mask)), groups=groups, score_sq_norm=norm[kept]
    )
    expected = diagnose(clean)
    for name, value in out.items():
        assert value == near(expected[name], nan_ok=True), name


def test_nothing_usable_says_so() -> None:
    reward, log_prob, behavior, mask, norm = columns()
    assert diagnose(batch_of(reward, log_prob, behavior, mask * 0, norm)) == {
        "vcpo/trajectories": 0.0, "vcpo/unusable": 0.0,
    }  # fmt: skip
    assert diagnose(batch_of(reward, log_prob * float("nan"), behavior, mask, norm)) == {
        "vcpo/trajectories": 48.0, "vcpo/unusable": 48.0,
    }  # fmt: skip


def test_a_batch_of_trajectory_ratios_alone() -> None:
    out = diagnose(Batch(reward=torch.ones(4), log_ratio=torch.tensor([0.0, 1.0, -1.0, 0.5])), prefix="")
    assert "ess_fraction_token" not in out
    assert "max_leverage" not in out
    assert 0 < out["ess_fraction_sequence"] < 1


def test_refusals() -> None:
    batch = Batch(reward=torch.ones(4), ratio=torch.ones(4), scores=ScoreNorms(torch.ones(4)))
    with pytest.raises(InputError, match="pass log_ratio instead of ratio"):
        diagnose(batch)
    with pytest.raises(InputError, match="cap: -1"):
        diagnose(Batch(reward=torch.ones(4), log_ratio=torch.zeros(4)), cap=-1)
