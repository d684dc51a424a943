"""Figures, in one style: what a command found, readable in ten seconds.

They are drawn on their own canvas, never through the global state of pyplot (`vcposim.commands.output` saves them).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vcposim.commands.output import TableRow
from vcposim.laboratory.standard_problems import GROUP_SIZE
from vcposim.replay.replay import Replay
from vcposim.replay.storage import heaviest, pieces

if TYPE_CHECKING:
    from vcposim.commands.plan import PlanAnswer

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 150,
}
INK, MUTED, ACCENT, ALARM = "#222222", "#9a9a9a", "#0b6e99", "#c1442e"
COLORS = (INK, ACCENT, "#d08700", "#5b8c3a", "#7b4ea3", ALARM)
"""told apart in print and by color-blind readers: they differ in lightness too"""
MOST_POINTS = 4000
"""of one curve; more lie on each other"""
MOST_GROUPS = 40
"""more than this cannot be told apart on one axis"""


def replay_figure(found: Replay) -> Figure:
    """Four panels: are the weights healthy, do baselines differ, does one sample dominate, would it have helped?"""
    with mpl.rc_context(STYLE):
        if not found.rows:  # no groups or no rewards: the weights are all there is
            figure = Figure(figsize=(5, 3.5), layout="constrained")
            _weights(figure.subplots(), found)
            return figure
        figure = Figure(figsize=(10, 7), layout="constrained")
        axes = figure.subplots(2, 2)
        _weights(axes[0, 0], found)
        # the groups to show, ordered by mean reward: all, or those where the baselines differ most
        mean = found.mean_reward
        per_group = [row.per_group for row in found.rows if row.baseline != "zero"] or [found.mean_reward]
        spread = [
            np.nan_to_num(np.nanmax(np.stack(some), axis=0) - np.nanmin(np.stack(some[:-1]), axis=0))
            for some in pieces(*per_group, found.mean_reward)
        ]
        shown = heaviest(np.concatenate(spread), MOST_GROUPS)
        shown = shown[np.argsort(mean[shown], kind="stable")]
        _baselines(axes[0, 1], found, shown)
        _leverage(axes[1, 0], found, shown)
        _ratios(axes[1, 1], found)
    return figure


def variance_figure(rows: Sequence[TableRow]) -> Figure:
    """Variance and squared bias of the gradient estimate, one bar an estimator: they add up to the MSE."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
        ax = figure.subplots()
        at = np.arange(len(rows))[::-1]
        variance = np.array([_or_nan(row["variance_of_mean"]) for row in rows])
        mse = np.array([_or_nan(row["mse"]) for row in rows])
        ax.barh(at, variance, color=ACCENT, label="variance of the mean")
        ax.barh(at, np.maximum(mse - variance, 0), left=variance, color=ALARM, label="squared bias")
        ax.set_yticks(at, [row.get("estimator") or f"{row['weighting']}, {row['baseline']}" for row in rows])
        longest = max(mse[np.isfinite(mse)], default=0.0)
        if longest > 0:
            ax.set_xlim(0, 1.05 * longest)  # the longest bar ends before the frame does
        ax.set_xlabel("MSE of the gradient estimate")
        ax.set_title("Error of the gradient, by estimator")
        ax.legend(loc="best")
    return figure


