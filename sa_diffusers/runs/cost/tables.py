"""Rows of dicts as Markdown, and files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_diffusers.io.atomic_files import atomic_path, write_json


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """A Markdown table with a column for every key of any row; lists are left out."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """In the unit that a reader would choose."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h" if seconds < 3.6e6 else f"{seconds / 3600:,.0f} h"


def write_report(rows: Any, text: str, output_dir: Path) -> None:
    """benchmark.json and benchmark.md."""
    write_json(rows, output_dir / "benchmark.json")
    with atomic_path(output_dir / "benchmark.md") as temporary:
        temporary.write_text(text)
