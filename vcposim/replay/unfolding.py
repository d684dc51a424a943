"""A record -> the rollouts in it: itself, those that it wraps, those of a batch in columns; turns joined."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vcposim.errors import InputError
from vcposim.replay.columns import MISSING, Columns
from vcposim.replay.items import LISTED, BadRecord, broken, kind
from vcposim.replay.layouts import look_up
from vcposim.replay.names import BESIDE, LOG_PROBS, PARTS, option


class Unfolding:
    """Finds the rollouts of each record; the columns of the file are decided on the first one."""

    def __init__(self, columns: Columns, skip_bad: bool):
        self.columns, self.skip_bad = columns, skip_bad
        self.under: tuple[str, ...] = ()
        """the names, one in the other, under which records hold their rollouts"""
        self.undecided: InputError | None = None
        """why the first records named no columns, where broken records are left out"""
        self.said: set[str] = set()

    @property
    def plain(self) -> bool:
        """Whether the columns are decided, and are those of the records themselves."""
        return not self.under and bool(self.columns.mapping)

    def rollouts(self, record: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """The record itself; or what it wraps, with the plain values beside it; each batch in columns unfolded.

        Raises `InputError` where no rollout can be found in the first record, `BadRecord` where none is in a later one.
        """
        if self.plain:
            return self.unfolded(record)
        if not self.columns.mapping and not self.under:
            self.under = self.columns.wrapping(record)
            if self.under:
                self.columns.notes.append(f"the rollouts are read out of {'.'.join(self.under)!r}{self._doubt(record)}")
        parts: Sequence[Any] = (record,)
        for name in self.under:
            parts = [part for one in parts for part in self._inside(one, name)]
        return self._decided(parts)

    def _doubt(self, record: Mapping[str, Any]) -> str:
        """What to do if those were no rollouts."""
        name = self.under[-1]
        if name not in PARTS or len(self.under) > 1 or not isinstance(record[name], list):
            return ""
        named = next(n for n in record[name][0] if n in LOG_PROBS)
        return (
            ", each with its reward; if they are the parts of one trajectory, name what it is joined of, as in "
            f"{option('log_prob', f'{name}.*.{named}')}, and the reward of the whole"
        )

    def _inside(self, record: Any, name: str) -> Sequence[Any]:
        """What a record holds under a name, each with the plain values, and the group, that stand beside it."""
        if not isinstance(record, dict):
            return (record,)
        inside, groups = record.get(name), self.columns.group_names
        shared = {k: v for k, v in record.items() if k != name and (k in groups or not isinstance(v, list | dict))}
        if isinstance(inside, dict):  # as verl's `batch` beside `non_tensor_batch`: columns of many, or one rollout
            listed = {n: v for n, v in inside.items() if n in LOG_PROBS and isinstance(v, LISTED) and len(v)}
            many = any(isinstance(v[0], LISTED) for v in listed.values())
            for one in (v for k, v in record.items() if k != name and isinstance(v, dict)):
                beside = {k: v for k, v in one.items() if isinstance(v, LISTED) or not (many or isinstance(v, dict))}
                shared = beside | shared
        several = inside if isinstance(inside, list) else [inside]
        return [{**shared, **x} if isinstance(x, dict) else x for x in several]

    def _decided(self, parts: Sequence[Any]) -> Iterable[Mapping[str, Any]]:
        for part in parts:
            if not isinstance(part, dict):
                where = f"{self.columns.where}: {'.'.join(self.under)}"
                raise broken(f"{where}: {kind(part)}, where others hold rollouts", "no rollouts")
            if not self.columns.mapping:
                try:
                    self.columns.decide(part)
                except BadRecord:
                    raise
                except InputError as error:
                    if not self.skip_bad or self.undecided is not None:
                        raise
                    self.undecided = error
                    raise broken(str(error), "no rollout") from None
            yield from self.unfolded(part)

    def unfolded(self, record: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """The record itself, or its rollouts if it is a batch in columns: every field a list over the same rollouts.

        Lists of lists are such a batch if there is a reward (without rewards: a group) each; with a single reward they
        are the turns of one trajectory.

        Raises `InputError` for lists of different lengths.
        """
        tokens: Any = self.columns.value(record, "log_prob" if "log_prob" in self.columns.mapping else "log_ratio")
        if not isinstance(tokens, LISTED) or not len(tokens):
            return (record,)
        nested = isinstance(tokens[0], LISTED)
        reward: Any = self.columns.value(record, "reward") if "reward" in self.columns.mapping else MISSING
        if not nested and not isinstance(reward, LISTED):
            return (record,)
        reward = _listed(reward)
        anchor: Any = _listed(self.columns.value(record, "group")) if "group" in self.columns.mapping else MISSING
        named = isinstance(anchor, list) and all(isinstance(x, int | float | str) for x in anchor)
        flat = named and isinstance(reward, list) and len(anchor) == len(reward) == len(tokens)
        if not nested and not flat:
            return (record,)
        n = len(tokens)
        if nested and n > 1 and not isinstance(reward if reward is not MISSING else anchor, list):
            names = [name for name in ("log_prob", "behavior_log_prob") if name in self.columns.mapping]
            values: dict[str, Any] = {name: self.columns.value(record, name) for name in names}
            sizes = {name: len(x) for name, x in values.items() if isinstance(x, LISTED) and len(x)}
            parts = [name for name in sizes if isinstance(values[name][0], LISTED)]
            # a number a token beside: neither rollouts nor turns
            if len(parts) == 1 and list(sizes.values()) == [n, n]:
                column = f"{self.columns.mapping[parts[0]]}.*.0"
                remedy = f"a list at each token; name its number, as in {option(parts[0], column)}"
                raise self.columns.bad(parts[0], values[parts[0]][0], remedy, "a list a token")
            if reward is not MISSING:
                self._say("the log-probabilities are lists in a list beside one reward: turns of a trajectory, joined")
                return (self._joined(record),)
            if anchor is not MISSING and not isinstance(anchor, Mapping):
                raise self.columns.bad(
                    "log_prob" if "log_prob" in self.columns.mapping else "log_ratio",
                    f"{n} lists",
                    "in one record of one group without rewards: turns of a trajectory, or trajectories? write one "
                    "trajectory a record, its tokens in one list",
                    "lists in a list",
                )
        self.columns.see_nothing_new(record)
        ungrouped = anchor is MISSING and not self.columns.group_columns and self.columns.group_size is None
        if n > 1:
            answers = f"; if those of one record answer one prompt, --group-size {n} says so" if ungrouped else ""
            self._say(f"a record holds columns of several rollouts ({n} in the first){answers}")
        columns = {}
        for name in self.columns.paths:
            try:
                value = _listed(look_up(record, name))
            except KeyError:
                continue
            if isinstance(value, list) and len(value) != n:
                raise self.columns.bad(
                    name, f"a list of {len(value)}", f"where the log-probabilities are of {n} rollouts", "columns"
                )
            columns[name] = value if isinstance(value, list) else [value] * n
        return [{name: column[k] for name, column in columns.items()} for k in range(n)]

    def _say(self, note: str) -> None:
        kind, _, _ = note.partition(" (")
        if kind not in self.said:
            self.said.add(kind)
            self.columns.notes.append(note)

    def _joined(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with the turns of its token lists after each other."""
        joined = dict(record)
        turns: dict[str, list[int]] = {}
        names = ("log_prob", "behavior_log_prob", "log_ratio", "mask", *BESIDE)
        for name in (name for name in names if name in self.columns.mapping):
            value = self.columns.value(record, name)
            if isinstance(value, list) and value and all(isinstance(turn, list | np.ndarray) for turn in value):
                joined[self.columns.mapping[name]] = [x for turn in value for x in turn]
                turns[name] = [len(turn) for turn in value]
        for name, lengths in turns.items():
            first, others = next(iter(turns.items()))
            if lengths != others:
                remedy = f"tokens a turn, where {first} has {others[:6]}; dump the same tokens"
                raise self.columns.bad(name, lengths[:6], remedy, "turns of different lengths")
        return joined


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
