"""Whose row is it: the map from rows of an activation to trajectories.

A layer sees its input as (row, time, feature); a weight gradient sums over row and time together. Score norms need
that sum *per trajectory*, so every array that reaches the tape is flattened to (N, feature) and a `Layout` says
which of the N rows belong to which trajectory: equal blocks for a padded batch, runs of equal segment ids for a
packed one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vcposim.errors import InputError

_WORTH_A_COPY = 1 / 8
_Made = TypeVar("_Made")


WHOLE_LOOP = "use ScoreTape(model, method='loop')"
"""what helps with any model"""


def _whole_loop(name: str) -> str:
    return WHOLE_LOOP


@dataclass(frozen=True)
class Layout:
    """Trajectories of a padded (`owner` None) or packed batch; `run` are packed token ranges [start, stop)."""

    n: int
    lead: tuple[int, ...]
    run: tuple[tuple[int, int], ...] = ()
    owner: Tensor | None = None
    given: tuple[int, ...] = ()
    """(row, time) of the model's input, where it is longer than log_prob"""
    advise: Callable[[str], str] = _whole_loop
    """what to do about a module of this name"""
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Any, make: Callable[[], _Made]) -> _Made:
        """What `make` gives, made at the first call with this key: layers by the dozen ask for the same."""
        found: _Made | None = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    @classmethod
    def of(
        cls,
        log_prob: Tensor,
        segment: Tensor | None,
        given: tuple[int, ...] = (),
        advise: Callable[[str], str] = _whole_loop,
    ) -> "Layout":
        """Layout of `log_prob` (row, time); `segment` (row, time) holds ids 0..n-1, each one run, -1 padding.

        Raises `InputError` for segments of another shape or type, or of nothing but padding.
        """
        if segment is None:
            given = given if given[:1] == log_prob.shape[:1] else ()
            return cls(log_prob.shape[0], tuple(log_prob.shape), given=given, advise=advise)
        if segment.shape != log_prob.shape:
            raise InputError(
                f"segment: shape {tuple(segment.shape)} differs from log_prob's {tuple(log_prob.shape)}; one id a token"
            )
        if segment.is_floating_point() or segment.is_complex():
            raise InputError(f"segment: holds numbers of {segment.dtype}; give ids as integers, say segment.long()")
        segment = segment.long()
        run = _runs(segment)
        if not run:
            raise InputError("segment: -1 everywhere, so there is no trajectory; leave such a batch out")
        owner = torch.where(segment < 0, len(run), segment).flatten()
        return cls(len(run), tuple(log_prob.shape), run, owner, advise=advise)

    def flatten(self, name: str, x: Tensor) -> Tensor:
        """Rows of features: x (..., feature) -> (N, feature); refuses what does not tell trajectories apart."""
        if not self.tells(x):
            raise self.mixed(name, x)
        return flat(x)

    def mixed(self, name: str, x: Tensor) -> InputError:
        """What to say of a module whose array `x` (...) has no rows for each trajectory."""
        rows, steps = self.lead
        if self.owner is not None and x.dim() >= 2 and len(x) == rows and x.shape[1] == steps + 1:
            return InputError(
                f"{name}: sees {x.shape[1]} tokens a row, and segment has {steps}; give log_prob, mask and segment as "
                "long as the model's input, with a column for its first token that the mask leaves out"
            )
        expected = f"{self.lead}" if self.owner is not None else f"({self.n}, time)"
        return InputError(
            f"{name}: sees shape {tuple(x.shape)}, not {expected} and features, so trajectories are mixed; "
            f"pass one row per trajectory, or {self.advise(name)}"
        )

    def tells(self, x: Tensor) -> bool:
        """Whether `x` (...) is (row, time, ...), or has row, time and perhaps heads in one axis; anything for one."""
        dims, alone = x.dim(), self.owner is None
        if self.n == 1 and alone:
            return dims >= 1
        if dims > 2:
            return x.shape[0] == self.n if alone else x.shape[:2] == self.lead
        tokens = (rows * steps for rows, steps in (self.lead, self.given or self.lead))
        return dims == 2 and (any(x.shape[0] % count == 0 for count in tokens) or (alone and x.shape[0] == self.n))

    def part(self, x: Tensor, i: int) -> Tensor:
        """Trajectory i's rows of an array of a padded batch, the whole of one without such: (...) -> (*part)."""
        if self.owner is not None or x.dim() == 0 or x.shape[0] % self.n:
            return x
        rows = x.shape[0] // self.n
        return x[i * rows : (i + 1) * rows]

    def over(self, name: str, value: Tensor, x: Tensor) -> Tensor:
        """value (n,) spread over the rows of x, broadcasting against it; padding of a packed batch gets 0."""
        self.flatten(name, x if x.dim() >= 2 else x.unsqueeze(-1))
        lead = x.shape[:2] if self.owner is not None and x.shape[:2] == self.lead else x.shape[:1]
        rows = lead.numel()
        return self.per_row(value.to(x.dtype), rows).view((*lead, *[1] * (x.dim() - len(lead))))

    def kept(self, rows: int, keep: Tensor) -> "Layout":
        """The layout of x[keep], x of `rows` rows, `keep` (k,) ascending: a trajectory's rows stay side by side."""
        bounds = torch.tensor(self.bounds(rows), device=keep.device)
        run = tuple((start, stop) for start, stop in torch.searchsorted(keep, bounds).tolist())
        each = len(keep) // self.n
        if run == tuple((i * each, (i + 1) * each) for i in range(self.n)) and run[-1][1] == len(keep):
            return Layout(self.n, (self.n, each), advise=self.advise)
        owner = self.per_row(torch.arange(1, self.n + 1, device=keep.device), rows).squeeze(1)[keep]
        owner = torch.where(owner == 0, self.n, owner - 1)
        return Layout(self.n, (1, len(keep)), run, owner, advise=self.advise)

    def bounds(self, rows: int) -> list[tuple[int, int]]:
        """Range of rows of each trajectory; heads inside a token (query norms) multiply the rows."""

        def make() -> list[tuple[int, int]]:
            if self.owner is None:
                steps = rows // self.n
                return [(i * steps, (i + 1) * steps) for i in range(self.n)]
            each = rows // self.owner.numel()
            return [(start * each, stop * each) for start, stop in self.run]

        return self.once(("bounds", rows), make)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Views of the rows of each trajectory, n of (steps, *row): `x` (N, *row)."""
        if self.owner is None:
            return x.unflatten(0, (self.n, -1)).unbind(0)
        return [x[start:stop] for start, stop in self.bounds(x.shape[0])]

    def per_row(self, value: Tensor, rows: int) -> Tensor:
        """value (n,) spread over the rows (N, 1); padding of a packed batch gets 0."""
        if self.owner is None:
            return value.repeat_interleave(rows // self.n).unsqueeze(1)
        padded = torch.cat([value, value.new_zeros(1)])[self.owner]
        return padded.repeat_interleave(rows // self.owner.numel()).unsqueeze(1)

    def per_trajectory(self, x: Tensor) -> Tensor:
        """Sum of the rows (N, d) of each trajectory: (n, d)."""
        if self.owner is None:
            return x.view(self.n, -1, x.shape[1]).sum(1)
        total = x.new_zeros(self.n + 1, x.shape[1])
        owner = self.owner.repeat_interleave(x.shape[0] // self.owner.numel())
        return total.index_add_(0, owner, x)[: self.n]


class Operands(NamedTuple):
    """A linear map's output gradients and inputs (N, d), without rows that cannot matter, and whose rows they are."""

    grad: Tensor
    x: Tensor
    layout: Layout
    keep: Tensor | None = None
    """(N,) which of the `rows` there were; None: all"""
    rows: int = 0

    @classmethod
    def of(cls, layout: Layout, name: str, grad: Tensor, x: Tensor, look: bool = True) -> "Operands":
        """From `grad` (..., out) and `x` (..., into). Rows without output gradient (prompts, padding) go if many, and
        if one is to `look`."""
        grad, x = layout.flatten(name, grad), layout.flatten(name, x)
        keep = live_rows(grad) if look else None
        if keep is None:
            return cls(grad, x, layout, None, grad.shape[0])
        return cls(grad.index_select(0, keep), x.index_select(0, keep), layout.kept(len(grad), keep), keep, len(grad))

    @classmethod
    def kept(cls, grad: Tensor, x: Tensor, keep: Tensor) -> "Operands":
        """The rows `keep` (k,) of `grad` (N, out) and `x` (N, into), nobody asking whose they are."""
        layout = Layout(1, (1, len(keep)))
        return cls(grad.index_select(0, keep), x.index_select(0, keep), layout, keep, len(grad))

    def spread(self, each: Tensor) -> Tensor:
        """Back to all rows, zeros where there was no gradient: (N, d) -> (rows, d)."""
        return each if self.keep is None else each.new_zeros(self.rows, each.shape[1]).index_copy_(0, self.keep, each)


