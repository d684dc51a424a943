"""The strategies of the public kit (`vcposim.testing.strategies`), under the name the tests use."""

from vcposim.testing.strategies import (  # noqa: F401
    Arms,
    Case,
    Exact,
    arrays_of,
    as_float,
    bandits,
    cases,
    exact,
    extreme_log_ratio,
    grid,
    language_cases,
    lead_shape,
    policy_pair,
    probability,
    ratio,
    reward,
)
