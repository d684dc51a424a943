"""How to add one of each kind, executed: each addition is one entry in one table, and it acts everywhere at once."""

from typing import Any

import numpy as np
import pytest

from tests.kit.statistical import assert_near
from vcposim.baselines import BASELINES, Monomial, leave_one_out, mean
from vcposim.batch import Batch
from vcposim.catalogue import CATALOGUE, Entry, Unbiased
from vcposim.control import STEP_RULES, StepRule
from vcposim.estimators import Estimator
from vcposim.laboratory import exact
from vcposim.learning.lags import Lag
from vcposim.learning.learner import Learner
from vcposim.learning.run_records import Run
from vcposim.learning.step_rules import Control
from vcposim.learning.tasks import task
from vcposim.problems.rollouts import bandit_problem
from vcposim.weights import Weighting

# --- a step rule: an entry of `vcposim.control.STEP_RULES` ------------------------------------------------------------


@pytest.fixture
def toy_rule(monkeypatch: pytest.MonkeyPatch) -> StepRule:
    """Half a step where the batch is stale, a full one where it is not."""
    rule = StepRule(
        formula="1/2 if lag > 0, else 1",
        scale=lambda seen, settings: 1 - (seen.lag > 0) * 0.5,
        turn=lambda gradient, previous, settings: 0 * gradient + 1,
    )
    monkeypatch.setitem(STEP_RULES, "toy", rule)
    return rule


def test_a_step_rule_acts_in_the_laboratory(toy_rule: StepRule) -> None:
    runs = [Run("vcpo", lag=Lag(k), control=Control("toy"), optimizer="sgd", clip_norm=float("inf")) for k in (0, 3)]
    learner = Learner(task("contextual_bandit"), runs)
    before = learner.state.theta.copy()
    first, second = learner.updates(2)
    assert (first.step_scale.tolist(), second.step_scale.tolist()) == ([1.0, 1.0], [1.0, 0.5])
    moved = learner.state.theta - before
    assert_near(moved, np.outer([2.0, 1.5], np.full(before.shape[1], 0.05)), scale=0)  # turned, then scaled


def test_a_step_rule_acts_in_the_trainer(toy_rule: StepRule) -> None:
    torch = pytest.importorskip("torch")
    from llm_bridge.training import TrainConfig
    from llm_bridge.training.steps import Steps, make_optimizer

    config = TrainConfig(step_rule="toy", optimizer="sgd", lr=1.0, clip_norm=float("inf"))
    p = torch.nn.Parameter(torch.zeros(2))
    steps = Steps(config, make_optimizer(config, [p]))
    where: list[Any] = []
    for lag in (0.0, 3.0):
        p.grad = torch.tensor([3.0, 4.0])
        scale = steps.step(0, lag, torch.zeros(4), torch.ones(4)).step_scale
        where.append((scale, p.tolist()))
    assert where == [(1.0, [-3.0, -4.0]), (0.5, [-3.5, -4.5])]  # no previous gradient to turn from, then turned


def test_a_step_rule_that_nobody_knows_is_refused_by_both() -> None:
    pytest.importorskip("torch")
    from llm_bridge.training import TrainConfig

    for make in (lambda: Control("toy"), lambda: TrainConfig(step_rule="toy")):
        with pytest.raises(ValueError, match="rule: unknown name 'toy'"):
            make()


# --- a baseline: an entry of `vcposim.baselines.BASELINES` ------------------------------------------------------------


def test_a_baseline_acts_in_moments_and_has_its_held_out_form(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = bandit_problem([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [1.0, 0.0, 2.0], [1.0, 2.0, 4.0])
    toy = Monomial(score=2, length=1)  # L ||s||^2
    monkeypatch.setitem(BASELINES, "toy", mean(toy))
    monkeypatch.setitem(BASELINES, "toy_others", leave_one_out(toy))
    assert Estimator(baseline="toy").needs == {"scores", "length"}
    biased, unbiased = (exact.moments(problem, Estimator(baseline=name), 3) for name in ("toy", "toy_others"))
    assert float(biased.relative_bias) > 1e-3
    assert_near(unbiased.bias, np.zeros(3))
    with pytest.raises(ValueError, match="group_size: 1 leaves nobody for baseline 'toy_others'"):
        exact.moments(problem, Estimator(baseline="toy_others"), 1)


# --- an estimator: an entry of the catalogue, or a function of a batch ------------------------------------------------


def test_an_estimator_learns_by_its_name_as_it_does_as_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """That an entry passes every test of the catalogue: test_rivals.py, with the docstring's."""
    mine = Entry(
        estimator=Estimator(Weighting("truncate", cap=3.0), baseline="group_mean"),
        formula="min(w, 3) (R - mean)",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("reinforce",),
    )
    monkeypatch.setitem(CATALOGUE, "toy", mine)

    def function(batch: Batch) -> Any:
        w = np.minimum(np.exp(batch.log_ratio), 3.0)
        return w * (batch.reward - batch.reward.mean(axis=-1, keepdims=True))

    *_, last = Learner(task("contextual_bandit"), [Run(e, lag=Lag(2)) for e in ("toy", function)]).updates(5)
    assert_near(last.value[1], last.value[0])
