"""What pages of one file are made of: a skeleton, its style for light and dark screens, and figures to explore.

A page needs nothing but itself. Vega-Lite draws a figure's data (`vcposim.pages.plots`), because its plots are data and
so one library, embedded once, serves every figure; its bundle (0.9 MB) comes with `vl-convert-python`. Where that is
not installed, a page has what does not need it.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vcposim.pages.plots import COLORS

GLOSSARY = {
    "ESS": "effective sample size of the importance weights, (sum w)^2 / sum w^2",
    "OPOB": "off-policy optimal baseline: mean reward weighted by w^2 times the squared score norm",
    "VCPO": "ESS-scaled step and OPOB together",
    "TIS": "truncated importance sampling: weights min(w, cap)",
    "chi2": "chi-squared divergence of target from behavior policy, E[w^2] - 1",
    "k-hat": "Pareto tail index of the weights; above 0.7 their mean cannot be trusted",
    "lag": "learner updates between the policy that sampled the data and the one that learns",
}
"""terms of both pages, explained on hover"""


def document(
    *,
    title: str,
    generator: str,
    links: Mapping[str, str],
    body: str,
    specs: Mapping[str, Any],
    style: str,
    script: str,
) -> str:
    """The page: `links` anchor -> name for the bar on top, `body` what `<main>` holds, `specs` the figures' data.

    Equal arguments give equal bytes.
    """
    bar = "".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name in links.items())
    data = json.dumps(specs, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    figures = (
        f'<script type="application/json" id="specs">{data}</script>\n'
        f'<script type="text/plain" id="vega">{bundle()}</script>\n'
        if specs
        else ""
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{generator}">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{STYLE}{style}</style></head>\n<body>\n"
        f'<nav aria-label="Sections"><a href="#top"><strong>vcposim</strong></a><ul>{bar}</ul></nav>\n'
        f'<main id="top">\n{body}</main>\n{figures}<script>{SCRIPT}{script}</script></body></html>\n'
    )


def is_page(path: Path, generator: str) -> bool:
    """Whether a file is a page of that generator: only such a one may be replaced."""
    with open(path, "rb") as file:
        return f'content="{generator}"'.encode() in file.read(1000)


@cache
def bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script; empty where vl-convert-python is not installed."""
    if find_spec("vl_convert") is None:
        return ""
    # in a process of its own: a JavaScript engine writes the script, and its 140 MB go when it does
    program = "import sys, vl_convert; sys.stdout.write(vl_convert.javascript_bundle())"
    command = [sys.executable, "-X", "utf8", "-c", program]
    code = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def prose(text: str, glossary: Mapping[str, str] = GLOSSARY) -> str:
    """Escaped text, the first use of each term of the glossary explained on hover."""
    out = escape(text)
    for term, words in glossary.items():
        pattern = rf"(?<![\w>-]){re.escape(term)}(?![\w-])(?![^<]*</abbr>)(?![^<]*>)"
        out = re.sub(pattern, rf'<abbr title="{escape(words)}">\g<0></abbr>', out, count=1)
    return out


def glossary_section(glossary: Mapping[str, str]) -> str:
    """All terms, folded away at the end."""
    terms = "".join(f"<dt>{escape(t)}</dt><dd>{escape(words)}</dd>" for t, words in glossary.items())
    return f'<section id="glossary"><h2>Glossary</h2><details><summary>Terms</summary><dl>{terms}</dl></details></section>\n'


def table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways by itself; cells are HTML, the first of a row names it."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for name, *cells in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #f3f5f7; --link: #0550ae;
  --good: #11632a; --mixed: #7d4e00; --bad: #a40e26; --open: #0550ae; --mute: #57606a }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0f1318; --line: #3a424c; --soft: #1a2027;
  --link: #7cb7ff; --good: #6fdd8b; --mixed: #eac54f; --bad: #ff9a93; --open: #7cb7ff; --mute: #9aa4ae } }
* { box-sizing: border-box }
html { scroll-padding-top: 3.2rem }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif }
nav { position: sticky; top: 0; z-index: 2; background: var(--soft); border-bottom: 1px solid var(--line);
  padding: .3rem 1rem; display: flex; gap: 1rem; overflow-x: auto; white-space: nowrap; font-size: .85rem }
nav ul { display: flex; gap: .9rem; margin: 0; padding: 0; list-style: none }
main { max-width: 86rem; margin: 0 auto; padding: .5rem 1rem }
h1 { font-size: 1.5rem; margin: .4rem 0 } h2 { font-size: 1.15rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere }
h1, h2 { line-height: 1.2 } a { color: var(--link) } p { margin: .35rem 0 }
abbr { text-decoration-style: dotted; cursor: help }
form { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; font-size: .85rem; margin-bottom: .3rem }
input, select, button { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--mute);
  border-radius: .3rem; padding: .1rem .35rem } button { cursor: pointer }
summary { cursor: pointer; padding: .17rem .2rem }
.badge { font-weight: 600; font-size: .8rem; border: 1.5px solid; border-radius: .4rem; padding: 0 .35rem;
  white-space: nowrap; justify-self: start }
.number { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.note { border-left: 4px solid var(--bad); background: var(--soft); padding: .4rem .8rem }
table { border-collapse: collapse; font-size: .85rem } th, td { text-align: left; padding: .15rem .5rem;
  border-bottom: 1px solid var(--line); vertical-align: top } .wide { overflow-x: auto }
figure { margin: 0 0 1.2rem } figcaption { font-size: .88rem; color: var(--mute) }
img { max-width: 100%; height: auto; display: block } .live { overflow-x: auto } .hidden { position: absolute;
  clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden }
details { margin: .1rem 0 } dt { font-weight: 600 } dd { margin: 0 0 .4rem; overflow-wrap: anywhere }
@media print { nav, form, button { display: none } body { font-size: 10px } section { break-inside: auto }
  figure { break-inside: avoid } }
"""

SCRIPT = (
    "const COLORS = "
    + json.dumps(COLORS)
    + """;
const isDark = () => matchMedia('(prefers-color-scheme: dark)').matches;
function tinted(spec, dark) {
  const text = JSON.stringify(spec).replace(/"series(\\d)"/g, (_, i) => JSON.stringify(COLORS[dark ? 'dark' : 'light'][i]));
  const ink = dark ? '#e6edf3' : '#1b1f24', out = JSON.parse(text);
  out.config = {...out.config, background: 'transparent', title: {color: ink}, rule: {color: ink},
    axis: {...out.config.axis, labelColor: ink, titleColor: ink, gridColor: dark ? '#2a313a' : '#e6e9ec'},
    legend: {labelColor: ink}};
  return out;
}
let vegaReady;
function loadVega() {
  vegaReady = vegaReady || new Promise(done => {
    const code = document.createElement('script');
    code.type = 'module';
    code.textContent = document.getElementById('vega').textContent + ';window.dispatchEvent(new Event("vega"));';
    addEventListener('vega', done, {once: true});
    document.head.append(code);
  });
  return vegaReady;
}
let specs;
function specOf(name) {
  specs = specs || document.getElementById('specs').textContent;
  return JSON.parse(specs)[name];
}
async function drawn(view, spec) {
  await loadVega();
  return vegaEmbed(view, tinted(spec, isDark()), {actions: false, renderer: 'svg', ast: false});
}
"""
)
"""draws the figures of `specs` in the page's colors: `drawn(element, specOf(name))`"""
