"""`vcposim variance`: bias, variance and MSE of estimators on a problem with a known gradient."""

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vcposim.arrays import Array
from vcposim.baselines import BASELINES
from vcposim.catalogue import CATALOGUE, WEIGHTINGS, weighting
from vcposim.catalogue.loading import estimator_named
from vcposim.commands.completion import complete_files, complete_with
from vcposim.commands.output import TableRow, add_output_options, output_of, print_whole
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import NORMALIZERS, Estimator, Resolved
from vcposim.laboratory import exact, monte_carlo
from vcposim.moments import SCALARS, Moments
from vcposim.problems.problem_file import load as load_problem
from vcposim.problems.rollouts import Problem, bandit_problem
from vcposim.weights import LEVELS

EXAMPLES = ("vcposim variance --estimator sequence_is sequence_tis vcpo gspo --no-figure",)
METHODS = ("exact", "monte-carlo")
FIGURE = "vcposim-variance.png"
RANDOM, ARMS, DRIFT = "bandit", 10, 0.5
DEFAULT = f"a random bandit of {ARMS} arms, as with --problem {RANDOM}"
PARTS: dict[str, str | list[str] | None] = {
    "--weighting": ["importance"],
    "--level": "sequence",
    "--baseline": ["zero", "group_mean", "opob"],
    "--normalizer": "none",
    "--cap": None,
    "--floor": None,
}
"""options that put estimators together, and their defaults"""
EstimatorKey = str | tuple[str, str]
"""a named estimator, or a weighting and a baseline"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim variance` takes."""
    p.description = (
        "Moments of policy-gradient estimators, exact where enumeration allows, by Monte Carlo elsewhere. "
        f"Without PROBLEM: {DEFAULT}."
    )
    p.epilog = "columns:\n" + "\n".join(f"  {name:20} {says}" for name, says in SCALARS.items())
    problem = p.add_argument_group("problem")
    says = f"a JSON file (kinds bandit, contextual_bandit, chain), or the word {RANDOM}: a random one"
    complete_files(problem.add_argument("file", nargs="?", metavar="PROBLEM", help=says))
    complete_files(problem.add_argument("--problem", metavar="PROBLEM", help="the same"))
    problem.add_argument("--arms", type=int, help=f"arms of the random bandit (default {ARMS})")
    problem.add_argument("--drift", type=float, help=f"sd of its behavior minus target logits (default {DRIFT})")
    problem.add_argument("--problem-seed", type=int, metavar="SEED", help="seed of the random bandit (default 0)")
    named = p.add_argument_group("estimators by name")
    says = "catalogue names, path/to/file.py:function, or module:function (a function of a vcposim.Batch)"
    complete_with(named.add_argument("--estimator", nargs="+", metavar="E", help=says), CATALOGUE)
    says = "fields of Batch that functions read, as in: tokens (or write it beside the function: mine.needs = ...)"
    named.add_argument("--needs", nargs="+", default=[], metavar="FIELD", help=says)
    what = p.add_argument_group("or estimators of parts: every weighting with every baseline")
    offered: dict[str, tuple[Any, dict[str, Any]]] = {
        "--weighting": (WEIGHTINGS, {"nargs": "+", "metavar": "W"}),
        "--level": (LEVELS, {}),
        "--baseline": (BASELINES, {"nargs": "+", "metavar": "B"}),
        "--normalizer": (NORMALIZERS, {}),
    }
    for flag, (names, options) in offered.items():
        says = f"{', '.join(names)} (default {_name_of(PARTS[flag])})"
        complete_with(what.add_argument(flag, help=says, **options), names)
    what.add_argument("--cap", type=float, help="largest weight, for truncate, clip and mask")
    what.add_argument("--floor", type=float, help="smallest weight, for clip and mask")
    what.add_argument("--group-size", type=int, default=8, metavar="N", help="responses per prompt (default 8)")
    how = p.add_argument_group("method")
    complete_with(how.add_argument("--method", default="exact", help=", ".join(METHODS)), METHODS)
    how.add_argument("--samples", type=int, default=100_000, metavar="N", help="trajectories drawn by monte-carlo")
    how.add_argument("--seed", type=int, default=0, help="seed of monte-carlo")
    how.add_argument("--workers", type=int, default=1, help="processes for monte-carlo; results do not depend on it")
    add_output_options(p, FIGURE)


