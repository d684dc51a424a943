"""A third set, by somebody who read neither the tape nor the first two: modules that remember, and odd ways to call.

What went wrong in silence is here (a cache handed to a module that is run twice, a cache that carries gradients past a
loop, statistics of a batch norm), and what crashed or was refused without need.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llm_bridge.scores import ScoreTape, score_sq_norms_loop, weighted_gradient_loop
from tests.llm_bridge.test_hostile_second import (
    SQUARE,
    VOCABULARY,
    D,
    Net,
    _lin,
    _p,
    _with,
    given,
    right_or_refused,
    same,
    taped,
    truth,
)
from vcposim.errors import InputError

BODIES = Callable[[], nn.Module]


class Cache:
    """What a decoder keeps from call to call: it grows, and says whether it has begun."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class Remembering(nn.Module):
    """Adds to the rows what the cache holds of earlier calls, and puts its own rows there; `mix` has no exact rule."""

    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.scale, self.mix = nn.Parameter(1 + _p(D)), nn.Parameter(_p(D, D)) if loop else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        y = x * self.scale
        y = y if self.mix is None else y + torch.einsum("ntd,df->ntf", x, self.mix)
        cache.kept.append(y)
        return sum(cache.kept)  # type: ignore[return-value]


class OneCache(nn.Module):
    """A cache made in the forward and handed to `layers` one after the other, each its own or one for all."""

    def __init__(self, loop: bool, layers: int = 1) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Remembering(loop) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        cache = Cache()
        for layer in self.layer:
            x = layer(x, cache=cache).tanh()
        return x


class Filling(nn.Module):
    """Leaves its rows in a dict that it was given, for a later layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(_p(D, D))

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        x = torch.einsum("ntd,df->ntf", x, self.mix).tanh()
        shared["rows"] = x
        return x


def _filled(s: Any, x: Tensor) -> Tensor:
    shared: dict[str, Tensor] = {}
    x = s.a(s.f(x, shared))
    return x + shared["rows"].sin() if shared else x


def _frozen_cast(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = s.w.float()
    return F.linear(x, frozen.to(x)) + x @ s.v


def _once_prompted(s: Any, x: Tensor) -> Tensor:
    prompt = s.e(torch.arange(2)).unsqueeze(0).expand(len(x), -1, -1)
    return torch.cat([prompt, x], 1).cumsum(1)[:, 2:].sin()


def _merged() -> nn.Module:
    layer = _lin()
    parametrize.register_parametrization(layer, "weight", Times())
    return layer


class Times(nn.Module):
    """A parametrization by a product of two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(_p(D, 2)), nn.Parameter(_p(2, D))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


EXACT: dict[str, BODIES] = {
    "cache, scale": lambda: OneCache(False),
    "cache, scale, two layers": lambda: OneCache(False, 2),
    "cache, loop": lambda: OneCache(True),
    "prompt embedded once": _with(_once_prompted, e=lambda: nn.Embedding(2, D)),
    "vmap of a product": _with(lambda s, x: torch.func.vmap(lambda row: (row @ s.w).tanh())(x), w=(D, D)),
    "part of a matrix": _with(lambda s, x: F.linear(F.linear(x, s.w[:5]).sin(), s.w[1:].t()[:, :5]), w=(6, D)),
    "parametrized by factors": _merged,
    "cast where no gradients go": _with(_frozen_cast, w=(D, D), v=(D, D)),
    "a map and its weight turned": _with(lambda s, x: F.linear(s.a(x).sin(), s.a.weight.t()), a=_lin),
    "a norm's scale borrowed": _with(
        lambda s, x: s.n(x) + F.layer_norm(x.sin(), (D,), s.n.weight), n=lambda: nn.LayerNorm(D)
    ),
}
EITHER: dict[str, BODIES] = {
    "part of a matrix, as long as the rows": _with(lambda s, x: F.linear(x, s.w[:D]).sin(), w=(D + 1, D)),
    "one cache through two loops": lambda: OneCache(True, 2),
    "a dict filled": _with(_filled, f=Filling, a=_lin),
    "vmap over a module": _with(lambda s, x: torch.func.vmap(lambda row: s.a(row).tanh())(x), a=_lin),
    "jvp over a module": _with(lambda s, x: torch.func.jvp(lambda y: s.a(y).tanh(), (x,), (2 * x,))[1], a=_lin),
}  # fmt: skip


