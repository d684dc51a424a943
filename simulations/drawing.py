"""One canvas for all experiments: the project's style, no global state of pyplot."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulations.stats import Interval
from vcposim.commands.figures import COLORS, STYLE

MARKERS = "osD^vP"


@contextmanager
def canvas(columns: int, *, width: float = 4.2, height: float = 3.4) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `columns` panels in the project's style; draw inside the `with`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        yield figure, list(np.atleast_1d(figure.subplots(1, columns)))


def color(number: int) -> str:
    """The color of series `number`."""
    return COLORS[number % len(COLORS)]


def marker(number: int) -> str:
    """The marker of series `number`: series stay apart without color."""
    return MARKERS[number % len(MARKERS)]


def draw_intervals(ax: Axes, x: Sequence[float], intervals: Sequence[Interval], number: int, label: str) -> None:
    """Series `number` as medians with their intervals, a little beside the others so that none hides another."""
    middle = np.array([i.value for i in intervals])
    spread = np.abs(np.array([[i.low for i in intervals], [i.high for i in intervals]]) - middle)
    shifted = np.asarray(x, dtype=float) * 1.02 ** (number - 2)
    style = {"marker": marker(number), "markersize": 4, "linewidth": 1, "color": color(number)}
    style["linestyle"] = "-" if number < len(COLORS) else "--"
    ax.errorbar(shifted, middle, spread, label=label, **style)  # type: ignore[arg-type]


def legend_beside(figure: Figure, ax: Axes) -> None:
    """One legend for all panels, to the right of them, where it hides nothing."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center")