def run(arguments: argparse.Namespace) -> None:
    """Compute, draw, print: output appears only when all of it could be made."""
    output = output_of(arguments, FIGURE)
    problem, described = _problem(arguments)
    rows = compute(
        problem,
        _estimators(arguments),
        arguments.group_size,
        method=arguments.method,
        samples=arguments.samples,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    diagnostics = {key: _number(value) for key, value in exact.diagnostics(problem).items()}
    path = None
    if output.drawing:
        from vcposim.commands.figures import variance_figure  # here because matplotlib is slow to load

        path = output.save(variance_figure(rows))
    if output.json:
        found = {"problem": described, "diagnostics": diagnostics, "gradient": [_number(x) for x in problem.gradient]}
        print(json.dumps({**found, "rows": rows}, allow_nan=False))
        return
    console = Console()
    console.print(f"problem: {described}", markup=False, highlight=False, soft_wrap=True)
    how = "exact" if arguments.method == "exact" else f"Monte Carlo, {arguments.samples} trajectories"
    _print_table(console, problem, diagnostics, rows, f"groups of {arguments.group_size} ({how})")
    if path is not None:
        print(f"figure: {path}")


def compute(
    problem: Problem,
    estimators: Mapping[EstimatorKey, Resolved],
    group_size: int,
    *,
    method: str = "exact",
    samples: int = 100_000,
    seed: int = 0,
    workers: int = 1,
) -> list[TableRow]:
    """One row per estimator, in the order they were asked for; `samples`, `seed` and `workers` are monte-carlo's.

    Raises `InputError` for a method nobody knows, and as the estimators do.
    """
    for estimator in estimators.values():
        estimator.require(group_size)
    if method == "exact":
        found: Any = {key: (exact.moments(problem, one, group_size), None) for key, one in estimators.items()}
    elif method == "monte-carlo":
        found = _monte_carlo(problem, estimators, group_size, samples, seed, workers)
    else:
        raise unknown_name("method", method, METHODS)
    return [_row(key, group_size, moments, error) for key, (moments, error) in found.items()]


def _monte_carlo(
    problem: Problem,
    estimators: Mapping[EstimatorKey, Resolved],
    group_size: int,
    samples: int,
    seed: int,
    workers: int,
) -> Any:
    named = {_name(key): estimator for key, estimator in estimators.items()}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("drawing", total=1.0)
        estimates = monte_carlo.moments(
            problem,
            named,
            group_size=group_size,
            samples=samples,
            seed=seed,
            workers=workers,
            progress=lambda fraction: bar.update(task, completed=fraction),
        )
    found = {key: estimates[_name(key)] for key in estimators}
    return {key: (one.moments, one.standard_error) for key, one in found.items()}


def _name(key: EstimatorKey) -> str:
    return key if isinstance(key, str) else " ".join(key)


def _row(key: EstimatorKey, size: int, moments: Moments, standard_error: Mapping[str, Array] | None) -> TableRow:
    row: TableRow = {"estimator": key} if isinstance(key, str) else {"weighting": key[0], "baseline": key[1]}
    row["group_size"] = size
    row["mean"] = [_number(x) for x in moments.mean]
    row.update({name: _number(getattr(moments, name)) for name in SCALARS})
    if standard_error is not None:
        row["standard_error"] = {
            name: [_number(x) for x in value] if np.ndim(value) else _number(value)
            for name, value in standard_error.items()
        }
    return row


def _number(x: Any) -> float | None:
    # JSON has no NaN and no infinity: a moment that does not exist is null
    value = float(x)
    return value if math.isfinite(value) else None


def _problem(arguments: argparse.Namespace) -> tuple[Problem, str]:
    """The problem, and what a reader has to know about where it came from."""
    if arguments.file is not None and arguments.problem is not None:
        raise InputError(f"--problem: {arguments.problem!r} and {arguments.file!r} are two problems; name one")
    name = arguments.problem if arguments.file is None else arguments.file
    own = {"--arms": arguments.arms, "--drift": arguments.drift, "--problem-seed": arguments.problem_seed}
    if name not in (None, RANDOM):
        for option, value in own.items():
            if value is not None:
                raise InputError(f"{option}: {value} is for the random bandit, {name} says all itself; drop one")
        if not Path(name).exists() and not Path(name).suffix:
            raise InputError(f"problem: {name!r} is neither a file nor {RANDOM!r}; give the path of a JSON file")
        return load_problem(Path(name)), name
    arms = ARMS if arguments.arms is None else arguments.arms
    drift = DRIFT if arguments.drift is None else arguments.drift
    if arms < 2:
        raise InputError(f"--arms: {arms} leaves nothing to choose; use 2 or more")
    if not 0 <= drift < math.inf:
        raise InputError(f"--drift: {drift} is not a finite non-negative standard deviation")
    seed = arguments.problem_seed or 0
    if seed < 0:
        raise InputError(f"--problem-seed: {seed} is negative; use 0 or more")
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=arms)
    behavior = _softmax(logit + drift * rng.normal(size=arms))
    problem = bandit_problem(_softmax(logit).tolist(), behavior.tolist(), rng.normal(size=arms).tolist())
    why = "none given, so " if name is None else ""
    return problem, f"{why}a random bandit: {arms} arms, drift {drift:g}, seed {seed}"


