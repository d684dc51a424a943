"""The fenced blocks of a how-to page."""

import re
from pathlib import Path

ADAPTERS = Path(__file__).parents[2] / "llm_bridge" / "adapters"


def blocks(page: str, kind: str) -> list[str]:
    """Every block of that kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", (ADAPTERS / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def patched(text: str, diff: str) -> str:
    """The text after a diff of `-` and `+` lines; every `-` line must occur once, the `+` lines after it replace it."""
    for part in re.findall(r"^-(.*)\n((?:\+.*\n)*)", diff, flags=re.MULTILINE):
        old, new = part[0] + "\n", re.sub(r"^\+", "", part[1], flags=re.MULTILINE)
        assert text.count(old) == 1, f"not once in the script: {old}"
        text = text.replace(old, new)
    return text


def wrapped_lines(page: str) -> list[str]:
    """Command lines of the shell blocks, continued lines joined."""
    return [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").strip().splitlines()]
