"""Layer 3: compiles the Coq files, and the one generated from the shipped functions, and audits what they assume.

The files of `coq/` are copied to a temporary folder, `Shipped.v` is generated beside them (`coq_export.py`), and `coqc`
compiles all in order. `Print Assumptions` is then asked of all lemmas that claims name: the only acceptable answer is
"Closed under the global context", that is, no axiom.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from proofs.claims import LayerOutcome, all_claims

FOLDER = Path(__file__).parent / "coq"
FILES = ("Vcposim", "Shipped", "Audit")
PACKAGES = "coq libcoq-mathcomp-algebra libcoq-mathcomp-algebra-tactics"
LIBRARIES = "From mathcomp Require Import all_ssreflect all_algebra ring."
CLOSED = "Closed under the global context"


@dataclass(frozen=True)
class CoqOutcome:
    """What Coq said: lemma -> its assumptions; or why nothing was run; or the first error."""

    assumptions: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    error: str = ""

    @property
    def summary(self) -> str:
        """For the foot of the table."""
        links = sum(name.endswith("_shipped") for name in self.assumptions)
        axioms = sum(said != CLOSED for said in self.assumptions.values())
        lemmas = len(self.assumptions) - links
        return f"layer 3: {lemmas} lemmas, {links} links to shipped functions, {axioms} of them resting on axioms"

    def of(self, lemmas: tuple[str, ...]) -> LayerOutcome:
        """Whether all of these lemmas are proved without axioms."""
        if self.error:
            return LayerOutcome(False, self.error)
        bad = [
            f"{name}: {self.assumptions.get(name, 'not audited')}"
            for name in lemmas
            if self.assumptions.get(name) != CLOSED
        ]
        return LayerOutcome(not bad, "; ".join(bad) if bad else ", ".join(lemmas))


@dataclass
class Compilation:
    """Coq at work in a temporary folder (or not, where there is none)."""

    process: subprocess.Popen[str] | None
    folder: Path | None = None
    lemmas: tuple[str, ...] = ()
    error: str = ""

    def finish(self) -> CoqOutcome:
        """Wait for Coq."""
        if self.error:
            return CoqOutcome(error=self.error)
        if self.process is None or self.folder is None:
            return CoqOutcome(skipped=f"layer 3 skipped: {missing()} (Debian: apt-get install {PACKAGES})")
        output, _ = self.process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.process.returncode:
            return CoqOutcome(error=_first_error(output))
        audited = CLOSED if CLOSED in output else " ".join(output[output.find("Axioms:") :].split())
        return CoqOutcome(dict.fromkeys(self.lemmas, audited))


@cache
def missing() -> str:
    """What layer 3 needs and this machine lacks; empty if nothing: Coq often comes without its libraries."""
    if shutil.which("coqc") is None:
        return "no coqc here"
    with tempfile.TemporaryDirectory(prefix="vcposim-coq-") as folder:
        (Path(folder) / "Probe.v").write_text(LIBRARIES)
        found = subprocess.run(["coqc", "-w", "none", "Probe.v"], cwd=folder, capture_output=True, check=False)
    return "coqc here lacks mathcomp (ssreflect, algebra, algebra-tactics)" if found.returncode else ""


def start() -> Compilation:
    """Start compiling, if Coq and its libraries are installed."""
    if missing():
        return Compilation(None)
    from proofs.coq_export import shipped_file

    folder = Path(tempfile.mkdtemp(prefix="vcposim-coq-"))
    shutil.copy(FOLDER / "Vcposim.v", folder)
    try:
        shipped = shipped_file()
    except Exception as error:  # a broken formula may fail in any way
        return Compilation(None, error=f"Shipped.v cannot be generated: {type(error).__name__}: {error}")
    (folder / "Shipped.v").write_text(shipped)
    links = re.findall(r"^Lemma (\w+_shipped)", shipped, re.M)
    lemmas = tuple(dict.fromkeys([*(name for claim in all_claims() for name in claim.coq), *links]))
    # one question for all the lemmas at once: each question walks through the whole library
    together = ",\n  ".join(f"@{name}" for name in lemmas)
    (folder / "Audit.v").write_text(
        f"From Proofs Require Import Vcposim Shipped.\nDefinition all := (\n  {together}).\nPrint Assumptions all.\n"
    )
    script = " && ".join(f"coqc -w none -Q . Proofs {name}.v" for name in FILES)
    process = subprocess.Popen(
        ["sh", "-c", script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Compilation(process, folder, lemmas)


def _first_error(output: str) -> str:
    where = re.search(r'File "\./(\w+)\.v", line (\d+)(?:(?!File).)*?Error:\s*(.*)', output, re.S)
    return f"{where[1]}.v:{where[2]}: {' '.join(where[3].split())[:160]}" if where else " ".join(output.split())[-200:]
