"""What CONTRIBUTING, CHANGELOG and CITATION say is so."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import vcposim

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MOVED = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("before", "now"), MOVED)
def test_a_module_is_where_the_changelog_says_and_no_longer_where_it_was(before: str, now: str) -> None:
    def place(name: str) -> Path | None:
        module, package = (ROOT / f"{name.replace('.', '/')}{end}" for end in (".py", "/__init__.py"))
        return module if module.exists() else package if package.exists() else None

    assert place(now) is not None
    assert before == now or place(before) is None or (place(before) or ROOT).name == "__init__.py"


def test_all_moves_are_listed() -> None:
    assert len(MOVED) > 60


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vcposim.__version__"}
    assert f"\nversion: {vcposim.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {vcposim.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_files_that_contributing_names_exist() -> None:
    paths = set(re.findall(r"`((?:vcposim|llm_bridge|simulations|tests|proofs)/[\w/]+(?:\.py|/))`", CONTRIBUTING))
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
    rooms = set(re.findall(r"^\| `(\w+)/` \|", CONTRIBUTING, re.MULTILINE))
    assert rooms == {path.name for path in (ROOT / "vcposim").iterdir() if (path / "__init__.py").exists()}


@pytest.mark.parametrize("tool", ["ruff", "mypy", "pre_commit", "pytest", "xdist"])
def test_tools_of_contributing_are_in_the_extra_dev(tool: str) -> None:
    named = {"xdist": "pytest-xdist", "pre_commit": "pre-commit"}.get(tool, tool)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    assert any(line.startswith(f"{named}>") for line in extra)
    assert tool in CONTRIBUTING.replace("pre-commit", "pre_commit").replace("-n 2", "xdist")
    assert importlib.util.find_spec(tool) or tool == "pre_commit"
