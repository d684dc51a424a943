"""A problem: an environment, a target policy that learns, and a behavior policy that sampled.

Whatever the problem, it hands out the same record, a `vcposim.batch.Batch`: with every outcome and its exact
probability (`outcomes`), or with draws (`sample`). `vcposim.laboratory` reads nothing else.

Ways to make one: `bandit_problem` and `contextual_bandit_problem` from probabilities, `bandit_problem_of` from
policies, `chains.chain_problem` for token chains, `problem_file.load` from a JSON file.
"""

from collections.abc import Sequence
from inspect import getattr_static
from typing import Any, Protocol

import numpy as np

from vcposim.arrays import Array
from vcposim.batch import Batch, Scores
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.problems.bandits import BanditProblem, require_support
from vcposim.problems.environments import BanditEnvironment, place, require_finite, require_probability
from vcposim.problems.policies import LinearSoftmax, Policy
from vcposim.weights import Weighting


class Problem(Protocol):
    """What exact and Monte Carlo moments ask of a problem: G contexts, p parameters, K outcomes of a context.

    An object with all of these members is a problem, whatever its class; `require_problem` names those that miss.
    """

    @property
    def value(self) -> float:
        """E_pi[R], over contexts and outcomes."""
        ...

    @property
    def gradient(self) -> Array:
        """The exact gradient of `value` in the target's parameters: (p,)."""
        ...

    @property
    def group_probability(self) -> Array:
        """How often a group is of each context: (G,), sums to 1."""
        ...

    @property
    def outcome_count(self) -> int:
        """K: outcomes of one context, as an exact integer; what feasibility is judged by."""
        ...

    @property
    def listable(self) -> bool:
        """Whether `outcomes` can be called: K is not too large."""
        ...

    def outcomes(self) -> Batch:
        """Every outcome with its exact probability under the behavior: axes (G, K[, t]), `unit` 0.

        Outcomes that cannot happen, or that pad a context with fewer, have measure 0.
        """
        ...

    def restricted(self, group: int, outcome: Array) -> Scores:
        """Scores of some outcomes of one context, `outcome` (n,) indices, for many batches (..., n) of them."""
        ...

    def sample(self, rng: np.random.Generator, replications: int, group_size: int) -> Batch:
        """Independent groups of draws, each of one context: axes (replications, group_size[, t])."""
        ...

    def draw(self, rng: np.random.Generator, replications: int, group_size: int) -> Any:
        """The random part of `sample`; its `group` (replications, 1) is the context of each group."""
        ...

    def batch(self, draw: Any, *, per_token: bool = ...) -> Batch:
        """The batch of a draw, with log-ratios per token if asked for and if there are any."""
        ...

    def numbers_per_group(self, group_size: int) -> int:
        """Numbers that the largest array of a drawn group holds: what bounds the memory of Monte Carlo."""
        ...

    def contribution_moments(self, estimator: Estimator, baseline: Array) -> tuple[Array, Array] | None:
        """E x and E||x||^2 of a contribution x = c s without listing outcomes: (G,) -> (G, p), (G,). None: no form.

        Asked for estimators that see one sample at a time, with their constant `baseline` (G,).
        """
        ...

    def population_baseline(self, weighting: Weighting) -> Array | None:
        """The OPOB E[w^2 ||s||^2 R] / E[w^2 ||s||^2] of each context, without listing outcomes: (G,). None: no form."""
        ...

    def diagnostics(self) -> dict[str, float] | None:
        """`ess_fraction`, `chi2` and `kl` (nats) without listing outcomes; None: no such form."""
        ...


def require_problem(problem: object) -> None:
    """Refuse what is no `Problem`: `InputError` names every member that misses, before any work."""
    missing = [name for name in PROBLEM_MEMBERS if getattr_static(problem, name, None) is None]
    if missing:
        raise InputError(
            f"problem: {type(problem).__name__} has no {', '.join(missing)}; "
            "vcposim.problems.rollouts.Problem says what each is"
        )


PROBLEM_MEMBERS = tuple(name for name in vars(Problem) if not name.startswith("_"))
"""names of all members of the protocol"""


