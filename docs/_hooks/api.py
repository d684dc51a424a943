"""A page for every public module of `vcposim` and `llm_bridge`, and one for the names to begin with."""

import ast
import importlib
from pathlib import Path

import vcposim
from _hooks.text import plain, table

ROOT = Path(__file__).parents[2]
PACKAGES = ("vcposim", "llm_bridge")
ROOMS = {
    "vcposim": "The formulas",
    "vcposim.problems": "Problems with known answers",
    "vcposim.gauges": "Gauges",
    "vcposim.catalogue": "The catalogue",
    "vcposim.laboratory": "The laboratory",
    "vcposim.learning": "Small learners",
    "vcposim.pipeline": "The pipeline",
    "vcposim.replay": "Replay of dumped rollouts",
    "vcposim.testing": "The laws of estimators",
    "vcposim.commands": "The command line",
}


def modules() -> list[str]:
    """Every module without an underscore, packages included, sorted."""
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts):
                found.append(".".join(parts))
    return sorted(found)


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).is_dir()


def purpose(module: str) -> str:
    """The first sentence of a module's docstring, without importing it."""
    text = ast.get_docstring(ast.parse(file_of(module).read_text())) or ""
    line = text.split("\n\n")[0].replace("\n", " ")
    return line.removeprefix(f"{module.split('.')[0]}: ")


def defined(module: str) -> set[str]:
    """Names that a module's own lines define."""
    names: set[str] = set()
    for node in ast.parse(file_of(module).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def home(name: str, module: str) -> str:
    """The module whose lines define what `module` offers under a name; the module of that name if it is one.

    >>> home("entry", "vcposim"), home("exact", "vcposim")
    ('vcposim.catalogue.entries.entry', 'vcposim.laboratory.exact')
    """
    value = getattr(importlib.import_module(module), name)
    if type(value).__name__ == "module":
        return str(value.__name__)
    if module == "vcposim":
        place, _, attribute = vcposim._PLACES[name].partition(":")
        return home(attribute or name, f"vcposim.{place}")
    if name in defined(module):
        return f"{module}.{name}"
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return home(alias.name, node.module)
    return f"{getattr(value, '__module__', module)}.{name}"


def link(target: str, label: str) -> str:
    role = "py:mod" if target in modules() else "py:obj"
    return f"{{{role}}}`{label} <{target}>`"


def offered(module: str) -> list[str]:
    """What a package offers under its own name."""
    return list(getattr(importlib.import_module(module), "__all__", []))


def page(module: str) -> str:
    """One module."""
    out = [f"# {module}\n"]
    names = offered(module) if is_package(module) and module.startswith("vcposim") else []
    own = defined(module)
    listed = [name for name in names if name not in own]
    options = (
        "   :no-members:\n"
        if is_package(module) and not (own - {"_PLACES"} - {n for n in own if n.startswith("_")})
        else ""
    )
    if is_package(module) and listed:
        options = "   :no-members:\n"
    out.append(f"```{{eval-rst}}\n.. automodule:: {module}\n{options}```\n")
    if listed:
        out.append("## Names\n")
        rows = [(link(home(name, module), name), summary(module, name)) for name in listed]
        out.append(table(("name", "what it is"), rows))
    return "\n".join(out)


def summary(module: str, name: str) -> str:
    value = getattr(importlib.import_module(module), name)
    text = getattr(value, "__doc__", None) or ""
    if isinstance(value, dict | tuple | str | float | int):
        text = ""
    return plain(text.strip().split("\n\n")[0].replace("\n", " "))


def pages() -> dict[str, str]:
    """The module pages and their index."""
    found = modules()
    out = {f"reference/api/{module}.md": page(module) for module in found}
    index = [
        "# Python\n",
        "The names to begin with are on {doc}`vcposim`. `vcposim` knows NumPy at most; `llm_bridge` is the "
        "same in torch. "
        "Each page is made from the docstrings of its module; `[source]` beside a name shows the lines.\n",
    ]
    for group, title in [*ROOMS.items(), ("llm_bridge", "In torch: llm_bridge")]:
        if group == "vcposim":
            members = [m for m in found if m.count(".") <= 1 and m.startswith("vcposim") and m not in ROOMS] + [
                "vcposim"
            ]
        else:
            members = [m for m in found if f"{m}.".startswith(f"{group}.")]
        rows = [(f"{{doc}}`{m} <{m}>`", plain(purpose(m))) for m in sorted(members)]
        index += [f"## {title}\n", table(("module", "what it is"), rows)]
    toc = "\n".join(found)
    index.append(f"```{{toctree}}\n:hidden:\n{toc}\n```\n")
    out["reference/api/index.md"] = "\n".join(index)
    return out
