"""The page of a comparison as a reader has it: the leaderboard with two that were asked for, in a browser."""

from pathlib import Path
from typing import Any

import pytest

from tests.kit.browser import FORMS, complaints, opened
from vcposim.comparison import leaderboard
from vcposim.comparison.design import REFERENCE, SIZES, with_transformers
from vcposim.comparison.measure import MeasuredTraining
from vcposim.comparison.page import page
from vcposim.comparison.result import comparison
from vcposim.comparison.run import Folder

pytestmark = pytest.mark.slow
NAMED = ("vcpo", "<b>mine</b>.py:soft")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = with_transformers(SIZES["quick"])
    standing = leaderboard.standing(size)
    for name, value in ((REFERENCE, 0.25), ("vcpo", 0.5), ("ppo_clip", 0.4)):
        trained: MeasuredTraining = {"average": [[value, 0.3, 0.4, 0.5]], "lost": [[0, 0, 1, 0]],
                                     "refused": [[0, 0, 0, 2]], "start": "0"}  # fmt: skip
        standing[name] |= {setting.name: trained for setting in size.transformers}
    named = {NAMED[0]: standing["vcpo"], NAMED[1]: standing.pop("ppo_clip")}  # a name that only escaping makes harmless
    result = comparison(Folder(Path("nowhere"), NAMED, size), named, standing, leaderboard.read())
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    path.write_text(page(result))
    path.with_name("cost.js").write_text('vcposimCost = {"vcpo": 2.04};\n')
    return path


@pytest.mark.parametrize(("width", "scheme"), FORMS)
def test_no_accessibility_violation_and_nothing_on_the_console(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    tab, said = opened(browser, report, width, scheme)
    assert complaints(tab, said, width) == []
    assert said == []


def test_transformers_have_rows_of_their_own(browser: Any, report: Path) -> None:
    tab, _ = opened(browser, report, 1400, "light")
    lines = tab.locator("#transformers tbody tr").all_inner_texts()
    assert len(lines) == 6
    assert [line.split("\t")[0] for line in lines[:2]] in ([NAMED[0]] * 2, [NAMED[1]] * 2)
    assert all("1 of 4; 2 updates without a finite gradient" in line for line in lines)
    assert sum("undecided" in line for line in lines) == 4
    assert tab.locator("nav a[href='#transformers']").count() == 1


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
