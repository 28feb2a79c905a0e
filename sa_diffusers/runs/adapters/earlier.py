"""What a run's folder keeps of the runs that it goes on from, so that others can go on from that folder alone."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from sa_diffusers.data.sharing import FISHER_FILE, SAMPLES_FILES, fetch_samples, locate
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.forgotten import FORGOTTEN
from sa_diffusers.runs.chain import EARLIER
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.fisher import FisherStage
from sa_diffusers.runs.stages.samples import SamplesStage


LARGEST = 2**30  # bytes of a file that is copied: the whole Fisher of a large model has more, and stays where it is
SMALL = ("config.yaml", "metrics.json", f"pipeline/{FORGOTTEN}")


def keep_earlier(context: RunContext) -> None:
    """Leave earlier/: options, numbers, records and adapters of every earlier run; samples and Fisher that serve all.

    Of these two only what lies in the chain's own folders, or this run has read: the options of a run from elsewhere
    may name any file of this machine.
    """
    if not context.chain:
        return
    serving = _serving(context).items()
    files = {name: file for name, file in serving if file.is_file() and file.stat().st_size <= LARGEST}
    for number, link in enumerate(context.chain, 1):
        own = [*(link.folder / name for name in SMALL), *link.adapters]
        files |= {f"{number}/{file.relative_to(link.folder)}": file for file in own}
    with atomic_path(context.folder / EARLIER) as new:
        for name, file in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            _place(file, new / name)


def _place(file: Path, at: Path) -> None:
    """A file there too; large ones, which nobody writes to but by replacing them, take no room twice on one disk."""
    if file.suffix == ".safetensors":
        with suppress(OSError):
            return os.link(file.resolve(), at)
    shutil.copyfile(file, at)


def _serving(context: RunContext) -> dict[str, Path]:
    """The chain's Fisher by the number of the run that has it; Fisher, where that is another, and samples as given."""
    options, files = context.options, {}
    read = options.fisher if FisherStage.name in context.artifacts else None
    fishers = ((number, link, link.shared("fisher", FISHER_FILE)) for number, link in enumerate(context.chain, 1))
    number, link, first = next((one for one in fishers if one[2]), (0, None, None))
    if first and (first == read or link.held("fisher", FISHER_FILE)):
        files[f"{number}/{FISHER_FILE}"] = locate(first, FISHER_FILE)
    if read and read != first:
        files[FISHER_FILE] = locate(read, FISHER_FILE)
    held = context.chain[-1].held("samples", "samples", "samples.safetensors")
    if options.samples and (SamplesStage.name in context.artifacts or options.samples == str(held)):
        folder = fetch_samples(options.samples)
        files |= {f"samples/{name}": folder / name for name in SAMPLES_FILES}
    return files
