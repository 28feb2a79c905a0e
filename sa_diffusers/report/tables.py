"""Tables of values as Markdown, and what a value looks like in one."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any


def cell(value: Any, spec: str = ".4g", missing: str = "–") -> str:
    """What a table shows of a value: a float by `spec`, None as `missing`, all else as Python prints it."""
    if value is None:
        return missing
    return f"{value:{spec}}" if isinstance(value, float) else str(value)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], spec: str = ".4g", missing: str = "–") -> str:
    """A Markdown table without a last line break; a bar inside a value is escaped.

    Args:
        rows: values of each row, in the order of the header.
        spec, missing: as of `cell`.
    """
    cells = [[cell(value, spec, missing).replace("|", "\\|") for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *cells])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of any lengths for a terminal, in columns."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def bracket(interval: Sequence[float], spec: str) -> str:
    """An interval as tables show it: "[96.0%, 99.0%]"."""
    return f"[{interval[0]:{spec}}, {interval[1]:{spec}}]"


def measured(value: Any, interval: Sequence[float] | None = None, spec: str = ".1%") -> str:
    """A number as everything here shows it, with its interval where it has one: "97.5% [96.0%, 99.0%]"."""
    if not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:{spec}}" + (f" {bracket(interval, spec)}" if interval else "")


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """One level of nested values as names with a dot: {"ink": {"red": 1.0}} becomes {"ink.red": 1.0}."""
    flat = {}
    for key, value in values.items():
        flat |= {f"{key}.{part}": v for part, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat
