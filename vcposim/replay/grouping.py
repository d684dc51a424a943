"""Rows into trajectories and groups, once all are read: steps that split a prompt, rows of one trajectory, lags."""

import math
from dataclasses import replace

import numpy as np

from vcposim.diagnostics import WeightSums
from vcposim.errors import InputError
from vcposim.replay.columns import Columns
from vcposim.replay.dumps import Dump, Tokens
from vcposim.replay.names import ABSENT, SESSIONS, TRAJECTORY
from vcposim.replay.storage import Stored, coded, counts, distinct, numbered, picked

AT_ONCE = 1 << 16
"""groups that are named together"""


def by_step(dump: Dump, columns: Columns, notes: list[str]) -> Dump:
    """A prompt that comes up at several steps is a group at each: its responses are of different policies."""
    if "step" not in dump.slices or columns.group_columns or not dump.has_group or columns.group_size:
        return dump
    step, values = dump.slices["step"]

    def pair(g: np.ndarray, t: np.ndarray) -> np.ndarray:
        return g.astype(np.int64) * len(values) + t

    if distinct(dump.group, step, key=pair).size == len(dump.labels):
        return dump
    if TRAJECTORY in dump.slices:
        ids, every = dump.slices[TRAJECTORY][0], len(dump.slices[TRAJECTORY][1])
        in_groups = distinct(dump.group, ids, key=lambda g, i: g.astype(np.int64) * every + i).size
        if in_groups < distinct(dump.group, step, ids, key=lambda g, t, i: pair(g, t) * every + i).size:
            return dump  # it changes inside a trajectory: a turn, not a training step
    order, _, code = coded(dump.group, step, key=pair)
    size, split = counts(dump.group), counts(code)
    column = columns.mapping["step"]
    if size.max() > 1 and split.max() == 1:
        notes.append(f"{column!r} differs within every group, so it is no training step and splits none")
        kept = dump.slices if "step" in columns.by else {n: one for n, one in dump.slices.items() if n != "step"}
        return replace(dump, slices=kept)
    names = dump.labels if isinstance(dump.labels, Stored) else Stored(dump.labels)
    labels = Stored()
    for start in range(0, order.size, AT_ONCE):
        group, at = np.divmod(order[start : start + AT_ONCE], len(values))
        pairs_here = [(values[k], label) for k, label in zip(at.tolist(), names.some(group), strict=True)]
        for k in range(0, len(pairs_here), 1024):
            labels.extend(pairs_here[k : k + 1024])
    name = columns.mapping.get("group", "group")
    notes.append(
        f"groups are ({column}, {name}): {name!r} comes up at several steps, {len(size)} values make {len(labels)} "
        f"groups (--group {name} pools the steps)"
    )
    return replace(dump, labels=labels, group=code)


