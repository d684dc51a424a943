"""What the index of papers says of trainers is what their doors say: served or refused, entry by entry."""

import ast
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import llm_bridge
from llm_bridge.adapters.rows import require
from llm_bridge.training.gradient import token_coefficients
from vcposim.catalogue import CATALOGUE
from vcposim.catalogue.papers import SWITCHES
from vcposim.errors import InputError
from vcposim.estimators import Estimator

ADAPTERS = Path(llm_bridge.__file__).parent / "adapters"


def constant(file: str, name: str) -> frozenset[str]:
    """A frozenset of words of an adapter, read without its framework."""
    for node in ast.parse((ADAPTERS / file).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            assert isinstance(node.value, ast.Call)
            return frozenset(ast.literal_eval(node.value.args[0]))
    raise AssertionError(f"{name} is not in {file}")


OFFERED = constant("trl.py", "OFFERED")


def asked(trainer: str, estimator: Estimator) -> None:
    """Raises `InputError` where the trainer refuses."""
    if trainer == "llm_bridge.train":
        token_coefficients(estimator, 4)
    elif trainer == "TRL" or "reference_log_ratio" not in estimator.needs:  # which verl's batches hold
        require(estimator, OFFERED, 4)


@pytest.mark.parametrize("trainer", SWITCHES)
def test_the_index_says_what_the_trainer_says(trainer: str) -> None:
    refused = set()
    for name, one in CATALOGUE.items():
        try:
            asked(trainer, one.estimator)
        except InputError:
            refused.add(name)
    assert refused == {name for name in CATALOGUE if SWITCHES[trainer].on(name) is None}


def test_verl_s_needs_from_elsewhere_are_the_index_s() -> None:
    assert constant("verl.py", "ELSEWHERE") == SWITCHES["verl"].missing
