"""`python -m simulations`: list the experiments, run them, report what they say.

Results go to standard output; progress, notes and errors to standard error. Exit codes: 0 done; 1 a setting or an
analysis failed (the rest is kept); 2 the command cannot be carried out, one line says why; 130 interrupted by Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from simulations import claims, conclusion, log, papers
from simulations.protocol import SIZES, Experiment, discover, select, settings_of
from simulations.report import (
    Findings,
    claim_rows,
    claim_table,
    gathered,
    is_report,
    load,
    page,
    standing_table,
    verdict_json,
    verdict_table,
)
from simulations.runner import (
    Failure,
    RunFolder,
    cluster_executor,
    local_executor,
    locked,
    sweep,
    write_atomically,
)
from simulations.summaries import Section, committed, dump, load_section, read
from vcposim.catalogue import papers as index
from vcposim.commands.logs import quiet_libraries
from vcposim.comparison import leaderboard
from vcposim.errors import InputError

PROGRAM = "python -m simulations"
DEFAULT = Path("results")
LOG = Path(__file__).parent / "LOG.md"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """A wrong command line is an InputError: one line, as for every other wrong input."""
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
        "--estimator",
        nargs="+",
        default=[],
        metavar="E",
        help="estimators to run among the methods of an experiment that compares some: names of the catalogue, or "
        "yours as file.py:function or module:function",
    )
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
        help="no longer needed: an incomplete run is resumed, a complete one kept, without being asked",
    )

    report = commands.add_parser("report", help="verdict table and one HTML page from finished runs")
    report.add_argument(
        "dir",
        nargs="?",
        type=Path,
        default=DEFAULT,
        metavar="DIR",
        help="a run, or a folder of runs (default: %(default)s; the committed summaries where it holds none)",
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (default: DIR/report.html)")
    report.add_argument("--force", action="store_true", help="replace FILE even if it is not a page of this program")
    report.add_argument("--json", action="store_true", help="print the verdicts as JSON; write a page only with --out")

    told = commands.add_parser("claims", help="one line a claim: its verdict over proofs and committed summaries")
    told.add_argument("--json", action="store_true", help="print a list of claims for machines")
    told.add_argument("--markdown", action="store_true", help="print the claims themselves, as simulations/CLAIMS.md")

    commands.add_parser(
        "papers", help="the index of papers as Markdown, with what claims and experiments found of each"
    )

    keep = commands.add_parser("keep", help="copy the summary of a full run to simulations/results/, to be committed")
    keep.add_argument(
        "dirs",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="complete full runs; or the output of `python -m proofs --json`",
    )

    written = commands.add_parser("log", help="rewrite the computed part of the log, from what is committed")
    written.add_argument("file", nargs="?", type=Path, default=LOG, metavar="FILE", help="default: simulations/LOG.md")

    check = commands.add_parser("check", help="numbers of a text that the sources it names do not hold; 1 if any")
    check.add_argument("file", nargs="?", type=Path, default=LOG, metavar="FILE", help="default: simulations/LOG.md")
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
        if options.command == "claims":
            return claims_command(options, known)
        if options.command == "papers":
            return papers_command(known)
        if options.command == "keep":
            return keep_command(options, known)
        if options.command == "log":
            return log_command(options, known)
        if options.command == "check":
            return check_command(options, known)
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


def console_of_results() -> Console:
    """Standard output; where that is no terminal, wide within reason."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def show(table: Table) -> None:
    """A table to standard output."""
    console_of_results().print(table)


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


def plan(
    ids: list[str], experiments: Mapping[str, Experiment], *, size: str, estimators: Sequence[str], out: Path | None
) -> tuple[Path, list[RunFolder]]:
    """Where everything goes: the folder a report is about, and one run folder for each experiment."""
    quick = "quick" in ids
    if quick and estimators:
        raise InputError("--estimator: 'quick' runs every experiment as it is; name those to run with yours")
    if quick and size != "reduced":
        raise InputError(f"--size: 'quick' is reduced, not {size!r}; name the experiments to run them in full")
    chosen = select(ids, experiments)
    for experiment in experiments.values() if quick else ():
        if experiment not in chosen:
            say(f"note: {experiment.id} is left out, it needs the extra {experiment.extra!r} (see README)")
    if not chosen:
        raise InputError("run: there is no experiment in simulations/; add one")
    own = ""
    if estimators:
        able = [e.id for e in experiments.values() if e.takes_estimators]
        for experiment in chosen:
            if experiment.id not in able:
                why = experiment.no_estimators or "compares no list of methods"
                raise InputError(f"--estimator: {experiment.id} {why}; those that take yours: {', '.join(able)}")
        chosen = [experiment.with_estimators(estimators) for experiment in chosen]
        own = "-with-" + re.sub(r"[^\w.]+", "-", " ".join(estimators))
    if len(chosen) == 1 and not quick:
        path = out or Path("results") / f"{chosen[0].id}-{size}{own}"
        return path, [RunFolder.plan(path, chosen[0], size)]
    root = out or (Path("results/quick") if quick else Path("results"))
    return root, [RunFolder.plan(root / f"{e.id}-{size}{own}", e, size) for e in chosen]


