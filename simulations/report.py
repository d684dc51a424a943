"""What the records say, for a reader: the verdict table on the terminal, as JSON, and one self-contained HTML page.

The page needs nothing but itself: style, figures for light and dark screens, and Vega-Lite, which draws a figure's data
to be explored once a reader asks for it. Vega-Lite because its plots are data (the same that the static figures are
drawn from), so that one library, embedded once, serves every figure; its bundle (0.9 MB) comes with `vl-convert-python`.
Where that is not installed the page has the static figures only. Equal sections give equal bytes: the page shows of the
provenance what determines the records, not when or where they were made. Everything from an experiment is escaped.
"""

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from simulations import claims
from simulations.protocol import WITNESSES, WORDS, Experiment, Verdict, one_line
from simulations.summaries import Section, against_full, load_section, once_each, picture
from simulations.verdicts import JudgedComparison, shown
from vcposim.errors import InputError
from vcposim.pages import parts
from vcposim.pages.parts import bundle, document, glossary_section, is_page, prose
from vcposim.pages.plots import vega

GENERATOR = "vcposim simulations"
COLOR = {"holds": "green", "holds if": "yellow", "fails": "red", "undecided": "blue", "not judged": "dim"}
FIRST = ("best_step_size", "async_learning", "baselines_under_lag")
"""whose figure stands beside the claims, the first that is there"""
GLOSSARY = {
    **parts.GLOSSARY,
    "AUROC": "probability that a run that collapses soon scores above one that does not; 0.5 is guessing",
    "IQM": "interquartile mean: mean of the middle half of the runs",
    "lost": "collapsed: from some update to its end the run stays below half of its own best",
    "seeds": "the unit that was randomised; intervals resample it",
    "Holm": "correction for several comparisons: together they are wrong with probability at most 5%",
}


@dataclass(frozen=True)
class Findings:
    """Everything found under a folder, an experiment once; paths of incomplete runs."""

    sections: list[Section]
    incomplete: list[Path] = field(default_factory=list)


def load(root: Path, experiments: Mapping[str, Experiment], summaries: Mapping[str, Section]) -> Findings:
    """Analyse every complete run in `root` and up to two folders below; what was run only in part is summarised.

    A full run takes the place of the committed summary; reduced ones say only what the full one says.

    Raises:
        InputError: if there is no complete run, a run is of an unknown experiment, or a record file is damaged.
    """
    patterns = ("provenance.json", "*/provenance.json", "*/*/provenance.json")
    paths = [path.parent for pattern in patterns for path in sorted(root.glob(pattern))]
    complete = [path for path in paths if (path / "results.jsonl").exists()]
    if not complete:
        what = "only incomplete runs" if paths else "no run"
        raise InputError(f"DIR: {root} holds {what}; start with: python -m simulations run quick")
    return gathered(
        [load_section(path, experiments) for path in complete], summaries, [p for p in paths if p not in complete]
    )


def gathered(
    sections: Sequence[Section], summaries: Mapping[str, Section], incomplete: Sequence[Path] = ()
) -> Findings:
    """Sections of runs and committed summaries together, an experiment once."""
    full = {**summaries, **{s.id: s for s in sections if s.settles}}
    settled = [against_full(s, full.get(s.id)) for s in sections]
    return Findings(once_each([*settled, *summaries.values()]), list(incomplete))


# --- the verdict table --------------------------------------------------------------------------------------------


def verdict_rows(sections: Sequence[Section]) -> list[tuple[Verdict, Section]]:
    """All verdicts, by number of the claim, then by experiment."""
    rows = [(verdict, section) for section in sections for verdict in section.verdicts]
    return sorted(rows, key=lambda row: (int(row[0].claim[1:]), row[1].name))


def verdict_json(sections: Sequence[Section]) -> dict[str, Any]:
    """The verdict table for machines."""
    rows = [vars(v) | {"experiment": section.id, "size": section.size} for v, section in verdict_rows(sections)]
    return {"verdicts": rows, "errors": {s.name: s.error for s in sections if s.error}}


