"""What two ranks do, for `test_distributed.py`.

Eight trajectories of three prompts are dealt to the ranks in several ways, most of which tear prompts apart. Every
scenario makes one update; rank 0 saves what each rank saw. `single` is the same update in one process, with the kernel
on the whole batch and no distributed code at all.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partialmethod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from llm_bridge import (
    EssStepScale,
    Groups,
    ScoreTape,
    TokenBatch,
    distributed,
    gather_batch,
    log_ratio,
    mean_coefficient,
    present,
    split_group_coefficient,
    sum_gradients,
    surrogate,
    token_log_prob,
    trajectory_batch,
    world_size,
)
from llm_bridge.scores.score_pass import ScorePass
from llm_bridge.scores.shards import Giver
from vcposim.batch import Batch
from vcposim.catalogue import entry
from vcposim.errors import InputError

VOCABULARY, TIME, GROUPS = 11, 7, 3
GROUP = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0])
REWARD = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.2, 0.5, 0.0, 9.0]).double()
ABSENT = 8
"""a row without tokens of the policy: what a rank without trajectories feeds its forward pass"""
SPLITS = {
    "torn": ([0, 2, 4, 6], [1, 3, 5, 7]),
    "ragged": ([4, 5, ABSENT], [6, 1, 0, 7, 2, 3]),
    "starved": ([0, 1, 2, 3, 4, 5, 6, 7], [ABSENT]),
}
ESTIMATORS = ("vcpo", "vcpo_leave_one_out", "vcpo_group_std", "leverage_damped_mean")
GATHERED = ("self_normalized", "vcpo", "shrinkage")


def model_of(seed: int) -> GPT2LMHeadModel:
    """A two-layer GPT-2 in float64, weights spread so that the policies differ."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=TIME, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def tokens(rows: list[int]) -> TokenBatch:
    """Trajectories of 3 to 7 tokens, one of them the prompt; the last row has none of the policy's."""
    generator = torch.Generator().manual_seed(5)
    token = torch.randint(VOCABULARY, (9, TIME), generator=generator)
    length = torch.tensor([7, 5, 3, 6, 4, 7, 5, 6, 1])
    time = torch.arange(TIME)
    mask = ((time < length[:, None]) & (time > 0)).double()
    return TokenBatch(token[rows], mask[rows], (time < length[:, None]).long()[rows])


def record(rows: list[int], log_prob: Tensor, **options: Any) -> Batch:
    """The kernel's record of some rows; score norms from the tape on a whole (unsharded) copy of the model."""
    batch, whole = tokens(rows), model_of(0)
    with ScoreTape(whole) as tape:
        norm = tape.score_sq_norms(token_log_prob(whole, batch), batch.mask, keep=False)
    return trajectory_batch(
        REWARD[rows], log_prob, behavior(rows), batch.mask, score_sq_norm=norm, level="sequence", **options
    )


@torch.no_grad()
def behavior(rows: list[int]) -> Tensor:
    return token_log_prob(model_of(1), tokens(rows))


def update(model: nn.Module, rows: list[int], name: str, coefficient_of: Callable, factor: float) -> dict[str, Any]:
    """One forward, backward and braked AdamW step; the gradient and parameters whole again."""
    batch = tokens(rows)
    log_prob = token_log_prob(model, batch)
    c = coefficient_of(name, rows, log_prob)
    (surrogate(c, log_prob, batch.mask) * factor).backward()
    return braked_step(model, rows, log_prob) | {"coefficient": c}


def braked_step(model: nn.Module, rows: list[int], log_prob: Tensor) -> dict[str, Any]:
    mask, gradient = tokens(rows).mask, whole([p.grad for p in model.parameters()])
    brake = EssStepScale(torch.optim.AdamW(model.parameters(), lr=0.01))
    half = (len(rows) + 1) // 2  # two microbatches
    for part in (slice(half), slice(half, None)):
        brake.observe(log_ratio(log_prob, behavior(rows), mask)[part], present(mask)[part])
    seen = brake.step()
    after = whole([p.detach() for p in model.parameters()])
    return {"gradient": gradient, "parameters": after, "scale": seen.step_scale, "count": seen.trajectories}


