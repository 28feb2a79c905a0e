"""Pictures of sets of prompts: in memory, or as PNG files, a folder a set, that a later start goes on from."""

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor

from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.data.images import read_image
from sa_diffusers.data.sampling import MOST, SamplingSettings, draw_batch, draw_samples, largest_batch
from sa_diffusers.evaluation.images.sets import DrawnImages
from sa_diffusers.evaluation.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.evaluation.subjects import Subject, check_size
from sa_diffusers.families import Family, family_class, get_family
from sa_diffusers.io.artifacts import Marker, fingerprint
from sa_diffusers.io.atomic_files import atomic_path, remove_leftovers
from sa_diffusers.io.loading import load_pipeline, pipeline_hashes
from sa_diffusers.io.processes import working
from sa_diffusers.report.pictures import to_pil, to_uint8


class StockPipeline:
    """A pipeline that no family here adapts: it draws by its own call, and its latents are its pictures.

    Takes the place of a `Family` where pictures are drawn; an option that is None is left to the pipeline.
    """

    resolution = None  # not known before it has drawn

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline

    @torch.no_grad()
    def draw(
        self,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        guidance_scale: float | None,
        num_inference_steps: int | None,
        negative: Sequence[Condition] = (),
    ) -> Tensor:
        """Raises ValueError: the pipeline does not take an option that was given."""
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        given = {name: value for name, value in given.items() if value is not None}
        unknown = set(given) - set(inspect.signature(self.pipeline.__call__).parameters)
        if unknown:
            raise ValueError(f"a {type(self.pipeline).__name__} does not take {' and '.join(unknown)}; omit it")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = self.pipeline(prompt=texts(conditions), generator=generators, output_type="pt", **given).images
        return 2 * images.float().cpu() - 1

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def draw_sets(
    family: Family,
    sets: Mapping[str, PromptSet],
    settings: SamplingSettings,
    what: str = "evaluate",
    known: Mapping[str, Tensor] | None = None,
    parts_dir: Path | None = None,
) -> dict[str, DrawnImages]:
    """The pictures of each set, by its name, in memory.

    Args:
        known: latents that this model gave with these settings, by the fingerprints of requests: not drawn again.
        parts_dir: as of `draw_samples`.
    """
    drawn, known = {}, known or {}
    left = {name: [one for one in part.requests if one.fingerprint not in known] for name, part in sets.items()}
    if settings.batch_size is None:
        fits = largest_batch(family) if any(left.values()) else MOST
        settings = replace(settings, batch_size=min(gather_object([fits])))  # processes that share must cut alike
    with working(what, sum(map(len, left.values())), "images"):
        for name, prompts in sets.items():
            none = torch.empty(0, *family.latent_shape)
            asked = prompts.requests
            # In a folder of the batch size: resumed where more or less memory is free it may be another.
            parts = parts_dir and parts_dir / f"{name}_{settings.batch_size}"
            latents = draw_samples(family, asked, settings, parts, known=known).latents if asked else none
            drawn[name] = DrawnImages(f"{what}, {name}", family, latents, settings.batch_size)
    return drawn


def load_subject(subject: Subject, config: PipelineEvaluationConfig) -> Family | StockPipeline:
    """Loaded without its safety checker, which would blacken pictures. Raises ModelLoadError where it cannot be."""
    pipeline = load_pipeline(subject.source, None, config.variant, config.dtype)
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    adapted = family_class(subject.class_name) is not None
    return get_family(pipeline, sampler=subject.settings.sampler) if adapted else StockPipeline(pipeline)


