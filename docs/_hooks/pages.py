"""Every page that is made from the code: reference, findings, guides. No number on them is typed by hand.

`everything()` gives path -> text; `write` puts them below `docs/`, touching only what changed, and removes what no
longer is. The folders are ignored by git: they can always be made again.
"""

from pathlib import Path

from _hooks import api, catalogue, commands, findings, guides

ROOT = Path(__file__).parents[2]
FOLDERS = ("reference", "findings", "guides")
"""below docs/, made by this module alone"""


def everything() -> dict[str, str | bytes]:
    """Path below `docs/` -> what is there."""
    out: dict[str, str | bytes] = {"reference/index.md": REFERENCE}
    for source in (api, catalogue, commands, findings, guides):
        out |= source.pages()
    return out


REFERENCE = """# Reference

Everything here is made from the code when the site is built, so that it cannot fall behind it.

::::{grid} 1 2 2 2
:gutter: 3

:::{grid-item-card} Estimators
:link: catalogue/index
:link-type: doc
Every named estimator: formula, when it is unbiased, exact bias and variance, how to switch it on.
:::
:::{grid-item-card} Commands
:link: commands/index
:link-type: doc
Every command with its options and an example that was run for this page.
:::
:::{grid-item-card} Python
:link: api/index
:link-type: doc
Every module, from its docstrings.
:::
:::{grid-item-card} Papers
:link: papers
:link-type: doc
Every source, and which estimators stand on it.
:::
::::

```{toctree}
:hidden:
catalogue/index
commands/index
api/index
papers
../help/glossary
```
"""


def write(docs: Path) -> None:
    """Bring the generated folders up to date."""
    wanted = everything()
    for name, content in wanted.items():
        path = docs / name
        data = content if isinstance(content, bytes) else content.encode()
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    for folder in FOLDERS:
        for path in (docs / folder).rglob("*"):
            if path.is_file() and path.relative_to(docs).as_posix() not in wanted:
                path.unlink()
