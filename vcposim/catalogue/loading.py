"""Objects named on the command line: `package.module:function`, or `path/to/file.py:function`."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from vcposim.errors import InputError, unknown_name


def load(name: str) -> Any:
    """What `module:attribute` or `file.py:attribute` names; modules are looked for in the current folder first.

    Raises `InputError` for a module that is not there or cannot be imported, and for an unknown attribute.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise InputError(f"estimator: {name!r} names no function; write module:function or path/to/file.py:function")
    found: Any = _module(place)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [x for x in vars(found) if not x.startswith("_") and callable(getattr(found, x))]
            raise unknown_name(f"{place}", part, known)
        found = getattr(found, part)
    return found


def _module(place: str) -> ModuleType:
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise InputError(f"estimator: there is no file {place}; give its path from {Path.cwd()}, or an absolute one")
    folder = str(path.parent.resolve() if path.suffix == ".py" else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _from_file(path) if path.suffix == ".py" else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise InputError(
                f"estimator: no module {error.name!r} in {folder} or among the installed packages; "
                "write path/to/file.py:function for a file elsewhere"
            ) from None
        raise InputError(f"estimator: {place} cannot be imported, it misses {error.name!r}; install that") from error
    except Exception as error:
        raise InputError(f"estimator: {place} cannot be imported, {_where(error)}{_brief(error)}") from error


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "" if isinstance(error, SyntaxError) else f"line {last.lineno} of {Path(last.filename).name} raises "


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
