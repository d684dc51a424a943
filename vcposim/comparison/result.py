"""From records to one comparison: scores, ranks and a word for every claim, as plain data that a page and a table show.

Four claims are judged of every estimator that was asked for, each with one of the five words:

    laws       it keeps every law it claims, and those that everybody must
    unbiased   its exact mean is the gradient: `holds if` where it is so on policy only
    common     it learns better than the group mean, both at the common step size, by regime
    own        the same, each at its own best step size

"Better" is a mean difference of success probabilities, averaged over training, above `MARGIN`; "surely" is Holm's
correction over all comparisons of the page. What a seed does not decide is `undecided`; what could not be measured is
`not judged`, with the reason.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NotRequired, TypedDict, final

import numpy as np

from vcposim.arrays import Array
from vcposim.comparison.design import COMMON, CORE, LAGS, REFERENCE, LearningSetting, MeasureSetting, Size
from vcposim.comparison.measure import MOMENTS, Measured, NotJudged
from vcposim.comparison.run import Folder, RunSource
from vcposim.comparison.statistics import (
    LEVEL,
    PROFILE_AT,
    WORDS,
    Difference,
    difference,
    holm,
    own_best,
    profile,
    ranking,
    verdict,
)

MARGIN = 0.02
"""the difference of success probabilities that matters"""
ROUNDING = 1e-7
"""a relative bias that is none: exact moments carry rounding, and are kept to nine digits"""
MODES = {"own": "own best step size", "common": "common step size"}
"""how a step size is chosen"""
CLAIMS = {
    "laws": "keeps every law it claims and those that every estimator must keep",
    "unbiased": "its exact mean is the gradient",
    "own": f"learns better than {REFERENCE}, each at its own best step size",
    "common": f"learns better than {REFERENCE}, both at step size {COMMON:g}",
}
MeasuredByName = Mapping[str, Mapping[str, Measured]]
"""estimator -> name of a setting -> what was measured there"""


class LeaderboardHead(TypedDict):
    """Which leaderboard: its date, the size it was made at, and by which version."""

    date: str
    size: str
    vcposim: str


@final
class LearnedRegime(TypedDict):
    """What an estimator learned in one regime: values by seed, each way of choosing a step size, and runs lost."""

    own: list[float]
    common: list[float]
    own_step_size: list[float]
    by_step: list[float]
    lost_common: int
    lost: int
    runs: int


class RegimeSummary(TypedDict):
    """Over all regimes: score and rank, each with the ends of its interval, and the profile at `PROFILE_AT`."""

    score: list[float]
    rank: list[int]
    profile: list[float]
    best_of: int


class JudgedDifference(TypedDict):
    """One comparison with the reference: the word, and the difference with the ends of its interval."""

    word: str
    difference: NotRequired[list[float]]
    p: NotRequired[float | None]


class ComparedEstimator(TypedDict):
    """All that is said of one estimator."""

    name: str
    named: bool
    laws: Measured
    moments: Measured
    learning: dict[str, LearnedRegime | NotJudged]
    not_judged: dict[str, str]
    words: dict[str, str]
    summary: dict[str, RegimeSummary]
    comparisons: NotRequired[dict[str, dict[str, JudgedDifference]]]
    """by mode and regime; of those asked for"""


class ComparisonReport(RunSource):
    """What comparison.json holds, and the page and the table show."""

    leaderboard: LeaderboardHead | None
    settings: list[MeasureSetting]
    regimes: list[str]
    reference: str
    common_step_size: float
    margin: float
    level: float
    claims: dict[str, str]
    words: list[str]
    comparisons_corrected_together: int
    profile_at: list[float]
    estimators: list[ComparedEstimator]


def comparison(
    folder: Folder, named: MeasuredByName, standing: MeasuredByName, board: LeaderboardHead | None
) -> ComparisonReport:
    """The whole comparison. `named` were asked for, `standing` come from the leaderboard `board`."""
    everybody = {**{k: v for k, v in standing.items() if k not in named}, **named}
    learning = folder.size.learning()
    rows = [_row(name, records, name in named, learning) for name, records in everybody.items()]
    _rank(rows, learning)
    family = _compare(rows, learning)
    return {
        **folder.identity,
        "leaderboard": None
        if board is None
        else {"date": board["date"], "size": board["size"], "vcposim": board["vcposim"]},
        "settings": folder.settings,
        "regimes": [s.name for s in learning],
        "reference": REFERENCE,
        "common_step_size": COMMON,
        "margin": MARGIN,
        "level": LEVEL,
        "claims": CLAIMS,
        "words": list(WORDS),
        "comparisons_corrected_together": family,
        "profile_at": [round(float(x), 4) for x in PROFILE_AT],
        "estimators": rows,
    }


def report_json(report: ComparisonReport) -> str:
    """The text of comparison.json."""
    return json.dumps(report, allow_nan=False, ensure_ascii=False, indent=1, default=asdict) + "\n"


def summarized(records: MeasuredByName, size: Size) -> list[ComparedEstimator]:
    """The rows of estimators with their scores and ranks among each other, nobody being asked for."""
    learning = size.learning()
    rows = [_row(name, found, False, learning) for name, found in records.items()]
    _rank(rows, learning)
    return rows


def _row(
    name: str, records: Mapping[str, Measured], named: bool, learning: Sequence[LearningSetting]
) -> ComparedEstimator:
    """One estimator's measurements, and what of them can be said without the others."""
    laws, moments = records["laws"], records["moments"]
    learned = {setting.name: _learned(records[setting.name], setting) for setting in learning}
    parts = {"laws": laws, "moments": moments, **learned}
    return {
        "name": name,
        "named": named,
        "laws": laws,
        "moments": moments,
        "learning": learned,
        "not_judged": {part: record["not_judged"] for part, record in parts.items() if "not_judged" in record},
        "words": {"laws": _laws_word(laws), "unbiased": _unbiased(moments)},
        "summary": {},
    }


