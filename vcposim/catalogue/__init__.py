"""Every named estimator and step rule: formula, validity, whom to cite. `entries` is where one is added."""

from vcposim.catalogue.entries import (
    ALWAYS,
    CATALOGUE,
    STEP_RULES,
    WEIGHTINGS,
    Entry,
    StepRule,
    cite,
    entry,
    weighting,
)

__all__ = ["ALWAYS", "CATALOGUE", "STEP_RULES", "WEIGHTINGS", "Entry", "StepRule", "cite", "entry", "weighting"]
