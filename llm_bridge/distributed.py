"""Ranks that share a batch: gather a few numbers, merge, and everyone knows the same thing.

**What a rank contributes.** All functions here act over the *data-parallel* process group, the group in which every
trajectory is held by exactly one rank.

- Tensor, pipeline, context or expert parallelism: ranks that hold the same trajectories belong to *different*
  data-parallel groups (with a `DeviceMesh`: `mesh["dp"].get_group()`). Each of them computes the same numbers from
  the same inputs. Passing the world instead counts trajectories once per copy: the ESS *fraction* survives that,
  leave-one-out baselines, counts and gradients do not.
- A rank without trajectories (an empty shard, a stage that sees no log-probabilities) takes part with zero rows, or
  with rows marked absent. It is neutral: it must not read ESS 0, and it must not be left out of the collective, which
  would hang.
- A context-parallel rank holds some *tokens* of a trajectory: sum its token log-ratios over that group first.

**How.** Parts are gathered and merged in rank order on every rank, so all ranks hold bit-equal results, and a NaN
anywhere is a NaN everywhere (what a MAX reduction does with NaN depends on the backend). The payload is a few
numbers a group.

**Gradients.** DDP and FSDP2 *average* over ranks. Coefficients here already carry the global measure, so multiply
the local surrogate by `world_size()`; the average is then the sum. After `ScoreTape.backward`, which fills p.grad
without DDP's hooks, call `sum_gradients`; under FSDP2 `ScoreTape.backward` has put the sum over ranks, this rank's
shard of it, into p.grad itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm_bridge.groups import Groups
from llm_bridge.moments import GroupSums, part_sums, split_coefficient, split_measure
from vcposim.batch import Batch, ScoreNorms, sample_measure
from vcposim.errors import InputError
from vcposim.estimators import Estimator

ProcessGroup = Any
"""a `torch.distributed` process group, or None for the default one (or for a single process)"""


class Additive(Protocol):
    """A NamedTuple of tensors with an associative `merge`."""

    def merge(self, other: Self) -> Any:
        """The sums of both parts; associative and commutative up to rounding."""


AnySums = TypeVar("AnySums", bound=Additive)


def world_size(process_group: ProcessGroup = None) -> int:
    """Ranks in the group; 1 where `torch.distributed` is not in use.

    Raises `InputError` if this rank is not one of them: it would go on with uninitialized numbers.
    """
    size = dist.get_world_size(process_group) if _active() else 1
    if size < 1:
        raise InputError(f"process_group: rank {dist.get_rank()} is not in it; pass its own data-parallel group")
    return size


def rank(process_group: ProcessGroup = None) -> int:
    """This process's rank in the group; 0 where `torch.distributed` is not in use."""
    return dist.get_rank(process_group) if _active() else 0


def gathered(x: Tensor, process_group: ProcessGroup = None) -> Tensor:
    """x of every rank, in rank order: (...) -> (ranks, ...); shapes must agree."""
    if world_size(process_group) == 1:
        return x[None]
    out = [torch.empty_like(x) for _ in range(world_size(process_group))]
    dist.all_gather(out, x.contiguous(), group=process_group)
    return torch.stack(out)


def gathered_rows(x: Tensor, process_group: ProcessGroup = None) -> Tensor:
    """Rows of every rank, in rank order; ranks may hold different numbers of rows, also none: (n, ...) -> (sum n, ...).

    Token axes may differ in length too; they are padded with zeros at the end.
    """
    if world_size(process_group) == 1:
        return x
    shapes = gathered(torch.tensor(x.shape, device=x.device), process_group)
    room = x.new_zeros(tuple(shapes.amax(0).tolist()))
    room[tuple(slice(size) for size in x.shape)] = x
    every = gathered(room, process_group)
    return torch.cat([part[: int(shape[0])] for part, shape in zip(every, shapes, strict=True)])


def merged(sums: AnySums, process_group: ProcessGroup = None) -> AnySums:
    """Every rank's sums in one (`WeightSums`, `GroupSums`), bit-equal on all ranks."""
    return reduce(lambda a, b: a.merge(b), _parts(sums, process_group))


