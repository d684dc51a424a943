"""A page as a reader has it: in a browser, on wide and narrow, light and dark screens, without a network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FORMS = ((400, "dark"), (1400, "light"))
"""both widths and both schemes, in two forms"""
PLACES = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")


def running() -> Iterator[Any]:
    """A headless Chromium of the system; skips with one line where it or playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
    found = next((place for place in PLACES if Path(place).exists()), None)
    if found is None:
        pytest.skip("needs a Chromium browser in /usr/bin")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


def opened(browser: Any, page: Path, width: int = 1400, scheme: str = "light") -> tuple[Any, list[str]]:
    """A tab with the page, and the errors and warnings on its console, in a list that grows."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    said: list[str] = []

    def hear(message: Any) -> None:
        if message.type in ("error", "warning"):
            said.append(f"{message.type}: {message.text}")

    tab.on("console", hear)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    return tab, said


def complaints(tab: Any, said: list[str], width: int) -> list[str]:
    """What is wrong with an open page: what it says on the console, what axe finds, a width beyond the screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python (extra dev)")
    heard = list(said)  # before axe, which asks for style sheets in a way that a file may not
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = axe.Axe().run(tab)
    wrong = [f"it says {line}" for line in heard]
    wrong += [found.generate_report()] if found.violations_count else []
    wide = tab.evaluate("document.documentElement.scrollWidth")
    return [*wrong, f"it is {wide} wide"] if wide > width else wrong
