"""Estimators by name: the catalogue's, or anyone's as `package.module:function` or `path/to/file.py:function`.

What `estimator_named` returns goes through every part: exact moments, Monte Carlo, replay, learning, transformers. A
function says what it reads beside itself, `mine.needs = ("tokens",)`; see `vcposim.estimators.FunctionEstimator`. It
may be written for NumPy, or for torch if its module has imported that, and where the arrays are the other's it is given
its own: it is shown a small batch of each, once.
"""

import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as shortened
from types import ModuleType
from typing import Any

import numpy as np

from vcposim.batch import Batch, DenseScores, Scores
from vcposim.catalogue.entries import entry
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import AnyEstimator, Estimator, FunctionEstimator, Resolved, estimator_of, told


def estimator_named(name: str, needs: Iterable[str] = (), library: str = "numpy", *, several: bool = True) -> Resolved:
    """The estimator of a catalogue name, of `module:function` or of `file.py:function`.

    `needs` are read by a function beside those it names itself; an entry knows its own. `library` is the one whose
    arrays there will be; a function that does not answer NumPy's is torch's, and either is given its own. `several`
    says that it will be shown several groups at once.

    Raises `InputError` for an unknown name, for what is no estimator, for a function that answers no small batch, or
    not the same way twice, that changes the batch, or lets a group's coefficients depend on the group beside it
    without needing `grouped`.
    """
    if ":" not in name:
        if name.endswith(".py"):
            raise InputError(f"estimator: {name} is a file and names none of its functions; write {name}:function")
        return entry(name).estimator
    found = load(name)
    if not callable(found) and not hasattr(found, "coefficients"):
        raise InputError(f"estimator: {name} is {shortened(found)}, no Estimator and no function of a Batch")
    estimator = estimator_of(found)
    if not isinstance(estimator, FunctionEstimator):
        if type(estimator) is not Estimator:  # theirs
            _require_sound(name, estimator, library, several=several)
        return estimator
    estimator = replace(estimator, needs=estimator.needs | frozenset(needs))
    said = []
    # NumPy's first: its functions often answer a tensor too, but not on every device
    for own in ("numpy", *(["torch"] if "torch" in sys.modules else [])):
        asked = replace(estimator, function=InLibrary(estimator.function, own))
        try:
            with warnings.catch_warnings(action="ignore"):  # of arrays that may not be its own
                asked.coefficients(_in_library(_small(asked.needs), library))
        except InputError as error:
            said.append(f"on {own} arrays {str(error).removeprefix('estimator: ')}")
        else:
            _require_sound(name, asked, library, several=several)
            return asked
    raise InputError(
        f"estimator: {name} does not answer a small batch: {'; '.join(said)}. It takes a Batch and returns one "
        "coefficient a sample (..., n) or a token (..., n, t); needs name the optional fields that it reads"
    )


def on_numpy(given: str | AnyEstimator, *, several: bool = False) -> Resolved:
    """The estimator of a name, or of an object, where there are NumPy's arrays: a function of torch's is given its own.

    `several` as for `estimator_named`, of a name.
    """
    if isinstance(given, str):
        return estimator_named(given, several=several)
    estimator = estimator_of(given)
    if not isinstance(estimator, FunctionEstimator) or "torch" not in sys.modules:
        return estimator
    for own in ("numpy", "torch"):
        asked = replace(estimator, function=InLibrary(estimator.function, own))
        try:
            asked.coefficients(_small(asked.needs))
        except InputError:
            continue
        return asked
    return estimator


