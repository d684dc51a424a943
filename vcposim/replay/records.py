"""One record -> the numbers of one trajectory, or what is wrong with it.

What a value means where it could be argued: log_prob = -inf is weight 0 (the learner never says that); an empty
response has weight 1, an empty product, and no gradient; a null mask is all tokens. Everything else that cannot be is
one error with file, place, field, value and remedy.
"""

import contextlib
import math
import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson

from vcposim.replay.checks import moments
from vcposim.replay.columns import MISSING, Columns, bare, shown
from vcposim.replay.items import LISTED, BadRecord, kind
from vcposim.replay.layouts import look_up
from vcposim.replay.names import ABSENT, LISTS, REMOVED, TRAJECTORY, option

ROUNDING = 1e-3
"""a log-probability may exceed 0 by this much in half precision"""
LARGEST = 1e100
"""no reward, norm or log-probability is larger than this; squares must stay finite"""
FLAGS = (int, float, np.generic)
"""what an entry of a mask may be"""
ALONG_A_LIST = ("version", "last_version", "learner_version", "lag")
"""slices that may have a value a token or a turn"""
MAY_BE_NOTHING = ("log_prob", "log_ratio")
"""fields of which -inf means that the learner never says this"""


class TokenLists(NamedTuple):
    """The tokens of one trajectory that count, (t,) each."""

    log_prob: np.ndarray
    behavior_log_prob: np.ndarray
    beside: dict[str, np.ndarray]


class Numbers(NamedTuple):
    """One trajectory, or one row of it."""

    label: Hashable
    """of its group"""
    reward: float
    log_ratio: float
    """NaN where there are tokens: their sums are taken together with those of other records"""
    length: float
    norm: float
    reference: float
    """log pi(tau) - log reference(tau), nats; NaN without one"""
    mixed: bool
    """whether several versions of the policy generated it"""
    marks: dict[str, Hashable]
    """slice -> its value"""
    tokens: TokenLists | None


TOLD = ("label", "reward", "log_ratio", "length", "norm", "reference", "mixed")
EACH = ("place", *TOLD, "size", "beside")


@dataclass
class Rows:
    """Records of one file after each other, as `Numbers` has them: k entries in every list of `EACH` and of `marks`.

    Without lists of tokens, `size` (how many each row has), `beside`, `learner` and `sampler` stay empty.
    """

    file: str
    place: list[str] = field(default_factory=list)
    label: list[Hashable] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    log_ratio: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    mixed: list[bool] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    beside: list[dict[str, np.ndarray]] = field(default_factory=list)
    marks: dict[str, list[Hashable]] = field(default_factory=dict)
    learner: list[np.ndarray] = field(default_factory=list)
    """the tokens of all rows after each other, in pieces that need not be those of the rows"""
    sampler: list[np.ndarray] = field(default_factory=list)

    def append(self, place: str, one: Numbers) -> None:
        """One row more."""
        self.place.append(place)
        for name in TOLD:
            getattr(self, name).append(getattr(one, name))
        for name, value in one.marks.items():
            self.marks.setdefault(name, []).append(value)
        if one.tokens is not None:
            self.size.append(one.tokens.log_prob.size)
            self.beside.append(one.tokens.beside)
            self.learner.append(one.tokens.log_prob)
            self.sampler.append(one.tokens.behavior_log_prob)

    def extend(self, other: "Rows") -> None:
        """All rows of another one."""
        for name in (*EACH, "learner", "sampler"):
            getattr(self, name).extend(getattr(other, name))
        for name, values in other.marks.items():
            self.marks.setdefault(name, []).extend(values)

    def only(self, rows: Sequence[int]) -> "Rows":
        """Some of the rows."""
        ends = np.cumsum(self.size)
        tokens = [slice(ends[i] - self.size[i], ends[i]) for i in rows]
        learner, sampler = np.concatenate(self.learner), np.concatenate(self.sampler)
        part = Rows(self.file, learner=[learner[x] for x in tokens], sampler=[sampler[x] for x in tokens])
        for name in EACH:
            getattr(part, name).extend(getattr(self, name)[i] for i in rows)
        part.marks = {name: [values[i] for i in rows] for name, values in self.marks.items()}
        return part


