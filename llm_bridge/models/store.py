"""Model folders on disk that are whole or not there: written aside and renamed, with a checksum of every file.

`manifest.json` says what a folder holds and the SHA-256 of its files. Weights are safetensors: loading runs no code.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from platformdirs import user_cache_path

from vcposim.errors import InputError

MANIFEST = "manifest.json"


def cache_folder(chosen: str | Path | None = None) -> Path:
    """The folder of converted and warmed-up models: the one given, or the platform's place for caches."""
    return user_cache_path("vcposim") if chosen is None else Path(chosen)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, write: Callable[[Path], Any], about: dict[str, Any]) -> None:
    """Calls `write` on a new folder, adds the manifest, and puts it in the place of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write(aside)
        files = {path.name: sha256(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"about": about, "sha256": files}, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check(folder: Path) -> dict[str, Any]:
    """What `folder` is about; InputError naming the file if one is missing or not what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, about = manifest["sha256"], manifest["about"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder / MANIFEST}: missing or unreadable; delete the folder and make it again") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != expected:
            raise InputError(f"{path}: missing, or its checksum is not that of the manifest; delete the folder")
    return about
