"""Files of rollouts -> a `Dump`: containers give records, records give numbers, and what is left is grouped.

    items        what files give: records, or blocks of rows in columns
    containers   any file -> its items, in bounded memory; Parquet and Arrow in `columnar`
    names        fields, and what frameworks call them
    layouts      what whole frameworks write
    unfolding    what a record holds: one rollout, several, or columns of them
    columns      which column of this file is which field
    records      one record -> the numbers of one trajectory, or what is wrong with it; `blocks` many at once
    checks       what tokens and weights say about how the data were made
    grouping     rows of one trajectory, prompts at several steps, lags
    storage      columns that grow with the file

Token lists are summed as they come and leave a handful of numbers a trajectory, which wait on disk (`storage`) where
there are many: memory does not grow with the file.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vcposim.diagnostics import WeightSums
from vcposim.errors import InputError, unknown_name
from vcposim.replay.blocks import block_of, read_block
from vcposim.replay.checks import Finding, TokenSums, averages, token_findings, trajectory_findings
from vcposim.replay.columns import Columns
from vcposim.replay.containers import Progress, read_items
from vcposim.replay.dumps import Dump, Tokens
from vcposim.replay.grouping import by_step, merged, of_several_versions, whole_groups, with_lag
from vcposim.replay.inputs import find_inputs
from vcposim.replay.items import CUT_OFF, BadRecord, Block, Item, Lists, Wanted
from vcposim.replay.layouts import layout
from vcposim.replay.names import FIELDS, NAMED_GROUP, OF_THE_RUN, TRAJECTORY
from vcposim.replay.records import RecordReader, Rows
from vcposim.replay.storage import Codes, NumberColumn, Stored, distinct, give_back, largest, numbered, picked
from vcposim.replay.unfolding import Unfolding

FILE = "file"
"""what `group` and `by` call the file that a record stands in, where it has no column of that name"""
TOKENS_AT_ONCE, ROWS_AT_ONCE = 1 << 16, 1 << 10
"""tokens that are looked at together, few enough to stay in the cache; rows, where they have few tokens or none"""
TOKENS_WAITING, RECORDS_WAITING, LONG = 1 << 13, 256, 1 << 10
"""of records of JSON lines that wait for each other: Python's numbers, few enough to stay in the cache too; so many
tokens that a record waits for none, as there is nothing to gain"""
KEPT_BYTES = 16 << 20
IN_RANGE = 100.0
"""magnitude of log-probabilities, nats, whose ratios and squares need no scale of their own"""
COMPARED = 1 << 20
"""trajectories among which copies are looked for at once, about"""
TOKENS_KEPT = 1_500_000
"""tokens of the first groups that are kept for the estimators that look at tokens"""


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
    growing: bool = False,
    progress: Progress | None = None,
) -> Dump:
    """All rollouts of files, folders, globs or `-`; `columns` maps field names to the file's own, or to `none`.

    `group`: columns that name a group together; without it a prompt that comes up at several steps is a group at each.
    `group_size`: the file has no group, but is ordered, that many responses a prompt. `trajectory`: the column that the
    rows of one trajectory share; `merge_reward` then says what their rewards are: the `same`, to `sum`, or the `last`.
    `by`: columns to slice by later. `skip_bad`: leave broken records out and count them, instead of refusing the file.
    `growing`: files are still being written, so that an unfinished last line is left out, and said.

    Raises `InputError`, one line, on input that is missing, empty, cut off or malformed, on missing, mistyped or
    ambiguous fields, and on values that cannot be.
    """
    check_reading(columns or {}, layout_name, group, group_size, merge_reward)
    arguments = [path] if isinstance(path, str | Path) else list(path)
    files, notes = find_inputs(arguments)
    named = str(arguments[0]) if len(arguments) == 1 else f"{arguments[0]} and {len(arguments) - 1} more"
    progress = Progress(shown=False) if progress is None else progress
    explicit = dict(columns or {}) | ({} if trajectory is None else {"trajectory": trajectory})
    resolved = Columns(explicit, layout_name, tuple(group), group_size, tuple(by))
    resolved.notes = notes
    reader = _Reader(named, resolved, len(files) > 1, skip_bad, growing)
    # glibc keeps what is freed, up to twice the largest block freed so far; without this, every array of tokens is
    # given back and its pages are faulted in anew, an eighth of all time
    np.empty(KEPT_BYTES, dtype=np.uint8)
    try:
        for one in read_items(files, reader.wanted, progress):
            reader.take_block(one) if isinstance(one, Block) else reader.take(one)
    finally:
        progress.done()
    return reader.finish(merge_reward)


def check_reading(
    columns: Mapping[str, str], layout_name: str | None, group: Sequence[str], group_size: int | None, merge_reward: str
) -> None:
    """Refuse options of `read_dump` that no file would make right, before there is one."""
    for name in columns:
        if name not in FIELDS:
            raise unknown_name("column", name, FIELDS)
    if layout_name is not None:
        layout(layout_name)
    if group_size is not None and group_size < 1:
        raise InputError(f"group_size: {group_size} is not positive; say how many responses each prompt has")
    if group and group_size is not None:
        raise InputError("group_size: given together with group; keep one")
    if merge_reward not in ("same", "sum", "last"):
        raise unknown_name("merge_reward", merge_reward, ("same", "sum", "last"))


class _Reader:
    """Takes records and keeps of each a handful of numbers; tokens become sums, those of many records at a time.

    Rows of columnar files come by the block, and records of JSON lines are put into blocks where they are short: what
    `read_block` finds plain is taken at once, any other record by itself.
    """

    def __init__(self, path: str, columns: Columns, several: bool, skip_bad: bool, growing: bool):
        self.path, self.columns, self.several, self.skip_bad, self.growing = path, columns, several, skip_bad, growing
        self.unfolding, self.record = Unfolding(columns, skip_bad), RecordReader(columns)
        self.wanted = Wanted()
        self.code = Codes()
        self.group = NumberColumn("i4")
        self.number = {name: NumberColumn() for name in ("reward", "log_ratio", "length", "norm", "reference")}
        self.slices: dict[str, tuple[Codes, NumberColumn]] = {}
        self.sums = {name: NumberColumn() for name in ("scale", "count", "total", "square")}
        self.where = Stored()
        self.waiting: list[Item] = []
        self.waiting_tokens = 0
        self.pending = Rows("")
        self.flushed = 0
        """tokens listed before those pending"""
        self.statistics = TokenSums()
        self.kept: list[Tokens] = []
        self.kept_tokens = 0
        self.skipped: dict[str, list[str]] = {}
        self.empty = self.no_weight = self.mixed = 0
        self.by_file = FILE in (*columns.group_columns, *columns.by)
        self.in_file = NumberColumn("i4")
        self.files: dict[str, int] = {}

    def take(self, item: Item) -> None:
        """One item of a container; records wait for others, to be read together where they are plain."""
        if not isinstance(item.record, dict) or not self.unfolding.plain:
            self._take_waiting()
            return self._take_one(item)
        tokens = item.record.get(self.columns.mapping.get("log_prob", self.columns.mapping.get("log_ratio", "")))
        size = len(tokens) if isinstance(tokens, list) else 0
        if self.waiting and (self.waiting[0].path != item.path or size >= LONG):
            self._take_waiting()
        if size >= LONG:
            return self._take_one(item)
        used = self.columns.used
        self.waiting.append(item._replace(record={name: x for name, x in item.record.items() if name in used}))
        self.waiting_tokens += size
        if self.waiting_tokens >= TOKENS_WAITING or len(self.waiting) >= RECORDS_WAITING:
            self._take_waiting()

    def _take_waiting(self) -> None:
        items, self.waiting, self.waiting_tokens = self.waiting, [], 0
        block = block_of(items) if items else None
        if block is not None:
            return self._take_rows(block)
        for item in items:
            self._take_one(item)

    def take_block(self, block: Block) -> None:
        """Rows of a columnar file."""
        self._take_waiting()
        self._take_rows(block)

    def _take_rows(self, block: Block) -> None:
        """Those that are plain many at once, any others one by one."""
        if self.by_file:
            block.columns.setdefault(FILE, [block.path] * block.rows)
        self._enter(block.path)
        at = 0
        while at < block.rows:
            tokens = block.columns.get(self.columns.mapping.get("log_prob", self.columns.mapping.get("log_ratio", "")))
            stop = at + ROWS_AT_ONCE - len(self.pending.place)
            if isinstance(tokens, Lists):
                room = TOKENS_AT_ONCE - (self.record.listed - self.flushed)
                stop = min(stop, at + 1 + int(np.searchsorted(tokens.ends[at + 1 :] - tokens.ends[at], room)))
            part = block.part(at, min(stop, block.rows))  # with what is pending, as much as is looked at together
            rows = read_block(self.record, part) if self.unfolding.plain else None
            if rows is None:
                for item in part.items():
                    self._take_one(item)
            else:
                self._at(block.path, rows.place[-1])
                self.pending.extend(rows)
                self._flush_if_full()
            at += part.rows

    def _take_one(self, item: Item) -> None:
        """A record, a batch of them in columns, or what is wrong in its place."""
        self._enter(item.path)
        self._at(item.path, item.place)
        try:
            if isinstance(item.record, InputError):
                raise item.record
            if self.by_file:
                item.record.setdefault(FILE, item.path)
            for k, record in enumerate(self.unfolding.rollouts(item.record)):
                if record is not item.record:
                    self._at(item.path, f"{item.place}, rollout {k + 1}")
                try:
                    numbers = self.record.read(record)
                    if numbers is not None:
                        self.pending.append(self.columns.place, numbers)
                        self._flush_if_full()
                except BadRecord as error:
                    self._skip(self.columns.strange(record) or error)
        except BadRecord as error:
            self.record.records += 1  # it counts where rows are counted, though nothing of it was read
            self._skip(error)
        self.wanted.names = self.columns.used if self.unfolding.plain else None

    def _at(self, file: str, place: str) -> None:
        self.columns.file, self.columns.place = file, place

    def _enter(self, file: str) -> None:
        if self.pending.file != file:
            self._flush()
            self.pending.file = file

    def _flush_if_full(self) -> None:
        if self.record.listed - self.flushed >= TOKENS_AT_ONCE or len(self.pending.place) >= ROWS_AT_ONCE:
            self._flush()

    def _skip(self, error: BadRecord) -> None:
        file, place = self.columns.file, self.columns.place
        self._flush()  # a record before this one may be wrong too, and comes first
        self._at(file, place)
        if not self.skip_bad and not (self.growing and error.reason == CUT_OFF):
            raise error
        self.skipped.setdefault(error.reason, []).append(f"{Path(file).name}: {place}" if self.several else place)

    def _flush(self) -> None:
        """Add the pending rows; their tokens are checked, and reduced to sums a trajectory, all at once."""
        rows, self.pending, self.flushed = self.pending, Rows(self.pending.file), self.record.listed
        if not rows.place:
            return
        if not rows.learner:
            return self._add(rows, rows.log_ratio)
        learner, sampler = _joined(rows)
        try:
            largest = self.record.check(learner, sampler)
        except BadRecord:
            ends = np.cumsum(rows.size)
            rows = rows.only([k for k, end in enumerate(ends) if self._is_sound(rows, k, int(end), learner, sampler)])
            learner, sampler = _joined(rows)
            largest = self.record.check(learner, sampler)
        return self._add(rows, self._reduced(rows, learner, sampler, largest))

    def _is_sound(self, rows: Rows, k: int, end: int, learner: np.ndarray, sampler: np.ndarray) -> bool:
        tokens = slice(end - rows.size[k], end)
        self._at(rows.file, rows.place[k])
        try:
            self.record.check(learner[tokens], sampler[tokens])
        except BadRecord as error:
            self._skip(error)
            return False
        return True

    def _reduced(self, rows: Rows, learner: np.ndarray, sampler: np.ndarray, largest: float) -> list[float]:
        """Log-ratio of each row; its sums of token weights, the checks' sums and the first groups' tokens are kept."""
        sizes = np.array(rows.size, dtype=int)
        ends = np.cumsum(sizes)
        first = len(self.number["reward"])
        log_ratio, scale = np.zeros(sizes.size), np.full(sizes.size, -math.inf)
        total, square = np.zeros(sizes.size), np.zeros(sizes.size)
        if learner.size:
            real = np.flatnonzero(sizes)
            starts = (ends - sizes)[real]
            d = learner - sampler
            log_ratio[real] = np.add.reduceat(d, starts)
            scale[real] = 0.0
            if largest >= IN_RANGE:
                scale[real] = np.maximum.reduceat(d, starts)
                d -= np.repeat(np.where(scale[real] == -math.inf, 0.0, scale[real]), sizes[real])
            w = np.exp(d, out=d)  # in place, as the square: one array more and all of them leave the cache
            total[real] = np.add.reduceat(w, starts)
            square[real] = np.add.reduceat(np.square(w, out=w), starts)
            if "log_ratio" not in self.columns.mapping:
                self.statistics.add(learner, sampler, ends[real], first + real, largest, Path(rows.file).name)
        for name, values in zip(self.sums, (scale, sizes.astype(float), total, square), strict=True):
            self.sums[name].extend(values)
        for k, (end, size, beside) in enumerate(zip(ends.tolist(), rows.size, rows.beside, strict=True)):
            if self.kept_tokens > TOKENS_KEPT:
                break
            self.kept_tokens += size
            self.kept.append(Tokens(first + k, learner[end - size : end], sampler[end - size : end], beside))
        return log_ratio.tolist()  # type: ignore[no-any-return]

    def _add(self, rows: Rows, log_ratio: Sequence[float]) -> None:
        number = self.number
        self.group.extend(self.code.codes(rows.label))
        number["log_ratio"].extend(log_ratio)
        number["reward"].extend(rows.reward)
        number["length"].extend(rows.length)
        if self.columns.norm_source != "length":
            number["norm"].extend(rows.norm)
        if "reference_log_prob" in self.columns.mapping:
            number["reference"].extend(rows.reference)
        for name, values in rows.marks.items():
            known, codes = self.slices.setdefault(name, (Codes(), NumberColumn("i4")))
            codes.extend(known.codes(values))
        self.where.extend([f"{Path(rows.file).name}: {place}" for place in rows.place] if self.several else rows.place)
        if self.several:
            self.in_file.extend([self.files.setdefault(rows.file, len(self.files))] * len(rows.place))
        self.no_weight += log_ratio.count(-math.inf)
        self.empty += rows.length.count(0)
        self.mixed += sum(rows.mixed)

    def finish(self, merge_reward: str) -> Dump:
        """The dump, or the error of an empty file."""
        self._take_waiting()
        self._flush()
        if not self.number["reward"]:
            bad = sum(map(len, self.skipped.values()))
            if self.unfolding.undecided is not None:
                raise self.unfolding.undecided
            why = f"all {bad} records are broken ({'; '.join(self.skipped)})" if bad else "empty file"
            if self.record.left_out:
                why = (
                    f"{self.record.left_out} trajectories have a sample mask of 0, and are left out as the trainer did"
                )
            raise InputError(f"{self.path}: no rollouts in it ({why}); dump at least one group")
        columns, records = self.columns, self.record.records
        twice = _two_kinds("trajectories", self.slices[TRAJECTORY][0]) if TRAJECTORY in self.slices else []
        number = {name: values.array() for name, values in self.number.items() if len(values)}
        length = number["length"]
        whole = len(self.sums["count"]) == length.size
        tokens = WeightSums(*(values.array() for values in self.sums.values())) if whole else None
        dump = Dump(
            path=self.path,
            labels=self.code.values(),
            group=self.group.array(),
            reward=number["reward"],
            log_ratio=number["log_ratio"],
            length=length,
            score_sq_norm=length if columns.norm_source == "length" else number["norm"],
            norm_source=columns.norm_source,
            tokens=tokens,
            has_group="group" in columns.mapping or bool(columns.group_columns) or columns.group_size is not None,
            has_reward="reward" in columns.mapping,
            layout=columns.layout.name if columns.layout else "",
            slices={name: (codes.array(), known.final()) for name, (known, codes) in self.slices.items()},
            skipped=self.skipped,
            kept=tuple(self.kept),
            reference_log_ratio=number.get("reference"),
            place=self.where,
        )
        notes = [*columns.notes, *twice]
        notes += self._doubtful_groups(dump)
        self.code.final()
        give_back()
        dump = by_step(dump, columns, notes)
        rows, parts = dump.group.size, dump
        dump = merged(dump, columns, merge_reward, notes)
        if columns.group_size and records % columns.group_size and dump.group.size == rows:
            raise InputError(
                f"--group-size: {records} records are no multiple of {columns.group_size}; the last prompt would be "
                "short, so the rows are not what this option takes them for"
            )
        if NAMED_GROUP in dump.slices:
            named, values = dump.slices[NAMED_GROUP]
            several = distinct(dump.group, named, key=lambda g, k: g.astype(np.int64) * len(values) + k)
            spread = int(np.sum(np.bincount(several // len(values)) > 1))
            if spread and len(values) < rows:
                column = columns.slice_columns[NAMED_GROUP][0]
                notes.append(
                    f"{spread} of {len(dump.labels)} groups of {columns.group_size} hold several values of {column!r}: "
                    f"are the rows in order? --group {column} groups by it"
                )
        dump = with_lag(dump, notes)
        self._say(dump, notes)
        told = token_findings(self.statistics, self.where)
        findings = [
            *told,
            *trajectory_findings(
                dump.log_ratio,
                dump.place,
                tokens=tokens is not None,
                told=told,
                rewarded=(dump.length, dump.reward) if dump.has_reward else None,
            ),
        ]
        findings += [
            *averages(self.record.sums),
            *_copied(dump),
            *_without_tokens(dump, record=self.record, columns=columns),
        ]
        mixed = (
            self.mixed if dump.group.size == rows else max(min(self.mixed, dump.group.size), of_several_versions(parts))
        )
        if "last_version" in dump.slices and "version" in dump.slices:
            (a, first), (b, last) = dump.slices["version"], dump.slices["last_version"]
            mixed = int(np.sum([first[i] != last[j] for i, j in zip(a, b, strict=True)]))
        if mixed:
            findings.append(
                Finding(
                    "mixed versions",
                    f"{mixed} of {dump.group.size} trajectories were generated by more than one version of the policy",
                    "their behavior policy changed on the way: behavior_log_prob must be the one recorded at each "
                    "token; a single version or lag stands for the first",
                )
            )
        slices = {name: one for name, one in dump.slices.items() if not name.startswith(" ")}
        give_back()
        return replace(dump, notes=tuple(notes), findings=tuple(findings), slices=slices, kept=whole_groups(dump))

    def _say(self, dump: Dump, notes: list[str]) -> None:
        """Everything that was counted on the way."""
        columns, record = self.columns, self.record
        if self.skipped:
            total = sum(map(len, self.skipped.values()))
            by_reason = "; ".join(f"{len(at)} {why} ({_first(at)})" for why, at in self.skipped.items())
            how = "--skip-bad" if self.skip_bad else "not finished yet"
            notes.append(f"{total} of {record.records} records are left out ({how}): {by_reason}")
        if "split" in dump.slices and len(dump.slices["split"][1]) > 1:
            values = ", ".join(map(str, dump.slices["split"][1][:4]))
            column = columns.slice_columns["split"][0]
            notes.append(
                f"column {column!r} has several values ({values}), all pooled here; --by split tells them apart"
            )
        for name in OF_THE_RUN:
            codes, known = dump.slices.get(name, (np.zeros(0, int), []))
            none = np.flatnonzero(codes == known.index(None)) if None in known else codes[:0]
            if 0 < none.size < codes.size:
                at = _first([dump.place[i] for i in none.tolist()])
                notes.append(f"{name} is null in {none.size} of {codes.size} trajectories ({at}): they stand apart")
        codes, known = dump.slices.get("lag", (np.zeros(0, int), []))
        ahead = np.flatnonzero(np.array([isinstance(x, int | float) and x < 0 for x in known], bool)[codes])
        if ahead.size:
            at = _first([dump.place[i] for i in ahead.tolist()])
            notes.append(f"lag is negative in {ahead.size} trajectories ({at}): the two versions exchanged?")
        if record.left_out:
            notes.append(f"{record.left_out} trajectories have a sample mask of 0: left out, as the trainer did")
        if self.empty:
            notes.append(f"{self.empty} responses are empty: weight 1, an empty product, and no gradient")
        if self.no_weight:
            notes.append(f"{self.no_weight} trajectories have weight 0: the learner's log-probability is -inf there")
        if record.null_masks:
            notes.append(f"{record.null_masks} masks are null: all tokens count there")
        if record.masked_tokens and dump.tokens is not None:
            share = record.masked_tokens / (record.masked_tokens + dump.tokens.count.sum())
            notes.append(f"{share:.0%} of the tokens listed are masked out ({columns.mapping['mask']})")
        if dump.has_group and len(dump.labels) == dump.group.size > 1:
            key = columns.mapping.get("group", ",".join(columns.group_columns) or "the group")
            notes.append(
                f"every one of the {dump.group.size} groups has a single response: {key!r} is no key of groups, so "
                "no baseline means anything; name what the responses of one prompt share (--group COLUMN[,COLUMN]), or "
                "--group-size N for rows in order"
            )

    def _doubtful_groups(self, dump: Dump) -> list[str]:
        """Names of groups that may be of several prompts, or two names of one."""
        if self.columns.group_size is not None:
            return []
        notes = []
        notes += _two_kinds("groups", self.code)
        odd = {name for name in dump.labels if isinstance(name, str) and _folded(name) != name}
        plain = {_folded(name) for name in odd if _folded(name) in self.code}
        once: dict[str, str] = {}
        alike = [name for name in sorted(odd | plain) if once.setdefault(_folded(name), name) != name]
        if alike:
            first = once[_folded(alike[0])]
            how = "spaces" if first.strip() == alike[0].strip() else "how Unicode spells their letters"
            notes.append(
                f"groups {first!a} and {alike[0]!a} are two here and differ in {how} alone, as do "
                f"{len(alike) - 1} more; write one where they are written"
            )
        if len(self.files) > 1 and "step" not in self.slices:
            files = len(self.files)
            pairs = distinct(dump.group, self.in_file.array(), key=lambda g, file: g.astype(np.int64) * files + file)
            spread = int(np.sum(np.bincount(pairs // files) > 1))
            if spread:
                name = ",".join(self.columns.group_columns) or self.columns.mapping.get("group", "group")
                notes.append(
                    f"{spread} of {len(dump.labels)} groups have responses in several files; if each file is a step, "
                    f"or counts its prompts from 0, these are different prompts: --group {FILE},{name} splits them"
                )
        return notes


def _joined(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of some rows after each other, as doubles."""
    none = [np.zeros(0)]
    learner = np.concatenate(rows.learner or none, dtype=np.float64)
    return learner, np.concatenate(rows.sampler or none, dtype=np.float64)


