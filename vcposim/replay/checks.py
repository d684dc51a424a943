"""Is the file what it seems? Checks of the log-probabilities themselves, as they stream by.

Importance ratios multiply along a trajectory, so a small mistake in how log-probabilities were written (a shift by one
token, padding counted, another temperature) looks like staleness, and is explained away. Each check leaves a `Finding`:
what was seen, with numbers, and what most likely did it. They look at sums over tokens (`TokenSums`, additive) and at a
sample of the tokens; nothing grows with the file.

Correlations are those of probabilities, exp(log p), in [0, 1]: a sentinel of -9999 must not drown all others.

Thresholds are set so that clean data (independent noise between the policies, log-ratios of a trajectory with a
standard deviation from 0 to 2 nats) raise nothing; the measured rate stands in `tests/vcposim/replay/test_checks.py`.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vcposim.diagnostics import log_mean_weight

ENOUGH = 200
"""tokens without which no pattern of tokens is claimed"""
SAMPLED = 1024
"""tokens of each flush that are looked at one by one"""
ALL_OF, ONE_OF = 64, 8
"""pieces of the file whose correlations are all taken, and of how many of the later ones one is: they cost an exp"""
DEEP = -25.0
"""a log-probability below this, met again and again to the last digit, is no measurement"""
ENDS = 3
"""tokens at either end of a list that are looked at for padding"""
FAR = 1.0
"""nats from which on no noise between two policies turns a log-probability into an exact 0"""


class Finding(NamedTuple):
    """Something wrong with the data, or with the run that they show."""

    check: str
    evidence: str
    cause: str
    """what most likely did it, and what to do"""


@dataclass
class TokenSums:
    """Sums over the tokens read so far, and a sample of them."""

    count: int = 0
    pieces: int = 0
    compared: int = 0
    """tokens that `same`, `moments` and `sample` are over"""
    same: int = 0
    zero: dict[str, int] = field(default_factory=lambda: {"log_prob": 0, "behavior_log_prob": 0})
    """exactly 0 here, and far from it on the other side"""
    zero_other: dict[str, float] = field(default_factory=lambda: {"log_prob": 0.0, "behavior_log_prob": 0.0})
    moments: dict[str, np.ndarray] = field(
        default_factory=lambda: {k: np.zeros(6) for k in ("in place", "learner later", "sampler later", "logs")}
    )
    """(count, x, y, xx, yy, xy) of probabilities, one list moved by one token or none; of log-probabilities"""
    deep: dict[str, Counter[float]] = field(
        default_factory=lambda: {"log_prob": Counter(), "behavior_log_prob": Counter()}
    )
    lists: int = 0
    """trajectories of more than `ENDS` tokens"""
    blank: dict[str, int] = field(default_factory=lambda: {"begin": 0, "end": 0})
    """those of them that begin (end) with `ENDS` tokens that are exactly 0 under both policies"""
    sample: list[np.ndarray] = field(default_factory=list)
    """(2, k) learner's and sampler's log-probabilities"""

    def add(self, learner: np.ndarray, sampler: np.ndarray, ends: np.ndarray) -> None:
        """Tokens of several trajectories in a row; `ends` are the indices after each one's last token."""
        self.count += learner.size
        self.pieces += 1
        zero = {"log_prob": learner == 0, "behavior_log_prob": sampler == 0}
        for name, one, other in (("log_prob", learner, sampler), ("behavior_log_prob", sampler, learner)):
            if zero[name].any():
                beside = other[zero[name]]
                far = beside[beside < -FAR]
                self.zero[name] += far.size
                self.zero_other[name] += float(np.maximum(far, -1e4).sum())
            deep = one[one < DEEP] if one.min() < DEEP else one[:0]
            if deep.size and len(self.deep[name]) < 10_000:
                self.deep[name].update(deep[np.isfinite(deep)].tolist())
        starts = np.concatenate([[0], ends[:-1]])
        long = ends - starts > ENDS
        self.lists += int(long.sum())
        for name, at in (("begin", starts[long]), ("end", ends[long] - ENDS)):
            blank = zero["log_prob"][at] & zero["behavior_log_prob"][at]
            if blank.any():
                inner = [zero[policy][at + k] for policy in zero for k in range(1, ENDS)]
                self.blank[name] += int(np.logical_and.reduce([blank, *inner]).sum())
        if self.pieces > ALL_OF and self.pieces % ONE_OF:
            return
        self.compared += learner.size
        self.same += int(np.count_nonzero(learner == sampler))
        p, q = np.exp(learner), np.exp(sampler)
        inside = np.ones(learner.size, dtype=bool)
        inside[ends[(ends > 0) & (ends < learner.size)] - 1] = False
        pair = inside[:-1]
        self.moments["in place"] += _moments(p, q)
        self.moments["learner later"] += _moments(p[1:][pair], q[:-1][pair])
        self.moments["sampler later"] += _moments(p[:-1][pair], q[1:][pair])
        real = np.isfinite(learner)
        self.moments["logs"] += _moments(np.maximum(learner[real], DEEP), np.maximum(sampler[real], DEEP))
        if len(self.sample) < 128:
            self.sample.append(np.stack([learner[:SAMPLED], sampler[:SAMPLED]]))


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([x.size, x.sum(), y.sum(), x @ x, y @ y, x @ y])


