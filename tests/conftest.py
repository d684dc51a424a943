"""One Hypothesis profile for all tests: reproducible (no random seed, no database), no deadline on a shared machine.

And the shapes that docstrings state are checked at every call (`tests/kit/shapes.py`).
"""

from hypothesis import HealthCheck, Phase, settings

from tests.kit import shapes

shapes.install()

settings.register_profile(
    "vcposim",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
# a mutant is dead at the first example that fails: no time spent on the smallest one
settings.register_profile(
    "mutation", settings.get_profile("vcposim"), phases=(Phase.explicit, Phase.generate), max_examples=8
)
settings.load_profile("vcposim")