def bandit_problem(
    target: Sequence[float], behavior: Sequence[float], reward: Sequence[float], length: Sequence[float] | None = None
) -> BanditProblem:
    """A K-armed bandit from probability vectors (K,) and rewards (K,); the score of arm a is e_a - target.

    `length` (K,) is the number of tokens of each arm, 1 by default. An arm that neither policy ever plays is dropped
    from the measure and keeps its place in the gradient (K,).

    Raises `InputError` naming the entry: not finite, negative, not summing to 1 (within 1e-9), behavior zero where
    target is not, lengths that differ, no arm at all.

    >>> bandit_problem([0.5, 0.5], [0.25, 0.75], [1.0, 0.0]).gradient
    array([ 0.25, -0.25])
    """
    given = _tables(1, target=target, behavior=behavior, reward=reward, length=length)
    return _bandit({name: values[None] for name, values in given.items()}, np.ones(1))


def contextual_bandit_problem(
    target: Any, behavior: Any, reward: Any, group_probability: Any = None, length: Any = None
) -> BanditProblem:
    """G contexts of K arms from tables (G, K); contexts come up with `group_probability` (G,), uniform by default.

    Parameters are the G K logits, so the score of arm a in context g is e_a - target_g in block g.

    Raises `InputError` as `bandit_problem` does.
    """
    given = _tables(2, target=target, behavior=behavior, reward=reward, length=length)
    groups = given["target"].shape[0]
    rho = np.full(groups, 1 / groups) if group_probability is None else numbers("group_probability", group_probability)
    if rho.shape != (groups,):
        raise InputError(f"group_probability: {rho.shape[0]} entries for {groups} rows of target; give one for each")
    require_probability("group_probability", rho)
    return _bandit(given, rho)


def bandit_problem_of(
    environment: BanditEnvironment,
    target: Policy,
    behaviors: Sequence[Policy],
    version_probability: Sequence[float] | None = None,
    recorded: Sequence[Policy] | None = None,
) -> BanditProblem:
    """The bandit problem of an environment, a target policy and the policies that sample (one, or several versions).

    `version_probability` (default uniform) says how often each of them samples; `recorded` are the policies that the
    learner believes to have sampled, where they differ.
    """
    count = len(behaviors)
    probability = [1 / count] * count if version_probability is None else version_probability
    believed = behaviors if recorded is None else recorded
    return BanditProblem(
        target=np.exp(target.log_prob),
        behavior=np.exp(np.stack([policy.log_prob for policy in behaviors])),
        reward=environment.reward,
        group_probability=environment.group_probability,
        version_probability=np.asarray(probability, dtype=float),
        recorded=np.exp(np.stack([policy.log_prob for policy in believed])),
        score=target.score_table if isinstance(target, LinearSoftmax) else None,
    )


def _bandit(given: dict[str, Array], group_probability: Array) -> BanditProblem:
    return BanditProblem(
        target=given["target"],
        behavior=given["behavior"][None],
        reward=given["reward"],
        group_probability=group_probability,
        version_probability=np.ones(1),
        length=given.get("length"),
    )


def _tables(ndim: int, **given: Any) -> dict[str, Array]:
    tables = {name: numbers(name, values, ndim) for name, values in given.items() if values is not None}
    shape = tables["target"].shape
    for name, table in tables.items():
        if table.shape != shape:
            raise InputError(f"{name}: shape {table.shape} for a target of {shape}; give one number for each arm")
        if name in ("target", "behavior"):
            require_probability(name, table)
        require_finite(name, table)
    require_support("behavior", tables["target"], tables["behavior"], tables["behavior"])
    if "length" in tables and np.any(tables["length"] <= 0):
        where = tuple(int(i) for i in np.argwhere(tables["length"] <= 0)[0])
        raise InputError(f"{place('length', where)}: {tables['length'][where]} tokens; lengths are positive")
    return tables


def numbers(name: str, values: Any, ndim: int = 1) -> Array:
    """`values` as a float array of `ndim` axes with at least one entry: -> (...).

    Raises `InputError` naming the entry that is no number, or the shape that is not a table.
    """
    kind = "a list of numbers" if ndim == 1 else "a list of lists of numbers, all of one length"
    if ndim == 2 and isinstance(values, list | tuple):
        for g, row in enumerate(values):
            numbers(f"{name}[{g}]", row)
    elif isinstance(values, list | tuple):
        for i, x in enumerate(values):
            if isinstance(x, bool) or not isinstance(x, int | float | np.number):
                raise InputError(f"{name}[{i}]: {x!r} is not a number; expected {kind}")
    try:
        table = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"{name}: not {kind}; got {_short(values)}") from None
    if table.ndim != ndim:
        raise InputError(f"{name}: not {kind}; got {_short(values)}")
    if table.size == 0:
        raise InputError(f"{name}: empty; give at least one arm")
    return table


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
