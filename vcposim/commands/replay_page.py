"""`vcposim replay --html FILE`: everything a replay says, on one page that needs nothing but itself."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from vcposim.diagnostics import Diagnostic
from vcposim.pages import parts
from vcposim.pages.parts import document, glossary_section, prose, table
from vcposim.pages.plots import ACCENT, ALARM, INK, MUTED, panel, series, vega_panel
from vcposim.replay import Replay, Slice, Track, first_alarms, summary, tracks, verdict
from vcposim.replay.storage import heaviest, picked, pieces
from vcposim.results import Interval

GENERATOR = "vcposim replay"
GLOSSARY = {
    **parts.GLOSSARY,
    "KL": "mean of -log w over trajectories, nats: how far the learner has moved from what sampled",
    "leverage": "one sample's share of its group's OPOB weight; above one half it mostly cancels its own reward",
    "held out": "computed without the sample it is applied to",
    "mean weight": "1 in expectation; below it, the learner does things that were never sampled",
}
MOST_ROWS = 200
"""of one table; --json has all"""
HEAVIEST = 200
"""trajectories of the figure of weights"""
RANKED = 25
"""estimators of the figure of risks"""


def replay_page(found: Replay, title: str) -> str:
    """The page of a replay: equal replays give equal bytes."""
    axis = next((name for name, slices in found.slices.items() if len(slices) > 1), None)
    specs: dict[str, Any] = {}
    checks = "".join(
        f'<p class="note"><strong>{escape(one.check)}</strong>: {prose(one.evidence, GLOSSARY)}. '
        f"<em>Likely:</em> {prose(one.cause, GLOSSARY)}.</p>"
        for one in found.findings
    )
    checks = checks or "<p>No sign of a mistake in how the data were written.</p>"
    sections: dict[str, tuple[str, str]] = {"checks": ("Data checks", checks)}
    if found.ranking is not None:
        sections["corrections"] = ("Which correction?", _corrections(found, specs))
    if axis is not None:
        slices = found.slices[axis]
        at = [one.value for one in slices]
        reward = Track("mean reward", at, [one.mean_reward for one in slices], None)
        sections["run"] = (
            f"Gauges against {axis}",
            against(axis, tracks(slices), [] if math.isnan(np.nanmax([0, *reward.value])) else [reward], specs),
        )
    sections["gauges"] = ("Gauges of all trajectories", _gauges(found))
    sections["weights"] = ("What dominates", _weights(found, specs))
    for name, slices in found.slices.items():
        sections[f"by-{name}"] = (f"By {name}", _slices(name, slices, found))
    if found.rows:
        sections["baselines"] = ("Baselines", _baselines(found))
    if found.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
        sections["notes"] = ("Notes", f"<ul>{notes}</ul>")
    groups = f" in {len(found.labels)} groups" if found.rows else ""
    return assembled(title, f"{found.n} trajectories{groups}", summary(found), sections, specs)


def assembled(
    title: str, what: str, lines: Sequence[str], sections: Mapping[str, tuple[str, str]], specs: Mapping[str, Any]
) -> str:
    """A page of this command: five lines, then sections, anchor -> (heading, HTML)."""
    first = "".join(f"<li><strong>{escape(h)}:</strong> {prose(t, GLOSSARY)}</li>" for h, _, t in map(_halves, lines))
    body = f'<h1>{escape(title)}</h1>\n<p>{escape(what)}.</p><ul class="five" id="summary">{first}</ul>\n' + "".join(
        f'<section id="{_anchor(anchor)}"><h2>{escape(heading)}</h2>\n{html}</section>\n'
        for anchor, (heading, html) in sections.items()
    )
    return document(
        title=f"vcposim replay: {title}",
        generator=GENERATOR,
        links={"summary": "summary"} | {_anchor(a): h for a, (h, _) in sections.items()},
        body=body + glossary_section(GLOSSARY),
        specs=specs,
        style=STYLE,
        script=SCRIPT,
    )


def against(axis: str, gauges: Sequence[Track], below: Sequence[Track], specs: dict[str, Any]) -> str:
    """Every gauge against an axis with its limit and alarms, and tracks without a limit below; figures go to `specs`."""
    first = {one.name: one.first_alarm for one in gauges if any(one.alarms)}
    said = ", ".join(f"{name} at {axis} {value}" for name, value in first.items()) or "none"
    shown = [one for one in gauges if any(map(math.isfinite, one.value))]
    without = [one.name for one in gauges if one not in shown]
    figures = "".join(_track(axis, one, specs, alarm=first.get(one.name)) for one in shown)
    more = "".join(_track(axis, one, specs) for one in below if any(map(math.isfinite, one.value)))
    rest = f"<p>Not estimable at any {escape(axis)}: {escape(', '.join(without))}.</p>" if without else ""
    only = '<label><input type="checkbox" id="only"> only gauges that alarm</label>' if len(first) > 0 else ""
    return (
        f"<p><strong>First alarms:</strong> {escape(said)}.</p><form aria-label='Figures'>{only}</form>"
        f'<div class="grid">{figures}</div><div class="below">{more}</div>{rest}'
    )


def _track(axis: str, one: Track, specs: dict[str, Any], alarm: Any = None) -> str:
    numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in one.at)
    points = [
        (at if numeric else str(at), y, bad, one.enough is None or one.enough[i])
        for i, (at, y, bad) in enumerate(zip(one.at, one.value, one.alarms, strict=True))
        if math.isfinite(y)
    ]
    name = _words(one.name)
    drawn = [series(name, [p[0] for p in points], [p[1] for p in points], color=INK)]
    limits = {x for x in one.limit or () if math.isfinite(x)}
    constant = len(limits) == 1
    if limits and not constant:
        pairs = [(p[0], x) for p, x in zip(points, _finite(one), strict=True) if math.isfinite(x)]
        drawn.append(series("limit", *map(list, zip(*pairs, strict=True)), color=MUTED))
    for label, color, keep in (
        ("alarm", ALARM, lambda p: p[2]),
        ("too few samples to tell", MUTED, lambda p: not p[3]),
    ):
        chosen = [p for p in points if keep(p)]
        if chosen:
            drawn.append(series(label, [p[0] for p in chosen], [p[1] for p in chosen], color=color, line=False))
    values = [p[1] for p in points] + (list(limits) if constant else [])
    wide = min(values) > 0 and max(values) > 1000 * min(values)
    more: dict[str, Any] = {"yscale": "log"} if wide else {}
    more |= {} if numeric else {"xtype": "nominal"}
    more |= {"hlines": list(limits)} if constant else {}
    limit = ""
    if limits:
        sign = "below" if one.high_is_bad else "above"
        limit = f"Should stay {sign} {min(limits):.3g}. " if constant else f"Should stay {sign} its limit. "
    told = f"First alarm at {axis} {alarm}. " if alarm is not None else ""
    figure = panel("", axis, name, drawn, **more)
    spec = _spec(figure, 150, f"{name} against {axis}. {told}{limit}")
    caption = f"<strong>{escape(name)}</strong>. {told and f'<b class=bad>{escape(told)}</b>'}{escape(limit)}"
    return _figure(f"track-{one.name}", spec, f"{caption}{prose(one.meaning, GLOSSARY)}", specs, bool(any(one.alarms)))


def _finite(one: Track) -> list[float]:
    """Its limits where it has a value."""
    return [x for x, y in zip(one.limit or (), one.value, strict=True) if math.isfinite(y)]


def _spec(one: dict[str, Any], height: int, description: str) -> dict[str, Any]:
    found = vega_panel(one) | {"width": "container", "height": height, "description": description}
    found["autosize"] = {"type": "fit-x", "contains": "padding"}
    found["config"] = {"view": {"stroke": None}, "axis": {"labelLimit": 150}}
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **found}


def _figure(name: str, spec: dict[str, Any], caption: str, specs: dict[str, Any], alarming: bool = False) -> str:
    anchor = _anchor(name)
    specs[anchor] = spec
    return (
        f'<figure data-alarms="{int(alarming)}"><div class="live" data-figure="{anchor}"></div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _gauges(found: Replay) -> str:
    rows = []
    for one in found.diagnostics.values():
        required = math.ceil(one.required) if math.isfinite(one.required) else one.required
        limit = f"{'&lt;' if one.high_is_bad else '&gt;'} {_number(one.threshold)}"
        rows.append([_words(one.name), _number(one.value), limit, _number(required), _state(one, found.n)])
        rows[-1].append(prose(one.meaning, GLOSSARY))
    return table("Gauges of all trajectories", ("gauge", "value", "limit", "needs n", "state", "meaning"), rows)


def _state(one: Diagnostic, n: int) -> str:
    if math.isnan(one.value):
        return '<b class="bad">not estimable</b>'
    if one.alarming:
        return '<b class="bad">ALARM</b>'
    return "ok" if n >= one.required else '<span class="few">n too small</span>'


def _weights(found: Replay, specs: dict[str, Any]) -> str:
    """The heaviest trajectories and the share of all weight that they and those before them hold."""
    shown = heaviest(found.log_ratio, HEAVIEST)
    log_ratio = picked(found.log_ratio, shown)
    top = log_ratio[0]
    if top == -math.inf:
        return "<p>Every trajectory has weight 0.</p>"
    weight = np.exp(log_ratio - top) / sum(float(np.exp(x - top).sum()) for (x,) in pieces(found.log_ratio))
    share = np.cumsum(weight)
    places = [found.place[i] if found.place else f"trajectory {i + 1}" for i in shown]
    held = series("trajectories", list(range(1, shown.size + 1)), share.tolist(), notes=places)
    even = series("if all weighed the same", [1, int(shown.size)], [1 / found.n, shown.size / found.n], color=MUTED)
    figure = panel("", "heaviest trajectories", "share of all weight", [held, even], ylim=[0, 1])
    spec = _spec(figure, 220, "Share of all weight that the heaviest trajectories hold together")
    if shown.size > 1:
        drawn = _figure("heaviest", spec, "Share of all weight held by the heaviest trajectories together.", specs)
    else:
        drawn = ""
    rows = [
        [escape(place), f"{log:.4g}", f"{of_all:.2%}"]
        for place, log, of_all in zip(places[:10], log_ratio, weight, strict=False)
    ]
    return f'<div class="pair"><div>{drawn}</div><div>{table("Heaviest trajectories", ("trajectory", "log w", "share of all weight"), rows)}</div></div>'


def _corrections(found: Replay, specs: dict[str, Any]) -> str:
    ranking = found.ranking
    assert ranking is not None
    rows = []
    for row in ranking.rows:
        cells = [
            _data(row.risk.value, f"{row.risk.value:.3g} [{_number(row.risk.low)}, {_number(row.risk.high)}]"),
            *(_data(x) for x in (row.bias, row.spread, row.kept)),
        ]
        cells += [_data(row.changed), _data(row.held_out_ratio), _data(row.effective), _data(row.cosine)]
        rows.append([escape(row.name), *cells])
    best = [row for row in ranking.rows if math.isfinite(row.risk.value)][:RANKED]
    drawn = ""
    if best:
        names = [row.name for row in best]
        ends = [[row.risk.low for row in best], [row.risk.high for row in best]]
        if not all(map(math.isfinite, ends[0] + ends[1])):
            ends = [[row.risk.value for row in best]] * 2
        part = series("risk", [row.risk.value for row in best], names, *ends, color=ACCENT, line=False)
        figure = panel("", "risk, 95% over groups", "", [part], order=names)
        spec = _spec(figure, 17 * len(best), "Risk of each estimator with its interval, smallest first")
        drawn = _figure("risks", spec, f"The {len(best)} smallest risks.", specs)
    scope = "tokens of the first" if ranking.per_token else "the first"
    more = "".join(f"<li>with {escape(c)}: also {escape(', '.join(n))}</li>" for c, n in ranking.absent.items())
    head = ("estimator", "risk [95%]", "bias", "spread", "kept", "changed", "held out", "ESS", "cosine")
    return (
        f"<p>{prose('risk = bias^2 + spread, relative to the size of the untruncated importance-weighted gradient: bias bounds what the correction gives up, spread is what its noise costs.', GLOSSARY)} "
        f"Scores of tokens are taken as orthogonal, scale is free. Over {scope} {ranking.groups} groups.</p>"
        f'<div class="pair"><div>{table("Estimators by risk", head, rows)}</div><div>{drawn}</div></div>'
        + (f"<ul>{more}</ul>" if more else "")
    )


SLICED = ("ess_fraction_sequence", "mean_weight", "kl_behavior_target", "khat")


def _slices(name: str, slices: Sequence[Slice], found: Replay) -> str:
    rows = []
    for one in slices[:MOST_ROWS]:
        cells = [_gauge_cell(one.diagnostics[gauge], one.n) for gauge in SLICED]
        alarming = sum(gauge.alarming for gauge in one.diagnostics.values())
        rows.append(
            [escape(str(one.value)), str(one.n), str(one.groups), _fixed(one.mean_reward), *cells, str(alarming)]
        )
    alarms = first_alarms(slices)
    told = ", ".join(f"{gauge} at {name} {value}" for gauge, value in alarms.items())
    head = (name, "n", "groups", "reward", *map(_words, SLICED), "alarms")
    more = f"<p>The first {MOST_ROWS} of {len(slices)}.</p>" if len(slices) > MOST_ROWS else ""
    return (f"<p>First alarms: {escape(told)}.</p>" if told else "") + more + table(f"By {name}", head, rows)


def _gauge_cell(one: Diagnostic, n: int) -> str:
    text = _number(one.value)
    return f'<b class="bad">{text}</b>' if one.alarming and n >= one.required else text


def _baselines(found: Replay) -> str:
    rows = [
        [
            escape(row.baseline),
            *(
                _data(None if x is None else x.value, _interval(x))
                for x in (row.second_moment_ratio, row.held_out_ratio)
            ),
        ]
        for row in found.rows
    ]
    return (
        f"<p><strong>{escape(verdict(found))}</strong></p><p>Mean of (w (R - b) ||s||)^2 relative to group_mean, with ||s||^2 from "
        f"{escape(found.norm_source)}. In sample, each baseline has seen the rewards it is subtracted from; only the held-out "
        f"column can show harm. Percentile bootstrap over groups, {found.resamples} resamples, seed {found.seed}.</p>"
        + table("Baselines", ("baseline", "in sample [95%]", "held out [95%]"), rows)
    )


def _data(value: float | None, text: str | None = None) -> str:
    """A number that a column can be sorted by."""
    if value is None or math.isnan(value):
        return "—"
    return f'<data value="{value:.9g}">{_fixed(value) if text is None else text}</data>'


def _interval(x: Interval | None) -> str:
    if x is None or math.isnan(x.value):
        return "—"
    return f"{x.value:.3f} [{_fixed(x.low)}, {_fixed(x.high)}]"


def _fixed(x: float) -> str:
    return "—" if math.isnan(x) else f"{x:.3f}"


def _number(x: float) -> str:
    return "—" if math.isnan(x) else f"{x:.3g}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _halves(line: str) -> tuple[str, str, str]:
    return line.partition(": ")


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


STYLE = """
.five { padding-left: 1.1rem } .five li { margin: .25rem 0; max-width: 60rem }
.bad { color: var(--bad) } .few { color: var(--mixed) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: .6rem 1.5rem }
.grid figure { margin: 0 0 .6rem; min-width: 0 } .live { width: 100%; min-height: 9rem }
.below figure { max-width: 60rem } .below .live { min-height: 14rem }
.wide { max-height: 30rem; overflow: auto } thead th { position: sticky; top: 0; background: var(--paper) }
th[scope="row"], data { white-space: nowrap }
.pair { display: grid; grid-template-columns: minmax(0, 1.5fr) minmax(0, 1fr); gap: 1.5rem }
.only [data-alarms="0"] { display: none }
th button { border: 0; padding: 0; font-weight: inherit; background: none; text-align: left }
th[aria-sort="ascending"] button::after { content: " \\2191" } th[aria-sort="descending"] button::after { content: " \\2193" }
@media (max-width: 62rem) { .pair { grid-template-columns: minmax(0, 1fr) } }
@media print { .wide { max-height: none } }
"""

SCRIPT = """
const places = [...document.querySelectorAll('[data-figure]')];
async function drawAll() {
  if (!document.getElementById('vega')) return;
  for (const place of places) await drawn(place, specOf(place.dataset.figure));
  document.body.dataset.drawn = places.length;
}
drawAll();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawAll);
const only = document.getElementById('only');
if (only) only.addEventListener('change', () => only.closest('section').classList.toggle('only', only.checked));
for (const form of document.forms) form.addEventListener('submit', event => event.preventDefault());
const valueOf = (row, column) => {
  const cell = row.cells[column], data = cell.querySelector('data');
  return data ? Number(data.value) : Number.isNaN(Number(cell.textContent)) ? cell.textContent : Number(cell.textContent);
};
for (const table of document.querySelectorAll('#corrections table, #baselines table')) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const rows = [...table.tBodies[0].rows], last = row => typeof valueOf(row, column) === 'string' && column > 0;
      rows.sort((a, b) => last(a) - last(b) || (up ? 1 : -1) * (valueOf(a, column) > valueOf(b, column) ? 1 : -1));
      table.tBodies[0].append(...rows);
    });
  });
}
"""
