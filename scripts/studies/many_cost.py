"""What is new in a run, by the seconds of its stages."""

from pathlib import Path

from sa_diffusers.io.artifacts import read_marker
from sa_diffusers.io.atomic_files import read_json
from sa_diffusers.io.loading import read_run_options


SHARED = ("samples", "fisher")  # stages that serve all runs of a model, by the options that name theirs
JUDGING = ("run", "before", "after")  # marks of what is not the forgetting


def stage_seconds(run: Path, first: bool = False) -> dict[str, float]:
    """Seconds of each stage that a run has made itself, or taken from a twin that drew the same.

    Args:
        first: of a chain, which also pays for the samples and the Fisher that it is given and the others go on with.
    """
    marks = {path.stem: path for path in sorted((run / ".stages").glob("*.json")) if path.stem not in JUDGING}
    if first:
        options, taken = read_run_options(run), read_json(run / "metrics.json", "seconds")["seconds"]["reused"]
        for name in (name for name in SHARED if name in taken and name not in marks):
            marks[name] = Path(options[name]).expanduser().parent / ".stages" / f"{name}.json"
    return {name: round(read_marker(path)["seconds"], 2) for name, path in marks.items()}
