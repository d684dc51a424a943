"""The gradient of an update is the kernel's coefficients times the scores, by every route."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge.groups import Groups  # noqa: E402
from llm_bridge.loss import mean_coefficient  # noqa: E402
from llm_bridge.ratios import trajectory_batch  # noqa: E402
from llm_bridge.scores import score_sq_norms_loop  # noqa: E402
from llm_bridge.training import Trainer, gradient  # noqa: E402
from llm_bridge.training.gradient import GradientMaker  # noqa: E402
from tests.kit.statistical import assert_near  # noqa: E402
from tests.llm_bridge.training.toys import trainer  # noqa: E402
from vcposim.batch import Batch, ScoreNorms  # noqa: E402
from vcposim.catalogue import CATALOGUE, entry  # noqa: E402
from vcposim.errors import InputError  # noqa: E402
from vcposim.estimators import FunctionEstimator  # noqa: E402

ROUNDING = 1e-6
"""of Hugging Face's RMSNorm, which works in float32 whatever the model's dtype"""


def lagging(**setting: Any) -> Trainer:
    """A trainer two updates into a run with lag, in float64, with the next batch in `rollouts`."""
    made = trainer(dtype="float64", lag=2, temperature=1.5, **setting)
    list(made.updates(2))
    made.queue.generate(made.lm, made.version)
    made.rollouts = made.queue.take(made.version)
    return made


def gradient_of(made: Trainer, **setting: Any) -> Any:
    """p.grad, flat, by the route that the setting asks for."""
    maker = GradientMaker(made.model, made.trained, made.config.changed(**setting), made.older)
    for p in made.model.parameters():  # of whoever had the model before
        p.grad = torch.ones_like(p)
    assert made.rollouts is not None
    assert maker(made.rollouts, made.version).finite
    return torch.cat([p.grad.flatten() for p in made.model.parameters()])


def slow_twin(made: Trainer) -> Any:
    """One backward a trajectory for norms, one for the gradient; coefficients from the kernel on (group, sample)."""
    rollouts, estimator = made.rollouts, made.config.resolved()
    assert rollouts is not None
    log_prob = made.maker.log_prob(made.model, rollouts)
    norm = score_sq_norms_loop(log_prob, rollouts.mask, list(made.model.parameters()))
    groups = Groups.of(rollouts.group)
    batch = trajectory_batch(
        rollouts.reward, log_prob, rollouts.behavior_log_prob, rollouts.mask, groups=groups, score_sq_norm=norm
    )
    c = groups.flat(mean_coefficient(estimator.coefficients(batch), batch))
    c = c if c.ndim == 2 else c[:, None]
    loss = -(c * log_prob * rollouts.mask).sum()
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(made.model.parameters()))])


def off(found: Any, expected: Any) -> float:
    assert float(expected.norm()) > 1e-3
    return float((found - expected).norm() / expected.norm())


def on_n2(name: str) -> Any:
    """A rival on the baseline that weighs rewards by squared score norms: coefficients a token, norms a trajectory."""
    return replace(entry(name).estimator, baseline="on_policy_optimal")


N2 = {f"{name} on n2": on_n2(name) for name in ("ppo_clip", "m2po", "token_tis")}


@pytest.mark.parametrize(
    "name", ["dr_grpo", "vcpo", "vcpo_group_std", "vcpo_leave_one_out", "token_tis", "gspo", "m2po", *N2]
)
def test_every_route_forms_the_slow_twins_gradient(name: str) -> None:
    made = lagging(estimator=N2.get(name, name))
    expected = slow_twin(made)
    for route in (0, made.config.group_size, 5):  # one pass; a group at a time; two passes with a ragged end
        assert off(gradient_of(made, micro_batch=route), expected) < ROUNDING, route


@pytest.mark.parametrize("name", N2)
def test_token_coefficients_on_a_norm_baseline_are_the_numpy_kernels(name: str) -> None:
    """From the same log-probabilities and norms, in NumPy; the group mean instead of n^2 is another update."""
    made = lagging(estimator=N2[name])
    assert made.rollouts is not None
    found = made.maker(made.rollouts, made.version)
    seen = {k: np.asarray(x) for k, x in vars(found.every.batch).items() if isinstance(x, torch.Tensor)}
    norms = ScoreNorms(np.asarray(found.every.batch.scored().sq_norm(found.every.batch.reward * 0 + 1)))
    batch = Batch(**seen, scores=norms, grouped=True)
    c = N2[name].coefficients(batch) * seen["measure"][..., None] / len(seen["reward"])
    plain = replace(N2[name], baseline="group_mean").coefficients(batch) * seen["measure"][..., None] / len(c)
    assert_near(found.coefficient, c.reshape(-1, c.shape[-1]), scale=1)
    assert abs(c - plain).max() > 1e-3 * abs(c).max()


def test_another_baseline_is_a_setting() -> None:
    """`--estimator ppo_clip --baseline on_policy_optimal`; another run than on the mean."""
    n2 = {"estimator": "ppo_clip", "baseline": "on_policy_optimal"}
    runs = [list(trainer(lag=1, updates=3, **x).updates()) for x in (n2, {"estimator": N2["ppo_clip on n2"]})]
    assert runs[0] == runs[1]
    assert [r["step_scale"] for r in runs[0]] == [1, 1, 1]
    plain = list(trainer(lag=1, updates=3, estimator="ppo_clip").updates())
    assert plain[-1]["gradient_norm"] != runs[0][-1]["gradient_norm"]
    with pytest.raises(InputError, match="baseline: unknown name 'n2'"):
        trainer(estimator="ppo_clip", baseline="n2")
    with pytest.raises(InputError, match="baseline: 'zero' with a function of your own"):
        trainer(estimator=FunctionEstimator(lambda batch: batch.reward), baseline="zero")


def test_the_route_by_group_is_taken_and_needs_no_second_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = gradient.policy_logits
    monkeypatch.setattr(gradient, "policy_logits", lambda *a: calls.append(1) or original(*a))
    made = lagging(estimator="vcpo")
    for setting, forwards in (({"micro_batch": 4}, 3), ({"micro_batch": 0}, 1), ({"micro_batch": 6}, 4)):
        calls.clear()
        gradient_of(made, **setting)
        assert len(calls) == forwards, setting


def test_group_gradients_average_to_the_gradient() -> None:
    made = lagging(estimator="vcpo")
    assert made.rollouts is not None
    found = made.maker(made.rollouts, made.version)
    each = made.maker.group_gradients(made.rollouts, found)
    assert each.shape[0] == 3
    assert off(each.mean(0), torch.cat([p.grad.flatten() for p in made.model.parameters()])) < ROUNDING


@pytest.mark.parametrize("norm", ["sketch", "last_block", "logit", "length"])
def test_stand_ins_for_norms_are_near_and_not_equal(norm: str) -> None:
    made = lagging(estimator="vcpo")
    assert 1e-6 < off(gradient_of(made, norm=norm), gradient_of(made)) < 0.5


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "vcpo_truncation_aware"])
def test_the_whole_catalogue_trains(name: str) -> None:
    (first, second) = trainer(estimator=name, lag=1, updates=2).updates()
    assert first["step_scale"] == second["step_scale"] == 1
    assert first.keys() == second.keys()


def test_what_cannot_be_served_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="estimator: cannot be served in training: scores: only norms are known"):
        trainer(estimator="vcpo_truncation_aware")


def test_ratios_to_older_policies_are_taken() -> None:
    """The anchor is one update old, the reference is the start: forget to move or to keep them, and this fails."""
    anchored, penalized = lagging(estimator="decoupled_ppo"), lagging(estimator="tba")
    for made, name in ((anchored, "anchor_log_ratio"), (penalized, "reference_log_ratio")):
        assert made.rollouts is not None
        value = getattr(made.maker(made.rollouts, made.version).record, name)
        assert float(value.abs().max()) > 1e-6
    now, before = (dict(m.named_parameters()) for m in (anchored.model, anchored.older["anchor"]))
    far = max(float((p - before[n]).detach().abs().max()) for n, p in now.items())
    assert 0 < far < 1.01 * anchored.config.lr / (1 - 0.9) * 1.01  # one step of Adam away
    assert trainer(estimator="decoupled_ppo", lag=0).older["anchor"] is not None
    assert entry("decoupled_ppo").estimator.needs >= {"anchor_log_ratio"}


@pytest.mark.parametrize("route", [0, 4, 5])
def test_an_empty_group_is_as_if_it_were_not_there(route: int) -> None:
    made = lagging(estimator="vcpo")
    assert made.rollouts is not None
    each = made.maker.group_gradients(made.rollouts, made.maker(made.rollouts, made.version))
    mask = made.rollouts.mask.clone()
    mask[:4] = 0
    made.rollouts = replace(made.rollouts, mask=mask)
    assert off(gradient_of(made, micro_batch=route), each[1:].mean(0)) < ROUNDING
