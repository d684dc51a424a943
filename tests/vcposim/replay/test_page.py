"""The page of a replay as a reader has it: in a browser, on wide and narrow, light and dark screens."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit.browser import FORMS, complaints, opened
from tests.vcposim.replay.fixtures import FIXTURES, batch
from vcposim.commands.main import main


def rows(worse: float = 0.08) -> list[dict[str, Any]]:
    """Four steps of eight prompts; from the third step on the learner has moved by `worse` nats a token."""
    out = []
    for step in range(4):
        for row in FIXTURES["vcposim"].rows(batch(step, prompts=8, responses=8)):
            moved = [x - worse * (step >= 2) for x in row["log_prob"]]
            out.append(
                {**row, "group": f"<b>{row['group']}</b>", "log_prob": moved, "step": step, "version": step // 2}
            )
    return out


def write(folder: Path, table: list[dict[str, Any]]) -> Path:
    path = folder / "run.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    out = folder / "run.html"
    assert main(["replay", str(write(folder, rows())), "--no-figure", "--html", str(out), "--bootstrap", "200"]) == 0
    return out


def drawn(browser: Any, page: Path, width: int = 1400, scheme: str = "light") -> tuple[Any, list[str]]:
    tab, said = opened(browser, page, width, scheme)
    tab.locator("body[data-drawn]").wait_for(timeout=60_000)
    return tab, said


def test_the_page_says_what_the_command_says_and_is_one_file(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    assert main(["replay", str(page.with_name("run.jsonl")), "--json", "--bootstrap", "200"]) == 0
    found = json.loads(capsys.readouterr().out)
    place = -1
    for line in found["summary"]:  # the five lines come first, in their order
        head = f"<strong>{line.split(':')[0]}:</strong>"
        assert text.index(head) > place
        place = text.index(head)
    assert place < text.index("<section")
    for gauge, step in found["first_alarms"]["step"].items():
        assert f"{gauge} at step {step}" in text
    for row in found["corrections"]["rows"]:
        assert row["name"] in text
        assert f'<data value="{row["risk"]["value"]:.9g}">' in text
    body = text[: text.index('<script type="text/plain" id="vega">')]
    assert "http" not in body.replace("https://vega.github.io/schema", "").replace("https://www.w3.org", "")
    assert page.stat().st_size < 3_000_000
    assert "<b>" not in text.partition('id="notes"')[2].partition("</section>")[0]  # the file's names are escaped


def test_equal_replays_give_equal_pages(page: Path) -> None:
    again = page.with_name("again.html")
    file = str(page.with_name("run.jsonl"))
    assert main(["replay", file, "--no-figure", "--html", str(again), "--bootstrap", "200"]) == 0
    assert again.read_text() == page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), FORMS)
def test_no_accessibility_violation_nothing_on_the_console_and_it_fits(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    tab, said = drawn(browser, page, width, scheme)
    assert complaints(tab, said, width) == []
    assert said == []


@pytest.mark.slow
def test_figures_are_drawn_tables_sort_and_quiet_gauges_can_be_hidden(browser: Any, page: Path) -> None:
    tab, said = drawn(browser, page)
    figures = tab.locator("[data-figure]")
    assert figures.count() >= 12
    for k in range(figures.count()):
        assert figures.nth(k).locator("svg .mark-symbol, svg .mark-line, svg .mark-rule").count() > 0
    names = tab.locator("#corrections tbody th")
    first = names.all_inner_texts()
    tab.locator("#corrections thead button").nth(2).click()
    bias = [float(x) for x in tab.locator("#corrections tbody tr td:nth-child(3) data").all_inner_texts()]
    assert bias == sorted(bias)
    tab.locator("#corrections thead button").nth(0).click()
    assert names.all_inner_texts() == sorted(first)
    shown = tab.locator("#run figure:visible")
    every = shown.count()
    tab.locator("#only").check()
    assert 0 < shown.count() < every
    assert said == []


def test_a_page_is_only_replaced_by_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(tmp_path, rows()[:64]))
    other = tmp_path / "mine.html"
    other.write_text("<p>not ours</p>")
    for given, words in (
        (other, "no page of this command"),
        (tmp_path / "page.txt", "does not end in .html"),
        (tmp_path / "no" / "page.html", "does not exist"),
    ):
        assert main(["replay", file, "--no-figure", "--html", str(given)]) == 2
        assert words in capsys.readouterr().err
    assert other.read_text() == "<p>not ours</p>"


def test_a_file_without_groups_or_steps_has_a_page_too(tmp_path: Path) -> None:
    bare = [{k: row[k] for k in ("log_prob", "behavior_log_prob")} for row in rows()[:64]]
    out = tmp_path / "bare.html"
    assert main(["replay", str(write(tmp_path, bare)), "--no-figure", "--html", str(out)]) == 0
    text = out.read_text()
    assert 'id="weights"' in text
    assert 'id="run"' not in text
    assert 'id="corrections"' not in text