def _require_sound(name: str, asked: Resolved, library: str, *, several: bool) -> None:
    """Refuse what changes its batch, says something else the second time, or mixes groups shown side by side."""
    batch, untouched = (_in_library(_small(asked.needs), library) for _ in range(2))
    first, second = (_numbers(asked.coefficients(batch)) for _ in range(2))
    for field in ("reward", "log_ratio", "length"):
        if not _same(getattr(batch, field), getattr(untouched, field)):
            raise InputError(f"estimator: {name} changes batch.{field}; compute with a copy, as in 1 * batch.{field}")
    if not _same(first, second):
        raise InputError(
            f"estimator: {name} gives two answers to one batch; a state or random numbers are no part of an estimator"
        )
    if not several or "grouped" in asked.needs:
        return
    try:
        both = _numbers(asked.coefficients(_in_library(_small(asked.needs, groups=2), library)))
    except InputError as error:
        raise InputError(f"{error}; here it is shown groups beside each other, (groups, samples)") from error
    for g in (0, 1):
        alone = _numbers(asked.coefficients(_in_library(_small(asked.needs, groups=2, only=g), library)))
        if not _same(both[g], alone):
            raise InputError(
                f"estimator: {name} gives a group other coefficients alone than beside another; reduce over the last "
                "axis only, as in batch.reward.mean(axis=-1, keepdims=True), or say that it spans prompts: needs "
                "'grouped'"
            )


def _numbers(x: Any) -> Any:
    """A copy as NumPy's, so that nothing done later to the original shows."""
    return np.array(x.detach().cpu().numpy() if hasattr(x, "detach") else x, dtype=float)


def _same(x: Any, y: Any) -> bool:
    return x is y or np.allclose(_numbers(x), _numbers(y), rtol=1e-6, atol=1e-6, equal_nan=True)


@dataclass(frozen=True)
class InLibrary:
    """A function of one library's batches as a function of any library's: it answers in the arrays of the batch.

    What NumPy warns of while it runs is not shown: a coefficient that is no number is told by whoever needs numbers.
    """

    function: Callable[[Batch], Any]
    library: str

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, batch: Batch) -> Any:
        """What it says of the batch in its own arrays, as the batch's."""
        with np.errstate(all="ignore"):
            return _like(self.function(_in_library(batch, self.library)), batch.reward)


@dataclass(frozen=True)
class _ScoresIn:
    """Scores asked in one library's arrays and answered in them, whatever they are made of."""

    scores: Scores
    library: str
    like: Any
    """an array of the kind that the scores themselves take"""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.like.shape)

    def combine(self, weight: Any) -> Any:
        return _array_in(self.scores.combine(_like(weight, self.like)), self.library)

    def sq_norm(self, weight: Any) -> Any:
        return _array_in(self.scores.sq_norm(_like(weight, self.like)), self.library)


def _in_library(batch: Batch, library: str) -> Batch:
    """The batch in a library's arrays; as it is where they are its own."""
    if type(batch.reward).__module__.partition(".")[0] == library:
        return batch
    arrays = {k: _array_in(x, library) for k, x in vars(batch).items() if hasattr(x, "dtype") and k != "scores"}
    scores: Any = batch.scores
    if isinstance(scores, DenseScores):
        scores = replace(scores, score=_array_in(scores.score, library))
    elif scores is not None:
        scores = _ScoresIn(scores, library, batch.reward)
    return replace(batch, **arrays, scores=scores)


def _array_in(x: Any, library: str) -> Any:
    """A copy in another library's arrays; constants, whatever graph they come from."""
    return importlib.import_module(library).asarray(np.array(x.detach().cpu().numpy() if hasattr(x, "detach") else x))


def _like(x: Any, like: Any) -> Any:
    """An array as one of the library, and on the device, of another."""
    library = type(like).__module__.partition(".")[0]
    if type(x).__module__.partition(".")[0] == library or not hasattr(x, "shape"):
        return x
    made = _array_in(x, library)
    return made.to(like.device) if hasattr(made, "to") else made


def source_of(name: str) -> Path | None:
    """The file that a function's name leads to, absolute; None for a name of the catalogue."""
    place, colon, _ = name.rpartition(":")
    if not colon:
        return None
    path = Path(place) if place.endswith(".py") else Path(str(getattr(_module(place), "__file__", place)))
    return path.resolve()


