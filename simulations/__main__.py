"""`python -m simulations`: list the experiments, run them, report what they say.

Results go to standard output; progress, notes and errors to standard error. Exit codes: 0 done; 1 a setting or an
analysis failed (the rest is kept); 2 the command cannot be carried out, one line says why; 130 interrupted by Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from simulations.protocol import SIZES, Experiment, discover, select, settings_of
from simulations.report import Findings, is_report, load, load_section, page, verdict_json, verdict_table
from simulations.runner import (
    Failure,
    RunFolder,
    cluster_executor,
    local_executor,
    locked,
    sweep,
    write_atomically,
)
from vcposim.commands.logs import quiet_libraries
from vcposim.errors import InputError

PROGRAM = "python -m simulations"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    """The command line, as `--help` shows it."""
    root = Parser(PROGRAM, description="List, run and report the experiments of simulations/.", allow_abbrev=False)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the experiments: question, claims, number of settings")

    run = commands.add_parser("run", help="compute records; 'quick' is every experiment, reduced, with a report")
    run.add_argument("ids", nargs="+", metavar="ID", help="experiment, see 'list'; or 'quick'")
    run.add_argument("--size", choices=SIZES, default="reduced", help="how much to sweep (default: %(default)s)")
    run.add_argument(
        "--workers",
        type=_positive,
        default=_cores(),
        metavar="N",
        help="processes (default: one per core, here %(default)s); the records do not depend on it",
    )
    run.add_argument("--scheduler", metavar="ADDRESS", help="use the workers of a dask.distributed scheduler instead")
    run.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run, or for several experiments the folder of their folders "
        "(default: results/ID-SIZE; results/quick)",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="keep a complete run instead of refusing; an incomplete one is resumed without being asked",
    )

    report = commands.add_parser("report", help="verdict table and one HTML page from finished runs")
    report.add_argument(
        "dir",
        nargs="?",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="a run, or a folder of runs (default: %(default)s)",
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (default: DIR/report.html)")
    report.add_argument("--force", action="store_true", help="replace FILE if it exists")
    report.add_argument("--json", action="store_true", help="print the verdicts as JSON; write a page only with --out")
    return root


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers; give an integer of at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None, experiments: Mapping[str, Experiment] | None = None) -> int:
    """Carry out a command line on the given experiments (default: those of simulations/); returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = parser().parse_args(arguments)
        known = discover() if experiments is None else experiments
        if options.command == "list":
            return list_command(known)
        if options.command == "report":
            return report_command(options, known)
        with quiet_libraries(PROGRAM):
            return run_command(options, known, [*PROGRAM.split(), *arguments])
    except InputError as error:
        say(f"error: {error}")
    except OSError as error:
        say(f"error: {error.filename or 'input/output'}: {error.strerror or error}; what had finished is kept")
    except KeyboardInterrupt:
        say("interrupted: finished settings are kept; the same command resumes (of a complete run: report)")
        return 130
    return 2


def say(line: str) -> None:
    """One line to standard error."""
    print(" ".join(line.split()), file=sys.stderr)


def show(table: Table) -> None:
    """A table to standard output; where that is no terminal, as wide as the table needs within reason."""
    console = Console()
    console.print(table) if console.is_terminal else Console(width=140).print(table)


# --- list ---------------------------------------------------------------------------------------------------------


def list_command(experiments: Mapping[str, Experiment]) -> int:
    """What can be run."""
    table = Table()
    for heading in ("ID", "Question", "Claims", *(size.capitalize() for size in SIZES)):
        numeric = heading.lower() in SIZES
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=heading == "ID")
    for experiment in experiments.values():
        counts = [str(len(settings_of(experiment, size))) for size in SIZES]
        cells = [experiment.id, experiment.question, ", ".join(experiment.claims), *counts]
        table.add_row(*(Text(cell) for cell in cells))
    show(table)
    print(f"Numbers are settings. Run one: {PROGRAM} run ID. Run all, reduced, with a report: {PROGRAM} run quick")
    return 0


# --- run ----------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace, experiments: Mapping[str, Experiment]) -> tuple[Path, list[RunFolder]]:
    """Where everything goes: the folder a report is about, and one run folder for each experiment."""
    quick = "quick" in options.ids
    if quick and options.size != "reduced":
        raise InputError(f"--size: 'quick' is reduced, not {options.size!r}; name the experiments to run them in full")
    chosen = select(options.ids, experiments)
    for experiment in experiments.values() if quick else ():
        if experiment not in chosen:
            say(f"note: {experiment.id} is left out, it needs the extra {experiment.extra!r} (see README)")
    if not chosen:
        raise InputError("run: there is no experiment in simulations/; add one")
    if len(chosen) == 1 and not quick:
        path = options.out or Path("results") / f"{chosen[0].id}-{options.size}"
        return path, [RunFolder.plan(path, chosen[0], options.size)]
    root = options.out or (Path("results/quick") if quick else Path("results"))
    return root, [RunFolder.plan(root / f"{e.id}-{options.size}", e, options.size) for e in chosen]


