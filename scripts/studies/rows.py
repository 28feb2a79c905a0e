"""Rows of a study as Markdown, and seconds as a reader would say them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sa_diffusers.report.tables import markdown_table


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a column for every key of any row; lists are left out, what is missing is blank."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
    return markdown_table(keys, ([row.get(key) for key in keys] for row in rows), ".3g", missing="") + "\n"


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader would choose: "90 s", "1.5 min", "3 h"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h" if seconds < 3.6e6 else f"{seconds / 3600:,.0f} h"
