"""Property-test any estimator, ours or yours: `check_estimator(mine, claims=["shift", "unbiased"])`.

An estimator is a function of a `Batch` that returns coefficients, one a sample (..., n) or one a token (..., n, t); an
`Estimator`, a name of the catalogue, or the text `module:function`. Some **laws** every estimator obeys (samples have
no order, groups do not see each other, padding is inert, log-ratios of 10^4 give finite numbers, ...). Others are
**claims**: made for some estimators, and to be kept by those (unbiased, blind to a shift of the rewards, ...). `LAWS`
lists both, with sources.

A broken law raises `Violation`, an `AssertionError` with the law, the smallest counterexample found, of at most four
samples, and a line that reproduces it. A test of your own estimator is three lines, one case a law:

    @pytest.mark.parametrize("law", laws_of(mine, claims=["shift", "unbiased"]))
    def test_mine(law):
        law()

Say your leave-one-out baseline includes the sample itself:

>>> def mine(batch):
...     mean = batch.reward.mean(axis=-1, keepdims=True)
...     return np.exp(batch.log_ratio) * (batch.reward - mean)
>>> try:
...     check_estimator(mine, claims=["unbiased"])
... except Violation as violation:
...     print(str(violation).splitlines()[0])
mine breaks 'unbiased': E[(1/n) sum c s] over every batch of n draws is the exact gradient

`vcposim check path/to/file.py:mine` does the same at the command line, and draws its bias against its variance.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypedDict, Unpack

import numpy as np
from hypothesis import HealthCheck, Phase, configuration, given, settings
from hypothesis.errors import Flaky

from vcposim.catalogue import Unbiased, entry
from vcposim.catalogue.loading import load
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import Estimator, estimator_of, names_on
from vcposim.testing.laws import LAWS, Broken, Coefficients, Law, Subject
from vcposim.testing.strategies import (
    Arms,
    Case,
    Library,
    Strings,
    bandit_of,
    bandits,
    case_of,
    cases,
    extreme_log_ratio,
    language_cases,
    policy_pair,
    probability,
    ratio,
    reward,
    strings,
    strings_of,
)

__all__ = [
    "LAWS",
    "Arms",
    "Case",
    "Law",
    "Strings",
    "Trial",
    "TrialSettings",
    "Violation",
    "bandits",
    "cases",
    "check_estimator",
    "check_law",
    "extreme_log_ratio",
    "language_cases",
    "laws_of",
    "policy_pair",
    "probability",
    "ratio",
    "reproduce",
    "reward",
    "strings",
    "subject_of",
    "trials",
]

JudgedEstimator = Estimator | str | Coefficients
Convert = Callable[[np.ndarray], Any] | str

CLAIMED, NOT_CLAIMED, NOT_APPLICABLE = "holds", "not claimed", "does not apply"


class Violation(AssertionError):
    """A law is broken; the message holds the law, the smallest counterexample and its reproduction."""

    def __init__(self, law: str, estimator: str, size: str, case: str, saw: str, call: str) -> None:
        super().__init__(law, estimator, size, case, saw, call)  # as pickle wants them
        self.law, self.estimator, self.size, self.case, self.saw = law, estimator, size, case, saw
        self.reproduction = call

    def __str__(self) -> str:
        return (
            f"{self.estimator} breaks {self.law!r}: {LAWS[self.law].statement}\n"
            f"  source: {LAWS[self.law].source}\n"
            f"  counterexample ({self.size}): {self.case}\n"
            f"  {self.saw}\n"
            f"  reproduce: {self.reproduction}"
        )


@dataclass(frozen=True)
class Trial:
    """One law with the estimator it is tried on; calling it tries. `status` is what it comes to if nothing breaks."""

    law: str
    subject: Subject
    status: str
    examples: int

    @property
    def __name__(self) -> str:
        """What pytest calls this case."""
        return self.law

    def __call__(self) -> None:
        """Raises `Violation` with a counterexample: the smallest found, if the law is claimed."""
        check_law(self.law, self.subject, self.examples, shrink=self.status == CLAIMED)


class TrialSettings(TypedDict, total=False):
    """The keywords of `trials`, for what passes them on."""

    without: Iterable[str]
    needs: Iterable[str]
    host: JudgedEstimator | None
    dominates: Sequence[JudgedEstimator]
    convert: Convert
    examples: int


def check_estimator(
    estimator: JudgedEstimator, claims: Iterable[str] = (), **setting: Unpack[TrialSettings]
) -> dict[str, str]:
    """Try every claimed law and every universal one; the report, law -> `holds`, `not claimed` or `does not apply`.

    `setting` are the keywords of `trials`. Raises `Violation` on the first broken law, and as `trials` does.
    """
    asked = trials(estimator, claims, **setting)
    for trial in asked:
        if trial.status == CLAIMED:
            trial()
    return {trial.law: trial.status for trial in asked}


def laws_of(estimator: JudgedEstimator, claims: Iterable[str] = (), **setting: Unpack[TrialSettings]) -> list[Trial]:
    """The laws that an estimator must keep, each a test to be called: for `pytest.mark.parametrize`.

    `setting` are the keywords of `trials`.
    """
    return [trial for trial in trials(estimator, claims, **setting) if trial.status == CLAIMED]


def trials(
    estimator: JudgedEstimator,
    claims: Iterable[str] = (),
    *,
    without: Iterable[str] = (),
    needs: Iterable[str] = (),
    host: JudgedEstimator | None = None,
    dominates: Sequence[JudgedEstimator] = (),
    convert: Convert = np.array,
    examples: int = 30,
) -> list[Trial]:
    """Every law of `LAWS`, with what it is to this estimator: claimed, not claimed, or not applicable.

    `claims` are names of `LAWS`, beside those that a function names itself, `mine.claims = ("unbiased",)`; `without`
    the universal laws it does not claim (say `padding`, if it takes full groups only). `host` claims `lag_zero`,
    `dominates` claims `dominance`, a catalogue name claims what its entry says and not what it `breaks`, and every
    `Estimator` claims `one_token`, and `levels` unless it reads token ratios.
    `needs` are the optional fields of `Batch` that a function reads (`tokens` for token ratios, `grouped` if it spans
    prompts); an `Estimator` knows its own. `convert` makes the arrays it works on, as in `convert=torch.tensor`, or
    names their library, as in `convert="torch"`. A law is tried on `examples` cases.

    Raises `InputError` for an unknown claim, name or library, and for a claim that cannot be tried on this estimator:
    a claim that nobody looked at is not kept.
    """
    subject, known = subject_of(estimator, needs, host, dominates, convert)
    asked = set(claims) | names_on(_resolved(estimator), "claims")
    named = isinstance(estimator, str) and ":" not in estimator
    claimed, dropped = known | asked, set(without) | set(entry(estimator).breaks if named else ())  # type: ignore[arg-type]
    for name in sorted((claimed | dropped) - LAWS.keys()):
        raise unknown_name("claims", name, LAWS)
    for name in sorted(asked):
        if not LAWS[name].fits(subject):
            raise InputError(f"claims: {name!r} does not apply to {subject.name}: {LAWS[name].otherwise}")

    def status(name: str, law: Law) -> str:
        if name in dropped or not (law.universal or name in claimed):
            return NOT_CLAIMED
        return CLAIMED if law.fits(subject) else NOT_APPLICABLE

    return [Trial(name, subject, status(name, law), examples) for name, law in LAWS.items()]


def subject_of(
    estimator: JudgedEstimator,
    needs: Iterable[str] = (),
    host: JudgedEstimator | None = None,
    dominates: Sequence[JudgedEstimator] = (),
    convert: Convert = np.array,
) -> tuple[Subject, set[str]]:
    """The estimator on trial, and what is claimed for it: by `host` and `dominates`, or by its catalogue entry.

    Raises `InputError` for an unknown name or something that is no estimator.
    """
    needs = sorted(needs)
    judged, claims = _resolved(estimator), set()
    named_host: Any = None if host is None else _resolved(host)
    if isinstance(estimator, str) and ":" not in estimator:
        known = entry(estimator)
        named_host = named_host or known.host
        claims |= {"shift"} if known.shift_invariant else set()
        claims |= {"unbiased"} if known.unbiased is Unbiased.ALWAYS else set()
    # the optional arguments that differ from their defaults, as one would write them
    settings = f", needs={needs!r}" if needs else ""
    settings += f", host={_name(host)}" if host is not None else ""
    settings += f", dominates=[{', '.join(map(_name, dominates))}]" if dominates else ""
    settings += "" if convert is np.array else f", convert={_name(convert)}"
    if not isinstance(convert, str):
        library = Library(getattr(convert, "__name__", "array"), convert)
    else:
        try:
            asarray = import_module(convert).asarray
        except (ModuleNotFoundError, AttributeError):
            raise InputError(
                f"convert: {convert!r} is no array library installed here; name one, as in 'torch'"
            ) from None
        library = Library(convert, lambda x: asarray(np.array(x)))
    own = judged.needs if isinstance(judged, Estimator) else estimator_of(_function(judged)).needs
    subject = Subject(
        name=_name(estimator),
        coefficients=_function(judged),
        needs=own | frozenset(needs),
        host=None if named_host is None else _function(named_host),
        dominates=tuple(_function(_resolved(rival)) for rival in dominates),
        library=library,
        settings=settings,
    )
    claims |= {"lag_zero"} if named_host else set()
    claims |= {"dominance"} if dominates else set()
    if isinstance(judged, Estimator):
        claims |= {"one_token"} if subject.per_token else {"one_token", "levels"}
    return subject, claims


def _resolved(estimator: JudgedEstimator) -> Estimator | Coefficients:
    if isinstance(estimator, str):
        estimator = load(estimator) if ":" in estimator or estimator.endswith(".py") else entry(estimator).estimator
    if isinstance(estimator, type):
        made = estimator_of(estimator)
        return made if isinstance(made, Estimator) else made.function
    return estimator


def _function(estimator: Any) -> Coefficients:
    if isinstance(estimator, Estimator):
        return estimator.coefficients
    if not callable(estimator):
        raise InputError(f"estimator: {estimator!r} is no Estimator, catalogue name or function of a Batch")
    return estimator


def _name(given: Any) -> str:
    return repr(given) if isinstance(given, str | Estimator) else getattr(given, "__name__", repr(given))


def check_law(name: str, subject: Subject, examples: int = 30, *, shrink: bool = True) -> None:
    """Try one law on many cases. Raises `Violation` with the smallest counterexample found; without `shrink`, any."""
    found: list[Violation] = []
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=quiet,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])),
    )
    @given(LAWS[name].given(subject))
    def trial(case: Any) -> None:
        try:
            _try(name, subject, case)
        except Violation as violation:
            found.append(violation)
            raise

    try:
        with _nothing_left_behind():
            trial()
    except (Violation, Flaky):  # flaky: an estimator that answers differently when asked again
        raise found[-1] from found[-1].__cause__


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Hypothesis writes what it has learned of the code into a folder `.hypothesis` of the working directory; not here.

    Its own home stays untouched: these cases are derandomized and kept nowhere.
    """
    before = getattr(configuration, "__hypothesis_home_directory", None)
    configuration.set_hypothesis_home_dir(_scratch().name)
    try:
        yield
    finally:
        configuration.set_hypothesis_home_dir(before)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # goes when the process does


