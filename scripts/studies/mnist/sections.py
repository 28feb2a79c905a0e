"""What parts of the study are made of: sections of text, tables, figures and numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.figures import save_figure


def section(
    text: Sequence[str], tables: Sequence[dict], figures: Sequence[dict], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """A section: sentences, tables of `table`, figures of `figure`, and whatever stands in study.json."""
    return {"text": list(text), "tables": list(tables), "figures": list(figures), "numbers": numbers}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table; floats are shown with four digits, text as it is."""
    return {"title": title, "columns": list(columns), "rows": rows}


def figure(drawn: Figure, path: Path, caption: str) -> dict[str, str]:
    """Save a figure among the files of its part."""
    return {"file": save_figure(drawn, path), "caption": caption}


def merge(sections: Sequence[Mapping]) -> dict[str, Any]:
    """Sections as one: their texts, tables and figures one after the other, their numbers side by side."""
    merged: dict = section([], [], [], {})
    for one in sections:
        for key in ("text", "tables", "figures"):
            merged[key] += one[key]
        merged["numbers"] |= one["numbers"]
    return merged


def merge_named(sections: Mapping[str, Mapping]) -> dict[str, Any]:
    """The same of sections by name, each of whose numbers stay together under its name."""
    return merge([{**one, "numbers": {name: one["numbers"]}} for name, one in sections.items()])
