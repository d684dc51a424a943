"""Every refusal of a tape, and its advice: what is wrong is refused in one line, and what the line asks for is exact.

One case a message. The last test reads the source and finds messages that no case has raised.
"""

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import llm_bridge.scores
from llm_bridge.scores import ScoreTape, last_block, norm_layers, score_sq_norms_loop, weighted_gradient_loop
from tests.kit.statistical import OPERATION, near
from tests.llm_bridge.test_hostile_second import (
    EITHER,
    SQUARE,
    Answer,
    D,
    Fn,
    Net,
    Reversed,
    _clipped,
    _lin,
    _p,
    _tables,
    _with,
    followed,
    given,
    same,
)
from tests.llm_bridge.test_hostile_third import EITHER as THIRD
from vcposim.errors import InputError

RAISED: dict[str, str] = {}
"""what was raised, by case"""
ELSEWHERE = {
    "is sharded; parameters=": "test_distributed, 'taped in part'",
    "is split by": "test_distributed, 'tensor parallel'",
    "another rank refused this pass": "test_distributed, 'checked'",
    "the model is called through DistributedDataParallel": "test_distributed",
    "adds to p.grad in its own backward": "test_hostile_second: no advice but to train without",
    "its forward ran outside the `with`": "test_hostile",
    "a compiled graph computed it": "test_hostile",
    "have this pass compared": "test_chunks",
    "was frozen between the forward": "test_hostile_fifth",
    "an earlier pass used up its graph": "test_hostile_fifth",
    "a checkpoint saves something else": "test_hostile_fifth",
    "which runs again where nobody": "test_hostile_fifth",
    "sees a nested tensor": "test_hostile_fifth",
    "writes to its own parameters": "test_hostile_seventh",
    "as in no pass before; open a new tape": "test_hostile_seventh",
    "was written to after the": "test_hostile_seventh",
    "goes another way than in earlier calls": "test_hostile_seventh",
    "selective activation checkpoints allow one backward": "test_hostile_fifth",
    "install one, or say block": "test_fused",
}
"""messages that need ranks, a compiler or earlier passes, or have nothing to follow, and who tests them"""


class Step:
    """One update of a small model, of which a case changes one thing."""

    def __init__(self, body: Callable[[], nn.Module] = _lin, model: nn.Module | None = None) -> None:
        self.model, self.token, self.mask, self.c = given(body, SQUARE)
        self.model = self.model if model is None else model.double()
        self.options: dict[str, Any] = {}
        self.norms: dict[str, Any] = {}
        self.run: Callable[[], Tensor] = lambda: self.model(self.token)
        self.inside: Callable[[], Any] = lambda: None
        self.around: Callable[[], Any] = nullcontext
        self.coefficient: Tensor | None = None

    def taken(self) -> Answer:
        """By the tape."""
        self.model.zero_grad()
        with ScoreTape(self.model, **self.options) as tape:
            self.inside()
            torch.manual_seed(1)
            out = self.run()
            with self.around():
                norm = tape.score_sq_norms(out, self.mask, **self.norms)
            tape.backward(self.c if self.coefficient is None else self.coefficient)
        params = [p for p in self.model.parameters() if p.requires_grad]
        return out.detach(), norm, [torch.zeros_like(p) if p.grad is None else p.grad for p in params], []

    def right(self) -> Answer:
        """By a backward per trajectory."""
        torch.manual_seed(1)
        params = [p for p in self.model.parameters() if p.requires_grad]
        out, given = self.run(), {"segment": self.norms.get("segment")}
        norm = score_sq_norms_loop(out, self.mask, params, **given)
        return out.detach(), norm, weighted_gradient_loop(out, self.mask, self.c, params, **given), []


Case = tuple[str, Callable[[bool], Step]]
"""what the refusal says, and the update as it is refused (False) or as the refusal asks for it (True)"""
CASES: dict[str, Case] = {}


def case(says: str) -> Callable[[Callable[[bool], Step]], Callable[[bool], Step]]:
    def keep(make: Callable[[bool], Step]) -> Callable[[bool], Step]:
        CASES[make.__name__.strip("_")] = says, make
        return make

    return keep


# --- modules: options that the refusal names --------------------------------------------------------------------------

