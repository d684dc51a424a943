"""Where an answer goes: the options `--json`, `--figure` and `--no-figure`, and a figure saved whole or not at all."""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcposim.errors import InputError
from vcposim.pages.parts import is_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

LONGEST_NAME = 240
"""bytes of a name, with which a file is written beside it first"""

TableRow = dict[str, Any]
"""a line of a table that is printed or written as JSON: column -> value"""


def figure_path(given: str | None, default: str) -> Path:
    """Where a figure goes: the path given, which is replaced if it exists, or a default name that is still free.

    Raises `InputError` before any work if nothing can be written there.
    """
    path = Path(given) if given else _free(Path(default))
    _require_short("figure", path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"figure: {path} is neither .png, .pdf nor .svg; name one, as in {default}")
    if path.is_dir():
        raise InputError(f"figure: {path} is a directory; name a file in it, as in {path / default}")
    if not path.parent.is_dir():
        raise InputError(f"figure: folder {path.parent} does not exist; create it, or name another")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"figure: folder {path.parent} cannot be written to; name another, or use --no-figure")
    return path


def add_output_options(parser: argparse.ArgumentParser, default: str) -> None:
    """The options that every command with a figure shares: `--json`, `--figure`, `--no-figure`."""
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="one JSON object, no figure unless --figure")
    out.add_argument(
        "--figure", metavar="FILE", help=f"where to save the figure, replacing it (default a free name like {default})"
    )
    out.add_argument("--no-figure", action="store_true", help="no figure")


@dataclass(frozen=True)
class Output:
    """Where an answer goes."""

    json: bool
    """as one object, instead of a table"""
    drawing: bool
    """whether a figure is asked for"""
    given: str | None
    """the figure's path; None for a free name like `default`"""
    default: str

    def save(self, figure: "Figure") -> Path:
        """Save to the path given or to a free default name (see `figure_path`); returns where it went."""
        return save_figure(figure, self.given, self.default)


def output_of(arguments: argparse.Namespace, default: str) -> Output:
    """What the options of `add_output_options` ask for.

    Raises `InputError` for a figure's place that cannot be written, before any work is done.
    """
    drawing = bool(arguments.figure) or not (arguments.json or arguments.no_figure)
    if drawing:
        figure_path(arguments.figure, default)
    return Output(arguments.json, drawing, arguments.figure, default)


def save_figure(figure: "Figure", given: str | None, default: str = "vcposim.png") -> Path:
    """Save to the path given or to a free default name (see `figure_path`); returns where it went.

    Written beside and moved into place, so that a full disk leaves no half of a figure.

    Raises `InputError` where the disk will not have it.
    """
    # imported here because most answers are text, and it takes longer than they do
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = figure_path(given, default)
    FigureCanvasAgg(figure)
    # no time stamp and no version in the file: the same result is the same bytes
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    try:
        _whole(path, lambda name: figure.savefig(name, metadata=metadata[path.suffix.lower()]))
    except OSError as error:
        raise InputError(f"figure: {path} cannot be written ({error.strerror}); name another, or --no-figure") from None
    return path


def page_path(given: str, generator: str) -> Path:
    """Where a page goes: the path given, which is replaced only if it is a page of that generator.

    Raises `InputError` before any work if nothing can or should be written there.
    """
    path = Path(given)
    _require_short("--html", path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--html: {path} does not end in .html; name a page, as in run.html")
    if path.is_dir():
        raise InputError(f"--html: {path} is a directory; name a file in it, as in {path / 'run.html'}")
    if not path.parent.is_dir():
        raise InputError(f"--html: folder {path.parent} does not exist; create it, or name another")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--html: folder {path.parent} cannot be written to; name another")
    if path.exists() and not is_page(path, generator):
        raise InputError(f"--html: {path} is there and is no page of this command; name another file")
    return path


def _require_short(what: str, path: Path) -> None:
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise InputError(f"{what}: {path.name[:40]}...: no file can have so long a name; shorten it")


def save_page(text: str, path: Path) -> Path:
    """Write a page whole or not at all; raises `InputError` where the disk will not have it."""
    try:
        _whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--html: {path} cannot be written ({error.strerror}); name another") from None
    return path


def _whole(path: Path, write: Callable[[str], Any]) -> None:
    """Let `write` fill a file beside `path`, and move it into place."""
    descriptor, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    try:
        write(name)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # a temporary file is private, an answer is an ordinary file
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def print_whole(console: "Console", table: "Table") -> None:
    """A table with no cell cut: one that is wider than the terminal is wrapped by the terminal, if it wraps."""
    from rich.console import Console
    from rich.measure import Measurement

    needs = Measurement.get(console, console.options.update(width=1000), table).maximum
    wide = Console(file=console.file, width=max(console.width, needs), force_terminal=console.is_terminal)
    wide.print(table)


def _free(path: Path) -> Path:
    # results of an earlier run are never replaced unasked: -2, -3, ...
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
