"""Which pass is compared with autograd: a model that permutes its rows gets past the check in none of these ways."""

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from llm_bridge.scores import ScoreTape, check, score_sq_norms_loop  # noqa: E402
from tests.kit.statistical import SUMMED, near  # noqa: E402
from tests.llm_bridge.test_hostile_second import Fn, Net, _lin, tokens  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

Order = Callable[[int], list[int]]
ORDERS: dict[str, Order] = {
    "rolled": lambda n: [*range(1, n), 0],
    "two change places": lambda n: [1, 0, *range(2, n)] if n > 1 else [0],
    "reversed if many": lambda n: [*range(n)][::-1] if n > 3 else [*range(n)],
}
"""where a layer puts the rows of its input; it puts them back"""


def permuting(order: Order) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        there = torch.tensor(order(len(x)))
        return s.a(x[there])[there.argsort()]

    torch.manual_seed(0)
    return Net(Fn(forward, a=_lin())).double()


def passed(
    model: nn.Module, n: int, c: float | None = None, live: int | None = None, *, keep: bool = True, **options: Any
) -> None:
    """One pass over n rows; `c`: all coefficients, `live`: the one row that is not masked."""
    mask = torch.ones(n, 5).double()
    if live is not None:
        mask[[i for i in range(n) if i != live]] = 0
    with ScoreTape(model, **options) as tape:
        log_prob = model(tokens(n, 5))
        norm = tape.score_sq_norms(log_prob, mask, keep=keep)
        if keep:
            tape.backward(torch.linspace(-1, 1.3, n).double() if c is None else torch.full((n,), c).double())
    if not options.get("norm"):
        assert norm == near(score_sq_norms_loop(model(tokens(n, 5)), mask, model.parameters()), allow=SUMMED)


@pytest.mark.parametrize(
    ("order", "before"),
    [
        ("rolled", {"n": 1}),
        ("rolled", {"n": 1, "keep": False}),
        ("two change places", {"n": 4, "live": 3}),
        ("reversed if many", {"n": 3}),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_a_pass_that_cannot_tell_is_not_the_one(order: str, before: dict[str, Any], keep: bool) -> None:
    """One row, one that is not masked, another number of rows: the next pass is compared."""
    model = permuting(ORDERS[order])
    passed(model, **before)
    with pytest.raises(InputError, match="by autograd"):
        passed(model, 4, keep=keep)


def test_equal_coefficients_are_no_proof_that_rows_keep_their_places() -> None:
    """Of eight rows two change places: a norm is looked at of one, and the gradient is right at c = 0."""
    model = permuting(ORDERS["two change places"])
    with ScoreTape(model, seed=0) as tape:
        tape.score_sq_norms(model(tokens(8, 5)), torch.ones(8, 5).double())
        tape.backward(torch.zeros(8).double())
    with pytest.raises(InputError, match="by autograd"):
        passed(model, 8)


@pytest.mark.parametrize("seed", range(5))
def test_where_no_gradient_follows_several_norms_are_compared(seed: int) -> None:
    """As in TRL's adapter, which asks for norms alone: there is no gradient that would show it."""
    with pytest.raises(InputError, match="squared score norm"):
        passed(permuting(ORDERS["two change places"]), 8, keep=False, seed=seed)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_sketch_without_a_gradient_is_compared_too(per_token: bool) -> None:
    """By exact norms in the same pass; the sketch itself is what it was."""
    model = permuting(ORDERS["rolled"])
    with pytest.raises(InputError, match="squared score norm"), ScoreTape(model, norm="sketch") as tape:
        tape.score_sq_norms(model(tokens(4, 5)), torch.ones(4, 5).double(), keep=per_token, per_token=per_token)
    model, found = permuting(lambda n: [*range(n)]), []
    for verify in ("always", "never"):
        with ScoreTape(model, norm="sketch", verify=verify) as tape:
            found.append(tape.score_sq_norms(model(tokens(4, 5)), torch.ones(4, 5).double(), keep=False))
    assert torch.equal(*found)


def test_another_mode_and_more_that_is_trainable_are_compared_anew() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.a(x) if s.training else s.a(x.roll(1, 0)).roll(-1, 0)

    model = Net(Fn(forward, a=_lin())).double()
    passed(model, 4)
    with pytest.raises(InputError, match="by autograd"):
        passed(model.eval(), 4)
    model = permuting(ORDERS["rolled"])
    (rolled,) = [m for m in model.modules() if isinstance(m, Fn)]
    rolled.requires_grad_(False)
    passed(model, 4)  # frozen, the layer has no norm that could be wrong
    rolled.requires_grad_(True)
    with pytest.raises(InputError, match="by autograd"):
        passed(model, 4)


def test_what_never_tells_is_not_compared_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that all fail have coefficients of zero for a while; numbers of rows that change all the time."""
    model, seen = permuting(lambda n: [*range(n)]), []
    real = check.check_norms
    monkeypatch.setattr(check, "check_norms", lambda *args: (seen.append(1), real(*args))[1])
    for _ in range(20):
        passed(model, 4, 0.0)
    assert len(seen) == check._PATIENCE
    seen.clear()
    model = permuting(lambda n: [*range(n)])
    for n in range(1, 21):
        passed(model, n)
    assert len(seen) == check._SHAPES


def test_micro_batches_take_turns() -> None:
    """Comparisons a multiple of the micro-batches apart would always meet the first, never the ragged last."""
    assert all(check.EVERY % k for k in range(2, check.EVERY))