IN_ITS_OWN_WORDS: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "unknown module": (
        "no exact norm for the parameters of body",
        _with(lambda s, x: torch.einsum("ntd,de->nte", x, s.w), w=(D, D)),
        {},
    ),
    "list of parameters": (
        "no exact norm for the parameters of body",
        lambda: Fn(lambda s, x: x @ s.w[0] + x @ s.w[1], w=nn.ParameterList([_p(D, D), _p(D, D)])),
        {},
    ),
    "rows mixed": ("so trajectories are mixed", EITHER["tokens to one expert, with capacity"], {}),
    "rows mixed, owner": (
        "loop over its owner",
        EITHER["tokens to one expert, with capacity"],
        {"unknown": "loop"},
    ),
    "rows swapped": ("squared score norm of trajectory", EITHER["two rows swapped"], {}),
    "in place": (
        "changes its input in place",
        EITHER["loops, and scales its input in place"],
        {"unknown": "loop"},
    ),
    "cache": ("reads what an earlier call left behind", THIRD["one cache through two loops"], {"unknown": "loop"}),
    "dict filled": ("fills a list or dict", THIRD["a dict filled"], {"unknown": "loop"}),
    "transform": ("inside a transform of torch.func", THIRD["vmap over a module"], {}),
    "table by frequency": ("divides gradients by counts", EITHER["table by frequency"], {}),
    "used outside": ("used outside its module's forward", _with(lambda s, x: x * s.a.bias + s.a(x), a=_lin), {}),
}
"""refusals that name options; options that they are met with"""


@pytest.mark.parametrize("name", IN_ITS_OWN_WORDS)
def test_options_that_a_refusal_names_are_exact(name: str) -> None:
    says, body, options = IN_ITS_OWN_WORDS[name]
    told: list[str] = []
    for _ in range(5):
        step = Step(body)
        step.options = options
        try:
            found = step.taken()
            break
        except InputError as error:
            told.append(str(error))
            options = followed(told[-1])
    RAISED[name] = " | ".join(told)
    assert any(says in line for line in told), told
    assert not same(found, Step(body).right()), told


# --- one thing changed ------------------------------------------------------------------------------------------------


@case("copied or pickled while a ScoreTape is open")
def _copied(heeded: bool) -> Step:
    step = Step()
    if heeded:
        copy.deepcopy(step.model)
    else:
        step.inside = lambda: copy.deepcopy(step.model)
    return step


@case("create_graph=True inside the model")
def _slope(heeded: bool) -> Step:
    def slope(s: Any, x: Tensor) -> Tensor:
        y = x if x.requires_grad else x.detach().requires_grad_()
        return x - torch.autograd.grad((s.a(y).tanh() * s.v).sum(), y, create_graph=True)[0]

    step = Step(_with(slope, a=_lin, v=(D,)))
    step.options = {"method": "loop"} if heeded else {"unknown": "loop"}
    return step


@case("scripted or traced by torch.jit")
@pytest.mark.filterwarnings("ignore")
def _scripted(heeded: bool) -> Step:
    return Step(_lin if heeded else lambda: torch.jit.trace(_lin().double(), torch.ones(2, 3, D).double()))


@case("is wrapped in DataParallel")
def _wrapped(heeded: bool) -> Step:
    step = Step()
    if not heeded:
        step.model = nn.DataParallel(step.model)
    return step


@case("is complex")
def _complex(heeded: bool) -> Step:
    def wave(s: Any, x: Tensor) -> Tensor:
        w = torch.view_as_complex(s.w) if heeded else s.w
        return x + torch.fft.irfft(torch.fft.rfft(x, dim=2) * w, n=D, dim=2)

    step = Step(_with(wave, w=(3, 2)))
    if heeded:
        step.options = {"unknown": "loop"}
    else:
        step.model.body.w = nn.Parameter(torch.view_as_complex(step.model.body.w.detach()))
    return step


@case("has a gradient hook")
def _hooked(heeded: bool) -> Step:
    step = Step()
    if not heeded:
        step.model.head.weight.register_hook(lambda g: 2 * g)
    return step


@case("has sparse gradients")
def _sparse(heeded: bool) -> Step:
    return Step(_tables(lambda e, k: e(k), sparse=not heeded))


@case("its backward is not linear")
def _bent(heeded: bool) -> Step:
    step = Step(_lin if heeded else _with(_clipped, a=_lin))
    step.options = {"method": "loop"}
    return step


