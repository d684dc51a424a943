"""From a gradient to a step: clip, let a step rule of the catalogue scale it, and refuse whatever is no number.

The rules are `vcposim.control.STEP_RULES`, the table that the laboratory's learner reads too; nothing here knows one by
name. What a rule may look at (`Seen`) is put together from this update, the ESS by `EssStepScale`. That brake stands in
front of every rule: a ratio that is no number, or no trajectory at all, means no step, whatever the rule says.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_bridge.control import EssStepScale, family_exponent
from llm_bridge.training.config import TrainConfig
from vcposim.control import MEMORY, Seen, norm_scale, step_rule


@dataclass(frozen=True)
class Stepped:
    """What became of one step."""

    step_scale: float
    """multiplier on the learning rate; 0: no step"""
    gradient_norm: float
    """before clipping"""
    reason: str = ""
    """why no step was taken; empty if one was"""


class Steps:
    """Clips, scales and takes the optimizer's steps; checkpointable."""

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer) -> None:
        self.config, self.optimizer, self.rule = config, optimizer, step_rule(config.step_rule)
        self.exponent = family_exponent(optimizer)
        # exponent 0: it knows the ESS and refuses what is no number; how far the step goes is the rule's to say
        reads_ess = "ess_fraction" in self.rule.needs
        self.brake = EssStepScale(optimizer, exponent=0.0, reference=config.ess_reference if reads_ess else 1.0)
        self.typical_norm = math.inf
        self.previous: Tensor | None = None
        self.lengths: list[float] = []
        """mean length of the responses of every update so far, where the rule looks at it"""

    @property
    def wants_group_gradients(self) -> bool:
        """Whether `step` must be given the gradient of each group."""
        return "group_gradient" in self.rule.needs

    def step(
        self,
        step: int,
        lag: float,
        log_ratio: Tensor,
        present: Tensor,
        *,
        finite: bool = True,
        group_gradient: Tensor | None = None,
        token_ess_fraction: float | None = None,
        length: float = math.nan,
    ) -> Stepped:
        """One step along p.grad, which is cleared.

        `lag`, `length`: the batch's means; `log_ratio`, `present` (n,): this rank's untruncated sequence log-ratios;
        `token_ess_fraction`: of the tokens of all ranks; `finite`: whether there is a gradient.
        """
        if "length" in self.rule.needs:
            self.lengths.append(length)
        gradient = [p.grad for p in self._parameters() if p.grad is not None] if finite else []
        norm = float(_norm(gradient)) if finite else math.nan
        if self.rule.turn is not None and gradient:
            found = torch.cat([g.flatten() for g in gradient])
            if self.previous is not None:
                turned = self.rule.turn(found, self.previous, self.config.control())
                for g, part in zip(gradient, turned.split([g.numel() for g in gradient]), strict=True):
                    g.copy_(part.view_as(g))
            self.previous = found
        if math.isfinite(self.config.clip_norm) and gradient:
            size = torch.tensor(norm) if self.rule.turn is None else _norm(gradient)
            factor = float(norm_scale(np.array(float(size)), self.config.clip_norm))
            if factor < 1:
                torch._foreach_mul_(list(gradient), factor)
        self.brake.observe(log_ratio, present)
        scale = 0.0
        with self.brake.applied(drop_gradients=False) as ready:
            if ready.step_scale > 0 and math.isfinite(norm):
                rho, lags, norms, typical = (np.array([x]) for x in (ready.ess_fraction, lag, norm, self.typical_norm))
                groups = None if group_gradient is None else group_gradient.double().cpu().numpy()[None]
                tokens = None if token_ess_fraction is None else np.array([token_ess_fraction])
                lengths = np.array([self.lengths]) if self.lengths else None
                control = self.config.control(self.exponent, ready.ess_reference)
                scale = float(control.scale(Seen(step, rho, lags, norms, typical, groups, tokens, lengths))[0])
            if scale > 0:
                with scaled(self.optimizer, scale):
                    self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if math.isfinite(norm):
            known = math.isfinite(self.typical_norm)
            self.typical_norm = MEMORY * self.typical_norm + (1 - MEMORY) * norm if known else norm
        if not ready.reason and not math.isfinite(norm):
            warnings.warn(f"step {step + 1} skipped: {self._why(norm)}", RuntimeWarning, stacklevel=2)
        return Stepped(scale, norm, ready.reason or ("" if scale > 0 else self._why(norm)))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the previous gradient where the rule looks at it."""
        return {"brake": self.brake.state_dict(), "typical_norm": self.typical_norm, "previous": self.previous,
                "lengths": list(self.lengths)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.brake.load_state_dict(state["brake"])
        self.typical_norm, self.previous = state["typical_norm"], state["previous"]
        self.lengths = list(state["lengths"])

    # --- parts of a step ----------------------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _why(self, norm: float) -> str:
        if math.isnan(norm):
            return "a coefficient or the gradient is not a number; check rewards and log-probabilities"
        if math.isinf(norm):
            return "the gradient's norm is infinite"
        return f"step rule {self.config.step_rule} says 0"


@contextmanager
def scaled(optimizer: torch.optim.Optimizer, scale: float) -> Iterator[None]:
    """Every learning rate times `scale` for the length of a `with`, then as it was to the bit."""
    saved = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * scale
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, saved, strict=True):
            group["lr"] = lr


def make_optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the configuration's name."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **options)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer](parameters, **options)


def _norm(gradient: Sequence[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(list(gradient))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
