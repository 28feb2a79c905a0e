"""Tables of values as Markdown, and what a value looks like in one."""

from collections.abc import Iterable, Mapping, Sequence
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


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """One level of nested values as names with a dot: {"ink": {"red": 1.0}} becomes {"ink.red": 1.0}."""
    flat = {}
    for key, value in values.items():
        flat |= {f"{key}.{part}": v for part, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat
