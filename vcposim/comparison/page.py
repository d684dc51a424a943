"""The page of a comparison: one file, in which a reader sorts, searches, and picks the estimators that figures show.

It needs nothing but itself. Equal comparisons give equal bytes; CPU times, which are never equal, are read from
`cost.js` where that lies beside the page. Every text that comes from a user is escaped.
"""

import json
from collections.abc import Sequence
from html import escape
from typing import TypedDict

import numpy as np

from vcposim.comparison.design import ENVIRONMENTS, LAGS, PROBLEM_GROUP_SIZE, LearningSetting, TransformerSetting
from vcposim.comparison.result import (
    MODES,
    ComparedEstimator,
    ComparisonReport,
    RegimeSummary,
    because,
    by_rank,
    counted,
    moments_of,
    staled,
    trained_rows,
    unjudged,
    values_of,
)
from vcposim.pages.parts import document
from vcposim.pages.plots import COLORS

GENERATOR = "vcposim compare"
FIRST = 5
"""estimators that the figures show until a reader picks others"""
MOST_NAMED = 12
"""of more than so many asked for, the table tells the words"""
METRICS = {
    "efficiency": "descent efficiency D: share of the best step's sure gain; negative downhill",
    "bias": "|bias| / |gradient|",
    "variance": "variance of the mean / |gradient|^2",
    "mse": "mean squared error / |gradient|^2",
    "cosine": "cosine of mean and gradient",
}


