"""Norms and sums in one pass over each product: kernels in C (`fused.c`), compiled on this machine at their first use.

An instantiated block costs a product, a pass that squares it and one that adds it to a sum. The kernel does both while
the product's entries are in registers, so that an affine update costs hardly more than an ordinary one. Where no sum is
formed, a second one computes the lower halves of the Gram matrices, in half to two thirds of the time of whole ones.
Both are exact; two more make an estimate (`sketch`). For float32 and float64 on a CPU, and optional: without a C
compiler torch's own products do the same.

The compiled file lies in the folder of caches, under the digest of its source, the compiler and this machine's
instruction set.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from llm_bridge.scores.layout import Layout
from llm_bridge.scores.norms import NO_SUMS, Recent, Scratch, Sink, SumPlan, of_grams
from vcposim.errors import InputError

SOURCE = Path(__file__).with_name("fused.c")
FLAGS = ("-O2", "-march=native", "-fno-tree-vectorize", "-funroll-loops", "-fpeel-loops", "-fno-math-errno")
REAL = {torch.float32: "float", torch.float64: "double"}
LEAST = 16
"""buckets that `fold` takes at least: as many as the widest register has numbers"""
COLUMNS, BAND = 1024, 1 << 15
"""columns of the right operand that are copied at a time, and entries of a sum that are gone through"""


@cache
def kernel(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernel for one type; None where there is no C compiler ($CC or cc), or none that can compile it."""
    compiler, real = shlex.split(os.environ.get("CC") or "cc"), REAL.get(dtype)  # "ccache cc" is one, too
    if not compiler or shutil.which(compiler[0]) is None or real is None:
        return None
    flags = (*FLAGS, f"-DREAL={real}")
    try:
        # what a compiler defines tells its version and the instructions of the machine it compiles for
        about = _run(*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull)
        digest = hashlib.sha256(" ".join(flags).encode() + about + SOURCE.read_bytes()).hexdigest()[:16]
        folder = user_cache_path("vcposim") / "kernels"
        built = folder / f"fused-{digest}.so"
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as aside:
                made = Path(aside) / built.name
                _run(*compiler, *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(made))
                made.replace(built)
        library = ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None
    size, address = ctypes.c_ssize_t, ctypes.c_void_p
    library.height.restype = library.width.restype = library.side.restype = library.few.restype = size
    library.fused.restype = None
    library.fused.argtypes = [
        address,
        size,
        address,
        *[size] * 5,
        *[address] * 2,
        *[size] * 3,
        *[address] * 6,
        size,
        address,
    ]
    library.gram.restype = None
    library.gram.argtypes = [address, *[size] * 5, *[address] * 3]
    library.fold.restype = None
    library.fold.argtypes = [address, *[size] * 5, *[address] * 4]
    library.sketch.restype = None
    library.sketch.argtypes = [address, *[size] * 4, address, address, size, *[address] * 5]
    return library


