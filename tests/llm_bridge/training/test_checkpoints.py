"""A checkpoint is whole or not there, and says so in one line when it is damaged."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge.training import checkpoints as module  # noqa: E402
from llm_bridge.training.checkpoints import STATE, TENSORS, checkpoints, load_checkpoint, save_checkpoint  # noqa: E402
from tests.llm_bridge.training.toys import trainer  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

NESTED = {
    "numbers": [1, 0.1, math.inf, None, True, "text"],
    "tensors": [{"x": torch.arange(3.0), "y": torch.tensor([[True]])}, torch.tensor(2.5, dtype=torch.float64)],
    "empty": {"list": [], "dict": {}, "tensor": torch.zeros(0, 3)},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert same(load_checkpoint(save_checkpoint(tmp_path, 3, NESTED, keep=1)), NESTED)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for version in (5, 10, 100, 20):
        save_checkpoint(tmp_path, version, {}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["update-00000020", "update-00000100"]


def test_a_kill_while_saving_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, NESTED, keep=2)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, NESTED, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["update-00000001"]
    save_checkpoint(tmp_path, 3, NESTED, keep=2)
    assert not list(tmp_path.glob(module.PARTIAL + "*"))


@pytest.mark.parametrize("file", [STATE, TENSORS])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_is_one_line_with_the_file_and_a_remedy(tmp_path: Path, file: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, 1, NESTED, keep=1) / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[10 if file == STATE else -1] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError, match="delete this folder to resume from the one before it") as raised:
        load_checkpoint(path.parent)
    assert str(path) in str(raised.value) or str(path.parent) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"lag": 2, "step_rule": "ess", "ess_reference": "running"},
        {"lag": 2, "lag_law": "in_flight", "step_rule": "skip_spike", "step_value": 2.0},
        {"lag": 2, "step_rule": "length_signal", "step_value": 1.01},
        {"lag": 2, "step_rule": "token_ess", "estimator": "token_tis"},
        {"lag": 3, "lag_law": "uniform", "step_rule": "gradient_alignment", "step_value": 0.1, "norm": "sketch"},
        {"lag": 1, "estimator": "decoupled_ppo", "optimizer": "sgd"},
        {"lag": 1, "estimator": "tba", "weight_decay": 0.1},
    ],
)
def test_a_resumed_trainer_goes_on_to_the_bit(tmp_path: Path, setting: dict[str, Any]) -> None:
    whole, first, second = (trainer(updates=6, **setting) for _ in range(3))
    records = list(whole.updates())
    list(first.updates(3))
    second.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 3, first.state_dict(), keep=1)))
    assert same([repr(r) for r in second.updates()], [repr(r) for r in records[3:]])
    assert same(second.state_dict(), whole.state_dict())


def test_a_checkpoint_of_another_model_is_refused() -> None:
    made, state = trainer(), trainer().state_dict()
    state["model"]["lm_head.weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"model: 'lm_head.weight' has shape .*, \(3, 3\) in the checkpoint"):
        made.load_state_dict(state)
    del state["model"]["lm_head.weight"]
    with pytest.raises(InputError, match=r"model: parameter 'lm_head\.weight' is only in one of model and checkpoint"):
        made.load_state_dict(state)
