"""Writes the generated pages before Sphinx looks for its sources (`_hooks.pages` says what they hold)."""

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from _hooks import pages


def generate(app: Sphinx) -> None:
    pages.write(Path(app.srcdir))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", generate, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
