"""Curves and a table from a campaign's JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vcposim.errors import InputError

LABELS = {
    "none": "no correction", "tis": "truncated ratios", "vcpo": "VCPO", "n2_ess": "norm baseline, ESS step",
}  # fmt: skip
COLORS = {"none": "#7f7f7f", "tis": "#d95f02", "vcpo": "#1b9e77", "n2_ess": "#7570b3"}
RESULT, TABLE, FIGURE = "campaign.json", "campaign.md", "campaign.png"


def read(path: Path) -> dict[str, Any]:
    """A campaign's JSON. Raises InputError if it is none."""
    try:
        found = json.loads(path.read_text())
        found["runs"], found["device"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no campaign.json of {__package__}.campaign") from None
    return found


def report(folder: Path) -> str:
    """Writes the figure and the table beside a campaign's JSON; returns the table."""
    found = read(folder / RESULT)
    text = table(found)
    (folder / TABLE).write_text(text + "\n")
    figure(found, folder / FIGURE)
    return text


def held_out(run: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(updates made, success rate on held-out problems), in order."""
    columns = run["columns"]
    pairs = zip(columns["step"], columns["held_out_success_rate"], strict=True)
    return [(step + 1, rate) for step, rate in pairs if rate is not None]


def table(found: Mapping[str, Any]) -> str:
    """A row a task, lag, step size and method: means over seeds, of finished runs."""
    device, problems = found["device"], found["settings"]["evaluate_problems"]
    done = [run for run in found["runs"] if run["finished"]]
    head = (
        f"{found['settings']['model']} on {device['name']} (torch {device['torch']}, "
        f"transformers {device['transformers']}); "
        f"{len(done)} finished runs of {found['settings']['updates']} updates, "
        f"{found['settings']['groups']} prompts x {found['settings']['group_size']} responses; held-out success rate "
        f"on {problems} problems, means over seeds, standard error of one measurement at most "
        f"{0.5 / math.sqrt(problems):.3f}."
    )
    names = (
        "task", "lag", "step size", "method", "seeds", "start", "end", "best", "worst after best", "ESS fraction",
        "step scale",
    )  # fmt: skip
    lines = [head, "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in sorted(done, key=lambda r: (r["task"], r["lag"], r["lr"])):
        grouped.setdefault((run["task"], run["lag"], run["lr"], run["method"]), []).append(run)
    for key, runs in grouped.items():
        task, lag, lr, method = key
        rates = [[rate for _, rate in held_out(run)] for run in runs]
        best = [max(range(len(x)), key=x.__getitem__) for x in rates]
        after = [min(x[i:]) for x, i in zip(rates, best, strict=True)]
        cells = [
            _mean([x[0] for x in rates]), _mean([x[-1] for x in rates]), _mean([max(x) for x in rates]), _mean(after),
            _mean([_mean_of(run, "ess_fraction_sequence", lag) for run in runs]),
            _mean([_mean_of(run, "step_scale", lag) for run in runs]),
        ]  # fmt: skip
        means = " | ".join(f"{x:.3f}" for x in cells)
        lines.append(f"| {task} | {lag} | {lr:g} | {LABELS.get(method, method)} | {len(runs)} | {means} |")
    lines += [
        "",
        "ESS fraction and step scale: from the update on at which the lag has been reached.",
        "",
        "Median seconds of an update, as one process sees them:",
        "",
        "| method | all | sampling | gradient | record | step |",
        "|---|---|---|---|---|---|",
    ]
    for method, spent in found["profile"].items():
        numbers = [spent.get(name, math.nan) for name in ("seconds", "s_sampling", "s_gradient", "s_record", "s_step")]
        lines.append(f"| {LABELS.get(method, method)} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |")
    return "\n".join(lines)


def figure(found: Mapping[str, Any], path: Path) -> None:
    """Held-out success rate over updates: a panel for each task and lag, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = found["runs"]
    tasks = list(dict.fromkeys(run["task"] for run in runs)) or ["no run"]
    lags = sorted({run["lag"] for run in runs}) or [0]
    fig, axes = plt.subplots(
        len(tasks), len(lags), figsize=(3.6 * len(lags), 2.8 * len(tasks)), squeeze=False, sharex=True, sharey="row"
    )
    styles: dict[float, str] = dict(zip(sorted({run["lr"] for run in runs}), ("-", "--", ":", "-."), strict=False))
    for run in runs:
        ax = axes[tasks.index(run["task"])][lags.index(run["lag"])]
        points = held_out(run)
        if points:
            ax.plot(*zip(*points, strict=True), styles.get(run["lr"], "-"), color=COLORS.get(run["method"]), lw=1.4)
    for row, task in zip(axes, tasks, strict=True):
        row[0].set_ylabel(f"{task}\nheld-out success rate")
        for ax, lag in zip(row, lags, strict=True):
            ax.set_title(f"lag {lag}", fontsize=10)
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("updates")
    methods = dict.fromkeys(run["method"] for run in runs)
    handles = [plt.Line2D([], [], color=COLORS.get(m), label=LABELS.get(m, m)) for m in methods]
    if len(styles) > 1:
        handles += [plt.Line2D([], [], color="k", ls=ls, label=f"step size {lr:g}") for lr, ls in styles.items()]
    fig.legend(handles=handles, loc="lower center", ncol=max(1, len(handles)), frameon=False, fontsize=9)
    fig.suptitle(f"{found['settings']['model']}, {found['device']['name']}; a line a seed", fontsize=10)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _mean_of(run: Mapping[str, Any], name: str, first: int) -> float:
    pairs = zip(run["columns"]["step"], run["columns"][name], strict=True)
    return _mean([x for step, x in pairs if step >= first and x is not None])
