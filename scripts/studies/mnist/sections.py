"""Sections of a part, each a dict of "text", "tables", "figures" and "numbers", put together."""

from collections.abc import Mapping, Sequence


def merge(sections: Sequence[Mapping]) -> dict:
    """Sections as one: their texts, tables and figures one after the other, their numbers side by side."""
    merged: dict = {"text": [], "tables": [], "figures": [], "numbers": {}}
    for section in sections:
        for key in ("text", "tables", "figures"):
            merged[key] += section[key]
        merged["numbers"] |= section["numbers"]
    return merged


def merge_named(sections: Mapping[str, Mapping]) -> dict:
    """The same of sections by name, each of whose numbers stay together under its name."""
    return merge([{**section, "numbers": {name: section["numbers"]}} for name, section in sections.items()])
