"""`vcposim cite NAME`: BibTeX of what named estimators stand on."""

import argparse

from vcposim.catalogue import CATALOGUE, cite
from vcposim.commands.completion import complete_with


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim cite` takes."""
    p.description = "BibTeX of every source that the named estimators stand on, each once."
    complete_with(
        p.add_argument("name", nargs="+", metavar="NAME", help="names of the catalogue, as in: vcpo rloo"), CATALOGUE
    )


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    print(cite(*arguments.name))
