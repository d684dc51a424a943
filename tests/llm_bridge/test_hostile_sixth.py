"""A sixth set, of an outsider who wrote it while kernels and strays were changed: what was wrong.

Without a word, where nothing is compared (`verify="never"`): a gate of one number read by its place, which took every
trajectory's gradient for the first one's; a weight that is looked up and is also the right factor of a product; pieces
of an embedding along time, put together as rows. By any setting: a negative `padding_idx`. Tracebacks: a single token
for all rows, and token by token.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
)

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


@pytest.mark.parametrize("verify", ["first", "never"])
@pytest.mark.parametrize("shape", [SQUARE, LONG, (1, 3), (5, 1)], ids=["square", "long", "one row", "one step"])
@pytest.mark.parametrize("case", CASES)
def test_exact_or_refused_with_advice_that_works(case: str, shape: tuple[int, int], verify: str) -> None:
    right_or_refused(lambda: CASES[case](shape), unknown="loop", verify=verify)


@pytest.mark.parametrize("case", ["soft tokens", "a table and its product", "padding from the end", "row by row"])
def test_these_are_exact(case: str) -> None:
    assert not right_or_refused(lambda: CASES[case](LONG), verify="always")