def _try(name: str, subject: Subject, case: Any) -> None:
    try:
        with np.errstate(all="ignore"):
            LAWS[name].check(subject, case)
    except Broken as broken:
        kinds = {Case: "samples", Arms: "arms", Strings: "strings"}
        size = f"{case.reward.size} {kinds[type(case)]}"
        call = f"vcposim.testing.reproduce({name!r}, {subject.name}{subject.settings}, {case.text()})"
        raise Violation(name, subject.name, size, case.text(), str(broken), call) from broken.__cause__


def reproduce(
    law: str,
    estimator: JudgedEstimator,
    *,
    needs: Iterable[str] = (),
    host: JudgedEstimator | None = None,
    dominates: Sequence[JudgedEstimator] = (),
    convert: Convert = np.array,
    **case: Any,
) -> None:
    """Try one law on one case, as a `Violation` prints it; silent where the law holds.

    `needs`, `host`, `dominates` and `convert` as they were given to `check_estimator`.

    Raises `Violation`; `InputError` for an unknown law.
    """
    if law not in LAWS:
        raise unknown_name("law", law, LAWS)
    subject, _ = subject_of(estimator, needs, host, dominates, convert)
    made = strings_of if "stops" in case else bandit_of if "target" in case else case_of
    _try(law, subject, made(**case))
