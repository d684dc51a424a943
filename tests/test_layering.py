"""Imports point one way, and heavy libraries stay where they belong. Read from the source files.

A module may import from earlier rooms and from its own, never from a later one, and never in a circle. A new module
needs no entry here, a new room does: its place is decided once, on the day it is built.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.protocol import discover

ROOT = Path(__file__).parents[1]

ROOMS = (
    "problems",
    "gauges",
    "catalogue",
    "laboratory",
    "learning",
    "pipeline",
    "replay",
    "testing",
    "pages",
    "comparison",
    "commands",
)
"""The folders of vcposim, in the order in which they may import; the formulas lie on top and import no room."""

KIT = "vcposim.testing"
"""the one room of vcposim that needs Hypothesis"""

TRANSFORMERS = {
    f"simulations.questions.{name}": {"llm_bridge", "torch"}
    for name in ("acceptance", "transformer_collapse", "proxy_quality", "long_trajectories", "longer_thoughts")
}
"""experiments on language models, which say `extra="llm"`: what they import inside their functions"""

OPTIONAL = {
    "simulations.summaries": {"PIL"},  # of pillow, which matplotlib needs too
    "vcposim.comparison.workers": {"distributed"},
    "vcposim.comparison.transformers": {"llm_bridge"},
    "vcposim.replay.containers": {"torch"},
    "vcposim.replay.metrics": {"tensorboard"},
    **TRANSFORMERS,
}
"""libraries that a module uses if they are there and has an error message for if not"""

KERNEL = (
    "arrays",
    "batch",
    "weights",
    "baselines",
    "surrogates",
    "second_moment",
    "estimators",
    "prefixes",
    "pooled",
    "moments",
)
KERNEL += ("vocabulary", "diagnostics", "control")
"""runs on any array library, so it may know none (and nothing of the project that does)"""

BESIDE = ("errors", "results")
"""on top beside the formulas, which import them: what is wrong with an input, what every result can do"""

PACKAGES: dict[str, set[str]] = {
    "vcposim": set(),
    "proofs": {"vcposim"},
    "simulations": {"vcposim"},
    "llm_bridge": {"vcposim"},
    "simulations.bench": {"vcposim", "simulations", "llm_bridge", "torch", "transformers"},
    **{module: {"vcposim", *used} for module, used in TRANSFORMERS.items()},
    "vcposim.replay.containers": {"torch"},  # for .pt files alone, where it is installed
    "vcposim.comparison.transformers": {"llm_bridge"},  # for `compare --transformers` alone, inside a function
}
"""what each package may import of the others, and whether of torch; a subpackage named here has its own rule"""


def rank(module: str) -> int | None:
    """The place of a module of vcposim, as `vcposim.room.module`: 0 for a formula, None in a folder nobody placed."""
    room = module.split(".")[1]
    if room in ROOMS:
        return 1 + ROOMS.index(room)
    if room == "__main__":  # the door of the last room
        return len(ROOMS)
    return 0 if room in (*KERNEL, *BESIDE) else None


def modules(root: Path, package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, module: str, everywhere: bool = True) -> set[str]:
    """Dotted names imported by a file: at module level only, or also inside functions.

    `from a.b import c` counts as `a.b.c` too, since c may be a module. Imports for type checkers are not imports.
    """
    tree = ast.parse(path.read_text())
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for child in block.body
        for node in ast.walk(child)
    }
    nodes = ast.walk(tree) if everywhere else module_level(tree)
    found: set[str] = set()
    for node in nodes:
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level or None]) if node.level else ""
            source = ".".join(x for x in (base, node.module or "") if x)
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def module_level(tree: ast.Module) -> Iterator[ast.AST]:
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack.extend(ast.iter_child_nodes(node))


def violations(root: Path) -> list[str]:
    """Everything that is wrong with the imports of a tree, in words that say what to do."""
    found = []
    for package in ("vcposim", "proofs", "simulations", "llm_bridge"):
        for module, path in modules(root, package):
            found += foreign(module, imports(path, module), package)
            if package == "vcposim" and module != "vcposim":
                found += backward(module, imports(path, module))
    return found + circles(root)


def foreign(module: str, names: set[str], package: str) -> list[str]:
    rule = next((k for k in sorted(PACKAGES, key=len, reverse=True) if f"{module}.".startswith(f"{k}.")), package)
    allowed = PACKAGES[rule] | {package} | ({"torch", "transformers"} if package == "llm_bridge" else set())
    watched = {"vcposim", "proofs", "simulations", "llm_bridge", "tests", "torch", "transformers"}
    used = {name.split(".")[0] for name in names}
    return [f"{module} imports {name}; {rule} may use {sorted(allowed)}" for name in sorted(used & watched - allowed)]


def backward(module: str, names: set[str]) -> list[str]:
    own = rank(module)
    if own is None:
        room = module.split(".")[1]
        return [f"{module} is in no room; put it into one of {ROOMS}, or {room!r} into ROOMS of tests/test_layering.py"]
    known = {name: rank(name) for name in names if name.startswith("vcposim.")}
    later = sorted({name.split(".")[1] for name, place in known.items() if place is not None and place > own})
    here = module.split(".")[1] if own else "the formulas"
    return [f"{module} ({here}) imports vcposim.{name} of a later room; move one of them" for name in later]


def circles(root: Path) -> list[str]:
    """Import circles at module level, within a package or between them."""
    packages = ("vcposim", "proofs", "simulations", "llm_bridge")
    known = {module: path for package in packages for module, path in modules(root, package)}
    graph = {
        m: {n for n in imports(path, m, everywhere=False) if n in known} - {m, *packages} for m, path in known.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> list[str]:
        if module in trail:
            return [" -> ".join((*trail[trail.index(module) :], module)) + " is a circle; move the shared part down"]
        if module in done:
            return []
        out = [line for other in sorted(graph[module]) for line in visit(other, (*trail, module))]
        done.add(module)
        return out

    return [line for module in sorted(graph) for line in visit(module, ())]


# -------------------------------------------------------------------------------------------------- the real project


def test_imports_point_one_way():
    assert violations(ROOT) == []


def test_the_kernel_knows_no_array_library():
    for name in KERNEL:
        used = imports(ROOT / "vcposim" / f"{name}.py", f"vcposim.{name}")
        outside = {x.split(".")[0] for x in used} - set(sys.stdlib_module_names) - {"vcposim", "array_api_compat"}
        assert not outside, f"vcposim.{name} imports {sorted(outside)}; the kernel runs on the arrays it is given"
        inside = {x.split(".")[1] for x in used if x.startswith("vcposim.")} - {*BESIDE, *KERNEL}
        assert not inside, f"vcposim.{name} imports vcposim.{sorted(inside)}, which is not kernel"


def declared(extra: str | None = None) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {line.split(">")[0].split("<")[0].split("=")[0].strip().replace("-", "_") for line in lines}


@pytest.mark.parametrize("package", ["vcposim", "simulations"])
def test_the_numeric_core_needs_its_base_dependencies_only(package: str):
    allowed = declared() - {"hypothesis"} | set(sys.stdlib_module_names) | {"vcposim", "simulations"}
    for module, path in modules(ROOT, package):
        if module.startswith("simulations.bench"):
            continue  # compares with what else there is
        kit = {"hypothesis", "pytest"} if f"{module}.".startswith(f"{KIT}.") else set()
        outside = {name.split(".")[0] for name in imports(path, module)} - allowed - kit - OPTIONAL.get(module, set())
        assert not outside, f"{module} imports {sorted(outside)}: not among the base dependencies of pyproject.toml"


@pytest.mark.parametrize("module", TRANSFORMERS)
@pytest.mark.slow
def test_experiments_on_language_models_are_listed_without_torch(module: str):
    path = ROOT / f"{module.replace('.', '/')}.py"
    early = {name.split(".")[0] for name in imports(path, module, everywhere=False)}
    assert not early & TRANSFORMERS[module], f"{module} imports these at module level; do it inside its functions"
    assert discover()[module.split(".")[-1]].extra == "llm"


def fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BLOCK = """
import importlib, importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "hypothesis", "pytest", "z3", "cvc5"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
"""as in a base installation: these libraries are not there"""


