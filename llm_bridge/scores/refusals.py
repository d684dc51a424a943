"""What a tape refuses before it computes: models, parameters, arrays and graphs of which it would miss scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointError

from llm_bridge.scores.inner import any_cut, cut_by
from llm_bridge.scores.layers import Twin
from llm_bridge.scores.layout import WHOLE_LOOP
from vcposim.errors import InputError


def refuse_modules(modules: Mapping[str, nn.Module], method: str) -> None:
    """Raise InputError for wrapped and scripted models, gradients that have no norm, and a tape that is open."""
    for name, module in modules.items():
        if isinstance(module.__dict__.get("forward"), Twin):
            raise InputError("ScoreTape: another tape is open on this model; close it first")
        if isinstance(module, (nn.parallel.DistributedDataParallel, FullyShardedDataParallel, nn.DataParallel)):
            place = f"its part {name}" if name else "model"
            raise InputError(
                f"ScoreTape: {place} is wrapped in {type(module).__name__}, whose hooks would miss the gradient; "
                "unwrap it (model.module) and call sum_gradients"
            )
        if isinstance(module, torch.jit.ScriptModule) and method != "loop" and any(True for _ in module.parameters()):
            raise InputError(
                f"ScoreTape: {name or 'the model'} is scripted or traced by torch.jit, whose parts nobody sees; take "
                f"the module it was made from, or {WHOLE_LOOP}"
            )
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without backward leaves the root's parameters whole
        if not any(p is not None and p.requires_grad for p in module._parameters.values()):
            continue
        # of the class or the object: a module's own look-up is slow where there is nothing
        if module.__dict__.get("sparse", getattr(type(module), "sparse", False)) is True:
            raise InputError(f"ScoreTape: {name} has sparse gradients, which have no norm here; give sparse=False")
        by_count = module.__dict__.get("scale_grad_by_freq", getattr(type(module), "scale_grad_by_freq", False))
        if by_count is True and method != "loop":
            raise InputError(
                f"ScoreTape: {name} divides gradients by counts over the batch, which no row knows; give "
                f"scale_grad_by_freq=False, or {WHOLE_LOOP}"
            )


def refuse_parameters(named: Sequence[tuple[str, nn.Parameter]], model: nn.Module, second_backward: bool) -> None:
    """Raise InputError for parameters whose gradients no tape sees."""
    for name, p in named:
        if isinstance(p, DTensor) and second_backward:
            raise InputError(
                f"ScoreTape: {name} is sharded; parameters=, unknown='loop' and method='loop' need a second "
                "backward, which fully_shard would average over ranks; use neither"
            )
        whole = isinstance(model, FSDPModule)
        if isinstance(p, DTensor) and (not whole or sum(not q.is_replicate() for q in p.placements) > 1):
            raise InputError(
                f"ScoreTape: {name} is split by {p.placements} over ranks; only fully_shard on the whole model, "
                "which gathers parameters for each forward, can be taped"
            )
        if p.requires_grad and p.is_complex():
            raise InputError(
                f"ScoreTape: {name} is complex; hold its real and imaginary parts as one real parameter and "
                "take torch.view_as_complex of it in the forward"
            )


def refuse_hooks(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise InputError for hooks on gradients of parameters."""
    for name, p in named:
        if p.requires_grad and (p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)):
            raise InputError(
                f"ScoreTape: {name} has a gradient hook, which would not run; remove it while taping, and change "
                "p.grad after `backward` instead"
            )


def refuse_frozen(named: Sequence[tuple[str, nn.Parameter]], used: Set[int]) -> None:
    """Raise InputError for a parameter of a graph, by `id`, that was trainable when it was made and is not now."""
    for name, p in named:
        if id(p) in used and not p.requires_grad:
            raise InputError(f"ScoreTape: {name} was frozen between the forward and its norms; freeze it before")


