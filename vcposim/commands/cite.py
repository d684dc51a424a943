"""`vcposim cite`: BibTeX of what named estimators stand on."""

import argparse

from vcposim.catalogue import CATALOGUE, cite
from vcposim.commands.completion import complete_with
from vcposim.errors import InputError

EXAMPLES = ("vcposim cite vcpo",)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim cite` takes."""
    p.description = "BibTeX of every source that the named estimators stand on, each once."
    complete_with(
        p.add_argument("name", nargs="*", metavar="NAME", help="names of the catalogue, as in: vcpo rloo"), CATALOGUE
    )
    p.add_argument(
        "--index",
        action="store_true",
        help="instead, all papers as Markdown: their estimators, what was found, how to switch them on (in a checkout, "
        "python -m simulations papers adds the verdicts of claims and experiments)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    if arguments.index == bool(arguments.name):
        raise InputError("cite: give names of the catalogue, as in: vcposim cite vcpo rloo, or --index alone")
    if arguments.index:
        from vcposim.catalogue.papers import markdown
        from vcposim.comparison.leaderboard import found

        print(markdown(found()))
    else:
        print(cite(*arguments.name))
