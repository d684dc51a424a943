"""Prompts that come again, and baselines that remember them."""

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge.training import Trainer  # noqa: E402
from llm_bridge.training.checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from llm_bridge.training.trainer import HELD_OUT  # noqa: E402
from tests.kit.statistical import OPERATION, near  # noqa: E402
from tests.llm_bridge.training.toys import config, trainer  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

MEMORY: dict[str, Any] = {"estimator": "on_policy_optimal", "memory": 0.5, "problems": 4, "groups": 3, "lag": 1}


def baselines(made: Trainer) -> Any:
    """R - c N G of the rows of the last update, by group: (groups, 1), the kernel's baseline as it was used."""
    assert made.made is not None
    every = made.made.every
    c = every.groups.lift(made.made.coefficient) * every.batch.reward.numel()
    return (every.batch.reward - c).mean(-1)


def test_a_problem_comes_again_under_a_number_of_its_own_and_held_out_ones_do_not() -> None:
    task = trainer(problems=3).task
    assert [task.problem(i).prompt for i in (0, 1, 2)] == [task.problem(i).prompt for i in (3, 4, 5)]
    assert [task.problem(i).index for i in (1, 4)] == [1, 4]
    plain = trainer().task
    assert task.problem(HELD_OUT + 7) == plain.problem(HELD_OUT + 7)
    assert copy.deepcopy(task).name == "letters"


def test_a_baseline_remembers_its_prompts_past() -> None:
    """By hand: every response a prompt had, n^2 as its weight, half of it for each later visit of the prompt."""
    made, past = trainer(updates=5, **MEMORY), {}  # type: ignore[var-annotated]
    for step, _ in enumerate(made.updates()):
        assert made.made is not None
        batch = made.made.every.batch
        weight = batch.scores.score_sq_norm  # type: ignore[union-attr]
        for g in range(3):
            prompt = (3 * step + g) % 4
            old = past.get(prompt, np.zeros(2))
            own = np.array([float((weight[g] * batch.reward[g]).sum()), float(weight[g].sum())])
            past[prompt] = 0.5 * old + own
        want = [past[(3 * step + g) % 4][0] / past[(3 * step + g) % 4][1] for g in range(3)]
        assert baselines(made).tolist() == near(want, allow=OPERATION)


def test_without_a_past_it_is_the_plain_baseline_and_micro_batches_change_nothing() -> None:
    plain, remembering, parts = (
        trainer(**{**MEMORY, **changes})
        for changes in ({"memory": 0.0}, {"problems": 99}, {"problems": 99, "micro_batch": 4})
    )
    for made in (plain, remembering, parts):
        next(made.updates())
    assert baselines(remembering).tolist() == near(baselines(plain).tolist(), allow=OPERATION)
    assert baselines(parts).tolist() == near(baselines(plain).tolist(), allow=OPERATION)


def test_a_memory_is_in_the_checkpoint(tmp_path: Any) -> None:
    whole, first, second = (trainer(updates=6, **MEMORY) for _ in range(3))
    expected = list(whole.updates())
    found = list(first.updates(3))
    save_checkpoint(tmp_path, 3, first.state_dict(), 1)
    second.load_state_dict(load_checkpoint(tmp_path / "update-00000003"))
    assert repr(found + list(second.updates())) == repr(expected)


def test_a_batch_that_is_no_number_is_not_remembered() -> None:
    made = trainer(updates=3, **MEMORY)
    next(made.updates())
    before = made.maker.remembered.copy()
    made.queue.waiting[next(iter(made.queue.waiting))].reward[:] = torch.nan
    with pytest.warns(RuntimeWarning, match="not a number"):
        next(made.updates())
    assert (made.maker.remembered == before).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": 1.0}, "memory: 1.0 is not in"),
        ({"estimator": "rloo"}, "memory: 0.5 with an estimator whose baseline is no weighted mean"),
        ({"problems": 0}, "memory: 0.5 where no prompt comes twice"),
        ({"problems": -1}, "problems: -1; give a whole number"),
    ],
)
def test_what_cannot_remember_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config(**{**MEMORY, **changes})
