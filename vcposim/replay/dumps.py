"""Reading rollouts that any framework dumped: one trajectory a record, JSONL or Parquet.

Fields, by this project's names (`COLUMNS` maps a file's own):

    group                what the responses of one prompt share: a number or a string, in any order
    reward               a number
    log_prob             log pi(tau), the learner's: a number in nats, or a list of one number a token
    behavior_log_prob    log mu(tau), the sampler's: likewise
    length               tokens of the response; counted where log-probabilities are lists
    mask                 optional, for lists: 1 for the policy's tokens, 0 for padding or the environment's
    score_sq_norm        optional, ||grad log pi(tau)||^2
    logit_proxy          optional stand-in for it, sum_t 1 - 2 pi(y_t) + sum_v pi(v)^2

Records are read one by one and kept as plain numbers, so a file of a million is no problem; token lists are summed
as they come, and leave only the sums that a token-level ESS is made of. Everything wrong is one `InputError` that names
the file, the record, the field, the value and the remedy.
"""

import array
import difflib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcposim.diagnostics import WeightSums, weight_sums
from vcposim.errors import InputError, unknown_name

NEEDED = ("group", "reward", "log_prob", "behavior_log_prob")
OPTIONAL = ("length", "mask", "score_sq_norm", "logit_proxy")
FIELDS = (*NEEDED, *OPTIONAL)

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "group": ("group_id", "prompt_id", "uid", "group_index", "prompt_index", "question_id", "prompt"),
    "reward": ("score", "rewards", "scores", "rm_score", "reward_score", "return", "acc", "correct"),
    "log_prob": (
        "trainer_logprobs",
        "trainer_log_probs",
        "target_log_prob",
        "learner_log_prob",
        "log_probs",
        "logprobs",
        "current_logprobs",
    ),
    "behavior_log_prob": (
        "rollout_log_probs",
        "rollout_logprobs",
        "inference_logprobs",
        "sampling_logprobs",
        "sampler_logprobs",
        "generation_logprobs",
        "behavior_log_probs",
        "behaviour_log_prob",
    ),
    "length": ("response_length", "response_len", "num_tokens", "n_tokens", "completion_length", "token_count"),
    "mask": ("response_mask", "loss_mask", "token_mask", "completion_mask", "action_mask"),
    "score_sq_norm": ("grad_sq_norm", "score_norm_sq", "squared_grad_norm"),
    "logit_proxy": (),
}
"""what frameworks call each field; used to suggest, never to guess"""

ROUNDING = 1e-3
"""a log-probability may exceed 0 by this much in half precision"""
LARGEST = 1e100
"""no reward, norm or log-probability is larger than this; squares must stay finite"""
TOKENS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Dump:
    """What a file held: n trajectories, groups coded 0, 1, ... in order of appearance."""

    path: str
    labels: list[Hashable]
    """the file's name of each group"""
    group: np.ndarray
    """(n,) code of the group"""
    reward: np.ndarray
    """(n,)"""
    log_ratio: np.ndarray
    """(n,) log pi(tau) - log mu(tau), nats"""
    length: np.ndarray
    """(n,) tokens"""
    score_sq_norm: np.ndarray
    """(n,) ||s_i||^2, or what stands in for it"""
    norm_source: str
    """which field `score_sq_norm` came from"""
    tokens: WeightSums | None
    """sums of token weights, where log-probabilities were lists"""


def read_dump(path: str | Path, columns: Mapping[str, str] | None = None) -> Dump:
    """All rollouts of a JSONL or Parquet file; `columns` maps field names to the file's own names.

    Raises `InputError`, one line, on a file that is missing, empty, cut off or malformed, on missing or mistyped
    fields, and on values that cannot be: see `_Reader`.
    """
    mapping = {field: field for field in FIELDS}
    for field, name in (columns or {}).items():
        if field not in mapping:
            raise unknown_name("column", field, FIELDS)
        mapping[field] = name
    source = Path(path)
    with _opened(source) as file:
        head = file.read(4)
    records = _parquet(source, mapping) if head == b"PAR1" or source.suffix == ".parquet" else _json_lines(source)
    reader = _Reader(str(path), mapping, frozenset(columns or {}))
    for place, record in records:
        reader.add(place, record)
    return reader.finish()


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """`["reward=score"]` -> `{"reward": "score"}`.

    Raises `InputError` for anything but FIELD=NAME with a known field, each once.

    >>> parse_columns(["reward=score", "group=uid"])
    {'reward': 'score', 'group': 'uid'}
    """
    out: dict[str, str] = {}
    for pair in pairs:
        field, equals, name = pair.partition("=")
        if not (equals and field and name):
            raise InputError(f"--column: {pair!r} is not FIELD=NAME; write it as in --column reward=score")
        if field not in FIELDS:
            raise unknown_name("--column", field, FIELDS)
        if field in out:
            raise InputError(f"--column: {field!r} is mapped twice ({out[field]!r}, {name!r}); keep one")
        out[field] = name
    return out


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; pass a JSONL or Parquet file of rollouts") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory; pass one JSONL or Parquet file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)}); check its name and permissions") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            yield f"line {number}", _json_object(path, number, line)


