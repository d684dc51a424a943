"""`ScoreTape`: the context in which a model's backward yields score norms first and the weighted gradient after."""

import math
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from llm_bridge.scores.approximate import last_block
from llm_bridge.scores.calibration import METHODS, Workspace
from llm_bridge.scores.check import Call, Verification, Verifier, grads_aside
from llm_bridge.scores.chunks import Place
from llm_bridge.scores.fused import require_kernel
from llm_bridge.scores.inner import graph_nodes, leaf_parameters
from llm_bridge.scores.layout import WHOLE_LOOP, Layout
from llm_bridge.scores.loop import Objective, score_sq_norms_loop
from llm_bridge.scores.moves import moves
from llm_bridge.scores.norms import sum_dtype
from llm_bridge.scores.plan import Borrowed, listen_again, twins_of
from llm_bridge.scores.refusals import (
    refuse_arrays,
    refuse_coefficient,
    refuse_frozen,
    refuse_graph,
    refuse_hooks,
    refuse_modules,
    refuse_parameters,
    refused_backward,
)
from llm_bridge.scores.routes import Affine, Again, General, Kept, Line, NormsOnly, Route, marks
from llm_bridge.scores.score_pass import ScorePass, Uses
from llm_bridge.scores.shards import Shards, on_any, together
from vcposim.errors import InputError, unknown_name

_NORMS = ("exact", "sketch")
_VERIFY = ("first", "always", "never")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """What `named_modules` gives, which passes every name through a generator for each module above it."""
    found: dict[nn.Module, str] = {}
    due = [("", model)]
    while due:
        name, module = due.pop()
        if module not in found:
            found[module] = name
            parts = reversed(module._modules.items())
            due += [(f"{name}.{key}" if name else key, part) for key, part in parts if part is not None]
    return {name: module for module, name in found.items()}


