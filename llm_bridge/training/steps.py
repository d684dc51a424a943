"""From a gradient to a step: clip, let a step rule of the catalogue scale it, and refuse whatever is no number.

    none                no scaling
    ess                 min(1, rho / rho_ref)^p with the optimizer family's p; ess_sqrt: p = 1/2; ess_linear: p = 1
    constant, replay    multipliers that know nothing of the batch: the controls that a claim of benefit must beat
    lag                 1 / max(lag, 1), the mean lag of the batch
    snr                 snr / (1 + snr), of the groups' gradients
    norm_clip           min(1, limit / ||g||) on the learning rate (Adam divides a clipped gradient's scale away)
    skip_spike          no step where ||g|| exceeds a multiple of its running mean
    gradient_alignment  turns the gradient instead: its part along the previous one is cut

Formulas are `vcposim.control`'s, through `vcposim.learning.step_rules.Control`; ESS comes from `EssStepScale`. That
brake stands in front of every rule (with exponent 0 if the rule is another): a ratio that is no number, or no
trajectory at all, means no step, whatever the rule says.
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

from llm_bridge.control import EssStepScale
from llm_bridge.training.config import TrainConfig
from vcposim.control import limit_alignment, norm_scale
from vcposim.learning.step_rules import Control, Seen

EXPONENT = {"ess": None, "ess_sqrt": 0.5, "ess_linear": 1.0}
MEMORY = 0.95
"""of the running mean of gradient norms, as in the laboratory's learner"""


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
        ess = config.step_rule in EXPONENT
        self.config, self.optimizer = config, optimizer
        self.brake = EssStepScale(
            optimizer,
            exponent=EXPONENT[config.step_rule] if ess else 0.0,
            reference=config.ess_reference if ess else 1.0,
        )
        self.control = _control(config)
        self.typical_norm = math.inf
        self.previous: Tensor | None = None

    @property
    def wants_group_gradients(self) -> bool:
        """Whether `step` must be given the gradient of each group."""
        return self.config.step_rule == "snr"

    def step(
        self,
        step: int,
        lag: float,
        log_ratio: Tensor,
        present: Tensor,
        *,
        finite: bool = True,
        group_gradient: Tensor | None = None,
    ) -> Stepped:
        """One step along p.grad, which is cleared.

        `lag`: the batch's mean; `log_ratio`, `present` (n,): this rank's untruncated sequence log-ratios; `finite`:
        whether there is a gradient.
        """
        gradient = self._gradient() if finite else []
        norm = float(_norm(gradient)) if finite else math.nan
        self._turn(gradient)
        scale = self._scale(step, lag, norm, group_gradient) if math.isfinite(norm) else 0.0
        self._clip(gradient, norm)
        self.brake.observe(log_ratio, present)
        record = self.brake.step(lambda: self._advance(scale))
        self.optimizer.zero_grad(set_to_none=True)
        self._remember(norm)
        if not record.reason and not math.isfinite(norm):
            warnings.warn(f"step {step + 1} skipped: {self._why(norm)}", RuntimeWarning, stacklevel=2)
        reason = record.reason or ("" if scale > 0 else self._why(norm))
        return Stepped(record.step_scale * scale, norm, reason)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the previous gradient where the rule looks at it."""
        return {"brake": self.brake.state_dict(), "typical_norm": self.typical_norm, "previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.brake.load_state_dict(state["brake"])
        self.typical_norm, self.previous = state["typical_norm"], state["previous"]

    # --- parts of a step ----------------------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _gradient(self) -> list[Tensor]:
        return [p.grad for p in self._parameters() if p.grad is not None]

    def _turn(self, gradient: Sequence[Tensor]) -> None:
        if self.config.step_rule != "gradient_alignment" or not gradient:
            return
        found = torch.cat([g.flatten() for g in gradient])
        if self.previous is not None:
            turned = limit_alignment(found, self.previous, self.config.step_value)
            for g, part in zip(gradient, turned.split([g.numel() for g in gradient]), strict=True):
                g.copy_(part.view_as(g))
        self.previous = found

    def _scale(self, step: int, lag: float, norm: float, group_gradient: Tensor | None) -> float:
        if self.config.step_rule == "norm_clip":
            return float(norm_scale(np.array(norm), self.config.step_value))
        groups = None if group_gradient is None else group_gradient.double().cpu().numpy()[None]
        one = np.ones(1)
        seen = Seen(step, one, lag * one, norm * one, self.typical_norm * one, groups)
        return float(self.control.scale(seen)[0])

    def _clip(self, gradient: Sequence[Tensor], norm: float) -> None:
        if not (math.isfinite(self.config.clip_norm) and gradient):
            return
        size = _norm(gradient) if self.config.step_rule == "gradient_alignment" else torch.tensor(norm)
        factor = float(norm_scale(np.array(float(size)), self.config.clip_norm))
        if factor < 1:
            torch._foreach_mul_(list(gradient), factor)

    def _advance(self, scale: float) -> None:
        if scale > 0:
            with scaled(self.optimizer, scale):
                self.optimizer.step()

    def _remember(self, norm: float) -> None:
        if math.isfinite(norm):
            known = math.isfinite(self.typical_norm)
            self.typical_norm = MEMORY * self.typical_norm + (1 - MEMORY) * norm if known else norm

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


def _control(config: TrainConfig) -> Control:
    rule = config.step_rule if config.step_rule in ("constant", "replay", "lag", "snr", "skip_spike") else "none"
    return Control(rule, value=config.step_value, schedule=tuple(config.step_schedule))


def _norm(gradient: Sequence[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(list(gradient))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