def draw_suite(
    subject: Subject,
    suite: Mapping[str, PromptSet],
    output_dir: Path,
    config: PipelineEvaluationConfig,
    image_size: int | None = None,
) -> dict:
    """Draw what `<output_dir>/<name>/<set>/` lacks, a PNG file a picture; what is there is kept.

    Args:
        image_size: pixels a side that the pictures must have; None: any.

    Returns:
        What decided the pictures beside their prompts, and their "image_size".

    Raises:
        ValueError: pictures of another size, before one is kept; or a folder of pictures holds files of somebody else.
        StageMismatch: the folder holds pictures of another model, other prompts or settings; nothing is drawn then.
        FloatingPointError: NaN or infinity.
    """
    family = load_subject(subject, config)
    pipeline, source = family.pipeline, subject.source
    check_size(source, family.resolution, image_size)
    scheduler = pipeline.components.get("scheduler")
    model = {
        "model": pipeline_hashes(pipeline),
        "options": {k: v for k, v in pipeline.config.items() if isinstance(v, str | int | float) and k[0] != "_"},
        "scheduler": None if scheduler is None else fingerprint({k: str(v) for k, v in scheduler.config.items()}),
    }
    folder = output_dir / subject.name
    for name, prompts in suite.items():
        _claim(Marker(folder, name, model | _drawing_key(subject, prompts, config)), config.overwrite)
    missing = {name: _missing(folder / name, len(part)) for name, part in suite.items()}
    settings = subject.settings
    settings = SamplingSettings(settings.guidance_scale, settings.num_inference_steps, config.batch_size)
    total, left = (sum(map(len, parts.values())) for parts in (suite, missing))
    with working(f"draw {subject.name}", total, "images", total - left) as advance:
        for name, rows in missing.items():
            for start in range(0, len(rows), config.batch_size):
                chosen = rows[start : start + config.batch_size]
                latents = draw_batch(family, suite[name].take(chosen).requests, settings)
                images = DrawnImages(source, family, latents, len(chosen)).images(range(len(chosen)))
                check_size(source, images.shape[-1], image_size)
                for index, image in zip(chosen, to_uint8(images), strict=True):
                    with atomic_path(_picture(folder / name, index)) as temporary:
                        to_pil(image).save(temporary)
                advance(len(chosen))
    size = read_image(_picture(folder / next(iter(suite)), 0)).shape[-1]
    check_size(source, size, image_size)
    return model | {"dtype": config.dtype, "image_size": size}


def count_pictures(
    config: PipelineEvaluationConfig, subjects: Sequence[Subject], suite: Mapping[str, PromptSet], output_dir: Path
) -> int:
    """How many pictures are there and need not be drawn again, unless a model's weights have changed.

    Raises:
        ValueError: a folder of pictures holds files of somebody else.
        StageMismatch: pictures of other prompts or settings; neither where `config.overwrite`.
    """
    there = 0
    for subject in subjects:
        for name, prompts in suite.items():
            folder = output_dir / subject.name
            marker = Marker(folder, name, _drawing_key(subject, prompts, config))
            try:
                found = json.loads(marker.path.read_text(encoding="utf-8"))["key"]
            except (FileNotFoundError, ValueError):  # a damaged one: `done` says what to do
                found = {}
            if _is_claimed(Marker(folder, name, found | marker.key), config.overwrite):
                there += len(prompts) - len(_missing(folder / name, len(prompts)))
    return there


def _drawing_key(subject: Subject, prompts: PromptSet, config: PipelineEvaluationConfig) -> dict:
    """What decides the pictures of a set, as far as it is known before the model is loaded.

    Of the prompts in words that say what differs, and as a fingerprint of all of them and their seeds.
    """
    first = prompts.requests[0]
    asked = {"concept": list(config.phrasings)} if prompts.purpose == "asks" else {}
    asked |= {"number": len(prompts), "first": first.condition.text, "first_seed": first.seed}
    asked["fingerprint"] = fingerprint({"requests": [request.key for request in prompts.requests]})
    return {
        "class": subject.class_name,
        "settings": asdict(subject.settings),
        "dtype": config.dtype,
        "prompts": asked,
    }


def _claim(marker: Marker, overwrite: bool) -> None:
    """Mark a folder of pictures as those of a key, so that others are never taken for them; see `count_pictures`."""
    pictures = marker.output_dir / marker.name
    if _is_claimed(marker, overwrite):
        remove_leftovers(pictures)
        return
    shutil.rmtree(pictures, ignore_errors=True)  # before the marker: it must not vouch for what is left
    marker.finish(0.0)


def _is_claimed(marker: Marker, overwrite: bool) -> bool:
    """Whether the folder's pictures are those of the key; False: it is empty, or may be emptied."""
    done, pictures = marker.done(overwrite), marker.output_dir / marker.name
    if not (done or overwrite) and pictures.exists() and (not pictures.is_dir() or any(pictures.iterdir())):
        raise ValueError(f"{pictures} holds files that this evaluation did not make; pass another --output_dir")
    return done


def _picture(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def _missing(folder: Path, count: int) -> list[int]:
    """Indices of the pictures that have not been drawn."""
    return [index for index in range(count) if not _picture(folder, index).exists()]