def bias_variance_figure(rows: Sequence[TableRow]) -> Figure:
    """Squared bias against variance, one panel a problem: one dot an estimator, yours a star, lines of equal MSE."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        for ax, problem in zip(figure.subplots(2, 2).flat, problems, strict=True):
            _bias_variance(ax, [row for row in rows if row["problem"] == problem])
            ax.set_title(problem[0].upper() + problem[1:])
        figure.supxlabel(
            f"variance of the mean over a group of {GROUP_SIZE}, over |gradient|²; gray lines: equal MSE", fontsize=9
        )
        figure.supylabel(f"squared bias over |gradient|² (lower edge: less than {LEAST:g}, or none)", fontsize=9)
    return figure


NAMED = ("reinforce", "rloo", "grpo", "gspo", "sequence_is", "token_tis", "sequence_tis", "vcpo")
"""entries that are named in the picture, for orientation"""

LEAST = 1e-4
"""what is smaller, relative to |gradient|^2, is drawn on the edge"""


def _bias_variance(ax: Axes, rows: Sequence[TableRow]) -> None:
    x, y = (np.maximum([row[key] for row in rows], LEAST) for key in ("variance", "squared_bias"))
    mine = np.array([row["mine"] for row in rows])
    named = [i for i, row in enumerate(rows) if row["estimator"] in NAMED and not row["mine"]]
    ax.scatter(x[~mine], y[~mine], s=14, color=MUTED, label="catalogue")
    ax.scatter(x[named], y[named], s=18, color=ACCENT)
    # points that lie too near each other for two labels share one, from the left
    point, reach = np.log10([x[named], y[named]]).T, 0.2
    clusters: list[list[int]] = []
    for i in np.argsort(point[:, 0], kind="stable").tolist():
        close = [c for c in clusters if np.all(np.abs(point[i] - point[c[0]]) < (4 * reach, reach))]
        close[0].append(i) if close else clusters.append([i])
    for near in clusters:
        label, first = ", ".join(rows[named[i]]["estimator"] for i in near), named[near[0]]
        at: Any = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 7, "color": ACCENT}
        ax.annotate(label, (x[first], y[first]), annotation_clip=False, **at)
    if mine.any():
        own = next(row["estimator"] for row in rows if row["mine"])
        ax.scatter(x[mine], y[mine], s=140, marker="*", color=ALARM, zorder=3, label=own.rpartition(":")[2])
    highest = 2 * max(x.max(), y.max())
    for mse in 10.0 ** np.arange(-3, np.ceil(np.log10(highest)) + 1):
        line = np.geomspace(LEAST, mse * (1 - 1e-9), 200)
        ax.plot(line, np.maximum(mse - line, LEAST), color=MUTED, lw=0.5, alpha=0.5, zorder=0)
    ax.set(xscale="log", yscale="log", xlim=(LEAST / 1.5, highest), ylim=(LEAST / 1.5, highest))
    ax.legend(loc="lower left")


def _weights(ax: Axes, found: Replay) -> None:
    descending = np.sort(found.log_ratio)[::-1]
    rank = np.arange(1, found.n + 1)
    rank = rank if found.n <= MOST_POINTS else np.unique(np.geomspace(1, found.n, MOST_POINTS).astype(int))
    log10_weight = descending[rank - 1] / np.log(10)
    ax.plot(rank, log10_weight, color=ACCENT, lw=1.8)
    ax.axhline(0, color=MUTED, lw=0.8)
    if log10_weight[0] > 0.5 * np.log10(found.cap):
        ax.axhline(np.log10(found.cap), color=ALARM, lw=0.8, ls="--")
        ax.annotate(f"cap {found.cap:g}", (1, np.log10(found.cap)), va="bottom", color=ALARM, fontsize=8)
    ax.set_xscale("log")
    ax.set(xlabel="rank of the trajectory", ylabel="log10 of its weight")
    ess, khat = found.diagnostics["ess_fraction_sequence"], found.diagnostics["khat"]
    tail = "not estimable" if np.isnan(khat.value) else f"{khat.value:.2f}"
    title = f"Weights: ESS {ess.value:.2g} of n, k-hat {tail} (limit {khat.threshold:.2f})"
    ax.set_title(title, color=ALARM if ess.alarming or khat.alarming else INK)


def _baselines(ax: Axes, found: Replay, shown: np.ndarray) -> None:
    names = ("group_mean", "length_weighted", "on_policy_optimal", "opob")
    at = np.arange(len(shown))
    drawn = [row for row in found.rows if row.baseline in names]
    if drawn:
        values = np.array([row.per_group[shown] for row in drawn])
        ax.vlines(at, values.min(axis=0), values.max(axis=0), color=MUTED, lw=0.8, zorder=0)
    for row, color, marker in zip(drawn, COLORS, "_s^o", strict=False):
        size = 110 if marker == "_" else 22
        ax.scatter(at, row.per_group[shown], s=size, color=color, marker=marker, label=row.baseline)
    ax.set(ylabel="baseline (reward)", title="What is subtracted, group by group")
    if drawn:
        ax.legend(loc="best")
    _group_axis(ax, found, shown)


def _leverage(ax: Axes, found: Replay, shown: np.ndarray) -> None:
    at = np.arange(len(shown))
    value, limit = found.max_leverage[shown], found.diagnostics["max_leverage"].threshold
    ax.bar(at, value, color=[ALARM if x > limit else ACCENT for x in value], width=0.7)
    ax.scatter(at, 1 / found.size[shown], marker="_", color=INK, s=60, label="equal shares, 1/n")
    ax.axhline(limit, color=ALARM, lw=0.8, ls="--")
    ax.set(ylim=(0, 1), ylabel="largest leverage", title="One sample's share of its own OPOB")
    ax.legend(loc="best")
    _group_axis(ax, found, shown)


def _ratios(ax: Axes, found: Replay) -> None:
    rows = [row for row in found.rows if row.baseline != "group_mean"]
    at = np.arange(len(rows))[::-1]
    for offset, color, intervals in (
        (0.14, MUTED, [row.second_moment_ratio for row in rows]),
        (-0.14, ACCENT, [row.held_out_ratio for row in rows]),
    ):
        for y, interval in zip(at + offset, intervals, strict=True):
            if interval is not None and np.isfinite(interval.value):
                ax.plot(interval.value, y, "o", ms=4, color=color)
                if np.isfinite([interval.low, interval.high]).all():
                    ax.plot([interval.low, interval.high], [y, y], color=color, lw=1.6)
    ax.axvline(1, color=INK, lw=0.8)
    ax.set_yticks(at, [row.baseline for row in rows])
    ax.set_xlabel("second moment over the group mean's, 95% interval")
    ax.set_title("Below 1: less noise. Blue: held out, gray: in sample")
    ax.margins(y=0.15)


def _group_axis(ax: Axes, found: Replay, shown: np.ndarray) -> None:
    labels = [str(found.labels[i]) for i in shown]
    short = [label if len(label) <= 12 else label[:11] + "…" for label in labels]
    ax.set_xticks(np.arange(len(shown)), short, rotation=90 if max(map(len, short)) > 3 else 0, fontsize=7)
    many = f" ({len(shown)} of {len(found.labels)} that differ most)" if len(found.labels) > len(shown) else ""
    ax.set_xlabel(f"group, by mean reward{many}")


def _or_nan(x: float | None) -> float:
    return float("nan") if x is None else x


def plan_figure(found: "PlanAnswer") -> Figure:
    """Speed against the split, one line a lag; and what each lag's best split comes to, relative to synchronous."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        lags = sorted({row["max_lag"] for row in found["options"]})
        for number, lag in enumerate(lags):
            rows = [row for row in found["options"] if row["max_lag"] == lag]
            rows.sort(key=lambda row: row["generators"])
            x, y = [row["generators"] for row in rows], [row["speed"]["value"] for row in rows]
            style = "-" if number < len(COLORS) else "--"
            left.plot(x, y, style, marker="o", ms=3, lw=1.4, color=COLORS[number % len(COLORS)], label=f"lag {lag}")
        left.axhline(1, color=MUTED, lw=0.8)
        devices = found["reference"]["generators"]
        left.set(xlabel=f"devices generating, of {devices}", ylabel="steps/s over synchronous", title="Throughput")
        left.set_ylim(bottom=0)
        left.legend(loc="best")
        _plan_times(right, found, lags)
    return figure


