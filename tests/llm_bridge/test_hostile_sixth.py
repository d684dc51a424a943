"""A sixth set, of an outsider who wrote it while kernels and strays were changed: what was wrong.

Without a word, where nothing is compared (`verify="never"`): a gate of one number read by its place, which took every
trajectory's gradient for the first one's; a weight that is looked up and is also the right factor of a product; pieces
of an embedding along time, put together as rows; a cast of a parameter that is changed in place; a norm whose shift is
its scale; looped modules by `functional_call`. In any pass that is not compared: a plan made for one argument used for
another, or made while a parameter was constant; a factor that is zero in the kernel's type and in no wider one;
coefficients in half precision far off the line; parameters unfrozen in a looped module while the tape was open. By any
setting: a negative `padding_idx`; draws from Python's and NumPy's streams, or counts in containers, that a rehearsal
left behind. Tracebacks: a single token for all rows, token by token, integer coefficients, reentrant checkpoints in
loops, a forward deleted inside.

Known: a constant times a parameter with as many rows as there are trajectories, and a looped module that gives a row a
list entry or two views of one array, are told by a comparison alone. A plan does not see entries of configurations or
the size of data. A gate of one number in a power or softplus may differ in its last bit. A forward that writes to
`.data` of a parameter does so in rehearsals too.
"""

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from llm_bridge.scores import ScoreTape
from tests.kit.statistical import SINGLE, SUMMED, assert_near
from tests.llm_bridge.test_hostile_second import (
    LONG,
    SQUARE,
    VOCABULARY,
    D,
    Fn,
    _lin,
    _p,
    _with,
    given,
    right_or_refused,
    same,
    taped,
    tokens,
    truth,
)
from vcposim.errors import InputError

Case = Callable[[tuple[int, int]], tuple[nn.Module, Tensor, Tensor, Tensor]]


