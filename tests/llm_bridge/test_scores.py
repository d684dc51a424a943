"""The score tape against its slow twin, in float64, and against wrong versions of itself.

Every exactness test is one call of `compare`: norms and gradient from the tape, the same from one backward per
trajectory on the untouched model, relative differences below 1e-10. `test_wrong_tapes_are_caught` breaks the tape in
the ways one would break it by accident and requires that `compare` notices.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
import transformers.models.qwen2.modeling_qwen2 as modeling_qwen2
from torch import Tensor, nn

from llm_bridge.logprobs import (
    TokenBatch,
    block_diagonal_mask,
    chunked_log_prob,
    log_prob_of,
    segment_of,
    token_log_prob,
)
from llm_bridge.scores import (
    ScoreTape,
    calibration,
    fused,
    last_block,
    layout,
    logit_sq_norms,
    loop,
    norm_error,
    routes,
    score_pass,
    score_sq_norms_loop,
    trajectory_sums,
    weighted_gradient_loop,
)
from llm_bridge.scores import layout as layout_module
from llm_bridge.scores.calibration import Choice, Workspace
from llm_bridge.scores.layout import Layout, Operands, live_rows
from llm_bridge.scores.norms import Recent, Scratch, gram_sq_norms
from llm_bridge.scores.routes import KERNEL, RUNS, WHOLE, Affine, General, Line
from llm_bridge.scores.score_pass import LIVE_LOOKS
from llm_bridge.scores.shards import Giver
from llm_bridge.scores.sketch import Sketch, sketch_sq_norms
from llm_bridge.scores.tape import modules_of, parameters_of
from simulations.bench import score_records
from simulations.bench import scores as bench
from tests.kit.statistical import (
    OPERATION,
    SUMMED,
    assert_mean_equals,
    assert_near,
    assert_rounding_only,
    assert_within_errors,
)
from tests.llm_bridge.models import (
    KINDS,
    NEEDS_COMPILER,
    double_rms_norm,
    packed_batch,
    padded_batch,
    tiny_model,
    unpacked,
)
from vcposim.errors import InputError

RELATIVE = 1e-10
COMPILED = pytest.param("fused", marks=NEEDS_COMPILER)
BATCHES: dict[str, Callable[[], TokenBatch]] = {
    "right-padded": padded_batch,
    "left-padded": lambda: padded_batch(side="left"),
    "packed": packed_batch,
}


@pytest.fixture(autouse=True)
def _double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """RMS norms that keep float64, one thread, nothing else."""
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", double_rms_norm)
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", double_rms_norm)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def coefficients(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(u, v, c) with c = u - 0.3 v: weights times rewards 0 and 1, a baseline of 0.3."""
    weight = torch.linspace(0.5, 2.0, n, dtype=dtype)
    reward = (torch.arange(n) % 2).to(dtype)
    return weight * reward, weight, weight * reward - 0.3 * weight


