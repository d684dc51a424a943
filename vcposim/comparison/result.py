"""From records to one comparison: scores, ranks and a word for every claim, as plain data that a page and a table show.

Four claims are judged of every estimator that was asked for, each with one of the five words:

    laws       it keeps every law it claims, and those that everybody must
    unbiased   its exact mean is the gradient: `holds if` where it is so on policy only
    common     it learns better than the group mean, both at the common step size, by regime
    own        the same, each at its own best step size
    trained    with it small transformers learn better, by task, if they were asked for

"Better" is a mean difference of success probabilities, averaged over training, above `MARGIN`; "surely" is Holm's
correction over all comparisons of the page. What a seed does not decide is `undecided`; what could not be measured is
`not judged`, with the reason.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple, NotRequired, TypedDict, final

import numpy as np

from vcposim.arrays import Array
from vcposim.comparison.design import (
    COMMON,
    CORE,
    LAGS,
    REFERENCE,
    TRANSFORMER_COMMON,
    LearningSetting,
    MeasureSetting,
    Size,
    TransformerSetting,
)
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
from vcposim.errors import InputError

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
    refused: NotRequired[int]
    """updates of transformers that had no finite gradient"""


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
    transformers: NotRequired[dict[str, LearnedRegime | NotJudged]]
    """by task; of those asked for and the reference, where transformers were asked for"""
    not_judged: dict[str, str]
    words: dict[str, str]
    summary: dict[str, RegimeSummary]
    comparisons: NotRequired[dict[str, dict[str, JudgedDifference]]]
    """by mode and regime, and `trained` by task; of those asked for"""


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
    """The whole comparison. `named` were asked for, `standing` come from the leaderboard `board`.

    Raises `InputError` for transformers that began from different weights.
    """
    everybody = {**{k: v for k, v in standing.items() if k not in named}, **named}
    size = folder.size
    require_one_start(everybody, size.transformers)
    learning, trained = size.learning(), size.transformers
    rows = [_row(name, records, name in named, size) for name, records in everybody.items()]
    _rank(rows, learning)
    places = {mode: [s.name for s in learning] for mode in MODES}
    places |= {"trained": [s.name for s in trained]} if trained else {}
    family = _compare(rows, places)
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
        "claims": claims(size),
        "words": list(WORDS),
        "comparisons_corrected_together": family,
        "profile_at": [round(float(x), 4) for x in PROFILE_AT],
        "estimators": rows,
    }


def claims(size: Size) -> dict[str, str]:
    """What is judged of everybody at a size: name -> sentence."""
    if not size.transformers:
        return CLAIMS
    several = len(size.transformers[0].step_sizes) > 1
    how = "each at its own best step size" if several else f"both at step size {TRANSFORMER_COMMON:g}"
    return {**CLAIMS, "trained": f"trains small transformers better than {REFERENCE}, {how}"}


def require_one_start(records: MeasuredByName, trained: Sequence[TransformerSetting]) -> None:
    """Refuse transformers that began from different weights: their runs are not paired."""
    for setting in trained:
        starts = set[str]()
        for one in records.values():
            record = one.get(setting.name)
            if record is not None and "start" in record:
                starts.add(record["start"])
        if len(starts) > 1:
            raise InputError(
                f"--transformers: records of {setting.name} begin from different weights, as machines that round "
                "differently warm them up; compute all shards on one kind of machine, in a new --out"
            )


def report_json(report: ComparisonReport) -> str:
    """The text of comparison.json."""
    return json.dumps(report, allow_nan=False, ensure_ascii=False, indent=1, default=asdict) + "\n"


def summarized(records: MeasuredByName, size: Size) -> list[ComparedEstimator]:
    """The rows of estimators with their scores and ranks among each other, nobody being asked for."""
    rows = [_row(name, found, False, size) for name, found in records.items()]
    _rank(rows, size.learning())
    return rows


def _row(name: str, records: Mapping[str, Measured], named: bool, size: Size) -> ComparedEstimator:
    """One estimator's measurements, and what of them can be said without the others."""
    laws, moments = records["laws"], records["moments"]
    learned = {setting.name: _learned(records[setting.name], setting, COMMON) for setting in size.learning()}
    trained = {s.name: _learned(records[s.name], s, TRANSFORMER_COMMON) for s in size.transformers if s.name in records}
    parts = {"laws": laws, "moments": moments, **learned, **{f"transformer on {k}": x for k, x in trained.items()}}
    lawful = "not judged" if "laws" not in laws else "fails" if counted(laws)["broken"] else "holds"
    known = [x for x in moments_of(moments).values() if not isinstance(x, str)]
    unbiased = verdict(["holds" if x["bias"] < ROUNDING else "fails" for x in known], over="where")
    row: ComparedEstimator = {
        "name": name,
        "named": named,
        "laws": laws,
        "moments": moments,
        "learning": learned,
        "not_judged": {part: record["not_judged"] for part, record in parts.items() if "not_judged" in record},
        "words": {"laws": lawful, "unbiased": unbiased},
        "summary": {},
    }
    if trained:
        row["transformers"] = trained
    return row