@lru_cache(maxsize=4096)
def doubles(count: int) -> struct.Struct:
    """Packs that many Python numbers into doubles: twice as fast as an array of them."""
    return struct.Struct(f"{count}d")


class RecordReader:
    """Reads records by the columns decided on; counts what it passes over."""

    def __init__(self, columns: Columns):
        self.columns = columns
        self.records = 0
        self.kinds: tuple[bool, ...] | None = None
        self.left_out = self.null_masks = self.masked_tokens = 0
        self.listed = 0
        """tokens of the records read, masked ones among them"""
        self.mixed = False
        self.sums = np.zeros(6)
        """(count, x, y, xx, yy, xy) of lengths and of log_prob, where that is a sum a trajectory"""

    def _bad(self, name: str, value: Any, remedy: str, reason: str) -> BadRecord:
        return self.columns.bad(name, value, remedy, reason)

    def read(self, record: Mapping[str, Any]) -> Numbers | None:
        """The numbers of one record, or None for one that the trainer left out.

        Raises `BadRecord` for whatever is wrong with it: a record is taken whole or not at all. Whether its tokens are
        log-probabilities is left to `check`, which many records share.
        """
        self.records += 1
        self.mixed = False
        mapping = self.columns.mapping
        self.columns.see_nothing_new(record)
        if "sample_mask" in mapping:
            flag = self._get(record, "sample_mask")
            flag = flag[0] if isinstance(flag, list) and len(flag) == 1 else flag
            if flag not in (0, 1):
                raise self._bad("sample_mask", flag, "is neither 0 nor 1", "sample mask")
            if bool(flag) == (mapping["sample_mask"] in REMOVED):
                self.left_out += 1
                return None
        label = self._label(record)
        reward = self._reward(record) if "reward" in mapping else math.nan
        log_ratio, length, reference, tokens = self._weights(record)
        norm = math.nan
        source = self.columns.norm_source
        if source != "length":
            norm = self._scalar(source, self._get(record, source))
            if norm < 0:
                raise self._bad(
                    source, norm, "is negative; it is a squared norm, dump it again or leave it out", "a negative norm"
                )
        marks = {name: self._mark(record, name, column) for name, (column, _) in self.columns.slice_columns.items()}
        if "trajectory" in mapping:  # null: this row is a trajectory by itself, as slime writes it
            trajectory = self._get(record, "trajectory")
            marks[TRAJECTORY] = ("row", self.records) if trajectory is None else _key(trajectory)
        return Numbers(label, reward, log_ratio, length, norm, reference, self.mixed, marks, tokens)

    def check(self, learner: np.ndarray, sampler: np.ndarray) -> float:
        """The largest magnitude there is, nats: (m,), (m,) -> number.

        Raises `BadRecord` for the first token that is no log-probability (or log-ratio).
        """
        if "log_ratio" in self.columns.mapping:
            return self._check("log_ratio", learner)
        return max(self._check("log_prob", learner), self._check("behavior_log_prob", sampler))

    def _check(self, name: str, x: np.ndarray) -> float:
        if not x.size:
            return 0.0
        low, high = x.min(), x.max()
        bound = LARGEST if name in ("log_ratio", "collision") else ROUNDING
        if not (high <= bound and (low >= -LARGEST or (low == -math.inf and name in MAY_BE_NOTHING))):
            for v in x:
                self._log_prob(name, float(v))
        return max(-float(low), float(high))

    def _get(self, record: Mapping[str, Any], name: str) -> Any:
        value = self.columns.value(record, name)
        if value is MISSING:
            raise self._bad(name, MISSING, "is missing, other records have it", "is missing")
        if value is None and name not in ("mask", "trajectory"):
            remedy = "fill it in or drop the record"
            if name == "reward" and "trajectory" in self.columns.mapping:
                remedy = (
                    "fill it in (0 in all rows of a trajectory but one, with --merge-reward sum) or drop the record"
                )
            elif name in ("group", "reward"):
                remedy += f", or read the weights alone: --column {name}={ABSENT}"
            raise self._bad(name, value, f"is no value; {remedy}", "null")
        if isinstance(value, LISTED) and len(value) == 1 and name not in LISTS:
            return value[0]  # a batch of one, as NeMo-RL writes
        return value

    def _label(self, record: Mapping[str, Any]) -> Hashable:
        if self.columns.group_size is not None:
            return (self.records - 1) // self.columns.group_size
        if self.columns.group_columns:
            parts = []
            for column in self.columns.group_columns:
                try:
                    parts.append(self._exact(column, look_up(record, column)))
                except KeyError:
                    raise self._bad(column, MISSING, "is missing, other records have it", "is missing") from None
            return parts[0] if len(parts) == 1 else tuple(parts)
        if "group" not in self.columns.mapping:
            return self.records
        value = self._get(record, "group")
        if isinstance(value, float) and value != value:
            raise self._bad("group", value, "cannot name a group; use a number, a string, or any JSON value", "NaN")
        if self.columns.layout is not None and self.columns.layout.group_suffixes and isinstance(value, str):
            return value.rsplit("_", self.columns.layout.group_suffixes)[0]
        return self._exact("group", value)

    def _exact(self, name: str, value: Any) -> Hashable:
        """A key that tells all values apart: JSON parsers round whole numbers that do not fit in 64 bits."""
        if isinstance(value, float) and abs(value) >= 2**53:
            raise self._bad(name, value, "is rounded: too large a number to name anything; write a string", "rounded")
        return _key(value)

    def _reward(self, record: Mapping[str, Any]) -> float:
        value = self._get(record, "reward")
        if isinstance(value, dict):
            keys = ", ".join(list(value)[:5])
            raise self._bad(
                "reward",
                value,
                f"is an object, not a number; name its part, as in --column reward={self.columns.mapping['reward']}."
                f"{next(iter(value), 'KEY')} (it has {keys})",
                "an object",
            )
        if isinstance(value, list | np.ndarray):
            return self._token_rewards(list(value), record)
        return self._scalar("reward", value, boolean=True)

    def _token_rewards(self, values: list[Any], record: Mapping[str, Any]) -> float:
        if self.columns.reward_rule == "one":
            raise self._bad(
                "reward",
                f"a list of {len(values)}",
                "is not one number a trajectory; name a column of numbers, one of its own as in --column reward="
                f"{self.columns.mapping['reward']}.0, or the --layout that says what it means",
                "a list",
            )
        if self.columns.reward_rule == "sum":
            return math.fsum(self._scalar("reward", x) for x in values)
        keep = self._mask(self._get(record, "mask"), len(values)) if "mask" in self.columns.mapping else None
        seen: set[Any] = {x for k, x in enumerate(values) if (keep is None or keep[k]) and x is not None}
        if not seen:
            remedy = f"is null at every token; fill it in, or read the weights alone: --column reward={ABSENT}"
            raise self._bad("reward", MISSING, remedy, "null")
        if len(seen) != 1:
            raise self._bad(
                "reward", f"{len(seen)} values", "over one trajectory, where this layout repeats a single one", "mixed"
            )
        return self._scalar("reward", seen.pop())

    def _scalar(self, name: str, value: Any, *, boolean: bool = False) -> float:
        if isinstance(value, np.generic | Decimal):
            value = float(value) if isinstance(value, Decimal) else value.item()
        if (isinstance(value, bool) and not boolean) or not isinstance(value, int | float):
            what, how = kind(value), "dump it as a number"
            parts = value if isinstance(value, dict) else {}
            inner = [k for k, x in parts.items() if isinstance(x, float)]
            if inner and all(str(k).isdigit() for k in parts):
                how = "write a list of its numbers, in the order of the tokens"
            elif inner:
                column = self.columns.mapping.get(name, name)
                how = f"name its part, as in {option(name, f'{column}.*.{inner[0]}')}"
            elif any(str(k).endswith("dtype") for k in parts):
                how = "write the array as a list of its numbers: array.tolist()"
            elif any(isinstance(x, dict) for x in parts.values()):
                how = "write the sampled token's number alone (of vLLM's: logprobs[t][token_id].logprob)"
            article = "an" if what[0] in "aeio" else "a"
            remedy = f"is {article} {what}, not a number; {how}"
            raise self._bad(name, value, remedy, f"{article} {what}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._bad(name, value, "is not finite; drop the record or compute it again", "not finite")
        if abs(number) > LARGEST:
            raise self._bad(name, value, "is out of any scale; check its unit", "out of any scale")
        return number

    def _weights(self, record: Mapping[str, Any]) -> tuple[float, float, float, TokenLists | None]:
        """log-ratio, length, log-ratio to the reference (NaN without one) and the lists of tokens, as `Numbers` has."""
        names = ("log_ratio",) if "log_ratio" in self.columns.mapping else ("log_prob", "behavior_log_prob")
        choices = record.get("choices")
        if (
            isinstance(choices, list)
            and len(choices) > 1
            and any(self.columns.mapping[n].startswith("choices.") for n in names)
        ):
            raise self._bad("choices", f"{len(choices)} answers", "in one record; write one answer a record", "choices")
        values = [bare(self._get(record, name)) for name in names]
        kinds = tuple(isinstance(v, LISTED) for v in values)
        if self.kinds is None:
            self.kinds = kinds
            if any(kinds) and not all(kinds):
                one = names[kinds.index(False)]
                self.columns.notes.append(
                    f"{one} is a sum a trajectory, the other a list: nothing can be said of single tokens"
                )
                if "mask" in self.columns.mapping:
                    raise self._bad(one, values[kinds.index(False)], "is a sum, and a sum cannot be masked", "a sum")
        elif kinds != self.kinds:
            name = next(n for n, a, b in zip(names, kinds, self.kinds, strict=True) if a != b)
            raise self._bad(
                name,
                values[names.index(name)],
                "is not what it was in the first record, a list or a sum",
                "mixed kinds",
            )
        lists = [v for v in values if isinstance(v, LISTED)]
        stated = self._scalar("length", self._get(record, "length")) if "length" in self.columns.mapping else None
        if stated is not None and stated != int(stated):
            raise self._bad("length", stated, "is no whole number of tokens", "no whole number")
        if not lists:
            if stated is None:
                raise self._bad("length", None, "is missing, and there is no list of tokens to count", "is missing")
            numbers = [self._log_prob(name, v) for name, v in zip(names, values, strict=True)]
            if stated < 1 and (stated < 0 or any(numbers)):
                raise self._bad("length", stated, "is less than one token; drop empty responses", "empty response")
            if len(numbers) > 1:
                self.sums += moments(np.array([stated]), np.array(numbers[:1]))
            total = numbers[0] - (numbers[1] if len(numbers) > 1 else 0.0)
            return total, stated, self._reference(record, numbers[0], None, None), None
        size = len(lists[0])
        for name, v in zip(names, values, strict=True):
            if isinstance(v, LISTED) and len(v) != size:
                raise self._bad(
                    name,
                    f"{len(v)} tokens",
                    f"does not match the {size} of the other one; dump the same tokens (one more: an end-of-text token "
                    "or the first of the prompt counted on one side; many more: the prompt, or another tokenizer)",
                    "lists of different lengths",
                )
        keep = None
        if "mask" in self.columns.mapping:
            given = self._get(record, "mask")
            self.null_masks += given is None
            keep = self._mask(given, size)
        tokens: list[Any] = [
            self._tokens(name, v, keep) if isinstance(v, LISTED) else self._log_prob(name, v)
            for name, v in zip(names, values, strict=True)
        ]
        counted = size if keep is None else int(keep.sum())
        self.listed += size
        self.masked_tokens += size - counted
        if stated is not None and keep is None and counted != stated:
            raise self._bad(
                "length", stated, f"is not the {counted} tokens listed; trim the padding or dump a mask", "length"
            )
        if self.columns.other_length is not None and keep is None:
            other = record.get(self.columns.other_length)
            if isinstance(other, int | float) and other != counted:
                raise self._bad(
                    self.columns.other_length,
                    other,
                    f"says how long the response is, and {counted} tokens are listed: padding, or tokens of others? "
                    "dump a mask or the response's own tokens, or ignore this column with --column length=none",
                    "another length than that of the lists",
                )
        reference = self._reference(record, tokens[0], size, keep)
        if len(lists) == 2:
            fields: list[str] = [n for n in ("anchor_log_prob", "collision") if n in self.columns.mapping]
            beside = {name: self._beside(record, name, size, keep) for name in fields}
            return math.nan, counted, reference, TokenLists(tokens[0], tokens[1], beside)
        if len(names) == 1:
            return math.nan, counted, reference, TokenLists(tokens[0], np.zeros(counted), {})
        for name, x in zip(names, tokens, strict=True):
            if isinstance(x, np.ndarray):
                self._check(name, x)
        learner, sampler = map(float, map(np.sum, tokens))
        return learner - sampler, counted, reference, None

    def _reference(self, record: Mapping[str, Any], log_prob: Any, size: int | None, keep: Any) -> float:
        """log pi(tau) - log reference(tau), nats; `log_prob` a sum or the tokens'."""
        if "reference_log_prob" not in self.columns.mapping:
            return math.nan
        total = float(np.sum(log_prob, dtype=np.float64))
        if size is None:
            return total - self._log_prob("reference_log_prob", self._get(record, "reference_log_prob"))
        return total - float(self._beside(record, "reference_log_prob", size, keep).sum())

    def _beside(self, record: Mapping[str, Any], name: str, size: int, keep: Any) -> np.ndarray:
        """A list a token of the same tokens as the log-probabilities."""
        value = bare(self._get(record, name))
        if not isinstance(value, list | np.ndarray) or len(value) != size:
            raise self._bad(
                name,
                value,
                f"does not match the {size} tokens of the log-probabilities; dump the same tokens, or ignore the "
                f"column with --column {name}={ABSENT}",
                "other tokens",
            )
        found = self._tokens(name, value, keep).astype(np.float64, copy=False)
        self._check(name, found)
        if name == "collision" and found.size and not (found.min() > 0 and found.max() <= 1 + ROUNDING):
            raise self._bad(name, float(found.min()), "is out of (0, 1]; it is a sum of squared probabilities", "range")
        return found

    def _mask(self, mask: Any, length: int) -> np.ndarray:
        if mask is None:
            return np.ones(length, dtype=bool)
        mask = bare(mask)
        if not isinstance(mask, list | np.ndarray) or len(mask) != length:
            count = f"{len(mask)} entries" if isinstance(mask, LISTED) else shown(mask)
            raise self._bad(
                "mask",
                MISSING,
                f"{count}: does not match the {length} tokens of the log-probabilities; cut a mask over prompt and "
                f"response to the tokens listed, or ignore it with --column mask={ABSENT}",
                "mask of another length",
            )
        flags: np.ndarray
        if isinstance(mask, np.ndarray):
            flags = mask
        else:
            try:
                flags = np.frombuffer(bytes(mask), np.uint8)  # whole numbers and booleans, five times as fast
            except (TypeError, ValueError):
                plain = all(isinstance(flag, int | float) and flag in (0, 1) for flag in mask)
                flags = np.array(mask, dtype=np.float64) if plain else np.array([math.nan])
        keep = flags == 1
        if not np.all(keep | (flags == 0)):
            flag, at = next((x, k + 1) for k, x in enumerate(mask) if not isinstance(x, FLAGS) or x not in (0, 1))
            flag = flag.item() if isinstance(flag, np.generic) else flag
            remedy = f"at token {at} is neither 0 nor 1; write 1 for the policy's own tokens and 0 for all others, or "
            raise self._bad("mask", flag, f"{remedy}ignore it with --column mask={ABSENT}", "mask")
        return keep

    def _tokens(self, name: str, value: Any, keep: np.ndarray | None) -> np.ndarray:
        """Numbers of the kept tokens, to be `check`ed; whatever stands at the others is never looked at."""
        if isinstance(value, np.ndarray) and value.dtype != object:
            if value.dtype.kind not in "fiu":
                raise self._bad(name, value.tolist(), "is a list of booleans, not of numbers", "booleans")
            return value if keep is None else value[keep]
        try:
            x = np.frombuffer(doubles(len(value)).pack(*value))
        except struct.error:
            kept = value if keep is None else [v for v, flag in zip(value, keep, strict=True) if flag]
            return np.array([self._one_token(name, v) for v in kept], dtype=np.float64)
        # packing takes false for 0: look at what stands where it found a 0
        zero = x == 0 if keep is None else (x == 0) & keep
        if zero.any() and bool in set(map(type, map(value.__getitem__, zero.nonzero()[0].tolist()))):
            raise self._bad(name, False, "is a boolean, not a number; dump it as a number", "a boolean")
        return x if keep is None else x[keep]

    def _one_token(self, name: str, value: Any) -> float:
        if value is None:
            raise self._bad(name, value, "is no value; fill it in, mask the token or drop the record", "null")
        return self._log_prob(name, value)

    def _log_prob(self, name: str, value: Any) -> float:
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, float) and value == -math.inf and name in MAY_BE_NOTHING:
            return value
        if isinstance(value, float) and value == -math.inf and name == "behavior_log_prob":
            raise self._bad(
                name, value, "is not finite: the sampler sampled what it gave no chance; drop the record", "not finite"
            )
        number = self._scalar(name, value)
        if number > ROUNDING and name not in ("log_ratio", "collision"):
            raise self._bad(
                name,
                value,
                "is positive; the logarithm of a probability is at most 0, check its sign"
                + (", or take the logarithm of a probability" if number <= 1 else "")
                + (
                    "; where 1 fills what is no token of the policy (TRL, open-instruct), give its mask" * (number == 1)
                ),
                "a positive log-probability",
            )
        return number

    def _mark(self, record: Mapping[str, Any], name: str, column: str) -> Any:
        try:
            value = look_up(record, column)
        except KeyError:
            if name in self.columns.mapping:
                raise self._bad(name, MISSING, "is missing, other records have it", "is missing") from None
            return None
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if name in ALONG_A_LIST and isinstance(value, list):
            # a version or lag a token or a turn: the trajectory began under its first own one, at its largest lag
            with contextlib.suppress(TypeError):  # a version that is no number or string
                value = set(value)
            versions = sorted({_key(x) for x in value if x is not None and (x != -1 or name == "lag")}, key=_order)
            self.mixed |= len(versions) > 1 and name != "learner_version"
            return versions[-1 if name == "lag" else 0] if versions else None
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        counts = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
        if name in self.columns.mapping and not (counts or value is None or isinstance(value, str)):
            remedy = f"is no count of the run; dump a number or a string, or ignore it with --column {name}={ABSENT}"
            raise self._bad(name, value, remedy, "no count")
        return _key(value)


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


def _order(value: Any) -> tuple[int, Any]:
    if isinstance(value, str):
        return (0, float(value)) if value.lstrip("-").isdigit() else (1, value)
    return (0, value)