def _looked_up(function: Callable[..., Tensor], **part: Callable[[], object]) -> Case:
    """A model whose tokens are looked up by `function`."""

    def case(shape: tuple[int, int]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        model, *rest = given(_with(lambda s, x: s.a(x), a=_lin), shape)
        model.embed = Fn(function, **{k: make() for k, make in part.items()}).double()
        return model, *rest  # type: ignore[return-value]

    return case


def _gated(function: Callable[[Tensor], Tensor], *shape: int) -> Case:
    body = _with(lambda s, x: x + function(s.gate) * x.sin(), gate=lambda: _p(*shape) + 1)
    return lambda size: given(body, size)


def _table(width: int = D) -> nn.Module:
    return nn.Embedding(VOCABULARY, width)


def _soft(s: nn.Module, token: Tensor) -> Tensor:
    x = s.e(token).cumsum(1).sin()
    return x + s.r(x).softmax(-1) @ s.e.weight


CASES: dict[str, Case] = {
    "gate by its place": _gated(lambda gate: gate[0], 1),
    "gate by its last place": _gated(lambda gate: gate[-1], 1),
    "gate unbound": _gated(lambda gate: gate.unbind(0)[0], 1),
    "first row of a gate": _gated(lambda gate: gate[0], 1, D),
    "last row of a gate": _gated(lambda gate: gate[-1], 1, D),
    "flat gate": _gated(lambda gate: gate.flatten()[0], 1, 1, 1),
    "gate at the end of a list": _gated(lambda gate: torch.stack([gate, gate.detach()]).select(0, 0)[0], 1),
    "soft tokens": _looked_up(_soft, e=_table, r=lambda: nn.Linear(D, VOCABULARY)),
    "a table and its product": _looked_up(
        lambda s, token: s.r((s.e(token).cumsum(1).sin() @ s.e.weight).cos()),
        e=lambda: _table(VOCABULARY),
        r=lambda: nn.Linear(VOCABULARY, D),
    ),
    "padding from the end": _looked_up(lambda s, token: F.embedding(token, s.w, padding_idx=-1), w=lambda: _p(7, D)),
    "padding of another's table": _looked_up(
        lambda s, token: F.embedding(token, s.e.weight, padding_idx=2 - VOCABULARY) + s.e(token), e=_table
    ),
    "one kind for all": _looked_up(lambda s, token: s.e(token) + s.kind(torch.tensor(1)), e=_table, kind=_table),
    "two kinds for all": _looked_up(
        lambda s, token: s.e(token) + s.kind(torch.tensor(1)) * s.kind(torch.tensor(2)), e=_table, kind=_table
    ),
    "as many kinds as rows": _looked_up(
        lambda s, token: s.e(token) + torch.stack([s.kind(torch.tensor(k)) for k in range(len(token))]).prod(0),
        e=_table,
        kind=_table,
    ),
    "token by token": _looked_up(
        lambda s, token: torch.stack([torch.stack([s.e(each) for each in row]) for row in token]), e=_table
    ),
    "step by step": _looked_up(lambda s, token: torch.stack([s.e(step) for step in token.unbind(1)], 1), e=_table),
    "row by row": _looked_up(lambda s, token: torch.stack([s.e(row) for row in token]), e=_table),
}


def _body(function: Callable[..., Tensor], **part: Any) -> Case:
    return lambda size: given(_with(function, **part), size)


def _written(change: Callable[[Tensor], Any], made: Callable[[Tensor], Tensor], *shape: int) -> Case:
    """A scale, or a square weight, made of a parameter and then written to."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        value = made(s.w)
        change(value)
        return F.linear(x, value) if len(shape) == 2 else F.layer_norm(x, shape, value)

    return _body(forward, w=shape)


class Block(nn.Sequential):
    pass


def _lent(s: nn.Module, x: Tensor) -> Tensor:
    return functional_call(s.b, {k: p + (p - p.detach()) for k, p in s.b.named_parameters()}, (x,))


def _head_in_chunks(s: nn.Module, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    return torch.cat([s.a(rows[k : k + len(x)]) for k in range(0, len(rows), len(x))]).view_as(x)


def _twice_in_each_chunk(s: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([s.a(s.a(part).sin()) for part in x.split(1)])


CASES |= {
    "twice in each chunk": _body(_twice_in_each_chunk, a=_lin),
    "as many tokens at a time as rows": _body(_head_in_chunks, a=_lin),
    "nothing goes in": _body(lambda s, x: x + s.a(x[..., :0]), a=lambda: nn.Linear(0, D)),
    "nothing comes out": _body(lambda s, x: x + s.a(x).sum(-1, keepdim=True), a=lambda: nn.Linear(D, 0)),
    "masked cast": _written(lambda v: v.masked_fill_(torch.eye(D).bool(), 0), lambda w: 1 + w, D, D),
    "row of a cast": _written(lambda v: v[0].mul_(0), lambda w: w + 1, D, D),
    "cast and sum in place": _written(lambda v: v.mul_(2).add_(1), lambda w: w + 1, D, D),
    "summed in place": _written(lambda v: v.add_(1), lambda w: w + 1, D, D),
    "clamped scale in place": _written(lambda v: v.clamp_(max=0.9), lambda w: 1 + w, D),
    "shift that is the scale": _body(lambda s, x: F.layer_norm(x, (D,), s.w, s.w), w=(D,)),
    "a number for all rows": _body(lambda s, x: x * s.a(x).exp(), a=lambda: Fn(lambda s, x: (x * s.w).mean(), w=_p(D))),
    "lent parameters": _body(_lent, b=lambda: Block(_lin(), nn.Tanh())),
}


@pytest.mark.parametrize("verify", ["first", "never"])
@pytest.mark.parametrize("shape", [SQUARE, LONG, (1, 3), (5, 1)], ids=["square", "long", "one row", "one step"])
@pytest.mark.parametrize("case", CASES)
def test_exact_or_refused_with_advice_that_works(case: str, shape: tuple[int, int], verify: str) -> None:
    right_or_refused(lambda: CASES[case](shape), unknown="loop", verify=verify)


@pytest.mark.parametrize("case", ["soft tokens", "a table and its product", "padding from the end", "row by row"])
def test_these_are_exact(case: str) -> None:
    assert not right_or_refused(lambda: CASES[case](LONG), verify="always")


@pytest.mark.parametrize("verify", ["first", "never"])
def test_parameters_lent_to_a_looped_module(verify: str) -> None:
    assert not right_or_refused(lambda: CASES["lent parameters"](LONG), unknown="loop", loop=["Block"], verify=verify)


# --- plans ------------------------------------------------------------------------------------------------------------


class Way(nn.Module):
    """Scales, or adds a mean of its scale, as an argument says; its own number may say it too."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.own = nn.Parameter(_p(D)), 0

    def forward(self, x: Tensor, mode: Any = 0) -> Tensor:
        return x * self.w if self.own + float(mode) == 0 else x.sin() * self.w.mean() + x


@pytest.mark.parametrize("other", [1, 1.0, True, "1"], ids=repr)
@pytest.mark.parametrize("how", ["argument", "keyword", "attribute"])
def test_a_plan_is_of_one_way_alone(how: str, other: Any) -> None:
    """Among them those that are equal and of another type."""

    def run(s: nn.Module, x: Tensor) -> Tensor:
        if how == "attribute":
            s.a.own = float(s.mode)
            return s.a(x)
        return s.a(x, s.mode) if how == "argument" else s.a(x, mode=s.mode)

    model, token, mask, c = given(_with(run, a=Way), LONG)
    for mode in (0, other, 0):
        model.body.mode = mode
        model.zero_grad()
        right = truth(model, token, mask, c)
        assert not same(taped(model, token, mask, c, False, unknown="loop"), right)


def test_plans_of_a_number_that_changes_do_not_pile_up() -> None:
    model, token, mask, c = given(_with(lambda s, x: s.a(x, s.mode), a=Way), LONG)
    for mode in range(70):
        model.body.mode = mode
        taped(model, token, mask, c, False, unknown="loop", verify="never")
    from llm_bridge.scores.plan import _FORMS, _PLANS

    assert 1 <= len(_PLANS[model.body.a]) <= _FORMS


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [lambda x: x[:, :-1], lambda x: x.split(3, 1)[0], lambda x: x.mT.contiguous().mT])
@pytest.mark.parametrize("product", [lambda x, w: x @ w.t(), F.linear, lambda x, w: x @ w])
def test_products_of_parts_have_the_bits_of_the_models(product: Any, part: Any, kind: torch.dtype) -> None:
    """By a weight of its own, or another's; torch multiplies them otherwise where the weight requires no gradient."""
    for borrowed in (False, True):
        wide: dict[str, Any] = {"a": lambda: nn.Linear(37, 37)} if borrowed else {"w": (37, 37)}

        def run(s: nn.Module, x: Tensor, borrowed: bool = borrowed) -> Tensor:
            y = part(s.up(x))
            z = product(y, s.a.weight if borrowed else s.w).sin()
            return s.down(F.pad(z, (0, 0, 0, x.shape[1] - z.shape[1])))

        parts: dict[str, Any] = {"up": lambda: nn.Linear(D, 37), "down": lambda: nn.Linear(37, D)}
        model, token, mask, c = given(_with(run, **parts, **wide), (5, 9))
        model.to(kind)
        plain = model(token)
        for _ in range(2):
            with ScoreTape(model, unknown="loop") as tape:
                out = model(token)
                assert torch.equal(out, plain)
                tape.score_sq_norms(out, mask.to(kind))
                tape.backward(c.to(kind))


