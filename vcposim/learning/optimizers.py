"""Optimizers for many runs at once: state and parameters are (run, p), step sizes (run,).

Gradients point uphill: a step is theta + step_size * direction. AdamW's weight decay is decoupled and follows the step
size, as in PyTorch, so a brake on the step brakes the decay too.
"""

from dataclasses import dataclass, field

import numpy as np

from vcposim.arrays import Array

OPTIMIZERS = ("adam", "sgd")


@dataclass
class AdamMoments:
    """Running moments of the gradient, and the number of updates behind them."""

    first: Array
    second: Array
    count: Array = field(default_factory=lambda: np.zeros(()))

    @classmethod
    def zeros(cls, shape: tuple[int, int]) -> "AdamMoments":
        """The state before the first update: (run, p)."""
        return cls(np.zeros(shape), np.zeros(shape), np.zeros((shape[0], 1)))


def adam_direction(
    moments: AdamMoments, gradient: Array, *, beta: tuple[float, float | Array] = (0.9, 0.999), epsilon: float = 1e-8
) -> Array:
    """m_hat / (sqrt(v_hat) + epsilon), moving the moments in place (arXiv 1412.6980): (run, p) -> (run, p).

    `beta`: what is kept of the first and second moments, numbers or (run, 1).
    """
    moments.count += 1
    moments.first += (1 - beta[0]) * (gradient - moments.first)
    moments.second += (1 - beta[1]) * (gradient * gradient - moments.second)
    mean = moments.first / (1 - beta[0] ** moments.count)
    square = moments.second / (1 - beta[1] ** moments.count)
    return mean / (np.sqrt(square) + epsilon)


def stepped(parameter: Array, direction: Array, step_size: Array, weight_decay: Array) -> Array:
    """theta + step_size (direction - weight_decay theta) (AdamW, arXiv 1711.05101).

    Shapes: (run, p), step_size (run,), weight_decay (run,) -> (run, p).
    """
    return parameter + step_size[:, None] * (direction - weight_decay[:, None] * parameter)
