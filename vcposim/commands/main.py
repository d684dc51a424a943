"""The `vcposim` command: what would my estimator do, on a problem I describe or on rollouts I dumped?

    vcposim variance    bias, variance and MSE of estimators on a problem with a known gradient
    vcposim replay      what each baseline would have done on dumped rollouts
    vcposim check       which laws an estimator of yours keeps, and its bias and variance
    vcposim plan        which lag and which split of devices reach the target first
    vcposim catalogue   every named estimator with its formula and validity
    vcposim cite        BibTeX of what a named estimator stands on

Every command prints a table for people, and with `--json` one JSON object for machines. Bad input is one line on
standard error and exit code 2; a law that is broken is exit code 1.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from vcposim.catalogue import CATALOGUE, cite
from vcposim.commands import check as check_cli
from vcposim.commands import plan as plan_cli
from vcposim.commands import replay as replay_cli
from vcposim.commands import variance as variance_cli
from vcposim.errors import InputError

Command = Callable[[argparse.Namespace], int | None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, no usage dump: the line says what to do."""
        sys.stderr.write(f"{self.prog}: error: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="vcposim", description="Prove, measure and check off-policy policy-gradient estimators.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    variance_cli.add_command(commands)
    replay_cli.add_command(commands)
    check_cli.add_command(commands)
    plan_cli.add_command(commands)
    listing = commands.add_parser("catalogue", help="every named estimator with its formula and validity")
    listing.set_defaults(run=_catalogue)
    citing = commands.add_parser("cite", help="BibTeX of what named estimators stand on")
    citing.add_argument("name", nargs="+", help="names of the catalogue, as in: vcpo rloo")
    citing.set_defaults(run=lambda arguments: print(cite(*arguments.name)))
    return top


def _catalogue(arguments: argparse.Namespace) -> None:
    table = Table("name", "coefficient", "unbiased", title="Estimators")
    for name, entry in CATALOGUE.items():
        table.add_row(name, entry.formula, entry.unbiased)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a broken law, 2 for bad input, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    command: Command = arguments.run
    code: int | None = 0
    try:
        code = command(arguments)
        sys.stdout.flush()
    except InputError as error:
        sys.stderr.write(f"vcposim: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("vcposim: interrupted; nothing was written\n")
        return 130
    except BrokenPipeError:  # `vcposim ... | head`: the reader has left, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
