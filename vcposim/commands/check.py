"""`vcposim check`: which laws an estimator of yours keeps, and its bias and variance beside the catalogue's."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vcposim.catalogue import CATALOGUE
from vcposim.commands.completion import complete_with
from vcposim.commands.output import Output, TableRow, add_output_options, output_of
from vcposim.errors import InputError

if TYPE_CHECKING:
    from vcposim.testing import Trial
    from vcposim.testing.report_card import LawFinding

EXAMPLES = ("vcposim check mine.py:mine --claims unbiased --examples 5 --no-figure",)
FIGURE = "vcposim-check.png"
STYLES = {"holds": "green", "violated": "bold red"}
SHOWN_RIVALS = ("reinforce", "rloo", "sequence_is", "sequence_tis", "vcpo")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim check` takes."""
    p.description = (
        "Property-test an estimator: a function of a vcposim.Batch that returns one coefficient a sample, "
        "or a token. Exit code 1 if a law that it claims is broken."
    )
    named = p.add_argument(
        "estimator",
        nargs="?",
        metavar="ESTIMATOR",
        help="module:function, path/to/file.py:function, or a catalogue name",
    )
    complete_with(named, CATALOGUE)
    p.add_argument("--catalogue", action="store_true", help="check every named estimator instead")
    laws = p.add_argument_group("laws (python -m pydoc vcposim.testing.laws)")
    laws.add_argument("--claims", nargs="+", default=[], metavar="LAW", help="laws it claims beyond the universal ones")
    laws.add_argument("--without", nargs="+", default=[], metavar="LAW", help="universal laws it does not claim")
    host = laws.add_argument("--host", metavar="ESTIMATOR", help="what it equals where pi = mu: claims lag_zero")
    rivals = laws.add_argument(
        "--dominates", nargs="+", default=[], metavar="ESTIMATOR", help="what it has no more variance than"
    )
    complete_with(host, CATALOGUE)
    complete_with(rivals, CATALOGUE)
    how = p.add_argument_group("how")
    how.add_argument("--needs", nargs="+", default=[], metavar="FIELD", help="fields of Batch it reads, as in: tokens")
    how.add_argument("--arrays", default="auto", metavar="LIBRARY", help="numpy, torch, ... (default: what it takes)")
    how.add_argument("--examples", type=int, metavar="N", help="cases a law (default 30; 5 with --catalogue)")
    how.add_argument("--workers", type=int, default=1, help="processes, for --catalogue; results do not depend on it")
    add_output_options(p, FIGURE)


def run(arguments: argparse.Namespace) -> int:
    """Try, compare, draw, print; returns the exit code, 1 if a claimed law is broken."""
    output = output_of(arguments, FIGURE)
    if bool(arguments.estimator) == arguments.catalogue:
        raise InputError("estimator: name one, as in module:function, or pass --catalogue alone")
    if arguments.examples is not None and arguments.examples < 1:
        raise InputError(f"--examples: {arguments.examples} tries nothing; use 1 or more")
    if arguments.workers < 1:
        raise InputError(f"--workers: {arguments.workers} is less than 1; use 1 or more")
    import vcposim.testing.report_card as cards

    if arguments.catalogue:
        for option in ("claims", "without", "needs", "host", "dominates"):
            if getattr(arguments, option):
                raise InputError(
                    f"--{option}: entries of the catalogue claim what they say; drop it, or name one estimator"
                )
        return _catalogue(cards, output, examples=arguments.examples or 5, workers=arguments.workers)
    arrays = arguments.arrays
    if arrays == "auto":
        arrays = cards.library_for(arguments.estimator, arguments.needs)
    asked = cards.trials(
        arguments.estimator,
        arguments.claims,
        needs=arguments.needs,
        host=arguments.host,
        dominates=arguments.dominates,
        without=arguments.without,
        examples=arguments.examples or 30,
        convert=arrays,
    )
    return _one(arguments.estimator, arrays, asked, cards, output)


def _one(name: str, arrays: str, asked: Sequence["Trial"], cards: Any, output: Output) -> int:
    with _progress(len(asked)) as step:
        found = cards.findings(asked, step)
    held = cards.passed(found)
    rows, refused = cards.measured(asked[0].subject)
    if refused and held:  # else the report says more than this line could
        raise InputError(f"estimator: {refused}; axes before the samples are replications: reduce over the last alone")
    path = _drawn(rows, output)
    if output.json:
        card = {"estimator": name, "arrays": arrays, "passed": held}
        print(json.dumps({**card, "laws": [one.to_json() for one in found], "moments": rows}, allow_nan=False))
    else:
        _print_card(name, arrays, found, rows, cards.LAWS)
        if path is not None:
            print(f"figure: {path}")
    return 0 if held else 1


