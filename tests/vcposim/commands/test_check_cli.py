"""`vcposim check`: any estimator by its name gets a report card, a picture and an exit code; mistakes get one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kit.statistical import near
from vcposim.catalogue import CATALOGUE
from vcposim.commands.main import main
from vcposim.laboratory import exact
from vcposim.laboratory.standard_problems import GROUP_SIZE, STANDARD, UNKNOWN, standard_problem
from vcposim.testing.report_card import beside_the_catalogue

MINE = """
import numpy as np

def own_sample(batch):
    mean = (batch.reward * batch.measure).sum(-1, keepdims=True)
    return np.exp(np.minimum(batch.log_ratio, 300)) * (batch.reward - mean)

def per_token(batch):
    return np.exp(np.minimum(batch.log_ratio, 0)) * np.sign(batch.token_mask) * batch.reward[..., None]

def by_length(batch):
    return np.exp(np.minimum(batch.on_tokens(batch.log_ratio).sum(-1) / batch.token_length(), 300)) * batch.reward

def over_all_axes(batch):
    return batch.reward if batch.reward.ndim == 1 else batch.reward[:3] * np.ones(5)

def only_small(batch):
    if batch.reward.shape[0] > 100:
        raise ValueError("too many")
    return np.exp(np.minimum(batch.log_ratio, 300)) * batch.reward

def total(batch):
    return batch.reward.sum()

def as_objects(batch):
    return batch.reward.astype(object)

def as_a_list(batch):
    return batch.reward.tolist()

def over_everything(batch):
    return batch.reward - batch.reward.mean()

def of_nothing(batch):
    return batch.reward / 0.0

def in_torch(batch):
    import torch
    return torch.exp(torch.clamp(batch.log_ratio, max=40.0)) * batch.reward
