"""The catalogue's own results, dated: a newcomer's estimator is compared with all of them and only it is run.

Runs are paired: same tasks, same seeds, same random numbers. That is so only if the leaderboard was made with the same
settings, whose hash it holds, and by a source that computes the same: one run of the group mean is made again and
must come to the same values. An entry that has changed since, or is new, is not among the results: run it too.

    vcposim compare --size full --out DIR
    python -m vcposim.comparison.leaderboard 2026-11-28 DIR             # writes the file that comes along

    vcposim compare NEW ... --size full --alone --out DIR
    python -m vcposim.comparison.leaderboard 2026-11-28 --add DIR       # adds these entries, keeps the others

Of several DIRs, of one size and one set of settings, a later one replaces or adds entries. What is added was made by
another source than the rest: the group mean, which --alone makes again, must come to what the leaderboard says of it
in every regime, and a row that was added says when and by which versions it was made.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from vcposim.catalogue import CATALOGUE
from vcposim.comparison.design import (
    LAGS,
    REFERENCE,
    SIZES,
    LearningSetting,
    MeasureSetting,
    MomentsSetting,
    Size,
    canonical,
)
from vcposim.comparison.measure import Measured
from vcposim.comparison.result import ComparedEstimator, LeaderboardHead, by_rank, laws_of, staled, summarized
from vcposim.comparison.run import SCHEMA, Folder, fingerprint
from vcposim.comparison.workers import write_atomically
from vcposim.errors import InputError

FILE = "leaderboard.json"
SAME_WITHIN = 0.02
"""mean difference of values that another processor's rounding may make of chaotic training"""


class MadeLater(TypedDict):
    """When and by which versions."""

    date: str
    vcposim: str
    packages: dict[str, str | None]
    python: str


class StandingEntry(TypedDict):
    """An entry of the catalogue as it was (a hash of its data) and what was measured of it, by name of the setting."""

    fingerprint: str
    records: dict[str, Measured]
    made: NotRequired[MadeLater]
    """of a row that was added to others"""


class Leaderboard(LeaderboardHead):
    """The file: when and from what it was made, and its estimators."""

    schema: str
    settings_sha256: str
    packages: dict[str, str | None]
    python: str
    estimators: dict[str, StandingEntry]


@cache
def read() -> Leaderboard:
    """The leaderboard that comes with this version; `InputError` if it is of other settings than this version's."""
    file = files("vcposim.comparison").joinpath(FILE)
    if not file.is_file():
        raise InputError("leaderboard: none comes with this version; name every estimator to compare, and pass --alone")
    found: Leaderboard = json.loads(file.read_text())
    size = SIZES.get(found.get("size", ""))
    if found.get("schema") != SCHEMA or size is None or found.get("settings_sha256") != size.digest():
        raise InputError(
            f"leaderboard: that of {found.get('date')} was made with other settings; name every estimator you want "
            "compared and pass --alone, or run the whole catalogue"
        )
    return found


def standing(size: Size) -> dict[str, dict[str, Measured]]:
    """Estimator -> setting -> record, as if run at this size: what the leaderboard has of entries as they are now.

    Transformers are not on it. Raises `InputError` if the leaderboard was made at a smaller size.
    """
    board = read()
    made, size = SIZES[board["size"]], replace(size, transformers=())
    kept = {setting.name: setting for setting in made.settings()}
    for setting in size.settings():
        if setting.name not in kept or not _within(setting, kept[setting.name]):
            raise InputError(
                f"--size: the leaderboard of {board['date']} was made at size {made.name}; use that, or name every "
                "estimator you want compared and pass --alone"
            )
    return {
        name: {s.name: _part(row["records"][s.name], s, kept[s.name]) for s in size.settings()}
        for name, row in board["estimators"].items()
        if _stands(name, row)
    }


def ranked() -> list[ComparedEstimator]:
    """Every entry as the leaderboard has it, ranked among each other, the best at its own best step size first."""
    size = SIZES[read()["size"]]
    return by_rank(summarized(standing(size), size))


def found() -> dict[str, list[str]]:
    """What the leaderboard says of each entry, a sentence under the first of its sources, for the index of papers."""
    board = read()
    out: dict[str, list[str]] = {}
    for row in ranked():
        own, bias, efficiency = row["summary"].get("own"), staled(row, "bias"), staled(row, "efficiency")
        said = []
        if own:
            score, (rank, low, high) = own["score"][0], own["rank"]
            said.append(f"{score:.3f} at its own best step size, rank {rank} [{low}, {high}] of {own['best_of']}")
        if bias is not None and efficiency is not None:
            said.append(f"on strings at lag {LAGS[-1]} bias {bias:.2g} |g|, D {efficiency:.2g}")
        if broken := [law for law, word in laws_of(row["laws"]).items() if word == "broken"]:
            said.append(f"breaks {', '.join(broken)}")
        if said:
            key = CATALOGUE[row["name"]].references[0]
            out.setdefault(key, []).append(f"{row['name']} on the leaderboard of {board['date']}: {'; '.join(said)}")
    return out


def _within(asked: MeasureSetting, made: MeasureSetting) -> bool:
    if isinstance(asked, LearningSetting) and isinstance(made, LearningSetting):
        grid = set(asked.step_sizes) <= set(made.step_sizes) and set(asked.seeds) <= set(made.seeds)
        return grid and replace(asked, step_sizes=made.step_sizes, seeds=made.seeds) == made
    if isinstance(asked, MomentsSetting) and isinstance(made, MomentsSetting):
        return asked.problems.keys() <= made.problems.keys() and replace(asked, problems=made.problems) == made
    return asked == made