def run_command(options: argparse.Namespace, experiments: Mapping[str, Experiment], command: Sequence[str]) -> int:
    """Compute what is missing, then say what it shows; for `quick` write the report as well."""
    root, folders = plan(options.ids, experiments, size=options.size, estimators=options.estimator, out=options.out)
    states = [folder.state() for folder in folders]
    target = root / "report.html" if "quick" in options.ids else None
    if target and target.exists() and not is_report(target):
        raise InputError(f"--out: {target} is not a report of this program; move it or choose another --out")
    source = conclusion.sources() if target else ""
    if all(state == "complete" for state in states) and not options.resume:
        age = time.time() - max(folder.results.stat().st_mtime for folder in folders)
        place = f"report at {target}" if target else f"a page of it: {PROGRAM} report {root}"
        say(f"complete, {age:,.0f} s ago; {place}; nothing to compute in {root} (delete it to start over)")
        sections = conclusion.kept(source, folders, target) if target else None
        if sections is not None:
            code = tell(Findings(sections))
            print(f"records: {root}")
            return code
        return conclude(root, folders, target, experiments, source)
    with contextlib.ExitStack() as stack:
        for folder, state in zip(folders, states, strict=True):
            open_folder(folder, state, command, stack)
        open_folders = [f for f, state in zip(folders, states, strict=True) if state != "complete"]
        try:
            failures = compute(open_folders, options.scheduler, options.workers)
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
    return max(1 if failures else 0, conclude(root, complete, target, experiments, source) if complete else 0)


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
    """Settings of all folders."""
    return sum(len(folder.settings) for folder in folders)


def progress_text(folders: Sequence[RunFolder]) -> str:
    """How many settings have their record."""
    kept = total(folders) - sum(len(folder.missing()) for folder in folders)
    return f"{kept} of {total(folders)} settings are kept"


def compute(folders: Sequence[RunFolder], scheduler: str | None, workers: int) -> list[Failure]:
    """Sweep with the executor and the progress display asked for."""
    pool = cluster_executor(scheduler) if scheduler else local_executor(workers)
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


def conclude(
    root: Path,
    complete: Sequence[RunFolder],
    target: Path | None,
    experiments: Mapping[str, Experiment],
    source: str,
) -> int:
    """Analyse the complete runs of this command, print their verdicts, write summaries of full runs and the report.

    With a report goes a conclusion (`simulations.conclusion`) by `source`, if nothing failed.
    """
    known = {folder.experiment.id: folder.experiment for folder in complete}
    sections = [load_section(folder.path, known) for folder in complete]
    for section in sections:
        if section.settles and section.path:
            write_atomically(section.path / "summary.json", dump(section))
    own = gathered(sections, {s.id: s for s in committed(known).values() if s.id not in full_ids(sections)})
    # the terminal shows what was run; the page also what the committed full runs found
    told = [s.beside if s.beside and s.path is None else s for s in own.sections]
    code = tell(Findings(told))
    if target:
        code = max(code, write_page(gathered(sections, committed(experiments)), target))
        if code == 0:
            conclusion.keep(source, complete, target, told)
    print(f"records: {root}" if target else f"records: {root}; a page of them: {PROGRAM} report {root}")
    return code


def full_ids(sections: Sequence[Section]) -> set[str]:
    """Experiments with a full run among these."""
    return {s.id for s in sections if s.size == "full" and not s.estimators}


def tell(findings: Findings) -> int:
    """Print the verdict table, and name each analysis that failed and each run left out."""
    show(verdict_table(findings.sections))
    for section in findings.sections:
        if section.standing:
            show(standing_table(section))
    for path in findings.incomplete:
        say(f"note: {path} is incomplete and left out; the command in its provenance.json resumes it")
    return save_tracebacks(findings)