def relative(ours: list[Tensor], twin: list[Tensor]) -> float:
    """Largest difference of any parameter's gradient over that parameter's largest entry."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-8)) for a, b in zip(ours, twin, strict=True))


def compare(
    model: nn.Module,
    batch: TokenBatch,
    *,
    affine: bool = False,
    token_weight: Tensor | None = None,
    tolerance: float = RELATIVE,
    autocast: bool = False,
    **options: object,
) -> None:
    """Assert that the tape's norms and gradient equal the twin's."""
    params = [p for p in model.parameters() if p.requires_grad]
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    extra = {"token_weight": token_weight, "segment": batch.segment}
    with context:
        log_prob = token_log_prob(model, batch)
    norm = score_sq_norms_loop(log_prob, batch.mask, params, **extra)
    u, v, c = coefficients(norm.numel())
    gradient = weighted_gradient_loop(log_prob, batch.mask, c, params, **extra)
    model.zero_grad()
    with ScoreTape(model, verify="never", **options) as tape_:  # type: ignore[arg-type]
        with context:
            log_prob = token_log_prob(model, batch)
        ours = tape_.score_sq_norms(log_prob, batch.mask, affine=(u, v) if affine else None, **extra)
        assert all(p.grad is None for p in params), "norms must not touch p.grad"
        tape_.backward(c)
    assert_near(ours, norm, allow=tolerance, scale=0)
    assert relative([torch.zeros_like(p) if p.grad is None else p.grad for p in params], gradient) <= tolerance
    assert float(norm.max() / norm.min()) > 1.5, "trajectories too alike to tell a wrong norm"


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("method", ["block", "loop"])
def test_coefficients_of_tokens_follow_the_norms(layout: str, method: str) -> None:
    """The gradient of sum c_it log pi_it, by autograd alone; padding has none, even where c is not 0 there."""
    model, batch = tiny_model("qwen2", tied=True), BATCHES[layout]()
    params = [p for p in model.parameters() if p.requires_grad]
    log_prob = token_log_prob(model, batch)
    c = torch.linspace(-1, 2, log_prob.numel(), dtype=log_prob.dtype).reshape(log_prob.shape)
    twin = torch.autograd.grad(-(c * torch.where(batch.mask > 0, log_prob, 0)).sum(), params, retain_graph=True)
    norm = score_sq_norms_loop(log_prob, batch.mask, params, segment=batch.segment)
    model.zero_grad()
    with ScoreTape(model, verify="always", method=method) as tape_:
        log_prob = token_log_prob(model, batch)
        ours = tape_.score_sq_norms(log_prob, batch.mask, segment=batch.segment, per_token=True)
        with pytest.raises(InputError, match="give one per token"):
            tape_.backward(torch.ones(len(norm)))
        with pytest.raises(InputError, match=r"nan at trajectory 0, token 1; skip"):
            tape_.backward(c.index_fill(1, torch.tensor(1), float("nan")))
        tape_.backward(c)
    assert_near(ours, norm, allow=SUMMED, scale=0)
    assert relative([p.grad for p in params], list(twin)) <= RELATIVE  # type: ignore[misc]
    with ScoreTape(model) as tape_:
        tape_.score_sq_norms(token_log_prob(model, batch), batch.mask, segment=batch.segment)
        with pytest.raises(InputError, match="take the norms with per_token=True"):
            tape_.backward(c)


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_slow_twin(kind: str, tied: bool, batch: str, affine: bool) -> None:
    compare(tiny_model(kind, tied=tied), BATCHES[batch](), affine=affine)


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
@pytest.mark.parametrize("method", ["block", "batch", "gram", COMPILED])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_method_is_exact(method: str, batch: str, affine: bool) -> None:
    compare(tiny_model("qwen2", tied=True), BATCHES[batch](), affine=affine, method=method)
    compare(tiny_model("gpt2", tied=True), BATCHES[batch](), affine=affine, method=method)


@pytest.mark.parametrize("fits", [True, False])
def test_a_clock_decides_for_auto_alone(fits: bool) -> None:
    """Two processes of one run must have the same bits: a method that was named is one way, whatever the time."""
    for settings in product((False, True), repeat=4):
        assert {len(calibration.candidates(name, fits, *settings)) for name in calibration.METHODS} == {1}
    assert len(calibration.candidates("auto", fits, False)) > 1
    assert len(calibration.candidates("auto", fits, compiled=True, keeps=True, sketched=True)) > 1


@pytest.mark.parametrize("how", [WHOLE, RUNS], ids=["whole", "runs"])
@pytest.mark.parametrize("batch", BATCHES)
def test_sums_in_one_product_or_by_runs(batch: str, how: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_pass, "fastest", lambda *_: ("gram", how))
    model, given = tiny_model("qwen2", tied=True), BATCHES[batch]()
    compare(model, given, affine=True)
    monkeypatch.setattr(routes, "_folded", lambda basis: (np.ones(basis.shape[1]), basis))
    compare(model, given, affine=True)


@pytest.mark.parametrize("choice", [("kept", WHOLE), ("half gram", WHOLE), ("half gram", KERNEL), ("fused", KERNEL)])
@pytest.mark.parametrize("batch", BATCHES)
@NEEDS_COMPILER
def test_what_the_kernel_gives_to_any_coefficients(choice: Choice, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_pass, "fastest", lambda *_: choice)
    for kind in ("llama", "gpt2"):
        model, given = tiny_model(kind, tied=True), BATCHES[batch]()
        compare(model, given, affine=False)
        found = []
        for scale in (1.0, 1024.0):
            model.zero_grad()
            with ScoreTape(model, verify="never") as tape:
                norm = tape.score_sq_norms(token_log_prob(model, given), given.mask, segment=given.segment, scale=scale)
                tape.backward(norm)
            found.append([norm, *(p.grad for p in model.parameters())])
        for plain, scaled in zip(*found, strict=True):
            assert_rounding_only(scaled, plain)


@NEEDS_COMPILER
def test_parameters_are_given_their_gradients_in_one_order_whatever_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP2 giving is a collective, and a clock may choose otherwise on another rank."""
    model, batch, orders = tiny_model("llama", tied=True), padded_batch(), []
    for choices in (["block", "kept"], ["kept", "half gram"], ["block"]):
        turn, given = cycle(choices), []
        monkeypatch.setattr(score_pass, "fastest", lambda *_, turn=turn: (next(turn), RUNS))
        monkeypatch.setattr(Giver, "give", lambda self, param, grad, given=given: given.append(param))
        with ScoreTape(model, verify="never") as tape:
            tape.backward(tape.score_sq_norms(token_log_prob(model, batch), batch.mask))
        orders.append([id(p) for p in given])
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) > 4


