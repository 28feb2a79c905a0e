"""What a saved pipeline has forgotten: forgotten.json beside model_index.json, which stock diffusers passes over."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sa_diffusers import __version__
from sa_diffusers.io.atomic_files import explain_read_errors, file_hash, read_json, write_json
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.hub import ModelLoadError, fetch
from sa_diffusers.io.model_names import is_on_hub


FORGOTTEN = "forgotten.json"
NAMED = ("concept", "method")  # in words, in every record
OPEN = {"surrogate": None, "surrogate_kind": "prompt", "date": None}  # where a record says nothing of them
LIBRARIES = ("diffusers", "transformers", "peft", "torch")


def write_forgotten(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write what has been forgotten, the oldest first, with a hash of every file that the folder holds now.

    Args:
        records: concept, surrogate and its kind ("prompt", "images" or "noise"), method and model by name; "date", the
            day that its run began, or None; "before" and "after", the hashes of every component. Those of this run
            have no versions yet, and get those of what has made it.
    """
    versions = {"sa_diffusers": __version__} | {name: version(name) for name in LIBRARIES}
    hashes = {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    forgotten = [record | {"versions": record.get("versions", versions)} for record in records]
    write_json({"forgotten": forgotten, "files": hashes}, folder / FORGOTTEN)


def read_forgotten(model: str, revision: str | None = None) -> list[dict[str, Any]]:
    """What a pipeline (hub id, local folder or bundled/<name>) has forgotten, the oldest first; [] where nothing says.

    Raises:
        DamagedFile: the file holds something else.
    """
    folder = Path(resolve(model))
    if is_on_hub(model):
        try:
            folder = fetch(model, [FORGOTTEN], revision)
        except ModelLoadError:  # the pipeline is there: what has none of the file has forgotten nothing that is known
            return []
    if not (folder / FORGOTTEN).is_file():
        return []
    records = read_json(folder / FORGOTTEN, "forgotten")["forgotten"]
    with explain_read_errors(folder / FORGOTTEN):
        return [OPEN | record | {name: str(record[name]) for name in NAMED} for record in records]


def said_of(record: Mapping[str, Any]) -> str:
    """A record in words."""
    towards = f" in favour of {record['surrogate']}" if record["surrogate"] else ""
    when = f", {record['date']}" if record.get("date") else ""
    return f"{record['concept']}{towards}, by {record['method']}{when}"