@case("no module of class 'Absent' in the model")
def _absent(heeded: bool) -> Step:
    step = Step()
    step.options = {"loop": ["Linear" if heeded else "Absent"], "unknown": "loop"}
    return step


@case("put into the model, or made to require gradients, while the tape was open")
def _thawed(heeded: bool) -> Step:
    step = Step()
    step.model.body.requires_grad_(heeded)
    step.inside = lambda: step.model.body.requires_grad_(True)
    return step


@case("another tape is open on this model")
def _two_tapes(heeded: bool) -> Step:
    step = Step()
    other = ScoreTape(step.model)
    if heeded:
        other.__enter__()
        other.__exit__(None, None, None)
    else:

        def inside() -> None:
            with other:
                pass

        step.inside = inside
    return step


# --- arrays -----------------------------------------------------------------------------------------------------------


@case("torch.inference_mode() allows no backward")
def _inference(heeded: bool) -> Step:
    step = Step()
    step.around = nullcontext if heeded else torch.inference_mode
    return step


@case("give (row, time)")
def _flat(heeded: bool) -> Step:
    step = Step()
    if not heeded:
        step.run = lambda: step.model(step.token).sum(1)
    return step


@case("has no rows")
def _no_rows(heeded: bool) -> Step:
    step = Step()
    rows = 1 if heeded else 0
    step.token, step.mask, step.c = step.token[:rows], 0 * step.mask[:rows], 0 * step.c[:rows]
    return step


@case("carries no gradient")
def _no_gradient(heeded: bool) -> Step:
    step = Step()
    if not heeded:
        step.run = lambda: step.model(step.token).detach()
    return step


@case("its graph holds no parameter of this tape")
def _of_another(heeded: bool) -> Step:
    step = Step()
    other = copy.deepcopy(step.model)
    if not heeded:
        step.run = lambda: other(step.token)
    return step


@case("mask: shape (4, 3) differs from log_prob's (4, 4)")
def _short_mask(heeded: bool) -> Step:
    step = Step()
    step.mask = step.mask if heeded else step.mask[:, 1:]
    return step


@case("give log_prob, mask and segment as long as the model's input")
def _packed_without_a_first_column(heeded: bool) -> Step:
    step = Step()
    first = 0 if heeded else 1
    step.run = lambda: step.model(step.token)[:, first:]
    step.mask = step.mask[:, first:]
    step.norms = {"segment": torch.arange(4)[:, None].expand(4, 4 - first)}
    return step


@case("segment: shape (4, 3) differs from log_prob's (4, 4); one id a token")
def _short_segment(heeded: bool) -> Step:
    step = Step()
    step.norms = {"segment": torch.arange(4)[:, None].expand(4, 4 if heeded else 3)}
    return step


@case("number trajectories 0..n-1")
def _unordered_segment(heeded: bool) -> Step:
    step = Step()
    ids = torch.tensor([0, 1, 2, 3] if heeded else [0, 1, 2, 4])
    step.norms = {"segment": ids[:, None].expand(4, 4)}
    return step


@case("give finite u (4,), v (4,)")
def _short_line(heeded: bool) -> Step:
    step = Step()
    v = torch.ones(4).double()
    step.norms = {"affine": (step.c - v, v if heeded else v[:3])}
    return step


@case("use the same u and v")
def _off_the_line(heeded: bool) -> Step:
    step = Step()
    v = torch.ones(4).double()
    step.norms = {"affine": (step.c - v, v)} if not heeded else {}
    step.coefficient = None if heeded else step.c.square()
    return step


@case("give one per trajectory, (4,)")
def _token_coefficient(heeded: bool) -> Step:
    step = Step()
    step.norms = {"per_token": heeded}
    step.coefficient = step.c[:, None].expand(4, 4)
    return step


@case("give one per token (the norms were taken with per_token)")
def _row_coefficient(heeded: bool) -> Step:
    step = Step()
    step.norms = {"per_token": True}
    step.coefficient = step.c[:, None].expand(4, 4) if heeded else step.c
    return step


@case("skip this update or repair its weights")
def _not_finite(heeded: bool) -> Step:
    step = Step()
    step.coefficient = step.c.clone()
    if not heeded:
        step.coefficient[2] = torch.nan
    return step


