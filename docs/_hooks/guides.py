"""Pages that live beside the code, shown here too, with their links made to fit."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

MIRRORED = {
    "llm_bridge/README.md": "guides/llm_bridge",
    "llm_bridge/adapters/HOWTO_TRL.md": "guides/HOWTO_TRL",
    "llm_bridge/adapters/HOWTO_VERL.md": "guides/HOWTO_VERL",
    "llm_bridge/adapters/OTHERS.md": "guides/OTHERS",
    "llm_bridge/adapters/README.md": "guides/adapters",
    "tests/README.md": "guides/tests",
    "CONTRIBUTING.md": "guides/contributing",
    "CHANGELOG.md": "guides/changelog",
    "simulations/LOG.md": "findings/log",
    "simulations/CLAIMS.md": "findings/claims/index",
    "proofs/README.md": "findings/theorems/index",
    "simulations/bench/core.md": "findings/benchmarks/core",
    "simulations/bench/scores.md": "findings/benchmarks/scores",
    "simulations/bench/gpu.md": "findings/benchmarks/gpu",
    "simulations/bench/families.md": "findings/benchmarks/families",
    "simulations/bench/rollouts.md": "findings/benchmarks/rollouts",
    "CITATION.cff": "help/cite",
    "README.md": "index",
}
"""file of the repository -> the page that shows it, or says the same"""

LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)")


def mirrored(path: str, title: str = "") -> str:
    """A file of the repository as a page. Links to files that have no page become their names."""
    folder = (ROOT / path).parent

    def fit(match: re.Match[str]) -> str:
        text, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match[0]
        file = (folder / target.partition("#")[0]).resolve()
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else target
        if name in MIRRORED:
            return f"{{doc}}`{text.strip('`')} </{MIRRORED[name]}>`"
        return text if text.startswith("`") else f"{text} (`{name}`)"

    parts = re.split(r"(^```.*?^```[^\n]*$)", (ROOT / path).read_text(), flags=re.DOTALL | re.MULTILINE)
    text = "".join(p if k % 2 else LINK.sub(fit, p) for k, p in enumerate(parts))
    head = re.match(r"# [^\n]+\n", text)
    if title:
        text = f"# {title}\n\n" + (text[head.end() :] if head else text)
    return re.sub(r"^```diff", "```text", text, flags=re.MULTILINE)


def pages() -> dict[str, str]:
    out = {f"{page}.md": mirrored(path) for path, page in MIRRORED.items() if page.startswith("guides/")}
    out["guides/index.md"] = INDEX
    return out


INDEX = """# Guides

```{toctree}
:maxdepth: 1
llm_bridge
HOWTO_TRL
HOWTO_VERL
OTHERS
adapters
tests
contributing
changelog
```
"""
