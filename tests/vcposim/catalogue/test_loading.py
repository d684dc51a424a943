"""One name, one object: a catalogue name or `file.py:function` has the moments of brute force."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kit.statistical import assert_near, near
from vcposim.batch import Batch, DenseScores
from vcposim.catalogue import entry
from vcposim.catalogue.loading import InLibrary, estimator_named
from vcposim.commands.main import main
from vcposim.errors import InputError
from vcposim.estimators import Estimator

FILE = """
import numpy as np
from vcposim import Estimator

def soft(batch):
    n, r, w = batch.reward.shape[-1], batch.reward, np.exp(np.minimum(batch.log_ratio, 50))
    return 2 * w / (1 + w) * (r - r.mean(-1, keepdims=True)) * n / (n - 1)

def per_token(batch):
    r = np.exp(np.minimum(batch.on_tokens(batch.log_ratio), 1))
    return r * (batch.reward - batch.reward.mean(-1, keepdims=True))[..., None] * batch.token_mask
per_token.needs = ("tokens",)

def in_torch(batch):
    import torch
    n, r, w = batch.reward.shape[-1], batch.reward, torch.exp(torch.clamp(batch.log_ratio, max=50.0))
    return 2 * w / (1 + w) * (r - r.mean(dim=-1, keepdim=True)) * n / (n - 1)

def unlikely(batch):
    return batch.reward[..., None] * batch.log_prob

def centers_in_place(batch):
    batch.reward[...] -= batch.reward.mean(-1, keepdims=True)
    return batch.reward

seen = []
def counts(batch):
    seen.append(batch)
    return batch.reward * len(seen)

def over_everything(batch):
    return batch.reward - batch.reward.mean()

class Halved(Estimator):
    def coefficients(self, batch):
        return super().coefficients(batch) / 2

def sample_by_sample(batch):
    return np.array([2.0 * float(r) for r in batch.reward])

class Mixed(Estimator):
    def coefficients(self, batch):
        return batch.reward - batch.reward.mean()

class Drifting(Estimator):
    def coefficients(self, batch):
        seen.append(batch)
        return batch.reward * len(seen)

class Alike:
    def coefficients(self, batch):
        return batch.reward

halved, constant, alike = Halved(), 3, Alike()

def wrong(batch):
    return batch.reward.sum()

def misspelled(batch):
    return batch.reward
misspelled.needs = ("token",)

def numbered(batch):
    return batch.reward
numbered.needs = 3

def leaves(batch):
    raise SystemExit(0)

def chatty(batch):
    print("a word")
    return batch.reward

def divides(batch):
    return batch.reward / batch.reward

def hidden(batch):
    return np.ma.array(batch.reward, mask=batch.reward > 0.5)

async def later(batch):
    return batch.reward

def in_a_graph(batch):
    import torch
    x = torch.as_tensor(batch.log_ratio).clone().requires_grad_()
    return torch.exp(x) * torch.as_tensor(batch.reward)

def as_numpy(batch):
    import torch
    return (torch.exp(torch.as_tensor(batch.log_ratio)) * torch.as_tensor(batch.reward)).numpy()

def weighted(batch):
    return np.exp(batch.log_ratio) * batch.reward

class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, batch):
        return self.by * batch.reward

class Silent:
    pass
