"""The built site as a reader has it. Build it first: `python -m sphinx -W -n docs build/site`."""

import ast
import os
from collections.abc import Iterator
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, unquote

import pytest

import vcposim
from proofs.claims import FAMILIES
from simulations.claims import CLAIMS
from tests.kit.browser import FORMS, complaints, opened
from vcposim.catalogue import CATALOGUE
from vcposim.catalogue.references import SOURCES
from vcposim.commands.main import subcommands

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("VCPOSIM_SITE", ROOT / "build" / "site"))
TUTORIALS = sorted(p.stem for p in (ROOT / "docs" / "tutorials").glob("*.md") if p.stem != "index")
MAIN = (
    "index",
    "start",
    "questions",
    "tutorials/why_ess_lies",
    "reference/catalogue/index",
    "reference/catalogue/gspo",
    "reference/commands/replay",
    "reference/api/vcposim.weights",
    "findings/claims/index",
    "findings/claims/C4",
    "findings/theorems/t02_optimal_baseline",
    "findings/gallery",
    "help/faq",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SITE / "index.html").exists(), reason="no site: python -m sphinx -W -n docs build/site builds it"
    ),
]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing about it."""

    def log_message(self, *_: Any) -> None:
        pass


class Page(HTMLParser):
    """Where a page points to, and what can be pointed to on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "source") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and "href" in given and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given["href"])


@cache
def page(path: Path) -> Page:
    return Page(path.read_text())


def broken(site: Path) -> list[str]:
    """Every link, picture, style and script of a site that leads nowhere, or to a network where it must not."""
    found = []
    for path in sorted(site.rglob("*.html")):
        if path.is_relative_to(site / "_static"):
            continue  # templates of the theme
        for target in page(path).loaded:
            if target.startswith(("http:", "https:", "//")):
                found.append(f"{path.relative_to(site)} loads {target}")
        for target in [*page(path).links, *page(path).loaded]:
            if target.startswith(("http:", "https:", "mailto:", "data:", "//")) or target in ("#", ""):
                continue
            place, _, anchor = unquote(target).partition("#")
            file = path if not place else (path.parent / place.partition("?")[0]).resolve()
            if not file.exists():
                found.append(f"{path.relative_to(site)} -> {target}")
            elif anchor and file.suffix == ".html" and anchor not in page(file).anchors:
                found.append(f"{path.relative_to(site)} -> {target} (no such place on the page)")
    return found


def test_no_link_leads_nowhere_and_nothing_is_loaded_from_a_network() -> None:
    assert broken(SITE) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#x">x</a><a href="c.html">y</a><img src="https://cdn/x.png">')
    (tmp_path / "b.html").write_text('<p id="y">')
    said = broken(tmp_path)
    assert [line.split()[1] for line in said] == ["loads", "->", "->"]


def test_every_public_name_entry_claim_theorem_command_and_paper_has_its_page() -> None:
    pages = [f"reference/catalogue/{name}" for name in CATALOGUE] + [f"findings/claims/{c.id}" for c in CLAIMS]
    pages += [f"findings/theorems/{f.split('.')[1]}" for f in FAMILIES] + [
        f"reference/commands/{c}" for c in subcommands()
    ]
    assert [name for name in pages if not (SITE / f"{name}.html").exists()] == []
    papers = page(SITE / "reference/papers.html").anchors
    assert {f"paper-{key.replace('_', '-')}" for key in SOURCES} <= papers
    shown = (SITE / "reference/api/vcposim.html").read_text()
    assert [name for name in vcposim.__all__ if f">{name}<" not in shown] == []


def test_every_public_function_and_class_is_described() -> None:
    """What a module's own lines define without an underscore stands on its page."""
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    from _hooks import api

    missing = []
    for module in api.modules():
        if api.is_package(module):
            continue
        anchors = page(SITE / "reference" / "api" / f"{module}.html").anchors
        tree = ast.parse(api.file_of(module).read_text())
        described = (ast.FunctionDef, ast.ClassDef)
        wanted = {one.name for one in tree.body if isinstance(one, described) and not one.name.startswith("_")}
        missing += [f"{module}.{name}" for name in wanted if f"{module}.{name}" not in anchors]
    assert missing == []


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.mark.parametrize(("width", "scheme"), FORMS)
def test_main_pages_are_accessible_quiet_and_as_wide_as_the_screen(browser: Any, width: int, scheme: str) -> None:
    wrong = []
    for name in MAIN:
        tab, said = opened(browser, SITE / f"{name}.html", width, scheme)
        wrong += [f"{name}: {complaint}" for complaint in complaints(tab, said, width)]
        tab.context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The address of the site on this machine: search shows excerpts, which a browser reads from no file."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("asked", "leads"),
    [
        ("GSPO", "reference/catalogue/gspo.html"),
        ("effective sample size", "help/glossary.html"),
        ("top-p", "help/faq.html"),
    ],
)
def test_search_finds(browser: Any, served: str, asked: str, leads: str) -> None:
    tab = browser.new_context().new_page()
    said: list[str] = []
    tab.on("response", lambda answer: said.append(answer.url) if answer.status >= 400 else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(f"{served}/search.html?q={quote(asked)}")
    tab.wait_for_function("document.querySelector('.search-summary, #search-results > p')?.innerText.match(/[0-9]/)")
    tab.wait_for_timeout(1500)
    found = [str(link.get_attribute("href")) for link in tab.locator("#search-results li a").all()]
    assert any(leads in link for link in found), found[:20]
    assert said == []
    tab.context.close()


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_shows_its_figures(browser: Any, name: str) -> None:
    tab, _ = opened(browser, SITE / "tutorials" / f"{name}.html")
    sizes = tab.evaluate("[...document.querySelectorAll('.cell_output img')].map(i => [i.naturalWidth, i.alt])")
    assert sizes
    assert all(width > 200 and alt for width, alt in sizes)
    tab.context.close()


def test_from_the_front_page_to_a_figure_of_ones_own_estimator_in_two_clicks(browser: Any) -> None:
    tab, _ = opened(browser, SITE / "index.html")
    tab.locator(".sd-card", has_text="Start here").first.click()
    tab.wait_for_selector("h1:has-text('Start here')")
    commands = tab.locator("pre", has_text="mine.py:mine").first.inner_text()
    assert "vcposim variance" in commands
    tab.context.close()
