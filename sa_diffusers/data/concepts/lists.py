"""Lists of concepts to forget at once; a wrong list is refused whole, and each fault named by its line."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from sa_diffusers.core.concepts import Concept, Concepts, fold
from sa_diffusers.data.concepts.given import check_surrogate, find_concept, siblings_of
from sa_diffusers.data.prompts import text_of
from sa_diffusers.data.tables import load_table
from sa_diffusers.io.atomic_files import read_text


SEPARATOR = ";"  # between concepts, as a comma is between phrasings


@dataclass(frozen=True)
class Forget:
    """A concept to forget and what takes its place, of a list of them.

    Attributes:
        concept: one or several phrasings, separated by commas.
        surrogate: a prompt, a folder of images (./pictures), "noise", or "auto"; None: looked up, for known concepts.
        siblings: words, separated by commas, that could stand in its place; None: those of its kind.
        kind: what it is one of ("digit"): all of a kind have the same siblings. None: looked up, for known concepts.
    """

    concept: str
    surrogate: str | os.PathLike | None = None
    siblings: str | None = None
    kind: str | None = None


COLUMNS = tuple(field.name for field in fields(Forget))
Rows = list[tuple[str, Forget]]  # where each stands ("": where nothing else could), and what it says


def read_rows(source: str) -> Rows:
    """The rows of a file: YAML, a list of mappings, or a table with a line of names (see `load_table`).

    Raises:
        ValueError: a file that cannot be read, that holds none, or names something beside COLUMNS.
    """
    path = Path(source)
    if path.suffix.lower() in (".yaml", ".yml"):
        found = list(_yaml_rows(path))
    else:
        table = load_table(source)
        length = len(next(iter(table.columns.values()), ()))
        found = [
            # An empty cell says nothing; in YAML `surrogate: ""` is nothing in particular.
            (table.where(i), {name: column[i] or None for name, column in table.columns.items()})
            for i in range(length)
        ]
    if not found:
        raise ValueError(f"expected concepts in {source}, which holds none")
    faults = [
        f"{where}: unknown column {name!r}; expected {', '.join(COLUMNS)}"
        for where, row in found
        for name in row
        if name not in COLUMNS
    ]
    _refuse(faults)
    return [(where, _row(where, row)) for where, row in found]


def split_rows(concept: str, surrogate: str | None = None, siblings: str | None = None) -> Rows:
    """Rows from texts that name several concepts, and what belongs to each, with semicolons between; see `split_list`.

    Raises:
        ValueError: surrogates or siblings for another number of concepts.
    """
    parts = split_list(concept)
    columns = {"concept": parts}
    for name, text in (("surrogate", surrogate), ("siblings", siblings)):
        columns[name] = [None] * len(parts) if text is None else split_list(text)
        if len(columns[name]) != len(parts):
            raise ValueError(
                f"expected {name} for each of {len(parts)} concepts, separated by {SEPARATOR!r}, got "
                f"{len(columns[name])} ({text}); name every one, or omit all"
            )
    columns["siblings"] = [(text or "").strip() or None for text in columns["siblings"]]  # a list's are of some
    rows = [Forget(*row) for row in zip(*columns.values(), strict=True)]
    return [(f"concept {i} ({row.concept.strip()})" if rows[1:] else "", row) for i, row in enumerate(rows, 1)]


def split_list(text: str) -> list[str]:
    r"""The parts of a text between its semicolons; one with a backslash before it (``\;``) is part of a part."""
    return [part.replace(rf"\{SEPARATOR}", SEPARATOR) for part in re.split(rf"(?<!\\){SEPARATOR}", text)]


def options_of(concepts: Sequence[Concept]) -> dict[str, str | None]:
    """Options that say concepts as they were completed; `split_rows` reads them back. None where nothing is known."""
    columns = {
        "concept": [one.said for one in concepts],
        "surrogate": [one.surrogate for one in concepts],
        "siblings": [", ".join(one.siblings) or None for one in concepts],
    }
    escaped = {n: [(text or "").replace(SEPARATOR, rf"\{SEPARATOR}") for text in own] for n, own in columns.items()}
    known = {name: any(text is not None for text in own) for name, own in columns.items()}
    return {name: f"{SEPARATOR} ".join(own) if known[name] else None for name, own in escaped.items()}


def concepts_of(rows: Rows, plurals: bool = False, favours: bool = True, favours_nothing: bool = False) -> Concepts:
    """The concepts of rows, completed from `assets/surrogates.yaml`.

    Args:
        favours: whether surrogates take their places; else what they are is not looked at.
        favours_nothing: whether a surrogate may be "".

    Raises:
        ValueError: with every fault: a row without a concept, two that name the same or overlap, a surrogate that is
            missing or itself forgotten, surrogates of several kinds, or one kind with different siblings.
    """
    kinds = {row.kind: row.siblings for _, row in reversed(rows) if row.kind and row.siblings}
    faults, found = [], []
    for where, row in rows:
        try:
            siblings = row.siblings or (row.kind and (kinds.get(row.kind) or siblings_of(row.kind)))
            concept = find_concept(row.concept, _written(row.surrogate), siblings, plurals)
            if favours:
                check_surrogate(concept, favours_nothing)
            found.append((where, concept))
        except ValueError as error:
            faults.append(_said(where, str(error)))
    faults += [
        _said(where, f"other rows of the kind {row.kind!r} have other siblings; give one list a kind")
        for where, row in rows
        if row.kind and row.siblings and kinds[row.kind] != row.siblings
    ]
    named = [(where or repr(concept.name), concept) for where, concept in found]
    for i, (where, concept) in enumerate(found):
        faults += [_said(where, text) for text in _conflicts(concept, named[:i], named, favours)]
    _refuse(faults)
    return Concepts(concept for _, concept in found)


def as_options(
    rows: str | Sequence[Forget], surrogate: str | os.PathLike | None = None, **options: Any
) -> dict[str, Any]:
    """Options with what is to be forgotten: one concept and its surrogate, or several as texts with semicolons.

    Raises:
        ValueError: as `concepts_of`; a surrogate or siblings beside a list.
    """
    if isinstance(rows, str):
        return options | {"concept": rows, "surrogate": _written(surrogate)}
    if surrogate is not None or options.get("siblings") is not None:
        raise ValueError("a list of concepts says all of each; expected no surrogate and no siblings beside it")
    listed = [(f"concept {i} ({row.concept})", row) for i, row in enumerate(rows, 1)]
    known = all(row.surrogate is None for row in rows)  # or looked up, each
    found = options_of(concepts_of(listed, favours=not known, favours_nothing=True))
    return options | found | ({"surrogate": None} if known else {})


def _written(surrogate: str | os.PathLike | None) -> str | None:
    """A surrogate as a text; a path as a folder, where a bare name would be a word."""
    return os.path.join(".", surrogate) if isinstance(surrogate, os.PathLike) else surrogate


def _yaml_rows(path: Path) -> Iterator[tuple[str, Mapping]]:
    loader = None
    try:
        loader = yaml.SafeLoader(read_text(path))
        node = loader.get_single_node()
        if not isinstance(node, yaml.SequenceNode | None):
            raise ValueError(f"{path}: expected a list of concepts, `- concept: seven, 7` and so on")
        for item in node.value if node else ():
            where = f"{path}, line {item.start_mark.line + 1}"
            row = loader.construct_object(item, deep=True)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected `concept: ...`, got {row!r}")
            yield where, row
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def _row(where: str, row: Mapping) -> Forget:
    said = {name: text_of(value, name, where) for name, value in row.items() if value is not None}
    said = {name: text for name, text in said.items() if text.strip() or name == "surrogate"}
    return Forget(**{"concept": ""} | said)


def _conflicts(
    concept: Concept, earlier: Sequence[tuple[str, Concept]], every: Sequence[tuple[str, Concept]], favours: bool
) -> Iterator[str]:
    """What is wrong with a concept beside others."""
    own = set(map(fold, concept.phrasings))
    for where, other in earlier:
        if own & set(map(fold, other.phrasings)):
            yield f"a duplicate of {where}; name every concept once"
        elif concept.named_in(other.said) or other.named_in(concept.said):
            yield f"its words overlap those of {where}, and one would be replaced within the other; omit one"
        if favours and other.surrogate_kind != concept.surrogate_kind and other is every[0][1]:
            kinds = f"{concept.surrogate_kind} beside {other.surrogate_kind} of {where}"
            yield f"expected surrogates of one kind, got {kinds}; pass other ones"
    if favours and concept.surrogate_kind == "prompt":
        for where, other in every:
            if other is not concept and other.named_in(concept.surrogate):
                yield f"the surrogate {concept.surrogate!r} is itself forgotten, by {where}; pass another"


def _said(where: str, text: str) -> str:
    return f"{where}: {text}" if where else text


def _refuse(faults: Sequence[str]) -> None:
    """Raise ValueError with every fault, a line each."""
    if faults:
        raise ValueError("\n".join(faults))
