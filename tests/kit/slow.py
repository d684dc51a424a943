"""Slow twins: every formula of the catalogue once more, as loops over one group, straight from its definition.

Nothing here is shared with the kernel. `m` is the measure, `unit` the mass of one draw, all lists or exact arrays.
"""

import math
from fractions import Fraction
from typing import Any

from tests.kit.strategies import Case

Number = Any


def treat(name: str, w: list[Number], m: list[Number], cap: Number, floor: Number) -> list[Number]:
    if name == "none":
        return [w_i * 0 + 1 for w_i in w]
    if name == "importance":
        return list(w)
    if name == "truncate":
        return [cap if w_i > cap else w_i for w_i in w]
    if name == "clip":
        return [cap if w_i > cap else floor if w_i < floor else w_i for w_i in w]
    if name == "mask":
        return [w_i if w_i <= cap else w_i * 0 for w_i in w]
    assert name == "self_normalize"
    mean = sum(m_i * w_i for m_i, w_i in zip(m, w, strict=True))
    return [w_i / mean for w_i in w]


def product(ratios: list[Number], mask: list[Number] | None) -> Number:
    out = Fraction(1)
    for t, r in enumerate(ratios):
        if mask is None or mask[t]:
            out = out * r
    return out


def weighted(s: Any, w: Any, per_token_score: bool) -> list[Number]:
    """w s, or sum_t w_t s_t, as a list of parameters."""
    if not per_token_score:
        return [w * x for x in s]
    times = range(len(s))
    at = w if isinstance(w, list) else [w for _ in times]
    return [sum(at[t] * s[t][k] for t in times) for k in range(len(s[0]))]


def square(v: list[Number]) -> Number:
    return sum(x * x for x in v)


def mean(a: list[Number], m: list[Number]) -> Number:
    return sum(x * y for x, y in zip(a, m, strict=True))


def average(r: list[Number], a: list[Number], m: list[Number]) -> Number:
    total = mean(a, m)
    return mean(r, m) if total == 0 else sum(m[i] * a[i] * r[i] for i in range(len(r))) / total


def average_of_others(r: list[Number], a: list[Number], m: list[Number], unit: Number, i: int) -> Number:
    """Mass m_j of each j != i, and of i what is left when one draw is taken away."""
    left = [m[j] if j != i else max(m[j] - unit, 0) for j in range(len(r))]
    if sum(left) == 0:
        return r[i]
    top = sum(left[j] * a[j] * r[j] for j in range(len(r)))
    total = sum(left[j] * a[j] for j in range(len(r)))
    return top / total if total else sum(left[j] * r[j] for j in range(len(r))) / sum(left)


def coefficients(
    group: Case, weighting: dict[str, Any], baseline: str, normalizer: str, level: str
) -> tuple[list[Any], float]:
    """c_i (or lists of c_it) of one group by the book, and the size of the largest term |w| (|R| + |b|) in them."""
    n, r = group.size, list(group.reward)
    if group.sample_mask is None:
        m = [Fraction(1, n)] * n
        unit = Fraction(1, n)
    else:
        unit = 1 / Fraction(sum(group.sample_mask))
        m = [x * unit for x in group.sample_mask]
    masks = [None if group.token_mask is None else list(group.token_mask[i]) for i in range(n)]
    lengths = [group.length[i] if masks[i] is None else Fraction(sum(masks[i])) for i in range(n)]  # type: ignore[arg-type]
    sequence = [product(list(group.ratio[i]), masks[i]) if group.per_token else group.ratio[i] for i in range(n)]
    cap, floor = weighting.get("cap"), weighting.get("floor")
    w: list[Any]
    if level == "token":
        rows = [treat(weighting["treatment"], list(group.ratio[i]), m, cap, floor) for i in range(n)]
        w = [[x * (1 if masks[i] is None else masks[i][t]) for t, x in enumerate(rows[i])] for i in range(n)]  # type: ignore[index]
    else:
        at = (
            sequence
            if level == "sequence"
            else [float(x) ** (1 / float(k)) for x, k in zip(sequence, lengths, strict=True)]
        )
        w = treat(weighting["treatment"], at, [float(x) for x in m] if level == "geometric" else m, cap, floor)
    per_token_score = group.score.ndim == 3
    ws = [weighted(group.score[i], w[i], per_token_score) for i in range(n)]
    sq = [square(weighted(group.score[i], Fraction(1), per_token_score)) for i in range(n)]
    b = baselines(baseline, r, m, unit, ws, sq, sequence, lengths, group.population_baseline)
    c: list[Any] = []
    size = 0.0
    for i in range(n):
        scale = 1 / lengths[i] if normalizer in ("length", "group_std_length") else Fraction(1)
        if normalizer in ("group_std", "group_std_length"):
            std = math.sqrt(float(mean([(x - mean(r, m)) ** 2 for x in r], m)))
            scale = 0 if std == 0 else float(scale) / std  # type: ignore[assignment]
        advantage = float(r[i] - b[i]) * scale if isinstance(scale, float) else (r[i] - b[i]) * scale
        c.append([x * advantage for x in w[i]] if level == "token" else w[i] * advantage)
        largest = max(w[i]) if level == "token" else w[i]
        size = max(size, float(largest) * float(abs(r[i]) + abs(b[i])) * float(scale))
    return c, size


def baselines(
    name: str, r: list, m: list, unit: Number, ws: list, sq: list, ratio: list, length: list, oracle: Any
) -> list[Number]:
    """b_i of one group, for every sample."""
    n = len(r)
    a, one = [square(x) for x in ws], [Fraction(1)] * n
    if name == "zero":
        return [0 * x for x in r]
    if name == "population":
        return [oracle[0]] * n
    if name == "leave_one_out":
        return [average_of_others(r, one, m, unit, i) for i in range(n)]
    if name == "opob_leave_one_out":
        return [average_of_others(r, a, m, unit, i) for i in range(n)]
    if name == "leverage_damped_mean":
        total = mean(a, m)
        share = [unit * x / total if total else unit for x in a]
        return [r[i] - (1 - share[i]) * (r[i] - average(r, one, m)) for i in range(n)]
    if name == "opob_truncated":
        return [truncation_aware(r, m, ws)] * n
    if name == "half_optimal":
        return [(average(r, one, m) + average(r, sq, m)) / 2] * n
    weight = {
        "group_mean": one,
        "length_weighted": length,
        "on_policy_optimal": sq,
        "opob": a,
        "opob_released": [x * w * w for x, w in zip(a, ratio, strict=True)],
    }[name]
    return [average(r, weight, m)] * n


def truncation_aware(r: list, m: list, ws: list) -> Number:
    """argmin_b of tr Cov of (R - b) w s, by its derivative: cov of (R w s, w s) over var of w s, traces."""
    parameters = range(len(ws[0]))
    mean_ws = [mean([x[k] for x in ws], m) for k in parameters]
    mean_wsr = [mean([x[k] * y for x, y in zip(ws, r, strict=True)], m) for k in parameters]
    n = range(len(r))
    cov = sum(m[i] * sum((ws[i][k] * r[i] - mean_wsr[k]) * (ws[i][k] - mean_ws[k]) for k in parameters) for i in n)
    var = sum(m[i] * sum((ws[i][k] - mean_ws[k]) ** 2 for k in parameters) for i in n)
    return cov / var if var else average(r, [square(x) for x in ws], m)
