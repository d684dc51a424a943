"""How experiments draw: plots as data (`vcposim.pages.plots`) from estimates, and matplotlib for paper and terminals.

A plot is a plain dict, so that a summary of a run holds all that its figures show and they are drawn again without it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from simulations.stats import Estimate, Interval
from vcposim.commands.figures import STYLE
from vcposim.pages.plots import ACCENT, ALARM, COLORS, INK, MUTED, Plot, panel, plot, series

__all__ = ["ACCENT", "ALARM", "INK", "MUTED", "Plot", "draw", "of_intervals", "panel", "plot", "ranking", "series"]

MARKERS = "osD^vP*"
DENSE = 30
"""points of a line from which on they are not marked one by one"""
PAPER = {"light": "#ffffff", "dark": "#0f1318"}
DARK = dict(zip((*COLORS["light"], PAPER["light"]), (*COLORS["dark"], PAPER["dark"]), strict=True))
"""a color of a light page -> that of a dark one"""


def of_intervals(
    name: str, x: Sequence[Any], intervals: Sequence[Interval | Estimate], number: int, **style: Any
) -> dict[str, Any]:
    """A series of values with their intervals."""
    found = [i.interval if isinstance(i, Estimate) else i for i in intervals]
    y, low, high = ([i[k] for i in found] for k in (1, 0, 2))
    return series(name, x, y, low, high, color=number, **style)


def ranking(
    title: str,
    xlabel: str,
    rows: Mapping[str, Interval | Estimate | None],
    *,
    alarms: Mapping[str, str] | None = None,
    accent: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """A panel of names from best to worst with their intervals.

    Rows of `accent` are the accent's color, those with an alarm (its words stand beside) the alarm's.
    """
    alarms = alarms or {}
    found = {n: i.interval if isinstance(i, Estimate) else i for n, i in rows.items() if i is not None}
    ordered = sorted(found, key=lambda name: -found[name].value)
    kinds = {"others": [], "VCPO and its parts": [], "runs collapsed": []}  # type: dict[str, list[str]]
    for name in ordered:
        kinds["runs collapsed" if name in alarms else "VCPO and its parts" if name in accent else "others"].append(name)
    parts = [
        series(
            kind,
            [found[n].value for n in names],
            names,
            [found[n].low for n in names],
            [found[n].high for n in names],
            color={"others": INK, "VCPO and its parts": ACCENT}.get(kind, ALARM),
            line=False,
            notes=[alarms.get(n, "") for n in names],
        )
        for kind, names in kinds.items()
        if names
    ]
    return panel(title, xlabel, "", parts, order=ordered, **more)


# --- matplotlib -------------------------------------------------------------------------------------------------------


ENTRY, LETTER = 0.6, 0.07
"""inches of an entry of the legend without its words, and of a letter of those"""


def draw(what: Plot, mode: str = "light") -> Figure:
    """The plot as a matplotlib figure, in the colors of a light or dark page."""
    ink = COLORS[mode][INK]
    style = {**STYLE, "svg.hashsalt": "vcposim", "svg.fonttype": "none"}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    style |= dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), PAPER[mode])
    panels = what["panels"]
    columns = min(len(panels), what["columns"])
    rows = -(-len(panels) // columns)
    with mpl.rc_context(style):
        figure = Figure(figsize=(what["width"] * columns, what["height"] * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        scales: dict[tuple[str, str], Axes] = {}
        for ax, one in zip(axes, panels, strict=False):
            if "order" not in one:  # one quantity, one scale: its panels can be compared
                first = scales.setdefault((one["ylabel"], one.get("yscale", "linear")), ax)
                ax.sharey(first) if first is not ax else None
            (_ranking if "order" in one else _curves)(ax, one, mode)
            ax.set_title(one["title"])
            ax.set_xlabel(one["xlabel"])
            ax.set_ylabel(one["ylabel"])
        for ax, one in zip(axes, panels, strict=False):
            for axis, ticks in ((ax.xaxis, one.get("ticks")), (ax.yaxis, None)):
                if axis.get_scale() == "log" and ticks is None:
                    _log_ticks(axis)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        handles: dict[str, Any] = {}
        for ax, one in zip(axes, panels, strict=False):
            if "order" in one and len(one["series"]) == 1:  # a ranking of one kind needs no name for it
                continue
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if len(handles) > 1:  # below all panels, where it hides nothing
            fit = int(figure.get_figwidth() / (ENTRY + LETTER * max(map(len, handles))))
            ncols = max(1, min(4, len(handles), fit))
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols)
    return figure


def darkened(svg: str) -> str:
    """A light picture of `draw` in the colors of a dark page: the same picture that drawing it again would give."""
    return re.sub("#[0-9a-f]{6}", lambda found: DARK.get(found[0], found[0]), svg)


def adaptive(svg: str) -> str:
    """A light picture of `draw` that darkens itself on a reader's dark screen."""
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    return svg.replace("</svg>", f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style></svg>")


def _log_ticks(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 where few decades are shown, else at powers of ten."""
    low, high = axis.get_view_interval()
    if high / low < 300:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 30 else (1.0, 3.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _curves(ax: Axes, one: dict[str, Any], mode: str) -> None:
    for number, part in enumerate(one["series"]):
        style: dict[str, Any] = {"color": COLORS[mode][part["color"] % 7], "label": part["name"]}
        dense = part["line"] and len(part["x"]) > DENSE
        style |= {"marker": "" if dense else MARKERS[number % 7], "markersize": 4, "linewidth": 1.1}
        style["linestyle"] = ("--" if part["dashed"] else "-") if part["line"] else "none"
        if part["hollow"]:
            style["markerfacecolor"] = PAPER[mode]
        if not part["line"] and "low" not in part:
            style |= {"alpha": 0.6, "markersize": 3}
        if "low" in part:
            y = np.array(part["y"])
            ax.errorbar(part["x"], y, np.abs([y - part["low"], np.array(part["high"]) - y]), **style)
        else:
            ax.plot(part["x"], part["y"], **style)
    _references(ax, one, mode)
    ax.set(xscale=one.get("xscale", "linear"), yscale=one.get("yscale", "linear"))
    if "ticks" in one:
        ax.set_xticks(one["ticks"], [f"{v:g}" for v in one["ticks"]])
        ax.minorticks_off()
    for name in ("xlim", "ylim"):
        if name in one:
            ax.set(**{name: one[name]})


def _references(ax: Axes, one: dict[str, Any], mode: str) -> None:
    muted = COLORS[mode][MUTED]
    for value in one.get("hlines", ()):
        ax.axhline(value, color=muted, linewidth=0.9, zorder=0)
    for value in one.get("vlines", ()):
        ax.axvline(value, color=muted, linewidth=0.9, zorder=0)
    if "diagonal" in one:
        x = [v for part in one["series"] for v in part["x"] if v > 0]
        at, band = np.geomspace(min(x), max(x), 50), one["diagonal"]
        ax.plot(at, at, color=muted, linewidth=0.9, zorder=0)
        ax.fill_between(at, at * (1 - band), at * (1 + band), color=muted, alpha=0.25, linewidth=0, zorder=0)


def _ranking(ax: Axes, one: dict[str, Any], mode: str) -> None:
    place = {name: -i for i, name in enumerate(one["order"])}
    shift = {part["name"]: 0.0 for part in one["series"]}
    names = [set(part["y"]) for part in one["series"]]
    if any(a & b for i, a in enumerate(names) for b in names[:i]):  # several points on a row stand one above another
        shift = {part["name"]: 0.15 - 0.3 * i / max(len(names) - 1, 1) for i, part in enumerate(one["series"])}
    for part in one["series"]:
        color = COLORS[mode][part["color"] % 7]
        y = np.array([place[n] for n in part["y"]]) + shift[part["name"]]
        if "low" in part:
            ax.hlines(y, part["low"], part["high"], color=color, linewidth=1.4)
        face = PAPER[mode] if part["hollow"] else color
        ax.plot(part["x"], y, "o", color=color, markersize=4, markerfacecolor=face, label=part["name"])
        for at, note in zip(y, part.get("notes", ()), strict=False):
            if note:
                ax.text(1.02, at, note, va="center", fontsize=7, color=color, transform=ax.get_yaxis_transform())
    _references(ax, one, mode)
    ax.set_yticks(list(place.values()), list(place), fontsize=7)
    ax.set_xscale(one.get("xscale", "linear"))
    if "xlim" in one:
        ax.set_xlim(one["xlim"])
