"""Rollouts that any framework dumped, as the numbers that a replay needs: one trajectory a record.

Fields, by this project's names (`columns` maps a file's own):

    group                what the responses of one prompt share: any JSON value, in any order
    reward               a number; without groups or rewards the gauges of the weights are all that can be read
    log_prob             log pi(tau), the learner's: a number in nats, or a list of one number a token
    behavior_log_prob    log mu(tau), the sampler's: likewise
    log_ratio            instead of these two: log pi(tau) - log mu(tau), nats, likewise
    length               tokens of the response; counted where there are lists
    mask                 for lists: 1 for the policy's tokens, 0 for padding or the environment's; null means all
    sample_mask          0 for a trajectory that the trainer left out
    trajectory           what the rows of one trajectory share, where it was written in several
    step, version, learner_version, lag    of the run; for slices
    score_sq_norm        ||grad log pi(tau)||^2
    logit_proxy          stand-in for it, sum_t 1 - 2 pi(y_t) + sum_v pi(v)^2

A file's own names become fields by `columns`, by a layout (`vcposim.replay.layouts`), or, for masks and fields of the
run, by being the only column that can be one; whatever was used is noted. A name that means the sampler in one
framework and the learner in another is explained and never guessed.

Token lists are summed as they come and leave a handful of numbers a trajectory. What a value means where it could be
argued: log_prob = -inf is weight 0 (the learner never says that); an empty response has weight 1, an empty product, and
no gradient. Everything else that cannot be is one `InputError` naming file, place, field, value and remedy, or, with
`skip_bad`, a record that is left out and counted.
"""

import array
import difflib
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vcposim.diagnostics import WeightSums
from vcposim.errors import InputError, unknown_name
from vcposim.replay.checks import Finding, TokenSums, token_findings, trajectory_findings
from vcposim.replay.containers import BadRecord, Item, Progress, Wanted, broken, find_inputs, kind, one_line, read_items
from vcposim.replay.layouts import ColumnLayout, layout, look_up, recognized

NEEDED = ("group", "reward", "log_prob", "behavior_log_prob")
OPTIONAL = ("length", "mask", "score_sq_norm", "logit_proxy")
OF_THE_RUN = ("step", "version", "learner_version", "lag")
FIELDS = (*NEEDED, "log_ratio", *OPTIONAL, "sample_mask", "trajectory", *OF_THE_RUN)
ABSENT = "none"
"""what `columns` maps a field to that is not to be used although the file has it"""

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "group": ("group_id", "prompt_id", "group_index", "prompt_index", "prompt_idx", "question_id", "uid", "prompt"),
    "reward": ("score", "rewards", "scores", "rm_score", "reward_score", "raw_reward", "return", "acc", "correct"),
    "log_prob": (
        "trainer_logprobs",
        "trainer_log_probs",
        "target_log_prob",
        "learner_log_prob",
        "learner_logprobs",
        "new_logprobs",
        "new_log_probs",
        "action_log_probs",
        "prev_logprobs",
        "current_logprobs",
        "policy_logprobs",
        "prox_logp",
    ),
    "behavior_log_prob": (
        "rollout_log_probs",
        "rollout_logprobs",
        "rollout_per_token_logps",
        "inference_logprobs",
        "infer_logprobs",
        "sampling_logprobs",
        "sampling_log_probs",
        "sampling_per_token_logps",
        "sampler_logprobs",
        "generation_logprobs",
        "vllm_logprobs",
        "completion_logprobs",
        "behavior_log_probs",
        "behavior_logprobs",
        "behaviour_log_prob",
    ),
    "log_ratio": ("log_importance_ratio", "log_ratios", "log_importance_weight"),
    "length": ("response_length", "response_len", "num_tokens", "n_tokens", "completion_length", "token_count"),
    "mask": (
        "response_mask",
        "loss_mask",
        "loss_masks",
        "token_mask",
        "token_loss_mask",
        "completion_mask",
        "action_mask",
        "assistant_mask",
        "assistant_masks",
        "env_mask",
        "tool_mask",
    ),
    "sample_mask": ("sample_loss_mask",),
    "trajectory": ("rollout_id", "rollout_ids", "trajectory_id", "trajectory_ids", "traj_id", "traj_uid", "episode_id"),
    "step": ("global_step", "global_steps", "training_step", "train_step", "iteration"),
    "version": (
        "policy_version",
        "model_version",
        "weight_version",
        "weight_versions",
        "head_version",
        "versions",
        "min_global_steps",
    ),
    "learner_version": ("trainer_version", "current_version"),
    "lag": ("staleness", "off_policyness", "policy_lag"),
    "score_sq_norm": ("grad_sq_norm", "score_norm_sq", "squared_grad_norm"),
    "logit_proxy": (),
}
"""what frameworks call each field: to suggest, and for a mask and the fields of the run, to use and say so"""

TAKEN = ("mask", "sample_mask", "trajectory", *OF_THE_RUN)
"""fields that would change the answer in silence: taken by their other names where there is exactly one, and noted"""

MEANINGFUL = frozenset(FIELDS) | {name for names in OTHER_NAMES.values() for name in names}
"""names that a record may not bring in when the first one had none of that name"""

AMBIGUOUS: dict[str, str] = {
    "logprobs": "the sampler's in OpenAI-style servers, vLLM, PipelineRL and open-instruct, the learner's elsewhere",
    "log_probs": "the learner's in slime, the sampler's elsewhere",
    "old_log_probs": "recomputed by the learner in verl and ROLL, the sampler's in TRL's AsyncGRPO",
    "old_logprobs": "the sampler's in TapeAgents, recomputed by the learner elsewhere",
    "old_log_prob": "the learner's before its update in verl, the sampler's elsewhere",
    "old_per_token_logps": "the learner's before its update in TRL and ms-swift",
    "ref_logprobs": "those of the KL penalty's reference, neither policy's",
    "rewards": "raw in OpenRLHF and NeMo-RL, minus the group's mean in slime and miles",
    "index": "a group in exports, the row's position in OpenRLHF and the sample's number in slime",
    "uid": "names the prompt in verl, a single response elsewhere: as a group, every value must come up several times",
}
"""names that mean different things in different frameworks; said, never guessed"""

ROUNDING = 1e-3
"""a log-probability may exceed 0 by this much in half precision"""
LARGEST = 1e100
"""no reward, norm or log-probability is larger than this; squares must stay finite"""
TOKENS_AT_ONCE = 1 << 14
"""tokens that are looked at together: few enough to stay in the cache"""
TOKENS_KEPT = 1_500_000
"""tokens of the first groups that are kept for the estimators that look at tokens"""


