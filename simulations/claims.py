"""The twenty claims the project settles, each with what would refute it, and how its witnesses are combined.

A claim is judged by four kinds of witness: a *proof* about the shipped functions (`python -m proofs`), an *exact*
computation, a *simulation*, and a *transformer*. Experiments name the claim of each of their questions; which theorem
speaks for or against a claim is written here, as `proofs`. Words come from checks and records alone (`combined`).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from simulations.verdicts import WITNESSES, JudgedComparison, Verdict, shown
from vcposim.errors import InputError

RESULTS = Path(__file__).parent / "results"
PAPER = "Stable Asynchrony (VCPO), arXiv 2602.17616"


@dataclass(frozen=True)
class PaperClaim:
    """One row of the table.

    Attributes:
        id: as in `C4`.
        title: three to six words.
        statement: a sentence with its quantities; true or false under conditions.
        source: who says so.
        refuted_by: what would refute it.
        proofs: theorem or counterexample of `python -m proofs` -> what it says of the statement if it checks.
    """

    id: str
    title: str
    statement: str
    source: str
    refuted_by: str
    proofs: Mapping[str, str] = field(default_factory=dict)


CLAIMS = (
    PaperClaim(
        "C1",
        "Lag fattens the ratios",
        "The spread of log-ratios, their tail index and the share of the heaviest 1% grow with lag, "
        "step size and length.",
        f"{PAPER}, motivation",
        "A concordance (Somers' D) with lag, step size or length that is surely below 0.1.",
    ),
    PaperClaim(
        "C2",
        "Only full sequence weights are unbiased",
        "Full sequence importance weights leave the policy gradient unbiased; truncated weights and none do not.",
        "importance sampling; the field's token, geometric and truncated variants",
        "A relative bias with full weights above 1%, or one with cut weights surely below 1%.",
        {"T1.gradient": "holds", "T5.bias": "holds", "T5.witness": "holds"},
    ),
    PaperClaim(
        "C3",
        "ESS identities",
        "ESS/n = 1/(1 + chi2) in expectation, lies in [1/n, 1], and does not change with the scale of the weights.",
        "Kong 1992; used by " + PAPER,
        "A violation beyond rounding.",
        {"T3.upper": "holds", "T3.lower": "holds", "T3.scale": "holds", "T4.chi2": "holds", "T4.fraction": "holds"},
    ),
    PaperClaim(
        "C4",
        "Gradient variance goes as 1/ESS",
        "Variance times ESS fraction equals the on-policy variance, within 25%.",
        f"{PAPER}, the reason for scaling the step by ESS",
        "Variance times ESS that surely differs by more than 25% from its on-policy value.",
        {"T4.mean": "holds if", "T4.gradient": "fails"},
    ),
    PaperClaim(
        "C5",
        "The ESS of a batch can be trusted",
        "The ESS read off a batch is within 25% of the true one, and an alarm tells where it is not.",
        f"{PAPER} reads it off every minibatch",
        "A median reading more than 25% too high, or a missed mode without an alarm.",
    ),
    PaperClaim(
        "C6",
        "OPOB is the best scalar baseline",
        "With full weights OPOB is the unique constant baseline of least variance; any other pays "
        "(b - b*)^2 E[w^2 n^2].",
        f"{PAPER}, closed-form off-policy optimal baseline",
        "A constant baseline of lower variance.",
        {"T2.gap": "holds", "T2.unique": "holds"},
    ),
    PaperClaim(
        "C7",
        "A baseline leaves the mean unchanged",
        "Subtracting a baseline does not move the expected gradient by more than 1%.",
        "REINFORCE; taken over by " + PAPER,
        "A relative bias surely above 1%.",
        {
            "T1.baseline": "holds if",
            "T1.softmax": "holds if",
            "T6.independent": "holds if",
            "T6.unbiased": "holds if",
            "T1.no_correction": "fails",
            "T5.bias": "fails",
            "T6.shrinks": "fails",
            "T6.opob_biased": "fails",
            "T11.biased": "fails",
        },
    ),
    PaperClaim(
        "C8",
        "In-batch OPOB is a soft mask, and unbiased",
        "In-batch OPOB is leave-one-out OPOB times 1 - leverage, and its bias is below 1%.",
        "this project; the released code of VCPO estimates it in the batch",
        "A violation of the identity, or a relative bias surely above 1%.",
        {"T9.identity": "holds", "T6.opob_biased": "fails"},
    ),
    PaperClaim(
        "C9",
        "Released weights do as well",
        "The released code's baseline weight, w counted twice, has at most 5% more error than the formula.",
        "mit-han-lab/vcpo, by reading",
        "An error surely more than 5% above the formula's.",
        {"T10.worse": "fails"},
    ),
    PaperClaim(
        "C10",
        "All parts of OPOB earn their keep",
        "Norms, weights, centering and damping each gain: OPOB is better than the mean and than each part alone.",
        f"{PAPER}, ablations",
        "A part, or the plain mean, that is as good within 0.02 of success probability.",
    ),
    PaperClaim(
        "C11",
        "Square root for Adam, linear for SGD",
        "Scaling the step by ESS^(1/2) with Adam and ESS with SGD is the best power, and beats controls "
        "that do not look "
        "at the batch.",
        f"{PAPER}, step rule",
        "A better power, or a matched constant that does as well.",
        {"T8.linear": "holds if", "T8.sqrt_overshoots": "holds if", "T8.adam": "not judged"},
    ),
    PaperClaim(
        "C12",
        "ESS and gradient norm foretell collapse",
        "ESS and the gradient norm predict collapse within 30 updates with an AUROC above 0.55, better "
        "than other numbers.",
        f"{PAPER}, predictive signals",
        "An AUROC surely below 0.55, or another number surely better by 0.05.",
    ),
    PaperClaim(
        "C13",
        "Rivals collapse, VCPO does not",
        "Under large lag every rival collapses more often, or learns less, than VCPO, at one and at "
        "each's best step size.",
        f"{PAPER}, main comparison",
        "A rival or simple control that is as good within the margin.",
    ),
    PaperClaim(
        "C14",
        "Both parts are needed",
        "ESS scaling and OPOB together beat neither and either alone by 0.02 of success probability.",
        f"{PAPER}, ablation",
        "A part that alone is as good.",
    ),
    PaperClaim(
        "C15",
        "Matches synchronous training",
        "VCPO under lag is at most 0.02 below synchronous training with the mean and with OPOB, at the "
        "end and on the way.",
        f"{PAPER}, headline",
        "A loss surely above 0.02.",
    ),
    PaperClaim(
        "C16",
        "Faster end to end",
        "Asynchronous VCPO reaches the target at least 5% sooner than synchronous training on the same devices.",
        f"{PAPER}, 2.5x",
        "A pipeline in which it surely is not faster.",
    ),
    PaperClaim(
        "C17",
        "Minimal overhead",
        "A cheap stand-in for the exact score norm costs at most 1% of second moment.",
        f"{PAPER}, gradient norms at small cost",
        "A second moment surely more than 1% above that with exact norms.",
    ),
    PaperClaim(
        "C18",
        "Numerics",
        "The step is right at any scale of log-ratios, and closes on what cannot be weighed.",
        "mit-han-lab/vcpo by reading; this project",
        "An input for which the step is wrong, or full where it has to be none.",
        {"T8.range": "holds", "T12.log_scale": "holds", "T12.ess": "holds"},
    ),
    PaperClaim(
        "C19",
        "Group std and OPOB together",
        "Dividing by the group's std on top of OPOB keeps the direction and improves learning by 0.02.",
        "GRPO; an option of the reference loss",
        "A mean update that leaves the gradient's direction, or a gain surely below 0.02.",
        {"T13.direction": "holds if", "T13.scale": "holds if", "T13.opob": "fails"},
    ),
    PaperClaim(
        "C20",
        "Math, reasoning and tool use alike",
        "VCPO beats sequence TIS on small transformers on verifiable tasks of each kind.",
        f"{PAPER}, experiments",
        "A kind of task on which the gain is surely below the margin.",
    ),
)
BY_ID = {claim.id: claim for claim in CLAIMS}


@dataclass(frozen=True)
class Witness:
    """One piece of evidence: its kind, where it comes from, its word, and its number if it has one."""

    kind: str
    source: str
    word: str
    statement: str
    number: str = ""
    verdict: Verdict | None = None

    @property
    def beside(self) -> bool:
        """Whether it is shown and does not judge."""
        return self.verdict is not None and self.verdict.beside

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {k: getattr(self, k) for k in ("kind", "source", "word", "statement", "number", "beside")}


def proof_results(path: Path = RESULTS / "proofs.json") -> dict[str, dict[str, Any]]:
    """What `python -m proofs --json` said, by name; empty where it is not committed."""
    if not path.exists():
        return {}
    return {row["claim"]: row for row in json.loads(path.read_text())["claims"]}


def keep_proofs(said: Path, path: Path = RESULTS / "proofs.json") -> Path:
    """Commit what `python -m proofs --json` printed to a file: one line a claim, without what differs by machine.

    Raises:
        InputError: if it is not that.
    """
    try:
        found = json.loads(said.read_text())["claims"]
        rows = [{k: row[k] for k in ("claim", "statement", "assumptions", "kind", "verdict", "rows")} for row in found]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"DIR: {said} is not what `python -m proofs --json` prints; print it again") from None
    path.write_text('{"claims": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]}\n")
    return path


def witnesses(
    claim: PaperClaim, verdicts: Iterable[tuple[str, Verdict]], proofs: Mapping[str, dict[str, Any]]
) -> list[Witness]:
    """All evidence on a claim: theorems that check, and verdicts by the name of their run."""
    found = []
    for name, word in claim.proofs.items():
        row = proofs.get(name)
        checked = row is not None and row["verdict"] != "FAILED"
        text, about = (row["statement"], row["verdict"]) if row else ("", "was not checked")
        if row and row.get("assumptions", "none") != "none":
            text += f", if {row['assumptions']}"
        found.append(Witness("proof", name, word if checked else "not judged", text, about))
    for source, v in verdicts:
        if v.claim == claim.id:
            found.append(Witness(v.witness, f"{source}/{v.key}", v.verdict, v.statement, v.number, v))
    present = {w.kind for w in found if not w.beside}
    missing = [kind for kind in WITNESSES if kind not in present]
    found += [Witness(kind, "none", "not judged", "no witness of this kind") for kind in missing]
    return sorted(found, key=lambda w: WITNESSES.index(w.kind))


def combined(found: Sequence[Witness]) -> str:
    """One word for all: the same word if they agree, "holds if" where some say so and some not.

    What is undecided vetoes a "holds" that rests on simulation alone: neither the mathematics nor an exact computation
    settles it. It vetoes no "fails": a general claim falls with one place where it surely is not so. What stands beside
    the claim does not count.
    """
    found = [w for w in found if not w.beside]
    words = {w.word for w in found}
    if "holds if" in words or {"holds", "fails"} <= words:
        return "holds if"
    if "fails" in words:
        return "fails"
    if "holds" in words:
        settled = any(w.word == "holds" and w.kind in ("proof", "exact") for w in found)
        return "holds" if settled or "undecided" not in words else "undecided"
    return "undecided" if "undecided" in words else "not judged"


def decisive(found: Sequence[Witness], word: str) -> Witness | None:
    """The witness whose number is shown: one that says the word or, for "holds if", one that sets the limit."""
    order = {"holds if": ("holds if", "fails"), "not judged": ()}.get(word, (word,))
    for wanted in order:
        some = [w for w in found if w.word == wanted and not w.beside]
        numbered = [w for w in some if w.verdict is not None]
        if numbered:
            return max(numbered, key=_weight)
        if some:
            return some[0]
    return None


def _weight(w: Witness) -> float:
    """How far its decisive comparison lies from the boundary, in standard errors; what is exact counts least here.

    An identity that holds to rounding says less to a reader than a size with an interval.
    """
    c = comparison(w.verdict)
    distance = c.get("distance") if c else None
    return abs(distance) if distance is not None and math.isfinite(distance) else 0.0


def comparison(v: Verdict | None) -> JudgedComparison:
    """The comparison that decided a verdict; {} without."""
    return v.comparisons[v.decided_by] if v is not None and v.decided_by is not None else {}


class ClaimRow(TypedDict):
    """A claim as `claims --json` prints it: `number` decides it, `interval` is its low and high end."""

    claim: str
    statement: str
    verdict: str
    number: str
    interval: list[float] | None
    witnesses: list[dict[str, Any]]
    decided_by: str | None


def table(verdicts: Sequence[tuple[str, Verdict]], proofs: Mapping[str, dict[str, Any]]) -> list[ClaimRow]:
    """One row a claim, in the order of `CLAIMS`, with its witnesses as plain data."""
    rows: list[ClaimRow] = []
    for claim in CLAIMS:
        found = witnesses(claim, verdicts, proofs)
        word = combined(found)
        by = decisive(found, word)
        c = comparison(by.verdict if by else None)
        number = f"{shown(c)} ({c['name']})" if "value" in c else by.number if by else "nothing measured"
        rows.append(
            {
                "claim": claim.id,
                "statement": claim.statement,
                "verdict": word,
                "number": number,
                "interval": [c["low"], c["high"]] if "value" in c else None,
                "witnesses": [w.plain() for w in found],
                "decided_by": by.source if by else None,
            }
        )
    return rows


def markdown() -> str:
    """The claims as a page to link to: `simulations/CLAIMS.md`."""
    lines = [
        "# Claims",
        "",
        "Made by `python -m simulations claims --markdown` from `simulations/claims.py`; what came out, "
        "with numbers, is",
        "printed by `python -m simulations claims`.",
        "",
    ]
    for c in CLAIMS:
        lines += [f'<a id="{c.id.lower()}"></a>', f"## {c.id}: {c.title}", "", c.statement, ""]
        lines += [f"- Source: {c.source}.", f"- Refuted by: {c.refuted_by[0].lower()}{c.refuted_by[1:]}"]
        if c.proofs:
            lines.append("- Proofs: " + ", ".join(f"{name} ({word})" for name, word in c.proofs.items()) + ".")
        lines.append("")
    return "\n".join(lines)
