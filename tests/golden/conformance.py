"""Which entry of the catalogue an option of a training framework is, or where the two differ.

A framework's loss is a number; its gradient is sum_it c_it grad log pi(y_it), and c_it is what the golden vectors
hold. An entry of the catalogue is that coefficient too, *before* the loss is averaged. So a `Row` names an entry, its
flags and an average, and a test holds it to them:

    golden = coefficient of the entry, with these flags  x  how the loss is averaged          where they are equal
    golden = that, put right by `explained`; and without it they are further apart than `EQUAL`   where they differ

A difference nobody can explain, or one that is none, fails. Advantages are R - mean in every loss (both frameworks
can be told so), so that a row about a loss is about the loss. `python -m tests.golden.conformance` prints the table.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.problem import GROUP, GROUPS, HERE, TIME, Problem, load
from vcposim.batch import Batch, over_tokens
from vcposim.catalogue import entry
from vcposim.estimators import Estimator
from vcposim.weights import Weighting

EQUAL = 1e-7
"""of the largest coefficient: verl adds 1e-8 to its denominators and computes one advantage in float32"""

PAGE = Path(__file__).parents[2] / "llm_bridge" / "adapters" / "README.md"

AVERAGES: dict[str, Callable[[Problem], np.ndarray]] = {
    "": lambda p: np.ones(()),
    "1": lambda p: np.ones(()),
    "1/B": lambda p: np.ones(()) / len(p.reward),
    "1/(B L)": lambda p: 1 / (len(p.reward) * p.length[:, None]),
    "1/(B T)": lambda p: np.ones(()) / (len(p.reward) * TIME),
    "1/sum L": lambda p: 1 / p.length.sum(),
    "L/sum L": lambda p: p.length[:, None] / p.length.sum(),
    "L/B": lambda p: p.length[:, None] / len(p.reward),
}
"""what a loss multiplies the coefficient of a token by; B responses, L tokens of this one, T the longest allowed"""


def batch(problem: Problem, ratio: str = "pi/anchor", groups: int = GROUPS) -> Batch:
    """The kernel's record of the problem, (group, n, t), with one of `RATIOS` as its ratio."""
    upper, lower = RATIOS[ratio]

    def lift(x: np.ndarray) -> np.ndarray:
        return x.reshape(groups, -1, *x.shape[1:])

    log_prob = getattr(problem, upper)
    return Batch(
        reward=lift(problem.reward),
        log_ratio=lift(log_prob - getattr(problem, lower)),
        token_mask=lift(problem.mask),
        log_prob=lift(log_prob),
        collision=lift(problem.anchor_collision),
        anchor_log_ratio=lift(problem.log_prob - problem.anchor_log_prob),
        grouped=True,
    )


RATIOS = {
    "pi/anchor": ("log_prob", "anchor_log_prob"),
    "pi/behavior": ("log_prob", "behavior_log_prob"),
    "anchor/behavior": ("anchor_log_prob", "behavior_log_prob"),
}