@case("coefficient: holds torch.complex128; give real numbers")
def _complex_coefficient(heeded: bool) -> Step:
    step = Step()
    step.coefficient = step.c if heeded else step.c.to(torch.complex128)
    return step


@case("lies on the meta device and has no numbers; give it where the model computes")
def _empty_coefficient(heeded: bool) -> Step:
    step = Step()
    step.coefficient = step.c if heeded else step.c.to("meta")
    return step


@case("no parameter of the model requires gradients, so there is no score to take")
def _nothing_to_train(heeded: bool) -> Step:
    step = Step()
    outside = torch.zeros(4, 4).double().requires_grad_()
    run = step.run

    def with_another() -> Tensor:
        step.model.requires_grad_(heeded)
        return run() + outside

    step.run = run if heeded else with_another
    return step


@case("scale: 0.0 leaves no norms to divide by it; give a positive number")
def _no_scale(heeded: bool) -> Step:
    step = Step()
    step.norms = {"scale": 2.0 if heeded else 0.0}
    return step


# --- reentrant checkpoints --------------------------------------------------------------------------------------------


def _rechecked(body: Callable[[], nn.Module], reentrant: bool, parts: int = 1) -> Step:
    def run(s: Any, x: Tensor) -> Tensor:
        return torch.cat([checkpoint(s.a, part, use_reentrant=reentrant) for part in x.chunk(parts)])

    return Step(_with(run, a=body))


@case("is unknown which; give use_reentrant=False to checkpointing")
def _reentrant_chunks(heeded: bool) -> Step:
    return _rechecked(_lin, not heeded, parts=2)


@case("used twice in one forward; give use_reentrant=False to checkpointing")
def _reentrant_twice(heeded: bool) -> Step:
    return _rechecked(_with(lambda s, x: s.a(s.a(x).sin()), a=_lin), not heeded)


def _row_by_row(s: Any, token: Tensor) -> Tensor:
    logits = s.h(torch.cat([s.e(row) for row in token.split(1)]).tanh())
    return logits.log_softmax(-1).gather(2, token[..., None]).squeeze(2)


@case("used more often than can be told apart; use ScoreTape(model, method='loop')")
def _shared_rows_and_head(heeded: bool) -> Step:
    model = Fn(_row_by_row, e=nn.Embedding(7, D), h=_lin(7, bias=False))
    model.h.weight = model.e.weight
    step = Step(model=model)
    step.options = {"method": "loop"} if heeded else {}
    return step


@case("looped module, whose backwards it does not allow; give use_reentrant=False to checkpointing")
def _reentrant_in_a_loop(heeded: bool) -> Step:
    def run(s: Any, x: Tensor) -> Tensor:
        return x @ s.w.softmax(0) + checkpoint(s.a, x, use_reentrant=not heeded)  # type: ignore[no-any-return]

    step = Step(_with(run, a=_lin, w=(D, D)))
    step.options = {"unknown": "loop", "loop": ["Fn"]}
    return step


@case("give ids as integers, say segment.long()")
def _segment_of_floats(heeded: bool) -> Step:
    step, ids = Step(), torch.arange(4)[:, None].expand(4, 4)
    step.norms = {"segment": ids if heeded else ids.double()}
    return step


@case("segment: -1 everywhere, so there is no trajectory; leave such a batch out")
def _segment_of_padding(heeded: bool) -> Step:
    step, ids = Step(), torch.arange(4)[:, None].expand(4, 4)
    step.norms = {"segment": ids if heeded else -torch.ones_like(ids)}
    return step


@case("method='loop' needs checkpointing with use_reentrant=False")
def _reentrant_loop(heeded: bool) -> Step:
    step = _rechecked(_lin, not heeded)
    step.options = {"method": "loop"}
    return step


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_is_exact_as_the_refusal_asks_for_it(name: str) -> None:
    says, make = CASES[name]
    with pytest.raises(InputError) as refused:
        make(False).taken()
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    RAISED[name] = str(refused.value)
    step = make(True)
    assert not same(step.taken(), step.right())


@contextmanager
def _says(name: str, words: str) -> Iterator[None]:
    with pytest.raises(InputError) as refused:
        yield
    assert words in str(refused.value)
    RAISED[name] = str(refused.value)