@contextmanager
def refused_backward(looped: bool) -> Iterator[None]:
    """Raise InputError, with what to do, where autograd says that a graph has had its backwards, or changed."""
    try:
        yield
    except RuntimeError as error:
        if "graph a second time" in str(error):
            raise InputError(
                "log_prob: an earlier pass used up its graph; give each call of score_sq_norms its own forward"
            ) from error
        if "use_reentrant=True" in str(error):
            raise InputError(
                "log_prob: a reentrant checkpoint lies inside a looped module, whose backwards it does not allow; give "
                "use_reentrant=False to checkpointing"
            ) from error
        if "under selective activation checkpoint" in str(error) or "not found in storage" in str(error):
            raise InputError(
                "log_prob: selective activation checkpoints allow one backward, and a comparison, a loop or "
                "coefficients a token take more; have a pass with other checkpoints compared, and give verify='never' "
                "with these, or use plain checkpoints"
            ) from error
        if isinstance(error, CheckpointError) and not looped:
            raise InputError(
                "log_prob: a checkpoint saves something else when it runs again inside the tape, as around a looped "
                f"module whose weight a hook makes; {WHOLE_LOOP}"
            ) from error
        raise


def refuse_arrays(log_prob: Tensor, mask: Tensor, token_weight: Tensor | None) -> None:
    """Raise InputError where shapes disagree or `log_prob` (row, time) has no graph."""
    if torch.is_inference_mode_enabled():
        raise InputError("ScoreTape: torch.inference_mode() allows no backward; take norms outside it")
    if log_prob.dim() != 2:
        raise InputError(f"log_prob: shape {tuple(log_prob.shape)}; give (row, time)")
    if not len(log_prob):
        raise InputError("log_prob: has no rows; give one that is masked throughout, of norm 0, with coefficient 0")
    if not log_prob.requires_grad:
        raise InputError("log_prob: carries no gradient; compute it inside the `with`, outside torch.no_grad()")
    for name, array in (("mask", mask), ("token_weight", token_weight)):
        if array is not None and array.shape != log_prob.shape:
            raise InputError(f"{name}: shape {tuple(array.shape)} differs from log_prob's {tuple(log_prob.shape)}")


def refuse_coefficient(coefficient: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError for a `coefficient` (...) of another shape, or not finite."""
    if tuple(coefficient.shape) != shape:
        one = "token (the norms were taken with per_token)" if len(shape) == 2 else "trajectory"
        remedy = "" if len(shape) == 2 else "; for one per token, take the norms with per_token=True"
        raise InputError(f"coefficient: shape {tuple(coefficient.shape)}; give one per {one}, {shape}{remedy}")
    if not coefficient.is_floating_point() and (coefficient.is_complex() or coefficient.dtype == torch.bool):
        raise InputError(f"coefficient: holds {coefficient.dtype}; give real numbers")
    if coefficient.device.type == "meta":
        raise InputError("coefficient: lies on the meta device and has no numbers; give it where the model computes")
    bad = ~torch.isfinite(coefficient)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        token = f", token {at[1]}" if len(at) == 2 else ""
        raise InputError(
            f"coefficient: {float(coefficient[tuple(at)])} at trajectory {at[0]}{token}; skip this update or "
            "repair its weights"
        )


def refuse_graph(nodes: Sequence[Any], names: Sequence[str], advise: Callable[[str], str]) -> bool:
    """Raise InputError for a compiled graph of log_prob, given by nodes and their names, or one that a loop has cut.

    Returns whether reentrant checkpoints lie in it.
    """
    cut = next((name for node in nodes if (name := cut_by(node)) is not None), None) if any_cut() else None
    if cut is not None:
        raise InputError(
            f"{cut}: looped over, and leaves something behind (a cache) on which log_prob hangs, whose gradient is "
            f"lost; {advise(cut)}"
        )
    kinds = set(names)
    if "CompiledFunctionBackward" in kinds:
        raise InputError(
            "log_prob: a compiled graph computed it, which hides its layers; run the forward inside the `with` and "
            "compile nothing between model and log_prob"
        )
    return "CheckpointFunctionBackward" in kinds