def test_every_shape_of_a_pass_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, asked = tiny_model("llama", tied=True), padded_batch(), []

    def fastest(method: str, left: Tensor, right: Tensor, *_: Any) -> Choice:
        asked.append((tuple(left.shape), right.shape[1]))
        return "gram", RUNS

    monkeypatch.setattr(score_pass, "fastest", fastest)
    compare(model, batch, affine=False)
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    assert {(left[1], right) for left, right in asked} == weights
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("prompt", [0, 3])
def test_rows_are_looked_at_until_all_have_a_gradient(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(layout_module, "live_rows", lambda grad: (looks.append(live_rows(grad)), looks[-1])[1])
    model = tiny_model("llama", tied=True)
    batch = TokenBatch(torch.randint(3, 9, (3, 6)), torch.ones(3, 6))
    batch.mask[:, :prompt] = 0
    compare(model, batch, affine=False)
    dead = [look is not None for look in looks]
    assert any(dead) == (prompt > 0)
    assert not any(dead[-LIVE_LOOKS:])


def test_norms_whose_terms_cancel_are_taken_from_products() -> None:
    """Output gradients that add up to nearly nothing, on inputs with a common part: the squares are far below the
    Gram matrices' rounding."""
    own = torch.Generator().manual_seed(0)
    grad = torch.randn(4, 32, 12, generator=own)
    grad = (grad - grad.mean(1, keepdim=True)).flatten(0, 1)
    x = 1 + 1e-4 * torch.randn(128, 9, generator=own)
    layout = Layout(4, (4, 32))
    exact = torch.stack(
        [(a.double().t() @ b.double()).square().sum() for a, b in zip(layout.split(grad), layout.split(x), strict=True)]
    )
    first, second = ((lambda y: torch.bmm(y, y.mT).flatten(1))(y.view(4, 32, -1)) for y in (grad, x))
    naive = torch.linalg.vecdot(first, second)
    assert bool((naive < 0.9 * exact).any() or (naive > 1.1 * exact).any())
    found = [gram_sq_norms(grad, x, layout, Recent(2))]
    if fused.kernel_takes(grad.device, grad.dtype):
        found.append(fused.half_gram_sq_norms(grad, x, layout, Recent(2)))
    for norm in found:
        assert_near(norm, exact, allow=1e-3, scale=0)


def test_blocks_are_kept_where_they_take_a_few_times_an_operands_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where a gradient with any coefficients is to follow: else they would be made for nothing."""
    asked = []
    monkeypatch.setattr(calibration, "_fastest", lambda method, fits, compiled, small, *_: (asked.append(small), 0))
    monkeypatch.setattr(calibration, "kernel_takes", lambda *_: True)
    for steps in (80, 79):  # 80 steps of 90: an eighth of 640 rows
        layout, x = Layout(2, (2, steps)), torch.empty(2 * steps, 640, device="meta")
        calibration.fastest("auto", x[:, :90], x, layout, General(layout))
    assert asked == [True, False]
    for keeps, small in product((False, True), repeat=2):
        kept = ("kept", WHOLE) in calibration.candidates("auto", fits=True, compiled=True, keeps=keeps, small=small)
        assert kept == (keeps and small)


@pytest.mark.parametrize("size", [1, 16, 100])
def test_blocks_need_not_divide_the_weight(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_bridge.scores.calibration.BLOCK_SIZES", (1, 1, size * 24, 1))
    compare(tiny_model("llama", tied=True), padded_batch(), affine=True, method="block")


def test_measuring_leaves_the_random_stream_alone() -> None:
    """Else the first update of every process shifts all samples after it, and a resumed run cannot match."""
    calibration._fastest.cache_clear()
    calibration.seconds.cache_clear()
    model, batch = tiny_model("llama", tied=False), padded_batch()
    state = torch.get_rng_state()
    with ScoreTape(model) as tape:
        tape.score_sq_norms(token_log_prob(model, batch), batch.mask, keep=False)
    assert calibration.seconds.cache_info().misses > 0, "nothing was measured"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str, affine: bool) -> None:
    model = tiny_model(kind, tied=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare(model, padded_batch(), affine=affine)
    compare(model, packed_batch(), affine=affine)


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
def test_token_weights_enter_the_norm(affine: bool) -> None:
    batch = padded_batch()
    weight = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(1)).double()
    compare(tiny_model("llama", tied=True), batch, token_weight=weight, affine=affine)


class Lora(nn.Module):
    """A frozen linear map plus a trainable low-rank one."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
def test_plain_lora_and_frozen_parameters(affine: bool) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", tied=True).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
        layer.mlp.down_proj = Lora(layer.mlp.down_proj)
    compare(model, padded_batch(), affine=affine)
    assert model.model.embed_tokens.weight.grad is None


def test_peft_lora() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen2", tied=False), config).double()
    compare(model, padded_batch(), affine=True)
    compare(model, packed_batch())


@pytest.mark.parametrize("keep", ["bias", "weight", "norm", "embed"])
def test_partly_frozen(keep: str) -> None:
    model = tiny_model("qwen2", tied=False)
    for name, p in model.named_parameters():
        p.requires_grad_(keep in name)
    compare(model, padded_batch())
    compare(model, padded_batch(), affine=True)


class Elsewhere(nn.Module):
    """Layers that Llama does not have: torch's own RMS norm, a (1 + w) norm, an embedding with padding."""

    class OffsetRMSNorm(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(0.1 * torch.randn(size)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    def __init__(self, mix: bool) -> None:
        super().__init__()
        self.mix = mix
        self.embed = nn.Embedding(37, 8, padding_idx=0)
        self.norms = nn.ModuleList([nn.RMSNorm(8), self.OffsetRMSNorm(8), nn.LayerNorm(8, bias=False)])
        self.query_norm = nn.RMSNorm(4)  # sees (row, time, head, 4)
        self.out = nn.Linear(8, 37)

    def forward(self, input_ids: Tensor, **unused: object) -> object:
        x = self.embed(input_ids)
        for norm in self.norms:
            x = norm(x).tanh()
            x = x.cumsum(1) if self.mix else x
        x = self.query_norm(x.unflatten(2, (2, 4))).flatten(2)
        return type("Output", (), {"logits": self.out(x)})


def test_other_layers() -> None:
    torch.manual_seed(0)
    compare(Elsewhere(mix=True).double(), padded_batch(), affine=True)
    compare(Elsewhere(mix=False).double(), packed_batch(rows=1))  # packed trajectories must not see each other


def test_several_groups_accumulate() -> None:
    """Group after group inside one tape gives the gradient of the union; so does one call with an unknown per group."""
    model, batches = tiny_model("llama", tied=True), [padded_batch(seed=s) for s in (0, 1)]
    baseline = (0.3, 0.6)
    with ScoreTape(model) as tape_:
        for batch, b in zip(batches, baseline, strict=True):
            u, v, _ = coefficients(5)
            tape_.score_sq_norms(token_log_prob(model, batch), batch.mask, affine=(u, v))
            tape_.backward(u - b * v)
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    both = TokenBatch(*(torch.cat([getattr(b, f) for b in batches]) for f in ("token", "mask", "attention_mask")))
    zero = torch.zeros_like(v)
    with ScoreTape(model) as tape_:
        slope = torch.stack([torch.cat([v, zero]), torch.cat([zero, v])])
        tape_.score_sq_norms(token_log_prob(model, both), both.mask, affine=(torch.cat([u, u]), slope))
        tape_.backward(torch.cat([u - b * v for b in baseline]))
    assert relative([p.grad for p in model.parameters()], first) < RELATIVE


def test_packed_equals_padded() -> None:
    model, packed = tiny_model("gpt2", tied=True), packed_batch()
    padded = unpacked(packed)
    twin = score_sq_norms_loop(token_log_prob(model, padded), padded.mask, model.parameters())
    with ScoreTape(model) as tape_:
        ours = tape_.score_sq_norms(token_log_prob(model, packed), packed.mask, segment=packed.segment, keep=False)
    assert_near(ours, twin, allow=RELATIVE, scale=0)


# --- lower precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_bf16(kind: str, affine: bool) -> None:
    """Within bf16's rounding (2^-8) of the twin under the same autocast; the norms themselves are float32."""
    batch = padded_batch()
    compare(tiny_model(kind, tied=True, dtype=torch.float32), batch, affine=affine, autocast=True, tolerance=2**-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_taped_forward_is_the_same(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in the library's own precision of norms."""
    monkeypatch.undo()
    model, batch = tiny_model(kind, tied=True, dtype=dtype), padded_batch()
    with torch.no_grad():
        expected = token_log_prob(model, batch)
    with ScoreTape(model):
        assert torch.equal(token_log_prob(model, batch), expected)
        with torch.no_grad():
            assert torch.equal(token_log_prob(model, batch), expected)


def test_squares_accumulate_in_float32() -> None:
    model, batch = tiny_model("llama", tied=True, dtype=torch.bfloat16), padded_batch()
    with ScoreTape(model) as tape_:
        norm = tape_.score_sq_norms(token_log_prob(model, batch), batch.mask)
    assert norm.dtype == torch.float32


# --- it can fail ------------------------------------------------------------------------------------------------------


def _forget_bias(self: score_pass.ScorePass, name: str, param: nn.Parameter, grad: Tensor, *place: object) -> None:
    if not name.endswith("proj"):
        _VECTOR(self, name, param, grad, *place)  # type: ignore[arg-type]


def _without_first(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep[1:]


_VECTOR = score_pass.ScorePass.vector
_WRONG: dict[str, tuple[object, str, object]] = {
    "tied cross term dropped": (score_pass, "tied_cross_term", lambda at, h, grad: grad[0].new_zeros(len(grad))),
    "tied cross term once": (score_pass, "tied_cross_term", lambda *a, f=score_pass.tied_cross_term: f(*a) / 2),
    "mask forgotten": (loop.Objective, "tokens", lambda of: of.log_prob),
    "token weight forgotten": (loop.Objective, "tokens", lambda of: loop.weighted(of.log_prob, of.mask, None)),
    "bias forgotten": (score_pass.ScorePass, "vector", _forget_bias),
    "wrong sign, general": (routes.General, "finish", lambda s, c, f=routes.General.finish: f(s, -c)),
    "wrong sign, affine": (routes.Line, "share", lambda s, a, f=routes.Line.share: f(s, -a)),
    "anchors swapped": (routes.Line, "share", lambda s, a, f=routes.Line.share: f(s, a)[::-1]),
    "fold forgotten": (routes, "_folded", lambda basis, f=routes._folded: (2 * f(basis)[0], f(basis)[1])),
    "a row that matters left out": (layout, "live_rows", lambda grad, f=layout.live_rows: _without_first(f(grad))),
    "embedding rows not merged": (
        score_pass,
        "embedding_sq_norms",
        lambda token, grad, layout, v: layout.per_trajectory(grad.square()).sum(1),
    ),
    "padding index forgotten": (
        score_pass.ScorePass,
        "embedding",
        lambda s, name, w, token, grad, pad, at, f=score_pass.ScorePass.embedding: f(s, name, w, token, grad, None),
    ),
    "one vector's squares off by 1e-6": (
        score_pass.ScorePass,
        "vector",
        lambda s, name, p, g, *_, f=score_pass.ScorePass.vector: f(s, name, p, g * (1 + 1e-6 * (name == "model.norm"))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", [None, *_WRONG])
def test_wrong_tapes_are_caught(wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything() -> None:
        batch = padded_batch()
        weight = torch.linspace(0.5, 1.5, batch.mask.numel()).double().view_as(batch.mask)
        for affine in (False, True):
            compare(tiny_model("qwen2", tied=True), batch, affine=affine, token_weight=weight)

    if wrong is None:
        return everything()
    monkeypatch.setattr(*_WRONG[wrong])
    with pytest.raises(AssertionError):
        everything()


@pytest.mark.parametrize("wrong", sorted(set(_WRONG) - {"one vector's squares off by 1e-6"}))
def test_the_check_stops_wrong_tapes(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trajectory against plain autograd, and one direction: every mutant but the one below its tolerance."""
    monkeypatch.setattr(*_WRONG[wrong])
    batch = padded_batch()
    weight = torch.linspace(0.5, 1.5, batch.mask.numel()).double().view_as(batch.mask)
    u, v, c = coefficients(5)

    def updates() -> None:
        for affine in (None, (u, v)):
            for seed in range(5):  # one trajectory at random: some mutants need one that holds what they break
                model = tiny_model("qwen2", tied=True)
                with ScoreTape(model, seed=seed) as tape_:
                    log_prob = token_log_prob(model, batch)
                    tape_.score_sq_norms(log_prob, batch.mask, token_weight=weight, affine=affine)
                    tape_.backward(c)

    with pytest.raises(InputError, match="by autograd"):
        updates()


# --- manners ----------------------------------------------------------------------------------------------------------


def test_model_is_left_as_found_even_after_an_error() -> None:
    model, batch = tiny_model("llama", tied=True), padded_batch()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}

    def interrupted() -> None:
        with ScoreTape(model) as tape_:
            tape_.score_sq_norms(token_log_prob(model, batch), batch.mask)
            raise RuntimeError("oops")

    with pytest.raises(RuntimeError, match="oops"):
        interrupted()
    assert before == {name: set(module.__dict__) for name, module in model.named_modules()}
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    compare(model, batch)


def test_auxiliary_losses_inside_the_tape_are_ordinary() -> None:
    model, batch = tiny_model("gpt2", tied=True), padded_batch()
    trajectory_sums(token_log_prob(model, batch), batch.mask).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with ScoreTape(model):
        trajectory_sums(token_log_prob(model, batch), batch.mask).sum().backward()
    assert relative([p.grad for p in model.parameters()], expected) < RELATIVE


class Mixing(nn.Module):
    """A parameter that no rule covers: a softmax over it mixes the features."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.mix = inner, nn.Parameter(torch.linspace(-1, 1, size * size).view(size, size).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.mix.softmax(0)


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
def test_unknown_module_is_refused_or_looped_over_alone(affine: bool) -> None:
    model = tiny_model("llama", tied=True)
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, 24)
    with (
        ScoreTape(model) as tape_,
        pytest.raises(
            InputError, match=r"parameters of model.layers.1.mlp \(Mixing\); freeze them, or use unknown='loop'"
        ),
    ):
        _norms(tape_)
    for batch in (padded_batch(), packed_batch()):
        compare(model, batch, unknown="loop", affine=affine)
        compare(model, batch, method="loop", affine=affine)
    with ScoreTape(model, unknown="loop") as tape_:
        _norms(tape_)
        assert list(tape_.loops) == ["model.layers.1.mlp"]


def test_parameter_used_outside_its_module_is_named() -> None:
    model, batch = tiny_model("llama", tied=False), padded_batch()
    weight = model.model.layers[0].mlp.up_proj.weight
    with ScoreTape(model) as tape_:
        log_prob = token_log_prob(model, batch) + weight.mean()
        with pytest.raises(InputError, match=r"model.layers.0.mlp.up_proj.weight: used outside its module's forward"):
            tape_.score_sq_norms(log_prob, batch.mask)


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_module_used_twice_has_its_cross_terms(tied: bool, affine: bool) -> None:
    model = tiny_model("qwen2", tied=tied)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    for batch in (padded_batch(), packed_batch()):
        compare(model, batch, affine=affine)


def test_positions_shared_by_the_batch() -> None:
    """GPT-2 as it is called without `position_ids`: one row of positions for all trajectories."""
    model, batch = tiny_model("gpt2", tied=True), padded_batch()
    log_prob = _default_positions(model, batch)
    norm = score_sq_norms_loop(log_prob, batch.mask, model.parameters())
    c = coefficients(5)[2]
    twin = weighted_gradient_loop(log_prob, batch.mask, c, list(model.parameters()))
    with ScoreTape(model) as tape_:
        log_prob = _default_positions(model, batch)
        assert_near(tape_.score_sq_norms(log_prob, batch.mask), norm, allow=SUMMED, scale=0)
        tape_.backward(c)
    assert relative([p.grad for p in model.parameters()], twin) < RELATIVE


def _default_positions(model: nn.Module, batch: TokenBatch) -> Tensor:
    return log_prob_of(model(input_ids=batch.token).logits, batch.token)


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_head_in_chunks_inside_the_loss(tied: bool, affine: bool) -> None:
    model, batch = tiny_model("llama", tied=tied), padded_batch()

    def forward() -> Tensor:
        hidden = model.model(input_ids=batch.token, attention_mask=batch.attention_mask).last_hidden_state
        return chunked_log_prob(hidden, model.lm_head, batch.token, chunk=5)

    logits = model(input_ids=batch.token, attention_mask=batch.attention_mask).logits
    whole = log_prob_of(logits, batch.token)
    assert_near(forward(), whole)
    u, v, c = coefficients(5)
    params = list(model.parameters())
    norm = score_sq_norms_loop(whole, batch.mask, params)
    twin = weighted_gradient_loop(whole, batch.mask, c, params)
    with ScoreTape(model, verify="always") as tape_:
        ours = tape_.score_sq_norms(forward(), batch.mask, affine=(u, v) if affine else None)
        tape_.backward(c)
    assert_near(ours, norm, allow=SUMMED, scale=0)
    assert relative([p.grad for p in params], twin) < RELATIVE


def test_another_forward_before_the_norms_does_not_matter() -> None:
    model, batch = tiny_model("llama", tied=True), padded_batch()
    exact = _measured(model, batch)
    with ScoreTape(model) as tape_:
        log_prob = token_log_prob(model, batch)
        token_log_prob(model, padded_batch(seed=1))
        ours = tape_.score_sq_norms(log_prob, batch.mask, keep=False)
    assert_near(ours, exact, allow=SUMMED, scale=0)


def _norms(tape_: ScoreTape, **options: object) -> Tensor:
    batch = padded_batch()
    return tape_.score_sq_norms(token_log_prob(tape_.model, batch), batch.mask, **options)  # type: ignore[arg-type]


def _reenter(tape_: ScoreTape) -> None:
    with tape_:
        pass


def _two_tapes(tape_: ScoreTape) -> None:
    with ScoreTape(tape_.model):
        pass


def _no_graph(tape_: ScoreTape) -> None:
    with torch.no_grad():
        log_prob = token_log_prob(tape_.model, padded_batch())
    tape_.score_sq_norms(log_prob, padded_batch().mask)


def _free(rows: int = 5, steps: int = 12) -> Tensor:
    return torch.zeros(rows, steps, requires_grad=True)


ONES, LINE = torch.ones(5), (torch.ones(5), torch.ones(5))
_OUT_OF_ORDER: dict[str, tuple[Callable[[ScoreTape], object], str]] = {
    "norms twice": (lambda t: (_norms(t), _norms(t)), "norms are already taken; call backward first"),
    "backward first": (lambda t: t.backward(ONES), "call score_sq_norms first"),
    "backward twice": (lambda t: (_norms(t), t.backward(ONES), t.backward(ONES)), "call score_sq_norms first"),
    "no gradient": (lambda t: (_norms(t, keep=False), t.backward(ONES)), "call score_sq_norms first"),
    "reenter": (_reenter, "already open"),
    "two tapes": (_two_tapes, "another tape is open on this model"),
    "no graph": (_no_graph, "carries no gradient"),
    "foreign graph": (lambda t: t.score_sq_norms(_free(), torch.ones(5, 12)), "no parameter of this tape"),
    "mask shape": (lambda t: t.score_sq_norms(_free(), torch.ones(5, 11)), r"mask: shape \(5, 11\)"),
    "c shape": (lambda t: (_norms(t), t.backward(ONES[:4])), r"coefficient: shape \(4,\); give one per trajectory"),
    "c nan": (lambda t: (_norms(t), t.backward(ONES * float("nan"))), "nan at trajectory 0"),
    "off the line": (lambda t: (_norms(t, affine=LINE), t.backward(torch.arange(5.0))), r"from u \+ a v"),
    "bad line": (lambda t: _norms(t, affine=(ONES[:4], ONES)), r"affine: u has shape \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", _OUT_OF_ORDER)
def test_out_of_order_is_one_clear_line(case: str) -> None:
    action, message = _OUT_OF_ORDER[case]
    model = tiny_model("llama", tied=True)
    with ScoreTape(model) as tape_, pytest.raises(InputError, match=message) as caught:
        action(tape_)
    assert "\n" not in str(caught.value)
    if case != "backward twice":
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("option", "value"),
    [("norm", "exct"), ("method", "gramm"), ("unknown", "ignore"), ("verify", "sometimes"), ("columns", 0)],
)
def test_options_are_checked(option: str, value: object) -> None:
    with pytest.raises(InputError, match=option):
        ScoreTape(nn.Linear(1, 1), **{option: value})  # type: ignore[arg-type]


def test_classes_to_loop_over_must_be_the_models() -> None:
    with pytest.raises(InputError, match="no module of class 'Mixtral' in the model"):
        ScoreTape(tiny_model("gpt2", tied=True), loop=["Mixtral"]).__enter__()
    compare(tiny_model("llama", tied=True), padded_batch(), unknown="loop", loop="LlamaDecoderLayer", affine=True)
    compare(tiny_model("llama", tied=True), packed_batch(), unknown="loop", loop="LlamaMLP")


# --- the line of coefficients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [[0, 1, 1, 0], [0.5, 0.25, 3, -1], [2, 2, 2, 2], [0, 0, 0.3, 1e-9]])
def test_line_reproduces_coefficients(reward: list[float]) -> None:
    weight = torch.tensor([0.5, 1.5, 0.0, 2.0], dtype=torch.float64)
    r = torch.tensor(reward, dtype=torch.float64)
    line = Line.of(weight * r, weight, 4)
    for baseline in (-1.0, 0.0, 0.4, 7.0):
        c = weight * (r - baseline)
        share = torch.tensor(line.share(line.unknown(c)), dtype=torch.float64)
        assert_near(share @ line.basis, c)


def test_rewards_of_zero_and_one_touch_one_sum_each() -> None:
    weight, reward = torch.tensor([0.5, 1.5, 0.7, 2.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert ((Line.of(weight * reward, weight, 4).basis != 0).sum(0) == 1).all()


def test_fold_keeps_the_basis_and_spares_small_factors() -> None:
    basis = torch.tensor([[2.0, 0.0, 1e-9, 1.0, 0.0], [0.0, -4.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    fold, factor = map(torch.from_numpy, routes._folded(basis.numpy()))
    assert_rounding_only(fold * factor, basis, ulp=4)
    assert fold.tolist() == [0.5, -1.0, 1.0, 1.0, 1.0]
    assert factor[0, 0] == factor[1, 1] == 4.0  # neighbors in one sum share a product


@pytest.mark.parametrize(
    ("owner", "bounds"), [(None, [(0, 1), (1, 3), (3, 6)]), ([2, 2, 2, 3, 0, 0, 0, 1, 1], [(3, 5), (5, 6), (0, 2)])]
)
def test_rows_without_output_gradient_are_left_out(owner: list[int] | None, bounds: list[tuple[int, int]]) -> None:
    """Padded: one, two and three live rows; packed: trajectory 2 first, then padding, then 0 and 1."""
    live = [2, 4, 5, 6, 7, 8] if owner is None else [0, 1, 3, 4, 5, 7]
    grad = torch.zeros(9, 2).double()
    grad[live, 1] = torch.arange(1.0, 7.0).double()  # the column that is looked at first stays zero
    run = ((4, 7), (7, 9), (0, 3))
    whole = Layout(3, (3, 3)) if owner is None else Layout(3, (1, 9), run, torch.tensor(owner))
    shape = (3, 3, 2) if owner is None else (1, 9, 2)
    kept = Operands.of(whole, "x", grad.view(shape), grad.view(shape) + 1)
    assert kept.grad[:, 1].tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(kept.spread(kept.grad), grad)
    assert kept.layout.bounds(6) == bounds


def test_no_accelerator_is_asked_which_rows_are_live() -> None:
    """A device without numbers cannot answer: whoever asks raises."""
    assert live_rows(torch.zeros(64, 3, device="meta")) is None


# --- batches and log-probabilities ------------------------------------------------------------------------------------


def test_log_prob_of_a_token_is_about_that_token() -> None:
    model, batch = tiny_model("llama", tied=True), padded_batch()
    log_prob = token_log_prob(model, batch)
    logits = model(batch.token[:, :6]).logits  # right padding comes later than position 6
    by_hand = logits[1, 4].log_softmax(-1)[batch.token[1, 5]]
    assert_near(log_prob[1, 5], by_hand, scale=0)
    assert (log_prob[:, 0] == 0).all()


def test_packed_trajectories_do_not_see_each_other() -> None:
    segment = segment_of(torch.tensor([0, 2, 4]))
    visible = block_diagonal_mask(segment, torch.float64)[0, 0] == 0
    assert visible.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("segment", [[[0, 0, 2]], [[0, 1, 0]], [[1, 1, 1]]])
def test_segments_are_numbered_runs(segment: list[list[int]]) -> None:
    with pytest.raises(InputError, match=r"number trajectories 0\.\.n-1"):
        Layout.of(torch.zeros(1, 3), torch.tensor(segment))


def test_cu_seqlens_and_double_description_are_checked() -> None:
    with pytest.raises(InputError, match="cu_seqlens: ends at 4, beyond length 3"):
        segment_of(torch.tensor([0, 2, 4]), length=3)
    both = TokenBatch(torch.ones(1, 2).long(), torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2).long())
    with pytest.raises(InputError, match="both attention_mask and segment"):
        token_log_prob(nn.Linear(1, 1), both)


# --- approximations ---------------------------------------------------------------------------------------------------


def test_sketch_is_unbiased_and_its_gradient_exact() -> None:
    """1000 sketches of a layer in 16 buckets: mean within 5 standard errors, false-fail rate 6e-7 per trajectory.

    A bias of 15% is rejected.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3 * 7, d, dtype=torch.float64, generator=generator) for d in (50, 110))
    layout = Layout(3, (3, 7))
    exact = gram_sq_norms(left, right, layout, Recent(2))
    draws = torch.stack([sketch_sq_norms(left, right, layout, Sketch(1, generator), Scratch()) for _ in range(1000)])
    error = (draws.mean(0) - exact) / (draws.std(0) / 1000**0.5)
    assert error.abs().max() < 5
    biased = 1.15 * draws
    assert ((biased.mean(0) - exact) / (biased.std(0) / 1000**0.5)).abs().max() > 5
    batch, model = padded_batch(), tiny_model("llama", tied=True)
    with pytest.raises(AssertionError):
        compare(model, batch, norm="sketch")  # norms differ ...
    for affine in (False, True):
        compare(model, batch, norm="sketch", affine=affine, tolerance=1.0)
    u, v, c = coefficients(5)
    log_prob = token_log_prob(model, batch)
    twin = weighted_gradient_loop(log_prob, batch.mask, c, list(model.parameters()))
    methods = ["auto", "block", *["fused"] * fused.kernel_takes(log_prob.device, log_prob.dtype)]
    for line, method in product((None, (u, v)), methods):
        model.zero_grad()
        with ScoreTape(model, norm="sketch", method=method) as tape_:
            _norms(tape_, affine=line)
            tape_.backward(c)
        assert relative([p.grad for p in model.parameters()], twin) < RELATIVE  # ... the gradient does not


@pytest.mark.slow
def test_the_sketch_of_a_model_is_unbiased() -> None:
    """400 seeds of 4 columns, layers of one input sharing their signs: the mean is the exact norm, within its error.

    A bias of 10% (signs that do not match the input, a layer left out) is rejected.
    """
    model, batch = tiny_model("llama", tied=True), padded_batch()
    exact = _measured(model, batch)
    draws = torch.stack([_measured(model, batch, norm="sketch", columns=4, seed=seed) for seed in range(400)])
    mean, error = draws.mean(0), draws.std(0) / 400**0.5
    assert_within_errors(mean, exact, error, degrees=399)
    with pytest.raises(AssertionError, match="is not"):
        assert_within_errors(1.1 * mean, exact, 1.1 * error, degrees=399)


def _measured(model: nn.Module, batch: TokenBatch, **options: object) -> torch.Tensor:
    with ScoreTape(model, **options) as tape:
        return tape.score_sq_norms(token_log_prob(model, batch), batch.mask, keep=False)


def test_layers_of_one_input_share_their_signs() -> None:
    x, sketch = torch.randn(6, 4), Sketch(3, torch.Generator().manual_seed(0))
    first = sketch.remembered(x)
    assert sketch.remembered(x) is first
    other = sketch.remembered(x.clone())
    assert not torch.equal(other, first)
    assert not torch.equal(sketch.remembered(x), first)  # only the last input is remembered


def test_last_block_norms_and_full_gradient() -> None:
    model, batch = tiny_model("llama", tied=True), padded_batch()
    block, c = last_block(model), coefficients(5)[2]
    assert {id(p) for p in block} == {id(p) for p in model.model.layers[-1].parameters()}
    log_prob = token_log_prob(model, batch)
    norm = score_sq_norms_loop(log_prob, batch.mask, block)
    twin = weighted_gradient_loop(log_prob, batch.mask, c, list(model.parameters()))
    with ScoreTape(model, parameters=block) as tape_:
        ours = _norms(tape_)
        tape_.backward(c)
    assert_near(ours, norm, allow=RELATIVE, scale=0)
    assert relative([p.grad for p in model.parameters()], twin) < RELATIVE


def test_logit_proxy_is_the_score_with_respect_to_free_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    token, mask = (
        torch.randint(6, (3, 4), generator=generator),
        torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1.0]]),
    )
    log_prob = logits[:, :-1].log_softmax(-1).gather(2, token[:, 1:, None]).squeeze(2)
    (grad,) = torch.autograd.grad((log_prob * mask[:, 1:]).sum(), logits)
    assert_near(logit_sq_norms(logits, token, mask), grad.square().sum((1, 2)), allow=OPERATION, scale=0)


def test_norm_error_sees_noise_and_not_scale() -> None:
    exact = torch.tensor([1.0, 2.0, 5.0])
    assert norm_error(3 * exact, exact)["relative_sd"] < 1e-6
    assert norm_error(exact * torch.tensor([1.1, 0.9, 1.0]), exact)["relative_sd"] > 0.05


# --- the bench compares like with like --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in bench.METHODS if "sketch" not in name])
def test_bench_methods_compute_the_same_update(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rival gives the tape's gradient to float32 rounding; the plain update, with another b, does not."""
    if method == "opacus":
        pytest.importorskip("opacus")
    monkeypatch.setitem(bench.SHAPES, "tiny", (37, 16, 2, 4, 2, 24, False))
    case = bench.make_case("tiny:6:12")

    def gradient(run: Callable[[bench.Workload], object]) -> list[Tensor]:
        case.model.zero_grad()
        run(case)
        return [p.grad.clone() for p in case.model.parameters()]

    ours, rival = gradient(bench.affine), gradient(bench.METHODS[method])
    assert relative(rival, ours) < 1e-3
    assert relative(gradient(bench.plain), ours) > 1e-2


def test_published_tables_are_those_of_the_record() -> None:
    here = Path(bench.__file__).parent
    assert (here / "scores.md").read_text() == score_records.markdown(
        score_records.load(str(here / "scores.jsonl"))
    ) + "\n"


def test_records_of_several_sittings_are_pooled_and_memory_is_told_in_gradients(tmp_path: Path) -> None:
    place = {**score_records.machine(torch.device("cpu")), **asdict(bench.ModelSetting()), "case": "1M:2:8"}
    path = str(tmp_path / "record")
    for ratios in ([1.0, 1.1], [1.2]):
        score_records.append(path, {**place, "ratios": {"affine": ratios, "vmap": "NotImplementedError: too large"}})
    score_records.append(
        path, {**place, "gradient": 10.0, "peak": {"plain": 100.0, "affine": 112.0, "vmap": "MemoryError: no"}}
    )
    time, memory = score_records.markdown(score_records.load(path)).split("\n\nPeak memory.")
    assert "| affine | 1.100 ± 0.100 (3 in 2 processes, 1.050 to 1.200) |" in time
    assert "| vmap | NotImplementedError |" in time
    assert "| affine | 1.12 x, +1.20 gradients |" in memory
    assert "| vmap | MemoryError |" in memory


def test_the_bench_runs_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerator's command, on the CPU."""
    monkeypatch.undo()
    monkeypatch.setitem(bench.SHAPES, "tiny", (37, 16, 2, 4, 2, 24, False))
    case = bench.make_case("tiny:6:12", bench.ModelSetting(dtype="bfloat16"))
    ratios = bench.paired_ratios(case, ["affine", "general", "sketch", "loop, two buffers", "ghost, two backwards"], 1)
    assert all(isinstance(found, list) for found in ratios.values()), ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reward", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [0.3, 0.1, 1, 0.7]])
@pytest.mark.parametrize("how", [WHOLE, RUNS])
def test_affine_sums_of_operands_are_the_weighted_products(dtype: torch.dtype, reward: list, how: int) -> None:
    """One run to a sum, several, none, no shared anchor: to the rounding of one product and one interpolation."""
    own = torch.Generator().manual_seed(3)
    n, steps, rows, cols, b = 4, 7, 6, 5, 0.37
    left, right = (torch.randn(n * steps, d, generator=own, dtype=torch.float64).to(dtype) for d in (rows, cols))
    layout, weight = Layout(n, (n, steps)), torch.rand(n, generator=own, dtype=torch.float64) + 0.5
    known = weight * torch.tensor(reward, dtype=torch.float64)
    route = Affine(layout, Line.of(known, weight, n))
    param = nn.Parameter(torch.zeros(rows, cols, dtype=dtype))
    each = layout.per_row(route.fold, n * steps)
    route.matrix(param, (left.double() * each).to(dtype), right, layout, how)
    coefficient = known - b * weight
    route.finish(coefficient)
    expected = -(left.double() * layout.per_row(coefficient, n * steps)).t() @ right.double()
    assert param.grad is not None
    # the sums at the anchors can be larger than what is left of them: the scale is that of the largest
    scale = (left.double().abs() * layout.per_row(weight, n * steps)).t() @ right.double().abs()
    assert param.grad.dtype == dtype
    ulp = 4 * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps  # NumPy has no bfloat16
    assert_rounding_only(param.grad.double(), expected, ulp=ulp, scale=scale)


def test_signs_of_whole_weights_do_not_depend_on_how_many_parts_a_rank_has() -> None:
    """Ranks that run the same trajectories must have the same norms, or their replicas drift apart."""
    whole, part = nn.Parameter(torch.zeros(40, 40)), nn.Parameter(torch.zeros(40, 40))
    found = []
    for parts in (1, 3):
        own, apart = (torch.Generator().manual_seed(k) for k in (0, 1))
        work = Workspace(16, own, split={part}, apart=apart)
        for _ in range(parts):
            work.sketch(part).drawn(part)
        found.append([*work.sketch(whole).drawn(whole), *work.sketch(whole).drawn(whole)])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], found[0][2])


@pytest.mark.parametrize("at_once", [1, 64, 1000])
def test_a_sketch_never_uses_a_sign_twice(at_once: int) -> None:
    """Drawn one by one, with a remainder too small for the next operand, or all at once; a column has one sign."""
    sketch = Sketch(8, torch.Generator().manual_seed(0))
    sketch.at_once = at_once
    spread = [sketch.folded(torch.eye(40)) for _ in range(3)]
    assert len(torch.cat(spread).abs().sum(1).unique()) == 1
    assert len({tuple(each.sum(1).tolist()) for each in spread}) == 3
    assert all(torch.equal((each != 0).sum(1), torch.ones(40, dtype=torch.long)) for each in spread)


@pytest.mark.parametrize("columns", [1, 16])
def test_columns_of_two_blocks_meet_in_a_bucket_as_often_as_by_chance(columns: int) -> None:
    """Those of one block never do. A turn that is always 0 would add up columns a multiple of K apart: fails."""
    sketch = Sketch(columns, torch.Generator().manual_seed(0))
    width, draws = sketch.buckets, 12_000
    where = torch.stack([sketch.folded(torch.eye(2 * width)).abs().argmax(1) for _ in range(draws)])
    assert (where[:, :width].sort(1).values == torch.arange(width)).all()
    for other in (width, width + 3):
        met = (where[:, 0] == where[:, other]).double()
        assert_mean_equals(met.numpy(), 1 / width, detect=0.8 / width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 16, 31, 320])
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernel_sketches_as_the_products_do(dtype: torch.dtype, width: int, packed: bool) -> None:
    """Also of operands whose rows lie apart in memory, of trajectories of unlike length, and on several threads."""
    left, right = (torch.randn(36, 2 * d, dtype=dtype)[:, :d] for d in (width, 2 * width + 5))
    segment = torch.tensor([[0] * 3 + [1] * 11 + [-1] * 2 + [2] * 20])
    layout = Layout.of(segment, segment) if packed else Layout(3, (3, 12))

    def norms(compiled: bool) -> Tensor:
        sketch = Sketch(16, torch.Generator().manual_seed(1), compiled)
        return sketch_sq_norms(left, right, layout, sketch, Scratch())

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = norms(True)
    finally:
        torch.set_num_threads(threads)
    scale = left.abs().sum().double() * right.abs().sum().double()
    assert_rounding_only(found.numpy(), norms(False).numpy(), scale=float(scale))


def test_a_walk_names_modules_and_parameters_as_torch_does() -> None:
    """Shared modules and weights under their first name, a part that is None left out."""
    model = nn.Module()
    model.first = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"deep": nn.Linear(2, 2, bias=False)}))
    model.again, model.none = model.first[1]["deep"], None
    model.register_module("absent", None)
    model.own, model.last = nn.Parameter(torch.ones(1)), nn.ModuleList([model.first[0], nn.Linear(2, 2)])
    model.last[1].weight = model.first[0].weight
    modules = modules_of(model)
    assert [*modules.items()] == [*model.named_modules()]
    found, right = parameters_of(modules), [*model.named_parameters()]
    assert [name for name, _ in found] == [name for name, _ in right]
    assert all(p is q for (_, p), (_, q) in zip(found, right, strict=True))
