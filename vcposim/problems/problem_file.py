"""Problems as JSON files.

Three kinds; every list holds plain numbers.

A bandit, from probabilities (`length`, the tokens of each arm, is optional):

    {"kind": "bandit", "target": [0.5, 0.5], "behavior": [0.25, 0.75], "reward": [1, 0]}

A contextual bandit, one row for each context (`group_probability`, uniform by default, and `length` are optional):

    {"kind": "contextual_bandit", "target": [[0.5, 0.5], [0.9, 0.1]], "behavior": [[0.25, 0.75], [0.8, 0.2]],
     "reward": [[1, 0], [0, 1]], "group_probability": [0.5, 0.5]}

A token chain, in compact form:

    {"kind": "chain", "task": "modular_sum", "length": 16, "vocabulary": 32, "modulus": 7, "residue": 3,
     "prompts": [0, 1, 2], "end_of_sequence": false,
     "policy": {"form": "tabular", "scale": 1.0, "seed": 0, "trained_steps": 0, "step_size": 1.0},
     "behavior": {"drift": 0.1, "seed": 1}}

Tasks: `modular_sum` (`length`, `modulus`; optional `residue`, `prompts`), `exact_match` and `partial_credit` (`target`,
a list of tokens), `any_match` (`targets`, several). With `end_of_sequence`, the vocabulary gains a token that ends a
string, and `length` is the longest string. Policies: `tabular`, or `linear` with `features`; random logits of standard
deviation `scale`, then `trained_steps` exact gradient steps of `step_size`. Behavior, one of: `drift` (standard
deviation of the noise on the parameters), `chi2` or `kl` (noise scaled until trajectories diverge that much), or `lag`
(the policy so many training steps earlier). Everything but task, vocabulary and behavior has the default shown.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vcposim.errors import InputError, unknown_name
from vcposim.problems.chains import chain_problem
from vcposim.problems.policies import Policy, drifted, drifted_to, random_linear, random_tabular
from vcposim.problems.rollouts import Problem, bandit_problem, contextual_bandit_problem
from vcposim.problems.runs import policies_of_a_run
from vcposim.problems.token_chains import TokenChain, any_match, exact_match, modular_sum, partial_credit, with_end

BANDIT = ("target", "behavior", "reward")


def load(path: Path) -> Problem:
    """The problem described by a JSON file.

    Raises `InputError`: unreadable or malformed file (with its line), missing or unknown field, unknown kind, or
    whatever the problem itself refuses; the message starts with the file's name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; a problem is a JSON file") from None
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: malformed JSON at column {error.colno} ({error.msg})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    try:
        return problem_from(fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def problem_from(fields: Any) -> Problem:
    """The problem described by the content of such a file, a dict.

    Raises `InputError` that names the field which is missing, unknown or out of range.
    """
    if not isinstance(fields, dict):
        raise InputError(f"problem: {type(fields).__name__} instead of an object with a field 'kind'; see --help")
    if "kind" not in fields:
        raise InputError(f"kind: missing; add one of {', '.join(sorted(KINDS))}")
    kind = fields["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown_name("kind", str(kind), KINDS)
    return KINDS[kind]({name: value for name, value in fields.items() if name != "kind"})


TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "modular_sum": (("length", "modulus"), ("residue", "prompts")),
    "exact_match": (("target",), ("length",)),
    "any_match": (("targets",), ("length",)),
    "partial_credit": (("target",), ()),
}
"""task -> its required and optional fields, beside those that all tasks have"""


def _chain(fields: dict[str, Any]) -> Problem:
    if "task" not in fields:
        raise InputError(f"task: missing; add one of {', '.join(sorted(TASKS))}")
    task = fields["task"]
    if task not in TASKS:
        raise unknown_name("task", str(task), TASKS)
    required, optional = TASKS[task]
    known(fields, ("task", "vocabulary", "behavior", *required), ("policy", "end_of_sequence", *optional))
    chain = _task(task, fields)
    run = _trained(chain, _object("policy", fields.get("policy", {})))
    return chain_problem(chain, run[-1], [_behavior(chain, run, _object("behavior", fields["behavior"]))])


def _task(task: str, fields: dict[str, Any]) -> TokenChain:
    ends = fields.get("end_of_sequence", False)
    if not isinstance(ends, bool):
        raise InputError(f"end_of_sequence: {ends!r} is neither true nor false")
    vocabulary = integer("vocabulary", fields["vocabulary"], least=1)
    if task == "modular_sum":
        length, modulus = (integer(name, fields[name], least=1) for name in ("length", "modulus"))
        prompts = tokens("prompts", fields.get("prompts", [0]))
        chain = modular_sum(length, vocabulary, modulus, integer("residue", fields.get("residue", 0)), prompts)
    elif task == "any_match":
        targets = fields["targets"]
        if not isinstance(targets, list):
            raise InputError("targets: not a list of lists of tokens")
        found = [tokens(f"targets[{i}]", target) for i, target in enumerate(targets)]
        chain = any_match(found, vocabulary, _length(fields, max(map(len, found), default=1), ends))
    else:
        target = tokens("target", fields["target"])
        if task == "partial_credit":
            chain = partial_credit(target, vocabulary)
        else:
            chain = exact_match(target, vocabulary, _length(fields, len(target), ends))
    return with_end(chain) if ends else chain


def _length(fields: dict[str, Any], longest: int, ends: bool) -> int:
    length = integer("length", fields.get("length", longest + ends), least=1)
    if length < longest or (length > longest and not ends):
        raise InputError(
            f"length: {length} for a target of {longest} tokens; make them equal, or set end_of_sequence and a longer"
        )
    return length


def _trained(chain: TokenChain, fields: dict[str, Any]) -> list[Policy]:
    known(fields, (), ("form", "features", "scale", "seed", "trained_steps", "step_size"))
    form = fields.get("form", "tabular")
    if form not in ("tabular", "linear"):
        raise unknown_name("policy.form", str(form), ("tabular", "linear"))
    scale = number("policy.scale", fields.get("scale", 1.0))
    rng = np.random.default_rng(integer("policy.seed", fields.get("seed", 0)))
    start: Policy
    if form == "linear":
        if "features" not in fields:
            raise InputError("policy.features: missing; a linear policy needs their number, as in 8")
        start = random_linear(rng, chain.shape, integer("policy.features", fields["features"], least=1), scale)
    else:
        start = random_tabular(rng, chain.shape, scale)
    steps = integer("policy.trained_steps", fields.get("trained_steps", 0))
    return policies_of_a_run(
        chain, start, steps=steps, step_size=number("policy.step_size", fields.get("step_size", 1.0))
    )


def _behavior(chain: TokenChain, run: list[Policy], fields: dict[str, Any]) -> Policy:
    known(fields, (), ("drift", "chi2", "kl", "lag", "seed"))
    ways = [name for name in ("drift", "chi2", "kl", "lag") if name in fields]
    if len(ways) != 1:
        raise InputError(
            f"behavior: {len(ways)} of drift, chi2, kl, lag given; give exactly one, as in {{'drift': 0.1}}"
        )
    way, target = ways[0], run[-1]
    if way == "lag":
        lag = integer("behavior.lag", fields["lag"])
        if lag >= len(run):
            raise InputError(f"behavior.lag: {lag} is more than policy.trained_steps {len(run) - 1}; train longer")
        return run[-1 - lag]
    value = number(f"behavior.{way}", fields[way])
    rng = np.random.default_rng(integer("behavior.seed", fields.get("seed", 1)))
    if way == "drift":
        return drifted(target, rng, value)
    direction = rng.standard_normal(target.parameter.shape)
    return drifted_to(target, direction, lambda mu: chain.divergence(target, mu, way), value)


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name}: {value!r} is not an object of fields in braces")
    return value