@pytest.mark.parametrize("case", [*EXACT, *EITHER])
def test_exact_or_refused_with_advice_that_works(case: str) -> None:
    told = right_or_refused(lambda: given((EXACT | EITHER)[case], SQUARE), unknown="loop")
    assert case in EITHER or not told, told


@pytest.mark.parametrize("verify", ["always", "never"])
def test_a_cache_is_no_way_round_a_loop(verify: str) -> None:
    """Gradients that pass by a module's outputs would be lost, with the check's own: this must be seen by the tape."""
    with pytest.raises(InputError, match=r"body\.layer\.1: reads what an earlier call left behind"):
        taped(*given(lambda: OneCache(True, 2), SQUARE), False, unknown="loop", verify=verify)


def test_statistics_of_a_batch_norm_are_a_plain_calls() -> None:
    """They are written past every count of versions. (The norms are nobody's: the check says so.)"""

    def body() -> nn.Module:
        return _with(lambda s, x: s.b(x.mT).mT, b=lambda: nn.BatchNorm1d(D))()

    found = taped(*given(body, SQUARE), False, unknown="loop", verify="never")
    plain = truth(*given(body, SQUARE))
    assert all(torch.equal(a, b) for a, b in zip(found[3], plain[3], strict=True))


def test_inputs_that_carry_gradients_are_no_alarm() -> None:
    """A model given embeddings of its own making: the model alone sees none of their parameters."""
    model, token, mask, c = given(_lin, SQUARE)
    rest = nn.ModuleDict({"embed": model.embed, "rest": Rest(model)})

    def log_prob() -> Tensor:
        return rest["rest"](rest["embed"](token), token)

    params = [p for p in rest.parameters() if p.requires_grad]
    out = log_prob()
    twin = (out, score_sq_norms_loop(out, mask, params), weighted_gradient_loop(out, mask, c, params), [])
    tape = ScoreTape(rest["rest"], verify="always")
    with tape:
        again = log_prob()
        norm = tape.score_sq_norms(again, mask)
        tape.backward(c)
    assert not same((again, norm, [p.grad for p in params], []), twin)


class Rest(nn.Module):
    """A model from its embeddings on."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        logits = self.net.head(self.net.body(x.cumsum(1).sin()))
        return F.pad(logits[:, :-1].log_softmax(-1).gather(2, token[:, 1:, None]).squeeze(2), (1, 0))


class Telling(nn.Module):
    """A model that gives away its hidden states beside log pi, and an estimate made of them."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.value = net, _lin(1)

    def forward(self, token: Tensor) -> dict[str, Any]:
        hidden = self.net.body(self.net.embed(token).cumsum(1).sin())
        log_p = self.net.head(hidden).log_softmax(-1)
        out = F.pad(log_p[:, :-1].gather(2, token[:, 1:, None]).squeeze(2), (1, 0))
        return {"hidden": [hidden], "log_prob": out, "value": self.value(hidden).squeeze(2)}


