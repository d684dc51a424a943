"""A sound method passes the acceptance task; a flipped sign and an inverted ratio do not."""

import copy
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("reasoning_gym")

from llm_bridge import acceptance  # noqa: E402
from llm_bridge.acceptance import NOW_AND_THEN, PROBLEMS, SETTING, accept, now_and_then, solved, start  # noqa: E402
from llm_bridge.tasks import load_task  # noqa: E402
from vcposim.batch import Batch  # noqa: E402
from vcposim.catalogue import entry  # noqa: E402
from vcposim.estimators import estimator_of  # noqa: E402

TASK = load_task(SETTING.task, **SETTING.task_options)


def flipped(batch: Batch) -> Any:
    return -entry("sequence_tis").estimator.coefficients(batch)


def inverted(batch: Batch) -> Any:
    assert batch.log_ratio is not None
    return entry("sequence_tis").estimator.coefficients(replace(batch, log_ratio=-batch.log_ratio))


@pytest.fixture(scope="module")
def begun() -> Any:
    return start(TASK)


@pytest.mark.slow
def test_problems_are_solved_now_and_then(begun: Any) -> None:
    """By chance alone a rate of 32 samples leaves the band, so they are asked together."""
    problems = now_and_then(begun, TASK)
    assert len(problems) == PROBLEMS == len({TASK.problem(i).prompt for i in problems})
    rate = solved(begun, TASK, problems)
    low, high = NOW_AND_THEN
    assert all(low <= x <= high for x in rate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "passes"),
    [("vcpo", True), (estimator_of(flipped), False), (estimator_of(inverted), False)],
    ids=["sound", "sign flipped", "ratio inverted"],
)
def test_a_sound_method_passes_and_a_broken_one_does_not(begun: Any, estimator: Any, passes: bool) -> None:
    found = accept(replace(SETTING, estimator=estimator), lm=copy.deepcopy(begun), show=lambda line: None)
    assert found.passed is passes, found


def test_the_command_says_what_it_found_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "accept", lambda config: acceptance.Accepted(0.45, 0.951))
    assert acceptance.main(["--estimator", "rloo"]) == 0
    monkeypatch.setattr(acceptance, "accept", lambda config: acceptance.Accepted(0.45, 0.95))
    assert acceptance.main([]) == 1
    assert "vcpo fails: 0.950 of samples right after training, 0.450 before" in capsys.readouterr().out


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert acceptance.main(["--estimator", "vcop"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'vcpo'" in error
