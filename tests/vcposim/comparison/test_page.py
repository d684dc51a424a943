"""The page of a comparison as a reader has it: the leaderboard with two that were asked for, in a browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vcposim.comparison import leaderboard
from vcposim.comparison.design import SIZES
from vcposim.comparison.page import page
from vcposim.comparison.result import comparison
from vcposim.comparison.run import Folder

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
CHROMIUM = next(
    (p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(p).exists()), None
)
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser in /usr/bin"), pytest.mark.slow]
NAMED = ("vcpo", "<b>mine</b>.py:soft")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = SIZES["quick"]
    standing = leaderboard.standing(size)
    named = {NAMED[0]: standing["vcpo"], NAMED[1]: standing["ppo_clip"]}  # a name that only escaping makes harmless
    result = comparison(Folder(Path("nowhere"), NAMED, size), named, standing, leaderboard.read())
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    path.write_text(page(result))
    path.with_name("cost.js").write_text('vcposimCost = {"vcpo": 2.04};\n')
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def opened(browser: Any, report: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(report.as_uri())
    return tab, said


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_no_accessibility_violation_and_nothing_on_the_console(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python (extra dev)")
    tab, said = opened(browser, report, width, scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = axe.Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_sort_search_and_pick(browser: Any, report: Path) -> None:
    tab, said = opened(browser, report, 1400, "light")
    names = tab.locator("#table tbody tr:visible th")
    assert names.count() > 50
    assert NAMED[1] in names.all_inner_texts()
    for column, up in ((2, True), (2, False)):
        tab.locator(f".sort[data-column='{column}']").click()
        assert names.all_inner_texts() == sorted(names.all_inner_texts(), key=str.lower, reverse=not up)
    tab.locator(".sort[data-column='3']").click()
    scores = [
        float(x)
        for x in tab.eval_on_selector_all("#table tbody td:nth-child(4)", "c => c.map(x => x.dataset.value)")
        if x
    ]
    assert scores == sorted(scores)
    tab.locator("#search").fill("vcpo")
    assert 1 < names.count() < 50
    assert all("vcpo" in name for name in names.all_inner_texts())
    tab.locator("#search").fill("")
    tab.locator("#only").check()
    assert set(names.all_inner_texts()) == set(NAMED)
    assert tab.locator("tr:has(th:text-is('vcpo')) .cost").inner_text() == "2.0x"
    curves = tab.locator("#profile polyline")
    before = curves.count()
    tab.locator("#table .pick[value='vcpo']").uncheck()
    assert curves.count() == before - 1
    tab.locator("#metric").select_option("cosine")
    assert "cosine" in tab.locator("#lags").inner_text()
    assert said == []
