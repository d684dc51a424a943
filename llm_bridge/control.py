"""`EssStepScale`: the brake of VCPO around any torch optimizer.

    brake = EssStepScale(optimizer)
    for each optimizer step:
        for each microbatch:
            brake.observe(log_ratio)     # (n,) untruncated sequence log-ratios
            loss.backward()
        brake.step()                     # lr * min(1, rho / rho_ref)^p for this one step, then lr as it was
        scheduler.step()                 # sees the unscaled lr, as does whatever logs it

rho is the ESS fraction of all trajectories observed since the last step, over all microbatches and ranks. The law is
`vcposim.control.step_scale`; here is what it takes to apply it to a real optimizer:

- **Fails closed.** Nothing observed, a NaN, a ratio of +inf, weights that are all zero: no step. The optimizer isn't
  called, or, if a trainer calls it (`apply` ... `restore`), it finds lr 0 and no gradients, because 0 * NaN would
  still poison parameters and moments. A `RuntimeWarning` and `record.reason` say why.
- **Scales the learning rate, not the gradient**: Adam divides the gradient's scale away. AdamW's decoupled weight
  decay is lr * weight_decay, so it is scaled along (as in the released code): a slow step also decays slowly. SGD's
  and Adam's coupled L2 penalty is part of the gradient; it follows lr as well. Moments and momentum see every applied
  gradient at full size.
- **Restores bit-exactly**: the saved value is put back, nothing is divided; also when the step raises.
- Parameter groups keep their own lr, a number or a tensor (capturable optimizers; scaled in place, once if shared).

The reference rho_ref is a number (1: on policy), or `"first"`: the first usable rho, so begin with a synchronous
batch; or `"running"`: the mean of the usable rho before this step, which follows a slow decline and then no longer
brakes it.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llm_bridge.distributed import ProcessGroup, merged
from vcposim.control import EXPONENTS, step_scale
from vcposim.diagnostics import WeightSums, weight_sums
from vcposim.errors import InputError, unknown_name

MOVING_REFERENCES = ("first", "running")
ADAM_LIKE = ("adam", "adafactor", "rmsprop")
"""parts of class names: optimizers that divide the gradient by a running estimate of its size"""
LOW_REFERENCE = 0.5
"""a first reference below this is worth a warning: every later step is judged by it"""


@dataclass(frozen=True)
class StepRecord:
    """What the brake did at one optimizer step."""

    step: int
    """steps asked for so far, skipped ones included; the first is 1"""
    step_scale: float
    """multiplier on every lr, in [0, 1]; 0: no step was taken"""
    ess_fraction: float
    """ESS / n of the observed trajectories; NaN if it isn't a number"""
    ess_reference: float
    """the ESS fraction of a full step"""
    trajectories: float
    """how many were observed, over all ranks"""
    log_mean_weight: float
    """log of their mean ratio, nats: 0 in expectation"""
    reason: str = ""
    """why no step was taken; empty if one was"""

    def scalars(self, prefix: str = "vcpo/") -> dict[str, float]:
        """The numbers, ready for a logger."""
        return {prefix + name: float(x) for name, x in asdict(self).items() if name not in ("step", "reason")}