def of_several_versions(dump: Dump) -> int:
    """How many trajectories have rows of several versions of the policy, where rows are trajectories' parts."""
    if not {TRAJECTORY, "version"} <= set(dump.slices):
        return 0
    (ids, names), (version, versions) = dump.slices[TRAJECTORY], dump.slices["version"]
    *_, code = coded(dump.group, ids, key=lambda g, i: g.astype(np.int64) * (len(names) + 1) + i)
    pairs = distinct(code, version, key=lambda t, v: t.astype(np.int64) * len(versions) + v)
    return int(np.sum(np.bincount(pairs // len(versions)) > 1))


def merged(dump: Dump, columns: Columns, merge_reward: str, notes: list[str]) -> Dump:
    """Rows of one trajectory, added up.

    Raises `InputError` where the rewards of one trajectory disagree.
    """
    if TRAJECTORY not in dump.slices:
        if merge_reward != "same":
            notes.append(
                f"--merge-reward {merge_reward}: nothing is merged, no column says which rows are a trajectory"
            )
        return dump
    ids, values = dump.slices[TRAJECTORY]
    column = columns.mapping["trajectory"]
    asked = "trajectory" in columns.explicit

    def key(g: np.ndarray, i: np.ndarray) -> np.ndarray:
        return g.astype(np.int64) * (len(values) + 1) + i

    order, first, code = coded(dump.group, ids, key=key)
    if order.size == ids.size:
        return dump
    groups_of_id = np.bincount(order % (len(values) + 1), minlength=len(values))
    ids_of_group = np.bincount(order // (len(values) + 1))
    if not asked and ids_of_group.max() == 1 and (groups_of_id.max() > 1 or len(values) == 1):
        notes.append(f"{column!r} is the same in whole groups: a counter of the run, not of trajectories, not used")
        return dump
    if not asked and column in SESSIONS and ids_of_group.max() == groups_of_id.max() == 1:
        notes.append(
            f"{column!r} is one in each group, so it may name the prompt: not used; if the rows of each group are one "
            f"trajectory, --trajectory {column} merges them"
        )
        return dump
    if columns.group_size:
        dump = _counted(dump, ids, columns.group_size, column)
        order, first, code = coded(dump.group, ids, key=key)
    last = np.zeros_like(first)
    for start, (here,) in numbered(code):
        np.maximum.at(last, here, start + np.arange(here.size))
    reward = picked(dump.reward, last if merge_reward == "last" else first)
    if merge_reward == "sum":
        reward = np.bincount(code, dump.reward)
    elif merge_reward == "same" and dump.has_reward and np.any(dump.reward != reward[code]):
        row = int(np.flatnonzero(dump.reward != reward[code])[0])
        raise InputError(
            f"{dump.path}: {dump.place[row]}: {column!r} says this row continues a trajectory, but its reward "
            f"{dump.reward[row]:g} is not the one before ({reward[code][row]:g}); use --merge-reward sum or last, "
            f"or --trajectory {ABSENT} if these are separate trajectories"
        )
    with np.errstate(invalid="ignore"):
        log_ratio = np.bincount(code, np.where(np.isfinite(dump.log_ratio), dump.log_ratio, 0.0))
    log_ratio[np.unique(code[dump.log_ratio == -math.inf])] = -math.inf
    length = np.bincount(code, dump.length)
    tokens = dump.tokens
    if tokens is not None:
        scale = np.full(order.size, -math.inf)
        np.maximum.at(scale, code, tokens.log_scale)
        with np.errstate(invalid="ignore"):
            factor = np.nan_to_num(np.exp(tokens.log_scale - scale[code]))
        tokens = WeightSums(
            scale,
            np.bincount(code, tokens.count),
            np.bincount(code, tokens.total * factor),
            np.bincount(code, tokens.square * factor * factor),
        )
    notes.append(f"{ids.size} rows are {order.size} trajectories: rows that share {column!r} are merged")
    if dump.norm_source != "length":
        notes.append(f"{dump.norm_source} of rows does not add up to a trajectory's; length stands in for it")
    parts: dict[int, list[Tokens]] = {}
    for one in dump.kept:
        parts.setdefault(int(code[one.row]), []).append(one)
    whole = np.bincount(code)
    kept = tuple(
        Tokens(
            t,
            np.concatenate([one.log_prob for one in rows]),
            np.concatenate([one.behavior_log_prob for one in rows]),
            {name: np.concatenate([one.beside[name] for one in rows]) for name in rows[0].beside},
        )
        for t, rows in parts.items()
        if len(rows) == whole[t]
    )
    reference = dump.reference_log_ratio
    return replace(
        dump,
        group=dump.group[first],
        reward=reward,
        log_ratio=log_ratio,
        length=length,
        score_sq_norm=length,
        norm_source="length",
        tokens=tokens,
        slices={name: (c[first], v) for name, (c, v) in dump.slices.items() if name != TRAJECTORY},
        kept=kept,
        reference_log_ratio=None if reference is None else np.bincount(code, reference),
        place=(dump.place if isinstance(dump.place, Stored) else Stored(dump.place)).take(first),
    )


def _counted(dump: Dump, ids: np.ndarray, size: int, column: str) -> Dump:
    """Groups of so many trajectories, where their rows follow each other; of so many rows else, as they are.

    Raises `InputError` where the trajectories are no multiple of it.
    """
    new = ids[1:] != ids[:-1]
    if new.all() and ids.size % size == 0:
        return dump
    number = np.concatenate([[0], np.cumsum(new)])
    trajectories = int(number[-1]) + 1
    if trajectories % size:
        raise InputError(
            f"--group-size: {ids.size} rows are {trajectories} trajectories (by {column!r}), no multiple of {size}: it "
            f"counts trajectories, and rows with --trajectory {ABSENT}"
        )
    return replace(dump, labels=Stored([*range(trajectories // size)]), group=number // size)


def with_lag(dump: Dump, notes: list[str]) -> Dump:
    """`lag` from the learner's version and the sampler's, where the file has both and no lag of its own."""
    if "lag" in dump.slices or not {"version", "learner_version"} <= set(dump.slices):
        return dump
    (a, sampler), (b, learner) = dump.slices["version"], dump.slices["learner_version"]
    try:
        ends = [[math.nan if v is None else float(v) for v in values] for values in (learner, sampler)]
        lag = np.array(ends[0])[b] - np.array(ends[1])[a]
    except (TypeError, ValueError):
        if any(isinstance(v, str) for v in (*learner, *sampler)):
            notes.append(f"versions such as {sampler[0]!r} and {learner[0]!r} are no numbers: no lag is read from them")
        return dump
    if np.isnan(lag).all():
        return dump
    order, _, code = coded(lag, key=lambda x: x)
    # a version that is null leaves a lag that is none
    values = [None if math.isnan(x) else int(x) if x == int(x) else float(x) for x in order]
    return replace(dump, slices={**dump.slices, "lag": (code, values)})


def whole_groups(dump: Dump) -> tuple[Tokens, ...]:
    """Tokens of the groups of which every trajectory was kept."""
    have = np.bincount(dump.group[[one.row for one in dump.kept]], minlength=len(dump.labels)) if dump.kept else None
    if have is None:
        return ()
    complete = have == np.bincount(dump.group, minlength=len(dump.labels))
    return tuple(one for one in dump.kept if complete[dump.group[one.row]])