def whole(tensors: list[Any]) -> Tensor:
    """One vector; sharded tensors are put together (a collective)."""
    return torch.cat([(x.full_tensor() if hasattr(x, "full_tensor") else x).flatten() for x in tensors])


def single(name: str) -> dict[str, Any]:
    """One process, the whole batch, the kernel."""

    def coefficient_of(name: str, rows: list[int], log_prob: Tensor) -> Tensor:
        groups = Groups.of(GROUP[rows])
        batch = record(rows, log_prob, groups=groups)
        return groups.flat(mean_coefficient(entry(name).estimator.coefficients(batch), batch))

    return update(model_of(0), list(range(8)), name, coefficient_of, 1.0)


def split(name: str, rows: list[int], log_prob: Tensor, process_group: Any = None) -> Tensor:
    return split_group_coefficient(entry(name).estimator, record(rows, log_prob), GROUP[rows], GROUPS, process_group)


def gathered(name: str, rows: list[int], log_prob: Tensor) -> Tensor:
    every = gather_batch(record(rows, log_prob), GROUP[rows])
    return every.local(mean_coefficient(entry(name).estimator.coefficients(every.batch), every.batch))


def ddp() -> nn.Module:
    return DistributedDataParallel(model_of(0))


def fsdp2() -> nn.Module:
    return sharded(model_of(0))


def sharded(model: GPT2LMHeadModel) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def bare() -> nn.Module:
    return model_of(0)