def page(result: ComparisonReport) -> str:
    """The comparison as HTML."""
    rows = by_rank(result["estimators"])
    named = [row for row in rows if row["named"]]
    board = result["leaderboard"]
    origin = (
        f"{len(named)} were run for this page, the others come from the leaderboard of {escape(board['date'])}, with the "
        "same tasks, seeds and random numbers."
        if board
        else "All were run for this page, with the same tasks, seeds and random numbers."
    )
    note = (
        ""
        if result["size"] == "full"
        else f'<p class="note">Size {escape(result["size"])}: a part of the full grid, with few seeds. What they do not '
        "decide reads undecided.</p>\n"
    )
    body = (
        f"<h1>Estimators compared</h1>\n<p>{len(rows)} estimators. {origin} Intervals are 95% and resample seeds; "
        f"{result['comparisons_corrected_together']} comparisons are corrected together (Holm, 5%). "
        f"A difference of success probabilities matters from {result['margin']:g} on.</p>\n{note}"
        + (_asked(named, result) if len(named) <= MOST_NAMED else "")
        + _ranking(rows, result)
        + _transformers(rows, result)
        + _figures(result)
        + _not_judged(rows)
        + _method(result)
    )
    links = {"asked": "asked for"} if len(named) <= MOST_NAMED else {}
    links |= {"ranking": "ranking"} | ({"transformers": "transformers"} if trained_rows(rows) else {})
    links |= {"figures": "figures", "unjudged": "not judged", "method": "method"}
    shown = [row["name"] for row in [*named[:FIRST], *(r for r in rows if not r["named"])][:FIRST]]
    if board and result["reference"] not in shown:
        shown[-1] = result["reference"]
    data = {
        "rows": [_drawn(row, result["regimes"]) for row in rows],
        "at": result["profile_at"],
        "regimes": result["regimes"],
        "lags": list(LAGS),
        "shown": shown,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    body += f'<script type="application/json" id="data">{text}</script>\n<script src="cost.js"></script>\n'
    # classes c0, c1, ... in the colors of every page
    light, dark = (" ".join(f".c{i} {{ color: {x} }}" for i, x in enumerate(COLORS[m])) for m in ("light", "dark"))
    return document(
        title="vcposim: estimators compared",
        generator=GENERATOR,
        links=links,
        body=body,
        specs={},
        style=f"{STYLE}{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n",
        script=SCRIPT,
    )


class DrawnLearning(TypedDict):
    """What the figures draw of learning: a profile, and mean, smallest and largest seed by regime."""

    profile: list[float] | None
    regimes: list[list[float] | None]


class DrawnEstimator(TypedDict):
    """What the figures draw of an estimator."""

    name: str
    moments: dict[str, dict[str, float] | str]
    own: DrawnLearning
    common: DrawnLearning


def _drawn(row: ComparedEstimator, regimes: Sequence[str]) -> DrawnEstimator:
    def learning(mode: str) -> DrawnLearning:
        values = [values_of(row["learning"][r], mode) for r in regimes]
        return {
            "profile": row["summary"][mode]["profile"] if mode in row["summary"] else None,
            "regimes": [None if x is None else [round(float(np.mean(x)), 4), min(x), max(x)] for x in values],
        }

    moments = moments_of(row["moments"])
    return {"name": row["name"], "moments": moments, "own": learning("own"), "common": learning("common")}


def _badge(word: str) -> str:
    return f'<span class="badge {word.replace(" ", "-")}">{word}</span>'


def _asked(named: Sequence[ComparedEstimator], result: ComparisonReport) -> str:
    """Those asked for: a word for every claim, and what it rests on."""
    cards = []
    for row in named:
        lines = []
        for claim, statement in result["claims"].items():
            if row["name"] == result["reference"] and claim in (*MODES, "trained"):
                continue
            lines.append(
                f"<li>{_badge(row['words'][claim])} {escape(statement)}{escape(because(row, claim))}"
                f"{_comparisons(row, claim)}</li>"
            )
        place = "no rank: not judged everywhere"
        if own := row["summary"].get("own"):
            place = "rank {} [{}, {}] of {}".format(*own["rank"], own["best_of"])
        cards.append(
            f"<article><h3>{escape(row['name'])}</h3><p>{place} at its own best step size</p>"
            f"<ul>{''.join(lines)}</ul></article>\n"
        )
    return f'<section id="asked"><h2>Asked for</h2>\n<div class="cards">{"".join(cards)}</div></section>\n'


def _comparisons(row: ComparedEstimator, claim: str) -> str:
    if "comparisons" not in row or claim not in row["comparisons"]:
        return ""
    known = row["comparisons"][claim]
    if not any("difference" in c for c in known.values()):
        return ""
    lines = []
    for regime, c in known.items():
        cell = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*c["difference"]) if "difference" in c else ""
        lines.append(f'<tr><th scope="row">{escape(regime)}</th><td>{_badge(c["word"])}</td><td>{cell}</td></tr>')
    label, what = escape(f"{row['name']}, {MODES.get(claim, 'transformers')}"), "regime" if claim in MODES else "task"
    return (
        f'<details><summary>by {what}</summary><div class="wide" tabindex="0" role="region" aria-label="{label}"><table>'
        f'<thead><tr><th scope="col">{what}</th><th scope="col">word</th><th scope="col">difference</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _ranking(rows: Sequence[ComparedEstimator], result: ComparisonReport) -> str:
    """The table that is sorted and searched; sorted as it comes by rank at the own best step size."""
    heads = (
        ("show", "in the figures"),
        ("rank", "at the own best step size, with its 95% interval"),
        ("estimator", ""),
        ("own best", "interquartile mean of success probabilities over regimes and seeds, own best step size"),
        (f"at {result['common_step_size']:g}", "the same at the common step size"),
        ("lost", "runs that collapsed, of all step sizes, regimes and seeds"),
        ("laws", "kept of those that could be tried; ! if one that it must keep is broken"),
        ("bias", f"|bias| / |gradient|, exact, strings at lag {LAGS[-1]}"),
        ("D", f"descent efficiency, exact, strings at lag {LAGS[-1]}; negative if the mean points downhill"),
        ("cost", f"CPU time of an update over that of {result['reference']}, from cost.js"),
    )
    head = "".join(
        f'<th scope="col"{f" title={json.dumps(escape(says))}" if says else ""}>'
        + (name if name == "show" else f'<button type="button" class="sort" data-column="{i}">{name}</button>')
        + "</th>"
        for i, (name, says) in enumerate(heads)
    )
    return (
        '<section id="ranking"><h2>Ranking</h2>\n<form id="filters" role="search" aria-label="Filter estimators">'
        '<label>Search <input type="search" id="search" autocomplete="off"></label>'
        '<label><input type="checkbox" id="only"> only those asked for</label><span id="count" role="status"></span></form>\n'
        '<div class="wide" tabindex="0" role="region" aria-label="Ranking"><table id="table"><thead><tr>'
        f"{head}</tr></thead>\n<tbody>{''.join(_line(row) for row in rows)}</tbody></table></div></section>\n"
    )


def _transformers(rows: Sequence[ComparedEstimator], result: ComparisonReport) -> str:
    """A line for each estimator and task, where transformers were asked for."""
    lines = []
    for one in trained_rows(rows):
        shown = '<td colspan="2">not judged</td>'
        if one.value is not None:
            refused = f"; {one.refused} updates without a finite gradient" if one.refused else ""
            shown = f"<td>{_bar(one.value, one.low, one.high)}</td><td>{one.lost} of {one.runs}{refused}</td>"
        apart = "" if one.difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one.difference)
        word = _badge(one.word) if one.word else ""
        lines.append(
            f'<tr><th scope="row">{escape(one.estimator)}</th><td>{escape(one.task)}</td>{shown}<td>{apart}</td>'
            f"<td>{word}</td></tr>\n"
        )
    if not lines:
        return ""
    heads = ("estimator", "task", "success", "lost", f"difference from {escape(result['reference'])}", "word")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        '<section id="transformers"><h2>Transformers</h2>\n<p>Success rate on held-out problems, averaged over training; the '
        "bar spans the seeds. All were run for this page, those of the reference too; ranks do not rest on them.</p>"
        '<div class="wide" tabindex="0" role="region" aria-label="Transformers"><table><thead><tr>'
        f"{head}</tr></thead>\n<tbody>{''.join(lines)}</tbody></table></div></section>\n"
    )


