"""`ScoreTape`: the context in which a model's backward yields score norms first and the weighted gradient after."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from llm_bridge.scores.approximate import last_block
from llm_bridge.scores.calibration import METHODS, Workspace, fastest, take
from llm_bridge.scores.check import EVERY, Call, Projection, alone, check_norms, ordinary, squares
from llm_bridge.scores.inner import Differs, Inner, Whole, cut_by, graph_nodes, untraced
from llm_bridge.scores.layers import Twin
from llm_bridge.scores.layout import WHOLE_LOOP, Layout, Operands
from llm_bridge.scores.loop import score_sq_norms_loop, trajectory_sums, weighted
from llm_bridge.scores.norms import (
    embedding_sq_norms,
    head_at_token,
    square_sum,
    sum_dtype,
    tied_cross_term,
)
from llm_bridge.scores.plan import twin_of
from llm_bridge.scores.routes import Affine, General, Line, Route
from vcposim.errors import InputError, unknown_name

_NORMS = ("exact", "sketch")
_VERIFY = ("first", "always", "never")
_PASSES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_COUPLED: WeakSet[nn.Module] = WeakSet()
"""looped modules whose gradients on one trajectory alone do not add up to those on all"""


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

    norm: "exact", or "sketch" (unbiased, `columns` random signs, `seed`). method: "auto" (calibrated), "block",
    "batch", "gram", or "loop": a backward per trajectory, slow and right for any model. parameters: norms of these
    only, say `last_block(model)`; the gradient is still everyone's, by a second backward. unknown: "error", or "loop"
    to run a backward per trajectory through those modules alone that have no exact rule (`tape.loops` names them).
    loop: class names of modules to loop over as a whole, such as a mixture of experts that sorts its rows.
    verify: "first" compares the first pass over a model, and then every hundredth, with plain autograd: one
    trajectory's norm and the gradient along a random direction; "always", "never". Sharded parameters are not
    verified, and of a sketch only the gradient is.

    split: parameters of which each rank of `split_group` holds a part (tensor parallelism, experts by rank), all ranks
    running the same trajectories: their squares are summed over the group, a collective. Everything else is counted
    once. The gradients of a part stay where the part is.

    The forward is the model's own, bit for bit. A compiled model runs in eager mode inside the `with`. With a
    GradScaler give `scale=scaler.get_scale()` to the norms and `scaler.scale(coefficient)` to `backward`.

    Under FSDP2 give the root module after `fully_shard`: each rank tapes its own trajectories, and `backward` leaves
    in each p.grad this rank's shard of the *sum* over ranks, so all ranks must call it. The affine route holds its
    sums whole on every rank (two gradients in float32); the general one a single weight's gradient at a time.

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
        if columns < 1:
            raise InputError(f"columns: {columns} random signings give no estimate; use at least 1")
        self.model, self.norm, self.method, self.unknown, self.columns = model, norm, method, unknown, columns
        self.verify, self.seed = verify, seed
        self.loops: dict[str, None] = {}
        self._whole = frozenset([loop] if isinstance(loop, str) else loop)
        self.inside = 0
        self.batch: tuple[int, ...] = ()
        self.running: ScorePass | None = None
        self._subset = None if parameters is None else {p for p in parameters if p.requires_grad}
        self._split, self._split_group = set(split), split_group
        if self._split and not (dist.is_available() and dist.is_initialized()):
            raise InputError("split: no process group is initialized; leave it out where each parameter is whole")
        # signs are drawn where they are used: to carry them over would stall an accelerator's queue of launches
        place = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self.generator = torch.Generator(place).manual_seed(seed)
        self._patched: list[tuple[nn.Module, Any]] = []
        self._hooks: list[RemovableHandle] = []
        self._token: dict[nn.Parameter, Tensor] = {}
        self._used: dict[nn.Parameter, list[str]] = {}
        self._known: set[Any] = set()
        self._stored: dict[nn.Parameter, nn.Parameter] = {}
        self._calls: list[Call] = []
        self._finish: Callable[[Tensor], None] | None = None
        self._eager: Any = None
        self._shape: tuple[int, ...] = ()
        self._open = self._called = False

    # --- context ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._open:
            raise InputError("ScoreTape: this tape is already open; use one `with` per tape")
        self._refuse_wrapped()
        self._refuse_parameters()
        if any(isinstance(m.__dict__.get("forward"), Twin) for m in self.model.modules()):
            raise InputError("ScoreTape: another tape is open on this model; close it first")
        for module, twin in [] if self.method == "loop" else self._twins():
            self._patched.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = twin
        self._known = {p for p in self.model.parameters() if p.requires_grad}
        self._note_gathered()
        self._hooks.append(self.model.register_forward_pre_hook(self._note_batch, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._note_call, with_kwargs=True))
        if any(_is_compiled(m) for m in self.model.modules()):
            warnings.warn("ScoreTape: the compiled model runs in eager mode while it is taped", stacklevel=2)
            self._eager = torch.compiler.set_stance("force_eager")
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, previous in self._patched:
            del module.__dict__["forward"]
            if previous is not None:
                module.__dict__["forward"] = previous
        for hook in self._hooks:
            hook.remove()
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
        self._hooks, self._patched, self._eager = [], [], None
        self._token, self._used, self._stored, self._known, self._calls = {}, {}, {}, set(), []
        self.running = self._finish = None
        self._open = self._called = False

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
        self._check_ready(log_prob, mask, token_weight)
        with self._untouched():
            return self._norms(log_prob, mask, token_weight, segment, affine, keep, per_token, scale)

    def _norms(
        self,
        log_prob: Tensor,
        mask: Tensor,
        token_weight: Tensor | None,
        segment: Tensor | None,
        affine: tuple[Tensor, Tensor] | None,
        keep: bool,
        per_token: bool,
        scale: float,
    ) -> Tensor:
        layout = Layout.of(log_prob, segment, self.batch, self.advice)
        self._shape = tuple(log_prob.shape) if per_token else (layout.n,)
        reentrant = self._read_graph(log_prob)
        if self.method == "loop":
            return self._loop(log_prob, mask, token_weight, segment, keep, per_token, reentrant)
        line = None if affine is None else Line.of(*affine, layout.n)
        again = per_token or self._subset is not None
        route = _route(layout, line, keep and not again, self._stored)
        route.scale = scale
        objective = weighted(log_prob, mask, token_weight) * scale
        if route.fold is not None:
            fold = route.fold.to(objective.device)
            objective = objective * layout.per_row(fold.to(objective.dtype), objective.numel()).view_as(objective)
        due = self._due()
        total = trajectory_sums(log_prob, mask, token_weight, segment) if again or due else None
        expected: list[float] = []
        if due and self.norm == "exact":
            assert total is not None
            i = int(torch.randint(layout.n, (), generator=torch.Generator().manual_seed(self.seed + due)))
            expected = squares(self._plainly(total, i, scale, reentrant))
        score = self._run(route, layout, objective.sum(), keep and bool(again or due), reentrant, bool(due))
        norms = self._over_ranks(score.part, objective.dtype)
        if expected:
            fold_i = 1.0 if route.fold is None else float(route.fold[i])
            part = {p: square / fold_i**2 for p, square in score.part.items()}
            check_norms(self._targets(), expected, part, i, score.coarsest, self.advice)
        self._calls = []
        norms = norms / scale**2
        if route.fold is not None:
            norms = norms / fold.square().to(norms.dtype)
        if due and (again or not keep):
            _PASSES[self.model] += 1
        if keep and again:
            assert total is not None
            each = weighted(log_prob, mask, token_weight) if per_token else total
            self._finish = self._second_backward(each, reentrant)
        elif keep:
            self._finish = route.finish if total is None else self._checked(route, total, score, reentrant, due)
        return norms

    def backward(self, coefficient: Tensor) -> None:
        """Add -sum_i c_i grad log pi(tau_i) to p.grad; c (n,), detached; (row, time) after `per_token` norms.

        Raises InputError before any norms, for a wrong shape or a number that is not finite (then p.grad is
        untouched).
        """
        if self._finish is None:
            raise InputError("ScoreTape.backward: no norms to follow; call score_sq_norms first, inside the `with`")
        if tuple(coefficient.shape) != self._shape:
            one = "token (the norms were taken with per_token)" if len(self._shape) == 2 else "trajectory"
            remedy = "" if len(self._shape) == 2 else "; for one per token, take the norms with per_token=True"
            raise InputError(
                f"coefficient: shape {tuple(coefficient.shape)}; give one per {one}, {self._shape}{remedy}"
            )
        bad = ~torch.isfinite(coefficient)
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            token = f", token {at[1]}" if len(at) == 2 else ""
            raise InputError(
                f"coefficient: {float(coefficient[tuple(at)])} at trajectory {at[0]}{token}; skip this update or "
                "repair its weights"
            )
        with torch.no_grad():
            self._finish(coefficient.detach())
        self._finish = None

    # --- what the layers ask and tell ---------------------------------------------------------------------------------

    def holds(self, param: object) -> bool:
        """Whether this is a trainable parameter of the model, or stands in for one; functional_call's are not."""
        return param in self._known or param in self._stored

    def uses(self, kind: str, weight: nn.Parameter, token: Tensor | None = None) -> None:
        """Count a use of a parameter in a forward, and the tokens it embeds, which a tied head needs early."""
        self._called = True
        if self.running is None:  # a checkpointed forward runs again during the backward
            self._used.setdefault(weight, []).append(kind)
            if token is not None:
                self._token[weight] = token

    def looped(self, name: str) -> None:
        """Remember that this module was looped over."""
        self.loops[name] = None

    def advice(self, name: str) -> str:
        """What to do about a module of which trajectories cannot be told: loop over its owner, or over everything."""
        owner = name.rpartition(".")[0]
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
        self.batch = tuple(found[0].shape[:2]) if found else ()

    def _note_call(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Keep a call that a check will want to repeat."""
        if self.running is None and not self.inside and torch.is_grad_enabled() and self._is_due():
            self._calls.append(Call.of(self.generator.device, args, kwargs, out))

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Raises InputError if p.grad changes in here: an operator whose own backward adds to it hides its scores."""
        found = [(name, p, p.grad, None if p.grad is None else p.grad._version) for name, p in self._targets()]
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

    def _read_graph(self, log_prob: Tensor) -> bool:
        """Whether reentrant checkpoints lie in the graph; Raises InputError for a compiled one."""
        nodes = graph_nodes([log_prob])
        kinds = {node.name() for node in nodes}
        cut = next((name for node in nodes if (name := cut_by(node)) is not None), None)
        if cut is not None:
            raise InputError(
                f"{cut}: looped over, and leaves something behind (a cache) on which log_prob hangs, whose gradient is "
                f"lost; {self.advice(cut)}"
            )
        if "CompiledFunctionBackward" in kinds:
            raise InputError(
                "log_prob: a compiled graph computed it, which hides its layers; run the forward inside the `with` and "
                "compile nothing between model and log_prob"
            )
        reentrant = "CheckpointFunctionBackward" in kinds
        if reentrant and self._subset is not None:
            raise InputError(
                "ScoreTape: parameters= does not go with reentrant checkpointing; give use_reentrant=False to it"
            )
        return reentrant

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

    def _is_due(self) -> bool:
        passes = _PASSES.setdefault(self.model, 0)
        return self.verify != "never" and not self._stored and (self.verify == "always" or passes % EVERY == 0)

    def _due(self) -> int:
        """0, or the number of the check that is due now, from 1. A pass whose check fails does not count."""
        if self._is_due():
            return _PASSES[self.model] + 1
        if self.verify != "never" and not self._stored:
            _PASSES[self.model] += 1
        return 0

    def _plainly(self, total: Tensor, i: int, scale: float, reentrant: bool) -> list[Tensor | None]:
        """Gradients of scale log pi(tau_i): by the model alone if that can tell, else through the taped graph."""
        params = [p for _, p in self._targets()]
        if len(self._calls) == 1 and not reentrant and not self._split:  # or ranks might not do the same
            found = alone(self, self.model, self._calls[0], total, i, scale, params)
            if found is not None:
                return found
        one = torch.zeros_like(total).index_fill_(0, torch.tensor(i, device=total.device), scale)
        with untraced(self.model, total.device), torch.autocast(total.device.type, enabled=False):
            return ordinary(total, one, params, reentrant)

    def _checked(
        self, route: Route, total: Tensor, score: "ScorePass", reentrant: bool, seed: int
    ) -> Callable[[Tensor], None]:
        fold = torch.ones(self._shape) if route.fold is None else route.fold
        size = {p: (square.cpu() / (fold * route.scale) ** 2).sqrt() for p, square in score.part.items()}
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

        def finish(coefficient: Tensor) -> None:
            cast = torch.autocast(total.device.type, enabled=False)
            with untraced(self.model, total.device), cast, torch.enable_grad():
                gradient = ordinary(total, -coefficient.to(total.dtype), [p for _, p in named], reentrant)
            projection = Projection(named, self.seed + seed, self.advice)
            route.finish(coefficient)
            c = coefficient.abs().cpu()
            projection.compare(gradient, {p: float((c * s).sum()) for p, s in size.items()}, score.coarsest)
            _PASSES[self.model] += 1

        return finish

    def _run(
        self, route: Route, layout: Layout, objective: Tensor, retain: bool, reentrant: bool, checked: bool
    ) -> "ScorePass":
        targets = self._targets()
        self.running = score = ScorePass(self, layout, route, checked)
        strays = [p.register_hook(self._stray(name)) for name, p in targets]
        try:
            with torch.autocast(objective.device.type, enabled=False):
                inputs = None if reentrant else [p for _, p in targets]
                torch.autograd.backward(objective, inputs=inputs, retain_graph=retain)
            with torch.no_grad():
                score.flush()
            return score
        finally:
            self.running, self._token, self._used = None, {}, {}
            for handle in strays:
                handle.remove()

    def _stray(self, name: str) -> Callable[[Tensor | None], None]:
        """A hook that fires when autograd brings a gradient past the tape: the parameter was used elsewhere."""

        def hook(grad: Tensor | None) -> None:
            if self.inside:
                return
            if grad is not None and not self._called:
                raise InputError("log_prob: its forward ran outside the `with`; run the model inside it")
            if grad is not None:
                raise InputError(
                    f"{name}: used outside its module's forward, so its score is not seen; freeze it, or "
                    f"{self.advice(name.rpartition('.')[0])}"
                )

        return hook

    def _targets(self) -> list[tuple[str, nn.Parameter]]:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if self._stored:
            gathered = {stored: p for p, stored in self._stored.items()}
            named = [(name, gathered.get(p, p)) for name, p in named if p in gathered or p in self._stored]
        return named if self._subset is None else [(name, p) for name, p in named if p in self._subset]

    def _second_backward(self, total: Tensor, reentrant: bool) -> Callable[[Tensor], None]:
        # of trajectories (n,) or of tokens (row, time), whichever the coefficients will be of
        params = [p for p in self.model.parameters() if p.requires_grad]

        def finish(coefficient: Tensor) -> None:
            torch.autograd.backward(total, -coefficient.to(total.dtype), inputs=None if reentrant else params)

        return finish

    def _loop(
        self,
        log_prob: Tensor,
        mask: Tensor,
        token_weight: Tensor | None,
        segment: Tensor | None,
        keep: bool,
        per_token: bool,
        reentrant: bool,
    ) -> Tensor:
        params = [p for _, p in self._targets()]
        if reentrant:
            raise InputError("ScoreTape: method='loop' needs checkpointing with use_reentrant=False")
        part = {}
        for of in ([p for p in params if p not in self._split], [p for p in params if p in self._split]):
            if of:
                part[of[0]] = score_sq_norms_loop(log_prob, mask, of, token_weight=token_weight, segment=segment)
        norms = self._over_ranks(part, log_prob.dtype)
        if keep:
            each = (log_prob, mask, token_weight)
            total = weighted(*each) if per_token else trajectory_sums(*each, segment)
            self._finish = self._second_backward(total, reentrant)
        return norms

    def _twins(self) -> list[tuple[nn.Module, Twin]]:
        """The replacements to make. Raises InputError where one cannot be, and unknown modules are errors."""
        twins: dict[str, tuple[nn.Module, Twin]] = {}
        modules = dict(self.model.named_modules())
        absent = self._whole - {type(module).__name__ for module in modules.values()}
        if absent:
            raise InputError(f"loop: no module of class {sorted(absent)[0]!r} in the model; give names of its classes")
        for name, module in modules.items():
            given = getattr(module, "parametrizations", None)
            made = isinstance(given, nn.Module) and any(p.requires_grad for p in given.parameters())
            if type(module).__name__ in self._whole or (made and self.unknown == "loop"):
                twins[name] = (module, Whole(module, name, self))
                continue
            if not any(p is not None and p.requires_grad for p in module._parameters.values()):
                continue
            fit = twin_of(module, name, self)
            own = fit.own().values()
            if not own or (self._subset is not None and self._subset.isdisjoint(own)):
                continue
            twin = None
            while type(module).forward is nn.Module.forward and name:  # a list or dict of parameters: its owner's
                name = name.rpartition(".")[0]
                module = modules[name]
                twin = Whole(module, name, self)
            if twin is not None and self.unknown == "error":
                raise InputError(
                    f"ScoreTape: no exact norm for the parameters of {name or 'the model itself'} "
                    f"({type(module).__name__}); freeze them, or use unknown='loop'"
                )
            if name not in twins or twin is not None:
                twins[name] = (module, twin or fit)
        return list(twins.values())

    def _note_gathered(self) -> None:
        """Whenever an FSDP2 unit has gathered its parameters, note which whole one stands in for which shard.

        Also those of modules that are never called: their weights may be borrowed by others, which must not pass.
        """
        for unit in self.model.modules():
            if isinstance(unit, FSDPModule):
                shards = [
                    (module, key, p)
                    for module in unit.modules()
                    for key, p in module.named_parameters(recurse=False)
                    if isinstance(p, DTensor)
                ]
                self._hooks.append(unit.register_forward_pre_hook(self._noting(shards)))

    def _noting(self, shards: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Callable[[nn.Module, object], None]:
        def note(unit: nn.Module, inputs: object) -> None:
            for module, key, stored in shards:
                gathered = getattr(module, key)
                if not isinstance(gathered, DTensor):
                    self._stored[gathered] = stored

        return note

    def _refuse_wrapped(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.parallel.DistributedDataParallel, FullyShardedDataParallel, nn.DataParallel)):
                place = f"its part {name}" if name else "model"
                raise InputError(
                    f"ScoreTape: {place} is wrapped in {type(module).__name__}, whose hooks would miss the gradient; "
                    "unwrap it (model.module) and call sum_gradients"
                )
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without backward leaves the root's parameters whole
        sharded = [(name, p) for name, p in self.model.named_parameters() if isinstance(p, DTensor)]
        if sharded and (self._subset is not None or "loop" in (self.unknown, self.method)):
            raise InputError(
                f"ScoreTape: {sharded[0][0]} is sharded; parameters=, unknown='loop' and method='loop' need a second "
                "backward, which fully_shard would average over ranks; use neither"
            )
        for name, p in sharded:
            if not isinstance(self.model, FSDPModule) or sum(not q.is_replicate() for q in p.placements) > 1:
                raise InputError(
                    f"ScoreTape: {name} is split by {p.placements} over ranks; only fully_shard on the whole model, "
                    "which gathers parameters for each forward, can be taped"
                )

    def _refuse_parameters(self) -> None:
        for name, module in self.model.named_modules():
            if not any(p.requires_grad for p in module.parameters(recurse=False)):
                continue
            if getattr(module, "sparse", False) is True:
                raise InputError(f"ScoreTape: {name} has sparse gradients, which have no norm here; give sparse=False")
            if getattr(module, "scale_grad_by_freq", False) is True and self.method != "loop":
                raise InputError(
                    f"ScoreTape: {name} divides gradients by counts over the batch, which no row knows; give "
                    f"scale_grad_by_freq=False, or {WHOLE_LOOP}"
                )
        for name, p in self.model.named_parameters():
            if p.requires_grad and p.is_complex():
                raise InputError(
                    f"ScoreTape: {name} is complex; hold its real and imaginary parts as one real parameter and "
                    "take torch.view_as_complex of it in the forward"
                )
            if p.requires_grad and (p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)):
                raise InputError(
                    f"ScoreTape: {name} has a gradient hook, which would not run; remove it while taping, and change "
                    "p.grad after `backward` instead"
                )

    def _check_ready(self, log_prob: Tensor, mask: Tensor, token_weight: Tensor | None) -> None:
        if not self._open:
            raise InputError("ScoreTape.score_sq_norms: the tape is closed; run forward and norms inside its `with`")
        if self._finish is not None:
            raise InputError(
                "ScoreTape.score_sq_norms: norms are already taken; call backward first, or use keep=False"
            )
        if log_prob.dim() != 2:
            raise InputError(f"log_prob: shape {tuple(log_prob.shape)}; give (row, time)")
        if not log_prob.requires_grad:
            raise InputError("log_prob: carries no gradient; compute it inside the `with`, outside torch.no_grad()")
        for name, array in (("mask", mask), ("token_weight", token_weight)):
            if array is not None and array.shape != log_prob.shape:
                raise InputError(f"{name}: shape {tuple(array.shape)} differs from log_prob's {tuple(log_prob.shape)}")


