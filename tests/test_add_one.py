"""How to add one of each kind, executed: each addition is one entry or one file, and it acts everywhere at once."""

import dataclasses
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations import questions
from simulations.protocol import discover, records_in_process
from tests.kit.statistical import assert_near
from tests.simulations.worlds import worlds_of
from vcposim import commands
from vcposim.baselines import BASELINES, Monomial, leave_one_out
from vcposim.baselines import mean as mean_baseline
from vcposim.batch import Batch
from vcposim.catalogue import CATALOGUE, Entry, Unbiased
from vcposim.commands.main import main
from vcposim.control import STEP_RULES, StepRule
from vcposim.estimators import Estimator
from vcposim.laboratory import exact
from vcposim.learning.lags import Lag
from vcposim.learning.learner import Learner
from vcposim.learning.run_records import Run
from vcposim.learning.step_rules import Control
from vcposim.learning.tasks import TASKS, LearningTask, open_loop, task
from vcposim.problems.chains import chain_problem
from vcposim.problems.policies import drifted, random_tabular
from vcposim.problems.rollouts import bandit_problem
from vcposim.problems.token_chains import TokenChain
from vcposim.results import Records, Result, records_of
from vcposim.weights import TREATMENTS, Treatment, Weighting

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
    monkeypatch.setitem(BASELINES, "toy", mean_baseline(toy))
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


# --- a treatment of weights: an entry of `vcposim.weights.TREATMENTS` -------------------------------------------------


def test_a_treatment_runs_on_floats_and_on_rationals(monkeypatch: pytest.MonkeyPatch) -> None:
    """w^2, written once on a scale: a product of two, whatever the numbers are."""

    def squared(x: Any, scale: Any) -> Any:
        return scale.product(np.stack([x, x], axis=-1), None)

    monkeypatch.setitem(TREATMENTS, "toy", Treatment(squared))
    w = np.array([Fraction(1, 3), Fraction(5, 3)])
    assert (Weighting("toy")(Batch(reward=w, ratio=w)).value == w * w).all()
    floats = np.array([1 / 3, 5 / 3])
    assert_near(Weighting("toy")(Batch(reward=floats, log_ratio=np.log(floats))).value, floats**2)


# --- an environment: a function that returns a `TokenChain`; to learn on it, an entry of `learning.tasks.TASKS` ------


def doubled_token() -> TokenChain:
    """Two tokens out of three; reward 1 if they are equal. States: start, one for each first token, equal, unequal."""
    first, second = [[1, 2, 3]] + [[s] * 3 for s in (1, 2, 3, 4, 5)], [[0] * 3]
    second += [[4 if token == state else 5 for token in range(3)] for state in range(3)] + [[4] * 3, [5] * 3]
    return TokenChain(
        transition=np.array([first, second]),
        reward=np.array([0, 0, 0, 0, 1.0, 0]),
        done=np.zeros(6, dtype=bool),
        start=np.array([0]),
        group_probability=np.ones(1),
    )


def test_an_environment_has_exact_moments_and_gradient() -> None:
    chain, rng = doubled_token(), np.random.default_rng(0)
    target = random_tabular(rng, chain.shape)
    problem = chain_problem(chain, target, [drifted(target, rng, 0.3)])
    prob = np.exp(target.log_prob)
    assert_near(problem.value, sum(prob[0, 0, v] * prob[1, v + 1, v] for v in range(3)))
    found = exact.moments(problem, Estimator(Weighting("importance"), "leave_one_out"), 2)
    assert_near(found.bias, np.zeros(chain.shape).ravel())
    assert exact.moments(problem, Estimator(baseline="group_mean"), 2).relative_bias > 0.1


def test_an_environment_is_learned_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def toy() -> LearningTask:
        chain = doubled_token()
        return LearningTask(chain, open_loop(chain), np.zeros((2, 3)), 0.3)

    monkeypatch.setitem(TASKS, "toy", toy)
    first, *_, last = Learner(task("toy"), [Run("reinforce", step_size=0.1), Run("vcpo", lag=Lag(2))]).updates(40)
    assert (last.value > first.value + 0.1).all()


# --- an experiment: a file of `simulations.questions` -----------------------------------------------------------------

QUESTION = """
from simulations.protocol import Analysis, Comparison, Experiment, Question, Rule, judge
from simulations.stats import of_seeds


def settings(size):
    return [{"seed": seed} for seed in range(8 if size == "reduced" else 64)]


def run(setting):
    return [{"seed": setting["seed"], "value": 1.0 + setting["seed"] / 100}]


def analyse(records):
    value = of_seeds((r["seed"], r["value"]) for r in records)
    return Analysis(judge([Question("big", "C1", "it is big", Rule("value", ">", 0.5), [Comparison("all", value)])]))


def world(mode, key):
    value = {"true": 1.0, "opposite": 0.0, "noise": 0.5, "between": 0.5}[mode]
    return [{"seed": seed, "value": value + (seed - 3.5) / (10 if mode == "noise" else 1000)} for seed in range(8)]


EXPERIMENT = Experiment(
    "toy_question", "Is it big?", ("C1",), settings, run, analyse, world=world, no_estimators="draws no gradient"
)
"""


