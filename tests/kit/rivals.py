"""A random token batch that any estimator of the catalogue can read, with a policy behind it.

Responses of one to `TIME` tokens to a few prompts; target, behavior, anchor and reference are softmax policies over
`VOCABULARY` tokens, the target's logits linear in six parameters, so that every field of the batch and the exact score
of every token come from one place. Padding holds NaN: whoever looks at it is found out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vcposim.batch import Batch, DenseScores

PROMPTS, GROUP, TIME, VOCABULARY, PARAMETERS = 3, 6, 5, 7, 6


def log_softmax(logit: np.ndarray) -> np.ndarray:
    top = logit.max(-1, keepdims=True)
    return logit - top - np.log(np.exp(logit - top).sum(-1, keepdims=True))


@dataclass(frozen=True)
class Draw:
    """The policies and the data of one random batch."""

    feature: np.ndarray
    """(g, n, t, v, p): target logits are feature @ theta"""
    theta: np.ndarray
    token: np.ndarray
    mask: np.ndarray
    reward: np.ndarray
    behavior: np.ndarray
    """(g, n, t), log mu of the tokens"""
    anchor: np.ndarray
    reference: np.ndarray

    def _at(self, log_prob: np.ndarray) -> np.ndarray:
        return np.take_along_axis(log_prob, self.token[..., None], -1)[..., 0]

    def batch(self, convert: Any = np.asarray, padding: float = float("nan"), **changes: Any) -> Batch:
        """The batch, in any library; `changes` replace fields, given as NumPy arrays or flags."""
        log_pi = log_softmax(self.feature @ self.theta)
        pi, log_prob = np.exp(log_pi), self._at(log_pi)
        chosen = np.take_along_axis(self.feature, self.token[..., None, None], -2)[..., 0, :]
        score = chosen - np.einsum("...v,...vp->...p", pi, self.feature)

        def pad(x: np.ndarray) -> np.ndarray:
            return np.where(self.mask > 0, x, padding)

        fields: dict[str, Any] = {
            "reward": self.reward,
            "log_ratio": pad(log_prob - self.behavior),
            "token_mask": self.mask,
            "log_prob": pad(log_prob),
            "collision": pad((pi * pi).sum(-1)),
            "anchor_log_ratio": pad(log_prob - self.anchor),
            "reference_log_ratio": (self.mask * (log_prob - self.reference)).sum(-1),
            "grouped": True,
        }
        fields |= changes
        scores = DenseScores(convert(np.where(self.mask[..., None] > 0, score, padding)), per_token=True)
        arrays = {k: convert(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()}
        return Batch(**({"scores": scores} | arrays))


def draw(seed: int, lag: float = 1.0) -> Draw:
    """A random draw; `lag` is the spread of the other policies' logits around the target's, 0 for pi = mu."""
    rng = np.random.default_rng(seed)
    shape = (PROMPTS, GROUP, TIME)
    feature = rng.normal(size=(*shape, VOCABULARY, PARAMETERS))
    theta = 0.5 * rng.normal(size=PARAMETERS)
    length = rng.integers(1, TIME + 1, size=shape[:2])
    length[:, 0] = TIME
    token = rng.integers(VOCABULARY, size=shape)
    logit = feature @ theta

    def other() -> np.ndarray:
        log_prob = log_softmax(logit + lag * rng.normal(size=logit.shape))
        return np.take_along_axis(log_prob, token[..., None], -1)[..., 0]

    return Draw(
        feature=feature,
        theta=theta,
        token=token,
        mask=(np.arange(TIME) < length[..., None]).astype(float),
        reward=rng.normal(size=shape[:2]),
        behavior=other(),
        anchor=other(),
        reference=other(),
    )
