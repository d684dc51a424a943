"""The array libraries every kernel function is run on; each converts an exact (object) array of Fractions."""

from typing import Any

import numpy as np
import pytest

from vcposim.testing.strategies import EXACT, NUMPY
from vcposim.testing.strategies import Library as Backend


def read_only(x: np.ndarray) -> np.ndarray:
    x = np.array(x)
    x.flags.writeable = False
    return x


def strided(x: np.ndarray) -> np.ndarray:
    """The same values, non-contiguous: every second element of a buffer that holds garbage in between."""
    if x.ndim == 0:
        return x
    buffer = np.full((*x.shape[:-1], 2 * x.shape[-1]), 1e300)
    buffer[..., ::2] = x
    return buffer[..., ::2]


def strict(x: np.ndarray) -> Any:
    return pytest.importorskip("array_api_strict").asarray(np.array(x))


def torch64(x: np.ndarray) -> Any:
    return pytest.importorskip("torch").tensor(np.array(x))


def torch32(x: np.ndarray) -> Any:
    torch = pytest.importorskip("torch")
    return torch.tensor(np.array(x), dtype=torch.float32)


FLOAT_BACKENDS = [
    NUMPY,
    Backend("numpy_read_only", read_only),
    Backend("numpy_strided", strided),
    Backend("array_api_strict", strict),
    Backend("torch_float64", torch64),
    Backend("torch_float32", torch32),
]
BACKENDS = [*FLOAT_BACKENDS, EXACT]
"""to parametrise over, with `ids=str`-like names from `Backend.name`"""


def name_of(backend: Backend) -> str:
    return backend.name
