"""Which pipelines are judged: their classes, names and settings, from their small files alone."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from transformers import PreTrainedTokenizerBase

from sa_diffusers.data.sampling import DrawingOptions
from sa_diffusers.evaluation.suite.options import RESULTS, PipelineEvaluationConfig
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.hub import explain_load_errors
from sa_diffusers.io.loading import read_model_index
from sa_diffusers.pipelines import OWN_PIPELINES


REAL_VOCABULARY = 10_000  # tokens; CLIP's has 49,408, that of the bundled digits 1,214
SMALL_DEFAULTS = {"guidance_scale": 2.5, "num_inference_steps": 10}  # of the bundled digits, as configs/digits.yaml
NEEDS_MORE = {"image", "num_frames", "video", "audio_length_in_s", "action"}  # what a prompt alone does not draw


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn; None: as the pipeline does by itself."""

    guidance_scale: float | None
    num_inference_steps: int | None
    sampler: str


@dataclass(frozen=True)
class Subject:
    """One pipeline that is judged: where it lies, its class, its name here, and how it draws."""

    name: str
    source: str
    class_name: str
    settings: DrawSettings


def pipeline_of(source: str) -> str:
    """The pipeline inside a run's folder, or the source itself."""
    folder = Path(resolve(source))
    inside = folder / "pipeline"
    run = (inside / "model_index.json").is_file() and not (folder / "model_index.json").exists()
    return str(inside) if run else source


def open_subjects(config: PipelineEvaluationConfig) -> list[Subject]:
    """Every pipeline of the command, from its model_index.json alone.

    Raises:
        ModelLoadError: one that cannot be read. ValueError: one that draws no pictures from a prompt.
    """
    sources = [pipeline_of(source) for source in config.sources]
    classes = [_text_to_image_class(source) for source in sources]
    shared = _settings(config, sources[0])
    own = DrawSettings(config.guidance_scale, config.num_inference_steps, "pipeline")
    subjects = []
    for name, source, class_name in zip(config.names or short_names(sources), sources, classes, strict=True):
        stable = is_stable_diffusion(class_name)
        if not stable and config.sampler not in (None, "pipeline"):
            raise ValueError(f"{source} is a {class_name}, which has its own sampler; leave --sampler away")
        subjects.append(Subject(name, source, class_name, shared if stable else own))
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


def read_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The (first) tokenizer of a pipeline, without its weights; None: it has none by that name."""
    kind = read_model_index(source).get("tokenizer", (None, None))[1]
    if kind is None or not hasattr(transformers, kind):
        return None
    with explain_load_errors(resolve(source)):
        return getattr(transformers, kind).from_pretrained(resolve(source), subfolder="tokenizer")


def is_stable_diffusion(class_name: str) -> bool:
    """Whether it is a StableDiffusionPipeline, which the samplers of this package serve."""
    cls = OWN_PIPELINES.get(class_name) or getattr(diffusers, class_name, None)
    return isinstance(cls, type) and issubclass(cls, StableDiffusionPipeline)


def _text_to_image_class(source: str) -> str:
    name = read_model_index(source)["_class_name"]
    cls = OWN_PIPELINES.get(name) or getattr(diffusers, name, None)
    takes = set(inspect.signature(cls.__call__).parameters) if isinstance(cls, type) else {"prompt"}
    if "prompt" not in takes or (takes & NEEDS_MORE and not _of_auto_pipeline(name)):
        raise ValueError(
            f"{source} is a {name}, which does not draw pictures from a prompt alone; expected a text-to-image "
            "pipeline. Class-conditional models and VAEs are judged by --run <folder of the run>"
        )
    return name


def _of_auto_pipeline(name: str) -> bool:
    """Whether diffusers lists it as text-to-image (an `image` is optional then), and it takes no control image."""
    return "Control" not in name and name in {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}


def _settings(config: PipelineEvaluationConfig, reference: str) -> DrawSettings:
    """As the command says; else as the run that made the reference drew; else as its kind does."""
    fields = ("guidance_scale", "num_inference_steps", "sampler")
    values: dict[str, Any] = {name: getattr(DrawingOptions, name) for name in fields}
    if is_stable_diffusion(read_model_index(reference)["_class_name"]):
        tokenizer = read_tokenizer(reference)
        values |= SMALL_DEFAULTS if tokenizer is not None and len(tokenizer) < REAL_VOCABULARY else {}
    run = Path(resolve(reference)).parent / "config.yaml"
    if run.is_file() and Path(reference).name == "pipeline":
        made = yaml.safe_load(run.read_text()) or {}
        values |= {name: made[name] for name in fields if made.get(name) is not None}
    values |= {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
    return DrawSettings(**values)