def save_tracebacks(findings: Findings) -> int:
    """Name each analysis that failed, with its traceback beside the records; the exit code."""
    for section in findings.sections:
        if section.source_changed:
            say(f"note: the source of {section.name} has changed since its records were made")
        if section.path is None:  # a committed summary
            continue
        file = section.path / "analysis-error.txt"
        if not section.error:
            file.unlink(missing_ok=True)  # of an analysis that has been mended
        else:
            write_atomically(file, section.traceback.encode())
            say(f"failed: analysis of {section.name}: {section.error} (traceback in {file})")
    return int(any(section.error for section in findings.sections))


# --- report -------------------------------------------------------------------------------------------------------


def report_command(options: argparse.Namespace, experiments: Mapping[str, Experiment]) -> int:
    """Write the page and print the verdicts; its own page is replaced, another file only by force."""
    target = options.out or (None if options.json else options.dir / "report.html")
    if target and target.exists() and not options.force and not (target.is_file() and is_report(target)):
        raise InputError(f"--out: {target} exists and is not a page of this program; choose another, or --force")
    summaries = committed(experiments)
    if options.dir == DEFAULT and summaries and not any(options.dir.glob("**/results.jsonl")):
        findings = gathered([], summaries)  # nothing was run here: what is committed
        target.parent.mkdir(exist_ok=True) if target and not options.out else None
    else:
        findings = load(options.dir, experiments, summaries)
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
    text, problems = page(findings, claims.proof_results())
    try:
        write_atomically(target, text.encode())
    except OSError as error:
        raise InputError(f"--out: cannot write {target} ({error.strerror}); choose another --out") from None
    for name, trace in problems.items():
        say(f"failed: {name}: {trace.strip().splitlines()[-1]} (noted on the page)")
    print(f"report: {target}", file=sys.stderr)
    return int(bool(problems))


# --- claims, and what is committed --------------------------------------------------------------------------------


def claims_command(options: argparse.Namespace, experiments: Mapping[str, Experiment]) -> int:
    """One line a claim."""
    if options.markdown:
        print(claims.markdown(), end="")
        return 0
    rows = claim_rows(list(committed(experiments).values()), claims.proof_results())
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        show(claim_table(rows, console_of_results().width))
    return 0


def papers_command(experiments: Mapping[str, Experiment]) -> int:
    """The index of `vcposim cite --index`, and the verdicts that name a paper or what stands on it."""
    sections = list(committed(experiments).values())
    verdicts = papers.found(claim_rows(sections, claims.proof_results()), sections)
    print(index.markdown(papers.together(leaderboard.found(), verdicts)))
    return 0


def keep_command(options: argparse.Namespace, experiments: Mapping[str, Experiment]) -> int:
    """Analyse full runs and put their summaries where they are committed."""
    for path in options.dirs:
        if path.is_file():
            print(f"{claims.keep_proofs(path)}: the words of `python -m proofs`")
            continue
        section = load_section(path, experiments)
        if section.estimators:
            added = ", ".join(section.estimators)
            raise InputError(f"DIR: {path} ran with {added}; only an experiment as it is settles anything")
        if section.size != "full" or section.error:
            raise InputError(f"DIR: {path} is a {section.size} run {section.error}; only full runs settle anything")
        target = claims.RESULTS / f"{section.id}.json"
        claims.RESULTS.mkdir(exist_ok=True)
        write_atomically(target, dump(section))
        read(target)
        print(f"{target}: {target.stat().st_size:,} bytes, {len(section.verdicts)} verdicts")
    return 0


def log_command(options: argparse.Namespace, experiments: Mapping[str, Experiment]) -> int:
    """Put into the log what the committed proofs and summaries say."""
    sections = list(committed(experiments).values())
    text = options.file.read_text()
    new = log.rewritten(text, log.computed(claim_rows(sections, claims.proof_results()), sections))
    if new != text:
        write_atomically(options.file, new.encode())
    print(f"{options.file}: {'rewritten' if new != text else 'is current'}")
    return 0


def check_command(options: argparse.Namespace, experiments: Mapping[str, Experiment]) -> int:
    """Numbers that what is named with them does not hold."""
    missing = log.numbers_without_a_source(options.file.read_text(), committed(experiments).values())
    for number in missing:
        print(number)
    say(f"{options.file}: {len(missing)} numbers of two decimals or more are not in what their paragraph names")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
