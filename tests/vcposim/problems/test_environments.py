"""Bandits and token chains: values and gradients against strings written out and finite differences."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.kit.statistical import SEARCHED, assert_near, near
from vcposim.errors import InputError
from vcposim.problems.environments import BanditEnvironment
from vcposim.problems.policies import Policy, drifted, random_linear, random_tabular
from vcposim.problems.token_chains import TokenChain, any_match, exact_match, modular_sum, partial_credit, with_end

STEP = 1e-5
Strings = Callable[[tuple[int, ...]], float]


def finite_difference(value: Callable[[Policy], float], policy: Policy) -> np.ndarray:
    theta = policy.parameter

    def at(parameter: np.ndarray) -> float:
        return value(policy.with_parameter(parameter))

    return np.array([(at(theta + STEP * e) - at(theta - STEP * e)) / (2 * STEP) for e in np.eye(theta.size)])


def final_states(chain: TokenChain) -> dict[tuple[int, ...], int]:
    """Where each string of T tokens ends, by walking the automaton from the first prompt."""
    out = {}
    for string in itertools.product(range(chain.shape[2]), repeat=chain.shape[0]):
        state = int(chain.start[0])
        for t, token in enumerate(string):
            state = int(chain.transition[t, state, token])
        out[string] = state
    return out


def until(string: tuple[int, ...], end: int) -> tuple[int, ...] | None:
    """What comes before the first end-of-sequence token; None if there is none."""
    return string[: string.index(end)] if end in string else None


TASKS: list[tuple[str, TokenChain, Strings]] = [
    ("exact", exact_match([1, 0, 2], 3), lambda s: float(s == (1, 0, 2))),
    ("any", any_match([[1, 0, 2], [1, 1, 1], [0, 0, 0]], 3), lambda s: float(s in {(1, 0, 2), (1, 1, 1), (0, 0, 0)})),
    ("partial", partial_credit([1, 0, 2], 3), lambda s: np.mean(np.array(s) == [1, 0, 2])),
    ("sum", modular_sum(3, 4, 5, 2, prompts=(1,)), lambda s: float((1 + sum(s)) % 5 == 2)),
    ("exact, ends", with_end(exact_match([1, 0], 2, length=3)), lambda s: float(until(s, 2) == (1, 0))),
    ("any, ends", with_end(any_match([[1], [0, 1]], 2, length=3)), lambda s: float(until(s, 2) in {(1,), (0, 1)})),
    (
        "sum, ends",
        with_end(modular_sum(3, 3, 2, 1), unfinished=-0.5),
        lambda s: -0.5 if until(s, 3) is None else float(sum(until(s, 3) or ()) % 2 == 1),
    ),
]


@pytest.mark.parametrize(("chain", "judge"), [t[1:] for t in TASKS], ids=[t[0] for t in TASKS])
def test_the_automaton_judges_strings_as_the_task_says(chain: TokenChain, judge: Strings) -> None:
    found = {string: chain.reward[state] for string, state in final_states(chain).items()}
    assert found == {string: near(judge(string)) for string in found}
    assert len(set(found.values())) > 1


def probability(chain: TokenChain, policy: Policy, string: Sequence[int], start: int) -> float:
    """Probability of a string up to its end; what follows the end counts only as token 0."""
    state, out = start, 1.0
    for t, token in enumerate(string):
        out *= float(token == 0) if chain.done[state] else float(np.exp(policy.log_prob[t, state, token]))
        state = int(chain.transition[t, state, token])
    return out


@pytest.mark.parametrize("linear", [False, True], ids=["tabular", "linear"])
@pytest.mark.parametrize(("chain", "judge"), [t[1:] for t in TASKS], ids=[t[0] for t in TASKS])
def test_value_gradient_and_divergence_of_chains(chain: TokenChain, judge: Strings, linear: bool) -> None:
    rng = np.random.default_rng(0)
    policy: Policy = random_linear(rng, chain.shape, 3) if linear else random_tabular(rng, chain.shape)
    behavior = drifted(policy, rng, 0.5)
    start = int(chain.start[0])
    strings = list(itertools.product(range(chain.shape[2]), repeat=chain.shape[0]))
    pi = np.array([probability(chain, policy, s, start) for s in strings])
    mu = np.array([probability(chain, behavior, s, start) for s in strings])
    assert pi.sum() == near(1)
    assert chain.value(policy) == near(pi @ [judge(s) for s in strings])
    assert_near(chain.gradient(policy), finite_difference(chain.value, policy), allow=SEARCHED)
    real = mu > 0
    assert chain.divergence(policy, behavior) == near(np.sum(pi[real] ** 2 / mu[real]) - 1)
    assert chain.divergence(policy, behavior, "kl") == near(np.sum(mu[real] * np.log(mu[real] / pi[real])))


def test_prompts_are_averaged() -> None:
    chain = modular_sum(2, 3, 4, 1, prompts=(0, 3))
    policy = random_tabular(np.random.default_rng(1), chain.shape)
    one = [modular_sum(2, 3, 4, 1, prompts=(p,)) for p in (0, 3)]
    assert chain.value(policy) == near(np.mean([c.value(policy) for c in one]))
    assert_near(chain.gradient(policy), np.mean([c.gradient(policy) for c in one], axis=0))


@pytest.mark.parametrize("linear", [False, True], ids=["tabular", "linear"])
def test_value_and_gradient_of_a_contextual_bandit(linear: bool) -> None:
    rng = np.random.default_rng(2)
    bandit = BanditEnvironment(rng.normal(size=(3, 4)), np.array([0.2, 0.5, 0.3]))
    policy: Policy = random_linear(rng, (3, 4), 5) if linear else random_tabular(rng, (3, 4))
    expected = sum(
        bandit.group_probability[g] * np.exp(policy.log_prob[g, k]) * bandit.reward[g, k]
        for g in range(3)
        for k in range(4)
    )
    assert bandit.value(policy) == near(float(expected))
    assert_near(bandit.gradient(policy), finite_difference(bandit.value, policy), allow=SEARCHED)


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"reward: shape \(3,\) with group_probability"):
        BanditEnvironment(np.zeros(3), np.ones(1))
    with pytest.raises(InputError, match=r"reward\[0\]\[1\]: nan is not a finite"):
        BanditEnvironment(np.array([[0.0, np.nan]]), np.ones(1))
    with pytest.raises(InputError, match=r"group_probability: sums to 0.9, not 1"):
        BanditEnvironment(np.zeros((2, 2)), np.array([0.5, 0.4]))
    policy = random_tabular(np.random.default_rng(0), (1, 2))
    with pytest.raises(InputError, match="divergence: 'tv' is neither"):
        BanditEnvironment(np.zeros((1, 2)), np.ones(1)).divergence(policy, policy, "tv")
    with pytest.raises(InputError, match=r"target: token 3 is outside 0..2"):
        exact_match([0, 3], 3)
    with pytest.raises(InputError, match="target: empty"):
        partial_credit([], 3)
    with pytest.raises(InputError, match="modulus: 0 is less than 1"):
        modular_sum(2, 3, 0)
    good = modular_sum(2, 3, 4)
    with pytest.raises(InputError, match=r"start: a state is outside 0..3"):
        TokenChain(good.transition, good.reward, good.done, np.array([4]), np.ones(1))
    with pytest.raises(InputError, match="transition: a done state is left"):
        TokenChain(good.transition, good.reward, ~good.done, good.start, np.ones(1))