def _plan_times(ax: Axes, found: "PlanAnswer", lags: list[int]) -> None:
    timed = found["efficiency"] is not None
    for at, lag in enumerate(lags):
        known = [
            (estimate["value"], estimate, row)
            for row in found["options"]
            if row["max_lag"] == lag and (estimate := row["time"] if timed else row["speed"]) and estimate["value"]
        ]
        if not known:
            ax.annotate("not\nknown", (at, 1), ha="center", va="bottom", color=MUTED, fontsize=7)
            continue
        value, estimate, best = (min if timed else max)(known, key=lambda one: one[0])
        ends = [value if end is None else end for end in (estimate["low"], estimate["high"])]
        chosen = best == found["best"]
        color = ACCENT if chosen else INK
        ax.plot([at, at], ends, color=color, lw=1.6)
        ax.plot(at, value, "o", ms=6 if chosen else 4, color=color)
        note = f"{best['generators']}+{best['trainers']}"
        ax.annotate(note, (at, value), xytext=(7, 0), textcoords="offset points", va="center", color=color, fontsize=8)
    ax.axhline(1, color=MUTED, lw=0.8)
    ax.set_xticks(range(len(lags)), [str(lag) for lag in lags])
    ax.margins(x=0.2)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("lag (best split: generating + training)")
    what = "Steps/s over synchronous" if not timed else "Time to target over synchronous"
    ax.set_title(f"{what}, 95%" + (" (throughput only)" if not timed else ""))
