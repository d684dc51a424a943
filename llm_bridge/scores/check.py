"""Trust, but verify: one trajectory's norm, and the gradient along a random direction, against plain autograd.

A tape believes that row i of an activation is trajectory i, and that a module computes what it seems to. A model that
permutes rows, sorts the batch or lays time first breaks that belief without an error. So the model's own code, without
any node of the tape, is run once more on one trajectory alone (`alone`): what it says of every parameter's norm, the
tape must have said. Where a row alone gives something else than among the others (dropout, experts with a capacity),
one ordinary backward of that trajectory through the taped graph knows at least nothing of rows. The gradient of all
trajectories is compared along a random direction, so that nothing of its size is kept twice.

Which pass is compared matters as much. One row cannot be permuted, equal coefficients do not tell two rows apart, what
begins as zero has no score, and a model may do with eight rows what it does not with four: such passes leave the next
one due (`Verifier`). And what a compared pass said holds for its graph: where nodes, indices or pieces are others than
in all that were compared, the pass is due as well (`moves`).

Under FSDP2 all ranks compare in the same pass and stop together; the gradient is that of all of them, put together and
looked at a parameter at a time. There the taped graph answers for the model, which a rank cannot run alone.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llm_bridge.scores.inner import (
    Autocast,
    autocast_state,
    differentiable,
    graph_nodes,
    is_opaque,
    rehearsal,
    untraced,
    unwritten,
)
from llm_bridge.scores.layers import Recorder
from llm_bridge.scores.loop import Objective, trajectory_sums, weighted, weighted_gradient_loop
from llm_bridge.scores.norms import square_sum
from llm_bridge.scores.shards import Shards, summed, together, whole
from vcposim.errors import InputError

EVERY = 101
"""passes from one check to the next: a prime, or it would always meet the same micro-batch of an update"""
_SHAPES, _PATIENCE, _MANY = 4, 5, 16
"""numbers of rows whose first pass is compared by itself; compared passes in a row that may tell nothing; trajectories
looked at where no gradient is"""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""relative, by the coarsest type an output gradient came in"""
GRADIENT = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 0.3, torch.bfloat16: 0.3}
"""the same for what a gradient is along a direction, of its size"""
_ALIKE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""how near one row alone comes to the row among others, if it is the same; dropout is farther"""
_FLOOR, _COLUMNS = 1e-3, 8
_MOVES, _OFTEN = 256, 20
"""orders of rows that are remembered; new ones after which a line says what they cost"""
_WHY = "its rows are not trajectories one by one (permuted, sorted, time first, or mixed)"
_BENT = "or its backward is not linear (a hook that clips), so that scores do not add up: take such hooks off"


@dataclass
class Passes:
    """What is known of the passes over a model that were taken in one way."""

    count: int = 0
    """how many there were, without compared ones that told nothing"""
    rows: set[tuple[int, bool]] = field(default_factory=set)
    """rows of compared passes, and whether they were narrow: one trajectory is not permuted, one step not laid first"""
    moves: set[Hashable] = field(default_factory=set)
    """graphs of compared passes, what indices did with rows in them, and how large pieces were"""
    scored: set[str] = field(default_factory=set)
    """parameters that had a score in a compared pass: of others it told nothing, as behind what begins as zero"""
    given_up: set[str] = field(default_factory=set)
    """those that had none in a few of them"""
    moving: int = 0
    """how many passes were compared for new ones"""
    idle: int = 0
    """compared passes in a row that may not have told: equal coefficients, or a trajectory without a score"""


_PASSES: WeakKeyDictionary[nn.Module, dict[Any, Passes]] = WeakKeyDictionary()
"""by model and way: a loop over everything says nothing of what layers report"""


@dataclass(frozen=True)
class Call:
    """One call of the model inside the tape: what it was given and gave, and under which autocast."""

    args: Any
    kwargs: Any
    out: Sequence[Tensor]
    cast: Autocast

    @classmethod
    def of(cls, device: torch.device, args: Any, kwargs: Any, out: Any) -> "Call":
        """As it is now."""
        return cls(args, kwargs, differentiable(out), autocast_state(device))


def _streams(device: torch.device) -> list[Tensor]:
    """How far torch's random streams have come: (any,) each."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def alone(
    tape: Recorder, model: nn.Module, call: Call, total: Tensor, i: int, scale: float, params: Sequence[Tensor]
) -> list[Tensor | None] | None:
    """Plain gradients of scale total_i by the model's own code on row i alone; None where that cannot tell.

    total (n,): log pi of each trajectory, whose gradient with respect to the call's output is carried back through
    the second run. That cannot tell where the row alone comes out otherwise, or where total hangs on parameters in
    another way than through the call's output alone.
    """
    n, held = len(total), set(params)
    if any(getattr(node, "variable", None) in held for node in graph_nodes([total], call.out)):
        return None
    # The call's outputs that total uses itself, and not only through another of them.
    end = {y.grad_fn for y in call.out}
    steps = {step for node in graph_nodes([total], call.out) if node not in end for step in node.next_functions}
    direct = [y for y in call.out if (y.grad_fn, y.output_nr) in steps]
    if any(y.grad_fn in graph_nodes([z]) for y in direct for z in direct if y.grad_fn is not z.grad_fn):
        return None  # one is made of the other, and log pi of both
    given = pytree.tree_leaves((call.args, call.kwargs))
    if any(x.requires_grad if isinstance(x, Tensor) else is_opaque(x) for x in given):
        return None  # parameters may hang on what it was given; a cache is not what it was
    if not direct or any(y.dim() == 0 or len(y) != n for y in call.out):
        return None

    def row(x: Any) -> Any:
        return x.detach()[i : i + 1] if isinstance(x, Tensor) and x.dim() and len(x) == n else x

    of = dict(zip(map(id, direct), torch.autograd.grad(total[i] * scale, direct, retain_graph=True), strict=True))
    seed = [of.get(id(y)) for y in call.out]
    with rehearsal(tape, model, total.device), torch.autocast(total.device.type, **call.cast):
        try:
            streams = _streams(total.device)
            args, kwargs = pytree.tree_map(row, (call.args, call.kwargs))
            with unwritten("", model):
                found = differentiable(model(*args, **kwargs))
        except InputError:
            raise
        except Exception:  # whatever the model's code says of a single row
            return None
        if any(not torch.equal(a, b) for a, b in zip(streams, _streams(total.device), strict=True)):
            return None  # what it draws for one row is not what it drew for all, even if that comes to nothing yet
        pairs = []
        for y, whole, g in zip(found, call.out, seed, strict=False):
            near = y.shape == whole[:1].shape
            near = near and float((y - whole[i : i + 1]).detach().norm()) <= _ALIKE[y.dtype] * float(y.detach().norm())
            if not near:
                return None
            if g is not None:
                pairs.append((y, g[i : i + 1]))
        if len(found) != len(call.out) or not pairs:
            return None
        out, into = zip(*pairs, strict=True)
        return list(torch.autograd.grad(out, params, into, allow_unused=True))


