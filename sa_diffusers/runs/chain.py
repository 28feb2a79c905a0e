"""One request after another: what a run that goes on from another takes over of it, and of those before that."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sa_diffusers.core.concepts import Concept, split_phrasings
from sa_diffusers.data.concepts.lists import Rows, options_of, read_rows, split_rows
from sa_diffusers.data.sharing import FISHER_FILE
from sa_diffusers.io.atomic_files import read_json
from sa_diffusers.io.forgotten import FORGOTTEN, read_forgotten
from sa_diffusers.io.hub import fetch_folder
from sa_diffusers.io.loading import read_run_options
from sa_diffusers.io.model_names import base_name
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.training.lora import LORA_FILE, lora_file


# What a chain is told by, with a classifier and without.
TOLD = (
    "concept_probability", "retained_accuracy", "retained_worst_accuracy", "concept_rate_when_unnamed",
    "concept_preference", "replay_loss",
)  # fmt: skip

# What a run keeps of those before it (see `keep_earlier`): a folder each by its number, from 1 on, and beside these
# what it was given itself.
EARLIER = "earlier"

# What others go on from, of a run's folder on the hub.
SHARED = ("config.yaml", "metrics.json", "pipeline/*", "lora/*", "samples/samples.*", FISHER_FILE, f"{EARLIER}/*")


@dataclass(frozen=True)
class Link:
    """A finished run that others go on from, by its folder. Raises ValueError: no finished run."""

    folder: Path

    @cached_property
    def options(self) -> dict[str, Any]:
        values = read_run_options(self.folder)
        if not values or not (self.folder / "metrics.json").exists():
            raise ValueError(f"expected the folder of a finished run to go on from, got {self.folder}")
        return values

    @property
    def rows(self) -> Rows:
        """What it forgot, as its own options say; a list's file is read where these name one, as they once did."""
        given = (self.options.get(name) for name in ("concepts", "concept", "surrogate", "siblings"))
        return [(f"{where or 'the concept'} of {self.folder}", row) for where, row in rows_of(*given)]

    @property
    def adapters(self) -> dict[Path, list[str]]:
        """The files of the adapters that it left, and of which concepts each is."""
        folder, names = self.folder / "lora", [split_phrasings(row.concept)[0] for _, row in self.rows]
        each = {folder / lora_file(name): [name] for name in names}
        found = {folder / LORA_FILE: names} if (folder / LORA_FILE).exists() else each
        return found if all(file.exists() for file in found) else {}

    @property
    def numbers(self) -> dict[str, Any]:
        """What the chain is told by: what it forgot, when and by what, and what its result was found to do."""
        metrics, own = read_json(self.folder / "metrics.json", "after"), self.forgotten[-1]
        told = {name: metrics["after"].get(name) for name in (*TOLD, f"{TOLD[0]}_by_concept")}
        said = "; ".join(row.concept.strip() for _, row in self.rows)
        return {"concept": said, "date": own["date"], "method": own["method"]} | told

    @property
    def forgotten(self) -> list[dict[str, Any]]:
        return read_forgotten(str(self.folder / "pipeline"))

    @property
    def kept(self) -> list[Path]:
        """Folders of what it keeps of the runs before it, the first one first."""
        found = (path for path in (self.folder / EARLIER).glob("*") if path.name.isdecimal())
        return sorted(found, key=lambda path: int(path.name))

    def held(self, option: str, name: str, holds: str = "") -> Path | None:
        """What its folder has of what serves every request: made by it, or kept of what it was given."""
        places = [self.folder / name]
        if self.options.get(option):  # of itself, where that is not the chain's
            places += [self.folder / EARLIER / name, *(folder / name for folder in self.kept)]
        return next((place for place in places if (place / holds).exists()), None)

    def shared(self, option: str, name: str, holds: str = "") -> str | None:
        """What it made, or was given, of what serves every request; None where it needed none."""
        held = self.held(option, name, holds)
        return str(held) if held else self.options.get(option)


@dataclass(frozen=True)
class Merge:
    """What a run does that trains nothing, but makes a pipeline of adapters that are there.

    Attributes:
        run: the last of the chain that they are of.
        files: the adapters, each with the names of its concepts.
        density: see `fuse_ties`; None: their changes are added.
        taken_back: what the pipeline knows again, judged against the run; None: judged against the original.
        command: what repeats it.
    """

    run: Link
    files: dict[Path, list[str]]
    density: float | None
    taken_back: str | None
    command: str

    @property
    def names(self) -> list[str]:
        """Of all that stays forgotten."""
        return [name for names in self.files.values() for name in names]

    @property
    def said(self) -> str:
        back = f", without that of {self.taken_back}, which it knows again" if self.taken_back else ""
        how = "the sum" if self.density is None else f"by TIES at density {self.density:g}"
        return f"Made of adapters of {base_name(str(self.run.folder))}, {how}{back}; nothing was trained."


def chain_of(after: str | None) -> list[Link]:
    """The runs that one goes on from, the first one first.

    Raises:
        ValueError: a chain of runs that are not there, or one that comes back to a run of it.
    """
    links: list[Link] = []
    kept: list[Path] = []
    while after:
        links.insert(0, _find(after, kept.pop() if kept else None))
        if links[0].folder in [link.folder for link in links[1:]]:
            raise ValueError(f"{after} goes on from itself: its folder was written over; pass another --after")
        kept = links[0].kept or kept
        after = links[0].options.get("after")
    return links


def _find(after: str, kept: Path | None) -> Link:
    """A run in its own place, or as a later one keeps it, where that place has none or, elsewhere, another run."""
    if kept is None:
        return Link(fetch_folder(after, SHARED))
    own, copied = Link(Path(after).expanduser()), Link(kept)
    is_there = (own.folder / "pipeline" / FORGOTTEN).is_file()
    return own if is_there and own.forgotten == copied.forgotten else copied


def rows_of(file: str | None, *given: str | None) -> Rows:
    return read_rows(file) if file else split_rows(*given)


def saying(options: RunOptions, concepts: Sequence[Concept]) -> RunOptions:
    """The options as they say the run's own concepts themselves: a list's file may change, and does not go with it."""
    said = copy.copy(options)
    for name, value in (options_of(concepts) | {"concepts": None}).items():
        setattr(said, name, value)
    return said


def shared_by(links: Sequence[Link]) -> dict[str, str | None]:
    """What serves a chain's next request as well: samples of the last run, Fisher of the first that has one."""
    fishers = (link.shared("fisher", FISHER_FILE) for link in links)
    samples = links[-1].shared("samples", "samples", "samples.safetensors")
    return {"samples": samples, "fisher": next(filter(None, fishers), None)}


def taken_over(options: RunOptions) -> RunOptions:
    """The options with samples of the chain's last run and the Fisher of its first, where they name none.

    Raises:
        ValueError: no finished run, or one of another model.
    """
    if not options.after:
        return options
    if options.output_dir and Path(options.after).resolve() == Path(options.output_dir).resolve():
        raise ValueError(f"a run cannot go on from itself: expected another output_dir than after, {options.after}")
    links = chain_of(options.after)
    last, shared = links[-1], shared_by(links)
    if base_name(last.options["model"]) != base_name(options.model):
        raise ValueError(
            f"a chain keeps its first model, which all of its requests change: expected model "
            f"{last.options['model']}, got {options.model}"
        )
    given = copy.copy(options)
    given.samples = options.samples or shared["samples"]
    if options.chain_fisher == "none":
        given.ewc_lambda = 0.0
    elif options.chain_fisher == "first":
        given.fisher = options.fisher or shared["fisher"]
    return given