def _small(needs: Iterable[str], groups: int = 0, only: int | None = None) -> Batch:
    """Two samples, or groups of two or the `only` one of them, with everything that `needs` may name."""
    shape: tuple[int, ...] = (1, 2) if "grouped" in needs else (groups, 2) if groups else (2,)
    reward, time = np.arange(4.0)[: 2 * max(groups, 1)] ** 2, 3  # no two axes of one length but groups and samples
    ratio = [[0.5, 2.0, 1.5], [1.0, 1.0, 0.8], [4.0, 1.0, 0.9], [0.2, 3.0, 1.0]]
    reward, tokens = reward.reshape(shape), np.log(ratio)[: reward.size].reshape(*shape, time)
    if only is not None:
        shape, reward, tokens = shape[1:], reward[only], tokens[only]
    given: dict[str, Any] = {"length": np.full(shape, float(time)), "log_ratio": tokens.sum(axis=-1)}
    per_token = set(needs) & {"tokens", "log_prob", "collision", "anchor_log_ratio"}
    if per_token:
        given = {"log_ratio": tokens, "token_mask": tokens * 0 + 1, "anchor_log_ratio": tokens}
        given |= {"log_prob": tokens * 0 - np.log(2), "collision": tokens * 0 + 0.5}
    score = np.ones((*shape, time, 1) if per_token else (*shape, 1))
    return Batch(
        reward=reward,
        scores=DenseScores(score, per_token=bool(per_token)),
        reference_log_ratio=reward * 0,
        population_baseline=reward[..., :1] * 0,
        grouped="grouped" in needs,
        **given,
    )


def load(name: str) -> Any:
    """What `module:attribute` or `file.py:attribute` names; modules are looked for in the current folder first.

    Raises `InputError` for a module that is not there or cannot be imported, and for an unknown attribute.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise InputError(f"estimator: {name!r} names no function; write module:function or path/to/file.py:function")
    found: Any = _module(place)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [x for x, y in vars(found).items() if not x.startswith("_") and callable(y) and y is not _aside]
            raise unknown_name(f"{place}", part, known)
        found = getattr(found, part)
    return found


def _module(place: str) -> ModuleType:
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise InputError(f"estimator: there is no file {place}; give its path from {Path.cwd()}, or an absolute one")
    folder = str(path.parent.resolve() if path.suffix == ".py" else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            module = _from_file(path) if path.suffix == ".py" else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise InputError(
                f"estimator: no module {error.name!r} in {folder} or among the installed packages; "
                "write path/to/file.py:function for a file elsewhere"
            ) from None
        raise InputError(f"estimator: {place} cannot be imported, it misses {error.name!r}; install that") from error
    except SystemExit as error:
        raise InputError(
            f"estimator: {place} cannot be imported, {told(error)}; what it does as a script belongs under "
            "if __name__ == '__main__':"
        ) from error
    except Exception as error:
        part = path.suffix == ".py" and path.with_name("__init__.py").is_file() and isinstance(error, ImportError)
        remedy = (
            "; it is part of a package, write package.module:function from the folder that holds that" if part else ""
        )
        raise InputError(f"estimator: {place} cannot be imported, {told(error)}{remedy}") from error
    sys.stderr.write(said.getvalue())  # standard output is the command's own
    return module


def _aside(*values: object, **how: Any) -> None:
    """`print` for a file of estimators: to standard error, for standard output is the command's own."""
    print(*values, **{"file": sys.stderr, **how})


def _from_file(path: Path) -> ModuleType:
    """The file as a module by its own name, so that worker processes find its functions; read once until it changes."""
    known, stamp = sys.modules.get(path.stem), path.stat().st_mtime_ns
    ours = known is None or getattr(known, "__file__", None) == str(path.resolve())
    if known is not None and getattr(known, "__vcposim_stamp__", None) == stamp and ours:
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.print = _aside  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
    module.__vcposim_stamp__ = stamp  # type: ignore[attr-defined]
    if ours:  # the name of a library stays the library's
        sys.modules[path.stem] = module
    return module
