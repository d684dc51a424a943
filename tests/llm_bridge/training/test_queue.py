"""Trajectories arrive at the update they were made for, and their stamps say who drew each token."""

import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge.logprobs import token_log_prob  # noqa: E402
from llm_bridge.rollouts import Rollouts  # noqa: E402
from llm_bridge.training.queue import joined, picked  # noqa: E402
from tests.kit.statistical import SINGLE, assert_near, near  # noqa: E402
from tests.llm_bridge.training.toys import tiny, trainer  # noqa: E402
from vcposim.errors import InputError  # noqa: E402


def served(updates: int = 6, **setting: Any) -> list[Rollouts]:
    """What each update learned from."""
    made, out = trainer(**setting), []
    for _ in made.updates(updates):
        assert made.rollouts is not None
        out.append(made.rollouts)
    return out


def lags(update: int, rollouts: Rollouts) -> set[int]:
    return set((update - rollouts.version[rollouts.mask > 0]).tolist())


def test_a_fixed_lag_is_exact_after_a_ramp() -> None:
    assert [lags(u, r) for u, r in enumerate(served(lag=2))] == [{0}, {1}, {2}, {2}, {2}, {2}]


def test_uniform_lags_are_the_plans() -> None:
    made = trainer(lag=3, lag_law="uniform")
    for record in made.updates(6):
        update, rollouts = int(record["step"]), made.rollouts
        assert rollouts is not None
        drawn = (update - rollouts.version).masked_fill(rollouts.mask == 0, 0).amax(1)
        assert drawn.view(3, 4).tolist() == [[lag] * 4 for lag in made.queue.schedule.lags(update)]


def test_in_flight_trajectories_mix_versions_in_order() -> None:
    mixed = 0
    for update, rollouts in enumerate(served(lag=2, lag_law="in_flight", max_new_tokens=6)):
        for version, own in zip(rollouts.version, rollouts.mask > 0, strict=True):
            stamps = version[own].tolist()
            assert stamps == sorted(stamps)
            assert stamps[0] >= update - 2
            mixed += len(set(stamps)) == 3
    assert mixed > 10


@pytest.mark.parametrize("law", ["fixed", "uniform", "in_flight"])
def test_every_batch_holds_the_same_problems_whatever_the_lag(law: str) -> None:
    on_policy = [r.group.tolist() for r in served(4, lag=0)]
    assert [r.group.tolist() for r in served(4, lag=3, lag_law=law)] == on_policy
    assert len({tuple(groups) for groups in on_policy}) == 4  # no batch is served twice


def test_on_policy_log_probabilities_are_the_learners() -> None:
    made = trainer(lag=0)
    for record in made.updates(3):
        assert record["ess_fraction_sequence"] == near(1, allow=SINGLE)
        assert record["kl_low_variance"] == near(0, allow=SINGLE)


def test_a_stamp_names_the_version_whose_probability_is_stored() -> None:
    made, history = trainer(lag=2), []
    for _ in range(5):
        weights = {name: p.detach().clone() for name, p in made.model.named_parameters()}
        history.append(weights)
        made.update()
    assert made.rollouts is not None
    old = tiny().model
    old.load_state_dict(history[2], strict=False)
    now = token_log_prob(old, made.rollouts).detach()
    own = made.rollouts.mask > 0
    assert_near(now[own], made.rollouts.behavior_log_prob[own], allow=SINGLE)


@pytest.mark.parametrize("law", ["fixed", "uniform", "in_flight"])
def test_a_queue_goes_on_from_its_state(law: str) -> None:
    made, other = (trainer(lag=2, lag_law=law, max_new_tokens=6) for _ in range(2))
    list(made.updates(3))
    state = made.queue.state_dict()
    plain = json.loads(json.dumps(state["in_flight"]))
    other.queue.load_state_dict({"waiting": state["waiting"], "in_flight": plain})
    for queue in (made.queue, other.queue):
        queue.generate(made.lm, 3)
    a, b = made.queue.take(3), other.queue.take(3)
    assert torch.equal(a.token, b.token)
    assert torch.equal(a.behavior_log_prob, b.behavior_log_prob)
    assert torch.equal(a.version, b.version)
    assert a.responses == b.responses


def test_joining_undoes_picking() -> None:
    batch = served(1)[0]
    short = picked(batch, slice(0, 4))
    narrow = Rollouts(
        **{name: x[:, :-1] if getattr(x, "ndim", 0) == 2 else x for name, x in short.state_dict().items()}
    )
    both = joined([narrow, picked(batch, slice(4, 12))])
    assert both.token.shape == batch.token.shape
    assert both.version[0, -1] == -1
    assert torch.equal(joined([short, picked(batch, slice(4, 12))]).token, batch.token)


def test_a_plan_that_ends_is_not_exceeded() -> None:
    made = trainer(lag=2, updates=2, extend=False)
    assert len(list(made.updates())) == 2
    assert len(made.queue) == 0
    with pytest.raises(InputError, match="updates: rollouts for update 2 were never sampled"):
        made.update()
    going_on = trainer(lag=2, updates=2)
    list(going_on.updates())
    assert len(going_on.queue) == 2 * 3
