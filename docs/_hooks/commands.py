"""A page for every command: its options as the parser says them, and an example that is run when the page is made."""

import contextlib
import io
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from _hooks.cache import cached
from _hooks.text import fence, plain, table, wrapped
from vcposim.commands.main import Subcommand, parser, subcommands

ROOT = Path(__file__).parents[2]
WIDTH = "96"
MINE = "import numpy as np\n\n\ndef mine(batch):\n    return np.exp(np.minimum(batch.log_ratio, 3)) * batch.reward\n"
"""the estimator of the examples"""

PROGRAMS = {
    "python -m simulations": ("simulations.__main__", "the experiments: list, run, report, claims"),
    "python -m proofs": ("proofs.__main__", "what is proved about the shipped functions"),
    "python -m llm_bridge.train": ("llm_bridge.train", "train a language model on stale rollouts"),
}
"""from a checkout -> the module that holds its parser, and what for"""

MOST = 60
"""lines of output that a page shows"""


@contextlib.contextmanager
def terminal() -> Iterator[io.StringIO]:
    """A terminal of fixed width in an empty folder with `mine.py` in it."""
    kept, here = dict(os.environ), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(COLUMNS=WIDTH, NO_COLOR="1", TERM="dumb")
        os.chdir(folder)
        Path("mine.py").write_text(MINE)
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                yield out
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(kept)


def output(line: str) -> tuple[int, str]:
    """Exit code and what a command line prints."""

    def run() -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "mine.py").write_text(MINE)
            command = [sys.executable, "-m", "vcposim", *shlex.split(line)[1:]]
            width = {"COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}
            environment = {**os.environ, **width, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{line}: exit code {done.returncode}")
        return done.returncode, done.stdout

    code, text = cached(line, run)
    return code, text


def help_of(name: str) -> str:
    """`vcposim NAME --help`."""
    with terminal():
        top = parser()
        choices = next(a.choices for a in top._actions if getattr(a, "choices", None) and name in a.choices)
        command = choices[name]
        assert isinstance(command, Subcommand)
        return command.format_help()


def page(name: str) -> str:
    """One subcommand."""
    purpose, examples = subcommands()[name], import_module(f"vcposim.commands.{name}").EXAMPLES
    out = [f"# vcposim {name}\n", plain(purpose[0].upper() + purpose[1:]) + ".\n", "## Example\n"]
    if any("mine.py" in line for line in examples):
        out += ["With this in `mine.py`:\n", fence(MINE, "python")]
    for line in examples:
        code, text = output(line)
        lines = [x.rstrip() for x in text.splitlines()]
        cut = [*lines[:MOST], f"... ({len(lines) - MOST} lines more)"] if len(lines) > MOST + 5 else lines
        out += [fence(wrapped(line), "sh"), fence("\n".join(cut))]
        if code:
            out.append(f"Exit code {code}.\n")
    out += ["## Options\n", fence(help_of(name))]
    return "\n".join(out)


def program(line: str, module: str, about: str) -> str:
    """One `python -m` program."""
    source = import_module(module)
    with terminal():
        text = getattr(source, "parser", getattr(source, "_parser", None))().format_help()
    return "\n".join([f"# {line}\n", f"{about[0].upper()}{about[1:]}. From a checkout.\n", fence(text)])


def pages() -> dict[str, str]:
    out = {f"reference/commands/{name}.md": page(name) for name in subcommands()}
    rows = [(f"{{doc}}`vcposim {name} <{name}>`", plain(says)) for name, says in subcommands().items()]
    for line, (module, about) in PROGRAMS.items():
        name = line.split()[-1]
        out[f"reference/commands/{name}.md"] = program(line, module, about)
        rows.append((f"{{doc}}`{line} <{name}>`", plain(about)))
    toc = "\n".join([*subcommands(), *(line.split()[-1] for line in PROGRAMS)])
    out["reference/commands/index.md"] = "\n".join(
        [
            "# Commands\n",
            "Every command prints a table for people, and with `--json` one JSON object for machines. Bad "
            "input is one line and "
            "exit code 2; a broken law is exit code 1.\n",
            table(("command", "what it is for"), rows),
            f"```{{toctree}}\n:hidden:\n{toc}\n```\n",
        ]
    )
    return out