def test_importing_the_kernel_loads_no_array_library():
    names = ", ".join(f"vcposim.{name}" for name in KERNEL)
    fresh(f"import sys, {names}; bad = {{'numpy', 'torch', 'scipy', 'pandas'}} & set(sys.modules); assert not bad, bad")


@pytest.mark.slow
def test_every_module_imports_without_torch_and_the_test_tools():
    names = [m for m, _ in modules(ROOT, "vcposim") if not f"{m}.".startswith(f"{KIT}.")]
    fresh(f"{BLOCK}\nfor name in {names!r}: importlib.import_module(name)")
    with pytest.raises(AssertionError, match="ModuleNotFoundError: hypothesis"):
        fresh(f"{BLOCK}\nimport hypothesis")


# ----------------------------------------------------------------------------------------- the checker can say no

CLEAN = {
    "vcposim/__init__.py": "from vcposim.arrays import x",
    "vcposim/errors.py": "",
    "vcposim/arrays.py": "from vcposim.errors import x",
    "vcposim/batch.py": "import vcposim.arrays",
    "vcposim/moments.py": "from vcposim import batch",
    "vcposim/problems/rollouts.py": "import typing\nif typing.TYPE_CHECKING:\n    from vcposim.commands import x",
    "vcposim/laboratory/exact.py": "def f():\n    from vcposim import moments",
    "vcposim/commands/main.py": "from ..laboratory.exact import f",
    "llm_bridge/ratios.py": "import torch\nfrom vcposim.batch import x",
    "simulations/q.py": "from vcposim.laboratory import exact",
    "simulations/bench/q.py": "import torch\nimport llm_bridge.ratios",
    "proofs/t.py": "from proofs import u\nimport vcposim.arrays",
}