def verdict_table(sections: Sequence[Section]) -> Table:
    """The verdict table for a terminal."""
    table = Table(title="Verdicts", title_justify="left", show_lines=True)
    for heading, ratio in (("Claim", 2), ("Verdict", 3), ("Statement", 8), ("Number", 5), ("Experiment", 4)):
        table.add_column(heading, ratio=ratio, no_wrap=heading == "Verdict", overflow="fold")
    for verdict, section in verdict_rows(sections):
        statement = Text(verdict.statement)
        if verdict.condition:
            statement.append(f"\nif: {verdict.condition}", style="italic")
        word = Text(verdict.verdict, style=f"bold {COLOR[verdict.verdict]}")
        table.add_row(
            Text(f"{'beside ' * verdict.beside}{verdict.claim}"),
            word,
            statement,
            Text(verdict.number),
            Text(section.name),
        )
    return table


def standing_table(section: Section) -> Table:
    """Where estimators of anyone's stand among an experiment's methods, for a terminal."""
    table = Table(title=f"{section.name}: {section.question}", title_justify="left")
    headings, *rows = section.standing
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        style = "bold" if row[0] in section.estimators else ""
        table.add_row(*(Text(cell, style=style) for cell in row))
    return table


def claim_rows(sections: Sequence[Section], proofs: Mapping[str, dict[str, Any]]) -> list[claims.ClaimRow]:
    """One row a claim, as `python -m simulations claims --json` prints them."""
    return claims.table([(s.id, v) for s in sections if not s.estimators for v in s.verdicts], proofs)


WIDE = 120
"""columns of a terminal from which the claims have a column for each kind of witness"""


def claim_table(rows: Sequence[Mapping[str, Any]], width: int = WIDE) -> Table:
    """The claims for a terminal of this width, one row each; no word is cut: a narrow terminal has fewer columns."""
    wide = width >= WIDE
    table = Table(title="Claims", title_justify="left", box=box.HEAVY_HEAD if wide else box.SIMPLE_HEAD, pad_edge=wide)
    whole = ("Claim", "Verdict", "Decided by")
    for heading in (*whole[:2], "What is claimed", "Number that decides", *((whole[2], "Witnesses") if wide else ())):
        table.add_column(heading, no_wrap=heading in whole, overflow="fold")
    short = {"holds": "+", "fails": "-", "holds if": "+/-", "undecided": "?", "not judged": "."}
    for row in rows:
        words = {
            kind: [short[w["word"]] for w in row["witnesses"] if w["kind"] == kind and not w["beside"]]
            for kind in WITNESSES
        }
        lines = [" ".join([kind, *marks]) for kind, marks in words.items() if set(marks) != {"."}]
        start = [row["claim"], Text(row["verdict"], style=f"bold {COLOR[row['verdict']]}")]
        by = (row["decided_by"] or "").replace("/", "/\n")  # the question below its experiment
        end = [row["number"], by, "\n".join(lines)]
        cells = [*start, claims.BY_ID[row["claim"]].title, *(end if wide else [f"{row['number']}\n{by}".strip()])]
        table.add_row(*(Text(c) if isinstance(c, str) else c for c in cells))
    marks = "witnesses: + holds, - fails, +/- holds if, ? undecided, . not judged; without a line where there is none"
    table.caption = marks if wide else f"each witness: --json, or a terminal of {WIDE} columns"
    return table


# --- the page -----------------------------------------------------------------------------------------------------