class ScorePass:
    """One backward under way: takes each layer's operands, adds to the norms, and keeps what the route needs.

    A parameter that is used several times in one forward has the sum of its uses as its gradient, and the norm of a
    sum needs cross terms. An embedding that is also the head is worked out (`tied_cross_term`); any other sum waits
    until all uses have come (`flush`) and is then formed trajectory by trajectory.
    """

    def __init__(self, tape: ScoreTape, layout: Layout, route: Route, checked: bool = False) -> None:
        self.layout, self.route, self._checked = layout, route, checked
        self.part: dict[nn.Parameter, Tensor] = {}
        self.coarsest = torch.float64
        """the coarsest type in which an output gradient came"""
        self._tape, self._token, self._used, self._subset = tape, tape._token, tape._used, tape._subset
        self._seen: set[tuple[str, nn.Parameter]] = set()
        self._head: dict[nn.Parameter, tuple[Tensor, list[Tensor], Sequence[Tensor]]] = {}
        self._waiting: dict[nn.Parameter, list[_Use]] = {}
        self._work = Workspace(tape.columns, tape.generator)

    @torch.no_grad()
    def matrix(self, name: str, weight: nn.Parameter, operands: Operands, transposed: bool) -> None:
        """A linear map's weight: output gradients and inputs."""
        if not self._wants(weight):
            return
        grad, x, layout = self._whole(operands.grad), self._whole(operands.x), operands.layout
        left, right = (x, grad) if transposed else (grad, x)

        if self._alone("matrix", name, weight):
            self._product(weight, left, right, layout)
            if self._tied(weight):
                token = self.layout.flatten(name, self._token[weight].unsqueeze(-1)).squeeze(1)
                at_token = head_at_token(layout.split(grad), self.layout.split(token))
                self._head[weight] = (token, at_token, layout.split(x))
        else:
            self._waiting.setdefault(weight, []).append((left, right, layout))

    def _product(self, weight: nn.Parameter, left: Tensor, right: Tensor, layout: Layout) -> None:
        method = "sketch" if self._tape.norm == "sketch" else self._tape.method
        choice = fastest(method, left, right, layout, self.route)
        self._add(weight, take(choice, weight, left, right, layout, self.route, self._work))

    @torch.no_grad()
    def vector(self, name: str, param: nn.Parameter, grad: Tensor) -> None:
        """A bias or scale: its gradient per position (row, time, ..., its size)."""
        if not self._wants(param):
            return
        self._whole(grad)
        grad = self.layout.flatten(name, grad)
        each = self.layout.per_trajectory(grad.to(sum_dtype(grad.dtype)))
        self.route.vector(param, each)
        if self._alone("vector", name, param):
            self._add(param, each.square().sum(1))
        else:
            self._wait(param, lambda i: each[i])

    @torch.no_grad()
    def embedding(self, name: str, weight: nn.Parameter, token: Tensor, grad: Tensor, padding: int | None) -> None:
        """An embedding: its tokens (row, time) and output gradients (row, time, d).

        Raises `InputError` if another forward ran before the norms.
        """
        if not self._wants(weight):
            return
        grad, token = self._whole(self.layout.flatten(name, grad)), token.reshape(-1)
        if padding is not None:
            grad = grad * (token != padding).unsqueeze(1)
        self.route.embedding(weight, token, grad)
        if self._alone("embedding", name, weight):
            self._add(weight, embedding_sq_norms(token, grad, self.layout, weight.shape[0]))
            if weight in self._head:
                at, gathered, hidden = self._head.pop(weight)
                if not torch.equal(at, token):
                    raise InputError(
                        f"{name}: another forward ran before the norms; call score_sq_norms after each forward"
                    )
                self._add(weight, 2 * tied_cross_term(gathered, hidden, self.layout.split(grad)))
            return

        def block(i: int) -> Tensor:
            dense = torch.zeros(weight.shape, dtype=sum_dtype(grad.dtype), device=grad.device)
            return dense.index_add_(0, self.layout.split(token)[i], self.layout.split(grad)[i].to(dense.dtype))

        self._wait(weight, block)

    def local(self, name: str, inner: Inner, grad: Sequence[Tensor | None]) -> list[Tensor | None]:
        """A module run as a whole: a backward per trajectory through it. Returns its inputs' gradients.

        Raises `Differs` where it does not act on trajectories one by one as on all of them.
        """
        layout, params = self.layout, inner.param
        for g in grad:
            if g is not None:  # an output without rows has a gradient that is everybody's
                layout.flatten(name, g if g.dim() >= 2 else g.unsqueeze(-1))
        alone = [self._wants(p) and self._alone("local", name, p) for p in params]
        square: list[list[Tensor]] = [[] for _ in params]
        kept: list[list[Tensor]] = [[] for _ in params]

        def take_one(i: int, found: list[Tensor | None]) -> None:
            for k, (p, g) in enumerate(zip(params, found, strict=True)):
                g = torch.zeros_like(p) if g is None else self._whole(g)
                square[k].append(square_sum(g))
                if not alone[k] and self._wants(p):
                    kept[k].append(g)

        def over(c: Tensor) -> list[Tensor | None]:
            return [None if g is None else g * layout.over(name, c, g) for g in grad]

        try:
            if layout.owner is not None or inner.twin.module in _COUPLED:
                raise Differs
            total: list[Tensor | float] = [0.0] * len(params)

            def add_one(i: int, found: list[Tensor | None]) -> None:
                take_one(i, found)
                for k, g in enumerate(found if self._checked else []):
                    total[k] = total[k] if g is None else total[k] + g

            given = inner.each(layout, grad, add_one)
            if self._checked and not all(map(_near, total, inner.grads(grad, params))):
                _COUPLED.add(inner.twin.module)
                raise Differs
        except Differs:
            for store in (*square, *kept):
                store.clear()
            one = torch.eye(layout.n, dtype=torch.float64, device=params[0].device)
            for i in range(layout.n):
                take_one(i, inner.grads(over(one[i]), params))
            given = inner.grads(grad, inner.input)
        for k, p in enumerate(params):
            if alone[k]:
                self._add(p, torch.stack(square[k]))
            elif self._wants(p):
                self._wait(p, kept[k].__getitem__)
        self.route.local(params, lambda c: inner.grads(over(c), params))
        return given

    def flush(self) -> None:
        """Norms of the parameters with several uses.

        A sum of products left^T right is one product of their rows side by side; anything else is added up as blocks,
        a trajectory at a time.
        """
        for param, uses in self._waiting.items():
            products = [use for use in uses if isinstance(use, tuple)]
            if len(products) == len(uses):
                self._product(param, *_joined(products))
                continue
            for left, right, layout in products:
                self.route.matrix(param, left, right, layout, whole=True)
            kind, square = sum_dtype(param.dtype), []
            for i in range(self.layout.n):
                total = param.new_zeros(param.shape, dtype=kind)
                for use in uses:
                    if isinstance(use, tuple):
                        left_i, right_i = (use[2].split(x)[i] for x in use[:2])
                        total += left_i.t() @ right_i
                    else:
                        total += use(i).to(kind).view(param.shape)
                square.append(square_sum(total))
            self._add(param, torch.stack(square))
        self._waiting = {}

    def _add(self, param: nn.Parameter, square: Tensor) -> None:
        self.part[param] = self.part[param] + square if param in self.part else square

    def _wait(self, param: nn.Parameter, block: Callable[[int], Tensor]) -> None:
        self._waiting.setdefault(param, []).append(block)

    def _whole(self, grad: Tensor) -> Tensor:
        """As it is, or wider where products of its numbers would overflow; notes the type."""
        if torch.finfo(grad.dtype).eps > torch.finfo(self.coarsest).eps:
            self.coarsest = grad.dtype
        return grad.float() if grad.dtype == torch.float16 else grad

    def _wants(self, param: nn.Parameter) -> bool:
        return self._subset is None or param in self._subset

    def _tied(self, param: nn.Parameter) -> bool:
        return sorted(self._used.get(param, [])) == ["embedding", "matrix"]

    def _alone(self, kind: str, name: str, param: nn.Parameter) -> bool:
        """Whether this use has no cross terms but those that are worked out."""
        if len(self._used.get(param, [])) > 1 and not self._tied(param):
            return False
        if (kind, param) in self._seen:  # inside a reentrant checkpoint, where the forward counts nothing
            raise InputError(
                f"{name}: its parameters are used twice in one forward; give use_reentrant=False to "
                f"checkpointing, or {WHOLE_LOOP}"
            )
        self._seen.add((kind, param))
        return True