def _learned(
    record: Measured, setting: LearningSetting | TransformerSetting, common: float
) -> LearnedRegime | NotJudged:
    """Values by seed at the common and at the own best step size, and how many runs were lost."""
    if "not_judged" in record:
        return record
    assert "average" in record
    average, steps = np.array(record["average"]), setting.step_sizes
    own, chosen = own_best(average)
    at = steps.index(common)
    learned: LearnedRegime = {
        "own": own.tolist(),
        "common": average[at].tolist(),
        "own_step_size": sorted({steps[i] for i in chosen}),
        "by_step": [round(float(x), 4) for x in average.mean(axis=1)],
        "lost_common": sum(record["lost"][at]),
        "lost": int(np.sum(record["lost"])),
        "runs": average.size,
    }
    if "refused" in record:
        learned["refused"] = int(np.sum(record["refused"]))
    return learned


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


def values_of(learned: LearnedRegime | NotJudged | None, mode: str) -> list[float] | None:
    """Values by seed, at the common step size if `mode` is "common", else at the own best; None where not judged."""
    if learned is None or "not_judged" in learned:
        return None
    return learned["common"] if mode == "common" else learned["own"]


def counted(laws: Measured) -> dict[str, int]:
    """How many laws were tried, kept, claimed, and broken though claimed."""
    words = [w for w in laws_of(laws).values() if w != "does not apply"]
    return {
        "tried": len(words),
        "kept": sum(not w.endswith("broken") for w in words),
        "claimed": sum(w in ("holds", "broken") for w in words),
        "broken": sum(w == "broken" for w in words),
    }


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


def learned_at(row: ComparedEstimator, claim: str, place: str) -> LearnedRegime | NotJudged | None:
    """What was learned where a claim looks: a regime, or for `trained` a transformer's task; None for nothing."""
    return row.get("transformers", {}).get(place) if claim == "trained" else row["learning"][place]


def _compare(rows: Sequence[ComparedEstimator], places: Mapping[str, Sequence[str]]) -> int:
    """Each named estimator against the reference, by claim and place, corrected together; how many comparisons."""
    reference = next((row for row in rows if row["name"] == REFERENCE), None)
    asked: list[tuple[JudgedDifference, Difference]] = []
    for row in rows:
        if not row["named"]:
            continue
        row["comparisons"] = {claim: {} for claim in places}
        for claim, where in places.items():
            for place in where:
                judged: JudgedDifference = {"word": "not judged"}
                row["comparisons"][claim][place] = judged
                mine = values_of(learned_at(row, claim, place), claim)
                theirs = None if reference is None else values_of(learned_at(reference, claim, place), claim)
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
        for claim in places:
            words = [c["word"] for c in row["comparisons"][claim].values()] if "comparisons" in row else []
            row["words"][claim] = verdict(words, over="where")
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


class TrainedRow(NamedTuple):
    """What transformers learned of a task, as a table has it; difference and word are from the reference."""

    estimator: str
    task: str
    value: float | None
    """success rate averaged over training, held-out problems and seeds; None where not judged"""
    low: float
    high: float
    """of the seeds"""
    lost: int
    runs: int
    refused: int
    difference: list[float] | None
    word: str


def trained_rows(rows: Sequence[ComparedEstimator]) -> list[TrainedRow]:
    """A line for each estimator with transformers and task; none where they were not asked for."""
    found = []
    for row in rows:
        for task, learned in row.get("transformers", {}).items():
            judged = row["comparisons"]["trained"][task] if "comparisons" in row else JudgedDifference(word="")
            word = "" if judged["word"] == "not judged" and "own" in learned else judged["word"]
            values = values_of(learned, "own")
            if "own" in learned and values is not None:
                mean, runs = float(np.mean(values)), (learned["lost"], learned["runs"], learned.get("refused", 0))
                found.append(
                    TrainedRow(row["name"], task, mean, min(values), max(values), *runs, judged.get("difference"), word)
                )
            else:
                found.append(TrainedRow(row["name"], task, None, 0.0, 0.0, 0, 0, 0, None, word))
    return found


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