def ordinary(out: Tensor, seed: Tensor, params: Sequence[Tensor], reentrant: bool) -> list[Tensor | None]:
    """Plain gradients of sum(seed out), same -> list; the graph survives and p.grad is left alone.

    Reentrant checkpointing admits only a backward into p.grad, which is put aside meanwhile.
    """
    if not reentrant:
        return list(torch.autograd.grad(out, params, seed, retain_graph=True, allow_unused=True))
    with grads_aside(params):
        torch.autograd.backward(out, seed, retain_graph=True)
        return [p.grad for p in params]


@contextmanager
def grads_aside(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, p.grad is None and may be written to; afterwards it is as before."""
    aside = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        yield
    finally:
        for p, kept in zip(params, aside, strict=True):
            p.grad = kept


def squares(grads: Sequence[Tensor | None]) -> list[float]:
    """||g||^2 of each, 0 where there is none."""
    return [0.0 if g is None else float(square_sum(g.float() if g.dtype == torch.float16 else g)) for g in grads]


def check_norms(
    named: Sequence[tuple[str, nn.Parameter]],
    expected: Sequence[float],
    part: Mapping[nn.Parameter, Tensor],
    i: int,
    dtype: torch.dtype,
    advise: Callable[[str], str],
) -> None:
    """Raise InputError if trajectory i's squared norm of any parameter differs from the expected one.

    Where autograd finds no number, as when half precision overflows, nothing can be said: what to do about it is the
    business of the trainer's scaler, or brake.
    """
    whole, worst, told = sum(b for b in expected if math.isfinite(b)), TOLERANCE[dtype], None
    for (name, p), b in zip(named, expected, strict=True):
        a = float(part[p][i]) if p in part else 0.0
        if not math.isfinite(b):
            continue
        off = abs(a - b) / (max(a, b) + _FLOOR * whole + 1e-300)
        if not off <= worst:
            worst, told = off, (name, a, b)
    if told is not None:
        name, a, b = told
        raise InputError(
            f"ScoreTape: {name}: squared score norm of trajectory {i} is {a:.6g}, and {b:.6g} by autograd: {_WHY}; "
            f"give the model one trajectory a row, or {advise(name.rpartition('.')[0])}"
        )


class Verifier:
    """Which passes over a model are compared, and how the model was called in them; `way`: the tape's own settings."""

    def __init__(
        self, tape: Recorder, model: nn.Module, verify: str, seed: int, shards: Shards, way: Hashable = None
    ) -> None:
        self.tape, self.model, self.verify, self.seed, self.shards = tape, model, verify, seed, shards
        self.way = way
        self.alike = False
        """whether other ranks must compare in the same passes, whatever their own batches are"""
        self.calls: list[Call] = []
        self.moves: Sequence[frozenset[Hashable]] = ()
        """what the pass under way does, each in forms of which a compared one may have had one: its graph, what indices
        do with rows in it, how large pieces are"""
        self.fresh = False
        """whether one of these was in no compared pass, on this rank or another"""

    @property
    def _known(self) -> Passes:
        return _PASSES.setdefault(self.model, {}).setdefault(self.way, Passes())

    @property
    def number(self) -> int:
        """Of the pass under way, from 1."""
        return self._known.count + 1

    def look(self, moves: Sequence[frozenset[Hashable]]) -> None:
        """Note what the pass under way does."""
        self.moves, known = moves, self._known.moves
        self.fresh = any(known.isdisjoint(each) for each in moves)

    def due(self, rows: int, narrow: bool = False) -> bool:
        """Whether the pass under way is one to be compared: so many rows, `narrow` with one trajectory or one step."""
        known = self._known
        new = not self.alike and (rows, narrow) not in known.rows and len(known.rows) < _SHAPES
        return self.verify == "always" or (self.verify == "first" and (known.count % EVERY == 0 or new or self.fresh))

    def coarsest(self, log_prob: Tensor) -> torch.dtype:
        """The type with the largest steps among those that a gradient of `log_prob` (row, time) can have come in."""
        cast = {call.cast["dtype"] for call in self.calls if call.cast["enabled"]}
        kinds = {log_prob.dtype, *cast, *(p.dtype for p in self.model.parameters() if p.requires_grad)}
        return max(kinds, key=lambda kind: torch.finfo(kind).eps)

    def passed(self, rows: int, narrow: bool, part: Mapping[str, Tensor], told: bool | None = None) -> None:
        """Count a pass; one whose comparison failed does not count, nor a few that could not have failed.

        part: every parameter's squares (n,). told: whether the comparison could have, None for a pass without.
        """
        moves, self.calls, self.moves, self.fresh = self.moves, [], (), False
        if self.verify == "never":
            return
        known = self._known
        if told is None:
            found = {name for name in known.given_up & part.keys() if bool((part[name] > 0).any())}
            known.given_up -= found
            known.rows = set() if found else known.rows  # the next pass will tell
        else:
            known.scored |= {name for name in part.keys() - known.scored if bool((part[name] > 0).any())}
            told = told and part.keys() <= known.scored | known.given_up
        known.idle = known.idle + 1 if told is False else 0
        if told is False and known.idle < _PATIENCE and not self.alike:
            return
        known.count += 1
        if told is not None:
            known.given_up |= part.keys() - known.scored
            known.rows.add((rows, narrow))
            if any(known.moves.isdisjoint(each) for each in moves):
                known.moving += 1
            known.moves = set().union(*moves, known.moves if len(known.moves) < _MOVES else ())
            if known.moving == _OFTEN:
                known.moving += 1
                warnings.warn(
                    "ScoreTape: the model's graph, or an index by which it picks rows, was another in each of many "
                    "passes, so each was compared with plain autograd, at about twice the cost; once you trust "
                    "it, give verify='never'",
                    stacklevel=4,
                )


class Verification:
    """What plain autograd says in one pass: of one trajectory before the tape's backward, of the gradient after it.

    named: the parameters whose norms are taken, as layers see them. groups: those over which ranks stop together.
    """

    def __init__(
        self,
        watch: Verifier,
        named: Sequence[tuple[str, nn.Parameter]],
        of: Objective,
        groups: Sequence[Any],
        reentrant: bool,
    ) -> None:
        self.watch, self.named, self.of, self.groups, self.reentrant = watch, named, of, groups, reentrant
        self.seed, self.advise, self.device = watch.seed + watch.number, watch.tape.advice, of.log_prob.device
        self.total = of.trajectories()
        weight = weighted(torch.ones_like(of.log_prob), of.mask, of.token_weight).abs()
        live = trajectory_sums(weight, torch.ones_like(weight), segment=of.segment) != 0
        self.live: list[int] = live.nonzero().squeeze(1).tolist()
        """trajectories that are not masked throughout"""
        self._plain: list[tuple[int, list[float]]] = []
        self._part: Mapping[nn.Parameter, Tensor] = {}
        self._dtype = torch.float64
        self._none, self._loop = torch.zeros_like(self.total), False

    def ask(self, scale: float, many: bool) -> None:
        """What plain autograd says of a random trajectory; `scale`: what to multiply by inside, against underflow.

        many: of several, where no gradient will be compared and so two rows might change places unseen. By the model
        alone if that can tell, else through the taped graph. One that is masked throughout says nothing.
        """
        total, some = self.total, self.live or [0]
        own = torch.Generator("cpu").manual_seed(self.seed)
        order = torch.randperm(len(some), generator=own, device="cpu").tolist()
        params, calls = [p for _, p in self.named], self.watch.calls
        for i in [some[k] for k in order[: _MANY if many and not self.groups else 1]]:
            found = None
            if len(calls) == 1 and not self.reentrant and not self.groups and self.of.segment is None:
                # or ranks might not do the same, and a row is not a trajectory
                found = alone(self.watch.tape, self.watch.model, calls[0], total, i, scale, params)
            if found is None:
                one = torch.zeros_like(total).index_fill_(0, torch.tensor(i, device=total.device), scale)
                with untraced(self.watch.model, self.device), torch.autocast(self.device.type, enabled=False):
                    found = ordinary(total, one, params, self.reentrant)
            self._plain.append((i, [square / scale**2 for square in squares(found)]))

    def norms(self, part: Mapping[nn.Parameter, Tensor], dtype: torch.dtype) -> None:
        """Raise InputError where a parameter's squares (n,) differ from what was said when asked.

        dtype: the coarsest in which an output gradient came.
        """
        self._part, self._dtype = part, dtype
        for i, expected in self._plain:
            together(partial(check_norms, self.named, expected, part, i, dtype, self.advise), self.groups, self.device)

    def passed(self, coefficient: Tensor | None = None) -> None:
        """Count the pass as compared; where all of `coefficient` (n,) are equal, or a score is 0, it may not tell."""
        one = len(self.total) == 1
        live = sum(self._part.values(), start=self._none) > 0
        told = bool(live.all())
        if told and coefficient is not None and not one:
            told = bool((coefficient != coefficient[0]).any())
        told = told and all(math.isfinite(square) for _, each in self._plain for square in each)
        part = {} if self._loop else {name: self._part.get(p, self._none) for name, p in self.named}
        self.watch.passed(len(self.of.log_prob), self.of.narrow(len(self.total)), part, told)

    def around(self, finish: Callable[[Tensor], None], loop: bool) -> Callable[[Tensor], None]:
        """`finish`, and after it a look at what it added to p.grad; `loop`: by a backward per trajectory."""
        shards, self._loop = self.watch.shards, loop  # which does not tell parameters apart
        held = [(name, p) for name, p in self.watch.model.named_parameters() if p.requires_grad]
        seen = shards.seen(held)
        held = [(name, shards.stored.get(p, p)) for name, p in seen]

        def compared(coefficient: Tensor) -> None:
            params = [p for _, p in seen]
            cast = torch.autocast(self.device.type, enabled=False)
            with untraced(self.watch.model, self.device), cast, torch.enable_grad():
                grads: list[Tensor | None]
                if loop:
                    grads = [
                        *weighted_gradient_loop(
                            *self.of[:2],
                            coefficient,
                            params,
                            token_weight=self.of.token_weight,
                            segment=self.of.segment,
                        )
                    ]
                else:
                    grads = ordinary(self.total, -coefficient.to(self.total.dtype), params, self.reentrant)
            projection = Projection(held, self.seed, (lambda name: _BENT) if loop else self.advise)
            finish(coefficient)
            c = coefficient.abs()
            none = torch.zeros_like(c)
            every = sum(self._part.values(), start=none)
            size = [(every if loop else self._part.get(p, none)).sqrt() for p in params]
            rounding = torch.tensor([float((c * s.to(c)).sum()) for s in size], device="cpu")
            if shards.stored:
                grads = [
                    summed(torch.zeros_like(p) if g is None else g, shards.groups())
                    for p, g in zip(params, grads, strict=True)
                ]
                rounding = summed(rounding.to(self.device), shards.groups())
            together(partial(projection.compare, grads, rounding.tolist(), self._dtype), self.groups, self.device)
            self.passed(coefficient)

        return compared


class Projection:
    """<p.grad, r> of every parameter for one random r of low rank, before and after a tape adds to it."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], seed: int, advise: Callable[[str], str]) -> None:
        self.named, self.seed, self.advise = named, seed, advise
        self.before = self._of(p.grad for _, p in named)

    def _of(self, grads: Iterable[Tensor | None]) -> list[float]:
        each = map(whole, grads)
        return [0.0 if g is None else _along(g, self.seed + k) for k, g in enumerate(each)]

    def compare(self, expected: Sequence[Tensor | None], summands: Sequence[float], dtype: torch.dtype) -> None:
        """Raise InputError if what was added differs from `expected` along r.

        summands: sum_i |c_i| ||s_i|| of each parameter. Where trajectories cancel, rounding is of this size, and not
        of the gradient's.
        """
        after, right, size = self._of(p.grad for _, p in self.named), self._of(expected), squares(expected)
        every, eps = sum(filter(math.isfinite, size)) ** 0.5, torch.finfo(dtype).eps
        for (name, _), a, start, b, square, summed_up in zip(
            self.named, after, self.before, right, size, summands, strict=True
        ):
            scale = GRADIENT[dtype] * (square**0.5 + _FLOOR * every) + eps * (abs(start) + 8 * summed_up)
            overflown = not (math.isfinite(b) and math.isfinite(scale))  # a GradScaler will find it, and skip the step
            if not overflown and not abs(a - start - b) <= scale + 1e-300:
                raise InputError(
                    f"ScoreTape: {name}: its gradient along a random direction is {a - start:.6g}, and {b:.6g} by "
                    f"autograd, so p.grad is wrong, take no step: {_WHY}; {self.advise(name.rpartition('.')[0])}"
                )


def _along(g: Tensor, seed: int) -> float:
    """<g, r> with r = A B^T of unit entries on average, so that E <g, r>^2 = ||g||^2 and g is read once."""
    if not g.numel():
        return 0.0
    flat = g.reshape(len(g), -1) if g.dim() > 1 else g.reshape(1, -1)
    own = torch.Generator(g.device).manual_seed(seed)
    wide = torch.promote_types(g.dtype, torch.float32)
    a, b = (torch.randn(size, _COLUMNS, generator=own, device=g.device, dtype=wide) for size in flat.shape)
    return float((a * (flat.to(wide) @ b)).sum()) / _COLUMNS**0.5