def _part(record: Measured, asked: MeasureSetting, made: MeasureSetting) -> Measured:
    """The cells of a record that a smaller grid has."""
    if "moments" in record and isinstance(asked, MomentsSetting):
        return {"moments": {name: record["moments"][name] for name in asked.problems}}
    if "average" in record and isinstance(asked, LearningSetting) and isinstance(made, LearningSetting):
        steps = [made.step_sizes.index(x) for x in asked.step_sizes]
        seeds = [made.seeds.index(x) for x in asked.seeds]
        average = [[record["average"][i][j] for j in seeds] for i in steps]
        lost = [[record["lost"][i][j] for j in seeds] for i in steps]
        return {"average": average, "lost": lost}
    return record


def require_same_source(anew: Measured, before: Measured) -> None:
    """Refuse a leaderboard if the group mean, run again, comes to other values than it says."""
    now, then = (np.array(record.get("average", np.nan)) for record in (anew, before))
    gap = float(np.mean(np.abs(now - then))) if now.shape == then.shape else float("nan")
    if not gap <= SAME_WITHIN:
        raise InputError(
            f"leaderboard: {REFERENCE} comes to other values here than on the leaderboard of {read()['date']} "
            f"(mean difference {gap:.3g}), so runs are not paired; name every estimator you want compared and pass "
            "--alone"
        )


HERE = Path(__file__).with_name(FILE)


def finished(date: str, folder: Path) -> Leaderboard:
    """A leaderboard of one finished comparison. Raises `InputError` if it is not finished, or of other settings."""
    about = json.loads((folder / "provenance.json").read_bytes())
    run = Folder(folder, tuple(about["estimators"]), SIZES[about["size"]])
    if about["settings_sha256"] != run.size.digest():
        raise InputError(f"{folder}: of other settings than those of size {run.size.name} now; run it anew")
    if run.missing():
        raise InputError(f"{folder}: {len(run.missing())} units are missing; finish the comparison first")
    return {
        "date": date,
        "schema": about["schema"],
        "size": about["size"],
        "settings_sha256": about["settings_sha256"],
        "vcposim": about["vcposim"],
        "packages": about["packages"],
        "python": about["python"],
        "estimators": {
            name: {"fingerprint": about["estimators"][name], "records": short(records)}
            for name, records in run.records().items()
        },
    }


def write(date: str, folders: Sequence[Path], path: Path = HERE) -> Path:
    """Make the leaderboard from finished comparisons; returns the file.

    Raises `InputError` if one is not finished, or of another size than the first.
    """
    board, *others = (finished(date, folder) for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        if other["settings_sha256"] != board["settings_sha256"]:
            raise InputError(f"{folder}: of other settings than {folders[0]}; run both at one size of one version")
        board["estimators"] |= other["estimators"]
    return _put(board, path)


def extend(date: str, folders: Sequence[Path], path: Path = HERE) -> Path:
    """Add the rows of finished comparisons to the leaderboard that comes along, or replace them; returns the file.

    Rows of entries that have changed since and are not made again are dropped. Raises `InputError` for a comparison
    that is not finished, of another size, or in which the group mean is missing or comes to other values.
    """
    board: Leaderboard = {**read(), "date": date}
    rows = {name: row for name, row in board["estimators"].items() if _stands(name, row)}
    for folder in folders:
        more = finished(date, folder)
        if more["settings_sha256"] != board["settings_sha256"]:
            raise InputError(
                f"{folder}: of size {more['size']}; the leaderboard is of size {board['size']}, run it at that"
            )
        if REFERENCE not in more["estimators"]:
            raise InputError(
                f"{folder}: {REFERENCE} is missing, by which runs are known to be paired; run it with --alone"
            )
        again = more["estimators"].pop(REFERENCE)["records"]
        for setting in SIZES[board["size"]].learning():
            require_same_source(again[setting.name], rows[REFERENCE]["records"][setting.name])
        made: MadeLater = {key: more[key] for key in ("date", "vcposim", "packages", "python")}  # type: ignore[assignment]
        rows |= {name: {**row, "made": made} for name, row in more["estimators"].items()}
    return _put({**board, "estimators": rows}, path)


def _stands(name: str, row: StandingEntry) -> bool:
    return name in CATALOGUE and row["fingerprint"] == fingerprint(name)


def _put(board: Leaderboard, path: Path) -> Path:
    """A line for each field and for each row."""
    rows = [
        f"  {json.dumps(k)}: {json.dumps(x, allow_nan=False, separators=(',', ':'))}"
        for k, x in board["estimators"].items()
    ]
    lines = [f" {json.dumps(k)}: {canonical(v)}" for k, v in board.items() if k != "estimators"]
    text = "{\n" + ",\n".join(lines) + ',\n "estimators": {\n' + ",\n".join(rows) + "\n}}\n"
    write_atomically(path, text.encode())
    return path


def short(records: dict[str, Measured]) -> dict[str, Measured]:
    """Records without the words of counterexamples, which `vcposim check` finds again."""
    return {name: {"laws": record["laws"]} if "laws" in record else record for name, record in records.items()}


if __name__ == "__main__":
    when, *where = sys.argv[1:]
    make = extend if "--add" in where else write
    print(make(when, [Path(x) for x in where if x != "--add"]))
