"""An estimator of anyone's in training: a function of NumPy's or torch's arrays learns as the entry that it is."""

import functools
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge import train  # noqa: E402
from llm_bridge.adapters.rows import estimator_of, require, row_coefficient  # noqa: E402
from llm_bridge.ratios import trajectory_batch  # noqa: E402
from llm_bridge.training import Trainer  # noqa: E402
from tests.kit.statistical import SINGLE, TRAINED, assert_near, near  # noqa: E402
from tests.llm_bridge.training.toys import Letters, config, tiny  # noqa: E402

FILE = """
import numpy as np
import torch
from dataclasses import replace
from vcposim import CATALOGUE

def centered(batch):
    return batch.reward - batch.reward.mean(-1, keepdims=True)

def in_torch(batch):
    assert isinstance(batch.reward, torch.Tensor)
    return batch.reward - batch.reward.mean(dim=-1, keepdim=True)

def tokens(batch):
    assert isinstance(batch.reward, np.ndarray)
    return np.minimum(np.exp(batch.log_ratio), 2) * centered(batch)[..., None] * batch.token_mask
tokens.needs = ("tokens",)

def norms(batch):
    square = batch.scores.sq_norm(np.ones_like(batch.reward))
    return batch.reward - (square * batch.reward).sum(-1, keepdims=True) / square.sum(-1, keepdims=True)
norms.needs = ("scores",)

def sequence(batch):
    return np.minimum(np.exp(batch.log_ratio), 8) * centered(batch)

def oracle(batch):
    return batch.reward - batch.population_baseline
oracle.needs = ("population_baseline",)
"""
TWINS = {
    "centered": "dr_grpo",
    "in_torch": "dr_grpo",
    "tokens": "token_tis",
    "norms": "on_policy_optimal",
    "sequence": "sequence_tis",
}
"""function -> the entry that it is"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "newcomer.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "newcomer", raising=False)
    return tmp_path


@functools.cache
def of_entry(name: str) -> torch.Tensor:
    """`learned` of an entry, once."""
    return learned(name)


def learned(estimator: str) -> torch.Tensor:
    """The parameters after four updates at lag 2, less those at the start."""
    lm = tiny()
    start = torch.cat([p.detach().flatten().clone() for p in lm.model.parameters()])
    trainer = Trainer(config(estimator=estimator, lag=2, optimizer="sgd", lr=0.5), task=Letters(), lm=lm)
    list(trainer.updates())
    return torch.cat([p.detach().flatten() for p in lm.model.parameters()]) - start


@pytest.mark.parametrize(("function", "entry"), TWINS.items())
def test_a_function_learns_as_the_entry_that_it_is(folder: Path, function: str, entry: str) -> None:
    mine, theirs = learned(f"newcomer.py:{function}"), of_entry(entry)
    size = float(theirs.norm())
    assert size > 1e-3
    assert float((mine - theirs).norm()) == near(0.0, allow=TRAINED / 2, scale=size)
    if entry != "dr_grpo":
        assert float((mine - of_entry("dr_grpo")).norm()) > 1e-2 * size


@pytest.mark.parametrize(("function", "entry"), TWINS.items())
def test_an_adapter_s_rows_get_the_coefficients_of_the_entry(folder: Path, function: str, entry: str) -> None:
    """The door that TRL's trainer goes through: rows in any order, a function by its name."""
    generator = torch.Generator().manual_seed(0)
    log_prob = -torch.rand(6, 3, generator=generator)
    behavior = log_prob + 0.5 * torch.randn(6, 3, generator=generator)
    reward, norm = torch.rand(6, generator=generator), torch.rand(6, generator=generator) + 0.5
    batch = trajectory_batch(reward, log_prob, behavior, torch.ones(6, 3), score_sq_norm=norm)
    group = torch.tensor([0, 1, 1, 0, 1, 0])
    estimators = estimator_of(f"newcomer.py:{function}"), estimator_of(entry)
    for one in estimators:
        require(one, "verl")
    mine, theirs = (row_coefficient(one, batch, group).coefficient for one in estimators)
    assert_near(mine, theirs, allow=SINGLE)
    assert theirs.abs().max() > 0.1


def call(*words: str) -> int:
    return train.main([*words])


def test_the_command_keeps_the_file_and_resumes_only_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().save_pretrained(folder / "model")
    small = ["--groups", "2", "--group-size", "3", "--max-new-tokens", "3", "--evaluate-problems", "4"]
    named = ["--model", "model", "--estimator", "newcomer.py:in_torch", *small]
    assert call(*named, "--updates", "2") == 0
    run = next((folder / "runs").iterdir())
    assert run.name == "addition-newcomer.py-in_torch-none-lag0-seed0"
    assert json.loads((run / "config.json").read_text())["estimator"] == "newcomer.py:in_torch"
    assert (run / "estimator.py").read_text() == FILE
    assert call("--output", str(run), "--resume", "--updates", "3") == 0
    (folder / "newcomer.py").write_text(FILE + "# better\n")
    assert call("--output", str(run), "--resume", "--updates", "4") == 2
    assert "the file of newcomer.py:in_torch is not what this run began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("oracle", "estimator: cannot be served in training: population_baseline: 'population' is an oracle"),
        ("centred", "newcomer.py: unknown name 'centred'; did you mean 'centered'"),
    ],
)
def test_mistakes_get_one_line(folder: Path, capsys: pytest.CaptureFixture[str], function: str, says: str) -> None:
    assert call("--estimator", f"newcomer.py:{function}", "--output", "run") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (folder / "run").exists()
