"""Plots as data, and two ways to show them: matplotlib for paper, terminals and dark screens, Vega-Lite to explore.

A plot is a plain dict, so that a summary of a run holds all that its figures show and they are drawn again without it:
panels side by side, each with series of points that may have intervals. In a *ranking* the y of a point is a name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulations.stats import Estimate, Interval
from vcposim.commands.figures import STYLE

Plot = dict[str, Any]
MARKERS = "osD^vP*"
COLORS = {
    "light": ("#222222", "#0b6e99", "#b07100", "#46782c", "#7b4ea3", "#c1442e", "#7a7a7a"),
    "dark": ("#e6edf3", "#58b8e3", "#eab94d", "#8ccb6a", "#bf9be0", "#ff8f7a", "#9aa4ae"),
}
"""told apart in print and by color-blind readers: they differ in lightness too; the last two mean alarm and "beside"
"""
INK, ACCENT, ALARM, MUTED = 0, 1, 5, 6
PAPER = {"light": "#ffffff", "dark": "#0f1318"}
MOST_POINTS = 1500
"""of one series; more are thinned evenly, a figure of more shows no more"""


def series(
    name: str,
    x: Sequence[Any],
    y: Sequence[Any],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    *,
    color: int = 0,
    line: bool = True,
    dashed: bool = False,
    hollow: bool = False,
    notes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Points of one name; `low` and `high` are intervals of y (of x in a ranking), `notes` are words for each point."""
    columns: dict[str, Any] = {"x": x, "y": y, "low": low, "high": high, "notes": notes}
    keep: list[int] = (
        np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int)).tolist() if len(x) else []
    )
    data = {k: [_short(v[i]) for i in keep] for k, v in columns.items() if v is not None}
    return {"name": name, "color": color, "line": line, "dashed": dashed, "hollow": hollow, **data}


def _short(value: Any) -> Any:
    """Numbers to five digits: what a reader can see, and half the bytes."""
    return value if isinstance(value, str) else float(f"{float(value):.5g}")


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


def panel(title: str, xlabel: str, ylabel: str, parts: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """One pair of axes.

    `xscale`, `yscale` ("linear", "log"), `xlim`, `ylim`, `ticks` (values on x), `vlines`, `hlines` (reference values),
    `order` (names, top to bottom: makes it a ranking), `diagonal` (the line y = x; a number widens it to a band).
    """
    return {"title": title, "xlabel": xlabel, "ylabel": ylabel, "series": list(parts), **more}


def plot(*panels: dict[str, Any], width: float = 4.2, height: float = 3.4, columns: int = 2) -> Plot:
    """Panels, at most `columns` side by side; a size in inches for each."""
    return {"panels": list(panels), "width": width, "height": height, "columns": columns}


# --- matplotlib -------------------------------------------------------------------------------------------------------


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
        for ax, one in zip(axes, panels, strict=False):
            (_ranking if "order" in one else _curves)(ax, one, mode)
            ax.set_title(one["title"])
            ax.set_xlabel(one["xlabel"])
            ax.set_ylabel(one["ylabel"])
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        handles: dict[str, Any] = {}
        for ax in axes[: len(panels)]:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if len(handles) > 1:  # below all panels, where it hides nothing
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _curves(ax: Axes, one: dict[str, Any], mode: str) -> None:
    for number, part in enumerate(one["series"]):
        style: dict[str, Any] = {"color": COLORS[mode][part["color"] % 7], "label": part["name"]}
        style |= {"marker": MARKERS[number % 7], "markersize": 4, "linewidth": 1.1}
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


# --- Vega-Lite --------------------------------------------------------------------------------------------------------


def vega(what: Plot) -> dict[str, Any]:
    """The plot as a Vega-Lite specification: hover for values, click a name in the legend to see it alone."""
    panels = [_vega_panel(one, number) for number, one in enumerate(what["panels"])]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "concat": panels,
        "columns": 1,
        "config": {"view": {"stroke": None}, "axis": {"labelLimit": 240}},
        "resolve": {"scale": {"color": "independent"}},
    }


def _vega_panel(one: dict[str, Any], number: int) -> dict[str, Any]:
    rank = "order" in one
    rows = []
    for part in one["series"]:
        for i, (at, value) in enumerate(zip(part["x"], part["y"], strict=True)):
            row = {"series": part["name"], "x": at, "y": value}
            if "low" in part:
                row |= {"low": part["low"][i], "high": part["high"][i]}
            if part.get("notes") and part["notes"][i]:
                row["note"] = part["notes"][i]
            rows.append(row)
    names = [part["name"] for part in one["series"]]
    x: dict[str, Any] = {"field": "x", "type": "quantitative", "title": one["xlabel"]}
    y: dict[str, Any] = {"field": "y", "type": "quantitative", "title": one["ylabel"]}
    for axis, kind in ((x, one.get("xscale", "linear")), (y, one.get("yscale", "linear"))):
        axis["scale"] = {"type": kind} if kind == "log" else {"type": kind, "zero": False}
    if "xlim" in one:
        x["scale"] |= {"domain": one["xlim"], "clamp": False}
    if "ylim" in one:
        y["scale"]["domain"] = one["ylim"]
    beside: dict[str, Any] = {}
    if rank:
        y = {"field": "y", "type": "nominal", "title": None, "sort": one["order"]}
        beside = {"yOffset": {"field": "series", "type": "nominal"}} if len(rows) > len(one["order"]) else {}
    picked = {"condition": {"param": f"pick{number}", "value": 1, "empty": True}, "value": 0.08}
    colors = [f"series{part['color'] % 7}" for part in one["series"]]  # the page puts in its own colors
    color: dict[str, Any] = {
        "field": "series",
        "type": "nominal",
        "title": None,
        "scale": {"domain": names, "range": colors},
    }
    color["legend"] = {"orient": "bottom", "columns": 2, "labelLimit": 260} if len(names) > 1 else None
    tip = [{"field": "series", "title": "series"}] if len(names) > 1 else []
    tip += [{"field": "y", "title": "name" if rank else one["ylabel"]}, {"field": "x", "title": one["xlabel"]}]
    tip += [{"field": "low", "title": "from"}, {"field": "high", "title": "to"}] if "low" in rows[0] else []
    encoding = {"x": x, "y": y, "color": color, "opacity": picked, "tooltip": tip, **beside}
    pick = {"name": f"pick{number}", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}
    layers: list[dict[str, Any]] = []
    if any(part["line"] for part in one["series"]) and not rank:
        layers.append({"mark": {"type": "line"}, "encoding": encoding})
    if "low" in rows[0]:
        end = {"x": {**x, "field": "low"}, "x2": {"field": "high"}} if rank else {"y": {**y, "field": "low"}}
        layers.append({"mark": "rule", "encoding": {**encoding, **end, **({} if rank else {"y2": {"field": "high"}})}})
    layers.append({"mark": {"type": "point", "filled": True, "size": 45}, "encoding": encoding, "params": [pick]})
    for field in ("vlines", "hlines"):
        for value in one.get(field, ()):
            at = {"x" if field == "vlines" else "y": {"datum": value}}
            layers.append({"mark": {"type": "rule", "strokeDash": [4, 3], "opacity": 0.6}, "encoding": at})
    size = {"width": 560, "height": {"step": 17} if rank else 260}
    return {"title": one["title"], "data": {"values": rows}, "layer": layers, **size}