def page(findings: Findings, proofs: Mapping[str, dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """The HTML page, and the tracebacks of figures that could not be drawn, by section and figure name."""
    problems: dict[str, str] = {}
    specs: dict[str, Any] = {}
    library = bundle()
    sections = findings.sections
    drawn = {s.name: [_figure(s, f, problems, specs if library else None) for f in s.figures] for s in sections}
    rows = claim_rows(sections, proofs)
    first = next((s for name in FIRST for s in sections if s.id == name and drawn[s.name]), None)
    first = first or next((s for s in sections if drawn[s.name]), None)
    reduced = [s.id for s in sections if s.size != "full" and not s.estimators]
    banner = (
        f'<p class="note">Reduced runs only, which settle nothing: {escape(", ".join(reduced))}. '
        "Their verdicts read undecided unless a full run says the same.</p>"
        if reduced
        else ""
    )
    count = ", ".join(f"{n} {w}" for w in WORDS if (n := sum(r["verdict"] == w for r in rows)))
    body = (
        f"<h1>What is true of stable asynchrony</h1>\n"
        f"<p>20 claims: {count}. Every word and number was computed from checks and records; bars are 95% intervals that "
        f"resample seeds, the upright line is the boundary (reference and margin). Words are corrected for several "
        f"comparisons (Holm, 5%), the family being all comparisons of one experiment that have an interval; the bars are "
        f"not, nor is a claim's word for the experiments it combines.</p>\n{banner}"
        f'<div class="first"><section id="claims" aria-labelledby="claims-title"><h2 id="claims-title">Claims</h2>\n'
        f"{_filters()}{''.join(_claim(row, sections) for row in rows)}"
        f'<p id="none" hidden>No claim matches.</p></section>\n'
        f"{_aside(first, drawn)}</div>\n"
        f"{''.join(_section(s, drawn[s.name]) for s in sections)}"
        f"{glossary_section(GLOSSARY)}"
    )
    links = {"claims": "claims"} | {_anchor(s): ", with ".join((s.id, *s.estimators)) for s in sections}
    text = document(
        title="vcposim: verdicts", generator=GENERATOR, links=links, body=body, specs=specs, style=STYLE, script=SCRIPT
    )
    return text, problems


def is_report(path: Path) -> bool:
    """Whether a file is a page of this module."""
    return is_page(path, GENERATOR)


def _anchor(section: Section) -> str:
    return re.sub(r"[^\w-]+", "-", "-".join((section.id, section.size, *section.estimators)))


def _badge(word: str) -> str:
    return f'<span class="badge {word.replace(" ", "-")}">{word}</span>'


def _prose(text: str) -> str:
    return prose(text, GLOSSARY)


def _filters() -> str:
    words = "".join(
        f'<label><input type="checkbox" name="word" value="{w.replace(" ", "-")}" checked> {w}</label>' for w in WORDS
    )
    kinds = "".join(f'<option value="{k}">{k}</option>' for k in WITNESSES)
    return (
        f'<form id="filters" role="search" aria-label="Filter claims"><fieldset><legend>Verdict</legend>{words}</fieldset>'
        f'<label>Witness <select id="witness"><option value="">any</option>{kinds}</select></label>'
        f'<label>Search <input type="search" id="search" autocomplete="off"></label></form>\n'
    )


def _bar(c: JudgedComparison, boundary: float) -> str:
    """An interval against its boundary, small enough for a line of text."""
    low, value, high = c["low"], c["value"], c["high"]
    left, right = min(low, boundary), max(high, boundary)
    span = (right - left) or abs(right) or 1.0
    left, span = left - 0.08 * span, 1.16 * span

    def x(v: float) -> str:
        return f"{2 + 106 * (v - left) / span:.1f}"

    label = escape(f"{shown(c)}; boundary {boundary:.3g}")
    return (
        f'<svg class="bar" viewBox="0 0 110 16" width="110" height="16" role="img" aria-label="{label}">'
        f'<line class="edge" x1="{x(boundary)}" x2="{x(boundary)}" y1="0" y2="16"/>'
        f'<line class="span" x1="{x(low)}" x2="{x(high)}" y1="8" y2="8"/>'
        f'<circle cx="{x(value)}" cy="8" r="3"/></svg>'
    )


def _claim(row: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """One claim: a line, and what is behind it."""
    claim = claims.BY_ID[row["claim"]]
    by_source = {f"{s.id}/{v.key}": (v, s) for s in sections if not s.estimators for v in s.verdicts}
    bar = ""
    number = row["number"]
    if row["decided_by"] in by_source:
        v = by_source[row["decided_by"]][0]
        c = claims.comparison(v)
        if "value" in c and v.rule:
            bar, number = _bar(c, v.rule["boundary"]), shown(c)
    elif row["decided_by"]:
        number = f"{row['decided_by']}, proved"
    kinds = {w["kind"] for w in row["witnesses"] if w["word"] != "not judged" and not w["beside"]}
    items = []
    for w in row["witnesses"]:
        source = escape(w["source"])
        if w["source"] in by_source:
            source = f'<a href="#{_anchor(by_source[w["source"]][1])}">{source}</a>'
        items.append(
            f"<li>{_badge(w['word'])} <em>{w['kind']}{', beside the claim' * w['beside']}</em> {source}: {_prose(w['statement'])}"
            f"{': ' + escape(w['number']) if w['number'] else ''}</li>"
        )
    word = row["verdict"]
    return (
        f'<details class="claim" id="{claim.id}" data-word="{word.replace(" ", "-")}" data-kinds="{" ".join(sorted(kinds))}">'
        f'<summary><b>{claim.id}</b><span class="title">{escape(claim.title)}</span>{_badge(word)}'
        f'<span class="cell">{bar}</span><span class="number">{escape(number)}</span></summary>\n'
        f"<p>{_prose(claim.statement)}</p><p><small>Source: {escape(claim.source)}. Refuted by: "
        f"{escape(claim.refuted_by)}</small></p><p>{escape(row['number'])}</p><ul>{''.join(items)}</ul></details>\n"
    )


def _aside(first: Section | None, drawn: Mapping[str, Sequence[str]]) -> str:
    if first is None:
        return ""
    figure = re.sub(r'<button.*?</button>|<div class="live".*?</div>', "", drawn[first.name][0])
    return f'<aside aria-label="A figure"><p><a href="#{_anchor(first)}">{escape(first.question)}</a></p>{figure}</aside>\n'


def _section(section: Section, figures: Sequence[str]) -> str:
    notes = []
    if section.estimators:
        notes.append("With estimators that are not of the experiment: it settles no claim.")
    elif section.size != "full":
        notes.append("A reduced run: it can agree with the full one or be undecided; it settles nothing.")
    if section.error:
        notes.append(f"The analysis failed: {section.error}")
    if section.source_changed:
        notes.append("The source has changed since these records were made.")
    note = "".join(f'<p class="note">{escape(text)}</p>\n' for text in notes)
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _facts(section))
    also = ""
    if section.beside:
        words = "; ".join(f"{v.key or v.claim}: {v.verdict}" for v in section.beside.verdicts)
        also = f"<p><small>The reduced run says: {escape(words)}.</small></p>"
    verdicts = "".join(_verdict(v, section.name) for v in sorted(section.verdicts, key=lambda v: int(v.claim[1:])))
    anchors = ", ".join(f'<a href="#{c}">{escape(c)}</a>' for c in section.claims)
    family = sum(c.get("p") is not None for v in section.verdicts for c in v.comparisons)
    corrected = f" {family} comparisons with an interval are corrected together." if family > 1 else ""
    return (
        f'<section id="{_anchor(section)}"><h2>{escape(section.name)}</h2>\n'
        f"<p><strong>{_prose(section.question)}</strong> {section.settings} settings, {section.records} records; claims "
        f"{anchors}.{corrected}</p>\n{note}{also}{_standing(section)}"
        f'<div class="pair"><div>{verdicts}</div><div>{"".join(figures)}</div></div>'
        f"<details><summary>Provenance</summary><dl>{facts}</dl></details></section>\n"
    )


def _standing(section: Section) -> str:
    """Where estimators of anyone's stand among the experiment's methods."""
    if not section.standing:
        return ""
    headings, *methods = section.standing
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headings)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in methods
    )
    label = escape(f"methods of {section.name}")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _verdict(v: Verdict, where: str) -> str:
    """A verdict with its rule and every comparison that it rests on."""
    rows = "".join(
        f'<tr><th scope="row">{escape(c["name"])}</th><td>{_badge(c["word"])}</td><td>{escape(shown(c))}</td>'
        f"<td>{c.get('seeds', '')}</td><td>{_decimal(c.get('power'))}</td><td>{c.get('needed') or ''}</td></tr>"
        for c in v.comparisons
    )
    head = "".join(f'<th scope="col">{h}</th>' for h in ("comparison", "word", "95%", "seeds", "power", "seeds needed"))
    rule = (
        f"<p><small>Rule: {escape(v.rule['text'])}. Interval: {escape(v.rule['method'])}.</small></p>" if v.rule else ""
    )
    more = (
        f"<details><summary>{len(v.comparisons)} comparisons</summary>{rule}"
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(f"{where}, {v.key}")}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{f'<p><small>{escape(v.note)}</small></p>' if v.note else ''}</details>"
        if v.comparisons
        else ""
    )
    condition = f"<p><em>if: {escape(v.condition)}</em></p>" if v.condition else ""
    return (
        f'<div class="verdict"><p>{"beside " * v.beside}<a href="#{v.claim}">{v.claim}</a> {_badge(v.verdict)} {_prose(v.statement)}</p>'
        f'<p class="number">{escape(v.number)}</p>{condition}{more}</div>\n'
    )


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _facts(section: Section) -> Iterator[tuple[str, str]]:
    """What determines the records."""
    about, git = section.provenance, section.provenance.get("git")
    yield "Reproduce", str(about.get("reproduce"))
    changed = " with local changes" if git and git["dirty"] else ""
    yield "Commit", f"{git['commit']}{changed}" if git else "not in a git checkout"
    yield "Source SHA-256", str(about.get("source_sha256"))
    yield "Settings SHA-256", str(about.get("settings_sha256"))
    yield "Python", f"{about.get('python')} on {about.get('platform')}"
    yield "Packages", ", ".join(f"{name} {version}" for name, version in (about.get("packages") or {}).items())


