"""`vcposim completion`: a script that completes commands, options and names in your shell.

The script is static, made by shtab from the parser itself: pressing tab starts no Python. Make it anew after an update.
"""

import argparse
import sys
from collections.abc import Iterable

from vcposim.errors import unknown_name

EXAMPLES = ("vcposim completion bash",)
SHELLS = ("bash", "zsh", "tcsh")
HOW = """\
to keep it:
  bash: vcposim completion bash > ~/.local/share/bash-completion/completions/vcposim
  zsh:  vcposim completion zsh > DIR/_vcposim, for a DIR of $fpath
  once: eval "$(vcposim completion bash)"
"""


def complete_with(argument: argparse.Action, names: Iterable[str]) -> None:
    """Offer names when an argument is completed, without refusing others: the one who reads it explains better."""
    argument.offered = list(names)  # type: ignore[attr-defined]


def complete_files(argument: argparse.Action) -> None:
    """Offer files when an argument is completed."""
    argument.offered = None  # type: ignore[attr-defined]


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim completion` takes."""
    p.description = "Print a script that completes vcposim's commands, options, files and names in your shell."
    p.epilog = HOW
    complete_with(p.add_argument("shell", metavar="SHELL", help=", ".join(SHELLS)), SHELLS)


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    if arguments.shell not in SHELLS:
        raise unknown_name("shell", arguments.shell, SHELLS)
    sys.stdout.write(script(arguments.shell))


def script(shell: str) -> str:
    """The completion script of the whole command line."""
    import shtab

    from vcposim.commands.main import Subcommand, parser

    top = parser()
    for action in top._actions:
        for command in {} if not isinstance(action, argparse._SubParsersAction) else action.choices.values():
            assert isinstance(command, Subcommand)
            for argument in command.filled()._actions:
                # what shtab reads of an argument: `choices` to offer, or a function that completes files
                offered = getattr(argument, "offered", None)
                if offered is not None:
                    argument.choices = offered
                elif hasattr(argument, "offered") or argument.metavar == "FILE":
                    argument.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(top, shell=shell)