@pytest.mark.parametrize("use", [["log_prob"], ["log_prob", "value"], ["log_prob", "hidden"]])
def test_what_a_model_gives_besides_is_no_alarm(use: list[str]) -> None:
    """log pi hangs on the hidden states through the logits alone: the gradient must not go back both ways."""
    net, token, mask, c = given(_lin, SQUARE)
    model = Telling(net).double()
    params = list(model.parameters())

    def log_prob() -> Tensor:
        out = model(token)
        return sum(out[k] if k != "hidden" else out[k][0].sin().sum(2) for k in use)  # type: ignore[return-value]

    out = log_prob()
    twin = (out, score_sq_norms_loop(out, mask, params), weighted_gradient_loop(out, mask, c, params), [])
    with ScoreTape(model, verify="always") as tape:
        again = log_prob()
        norm = tape.score_sq_norms(again, mask)
        tape.backward(c)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    assert not same((again, norm, grads, []), twin)


def test_norms_and_gradient_may_be_asked_for_without_gradients() -> None:
    model, token, mask, c = given(_lin, SQUARE)
    twin = truth(*given(_lin, SQUARE))
    with ScoreTape(model, verify="always") as tape:
        out = model(token)
        with torch.no_grad():
            norm = tape.score_sq_norms(out, mask)
            tape.backward(c)
        again = model(token)
        with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
            tape.score_sq_norms(again, mask)
    assert not same((out, norm, [p.grad for p in model.parameters()], []), twin)


def test_a_hook_put_on_after_the_tape_was_opened_is_refused() -> None:
    model, token, mask, _ = given(_lin, SQUARE)
    with ScoreTape(model) as tape:
        out = model(token)
        model.head.weight.register_hook(lambda g: 0 * g)
        with pytest.raises(InputError, match=r"head\.weight has a gradient hook"):
            tape.score_sq_norms(out, mask)


class Counting(nn.Module):
    """Keeps its own books in a list, a dict and a set, as mixtures of experts do for an auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scale = nn.Parameter(_p(D, D)), nn.Parameter(_p(D))
        self.load: list[int] = []
        self.calls, self.rows = {"n": 0}, set[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.load.append(len(x))
        self.calls["n"] += 1
        self.rows.add(len(x))
        return torch.einsum("ntd,df->ntf", x, self.mix) * self.scale


def test_books_that_a_module_keeps_are_a_plain_calls() -> None:
    model, *rest = given(Counting, SQUARE)
    taped(model, *rest, False, unknown="loop", verify="always")
    assert (model.body.load, model.body.calls, model.body.rows) == ([4], {"n": 1}, {4})


class Borrower(nn.Module):
    """A head that is the embedding's weight, its bias of its own; positions that are rows of another's weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.place, self.a, self.how = nn.Embedding(VOCABULARY, D), nn.Embedding(9, D), _lin(), how

    def forward(self, token: Tensor) -> Tensor:
        hidden = self.a(self.embed(token).cumsum(1).sin() + self.place.weight[: token.shape[1]])
        if self.how == "hidden":
            return hidden
        weight = self.embed.weight
        return F.linear(hidden, weight) if self.how == "linear" else hidden @ weight.t()


@pytest.mark.parametrize("how", ["linear", "matmul", "hidden"])
def test_borrowed_weights_take_no_loop(how: str) -> None:
    """In the model's forward or in the loss, in the first pass and in later ones, after a rehearsal or without."""
    _, token, mask, c = given(_lin, SQUARE)

    def log_prob(model: Borrower) -> Tensor:
        out = model(token)
        logits = F.linear(out, model.embed.weight) if how == "hidden" else out
        return F.pad(logits.log_softmax(-1)[:, :-1].gather(2, token[:, 1:, None]).squeeze(2), (1, 0))

    model = Borrower(how).double()
    params = list(model.parameters())
    out = log_prob(model)
    twin = (out, score_sq_norms_loop(out, mask, params), weighted_gradient_loop(out, mask, c, params), [])
    for _ in range(2):
        model.zero_grad()
        with ScoreTape(model, verify="always") as tape:
            again = log_prob(model)
            norm = tape.score_sq_norms(again, mask)
            tape.backward(c)
        assert not tape.loops
        assert not same((again, norm, [p.grad for p in params], []), twin)