def tree(tmp_path: Path, **planted: str) -> Path:
    for name, text in {**CLEAN, **planted}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_clean_tree_passes(tmp_path: Path):
    assert violations(tree(tmp_path)) == []


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        (
            "vcposim/arrays.py",
            "from vcposim.laboratory import exact",
            "(the formulas) imports vcposim.laboratory of a later",
        ),
        ("vcposim/arrays.py", "def f():\n    import vcposim.commands.main", "vcposim.arrays (the formulas) imports"),
        (
            "vcposim/batch.py",
            "from .laboratory.exact import f",
            "vcposim.batch (the formulas) imports vcposim.laboratory",
        ),
        (
            "vcposim/batch.py",
            "from .laboratory import exact",
            "vcposim.batch (the formulas) imports vcposim.laboratory",
        ),
        ("vcposim/problems/rollouts.py", "from ..laboratory import exact", "(problems) imports vcposim.laboratory"),
        ("vcposim/errors.py", "from vcposim.arrays import x", "vcposim.errors -> vcposim.arrays is a circle"),
        ("vcposim/novelty.py", "", "vcposim.novelty is in no room; put it into one of"),
        ("vcposim/novelty/thing.py", "", "vcposim.novelty.thing is in no room"),
        (
            "vcposim/laboratory/exact.py",
            "def f():\n    import torch",
            "vcposim.laboratory.exact imports torch; vcposim may use",
        ),
        (
            "vcposim/laboratory/exact.py",
            "import simulations.q",
            "vcposim.laboratory.exact imports simulations; vcposim may",
        ),
        ("simulations/q.py", "from torch import nn", "simulations.q imports torch; simulations may use"),
        ("simulations/q.py", "import llm_bridge", "simulations.q imports llm_bridge"),
        ("proofs/t.py", "from simulations import q", "proofs.t imports simulations"),
        ("llm_bridge/ratios.py", "from tests.strategies import x", "llm_bridge.ratios imports tests"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, says: str):
    found = violations(tree(tmp_path, **{file: text}))
    assert any(says in line for line in found), found