def _near(a: Tensor | float, b: Tensor | None) -> bool:
    if b is None:
        return not isinstance(a, Tensor) or not bool(a.any())
    return float((b - a).norm()) <= torch.finfo(b.dtype).eps ** 0.5 * float(b.norm())


_Product = tuple[Tensor, Tensor, Layout]
_Use = _Product | Callable[[int], Tensor]


def _joined(products: Sequence[_Product]) -> _Product:
    """Operands of several products with one weight as those of one: each trajectory's rows side by side."""
    if len(products) == 1:
        return products[0]
    n = products[0][2].n
    sides = []
    for side in (0, 1):
        rows = [use[2].split(use[:2][side]) for use in products]
        sides.append([torch.cat([each[i] for each in rows]) for i in range(n)])
    length = [len(x) for x in sides[0]]
    left, right = (torch.cat(side) for side in sides)
    if len(set(length)) == 1:
        return left, right, Layout(n, (n, length[0]))
    stop = torch.tensor(length).cumsum(0).tolist()
    run = tuple((end - size, end) for end, size in zip(stop, length, strict=True))
    owner = torch.repeat_interleave(torch.arange(n), torch.tensor(length)).to(left.device)
    return left, right, Layout(n, (1, len(left)), run, owner)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _route(layout: Layout, line: Line | None, keep: bool, stored: dict[nn.Parameter, nn.Parameter]) -> Route:
    if not keep:
        return Route(layout)
    return General(layout, stored) if line is None else Affine(layout, line, stored)