"""

needs_torch = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("torch"), reason="judges a torch function"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_estimators.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "lacks.py").write_text("import a_library_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def check(*arguments: str) -> int:
    return main(["check", *arguments, "--examples", "4"])


def card(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = check(*arguments, "--json")
    found = json.loads(capsys.readouterr().out)
    found["by_law"] = {one["law"]: one for one in found["laws"]}
    return code, found


@pytest.mark.slow
def test_a_broken_claim_is_exit_code_1_and_its_line_reproduces(folder: Path, capsys: pytest.CaptureFixture[str]):
    code, found = card(capsys, "my_estimators.py:own_sample", "--claims", "unbiased", "shift")
    status = {name: one["status"] for name, one in found["by_law"].items()}
    assert (code, found["passed"], found["arrays"]) == (1, False, "numpy")
    assert status["unbiased"] == "violated"
    assert status["shift"] == status["padding"] == status["bfloat16"] == "holds"
    assert status["weight_scale"] == "not claimed"
    assert status["token_mask"] == "does not apply"
    broken = found["by_law"]["unbiased"]
    assert broken["counterexample"]["size"] == "2 arms"
    line = f"import vcposim.testing; {broken['reproduce']}"
    done = subprocess.run([sys.executable, "-c", line], cwd=folder, capture_output=True, text=True, check=False)
    assert "Violation" in done.stderr
    assert broken["counterexample"]["saw"] in done.stderr


@pytest.mark.slow
def test_the_card_for_a_reader(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert check("my_estimators:own_sample", "--claims", "unbiased") == 1  # as a module
    text = capsys.readouterr().out
    for says in (
        "violated",
        "not claimed: no counterexample",
        "not claimed: it fails",
        "does not apply",
        "on policy: ",
    ):
        assert says in text
    assert "'my_estimators:own_sample' breaks 'unbiased': E[(1/n) sum c s] over every batch" in text
    assert 'reproduce: python -c "import vcposim.testing; vcposim.testing.reproduce(' in text
    assert "very stale: bias 0.25 |g|" in text  # (1 - 1/n) of the gradient, n = 4, whatever the lag
    assert "breaks 1 of the" in text
    assert (folder / "vcposim-check.png").stat().st_size > 10_000


@pytest.mark.slow
def test_claims_on_token_ratios_are_tried_and_what_cannot_be_tried_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    code, found = card(capsys, "my_estimators.py:by_length", "--claims", "unbiased", "levels", "--needs", "tokens")
    assert (code, found["passed"]) == (1, False)
    assert {name for name in ("unbiased", "levels") if found["by_law"][name]["status"] == "violated"} == {
        "unbiased",
        "levels",
    }
    assert check("my_estimators.py:by_length", "--claims", "one_token", "--needs", "tokens") == 2
    assert "claims: 'one_token' does not apply to 'my_estimators.py:by_length'" in capsys.readouterr().err
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}  # Python's own
    assert left == {"my_estimators.py", "broken.py", "lacks.py"}


@pytest.mark.slow
def test_an_estimator_that_fails_on_the_standard_problems_is_no_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    code, found = card(
        capsys, "my_estimators.py:over_all_axes", "--claims", "unbiased", "--without", "groups", "padding"
    )
    assert code == 1
    assert not any(row["mine"] for row in found["moments"])
    # moments of groups that were mixed, or of no numbers, are none
    for name in ("over_everything", "of_nothing"):
        code, found = card(capsys, f"my_estimators.py:{name}", "--without", "padding")
        assert code == 1
        assert not any(row["mine"] for row in found["moments"])
    assert check("my_estimators.py:only_small", "--without", "groups", "padding") == 2
    assert "does not answer the standard problems: it raised ValueError: too many" in capsys.readouterr().err


@pytest.mark.slow
def test_what_holds_is_exit_code_0(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert check("rloo", "--no-figure") == 0
    assert "rloo keeps all" in capsys.readouterr().out
    assert check("my_estimators.py:per_token", "--needs", "tokens", "--no-figure") == 0
    assert check("my_estimators.py:own_sample", "--host", "dr_grpo", "--dominates", "sequence_is", "--no-figure") == 1
    assert "breaks 'dominance'" in capsys.readouterr().out
    assert not list(folder.glob("*.png"))


@needs_torch
@pytest.mark.slow
def test_torch_functions_are_found_out(folder: Path, capsys: pytest.CaptureFixture[str]):
    code, found = card(capsys, "my_estimators.py:in_torch", "--claims", "unbiased", "no_leak")
    assert (code, found["arrays"]) == (1, "torch")
    assert found["by_law"]["unbiased"]["status"] == "holds"
    assert found["by_law"]["no_leak"]["status"] == "violated"
    assert found["by_law"]["least_variance"]["counterexample"] is not None
    code, same = card(capsys, "sequence_is", "--arrays", "torch")
    assert code == 0
    mine = [{k: v for k, v in row.items() if k != "estimator"} for row in found["moments"] if row["mine"]]
    other = [{k: v for k, v in row.items() if k != "estimator"} for row in same["moments"] if row["mine"]]
    assert [row["problem"] for row in mine] == list(STANDARD)
    for a, b in zip(mine, other, strict=True):
        assert a["variance"] == near(b["variance"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("my_estimators.py:own_smaple", "my_estimators.py: unknown name 'own_smaple'; did you mean 'own_sample'"),
        ("my_estimators.py", "estimator: 'my_estimators.py' names no function; write module:function or path/"),
        ("my_estimators.py:np.pi", "is no Estimator, catalogue name or function of a Batch"),
        ("my_estimators.py:total", "given numpy arrays, coefficients of shape () for rewards of shape (2,)"),
        ("my_estimators.py:per_token", "given numpy arrays, it raised TypeError: "),
        ("my_estimators.py:as_objects", "given numpy arrays, coefficients of dtype object, which are no real numbers"),
        ("my_estimators.py:as_a_list", "given numpy arrays, it returned a list, not an array like batch.reward"),
        ("nofile.py:f", "estimator: there is no file nofile.py; give its path from "),
        ("no_such_module:f", "estimator: no module 'no_such_module' in "),
        (
            "broken.py:f",
            "estimator: broken.py cannot be imported, ZeroDivisionError: division by zero (line 2 of broken.py)",
        ),
        ("lacks.py:f", "estimator: lacks.py cannot be imported, it misses 'a_library_nobody_has'; install that"),
        ("rloo --claims unbiassed", "claims: unknown name 'unbiassed'; did you mean 'unbiased'"),
        ("rloo --catalogue", "estimator: name one, as in module:function, or pass --catalogue alone"),
        ("--catalogue --claims shift", "--claims: entries of the catalogue claim what they say"),
        ("rloo --arrays jaxx", "convert: 'jaxx' is no array library installed here"),
        ("rloo --figure nowhere/a.png", "figure: folder nowhere does not exist"),
        ("rloo --workers 0", "--workers: 0 is less than 1"),
    ],
)
def test_mistakes_get_one_line(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, says: str):
    assert check(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("vcposim: error: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_catalogue_states_what_it_does_not_claim(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    few = {name: CATALOGUE[name] for name in ("vcpo", "sequence_is", "token_tis")}
    monkeypatch.setattr("vcposim.commands.check.CATALOGUE", few)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check", "--catalogue", "--no-figure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = {line.split()[0]: line for line in lines if line.strip() and line.split()[0] in few}
    assert "unbiased!" in row["vcpo"]
    assert "shift!" in row["sequence_is"]
    assert "unbiased" not in row["sequence_is"]
    assert lines[-1] == "3 estimators; every one keeps the laws it must"
    assert main(["check", "--catalogue", "--json", "--workers", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["estimators"].keys() == few.keys()


@pytest.mark.parametrize("problem", STANDARD)
def test_moments_over_ordered_batches_are_those_over_counts(problem: str):
    """Two enumerations that share no code: K^n ordered batches here, count vectors in `vcposim.laboratory.exact`."""
    rows = {row["estimator"]: row for row in beside_the_catalogue(None) if row["problem"] == problem}
    assert len(rows) == sum(not entry.estimator.needs & UNKNOWN for entry in CATALOGUE.values())
    for name in ("reinforce", "sequence_tis", "token_tis", "vcpo", "opo", "gspo", "sequence_is_opob_leave_one_out"):
        want = exact.moments(standard_problem(problem), CATALOGUE[name].estimator, GROUP_SIZE)
        size = np.sum(want.gradient**2)
        assert rows[name]["variance"] == near(want.variance_of_mean / size)
        assert rows[name]["squared_bias"] == near(np.sum(want.bias**2) / size)