@dataclass(frozen=True)
class Dump:
    """What a file held: n trajectories, groups coded 0, 1, ... in order of appearance."""

    path: str
    labels: list[Hashable]
    """the file's name of each group"""
    group: np.ndarray
    """(n,) code of the group"""
    reward: np.ndarray
    """(n,) NaN where the file has none"""
    log_ratio: np.ndarray
    """(n,) log pi(tau) - log mu(tau), nats; -inf for weight 0"""
    length: np.ndarray
    """(n,) tokens"""
    score_sq_norm: np.ndarray
    """(n,) ||s_i||^2, or what stands in for it"""
    norm_source: str
    """which field `score_sq_norm` came from"""
    tokens: WeightSums | None
    """sums of token weights (n,), one a trajectory, where log-probabilities were lists"""
    has_group: bool = True
    """False: the file names no groups, and every trajectory stands alone in `group`"""
    has_reward: bool = True
    layout: str = ""
    notes: tuple[str, ...] = ()
    """what was used, and what was left out"""
    findings: tuple[Finding, ...] = ()
    slices: dict[str, tuple[np.ndarray, list[Any]]] = field(default_factory=dict)
    """name -> code (n,) and the value of each code"""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """reason -> places of the records that were left out"""
    kept: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()
    """(trajectory, learner's, sampler's log-probabilities a token) of the first groups"""
    place: tuple[str, ...] = ()
    """(n,) where each trajectory (its first row) stands"""

    def select(self, rows: np.ndarray) -> "Dump":
        """The trajectories where `rows` (n,) is true; groups that lose all of theirs go."""
        left = np.unique(self.group[rows])
        code = np.full(len(self.labels), -1)
        code[left] = np.arange(left.size)
        new = np.cumsum(rows) - 1
        taken = self.take(np.flatnonzero(rows))
        return replace(
            taken,
            labels=[self.labels[g] for g in left],
            group=code[taken.group],
            slices={name: (values[rows], names) for name, (values, names) in self.slices.items()},
            kept=tuple((int(new[i]), a, b) for i, a, b in self.kept if rows[i]),
            place=tuple(p for p, here in zip(self.place, rows, strict=False) if here),
        )

    def take(self, rows: np.ndarray) -> "Dump":
        """The numbers of the trajectories `rows` (k,), and nothing else; groups keep their codes."""
        return replace(
            self,
            tokens=None if self.tokens is None else WeightSums(*(x[rows] for x in self.tokens)),
            slices={},
            kept=(),
            place=(),
            **{name: getattr(self, name)[rows] for name in ("group", "reward", "log_ratio", "length", "score_sq_norm")},
        )


