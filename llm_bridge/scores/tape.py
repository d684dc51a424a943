"""`ScoreTape`: the context in which a model's backward yields score norms first and the weighted gradient after."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import NoReturn, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from llm_bridge.scores.calibration import METHODS, Workspace, fastest, take
from llm_bridge.scores.layers import twin_forward
from llm_bridge.scores.layout import Layout, Operands
from llm_bridge.scores.loop import score_sq_norms_loop, trajectory_sums, weighted
from llm_bridge.scores.norms import (
    embedding_sq_norms,
    head_at_token,
    sum_dtype,
    tied_cross_term,
)
from llm_bridge.scores.routes import Affine, General, Line, Route
from vcposim.errors import InputError, unknown_name

_NORMS = ("exact", "sketch")
_TWIN = "_score_tape_name"


class ScoreTape:
    """Exact ||grad log pi(tau_i)||^2 in one backward, then -sum_i c_i grad log pi(tau_i) without a second.

        with ScoreTape(model) as tape:
            log_prob = token_log_prob(model, batch)                  # (n, t)
            sq_norm = tape.score_sq_norms(log_prob, batch.mask)      # (n,)
            tape.backward(coefficient)                               # p.grad += -sum_i c_i grad log pi(tau_i)

    The three steps may repeat inside one `with` (one group after another); p.grad accumulates. Only `backward`
    touches p.grad. On exit the model is as it was found, also after an exception.

    norm: "exact", or "sketch" (unbiased, `columns` random signs, `seed`). method: "auto" (calibrated), "block",
    "batch" or "gram". parameters: norms of these only, say `last_block(model)`; the gradient is still everyone's, by
    a second backward. unknown: "error", or "loop" to run one backward per trajectory if the model holds a module
    that the tape does not know.

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
        columns: int = 16,
        seed: int = 0,
    ) -> None:
        for label, value, known in (
            ("norm", norm, _NORMS),
            ("method", method, ("auto", *METHODS)),
            ("unknown", unknown, ("error", "loop")),
        ):
            if value not in known:
                raise unknown_name(f"ScoreTape {label}", value, known)
        if columns < 1:
            raise InputError(f"columns: {columns} random signings give no estimate; use at least 1")
        self.model, self.norm, self.method, self.unknown, self.columns = model, norm, method, unknown, columns
        self.running: ScorePass | None = None
        self._subset = None if parameters is None else {p for p in parameters if p.requires_grad}
        # signs are drawn where they are used: to carry them over would stall an accelerator's queue of launches
        place = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self.generator = torch.Generator(place).manual_seed(seed)
        self._patched: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []
        self._token: dict[nn.Parameter, Tensor] = {}
        self._stored: dict[nn.Parameter, nn.Parameter] = {}
        self._finish: Callable[[Tensor], None] | None = None
        self._n = 0
        self._open = self._looping = False

    # --- context ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._open:
            raise InputError("ScoreTape: this tape is already open; use one `with` per tape")
        self._refuse_wrapped()
        if any(_TWIN in m.__dict__ for m in self.model.modules()):
            raise InputError("ScoreTape: another tape is open on this model; close it first")
        twins = self._twins()
        self._looping = twins is None
        for module, forward in twins or []:
            module.__dict__["forward"] = forward
            module.__dict__[_TWIN] = True
            self._patched.append(module)
        self._note_gathered()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._patched:
            del module.__dict__["forward"], module.__dict__[_TWIN]
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._patched, self._token, self._stored = [], {}, {}
        self.running = self._finish = None
        self._open = False

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
    ) -> Tensor:
        """||grad sum_t mask_t weight_t log_prob_t||^2 of every trajectory: (n,), at least float32, no gradient.

        log_prob, mask, token_weight, segment: (row, time). One trajectory a row, or `segment` ids 0..n-1 of a packed
        batch (-1: padding). affine: (u, v), each (n,), when the coefficients will be u + a v with the one number a
        unknown; v (groups, n) for one unknown per group, at one more gradient buffer each. keep=False: norms only,
        no gradient to follow. Squares are of the weighted score; per-trajectory factors belong into the
        coefficients.

        Raises InputError on shapes that disagree, a second call before `backward`, or a log_prob without graph.
        """
        self._check_ready(log_prob, mask, token_weight)
        layout = Layout.of(log_prob, segment)
        self._n = layout.n
        if self._looping:
            return self._loop(log_prob, mask, token_weight, segment, keep)
        line = None if affine is None else Line.of(*affine, layout.n)
        again = self._subset is not None
        route = _route(layout, line, keep and not again, self._stored)
        objective = weighted(log_prob, mask, token_weight)
        if route.fold is not None:
            fold = route.fold.to(objective.device)
            objective = objective * layout.per_row(fold.to(objective.dtype), objective.numel()).view_as(objective)
        norms = self._run(route, layout, objective.sum(), retain=again and keep)
        if route.fold is not None:
            norms = norms / fold.square().to(norms.dtype)
        if keep:
            total = trajectory_sums(log_prob, mask, token_weight, segment) if again else None
            self._finish = route.finish if total is None else self._second_backward(total)
        return norms

    def backward(self, coefficient: Tensor) -> None:
        """Add -sum_i c_i grad log pi(tau_i) to p.grad; c (n,), detached.

        Raises InputError before any norms, for a wrong shape or a number that is not finite (then p.grad is
        untouched).
        """
        if self._finish is None:
            raise InputError("ScoreTape.backward: no norms to follow; call score_sq_norms first, inside the `with`")
        if tuple(coefficient.shape) != (self._n,):
            raise InputError(f"coefficient: shape {tuple(coefficient.shape)}; give one per trajectory, ({self._n},)")
        bad = ~torch.isfinite(coefficient)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise InputError(
                f"coefficient: {float(coefficient[i])} at trajectory {i}; skip this update or repair its weights"
            )
        with torch.no_grad():
            self._finish(coefficient.detach())
        self._finish = None

    # --- inside -------------------------------------------------------------------------------------------------------

    def embeds(self, weight: nn.Parameter, token: Tensor) -> None:
        """Remember the tokens a forward embeds: a tied head needs them before the embedding's own backward comes."""
        if self.running is None:  # a checkpointed forward runs again during the backward
            self._token[weight] = token

    def _run(self, route: Route, layout: Layout, objective: Tensor, retain: bool) -> Tensor:
        targets = self._targets()
        self.running = ScorePass(self, layout, route, self._token)
        strays = [p.register_hook(_stray(name)) for name, p in targets]
        try:
            with torch.autocast(objective.device.type, enabled=False):
                torch.autograd.backward(objective, inputs=[p for _, p in targets], retain_graph=retain)
            return self.running.result(objective)
        finally:
            self.running, self._token = None, {}
            for handle in strays:
                handle.remove()

    def _targets(self) -> list[tuple[str, nn.Parameter]]:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if self._stored:
            gathered = {stored: p for p, stored in self._stored.items()}
            named = [(name, gathered.get(p, p)) for name, p in named if p in gathered or p in self._stored]
        return named if self._subset is None else [(name, p) for name, p in named if p in self._subset]

    def _second_backward(self, total: Tensor) -> Callable[[Tensor], None]:
        params = [p for p in self.model.parameters() if p.requires_grad]

        def finish(coefficient: Tensor) -> None:
            torch.autograd.backward(total, -coefficient.to(total.dtype), inputs=params)

        return finish

    def _loop(
        self, log_prob: Tensor, mask: Tensor, token_weight: Tensor | None, segment: Tensor | None, keep: bool
    ) -> Tensor:
        params = [p for _, p in self._targets()]
        norms = score_sq_norms_loop(log_prob, mask, params, token_weight=token_weight, segment=segment)
        if keep:
            self._finish = self._second_backward(trajectory_sums(log_prob, mask, token_weight, segment))
        return norms

    def _twins(self) -> list[tuple[nn.Module, Callable[..., Tensor]]] | None:
        """The replacements to make; None if the model holds an unknown module and the slow way is allowed."""
        twins, unknown = [], []
        for name, module in self.model.named_modules():
            own = [p for _, p in module.named_parameters(recurse=False) if p.requires_grad]
            if not own or (self._subset is not None and self._subset.isdisjoint(own)):
                continue
            forward = twin_forward(module, name, self)
            if forward is None:
                unknown.append(f"{name or 'the model itself'} ({type(module).__name__})")
            else:
                twins.append((module, forward))
        if unknown and self.unknown == "error":
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise InputError(
                f"ScoreTape: no exact norm for the parameters of {unknown[0]}{more}; freeze them, or use unknown='loop'"
            )
        return None if unknown else twins

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
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise InputError(
                "ScoreTape: model is wrapped in DistributedDataParallel; give model.module and call sum_gradients"
            )
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without backward leaves the root's parameters whole
        sharded = [(name, p) for name, p in self.model.named_parameters() if isinstance(p, DTensor)]
        if sharded and (self._subset is not None or self.unknown == "loop"):
            raise InputError(
                f"ScoreTape: {sharded[0][0]} is sharded; parameters= and unknown='loop' need a second backward, "
                "which fully_shard would average over ranks; use neither"
            )
        for name, p in sharded:
            if not isinstance(self.model, FSDPModule) or sum(not q.is_replicate() for q in p.placements) > 1:
                raise InputError(
                    f"ScoreTape: {name} is split by {p.placements} over ranks; only fully_shard on the whole model, "
                    "which gathers parameters for each forward, can be taped"
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
    """One backward under way: takes each layer's operands, adds to the norms, and keeps what the route needs."""

    def __init__(self, tape: ScoreTape, layout: Layout, route: Route, token: dict[nn.Parameter, Tensor]) -> None:
        self.layout, self.route = layout, route
        self._tape, self._token, self._subset = tape, token, tape._subset
        self._square: list[Tensor] = []
        self._seen: set[tuple[str, nn.Parameter]] = set()
        self._head: dict[nn.Parameter, tuple[Tensor, list[Tensor], Sequence[Tensor]]] = {}
        self._work = Workspace(tape.columns, tape.generator)

    def result(self, objective: Tensor) -> Tensor:
        """The norms (n,) so far; Raises InputError if no layer reported."""
        if not self._square:
            raise InputError("log_prob: its graph holds no parameter of this tape; run the model inside the `with`")
        kind = sum_dtype(objective.dtype)
        return torch.stack([square.to(kind) for square in self._square]).sum(0)

    @torch.no_grad()
    def matrix(self, name: str, weight: nn.Parameter, operands: Operands, transposed: bool) -> None:
        """A linear map's weight: output gradients and inputs."""
        if not self._wants("matrix", name, weight):
            return
        grad, x, layout = operands.grad, operands.x, operands.layout
        left, right = (x, grad) if transposed else (grad, x)
        method = "sketch" if self._tape.norm == "sketch" else self._tape.method
        choice = fastest(method, left, right, layout, self.route)
        self._add(take(choice, weight, left, right, layout, self.route, self._work))
        if weight in self._token:
            token = self.layout.flatten(name, self._token[weight].unsqueeze(-1)).squeeze(1)
            at_token = head_at_token(layout.split(grad), self.layout.split(token))
            self._head[weight] = (token, at_token, layout.split(x))

    @torch.no_grad()
    def vector(self, name: str, param: nn.Parameter, grad: Tensor) -> None:
        """A bias or scale: its gradient per position (row, time, ..., d)."""
        if not self._wants("vector", name, param):
            return
        grad = self.layout.flatten(name, grad)
        each = self.layout.per_trajectory(grad.to(sum_dtype(grad.dtype)))
        self._add(each.square().sum(1))
        self.route.vector(param, each)

    @torch.no_grad()
    def embedding(self, name: str, weight: nn.Parameter, token: Tensor, grad: Tensor, padding: int | None) -> None:
        """An embedding: its tokens (row, time) and output gradients (row, time, d)."""
        if not self._wants("embedding", name, weight):
            return
        grad, token = self.layout.flatten(name, grad), token.reshape(-1)
        if padding is not None:
            grad = grad * (token != padding).unsqueeze(1)
        self._add(embedding_sq_norms(token, grad, self.layout, weight.shape[0]))
        if weight in self._head:
            at, gathered, hidden = self._head.pop(weight)
            if not torch.equal(at, token):
                raise InputError(
                    f"{name}: another forward ran before the norms; call score_sq_norms after each forward"
                )
            self._add(2 * tied_cross_term(gathered, hidden, self.layout.split(grad)))
        self.route.embedding(weight, token, grad)

    def _add(self, square: Tensor) -> None:
        self._square.append(square)

    def _wants(self, kind: str, name: str, param: nn.Parameter) -> bool:
        if self._subset is not None and param not in self._subset:
            return False
        # Squares of a sum over several uses need their cross terms; only embedding with head is worked out.
        if (kind, param) in self._seen:
            raise InputError(
                f"{name}: its parameters are used twice in one forward; use ScoreTape(model, unknown='loop')"
            )
        self._seen.add((kind, param))
        return True


def _route(layout: Layout, line: Line | None, keep: bool, stored: Mapping[nn.Parameter, nn.Parameter]) -> Route:
    if not keep:
        return Route(layout)
    return General(layout, stored) if line is None else Affine(layout, line, stored)


def _stray(name: str) -> Callable[[Tensor | None], None]:
    """A hook that fires when autograd brings a gradient past the tape: the parameter was used outside its module."""

    def hook(grad: Tensor | None) -> None:
        if grad is not None:
            _raise_stray(name)

    return hook


def _raise_stray(name: str) -> NoReturn:
    raise InputError(
        f"{name}: used outside its module's forward, so its score is not seen; use unknown='loop' or freeze it"
    )
