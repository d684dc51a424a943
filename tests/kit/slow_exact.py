"""Slow twin of `vcposim.laboratory.exact`: all K^N ordered batches, dense scores, plain loops, nothing from the kernel.

An outcome is a dict: prob, w (ratio), reward, length, score (list). Numbers may be Fractions or floats.
"""

import itertools
import math
from typing import Any

Outcome = dict[str, Any]


def treated(name: str, w: list[Any], cap: Any, floor: Any) -> list[Any]:
    one = {
        "none": lambda x: 1,
        "importance": lambda x: x,
        "truncate": lambda x: min(x, cap),
        "clip": lambda x: max(floor, min(x, cap)),
        "mask": lambda x: x if x <= cap else 0,
    }
    if name == "self_normalize":
        total = sum(w)
        return [len(w) * x / total for x in w] if total else [0 for _ in w]
    return [one[name](x) for x in w]


def dot(x: list[Any], y: list[Any]) -> Any:
    return sum(a * b for a, b in zip(x, y, strict=True))


def average(reward: list[Any], weight: list[Any]) -> Any:
    """Weighted mean; plain where nothing has weight; None of nobody."""
    if not reward:
        return None
    total = sum(weight)
    return dot(weight, reward) / total if total else sum(reward) / len(reward)


def baselines(name: str, batch: list[Outcome], w: list[Any], population: Any) -> list[Any]:
    """One baseline for each sample of an ordered batch."""
    n = len(batch)
    r = [o["reward"] for o in batch]
    norm = [dot(o["score"], o["score"]) for o in batch]
    a = [x * x * y for x, y in zip(w, norm, strict=True)]

    def without(i: int, weight: list[Any]) -> Any:
        b = average(r[:i] + r[i + 1 :], weight[:i] + weight[i + 1 :])
        return r[i] if b is None else b

    if name == "zero":
        return [0] * n
    if name == "population":
        return [population] * n
    if name == "group_mean":
        return [average(r, [1] * n)] * n
    if name == "leave_one_out":
        return [without(i, [1] * n) for i in range(n)]
    if name == "length_weighted":
        return [average(r, [o["length"] for o in batch])] * n
    if name == "on_policy_optimal":
        return [average(r, norm)] * n
    if name == "half_optimal":
        return [(average(r, [1] * n) + average(r, norm)) / 2] * n
    if name == "opob":
        return [average(r, a)] * n
    if name == "opob_leave_one_out":
        return [without(i, a) for i in range(n)]
    if name == "opob_released":
        return [average(r, [x * o["w"] ** 2 for x, o in zip(a, batch, strict=True)])] * n
    if name == "leverage_damped_mean":
        total, mean = sum(a), average(r, [1] * n)
        share = [x / total if total else type(r[0])(1) / n for x in a]
        return [r[i] - (1 - share[i]) * (r[i] - mean) for i in range(n)]
    assert name == "opob_truncated"
    p = range(len(batch[0]["score"]))
    ws = [sum(w[i] * batch[i]["score"][k] for i in range(n)) / n for k in p]
    wrs = [sum(w[i] * r[i] * batch[i]["score"][k] for i in range(n)) / n for k in p]
    spread = sum(a) / n - dot(ws, ws)
    if abs(spread) < 1e-11:  # all w s alike: no baseline changes their spread
        return [average(r, a)] * n
    return [(dot(a, r) / n - dot(wrs, ws)) / spread] * n


def moments(
    outcomes: list[Outcome],
    size: int,
    treatment: str,
    baseline: str,
    *,
    normalizer: str = "none",
    cap: Any = None,
    floor: Any = None,
) -> tuple[list[Any], Any, Any]:
    """mean (p,), variance_per_sample, variance_of_mean over all ordered batches of `size` outcomes."""
    p = len(outcomes[0]["score"])
    population = None
    if baseline == "population":
        # self-normalized weights of the whole population are the ratios over their mean, which is one
        name = "importance" if treatment == "self_normalize" else treatment
        w = treated(name, [o["w"] for o in outcomes], cap, floor)
        a = [o["prob"] * x * x * dot(o["score"], o["score"]) for x, o in zip(w, outcomes, strict=True)]
        population = dot(a, [o["reward"] for o in outcomes]) / sum(a)
    mean, square, per_sample = [0] * p, 0, 0
    for batch in itertools.product(outcomes, repeat=size):
        mass = math.prod(o["prob"] for o in batch)
        w = treated(treatment, [o["w"] for o in batch], cap, floor)
        b = baselines(baseline, list(batch), w, population)
        c = [w[i] * (o["reward"] - b[i]) for i, o in enumerate(batch)]
        if normalizer == "length":
            c = [x / o["length"] for x, o in zip(c, batch, strict=True)]
        if normalizer == "group_std":
            center = average([o["reward"] for o in batch], [1] * size)
            std = math.sqrt(sum((o["reward"] - center) ** 2 for o in batch) / size)
            c = [x / std if std > 1e-12 else 0 for x in c]
        x = [[c[i] * s for s in o["score"]] for i, o in enumerate(batch)]
        g = [sum(column) / size for column in zip(*x, strict=True)]
        mean = [m + mass * y for m, y in zip(mean, g, strict=True)]
        square += mass * dot(g, g)
        per_sample += mass * sum(dot(y, y) for y in x) / size
    return mean, per_sample - dot(mean, mean), square - dot(mean, mean)
