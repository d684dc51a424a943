"""Every named estimator and step rule: formula, validity, whom to cite. `entries` is where an estimator is added."""

from vcposim.catalogue.entries import CATALOGUE, FAMILIES, WEIGHTINGS, Entry, Unbiased, cite, entry, weighting
from vcposim.control import STEP_RULES, StepRule

__all__ = [
    "CATALOGUE",
    "FAMILIES",
    "STEP_RULES",
    "WEIGHTINGS",
    "Entry",
    "StepRule",
    "Unbiased",
    "cite",
    "entry",
    "weighting",
]