def _correlation(m: np.ndarray) -> float:
    n, x, y, xx, yy, xy = m
    spread = math.sqrt(max(xx - x * x / n, 0) * max(yy - y * y / n, 0)) if n > 1 else 0.0
    return (xy - x * y / n) / spread if spread > 1e-12 * n else math.nan


def token_findings(sums: TokenSums) -> list[Finding]:
    """What the tokens say."""
    found = [*_zeros(sums), *_padding(sums), *_sentinels(sums)]
    if sums.count < ENOUGH:
        return found
    if sums.same >= 0.999 * sums.compared:
        return [_identical(f"{sums.same:,} of {sums.compared:,} tokens")]
    found += _alignment(sums)
    x, y = np.concatenate(sums.sample, axis=1)
    real = np.isfinite(x) & (x > DEEP) & (y > DEEP)
    x, y = x[real], y[real]
    if x.size >= ENOUGH and not any(f.check in ("shifted", "other tokens") for f in found):
        found += _constant(x - y) or _temperature(sums)
    return found + _precision(x, y)


def _identical(evidence: str) -> Finding:
    return Finding(
        "identical columns",
        f"{evidence} have the same log-probability under both policies",
        "nothing was measured: one column was copied to the other (as verl does in bypass_mode, and "
        "PipelineRL without a reference model); dump the sampler's as the sampler returned them",
    )


def _alignment(sums: TokenSums) -> list[Finding]:
    here, later, earlier = (_correlation(sums.moments[key]) for key in ("in place", "learner later", "sampler later"))
    best = max(later, earlier)
    if math.isnan(here) or math.isnan(best):
        return []
    if here < 0.5 and best > 0.7 and best > here + 0.4:
        which = "learner's" if later > earlier else "sampler's"
        return [
            Finding(
                "shifted",
                f"probabilities of the two policies correlate {here:.2f} in place and {best:.2f} one token apart",
                f"the {which} list begins one token late: logits of position t speak of token t + 1; "
                "cut its first entry (and the other list's last), or move it where it is written",
            )
        ]
    if here < 0.3 and best < 0.3:
        return [
            Finding(
                "other tokens",
                f"probabilities of the two policies correlate {here:.2f} in place, {best:.2f} one token apart",
                "the two lists are not of the same tokens: retokenized text, another prompt or order of rows, or two "
                "different models",
            )
        ]
    return []


def _zeros(sums: TokenSums) -> list[Finding]:
    found = []
    for name, whose in (("behavior_log_prob", "sampler's"), ("log_prob", "learner's")):
        hits, limit = sums.zero[name], max(3, 0.005 * sums.count)
        if hits >= limit:
            found.append(
                Finding(
                    "exact zeros",
                    f"{hits:,} of {sums.count:,} tokens are exactly 0 in {name}, where the other policy says "
                    f"{sums.zero_other[name] / hits:.3g} nats on average",
                    f"these are no tokens of the {whose} policy (prompt, tool output, padding): give the mask of its "
                    "own tokens; or the sampler cut its distribution down to one token (top-p, top-k, greedy)",
                )
            )
    return found


def _padding(sums: TokenSums) -> list[Finding]:
    """Zeros on both sides make no ratio, but they are counted as tokens: in lengths, in token and geometric weights."""
    return [
        Finding(
            "padding",
            f"{hits} of {sums.lists} lists {name} with {ENDS} or more tokens that are exactly 0 under both policies",
            "the prompt or padding is listed with the response: lengths and every gauge a token count it; give the "
            "mask of the policy's own tokens, or cut the lists (if both policies are certain there, ignore this)",
        )
        for name, hits in sums.blank.items()
        if sums.lists >= 8 and hits > 0.5 * sums.lists
    ]


def _sentinels(sums: TokenSums) -> list[Finding]:
    found = []
    for name, counter in sums.deep.items():
        for value, hits in counter.most_common(1):
            round_number = value == round(value) and abs(value) >= 50
            if hits >= 3 and (round_number or hits >= 10):
                found.append(
                    Finding(
                        "sentinel",
                        f"{value:g} stands {hits:,} times in {name}",
                        "a placeholder, not a log-probability (OpenAI-style servers write -9999 outside the top 20, "
                        "NeMo-RL for -inf): one such token makes its trajectory's weight 0 or infinite; mask these "
                        "tokens or leave the records out (--skip-bad does not: they are finite)",
                    )
                )
    return found