def test_a_norm_with_dropout_is_not_looped_over() -> None:
    """Draws of a rehearsal are put back before the next one, or two runs of the same would differ."""
    body = _with(lambda s, x: F.dropout(x * s.w, 0.5), w=(D,))
    assert not right_or_refused(lambda: given(body, LONG), verify="never")


@pytest.mark.parametrize(
    "made",
    [lambda w: w * (w >= w.mean(0)), lambda w: w.sort(0)[0], lambda w: w / w.detach().mean(0), lambda w: w.flip(0)],
    ids=["pruned", "sorted", "normed", "turned"],
)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_plan_made_of_equal_numbers_holds_for_others(made: Callable[[Tensor], Tensor], start: float) -> None:
    model, token, mask, c = given(
        _with(lambda s, x: x * made(s.w + 1), w=lambda: nn.Parameter(torch.full((D,), start))), LONG
    )
    for _ in range(2):
        model.zero_grad()
        right = truth(model, token, mask, c)
        assert not same(taped(model, token, mask, c, False, unknown="loop"), right)
        with torch.no_grad():
            model.body.w.add_(torch.linspace(0.5, -0.5, D))


# --- traces -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Count:
    n: int = 0


def _drawn(s: nn.Module) -> dict[str, float]:
    """A number from each stream, and from each count after it is raised."""
    s.tensor += 1
    s.nested["deep"][0] += 1
    s.queue.append(1)
    s.space.n += 1
    s.data.n += 1
    s.pair[0].append(1)
    return {
        "python": random.random(),
        "numpy": float(np.random.rand()),  # noqa: NPY002 - what a model may draw from
        "own": s.own.random(),
        "own of numpy": float(s.rng.random()),
        "old of numpy": float(s.old.rand()),
        "own of torch": float(torch.rand((), generator=s.stream)),
        "tensor": float(s.tensor),
        "nested": s.nested["deep"][0],
        "queue": len(s.queue),
        "namespace": s.space.n,
        "dataclass": s.data.n,
        "pair": len(s.pair[0]),
    }


