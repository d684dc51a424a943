"""Checkpoints that are whole or not there: a folder with `state.json` and `tensors.safetensors`, nothing pickled.

A state is nested lists and dicts of plain values and tensors. Tensors go into one safetensors file, numbered; in the
JSON stands `{"tensor": number}`. The folder is written under another name, flushed to the disk and renamed: a kill at
any moment leaves the earlier checkpoints and perhaps a folder `.partial-...` that the next save clears away.
`state.json` holds the SHA-256 of the tensor file, so that a cut or damaged one is an error and never a silent resume.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vcposim.errors import InputError

FORMAT = 1
PREFIX, PARTIAL = "update-", ".partial-"
STATE, TENSORS = "state.json", "tensors.safetensors"
REMEDY = "delete this folder to resume from the one before it, or start again"


def save_checkpoint(folder: Path, version: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state of a version under `folder` and delete all but the newest `keep`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(PARTIAL + "*"):
        shutil.rmtree(left)
    path, partial = folder / f"{PREFIX}{version:08d}", folder / f"{PARTIAL}{version:08d}"
    partial.mkdir()
    tensors: list[Tensor] = []
    plain = _plain(state, tensors)
    payload = save({str(i): x for i, x in enumerate(tensors)})
    _write(partial / TENSORS, payload)
    head = {"format": FORMAT, "sha256": hashlib.sha256(payload).hexdigest(), "state": plain}
    _write(partial / STATE, json.dumps(head).encode())
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name is on the disk before older ones go
    finally:
        os.close(handle)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(PREFIX + "*") if path.is_dir())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint. Raises `InputError`, one line with the file and a remedy, if it is not whole."""
    state, tensors = path / STATE, path / TENSORS
    try:
        head = json.loads(state.read_bytes())
        digest, plain, written = head["sha256"], head["state"], head["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{state}: not a checkpoint's state ({_line(error)}); {REMEDY}") from None
    if written != FORMAT:
        raise InputError(
            f"{state}: written in format {written}, this version reads {FORMAT}; resume with the version that wrote it"
        )
    try:
        payload = tensors.read_bytes()
        if hashlib.sha256(payload).hexdigest() != digest:
            raise InputError(f"{tensors}: damaged or cut off ({len(payload)} bytes, wrong SHA-256); {REMEDY}")
        found = load(payload)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{tensors}: cannot be read ({_line(error)}); {REMEDY}") from None
    return _restored(plain, found)


def _plain(x: Any, tensors: list[Tensor]) -> Any:
    if isinstance(x, Tensor):
        tensors.append(x.detach().cpu().contiguous().clone())
        return {"tensor": len(tensors) - 1}
    if isinstance(x, dict):
        return {str(name): _plain(value, tensors) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value, tensors) for value in x]
    return x


def _restored(x: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(x, dict):
        if x.keys() == {"tensor"}:
            return tensors[str(x["tensor"])]
        return {name: _restored(value, tensors) for name, value in x.items()}
    return [_restored(value, tensors) for value in x] if isinstance(x, list) else x


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