"""

TARGET, BEHAVIOR, REWARD = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5]), np.array([1.0, 0.0, 0.5])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "newcomer.py").write_text(FILE)
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)")
    (tmp_path / "leer.py").touch()
    (tmp_path / "parses.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    (tmp_path / "broken.py").write_text("def soft(batch)\n    return batch.reward\n")
    (tmp_path / "loud.py").write_text("print('hello')\ndef soft(batch):\n    return batch.reward\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "part.py").write_text("from . import other\n")
    bandit = {"kind": "bandit", "target": TARGET.tolist(), "behavior": BEHAVIOR.tolist(), "reward": REWARD.tolist()}
    (tmp_path / "p.json").write_text(json.dumps(bandit))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["vcposim", "variance", "--estimator"])  # as a script that parses would read it
    monkeypatch.delitem(sys.modules, "newcomer", raising=False)
    return tmp_path


def brute_force(coefficients, n: int) -> tuple[np.ndarray, float]:
    """Mean and variance of the mean contribution over all K^n ordered batches, one at a time."""
    mean, square = np.zeros(3), 0.0
    for arms in itertools.product(range(3), repeat=n):
        a = np.array(arms)
        score = np.eye(3)[a] - TARGET
        batch = Batch(
            reward=REWARD[a], log_ratio=np.log(TARGET / BEHAVIOR)[a], scores=DenseScores(score), length=np.ones(n)
        )
        g = np.asarray(coefficients(batch)) @ score / n
        mass = BEHAVIOR[a].prod()
        mean, square = mean + mass * g, square + mass * float(g @ g)
    return mean, square - float(mean @ mean)


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["variance", "--problem", "p.json", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize("n", [2, 3])
def test_named_estimators_have_the_moments_of_brute_force(folder: Path, capsys: pytest.CaptureFixture[str], n: int):
    pytest.importorskip("torch")
    names = ["vcpo", "gspo", "newcomer.py:soft", "newcomer:soft", "newcomer.py:in_torch", "newcomer.py:halved"]
    names += ["newcomer.py:Halved", "newcomer.py:over_everything"]
    found = rows(capsys, "--estimator", *names, "--group-size", str(n), "--method", "exact")
    assert [row["estimator"] for row in found] == names
    assert all("weighting" not in row and "baseline" not in row for row in found)
    for name, row in zip(names, found, strict=True):
        mean, variance = brute_force(estimator_named(name, several=False).coefficients, n)
        assert_near(row["mean"], mean)
        assert row["variance_of_mean"] == near(variance)
    assert found[2]["mse"] == near(found[4]["mse"])  # NumPy and torch


def test_functions_of_a_file_travel_to_worker_processes(folder: Path, capsys: pytest.CaptureFixture[str]):
    common = ["--estimator", "newcomer.py:soft", "newcomer.py:halved", "rloo", "--group-size", "3"]
    drawn = ["--method", "monte-carlo", "--samples", "600", "--seed", "3"]
    alone = rows(capsys, *common, *drawn)
    assert rows(capsys, *common, *drawn, "--workers", "2") == alone


def test_what_a_function_needs_is_written_beside_it_or_given(folder: Path):
    assert estimator_named("newcomer.py:per_token").needs == {"tokens"}
    assert estimator_named("newcomer.py:unlikely", ["log_prob"]).needs == {"log_prob"}
    assert estimator_named("vcpo", ["log_prob"]) == entry("vcpo").estimator
    assert isinstance(estimator_named("newcomer.py:halved"), Estimator)
    assert estimator_named("newcomer.py:alike.coefficients").needs == frozenset()


def test_a_torch_function_says_on_numpy_arrays_what_it_says_on_its_own(folder: Path):
    pytest.importorskip("torch")
    torch_made, numpy_made = (estimator_named(f"newcomer.py:{name}") for name in ("in_torch", "soft"))
    assert isinstance(torch_made.function, InLibrary)  # type: ignore[union-attr]
    batch = Batch(reward=np.array([1.0, 0.0, 2.0]), log_ratio=np.array([0.3, -1.0, 60.0]))
    assert_near(torch_made.coefficients(batch), numpy_made.coefficients(batch), scale=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--estimator vcppo", "estimator: unknown name 'vcppo'; did you mean 'vcpo'"),
        ("--estimator newcomer.py:sofd", "newcomer.py: unknown name 'sofd'; did you mean 'soft'"),
        ("--estimator newcomer.py:constant", "estimator: newcomer.py:constant is 3, no Estimator and no function"),
        ("--estimator newcomer.py:wrong", "newcomer.py:wrong does not answer a small batch: on numpy arrays "),
        ("--estimator newcomer.py:misspelled", "needs: unknown name 'token'; did you mean 'tokens'"),
        ("--estimator newcomer.py:numbered", "needs: 3 is no name and no tuple of names; write it as needs = ('one',"),
        ("--estimator newcomer.py:leaves", "on numpy arrays leaves raises SystemExit: 0 (line "),
        ("--estimator newcomer.py:divides", "divides returns a coefficient that is no number, as for rewards [1."),
        ("--estimator newcomer.py:hidden", "hidden returned a masked array; say what stands where it is masked"),
        ("--estimator newcomer.py:later", "on numpy arrays later returned a coroutine; return an array"),
        ("--estimator newcomer.py:Scaled", "Scaled() raises TypeError: Scaled.__init__() missing 1 required"),
        ("--estimator newcomer.py:Silent", "Silent is no Estimator and no function of a Batch; give it __call__"),
        ("--estimator parses.py:soft", "parses.py cannot be imported, SystemExit: 2 (line 2 of parses.py); what it "),
        ("--estimator broken.py:soft", "broken.py cannot be imported, SyntaxError: expected ':' (broken.py, line 1)\n"),
        ("--estimator package/part.py:soft", "(line 1 of part.py); it is part of a package, write package.module:f"),
        ("--estimator leaving.py:soft", "leaving.py cannot be imported, SystemExit: 0 (line 1 of leaving.py)"),
        (
            "--estimator newcomer.py:alike",
            "Alike has coefficients and is no vcposim.Estimator; derive it from that, or",
        ),
        ("--estimator newcomer.py", "newcomer.py is a file and names none of its functions; write newcomer.py:fun"),
        ("--estimator VCPO", "unknown name 'VCPO'; did you mean 'vcpo'?"),
        ("--estimator leer.py:soft", "leer.py: unknown name 'soft'; there are none"),
        ("--estimator newcomer.py:Estimator2", "newcomer.py: unknown name 'Estimator2'"),
        (
            "--estimator newcomer.py:soft --needs tokens",
            "newcomer.py:soft does not answer a small batch: on numpy arrays s",
        ),
        ("--estimator newcomer.py:centers_in_place", "centers_in_place changes batch.reward; compute with a copy"),
        ("--estimator newcomer.py:counts", "newcomer.py:counts gives two answers to one batch; a state or random"),
        ("--estimator newcomer.py:Drifting", "newcomer.py:Drifting gives two answers to one batch; a state or random"),
        ("--estimator rloo rloo", "--estimator: 'rloo' is given twice"),
        ("--estimator rloo --baseline zero", "--baseline: zero is for estimators of parts; drop it, or --estimator"),
        ("--estimator rloo --cap 8", "--cap: 8.0 is for estimators of parts"),
        ("--needs tokens", "--needs: tokens is for functions; name one with --estimator"),
    ],
)
def test_mistakes_get_one_line(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, says: str):
    assert main(["variance", "--problem", "p.json", *arguments.split(), "--json"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_what_a_file_prints_stands_apart_from_what_the_command_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("newcomer.py:chatty", "a word\n"), ("loud.py:soft", "hello\n")):
        assert main(["variance", "--problem", "p.json", "--estimator", name, "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["rows"][0]["estimator"] == name
        assert said in told.err


@pytest.mark.parametrize("name", ["in_a_graph", "as_numpy"])
def test_an_answer_in_other_arrays_is_one_in_the_batchs(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    torch = pytest.importorskip("torch")
    found, want = (
        rows(capsys, "--estimator", f"newcomer.py:{x}", "--group-size", "3", "--method", "exact")[0]
        for x in (name, "weighted")
    )
    keys = ("relative_bias", "variance_of_mean", "cosine")
    assert_near([found[key] for key in keys], [want[key] for key in keys])
    batch = Batch(reward=torch.tensor([1.0, 0.0]), log_ratio=torch.tensor([0.5, 0.0]))
    asked = estimator_named(f"newcomer.py:{name}", library="torch")
    assert isinstance(asked.coefficients(batch), torch.Tensor)


def test_who_mixes_groups_is_refused_where_several_are_shown(folder: Path):
    with pytest.raises(InputError, match="coefficients alone than beside another; reduce over the last axis only"):
        estimator_named("newcomer.py:over_everything")
    with pytest.raises(
        InputError, match=r"\(line \d+ of newcomer\.py\).*shown groups beside each other, \(groups, samp"
    ):
        estimator_named("newcomer.py:sample_by_sample")
    with pytest.raises(InputError, match="Mixed gives a group other coefficients alone than beside"):
        estimator_named("newcomer.py:Mixed")
    assert estimator_named("newcomer.py:over_everything", ["grouped"]).needs == {"grouped"}


def test_an_unanswered_batch_is_an_input_error(folder: Path):
    with pytest.raises(InputError, match="It takes a Batch and returns one"):
        estimator_named("newcomer.py:wrong")
