"""What other libraries log while a command of ours runs: errors, in one line with the library's name; nothing else.

Progress notes, deprecations and advice of a library are for those who call it. A command of ours is judged by its own
output, and its standard error holds what its user can act on.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class _OneLine(logging.Handler):
    """Errors of any logger as one line on standard error, whatever that is when they come."""

    def __init__(self, program: str):
        super().__init__(logging.ERROR)
        self.program = program

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        sys.stderr.write(f"{self.program}: {record.name.partition('.')[0]}: {text}\n")


@contextmanager
def quiet_libraries(program: str) -> Iterator[None]:
    """For the time of a command: logs of other libraries below error are dropped, and so are their warnings.

    Warnings raised from our own files, or a user's, are a line each. Libraries that install handlers of their own
    (transformers) keep to their own levels.
    """
    root, handler = logging.getLogger(), _OneLine(program)
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():

            def show(message, category, filename, lineno, file=None, line=None):  # type: ignore[no-untyped-def]
                path = Path(filename)
                if not {"site-packages", "dist-packages"} & set(path.parts):
                    text = " ".join(str(message).split())
                    sys.stderr.write(f"{program}: {path.name}, line {lineno}: {category.__name__}: {text}\n")

            warnings.showwarning = show
            yield
    finally:
        root.removeHandler(handler)