def _figure(section: Section, figure: Mapping[str, Any], problems: dict[str, str], specs: dict[str, Any] | None) -> str:
    """A picture for light and dark screens inside the page, or a note that it could not be drawn."""
    name = f"{section.id}-{figure['name']}"
    live = ""
    try:
        if "error" in figure:
            raise RuntimeError(figure["error"])
        image = f'<img src="{picture(figure)}" alt="{escape(figure["alt"])}" loading="lazy">'
        if specs is not None and "plot" in figure:
            specs[name] = vega(figure["plot"])
            live = (
                f'<button type="button" class="explore" data-figure="{escape(name)}">Explore'
                f'<span class="hidden"> {escape(figure["name"].replace("_", " "))}</span></button>'
                f'<div class="live" id="live-{escape(name)}" hidden></div>'
            )
    except Exception as error:
        problems[f"{section.name}, figure {figure['name']}"] = figure.get("traceback") or traceback.format_exc()
        failed = f"The figure {figure['name']!r} could not be drawn: {figure.get('error') or one_line(error)}"
        image = f'<p class="note">{escape(failed)}</p>'
    return f"<figure>{image}{live}<figcaption>{_prose(figure['caption'])}</figcaption></figure>\n"


STYLE = """
.first h2 { margin-top: .3rem }
.first { display: grid; grid-template-columns: minmax(0, 1.6fr) minmax(0, 1fr); gap: 1.5rem }
.first aside { font-size: .85rem } .first aside img { max-height: 33rem } img[hidden] { display: none }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1.1fr); gap: 1.5rem }
fieldset { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .1rem .7rem } legend { float: left;
  padding: 0 .6rem 0 0 }
#search { width: 11rem }
.claim { border-top: 1px solid var(--line); font-size: .88rem } .claim[open] { background: var(--soft) }
.claim > summary { display: grid; grid-template-columns: 2.2rem minmax(8rem, 1fr) 5.9rem 7.2rem 12.5rem; gap: .5rem;
  align-items: center; list-style: none } .claim > summary::-webkit-details-marker { display: none }
.claim > :not(summary) { margin-left: 2.9rem } .claim ul { padding-left: 1rem }
.holds { color: var(--good) } .holds-if { color: var(--mixed) } .fails { color: var(--bad) }
.undecided { color: var(--open); border-style: dashed } .not-judged { color: var(--mute); border-style: dotted }
.bar { display: block } .bar .edge { stroke: var(--bad); stroke-width: 1.5 } .bar .span { stroke: var(--ink);
  stroke-width: 2 } .bar circle { fill: var(--ink) }
.verdict { border-left: 3px solid var(--line); padding-left: .7rem; margin: 0 0 .8rem } .verdict .number { font-size: .9rem }
@media (max-width: 62rem) { .first, .pair { grid-template-columns: minmax(0, 1fr) } .first aside { order: 2 } }
@media (max-width: 40rem) { .claim > summary { grid-template-columns: 2.2rem minmax(0, 1fr) auto }
  .claim .cell { grid-column: 2 } .claim .number { grid-column: 3; text-align: right; max-width: 9rem }
  .claim > :not(summary) { margin-left: .3rem } }
@media print { .first, .pair { grid-template-columns: 1fr 1fr } figure img { max-height: 14rem }
  .claim > summary { padding: 0 } .verdict { break-inside: avoid } }
"""

