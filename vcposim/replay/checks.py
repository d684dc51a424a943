"""Is the file what it seems? Checks of the log-probabilities themselves, as they stream by.

Importance ratios multiply along a trajectory, so a small mistake in how log-probabilities were written (a shift by one
token, padding counted, another temperature) looks like staleness, and is explained away. Each check leaves a `Finding`:
what was seen, with numbers, and what most likely did it. They look at sums over tokens (`TokenSums`, additive), of all
lists and of each (one rank of many may have written its own wrong), and at a sample of the tokens; nothing grows with
the file.

Correlations are those of probabilities, exp(log p), in [0, 1]: a sentinel of -9999 must not drown all others.

Thresholds are set so that clean data (independent noise between the policies, log-ratios of a trajectory with a
standard deviation up to 1.5 nats) raise nothing; the measured rate stands in `tests/vcposim/replay/test_checks.py`.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vcposim.diagnostics import WeightSums, weight_sums
from vcposim.replay.storage import heaviest, largest, pieces

ENOUGH = 200
"""tokens without which no pattern of tokens is claimed"""
COMPARED = 8192
"""tokens of a piece whose ratios are summed, about"""
SAMPLED, SAMPLES = 1024, 32
"""tokens of a piece of the file that are looked at one by one, about; in so many pieces of each file"""
MOST_FILES = 32
"""files that are looked at by themselves: one worker or rank of many may have written its own wrong"""
ALL_OF, ONE_OF = 16, 32
"""pieces of the file whose correlations are all taken, and of how many of the later ones one is: they cost an exp"""
DEEP = -25.0
"""a log-probability below this, met again and again to the last digit, is no measurement"""
FLOOR = -15.0
"""a log-probability below this that comes at least `OFTEN` times and is `COMMON` of all below is none: log(1e-8)"""
OFTEN, COMMON = 10, 0.2
ENDS = 3
"""tokens at either end of a list that are looked at for padding"""
FAR = 1.0
"""nats from which on no noise between two policies turns a log-probability into an exact 0"""
NEAR_ZERO = 1e-5
"""magnitude below which one value that comes again and again, where the other policy is `FAR` off, is a filler: 1e-8"""
NO_NUMBER = -1000.0
"""a whole number from here down is a placeholder even if it stands once: exp of it is 0"""
LONG = 20
"""tokens of a list whose own correlation says something"""
SPREAD = 0.05
"""standard deviation of a list's probabilities, for the same; where all are near 1, noise alone is left to correlate"""
SOME = 0.02
"""share of the lists that are wrong by themselves, at least, and 3 of them: not one odd list among thousands"""
WRONG = ("identical", "shifted", "other tokens", "constant", "learner deeper", "sampler deeper")
"""what a list can be by itself"""
ROUNDED = 0.05
"""share of numbers that half precision can hold, which one in thousands of float32's is"""
ONE_WAY = 0.25
"""correlation one token apart, and what it is more than to the other side, that lists in place have not"""
STEEP, ERRORS, ERRORS_OF_ONE = 1.06, 4.0, 5.0
"""slope of one policy's log-probabilities on the other's from which on they are of two temperatures, and the standard
errors that it must be above that: of all tokens, of one list"""
TEMPERED = 0.05
"""share of the lists that are of two temperatures by themselves, at least, and 4 of them: noise of 1.5 nats a list
makes some so"""
SCALED, PROPORTIONAL, SCALED_LIKELY = 0.05, 0.8, 0.1
"""how far from 1 a factor between all log-probabilities is, what share of the squared log-ratios it explains, and how
far from it that of the likely half of the tokens is at most"""
OFF, ALIKE = 5e-3, 5e-4
"""log-ratio that a constant factor makes at least, and what its repeats differ by at most"""
EXAMPLES = 3
FEW = 8
"""tokens of a list that are not 0 without which it is not called identical"""
UNLIKELY = -1.0
"""log-probability from which down a token is unlikely enough that noise around it is not cut off at 0"""
NARROW, SYSTEMATIC, SIGMAS = 0.5, 0.01, 8.0
"""standard deviation of log-ratios whose mean ratio the sample knows; what its mean may be off, and in standard errors
"""
SURE_OF, FAR_FROM_ONE = 64, 0.2
"""trajectories, and log of the mean weight, from which on `SIGMAS` standard errors between it and 1 are no chance:
where half of the samples count, lognormal weights are so at most 1 time in 100,000"""
ENOUGH_SUMS, FLAT, SHALLOW, EVEN = 64, -0.3, 0.05, 0.5
"""trajectories, correlation of sums with lengths, nats a token, and deviation in terms of the mean, beyond which sums
are none"""
FOLLOWS = 0.7
"""correlation of log-ratios with rewards from which on the learner has seen these very trajectories"""
FILLER = -0.5
"""a log-probability below this does not stand several times in a row, to the last digit, at the end of a list"""

ALIGNMENTS = ("in place", "learner later", "sampler later")
"""how two lists may lie: `learner later` compares the learner's entry t + 1 with the sampler's t"""

BY_THE_RUN = (
    "a few carry everything",
    "follows the reward",
    "weights vanish",
    "weights explode",
    "mean weight",
    "mixed versions",
)
"""checks that a run far off policy can set off too, without any mistake in how it was written"""
OWN_CAUSE = ("follows the reward", "mixed versions")
"""those of them that know their cause"""


class Finding(NamedTuple):
    """Something wrong with the data, or with the run that they show."""

    check: str
    evidence: str
    cause: str
    """what most likely did it, and what to do"""


