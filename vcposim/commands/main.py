"""The `vcposim` command: what would my estimator do, on a problem I describe or on rollouts I dumped?

    vcposim variance    bias, variance and MSE of estimators on a problem with a known gradient
    vcposim replay      what dumped rollouts say about a run, and what each correction would have done
    vcposim check       which laws an estimator of yours keeps, and its bias and variance
    vcposim compare     estimators of yours measured like the catalogue's: laws, exact moments, learning
    vcposim advise      which estimator, baseline and step rule did best nearest to your regime
    vcposim plan        which lag and which split of devices reach the target first
    vcposim catalogue   every named estimator with its formula and validity
    vcposim cite        BibTeX of what a named estimator stands on
    vcposim completion  a script that completes all this in your shell

Every command prints a table for people, and with `--json` one JSON object for machines. Bad input is one line on
standard error and exit code 2; a law that is broken is exit code 1.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from vcposim import __version__
from vcposim.commands.logs import quiet_libraries
from vcposim.errors import InputError, either, unknown_name

COMMANDS = {
    "variance": "bias, variance and MSE of estimators on a problem with a known gradient",
    "replay": "what dumped rollouts say about a run, and what each correction would have done",
    "check": "which laws an estimator of yours keeps, and its bias and variance beside the catalogue's",
    "compare": "your estimators measured like the catalogue's, and beside them: laws, exact moments, learning, cost",
    "advise": "which estimator, baseline and step rule did best nearest to your regime, and how sure that is",
    "plan": "which lag and generation/training split reach the target first",
    "catalogue": "every named estimator with its formula and validity; one of them in full",
    "cite": "BibTeX of what named estimators stand on",
    "completion": "a script that completes commands, options and names in your shell",
}
"""name -> what it is for; each is a module of this folder with `add_arguments(parser)` and `run(arguments)`"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, no usage dump: the line says what to do, and names what is nearest to a misspelled word."""
        choice = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(", message)
        if choice:
            message = str(unknown_name("command", choice[1], COMMANDS))
        if message.startswith("unrecognized arguments: --"):
            word = message.split()[2].partition("=")[0]
            near = get_close_matches(word, self._option_string_actions, n=3, cutoff=0.6)
            message += f"; did you mean {either(near)}?" if near else ""
        sys.stderr.write(f"{self.prog}: error: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)


class Subcommand(_Parser):
    """A command whose module is imported when its arguments are parsed or its help is asked for, not before."""

    name: str | None = None
    """of the module that is still to be imported"""

    def filled(self) -> "Subcommand":
        """Itself, with all its arguments."""
        if self.name is not None:
            module, self.name = import_module(f"vcposim.commands.{self.name}"), None
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; the parser is filled first, and an unknown argument is an error of this subcommand."""
        # here and not in the parent, which would say "vcposim" where it means "vcposim variance"
        found, unknown = super(Subcommand, self.filled()).parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def format_help(self) -> str:
        """As argparse's, with the arguments filled in first."""
        return super(Subcommand, self.filled()).format_help()


def parser() -> argparse.ArgumentParser:
    """The whole command line; a subcommand's own arguments join it when they are needed."""
    top = _Parser(
        prog="vcposim",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=14),
        description="Prove, measure and check off-policy policy-gradient estimators.",
        epilog="vcposim COMMAND --help says what a command takes.",
    )
    top.add_argument("--version", action="version", version=f"vcposim {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Subcommand)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose).name = name
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a broken law, 2 for bad input, 130 when interrupted."""
    top = parser()
    code: int | None = 0
    try:
        with quiet_libraries("vcposim"):
            arguments = top.parse_args(argv)
            if arguments.command is None:
                top.print_help()
            else:
                code = arguments.run(arguments)
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
