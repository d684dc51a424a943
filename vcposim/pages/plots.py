"""Plots as data, and Vega-Lite to explore them on a page.

A plot is a plain dict, so that whoever draws it needs nothing but it: panels, each with series of points that may have
intervals. In a *ranking* the y of a point is a name. `simulations.drawing` draws the same dicts with matplotlib.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Plot = dict[str, Any]
COLORS = {
    "light": ("#222222", "#0b6e99", "#b07100", "#46782c", "#7b4ea3", "#c1442e", "#7a7a7a"),
    "dark": ("#e6edf3", "#58b8e3", "#eab94d", "#8ccb6a", "#bf9be0", "#ff8f7a", "#9aa4ae"),
}
"""told apart in print and by color-blind readers: they differ in lightness too; the last two mean alarm and "beside"
"""
INK, ACCENT, ALARM, MUTED = 0, 1, 5, 6
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
    # numbers to five digits: what a reader can see, and half the bytes
    data = {
        key: [x if isinstance(x, str) else float(f"{float(x):.5g}") for x in (values[i] for i in keep)]
        for key, values in columns.items()
        if values is not None
    }
    return {"name": name, "color": color, "line": line, "dashed": dashed, "hollow": hollow, **data}


def panel(title: str, xlabel: str, ylabel: str, parts: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """One pair of axes.

    `xscale`, `yscale` ("linear", "log"), `xlim`, `ylim`, `ticks` (values on x), `vlines`, `hlines` (reference values),
    `order` (names, top to bottom: makes it a ranking), `diagonal` (the line y = x; a number widens it to a band).
    """
    return {"title": title, "xlabel": xlabel, "ylabel": ylabel, "series": list(parts), **more}


def plot(*panels: dict[str, Any], width: float = 4.2, height: float = 3.4, columns: int = 2) -> Plot:
    """Panels, at most `columns` side by side; a size in inches for each."""
    return {"panels": list(panels), "width": width, "height": height, "columns": columns}


def vega(what: Plot) -> dict[str, Any]:
    """The plot as a Vega-Lite specification: hover for values, click a name in the legend to see it alone."""
    panels = [vega_panel(one, number) for number, one in enumerate(what["panels"])]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "concat": panels,
        "columns": 1,
        "config": {"view": {"stroke": None}, "axis": {"labelLimit": 240}},
        "resolve": {"scale": {"color": "independent"}},
    }


def vega_panel(one: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """One panel as a specification: part of a concatenation, or alone with a `$schema` and a width of its own.

    Of a panel in which some series are lines and some are not, only those are drawn as lines that are. `xtype` is
    Vega-Lite's type of x where it is not a number (`nominal`).
    """
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
    x: dict[str, Any] = {"field": "x", "type": one.get("xtype", "quantitative"), "title": one["xlabel"]}
    y: dict[str, Any] = {"field": "y", "type": "quantitative", "title": one["ylabel"]}
    if x["type"] != "quantitative":
        x["sort"] = None  # as they come
    for axis, kind in ((x, one.get("xscale", "linear")), (y, one.get("yscale", "linear"))):
        if axis["type"] != "quantitative":
            continue
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
    lined = [part["name"] for part in one["series"] if part["line"]]
    if lined and not rank:
        only = {} if len(lined) == len(names) else {"transform": [{"filter": {"field": "series", "oneOf": lined}}]}
        layers.append({"mark": {"type": "line"}, "encoding": encoding, **only})
    if "low" in rows[0]:
        end = {"x": {**x, "field": "low"}, "x2": {"field": "high"}} if rank else {"y": {**y, "field": "low"}}
        layers.append({"mark": "rule", "encoding": {**encoding, **end, **({} if rank else {"y2": {"field": "high"}})}})
    layers.append({"mark": {"type": "point", "filled": True, "size": 45}, "encoding": encoding, "params": [pick]})
    for field in ("vlines", "hlines"):
        for value in one.get(field, ()):
            at = {"x" if field == "vlines" else "y": {"datum": value}}
            rule = {"type": "rule", "strokeDash": [4, 3], "opacity": 0.6, "aria": False}  # it has nothing to read out
            layers.append({"mark": rule, "encoding": at})
    size = {"width": 560, "height": {"step": 17} if rank else 260}
    return {"title": one["title"], "data": {"values": rows}, "layer": layers, **size}