def _learned(record: Measured, setting: LearningSetting) -> LearnedRegime | NotJudged:
    """Values by seed at the common and at the own best step size, and how many runs were lost."""
    if "not_judged" in record:
        return record
    assert "average" in record
    average, steps = np.array(record["average"]), setting.step_sizes
    own, chosen = own_best(average)
    at = steps.index(COMMON)
    return {
        "own": own.tolist(),
        "common": average[at].tolist(),
        "own_step_size": sorted({steps[i] for i in chosen}),
        "by_step": [round(float(x), 4) for x in average.mean(axis=1)],
        "lost_common": sum(record["lost"][at]),
        "lost": int(np.sum(record["lost"])),
        "runs": average.size,
    }


def laws_of(record: Measured) -> dict[str, str]:
    """Law -> what became of it; nothing where that was not judged."""
    if "laws" in record:
        return record["laws"]
    return {}


def moments_of(record: Measured) -> dict[str, dict[str, float] | str]:
    """Problem -> `MOMENTS` there, or why there are none; nothing where that was not judged."""
    if "moments" in record:
        return record["moments"]
    return {}


def values_of(learned: LearnedRegime | NotJudged, mode: str) -> list[float] | None:
    """Values by seed, `mode` one of `MODES`; None where that was not judged."""
    if "not_judged" in learned:
        return None
    return learned["own"] if mode == "own" else learned["common"]


def counted(laws: Measured) -> dict[str, int]:
    """How many laws were tried, kept, claimed, and broken though claimed."""
    words = [w for w in laws_of(laws).values() if w != "does not apply"]
    return {
        "tried": len(words),
        "kept": sum(not w.endswith("broken") for w in words),
        "claimed": sum(w in ("holds", "broken") for w in words),
        "broken": sum(w == "broken" for w in words),
    }


def _laws_word(laws: Measured) -> str:
    if "laws" not in laws:
        return "not judged"
    return "fails" if counted(laws)["broken"] else "holds"


def _unbiased(moments: Measured) -> str:
    known = [x for x in moments_of(moments).values() if not isinstance(x, str)]
    return verdict(["holds" if x["bias"] < ROUNDING else "fails" for x in known], over="where")


def _rank(rows: Sequence[ComparedEstimator], learning: Sequence[LearningSetting]) -> None:
    """Scores, ranks and profiles of those who learned in every regime; others get none."""
    able = [row for row in rows if all("own" in row["learning"][s.name] for s in learning)]
    if not able:
        return
    for mode in MODES:
        values = np.array([[values_of(row["learning"][s.name], mode) for s in learning] for row in able])
        found = ranking(values)
        for row, score, rank, runs in zip(able, found.score, found.rank, values, strict=True):
            row["summary"][mode] = {
                "score": [round(x, 4) for x in (score.value, score.low, score.high)],
                "rank": [int(rank.value), int(np.floor(rank.low)), int(np.ceil(rank.high))],
                "profile": profile(runs),
                "best_of": len(able),
            }


