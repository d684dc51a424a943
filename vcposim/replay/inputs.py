"""Names, folders and globs -> the files of rollouts in them, in natural order; what is passed over is said."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vcposim.errors import InputError

SUFFIXES = ("jsonl", "json", "ndjson", "parquet", "arrow", "feather", "ipc", "pt", "pth")
PACKED = ("gz", "zst", "zstd", "bz2", "xz", "lz4")

NO_ROLLOUTS = re.compile(
    r"""metadata\.jsonl$|^metrics\.jsonl$|^eval_|^val_data_step|_eval\.|^tokenizer.*\.json$|config\.json$
    |^(trainer_state|args|hparams|params|settings|metadata|summary|special_tokens_map|\w+_results)\.json$
    |^(optimizer|scheduler|scaler|rng_state\w*|training_args|pytorch_model\S*|adapter_model|zero_pp_rank\S*|mp_rank\S*)
     \.(pt|pth)$""",
    re.VERBOSE,
)
"""files that trainers put beside their rollouts: what the run was, its metrics, its evaluations, its checkpoints"""
LONGEST_NAME = 255
"""bytes of a file's name, on every file system in use"""
PART = re.compile(r"(.*?)-?\d+-of-(\d+)(\.[\w.]+)")
"""one of so many files of a data set, as train-00000-of-00004.parquet"""
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def find_inputs(arguments: Sequence[str | Path]) -> tuple[list[str], list[str]]:
    """The files behind names, folders, globs and `-`, in natural order, each once; and notes on what was passed over.

    Raises `InputError` for a name that is nothing, for a folder that holds no rollouts or several splits of a data set.
    """
    files: list[str] = []
    notes: list[str] = []
    require_names(arguments)
    for argument in map(str, arguments):
        path = Path(argument)
        if argument == "-" or (path.exists() and not path.is_dir()):
            files.append(argument)
        elif path.is_dir():
            found, passed = _folder(path)
            if not found:
                what = f"; not read: {_some(passed)}" if passed else ""
                raise InputError(f"{path}: a folder without rollouts (of {', '.join(SUFFIXES)}){what}")
            files += found
            if passed:
                notes.append(f"not read in {path}: {_some(passed)}")
        elif any(letter in argument for letter in "*?["):
            matching = sorted(glob.glob(argument, recursive=True), key=natural)
            found = [f for f in matching if Path(f).is_file()]
            if not matching:
                raise InputError(f"{argument}: no file matches; check the pattern")
            if not found:  # a pattern of folders
                several, passed = find_inputs(matching)
                found, notes = several, notes + passed
            files += found
        else:
            raise InputError(f"{path}: no such file; pass a file or folder of rollouts, a glob, or - for a pipe")
    strange = next((name for name in files if not name.isprintable()), None)
    if strange is not None:
        raise InputError(f"{strange!a}: a name that cannot be shown in a line; rename it")
    # links to files that are there themselves, and files named twice, are read once
    first: dict[str, str] = {}
    for name in sorted(files, key=os.path.islink):
        first.setdefault(os.path.realpath(name), name)
    kept = list(dict.fromkeys(name for name in files if first[os.path.realpath(name)] == name))
    left = [Path(name).name for name in files if name not in first.values()]
    if len(kept) < len(files):
        named = f" (links: {_some(left)})" if left else ""
        notes.append(f"{len(files) - len(kept)} of {len(files)} files are others once more: read once{named}")
    return kept, notes


def require_names(arguments: Sequence[str | Path]) -> None:
    """Refuse what is no name of a file on any system, which nobody could look for."""
    for argument in map(str, arguments):
        if max(len(os.fsencode(part)) for part in (*Path(argument).parts, "")) > LONGEST_NAME or "\0" in argument:
            raise InputError(f"{argument[:40]!a}...: no file can have such a name; check it")


def _folder(path: Path) -> tuple[list[str], list[str]]:
    """Its files of rollouts, and names of what is passed over."""
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = _json_of(splits).get("splits", [])
        if len(names) > 1:
            raise InputError(f"{path}: a dataset of the splits {', '.join(names)}; pass one, as {path / names[0]}")
    # a folder written by datasets.save_to_disk describes itself in JSON files that are no rollouts
    saved = {f.parent for f in path.rglob("state.json") if list(f.parent.glob("*.arrow"))}
    for folder in saved:
        if any(key.startswith("_indices") and value for key, value in _json_of(folder / "state.json").items()):
            raise InputError(
                f"{folder}: a dataset saved with an index of the rows that were selected or shuffled; "
                "save_to_disk again after flatten_indices()"
            )
    found: list[Path] = []
    passed: list[str] = []
    details = (path / "train_data").is_dir() and (path / "rollout_data").is_dir()
    inside = path / "train_data" if details else path  # slime's --dump-details: the other half is joined to it
    for f in sorted((f for f in inside.rglob("*") if not f.is_dir()), key=natural):
        hidden = any(part.startswith((".", "_")) for part in f.relative_to(path).parts)
        parts = f.name.lower().split(".")
        kind = parts[-2] if parts[-1] in PACKED and len(parts) > 2 else parts[-1]
        if NO_ROLLOUTS.search(f.name):
            passed.append(f.name)
        elif hidden or f.name == "dataset_dict.json" or (f.parent in saved and f.suffix == ".json"):
            continue
        elif kind not in SUFFIXES:
            passed.append(f.name)
        elif not f.is_file():
            passed.append(f"{f.name} ({'a link to nothing' if f.is_symlink() else 'no file, a pipe or a device'})")
        elif not f.stat().st_size:
            passed.append(f"{f.name} (empty)")
        else:
            found.append(f)
    return list(map(str, found)), passed + list(_missing_parts(path, found))


def _missing_parts(path: Path, found: Sequence[Path]) -> Iterator[str]:
    """Files of data sets that are not all there."""
    sets: dict[tuple[Path, str, str, str], set[str]] = {}
    for f in found:
        part = PART.fullmatch(f.name)
        if part is not None:
            sets.setdefault((f.parent, part[1], part[2], part[3]), set()).add(f.name)
    splits = {name: folder for folder, name, _, _ in sets if name in SPLITS}
    if len(splits) > 1:
        name = min(splits, key=SPLITS.index)
        raise InputError(f"{path}: files of the splits {', '.join(splits)}; pass one, as '{splits[name]}/{name}-*'")
    for (_, name, total, end), names in sets.items():
        if len(names) < int(total):
            yield f"{int(total) - len(names)} of the {int(total)} files {name}-*-of-{total}{end}, which are not there"


def _json_of(file: Path) -> Any:
    """What it holds, or an empty object where that is none."""
    with contextlib.suppress(ValueError, OSError):
        value = json.loads(file.read_text())
        return value if isinstance(value, dict) else {}
    return {}


def natural(path: Any) -> list[Any]:
    """A key that sorts step_2 before step_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