def test_parameters_do_not_go_with_reentrant_checkpoints() -> None:
    step = _rechecked(_lin, True)
    step.options = {"parameters": list(step.model.head.parameters())}
    with _says("reentrant subset", "give use_reentrant=False to it"):
        step.taken()
    step = _rechecked(_lin, False)
    step.options = {"parameters": list(step.model.head.parameters())}
    out, norm, gradient, _ = step.right()
    expected = score_sq_norms_loop(step.run(), step.mask, step.model.head.parameters())
    assert not same(step.taken(), (out, expected, gradient, []))
    assert near(expected, allow=OPERATION) != norm


def test_calls_out_of_order_are_refused_and_in_order_exact() -> None:
    step = Step()
    tape = ScoreTape(step.model)
    with _says("closed", "run forward and norms inside its `with`"):
        tape.score_sq_norms(step.run(), step.mask)
    with tape:
        with _says("twice open", "use one `with` per tape"):
            tape.__enter__()
        with _says("no norms", "call score_sq_norms first"):
            tape.backward(step.c)
        out = step.run()
        tape.score_sq_norms(out, step.mask)
        with _says("norms twice", "call backward first, or use keep=False"):
            tape.score_sq_norms(out, step.mask)
        tape.backward(step.c)
        step.model.zero_grad()
        tape.score_sq_norms(step.run(), step.mask, keep=False)
        out = step.run()
        norm = tape.score_sq_norms(out, step.mask)
        tape.backward(step.c)
    assert not same((out.detach(), norm, [p.grad for p in step.model.parameters()], []), step.right())


def test_a_graph_that_a_loop_has_cut() -> None:
    """What a module that is looped over leaves behind is no way round its loop."""

    def left(s: Any, x: Tensor) -> Tensor:
        s.kept = torch.einsum("ntd,de->nte", x, s.w)
        return s.kept.sin()

    class Leaving(Net):
        def forward(self, token: Tensor) -> Tensor:
            return super().forward(token) + self.body.kept.sum(2)

    step = Step(model=Leaving(_with(left, w=(D, D))()))
    step.options = {"unknown": "loop"}
    with _says("cut", "leaves something behind"):
        step.taken()
    step.options = followed(RAISED["cut"])
    assert not same(step.taken(), step.right())


def test_settings_and_stand_ins() -> None:
    step = Step()
    with _says("columns", "use at least 1"):
        ScoreTape(step.model, columns=0)
    with _says("parameters", "leave it out for all"):
        ScoreTape(step.model, parameters=[nn.Parameter(torch.ones(2))])
    with _says("parameters", "leave it out for all"):
        ScoreTape(step.model, parameters=[])
    with _says("split", "leave it out where each parameter is whole"):
        ScoreTape(step.model, split=step.model.parameters())
    with _says("last block", "pass the parameters yourself"):
        last_block(step.model)
    with _says("norm layers", "pass the parameters yourself"):
        norm_layers(step.model)
    assert not same(step.taken(), step.right())


def test_gradients_that_add_up_to_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order, and norms that nobody compares: the gradient of all tells, and names what works."""
    step = Step(_with(lambda s, x: s.a(x.flip(0)).flip(0), a=_lin))
    with monkeypatch.context() as patch, _says("gradient", "so p.grad is wrong, take no step"):
        patch.setattr(llm_bridge.scores.check, "check_norms", lambda *_: None)
        step.taken()
    step.options = followed(RAISED["gradient"])
    assert not same(step.taken(), step.right())


def test_gradients_that_an_operator_adds_itself_have_no_remedy() -> None:
    with _says("own backward", "adds to p.grad in its own backward"):
        Step(_with(lambda s, x: Reversed.apply(x, s.a), a=_lin)).taken()


def test_every_message_of_the_source_is_raised_here() -> None:
    """All but those that need ranks or a compiler (ELSEWHERE). Runs the other tests where they have not run."""
    if len(RAISED) < len(CASES) + len(IN_ITS_OWN_WORDS):
        pytest.skip("only where the whole file runs")
    said = " | ".join(RAISED.values())
    missing = []
    for path in sorted(Path(llm_bridge.scores.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError":
                words = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
                longest = max(words, key=len)
                if longest not in said and not any(other in " ".join(words) for other in ELSEWHERE):
                    missing.append((path.name, node.lineno, longest))
    assert not missing