@dataclasses.dataclass
class Out:
    x: Tensor


class Hides(nn.Module):
    """Scales by entries that have to do with each other, and gives the result in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.how = nn.Parameter(_p(D) + 1), how

    def forward(self, x: Tensor, into: list[Tensor] | None = None) -> Any:
        y = x * (self.w * (self.w >= self.w.mean(0)))
        if self.how == "dataclass":
            return Out(y)
        if self.how == "generator":
            return (each for each in [y])
        if self.how in ("attribute", "attribute and input"):
            self.kept = y
        elif self.how == "attribute of a list":
            self.kept = [y]
        elif into is not None:
            into.append(y)
        return x if self.how.endswith("and input") else None


def _unhidden(s: nn.Module, x: Tensor) -> Tensor:
    into: list[Tensor] = []
    out = s.a(x, into) if s.a.how.startswith("list") else s.a(x)
    if s.a.how == "dataclass":
        return out.x  # type: ignore[no-any-return]
    if s.a.how == "generator":
        return next(out)
    return (s.a.kept[0] if s.a.how.endswith("of a list") else s.a.kept) if "attribute" in s.a.how else into[0]


HIDDEN = ["dataclass", "generator", "attribute", "attribute and input", "attribute of a list", "list", "list and input"]


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("verify", ["first", "never"])
def test_results_that_nobody_sees_are_exact_or_refused(how: str, verify: str) -> None:
    right_or_refused(lambda: given(_with(_unhidden, a=lambda: Hides(how)), LONG), unknown="loop", verify=verify)


def _traced() -> nn.Module:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        s.seen = _drawn(s)
        return x * s.w * (1 + 0.01 * sum(s.seen.values()))

    module = Fn(forward, w=_p(D), tensor=0)
    module.tensor, module.nested, module.queue = torch.zeros(()), {"deep": [0]}, deque(maxlen=99)
    module.space, module.data, module.pair = SimpleNamespace(n=0), Count(), ([],)
    module.own, module.rng, module.stream = random.Random(0), np.random.default_rng(0), torch.Generator().manual_seed(0)
    module.old = np.random.RandomState(0)
    return module


@pytest.mark.parametrize("options", [{}, {"loop": ["Fn"]}, {"method": "loop"}], ids=str)
def test_runs_that_a_plain_call_would_not_make_leave_no_trace(options: dict[str, Any]) -> None:
    """Two forwards, the second after a compared pass: each draws and counts as without a tape."""
    found = []
    for with_tape in (False, True):
        model, token, mask, c = given(_traced, LONG)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        drawn = []
        for _ in range(2):
            if with_tape:
                with ScoreTape(model, unknown="loop", **options) as tape:
                    tape.score_sq_norms(model(token), mask)
                    tape.backward(c)
            else:
                model(token)
            drawn.append(model.body.seen)
        found.append(drawn)
    assert found[0] == found[1]


# --- the line, and what changes while the tape is open ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["fused", "block", "gram", "auto"])
@pytest.mark.parametrize("small", [0.0, -150.0, -700.0])
def test_a_factor_that_is_zero_in_the_operands_type(small: float, method: str) -> None:
    """Memory that was used before shows where a sum is not begun."""
    model, token, mask, _ = given(_with(lambda s, x: s.a(x), a=_lin), (4, 6))
    model.float()
    reward = torch.tensor([1.0, 0, 1, 0]).double()
    for all_small in (False, True):
        weight = torch.tensor([small, 0, small if all_small else 0, 0]).double().exp()
        c = weight * (reward - 0.4)
        model.zero_grad()
        right = truth(model, token, mask.float(), c.float())
        for value in (1e30, float("nan")):
            model.zero_grad()
            for size in (16, 28, 128):
                junk = [torch.full((size,), value) for _ in range(50)]
                del junk
            with ScoreTape(model, method=method, verify="never") as tape:
                tape.score_sq_norms(model(token), mask.float(), affine=(weight * reward, weight))
                tape.backward(c)
            for p, g in zip(model.parameters(), right[2], strict=True):
                assert p.grad is not None
                assert_near(p.grad, g, allow=SINGLE, scale=float(g.abs().max()) + float(c.abs().max()))


def test_integers_are_coefficients() -> None:
    model, token, mask, _ = given(_with(lambda s, x: s.a(x), a=_lin), LONG)
    c, one = torch.tensor([2, -1, 0]), torch.ones(3, dtype=torch.long)
    right = truth(model, token, mask, c.double())
    with ScoreTape(model) as tape:
        norm = tape.score_sq_norms(out := model(token), mask, affine=(c + one, one))
        tape.backward(c)
    assert not same((out.detach(), norm, [p.grad for p in model.parameters()], []), right)  # type: ignore[misc]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_excuse_for_other_coefficients(kind: torch.dtype) -> None:
    model, token, mask, _ = given(_with(lambda s, x: s.a(x), a=_lin), LONG)
    reward, weight = torch.tensor([0.3, 1.0, 0.5]).double(), torch.tensor([0.5, 1.5, 0.9]).double()
    for off, refused in ((0.0, False), (0.3, True)):
        with ScoreTape(model, verify="never") as tape:
            tape.score_sq_norms(model(token), mask, affine=(weight * reward, weight))
            c = (weight * (reward - 0.4) + off * torch.tensor([1.0, 0, 0])).to(kind)
            if refused:
                with pytest.raises(InputError, match="use the same u and v"):
                    tape.backward(c)
            else:
                tape.backward(c)


@pytest.mark.parametrize("verify", ["first", "never"])
@pytest.mark.parametrize("change", ["unfreeze", "add", "replace"])
def test_parameters_of_a_looped_module_that_come_while_the_tape_is_open(change: str, verify: str) -> None:
    model, token, mask, _ = given(_with(lambda s, x: s.b(x) + s.b.extra, b=lambda: Block(_lin(), nn.Tanh())), LONG)
    block = model.body.b
    block.register_parameter("extra", None)
    model.body.function = lambda s, x: s.b(x)
    block[0].weight.requires_grad_(change != "unfreeze")
    with ScoreTape(model, unknown="loop", loop=["Block"], verify=verify) as tape:
        if change == "unfreeze":
            block[0].weight.requires_grad_(True)
        elif change == "replace":
            block[0].weight = nn.Parameter(block[0].weight.detach().clone())
        else:
            block[1] = nn.Linear(D, D).double()
        with pytest.raises(InputError, match="while the tape was open; open it after"):
            tape.score_sq_norms(model(token), mask)


def test_a_weight_frozen_before_the_forward_has_no_norm() -> None:
    model, token, mask, c = given(_with(lambda s, x: s.a(x), a=_lin), LONG)
    for part in (model.body.a.weight, model.body.a.bias, model.embed.weight):
        with ScoreTape(model, verify="never") as tape:
            part.requires_grad_(False)
            norm = tape.score_sq_norms(model(token), mask)
            tape.backward(c)
        right = truth(model, token, mask, c)
        assert_near(norm, right[1], allow=SUMMED, scale=float(right[1].max()))
        part.requires_grad_(True)


def test_a_forward_set_or_deleted_inside_stays_so() -> None:
    model, token, *_ = given(_with(lambda s, x: s.b(x), b=lambda: Block(_lin(), nn.Tanh())), LONG)
    before = dict(model.body.b[0].__dict__), model(token)
    with ScoreTape(model):
        del model.body.b[0].__dict__["forward"]
        model.embed.forward = mine = lambda token: F.embedding(token, model.embed.weight)
    assert model.body.b[0].__dict__.keys() == before[0].keys()
    assert model.embed.forward is mine
    assert "forward" not in model.head.__dict__
    assert torch.equal(model(token), before[1])


def test_a_reentrant_checkpoint_in_a_loop_is_named() -> None:
    model, token, mask, _ = given(
        _with(lambda s, x: x @ s.w.softmax(0) + checkpoint(s.a, x, use_reentrant=True), a=_lin, w=(D, D)), LONG
    )
    with (
        ScoreTape(model, unknown="loop", verify="never") as tape,
        pytest.raises(InputError, match="use_reentrant=False"),
    ):
        tape.score_sq_norms(model(token), mask)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_segments_of_any_integers(kind: torch.dtype) -> None:
    model, *_ = given(_with(lambda s, x: s.a(x), a=_lin), LONG)
    token, mask = tokens(1, 7), torch.ones(1, 7).double()
    norms = []
    for of in (torch.int64, kind):
        with ScoreTape(model, verify="never") as tape:
            segment = torch.tensor([[0, 0, 0, 1, 1, 2, 2]]).to(of)
            norms.append(tape.score_sq_norms(model(token), mask, segment=segment))
            tape.backward(torch.ones(3))
    assert torch.equal(*norms)


def test_segments_that_are_none() -> None:
    model, *_ = given(_with(lambda s, x: s.a(x), a=_lin), LONG)
    token, mask = tokens(1, 7), torch.ones(1, 7).double()
    for segment, why in ((torch.zeros(1, 7), "give ids as integers"), (-torch.ones(1, 7).long(), "leave such a batch")):
        with ScoreTape(model) as tape, pytest.raises(InputError, match=why):
            tape.score_sq_norms(model(token), mask, segment=segment)


@pytest.mark.parametrize("case", ["norm", "cast"])
def test_bfloat16_parameters_in_a_float32_model_are_no_alarm(case: str) -> None:
    def run(s: nn.Module, x: Tensor) -> Tensor:
        return s.a(x.bfloat16()).to(x.dtype) if case == "norm" else F.linear(x, s.w.to(x.dtype))

    for seed in range(8):
        torch.manual_seed(seed)
        part: dict[str, Any] = {"a": lambda: nn.LayerNorm(D)} if case == "norm" else {"w": (D, D)}
        model, token, mask, c = given(_with(run, **part), LONG)
        model.float().body.bfloat16()
        with ScoreTape(model, unknown="loop", verify="always") as tape:
            tape.score_sq_norms(model(token), mask.float())
            tape.backward(c.float())


# --- what one pass teaches the next -----------------------------------------------------------------------------------


def _flat(s: nn.Module, x: Tensor, size: int = 4) -> Tensor:
    return torch.cat([s.a(part) for part in x.flatten(0, 1).split(size)]).view_as(x)


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "whole": lambda s, x: s.a(x),
    "flat": _flat,
    "flat by rows": lambda s, x: _flat(s, x, len(x)),
    "rows": lambda s, x: torch.stack([s.a(row) for row in x]),
    "chunks": lambda s, x: torch.cat([s.a(part) for part in x.split(2)]),
    "twice in chunks": lambda s, x: torch.cat([s.a(s.a(part)) for part in x.split(2)]),
    "steps": lambda s, x: torch.stack([s.a(x[:, k]) for k in range(x.shape[1])], 1),
}


@pytest.mark.parametrize("layer", [_lin, lambda: nn.LayerNorm(D)], ids=["linear", "norm"])
@pytest.mark.parametrize("shape", [(3, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_a_second_way_is_exact_or_refused(first: str, second: str, shape: tuple[int, int], layer: Any) -> None:
    """The first pass is compared, the second is not."""
    if {first, second} == {"flat by rows", "steps"}:
        pytest.skip("calls of equal shapes and number, which no pass can tell from each other")
    model, token, mask, c = given(_with(lambda s, x: WAYS[s.way](s, x), a=layer), shape)
    for way in (first, second):
        model.body.way = way
        model.zero_grad()
        right = truth(model, token, mask, c)
        try:
            assert not same(taped(model, token, mask, c, False), right)
        except InputError as error:
            assert "method='loop'" in str(error)  # noqa: PT017 - the other half of either


def test_pieces_stay_pieces_where_there_are_as_many_tokens_as_rows() -> None:
    """Chunks of four tokens: of three rows, and then of four, compared and not."""
    model, *_ = given(_with(_flat, a=_lin), LONG)
    for rows in (3, 4, 4, 3, 4):
        token, mask, c = tokens(rows, 6), torch.ones(rows, 6).double(), torch.linspace(-1, 1.3, rows).double()
        model.zero_grad()
        right = truth(model, token, mask, c)
        assert not same(taped(model, token, mask, c, False), right)


def test_a_looped_module_may_be_called_on_nothing() -> None:
    def run(s: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([s.b(x[:1]), s.b(x[1:])])

    for shape in ((1, 3), (3, 6)):
        right_or_refused(
            lambda shape=shape: given(_with(run, b=lambda: Block(_lin(), nn.Tanh())), shape), loop=["Block"]
        )


def test_a_tape_of_other_parameters_does_not_end_the_search_for_borrowers() -> None:
    model, token, mask, c = given(_with(lambda s, x: s.a(x), a=_lin), LONG)
    model.head = Fn(lambda s, x: F.linear(x, model.embed.weight))
    with ScoreTape(model, parameters=model.body.parameters()) as tape:
        tape.score_sq_norms(model(token), mask)
    model.zero_grad()
    right = truth(model, token, mask, c)
    for _ in range(2):
        model.zero_grad()
        assert not same(taped(model, token, mask, c, False), right)
