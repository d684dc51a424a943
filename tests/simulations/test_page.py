"""The report as a reader has it: in a browser, on wide and narrow, light and dark screens."""

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from simulations import claims
from simulations.drawing import adaptive, darkened, draw, panel, plot, series
from simulations.protocol import discover
from simulations.report import gathered, page
from simulations.summaries import committed, svg, vector_uri
from tests.kit.browser import FORMS, complaints, opened

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the committed summaries."""
    text, problems = page(gathered([], committed(discover())), claims.proof_results())
    assert problems == {}
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(text)
    return path


def test_the_page_is_one_file_of_at_most_5_mb(report: Path) -> None:
    assert report.stat().st_size <= 5_000_000


@pytest.mark.parametrize(("width", "scheme"), FORMS)
def test_no_accessibility_violation_and_nothing_on_the_console(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    tab, said = opened(browser, report, width, scheme)
    assert complaints(tab, said, width) == []
    assert said == []


def test_claims_and_a_figure_are_seen_without_scrolling(browser: Any, report: Path) -> None:
    tab, _ = opened(browser, report)
    boxes = [row.bounding_box() for row in tab.locator(".claim").all()]
    assert len(boxes) == 20
    assert boxes[-1]["y"] + boxes[-1]["height"] <= 900
    figure = tab.locator("img").first.bounding_box()
    assert figure["y"] + figure["height"] <= 900


def test_filter_and_search(browser: Any, report: Path) -> None:
    tab, _ = opened(browser, report)
    rows = tab.locator(".claim:visible")

    def words() -> set[str]:
        return {row.get_attribute("data-word") for row in rows.all()}

    every = words()
    for word in sorted(every):
        tab.locator(f"[name=word][value={word}]").uncheck()
        assert word not in words()
        tab.locator(f"[name=word][value={word}]").check()
    tab.locator("#witness").select_option("proof")
    assert 0 < rows.count() < 20
    assert all("proof" in row.get_attribute("data-kinds").split() for row in rows.all())
    tab.locator("#witness").select_option("")
    tab.locator("#search").fill("minimal overhead")
    assert [row.get_attribute("id") for row in rows.all()] == ["C17"]
    tab.locator("#search").fill("no such words")
    assert rows.count() == 0
    assert tab.locator("#none").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_can_be_explored(browser: Any, report: Path, scheme: str) -> None:
    tab, said = opened(browser, report, scheme=scheme)
    buttons = tab.locator(".explore")
    assert buttons.count() > 0
    for number in range(buttons.count()):
        button = buttons.nth(number)
        button.click()
        live = tab.locator(f"#live-{button.get_attribute('data-figure')}")
        marks = live.locator("svg .mark-symbol, svg .mark-line")
        marks.first.wait_for(state="attached", timeout=30_000)  # a level line has no height and counts as hidden
        if live.locator("input").count():
            live.locator("input").set_checked(True)
    assert said == []


def test_a_darkened_picture_is_the_one_drawn_dark() -> None:
    """Up to the names of what is drawn twice, which are hashes of its colors too."""
    figure = committed(["collapse_prediction"])["collapse_prediction"].figures[0]["plot"]

    def lines(vector: str) -> str:
        names: dict[str, str] = {}
        return re.sub(
            r"\b[a-z]?[0-9a-f]{10,}\b", lambda found: names.setdefault(found[0], f"name {len(names)}"), vector
        )

    light, dark = (svg(draw(figure, mode)).decode() for mode in ("light", "dark"))
    assert lines(darkened(light)) == lines(dark)
    assert lines(light) != lines(dark)


def test_numbers_in_words_are_not_cut_with_places() -> None:
    """A tick at 0.0003 and a label of 0.955 keep their digits; the places of points have two decimals."""
    steps = [0.0001, 0.0003, 0.001]
    drawn = draw(plot(panel("at 0.955", "step size", "y", [series("line", steps, [0.1, 0.2, 0.3])], ticks=steps)))
    vector = svg(drawn).decode()
    words = re.findall(r">([^<>]+)</text>", vector)
    assert {"at 0.955", "0.0001", "0.0003", "0.001"} <= set(words)
    assert not re.search(r"\.\d{3}", "".join(re.findall(r'\bd="([^"]*)"', vector)))


@pytest.mark.parametrize("label", ["n2", "a method with quite a long name"])
def test_a_legend_stays_inside_its_figure(label: str) -> None:
    names = [f"{label} {k}" for k in range(5)]
    drawn = draw(plot(panel("", "x", "y", [series(name, [1, 2], [0.1, 0.3]) for name in names]), width=3.8))
    drawn.draw_without_rendering()
    box, page = drawn.legends[0].get_window_extent(), drawn.bbox
    assert page.x0 <= box.x0
    assert box.x1 <= page.x1


def test_a_picture_darkens_itself_on_a_dark_screen(browser: Any, tmp_path: Path) -> None:
    """Its pixels are those of the light picture on a light screen, of the dark one on a dark screen."""
    figure = committed(["collapse_prediction"])["collapse_prediction"].figures[0]["plot"]
    light = svg(draw(figure)).decode()
    forms = {"adaptive": adaptive(light), "light": light, "dark": darkened(light)}

    def pixels(form: str, scheme: str) -> bytes:
        image = base64.b64encode(forms[form].encode()).decode()
        page = tmp_path / f"{form}.html"
        page.write_text(
            "<!doctype html><style>:root { color-scheme: light dark } body { margin: 0; background: #777 }</style>"
            f'<img src="data:image/svg+xml;base64,{image}">'
        )
        tab, said = opened(browser, page, scheme=scheme)
        assert said == []
        return bytes(tab.screenshot())

    assert pixels("adaptive", "light") == pixels("light", "light")
    assert pixels("adaptive", "dark") == pixels("dark", "dark") != pixels("light", "dark")


def test_a_picture_as_text_is_the_picture(browser: Any, tmp_path: Path) -> None:
    """Whatever its words hold that would end an attribute, an entity or a URL."""
    title = "100% of \"these\" & 'those', #1 <b> &amp; é ⟨n²⟩ \\ ?"
    vector = svg(draw(plot(panel(title, "x", "y", [series("line", [1, 2], [0.1, 0.3])]))))

    def pixels(uri: str) -> bytes:
        path = tmp_path / "page.html"
        path.write_text(f'<!doctype html><meta charset="utf-8"><img src="{uri}">')
        tab, said = opened(browser, path)
        assert said == []
        assert tab.evaluate("document.querySelector('img').naturalWidth") > 0
        return bytes(tab.screenshot())

    encoded = base64.b64encode(vector).decode()
    assert pixels(vector_uri(vector)) == pixels(f"data:image/svg+xml;base64,{encoded}")


def test_it_prints_to_few_pages(browser: Any, report: Path, tmp_path: Path) -> None:
    tab, _ = opened(browser, report)
    data = tab.pdf(format="A4")
    assert data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") + data.count(b"/Type/Page/") <= 20
