"""Small modules built to fool the tape: every one is exact or refused by name, with advice that works.

The two shapes are chosen against it: as many rows as steps, where an array with time first looks like one with rows
first, and fewer. Each case says which of the two ends it must come to, so that a tape that refuses everything fails
as well.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from llm_bridge.scores import ScoreTape, score_sq_norms_loop, weighted_gradient_loop
from tests.kit.statistical import BRAIN, HALF, SUMMED, assert_near, near
from vcposim.errors import InputError

VOCABULARY, D, STEPS = 11, 6, 5
Body = Callable[[], nn.Module]


class Net(nn.Module):
    """Embedding, a mean over the past, the hostile part, a head; log pi of each token (n, t)."""

    def __init__(self, body: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.body = body
        self.head = head or nn.Linear(D, VOCABULARY)

    def forward(self, token: Tensor) -> Tensor:
        x = self.embed(token).cumsum(1)
        return log_prob(self.head(self.body(x)), token)


def log_prob(logits: Tensor, token: Tensor) -> Tensor:
    chosen = logits[:, :-1].log_softmax(-1).gather(2, token[:, 1:, None]).squeeze(2)
    return F.pad(chosen, (1, 0))


class Fn(nn.Module):
    """A module whose forward is a function of its parts and the input."""

    def __init__(self, forward: Callable[..., Tensor], **part: Any) -> None:
        super().__init__()
        for name, x in part.items():
            if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                self.register_parameter(name, nn.Parameter(x))
            else:
                setattr(self, name, x)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _p(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.5


def _lin(out: int = D, inner: int = D) -> nn.Linear:
    return nn.Linear(inner, out)


class Rms(nn.Module):
    """RMS norms of one class in several forms."""

    def __init__(self, offset: bool = False, clamp: float | None = None, size: int = D, gate: bool = False) -> None:
        super().__init__()
        self.weight, self.offset, self.clamp, self.gate = nn.Parameter(_p(size)), offset, clamp, gate
        self.eps = 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        if gate is not None:
            h = h * F.silu(gate)
        y = (1 + self.weight) * h if self.offset else self.weight * h
        return y if self.clamp is None else y.clamp(-self.clamp, self.clamp)


class RMSNorm(Rms):
    """The name that everybody uses, with a scale by half."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, gate)