def _two_kinds(what: str, names: Codes) -> list[str]:
    twice = names.written_twice
    if not twice:
        return []
    more = f"as are {len(twice) - 1} more; write one kind"
    return [f"{what} {twice[0]} and {str(twice[0])!r} are two here, a number and a string, {more}"]


def _folded(name: str) -> str:
    """A name without spaces around it, its letters spelled in one way."""
    name = name.strip()
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _same_part(log_ratio: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Rows of one of so many parts of the trajectories, equal log-ratios in the same: (n,) -> (k,)."""
    rows = []
    for first, (x,) in numbered(log_ratio):
        mixed = x.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
        rows.append(first + np.flatnonzero(mixed % np.uint64(parts) == part))
    return np.concatenate(rows)


def _copied(dump: Dump) -> list[Finding]:
    """Trajectories that are there twice."""
    parts = -(-dump.log_ratio.size // COMPARED)
    copied = [_copies_among(dump, _same_part(dump.log_ratio, part, parts)) for part in range(parts)]
    copies = np.sort(np.concatenate(copied))
    if copies.size <= 0.02 * dump.group.size:
        return []
    at = _first([dump.place[i] for i in copies.tolist()])
    return [
        Finding(
            "copies",
            f"{copies.size} of {dump.group.size} trajectories are exact copies of earlier ones ({at})",
            "files that overlap, or ranks that write the same samples: everything counts them twice; name each once",
        )
    ]


def _without_tokens(dump: Dump, record: RecordReader, columns: Columns) -> list[Finding]:
    """Not one token that counts: nothing was measured."""
    if largest(dump.length) > 0:
        return []
    if not record.masked_tokens:
        return [Finding("no tokens", f"all {dump.group.size} responses are empty", "nothing was sampled, or written")]
    return [
        Finding(
            "no tokens",
            f"{columns.mapping['mask']} masks all {record.masked_tokens:,} tokens out",
            "a mask that is 1 where others are 0, or of something else: name the one of the policy's own tokens",
        )
    ]


def _copies_among(dump: Dump, rows: np.ndarray) -> np.ndarray:
    log_ratio = picked(dump.log_ratio, rows)
    order = np.argsort(log_ratio)
    equal = np.diff(log_ratio[order]) == 0
    at = np.sort(rows[order[np.concatenate([[False], equal]) | np.concatenate([equal, [False]])]])  # few, as a rule
    ratio, length = picked(dump.log_ratio, at), picked(dump.length, at)
    at = at[(length >= 8) & (ratio != 0) & np.isfinite(ratio)]
    columns = (dump.group, dump.reward, dump.log_ratio, dump.length)
    same = np.stack([np.nan_to_num(picked(column, at)) for column in columns], axis=1)
    return np.delete(at, np.unique(same, axis=0, return_index=True)[1])


def _first(places: list[str]) -> str:
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
