"""`vcposim variance`: bias, variance and MSE of estimators on a problem whose gradient is known."""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vcposim.baselines import BASELINES
from vcposim.catalogue import WEIGHTINGS, weighting
from vcposim.commands.figures import add_output_options, save_figure, variance_figure, wants_figure
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import NORMALIZERS, Estimator
from vcposim.laboratory import exact, monte_carlo
from vcposim.moments import Moments
from vcposim.problems.problem_file import load as load_problem
from vcposim.problems.rollouts import Problem, bandit_problem
from vcposim.weights import LEVELS

METHODS = ("exact", "monte-carlo")
FIGURE = "vcposim-variance.png"
SCALARS = ("relative_bias", "variance_per_sample", "variance_of_mean", "mse", "descent_efficiency", "snr", "cosine")
HEADERS = {"descent_efficiency": "D"}
"""short where the table is narrow"""
Row = dict[str, Any]


def add_command(commands: Any) -> None:
    """Add `variance` to the command line."""
    p = commands.add_parser(
        "variance",
        help="bias, variance and MSE of estimators on a problem with a known gradient",
        description="Moments of policy-gradient estimators, exact where enumeration allows, by Monte Carlo elsewhere.",
    )
    problem = p.add_argument_group("problem: a file, or a random bandit")
    problem.add_argument("--problem", metavar="FILE", help="JSON problem: bandit, contextual_bandit or chain")
    problem.add_argument("--arms", type=int, default=10, help="arms of the random bandit (default 10)")
    problem.add_argument("--drift", type=float, default=0.5, help="sd of behavior minus target logits (default 0.5)")
    problem.add_argument("--problem-seed", type=int, default=0, metavar="SEED", help="seed of the random bandit")
    what = p.add_argument_group("estimators: every weighting with every baseline")
    what.add_argument("--weighting", nargs="+", default=["importance"], metavar="W", help=", ".join(WEIGHTINGS))
    what.add_argument("--level", default="sequence", help=", ".join(LEVELS))
    what.add_argument("--cap", type=float, help="largest weight, for truncate, clip and mask")
    what.add_argument("--floor", type=float, help="smallest weight, for clip and mask")
    what.add_argument(
        "--baseline", nargs="+", default=["zero", "group_mean", "opob"], metavar="B", help=", ".join(BASELINES)
    )
    what.add_argument("--normalizer", default="none", help=", ".join(NORMALIZERS))
    what.add_argument("--group-size", type=int, default=8, metavar="N", help="responses per prompt (default 8)")
    how = p.add_argument_group("method")
    how.add_argument("--method", default="exact", help=", ".join(METHODS))
    how.add_argument("--samples", type=int, default=100_000, metavar="N", help="trajectories drawn by monte-carlo")
    how.add_argument("--seed", type=int, default=0, help="seed of monte-carlo")
    how.add_argument("--workers", type=int, default=1, help="processes for monte-carlo; results do not depend on it")
    add_output_options(p, FIGURE)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compute, draw, print: output appears only when all of it could be made."""
    drawing = wants_figure(arguments, FIGURE)
    problem = _problem(arguments)
    rows = compute(problem, _estimators(arguments), arguments)
    diagnostics = {key: _number(value) for key, value in exact.diagnostics(problem).items()}
    path = save_figure(variance_figure(rows), arguments.figure, FIGURE) if drawing else None
    if arguments.json:
        gradient = [_number(x) for x in problem.gradient]
        print(json.dumps({"diagnostics": diagnostics, "gradient": gradient, "rows": rows}, allow_nan=False))
        return
    _print_table(problem, diagnostics, rows, arguments)
    if path is not None:
        print(f"figure: {path}")


def compute(problem: Problem, estimators: dict[tuple[str, str], Estimator], arguments: argparse.Namespace) -> list[Row]:
    """One row per estimator, in the order they were asked for."""
    size = arguments.group_size
    for estimator in estimators.values():
        estimator.require(size)
    if arguments.method == "exact":
        found = {key: (exact.moments(problem, estimator, size), None) for key, estimator in estimators.items()}
    elif arguments.method == "monte-carlo":
        found = _monte_carlo(problem, estimators, arguments)
    else:
        raise unknown_name("method", arguments.method, METHODS)
    return [_row(key, size, moments, error) for key, (moments, error) in found.items()]


def _monte_carlo(problem: Problem, estimators: dict[tuple[str, str], Estimator], arguments: argparse.Namespace) -> Any:
    named = {f"{w} {b}": estimator for (w, b), estimator in estimators.items()}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("drawing", total=1.0)
        estimates = monte_carlo.moments(
            problem,
            named,
            group_size=arguments.group_size,
            samples=arguments.samples,
            seed=arguments.seed,
            workers=arguments.workers,
            progress=lambda fraction: bar.update(task, completed=fraction),
        )
    return {(w, b): (estimates[f"{w} {b}"].moments, estimates[f"{w} {b}"].standard_error) for w, b in estimators}


def _row(key: tuple[str, str], size: int, moments: Moments, standard_error: dict[str, Any] | None) -> Row:
    row: Row = {"weighting": key[0], "baseline": key[1], "group_size": size}
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


def _problem(arguments: argparse.Namespace) -> Problem:
    if arguments.problem is not None:
        return load_problem(Path(arguments.problem))
    if arguments.arms < 2:
        raise InputError(f"--arms: {arguments.arms} leaves nothing to choose; use 2 or more")
    if not 0 <= arguments.drift < math.inf:
        raise InputError(f"--drift: {arguments.drift} is not a finite non-negative standard deviation")
    rng = np.random.default_rng(arguments.problem_seed)
    logit = rng.normal(size=arguments.arms)
    behavior = _softmax(logit + arguments.drift * rng.normal(size=arguments.arms))
    return bandit_problem(_softmax(logit).tolist(), behavior.tolist(), rng.normal(size=arguments.arms).tolist())


def _softmax(logit: np.ndarray) -> np.ndarray:
    weight = np.exp(logit - logit.max())
    return weight / weight.sum()


def _estimators(arguments: argparse.Namespace) -> dict[tuple[str, str], Estimator]:
    def limits(name: str) -> dict[str, float | None]:
        return {"cap": arguments.cap, "floor": arguments.floor} if name in ("truncate", "clip", "mask") else {}

    return {
        (w, b): Estimator(weighting(w, level=arguments.level, **limits(w)), b, arguments.normalizer)
        for w in _unique("--weighting", arguments.weighting)
        for b in _unique("--baseline", arguments.baseline)
    }


def _unique(option: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{option}: {sorted(twice)[0]!r} is given twice; name each once")
    return names


def _print_table(
    problem: Problem, diagnostics: dict[str, float | None], rows: list[Row], arguments: argparse.Namespace
) -> None:
    console = Console()
    console.print(
        f"ESS fraction {_text(diagnostics['ess_fraction'])}, chi2 {_text(diagnostics['chi2'])}, "
        f"KL {_text(diagnostics['kl'])} nats, |gradient| {np.linalg.norm(problem.gradient):.4g}"
    )
    how = "exact" if arguments.method == "exact" else f"Monte Carlo, {arguments.samples} trajectories"
    console.print(f"Moments of the gradient estimate, groups of {arguments.group_size} ({how})", style="bold")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("baseline\n(weighting)", no_wrap=True)
    for name in SCALARS:
        header = HEADERS.get(name, name.replace("_", "\n", 1).replace("_", " "))
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(f"{row['baseline']}\n({row['weighting']})", *(_cell(row, name) for name in SCALARS))
    console.print(table)
    console.print(
        "D: descent efficiency; the best step is sure to gain D |gradient|^2 / (2 L).\nShrinking leaves it alone."
    )


def _cell(row: Row, name: str) -> str:
    error = row.get("standard_error", {}).get(name)
    return _text(row[name]) + ("" if error is None else f"\n±{error:.1g}")


def _text(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"