class Half(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Swapped(nn.Linear):
    """A linear map over rows and time exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1).cumsum(0)).transpose(0, 1)


class Experts(nn.Module):
    """Fused experts and a router: rows are gathered by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(_p(3, D))
        self.up, self.down = nn.Parameter(_p(3, 8, D)), nn.Parameter(_p(3, D, 8))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weight, choice = F.linear(flat, self.router).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e in range(3):
            row, k = (choice == e).nonzero(as_tuple=True)
            hidden = F.linear(F.linear(flat[row], self.up[e]).tanh(), self.down[e])
            out = out.index_add(0, row, hidden * weight[row, k, None])
        return out.view_as(x)


class Router(nn.Module):
    """A router over flattened rows, in another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_p(D, D))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        return (flat * F.linear(flat.type(torch.float64), self.weight.type(torch.float64)).softmax(-1)).view_as(x)


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(_p(D, 2)), nn.Parameter(_p(2, D))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


def _parametrized() -> nn.Module:
    layer = _lin()
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", Lora())
    return layer


def _causal_conv(groups: int) -> nn.Module:
    conv = nn.Conv1d(D, D, 3, groups=groups)
    return Fn(lambda s, x: s.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), conv=conv)


def _gru() -> nn.Module:
    return Fn(lambda s, x: s.rnn(x)[0], rnn=nn.GRU(D, D, batch_first=True))


def _attention() -> nn.Module:
    return Fn(lambda s, x: s.mix(x, x, x, need_weights=False)[0], mix=nn.MultiheadAttention(D, 2, batch_first=True))


class Shifted(nn.LayerNorm):
    """Nemotron's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Positions(nn.Embedding):
    """Whisper's and OPT's ways to have positions."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        return x + self.weight[1 : 1 + x.shape[1]] + 0.5 * super().forward(place[None] + 1)


def _sorted(s: Any, x: Tensor) -> Tensor:
    order = x.sum((1, 2)).argsort()
    return s.inner(x[order])[order.argsort()]


def _first_owns(s: Any, x: Tensor) -> Tensor:
    """As many images as rows, all of them the first trajectory's."""
    image = torch.linspace(-1, 1, len(x) * 4 * D, dtype=x.dtype).view(len(x), 4, D)
    seen = s.project(image).mean((0, 1))
    return torch.cat([x[:1] + seen, x[1:]])


class Squared(torch.autograd.Function):
    """A user's own operator with a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.square() @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * x * (grad @ weight.t()), x.square().flatten(0, 1).t() @ grad.flatten(0, 1)


def _shared() -> nn.Module:
    layer = _lin()
    return nn.Sequential(layer, nn.Tanh(), layer, Fn(lambda s, x: s.a(x.tanh()) + s.a(x.cos()), a=layer))


def _chunked_head() -> nn.Module:
    head = _lin(VOCABULARY)
    return Fn(lambda s, x: torch.cat([s.head(part) for part in x.split(2, 1)], 1), head=head)


def _flat_chunks() -> nn.Module:
    return Fn(
        lambda s, x: torch.cat([s.head(p) for p in x.reshape(-1, D).split(4)]).view(*x.shape[:2], -1), head=_lin()
    )


def _row_chunks() -> nn.Module:
    return Fn(lambda s, x: torch.cat([s.a(p) for p in x.split(2)]), a=_lin())


def _lent() -> nn.Module:
    return Fn(lambda s, x: F.linear(s.own(x), s.lender.weight), own=_lin(), lender=_lin())


def _norm_map(s: Any, x: Tensor) -> Tensor:
    return s.norm(x.unflatten(2, (2, 3))).flatten(2)


EXACT: dict[str, Body] = {
    "plain": _lin,
    "rms, 1 + weight": lambda: Rms(offset=True),
    "two forms of one class": lambda: nn.Sequential(Rms(offset=True), Rms(), Rms(clamp=0.7)),
    "rms by name only": RMSNorm,
    "rms of heads": lambda: Fn(_norm_map, norm=Rms(size=3)),
    "rms with zero weights": lambda: Fn(lambda s, x: s.norm(x) + x, norm=_zeroed(Rms())),
    "gated norm": lambda: Fn(lambda s, x: s.norm(x, x.cos()), norm=Rms()),
    "gate by keyword": lambda: Fn(lambda s, x: s.norm(gate=x.cos(), x=x), norm=Rms()),
    "layer norm over two axes": lambda: Fn(_norm_map, norm=nn.LayerNorm((2, 3))),
    "layer norm, 1 + weight": lambda: Shifted(D),
    "torch's rms": lambda: nn.RMSNorm(D),
    "input by keyword": lambda: Fn(lambda s, x: s.a(input=x), a=_lin()),
    "scaled linear": lambda: Half(D, D),
    "x @ W.T": lambda: Product(D, D),
    "scale and shift": lambda: Fn(lambda s, x: x * s.scale + s.shift, scale=_p(D), shift=_p(1, 1, D)),
    "scalar gate": lambda: Fn(lambda s, x: x + s.gate.tanh() * x.sin(), gate=_p()),
    "softmax of a scale": lambda: Fn(lambda s, x: x * s.scale.softmax(-1), scale=_p(D)),
    "mean of a scale": lambda: Fn(lambda s, x: x.sin() + x * s.scale.square().sum(), scale=_p(D)),
    "positions by row": lambda: Positions(20, D),
    "positions as a parameter": lambda: Fn(lambda s, x: (x + s.place).sin(), place=_p(1, STEPS, D)),
    "experts": Experts,
    "router": Router,
    "softmax of a matrix": lambda: Fn(lambda s, x: x @ s.w.softmax(0), w=_p(D, D)),
    "einsum": lambda: Fn(lambda s, x: torch.einsum("ntd,de->nte", x, s.w), w=_p(D, D)),
    "list of parameters": lambda: Fn(lambda s, x: x @ s.w[0] @ s.w[1], w=nn.ParameterList([_p(D, D), _p(D, D)])),
    "dict of parameters": lambda: Fn(lambda s, x: x @ s.w["a"], w=nn.ParameterDict({"a": nn.Parameter(_p(D, D))})),
    "convolution": lambda: _causal_conv(1),
    "depthwise convolution": lambda: _causal_conv(D),
    "recurrent": _gru,
    "attention": _attention,
    "group norm": lambda: Fn(lambda s, x: s.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.GroupNorm(2, D)),
    "bilinear": lambda: Fn(lambda s, x: s.b(x, x.cos()), b=nn.Bilinear(D, D, D)),
    "own operator": lambda: Fn(lambda s, x: Squared.apply(x, s.w), w=_p(D, D)),
    "shared thrice": _shared,
    "in place after": lambda: Fn(lambda s, x: s.n(s.a(x).add_(x).mul_(2)).mul_(2), a=_lin(), n=nn.LayerNorm(D)),
    "in part without gradient": lambda: Fn(lambda s, x: s.a(x) + s.a(x.detach()).detach(), a=_lin()),
    "flattened rows": lambda: Fn(lambda s, x: s.a(x.reshape(-1, D)).view_as(x), a=_lin()),
    "chunked in time": lambda: Fn(lambda s, x: torch.cat([s.a(part) for part in x.split(2, 1)], 1), a=_lin()),
    "checkpoint": lambda: Fn(lambda s, x: checkpoint(s.a, x, use_reentrant=False), a=nn.Sequential(_lin(), Rms())),
    "looped in a checkpoint": lambda: Fn(lambda s, x: checkpoint(s.a, x, use_reentrant=False), a=Experts()),
    "forward of its own": lambda: _patched(_lin()),
    "a hook on the module": lambda: _hooked(_lin()),
    "unused parameters": lambda: Fn(lambda s, x: s.a(x), a=_lin(), idle=_lin(), rest=_p(3)),
    "transposed head": lambda: Fn(lambda s, x: x @ s.w, w=_p(D, D)),
}  # fmt: skip
"""these the tape must give exactly"""

REFUSED: dict[str, Body] = {
    "rows permuted": lambda: Fn(lambda s, x: s.inner(x.roll(1, 0)).roll(-1, 0), inner=_lin()),
    "batch sorted": lambda: Fn(_sorted, inner=_lin()),
    "rows flipped, norm": lambda: Fn(lambda s, x: s.inner(x.flip(0)).flip(0), inner=Rms()),
    "time first": lambda: Swapped(D, D),
    "attention, time first": lambda: Fn(
        lambda s, x: s.mix(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1),
        mix=nn.MultiheadAttention(D, 2),
    ),
    "flattened, time first": lambda: Fn(
        lambda s, x: s.a(x.transpose(0, 1).reshape(-1, D)).view(x.shape[1], x.shape[0], D).transpose(0, 1), a=_lin()
    ),
    "images of one trajectory": lambda: Fn(_first_owns, project=_lin()),
    "mixed over the batch": lambda: Fn(lambda s, x: s.b(s.a(x) + s.a(x).mean(0)), a=_lin(), b=_lin()),
    "batch norm": lambda: Fn(lambda s, x: s.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(D)),
    "parametrized": _parametrized,
    "weight norm": lambda: parametrizations.weight_norm(_lin()),
    "chunks across rows": _flat_chunks,
    "chunks of rows": _row_chunks,
    "lent weight": _lent,
    "mean of a vector": lambda: Fn(lambda s, x: x.sin() * s.scale.mean(), scale=_p(D)),
    "once for all rows": lambda: Fn(lambda s, x: x + s.a(x.new_ones(1, 1, D)), a=_lin()),
    "copies of rows": lambda: Fn(lambda s, x: s.a(x.repeat(2, 1, 1)).unflatten(0, (2, -1)).mean(0), a=_lin()),
}  # fmt: skip
"""these it may refuse: by name, and method='loop' must then be right"""


def _zeroed(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight[::2] = 0
    return norm


def _patched(layer: nn.Linear) -> nn.Module:
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x.tanh())  # type: ignore[method-assign]
    return layer


def _hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, args, out: out * 2)
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return layer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tokens(n: int) -> Tensor:
    token = torch.randint(VOCABULARY, (n, STEPS), generator=torch.Generator().manual_seed(n))
    return torch.stack([row[torch.arange(STEPS) % (1 + i % STEPS)] for i, row in enumerate(token)])


def truth(model: nn.Module, token: Tensor, mask: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
    params = [p for p in model.parameters() if p.requires_grad]
    out = model(token)
    return score_sq_norms_loop(out, mask, params), weighted_gradient_loop(out, mask, c, params)


def taped(
    model: nn.Module, token: Tensor, mask: Tensor, c: Tensor, affine: bool, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    line = (c, 1 + c.square()) if affine else None
    with ScoreTape(model, **options) as tape:
        norm = tape.score_sq_norms(model(token), mask, affine=line)
        tape.backward(c if line is None else line[0] - 0.3 * line[1])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return norm, grads


def same(ours: tuple[Tensor, list[Tensor]], twin: tuple[Tensor, list[Tensor]]) -> bool:
    scale = max(float(g.abs().max()) for g in twin[1])
    gradient = all(near(b, allow=SUMMED, scale=scale) == a for a, b in zip(ours[1], twin[1], strict=True))
    return gradient and near(twin[0], allow=SUMMED, scale=0) == ours[0]


def _given(body: Body, n: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model = Net(body()).double()
    token, mask = tokens(n), (torch.arange(STEPS) >= 1).double().expand(n, STEPS)
    return model, token, mask, torch.linspace(-1, 1.3, n).double()


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
@pytest.mark.parametrize("n", [STEPS, 3])
@pytest.mark.parametrize("case", EXACT)
def test_exact(case: str, n: int, affine: bool) -> None:
    """Without the check: the rules themselves are right."""
    model, token, mask, c = _given(EXACT[case], n)
    weight = c - 0.3 * (1 + c.square()) if affine else c
    twin, plain = truth(model, token, mask, weight), model(token)
    with ScoreTape(model, unknown="loop"):
        assert torch.equal(model(token), plain), "another forward"
    assert same(taped(model, token, mask, c, affine, unknown="loop", verify="never"), twin)
    assert same(taped(model, token, mask, c, affine, unknown="loop", verify="always"), twin), "a false alarm changes it"


def test_reentrant_checkpoints_are_exact() -> None:
    """Against the same model with the other kind of checkpoint, whose gradients can be asked for one by one."""
    model, token, mask, c = _given(EXACT["checkpoint"], 3)
    twin = truth(model, token, mask, c - 0.3 * (1 + c.square()))
    model.body.function = lambda s, x: checkpoint(s.a, x, use_reentrant=True)
    assert same(taped(model, token, mask, c, True, verify="always"), twin)
    with pytest.raises(InputError, match="use_reentrant=False"):
        taped(model, token, mask, c, False, method="loop")


@pytest.mark.parametrize("n", [STEPS, 3])
@pytest.mark.parametrize("case", REFUSED)
def test_exact_or_refused_by_name_with_advice_that_works(case: str, n: int) -> None:
    model, token, mask, c = _given(REFUSED[case], n)
    twin = truth(model, token, mask, c)
    for unknown in ("error", "loop"):
        refusal, ours = "", twin
        try:
            ours = taped(model, token, mask, c, False, unknown=unknown)
        except InputError as error:
            refusal = str(error)
        assert same(ours, twin), "silently wrong"
        if refusal:
            assert "\n" not in refusal
            assert "method='loop'" in refusal or "unknown='loop'" in refusal
    assert same(taped(model, token, mask, c, False, method="loop"), twin)


def test_without_the_check_permuted_rows_would_be_wrong() -> None:
    """The check is what refuses: without it the answer is far off."""
    for case in ("rows permuted", "batch sorted", "images of one trajectory"):
        model, token, mask, c = _given(REFUSED[case], STEPS)
        assert not same(taped(model, token, mask, c, False, verify="never"), truth(model, token, mask, c)), case


# --- what is done to a model while a tape is open ---------------------------------------------------------------------


def test_copies_are_refused() -> None:
    model = Net(_lin()).double()
    with ScoreTape(model):
        for copied in (lambda: copy.deepcopy(model), lambda: pickle.dumps(model), lambda: copy.deepcopy(model.head)):
            with pytest.raises(InputError, match="copied or pickled while a ScoreTape is open"):
                copied()
    assert torch.equal(copy.deepcopy(model)(tokens(3)), model(tokens(3)))


def test_other_parameters_are_not_this_models() -> None:
    model, token, mask, _ = _given(_lin, 3)
    other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with ScoreTape(model) as tape:
        log_prob_ = torch.func.functional_call(model, other, (token,))
        with pytest.raises(InputError, match="no parameter of this tape"):
            tape.score_sq_norms(log_prob_, mask)
    moved = {name: p * 2 for name, p in model.named_parameters()}
    with ScoreTape(model) as tape:
        log_prob_ = torch.func.functional_call(model, moved, (token,))
        with pytest.raises(InputError, match=r"outside"):
            tape.score_sq_norms(log_prob_, mask)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_are_refused(kind: str) -> None:
    model = Net(_lin()).double()
    handle = getattr(model.head.weight, kind)(lambda x: None)
    with pytest.raises(InputError, match=r"head.weight has a gradient hook"):
        ScoreTape(model).__enter__()
    handle.remove()
    with ScoreTape(model):
        pass


def test_wrappers_inside_are_refused() -> None:
    inner = nn.DataParallel(_lin()) if not torch.cuda.is_available() else nn.DataParallel(_lin().cuda())
    with pytest.raises(InputError, match="its part body is wrapped in DataParallel"):
        ScoreTape(Net(inner)).__enter__()


def test_a_forward_before_the_with_is_named() -> None:
    model, token, mask, _ = _given(_lin, 3)
    early = model(token)
    with ScoreTape(model) as tape, pytest.raises(InputError, match="forward ran outside the `with`"):
        tape.score_sq_norms(early, mask)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_run_eager_inside_and_are_named_outside(whole: bool) -> None:
    model, token, mask, c = _given(lambda: nn.Sequential(_lin(), Rms()), 3)
    twin = truth(model, token, mask, c)
    if whole:
        compiled: Any = torch.compile(model, backend="aot_eager")
    else:
        compiled = model
        model.body.compile(backend="aot_eager")
    early = compiled(token)
    tape = ScoreTape(compiled)
    with pytest.warns(UserWarning, match="eager mode"):
        tape.__enter__()
    with pytest.raises(InputError, match="a compiled graph computed it"):
        tape.score_sq_norms(early, mask)
    norm = tape.score_sq_norms(compiled(token), mask)
    tape.backward(c)
    tape.__exit__(None, None, None)
    assert same((norm, [p.grad for p in model.parameters()]), twin)


# --- the check itself -------------------------------------------------------------------------------------------------


def test_the_first_pass_is_checked_and_then_one_in_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_bridge.scores import check as module

    model, token, mask, c = _given(_lin, 3)
    seen: list[int] = []
    real = module.check_norms
    monkeypatch.setattr(module, "check_norms", lambda *args: (seen.append(count), real(*args))[1])
    for count in range(203):  # noqa: B007
        with ScoreTape(model) as tape:
            tape.score_sq_norms(model(token), mask)
            tape.backward(c)
    assert seen == [0, 101, 202], "a prime: with two or ten micro-batches an update, not always the same one"


def test_a_wrong_gradient_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_bridge.scores import routes

    model, token, mask, c = _given(_lin, 3)
    real = routes.General.finish
    monkeypatch.setattr(routes.General, "finish", lambda self, c: real(self, c * torch.tensor([1.0, 1.02, 1.0])))
    with pytest.raises(InputError, match="take no step"):
        taped(model, token, mask, c, False)


# --- precision --------------------------------------------------------------------------------------------------------


def test_float16_with_a_scaler() -> None:
    """Gram products in float16 overflow; the scaled gradient is undone by the scaler."""
    model, token, mask, c = _given(lambda: nn.Sequential(_lin(), nn.LayerNorm(D), Rms()), 3)
    twin = truth(model, token, mask, c)
    model, scaler = model.float(), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaled = scaler.scale(c.float())
    with torch.autocast("cpu", torch.float16), ScoreTape(model, method="gram") as tape:
        norm = tape.score_sq_norms(model(token), mask, scale=scaler.get_scale())
        tape.backward(scaled)
    scaler.unscale_(optimizer)
    grads = [p.grad for p in model.parameters()]
    assert_near(norm.double(), twin[0], allow=HALF, scale=0)
    for ours, right in zip(grads, twin[1], strict=True):
        assert float((ours - right).norm()) == near(0.0, allow=HALF, scale=float(right.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_under_autocast(dtype: torch.dtype) -> None:
    model, token, mask, c = _given(lambda: nn.Sequential(_lin(), nn.LayerNorm(D), Rms(), nn.RMSNorm(D)), 3)
    model = model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(token)
        twin = score_sq_norms_loop(plain, mask, model.parameters())
        with ScoreTape(model, verify="always") as tape:
            again = model(token)
            assert torch.equal(again, plain)
            norm = tape.score_sq_norms(again, mask)
            tape.backward(c)
    assert_near(norm.float(), twin.float(), allow=BRAIN, scale=0)