def _constant(d: np.ndarray) -> list[Finding]:
    middle = float(np.median(d))
    near = float(np.mean(np.abs(d - middle) < 5e-4))
    if abs(middle) > 5e-3 and near > 0.5:
        return [
            Finding(
                "constant ratio",
                f"{near:.0%} of the tokens have one and the same log-ratio, {middle:.4f} (a factor of "
                f"{math.exp(middle):.4f})",
                "the sampler's log-probabilities are renormalized after top-p or top-k, the learner's are not (or the "
                "other way round): ask the sampler for log-probabilities before its filters, or sample with top_p = 1",
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


def _temperature(sums: TokenSums) -> list[Finding]:
    """Both regressions of one policy's log-probabilities on the other's: at temperature T, log p scales like 1 / T.

    Noise between the policies makes one slope 1 and the other less; only a factor makes one of them more than 1.
    """
    n, sx, sy, xx, yy, xy = sums.moments["logs"]
    if n < 1000:
        return []
    var_x, var_y, cov = xx / n - (sx / n) ** 2, yy / n - (sy / n) ** 2, xy / n - sx * sy / n**2
    if not cov > 0.8 * math.sqrt(max(var_x * var_y, 1e-300)):
        return []
    for slope, var_to, var_of, flat, steep in (
        (cov / var_y, var_x, var_y, "sampler", "learner"),
        (cov / var_x, var_y, var_x, "learner", "sampler"),
    ):
        error = math.sqrt(max(var_to - slope * slope * var_of, 0) / (var_of * n))
        if slope - 4 * error > 1.06:
            return [
                Finding(
                    "temperature",
                    f"the {steep}'s log-probabilities are {slope:.2f} times as deep as the {flat}'s, token by token "
                    f"(regression over {n:,.0f} tokens)",
                    f"the {steep} works at a lower temperature, about {1 / slope:.2f} of the {flat}'s: divide the "
                    "learner's logits by the sampling temperature, or ask the sampler for processed log-probabilities; "
                    "if both are the same, the learner has become that much surer since",
                )
            ]
    return []


def _precision(x: np.ndarray, y: np.ndarray) -> list[Finding]:
    found = []
    for name, values in (("behavior_log_prob", y), ("log_prob", x)):
        values = values[(values != 0) & (values > DEEP)]
        if values.size < ENOUGH or np.unique(values[:1000]).size < 50:
            continue
        single = values.astype("f4")
        if np.mean(single == values) < 0.9:
            continue
        brain = np.mean((single.view("u4") & 0xFFFF) == 0)
        half = np.mean(values.astype("f2").astype("f4") == single)
        for share, kind, step in ((brain, "bfloat16", 2**-8), (half, "float16", 2**-11)):
            if share > 0.9:
                found.append(
                    Finding(
                        "precision",
                        f"{share:.0%} of {name} are {kind} numbers: each is rounded by up to {step:.2g} of itself",
                        "log-probabilities were computed or written in half precision; their rounding adds up along a "
                        "trajectory: take log_softmax in float32 and dump float32",
                    )
                )
                break
    return found


def trajectory_findings(log_ratio: np.ndarray, places: Any, *, tokens: bool) -> list[Finding]:
    """What the weights of n trajectories say; `places(i)` names trajectory i in the file."""
    n = log_ratio.size
    found: list[Finding] = []
    if n < 8:
        return found
    if not tokens and np.all(log_ratio == 0):
        return [_identical(f"all {n} trajectories")]
    top = log_ratio.max()
    if top == -math.inf:
        return [Finding("no weight", "every trajectory has weight 0", "the learner cannot produce any of them")]
    weight = np.exp(log_ratio - top)
    few = max(1, math.ceil(0.01 * n))
    order = np.argsort(-weight, kind="stable")[:few]
    share = float(weight[order].sum() / weight.sum())
    if share > 0.5 and n >= 20:
        named = ", ".join(str(places(int(i))) for i in order[:3])
        found.append(
            Finding(
                "a few carry everything",
                f"{few} of {n} trajectories hold {share:.0%} of all weight ({named}{' ...' if few > 3 else ''})",
                "look at these records: broken log-probabilities, or a tail too heavy for untruncated weights; "
                "truncate (--weighting truncate --cap 8)",
            )
        )
    log_mean = float(log_mean_weight(log_ratio))
    inverse = float(log_mean_weight(-log_ratio[np.isfinite(log_ratio)]))
    if log_mean > math.log(3) and abs(inverse) < math.log(2) and not found:
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
                "the two log-probabilities are not of the same tokens, or the sampler's hold something below what it "
                "sampled with",
            )
        )
    elif log_mean < math.log(0.1):
        found.append(
            Finding(
                "weights vanish",
                f"the mean weight is {_power(log_mean)}; it is 1 in expectation",
                "nearly all of what the learner would do was never sampled: a systematic ratio along all tokens "
                "(top-p, temperature, precision, a wrong mask), or far too much lag",
            )
        )
    return found


def _power(log: float) -> str:
    return f"{math.exp(log):.3g}" if abs(log) < 600 else f"e^{log:.0f}"
