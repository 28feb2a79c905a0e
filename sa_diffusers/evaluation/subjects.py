"""Which pipelines are judged: their classes, names, settings and files, before one of them is loaded."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers

from sa_diffusers.data.sampling import DrawingOptions
from sa_diffusers.evaluation.options import RESULTS, DrawnAs
from sa_diffusers.families import family_class, family_defaults
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import check_files, read_model_index, read_run_options
from sa_diffusers.models.single_file import configurations


NEEDS_MORE = {"image", "num_frames", "video", "audio_length_in_s", "action"}  # what a prompt alone does not draw


@dataclass(frozen=True)
class Subject:
    """One pipeline that is judged: where it lies, its class, its name here, and how it draws."""

    name: str
    source: str
    class_name: str
    settings: DrawnAs


def pipeline_of(source: str) -> str:
    """The pipeline inside a run's folder, or the source itself."""
    folder = Path(resolve(source))
    inside = folder / "pipeline"
    run = (inside / "model_index.json").is_file() and not (folder / "model_index.json").exists()
    return str(inside) if run else source


def made_by(source: str) -> dict[str, Any]:
    """The options of the run that made a pipeline; {} where none lie beside it."""
    path = Path(resolve(pipeline_of(source)))
    return read_run_options(path.parent) if path.name == "pipeline" else {}


def drawn_as(source: str, given: DrawnAs) -> DrawnAs:
    """How a pipeline of a family here draws: as given, else as the run that made it drew, else as its kind does.

    Raises:
        ModelLoadError: no pipeline that can be read.
    """
    layers = [family_defaults(read_model_index(pipeline_of(source))["_class_name"]), made_by(source), asdict(given)]
    values = {name: getattr(DrawingOptions, name) for name in asdict(given)}
    for layer in layers:
        values |= {name: layer[name] for name in values if layer.get(name) is not None}
    return DrawnAs(**values)


def open_subjects(sources: Sequence[str], names: Sequence[str], given: DrawnAs) -> list[Subject]:
    """Every pipeline of a command, from its model_index.json alone; how they draw is the first one's.

    Args:
        names: of all of them; []: from their paths.

    Raises:
        ModelLoadError: one that cannot be read. ValueError: one that draws no pictures from a prompt.
    """
    sources = [pipeline_of(source) for source in sources]
    classes = [_text_to_image_class(source) for source in sources]
    shared, own = drawn_as(sources[0], given), DrawnAs(given.guidance_scale, given.num_inference_steps, "pipeline")
    subjects = []
    for name, source, class_name in zip(names or short_names(sources), sources, classes, strict=True):
        adapted = family_class(class_name) is not None
        if not adapted and given.sampler not in (None, "pipeline"):
            raise ValueError(f"{source} is a {class_name}, which has its own sampler; omit --sampler")
        subjects.append(Subject(name, source, class_name, shared if adapted else own))
    return subjects


def short_names(sources: Sequence[str]) -> list[str]:
    """A name for each path: its last part that says something, with a number where two would be the same."""
    names: list[str] = []
    for source in sources:
        parts = [part for part in Path(source).parts if part not in ("pipeline", "/", ".", "..")]
        name = re.sub(r"[^\w.-]+", "-", parts[-1] if parts else "pipeline").lstrip("-.") or "pipeline"
        taken = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in (*names, *RESULTS))
        names.append(f"{name}-{taken + 1}" if taken else name)
    return names


def _text_to_image_class(source: str) -> str:
    """Its class. Raises ValueError for one that draws no pictures from a prompt alone."""
    name = read_model_index(source)["_class_name"]
    family, cls = family_class(name), getattr(diffusers, name, None)
    if family is not None:
        draws = "text" in family.capabilities
    else:
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING  # takes more than a second

        takes = set(inspect.signature(cls.__call__).parameters) if isinstance(cls, type) else {"prompt"}
        # What diffusers lists as text-to-image may take an `image`, but not have to, unless it is one that controls.
        listed = name in {one.__name__ for one in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()} and "Control" not in name
        draws = "prompt" in takes and (listed or not takes & NEEDS_MORE)
    if not draws:
        raise ValueError(
            f"{source} is a {name}, which does not draw pictures from a prompt alone; expected a text-to-image "
            "pipeline. Class-conditional models and VAEs are judged by `evaluate run <folder of the run>`"
        )
    return name


def check_subjects(subjects: Sequence[Subject], image_size: int | None, alike: bool, variant: str | None) -> None:
    """Check every pipeline's files, downloading what is missing, and the size of its pictures where its files say it.

    Args:
        image_size: pixels a side that the classifier reads; None: there is none.
        alike: whether pictures of one pipeline are compared with another's.

    Raises:
        ModelLoadError: files that are missing or damaged. ValueError: pictures of another size.
    """
    for subject in subjects:
        check_files(subject.source, variant)
    for subject in subjects:
        family = family_class(subject.class_name)
        size = family and family.resolution_of(configurations(resolve(subject.source)))
        check_size(subject.source, size, image_size)
        if alike:
            image_size = image_size or size


def check_size(source: str, size: int | None, expected: int | None) -> None:
    """Raise ValueError where both sizes are known and differ."""
    if None not in (size, expected) and size != expected:
        raise ValueError(
            f"expected pictures of {expected} pixels a side, as the classifier reads or the first pipeline draws "
            f"them, got {size} from {source}; take models of one size and a classifier that reads it, or fewer"
        )
