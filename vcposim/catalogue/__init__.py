"""Every named estimator and step rule: formula, validity, whom to cite. `entries` is where an estimator is added."""

from vcposim.catalogue.entries import ALWAYS, CATALOGUE, WEIGHTINGS, Entry, cite, entry, weighting
from vcposim.control import STEP_RULES, StepRule

__all__ = ["ALWAYS", "CATALOGUE", "STEP_RULES", "WEIGHTINGS", "Entry", "StepRule", "cite", "entry", "weighting"]