def read_dump(
    path: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    *,
    layout_name: str | None = None,
    group: Sequence[str] = (),
    group_size: int | None = None,
    trajectory: str | None = None,
    merge_reward: str = "same",
    by: Sequence[str] = (),
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Dump:
    """All rollouts of files, folders, globs or `-`; `columns` maps field names to the file's own, or to `none`.

    `group`: columns that name a group together; without it a prompt that comes up at several steps is a group at each.
    `group_size`: the file has no group, but is ordered, that many responses a prompt. `trajectory`: the column that the
    rows of one trajectory share; `merge_reward` then says what their rewards are: the `same`, to `sum`, or the `last`.
    `by`: columns to slice by later. `skip_bad`: leave broken records out and count them, instead of refusing the file.

    Raises `InputError`, one line, on input that is missing, empty, cut off or malformed, on missing, mistyped or
    ambiguous fields, and on values that cannot be.
    """
    for name in columns or {}:
        if name not in FIELDS:
            raise unknown_name("column", name, FIELDS)
    if group_size is not None and group_size < 1:
        raise InputError(f"group_size: {group_size} is not positive; say how many responses each prompt has")
    if group and group_size is not None:
        raise InputError("group_size: given together with group; keep one")
    if merge_reward not in ("same", "sum", "last"):
        raise unknown_name("merge_reward", merge_reward, ("same", "sum", "last"))
    arguments = [path] if isinstance(path, str | Path) else list(path)
    files, notes = find_inputs(arguments)
    named = str(arguments[0]) if len(arguments) == 1 else f"{arguments[0]} and {len(arguments) - 1} more"
    progress = Progress(shown=False) if progress is None else progress
    reader = _Reader(named, dict(columns or {}), layout_name, tuple(group), group_size, trajectory, tuple(by), skip_bad)
    reader.several, reader.notes = len(files) > 1, notes
    try:
        for item in read_items(files, reader.wanted, progress):
            reader.take(item)
    finally:
        progress.done()
    return reader.finish(merge_reward)


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """`["reward=score"]` -> `{"reward": "score"}`.

    Raises `InputError` for anything but FIELD=NAME with a known field, each once.

    >>> parse_columns(["reward=score", "group=uid"])
    {'reward': 'score', 'group': 'uid'}
    """
    out: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (equals and name and column):
            raise InputError(f"--column: {pair!r} is not FIELD=NAME; write it as in --column reward=score")
        if name not in FIELDS:
            raise unknown_name("--column", name, FIELDS)
        if name in out:
            raise InputError(f"--column: {name!r} is mapped twice ({out[name]!r}, {column!r}); keep one")
        out[name] = column
    return out


def pooled(tokens: WeightSums) -> WeightSums:
    """Sums over all trajectories of sums (n,) each, on the largest scale."""
    top = tokens.log_scale.max(initial=-math.inf)
    if top == -math.inf:
        return WeightSums(top, tokens.count.sum(), np.float64(0), np.float64(0))
    factor = np.exp(tokens.log_scale - top)
    return WeightSums(top, tokens.count.sum(), (tokens.total * factor).sum(), (tokens.square * factor * factor).sum())


_MISSING = object()
LISTS = ("log_prob", "behavior_log_prob", "log_ratio", "mask", "group")
"""fields in which a list of one is a list"""


class _Reader:
    """Decides on the first record which column is which, checks records one by one, keeps their numbers."""

    def __init__(
        self,
        path: str,
        explicit: dict[str, str],
        layout_name: str | None,
        group: tuple[str, ...],
        group_size: int | None,
        trajectory: str | None,
        by: tuple[str, ...],
        skip_bad: bool,
    ):
        self.path, self.explicit, self.skip_bad = path, explicit, skip_bad
        if trajectory is not None:
            self.explicit["trajectory"] = trajectory
        self.asked = None if layout_name is None else layout(layout_name)
        self.group_columns, self.group_size, self.by = group, group_size, by
        self.wanted = Wanted()
        self.several = False
        self.notes: list[str] = []
        self.layout: ColumnLayout | None = None
        self.mapping: dict[str, str] = {}
        self.reward_rule = "one"
        self.code: dict[Hashable, int] = {}
        self.names: list[Any] = []
        self.number = {
            name: array.array("d") for name in ("group", "reward", "log_ratio", "length", "norm", "trajectory")
        }
        self.slices: dict[str, tuple[dict[Any, int], array.array[int]]] = {}
        self.sums: dict[str, list[np.ndarray]] = {name: [] for name in ("scale", "count", "total", "square")}
        self.where: list[str] = []
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        self.pending_tokens = 0
        self.statistics = TokenSums()
        self.kept: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.kept_tokens = 0
        self.skipped: dict[str, list[str]] = {}
        self.records = self.empty = self.no_weight = self.left_out = self.mixed = self.null_masks = 0
        self.masked_tokens = 0
        self.first_names: frozenset[str] | None = None
        self.kinds: tuple[bool, ...] | None = None
        self.other_length: str | None = None
        self.slice_columns: dict[str, tuple[str, bool]] = {}
        self.file = self.place = ""

    # ---- records ---------------------------------------------------------------------------------------------------

    def take(self, item: Item) -> None:
        """One item of a container: a record, a batch of them in columns, or what is wrong in its place."""
        self.file, self.place = item.path, item.place
        try:
            if isinstance(item.record, InputError):
                raise item.record
            if not self.mapping:
                self._decide(item.record)
            for k, record in enumerate(self._unfolded(item.record)):
                self.place = item.place if k is None or record is item.record else f"{item.place}, rollout {k + 1}"
                self._counted(record)
        except BadRecord as error:
            self._skip(error)

    def _counted(self, record: Mapping[str, Any]) -> None:
        self.records += 1
        try:
            self._add(record)
        except BadRecord as error:
            self._skip(error)

    def _skip(self, error: BadRecord) -> None:
        if not self.skip_bad:
            raise error
        self.skipped.setdefault(error.reason, []).append(self._here())

    def _here(self) -> str:
        return f"{Path(self.file).name}: {self.place}" if self.several else self.place

    def _unfolded(self, record: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """The record itself, or its rollouts if it is a batch in columns: every field a list over the same rollouts."""
        tokens: Any = self._value(record, "log_prob" if "log_prob" in self.mapping else "log_ratio")
        anchor: Any = _listed(self._value(record, "group")) if "group" in self.mapping else _MISSING
        reward: Any = _listed(self._value(record, "reward")) if "reward" in self.mapping else _MISSING
        if not isinstance(tokens, list | np.ndarray) or not len(tokens):
            return (record,)
        nested = isinstance(tokens[0], list | np.ndarray)
        named = isinstance(anchor, list) and all(isinstance(x, int | float | str) for x in anchor)
        flat = named and isinstance(reward, list) and len(anchor) == len(reward) == len(tokens)
        if not nested and not flat:
            return (record,)
        n = len(tokens)
        used = {self.mapping[name] for name in self.mapping} | set(self.group_columns) | set(self.by)
        columns = {}
        for name in used:
            try:
                value = _listed(look_up(record, name))
            except KeyError:
                continue
            if isinstance(value, list) and len(value) != n:
                raise self._bad(
                    name, f"a list of {len(value)}", f"where the log-probabilities are of {n} rollouts", "columns"
                )
            columns[name] = value if isinstance(value, list) else [value] * n
        return [{name: column[k] for name, column in columns.items()} for k in range(n)]

    def _value(self, record: Mapping[str, Any], name: str) -> Any:
        path = self.mapping[name]
        value = record.get(path, _MISSING)
        if value is _MISSING and "." in path:
            try:
                return look_up(record, path)
            except KeyError:
                return _MISSING
        return value

    # ---- which column is which -------------------------------------------------------------------------------------

    def _decide(self, record: Mapping[str, Any]) -> None:
        names = list(map(str, record))
        where = f"{self.file}: {self.place}"
        mapping = {f: n for f, n in self.explicit.items() if n != ABSENT}
        refused = {f for f, n in self.explicit.items() if n == ABSENT}
        for name, column in mapping.items():
            if not _holds(record, column):
                raise self._all_missing(record, names, mapping, {name: column})
        self.layout = self.asked or recognized(names)
        for name in FIELDS:
            if name not in mapping and name not in refused and name in names:
                mapping[name] = name
        if self.layout is not None:
            by_layout = {}
            for name, options in self.layout.columns.items():
                if name in mapping or name in refused:
                    continue
                found = next((n for n in options if _holds(record, n)), None)
                if found is not None:
                    by_layout[name] = found
            mapping |= by_layout
            self.reward_rule = self.layout.reward_rule
            if self.layout.name != "vcposim" and (by_layout or self.asked):
                said = ", ".join(f"{f}={n}" for f, n in by_layout.items())
                how = "as asked" if self.asked else "recognized by its columns"
                self.notes.append(
                    f"layout {self.layout.name} ({self.layout.what}), {how}: {said or 'every field is named already'}"
                )
        for name in ("score_sq_norm", "logit_proxy", "length"):
            if mapping.get(name) == name and name not in self.explicit and record[name] is None:
                del mapping[name]  # a schema with the column, and nothing in it
                self.notes.append(f"{name} is null in the first record: not used")
        if "log_ratio" in mapping and {"log_prob", "behavior_log_prob"} <= set(mapping):
            del mapping["log_ratio"]
        self._take_others(record, names, mapping, refused)
        ratio = "log_ratio" in mapping
        needed = [name for name in ("log_prob", "behavior_log_prob") if not ratio and name not in mapping]
        if self.layout is not None and self.layout.missing and needed:
            raise InputError(
                f"{where}: this is {self.layout.what}: it holds {self.layout.missing}, and a replay needs those of "
                f"both policies. {self._more(names)}To write them (read at its source, not run): {self.layout.change}"
            )
        for name in ("group", "reward"):
            grouped = name == "group" and (self.group_columns or self.group_size)
            if name not in mapping and name not in refused and not grouped and self._candidates(name, names):
                needed.append(name)
        known = mapping.get("log_ratio") or mapping.get("log_prob")
        if known is not None and "length" not in mapping and not needed:
            value = look_up(record, known)
            other = value if ratio else look_up(record, mapping["behavior_log_prob"])
            if not any(hasattr(x, "__len__") and not isinstance(x, str) for x in (value, other)):
                needed.append("length")
        if needed:
            raise self._all_missing(record, names, mapping, dict.fromkeys(needed, ""))
        for column in (*self.group_columns, *self.by):
            if column not in ("lag", "version", "step", "task") and not _holds(record, column):
                raise InputError(f"{where}: column {column!r} not found; the file has: {', '.join(names)}")
        self.mapping = mapping
        self._name_lookalikes(record, names, set(mapping.values()))
        self._slice_columns(record, names)
        if "length" not in mapping and "mask" not in mapping and self.explicit.get("length") != ABSENT:
            self.other_length = next((n for n in (*OTHER_NAMES["length"], "response_lengths") if n in names), None)
        used = {
            *mapping.values(),
            *({self.other_length} if self.other_length else ()),
            *self.group_columns,
            *self.by,
            *(c for c, _ in self.slice_columns.values()),
        }
        self.wanted.names = {name for path in used for name in (path, path.split(".")[0])}
        for name in ("group", "reward"):
            if name not in mapping and not (name == "group" and (self.group_columns or self.group_size)):
                self.notes.append(f"no {name} in the file: the gauges of the weights are read, baselines are not")

    def _more(self, names: list[str]) -> str:
        likely = [n for n in names if ("log" in n and n in AMBIGUOUS) or n in OTHER_NAMES["log_prob"]]
        told = [f"{n}: {AMBIGUOUS[n]}" for n in likely if n in AMBIGUOUS]
        return f"({'; '.join(told)}; name the learner's with --column log_prob=NAME if it is there.) " if told else ""

    def _take_others(
        self, record: Mapping[str, Any], names: list[str], mapping: dict[str, str], refused: set[str]
    ) -> None:
        """Columns that would change the answer in silence: used and noted, or named where it is not clear which."""
        for name in TAKEN:
            if name in mapping or name in refused:
                continue
            there = [n for n in OTHER_NAMES[name] if n in names and n not in mapping.values()]
            if name == "mask":
                for other in (n for n in there if not _maskable(record[n])):
                    self.notes.append(
                        f"column {other!r} is named like a mask but holds {shown(record[other])}: not used"
                    )
                there = [n for n in there if _maskable(record[n])]
            if not there:
                continue
            if name == "mask" and len(there) > 1:
                raise InputError(
                    f"{self.file}: {self.place}: {' and '.join(there)} could both be the mask of the policy's tokens; "
                    f"name one with --column mask={there[0]}, or none of them with --column mask={ABSENT}"
                )
            mapping[name] = there[0]
            if name in ("mask", "sample_mask"):
                self.notes.append(
                    f"{name}: column {there[0]!r} is used as such (--column {name}={ABSENT} to ignore it)"
                )

    def _name_lookalikes(self, record: Mapping[str, Any], names: list[str], used: set[str]) -> None:
        """A list of 0 and 1 beside the tokens may be their mask under a name nobody knows."""
        if "mask" in self.mapping or self.explicit.get("mask") == ABSENT:
            return
        tokens = _bare(self._value(record, "log_prob" if "log_prob" in self.mapping else "log_ratio"))
        if not isinstance(tokens, list | np.ndarray):
            return
        for name in names:
            value = _bare(record[name])
            if name in used or not isinstance(value, list | np.ndarray) or len(value) != len(tokens) or not len(value):
                continue
            if all(isinstance(x, int | float | np.generic) and x in (0, 1) for x in value):
                self.notes.append(
                    f"column {name!r} holds 0 and 1 a token and is not used; if it is the mask of the policy's own "
                    f"tokens, --column mask={name}"
                )

    def _slice_columns(self, record: Mapping[str, Any], names: list[str]) -> None:
        """Slices that may be asked for, and those that the file offers by itself."""
        for name in OF_THE_RUN:
            if name in self.mapping:
                self.slice_columns[name] = (self.mapping[name], True)
        for last in ("last_version", "tail_version", "max_global_steps"):
            if last in names and "version" in self.mapping:
                self.slice_columns["last_version"] = (last, True)
        task = next((n for n in TASKS if n in names), None)
        if task is not None:
            self.slice_columns["task"] = (task, False)
        for column in self.by:
            if column in ("lag", "version", "step", "task"):
                continue
            self.slice_columns[column] = (column, False)

    def _candidates(self, name: str, names: list[str]) -> list[str]:
        return [n for n in OTHER_NAMES[name] if n in names]

    def _all_missing(
        self, record: Mapping[str, Any], names: list[str], mapping: dict[str, str], needed: dict[str, str]
    ) -> InputError:
        """One message for all that is missing, with the options that would mend it, and why a name is not guessed."""
        where = f"{self.file}: {self.place}"
        taken = set(mapping.values()) - set(needed.values())
        told: list[str] = []
        options: list[str] = []
        asked = {n: c for n, c in needed.items() if c}
        plural = "s" if len(needed) > 1 else ""
        quoted = ", ".join(repr(c or n) for n, c in needed.items())
        if asked:
            near = [
                (n, next(iter(difflib.get_close_matches(c, [x for x in names if x not in taken], 1, 0.6)), None))
                for n, c in asked.items()
            ]
            for n, close in near:
                close = close or next((x for x in self._candidates(n, names) if x not in taken), None)
                if close:
                    options.append(f"--column {n}={close}")
        else:
            for name in needed:
                sure = [n for n in self._candidates(name, names) if n not in taken]
                if sure:
                    options.append(f"--column {name}={sure[0]}")
                    taken.add(sure[0])
            # an ambiguous log-probability is what is left over, once the other policy's is known
            unsure = [n for n in names if n in AMBIGUOUS and n not in taken and n not in ("uid", "rewards", "index")]
            for name in ("log_prob", "behavior_log_prob"):
                if name in needed and not any(f"{name}=" in o for o in options):
                    other = "behavior_log_prob" if name == "log_prob" else "log_prob"
                    settled = other in mapping or any(o.startswith(f"--column {other}=") for o in options)
                    if settled and len([n for n in unsure if not n.startswith("ref_")]) == 1:
                        left = next(n for n in unsure if not n.startswith("ref_"))
                        options.append(f"--column {name}={left}")
            told += [f"{n}: {AMBIGUOUS[n]}" for n in unsure]
            for name in ("uid", "rewards", "index"):
                if any(option.endswith(f"={name}") for option in options):
                    told.append(f"{name}: {AMBIGUOUS[name]}")
            if "log_prob" in needed and "log_ratio" not in mapping:
                ratio = self._candidates("log_ratio", names)
                if ratio:
                    options = [o for o in options if "log_prob" not in o] + [f"--column log_ratio={ratio[0]}"]
        text = f"{where}: column{plural} {quoted} not found"
        if options:
            first = options[0].split("=")[1]
            text += f"; did you mean {first!r}?" if len(options) == 1 and len(needed) == 1 else ""
            text += f" use {' '.join(options)}" if text.endswith("?") else f"; use {' '.join(options)}"
        rest = [n for n in needed if not any(o.startswith(f"--column {n}=") for o in options)]
        if rest:
            named = " ".join(f"--column {n}=NAME" for n in rest)
            text += f"; name {'it' if len(rest) == 1 else 'them'} with {named}, the file has: {', '.join(names)}"
        return InputError(text + (f" ({'; '.join(told)})" if told else ""))

    # ---- one record ------------------------------------------------------------------------------------------------

    def _add(self, record: Mapping[str, Any]) -> None:
        """Check everything first, then keep it: a record is taken whole or not at all."""
        mapping = self.mapping
        if self.first_names is None:
            self.first_names = frozenset(record)
        elif not self.first_names.issuperset(record):
            for name in MEANINGFUL.intersection(record) - self.first_names:
                raise self._bad(
                    name, "here", "but not in the first record; write it in all of them or in none", "a new field"
                )
        if "sample_mask" in mapping and self._get(record, "sample_mask") in (0, [0], [0.0], False):
            self.left_out += 1
            return
        label = self._label(record)
        reward = self._reward(record) if "reward" in mapping else math.nan
        log_ratio, length, pair = self._weights(record)
        norm = math.nan
        source = self.norm_source
        if source != "length":
            norm = self._scalar(source, self._get(record, source))
            if norm < 0:
                raise self._bad(
                    source, norm, "is negative; it is a squared norm, dump it again or leave it out", "a negative norm"
                )
        trajectory = self._get(record, "trajectory") if "trajectory" in mapping else None
        if "trajectory" in mapping:  # null: this row is a trajectory by itself, as slime writes it
            trajectory = ("row", self.records) if trajectory is None else _key(trajectory)
        marks = {name: self._mark(record, name, column) for name, (column, _) in self.slice_columns.items()}

        row = len(self.number["reward"])
        number = self.number
        number["group"].append(self.code.setdefault(label, len(self.code)))
        if len(self.names) < len(self.code):
            self.names.append(label)
        number["reward"].append(reward)
        number["log_ratio"].append(log_ratio)
        number["length"].append(length)
        number["norm"].append(norm)
        if trajectory is not None:
            ids, codes = self.slices.setdefault(" trajectory", ({}, array.array("q")))
            codes.append(ids.setdefault(trajectory, len(ids)))
        for name, value in marks.items():
            values, codes = self.slices.setdefault(name, ({}, array.array("q")))
            codes.append(values.setdefault(value, len(values)))
        self.where.append(self._here())
        self.empty += length == 0
        self.no_weight += log_ratio == -math.inf
        if pair is not None:
            self._keep_tokens(row, *pair)

    def _get(self, record: Mapping[str, Any], name: str) -> Any:
        value = self._value(record, name)
        if value is _MISSING:
            raise self._bad(name, "absent", "is missing, other records have it", "is missing")
        if value is None and name not in ("mask", "trajectory"):
            raise self._bad(name, value, "is no value; fill it in or drop the record", "null")
        if isinstance(value, list | np.ndarray) and len(value) == 1 and name not in LISTS:
            return value[0]  # a batch of one, as NeMo-RL writes
        return value

    def _label(self, record: Mapping[str, Any]) -> Hashable:
        if self.group_size is not None:
            return (self.records - 1) // self.group_size
        if self.group_columns:
            parts = []
            for column in self.group_columns:
                try:
                    parts.append(_key(look_up(record, column)))
                except KeyError:
                    raise self._bad(column, "absent", "is missing, other records have it", "is missing") from None
            return parts[0] if len(parts) == 1 else tuple(parts)
        if "group" not in self.mapping:
            return len(self.code)
        value = self._get(record, "group")
        if isinstance(value, float) and value != value:
            raise self._bad("group", value, "cannot name a group; use a number, a string, or any JSON value", "NaN")
        if self.layout is not None and self.layout.group_suffixes and isinstance(value, str):
            return value.rsplit("_", self.layout.group_suffixes)[0]
        return _key(value)

    def _reward(self, record: Mapping[str, Any]) -> float:
        value = self._get(record, "reward")
        if isinstance(value, dict):
            keys = ", ".join(list(value)[:5])
            raise self._bad(
                "reward",
                value,
                f"is an object, not a number; name its part, as in --column reward={self.mapping['reward']}."
                f"{next(iter(value), 'KEY')} (it has {keys})",
                "an object",
            )
        if isinstance(value, list | np.ndarray):
            return self._token_rewards(list(value), record)
        return self._scalar("reward", value, boolean=True)

    def _token_rewards(self, values: list[Any], record: Mapping[str, Any]) -> float:
        if self.reward_rule == "one":
            raise self._bad(
                "reward",
                f"a list of {len(values)}",
                "is not one number a trajectory; name a column of numbers, or the --layout that says what it means",
                "a list",
            )
        if self.reward_rule == "sum":
            return math.fsum(self._scalar("reward", x) for x in values)
        keep = self._mask(self._get(record, "mask"), len(values)) if "mask" in self.mapping else None
        seen: set[Any] = {x for k, x in enumerate(values) if (keep is None or keep[k]) and x is not None}
        if len(seen) != 1:
            raise self._bad(
                "reward", f"{len(seen)} values", "over one trajectory, where this layout repeats a single one", "mixed"
            )
        return self._scalar("reward", seen.pop())

    def _scalar(self, name: str, value: Any, *, boolean: bool = False) -> float:
        if isinstance(value, np.generic):
            value = value.item()
        if (isinstance(value, bool) and not boolean) or not isinstance(value, int | float):
            raise self._bad(name, value, f"is a {kind(value)}, not a number; dump it as a number", f"a {kind(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._bad(name, value, "is not finite; drop the record or compute it again", "not finite")
        if abs(number) > LARGEST:
            raise self._bad(name, value, "is out of any scale; check its unit", "out of any scale")
        return number

    def _weights(self, record: Mapping[str, Any]) -> tuple[float, float, tuple[Any, Any] | None]:
        """log-ratio, length, and the two lists of tokens if there are two."""
        names = ("log_ratio",) if "log_ratio" in self.mapping else ("log_prob", "behavior_log_prob")
        choices = record.get("choices")
        if (
            isinstance(choices, list)
            and len(choices) > 1
            and any(self.mapping[n].startswith("choices.") for n in names)
        ):
            raise self._bad("choices", f"{len(choices)} answers", "in one record; write one answer a record", "choices")
        values = [_bare(self._get(record, name)) for name in names]
        kinds = tuple(isinstance(v, list | np.ndarray) for v in values)
        if self.kinds is None:
            self.kinds = kinds
            if any(kinds) and not all(kinds):
                one = names[kinds.index(False)]
                self.notes.append(
                    f"{one} is a sum a trajectory, the other a list: nothing can be said of single tokens"
                )
                if "mask" in self.mapping:
                    raise self._bad(one, values[kinds.index(False)], "is a sum, and a sum cannot be masked", "a sum")
        elif kinds != self.kinds:
            name = next(n for n, a, b in zip(names, kinds, self.kinds, strict=True) if a != b)
            raise self._bad(
                name,
                values[names.index(name)],
                "is not what it was in the first record, a list or a sum",
                "mixed kinds",
            )
        lists = [v for v in values if isinstance(v, list | np.ndarray)]
        stated = self._scalar("length", self._get(record, "length")) if "length" in self.mapping else None
        if not lists:
            if stated is None:
                raise self._bad("length", None, "is missing, and there is no list of tokens to count", "is missing")
            numbers = [self._log_prob(name, v) for name, v in zip(names, values, strict=True)]
            if stated < 1 and (stated < 0 or any(numbers)):
                raise self._bad("length", stated, "is less than one token; drop empty responses", "empty response")
            return numbers[0] - (numbers[1] if len(numbers) > 1 else 0.0), stated, None
        size = len(lists[0])
        for name, v in zip(names, values, strict=True):
            if isinstance(v, list | np.ndarray) and len(v) != size:
                raise self._bad(
                    name,
                    f"{len(v)} tokens",
                    f"does not match the {size} of the other one; dump the same tokens (one more: an end-of-text token "
                    "or the first of the prompt counted on one side; many more: the prompt, or another tokenizer)",
                    "lists of different lengths",
                )
        keep = None
        if "mask" in self.mapping:
            given = self._get(record, "mask")
            self.null_masks += given is None
            keep = self._mask(given, size)
        tokens = [
            self._tokens(name, v, keep) if isinstance(v, list | np.ndarray) else self._log_prob(name, v)
            for name, v in zip(names, values, strict=True)
        ]
        counted = size if keep is None else int(keep.sum())
        self.masked_tokens += size - counted
        if stated is not None and keep is None and counted != stated:
            raise self._bad(
                "length", stated, f"is not the {counted} tokens listed; trim the padding or dump a mask", "length"
            )
        if self.other_length is not None and keep is None:
            other = record.get(self.other_length)
            if isinstance(other, int | float) and other != counted:
                raise self._bad(
                    self.other_length,
                    other,
                    f"says how long the response is, and {counted} tokens are listed: padding, or tokens of others? "
                    "dump a mask or the response's own tokens, or ignore this column with --column length=none",
                    "another length than that of the lists",
                )
        sums = [float(t.sum()) if isinstance(t, np.ndarray) else t for t in tokens]
        total = sums[0] - (sums[1] if len(sums) > 1 else 0.0)
        if len(lists) == 2:
            return total, counted, (tokens[0], tokens[1])
        pair = (tokens[0], np.zeros(counted)) if len(names) == 1 else None
        return total, counted, pair

    def _mask(self, mask: Any, length: int) -> np.ndarray:
        if mask is None:
            return np.ones(length, dtype=bool)
        mask = _bare(mask)
        if not isinstance(mask, list | np.ndarray) or len(mask) != length:
            raise self._bad(
                "mask", mask, f"does not match the {length} tokens of the log-probabilities", "mask of another length"
            )
        if isinstance(mask, list) and not {type(flag) for flag in mask} <= {int, float, bool}:
            raise self._bad("mask", mask, "holds something else than 0 and 1", "mask")
        try:
            flags = np.asarray(mask, dtype=np.float64)
        except OverflowError:
            flags = np.array([math.inf])
        if not np.all((flags == 0) | (flags == 1)):
            raise self._bad("mask", list(mask), "holds something else than 0 and 1", "mask")
        return flags.astype(bool)

    def _tokens(self, name: str, value: Any, keep: np.ndarray | None) -> np.ndarray:
        """Log-probabilities of the kept tokens; whatever stands at the others is never looked at."""
        if isinstance(value, np.ndarray) and value.dtype != object:
            if value.dtype.kind not in "fiu":
                raise self._bad(name, value.tolist(), "is a list of booleans, not of numbers", "booleans")
            x = value.astype(np.float64, copy=False)
            x = x if keep is None else x[keep]
        else:
            try:
                x = np.frombuffer(array.array("d", value))
                # an array takes false for 0: look at what stands where it found a 0
                zero = np.flatnonzero(x == 0 if keep is None else (x == 0) & keep).tolist()
                if bool in set(map(type, map(value.__getitem__, zero))):
                    raise self._bad(name, False, "is a boolean, not a number; dump it as a number", "a boolean")
                x = x if keep is None else x[keep]
            except (TypeError, OverflowError):
                kept = value if keep is None else [v for v, flag in zip(value, keep, strict=True) if flag]
                x = np.array([self._one_token(name, v) for v in kept], dtype=np.float64)
        if not x.size:
            return x
        low, high = x.min(), x.max()
        bound = LARGEST if name == "log_ratio" else ROUNDING
        if not (high <= bound and (low >= -LARGEST or (low == -math.inf and name != "behavior_log_prob"))):
            for v in x:
                self._log_prob(name, float(v))
        return x

    def _one_token(self, name: str, value: Any) -> float:
        if value is None:
            raise self._bad(name, value, "is no value; fill it in, mask the token or drop the record", "null")
        return self._log_prob(name, value)

    def _log_prob(self, name: str, value: Any) -> float:
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, float) and value == -math.inf and name != "behavior_log_prob":
            return value
        if isinstance(value, float) and value == -math.inf:
            raise self._bad(
                name, value, "is not finite: the sampler sampled what it gave no chance; drop the record", "not finite"
            )
        number = self._scalar(name, value)
        if number > ROUNDING and name != "log_ratio":
            raise self._bad(
                name,
                value,
                "is positive; the logarithm of a probability is at most 0, check its sign",
                "a positive log-probability",
            )
        return number

    def _mark(self, record: Mapping[str, Any], name: str, column: str) -> Any:
        try:
            value = look_up(record, column)
        except KeyError:
            if name in self.mapping:
                raise self._bad(name, "absent", "is missing, other records have it", "is missing") from None
            return None
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if name in ("version", "last_version") and isinstance(value, list):
            # a version a token or a turn: the trajectory began under its first own one
            versions = sorted({_key(x) for x in value if x not in (None, -1)}, key=_order)
            self.mixed += len(versions) > 1
            return versions[0] if versions else None
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if name in self.mapping and not (value is None or isinstance(value, str) or _counts(value)):
            raise self._bad(name, value, "is no count of the run; dump a number or a string", "no count")
        return _key(value)

    def _bad(self, name: str, value: Any, remedy: str, reason: str) -> BadRecord:
        column = self.mapping.get(name, name)
        known = column if column == name else f"{column} ({name})"
        return broken(f"{self.file}: {self.place}: {known}: {shown(value)} {remedy}", f"{name}: {reason}")

    @property
    def norm_source(self) -> str:
        """The best field there is for ||s||^2."""
        return next((name for name in ("score_sq_norm", "logit_proxy") if name in self.mapping), "length")

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def _keep_tokens(self, row: int, learner: np.ndarray, sampler: np.ndarray) -> None:
        self.pending.append((learner, sampler))
        self.pending_tokens += learner.size
        if self.kept_tokens <= TOKENS_KEPT:
            self.kept_tokens += learner.size
            self.kept.append((row, learner, sampler))
        if self.pending_tokens >= TOKENS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        """Reduce the pending tokens to sums a trajectory, and look at them for the checks."""
        if not self.pending:
            return
        sizes = np.array([a.size for a, _ in self.pending])
        learner = np.concatenate([a for a, _ in self.pending])
        sampler = np.concatenate([b for _, b in self.pending])
        self.pending, self.pending_tokens = [], 0
        scale, total, square = np.full(sizes.size, -math.inf), np.zeros(sizes.size), np.zeros(sizes.size)
        ends = np.cumsum(sizes)
        if learner.size:
            real = np.flatnonzero(sizes)
            starts = (ends - sizes)[real]
            with np.errstate(invalid="ignore"):
                d = learner - sampler
            scale[real] = np.maximum.reduceat(d, starts)
            w = np.exp(d - np.repeat(np.where(scale[real] == -math.inf, 0.0, scale[real]), sizes[real]))
            total[real], square[real] = np.add.reduceat(w, starts), np.add.reduceat(w * w, starts)
            if "log_ratio" not in self.mapping:
                self.statistics.add(learner, sampler, ends[real])
        for name, values in zip(self.sums, (scale, sizes.astype(float), total, square), strict=True):
            self.sums[name].append(values)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def finish(self, merge_reward: str) -> Dump:
        """The dump, or the error of an empty file."""
        if not self.number["reward"]:
            bad = sum(map(len, self.skipped.values()))
            why = f"all {bad} records are broken ({'; '.join(self.skipped)})" if bad else "empty file"
            raise InputError(f"{self.path}: no rollouts in it ({why}); dump at least one group")
        self._flush()
        if self.group_size and self.records % self.group_size:
            raise InputError(
                f"--group-size: {self.records} records are no multiple of {self.group_size}; the last prompt would be "
                "short, so the rows are not what this option takes them for"
            )
        length = np.array(self.number["length"])
        n = length.size
        whole = len(self.sums["count"]) > 0 and sum(map(len, self.sums["count"])) == n
        tokens = WeightSums(*map(np.concatenate, self.sums.values())) if whole else None
        dump = Dump(
            path=self.path,
            labels=self.names,
            group=np.array(self.number["group"]).astype(int),
            reward=np.array(self.number["reward"]),
            log_ratio=np.array(self.number["log_ratio"]),
            length=length,
            score_sq_norm=length if self.norm_source == "length" else np.array(self.number["norm"]),
            norm_source=self.norm_source,
            tokens=tokens,
            has_group="group" in self.mapping or bool(self.group_columns) or self.group_size is not None,
            has_reward="reward" in self.mapping,
            layout=self.layout.name if self.layout else "",
            slices={name: (np.array(codes), list(values)) for name, (values, codes) in self.slices.items()},
            skipped=self.skipped,
            kept=tuple(self.kept),
            place=tuple(self.where),
        )
        notes = list(self.notes)
        dump = self._by_step(dump, notes)
        dump = self._merged(dump, merge_reward, notes)
        dump = _with_lag(dump)
        self._say(dump, notes)
        findings = [
            *token_findings(self.statistics),
            *trajectory_findings(dump.log_ratio, lambda i: dump.place[i], tokens=tokens is not None),
            *self._versions(dump),
        ]
        slices = {name: one for name, one in dump.slices.items() if not name.startswith(" ")}
        return replace(dump, notes=tuple(notes), findings=tuple(findings), slices=slices, kept=_whole_groups(dump))

    def _by_step(self, dump: Dump, notes: list[str]) -> Dump:
        """A prompt that comes up at several steps is a group at each: its responses are of different policies."""
        if "step" not in dump.slices or self.group_columns or not dump.has_group or self.group_size:
            return dump
        step, values = dump.slices["step"]
        pair = dump.group * len(values) + step
        pairs = np.unique(pair)
        if pairs.size == len(dump.labels):
            return dump
        if " trajectory" in dump.slices:
            ids = dump.slices[" trajectory"][0]
            if np.unique(dump.group * (ids.max() + 1) + ids).size < np.unique(pair * (ids.max() + 1) + ids).size:
                return dump  # it changes inside a trajectory: a turn, not a training step
        size, split = np.bincount(dump.group), np.unique(pair, return_counts=True)[1]
        column = self.mapping["step"]
        if size.max() > 1 and split.max() == 1:
            notes.append(f"{column!r} differs within every group, so it is no training step and splits none")
            return dump
        order, code = _coded(pair)
        labels: list[Hashable] = [(values[p % len(values)], dump.labels[p // len(values)]) for p in order]
        name = self.mapping.get("group", "group")
        notes.append(
            f"groups are ({column}, {name}): {name!r} comes up at several steps, {len(size)} values make {len(labels)} "
            f"groups (--group {name} pools the steps)"
        )
        return replace(dump, labels=labels, group=code)

    def _merged(self, dump: Dump, merge_reward: str, notes: list[str]) -> Dump:
        """Rows of one trajectory, added up."""
        if " trajectory" not in dump.slices:
            return dump
        ids, values = dump.slices[" trajectory"]
        column = self.mapping["trajectory"]
        asked = "trajectory" in self.explicit
        key = dump.group * (len(values) + 1) + ids
        order, code = _coded(key)
        if order.size == ids.size:
            return dump
        groups_of_id = np.bincount(np.unique(key) % (len(values) + 1), minlength=len(values))
        ids_of_group = np.bincount(np.unique(key) // (len(values) + 1))
        if not asked and ids_of_group.max() == 1 and (groups_of_id.max() > 1 or len(values) == 1):
            notes.append(f"{column!r} is the same in whole groups: a counter of the run, not of trajectories, not used")
            return dump
        first = np.unique(code, return_index=True)[1]
        last = ids.size - 1 - np.unique(code[::-1], return_index=True)[1]
        reward = dump.reward[last if merge_reward == "last" else first]
        if merge_reward == "sum":
            reward = np.bincount(code, dump.reward)
        elif merge_reward == "same" and dump.has_reward and np.any(dump.reward != reward[code]):
            row = int(np.flatnonzero(dump.reward != reward[code])[0])
            raise InputError(
                f"{self.path}: {dump.place[row]}: {column!r} says this row continues a trajectory, but its reward "
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
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for row, a, b in dump.kept:
            parts.setdefault(int(code[row]), []).append((a, b))
        whole = np.bincount(code)
        kept = tuple(
            (t, np.concatenate([a for a, _ in rows]), np.concatenate([b for _, b in rows]))
            for t, rows in parts.items()
            if len(rows) == whole[t]
        )
        return replace(
            dump,
            group=dump.group[first],
            reward=reward,
            log_ratio=log_ratio,
            length=length,
            score_sq_norm=length,
            norm_source="length",
            tokens=tokens,
            slices={name: (c[first], v) for name, (c, v) in dump.slices.items() if name != " trajectory"},
            kept=kept,
            place=tuple(dump.place[i] for i in first),
        )

    def _say(self, dump: Dump, notes: list[str]) -> None:
        """Everything that was counted on the way."""
        if self.skipped:
            total = sum(map(len, self.skipped.values()))
            by_reason = "; ".join(f"{len(at)} {why} ({_first(at)})" for why, at in self.skipped.items())
            notes.append(f"{total} of {self.records + self._unread()} records are left out (--skip-bad): {by_reason}")
        if self.left_out:
            notes.append(f"{self.left_out} trajectories have a sample mask of 0 and are left out, as the trainer did")
        if self.empty:
            notes.append(f"{self.empty} responses are empty: weight 1, an empty product, and no gradient")
        if self.no_weight:
            notes.append(f"{self.no_weight} trajectories have weight 0: the learner's log-probability is -inf there")
        if self.null_masks:
            notes.append(f"{self.null_masks} masks are null: all tokens count there")
        if self.masked_tokens and dump.tokens is not None:
            share = self.masked_tokens / (self.masked_tokens + dump.tokens.count.sum())
            notes.append(f"{share:.0%} of the tokens listed are masked out ({self.mapping['mask']})")
        if dump.has_group and len(dump.labels) == dump.group.size > 1:
            notes.append(
                f"every one of the {dump.group.size} groups has a single response: "
                f"{self.mapping.get('group', ','.join(self.group_columns) or 'the group')!r} is no key of groups, so "
                "no baseline means anything; name what the responses of one prompt share (--group COLUMN[,COLUMN]), or "
                "--group-size N for rows in order"
            )

    def _unread(self) -> int:
        return sum(len(at) for why, at in self.skipped.items() if why in ("not JSON", "cut off", "no JSON object"))

    def _versions(self, dump: Dump) -> list[Finding]:
        mixed = self.mixed
        if "last_version" in dump.slices and "version" in dump.slices:
            (a, first), (b, last) = dump.slices["version"], dump.slices["last_version"]
            mixed = int(np.sum([first[i] != last[j] for i, j in zip(a, b, strict=True)]))
        if not mixed:
            return []
        return [
            Finding(
                "mixed versions",
                f"{mixed} of {dump.group.size} trajectories were generated by more than one version of the policy",
                "their behavior policy changed on the way: behavior_log_prob must be the one recorded at each token; "
                "a single version or lag stands for the first",
            )
        ]


TASKS = ("task", "env_name", "data_source", "dataset", "dataset_name", "domain", "environment")
"""what frameworks call the task of a prompt"""


def _holds(record: Mapping[str, Any], path: str) -> bool:
    try:
        look_up(record, path)
    except KeyError:
        return False
    return True


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _bare(value: Any) -> Any:
    """Without the batch axis of one that NeMo-RL writes around everything."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list | np.ndarray):
        return value[0]
    return value


def _maskable(value: Any) -> bool:
    return value is None or isinstance(value, list | np.ndarray)


def _key(value: Any) -> Hashable:
    """A JSON value as a key: numbers, strings and booleans as they are, the rest as canonical text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, int | float | str):
        return value
    return orjson.dumps(
        value, option=orjson.OPT_SORT_KEYS, default=lambda x: getattr(x, "tolist", x.__str__)()
    ).decode()


def _counts(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _order(value: Any) -> tuple[int, Any]:
    if isinstance(value, str):
        return (0, float(value)) if value.lstrip("-").isdigit() else (1, value)
    return (0, value)


def _coded(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys in order of appearance, and the code of each."""
    values, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    rank = np.empty(values.size, dtype=int)
    order = np.argsort(first)
    rank[order] = np.arange(values.size)
    return values[order], rank[inverse]


def _first(places: list[str]) -> str:
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def _with_lag(dump: Dump) -> Dump:
    """`lag` from the learner's version and the sampler's, where the file has both and no lag of its own."""
    if "lag" in dump.slices or not {"version", "learner_version"} <= set(dump.slices):
        return dump
    (a, sampler), (b, learner) = dump.slices["version"], dump.slices["learner_version"]
    try:
        lag = np.array([float(v) for v in learner])[b] - np.array([float(v) for v in sampler])[a]
    except (TypeError, ValueError):
        return dump
    order, code = _coded(lag)
    return replace(dump, slices={**dump.slices, "lag": (code, [int(x) if x == int(x) else float(x) for x in order])})


def _whole_groups(dump: Dump) -> tuple[tuple[int, np.ndarray, np.ndarray], ...]:
    """Tokens of the groups of which every trajectory was kept."""
    have = np.bincount(dump.group[[i for i, _, _ in dump.kept]], minlength=len(dump.labels)) if dump.kept else None
    if have is None:
        return ()
    complete = have == np.bincount(dump.group, minlength=len(dump.labels))
    return tuple(one for one in dump.kept if complete[dump.group[one[0]]])


def shown(value: Any) -> str:
    """A value in an error: JSON, cut short."""
    if isinstance(value, str) and " " in value:
        text = value
    else:
        text = json.dumps(value if not isinstance(value, np.ndarray) else value.tolist(), default=str)
    return one_line(text if len(text) <= 60 else text[:57] + "...")
