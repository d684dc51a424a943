"""Every claim holds in layers 1 and 2, is about what it says, and through the functions it names."""

from __future__ import annotations

import cProfile
import importlib
import inspect
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from proofs import coq_layer, readme
from proofs.claims import Claim, all_claims, run_exact, run_symbolic, select, sensible

pytestmark = pytest.mark.slow

CLAIMS = all_claims()
ROWS = {f"C{k}" for k in range(1, 21)}


def executed(action: Callable[[], Any]) -> tuple[Any, set[CodeType]]:
    """The result of an action, and the code of every function that ran."""
    profile = cProfile.Profile(builtins=False)
    result = profile.runcall(action)
    return result, {entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType)}


def code_of(name: str) -> CodeType:
    """The code of `module.function` or `module.Class.method` of vcposim."""
    module, *path = name.split(".")
    found: Any = importlib.import_module(f"vcposim.{module}")
    for part in path:
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    function: Any = found.fget if isinstance(found, property) else found
    code: CodeType = function.__code__
    return code


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.exact], ids=lambda c: c.name)
def test_exact(claim: Claim) -> None:
    outcome = run_exact(claim)
    assert outcome.passed, outcome.detail


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.symbolic], ids=lambda c: c.name)
def test_symbolic(claim: Claim) -> None:
    pytest.importorskip("z3", reason="layer 2 needs z3-solver (extra 'proofs')")
    outcome = run_symbolic(claim)
    assert outcome.passed, outcome.detail


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.shipped], ids=lambda c: c.name)
def test_shipped_functions_run(claim: Claim) -> None:
    """By execution, not by retyping: each function a claim names runs when its statement is built or checked."""
    ran: set[CodeType] = set()
    for action in (claim.exact, claim.symbolic):
        if action is not None:
            ran |= executed(inspect.unwrap(action))[1]
    missing = [name for name in claim.shipped if code_of(name) not in ran]
    assert not missing, f"{claim.name} names {missing}, which did not run"


def test_names_and_rows() -> None:
    names = [c.name for c in CLAIMS]
    assert len(names) == len(set(names))
    assert {c.family for c in CLAIMS} == {f"T{k}" for k in range(1, 18)}
    assert all(c.rows and set(c.rows) <= ROWS for c in CLAIMS)


def test_every_claim_has_a_layer_or_says_why_not() -> None:
    for claim in CLAIMS:
        assert claim.exact or claim.symbolic or (claim.kind == "no theorem" and "no theorem" in claim.statement), (
            claim.name
        )
        assert bool(claim.symbolic) == bool(claim.instance), claim.name


def test_a_vacuous_theorem_does_not_pass() -> None:
    pytest.importorskip("z3", reason="layer 2 needs z3-solver (extra 'proofs')")
    (claim,) = select(["T3.upper"])
    theorem = claim.symbolic() if claim.symbolic else None
    empty = Claim("T0.empty", "", (), (), instance=lambda rng: {"N": 0, "W": []})
    with pytest.raises(AssertionError, match="no instance meets the hypotheses"):
        sensible(empty, theorem)  # type: ignore[arg-type]


def test_unknown_claim_is_named() -> None:
    with pytest.raises(ValueError, match="--only: unknown claim 'T99'"):
        select(["T99"])


def test_readme_is_in_step() -> None:
    assert readme.path().read_text() == readme.render(CLAIMS), "run: python -m proofs --readme"


def test_instances_are_rational() -> None:
    for claim in CLAIMS:
        if claim.instance:
            values = claim.instance(random.Random(0))
            assert all(not isinstance(v, float) for v in values.values()), claim.name


def test_readme_names_files_that_exist() -> None:
    folder = Path(readme.__file__).parent
    for family in {c.family for c in CLAIMS}:
        assert list(folder.glob(f"t{int(family[1:]):02d}_*.py")), family


def test_coq_without_its_libraries_is_told_from_a_proof_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coqc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "coqc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    coq_layer.missing.cache_clear()
    try:
        outcome = coq_layer.start().finish()
    finally:
        coq_layer.missing.cache_clear()
    assert outcome.error == ""
    assert "lacks mathcomp" in outcome.skipped