def _bar(value: float, low: float, high: float) -> str:
    """A value in [0, 1] with its interval, drawn and in figures."""
    return (
        f'<svg class="bar" viewBox="0 0 80 12" width="80" height="12" aria-hidden="true"><line x1="0" x2="80" y1="6" '
        f'y2="6" class="rail"/><line class="span" x1="{80 * low:.1f}" x2="{80 * high:.1f}" y1="6" y2="6"/>'
        f'<circle cx="{80 * value:.1f}" cy="6" r="3"/></svg><span title="[{low:.3f}, {high:.3f}]">{value:.3f}</span>'
    )


def _line(row: ComparedEstimator) -> str:
    own, common, laws = row["summary"].get("own"), row["summary"].get("common"), counted(row["laws"])
    learned = [x for x in row["learning"].values() if "own" in x]
    lost, runs = sum(x["lost"] for x in learned), sum(x["runs"] for x in learned)

    def cell(value: float | None, text: str) -> str:
        return f'<td data-value="{"" if value is None else f"{value:.6g}"}">{text}</td>'

    def score(found: RegimeSummary | None) -> str:
        if found is None:
            return cell(None, "not judged")
        value, low, high = found["score"]
        return cell(value, _bar(value, low, high))

    bias, efficiency = staled(row, "bias"), staled(row, "efficiency")
    rank = own["rank"] if own else None
    name = escape(row["name"])
    return (
        f'<tr data-named="{int(row["named"])}"><td><input type="checkbox" class="pick" value="{name}" '
        f'aria-label="show {name}"></td>'
        + cell(rank[0] if rank else None, f"{rank[0]} <small>[{rank[1]}, {rank[2]}]</small>" if rank else "-")
        + f'<th scope="row">{name}</th>{score(own)}{score(common)}'
        + cell(lost if runs else None, f"{lost} of {runs}" if runs else "-")
        + cell(laws["kept"] / max(laws["tried"], 1), f"{laws['kept']}/{laws['tried']}{'!' * bool(laws['broken'])}")
        + cell(bias, _short(bias))
        + cell(efficiency, _short(efficiency))
        + f'<td class="cost" data-name="{name}" data-value=""></td></tr>\n'
    )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{0 if abs(value) < 1e-9 else value:.3g}"