def integer(name: str, value: Any, least: int = 0) -> int:
    """An integer of at least `least`; `InputError` names the field otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: {value!r} is not an integer of {least} or more")
    return value


def number(name: str, value: Any) -> float:
    """A finite non-negative number; `InputError` names the field otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InputError(f"{name}: {value!r} is not a finite non-negative number")
    return float(value)


def tokens(name: str, value: Any) -> list[int]:
    """A list of non-negative integers; `InputError` names the entry otherwise."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}: {value!r} is not a list of tokens, as in [3, 1, 4]")
    return [integer(f"{name}[{i}]", token) for i, token in enumerate(value)]


def known(fields: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields, if all required ones and no unknown ones are there.

    Raises `InputError` that names the field otherwise.
    """
    for name in fields:
        if name not in required + optional:
            raise unknown_name("field", name, required + optional)
    for name in required:
        if name not in fields:
            raise InputError(f"{name}: missing; required are {', '.join(required)}")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: given twice; keep one")
    return dict(pairs)


KINDS: dict[str, Callable[[dict[str, Any]], Problem]] = {
    "bandit": lambda fields: bandit_problem(**known(fields, BANDIT, ("length",))),
    "contextual_bandit": lambda fields: contextual_bandit_problem(
        **known(fields, BANDIT, ("group_probability", "length"))
    ),
    "chain": _chain,
}
"""kind -> how its fields become a problem"""