@dataclass
class Sampled:
    """Tokens of one file that were looked at one by one, and sums over those that were compared."""

    logs: np.ndarray = field(default_factory=lambda: np.zeros(6))
    """(count, x, y, xx, yy, xy) of log-probabilities, the learner's and the sampler's"""
    ratios: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    """(count, x, xx) of log-ratios, of 1 - ratio, and of that at tokens that are unlikely under the sampler"""
    sample: list[np.ndarray] = field(default_factory=list)
    """(2, k) of the same"""


@dataclass
class TokenSums:
    """Sums over the tokens read so far, and a sample of them."""

    count: int = 0
    pieces: int = 0
    compared: int = 0
    """tokens that `same`, `aligned` and `files` are over"""
    same: int = 0
    zero: dict[str, int] = field(default_factory=lambda: {"log_prob": 0, "behavior_log_prob": 0})
    """exactly 0 here, and far from it on the other side"""
    zero_other: dict[str, float] = field(default_factory=lambda: {"log_prob": 0.0, "behavior_log_prob": 0.0})
    near_zero: dict[str, Counter[float]] = field(
        default_factory=lambda: {"log_prob": Counter(), "behavior_log_prob": Counter()}
    )
    """values near 0 and not 0, of tokens compared, that are `FAR` from the other side's"""
    aligned: np.ndarray = field(default_factory=lambda: np.zeros((len(ALIGNMENTS), 6)))
    """(count, x, y, xx, yy, xy) of probabilities at each of `ALIGNMENTS`"""
    files: dict[str, Sampled] = field(default_factory=dict)
    """one for each of the first `MOST_FILES` files, one under "" for the rest"""
    lists_compared: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WRONG, 0))
    """lists long enough to be judged by themselves"""
    wrong: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WRONG, 0))
    """those of them that are so"""
    examples: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in WRONG})
    """the first rows of those"""
    slopes: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    """(xx, yy, xy) about the mean of each list, added up over lists of one temperature, `learner deeper` ones, and
    `sampler deeper` ones"""
    constant: float = 0.0
    """mean log-ratio of each list that is constant, added up"""
    alike: int = 0
    """tokens of the other lists that are equal under both policies and not 0"""
    unequal: int = 0
    """tokens of those lists that are not 0"""
    deep: dict[str, Counter[float]] = field(
        default_factory=lambda: {"log_prob": Counter(), "behavior_log_prob": Counter()}
    )
    lists: int = 0
    """trajectories of more than `ENDS` tokens"""
    blank: dict[str, int] = field(default_factory=lambda: {"begin": 0, "end": 0})
    """those of them that begin (end) with `ENDS` tokens of one constant under each policy"""
    filled: dict[str, int] = field(default_factory=lambda: {"begin": 0, "end": 0})
    """those of them whose constants are not near 0, as those of no sure policy are"""
    filler: dict[str, tuple[float, float]] = field(default_factory=dict)
    """such constants, the learner's and the sampler's"""
    far: dict[str, int] = field(default_factory=lambda: {"all": 0, "begin": 0, "end": 0})
    """tokens compared that the policies disagree on by more than `FAR`: all, and those that begin (end) a list"""
    ended: int = 0
    """lists compared"""
    placed: dict[tuple[str, float], int] = field(default_factory=dict)
    """the row where a deep value, or a zero far from the other policy's, was met first"""

    def add(
        self,
        learner: np.ndarray,
        sampler: np.ndarray,
        ends: np.ndarray,
        rows: np.ndarray,
        largest: float,
        file: str = "",
    ) -> None:
        """Tokens of several trajectories of a file in a row: (m,), (m,), (k,), (k,) -> nothing.

        `ends` are the indices after each trajectory's last token, none is empty, `rows` their numbers, `largest` the
        largest magnitude among the tokens.
        """
        self.count += learner.size
        self.pieces += 1
        deep, low = largest > -DEEP, largest > -FLOOR
        for name, one, other in (("log_prob", learner, sampler), ("behavior_log_prob", sampler, learner)):
            zero = one == 0
            if zero.any() and (far := zero & (other < -FAR)).any():
                self.zero[name] += int(np.count_nonzero(far))
                self.placed.setdefault((name, 0.0), int(rows[np.searchsorted(ends, far.argmax(), side="right")]))
                self.zero_other[name] += float(np.maximum(other[far], -1e4).sum())
            if low and len(self.deep[name]) < 10_000:
                at = np.flatnonzero((one < FLOOR) & np.isfinite(one))
                values, first, count = np.unique(one[at], return_index=True, return_counts=True)
                row = rows[np.searchsorted(ends, at[first], side="right")]
                for value, hits, place in zip(values.tolist(), count.tolist(), row.tolist(), strict=True):
                    self.deep[name][value] += hits
                    self.placed.setdefault((name, value), place)
        starts = np.concatenate([[0], ends[:-1]])
        self._look_at_ends(learner, sampler, starts, ends)
        new = file not in self.files and len(self.files) < MOST_FILES
        if new or self.pieces <= ALL_OF or self.pieces % ONE_OF == 0:
            self._compare(learner, sampler, starts, ends, rows)
            part = self.files.setdefault(file if new or file in self.files else "", Sampled())
            if deep:
                real = np.isfinite(learner)
                part.logs += moments(np.maximum(learner[real], DEEP), np.maximum(sampler[real], DEEP))
            else:
                part.logs += moments(learner, sampler)
            some = slice(None, None, max(learner.size // COMPARED, 1))
            x, y = learner[some], sampler[some]
            real = (x > DEEP) & (y > DEEP)
            x, y = x[real], y[real]
            off = -np.expm1(x - y)
            part.ratios += [[one.size, one.sum(), one @ one] for one in (x - y, off, off[y < UNLIKELY])]
            if len(part.sample) < SAMPLES:
                one_of = max(learner.size // SAMPLED, 1)
                part.sample.append(np.stack([learner[::one_of], sampler[::one_of]]))

    def _look_at_ends(self, learner: np.ndarray, sampler: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        long = ends - starts > ENDS
        self.lists += int(np.count_nonzero(long))
        for name, at in (("begin", starts[long]), ("end", ends[long] - ENDS)):
            at = at[(learner[at] == learner[at + 1]) & (sampler[at] == sampler[at + 1])]  # few, on clean data none
            if not at.size:
                continue
            at = at[:, None] + np.arange(ENDS)
            one, other = learner[at], sampler[at]
            constant = (one == one[:, :1]).all(axis=1) & (other == other[:, :1]).all(axis=1)
            if constant.any():
                pairs = np.stack([one[constant, 0], other[constant, 0]], axis=1)
                filler = pairs[(np.abs(pairs) < NEAR_ZERO).all(axis=1) | (pairs.min(axis=1) < FILLER)]
                self.blank[name] += len(filler)
                self.filled[name] += int(np.count_nonzero(filler.min(axis=1) < FILLER))
                if len(filler):
                    self.filler[name] = tuple(filler[0].tolist())

    def _compare(
        self, learner: np.ndarray, sampler: np.ndarray, starts: np.ndarray, ends: np.ndarray, rows: np.ndarray
    ) -> None:
        self.compared += learner.size
        far = np.abs(learner - sampler) > FAR
        disagreed = np.flatnonzero(far)  # few, on clean data none near 0
        for name, one in (("log_prob", learner), ("behavior_log_prob", sampler)):
            near = one[disagreed]
            near = near[(np.abs(near) < NEAR_ZERO) & (near != 0)]
            if near.size and len(self.near_zero[name]) < 10_000:
                self.near_zero[name].update(near.tolist())
        equal, counted = learner == sampler, learner != 0
        self.ended += ends.size
        for name, at in (("all", ...), ("begin", starts), ("end", ends - 1)):
            self.far[name] += int(np.count_nonzero(far[at]))
        self.same += int(np.count_nonzero(equal))
        alike, of = (np.add.reduceat(flags, starts, dtype=int) for flags in (equal & counted, counted))
        identical = alike == of
        self._judge("identical", of >= FEW, identical, rows)
        others = ~identical & (of >= FEW)
        self.alike += int(alike[others].sum())
        self.unequal += int(of[others].sum())
        lists = _aligned(np.exp(learner), np.exp(sampler), starts, ends)
        self.aligned += lists.sum(axis=-1)
        n, x, y, xx, yy, _ = lists[0]
        varied = (n >= LONG) & (np.minimum(xx - x * x / n, yy - y * y / n) > SPREAD**2 * n)
        here, later, earlier = _correlation(np.moveaxis(lists, 1, 0))
        best = np.maximum(later, earlier)
        self._judge("shifted", varied, _is_shifted(here, best), rows)
        self._judge("other tokens", varied, (here < 0.3) & (best < 0.3), rows)
        self._compare_slopes(learner, sampler, starts, n, rows)

    def _compare_slopes(
        self, learner: np.ndarray, sampler: np.ndarray, starts: np.ndarray, n: np.ndarray, rows: np.ndarray
    ) -> None:
        """Factors that only some lists have: of their ratios, and of their log-probabilities."""
        long = n >= LONG
        if not long.any():
            return
        x, y = np.maximum(learner, DEEP), np.maximum(sampler, DEEP)
        d = x - y
        pairs = np.append(np.abs(d[1:] - d[:-1]) < ALIKE, False) & (np.abs(d) > OFF)
        pairs[np.append(starts[1:], d.size) - 1] = False  # the next is of another list
        constant = np.add.reduceat(pairs, starts, dtype=int) > 0.5 * n
        self._judge("constant", long, constant, rows)
        constant &= long
        if constant.any():
            self.constant += float((np.add.reduceat(d, starts) / n)[constant].sum())
        sx, sy, xx, yy, xy = (np.add.reduceat(v, starts) for v in (x, y, x * x, y * y, x * y))
        moments = np.stack([xx - sx * sx / n, yy - sy * sy / n, xy - sx * sy / n])
        deeper = [long & (slope - ERRORS_OF_ONE * error > STEEP) for slope, error in _slopes(moments, n)]
        for name, found in zip(("learner deeper", "sampler deeper"), deeper, strict=True):
            self._judge(name, long, found, rows)
        for row, lists in enumerate((long & ~deeper[0] & ~deeper[1], *deeper)):
            self.slopes[row] += moments[:, lists].sum(axis=1)

    def _judge(self, name: str, judged: np.ndarray, wrong: np.ndarray, rows: np.ndarray) -> None:
        found = rows[judged & wrong]
        self.lists_compared[name] += int(judged.sum())
        self.wrong[name] += found.size
        self.examples[name] += found[: EXAMPLES - len(self.examples[name])].tolist()

    def in_some(self, name: str) -> bool:
        """Whether so many lists are so by themselves that one worker or rank wrote them so."""
        return self.wrong[name] >= max(3, SOME * self.lists_compared[name])


def moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(count, x, y, xx, yy, xy), which add up: (n,), (n,) -> (6,)."""
    return np.array([x.size, x.sum(), y.sum(), x @ x, y @ y, x @ y])


def _aligned(p: np.ndarray, q: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The moments of each list at each of `ALIGNMENTS`: (3, 6, lists)."""
    last = ends - 1
    product = np.empty(p.size)
    x, y = np.add.reduceat(p, starts), np.add.reduceat(q, starts)
    xx, yy, xy = (np.add.reduceat(np.multiply(a, b, out=product), starts) for a, b in ((p, p), (q, q), (p, q)))
    found = np.empty((len(ALIGNMENTS), 6, ends.size))
    found[0] = ends - starts, x, y, xx, yy, xy
    for k, (a, b, sums) in enumerate(((p, q, (x, y, xx, yy)), (q, p, (y, x, yy, xx))), 1):
        np.multiply(a[1:], b[:-1], out=product[:-1])
        product[last] = 0.0  # its neighbour is of the next list
        begun, ended = a[starts], b[last]  # have no partner
        gone = begun, ended, begun * begun, ended * ended
        found[k, 0], found[k, 5] = ends - starts - 1, np.add.reduceat(product, starts)
        for row, (total, without) in enumerate(zip(sums, gone, strict=True), 1):
            found[k, row] = total - without
    return found


def _correlation(m: np.ndarray) -> np.ndarray:
    """Of moments (6, ...); NaN where nothing varies."""
    n, x, y, xx, yy, xy = m
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0))
        return np.where(spread > 1e-12 * n, (xy - x * y / n) / spread, math.nan)


def _slopes(moments: np.ndarray, n: Any) -> list[tuple[Any, Any]]:
    """Slopes of the learner's on the sampler's and of the sampler's on the learner's, with standard errors, of (xx, yy,
    xy) about the means: (3, ...) -> two pairs of (...); 0 where the two hardly correlate."""
    xx, yy, xy = moments
    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        sure = xy > 0.8 * np.sqrt(xx * yy)
        for to, of in ((xx, yy), (yy, xx)):
            slope = np.where(sure, xy / of, 0.0)
            found.append((slope, np.where(sure, np.sqrt(np.maximum(to - slope * slope * of, 0) / (of * n)), 0.0)))
    return found


def _is_shifted(here: Any, best: Any) -> Any:
    return (here < 0.5) & (best > 0.7) & (best > here + 0.4)


def token_findings(sums: TokenSums, places: Sequence[str]) -> list[Finding]:
    """What the tokens say; `places[i]` names row i in the file."""
    found = [*_zeros(sums, places), *_padding(sums), *_sentinels(sums, places), *_ends(sums)]
    if sums.count < ENOUGH:
        return found
    if sums.same >= 0.999 * sums.compared:
        return [_identical(f"{sums.same:,} of {sums.compared:,} tokens")]
    if sums.in_some("identical") and sums.alike < 0.2 * sums.unequal:
        lists = f"{sums.wrong['identical']} lists of {sums.lists_compared['identical']} looked at"
        named = _some(sums.examples["identical"], sums.wrong["identical"], places)
        found.append(_identical(f"{lists} ({named}), and {sums.alike / sums.unequal:.0%} of the others' tokens,"))
    found += _alignment(sums, places)
    aligned = not any(f.check in ("shifted", "other tokens") for f in found)
    parts = sums.files.values()
    whole = Sampled(
        np.sum([p.logs for p in parts], axis=0),
        np.sum([p.ratios for p in parts], axis=0),
        [x for p in parts for x in p.sample],
    )
    partial = _in_some_lists(sums, places) if aligned else []
    # a factor of some lists is none of all: what is blended over the file is not told
    found += [f for f in _factors(whole, aligned=aligned) if f.check not in [p.check for p in partial]]
    if len(parts) > 1:
        known = {f.check for f in found}
        told: dict[str, list[tuple[str, Finding]]] = {}
        for file, part in sums.files.items():
            for f in _factors(part, aligned=aligned):
                if file and f.check not in known:
                    told.setdefault(f.check, []).append((file, f))
        for (file, f), *more in told.values():
            if len(more) + 1 == len(parts) and f.check in [p.check for p in partial]:
                continue  # some lists of every file
            named = f"in {file}" + (f" and {len(more)} more files" if more else ", of all files,")
            found.append(f._replace(evidence=f"{named} {f.evidence}"))
    return found + [p for p in partial if p.check not in {f.check for f in found}]


def _in_some_lists(sums: TokenSums, places: Sequence[str]) -> list[Finding]:
    """Factors that some lists have by themselves and the others have not."""
    found = []

    def these(name: str) -> str:
        lists = f"{sums.wrong[name]} of {sums.lists_compared[name]} lists looked at"
        return f"{lists} ({_some(sums.examples[name], sums.wrong[name], places)})"

    hits, judged = sums.wrong["constant"], sums.lists_compared["constant"]
    if sums.in_some("constant") and hits < 0.9 * judged:
        evidence = (
            f"most tokens of {these('constant')} have one and the same log-ratio, on average {sums.constant / hits:.4f}"
        )
        found.append(Finding("constant ratio", evidence, RENORMALIZED))
    for k, (steep, flat) in enumerate((("learner", "sampler"), ("sampler", "learner"))):
        name = f"{steep} deeper"
        if sums.wrong[name] < max(4, TEMPERED * sums.lists_compared[name]):
            continue
        slope, rest = (float(_slopes(sums.slopes[row], 1)[k][0]) for row in (k + 1, 0))
        if 0 < rest <= 1 + (slope - 1) / 3:
            evidence = f"the {steep}'s log-probabilities of at least {these(name)} are {slope:.2f} times as deep as "
            evidence += f"the {flat}'s, token by token, and {rest:.2f} times in the others"
            found.append(Finding("temperature", evidence, _two_temperatures(steep, flat, slope)))
    return found


def _factors(part: Sampled, *, aligned: bool) -> list[Finding]:
    """Factors on log-probabilities, and their precision."""
    x, y = np.concatenate(part.sample, axis=1)
    real = np.isfinite(x) & (x > DEEP) & (y > DEEP)
    x, y = x[real], y[real]
    found = []
    if x.size >= ENOUGH and aligned:
        found += (
            _clamped(x, y) or _scaled(x, y) or _constant(x - y) or _temperature(part.logs) or _mean_ratio(part.ratios)
        )
    return found + _precision(x, y)


def _identical(evidence: str) -> Finding:
    return Finding(
        "identical columns",
        f"{evidence} have the same log-probability under both policies",
        "nothing was measured: one column was copied to the other (as verl does in bypass_mode, and "
        "PipelineRL without a reference model); dump the sampler's as the sampler returned them (where one program "
        "computes both to the last bit, these are on policy)",
    )


def _some(rows: Sequence[int], count: int, places: Sequence[str]) -> str:
    return ", ".join(places[i] for i in rows[: min(EXAMPLES, count)]) + (" ..." if count > EXAMPLES else "")


def _alignment(sums: TokenSums, places: Sequence[str]) -> list[Finding]:
    here, later, earlier = _correlation(sums.aligned.T).tolist()
    best = max(later, earlier)
    if math.isnan(here) or math.isnan(best):
        return []
    retokenized = (
        "the two lists are not of the same tokens: retokenized text, another prompt or order of rows, or two different "
        "models"
    )
    if _is_shifted(here, best):
        which, other = ("learner's", "sampler's") if later > earlier else ("sampler's", "learner's")
        return [
            Finding(
                "shifted",
                f"probabilities of the two policies correlate {here:.2f} in place and {best:.2f} one token apart",
                f"the {which} list runs one place behind the {other}: the same token stands one entry later in it "
                f"(logits of position t speak of token t + 1); cut its first entry and the {other} last",
            )
        ]
    one_way = abs(later - earlier) > ONE_WAY and best > ONE_WAY  # how like its neighbors a token is, is like both ways
    if one_way and here < 0.9:
        which, other = ("learner's", "sampler's") if later > earlier else ("sampler's", "learner's")
        return [
            Finding(
                "shifted",
                f"probabilities of the two policies correlate {here:.2f} in place, and {later:.2f} and {earlier:.2f} "
                "one token apart to either side, which are alike where lists lie in place",
                f"the {which} list runs one place behind the {other} in part: from some turn, tool call or cut on; "
                "look where a list's own ratios become large",
            )
        ]
    if here < 0.3 and best < 0.3:
        evidence = f"probabilities of the two policies correlate {here:.2f} in place and {best:.2f} one token apart"
        return [Finding("other tokens", evidence, retokenized)]
    found = []
    for name, what, cause in (
        (
            "shifted",
            "one token apart and not in place, those of the others in place",
            "one list of these runs a place behind the other, as one worker, rank or kind of task may write it; cut "
            "its first entry and the other's last there",
        ),
        ("other tokens", "neither in place nor one token apart, those of the others in place", retokenized),
    ):
        if sums.in_some(name):
            lists = f"{sums.wrong[name]} of {sums.lists_compared[name]} lists looked at"
            evidence = (
                f"probabilities of {lists} ({_some(sums.examples[name], sums.wrong[name], places)}) correlate {what}"
            )
            found.append(Finding(name, evidence, cause))
    return found


def _zeros(sums: TokenSums, places: Sequence[str]) -> list[Finding]:
    found = []
    for name, whose in (("behavior_log_prob", "sampler's"), ("log_prob", "learner's")):
        for value, hits in sums.near_zero[name].most_common(1):
            if hits >= max(3, 0.001 * sums.compared):
                found.append(
                    Finding(
                        "sentinel",
                        f"{value:g} stands in {name} for {hits:,} of {sums.compared:,} tokens looked at whose other "
                        f"log-probability is below -{FAR:g}",
                        f"a number near 0, filled in for what is no token of the {whose} policy (prompt, tool output, "
                        "padding): give the mask of its own tokens",
                    )
                )
        hits, limit = sums.zero[name], max(3, 0.001 * sums.count)
        if hits >= limit:
            found.append(
                Finding(
                    "exact zeros",
                    f"{hits:,} of {sums.count:,} tokens are exactly 0 in {name} (first in "
                    f"{places[sums.placed[name, 0.0]]}), where the other policy says "
                    f"{sums.zero_other[name] / hits:.3g} nats on average",
                    f"these are no tokens of the {whose} policy (prompt, tool output, padding): give the mask of its "
                    "own tokens; or the sampler cut its distribution down to one token (top-p, top-k, greedy)",
                )
            )
    return found


def _padding(sums: TokenSums) -> list[Finding]:
    """Constants at the end of every list; zeros make no ratio, but count as tokens: in lengths, in token weights."""
    return [
        Finding(
            "padding",
            f"{hits} of {sums.lists} lists {name} with {ENDS} or more tokens of one constant "
            f"({sums.filler[name][0]:g} in log_prob, {sums.filler[name][1]:g} in behavior_log_prob)",
            "the prompt or padding is listed with the response: lengths and every gauge a token count it; give the "
            "mask of the policy's own tokens, or cut the lists (if both policies are certain there, ignore this)",
        )
        for name, hits in sums.blank.items()
        if sums.lists >= 8 and (hits > 0.5 * sums.lists or sums.filled[name] >= max(3, SOME * sums.lists))
    ]


def _ends(sums: TokenSums) -> list[Finding]:
    """A token at one end of most lists that the policies disagree on, as on no other."""
    others = (sums.far["all"] - sums.far["begin"] - sums.far["end"]) / max(sums.compared - 2 * sums.ended, 1)
    found = []
    for name, which, whose in (("begin", "first", "one of the prompt"), ("end", "last", "an end of text")):
        share = sums.far[name] / max(sums.ended, 1)
        if sums.ended >= LONG and share > 0.3 and share > 10 * others:
            found.append(
                Finding(
                    "one end",
                    f"the {which} tokens of {sums.far[name]} of {sums.ended} lists looked at differ by more than "
                    f"{FAR:g} nat between the policies, as {others:.1%} of the tokens within do",
                    f"one policy was asked about another token there ({whose}, or the lists were cut to one "
                    "length): mask that token, or dump the same one",
                )
            )
    return found


def _sentinels(sums: TokenSums, places: Sequence[str]) -> list[Finding]:
    found = []
    for name, counter in sums.deep.items():
        below = counter.total()
        for value, hits in counter.most_common():
            enough = (1 if value <= NO_NUMBER else 3) if value == round(value) and value <= -50 else OFTEN
            if hits >= enough and (value < DEEP or hits > COMMON * below):
                times = "once" if hits == 1 else f"{hits:,} times"
                found.append(
                    Finding(
                        "sentinel",
                        f"{value:g} stands {times} in {name} (first in {places[sums.placed[name, value]]})",
                        "a placeholder, not a log-probability (OpenAI-style servers write -9999 outside the top 20, "
                        "NeMo-RL for -inf; log(1e-8) and its like are a clamp): one such token makes its trajectory's "
                        "weight 0 or infinite; mask these tokens or leave the records out (--skip-bad does not: they "
                        "are finite)",
                    )
                )
                break
    return found


def _clamped(x: np.ndarray, y: np.ndarray) -> list[Finding]:
    """A smallest value that comes again and again, where the other policy goes below it."""
    for name, values, other in (("behavior_log_prob", y, x), ("log_prob", x, y)):
        least = float(values.min())
        hits = values == least
        count = int(np.count_nonzero(hits))
        if count >= max(OFTEN, 0.001 * values.size) and other[hits].min() < least - FAR and least < UNLIKELY:
            return [
                Finding(
                    "sentinel",
                    f"{least:g} is the smallest {name}, stands {count:,} times among {values.size:,} tokens looked "
                    f"at, where the other policy goes down to {other[hits].min():.3g}",
                    "a clamp, not a log-probability: each such ratio is off by what was cut; write them whole",
                )
            ]
    return []


def _scaled(x: np.ndarray, y: np.ndarray) -> list[Finding]:
    """Log-ratios that are proportional to the log-probabilities: a factor after the softmax, and not before it.

    `PROPORTIONAL` is the share of the squared log-ratios that one factor explains: at least 0.83 for scaled
    log-probabilities among noise up to 1 nat a list, at most 0.79 for two temperatures and for filters. Those change
    likely tokens by another factor, too: 0.7 of it at most, or 1.2 of it at least, where scaling changes it by 0.03.
    """
    d, likely = x - y, y >= np.median(y)
    factor, of_likely = (float(a @ b) / max(float(b @ b), 1e-300) for a, b in ((x, y), (x[likely], y[likely])))
    share = float(d @ y) ** 2 / max(float(d @ d) * float(y @ y), 1e-300)
    near_one_or_none = factor <= SCALED or abs(factor - 1) < SCALED
    if near_one_or_none or share < PROPORTIONAL or abs(of_likely / factor - 1) > SCALED_LIKELY:
        return []
    return [
        Finding(
            "scaled",
            f"the learner's log-probabilities are {factor:.3f} times the sampler's, token by token, likely or not",
            "one of the two was multiplied after the softmax: divided by a temperature, which belongs on the logits, "
            "or taken to another base (2.303 is 10, 1.443 is 2); write natural logarithms of the probabilities",
        )
    ]


def _constant(d: np.ndarray) -> list[Finding]:
    middle = float(np.median(d))
    near = float(np.mean(np.abs(d - middle) < ALIKE))
    if abs(middle) > OFF and near > 0.5:
        return [
            Finding(
                "constant ratio",
                f"{near:.0%} of the tokens have one and the same log-ratio, {middle:.4f} (a factor of "
                f"{math.exp(middle):.4f})",
                RENORMALIZED,
            )
        ]
    for sign, whose, other in ((1, "learner's", "sampler's"), (-1, "sampler's", "learner's")):
        if d.size >= 1000 and np.mean(sign * d > 1e-5) < 0.002 and np.mean(sign * d) < -2e-3:
            return [
                Finding(
                    "one-sided ratio",
                    f"the {whose} probability is the smaller one at {np.mean(sign * d <= 1e-5):.1%} of the tokens",
                    f"the {other} log-probabilities are renormalized after a filter (top-p, top-k, min-p): two "
                    "policies that each sum to one are above each other about as often as below",
                )
            ]
    return []


def _mean_ratio(moments: np.ndarray) -> list[Finding]:
    """Two laws that no lag breaks: E_mu[pi / mu] = 1 at each token, and E_mu[log pi / mu] = -KL is at most 0.

    Given the tokens before, both are of mean 0 without the KL, so tokens of one trajectory are uncorrelated. The first
    is looked at among unlikely tokens too: noise that is cut off at log-probability 0 lowers the ratios of likely ones.
    """
    count, total, square = moments.T
    mean = total / np.maximum(count, 1)
    deviation = np.sqrt(np.maximum(square / np.maximum(count, 1) - mean * mean, 0))
    if count[0] < 1000 or deviation[0] > NARROW:
        return []
    up, below, below_unlikely = (mean > SYSTEMATIC) & (mean > SIGMAS * deviation / np.sqrt(np.maximum(count, 1)))
    if below and below_unlikely and count[2] >= ENOUGH:
        return [
            Finding(
                "ratio below one",
                f"the mean ratio of a token is {1 - mean[1]:.3f}, and {1 - mean[2]:.3f} of an unlikely one; of tokens "
                "drawn from the sampler's policy it is 1 in expectation, however stale they are",
                "the sampler's log-probabilities are renormalized after a filter (top-p, top-k, min-p), the learner's "
                "are not: ask the sampler for log-probabilities before its filters, or sample with top_p = 1 (if the "
                "learner was trained on these very tokens, it may have pushed them down)",
            )
        ]
    if up:
        return [
            Finding(
                "ratio above one",
                f"the mean log-ratio of a token is {mean[0]:+.3f} nats; of tokens drawn from the sampler's policy it "
                "is minus a KL, never positive",
                "log_prob and behavior_log_prob exchanged, or the sampler's are of a policy before its filters and the "
                "learner's after them (if the learner was trained on these very tokens, it may have pushed them up)",
            )
        ]
    return []


def _temperature(moments: np.ndarray) -> list[Finding]:
    """Both regressions of one policy's log-probabilities on the other's: at temperature T, log p scales like 1 / T.

    Noise between the policies makes one slope 1 and the other less; only a factor makes one of them more than 1.
    """
    n, sx, sy, xx, yy, xy = moments
    if n < ENOUGH:
        return []
    var_x, var_y, cov = xx / n - (sx / n) ** 2, yy / n - (sy / n) ** 2, xy / n - sx * sy / n**2
    if not cov > 0.8 * math.sqrt(max(var_x * var_y, 1e-300)):
        return []
    for slope, var_to, var_of, flat, steep in (
        (cov / var_y, var_x, var_y, "sampler", "learner"),
        (cov / var_x, var_y, var_x, "learner", "sampler"),
    ):
        error = math.sqrt(max(var_to - slope * slope * var_of, 0) / (var_of * n))
        if slope - ERRORS * error > STEEP:
            return [
                Finding(
                    "temperature",
                    f"the {steep}'s log-probabilities are {slope:.2f} times as deep as the {flat}'s, token by token "
                    f"(regression over {n:,.0f} tokens)",
                    _two_temperatures(steep, flat, slope),
                )
            ]
    return []


RENORMALIZED = (
    "the sampler's log-probabilities are renormalized after top-p or top-k, the learner's are not (or the other way "
    "round): ask the sampler for log-probabilities before its filters, or sample with top_p = 1"
)


def _two_temperatures(steep: str, flat: str, slope: float) -> str:
    return (
        f"the {steep} works at a lower temperature, about {1 / slope:.2f} of the {flat}'s: divide the learner's logits "
        "by the sampling temperature, or ask the sampler for processed log-probabilities; if both are the same, the "
        "learner has become that much surer since"
    )


def _precision(x: np.ndarray, y: np.ndarray) -> list[Finding]:
    found = []
    for name, values in (("behavior_log_prob", y), ("log_prob", x)):
        values = values[(values != 0) & (values > DEEP)]
        if values.size < ENOUGH or np.unique(values[:1000]).size < 20:
            continue
        if np.mean(np.abs(values * 100 - np.rint(values * 100)) < 1e-6) > 0.9:
            found.append(
                Finding(
                    "precision",
                    f"{name} has two decimals at most: each is rounded by up to 0.005 nats",
                    "log-probabilities were rounded when they were written, which adds up along a trajectory: write "
                    "them as they are",
                )
            )
            continue
        values = np.unique(values)
        single = values.astype("f4")
        if np.mean(single == values) < 0.9:
            continue
        brain = np.mean((single.view("u4") & 0xFFFF) == 0)
        half = np.mean(values.astype("f2").astype("f4") == single)
        for share, kind, step in ((brain, "bfloat16", 2**-8), (half, "float16", 2**-11)):
            if share > ROUNDED:
                found.append(
                    Finding(
                        "precision",
                        f"{share:.0%} of {name} are {kind} numbers, each rounded by up to {step:.2g} of itself",
                        "log-probabilities were computed or written in half precision; their rounding adds up along a "
                        "trajectory: take log_softmax in float32 and dump float32",
                    )
                )
                break
    return found


def trajectory_findings(
    log_ratio: np.ndarray,
    places: Sequence[str],
    *,
    tokens: bool,
    told: Sequence[Finding] = (),
    rewarded: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Finding]:
    """What the weights of n trajectories say: (n,) -> findings; `places[i]` names trajectory i in the file.

    What the tokens have `told` already explains wrong weights: no other cause is offered then. `rewarded`: length and
    reward (n,), (n,), if known.
    """
    n = log_ratio.size
    found: list[Finding] = []
    if n < 8:
        return found
    if not tokens and all((x == 0).all() for (x,) in pieces(log_ratio)):
        return [_identical(f"all {n} trajectories")]
    top = largest(log_ratio)
    if top == -math.inf:
        return [Finding("no weight", "every trajectory has weight 0", "the learner cannot produce any of them")]
    few = max(1, math.ceil(0.01 * n))
    heavy, total, least = np.zeros(0), 0.0, math.inf
    sums, inverses = [], []
    for (x,) in pieces(log_ratio):
        weight = np.exp(x - top)
        total, least = total + float(weight.sum()), min(least, float(x.min()))
        heavy = np.sort(np.concatenate([heavy, weight]))[-few:]
        sums.append(weight_sums(x))
        inverses.append(weight_sums(-x[np.isfinite(x)]))
    share = float(heavy.sum() / total)
    if share > 0.5 and n >= 20:
        found.append(
            Finding(
                "a few carry everything",
                f"{few} of {n} trajectories hold {share:.0%} of all weight "
                f"({_some(heaviest(log_ratio, EXAMPLES).tolist(), few, places)})",
                "look at these records: broken log-probabilities, or a tail too heavy for untruncated weights; "
                "truncate (--weighting truncate --cap 8)",
            )
        )
    if rewarded is not None and not told:
        found += _follows_reward(log_ratio, *rewarded)
    explained = any(f.check not in ("padding", "precision", "ratio above one") for f in told)
    explained = explained or any(f.check == "follows the reward" for f in found)
    as_said = "what the checks above say, most likely; mend that first"
    weights, inverted = (functools.reduce(WeightSums.merge, one) for one in (sums, inverses))
    log_mean, inverse = float(weights.log_mean()), float(inverted.log_mean())
    if log_mean > math.log(3) and abs(inverse) < math.log(2) and not found and not explained:
        found.append(
            Finding(
                "swapped",
                f"the mean weight is {_power(log_mean)} and that of the inverse ratios {_power(inverse)}; the one that "
                "should be 1 is the first",
                "log_prob and behavior_log_prob look exchanged: swap the two --column options",
            )
        )
    elif log_mean > math.log(10):
        found.append(
            Finding(
                "weights explode",
                f"the mean weight is {_power(log_mean)}; it is 1 in expectation",
                as_said
                if explained
                else "every log-ratio is positive, as those of no two policies are: ratios in place of their "
                "logarithms, or another number below the sampler's log-probability"
                if least > 0
                else "the two log-probabilities are not of the same tokens, or the sampler's hold something below what "
                "it sampled with",
            )
        )
    elif log_mean < math.log(0.1):
        found.append(
            Finding(
                "weights vanish",
                f"the mean weight is {_power(log_mean)}; it is 1 in expectation",
                as_said
                if explained
                else "nearly all of what the learner would do was never sampled: a systematic ratio along all tokens "
                "(top-p, temperature, precision, a wrong mask), or far too much lag",
            )
        )
    elif not explained:
        found += _mean_weight(log_mean, float(weights.ess_fraction()), n)
    return found


def _follows_reward(log_ratio: np.ndarray, length: np.ndarray, reward: np.ndarray) -> list[Finding]:
    """Log-ratios a token that rise with the reward, as staleness makes them little; a systematic ratio follows length.

    (n,), (n,), (n,) -> findings.
    """
    sums = np.zeros(6)
    for ratio, tokens, value in pieces(log_ratio, length, reward):
        real = np.isfinite(ratio) & np.isfinite(value) & (tokens > 0)
        sums += moments(ratio[real] / tokens[real], value[real])
    correlation = float(_correlation(sums))
    if sums[0] < SURE_OF or not correlation > FOLLOWS:
        return []
    return [
        Finding(
            "follows the reward",
            f"log-ratios a token of the trajectories rise with their rewards: they correlate {correlation:.2f}",
            "the learner had been trained on these very trajectories when log_prob was computed, so its ratios are no "
            "staleness, and their mean is not 1: take log_prob before the update",
        )
    ]


def _mean_weight(log_mean: float, ess: float, n: int) -> list[Finding]:
    """A mean weight that is not 1, where half of the samples count and its error is known."""
    error = math.sqrt(max(1 / ess - 1, 1e-12) / n)
    away = abs(1 - math.exp(-log_mean)) / error
    if n < SURE_OF or ess < 0.5 or abs(log_mean) < FAR_FROM_ONE or away < SIGMAS:
        return []
    return [
        Finding(
            "mean weight",
            f"the mean weight is {_power(log_mean)}, {away:.0f} standard errors from the 1 that it is in expectation",
            "a small systematic ratio along all tokens (top-p, top-k, precision, a wrong mask), much lag, or a learner "
            "that was trained on these very tokens",
        )
    ]


def averages(sums: np.ndarray) -> list[Finding]:
    """Sums of log-probabilities fall with the length, averages do not: `moments` of lengths and sums -> findings."""
    n, length, total, squares, of_totals, _ = sums
    if n < ENOUGH_SUMS:
        return []
    mean, deviation = length / n, math.sqrt(max(squares / n - (length / n) ** 2, 0))
    noise = math.sqrt(max(of_totals / n - (total / n) ** 2, 0))
    a_token, correlation = -total / max(length, 1.0), float(_correlation(sums))
    alike = noise < EVEN * -total / n  # sums of few unsure tokens are not: of a policy that is all but sure
    if deviation < 0.1 * mean or not correlation > FLAT or a_token > SHALLOW or not alike:
        return []
    return [
        Finding(
            "averages",
            f"log_prob is {total / n:.3g} nats for {mean:.0f} tokens on average, {a_token:.2g} a token, and does not "
            f"fall with the length (they correlate {correlation:.2f})",
            "averages a token in place of sums, whose weights are of no trajectory: write the sum, or the list",
        )
    ]


def _power(log: float) -> str:
    return f"{math.exp(log):.3g}" if abs(log) < 600 else f"e^{log:.0f}" if abs(log) < 1e9 else f"e^({log:.3g})"