def _figures(result: ComparisonReport) -> str:
    modes = "".join(f'<option value="{mode}">{words}</option>' for mode, words in MODES.items())
    metrics = "".join(f'<option value="{key}">{escape(words)}</option>' for key, words in METRICS.items())
    problems = "".join(f'<option value="{name}">{name}</option>' for name in reversed(ENVIRONMENTS))
    return (
        '<section id="figures"><h2>Figures</h2>\n<p>Of the estimators ticked in the table, six at most.</p>'
        '<p id="legend" role="status"></p><noscript><p>Figures are drawn by script.</p></noscript>\n'
        f'<form aria-label="Figures of learning"><label>Learning at the <select id="mode">{modes}</select></label></form>'
        '<div class="pair"><figure><div class="wide" id="profile" tabindex="0"></div><figcaption>Performance profile: share of runs '
        "(regime x seed) above each success probability. Higher is better; curves that cross have no order.</figcaption>"
        '</figure><figure><div class="wide" id="regimes" tabindex="0"></div><figcaption>Success probability by regime, mean, smallest and '
        "largest seed.</figcaption></figure></div>\n"
        f'<form aria-label="Figures of moments"><label>Exact, on <select id="problem">{problems}</select></label>'
        f'<label>show <select id="metric">{metrics}</select></label></form>'
        '<figure><div class="wide" id="lags" tabindex="0"></div><figcaption>Exact moments of the mean of a group of '
        f"{PROBLEM_GROUP_SIZE} over lag, by listing every batch.</figcaption></figure></section>\n"
    )


def _not_judged(rows: Sequence[ComparedEstimator]) -> str:
    items = "".join(
        f"<li><b>{escape(row['name'])}</b>, {escape(parts)}: {escape(reason)}</li>"
        for row in rows
        for reason, parts in unjudged(row).items()
    )
    text = f"<ul>{items}</ul>" if items else "<p>Nothing: everything could be measured.</p>"
    return f'<section id="unjudged"><h2>Not judged</h2>\n{text}</section>\n'


