"""Coefficients of functions that are not ours, of which nothing is known but that they take a batch.

Exact and Monte Carlo moments show an estimator many groups at once, one a row. A function that reduces over more than
the last axis, or that cannot take two axes at all, says something else of a row beside others than of the same row
alone; a moment is one of groups alone, so it is then asked row by row, which is slow and right.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from vcposim.arrays import Array
from vcposim.batch import Batch, DenseScores, Scores
from vcposim.errors import InputError
from vcposim.estimators import FunctionEstimator, Resolved, answered

ROWS = 16
"""of different rewards, by which a function is judged before it is shown all"""


class Asked:
    """A stranger's estimator while one computation lasts: the first rows decide how it is shown the others."""

    def __init__(self, estimator: Resolved) -> None:
        self.estimator = estimator
        self.row_by_row: bool | None = None

    @property
    def name(self) -> str:
        """What it is called in errors."""
        e = self.estimator
        return e.name if isinstance(e, FunctionEstimator) else type(e).__name__

    def coefficients(self, batch: Batch) -> Array:
        """Of groups (m, n) that stand alone: (m, n) or (m, n, t).

        Raises `InputError` for a function that answers a batch differently the second time, and for coefficients that
        are no numbers.
        """
        with np.errstate(all="ignore"):
            if self.row_by_row is None:
                self.row_by_row = self._mixes(batch)
            rows = range(batch.reward.shape[0])
            if self.row_by_row:
                c = np.stack([self._alone(batch, i) for i in rows])
            else:
                # a copy, which it may change
                c = np.asarray(self._said(part(batch, slice(None))), dtype=float)
        bad = ~np.isfinite(c).reshape(len(rows), -1).all(axis=-1)
        if bad.any():
            i = int(bad.argmax())
            shown = [np.array2string(x[i], precision=4, threshold=8) for x in (batch.reward, batch.given_ratio)]
            raise InputError(
                f"estimator: {self.name} returns a coefficient that is no number, as for rewards {shown[0]} with "
                f"log-ratios {' '.join(shown[1].split())}; say what it should be there, as with vcposim.arrays."
                "safe_divide"
            )
        return c

    def _mixes(self, batch: Batch) -> bool | None:
        """Whether rows have other coefficients beside each other than alone; None if all that are shown are alike."""
        _, first = np.unique(batch.reward, axis=0, return_index=True)
        some = np.sort(first[np.unique(np.linspace(0, len(first) - 1, ROWS).astype(int))])
        apart, again = ([self._alone(batch, i) for i in some] for _ in range(2))
        if not all(np.array_equal(x, y, equal_nan=True) for x, y in zip(apart, again, strict=True)):
            raise InputError(
                f"estimator: {self.name} gives two answers to one batch: it keeps a state or draws random numbers, and "
                "has no moments then"
            )
        try:
            both = np.asarray(self._said(part(batch, some)), dtype=float)
        except InputError:
            return True
        size = max(float(np.max(np.abs(x), initial=0.0)) for x in apart)
        same = np.allclose(both, apart, rtol=0, atol=1e-12 * size, equal_nan=True)
        return None if same and len(some) < 2 else not same

    def _alone(self, batch: Batch, i: int) -> Array:
        return np.array(self._said(part(batch, i)), dtype=float)

    def _said(self, batch: Batch) -> Array:
        return answered(self.name, self.estimator.coefficients, batch)


def part(batch: Batch, at: Any) -> Batch:
    """Some rows of a batch (m, n[, t]), or one without its axis; arrays are copies."""
    fields: dict[str, Any] = {
        k: np.array(x[at]) for k, x in vars(batch).items() if isinstance(x, np.ndarray) and x.ndim
    }
    scores: Any = batch.scores
    if isinstance(scores, DenseScores):
        scores = replace(scores, score=scores.score[at])
    elif scores is not None:
        scores = RowScores(scores, batch.reward.shape, at)
    return replace(batch, **fields, scores=scores)


class RowScores:
    """Some rows of scores that have no rows to take: the others get weight 0."""

    def __init__(self, scores: Scores, shape: tuple[int, ...], at: Any) -> None:
        self.scores, self.shape, self.at = scores, shape, at

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(..., n)"""
        return tuple(np.empty(self.shape)[self.at].shape)

    def _everywhere(self, weight: Array) -> Array:
        tokens = weight.shape[len(self.sample_shape) :]
        whole = np.zeros((*self.shape, *tokens))
        whole[self.at] = weight
        return whole

    def combine(self, weight: Array) -> Array:
        """See `vcposim.batch.Scores`."""
        return self.scores.combine(self._everywhere(weight))[self.at]

    def sq_norm(self, weight: Array) -> Array:
        """See `vcposim.batch.Scores`."""
        return self.scores.sq_norm(self._everywhere(weight))[self.at]
