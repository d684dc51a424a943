"""Which column of a file is which field: by option, by our names, by layout, or by being the only one that can be it.

A name that means the sampler in one framework and the learner in another is explained and never guessed; a column that
would change the answer is used and said, or named.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vcposim.errors import InputError
from vcposim.replay.items import LISTED, BadRecord, broken, one_line
from vcposim.replay.layouts import ColumnLayout, layout, look_up, recognized
from vcposim.replay.metrics import is_log
from vcposim.replay.names import (
    ABSENT,
    AMBIGUOUS,
    BESIDE,
    FIELDS,
    IDS,
    LAST_VERSIONS,
    LIKE,
    LISTS,
    LOG_PROBS,
    NAMED_GROUP,
    OF_LAGS,
    OF_THE_RUN,
    OF_TRAJECTORIES,
    OF_VERSIONS,
    OTHER_NAMES,
    SPLITS,
    TAKEN,
    TASKS,
    TURNS,
    option,
    plain,
)

MISSING = object()
"""what a record has where it has nothing"""


class Columns:
    """The columns of a file, decided once, on its first record."""

    def __init__(
        self,
        explicit: Mapping[str, str],
        layout_name: str | None,
        group: tuple[str, ...],
        group_size: int | None,
        by: tuple[str, ...],
    ):
        self.explicit = explicit
        self.asked = None if layout_name is None else layout(layout_name)
        self.group_columns, self.group_size, self.by = group, group_size, by
        self.layout: ColumnLayout | None = None
        self.mapping: dict[str, str] = {}
        self.paths: set[str] = set()
        """all that is read of a record"""
        self.used: set[str] = set()
        """names a columnar file has to deliver"""
        self.watched: frozenset[str] = frozenset()
        """names that a later record may not bring in, for the first one had none of that name"""
        self.reward_rule = "one"
        self.other_length: str | None = None
        self.slice_columns: dict[str, tuple[str, bool]] = {}
        self.notes: list[str] = []
        self.file = self.place = ""
        """of the record at hand, for errors"""

    @property
    def where(self) -> str:
        """File and place of the record at hand."""
        return f"{self.file}: {self.place}"

    def value(self, record: Mapping[str, Any], name: str) -> Any:
        """What a record has under a field, or `MISSING`."""
        path = self.mapping[name]
        value = record.get(path, MISSING)
        if value is MISSING and "." in path:
            try:
                return look_up(record, path)
            except KeyError:
                return MISSING
        return value

    @property
    def norm_source(self) -> str:
        """The best field there is for ||s||^2."""
        return next((name for name in ("score_sq_norm", "logit_proxy") if name in self.mapping), "length")

    def bad(self, name: str, value: Any, remedy: str, reason: str) -> BadRecord:
        """The error of a field of the record at hand."""
        column = self.mapping.get(name, name)
        known = column if column == name else f"{column} ({name})"
        told = "" if value is MISSING else f"{shown(value)} "
        return broken(f"{self.where}: {known}: {told}{remedy}", f"{name}: {reason}")

    def see_nothing_new(self, names: Iterable[str]) -> None:
        """Raises `BadRecord` for a record that brings in a column which would have changed how the first was read."""
        for name in self.watched.intersection(names):
            remedy = "is here, but not in the first record; write it in all of them or in none"
            raise self.bad(name, MISSING, remedy, "a new field")

    def strange(self, record: Mapping[str, Any]) -> BadRecord | None:
        """The error of a record that has nothing of what the first one has: no rollout at all."""
        columns = dict.fromkeys((*self.mapping.values(), *self.group_columns))
        if not columns or any(_holds(record, column) for column in columns):
            return None
        remedy = "name the files of rollouts alone, or take this one away"
        return broken(
            f"{self.where}: none of the columns of the rollouts ({', '.join(columns)}); {remedy}", "no rollout"
        )

    def decide(self, record: Mapping[str, Any]) -> None:
        """Map every field that the first record has.

        Raises `InputError` once, naming all that is missing.
        """
        names = list(map(str, record))
        where = self.where
        split = {"columns", "data"} <= set(record) and isinstance(record["data"], list)
        numbered = [v for v in record.values() if isinstance(v, Mapping) and v and all(str(k).isdigit() for k in v)]
        if split or (len(numbered) > 1 and len(numbered) == len(record)):
            raise InputError(
                f"{where}: a whole table in one object, as pandas writes it; write a rollout a line: "
                "to_json(FILE, orient='records', lines=True), or to_parquet(FILE)"
            )
        mapping = {f: n for f, n in self.explicit.items() if n != ABSENT}
        refused = {f for f, n in self.explicit.items() if n == ABSENT}
        for name, column in mapping.items():
            if not _holds(record, column):
                raise self._all_missing(record, names, mapping, {name: column})
        self.layout = self.asked or recognized(names)
        for name in FIELDS:
            if name not in mapping and name not in refused and name in names and _may_be(name, record[name]):
                mapping[name] = name
        if self.layout is not None:
            by_layout = {}
            for name, options in self.layout.columns.items():
                if name in mapping or name in refused:
                    continue
                found = next((n for n in options if _holds(record, n)), None)
                value: Any = look_up(record, found) if found is not None else None
                if name == "reward" and _filled(value) and all(x is None for x in value):  # prime-rl, without rewards
                    self.notes.append(f"{found!r} ({name}) is null at every token of the first record: not used")
                    refused.add(name)
                elif found is not None:
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
            self.notes.append(f"column {mapping.pop('log_ratio')!r} is not used: both log-probabilities are there")
        self._take_others(record, names, mapping, refused)
        ratio = "log_ratio" in mapping
        needed = [name for name in ("log_prob", "behavior_log_prob") if not ratio and name not in mapping]
        if self.layout is not None and self.layout.missing and needed:
            likely = [n for n in names if ("log" in n and n in AMBIGUOUS) or n in OTHER_NAMES["log_prob"]]
            told = "; ".join(f"{n}: {AMBIGUOUS[n]}" for n in likely if n in AMBIGUOUS)
            told = f"({told}; name the learner's with --column log_prob=NAME if it is there.) " if told else ""
            raise InputError(
                f"{where}: this is {self.layout.what}: it holds {self.layout.missing}, and a replay needs those of "
                f"both policies. {told}To write them (read at its source, not run): {self.layout.change}"
            )
        for name in ("group", "reward"):
            grouped = name == "group" and (self.group_columns or self.group_size)
            if name not in mapping and name not in refused and not grouped and self._likely(name, record):
                needed.append(name)
        known = mapping.get("log_ratio") or mapping.get("log_prob")
        if known is not None and "length" not in mapping and not needed:
            value = look_up(record, known)
            other = value if ratio else look_up(record, mapping["behavior_log_prob"])
            for name, text in (("log_ratio" if ratio else "log_prob", value), ("behavior_log_prob", other)):
                if not isinstance(text, str | bytes):
                    continue
                what, remedy = "text", "write it as a number"
                if isinstance(text, bytes):
                    what, remedy = "bytes", "write a list: numpy.frombuffer(x, dtype).tolist()"
                elif text.lstrip().startswith(("[", "array(", "tensor(")):
                    what, remedy = "a printed array", "numbers may be cut off or left out: write x.tolist()"
                    with contextlib.suppress(ValueError):
                        json.loads(text)
                        what, remedy = "a list in a string", "json.loads() it where it is written"
                column = mapping[name] if mapping[name] == name else f"{mapping[name]} ({name})"
                raise InputError(f"{where}: {column}: {shown(text)} is {what}, not log-probabilities; {remedy}")
            if not any(hasattr(x, "__len__") and not isinstance(x, str) for x in (value, other)):
                needed.append("length")
        if needed:
            raise self._all_missing(record, names, mapping, dict.fromkeys(needed, ""))
        if mapping.get("log_prob", "") == mapping.get("behavior_log_prob"):
            raise InputError(
                f"{where}: {mapping['log_prob']!r} cannot be both log_prob and behavior_log_prob; name one "
                "column for each policy"
            )
        for column in (*self.group_columns, *self.by):
            if column not in ("lag", "version", "step", "task", "split") and not _holds(record, column):
                raise InputError(f"{where}: column {column!r} not found; this first record has: {', '.join(names)}")
        self._take_beside(record, mapping, refused)
        if self.group_size and "group" in names and "group" not in self.explicit:
            self.notes.append("column 'group' is not used: --group-size counts rows instead")
        self.mapping = mapping
        self._name_lookalikes(record, names, set(mapping.values()))
        self._slice_columns(record, names)
        self._name_versions(record, names)
        if self.group_size:
            named = [n for n in ("group", *_candidates("group", names)) if isinstance(record.get(n), str | int)]
            self.slice_columns |= {NAMED_GROUP: (named[0], False)} if named else {}
        if "length" not in mapping and "mask" not in mapping and self.explicit.get("length") != ABSENT:
            tokens = self.value(record, "log_prob" if "log_prob" in mapping else "log_ratio")
            many = isinstance(tokens, LISTED) and len(tokens) and isinstance(tokens[0], LISTED)
            lengths = {n: record[n] for n in (*OTHER_NAMES["length"], "response_lengths") if n in names}
            self.other_length = next(
                (n for n, x in lengths.items() if isinstance(x[0] if many and _filled(x) else x, int | float)), None
            )
        self.paths = {
            *mapping.values(),
            *({self.other_length} if self.other_length else ()),
            *self.group_columns,
            *self.by,
            *(c for c, _ in self.slice_columns.values()),
        }
        self.watched = frozenset(n for f in FIELDS if f not in refused for n in (f, *OTHER_NAMES.get(f, ()))) - {*names}
        self.used = {name for path in self.paths for name in (path, path.split(".")[0])} | self.watched
        for name in ("group", "reward"):
            if name not in mapping and not (name == "group" and (self.group_columns or self.group_size)):
                like = [n for n in names if n not in mapping.values() and any(x in n.lower() for x in LIKE[name])]
                like = [n for n in like if name == "group" or (_numeric(record[n]) and not self._each_token(record, n))]
                like += [p for p in _named(name, [*(n for n in names if "." in n), *_paths(record)]) if p not in like]
                like = [] if name in refused else like
                maybe = f" (is it {' or '.join(map(repr, like[:4]))}? then {option(name, like[0])})" if like else ""
                self.notes.append(
                    f"no {name} in the file{maybe}: the gauges of the weights are read, baselines are not"
                )
                each = [n for n in names if any(x in n.lower() for x in LIKE["reward"]) and self._each_token(record, n)]
                if name == "reward" and each and not like and name not in refused:
                    self.notes.append(
                        f"{each[0]!r} has a number a token: write their sum as the reward of each trajectory"
                    )
                if name == "reward" and "advantage" in map(plain, names):
                    self.notes.append("advantages are no rewards: a baseline has been subtracted already")
        turn = next((n for n in TURNS if n in names), None)
        of_rows = [n for n in names if OF_TRAJECTORIES.search(n.lower()) and isinstance(record[n], int | str)]
        of_rows = [n for n in of_rows if n not in (*mapping.values(), *self.group_columns)]
        if "trajectory" in (*mapping, *refused) or turn in mapping.values():
            return
        mapped_by = f"--trajectory {of_rows[0] if of_rows else 'COLUMN'}"
        if turn is not None:
            self.notes.append(
                f"column {turn!r} counts parts of a trajectory, and nothing says which rows are one: every row is "
                f"taken as a trajectory by itself; name what they share with {mapped_by}"
            )
        elif of_rows:
            self.notes.append(
                f"column {of_rows[0]!r} may say which rows are one trajectory, and is not used: every row is taken as "
                f"one by itself; if they share it, {mapped_by}"
            )

    def _likely(self, name: str, record: Mapping[str, Any]) -> list[str]:
        """Columns that may be a field; no reward is one with a number a token where nothing says what that means."""
        found = _candidates(name, list(map(str, record)))
        if name == "reward" and (self.layout is None or self.layout.reward_rule == "one"):
            return [n for n in found if not self._each_token(record, n)]
        return found

    def _each_token(self, record: Mapping[str, Any], name: str) -> bool:
        """Whether a column has a number at each token, and not one for each rollout of a batch in columns."""
        tokens: Any = next((bare(x) for n, x in record.items() if n in LOG_PROBS and isinstance(x, LISTED)), ())
        value = bare(record[name])
        if (
            not isinstance(value, LISTED)
            or len(value) != len(tokens)
            or len(tokens) < 2
            or isinstance(tokens[0], LISTED)
        ):
            return False
        return not any(isinstance(record[n], LISTED) for n in _candidates("group", list(record)))

    def _take_others(
        self, record: Mapping[str, Any], names: list[str], mapping: dict[str, str], refused: set[str]
    ) -> None:
        """Columns that would change the answer in silence: used and noted, or named where it is not clear which."""
        for name in TAKEN:
            if name in mapping or name in refused:
                continue
            there = [n for n in _candidates(name, names) if n not in mapping.values() and _may_be(name, record[n])]
            if name == "mask":
                known = ("sample_mask", *OTHER_NAMES["sample_mask"], *mapping.values())
                flags = [n for n in names if "mask" in n.lower() and isinstance(record[n], int | float)]
                for other in dict.fromkeys((*flags, *there)):
                    if _maskable(record[other]) or other in known:
                        continue
                    one = f"; if it is 0 for trajectories that were left out, --column sample_mask={other}"
                    self.notes.append(
                        f"column {other!r} is named like a mask but holds {shown(record[other])}: not used"
                        + one * (other in flags)
                    )
                there = [n for n in there if _maskable(record[n])]
            if not there:
                continue
            if name == "mask" and len(there) > 1:
                raise InputError(
                    f"{self.where}: {' and '.join(there)} could both be the mask of the policy's tokens; "
                    f"name one with --column mask={there[0]}, or none of them with --column mask={ABSENT}"
                )
            mapping[name] = there[0]
            if name in ("mask", "sample_mask"):
                self.notes.append(
                    f"{name}: column {there[0]!r} is used as such (--column {name}={ABSENT} to ignore it)"
                )
        masks = [n for n in _candidates("mask", names) if n != mapping.get("mask") and _maskable(record[n])]
        if "mask" in mapping and masks and (self.layout is None or self.layout.name == "vcposim"):
            self.notes.append(
                f"{' and '.join(map(repr, masks))} could be masks too and are not used: {mapping['mask']!r} is"
            )

    def _take_beside(self, record: Mapping[str, Any], mapping: dict[str, str], refused: set[str]) -> None:
        """Log-probabilities of other policies, for the estimators that need them; they change no other number."""
        tokens = None if "log_prob" not in mapping else bare(look_up(record, mapping["log_prob"]))
        listed = isinstance(tokens, list | np.ndarray)
        for name in BESIDE:
            asked = name in self.explicit
            if name in refused:
                continue
            if name not in mapping:
                there = [n for n in OTHER_NAMES[name] if n in record and n not in mapping.values()]
                if not there:
                    continue
                mapping[name] = there[0]
            column = mapping[name]
            value = bare(look_up(record, column))
            fits = isinstance(value, list | np.ndarray) == listed and (listed or name == "reference_log_prob")
            if tokens is None or (not asked and not (fits and (not listed or len(value) == len(tokens)))):
                del mapping[name]
                why = "the file has no log_prob" if tokens is None else f"it holds {shown(value)} beside log_prob"
                self.notes.append(f"column {column!r} ({name}) is not used: {why}")
            elif column != name and not asked:
                self.notes.append(f"{name}: column {column!r} is used as such (--column {name}={ABSENT} to ignore it)")

    @property
    def group_names(self) -> set[str]:
        """What a group may be called here."""
        named = {"group", *OTHER_NAMES["group"], *self.group_columns}
        return named | ({self.explicit["group"]} if "group" in self.explicit else set())

    def wrapping(self, record: Mapping[str, Any], above: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """The names under which a record holds rollouts, of a whole file or of one prompt: none, one, or one in one.

        Rollouts have rewards of their own; parts of one trajectory (turns) stand beside its reward. `above`: the names
        that stand around the record. Raises `InputError` where each rollout stands under a name of its own.
        """
        reaching = any("." in column for column in self.explicit.values())
        if reaching or self.asked is not None or recognized(map(str, record)) or LOG_PROBS & set(record):
            return ()
        inner = {n: v[0] if isinstance(v, list) and v else v for n, v in record.items()}
        holding = [
            n
            for n, v in inner.items()
            if isinstance(v, Mapping) and any(name in v and not isinstance(v[name], Mapping) for name in LOG_PROBS)
        ]
        rewards = {"reward", *OTHER_NAMES["reward"], self.explicit.get("reward")}
        whole = len(holding) > 2 or all(rewards & set(inner[n]) for n in holding)
        if whole and 1 < len(holding) == len(record):
            raise InputError(
                f"{self.where}: an object of {len(record)} rollouts, or lists of them, under names of their own (the "
                f"first is {holding[0]!r}); write them as a list, or one a line "
                "(pandas: to_json(FILE, orient='records', lines=True))"
            )
        around = above | set(record)
        if not holding and not above and not rewards & around:
            deeper = {n: self.wrapping(v, around) for n, v in inner.items() if isinstance(v, Mapping)}
            found = [(n, *names) for n, names in deeper.items() if names]
            return found[0] if len(found) == 1 else ()
        if len(holding) != 1 or not (rewards & set(inner[holding[0]]) or not (self.group_names | rewards) & around):
            return ()
        return (holding[0],)

    def _name_lookalikes(self, record: Mapping[str, Any], names: list[str], used: set[str]) -> None:
        """A list of 0 and 1 beside the tokens may be their mask under a name nobody knows."""
        if "mask" in self.mapping or self.explicit.get("mask") == ABSENT:
            return
        tokens = bare(self.value(record, "log_prob" if "log_prob" in self.mapping else "log_ratio"))
        if not isinstance(tokens, list | np.ndarray) or (len(tokens) and isinstance(tokens[0], list | np.ndarray)):
            return
        for name in names:
            value = bare(record[name])
            if name == "labels" and isinstance(value, list | np.ndarray) and -100 in value:
                self.notes.append(
                    "column 'labels' marks with -100 what is not the policy's and is not used; write a mask of 0 and 1 "
                    "beside the log-probabilities ([x != -100 for x in labels]), or cut these tokens"
                )
            if name == "attention_mask" and isinstance(value, list | np.ndarray) and len(value) > len(tokens):
                self.notes.append(
                    f"column 'attention_mask' of {len(value)} entries is not used: the log-probabilities are of "
                    f"{len(tokens)} tokens, padding among them? write its part over the response as response_mask"
                )
            if re.sub("_token_ids$", "_ids", name) in IDS and _filled(value) and len(value) != len(tokens):
                self.notes.append(
                    f"column {name!r} lists {len(value)} tokens beside {len(tokens)} log-probabilities: padding, or a "
                    "token that one of them lacks? write both of the same tokens, or the mask of those that count"
                )
            if name in used or not _filled(value) or len(value) != len(tokens):
                continue
            rewards = any(word in name.lower() for word in LIKE["reward"])
            if not rewards and all(isinstance(x, int | float | np.generic) and x in (0, 1) for x in value):
                mine = f"if it is the mask of the policy's own tokens, --column mask={name}"
                padding = "if 1 marks padding, write it as mask with 0 and 1 exchanged"
                self.notes.append(
                    f"column {name!r} holds 0 and 1 a token and is not used; {padding if 'pad' in name else mine}"
                )

    def _name_versions(self, record: Mapping[str, Any], names: list[str]) -> None:
        """Versions and lags under names that nobody knows, or inside objects: they are not used, which is said."""
        settled = "lag" in self.mapping or {"version", "learner_version"} <= {*self.mapping}
        fields = [f for f in ("version", "learner_version", "lag") if f not in self.mapping and f not in self.explicit]
        used = {*self.mapping.values(), *self.group_columns, *self.by, *(c for c, _ in self.slice_columns.values())}
        found = []
        for path in () if settled else (*names, *(p for p in _paths(record) if "*" not in p)):
            own, value = path.split(".")[-1], look_up(record, path)
            field = next((f for f in fields if own in (f, *OTHER_NAMES[f])), None)
            if field is None and fields and OF_VERSIONS.search(own.lower()):
                field = fields[-1] if OF_LAGS.search(own.lower()) else fields[0]
            counts = isinstance(value, int | float | str) and not isinstance(value, bool)
            if field is not None and path not in used and counts:
                found.append((path, field))
        if found:
            several = ", ".join(repr(path) for path, _ in found[:4])
            path, field = found[0]
            self.notes.append(
                f"{several} may tell versions or lags, and {'are' if len(found) > 1 else 'is'} not used: name the "
                f"sampler's version, the learner's or their lag, as in {option(field, path)}"
            )

    def _slice_columns(self, record: Mapping[str, Any], names: list[str]) -> None:
        """Slices that may be asked for, and those that the file offers by itself."""
        for name in OF_THE_RUN:
            if name in self.mapping:
                self.slice_columns[name] = (self.mapping[name], True)
        for last in LAST_VERSIONS:
            if last in names and "version" in self.mapping:
                self.slice_columns["last_version"] = (last, True)
        split = next((n for n in SPLITS if n in names and n not in self.mapping.values()), None)
        if split is not None:
            self.slice_columns["split"] = (split, False)
        task = next((n for n in TASKS if n in names), None)
        if task is not None:
            self.slice_columns["task"] = (task, False)
        tokens = {self.mapping[name]: name for name in LISTS if name in self.mapping and name != "group"}
        for column in self.by:
            if column in tokens and isinstance(bare(look_up(record, column)), list | np.ndarray):
                raise InputError(
                    f"--by: {column!r} holds {tokens[column]} of each token; name a column with one value a trajectory"
                )
            if column in ("lag", "version", "step", "task", "split"):
                continue
            self.slice_columns[column] = (column, False)

    def _all_missing(
        self, record: Mapping[str, Any], names: list[str], mapping: dict[str, str], needed: dict[str, str]
    ) -> InputError:
        """One message for all that is missing, with the options that would mend it, and why a name is not guessed."""
        where = self.where
        taken = set(mapping.values()) - set(needed.values())

        def offered(name: str) -> bool:
            return any(option.startswith(f"--column {name}=") for option in options)

        told: list[str] = []
        options: list[str] = []
        asked = {n: c for n, c in needed.items() if c}
        plural = "s" if len(needed) > 1 else ""
        quoted = ", ".join(repr(c or n) for n, c in needed.items())
        nested = _paths(record)
        if asked:
            near = [
                (n, next(iter(difflib.get_close_matches(c, [x for x in names if x not in taken], 1, 0.6)), None))
                for n, c in asked.items()
            ]
            for n, close in near:
                close = close or next((x for x in _candidates(n, names) if x not in taken), None)
                if close:
                    options.append(f"--column {n}={close}")
        else:
            for name in needed:
                sure = [n for n in self._likely(name, record) if n not in taken]
                sure = [n for n in sure if name == "group" or not isinstance(record[n], Mapping)]
                dotted = [n for n in names if "." in n]  # as pandas' json_normalize names what was nested
                sure = sure or [p for p in _named(name, [*dotted, *nested]) if p not in taken]
                if sure:
                    options.append(f"--column {name}={sure[0]}")
                    taken.add(sure[0])
                if len(sure) > 1 and name in ("log_prob", "behavior_log_prob"):
                    told.append(f"{', '.join(sure[1:])}: may be meant instead of {sure[0]}")
            # an ambiguous log-probability is what is left over, once the other policy's is known
            unsure = [n for n in names if n in AMBIGUOUS and n not in taken and n not in ("uid", "rewards", "index")]
            for name in ("log_prob", "behavior_log_prob"):
                if name in needed and not offered(name):
                    other = "behavior_log_prob" if name == "log_prob" else "log_prob"
                    settled = other in mapping or offered(other)
                    if settled and len([n for n in unsure if not n.startswith("ref_")]) == 1:
                        left = next(n for n in unsure if not n.startswith("ref_"))
                        inside = [p for p in nested if p.startswith(f"{left}.") and "log" in p.split(".")[-1]]
                        options.append(f"--column {name}={inside[0] if inside else left}")
            told += [f"{n}: {AMBIGUOUS[n]}" for n in unsure]
            deeper = [p for p in _log_paths(record) if not any(o.endswith(f"={p}") for o in options)]
            open_ = [n for n in ("log_prob", "behavior_log_prob") if n in needed and not offered(n)]
            if len(deeper) == len(open_) == 1:
                options.append(f"--column {open_[0]}={deeper[0]}")
            elif deeper and open_:
                told.append(f"inside objects: {', '.join(deeper[:4])}")
            for name in ("uid", "rewards", "index"):
                if any(option.endswith(f"={name}") for option in options):
                    told.append(f"{name}: {AMBIGUOUS[name]}")
            if "log_prob" in needed and "log_ratio" not in mapping:
                ratio = _candidates("log_ratio", names)
                if ratio:
                    options = [o for o in options if "log_prob" not in o] + [f"--column log_ratio={ratio[0]}"]
        if not asked and is_log(record):
            return InputError(f"{where}: these are metrics, not rollouts; read their gauges with --metrics")
        numbers = [x for x in record.values() if not isinstance(x, str | bool | type(None))]
        if not options and not told and all(isinstance(x, int | float) for x in numbers) and "/" in "".join(names):
            return InputError(
                f"{where}: numbers named {', '.join(names[:4])} are metrics, not rollouts, and none is a gauge that is "
                "known (vcposim.replay.metrics.KEYS has those of verl, TRL and prime-rl); dump rollouts"
            )
        text = f"{where}: column{plural} {quoted} not found"
        if list(needed) == ["length"]:
            text += ": log-probabilities are sums here, and a sum needs the number of tokens it is over"
        if options:
            first = options[0].partition("=")[2]
            quoted_options = " ".join(option(*o.removeprefix("--column ").split("=", 1)) for o in options)
            text += f"; did you mean {first!r}?" if len(options) == 1 and len(needed) == 1 else ""
            text += f" use {quoted_options}" if text.endswith("?") else f"; use {quoted_options}"
        rest = [n for n in needed if not offered(n)]
        if rest:
            named = " ".join(f"--column {n}=NAME" for n in rest)
            text += f"; name {'it' if len(rest) == 1 else 'them'} with {named}, the file has: {', '.join(names)}"
        return InputError(text + (f" ({'; '.join(told)})" if told else ""))


def _candidates(name: str, names: list[str]) -> list[str]:
    """Columns that may be a field: by a name that a framework gives it, then by one that is spelled like it."""
    known = [n for n in OTHER_NAMES[name] if n in names]
    alike = {plain(n) for n in (name, *OTHER_NAMES[name])}
    return known + [n for n in names if n not in (*known, *AMBIGUOUS, name) and plain(n) in alike]


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, list) and bool(value) and _numeric(value[0]))


def _log_paths(record: Mapping[str, Any]) -> list[str]:
    """Paths to lists that look like log-probabilities of tokens: numbers, or tuples that begin with one (SGLang)."""
    found = []
    for path in _paths(record):
        try:
            value = look_up(record, path)
        except KeyError:  # the first of several objects has it, another has not
            continue
        first = value[0] if isinstance(value, list) and value else None
        several = isinstance(first, list) and bool(first) and isinstance(first[0], float)
        if "logp" in plain(path) and (isinstance(first, float) or several):
            found.append(f"{path}.*.0" if several else path)
    return found


def _named(name: str, paths: Iterable[str]) -> list[str]:
    """Those of some paths that end in a name of a field."""
    return [path for path in paths if path.split(".")[-1] in (name, *OTHER_NAMES[name])]


def _paths(record: Mapping[str, Any], depth: int = 3) -> list[str]:
    """Paths to what lies inside objects and lists of objects, as `look_up` takes them."""
    found: list[str] = []
    for name, value in record.items():
        several = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
        inside = value[0] if several else value
        if isinstance(inside, Mapping) and not any(str(key).isdigit() for key in inside):
            here = f"{name}.*" if several else str(name)
            found += [f"{here}.{key}" for key in inside]
            found += [f"{here}.{path}" for path in _paths(inside, depth - 1)] if depth > 1 else []
    return found


def _holds(record: Mapping[str, Any], path: str) -> bool:
    try:
        look_up(record, path)
    except KeyError:
        return False
    return True


def bare(value: Any) -> Any:
    """Without the batch axis of one that NeMo-RL writes around everything."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list | np.ndarray):
        return value[0]
    return value


def _may_be(name: str, value: Any) -> bool:
    """Whether a column can be a field by what it holds: objects under `steps` or `trajectory` are no count."""
    while isinstance(value, list) and value:
        value = value[0]
    return name not in (*OF_THE_RUN, "trajectory") or not isinstance(value, Mapping)


def _filled(value: Any) -> bool:
    return isinstance(value, LISTED) and len(value) > 0


def _maskable(value: Any) -> bool:
    return value is None or isinstance(value, list | np.ndarray)


def shown(value: Any) -> str:
    """A value in an error: JSON, cut short."""
    if isinstance(value, str) and " " in value:
        text = value
    else:
        text = json.dumps(value if not isinstance(value, np.ndarray) else value.tolist(), default=str)
    return one_line(text if len(text) <= 60 else text[:57] + "...")
