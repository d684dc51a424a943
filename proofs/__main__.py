"""python -m proofs: what is proved about the shipped functions, and by which layers.

Prints one row a claim and exits with 1 if any fails. `python -m proofs --help` lists the options.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from proofs import check, readme
from proofs.claims import all_claims, select

STYLE = {"FAILED": "bold red", "proved": "green", "exact": "green", "counterexample": "cyan", "no theorem": "yellow"}


def main(arguments: list[str] | None = None) -> int:
    """Run the claims, print the table; 0 if all hold, 1 if one fails, 2 on a wrong option."""
    options = _parser().parse_args(arguments)
    try:
        claims = select(options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.readme:
        readme.path().write_text(readme.render(all_claims()))
        return 0
    began = time.perf_counter()
    layers = tuple(options.layer or check.LAYERS)
    report = check.run(
        claims, layers if not options.no_coq else tuple(x for x in layers if x != "coq"), need_coq=options.coq
    )
    seconds = time.perf_counter() - began
    if options.json:
        obligations = {
            "asked": report.asked,
            "confirmed": report.confirmed,
            "contradicted": report.contradicted,
            "undecided_in": report.undecided,
        }
        document = {
            "claims": [result.as_dict() for result in report.results],
            "obligations": obligations,
            "notes": report.notes,
            "seconds": round(seconds, 1),
            "failed": report.failed,
        }
        print(json.dumps(document, indent=1))
    else:
        _show(report, seconds)
    return int(report.failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m proofs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", metavar="T", help="a family (T2) or a claim (T2.gap); repeatable")
    parser.add_argument("--layer", action="append", choices=check.LAYERS, help="run this layer only; repeatable")
    parser.add_argument("--coq", action="store_true", help="fail where layer 3 cannot run, instead of skipping it")
    parser.add_argument("--no-coq", action="store_true", help="leave out layer 3")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--readme", action="store_true", help="rewrite proofs/README.md from the claims")
    return parser


def _show(report: check.Report, seconds: float) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=160)
    columns = COLUMNS if console.width >= 120 else COLUMNS[:2] + COLUMNS[3:5]
    table = Table(title="What is proved about the functions that ship", show_lines=True)
    for name in columns:
        table.add_column(name, no_wrap=name in ("claim", "layers"))
    for result in report.results:
        cells = _cells(result)
        table.add_row(*(cells[name] for name in columns))
    console.print(table)
    for result in report.results:
        for layer, outcome in result.outcomes.items():
            if not outcome.passed:
                console.print(Text(f"FAILED {result.claim.name} ({layer}): {outcome.detail}", style="bold red"))
    remarks = ["layers: 1 exact rationals, 2 any number of samples and any dimension (z3), 3 Coq"]
    if report.asked:
        open_ = f", gives up on some of {', '.join(report.undecided)}" if report.undecided else ""
        remarks.append(
            f"second opinion: cvc5 confirms {report.confirmed} of {report.asked} obligations of layer 2, contradicts "
            f"{report.contradicted}{open_}"
        )
    failed = sum(result.failed for result in report.results)
    for line in (*remarks, *report.notes, f"{len(report.results)} claims, {failed} failed, {seconds:.0f} s"):
        console.print(Text(line))


COLUMNS = ("claim", "statement", "assumptions", "verdict", "layers", "shipped functions", "rows")


def _cells(result: check.ClaimResult) -> dict[str, Text]:
    claim, verdict = result.claim, result.verdict
    texts = (claim.name, claim.statement, claim.assumptions, verdict, result.layers or "-",
             "\n".join(claim.shipped) or "-", " ".join(claim.rows))  # fmt: skip
    styles = {"verdict": STYLE.get(verdict, "")}
    return {name: Text(text, style=styles.get(name, "")) for name, text in zip(COLUMNS, texts, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