def _method(result: ComparisonReport) -> str:
    learning = next(s for s in result["settings"] if isinstance(s, LearningSetting))
    trained = [s for s in result["settings"] if isinstance(s, TransformerSetting)]
    facts = {
        "Learning": f"{len(result['regimes'])} regimes, step sizes {', '.join(f'{x:g}' for x in learning.step_sizes)}, "
        f"{len(learning.seeds)} seeds, {learning.updates} updates of {learning.groups} groups of "
        f"{learning.group_size}, Adam, a network of two layers; the value is the exact success probability averaged "
        "over training. Each half of the seeds is judged at the step size that the other half chose.",
        "Score": "interquartile mean over regimes and seeds (Agarwal et al. 2021, arXiv 2108.13264); ranks and intervals "
        "resample seeds, the same for every estimator.",
    }
    if trained:
        first = trained[0]
        tasks = ", ".join(one.task for one in trained)
        steps = ", ".join(f"{x:g}" for x in first.step_sizes)
        facts["Transformers"] = (
            f"{tasks}; a character Llama of {first.layers} layers and width {first.hidden}, warmed up to a "
            f"success rate of {first.base_rate:g} and the same for all; lag {first.lag}, step sizes {steps}, "
            f"{len(first.seeds)} seeds, {first.updates} updates of {first.groups} groups of {first.group_size}, Adam; "
            f"{first.held_out} held-out problems before the first and after each {first.every}th update."
        )
    facts |= {
        "Laws": "vcposim.testing; vcposim check NAME shows the smallest counterexample.",
        "Size": result["size"],
        "Settings SHA-256": result["settings_sha256"],
        "Source SHA-256": result["source_sha256"],
        "vcposim": result["vcposim"],
        "Python": result["python"],
        "Packages": ", ".join(f"{name} {version}" for name, version in result["packages"].items()),
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f'<section id="method"><h2>Method and provenance</h2>\n<dl>{items}</dl></section>\n'


STYLE = """
.holds { color: var(--good) } .holds-if { color: var(--mixed) } .fails { color: var(--bad) }
.undecided { color: var(--open); border-style: dashed } .not-judged { color: var(--mute); border-style: dotted }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem; min-width: 0 }
h3 { font-size: 1rem; margin: .2rem 0; overflow-wrap: anywhere } article ul { padding-left: 0; list-style: none }
article li { margin: .35rem 0; font-size: .9rem; overflow-wrap: anywhere }
.bar { vertical-align: -1px; margin-right: .4rem } .bar .span { stroke: var(--ink); stroke-width: 2 }
.bar .rail { stroke: var(--line) } .bar circle { fill: var(--ink) }
#table td, #table th { white-space: nowrap; font-variant-numeric: tabular-nums } #table th[scope=row] { font-weight: 400 }
#table tr[data-named="1"] th[scope=row] { font-weight: 700 }
.sort { border: 0; padding: 0; background: none; font-weight: 600; text-decoration: underline dotted }
.sort[aria-sort] { text-decoration: underline }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.5rem }
#legend span { margin-right: 1rem; overflow-wrap: anywhere } #legend i { display: inline-block; width: 1.4rem; height: 0;
  border-top: 3px solid; margin-right: .3rem; vertical-align: .25rem }
.chart text { fill: var(--ink); font-size: 11px } .chart .axis { stroke: var(--mute) } .chart .grid { stroke: var(--line) }
.chart .mark { stroke: currentColor; fill: none; stroke-width: 2 } .chart .dot { fill: currentColor; stroke: none }
select { max-width: 100% } form label { max-width: 100% }
@media (max-width: 62rem) { .pair { grid-template-columns: minmax(0, 1fr) } }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent), byName = new Map(data.rows.map(r => [r.name, r]));
const $ = id => document.getElementById(id), body = $('table').tBodies[0], lines = [...body.rows], most = 6;
const picks = [...document.querySelectorAll('.pick')];
if (typeof vcposimCost !== 'undefined') for (const cell of document.querySelectorAll('.cost')) {
  const value = vcposimCost[cell.dataset.name];
  if (value != null) { cell.textContent = value.toFixed(1) + 'x'; cell.dataset.value = value; }
}
function filter() {
  const asked = $('search').value.trim().toLowerCase();
  let shown = 0;
  for (const line of lines) {
    const name = line.querySelector('th').textContent.toLowerCase();
    line.hidden = !name.includes(asked) || ($('only').checked && line.dataset.named !== '1');
    shown += !line.hidden;
  }
  $('count').textContent = shown + ' of ' + lines.length;
}
$('filters').addEventListener('input', filter);
for (const form of document.forms) form.addEventListener('submit', event => event.preventDefault());
document.querySelector('#table thead').addEventListener('click', event => {
  const button = event.target.closest('.sort');
  if (!button) return;
  const column = +button.dataset.column, head = button.parentElement;
  const up = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
  for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up === 1 ? 'ascending' : 'descending');
  const key = line => { const cell = line.cells[column], v = cell.dataset.value;
    return v === undefined ? cell.textContent : v === '' ? null : +v; };
  const order = (a, b) => { const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);  // what is not judged stays last
    return up * (typeof x === 'string' ? x.localeCompare(y) : x - y); };
  lines.sort(order).forEach(line => body.append(line));
});
const NS = 'http://www.w3.org/2000/svg';
function put(parent, tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
function ticks(low, high) {
  const span = high - low || 1, step = 10 ** Math.floor(Math.log10(span / 3)), found = [];
  const by = [1, 2, 5, 10].map(m => m * step).find(s => span / s <= 6);
  for (let at = Math.ceil(low / by - 1e-9) * by; at <= high + 1e-9 * span; at += by) found.push(+at.toPrecision(12));
  return found;
}
function chart(place, label, series, {names, low, high, xlabel, ylabel}) {
  const W = 560, H = 300, left = 52, right = 12, top = 10, bottom = names ? 66 : 44;
  const values = series.flatMap(s => s.points.flatMap(p => p.slice(1))).filter(v => v !== null && Number.isFinite(v));
  const y0 = low ?? Math.min(0, ...values), y1 = high ?? (Math.max(...values, y0 + 1e-9) * 1.05 || 1);
  const xs = names ? names.map((_, i) => i) : series.flatMap(s => s.points.map(p => p[0]));
  const x0 = names ? -.5 : Math.min(...xs), x1 = names ? names.length - .5 : Math.max(...xs);
  const X = v => left + (W - left - right) * (v - x0) / (x1 - x0 || 1), Y = v => H - bottom - (H - top - bottom) * (v - y0) / (y1 - y0);
  place.replaceChildren();
  const svg = put(place, 'svg', {viewBox: `0 0 ${W} ${H}`, width: '100%', class: 'chart', role: 'img', 'aria-label': label,
    style: 'min-width: 420px; max-width: 760px'});
  for (const v of ticks(y0, y1)) {
    put(svg, 'line', {class: 'grid', x1: left, x2: W - right, y1: Y(v), y2: Y(v)});
    put(svg, 'text', {x: left - 6, y: Y(v) + 4, 'text-anchor': 'end'}, String(v));
  }
  if (names) names.forEach((name, i) => name.split(', ').forEach((part, line) =>
    put(svg, 'text', {x: X(i), y: H - bottom + 15 + 13 * line, 'text-anchor': 'middle'}, part)));
  else for (const v of ticks(x0, x1)) put(svg, 'text', {x: X(v), y: H - bottom + 16, 'text-anchor': 'middle'}, String(v));
  put(svg, 'line', {class: 'axis', x1: left, x2: W - right, y1: Y(y0), y2: Y(y0)});
  if (xlabel) put(svg, 'text', {x: (left + W) / 2, y: H - 8, 'text-anchor': 'middle'}, xlabel);
  put(svg, 'text', {transform: `translate(12 ${(H - bottom + top) / 2}) rotate(-90)`, 'text-anchor': 'middle'}, ylabel);
  series.forEach((s, i) => {
    const g = put(svg, 'g', {class: 'c' + s.color}), shift = names ? (i - (series.length - 1) / 2) * 5 : 0;
    const known = s.points.filter(p => p[1] !== null);
    if (!names) put(g, 'polyline', {class: 'mark', points: known.map(p => X(p[0]) + ',' + Y(p[1])).join(' ')});
    for (const p of known) {
      if (p.length > 2) put(g, 'line', {class: 'mark', x1: X(p[0]) + shift, x2: X(p[0]) + shift, y1: Y(p[2]), y2: Y(p[3])});
      if (names || s.dots) {
        const dot = put(g, 'circle', {class: 'dot', cx: X(p[0]) + shift, cy: Y(p[1]), r: 3.5});
        put(dot, 'title', {}, `${s.name}: ${p[1]}`);
      }
    }
  });
}
function draw() {
  const chosen = picks.filter(p => p.checked).map(p => byName.get(p.value)), mode = $('mode').value;
  $('legend').replaceChildren(...chosen.map((row, i) => {
    const item = document.createElement('span'), line = document.createElement('i');
    line.className = 'c' + i;
    item.append(line, row.name);
    return item;
  }));
  const of = points => chosen.map((row, color) => ({name: row.name, color, dots: true, points: points(row)}));
  const profiles = of(row => (row[mode].profile || []).map((y, i) => [data.at[i], y]));
  profiles.forEach(s => s.dots = false);
  chart($('profile'), 'Performance profiles', profiles.filter(s => s.points.length),
    {low: 0, high: 1, xlabel: 'success probability averaged over training', ylabel: 'share of runs above'});
  chart($('regimes'), 'Success probability by regime', of(row => row[mode].regimes.map((v, i) => v === null ? [i, null] : [i, ...v])),
    {names: data.regimes, low: 0, high: 1, ylabel: 'success probability'});
  const metric = $('metric').value, bound = metric === 'cosine' ? {low: -1, high: 1} : metric === 'efficiency' ? {high: 1} : {};
  const moments = of(row => data.lags.map(lag => {
    const found = row.moments[$('problem').value + ', lag ' + lag];
    if (!found || typeof found !== 'object') return [lag, null];
    return [lag, metric === 'efficiency' && found.cosine < 0 ? -found[metric] : found[metric]];  // it points downhill
  }).filter(p => p[1] !== null));
  chart($('lags'), 'Exact moments over lag', moments.filter(s => s.points.length),
    {...bound, xlabel: 'lag, updates', ylabel: $('metric').selectedOptions[0].text.split(':')[0]});
}
for (const pick of picks) pick.checked = data.shown.includes(pick.value);
document.addEventListener('change', event => {
  if (event.target.matches('.pick') && picks.filter(p => p.checked).length > most) event.target.checked = false;
  if (event.target.matches('.pick, select')) draw();
});
filter();
draw();
"""