SCRIPT = """
const rows = [...document.querySelectorAll('.claim')], form = document.getElementById('filters');
function filter() {
  const words = new Set([...form.querySelectorAll('[name=word]:checked')].map(box => box.value));
  const kind = document.getElementById('witness').value;
  const asked = document.getElementById('search').value.trim().toLowerCase();
  let shown = 0;
  for (const row of rows) {
    const keep = words.has(row.dataset.word) && (!kind || row.dataset.kinds.split(' ').includes(kind))
      && (!asked || row.textContent.toLowerCase().includes(asked));
    row.hidden = !keep;
    shown += keep;
  }
  document.getElementById('none').hidden = shown > 0;
}
form.addEventListener('input', filter);
form.addEventListener('submit', event => event.preventDefault());
addEventListener('hashchange', () => { const to = document.getElementById(location.hash.slice(1));
  if (to && to.tagName === 'DETAILS') to.open = true; });
document.addEventListener('click', async event => {
  const button = event.target.closest('.explore');
  if (!button) return;
  const place = document.getElementById('live-' + button.dataset.figure), picture = button.parentElement.querySelector('img');
  if (!place.hidden) { place.hidden = true; picture.hidden = false; button.firstChild.data = 'Explore'; return; }
  const spec = specOf(button.dataset.figure);
  place.replaceChildren();
  const log = document.createElement('label'), box = document.createElement('input');
  box.type = 'checkbox';
  box.checked = spec.concat.every(p => p.layer[0].encoding.y.scale && p.layer[0].encoding.y.scale.type === 'log');
  log.append(box, ' logarithmic y');
  const view = document.createElement('div');
  const positive = p => p.data.values.every(v => v.y > 0 && !(v.low <= 0));  // a logarithm of what is shown exists
  if (spec.concat.every(p => p.layer[0].encoding.y.scale && positive(p))) place.append(log);
  place.append(view);
  const show = () => {
    for (const p of spec.concat) for (const l of p.layer) if (l.encoding.y && l.encoding.y.scale) {
      l.encoding.y.scale.type = box.checked ? 'log' : 'linear';
      if (box.checked) delete l.encoding.y.scale.zero;
      if (box.checked) delete l.encoding.y.scale.domain;
    }
    return drawn(view, spec);
  };
  box.addEventListener('change', show);
  await show();
  place.hidden = false; picture.hidden = true; button.firstChild.data = 'Static figure';
});
"""
