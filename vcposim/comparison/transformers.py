"""Where a comparison meets transformers: `llm_bridge.comparison`, which needs the extra `llm`.

The one module of vcposim that knows llm_bridge, and it imports it inside a function: all else of a comparison works
without the extra.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from vcposim.comparison.design import TransformerSetting
from vcposim.errors import InputError

if TYPE_CHECKING:
    from vcposim.comparison.measure import MeasuredTraining

PACKAGES = ("torch", "transformers", "reasoning-gym")
"""whose versions decide what transformers learn, beside those of every comparison"""


class TransformerPart(Protocol):
    """What `llm_bridge.comparison` does for a comparison."""

    def trained(self, name: str, setting: TransformerSetting) -> "MeasuredTraining":
        """What an estimator's runs came to."""

    def prepare(self, settings: Sequence[TransformerSetting]) -> None:
        """Warm up what the runs begin from, and keep it for all processes."""


def part() -> TransformerPart:
    """The part; `InputError` that says what to install if the extra is not there."""
    try:
        from llm_bridge import comparison
    except ModuleNotFoundError as error:
        missing = f"{error.name!r} is not installed" if error.name else str(error)
        raise InputError(f"--transformers: {missing}; python -m pip install 'vcposim[llm]'") from None
    return cast(TransformerPart, comparison)
