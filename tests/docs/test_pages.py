"""What the site is made from: every name has a page, no word of a formula is lost, what pages tell to type exists."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_bridge
import vcposim
from vcposim.catalogue import CATALOGUE
from vcposim.commands.main import parser, subcommands

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))  # where the generators are

from _hooks import api, guides  # noqa: E402
from _hooks.docstrings import restructured  # noqa: E402
from _hooks.formula import clauses, latex  # noqa: E402
from _hooks.text import plain, table  # noqa: E402

WRITTEN = [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if path.relative_to(DOCS).parts[0] not in ("reference", "findings", "guides") and path.name != "README.md"
]


@pytest.mark.parametrize("name", ["api", "docstrings", "formula", "text"])
def test_examples_of_the_generators(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"_hooks.{name}")).failed == 0


def test_mathml_keeps_the_bars_of_a_norm_as_high_as_a_letter() -> None:
    pytest.importorskip("latex2mathml", reason="needs latex2mathml (extra docs)")
    from _hooks.mathml import mathml

    assert '<mo stretchy="false">&#x02016;</mo>' in mathml(r"\lVert s \rVert^2")


# ------------------------------------------------------------------------------------------------------- every name


def test_every_public_module_has_a_page() -> None:
    found = {name for package in (vcposim, llm_bridge) for name in importable(package)}
    assert set(api.modules()) == found


def importable(package: Any, paths: Any = None, prefix: str = "") -> set[str]:
    """Names of a package's modules, found without importing them."""
    prefix = prefix or package.__name__
    found = {prefix}
    for module in pkgutil.iter_modules(paths or package.__path__):
        if module.name.startswith("_"):
            continue
        name = f"{prefix}.{module.name}"
        inner = [str(Path(x) / module.name) for x in (paths or package.__path__)]
        found |= importable(package, inner, name) if module.ispkg else {name}
    return found


@pytest.mark.parametrize("package", sorted(api.ROOMS))
def test_what_a_room_offers_is_linked_to_where_it_is(package: str) -> None:
    for name in api.offered(package):
        place, _, attribute = api.home(name, package).rpartition(".")
        value = getattr(importlib.import_module(package), name)
        if inspect.ismodule(value):
            assert f"{place}.{attribute}" == value.__name__
        else:
            assert getattr(importlib.import_module(place), attribute) is value
            assert attribute in api.defined(place), f"{place} has {attribute} from elsewhere"


def test_every_command_has_an_example_of_itself() -> None:
    for name in subcommands():
        lines = importlib.import_module(f"vcposim.commands.{name}").EXAMPLES
        assert lines, f"{name}.EXAMPLES"
        assert all(shlex.split(line)[:2] == ["vcposim", name] for line in lines)


def test_every_entry_is_listed_once_and_its_needs_have_words() -> None:
    pytest.importorskip("torch", reason="needs torch (extra docs)")
    from _hooks import catalogue

    assert all(len(set(entry.families) & set(catalogue.TITLES)) == 1 for entry in CATALOGUE.values())
    assert {need for entry in CATALOGUE.values() for need in entry.estimator.needs} <= set(catalogue.NEEDS)
    page = catalogue.trained_with("decoupled_ppo", CATALOGUE["decoupled_ppo"])
    assert "--estimator decoupled_ppo" in page
    assert "refused" in page


# --------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("name", CATALOGUE)
def test_no_word_and_no_number_of_a_formula_is_lost(name: str) -> None:
    text = CATALOGUE[name].formula
    shown = " ".join(latex(part) for part in clauses(text))
    for word in re.findall(r"[A-Za-z]{2,}", text):
        wanted = {"lam": "lambda", "xhat": "hat"}.get(word, word)
        assert wanted in shown or set(word) <= set("WRLritj"), f"{word!r} is not in {shown}"
    for number in re.findall(r"\d+\.?\d*", text):
        assert number in shown or number == "1" or "e" in text, f"{number!r} is not in {shown}"
    assert shown.count("(") + shown.count("^{") >= text.count("(") - text.count("_(")
    assert shown.count("{") == shown.count("}") + shown.count("\\{") - shown.count("\\}")


