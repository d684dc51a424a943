"""What a result of vcposim has in common with every other: it converts to plain records, and a notebook shows it.

    moments.records()                    one dict, or one a row: names -> numbers and words
    records_of({"vcpo": moments, ...})   several results as one table, `name` first
    pandas.DataFrame(result.records())   and on from there

Formulas know no table library, so a table is a list of dicts, and its HTML is written by hand.
"""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """A value with its 95% interval; NaN where it does not exist. Build it by keywords: the order is nobody's habit."""

    low: float
    value: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Records(list[dict[str, Any]]):
    """Rows of a table: a list of dicts that shows itself as a table in a notebook.

    >>> Records([{"name": "a", "mse": 0.25}, {"name": "b", "mse": None}])._repr_html_()
    '<table><tr><th>name</th><th>mse</th></tr><tr><td>a</td><td>0.25</td></tr><tr><td>b</td><td>—</td></tr></table>'
    """

    def _repr_html_(self) -> str:
        """An HTML table: a column for every key that occurs; numbers to four figures, "—" for what does not exist."""
        columns = list(dict.fromkeys(key for record in self for key in record))
        head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
        rows = ("".join(f"<td>{escape(_shown(record.get(c)))}</td>" for c in columns) for record in self)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


class Result:
    """A result with `records`: rows of plain numbers and words, each with the same keys."""

    def records(self) -> Records:
        """The result as rows of a table; what does not exist is NaN or infinite, as the formulas have it."""
        raise NotImplementedError(f"{type(self).__name__} has no records; write the method")

    def _repr_html_(self) -> str:
        return self.records()._repr_html_()


def records_of(results: Mapping[str, Result]) -> Records:
    """Several results as one table: their records, each with the `name` it goes by in front."""
    return Records({"name": name, **record} for name, result in results.items() for record in result.records())


def _shown(value: Any) -> str:
    if value is None or value != value:  # NaN is unlike itself, whatever its library
        return "—"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