def run_command(options: argparse.Namespace, experiments: Mapping[str, Experiment], command: Sequence[str]) -> int:
    """Compute what is missing, then say what it shows; for `quick` write the report as well."""
    root, folders = plan(options, experiments)
    states = [folder.state() for folder in folders]
    target = root / "report.html" if "quick" in options.ids else None
    if target and target.exists() and not is_report(target):
        raise InputError(f"--out: {target} is not a report of this program; move it or choose another --out")
    finished = all(state == "complete" for state in states) and (target is None or target.exists())
    if finished and not options.resume:
        raise InputError(f"--out: {root} holds a complete run; choose another --out, delete it, or keep it (--resume)")
    with contextlib.ExitStack() as stack:
        for folder, state in zip(folders, states, strict=True):
            open_folder(folder, state, command, stack)
        open_folders = [f for f, state in zip(folders, states, strict=True) if state != "complete"]
        try:
            failures = compute(open_folders, options)
        except KeyboardInterrupt:
            say(f"interrupted: {progress_text(folders)} in {root}; the same command resumes")
            return 130
        except (BrokenExecutor, CancelledError):
            say(f"error: a worker died (out of memory?): {progress_text(folders)} in {root}; the same command resumes")
            return 1
    for failure in failures[:10]:
        where = "" if failure.error.startswith(failure.setting_id) else f"{failure.setting_id}: "
        say(f"failed: {where}{failure.error} (traceback in {failure.file})")
    if failures:
        say(
            f"error: {len(failures)} of {total(folders)} settings failed, the others are kept in {root}; "
            "the same command tries them again"
        )
    complete = [folder for folder in folders if folder.results.exists()]
    return max(1 if failures else 0, conclude(root, complete, target) if complete else 0)


def open_folder(folder: RunFolder, state: str, command: Sequence[str], stack: contextlib.ExitStack) -> None:
    """Make a folder ready to receive records, lock it, and say what of it is kept.

    Raises:
        InputError: if it cannot be written, or another run is writing to it.
    """
    try:
        if state == "new":
            folder.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder.path))
        if state == "new":
            folder.start(command)
        damaged = folder.set_aside_damaged() if state == "partial" else []
    except OSError as error:
        raise InputError(f"--out: cannot write {folder.path} ({error.strerror}); choose another --out") from None
    for name in damaged:
        say(
            f"note: the record file of {name} was cut short or altered; set aside in {folder.path / 'damaged'}, "
            "to be computed again"
        )
    if state == "partial":
        done, count = len(folder.settings) - len(folder.missing()), len(folder.settings)
        say(f"resuming {folder.experiment.id} in {folder.path}: {done} of {count} settings are kept")
    if state == "complete":
        say(f"keeping {folder.experiment.id} in {folder.path}: complete")


def total(folders: Sequence[RunFolder]) -> int:
    return sum(len(folder.settings) for folder in folders)


def progress_text(folders: Sequence[RunFolder]) -> str:
    kept = total(folders) - sum(len(folder.missing()) for folder in folders)
    return f"{kept} of {total(folders)} settings are kept"


def compute(folders: Sequence[RunFolder], options: argparse.Namespace) -> list[Failure]:
    """Sweep with the executor and the progress display asked for."""
    pool = cluster_executor(options.scheduler) if options.scheduler else local_executor(options.workers)
    count = sum(len(folder.missing()) for folder in folders)
    with pool as executor, progress(count) as advance:
        return sweep(folders, executor, advance)


@contextlib.contextmanager
def progress(count: int) -> Iterator[Callable[[RunFolder, int], None]]:
    """A bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("settings", total=count)
        yield lambda folder, number: bar.update(task, advance=1, description=folder.experiment.id)


def conclude(root: Path, complete: Sequence[RunFolder], target: Path | None) -> int:
    """Analyse the complete runs of this command, print their verdicts, write the report if there is a target."""
    known = {folder.experiment.id: folder.experiment for folder in complete}
    findings = Findings([load_section(folder.path, known) for folder in complete])
    code = tell(findings)
    if target:
        code = max(code, write_page(findings, target))
    print(f"records: {root}" if target else f"records: {root}; a page of them: {PROGRAM} report {root}")
    return code


def tell(findings: Findings) -> int:
    """Print the verdict table, and name each analysis that failed and each run left out."""
    show(verdict_table(findings.sections))
    for path in findings.incomplete:
        say(f"note: {path} is incomplete and left out; the command in its provenance.json resumes it")
    return save_tracebacks(findings)


def save_tracebacks(findings: Findings) -> int:
    """Name each analysis that failed, with its traceback beside the records; the exit code."""
    for section in findings.sections:
        if section.source_changed:
            say(f"note: the source of {section.name} has changed since its records were made")
        file = section.folder.path / "analysis-error.txt"
        if not section.error:
            file.unlink(missing_ok=True)  # of an analysis that has been mended
        else:
            write_atomically(file, section.traceback.encode())
            say(f"failed: analysis of {section.name}: {section.error} (traceback in {file})")
    return int(any(section.error for section in findings.sections))


# --- report -------------------------------------------------------------------------------------------------------


def report_command(options: argparse.Namespace, experiments: Mapping[str, Experiment]) -> int:
    """Write the page and print the verdicts."""
    target = options.out or (None if options.json else options.dir / "report.html")
    if target and target.exists() and not options.force:
        raise InputError(f"--out: {target} exists; choose another --out, or --force to replace it")
    findings = load(options.dir, experiments)
    if target and not target.parent.is_dir():
        raise InputError(f"--out: {target.parent} is not a folder; create it or choose another --out")
    if options.json:
        print(json.dumps(verdict_json(findings.sections), indent=1, ensure_ascii=False))
        code = save_tracebacks(findings)
    else:
        code = tell(findings)
    return max(code, write_page(findings, target)) if target else code


def write_page(findings: Findings, target: Path) -> int:
    """Write the HTML page; 1 if a figure could not be drawn."""
    text, problems = page(findings)
    try:
        write_atomically(target, text.encode())
    except OSError as error:
        raise InputError(f"--out: cannot write {target} ({error.strerror}); choose another --out") from None
    for name, trace in problems.items():
        say(f"failed: {name}: {trace.strip().splitlines()[-1]} (noted on the page)")
    print(f"report: {target}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
