"""Step rules scale the step as the kernel says, and whatever is no number is no step."""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge.training.steps import Steps, make_optimizer  # noqa: E402
from tests.kit.statistical import SINGLE, assert_near, near  # noqa: E402
from tests.llm_bridge.training.toys import config, trainer  # noqa: E402
from vcposim import control  # noqa: E402

GRADIENT = torch.tensor([3.0, 4.0])
LOG_RATIO = torch.tensor([0.3, -0.5, 1.0, 0.0])


def stepped(
    gradient: Any = GRADIENT, log_ratio: Any = LOG_RATIO, lag: float = 0.0, steps: Any = None, **setting: Any
) -> Any:
    """What one step of plain SGD did: the scale, the way the parameter went, the reason."""
    steps = steps or Steps(*_parts(**setting))
    (p,) = steps.optimizer.param_groups[0]["params"]
    before, p.grad = p.detach().clone(), gradient.clone()
    seen = steps.step(3, lag, log_ratio, torch.ones(len(log_ratio)))
    assert p.grad is None
    return seen, before - p.detach(), steps


def _parts(**setting: Any) -> Any:
    made = config(**({"optimizer": "sgd", "lr": 1.0} | setting))
    return made, make_optimizer(made, [torch.nn.Parameter(torch.zeros(2))])


def test_no_rule_is_plain_descent() -> None:
    seen, way, _ = stepped()
    assert (seen.step_scale, seen.gradient_norm, seen.reason) == (1.0, 5.0, "")
    assert torch.equal(way, GRADIENT)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    seen, way, _ = stepped(clip_norm=1.0)
    assert seen.gradient_norm == 5.0
    assert float(way.norm()) == near(1.0)
    assert torch.equal(stepped(clip_norm=6.0)[1], GRADIENT)


@pytest.mark.parametrize(
    ("rule", "exponent", "optimizer"),
    [("ess", 1.0, "sgd"), ("ess", 0.5, "adamw"), ("ess_sqrt", 0.5, "sgd"), ("ess_linear", 1.0, "adamw")],
)
def test_ess_rules_have_their_exponent(rule: str, exponent: float, optimizer: str) -> None:
    w = LOG_RATIO.double().exp()
    rho = w.sum() ** 2 / (w * w).sum() / 4
    seen, _, _ = stepped(step_rule=rule, optimizer=optimizer, ess_reference=0.9)
    assert seen.step_scale == near(float(control.step_scale(rho, reference=0.9, exponent=exponent)))
    assert seen.step_scale < 0.95


@pytest.mark.parametrize(
    ("setting", "lag", "scale"),
    [
        ({"step_rule": "constant", "step_value": 0.25}, 0.0, 0.25),
        ({"step_rule": "replay", "step_schedule": (1.0, 0.5, 0.1)}, 0.0, 0.1),
        ({"step_rule": "lag"}, 4.0, 0.25),
        ({"step_rule": "norm_clip", "step_value": 2.5}, 0.0, 0.5),
    ],
)
def test_rules_without_a_memory(setting: dict[str, Any], lag: float, scale: float) -> None:
    seen, way, _ = stepped(lag=lag, **setting)
    assert seen.step_scale == near(scale)
    assert_near(way, scale * GRADIENT)


def test_a_spike_is_skipped() -> None:
    _, _, steps = stepped(step_rule="skip_spike", step_value=3.0)
    seen, way, _ = stepped(10 * GRADIENT, steps=steps)
    assert (seen.step_scale, seen.reason) == (0.0, "step rule skip_spike says 0")
    assert torch.equal(way, torch.zeros(2))
    assert stepped(2 * GRADIENT, steps=steps)[0].step_scale == 1.0


def test_alignment_turns_the_gradient() -> None:
    _, _, steps = stepped(step_rule="gradient_alignment", step_value=0.0)
    _, way, _ = stepped(torch.tensor([4.0, 3.0]), steps=steps)
    assert float(way @ GRADIENT) == near(0, allow=SINGLE)
    assert float(way.norm()) > 1


def test_snr_looks_at_the_groups() -> None:
    records = list(trainer(step_rule="snr", estimator="reinforce", group_size=8).updates())
    scales = [record["step_scale"] for record in records]
    assert all(0 <= scale < 1 for scale in scales)
    assert max(scales) > 0


@pytest.mark.parametrize("rule", ["none", "ess", "constant", "skip_spike"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_no_step(rule: str, bad: float) -> None:
    for gradient, log_ratio in ((torch.tensor([1.0, bad]), LOG_RATIO), (GRADIENT, torch.tensor([0.0, bad]))):
        with pytest.warns(RuntimeWarning, match="skipped"):
            seen, way, steps = stepped(gradient, log_ratio, step_rule=rule)
        assert seen.step_scale == 0
        assert seen.reason
        assert torch.equal(way, torch.zeros(2))
        assert steps.optimizer.param_groups[0]["lr"] == 1.0


def test_a_learning_rate_is_restored_to_the_bit() -> None:
    _, _, steps = stepped(step_rule="constant", step_value=1 / 3, lr=0.1)
    assert steps.optimizer.param_groups[0]["lr"] == 0.1