def _drawn(rows: Sequence[TableRow], output: Output) -> Path | None:
    if not output.drawing:
        return None
    from vcposim.commands.figures import bias_variance_figure  # here because matplotlib is slow to load

    return output.save(bias_variance_figure(rows))


def _print_card(name: str, arrays: str, found: Sequence["LawFinding"], rows: Sequence[TableRow], laws: Any) -> None:
    console = Console()
    table = Table(
        title=Text(f"{name}, on {arrays} arrays"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("law", "verdict", "what it says"):
        table.add_column(column, no_wrap=column != "what it says")
    for one in found:
        verdict = one.status
        if one.status == "not claimed" and one.tried:
            verdict += ": no counterexample" if one.violation is None else ": it fails"
        table.add_row(one.law, Text(verdict, style=STYLES.get(one.status, "dim")), Text(laws[one.law].statement))
    console.print(table)
    broken = [one for one in found if one.status == "violated"]
    for one in broken:
        seen = one.violation
        assert seen is not None  # it is what makes a law violated
        lines = str(seen).splitlines()
        console.print(lines[0], style="bold red", markup=False, highlight=False)
        for line in lines[1:-1]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if laws[one.law].universal:
            console.print(f"  if it is not meant to keep it: --without {one.law}", markup=False, highlight=False)
        again = f'  reproduce: python -c "import vcposim.testing; {seen.reproduction}"'
        console.print(again, markup=False, highlight=False, soft_wrap=True)
    for problem in dict.fromkeys(row["problem"] for row in rows if row["mine"]):  # where it stands among the catalogue
        here = [row for row in rows if row["problem"] == problem]
        mine, others = next(row for row in here if row["mine"]), [row for row in here if not row["mine"]]
        ahead = sum(row["mse"] < mine["mse"] * (1 - 1e-9) for row in others)
        best = min(others, key=lambda row: row["mse"])
        bias = mine["squared_bias"] ** 0.5 if mine["squared_bias"] > 1e-20 else 0.0  # less is rounding
        console.print(
            f"{problem}: bias {bias:.3g} |g|, variance {mine['variance']:.3g} |g|^2, MSE {mine['mse']:.3g} |g|^2; "
            f"{ahead} of {len(others)} named estimators have less (least: {best['estimator']}, {best['mse']:.3g})",
            markup=False,
            highlight=False,
        )
    claimed = sum(one.status in STYLES for one in found)
    verdict = f"breaks {len(broken)} of the {claimed} laws it must keep" if broken else f"keeps all {claimed} laws"
    console.print(f"{name} {verdict}", style="bold", markup=False, highlight=False)


def _catalogue(cards: Any, output: Output, *, examples: int, workers: int) -> int:
    judge = partial(cards.catalogue_card, examples=examples)
    with _progress(len(CATALOGUE)) as step, _mapper(workers) as spread:
        found = {}
        for name, card in zip(CATALOGUE, spread(judge, CATALOGUE), strict=True):
            step(name)
            found[name] = card
    path = _drawn(cards.beside_the_catalogue(None), output) if output.drawing else None
    held = all(cards.passed(card) for card in found.values())
    if output.json:
        entries = {name: [one.to_json() for one in card] for name, card in found.items()}
        print(json.dumps({"passed": held, "estimators": entries}, allow_nan=False))
    else:
        _print_catalogue(found)
        if path is not None:
            print(f"figure: {path}")
    return 0 if held else 1


def _print_catalogue(found: dict[str, list["LawFinding"]]) -> None:
    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("estimator", no_wrap=True)
    table.add_column("keeps", justify="right")
    table.add_column("does not claim (!: a case shows why)", overflow="fold")
    for name, card in found.items():
        kept = sum(one.status == "holds" for one in card)
        broken = [f"BREAKS {one.law}" for one in card if one.status == "violated"]
        open_ = [
            f"{one.law}{'!' if one.violation else ''}" for one in card if one.status == "not claimed" and one.tried
        ]
        table.add_row(name, str(kept), Text(", ".join(broken + open_), style="bold red" if broken else ""))
    console.print(table)
    bad = [name for name, card in found.items() if any(one.status == "violated" for one in card)]
    verdict = f"{len(bad)} break a law: {', '.join(bad)}" if bad else "every one keeps the laws it must"
    console.print(f"{len(found)} estimators; {verdict}", style="bold", markup=False, highlight=False)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Any]]:
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers) as pool:
        yield pool.map