class EssStepScale:
    """Scales every lr of `optimizer` by min(1, rho / rho_ref)^exponent for one step, and puts it back.

    `exponent` defaults to the optimizer family's (1/2 for Adam and its kin, 1 for SGD). `reference`: an ESS fraction in
    (0, 1], "first" or "running". `process_group`: the data-parallel group (see `llm_bridge.distributed`); default:
    all ranks if `torch.distributed` is in use.

    Raises `InputError` for an optimizer of no known family without `exponent`, or settings out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        exponent: float | None = None,
        reference: float | str = 1.0,
        process_group: ProcessGroup = None,
    ) -> None:
        if isinstance(reference, str) and reference not in MOVING_REFERENCES:
            raise unknown_name("reference", reference, MOVING_REFERENCES)
        self.optimizer, self.reference, self.process_group = optimizer, reference, process_group
        self.exponent = family_exponent(optimizer) if exponent is None else exponent
        one = torch.ones((), dtype=torch.float64)
        step_scale(one, reference=1.0 if isinstance(reference, str) else reference, exponent=self.exponent)
        self.record: StepRecord | None = None
        self._steps = self._usable = 0
        self._mean = math.nan
        self._seen: WeightSums | None = None
        self._saved: list[tuple[dict[str, Any], Any, Any]] = []

    def observe(self, log_ratio: Tensor, present: Tensor | None = None) -> None:
        """Add trajectories to the coming step: untruncated sequence log-ratios: (n,) -> none.

        `present` 0 marks padding; n may be 0. Raises `InputError` on token-level input, whose ESS is another quantity.
        """
        if log_ratio.dim() != 1 or (present is not None and present.shape != log_ratio.shape):
            raise InputError(
                f"log_ratio: shape {tuple(log_ratio.shape)}; give one per trajectory, (n,), and present alike"
            )
        x = log_ratio.detach().to(_precise(log_ratio.device))
        sums = weight_sums(x, None if present is None else present.to(x.dtype))
        self._seen = sums if self._seen is None else self._seen.merge(sums)

    def step(self, advance: Callable[[], object] | None = None) -> StepRecord:
        """One optimizer step at the scaled lr, then forget what was observed; no call of the optimizer at scale 0.

        `advance` replaces `optimizer.step`, as in `lambda: scaler.step(optimizer)`.
        """
        with self.applied(drop_gradients=False) as record:
            if record.step_scale > 0:
                (advance or self.optimizer.step)()
        return record

    @contextmanager
    def applied(self, *, drop_gradients: bool = True) -> Iterator[StepRecord]:
        """The scaled lr for the length of a `with` in which someone else steps the optimizer."""
        record = self.apply(drop_gradients=drop_gradients)
        try:
            yield record
        finally:
            self.restore()

    def apply(self, *, drop_gradients: bool = True) -> StepRecord:
        """Scale every lr, for callbacks that cannot hold a `with` open: call `restore` after the step.

        A collective on all ranks of the process group. At scale 0 gradients are set to None, so that whatever steps the
        optimizer changes neither parameters nor state. Raises `InputError` if an earlier `apply` was not restored.
        """
        if self._saved:
            raise InputError("EssStepScale.apply: lr is scaled already; call restore first")
        self.record = self._decide()
        if self.record.reason:
            warnings.warn(f"step {self.record.step} skipped: {self.record.reason}", RuntimeWarning, stacklevel=2)
            if drop_gradients:
                self.optimizer.zero_grad(set_to_none=True)
        scaled: set[int] = set()
        for group in self.optimizer.param_groups:
            lr = group["lr"]
            if not isinstance(lr, Tensor):
                self._saved.append((group, lr, None))
                group["lr"] = lr * self.record.step_scale
            elif id(lr) not in scaled:  # groups may share one tensor
                scaled.add(id(lr))
                self._saved.append((group, lr, lr.clone()))
                lr.mul_(self.record.step_scale)
        return self.record

    def restore(self) -> None:
        """Every lr as it was before `apply`, to the bit; harmless if there is nothing to restore."""
        while self._saved:
            group, lr, value = self._saved.pop()
            group["lr"] = lr
            if value is not None:
                lr.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain numbers; also the microbatches observed since the last step."""
        pending = None if self._seen is None else [float(x) for x in self._seen]
        return {
            "exponent": self.exponent,
            "reference": self.reference,
            "steps": self._steps,
            "usable": self._usable,
            "mean": self._mean,
            "pending": pending,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises `InputError` if a key is missing or the settings are not these."""
        for name in ("exponent", "reference", "steps", "usable", "mean", "pending"):
            if name not in state:
                raise InputError(f"state_dict: no {name!r}; is it the state of another object?")
        for name in ("exponent", "reference"):
            if state[name] != getattr(self, name):
                raise InputError(
                    f"{name}: {getattr(self, name)!r} here, {state[name]!r} in the checkpoint; use the same"
                )
        self._steps, self._usable, self._mean = state["steps"], state["usable"], state["mean"]
        pending = state["pending"]
        device = self.optimizer.param_groups[0]["params"][0].device
        self._seen = pending and WeightSums(*torch.tensor(pending, dtype=_precise(device), device=device))

    def _decide(self) -> StepRecord:
        seen = self._seen
        if seen is None:  # nothing was observed on this rank
            device = self.optimizer.param_groups[0]["params"][0].device
            seen = weight_sums(torch.empty(0, dtype=_precise(device), device=device))
        seen, self._seen = merged(seen, self.process_group), None
        fraction, count = seen.ess_fraction(), float(seen.count)
        rho = float(fraction)
        if isinstance(self.reference, str):
            known = self._mean if self._usable else rho
            reference = min(known, 1.0) if known > 0 else 1.0  # NaN too: the scale is 0 then, whatever the reference
        else:
            reference = self.reference
        scale = float(step_scale(fraction, reference=reference, exponent=self.exponent))
        self._steps += 1
        if scale > 0 and not (self.reference == "first" and self._usable):  # the reference learns from it
            if isinstance(self.reference, str) and not self._usable and rho < LOW_REFERENCE:
                warnings.warn(
                    f"reference: the first ESS fraction is {rho:.3g}, and later steps are judged by it; "
                    "begin with a synchronous batch, or pass a number",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._usable += 1
            self._mean = rho if self._usable == 1 else self._mean + (rho - self._mean) / self._usable
        reason = "" if scale > 0 else _reason(seen)
        return StepRecord(self._steps, scale, rho, reference, count, float(seen.log_mean()), reason)


def family_exponent(optimizer: object) -> float:
    """The paper's exponent for the optimizer's family, by its class (or that of the optimizer it wraps).

    Raises `InputError` for a class of no known family: whether its step is proportional to the gradient is yours to
    say.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    names = [cls.__name__.lower() for cls in type(inner).__mro__]
    if any(part in name for part in ADAM_LIKE for name in names):
        return EXPONENTS["adam"]
    if any("sgd" in name for name in names):
        return EXPONENTS["sgd"]
    raise InputError(
        f"exponent: {type(inner).__name__} is of no known family; pass exponent=0.5 if its step ignores the scale of "
        "the gradient (as Adam's does), exponent=1 if it is proportional to it (as SGD's is)"
    )


def _reason(seen: WeightSums) -> str:
    if not float(seen.count) > 0:
        return "no trajectory was observed since the last step; call observe, or check the masks"
    if math.isnan(float(seen.log_scale)):
        return "a log-ratio is NaN; check log_prob and behavior_log_prob"
    if float(seen.log_scale) == math.inf:
        return "a log-ratio is +inf (behavior probability zero); check behavior_log_prob"
    if float(seen.total) == 0:
        return "every ratio is zero; the target gives no probability to anything that was sampled"
    return "the ESS fraction is not in (0, 1]"


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
