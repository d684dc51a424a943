"""What takes seconds is computed once for each state of the code; `build/pages` can be thrown away at any time."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "pages"


@functools.cache
def code() -> str:
    """A digest of everything that a page is computed from."""
    seen = hashlib.sha256()
    for folder in ("vcposim", "simulations", "docs/_hooks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".jsonl"):
                seen.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()


def cached(key: str, make: Callable[[], Any]) -> Any:
    """`make()`, or what it gave for this key with this code: JSON, of which tuples come back as lists."""
    path = FOLDER / hashlib.sha256(f"{code()} {key}".encode()).hexdigest()
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        text = json.dumps(make())
    FOLDER.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
    return json.loads(text)