def _compare(rows: Sequence[ComparedEstimator], learning: Sequence[LearningSetting]) -> int:
    """Each named estimator against the reference, by regime, corrected together; how many comparisons that is."""
    reference = next((row for row in rows if row["name"] == REFERENCE), None)
    asked: list[tuple[JudgedDifference, Difference]] = []
    for row in rows:
        if not row["named"]:
            continue
        row["comparisons"] = {mode: {} for mode in MODES}
        for mode in MODES:
            for setting in learning:
                regime = setting.name
                judged: JudgedDifference = {"word": "not judged"}
                row["comparisons"][mode][regime] = judged
                mine = values_of(row["learning"][regime], mode)
                theirs = None if reference is None else values_of(reference["learning"][regime], mode)
                if row is not reference and mine is not None and theirs is not None:
                    asked.append((judged, difference(_values(mine), _values(theirs), MARGIN)))
    uncertain = [d.p for _, d in asked if d.p is not None]
    adjusted = iter(holm(uncertain))
    for judged, d in asked:
        p = None if d.p is None else next(adjusted)
        sure = p is None or p < LEVEL
        judged["word"] = ("holds" if d.value > MARGIN else "fails") if sure else "undecided"
        judged["difference"] = [round(x, 4) for x in (d.value, d.low, d.high)]
        judged["p"] = None if p is None else float(f"{p:.3g}")
    for row in rows:
        for mode in MODES:
            words = [c["word"] for c in row["comparisons"][mode].values()] if "comparisons" in row else []
            row["words"][mode] = verdict(words, over="where")
    return len(asked)


def _values(x: Sequence[float]) -> Array:
    return np.asarray(x, dtype=float)


def staled(row: ComparedEstimator, key: str, problem: str = "strings", lag: int = LAGS[-1]) -> float | None:
    """One of `MOMENTS` of an estimator at a lag; None if it was not judged there.

    D says what a step along the mean's line can gain; where the mean points downhill it is shown with a minus.
    """
    assert key in MOMENTS
    found = moments_of(row["moments"]).get(f"{problem}, lag {lag}")
    if found is None or isinstance(found, str):
        return None
    return -found[key] if key == "efficiency" and found["cosine"] < 0 else found[key]


def because(row: ComparedEstimator, claim: str) -> str:
    """What a word rests on, to be put behind its sentence: `: 13 of 16 kept, 12 claimed`."""
    if row["words"][claim] == "not judged":
        reasons = list(dict.fromkeys(row["not_judged"].values()))
        return f": {reasons[0]}" if reasons else ""
    if claim == "laws":
        count = counted(row["laws"])
        broken = [law for law, word in laws_of(row["laws"]).items() if word == "broken"]
        also = [law for law, word in laws_of(row["laws"]).items() if word == "not claimed: broken"]
        text = f": {count['kept']} of {count['tried']} kept, {count['claimed']} claimed"
        text += f"; breaks {', '.join(broken)}" if broken else ""
        return text + (f"; does not keep, nor claim, {', '.join(also)}" if also else "")
    if claim == "unbiased":
        known = {k: x["bias"] for k, x in moments_of(row["moments"]).items() if not isinstance(x, str)}
        worst = max(known, key=lambda k: known[k])
        clean = [k for k, bias in known.items() if bias < ROUNDING]
        text = f": largest bias {known[worst]:.3g} |gradient| ({worst})"
        return text + (f"; none on {', '.join(clean)}" if clean and len(clean) < len(known) else "")
    where: dict[str, list[str]] = {}
    for regime, c in row["comparisons"][claim].items():
        where.setdefault(c["word"], []).append(brief(regime))
    return ": " + "; ".join(f"{word} at {', '.join(where[word])}" for word in WORDS if word in where)


def brief(regime: str) -> str:
    """The name of a regime without what it shares with the core."""
    others = [part for part in regime.split(", ") if part not in CORE.name.split(", ")]
    return " and ".join(others) or "the core"


def unjudged(row: ComparedEstimator) -> dict[str, str]:
    """Why something of an estimator was not judged -> what that was, in words: `learning (4 regimes)`."""
    parts: dict[str, list[str]] = {}
    for part, why in row["not_judged"].items():
        parts.setdefault(why, []).append(part)
    out = {}
    for why, names in parts.items():
        regimes = sum(name in row["learning"] for name in names)
        words = [name for name in names if name not in row["learning"]]
        words += [f"learning ({regimes} regime{'s' * (regimes > 1)})"] if regimes else []
        out[why] = ", ".join(words)
    return out


def by_rank(rows: Sequence[ComparedEstimator]) -> list[ComparedEstimator]:
    """Rows from the best rank at the own best step size to the worst, those without one last, equal ones by name."""

    def place(row: ComparedEstimator) -> tuple[int, str]:
        own = row["summary"].get("own")
        return own["rank"][0] if own else len(rows) + 1, row["name"]

    return sorted(rows, key=place)