def flat(x: Tensor) -> Tensor:
    """Rows of features, which may be none: x (..., feature) -> (N, feature)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def live_rows(grad: Tensor) -> Tensor | None:
    """Indices of the rows of `grad` (N, d) that are not all zero; None if nearly all are live, or none.

    Always None on an accelerator, where the question would stall the queue of launches.
    """
    if grad.device.type != "cpu" or not grad.shape[1]:
        return None
    if (grad[::8, 0] == 0).sum() < _WORTH_A_COPY / 16 * len(grad):  # a look at few numbers settles most cases
        return None
    suspect = (grad[:, 0] == 0).nonzero().squeeze(1)
    if len(suspect) < _WORTH_A_COPY * len(grad):
        return None
    rows = grad.index_select(0, suspect)
    live = torch.ones(len(grad), dtype=torch.bool, device=grad.device)
    live[suspect] = (rows.amax(1) != 0) | (rows.amin(1) != 0)
    keep = live.nonzero().squeeze(1)
    return keep if 0 < len(keep) <= (1 - _WORTH_A_COPY) * len(grad) else None


def _runs(segment: Tensor) -> tuple[tuple[int, int], ...]:
    """Ranges of equal ids in the flattened (row, time) axis, ordered by id; runs never cross a row."""
    width = segment.shape[1]
    row = torch.arange(segment.shape[0], device=segment.device).unsqueeze(1).expand_as(segment)
    key = torch.stack([row.flatten(), segment.flatten()])
    (_, identity), count = torch.unique_consecutive(key, dim=1, return_counts=True)
    stop = count.cumsum(0)
    run = [(i, e - c, e) for i, e, c in zip(identity.tolist(), stop.tolist(), count.tolist(), strict=True) if i >= 0]
    run.sort()
    for expected, (identity_i, start, _) in enumerate(run):
        if identity_i != expected:
            raise InputError(
                f"segment: id {identity_i} at row {start // width} where {expected} was due; "
                "number trajectories 0..n-1 and keep each in one run of one row"
            )
    return tuple((start, stop_i) for _, start, stop_i in run)
