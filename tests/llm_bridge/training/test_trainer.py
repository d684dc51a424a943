"""Runs as a whole: they learn, repeat, and have defined behavior where a batch says little."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from torch import nn  # noqa: E402

from llm_bridge.scores import ScoreTape  # noqa: E402
from llm_bridge.training import TrainConfig, Trainer  # noqa: E402
from llm_bridge.training.config import NORM_METHODS, read_config, typed  # noqa: E402
from llm_bridge.training.records import to_json  # noqa: E402
from llm_bridge.training.sharding import weights  # noqa: E402
from tests.llm_bridge.training.toys import Constant, Letters, config, tiny, trainer  # noqa: E402
from vcposim.batch import Batch  # noqa: E402
from vcposim.errors import InputError  # noqa: E402
from vcposim.estimators import Estimator  # noqa: E402


def moved(made: Trainer) -> float:
    start = weights(tiny().model)
    return max(float((p - start[name]).abs().max()) for name, p in weights(made.model).items())


@pytest.mark.parametrize("setting", [{"lag": 0}, {"lag": 4, "step_rule": "ess"}])
def test_it_learns(setting: dict[str, Any]) -> None:
    """From a success rate of a quarter to above 0.9 in 40 updates."""
    made = trainer(updates=40, groups=4, group_size=8, max_new_tokens=2, lr=5e-3, **setting)
    records = list(made.updates())
    assert records[0]["reward"] < 0.5
    assert made.evaluate(100)["success_rate"] > 0.9


def test_a_run_is_a_function_of_its_configuration() -> None:
    a, b, other = (list(trainer(lag=1, seed=seed).updates()) for seed in (3, 3, 4))
    assert repr(a) == repr(b)
    assert repr(a) != repr(other)


def test_stopping_and_going_on_changes_nothing() -> None:
    whole, parts = trainer(updates=4), trainer(updates=4)
    expected = list(whole.updates())
    found = [*parts.updates(1), *parts.updates(2)]
    parts.evaluate(5)  # draws no number that training would see
    assert repr(found + list(parts.updates())) == repr(expected)


def test_records_have_the_same_names_for_every_method() -> None:
    names = [list(next(trainer(estimator=name).updates())) for name in ("vcpo", "dr_grpo", "otb")]
    assert names[0] == names[1] == names[2]
    assert {"reward", "khat", "ess_fraction_sequence", "step_scale", "gradient_norm", "entropy", "lag"} <= {*names[0]}


def test_equal_rewards_are_no_gradient_under_a_centered_baseline() -> None:
    made = trainer(Constant(), estimator="vcpo")
    for record in made.updates():
        assert (record["gradient_norm"], record["equal_groups"], record["step_scale"]) == (0.0, 1.0, 1.0)
    assert moved(made) == 0
    assert next(trainer(Constant(), estimator="sequence_is").updates())["gradient_norm"] > 0


def test_responses_without_tokens_are_no_step() -> None:
    made = trainer(max_new_tokens=0)
    with pytest.warns(RuntimeWarning, match="no trajectory was observed"):
        records = list(made.updates(2))
    assert [record["step_scale"] for record in records] == [0.0, 0.0]
    assert math.isnan(records[0]["reward"])
    assert records[0]["trajectories"] == 0
    assert moved(made) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_no_step(bad: float) -> None:
    made = trainer(Constant(value=bad))
    with pytest.warns(RuntimeWarning, match="skipped: a coefficient or the gradient is not a number"):
        record = next(made.updates())
    assert record["step_scale"] == 0
    assert moved(made) == 0


def test_weights_that_are_no_number_stop_the_steps_and_not_the_program() -> None:
    made = trainer()
    with torch.no_grad():
        made.model.lm_head.weight[0] = math.nan
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert [record["step_scale"] for record in made.updates(2)] == [0.0, 0.0]


@dataclasses.dataclass(frozen=True)
class Raising(Letters):
    def reward(self, problem: Any, responses: Any) -> float:
        raise OSError("the verifier's server is gone")


def test_a_verifier_of_ones_own_that_raises_is_not_swallowed() -> None:
    with pytest.raises(OSError, match="the verifier's server is gone"):
        trainer(Raising()).update()


@dataclasses.dataclass(frozen=True)
class Halves:
    needs = ()

    def __call__(self, batch: Batch, advantage: Any) -> Any:
        return 0 * batch.reward + 0.5


def test_an_estimator_of_ones_own_trains() -> None:
    made = trainer(estimator=Estimator(baseline="group_mean", surrogate=Halves()))
    assert sum(record["gradient_norm"] for record in made.updates()) > 0
    assert "Halves" in made.config.as_dict()["estimator"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"lag": -1}, "lag: -1 is negative"),
        ({"estimator": "vcop"}, "did you mean 'vcpo'"),
        ({"step_rule": "es"}, "did you mean 'ess'"),
        ({"lag_law": "uniforn"}, "did you mean 'uniform'"),
        ({"norm": "exat"}, "did you mean 'exact'"),
        ({"norm_method": "lop"}, "norm_method: unknown name 'lop'; did you mean 'loop'"),
        ({"optimizer": "adam2"}, "optimizer: unknown name"),
        ({"groups": 0}, "groups: 0; give a whole number of at least 1"),
        ({"temperature": 0.0}, "temperature: 0.0 is not positive"),
        ({"lr": math.inf}, "lr: inf is not a finite non-negative number"),
        ({"estimator": "rloo", "group_size": 1}, "group_size: 1 leaves nobody"),
        ({"step_rule": "replay"}, "step_schedule: empty"),
        ({"step_rule": "constant", "step_value": -1.0}, "value: -1.0 is not a finite non-negative number"),
        ({"step_rule": "ess", "ess_reference": "lats"}, "reference: unknown name 'lats'"),
        ({"step_rule": "ess", "ess_reference": 2.0}, "reference: 2.0 is not in"),
    ],
)
def test_wrong_settings_are_one_line(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        trainer(**setting)
    assert "\n" not in str(raised.value)


def test_evaluation_needs_problems() -> None:
    with pytest.raises(InputError, match="problems: 0"):
        trainer().evaluate(0)


def test_a_configuration_goes_through_a_file(tmp_path: Path) -> None:
    made = config(
        lag=3, step_rule="replay", step_schedule=(1.0, 0.5), task_options={"digits": 2}, ess_reference="first"
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(made.as_dict()))
    assert TrainConfig.from_dict(read_config(path)) == made
    toml = tmp_path / "config.toml"
    toml.write_text('estimator = "rloo"\nlag = 2\n')
    assert TrainConfig.from_dict(read_config(toml)) == TrainConfig(estimator="rloo", lag=2)
    toml.write_text("lags = 2")
    with pytest.raises(InputError, match=r"config: unknown name 'lags'; did you mean 'lag'"):
        TrainConfig.from_dict(read_config(toml))
    with pytest.raises(InputError, match=r"lag: 2\.5 is not a whole number"):
        typed("lag", 2.5)


def test_a_record_is_strict_json() -> None:
    line = to_json({"step": 2.0, "khat": -math.inf, "reward": 0.25})
    assert line == '{"step": 2, "khat": null, "reward": 0.25}'


def test_the_settings_know_every_method_of_a_tape() -> None:
    """Also "loop", which refusals of a tape advise."""
    with pytest.raises(InputError, match=f"known: {', '.join(sorted(NORM_METHODS))}$"):
        ScoreTape(nn.Linear(2, 2), method="other")
