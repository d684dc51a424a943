"""vcposim: prove, measure and train with off-policy policy-gradient estimators, by the same lines of code.

The nouns to begin with are importable from here; a name is looked up when it is first used, so that `import vcposim`
costs next to nothing. Everything else is imported from its module.

>>> import numpy as np
>>> from vcposim import Batch, Estimator, ScoreNorms, Weighting
>>> batch = Batch(
...     reward=np.array([1.0, 0.0, 0.0, 1.0]),
...     log_ratio=np.array([0.3, -0.2, 0.1, 2.0]),
...     scores=ScoreNorms(np.array([2.0, 3.0, 2.5, 4.0])),
... )
>>> Estimator(Weighting("truncate", cap=8.0), baseline="opob").coefficients(batch).round(3)
array([ 0.03 , -0.8  , -1.081,  0.165])

How does it do on a problem whose gradient is known?

>>> from vcposim import bandit_problem, entry, exact
>>> problem = bandit_problem(target=[0.7, 0.3], behavior=[0.4, 0.6], reward=[1.0, 0.0])
>>> exact.moments(problem, entry("sequence_is").estimator, group_size=4).relative_bias < 1e-15
np.True_
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` reads the table below
    from vcposim import replay as replay
    from vcposim.batch import Batch, DenseScores, ScoreNorms, sample_measure
    from vcposim.catalogue import CATALOGUE, cite, entry
    from vcposim.control import step_scale
    from vcposim.diagnostics import Diagnostic, ess, ess_fraction
    from vcposim.errors import InputError
    from vcposim.estimators import Estimator
    from vcposim.gauges.panel import panel
    from vcposim.laboratory import exact, monte_carlo
    from vcposim.moments import Moments
    from vcposim.problems.chains import chain_problem
    from vcposim.problems.problem_file import load as load_problem
    from vcposim.problems.rollouts import Problem, bandit_problem, contextual_bandit_problem
    from vcposim.replay.reading import read_dump
    from vcposim.results import records_of
    from vcposim.testing import check_estimator, laws_of
    from vcposim.weights import Weighting

_PLACES = {
    "CATALOGUE": "catalogue",
    "Batch": "batch",
    "DenseScores": "batch",
    "Diagnostic": "diagnostics",
    "Estimator": "estimators",
    "InputError": "errors",
    "Moments": "moments",
    "Problem": "problems.rollouts",
    "ScoreNorms": "batch",
    "Weighting": "weights",
    "bandit_problem": "problems.rollouts",
    "chain_problem": "problems.chains",
    "check_estimator": "testing",
    "cite": "catalogue",
    "contextual_bandit_problem": "problems.rollouts",
    "entry": "catalogue",
    "ess": "diagnostics",
    "ess_fraction": "diagnostics",
    "exact": "laboratory.exact:",
    "laws_of": "testing",
    "load_problem": "problems.problem_file:load",
    "monte_carlo": "laboratory.monte_carlo:",
    "panel": "gauges.panel",
    "read_dump": "replay.reading",
    "records_of": "results",
    "replay": "replay:",
    "sample_measure": "batch",
    "step_scale": "control",
}
"""public name -> the module that defines it; `module:` is the module itself, `module:x` another name in it"""

__all__ = [
    "CATALOGUE",
    "Batch",
    "DenseScores",
    "Diagnostic",
    "Estimator",
    "InputError",
    "Moments",
    "Problem",
    "ScoreNorms",
    "Weighting",
    "bandit_problem",
    "chain_problem",
    "check_estimator",
    "cite",
    "contextual_bandit_problem",
    "entry",
    "ess",
    "ess_fraction",
    "exact",
    "laws_of",
    "load_problem",
    "monte_carlo",
    "panel",
    "read_dump",
    "records_of",
    "replay",
    "sample_measure",
    "step_scale",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'vcposim' has no attribute {name!r}")
    place, colon, attribute = _PLACES[name].partition(":")
    module = import_module(f"vcposim.{place}")
    found = module if colon and not attribute else getattr(module, attribute or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