def merged_others(sums: AnySums, process_group: ProcessGroup = None) -> AnySums | None:
    """The sums of all ranks but this one, None if there is no other."""
    parts = _parts(sums, process_group)
    del parts[rank(process_group)]
    return reduce(lambda a, b: a.merge(b), parts) if parts else None


def split_group_coefficient(
    estimator: Estimator, batch: Batch, group: Tensor, groups: int, process_group: ProcessGroup = None
) -> Tensor:
    """c_i measure_i of this rank's rows, prompt groups split over ranks in any way, ready for `surrogate`: (n,).

    `group` is the index of each row's prompt among the `groups` of the whole batch. Exchanges six numbers a group.

    Raises `InputError` for estimators that are no function of such sums; `gather_batch` serves these.
    """
    mine = part_sums(estimator, batch, group, groups)
    total, rest = merged(mine, process_group), merged_others(mine, process_group)
    c = split_coefficient(estimator, batch, group, total, nothing_like(mine) if rest is None else rest)
    measure = split_measure(batch, group, total)
    return c * (measure if c.ndim == 1 else measure[:, None])


def nothing_like(sums: GroupSums) -> GroupSums:
    """The neutral element: the sums of no trajectories."""
    zero = torch.zeros_like(sums.weight)
    return GroupSums(zero - torch.inf, zero, zero, zero, zero, zero)


@dataclass(frozen=True)
class Gathered:
    """The batch of all ranks, on group axes (G, N), and the way back to this rank's rows."""

    batch: Batch
    groups: Groups
    rows: slice

    def local(self, x: Tensor) -> Tensor:
        """This rank's rows of an array on the group axes: (G, N, *rest) -> (rows, *rest)."""
        return self.groups.flat(x)[self.rows]


def gather_batch(batch: Batch, group: Tensor, process_group: ProcessGroup = None) -> Gathered:
    """Every rank's rows in one batch on every rank: any estimator of the kernel then runs as on a single process.

    `batch` has flat rows with trajectory norms or none, `group` (n,) their prompts' ids. Exchanges a few numbers a
    trajectory (with token ratios: a few a token; `trajectory_batch(level="sequence")` keeps it small).

    Raises `InputError` for dense scores, which are as large as gradients, or a batch that already has group axes.
    """
    if batch.reward.ndim != 1:
        raise InputError(
            f"batch: rewards of shape {tuple(batch.reward.shape)}; give this rank's rows (n,) and their group"
        )
    if batch.scores is not None and not isinstance(batch.scores, ScoreNorms):
        raise InputError("scores: gather trajectory norms, not scores; pass ScoreNorms")
    every_group = gathered_rows(group, process_group)
    groups = Groups.of(every_group)

    def whole(x: Tensor) -> Tensor:
        return groups.lift(gathered_rows(x, process_group))

    count = gathered(torch.tensor(len(group), device=group.device), process_group).tolist()
    start = sum(count[: rank(process_group)])
    skip = ("measure", "unit", "scores", "population_baseline", "grouped")
    column = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in skip}
    column = {name: x if x is None else whole(x) for name, x in column.items()}
    here = (batch.given("measure") > 0).to(batch.reward.dtype)
    measure, unit = sample_measure(whole(here))
    scores = None if batch.scores is None else ScoreNorms(whole(batch.scores.score_sq_norm))
    all_ranks = Batch(**column, scores=scores, measure=measure, unit=unit, grouped=True)
    return Gathered(all_ranks, groups, slice(start, start + len(group)))


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], process_group: ProcessGroup = None) -> None:
    """p.grad <- sum of p.grad over ranks, for gradients that no wrapper reduces; a missing gradient counts as zero.

    Sharded parameters (FSDP2) are passed over: theirs is the sum already.
    """
    if world_size(process_group) == 1:
        return
    for p in parameters:
        if p.requires_grad and not isinstance(p, DTensor):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad, group=process_group)


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _parts(sums: Any, process_group: ProcessGroup) -> list[Any]:
    every = gathered(torch.stack([torch.as_tensor(x) for x in sums]), process_group)
    return [type(sums)(*part) for part in every]