def _json_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path}: line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            raise InputError(f"{where}: the file is cut off here; dump it again, or delete this last line") from None
        raise InputError(f"{where}: not JSON ({_one_line(error)}); every line is one JSON object") from None
    if not isinstance(record, dict):
        hint = "; turn the array into lines, as with: jq -c '.[]'" if isinstance(record, list) else ""
        raise InputError(f"{where}: a JSON {_kind(record)}, not an object; every line is one rollout{hint}")
    return record


def _parquet(path: Path, mapping: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa  # imported here: JSONL needs none of it, and it takes a while
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            wanted = [name for name in dict.fromkeys(mapping.values()) if name in present]
            number = 0
            # a file that has none of the columns is read for their names, so that the error can suggest
            for batch in file.iter_batches(batch_size=8192, columns=wanted or None):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record if len(wanted) == len(present) else _Partial(record, present)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable Parquet file ({_one_line(error)}); dump it again") from None


class _Partial(dict[str, Any]):
    """A record read in part, that still knows the names of all columns."""

    def __init__(self, record: dict[str, Any], names: list[str]):
        super().__init__(record)
        self.names = names


class _Reader:
    """Checks records one by one and keeps their numbers.

    Refuses: a field missing, null, of another type than a number (or a list of them, for log-probabilities); NaN or
    infinite; a log-probability above 0; a length below 1; a negative norm; token lists of different lengths; an
    optional field that some records have and others lack.
    """

    def __init__(self, path: str, mapping: Mapping[str, str], explicit: frozenset[str]):
        self.path, self.mapping, self.explicit = path, mapping, explicit
        self.code: dict[Hashable, int] = {}
        self.group = array.array("q")
        self.number = {name: array.array("d") for name in ("reward", "log_ratio", "length", "norm")}
        self.has: dict[str, bool] = {}
        self.token_log_ratio: list[np.ndarray] = []
        self.pending = 0
        self.sums: WeightSums | None = None
        self.place = ""

    def add(self, place: str, record: dict[str, Any]) -> None:
        """Check and keep one record; `place` is its line or row, for errors."""
        self.place = place
        if not self.has:
            self._first(record)
        given = {field: self._get(record, field) for field in FIELDS if self.has[field]}
        self._same_columns(record)
        log_prob, behavior, mask = self._log_probs(given)
        self.group.append(self.code.setdefault(self._label(given["group"]), len(self.code)))
        self.number["reward"].append(self._scalar("reward", given["reward"], boolean=True))
        self.number["log_ratio"].append(self._sum("log_prob", log_prob) - self._sum("behavior_log_prob", behavior))
        self.number["length"].append(self._length(given, log_prob, mask))
        source = self.norm_source
        if source != "length":
            norm = self._scalar(source, given[source])
            if norm < 0:
                raise self._error(source, norm, "is negative; it is a squared norm, dump it again or leave it out")
            self.number["norm"].append(norm)

    def finish(self) -> Dump:
        """The dump, or the error of an empty file."""
        if not self.group:
            raise InputError(f"{self.path}: no rollouts in it (empty file); dump at least one group")
        self._flush()
        length = np.array(self.number["length"])
        return Dump(
            path=self.path,
            labels=list(self.code),
            group=np.array(self.group),
            reward=np.array(self.number["reward"]),
            log_ratio=np.array(self.number["log_ratio"]),
            length=length,
            score_sq_norm=length if self.norm_source == "length" else np.array(self.number["norm"]),
            norm_source=self.norm_source,
            tokens=self.sums,
        )

    @property
    def norm_source(self) -> str:
        """The best field there is for ||s||^2."""
        return next((name for name in ("score_sq_norm", "logit_proxy") if self.has[name]), "length")

    def _first(self, record: dict[str, Any]) -> None:
        names = getattr(record, "names", list(record))
        for field in FIELDS:
            self.has[field] = self.mapping[field] in names
            if not self.has[field] and (field in NEEDED or field in self.explicit):
                raise self._missing(field, names)
        lists = isinstance(record[self.mapping["log_prob"]], list)
        if not self.has["length"] and not lists:
            raise self._missing("length", names)

    def _missing(self, field: str, names: list[str]) -> InputError:
        name = self.mapping[field]
        near = [other for other in OTHER_NAMES[field] if other in names]
        near = near or difflib.get_close_matches(name, [n for n in names if n not in FIELDS], n=1, cutoff=0.6)
        where = f"{self.path}: {self.place}: column {name!r} not found"
        if near:
            return InputError(f"{where}; did you mean {near[0]!r}? use --column {field}={near[0]}")
        return InputError(f"{where}; name it with --column {field}=NAME, the file has: {', '.join(map(str, names))}")

    def _same_columns(self, record: dict[str, Any]) -> None:
        for field in OPTIONAL:
            if not self.has[field] and self.mapping[field] in record:
                raise InputError(
                    f"{self.path}: {self.place}: field {self.mapping[field]!r} is here but not in the first record; "
                    "write it in all of them or in none"
                )

    def _get(self, record: dict[str, Any], field: str) -> Any:
        name = self.mapping[field]
        if name not in record:
            raise InputError(f"{self.path}: {self.place}: field {name!r} is missing, earlier records have it")
        value = record[name]
        if value is None:
            raise self._error(field, value, "is no value; fill it in or drop the record")
        return value

    def _label(self, value: Any) -> Hashable:
        if not isinstance(value, int | float | str) or value != value:
            raise self._error("group", value, "cannot name a group; use a number or a string")
        return value

    def _scalar(self, field: str, value: Any, *, boolean: bool = False) -> float:
        if (isinstance(value, bool) and not boolean) or not isinstance(value, int | float):
            raise self._error(field, value, f"is a {_kind(value)}, not a number; dump it as a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._error(field, value, "is not finite; drop the record or compute it again")
        if abs(number) > LARGEST:
            raise self._error(field, value, "is out of any scale; check its unit")
        return number

    def _log_probs(self, given: dict[str, Any]) -> tuple[Any, Any, Any]:
        pair = given["log_prob"], given["behavior_log_prob"]
        mask = given.get("mask")
        lists = [value for value in pair if isinstance(value, list)]
        if not lists:
            return *pair, None
        keep = self._mask(mask, len(lists[0]))
        log_prob, behavior = (
            self._tokens(field, value, keep) if isinstance(value, list) else value
            for field, value in zip(("log_prob", "behavior_log_prob"), pair, strict=True)
        )
        if len(lists) == 2:
            self._keep_tokens(log_prob - behavior)
        return log_prob, behavior, keep

    def _mask(self, mask: Any, length: int) -> np.ndarray:
        if mask is None:
            return np.ones(length, dtype=bool)
        if not isinstance(mask, list) or len(mask) != length:
            raise self._error("mask", mask, f"does not match the {length} tokens of the log-probabilities")
        if any(flag not in (0, 1) for flag in mask):
            raise self._error("mask", mask, "holds something else than 0 and 1")
        return np.array(mask, dtype=bool)

    def _tokens(self, field: str, value: list[Any], keep: np.ndarray) -> np.ndarray:
        if len(value) != len(keep):
            raise self._error(
                field, f"{len(value)} tokens", f"does not match the {len(keep)} of the other one; dump the same tokens"
            )
        kept = [x for x, flag in zip(value, keep, strict=True) if flag]
        for x in kept:
            self._log_prob(field, x)
        return np.array(kept, dtype=np.float64)

    def _log_prob(self, field: str, value: Any) -> float:
        number = self._scalar(field, value)
        if number > ROUNDING:
            raise self._error(field, value, "is positive; the logarithm of a probability is at most 0, check its sign")
        return number

    def _sum(self, field: str, value: Any) -> float:
        return math.fsum(value) if isinstance(value, np.ndarray) else self._log_prob(field, value)

    def _length(self, given: dict[str, Any], log_prob: Any, keep: np.ndarray | None) -> float:
        counted = None if keep is None else int(keep.sum())
        stated = self._scalar("length", given["length"]) if "length" in given else counted
        if stated is None:
            raise self._error("length", None, "is missing, and there is no list of tokens to count")
        if stated < 1:
            raise self._error("length", stated, "is less than one token; drop empty responses")
        if counted == 0:
            raise self._error("mask", "all 0", "leaves no token; drop empty responses")
        if counted is not None and "mask" not in given and counted != stated:
            raise self._error("length", stated, f"is not the {counted} tokens listed; trim the padding or dump a mask")
        return float(counted if counted is not None else stated)

    def _keep_tokens(self, log_ratio: np.ndarray) -> None:
        self.token_log_ratio.append(log_ratio)
        self.pending += log_ratio.size
        if self.pending >= TOKENS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self.pending:
            sums = weight_sums(np.concatenate(self.token_log_ratio))
            self.sums = sums if self.sums is None else self.sums.merge(sums)
        self.token_log_ratio, self.pending = [], 0

    def _error(self, field: str, value: Any, remedy: str) -> InputError:
        name = self.mapping[field]
        known = name if name == field else f"{name} ({field})"
        return InputError(f"{self.path}: {self.place}: {known}: {_shown(value)} {remedy}")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and " " in value else json.dumps(value, default=str)
    return _one_line(text if len(text) <= 60 else text[:57] + "...")


def _kind(value: Any) -> str:
    names: dict[Callable[..., Any] | None, str] = {dict: "object", list: "list", str: "string", bool: "boolean"}
    return names.get(type(value), "number" if isinstance(value, int | float) else "null")


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