def parameters_of(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """What `named_parameters` gives of a model with these modules, without another walk through it."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules.items():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in found:
                found[id(p)] = (f"{prefix}.{name}" if prefix else name, p)
    return list(found.values())


def _put_in(name: str) -> InputError:
    return InputError(
        f"{name}: put into the model, or made to require gradients, while the tape was open; open it after"
    )


def tape_for(model: nn.Module, norm: str, *, method: str = "auto", seed: int = 0) -> "ScoreTape | None":
    """The tape for a trainer's `norm`: "exact", "sketch" or "last_block"; None for a norm that takes no backward.

    Modules without an exact rule are looped over one by one; under FSDP2, which that would not survive, they are
    refused.
    """
    if norm not in ("exact", "sketch", "last_block"):
        return None
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return ScoreTape(
        model,
        norm="sketch" if norm == "sketch" else "exact",
        method=method,
        parameters=last_block(model) if norm == "last_block" else None,
        unknown="error" if sharded else "loop",
        seed=seed,
    )


class ScoreTape:
    """Exact ||grad log pi(tau_i)||^2 in one backward, then -sum_i c_i grad log pi(tau_i) without a second.

        with ScoreTape(model) as tape:
            log_prob = token_log_prob(model, batch)                  # (n, t)
            sq_norm = tape.score_sq_norms(log_prob, batch.mask)      # (n,)
            tape.backward(coefficient)                               # p.grad += -sum_i c_i grad log pi(tau_i)

    The three steps may repeat inside one `with` (one group after another); p.grad accumulates. Only `backward`
    touches p.grad. On exit the model is as it was found, also after an exception.

    norm: "exact", or "sketch" (unbiased, with the error of `columns` random signings, `seed`). method: "auto"
    (calibrated), "block", "batch", "gram", "fused" (a C kernel, on a CPU; elsewhere block), or "loop": a backward per
    trajectory, slow and right for any model. parameters: norms of these only, say `last_block(model)`; the gradient is
    still everyone's, by a second backward. unknown: "error", or "loop" to run a backward per trajectory through those
    modules alone that have no exact rule (`tape.loops` names them). loop: class names of modules to loop over as a
    whole, such as a mixture of experts that sorts its rows.
    verify: "first" compares the first pass over a model, and then every 101st, with plain autograd: one trajectory's
    norm and the gradient along a random direction, or the norms of several where no gradient follows; "always",
    "never". Compared is, too, what no compared pass has shown: another number of rows (four at most), mode, graph,
    layout or kind of gradient, other parameters trainable, an index that moves rows in another way. A pass that may not
    tell (equal coefficients, a trajectory or parameter without a score, one step) is not the one. Of a sketch or a loop
    with a gradient only that is verified. Ranks that share a model (FSDP2, `split`) verify in the same pass and stop
    together; FSDP2 with reentrant checkpoints cannot, and is not verified.

    split: parameters of which each rank of `split_group` holds a part (tensor parallelism, experts by rank), all ranks
    running the same trajectories: their squares are summed over the group, a collective. Everything else is counted
    once. The gradients of a part stay where the part is.

    The forward is the model's own, bit for bit. Whatever is compiled runs in eager mode inside the `with`. With a
    GradScaler give `scale=scaler.get_scale()` to the norms and `scaler.scale(coefficient)` to `backward`, u and v of
    `affine` scaled like it.

    Under FSDP2 give the root module after `fully_shard`: each rank tapes its own trajectories, and `backward` leaves
    in each p.grad this rank's shard of the *sum* over ranks, so all ranks must call it. The affine route holds its
    sums whole on every rank (two gradients in float32); the general one what blocks it keeps and a single weight's
    gradient at a time. A pass that is verified holds the whole gradient once.

    Raises InputError for modules it does not know, wrapped or otherwise sharded models, and calls out of order.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str = "exact",
        method: str = "auto",
        parameters: Iterable[nn.Parameter] | None = None,
        unknown: str = "error",
        loop: Iterable[str] = (),
        verify: str = "first",
        split: Iterable[nn.Parameter] = (),
        split_group: dist.ProcessGroup | None = None,
        columns: int = 16,
        seed: int = 0,
    ) -> None:
        for label, value, known in (
            ("norm", norm, _NORMS),
            ("method", method, ("auto", *METHODS, "loop")),
            ("unknown", unknown, ("error", "loop")),
            ("verify", verify, _VERIFY),
        ):
            if value not in known:
                raise unknown_name(f"ScoreTape {label}", value, known)
        require_kernel(method)
        if columns < 1:
            raise InputError(f"columns: {columns} random signings give no estimate; use at least 1")
        self.model, self.norm, self.method, self.unknown, self.columns = model, norm, method, unknown, columns
        self.verify, self.seed = verify, seed
        self.loops: dict[str, None] = {}
        self.inside = 0
        self.batch: tuple[int, ...] = ()
        self.running: ScorePass | None = None
        self._whole = frozenset([loop] if isinstance(loop, str) else loop)
        self._subset = None if parameters is None else {p for p in parameters if p.requires_grad}
        if self._subset is not None and self._subset.isdisjoint(model.parameters()):
            raise InputError(
                "parameters: none of them is a trainable parameter of the model, so no norm hangs on them; give some "
                "that are, or leave it out for all"
            )
        self._split, self._split_group = set(split), split_group
        if self._split and not (dist.is_available() and dist.is_initialized()):
            raise InputError("split: no process group is initialized; leave it out where each parameter is whole")
        # signs are drawn where they are used: to carry them over would stall an accelerator's queue of launches
        place = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self.generator, self._apart = (torch.Generator(place).manual_seed(k) for k in (seed, seed + 1))
        self._patched: list[tuple[nn.Module, Any, Any]] = []
        self._hooks: list[RemovableHandle] = []
        self._eager: Any = None
        self._borrowed: Borrowed | None = None
        self._open = False
        self._forget()

    def _forget(self) -> None:
        """What is known of forwards, and of a pass that a gradient is to follow."""
        self._shards = Shards(self.model)
        way = (self.norm, self.method == "loop", self.unknown, self._whole)
        self._watch = Verifier(self, self.model, self.verify, self.seed, self._shards, way)
        self._uses, self._known = Uses(), dict[int, nn.Parameter]()  # uses: of the graph of the pass under way
        self._called, self._rows, self._parts, self._counting = False, list[int](), 0, True
        self.running = None
        self._finish: Callable[[Tensor], None] | None = None
        self._taken: Route | None = None
        self._shape: tuple[int, ...] = ()
        self._foreign: list[nn.Parameter] = []
        """leaves of a graph with reentrant checkpoints that are none of the model's"""

    # --- context ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._open:
            raise InputError("ScoreTape: this tape is already open; use one `with` per tape")
        try:
            self._enter()
        except BaseException:  # a refusal, or a warning that is an error: the model is as it was
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _enter(self) -> None:
        modules = modules_of(self.model)
        refuse_modules(modules, self.method)
        named = parameters_of(modules)
        second_backward = self._subset is not None or "loop" in (self.unknown, self.method)
        refuse_parameters(named, self.model, second_backward)
        refuse_hooks(named)
        twins = [] if self.method == "loop" else twins_of(modules, self, self._whole, self._subset)
        for module, twin in twins:
            self._patched.append((module, twin, module.__dict__.get("forward")))
            module.__dict__["forward"] = twin
        self._known = {id(p): p for _, p in named if p.requires_grad}
        # other modes are other models, by names: what is known of a model must not keep its old parameters alive
        trainable = frozenset(name for name, p in named if p.requires_grad)
        self._watch.way = (self._watch.way, self.model.training, trainable)
        sharded = any(isinstance(module, FSDPModule) for module in modules.values())
        self._watch.alike = sharded or bool(self._split)
        targets = self._targets(named)
        if self.method != "loop" and not sharded and Borrowed.needed(self.model, targets):
            self._borrowed = Borrowed(self.model, targets, self)
            self._borrowed.__enter__()
        if sharded:
            self._hooks += self._shards.watch()
        self._hooks.append(self.model.register_forward_pre_hook(self._note_batch, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._note_call, with_kwargs=True))
        if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules.values()):
            warnings.warn("ScoreTape: the compiled model runs in eager mode while it is taped", stacklevel=3)
        if "torch._dynamo" in sys.modules:  # else nobody compiled anything, a function of the model's or a loss either
            self._eager = torch.compiler.set_stance("force_eager")
        self._open = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, twin, previous in self._patched:
            if module.__dict__.get("forward") is not twin:
                continue  # set or deleted inside
            del module.__dict__["forward"]
            if previous is not None:
                module.__dict__["forward"] = previous
        for hook in self._hooks:
            hook.remove()
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
        if self._borrowed is not None:
            self._borrowed.__exit__(kind, value, trace)
            if kind is None and self._called:
                self._borrowed.learned()
        self._hooks, self._patched, self._eager, self._borrowed = [], [], None, None
        self._open = False
        self._forget()

    # --- the two calls ------------------------------------------------------------------------------------------------

    def score_sq_norms(
        self,
        log_prob: Tensor,
        mask: Tensor,
        *,
        token_weight: Tensor | None = None,
        segment: Tensor | None = None,
        affine: tuple[Tensor, Tensor] | None = None,
        keep: bool = True,
        per_token: bool = False,
        scale: float = 1.0,
    ) -> Tensor:
        """||grad sum_t mask_t weight_t log_prob_t||^2 of every trajectory: (n,), at least float32, no gradient.

        log_prob, mask, token_weight, segment: (row, time). One trajectory a row, or `segment` ids 0..n-1 of a packed
        batch (-1: padding). affine: (u, v), each (n,), when the coefficients will be u + a v with the one number a
        unknown; v (groups, n) for one unknown per group, at one more gradient buffer each. keep=False: norms only,
        no gradient to follow. per_token: the coefficients that follow are one a token (row, time), which no sum over
        a trajectory's rows can hold: the graph is kept, and the gradient takes a second backward. scale: what the
        backward is multiplied by inside, against underflow in float16; norms and gradient come without it. Squares
        are of the weighted score; per-trajectory factors belong into the coefficients.

        Raises InputError on shapes that disagree, a second call before `backward`, or a log_prob without graph.
        """
        if not self._open:
            raise InputError("ScoreTape.score_sq_norms: the tape is closed; run forward and norms inside its `with`")
        if self._finish is not None:
            raise InputError(
                "ScoreTape.score_sq_norms: norms are already taken; call backward first, or use keep=False"
            )
        held = parameters_of(modules_of(self.model))
        named = self._targets(held)
        ready: list[tuple[Objective, Layout, bool, Line | None]] = []

        def prepare() -> None:
            refuse_arrays(log_prob, mask, token_weight)
            if not (math.isfinite(scale) and scale > 0):
                raise InputError(f"scale: {float(scale)} leaves no norms to divide by it; give a positive number")
            refuse_hooks(held)
            if not named:
                raise InputError(
                    "ScoreTape: no parameter of the model requires gradients, so there is no score to take"
                )
            of = Objective(log_prob, mask, token_weight, segment)
            layout = Layout.of(log_prob, segment, self.batch, self.advice)
            line = None if affine is None or self.method == "loop" else Line.of(*affine, layout.n)
            way = (segment is None, keep, per_token, line is None)
            ready.append((of, layout, self._read(log_prob, held, layout, way), line))

        with torch.enable_grad(), self._uncounted(), self._untouched(named):
            ranks = [*self._shards.groups(), *([self._split_group] if self._split else [])]
            together(prepare, ranks, self.generator.device)  # or one that stops here leaves the others waiting
            of, layout, reentrant, line = ready[0]
            if self.verify == "first":
                self._watch.fresh = on_any(self._watch.fresh, ranks, self.generator.device)
            route = self._route(of, layout, line, keep, per_token, reentrant)
            self._taken = route
            route.scale = float(scale) if self.method != "loop" else 1.0
            self._shape = tuple(log_prob.shape) if per_token else (layout.n,)
            with refused_backward(self.method == "loop"), grads_aside(self._foreign):
                return self._norms(of, layout, route, named, reentrant)

    def _read(self, log_prob: Tensor, held: Sequence[tuple[str, nn.Parameter]], layout: Layout, way: Hashable) -> bool:
        """What the graph of `log_prob` (row, time) does with parameters and rows; whether it has reentrant checkpoints.

        `way`: what else a comparison may depend on.
        """
        nodes = graph_nodes([log_prob])
        names = [node.name() for node in nodes]
        reentrant, self._uses = refuse_graph(nodes, names, self.advice), Uses.of(nodes, self)
        for name, p in held:
            if id(p) in self._uses.others:
                raise _put_in(name)
        refuse_frozen(held, self._known.keys() & set(map(id, self._uses.kind)))
        foreign = set(leaf_parameters([log_prob])) - {p for _, p in held} if reentrant else set()
        self._foreign = [p for p in foreign if not self.holds(p)]
        if self.verify == "first" and self.method != "loop":
            with refused_backward(False):
                parts = self._uses.parts({id(p): name for name, p in held}, layout.n, math.prod(layout.lead))
                graph = hash(frozenset(pairwise(names))), way  # the same for more steps or chunks
                self._watch.look([*parts, *(frozenset([move]) for move in (graph, *moves(nodes, names, layout.n)))])
        return reentrant

    def _route(
        self,
        of: Objective,
        layout: Layout,
        line: Line | None,
        keep: bool,
        per_token: bool,
        reentrant: bool,
    ) -> Route:
        """How the gradient will come, the one place where that is chosen.

        Not at all; by a second backward, where one backward cannot hold what it takes (a loop, norms of some
        parameters only, a coefficient a token); in two sums, where c = u + a v; else from operands that are kept.
        """
        if reentrant and self._subset is not None:
            raise InputError(
                "ScoreTape: parameters= does not go with reentrant checkpointing; give use_reentrant=False to it"
            )
        if reentrant and self.method == "loop":
            raise InputError("ScoreTape: method='loop' needs checkpointing with use_reentrant=False")
        if not keep:
            return NormsOnly(layout)
        if per_token or self._subset is not None or self.method == "loop":
            params = None if reentrant else [p for p in self.model.parameters() if p.requires_grad]
            return Again(layout, of.tokens() if per_token else of.trajectories(), params, self._shards.giver())
        giver = self._shards.giver()
        # Of equal coefficients a sum would not tell. What is kept is not copied to undo marks: coefficients do.
        mark = marks(layout.n) if self._watch.due(len(of.log_prob), of.narrow(layout.n)) else None
        if line is None:
            general = General(layout, giver)
            general.fold = mark
            return general
        affine = Affine(layout, line, giver)
        affine.mark = mark
        return affine

    def _norms(
        self, of: Objective, layout: Layout, route: Route, named: list[tuple[str, nn.Parameter]], reentrant: bool
    ) -> Tensor:
        """The squares of one backward, or of a loop, summed over parameters; where one is due with a comparison."""
        groups: list[dist.ProcessGroup | None] = [*self._shards.groups()]
        check = None
        rows, narrow = len(of.log_prob), of.narrow(layout.n)
        possible = not (groups and reentrant)  # FSDP2 does not allow it with reentrant checkpoints
        if possible and self._watch.due(rows, narrow):
            split = [self._split_group] if self._split else []
            check = Verification(self._watch, named, of, [*groups, *split], reentrant)
        if self.method == "loop":
            part, kind = {}, self._watch.coarsest(of.log_prob)
            log_prob, mask, token_weight, segment = of
            for split_ones in (False, True):  # those of split parameters apart, to be summed over ranks
                params = [p for _, p in named if (p in self._split) == split_ones]
                if params:
                    part[params[0]] = score_sq_norms_loop(
                        log_prob, mask, params, token_weight=token_weight, segment=segment
                    )
        else:
            if check is not None and self.norm == "exact":
                check.ask(route.scale, many=not isinstance(route, Kept))
            elif check is not None and not isinstance(route, Kept) and not (reentrant or check.groups):
                # a sketch whose gradient is not compared: the exact norms are, by a backward before its own
                uses, exact = self._uses.copied(), NormsOnly(layout)
                exact.scale = route.scale
                check.ask(route.scale, many=True)
                found = self._backward(of, layout, exact, named, False, True, sketched=False, again=True)
                check.norms({p: exact.unweighed(square) for p, square in found.part.items()}, found.coarsest)
                self._uses = uses
            score = self._backward(of, layout, route, named, reentrant, check is not None, self.norm == "sketch")
            part, kind = score.part, score.coarsest
        norms = route.unweighed(self._over_ranks(part, of.log_prob.dtype))
        if check is not None and (self.norm == "exact" or isinstance(route, Kept)):
            check.norms({p: route.unweighed(square) for p, square in part.items()}, kind)
        loop = self.method == "loop" and isinstance(route, Again) and len(self._shape) == 1
        if check is not None and (loop or isinstance(route, Kept)):
            self._finish = check.around(route.finish, loop)
            return norms
        if check is not None:
            check.passed()
        else:
            self._watch.passed(rows, narrow, {name: part[p] for name, p in named if p in part})
        self._finish = None if isinstance(route, NormsOnly) else route.finish
        return norms

    def backward(self, coefficient: Tensor) -> None:
        """Add -sum_i c_i grad log pi(tau_i) to p.grad: detached `coefficient` (n,), or (row, time) after `per_token`.

        Raises InputError before any norms, for a wrong shape or a number that is not finite (then p.grad is
        untouched).
        """
        if self._finish is None or self._taken is None:
            raise InputError("ScoreTape.backward: no norms to follow; call score_sq_norms first, inside the `with`")
        taken = self._taken

        def check() -> None:
            refuse_coefficient(coefficient, self._shape)
            taken.check(coefficient.detach())

        together(check, self._shards.groups(), self.generator.device)
        with torch.no_grad(), self._uncounted(), refused_backward(self.method == "loop"), grads_aside(self._foreign):
            self._finish(coefficient.detach())
        self._finish = None

    # --- what the layers ask and tell ---------------------------------------------------------------------------------

    def holds(self, param: object) -> bool:
        """Whether this is a trainable parameter of the model, or stands in for one; functional_call's are not."""
        return id(param) in self._known or param in self._shards.stored

    def place(self) -> Place | None:
        """When the call under way is made: in which of the model's, and after how many of its parts."""
        self._called = True
        if not self._counting:  # a checkpointed forward runs again during a backward
            return None
        self._parts += 1
        return Place(len(self._rows), self._parts)

    def looped(self, name: str) -> None:
        """Remember that this module was looped over."""
        self.loops[name] = None

    def advice(self, name: str) -> str:
        """What to do about a module of which trajectories cannot be told: loop over its owner, or over everything."""
        owner = name.rpartition(".")[0]
        if self._shards.stored:
            return f"{WHOLE_LOOP} without fully_shard"
        if not owner or self.unknown == "error":
            return WHOLE_LOOP
        modules = dict(self.model.named_modules())
        while owner and (
            type(modules[owner]).forward is nn.Module.forward or type(modules[owner]).__name__ in self._whole
        ):
            owner = owner.rpartition(".")[0]
        if not owner:
            return WHOLE_LOOP
        loop = sorted({*self._whole, type(modules[owner]).__name__})
        return f"loop over its owner, ScoreTape(model, unknown='loop', loop={loop})"

    # --- inside -------------------------------------------------------------------------------------------------------

    def _note_batch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.inside:
            return
        self._called = self._called or torch.is_grad_enabled()
        if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise InputError(
                "ScoreTape: the model is called through DistributedDataParallel, whose hooks would miss the gradient; "
                "call its .module inside the `with`, and sum_gradients after `backward`"
            )
        named = [kwargs[k] for k in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(k), Tensor)]
        found = [x for x in (*named, *args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() >= 2]
        if torch.is_grad_enabled() or not self.batch:  # a call of another batch without gradients is nobody's
            self.batch = tuple(found[0].shape[:2]) if found else ()
        if self._counting and torch.is_grad_enabled():
            self._rows.append(self.batch[0] if found else 1)

    def _note_call(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Keep a call that a check will want to repeat."""
        if (
            self._counting
            and not self.inside
            and torch.is_grad_enabled()
            and self._watch.due(self.batch[0] if self.batch else 1)
        ):
            self._watch.calls.append(Call.of(self.generator.device, args, kwargs, out))

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """No call in here is one of the forward's: checkpoints run theirs again in every backward."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    @contextmanager
    def _untouched(self, named: list[tuple[str, nn.Parameter]]) -> Iterator[None]:
        """Raises InputError if p.grad changes in here: an operator whose own backward adds to it hides its scores."""
        found = [(name, p, p.grad, None if p.grad is None else p.grad._version) for name, p in named]
        try:
            yield
        finally:
            moved = [name for name, p, g, old in found if p.grad is not g or (g is not None and g._version != old)]
            for _, p, g, _ in found:
                if g is None:
                    p.grad = None
            if moved:
                raise InputError(
                    f"ScoreTape: {moved[0]}: an operator of the model adds to p.grad in its own backward, as "
                    "reversible layers do; neither a tape nor a loop sees its scores; train this model without"
                )

    def _targets(self, held: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
        """Those of the model's parameters whose norms are taken, as layers see them."""
        named = self._shards.seen([(name, p) for name, p in held if p.requires_grad])
        return named if self._subset is None else [(name, p) for name, p in named if p in self._subset]

    def _backward(
        self,
        of: Objective,
        layout: Layout,
        route: Route,
        named: list[tuple[str, nn.Parameter]],
        reentrant: bool,
        checked: bool,
        sketched: bool,
        again: bool = False,
    ) -> ScorePass:
        """The one backward: every layer reports to a `ScorePass`, none adds to p.grad; `again`: the graph survives."""
        compiled = self.method in ("auto", "fused")
        work = Workspace(self.columns, self.generator, compiled, self._split, self._apart)
        self.running = score = ScorePass(layout, route, self._uses, self._subset, self.method, work, checked, sketched)
        score.coarsest = of.log_prob.dtype
        if reentrant:
            self._uses.places.add(None)
        calls = [self._rows[k - 1] for k in {place.model for place in self._uses.places if place} if k]
        score.chunked = len(calls) > 1 and sum(calls) == of.log_prob.shape[0]
        # a reentrant checkpoint allows no inputs: there a hook sees a gradient, and here the array of all does
        strays = [p.register_hook(partial(self._refuse_stray, name, p)) for name, p in named if reentrant]
        again = again or isinstance(route, Again) or (checked and isinstance(route, Kept))
        try:
            objective = route.weighed(of.tokens()).sum()
            with torch.autocast(objective.device.type, enabled=False):
                if reentrant:
                    torch.autograd.backward(objective, retain_graph=again)
                else:
                    params = [p for _, p in named]
                    past = torch.autograd.grad(objective, params, retain_graph=again, allow_unused=True)
                    for (name, p), grad in zip(named, past, strict=True):
                        self._refuse_stray(name, p, grad)
            with torch.no_grad():
                score.flush()
            return score
        finally:
            self.running, self._uses = None, Uses()
            for handle in strays:
                handle.remove()

    def _refuse_stray(self, name: str, param: nn.Parameter, grad: Tensor | None) -> None:
        """Raise InputError for a gradient that autograd brings past the tape: the parameter was used elsewhere."""
        if grad is None or self.inside:
            return
        if not self._called:
            raise InputError("log_prob: its forward ran outside the `with`; run the model inside it")
        if not self.holds(param):
            raise _put_in(name)
        if self._borrowed is None and listen_again(self.model, name):
            raise InputError(
                f"{name}: used outside its module's forward, as in no pass before; open a new tape, which will see it, "
                f"or {self.advice(name.rpartition('.')[0])}"
            )
        raise InputError(
            f"{name}: used outside its module's forward, so its score is not seen; freeze it, or "
            f"{self.advice(name.rpartition('.')[0])}"
        )

    def _over_ranks(self, part: Mapping[nn.Parameter, Tensor], dtype: torch.dtype) -> Tensor:
        """Sum of the parameters' squares (n,), those of parts of a parameter over all ranks.

        Raises InputError if no layer reported.
        """
        if not part:
            raise InputError("log_prob: its graph holds no parameter of this tape; run the model inside the `with`")
        kind = sum_dtype(dtype)
        whole = [square.to(kind) for p, square in part.items() if p not in self._split]
        parts = [square.to(kind) for p, square in part.items() if p in self._split]
        if not self._split:
            return torch.stack(whole).sum(0)
        zero = torch.zeros_like(next(iter(part.values())), dtype=kind)
        total = torch.stack([zero, *parts]).sum(0)
        dist.all_reduce(total, group=self._split_group)
        return torch.stack([total, *whole]).sum(0)
