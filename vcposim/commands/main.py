"""The `vcposim` command: what would my estimator do, on a problem I describe or on rollouts I dumped?

A subcommand is a module of this folder: its docstring opens with "`vcposim NAME`: what for.", `EXAMPLES` are lines to
type, `add_arguments(parser)` says what it takes, `run(arguments)` does it. Nothing else lists it.

Every command prints a table for people, and with `--json` one JSON object for machines. Bad input is one line on
standard error and exit code 2; a law that is broken is exit code 1.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from vcposim import __version__, commands
from vcposim.commands.logs import quiet_libraries
from vcposim.errors import InputError, either, unknown_name

OPENING = re.compile(r'"""`vcposim (\w+)`: (.*?)\.?(?:\n\n|""")', re.DOTALL)
"""how the docstring of a subcommand's module begins: its name, and what it is for"""


def subcommands() -> dict[str, str]:
    """name -> what it is for; the modules' text is read and nothing is imported, so that help comes at once."""
    files = sorted(path for folder in commands.__path__ for path in Path(folder).glob("*.py"))
    openings = [OPENING.match(path.read_text(encoding="utf-8")) for path in files]
    return {found[1]: found[2] for found in openings if found}


class HelpText(argparse.HelpFormatter):
    """Paragraphs are wrapped, and a line that is indented or short enough stays a line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=16 if prog == "vcposim" else 24)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def filled(line: str) -> str:
            return line if line.startswith("  ") else super(HelpText, self)._fill_text(line, width, indent)

        return "\n".join(map(filled, text.splitlines()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, no usage dump: the line says what to do, and names what is nearest to a misspelled word."""
        choice = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(", message)
        if choice:
            message = str(unknown_name("command", choice[1], subcommands()))
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
            self.epilog = "\n\n".join(filter(None, [self.epilog, "\n  ".join(["for example:", *module.EXAMPLES])]))
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
        formatter_class=HelpText,
        description="Prove, measure and check off-policy policy-gradient estimators.",
        epilog="vcposim COMMAND --help says what a command takes. Training of transformers: python -m llm_bridge.train "
        "(extra llm). Experiments, claims and proofs come with a checkout of the repository, not with the package: "
        "there, python -m simulations and python -m proofs.",
    )
    top.add_argument("--version", action="version", version=f"vcposim {__version__}")
    choices = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Subcommand)
    for name, purpose in subcommands().items():
        choices.add_parser(name, help=purpose, formatter_class=HelpText).name = name
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
