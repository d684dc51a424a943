"""What do exact score norms cost? Paired ratios to a plain batched update with known coefficients.

    python -m simulations.bench.scores --quick             small sizes, under two minutes on a quiet core
    python -m simulations.bench.scores --case 135M:8:128   one case: size, trajectories n, length T
    python -m simulations.bench.scores --memory            peak memory instead of time
    python -m simulations.bench.scores --error --quick     how far the approximate norms are off
    python -m simulations.bench.scores --record FILE ...   also append every ratio to FILE (JSON lines)
    python -m simulations.bench.scores --markdown FILE     the tables of a record, as in scores.md beside this file
    python -m simulations.bench.scores --device cuda --dtype bfloat16 --case 135M:8:128 --case 1B:8:512

Every method does the same work: forward, norms, the off-policy optimal baseline b = sum w^2 s R / sum w^2 s with s
the squared norms, and p.grad = -sum_i w_i (R_i - b) grad log pi(tau_i). Plain knows b. Methods are interleaved, each
between plain updates of its own; the table gives the median of the ratios and half the interquartile range. A ratio
is process CPU time over the mean of the two plain ones beside it (on an accelerator: wall time, synchronized).
glibc is told to keep freed memory, as an accelerator's allocator does: page faults of fresh memory, slow on virtual
machines, would otherwise fall on one method or another by chance. Trajectories are in the order of
their rewards, as a trainer can arrange at no cost: the tape gives neighbors with equal rewards one product.

Cost model, in multiply-adds per linear map of (rows, cols) and trajectory of length T. A plain update spends
3 T rows cols: forward, input gradient, weight gradient.

    affine         0 more. The weight gradient is formed a trajectory at a time. The compiled kernel (`fused`) squares
                   it and, if rewards take two values, adds it to one of two sums, in registers. Without a compiler
                   (`affine, block`) it is formed in blocks of cache size: products of inner dimension T instead of n T
                   (a little slower), one read for the square and one add. These passes cost a constant times rows
                   cols: a share that falls as 1 / T. Where Gram matrices are cheaper, the sums take one product per
                   run of equal rewards. One more gradient buffer. Rows without output gradient are left out, which
                   plain does not do: in these cases the prompt, a quarter of the rows of the head and of the last
                   block. What that is worth is told by --prompt 0, where there are none.
    general        T^2 (rows + cols) / 2 more: the lower halves of Gram matrices, with the compiled kernel; or 0, where
                   blocks take at most eight times the memory of an operand, are kept in their place and added up when
                   the coefficients are known: a pass over n rows cols numbers that are written and read. Without a
                   compiler min(T rows cols, T^2 (rows + cols)): blocks thrown away, or Gram matrices; a third at most.
                   Activations and output gradients stay alive, n T (rows + cols) numbers per map.
    sketch, K      T (rows + cols) additions more, T cols of them once for all maps of one input, and T K^2; without a
                   compiler T K (rows + cols) in place of the additions (K: twice the columns). No term in T^2. The
                   norms carry an error, the gradient none. Operands stay alive as in general, or two sums are formed
                   as in affine, which costs the two passes of adding them up.
    two backwards  the norms as in general, plus 2 T rows cols for the second backward.
    loop           0 more, but at batch size one in every layer, and two gradient buffers in memory are read and
                   written for every trajectory.
    vmap           0 more, n gradient buffers.

The tape's RMS norm is one fused function and a little cheaper than the library's; all methods here that use the tape
profit from that.
"""

import argparse
import ctypes
import gc
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_bridge.logprobs import TokenBatch, next_token_logits, token_log_prob
from llm_bridge.scores import ScoreTape, last_block, logit_sq_norms, norm_error, trajectory_sums
from llm_bridge.scores.norms import sum_dtype
from simulations.bench.score_records import append, load, machine, markdown

#       vocabulary, width, layers, heads, key-value heads, inner width, tied
SHAPES = {
    "tiny": (64, 16, 2, 2, 1, 32, True),
    "1M": (512, 128, 4, 4, 2, 344, False),
    "10M": (4096, 320, 6, 5, 5, 864, False),
    "135M": (49152, 576, 30, 9, 3, 1536, True),  # SmolLM2-135M
    "0.5B": (151936, 896, 24, 14, 2, 4864, True),  # Qwen2.5-0.5B, without its biases
    "1.5B": (151936, 1536, 28, 12, 2, 8960, True),  # Qwen2.5-1.5B, without its biases
    "1B": (128256, 2048, 16, 32, 8, 8192, True),
}
QUICK = ("1M:16:64", "10M:8:128")
FULL = ("1M:16:64", "1M:32:64", "10M:16:64", "10M:8:128", "10M:8:256", "10M:8:512", "135M:8:128")


