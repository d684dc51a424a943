"""Rows in chunks: a model, a part of it or a loss that is run on some of the rows after the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_bridge.scores import ScoreTape, score_sq_norms_loop, weighted_gradient_loop
from llm_bridge.scores.chunks import Piece, Place, gathered
from llm_bridge.scores.layout import Layout
from tests.llm_bridge.test_hostile_second import (
    VOCABULARY,
    Answer,
    D,
    Net,
    _lin,
    _with,
    obedient,
    same,
    tokens,
    truth,
)
from vcposim.errors import InputError

Chunks = Callable[[Net, Tensor], Tensor]
LATER, SQUARE = (5, 6), (4, 4)
"""five rows, so that the last chunk of two is one row; and rows as many as steps"""


class Chunked(nn.Module):
    """Log pi of each token, by a function of a net and the tokens; `call`: who calls it, a model or a training loop."""

    def __init__(self, chunks: Chunks, body: Callable[[], nn.Module] = _lin, tied: bool = False) -> None:
        super().__init__()
        self.net, self.chunks = Net(body(), nn.Linear(D, VOCABULARY, bias=not tied)), chunks
        if tied:
            self.net.head.weight = self.net.embed.weight

    def forward(self, token: Tensor) -> Tensor:
        return self.chunks(self.net, token)


def _chosen(logits: Tensor, token: Tensor) -> Tensor:
    return F.pad(logits[:, :-1].log_softmax(-1).gather(2, token[:, 1:, None]).squeeze(2), (1, 0))


def _hidden(net: Net, token: Tensor) -> Tensor:
    return net.body(net.embed(token).cumsum(1).sin())  # type: ignore[no-any-return]


def _by_rows(size: int) -> Chunks:
    return lambda net, token: torch.cat([net(part) for part in token.split(size)])


def _each_row(net: Net, token: Tensor) -> Tensor:
    logits = [net.head(net.body(net.embed(row).cumsum(0).sin())) for row in token]
    return _chosen(torch.stack(logits), token)


def _head(net: Net, token: Tensor) -> Tensor:
    return _chosen(torch.cat([net.head(part) for part in _hidden(net, token).split(2)]), token)


def _head_of_tokens(net: Net, token: Tensor) -> Tensor:
    flat = _hidden(net, token).flatten(0, 1)
    return _chosen(torch.cat([net.head(part) for part in flat.split(7)]).view(*token.shape, -1), token)


def _head_of_rows(net: Net, token: Tensor) -> Tensor:
    return _chosen(torch.stack([net.head(row) for row in _hidden(net, token)]), token)


def _by_step(net: Net, token: Tensor) -> Tensor:
    return _chosen(torch.stack([net.head(x) for x in _hidden(net, token).unbind(1)], 1), token)


def _body(net: Net, token: Tensor) -> Tensor:
    x = net.embed(token).cumsum(1).sin()
    return _chosen(net.head(torch.cat([net.body(part) for part in x.split(2)])), token)


def _filled_in(net: Net, token: Tensor) -> Tensor:
    out = torch.zeros(*token.shape, dtype=torch.float64)
    for start in range(0, len(token), 2):
        out[start : start + 2] = net(token[start : start + 2])
    return out


def _checkpointed(reentrant: bool) -> Chunks:
    def chunks(net: Net, token: Tensor) -> Tensor:
        x = net.embed(token).cumsum(1).sin()
        parts = [checkpoint(lambda y: net.head(net.body(y)), part, use_reentrant=reentrant) for part in x.split(2)]
        return _chosen(torch.cat(parts), token)

    return chunks


def _borrowed_head(net: Net, token: Tensor) -> Tensor:
    parts = [F.linear(part, net.embed.weight) for part in _hidden(net, token).split(2)]
    return _chosen(torch.cat(parts), token)


def _every_other(net: Net, token: Tensor) -> Tensor:
    order = torch.arange(len(token))
    order = torch.cat([order[::2], order[1::2]])
    return torch.cat([net(token[::2]), net(token[1::2])])[order.argsort()]


_CONV = _with(lambda s, x: s.c(F.pad(x.mT, (2, 0))).mT, c=lambda: nn.Conv1d(D, D, 3))
_POSITIONS = _with(lambda s, x: x + s.p(torch.arange(x.shape[1])), p=lambda: nn.Embedding(9, D))
_NORMS = _with(
    lambda s, x: s.n(x) * s.g + s.r(x) + s.p[: x.shape[1]],
    n=lambda: nn.LayerNorm(D),
    r=lambda: nn.RMSNorm(D),
    g=(D,),
    p=(9, D),
)
_TWICE = _with(lambda s, x: s.a(s.a(x).sin()), a=_lin)

EXACT: dict[str, Callable[[], Chunked]] = {
    "model by two rows": lambda: Chunked(_by_rows(2)),
    "model by three rows": lambda: Chunked(_by_rows(3)),
    "model by one row": lambda: Chunked(_by_rows(1)),
    "model by two rows, tied": lambda: Chunked(_by_rows(2), tied=True),
    "model by one row, tied": lambda: Chunked(_by_rows(1), tied=True),
    "model by two rows, positions": lambda: Chunked(_by_rows(2), _POSITIONS),
    "model by two rows, norms": lambda: Chunked(_by_rows(2), _NORMS),
    "model by two rows, a loop in it": lambda: Chunked(_by_rows(2), _CONV),
    "model by one row, a loop in it": lambda: Chunked(_by_rows(1), _CONV),
    "each row without its axis": lambda: Chunked(_each_row),
    "filled in": lambda: Chunked(_filled_in),
    "body": lambda: Chunked(_body, _NORMS),
    "body that is looped over": lambda: Chunked(_body, _CONV),
    "head": lambda: Chunked(_head),
    "head, tied": lambda: Chunked(_head, tied=True),
    "head by the embedding's weight": lambda: Chunked(_borrowed_head),
    "head of tokens": lambda: Chunked(_head_of_tokens),
    "head of each row": lambda: Chunked(_head_of_rows),
    "head of each step": lambda: Chunked(_by_step),
    "checkpoints": lambda: Chunked(_checkpointed(False)),
}
EITHER: dict[str, Callable[[], Chunked]] = {
    "a layer twice in each chunk": lambda: Chunked(_by_rows(2), _TWICE),
    "every other row": lambda: Chunked(_every_other),
}


def _given(case: str, shape: tuple[int, int]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = (EXACT | EITHER)[case]().double()
    mask = (torch.arange(shape[1]) >= 1).double().repeat(shape[0], 1)
    mask[1] = 0
    return model, tokens(*shape), mask, torch.linspace(-1, 1.3, shape[0]).double()


def _taped(
    model: nn.Module,
    token: Tensor,
    mask: Tensor,
    c: Tensor,
    affine: bool,
    run: Callable[[nn.Module, Tensor], Tensor] | None = None,
    **options: Any,
) -> Answer:
    v = 1 + c.square()
    for p in model.parameters():
        p.grad = None
    with ScoreTape(model, **options) as tape:
        out = model(token) if run is None else run(model, token)
        norm = tape.score_sq_norms(out, mask, affine=(c + 0.3 * v, v) if affine else None)
        tape.backward(c)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return out.detach(), norm, grads, list(model.buffers())


@pytest.mark.parametrize("shape", [LATER, SQUARE], ids=["uneven", "square"])
@pytest.mark.parametrize("case", [*EXACT, *EITHER])
def test_exact_or_refused_with_advice_that_works(case: str, shape: tuple[int, int]) -> None:
    twin = truth(*_given(case, shape))
    for affine in (False, True):

        def answer(affine: bool = affine, **options: Any) -> Answer:
            return _taped(*_given(case, shape), affine, **options)

        found, told = obedient(answer, unknown="loop")
        assert not same(found, twin), told
        alike = shape == SQUARE and "each row" in case  # the tokens of one row look like one token of each
        assert case in EITHER or alike or not told, told


@pytest.mark.parametrize("body", [_lin, _TWICE, _NORMS, _CONV])
@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 4, 1], [1] * 6])
def test_a_training_loop_may_run_the_model_in_chunks(body: Callable[[], nn.Module], sizes: list[int]) -> None:
    """Also one that uses a layer twice in each, and chunks cut to the length of their longest row."""
    for length in ([6] * len(sizes), [4, 6, 5, 6, 6, 4][: len(sizes)]):
        torch.manual_seed(0)
        model, token = Net(body()).double(), tokens(6, 6)
        mask = torch.zeros(6, 6).double()
        for rows, steps in zip(torch.arange(6).split(sizes), length, strict=True):
            mask[rows, 1:steps] = 1
        c = torch.linspace(-1, 1.3, 6).double()

        def run(model: nn.Module, token: Tensor, length: list[int] = length) -> Tensor:
            parts = zip(token.split(sizes), length, strict=True)
            return torch.cat([F.pad(model(part[:, :steps]), (0, 6 - steps)) for part, steps in parts])

        out = run(model, token)
        params = list(model.parameters())
        expected = score_sq_norms_loop(out, mask, params), weighted_gradient_loop(out, mask, c, params)
        for affine in (False, True):
            found = _taped(model, token, mask, c, affine, run, unknown="loop")
            assert not same(found, (out.detach(), *expected, [])), affine


def test_reentrant_checkpoints_of_chunks_are_refused_with_advice_that_works() -> None:
    model, *rest = _given("head", LATER)
    twin = truth(*_given("head", LATER))
    model.chunks = _checkpointed(True)
    with pytest.raises(InputError, match="give use_reentrant=False"):
        _taped(model, *rest, False)
    model.chunks = _checkpointed(False)
    assert not same(_taped(model, *rest, False), twin)


def test_what_was_tokens_of_a_row_stays_that_where_rows_are_as_many() -> None:
    """A head run on each row: the check sees the first batch, and a later one has as many rows as steps."""
    torch.manual_seed(0)
    model = Chunked(_head_of_rows).double()
    for shape in (LATER, (6, 6), SQUARE):
        rest = tokens(*shape), torch.ones(shape).double(), torch.linspace(-1, 1.3, shape[0]).double()
        assert not same(_taped(model, *rest, False), truth(model, *rest)), shape


def test_rows_that_first_come_one_by_one_where_they_are_as_many_as_steps() -> None:
    """No pass that was compared has seen them so: refused, and the pass is compared, or taken by a loop, as asked."""
    for heads, advice in ((_by_step, {"verify": "always"}), (_head_of_rows, {"method": "loop"})):
        torch.manual_seed(0)
        model = Chunked(lambda net, token: _chosen(net.head(_hidden(net, token)), token)).double()

        def of(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
            return tokens(*shape), torch.ones(shape).double(), torch.linspace(-1, 1.3, shape[0]).double()

        _taped(model, *of((SQUARE[0], LATER[1])), False)  # another number of rows would be compared anew
        model.chunks = heads
        with pytest.raises(InputError, match=r"net\.head: sees shape .* verify='always', or use .*method='loop'"):
            _taped(model, *of(SQUARE), False, verify="never")
        assert not same(_taped(model, *of(SQUARE), False, **advice), truth(model, *of(SQUARE)))


def test_pieces_of_another_size_are_compared() -> None:
    """Steps of all rows, or tokens in a row: a head in chunks of time has one chunk at first, and later two."""

    def by_time(net: Net, token: Tensor) -> Tensor:
        parts = _hidden(net, token).split(4, 1)
        logits = [net.head(part.flatten(0, 1)).view(*part.shape[:2], -1) for part in parts]
        return _chosen(torch.cat(logits, 1), token)

    def in_a_row(net: Net, token: Tensor) -> Tensor:
        x = _hidden(net, token)
        parts = x.flatten(0, 1).split(12)
        return _chosen(torch.cat([net.head(part) for part in parts]).view(*token.shape, -1), token)

    for heads, right in ((by_time, False), (in_a_row, True)):
        torch.manual_seed(0)
        model = Chunked(heads).double()
        for steps in (4, 8, 8, 12):
            token, mask, c = tokens(3, steps), torch.ones(3, steps).double(), torch.linspace(-1, 1.3, 3).double()
            twin = truth(model, token, mask, c)
            if right or steps == 4:
                assert not same(_taped(model, token, mask, c, False), twin)
            else:
                with pytest.raises(InputError, match="by autograd: its rows are not trajectories"):
                    _taped(model, token, mask, c, False)


def test_chunks_that_do_not_add_up_are_no_chunks() -> None:
    def pieces(*shape: tuple[int, ...]) -> list[Piece]:
        return [Piece("a", Place(0, i), (torch.ones(x), torch.ones(x))) for i, x in enumerate(shape)]

    layout = Layout(4, (4, 6))
    assert gathered(pieces((2, 6, 3), (3, 6, 3)), layout) is None
    assert gathered(pieces((2, 6, 3), (2, 6, 5)), layout) is None
    assert gathered(pieces((13, 3), (12, 3)), layout) is None
    assert [x.arrays[0].shape for x in gathered(pieces((13, 3), (11, 3)), layout) or []] == [(24, 3)]
    assert [x.arrays[0].shape for x in gathered(pieces((1, 4, 3), (3, 5, 3)), layout) or []] == [(4, 5, 3)]
    assert [x.arrays[0].shape for x in gathered(pieces(*[(i, 3) for i in (2, 4, 6, 5)]), layout) or []] == [(4, 6, 3)]
