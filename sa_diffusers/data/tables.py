"""Tables from files and data sets, their columns by name; what is wrong with one is told by its line."""

import csv
import io
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_diffusers.io.atomic_files import read_text
from sa_diffusers.io.hub import explain_load_errors


if TYPE_CHECKING:  # it takes a second to import
    from datasets import Dataset

DELIMITERS, JSON = {".csv": ",", ".tsv": "\t"}, (".json", ".jsonl")
KINDS = (*DELIMITERS, *JSON, ".parquet")


@dataclass(frozen=True)
class Table:
    """Columns of equal length by name, and the line that each row begins at, where it has one."""

    source: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None

    def where(self, row: int) -> str:
        return f"{self.source}, " + (f"row {row}" if self.lines is None else f"line {self.lines[row]}")


def kind_of(path: Path) -> str:
    """What a file's name says that it holds, such as ".csv" for X.CSV and x.csv.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def check_kind(path: Path, *kinds: str) -> None:
    """Raise what is wrong with a path that should be a file of one of some kinds; folders and hub ids pass.

    Raises:
        FileNotFoundError: it names a file of such a kind that does not exist.
        ValueError: it is a file of another kind.
    """
    if kind_of(path) in kinds and not path.is_file():
        raise FileNotFoundError(f"no file {path}; check the path")
    if path.is_file() and kind_of(path) not in kinds:
        raise ValueError(f"expected a file ending in {', '.join(kinds)} (or these with .gz), got {path}; convert it")


def load_table(source: str) -> Table:
    """A .csv, .tsv, .json, .jsonl or .parquet file, a folder of such, or the split "train" of a data set of the hub.

    Values of .csv and .tsv are text; those of the others have their types.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that cannot be read, with the line where it goes wrong.
        ModelLoadError: a folder or a data set of the hub that cannot be loaded.
    """
    path = Path(source)
    check_kind(path, *KINDS)
    if kind_of(path) in DELIMITERS:
        return _read_csv(path)
    if kind_of(path) in JSON:
        return _read_json(path)
    if path.is_file():
        try:
            data = load_rows(path="parquet", data_files=source)
        except ValueError as error:
            raise ValueError(f"{source} is no readable .parquet file ({error}); write it again") from error
    else:
        with explain_load_errors(source, "dataset"):
            data = load_rows(path=source)
    return Table(source, {name: data[name] for name in data.column_names})


def load_rows(**given: Any) -> "Dataset":
    """`datasets.load_dataset` of the split "train"; a file that cannot be read is a ValueError that says why."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(**given, split="train")
    except (DatasetGenerationError, StopIteration) as error:  # the latter of an empty .jsonl
        raise ValueError(" ".join(str(error.__cause__ or error).split()) or "a file is empty") from error


def _read_csv(path: Path) -> Table:
    delimiter = DELIMITERS[kind_of(path)]
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows, lines, start = [], [], 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: {error}; check the quotes around its values") from error
    if not rows:
        raise ValueError(f"expected a line with the names of columns in {path}, which is empty")
    names = rows[0]
    if len(names) == 1 and any(other in names[0] for other in ";\t"):
        raise ValueError(f"{path}, line {lines[0]}: expected {delimiter!r} between columns, got {names[0]!r}")
    wrong = next((index for index, row in enumerate(rows) if len(row) != len(names)), None)
    if wrong is not None:
        raise ValueError(
            f"{path}, line {lines[wrong]}: expected {len(names)} values, for {', '.join(names)}, got "
            f"{len(rows[wrong])}; put quotes around a text with {delimiter!r} in it"
        )
    columns = dict(zip(reversed(names), zip(*(row[::-1] for row in rows), strict=True), strict=True))
    return Table(str(path), {name: columns[name][1:] for name in dict.fromkeys(names)}, lines[1:])


def _read_json(path: Path) -> Table:
    """A list of objects or of texts (the column "prompt"), an object of columns, or an object a line."""
    text = read_text(path)
    lines = None
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if kind_of(path) == ".json" and text.lstrip()[:1] == "[":
            raise ValueError(f"{path} is no valid JSON: {error}; repair it") from error
        rows, lines = [], []
    if isinstance(rows, dict):
        values = list(rows.values())
        if kind_of(path) == ".json" and values and all(isinstance(value, list) for value in values):
            if len({len(value) for value in values}) > 1:
                raise ValueError(f"{path}: expected columns of one length, got others")
            return Table(str(path), rows)
        rows = [rows]
    if not isinstance(rows, list) or lines is not None:
        rows, lines = zip(*json_lines(text, path), strict=True) if text.strip() else ([], [])
    rows = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    wrong = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        where = f"line {lines[wrong]}" if lines else f"entry {wrong}"
        raise ValueError(f"{path}, {where}: expected a JSON object, got {reprlib.repr(rows[wrong])}")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, lines)


def json_lines(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    """What each line that is not blank says, and its number. Raises ValueError for one that is no JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), number
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}") from error
