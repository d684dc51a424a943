"""How an estimator is switched on in each trainer, and what a trainer gives it of what it needs.

What no line says is given is refused, by name and before any work: a need that is new to the catalogue is refused
everywhere until someone gives it.
"""

from dataclasses import dataclass

from vcposim.baselines import baseline
from vcposim.catalogue.entries import CATALOGUE
from vcposim.errors import InputError
from vcposim.estimators import NEEDS, Estimator, Resolved

ALWAYS = frozenset({"tokens", "length", "grouped", "scores"})
"""what every trainer gives: ratios of tokens, lengths, all prompts of the batch, and norms of scores or a proxy"""

MEANING = {
    "log_prob": "log pi of every token",
    "collision": "sum_v pi(v)^2 at every token",
    "anchor_log_ratio": "log pi/anchor of every token, the anchor an earlier policy of the trainer",
    "reference_log_ratio": "log pi/reference",
    "population_baseline": "an oracle",
    "scores": "scores themselves, not their norms",
}
"""of needs that not every trainer meets"""


@dataclass(frozen=True)
class Switch:
    """A trainer's way to name an estimator."""

    line: str
    """with NAME for the estimator's name"""
    gives: frozenset[str] = ALWAYS
    """needs that it meets, as `Estimator.needs` says them"""
    norms: str = ""
    """what follows the name of an estimator that needs score norms"""

    def on(self, name: str) -> str | None:
        """The line for an entry; None where the trainer refuses it."""
        e = CATALOGUE[name].estimator
        if self.lacks(e):
            return None
        return self.line.replace("NAME", name + (self.norms if "scores" in e.needs else ""))

    def lacks(self, estimator: Resolved) -> list[str]:
        """Needs that it does not meet; scores themselves are not there, only their norms."""
        sums = (
            isinstance(estimator, Estimator)
            and isinstance(estimator.baseline, str)
            and not baseline(estimator.baseline).norms_suffice
        )
        return sorted((estimator.needs - self.gives) | ({"scores"} if sums else set()))


SWITCHES = {
    # its anchor is the policy one update ago, its reference the start
    "llm_bridge.train": Switch("--estimator NAME", NEEDS - {"population_baseline"}),
    "TRL": Switch('VcpoConfig(estimator="NAME")', ALWAYS | {"log_prob", "collision"}),
    "verl": Switch(
        "algorithm.adv_estimator=vcposim/NAME", ALWAYS | {"log_prob", "collision", "reference_log_ratio"}, "/length"
    ),
}
"""trainer -> how to switch an estimator on; step rules: `--step-rule NAME` of llm_bridge.train"""


def require_met(trainer: str, estimator: Resolved, name: str | None = None) -> None:
    """Refuse an estimator, called `name`, that needs what a trainer of `SWITCHES` does not give.

    Raises `InputError`, which says what that is and where to train it instead.
    """
    if not (lacking := SWITCHES[trainer].lacks(estimator)):
        return
    what = " and ".join(f"{need} ({MEANING[need]})" if need in MEANING else need for need in lacking)
    others = [line for other, line in SWITCHES.items() if other != trainer and not line.lacks(estimator)]
    remedy = (
        f"train it elsewhere, {others[0].line.replace('NAME', name or 'NAME')}" if others else "no trainer has that"
    )
    raise InputError(f"estimator: {name or 'this one'} needs {what}, which {trainer} does not give; {remedy}")