def flat(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(group, n) or (group, n, t) -> (B, T), zero on padding."""
    assert x.shape[:2] in ((GROUPS, GROUP), (GROUPS * GROUP, 1)), x.shape
    rows = x.reshape(mask.shape[0], -1)
    return np.where(mask > 0, rows, 0.0)


@dataclass(frozen=True)
class Row:
    """One option of a framework."""

    case: str
    """its name in the golden file: what to set"""
    entry: str | None
    """the catalogue's name for it, None if it has none"""
    average: str = ""
    """one of `AVERAGES`; empty where the framework returns advantages"""
    flags: dict[str, Any] = field(default_factory=dict)
    """what to replace in the entry's estimator"""
    ratio: str = "pi/anchor"
    correction: Weighting | None = None
    """weights of anchor/behavior in front of it"""
    groups: int = GROUPS
    baseline_only: bool = False
    """compare R - b, without the weight that b was made with"""
    note: str = ""
    explained: Callable[[Problem, np.ndarray], np.ndarray] | None = None
    """from the entry's coefficient to the framework's, where they differ"""

    def estimator(self) -> Estimator:
        """The entry with its flags."""
        assert self.entry is not None
        return replace(entry(self.entry).estimator, **self.flags)

    def ours(self, problem: Problem) -> np.ndarray:
        """The entry's coefficient as this loss averages it: (B, T); zeros without an entry."""
        if self.entry is None:
            return np.zeros_like(problem.mask)
        record = batch(problem, self.ratio, self.groups)
        if self.baseline_only:
            b = self.estimator().baseline_value(record)
            c = over_tokens(record.reward, b) - b
        else:
            c = self.estimator().coefficients(record)
        out = flat(c, problem.mask)
        if self.correction is not None:
            out = out * flat(self.correction(batch(problem, "anchor/behavior")).value, problem.mask)
        return out * AVERAGES[self.average](problem)

    def gap(self, problem: Problem, golden: np.ndarray) -> float:
        """Largest difference between the entry and the framework, over the framework's largest coefficient."""
        return _gap(self.ours(problem), golden)

    def unexplained(self, problem: Problem, golden: np.ndarray) -> float:
        """The same once `explained` has put it right."""
        assert self.explained is not None
        return _gap(self.explained(problem, self.ours(problem)), golden)


@dataclass(frozen=True)
class Gauge:
    """One number a framework logs, beside ours."""

    case: str
    ours: str
    """the panel's name for it"""
    value: Callable[[Problem], float]
    note: str = ""
    explained: Callable[[Problem], float] | None = None


def _gap(ours: np.ndarray, golden: np.ndarray) -> float:
    return float(np.abs(ours - golden).max() / (np.abs(golden).max() or 1.0))


def golden(framework: str) -> dict[str, Any]:
    """A committed golden file: `framework`, `versions`, and `cases` as arrays."""
    stored = json.loads((HERE / f"{framework}.json").read_text())
    return stored | {"cases": {name: np.array(values) for name, values in stored["cases"].items()}}


def shown(row: Row) -> str:
    """Entry and flags, as one would write them."""
    if row.entry is None:
        return "none"
    flags = "".join(f"<br>`{name}={_code(value)}`" for name, value in row.flags.items())
    before = "" if row.correction is None else f"<br>times `{_code(row.correction)}` of anchor/behavior"
    ratio = "" if row.ratio == "pi/anchor" else f"<br>on {row.ratio}"
    return f"`{row.entry}`{flags}{before}{ratio}" + ("<br>its R - b" if row.baseline_only else "")


def _code(x: Any) -> str:
    text = repr(x)
    for default in (", floor=None", ", smooth=None", ", dual=inf"):
        text = text.replace(default, "")
    return text


def table(framework: str, rows: list[Row], gauges: list[Gauge]) -> str:
    """The framework's part of the page."""
    stored, problem = golden(framework), load()
    versions = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
    out = [f"## {framework}\n", f"Made with {versions}.\n"]
    out += ["| option | entry and flags | x | equal? | note |", "|---|---|---|---|---|"]
    for row in rows:
        gap = row.gap(problem, stored["cases"][row.case])
        verdict = "equal" if row.explained is None else "no entry" if row.entry is None else f"differs by {gap:.2%}"
        out.append(_line(f"`{row.case}`", shown(row), row.average, verdict, row.note))
    if gauges:
        out += ["", "| logged as | value | ours | value | note |", "|---|---|---|---|---|"]
    for gauge in gauges:
        theirs, ours = float(stored["cases"][gauge.case]), gauge.value(problem)
        note = f"equal. {gauge.note}".strip() if gauge.explained is None else gauge.note
        out.append(_line(f"`{gauge.case}`", f"{theirs:.4f}", f"`{gauge.ours}`", f"{ours:.4f}", note))
    return "\n".join(out) + "\n"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


HEAD = f"""# Adapters: what the frameworks' options are

Generated by `python -m tests.golden.conformance`; `test_conformance.py` compares this page, and every line of it,
with the golden vectors in `tests/golden/`, which the frameworks' own functions produced there
(`python -m tests.golden.make_trl`, `make_verl`).

A line says which entry of `vcposim.catalogue` an option is. The entry's coefficient times the column **x** (how the
loss is averaged) is what multiplies grad log pi of each token: B responses, L tokens of this one, T the longest
allowed; an empty x means that advantages are compared, before any loss. *Equal* means within {EQUAL:.0e} of the largest
coefficient; *differs by* is the largest difference in the same unit, on one batch of {GROUPS * GROUP} ragged responses
that tells the entries of the catalogue apart. What a note says about a difference is tested: with it put right, the
rest is below {EQUAL:.0e}. In all losses the advantage is R - mean. *anchor* is the trainer's policy when the batch came
in, which frameworks call old; *behavior* is the sampler's.
"""


def page() -> str:
    """The whole README."""
    from tests.golden.rows_trl import ROWS as TRL
    from tests.golden.rows_trl import UNCOMPARED as TRL_REST
    from tests.golden.rows_verl import GAUGES, UNCOMPARED
    from tests.golden.rows_verl import ROWS as VERL

    parts = [HEAD, table("trl", TRL, []), TRL_REST, table("verl", VERL, GAUGES), UNCOMPARED]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
