"""Draw a suite of prompts with text-to-image pipelines of any class, each picture once, into a folder a set."""

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.data.images import read_image
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.prompt_suite import PromptSet
from sa_diffusers.evaluation.suite.subjects import DrawSettings, Subject, check_size
from sa_diffusers.families import Family, family_class, get_family
from sa_diffusers.io.artifacts import Stage, fingerprint
from sa_diffusers.io.atomic_files import atomic_path, remove_leftovers
from sa_diffusers.io.loading import load_pipeline, pipeline_hashes
from sa_diffusers.report.pictures import to_pil, to_uint8


def load_subject(subject: Subject, config: PipelineEvaluationConfig) -> tuple[DiffusionPipeline, Family | None]:
    """The loaded pipeline without its safety checker, which would blacken pictures; its family if it has one.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    pipeline = load_pipeline(subject.source, None, config.variant, config.dtype)
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    adapted = family_class(subject.class_name) is not None
    return pipeline, get_family(pipeline, sampler=subject.settings.sampler) if adapted else None


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    family: Family | None,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    settings: DrawSettings,
) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], each a function of its condition and seed.

    Raises:
        ValueError: the pipeline does not take an option that was given. FloatingPointError: NaN or infinity.
    """
    if family is not None:
        images = family.decode(family.draw(conditions, seeds, settings.guidance_scale, settings.num_inference_steps))
    else:
        given = {k: v for k, v in asdict(settings).items() if k != "sampler" and v is not None}
        unknown = set(given) - set(inspect.signature(pipeline.__call__).parameters)
        if unknown:
            raise ValueError(f"a {type(pipeline).__name__} does not take {' and '.join(unknown)}; leave it away")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(prompt=texts(conditions), generator=generators, output_type="pt", **given).images
        images = 2 * images.float().cpu() - 1
    if not images.isfinite().all():
        raise FloatingPointError(f"the pipeline drew values that are not finite for {conditions[0]}; use float32")
    return images


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
    """
    pipeline, family = load_subject(subject, config)
    check_size(subject.source, None if family is None else family.resolution, image_size)
    scheduler = pipeline.components.get("scheduler")
    model = {
        "model": pipeline_hashes(pipeline),
        "options": {k: v for k, v in pipeline.config.items() if isinstance(v, str | int | float) and k[0] != "_"},
        "scheduler": None if scheduler is None else fingerprint({k: str(v) for k, v in scheduler.config.items()}),
    }
    folder = output_dir / subject.name
    for name, prompts in suite.items():
        _claim(Stage(folder, name, model | _drawing_key(subject, prompts, config)), config.overwrite)
    missing = {name: _missing(folder / name, len(part)) for name, part in suite.items()}
    batches = [
        (name, indices[start : start + config.batch_size])
        for name, indices in missing.items()
        for start in range(0, len(indices), config.batch_size)
    ]
    total, left = (sum(map(len, parts.values())) for parts in (suite, missing))
    with tqdm(total=total, initial=total - left, desc=f"draw {subject.name}", mininterval=1) as progress:
        for name, indices in batches:
            requests = [suite[name].requests[index] for index in indices]
            conditions, seeds = [r.condition for r in requests], [r.seed for r in requests]
            images = draw(pipeline, family, conditions, seeds, subject.settings)
            check_size(subject.source, images.shape[-1], image_size)
            for index, image in zip(indices, to_uint8(images), strict=True):
                with atomic_path(_picture(folder / name, index)) as temporary:
                    to_pil(image).save(temporary)
            progress.update(len(indices))
    size = read_image(_picture(folder / next(iter(suite)), 0)).shape[-1]
    check_size(subject.source, size, image_size)
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
            stage = Stage(folder, name, _drawing_key(subject, prompts, config))
            try:
                found = json.loads(stage.marker.read_text(encoding="utf-8"))["key"]
            except (FileNotFoundError, ValueError):  # a damaged one: `done` says what to do
                found = {}
            if _is_claimed(Stage(folder, name, found | stage.key), config.overwrite):
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


def _claim(stage: Stage, overwrite: bool) -> None:
    """Mark a folder of pictures as those of a key, so that others are never taken for them; see `count_pictures`."""
    pictures = stage.output_dir / stage.name
    if _is_claimed(stage, overwrite):
        remove_leftovers(pictures)
        return
    shutil.rmtree(pictures, ignore_errors=True)  # before the marker: it must not vouch for what is left
    stage.finish(0.0)


def _is_claimed(stage: Stage, overwrite: bool) -> bool:
    """Whether the folder's pictures are those of the key; False: it is empty, or may be emptied."""
    done, pictures = stage.is_done(overwrite), stage.output_dir / stage.name
    if not (done or overwrite) and pictures.exists() and (not pictures.is_dir() or any(pictures.iterdir())):
        raise ValueError(f"{pictures} holds files that this evaluation did not make; pass another --output_dir")
    return done


def _picture(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def _missing(folder: Path, count: int) -> list[int]:
    """Indices of the pictures that have not been drawn."""
    return [index for index in range(count) if not _picture(folder, index).exists()]