# -------------------------------------------------------------------------------------------------------- docstrings


def test_bars_stars_and_underscores_of_a_docstring_stay_what_they_are() -> None:
    docutils = pytest.importorskip("docutils.core", reason="needs docutils (extra docs)")
    lines = ["Sum of |w_i| * n_i_ where *emphasis* is **strong**; `a|b`s.", "", "    w = r^2", "", "Raises:"]
    lines += ["    InputError: if `w` is", "        empty.", "", ">>> 1 | 2", "3"]
    strict = {"report_level": 1, "halt_level": 2}
    tree = docutils.publish_doctree("\n".join(restructured(lines)), settings_overrides=strict)
    text = tree.astext()
    assert "Sum of |w_i| * n_i_ where emphasis is strong; a|bs." in text
    assert "w = r^2" in text
    assert "InputError: if w is\nempty." in text
    assert ">>> 1 | 2\n3" in text


def test_markdown_of_plain_text_is_that_text() -> None:
    tokens = pytest.importorskip("markdown_it", reason="needs markdown-it-py (extra docs)").MarkdownIt().enable("table")
    for text in ("E[w_i] <= n*m*2 |x| $a$ <b> # ~~c~~ {d} ^e^", "a_b_c [x](y) `code|bar`"):
        html = tokens.renderInline(plain(text))
        bare = re.sub(r"</?code>", "`", html).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
        assert bare == text
        cells = re.findall(r"<td>(.*?)</td>", tokens.render(table(("x", "y"), [(plain(text), "last")])))
        assert len(cells) == 2
        assert cells[1] == "last"


# ------------------------------------------------------------------------------------------------- pages by hand


def told() -> list[tuple[str, str]]:
    """(page, line) of every whole `vcposim ...` command that a page written by hand tells to type."""
    found = []
    for path in WRITTEN:
        text = path.read_text().replace("\\\n", " ")
        lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        lines += re.findall(r"`(vcposim [^`]+)`", text)
        for line in lines:
            line = re.split(r"\s+#|\s+:", line)[0].strip()
            if line.startswith("vcposim ") and "NAME" not in line:
                found.append((path.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), told())
def test_commands_that_pages_tell_exist(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    if words[-1] == "..." or len(words) == 1:  # told in part: the command is there
        assert words[0] in subcommands()
        return
    assert parser().parse_args(words).command == words[0], page


def test_mirrored_files_exist_and_their_links_lead_somewhere() -> None:
    for path in guides.MIRRORED:
        assert (ROOT / path).exists(), path
    text = guides.mirrored("CONTRIBUTING.md")
    assert "](proofs" not in text


# -------------------------------------------------------------------------------------------------------- notebooks

NOTEBOOKS = sorted(path.stem for path in (DOCS / "tutorials").glob("*.md") if path.stem != "index")
CELL = re.compile(r"```\{code-cell\}[^\n]*\n(?:---\n(?P<options>.*?)---\n)?(?P<code>.*?)```", re.DOTALL)


def test_tutorials_are_listed() -> None:
    assert set(NOTEBOOKS) == set((DOCS / "tutorials/index.md").read_text().split("```")[1].split("\n")[2:-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_tutorial_runs_and_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the same cells that the site runs and shows. Every figure has words for who cannot see it."""
    if name == "train_a_transformer":
        pytest.importorskip("transformers", reason="needs transformers (extra llm)")
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path))
    scope: dict[str, Any] = {"__name__": "__main__"}
    described = 0
    for cell in CELL.finditer((DOCS / "tutorials" / f"{name}.md").read_text()):
        described += "alt:" in (cell["options"] or "")
        exec(compile(cell["code"], name, "exec"), scope)
    assert described
    plt.close("all")
