"""Writes the generated pages before Sphinx looks for its sources, and mends what its extensions leave broken."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from _hooks import pages


def generate(app: Sphinx) -> None:
    pages.write(Path(app.srcdir))


TOGGLE = '<summary><span class="toctree-toggle"'
NAMED = '<summary aria-label="show or hide what is below"><span class="toctree-toggle"'
"""of the theme's navigation: a button needs a name for who hears the page"""

BACK = re.compile(r'<a class="viewcode-back" href="[^"]*">\[docs\]</a>')
"""from source back to a description; it points to whichever page imported the name first, often a wrong one"""


def mend(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    for path in out.rglob("*.html"):
        text = path.read_text()
        mended = text.replace(TOGGLE, NAMED)
        if path.is_relative_to(out / "_modules"):
            mended = BACK.sub("", mended)
            mended = re.sub(
                r'<li><a href="([^"]+)">[^<]*</a></li>',
                lambda found, here=path.parent: found[0] if (here / found[1]).exists() else "",
                mended,
            )
        if mended != text:
            path.write_text(mended)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", generate, priority=100)
    app.connect("build-finished", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