@dataclass(frozen=True)
class ModelSetting:
    """Where and in what precision models run, and which part of each trajectory is prompt."""

    device: str = "cpu"
    dtype: str = "float32"
    prompt: float = 0.25
    checkpointing: bool = False
    note: str = ""
    """what else a reader of the record should know, say that the machine was shared"""


@dataclass(frozen=True)
class Workload:
    """One line of the table: a model, n trajectories of T tokens, their weights and rewards."""

    name: str
    model: nn.Module
    batch: TokenBatch
    weight: Tensor
    reward: Tensor


def make_case(name: str, setting: ModelSetting | None = None, ragged: bool = False, seed: int = 0) -> Workload:
    """A random Llama of the named shape; rewards are 0 or 1.

    ragged: trajectories of unequal length that repeat few or many tokens, so that norms differ.
    """
    setting = setting or ModelSetting()
    size, n, t = name.split(":")[0], *map(int, name.split(":")[1:])
    vocabulary, width, layers, heads, kv, inner, tied = SHAPES[size]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=inner, tie_word_embeddings=tied, use_cache=False, pad_token_id=None,
    )  # fmt: skip
    with torch.device(setting.device):
        model = LlamaForCausalLM(config).to(getattr(torch, setting.dtype)).train()
    if setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mask = torch.ones(n, t)
    mask[:, : int(t * setting.prompt)] = 0
    weight = (0.5 * torch.randn(n)).exp()
    reward = (torch.rand(n) < 0.4).float()
    reward[0], reward[1] = 1.0, 0.0
    reward = reward.sort().values
    token = torch.randint(vocabulary, (n, t))
    if ragged:
        for i in range(n):
            token[i] = token[i, torch.arange(t) % max(4, t * (i + 1) // n)]
            mask[i, t - (t // 2) * (i * 7 % n) // n :] = 0
    token, mask, weight, reward = (x.to(setting.device) for x in (token, mask, weight, reward))
    return Workload(name, model, TokenBatch(token, mask), weight, reward)


def opob_baseline(sq_norm: Tensor, case: Workload) -> Tensor:
    """b = sum w^2 s R / sum w^2 s, s the squared norms: (n,) -> ()."""
    share = case.weight.square() * sq_norm.to(case.weight.dtype)
    return (share * case.reward).sum() / share.sum()


def opob(sq_norm: Tensor, case: Workload) -> Tensor:
    """Coefficients w (R - b): (n,)."""
    return case.weight * (case.reward - opob_baseline(sq_norm, case))


# --- the methods ------------------------------------------------------------------------------------------------------


def plain(case: Workload) -> None:
    """The floor: coefficients known, one batched forward and backward."""
    total = trajectory_sums(token_log_prob(case.model, case.batch), case.batch.mask)
    (-(case.weight * (case.reward - 0.4)) * total).sum().backward()


def _taped(case: Workload, affine: bool, **options: object) -> Tensor:
    line = (case.weight * case.reward, case.weight) if affine else None
    with ScoreTape(case.model, verify="never", **options) as tape:  # type: ignore[arg-type]
        log_prob = token_log_prob(case.model, case.batch)
        norm = tape.score_sq_norms(log_prob, case.batch.mask, affine=line)
        tape.backward(opob(norm, case))
    return norm


def affine(case: Workload) -> Tensor:
    """Squared norms, exact, coefficients on a line: (n,). Two sums."""
    return _taped(case, True)


def general(case: Workload) -> Tensor:
    """Squared norms, exact, any coefficients: (n,). Weight gradients are deferred."""
    return _taped(case, False)


def sketch(case: Workload) -> Tensor:
    """Squared norms from 16 random signings, unbiased: (n,). Exact gradient of any coefficients: operands are kept."""
    return _taped(case, False, norm="sketch")


def sketch_affine(case: Workload) -> Tensor:
    """The same with coefficients on a line: (n,). Two sums instead of operands."""
    return _taped(case, True, norm="sketch")


def two_backward_ghost(case: Workload) -> Tensor:
    """Gram norms in a first backward, the weighted gradient in a second: (n,)."""
    return _taped(case, False, method="gram", parameters=list(case.model.parameters()))


def loop_sums(case: Workload) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Squared norms (n,) and the sums of w R grad log pi and of w grad log pi, from a micro-batch of one."""
    params = list(case.model.parameters())
    rewarded, score = ([torch.zeros_like(p) for p in params] for _ in range(2))
    norm = torch.zeros_like(case.weight)
    for i in range(len(case.weight)):
        one = TokenBatch(case.batch.token[i : i + 1], case.batch.mask[i : i + 1])
        total = trajectory_sums(token_log_prob(case.model, one), one.mask)
        total.sum().backward()
        grads = [p.grad for p in params if p.grad is not None]
        each = torch._foreach_norm(grads, 2, dtype=sum_dtype(grads[0].dtype))
        norm[i] = torch.stack(each).square().sum()
        torch._foreach_add_(rewarded, grads, alpha=float(case.weight[i] * case.reward[i]))
        torch._foreach_add_(score, grads, alpha=float(case.weight[i]))
        case.model.zero_grad()
    return norm, rewarded, score


def loop_two_buffers(case: Workload) -> Tensor:
    """Micro-batch of one, reward-weighted and unweighted sums kept apart, as the reference code does: (n,)."""
    norm, rewarded, score = loop_sums(case)
    torch._foreach_add_(rewarded, score, alpha=-float(opob_baseline(norm, case)))
    for p, grad in zip(case.model.parameters(), torch._foreach_neg(rewarded), strict=True):
        p.grad = grad
    return norm


def vmap(case: Workload) -> Tensor:
    """Squared norms of all per-trajectory gradients at once, by torch.func: (n,)."""
    if case.weight.device.type == "cpu" and sum(p.numel() for p in case.model.parameters()) > 2e7:
        raise NotImplementedError("n gradients of this model do not fit")
    params = {name: p.detach() for name, p in case.model.named_parameters()}

    def score(params: dict[str, Tensor], token: Tensor, mask: Tensor) -> Tensor:
        def call(**kwargs: object) -> object:
            return torch.func.functional_call(case.model, params, (), kwargs, tie_weights=True)

        wrapped = type("Functional", (), {"__call__": lambda self, **kwargs: call(**kwargs)})()
        one = TokenBatch(token[None], mask[None])
        return trajectory_sums(token_log_prob(wrapped, one), one.mask).sum()

    grads = torch.func.vmap(torch.func.grad(score), (None, 0, 0))(params, case.batch.token, case.batch.mask)
    norm = torch.stack([g.flatten(1).square().sum(1, dtype=sum_dtype(g.dtype)) for g in grads.values()]).sum(0)
    c = opob(norm, case)
    for name, p in case.model.named_parameters():
        p.grad = -torch.tensordot(c.to(p.dtype), grads[name], dims=1)
    return norm


def opacus(case: Workload) -> Tensor:
    """Fast ghost clipping's norms, then a second backward: (n,)."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    for p in case.model.parameters():
        p._forward_counter = 0  # type: ignore[attr-defined]
    wrapped = GradSampleModuleFastGradientClipping(case.model, strict=False, loss_reduction="sum")
    try:
        total = trajectory_sums(token_log_prob(wrapped, case.batch), case.batch.mask)
        total.sum().backward(retain_graph=True)
        norm = wrapped.get_norm_sample().square()
        c = opob(norm, case)
        case.model.zero_grad()
        wrapped.disable_hooks()
        (-c * total).sum().backward()
    finally:
        wrapped.to_standard_module()
    return norm


def affine_block(case: Workload) -> Tensor:
    """`affine` as it is without a compiler: (n,)."""
    return _taped(case, True, method="block")


METHODS: dict[str, Callable[[Workload], Tensor]] = {
    "affine": affine,
    "affine, block": affine_block,
    "general": general,
    "sketch": sketch,
    "sketch, affine": sketch_affine,
    "loop, two buffers": loop_two_buffers,
    "vmap": vmap,
    "ghost, two backwards": two_backward_ghost,
    "opacus": opacus,
}
TIMED: dict[str, Callable[[Workload], Tensor | None]] = {"plain": plain, **METHODS}
"""plain is its own control: a row that is not 1 says how far the others may be trusted"""


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(method: Callable[[Workload], Tensor | None], case: Workload) -> float:
    """Process CPU time of one update from cleared gradients; on an accelerator wall time until it is idle."""
    case.model.zero_grad(set_to_none=True)
    start = _clock(case)
    method(case)
    return _clock(case) - start


def _clock(case: Workload) -> float:
    if case.weight.device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(case.weight.device)
    return time.perf_counter()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """No returns of memory to the system, no memory maps of single arrays; does nothing where there is no glibc."""
    _tell_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def return_freed_memory() -> None:
    """Arrays of more than 64 kB go back to the system when they are freed: what is resident is what is alive."""
    _tell_malloc({M_MMAP_THRESHOLD: 1 << 16})


def _tell_malloc(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in options.items():
            mallopt(name, value)


def paired_ratios(case: Workload, methods: list[str], rounds: int) -> dict[str, list[float] | str]:
    """Ratios to the plain updates on both sides; a method that cannot run maps to the reason."""
    result: dict[str, list[float] | str] = {}
    for name in methods:
        try:
            TIMED[name](case)  # warm up: calibration, allocator
            result[name] = []
        except Exception as error:
            result[name] = _reason(error)
    plain(case)
    before = seconds(plain, case)
    for _ in range(rounds):
        for name, ratios in result.items():
            if isinstance(ratios, list):
                own = seconds(TIMED[name], case)
                after = seconds(plain, case)
                ratios.append(2 * own / (before + after))
                before = after
    case.model.zero_grad(set_to_none=True)
    return result


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:70]


def peak_mebibytes(name: str, method: str, setting: ModelSetting) -> float | str:
    """Peak memory of two updates, in a process of its own: resident above the empty interpreter's, or allocated.

    A method that cannot run maps to the reason.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, method, setting))


def _peak(name: str, method: str, setting: ModelSetting) -> float | str:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case = make_case(name, setting)
    run = TIMED[method]
    try:
        for _ in range(2):
            case.model.zero_grad(set_to_none=True)
            run(case)
    except Exception as error:
        return _reason(error)
    if setting.device != "cpu":
        return torch.cuda.max_memory_allocated(setting.device) / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def time_table(names: list[str], methods: list[str], rounds: int, setting: ModelSetting, record: str | None) -> None:
    """Measure, record and print the ratios of each case as soon as they are known."""
    for name in names:
        case = make_case(name, setting)
        measured = paired_ratios(case, methods, rounds)
        row = {"case": name, **machine(case.weight.device), **asdict(setting), "ratios": measured}
        if record:
            append(record, row)
        print(markdown([row]), flush=True)
        del case
        gc.collect()


def memory_table(names: list[str], methods: list[str], setting: ModelSetting, record: str | None) -> None:
    """Measure, record and print peak memory: ratio to plain's, and what exceeds plain in units of one gradient."""
    for name in names:
        weights = sum(p.numel() * p.element_size() for p in make_case(name, setting).model.parameters()) / 2**20
        peak = {method: peak_mebibytes(name, method, setting) for method in dict.fromkeys(["plain", *methods])}
        row = {
            "case": name,
            **machine(torch.device(setting.device)),
            **asdict(setting),
            "gradient": weights,
            "peak": peak,
        }
        if record:
            append(record, row)
        print(markdown([row]), flush=True)


def estimates(case: Workload) -> dict[str, Tensor]:
    """Squared norms (n,) by every approximation, and by the trajectory's length alone."""
    with torch.no_grad():
        logit = logit_sq_norms(next_token_logits(case.model, case.batch), case.batch.token, case.batch.mask)
    return {
        **{f"sketch, {k} columns": _norm_only(case, norm="sketch", columns=k) for k in (1, 4, 16, 64)},
        "last block": _norm_only(case, parameters=last_block(case.model)),
        "logit proxy": logit,
        "length": case.batch.mask.sum(1),
    }


def _norm_only(case: Workload, **options: object) -> Tensor:
    with ScoreTape(case.model, **options) as tape:  # type: ignore[arg-type]
        return tape.score_sq_norms(token_log_prob(case.model, case.batch), case.batch.mask, keep=False)


def error_table(names: list[str], setting: ModelSetting) -> None:
    """Print, per case, how each approximation's squared norms differ from the exact ones once scaled to them."""
    for name in names:
        case = make_case(name, setting, ragged=True)
        exact = _norm_only(case)
        print(f"{name}: exact norms vary by a factor {float(exact.max() / exact.min()):.1f}")
        for label, estimate in estimates(case).items():
            error = norm_error(estimate, exact)
            spread, alike = error["relative_sd"], error["correlation"]
            print(f"    {label:20s} relative sd {spread:.3f}, correlation of logs {alike:.3f}")


def main() -> None:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, fewer rounds")
    parser.add_argument("--case", action="append", help="SIZE:N:T, may be repeated")
    parser.add_argument("--method", action="append", choices=list(TIMED), help="may be repeated; all by default")
    parser.add_argument("--rounds", type=int, help="pairs per method")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--error", action="store_true", help="errors of the approximations instead of time")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--prompt", type=float, default=0.25, help="part of each trajectory that is prompt")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model")
    parser.add_argument("--note", default="", help="put into the record and above the table: 'shared machine'")
    parser.add_argument("--record", metavar="FILE", help="append what is measured to this file")
    parser.add_argument("--markdown", metavar="FILE", help="print the tables of a record, and measure nothing")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(load(options.markdown)))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = options.case or list(QUICK if options.quick else FULL)
    methods = options.method or list(TIMED)
    setting = ModelSetting(options.device, options.dtype, options.prompt, options.checkpointing, options.note)
    if options.error:
        error_table(names, setting)
    elif options.memory:
        memory_table(names, methods, setting, options.record)
    else:
        keep_freed_memory()
        time_table(names, methods, options.rounds or (3 if options.quick else 9), setting, options.record)


if __name__ == "__main__":
    main()