def test_an_experiment_is_found_run_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "__path__", [str(tmp_path)])
    (tmp_path / "toy_question.py").write_text(QUESTION)
    try:
        found = discover()
        assert list(found) == ["toy_question"]
        assert not found["toy_question"].takes_estimators  # and says why, as every experiment that takes none
        worlds = {mode: worlds_of(found)["toy_question"](mode, "") for mode in ("true", "opposite", "noise")}
        (verdict,) = found["toy_question"].analyse(records_in_process(found["toy_question"], "reduced")).verdicts
        assert verdict.verdict == "holds"
        words = {mode: found["toy_question"].analyse(world).verdicts[0].verdict for mode, world in worlds.items()}
        assert words == {"true": "holds", "opposite": "fails", "noise": "undecided"}
    finally:
        sys.modules.pop("simulations.questions.toy_question", None)


# --- a task for transformers: an entry of `llm_bridge.tasks.TASKS` ----------------------------------------------------


def test_a_task_for_transformers_is_a_name_for_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("reasoning_gym")
    from llm_bridge.tasks import TASKS, Single, arithmetic, load_task
    from llm_bridge.training import TrainConfig
    from vcposim.errors import InputError

    def small(largest: int = 9) -> dict[str, Any]:
        return {"max_value": largest}

    toy = Single("math", "gcd", arithmetic.short_gcd(), arithmetic.NUMBERS, small)
    monkeypatch.setitem(TASKS, "toy", toy)
    made = load_task(TrainConfig(task="toy").task, seed=3, largest=20)
    problem = made.problem(0)
    assert made.reward(problem, made.demonstration(problem)) == 1.0
    assert made.reward(problem, ["?"]) == 0.0
    assert max(map(int, re.findall(r"\d+", problem.prompt))) <= 20
    with pytest.raises(InputError, match="option of task 'toy': unknown name 'larges'"):
        load_task("toy", larges=3)


# --- a law: an entry of `vcposim.testing.laws.LAWS`, with a wrong estimator that dies by it ---------------------------


def test_a_law_judges_every_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    from vcposim.testing import LAWS, Violation, check_estimator
    from vcposim.testing.laws import Broken, Law, Wrong

    def on_rewards_alike(f: Any, case: Any) -> None:
        alike = dataclasses.replace(case, reward=case.reward * 0 + 1)
        if (abs(f.of(alike)) > 1e-6).any():
            raise Broken("a step although all rewards are equal")

    def centered(batch: Batch) -> Any:
        return batch.reward - batch.reward.mean(axis=-1, keepdims=True)

    def plain(batch: Batch) -> Any:
        return batch.reward * 1.0

    toy = Law("c = 0 where rewards are equal", "no news", lambda f: f.cases(), on_rewards_alike, Wrong(plain))
    monkeypatch.setitem(LAWS, "toy", toy)
    assert check_estimator(centered, ["toy"], without=["padding"], examples=5)["toy"] == "holds"
    with pytest.raises(Violation, match="plain breaks 'toy': c = 0 where rewards are equal"):
        check_estimator(toy.wrong.coefficients, ["toy"], without=["padding"], examples=5)


# --- a subcommand: a file of `vcposim.commands` ---------------------------------------------------------------------

COMMAND = '''"""`vcposim toy`: twice a number."""

EXAMPLES = ("vcposim toy 4",)


def add_arguments(p):
    p.add_argument("number", type=float)


def run(arguments):
    print(2 * arguments.number)
'''


def test_a_subcommand_is_listed_and_loaded_when_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    (tmp_path / "toy.py").write_text(COMMAND)
    try:
        assert main([]) == 0
        assert re.search(r"  toy +twice a number", capsys.readouterr().out)
        assert "vcposim.commands.toy" not in sys.modules
        assert main(["toy", "4"]) == 0
        assert capsys.readouterr().out == "8.0\n"
        with pytest.raises(SystemExit):
            main(["toy", "--help"])
        assert capsys.readouterr().out.endswith("for example:\n  vcposim toy 4\n")
        with pytest.raises(SystemExit):
            main(["toy", "4", "--nonsense"])
        assert capsys.readouterr().err.startswith("vcposim toy: error: unrecognized arguments: --nonsense")
    finally:
        sys.modules.pop("vcposim.commands.toy", None)


# --- a result: a dataclass that inherits `vcposim.results.Result` -----------------------------------------------------


@dataclass(frozen=True)
class Toy(Result):
    mse: float

    def records(self) -> Records:
        return Records([{"mse": self.mse}])


def test_a_result_converts_to_a_table_and_shows_itself() -> None:
    assert records_of({"a": Toy(0.25), "b": Toy(float("nan"))})[0] == {"name": "a", "mse": 0.25}
    assert Toy(0.25)._repr_html_() == "<table><tr><th>mse</th></tr><tr><td>0.25</td></tr></table>"
    with pytest.raises(NotImplementedError, match="Result has no records; write the method"):
        Result().records()


# --- the table of CONTRIBUTING --------------------------------------------------------------------------------------


def test_every_kind_of_contributing_is_executed_here() -> None:
    root = Path(__file__).parents[1]
    section = (root / "CONTRIBUTING.md").read_text().partition("## How to add one")[2].partition("\n## ")[0]
    kinds = re.findall(r"^\| (?:an?) ([\w ]+?) \|", section, re.MULTILINE)
    here = Path(__file__).read_text()
    assert len(kinds) >= 10
    assert [kind for kind in kinds if not re.search(rf"^# --- an? {kind}: ", here, re.MULTILINE)] == []
