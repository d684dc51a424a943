"""Changing a shipped formula breaks the proofs about it: each mutant dies.

A mutant is the whole package with one formula changed, in a temporary folder. The claim is then checked there in
layer 2 only (or in layer 1, where a claim has no other), by `python -m proofs`, which must exit with 1. That the
unchanged package passes the same command is `test_claims.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from proofs.coq_layer import missing

pytest.importorskip("z3", reason="layer 2 needs z3-solver (extra 'proofs')")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `vcposim/<module>.py`, and `claim` must not survive it."""

    name: str
    module: str
    old: str
    new: str
    claim: str
    layer: str = "symbolic"


MUTANTS = [
    Mutant("importance weights squared", "weights", "    return x\n", "    return x * x\n", "T1.gradient"),
    Mutant(
        "contributions not averaged", "moments", "combine(coefficient * measure)", "combine(coefficient)", "T1.gradient"
    ),
    Mutant(
        "opob forgets the weight",
        "baselines",
        "sq_norm(self.weight.relative)",
        "sq_norm(self.weight.relative * 0 + 1)",
        "T2.gap",
    ),
    Mutant("opob mean forgets the weight", "baselines", "expectation(weight * reward", "expectation(reward", "T2.gap"),
    Mutant("norm without square", "batch", "sum(total * total", "sum(total", "T2.gap"),
    Mutant("covariance not centered", "moments", "deviation = vector - mean", "deviation = vector", "T2.gap"),
    Mutant(
        "baseline added", "estimators", "over_tokens(batch.reward, b) - b", "over_tokens(batch.reward, b) + b", "T2.gap"
    ),
    Mutant(
        "ess without square",
        "diagnostics",
        "safe_divide(total * total, square, 0)",
        "safe_divide(total, square, 0)",
        "T3.scale",
    ),
    Mutant("ess fraction without square", "diagnostics", "safe_divide(mean * mean", "safe_divide(mean", "T3.fraction"),
    Mutant("chi2 not centered", "diagnostics", "(weight - 1) * (weight - 1)", "weight * weight", "T4.chi2"),
    Mutant(
        "truncation from below",
        "weights",
        "minimum(x, scale.write(cap))\n\n\ndef clip",
        "maximum(x, scale.write(cap))\n\n\ndef clip",
        "T5.bias",
    ),
    Mutant("minimizer forgets the mean", "baselines", "spread = weighted - square", "spread = weighted", "T5.variance"),
    Mutant("minimizer adds the mean", "baselines", "weighted_reward - cross", "weighted_reward + cross", "T5.variance"),
    Mutant(
        "mse forgets the bias",
        "moments",
        "self.variance_of_mean + sq_norm(self.bias)",
        "self.variance_of_mean",
        "T5.mse",
    ),
    Mutant("efficiency not squared", "moments", "safe_divide(inner * inner, ", "safe_divide(inner, ", "T15.shrink"),
    Mutant(
        "n^2 mean without n^2", "baselines", "weight * reward, measure", "reward * reward, measure", "T15.self_push"
    ),
    Mutant(
        "baseline counted twice",
        "estimators",
        "over_tokens(batch.reward, b) - b",
        "over_tokens(batch.reward, b) - 2 * b",
        "T15.only",
    ),
    Mutant(
        "no correction keeps the ratio", "weights", "zeros_like(x) + scale.write(1)", "zeros_like(x) + x", "T16.stale"
    ),
    Mutant(
        "reward shifted by the baseline's double",
        "estimators",
        "over_tokens(batch.reward, b) - b",
        "over_tokens(batch.reward, b) - 2 * b",
        "T16.along",
    ),
    Mutant("update of a sum", "moments", "combine(coefficient * measure)", "combine(coefficient)", "T16.transition"),
    Mutant("no correction damps", "weights", "scale.write(1)", "scale.write(1) / 2", "T16.settles"),
    Mutant(
        "n^2 mean takes the mean's weight",
        "baselines",
        "[e.score_sq_norm()] if self.score",
        "[e.one] if self.score",
        "T16.overshoot",
        "exact",
    ),
    Mutant(
        "center under the target",
        "vocabulary",
        "center = behavior * weighted",
        "center = target * weighted",
        "T17.constant",
        "exact",
    ),
    Mutant(
        "center forgets the weight",
        "vocabulary",
        "center = behavior * weighted",
        "center = behavior",
        "T17.covariance",
        "exact",
    ),
    Mutant("own sample left in", "baselines", "+ x * (measure - unit)", "+ x * measure", "T6.ignores"),
    Mutant("step ignores the reference", "control", "safe / reference", "safe", "T8.range"),
    Mutant(
        "others: after i forgotten",
        "arrays",
        "return before(x) + xp.flip(before(xp.flip(x, axis=-1)), axis=-1)",
        "return before(x)",
        "T9.others",
    ),
    Mutant(
        "leverage forgets the unit",
        "baselines",
        "safe_divide(weight * unit, total",
        "safe_divide(weight, total",
        "T9.share",
    ),
    Mutant(
        "damping by the share",
        "baselines",
        "reward - (1 - share) * (reward - baseline)",
        "reward - share * (reward - baseline)",
        "T9.damped",
    ),
    Mutant(
        "released weights counted once",
        "baselines",
        "[e.ratio_sq()] if self.ratio else []",
        "[]",
        "T10.difference",
    ),
    Mutant("no division by length", "estimators", "divided(a, batch, batch.token_length())", "a", "T11.best"),
    Mutant("merge forgets a part", "moments", "Sums(*(a + b for a, b", "Sums(*(a for a, b", "T12.merge"),
    Mutant("merge on the wrong scale", "diagnostics", "self.square * a * a", "self.square * a", "T12.log_scale"),
    Mutant("mass of batches forgotten", "moments", "xp.sum(mass * square)", "xp.sum(square)", "T5.mse"),
    Mutant(
        "std not centered",
        "estimators",
        "deviation = reward - mean\n    std",
        "deviation = reward\n    std",
        "T13.group",
    ),
]


def verdict(mutant: Mutant, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m proofs` on one mutant."""
    shutil.copytree(ROOT / "vcposim", folder / "vcposim")  # compiled files too: their times are kept, so they hold
    (folder / "proofs").symlink_to(ROOT / "proofs")
    file = folder / "vcposim" / f"{mutant.module}.py"
    source = file.read_text()
    assert mutant.old in source, (
        f"{mutant.name}: {mutant.old!r} is not in {mutant.module}.py any more; update the mutant"
    )
    file.write_text(source.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "proofs", "--only", mutant.claim, "--layer", mutant.layer]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_coq_notices_a_changed_formula(tmp_path: Path) -> None:
    """Coq compares the shipped OPOB, as it stands, with the definition that its theorems are about."""
    if lacking := missing():  # asked here: it starts Coq, and every worker of pytest collects this file
        pytest.skip(f"layer 3: {lacking}")
    forgets_the_weight = Mutant(
        "Coq", "baselines", "sq_norm(self.weight.relative)", "sq_norm(self.weight.relative * 0 + 1)", "T2.gap", "coq"
    )
    done = verdict(forgets_the_weight, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED T2.gap (coq): Shipped.v" in done.stdout


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    folders = [tmp_path_factory.mktemp("mutant") for _ in MUTANTS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((m.name for m in MUTANTS), pool.map(verdict, MUTANTS, folders), strict=True))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_dies(mutant: Mutant, verdicts: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = verdicts[mutant.name]
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"FAILED {mutant.claim} ({mutant.layer})" in done.stdout
