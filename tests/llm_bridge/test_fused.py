"""The kernel that squares and adds up blocks in registers, against blocks that are formed in double precision."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llm_bridge.scores import ScoreTape, calibration, fused
from llm_bridge.scores.layout import Layout
from llm_bridge.scores.norms import Recent, Scratch, Sink, SumPlan
from llm_bridge.training import TrainConfig
from tests.kit.statistical import OPERATION, assert_near, assert_rounding_only
from tests.llm_bridge.models import NEEDS_COMPILER
from vcposim.errors import InputError

KINDS = {torch.float32: OPERATION, torch.float64: 1e-14}


def packed(length: list[int], gap: int, total: int) -> Layout:
    """Trajectories of these lengths in one row, `gap` rows of padding before each."""
    run, at = [], 0
    for one in length:
        run.append((at + gap, at + gap + one))
        at += gap + one
    owner = torch.full((total,), len(length))
    for i, (start, stop) in enumerate(run):
        owner[start:stop] = i
    return Layout(len(length), (1, total), tuple(run), owner)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Layout, Tensor]:
    """Operands of any shape, a padded or a packed layout, and factors of up to three sums, many of them 0."""
    kind = draw(st.sampled_from(list(KINDS)))
    length = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    rows, cols = (
        draw(st.integers(1, 50)),
        draw(st.one_of(st.integers(1, 70), st.sampled_from((1023, 1024, 1025, 2060)))),
    )
    padded, gap = draw(st.booleans()) or not any(length), draw(st.integers(0, 2))
    if padded:
        length = [max(length)] * len(length)
    total = sum(length) if padded else sum(length) + gap * len(length)
    layout = Layout(len(length), (len(length), length[0])) if padded else packed(length, gap, total)
    own = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    left, right = (torch.randn(total, d + 3, generator=own, dtype=kind)[:, :d] for d in (rows, cols))
    sums = draw(st.integers(0, 3))
    factor = torch.randn(sums, len(length), generator=own, dtype=torch.float64)
    return left, right, layout, factor * (torch.rand(factor.shape, generator=own) < 0.6)


@NEEDS_COMPILER
@given(products(), st.sampled_from([1, 2, 3]))
def test_norms_and_sums_are_those_of_blocks(case: tuple[Tensor, Tensor, Layout, Tensor], threads: int) -> None:
    left, right, layout, factor = case
    block = torch.stack([a.double().t() @ b.double() for a, b in zip(*map(layout.split, case[:2]), strict=True)])
    total = [torch.full(block.shape[1:], float("nan"), dtype=left.dtype) for _ in factor]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sink = Sink(total, SumPlan.of(factor)) if len(factor) else None
        norm = fused.fused_sq_norms(left, right, layout, sink, Scratch())
        of_half = fused.half_gram_sq_norms(left, right, layout, Recent(2))
    finally:
        torch.set_num_threads(before)
    allow = KINDS[left.dtype]
    assert_near(norm, block.square().sum((1, 2)), allow=allow, scale=0)
    # its terms have both signs: what cancels is as large as the Gram matrices
    size = [
        float(a.double().norm() ** 2 * b.double().norm() ** 2)
        for a, b in zip(*map(layout.split, case[:2]), strict=True)
    ]
    assert_near(of_half, block.square().sum((1, 2)), allow=allow, scale=max(size, default=0.0))
    magnitude = float(torch.einsum("n,nrc->rc", factor.abs().sum(0) + 1, block.abs()).max())
    for each, row in zip(total, factor, strict=True):
        assert_near(each, torch.einsum("n,nrc->rc", row, block), allow=allow, scale=magnitude)


@NEEDS_COMPILER
@given(products())
def test_blocks_are_left_where_they_are_to_be_kept(case: tuple[Tensor, Tensor, Layout, Tensor]) -> None:
    left, right, layout, _ = case
    exact = torch.stack([a.double().t() @ b.double() for a, b in zip(*map(layout.split, case[:2]), strict=True)])
    block = torch.full(exact.shape, float("nan"), dtype=left.dtype)
    norm = fused.fused_sq_norms(left, right, layout, None, Scratch(), block)
    assert_near(norm, exact.square().sum((1, 2)), allow=KINDS[left.dtype], scale=0)
    assert_near(block, exact, allow=KINDS[left.dtype], scale=float(exact.abs().max()))


@NEEDS_COMPILER
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cols", [7, 70, 1030])
def test_an_operand_of_several_maps_is_copied_once_and_anew_when_it_is_another(cols: int, threads: int) -> None:
    """The same again; written to since; rows dealt otherwise; of another type; a view of other columns."""
    own = torch.Generator().manual_seed(cols)
    left, right = torch.randn(12, 150, generator=own), torch.randn(12, cols + 1, generator=own)
    even, odd = Layout(3, (3, 4)), packed([2, 9, 1], 0, 12)
    scratch, before = Scratch(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step, layout, kind, x in (
            ("first", even, torch.float32, right[:, :cols]),
            ("again", even, torch.float32, right[:, :cols]),
            ("wrote", even, torch.float32, right[:, :cols]),
            ("dealt", odd, torch.float32, right[:, :cols]),
            ("wider", odd, torch.float64, right[:, :cols]),
            ("aside", odd, torch.float64, right[:, 1:]),
        ):
            if step == "wrote":
                right.mul_(-1.5).add_(1)
            y, x = left.to(kind), x.to(kind)
            exact = torch.stack([a.double().t() @ b.double() for a, b in zip(*map(layout.split, (y, x)), strict=True)])
            norm = fused.fused_sq_norms(y, x, layout, None, scratch)
            assert_near(norm, exact.square().sum((1, 2)), allow=KINDS[kind], scale=0)
            left = left.flip(1)
    finally:
        torch.set_num_threads(before)


@NEEDS_COMPILER
def test_one_thread_and_several_give_the_same_sums() -> None:
    """And norms of another order of addition; what one trajectory has does not touch the others."""
    left, right = (torch.randn(6 * 8, d, generator=torch.Generator().manual_seed(d)) for d in (500, 70))
    left[8:16, 3] = float("nan")
    layout, factor, found = Layout(6, (6, 8)), torch.tensor([[1.0, 0, 1, 1, 1, 1], [0, 2, 0, 0, 0, 0]]), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        total = [torch.empty(500, 70) for _ in factor]
        norm = fused.fused_sq_norms(left, right, layout, Sink(total, SumPlan.of(factor)), Scratch())
        found.append((norm, *total, fused.half_gram_sq_norms(left, right, layout, Recent(2))))
    torch.set_num_threads(before)
    assert found[0][0].isnan().tolist() == found[0][-1].isnan().tolist() == [False, True, *[False] * 4]
    assert bool(found[0][1].isfinite().all())
    assert bool(found[0][2][3].isnan().all())
    for norm, *total, half in found[1:]:
        assert_rounding_only(norm[2:], found[0][0][2:])
        assert torch.equal(total[0], found[0][1])
        assert torch.equal(half[2:], found[0][-1][2:])


@NEEDS_COMPILER
def test_buffers_of_another_order_or_type_are_filled() -> None:
    left, right, layout = torch.randn(6, 5), torch.randn(6, 4), Layout(3, (3, 2))
    factor = torch.tensor([[1.0, 0, 2.0], [0, 0, 0]])
    plain, odd = ([torch.empty(5, 4), torch.empty(5, 4)], [torch.empty(4, 5).t(), torch.empty(5, 4).double()])
    for total in (plain, odd):
        fused.fused_sq_norms(left, right, layout, Sink(total, SumPlan.of(factor)), Scratch())
    assert all(torch.equal(x.float(), y) for x, y in zip(odd, plain, strict=True))
    assert not bool(plain[1].any())


@NEEDS_COMPILER
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "user_cache_path", lambda _: tmp_path)
    ran: list[tuple[str, ...]] = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda *command: (ran.append(command), run(*command))[1])
    for _ in range(2):
        fused.kernel.cache_clear()
        assert fused.kernel(torch.float32) is not None
    assert ["-shared" in command for command in ran] == [False, True, False]
    assert len(list((tmp_path / "kernels").iterdir())) == 1
    fused.kernel.cache_clear()


@pytest.mark.parametrize("compiler", ["no_such_compiler", "false"])
def test_without_a_compiler_the_other_methods_do_the_same(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`false` is one that fails."""
    monkeypatch.setattr(fused, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setenv("CC", compiler)
    fused.kernel.cache_clear()
    try:
        assert not fused.kernel_takes(torch.device("cpu"), torch.float32)
        with pytest.raises(InputError, match=r"fused needs a C compiler, \$CC or cc.*say block"):
            ScoreTape(nn.Linear(2, 2), method="fused")
        with pytest.raises(InputError, match="norm_method: fused needs a C compiler"):  # before a model is warmed up
            TrainConfig(norm_method="fused")
        assert calibration.candidates("fused", True, False) == calibration.candidates("block", True, False)
    finally:
        fused.kernel.cache_clear()


@NEEDS_COMPILER
def test_a_compiler_may_have_a_word_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ccache cc`, with a space before the compiler."""
    monkeypatch.setattr(fused, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setenv("CC", f"env {os.environ.get('CC') or 'cc'}")
    fused.kernel.cache_clear()
    try:
        assert fused.kernel(torch.float32) is not None
    finally:
        fused.kernel.cache_clear()


def test_half_precision_is_taken_by_blocks() -> None:
    assert not fused.kernel_takes(torch.device("cpu"), torch.bfloat16)
    assert not fused.kernel_takes(torch.device("meta"), torch.float32)