def _run(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout


def require_kernel(method: str, argument: str = "method") -> None:
    """Refuse "fused" on a machine that has no compiler for it, given as an `argument` of that name.

    Raises `InputError` there.
    """
    if method == "fused" and kernel(torch.float32) is None:
        why = "needs a C compiler, $CC or cc, and there is none that can compile it"
        raise InputError(f"{argument}: fused {why}; install one, or say block")


def kernel_takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can take operands of this kind."""
    return device.type == "cpu" and kernel(dtype) is not None


def fused_sq_norms(
    left: Tensor, right: Tensor, layout: Layout, sink: Sink | None, scratch: Scratch, block: Tensor | None = None
) -> Tensor:
    """Exact norms, each block added to the sink where it is made: `left` (N, out), `right` (N, in) -> (n,).

    Or left in `block` (n, out, in), where there is no sink. A thread takes a band of rows, as many as torch would use.
    """
    library = kernel(left.dtype)
    assert library is not None
    assert right.dtype == left.dtype
    left, right = (x if x.stride(1) == 1 else x.contiguous() for x in (left, right))
    rows, cols, n = left.shape[1], right.shape[1], layout.n
    begin, end, longest = _places(layout, left.shape[0])
    high, wide = _sizes(left.dtype)
    tall = max(1, min(BAND // min(cols, COLUMNS), rows + high - 1) // high) * high
    own, panels = longest * tall, left.shape[0] * (-(-min(cols, COLUMNS) // wide) * wide)

    assert sink is None or block is None
    buffer: Sequence[Tensor] = sink.buffer if sink is not None else [] if block is None else list(block)
    plain = [x.is_contiguous() and x.dtype == left.dtype for x in buffer]
    total = [x if same else left.new_zeros(x.shape) for x, same in zip(buffer, plain, strict=True)]
    where = (ctypes.c_void_p * max(1, len(total)))(*[x.data_ptr() for x in total])
    sums = NO_SUMS if sink is None else sink.sums
    factor, first, empty = (None, None, ()) if block is not None else _factors(sums, left.dtype)
    for k in empty:
        total[k].zero_()

    threads = max(1, min(torch.get_num_threads(), rows // (4 * high)))
    each = -(-rows // (threads * high)) * high
    size, squares = left.element_size(), 8 * n
    each_own = squares + 8 * -(-own * size // 8)
    mine = scratch.at_least(threads * each_own // size, left).data_ptr()
    copied, packed = scratch.copied.room(right, layout, threads * panels, reuse=cols <= COLUMNS)
    copy = copied.data_ptr()
    norm = left.new_empty(n) if threads == 1 else left.new_empty(threads, n)
    out = norm.data_ptr()

    def band(k: int) -> None:
        at = mine + k * each_own
        library.fused(
            left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), cols, COLUMNS, tall, n, begin, end,
            k * each, min(rows, (k + 1) * each), len(total), factor, first, where,
            at, at + squares, copy + k * panels * size, packed, out + k * n * size,
        )  # fmt: skip

    _on_threads(band, threads)
    for x, y in zip(buffer, total, strict=True):
        if x is not y:
            x.copy_(y)
    return norm if threads == 1 else norm.sum(0)


def half_gram_sq_norms(left: Tensor, right: Tensor, layout: Layout, recent: Recent) -> Tensor:
    """Exact norms from the lower halves of the Gram matrices: (N, out), (N, in) -> (n,). `recent` is for them alone."""
    library = kernel(left.dtype)
    assert library is not None
    each = [recent.of(x, lambda x: _half_gram(x, layout)) for x in (left, right)]
    size = _tiles(layout, left.shape[0], library.side())
    first, second = ([x.view(layout.n, -1)] if len(set(size)) == 1 else x.split(size) for x in each)
    return of_grams(first, second, left, right, layout)


def _half_gram(x: Tensor, layout: Layout) -> Tensor:
    library = kernel(x.dtype)
    assert library is not None
    n = layout.n
    x = x if x.stride(1) == 1 else x.contiguous()
    begin, end, _ = _places(layout, x.shape[0])
    size = _tiles(layout, x.shape[0], library.side())
    out = x.new_empty(sum(size))
    at = (ctypes.c_void_p * n)(*(out.data_ptr() + x.element_size() * k for k in accumulate(size[:-1], initial=0)))

    threads = min(torch.get_num_threads(), n)

    def some(k: int) -> None:
        library.gram(
            x.data_ptr(), x.stride(0), *x.shape, k * n // threads, (k + 1) * n // threads, begin, end, at
        )  # fmt: skip

    _on_threads(some, threads)
    return out


def _on_threads(some: Callable[[int], None], threads: int) -> None:
    if threads == 1:
        return some(0)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(threads)))


def fold(x: Tensor, sign: Tensor, turn: Tensor) -> Tensor:
    """Columns of x (N, d) times their signs, added up in K buckets: sign (blocks, K), turn (blocks,) -> (N, K).

    K is a power of two from `LEAST` on. Column j, of block j // K, goes to bucket (j % K) ^ turn.
    """
    library = kernel(x.dtype)
    assert library is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    buckets = sign.shape[1]
    threads = max(1, min(torch.get_num_threads(), len(x) // buckets))
    sign, turn = sign.contiguous(), turn.contiguous()
    out, rest = x.new_empty(len(x), buckets), x.new_empty(threads, buckets)

    def some(k: int) -> None:
        top, bottom = k * len(x) // threads, (k + 1) * len(x) // threads
        library.fold(
            x.data_ptr(), x.stride(0), x.shape[1], top, bottom, buckets,
            sign.data_ptr(), turn.data_ptr(), rest[k].data_ptr(), out.data_ptr(),
        )  # fmt: skip

    _on_threads(some, threads)
    return out


def folded_sq_norms(left: Tensor, sign: Tensor, turn: Tensor, other: Tensor, layout: Layout) -> Tensor:
    """||fold(left)_i^T other_i||^2, folded where it is read: (N, d), (blocks, K), (blocks,), other (N, K) -> (n,)."""
    library = kernel(left.dtype)
    assert library is not None
    left = left if left.stride(1) == 1 else left.contiguous()
    buckets, n = sign.shape[1], layout.n
    begin, end, _ = _places(layout, left.shape[0])
    threads = min(torch.get_num_threads(), n)
    sign, turn, other = sign.contiguous(), turn.contiguous(), other.contiguous()
    rest, square = left.new_empty(threads, buckets + library.few() + 1, buckets), left.new_empty(n, dtype=torch.float64)

    def some(k: int) -> None:
        library.sketch(
            left.data_ptr(), left.stride(0), left.shape[1], k * n // threads, (k + 1) * n // threads, begin, end,
            buckets, sign.data_ptr(), turn.data_ptr(), other.data_ptr(), rest[k].data_ptr(), square.data_ptr(),
        )  # fmt: skip

    _on_threads(some, threads)
    return square.to(left.dtype)


def _tiles(layout: Layout, rows: int, side: int) -> list[int]:
    """How many numbers the half of each trajectory's Gram matrix takes, in tiles of so many rows.

    >>> _tiles(Layout(2, (1, 10), ((0, 4), (4, 10)), torch.tensor([0] * 4 + [1] * 6)), 10, 4)
    [16, 48]
    """

    def make() -> list[int]:
        wide = [-(-(stop - start) // side) for start, stop in layout.bounds(rows)]
        return [side * side * k * (k + 1) // 2 for k in wide]

    return layout.once(("tiles", rows, side), make)


def _places(layout: Layout, rows: int) -> tuple[ctypes.Array[Any], ctypes.Array[Any], int]:
    """The first rows of trajectories, those after their last ones, and the most steps, as the kernel takes them."""

    def make() -> tuple[ctypes.Array[Any], ctypes.Array[Any], int]:
        kind, bounds = ctypes.c_ssize_t * layout.n, layout.bounds(rows)
        begin, end = zip(*bounds, strict=True)
        return kind(*begin), kind(*end), max(stop - start for start, stop in bounds)

    return layout.once(("places", rows), make)


@lru_cache(maxsize=8)
def _factors(sums: SumPlan, dtype: torch.dtype) -> tuple[ctypes.Array[Any], ctypes.Array[Any], list[int]]:
    """The factors of each sum, row after row, the first trajectory that has one, and the sums of nothing.

    In the kernel's type, in which a factor may be zero that is none in a wider one.
    """
    real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    flat = (real * max(1, sums.factor.numel()))(*(factor for row in sums.row for factor in row))
    n = sums.factor.shape[1]
    first = [next((i for i in range(n) if flat[k * n + i]), -1) for k in range(len(sums.row))]
    return flat, (ctypes.c_ssize_t * max(1, len(first)))(*first), [k for k, i in enumerate(first) if i < 0]


@cache
def _sizes(dtype: torch.dtype) -> tuple[int, int]:
    """Height and width of the kernel's tile."""
    library = kernel(dtype)
    assert library is not None
    return library.height(), library.width()