def _softmax(logit: np.ndarray) -> np.ndarray:
    weight = np.exp(logit - logit.max())
    return weight / weight.sum()


def _estimators(arguments: argparse.Namespace) -> Mapping[EstimatorKey, Resolved]:
    parts = {option: getattr(arguments, option.removeprefix("--")) for option in PARTS}
    if arguments.estimator:
        for option, value in parts.items():
            if value is not None:
                raise InputError(f"{option}: {_name_of(value)} is for estimators of parts; drop it, or --estimator")
        names = _unique("--estimator", arguments.estimator)
        return {name: estimator_named(name, arguments.needs, several=False) for name in names}
    if arguments.needs:
        raise InputError(f"--needs: {_name_of(arguments.needs)} is for functions; name one with --estimator")
    parts = {option: PARTS[option] if value is None else value for option, value in parts.items()}

    def limits(name: str) -> dict[str, float | None]:
        return {"cap": arguments.cap, "floor": arguments.floor} if name in ("truncate", "clip", "mask") else {}

    return {
        (w, b): Estimator(weighting(w, level=parts["--level"], **limits(w)), b, parts["--normalizer"])
        for w in _unique("--weighting", parts["--weighting"])
        for b in _unique("--baseline", parts["--baseline"])
    }


def _name_of(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def label(row: TableRow) -> str:
    """What a row is called: the estimator's name, or its baseline above its weighting."""
    return row["estimator"] if "estimator" in row else f"{row['baseline']}\n({row['weighting']})"


def _unique(option: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{option}: {sorted(twice)[0]!r} is given twice; name each once")
    return names


def _print_table(
    console: Console, problem: Problem, diagnostics: dict[str, float | None], rows: list[TableRow], how: str
) -> None:
    console.print(
        f"ESS fraction {_text(diagnostics['ess_fraction'])}, chi2 {_text(diagnostics['chi2'])}, "
        f"KL {_text(diagnostics['kl'])} nats, |gradient| {np.linalg.norm(problem.gradient):.4g}"
    )
    console.print(f"Moments of the gradient estimate, {how}", style="bold")
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("estimator" if "estimator" in rows[0] else "baseline\n(weighting)", no_wrap=True)
    for name in SCALARS:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for name in SCALARS:
            error = row.get("standard_error", {}).get(name)
            # figures beyond the error say nothing, and 80 columns are few
            cells.append(_text(row[name]) if error is None else f"{_text(row[name], 3)}\n±{error:.1g}")
        table.add_row(Text(label(row)), *map(Text, cells))
    print_whole(console, table)
    for name, says in SCALARS.items():
        console.print(f"{name.replace('_', ' ')}: {says}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _text(value: float | None, figures: int = 4) -> str:
    return "—" if value is None else f"{value:.{figures}g}"