def fsdp2_checkpointed() -> nn.Module:
    model = model_of(0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return sharded(model.train())


def weight_line(weight: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """(u, v) of c = w (R - b) measure / G, an unknown b for each prompt: (n,), (groups, n)."""
    group = GROUP[rows]
    share = weight / (torch.bincount(GROUP[:ABSENT])[group] * GROUPS) * (torch.tensor(rows) != ABSENT)
    return share * REWARD[rows], share * (group == torch.arange(GROUPS)[:, None])


def by_tape(
    rows: list[int], name: str, wrap: Callable[[], nn.Module], affine: bool = False, chunks: int = 1
) -> dict[str, Any]:
    """Norms and gradient from the tape on each rank's own rows; `sum_gradients` adds up what no wrapper has.

    chunks: of the rows, one forward each; as many on all ranks, as FSDP2 gathers in every one.
    """
    model, batch = wrap(), tokens(rows)
    model(batch.token)  # a forward without backward must not matter
    with ScoreTape(model) as tape:
        parts = zip(batch.token.tensor_split(chunks), batch.mask.tensor_split(chunks), strict=True)
        log_prob = torch.cat([token_log_prob(model, TokenBatch(*part)) for part in parts])
        shared = {"level": "sequence"}
        part = trajectory_batch(REWARD[rows], log_prob, behavior(rows), batch.mask, **shared)
        line = weight_line(entry(name).estimator.weighting(part).value.detach(), rows) if affine else None
        norm = tape.score_sq_norms(log_prob, batch.mask, affine=line)
        own = trajectory_batch(REWARD[rows], log_prob, behavior(rows), batch.mask, score_sq_norm=norm, **shared)
        tape.backward(split_group_coefficient(entry(name).estimator, own, GROUP[rows], GROUPS))
    sum_gradients(model.parameters())
    return braked_step(model, rows, log_prob)


def duplicated(process_group: Any) -> dict[str, Any]:
    """Both ranks hold all trajectories, as tensor-parallel ranks do: coefficients, and the brake's count."""
    rows = list(range(8))
    with torch.no_grad():
        log_prob = token_log_prob(model_of(0), tokens(rows))
    c = split("vcpo_leave_one_out", rows, log_prob, process_group)
    brake = EssStepScale(torch.optim.AdamW(model_of(0).parameters()), process_group=process_group)
    brake.observe(log_ratio(log_prob, behavior(rows), tokens(rows).mask))
    seen = brake.step(lambda: None)
    return {"coefficient": c, "scale": seen.step_scale, "count": seen.trajectories}


def refused(call: Callable[[], object]) -> str:
    """The message of the InputError that a call raises."""
    try:
        call()
    except InputError as error:
        return str(error)
    return "no error"


class Borrower(nn.Module):
    """A head that multiplies by the weight of a map it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.own(x), self.other.weight)


def borrowed(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Borrower())
    with ScoreTape(model) as tape:
        log_prob = model(torch.ones(2, 5, 3).double()).log_softmax(-1)[..., 0]
        tape.score_sq_norms(log_prob, torch.ones(2, 5).double(), keep=False)


def checked(rank: int, affine: bool, owner: Any, name: str, wrong: Callable[..., None]) -> str:
    """What a rank says of a tape under FSDP2 if `wrong` takes the place of a method on rank 1 alone."""
    with mock.patch.object(owner, name, partialmethod(wrong, getattr(owner, name))) if rank else nullcontext():
        return refused(lambda: by_tape(SPLITS["torn"][rank], "vcpo", fsdp2, affine))


def larger_norm(self: Any, real: Any, name: str, param: nn.Parameter, grad: Tensor, place: Any) -> None:
    real(self, name, param, 1.01 * grad, place)


def larger_give(self: Any, real: Any, param: nn.Parameter, grad: Tensor) -> None:
    real(self, param, 1.1 * grad)


class Ways(nn.Module):
    """Two maps of one shape, called in any order, in pieces of four steps at most; log pi of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, token: Tensor, order: str) -> Tensor:
        x = self.embed(token)
        for name in order:
            x = x + torch.cat([getattr(self, name)(part) for part in x.split(4, 1)], 1).tanh()
        return self.head(x).log_softmax(-1).gather(2, token[..., None]).squeeze(2)


WAYS = {"other lengths": ("ab", "ab"), "other orders": ("ab", "ba"), "not called": ("ab", "a"), "never": ("a", "a")}
KINDS = ("general", "affine", "per token")


def own_ways(rank: int, orders: tuple[str, str], kind: str) -> dict[str, float]:
    """How far gradients under FSDP2 are from one process', of ranks that call their modules in their own ways."""
    torch.manual_seed(0)
    whole = Ways().double()
    sharded = Ways().double()
    sharded.load_state_dict(whole.state_dict())
    fully_shard(sharded)
    worst = dict.fromkeys(("gradient", "none"), 0.0)
    for seed in range(2):
        batches = []
        for r in range(2):
            own = torch.Generator().manual_seed(10 * seed + r)
            token = torch.randint(VOCABULARY, (3, 4 + 3 * r), generator=own)
            shape = token.shape if kind == "per token" else (3,)
            batches.append((token, torch.randn(shape, generator=own, dtype=torch.float64)))
        whole.zero_grad()
        for (token, c), order in zip(batches, orders, strict=True):
            log_prob = whole(token, order)
            (-(log_prob if kind == "per token" else log_prob.sum(1)) * c).sum().backward()
        token, c = batches[rank]
        sharded.zero_grad()
        with ScoreTape(sharded) as tape:
            line = (c - 0.3, torch.ones(3)) if kind == "affine" else None
            mask = torch.ones(token.shape)
            tape.score_sq_norms(sharded(token, orders[rank]), mask, affine=line, per_token=kind == "per token")
            tape.backward(c)
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            if p.grad is None or q.grad is None:
                worst["none"] += (p.grad is None) != (q.grad is None)
            else:
                error = float((q.grad.full_tensor() - p.grad).norm() / p.grad.norm())
                worst["gradient"] = max(worst["gradient"], error)
    return worst


def stopped(rank: int, what: str) -> str:
    """What a rank says of a pass that rank 1 alone cannot take."""
    model = fully_shard(Ways().double())

    def run() -> None:
        token, c = torch.arange(12).view(3, 4) % VOCABULARY, torch.tensor([0.5, -1.0, 0.2])
        with ScoreTape(model) as tape:
            v = torch.full((3,), torch.nan if rank and what == "line" else 1.0)
            mask = torch.ones(3, 3 if rank and what == "mask" else 4)
            tape.score_sq_norms(model(token, "ab"), mask, affine=(c, v) if what != "coefficient" else None)
            tape.backward(c * torch.nan if rank and what == "coefficient" else c.square() if rank else c)

    return refused(run)


def split_over_tensors() -> None:
    """A model that tensor parallelism has split: each rank computes a part of every trajectory."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ScoreTape(parallelize_module(Borrower(), mesh, {"own": ColwiseParallel()})).__enter__()


def nan_on_one_rank(rank: int) -> dict[str, Any]:
    p = nn.Parameter(torch.ones(3).double())
    p.grad = torch.ones(3).double()
    brake = EssStepScale(torch.optim.AdamW([p], lr=0.1))
    brake.observe(torch.tensor([0.0, float("nan") if rank else 0.1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = brake.step()
    return {"scale": seen.step_scale, "reason": seen.reason, "parameters": p.detach()}


def without_communication(update_of: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The mutant: each rank merges nothing, as if its own rows were the batch."""
    kept = distributed.world_size, distributed.rank
    distributed.world_size, distributed.rank = (lambda process_group=None: 1), (lambda process_group=None: 0)
    try:
        return update_of()
    finally:
        distributed.world_size, distributed.rank = kept


def scenarios(rank: int) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for wrap in (ddp, fsdp2):
        for how, rows in SPLITS.items():
            for name in ESTIMATORS:
                out[f"{wrap.__name__}/{how}/{name}"] = update(wrap(), rows[rank], name, split, world_size())
        for name in GATHERED:
            key = f"{wrap.__name__}/gathered/{name}"
            out[key] = update(wrap(), SPLITS["ragged"][rank], name, gathered, world_size())
    for wrap in (bare, fsdp2, fsdp2_checkpointed):
        for how, rows in SPLITS.items():
            out[f"tape/{wrap.__name__}/{how}/vcpo"] = by_tape(rows[rank], "vcpo", wrap)
            out[f"tape/{wrap.__name__}, affine/{how}/vcpo"] = by_tape(rows[rank], "vcpo", wrap, affine=True)
    for wrap, affine in ((fsdp2, False), (fsdp2, True), (fsdp2_checkpointed, True)):
        for how in ("torn", "ragged"):
            key = f"tape/{wrap.__name__} in chunks{', affine' * affine}/{how}/vcpo"
            out[key] = by_tape(SPLITS[how][rank], "vcpo", wrap, affine, chunks=2)
    for name in ESTIMATORS:
        out[f"tape/fsdp2/torn/{name}"] = by_tape(SPLITS["torn"][rank], name, fsdp2)
    alone = [dist.new_group([r]) for r in range(2)]
    out["replicas/data-parallel group"] = duplicated(alone[rank])
    out["replicas/world"] = duplicated(None)
    out["not a member"] = {"error": refused(lambda: duplicated(alone[1 - rank]))}
    out["taped in part"] = {"error": refused(lambda: ScoreTape(fsdp2(), unknown="loop").__enter__())}
    out["sharded in part"] = {"error": refused(lambda: ScoreTape(nn.ModuleList([fsdp2()])).__enter__())}
    out["borrowed weight"] = {"error": refused(lambda: borrowed(fully_shard))}
    out["tensor parallel"] = {"error": refused(split_over_tensors)}
    for affine in (False, True):
        key = f"checked{', affine' * affine}"
        norms = checked(rank, affine, ScorePass, "vector", larger_norm)
        gradient = checked(rank, affine, Giver, "give", larger_give)
        out[key] = {"norms": norms, "gradient": gradient}
    for name, orders in WAYS.items():
        for kind in KINDS:
            out[f"ways/{name}/{kind}"] = own_ways(rank, orders, kind)
    out["stopped"] = {what: stopped(rank, what) for what in ("mask", "line", "coefficient", "off the line")}
    out["nan"] = nan_on_one_rank(rank)
    # one row of three tokens on rank 0, three rows of two on rank 1
    out["rows"] = {"rows": distributed.gathered_rows(torch.full((1 + 2 * rank, 3 - rank), rank + 1.0))}
    torn = SPLITS["torn"][rank]
    out["mutant/average for sum"] = update(ddp(), torn, "vcpo", split, 1.0)
    out["mutant/own rows only"] = without_communication(lambda: update(ddp(), torn, "vcpo", split, 1.0))
    return out


def main(output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, scenarios(dist.get_rank()))
        if dist.get_rank() == 0:
            torch.save(every, output)
    finally:
        dist.destroy_process_group()
