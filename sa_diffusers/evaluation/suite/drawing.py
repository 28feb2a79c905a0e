"""Draw a suite of prompts with text-to-image pipelines of any class, each picture once."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from sa_diffusers.evaluation.images.image_sets import ImageFolder, read_image
from sa_diffusers.evaluation.prompts.prompt_suite import PromptSet
from sa_diffusers.evaluation.suite.checks import check_size
from sa_diffusers.evaluation.suite.folder import claim, drawing_key, missing_pictures, picture_path
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.subjects import DrawSettings, Subject
from sa_diffusers.families import Family, get_family
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.loading import load_pipeline, pipeline_hashes
from sa_diffusers.report.pictures import to_pil, to_uint8


def load_subject(subject: Subject, config: PipelineEvaluationConfig) -> tuple[DiffusionPipeline, Family | None]:
    """The loaded pipeline without its safety checker, which would blacken pictures; its family if it is Stable
    Diffusion.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    pipeline = load_pipeline(subject.source, None, config.variant, config.dtype)
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    stable = isinstance(pipeline, StableDiffusionPipeline)
    return pipeline, get_family(pipeline, sampler=subject.settings.sampler) if stable else None


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    family: Family | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: DrawSettings,
) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], each a function of its prompt and seed.

    Raises:
        ValueError: the pipeline does not take an option that was given. FloatingPointError: NaN or infinity.
    """
    if family is not None:
        images = family.decode(family.draw(prompts, seeds, settings.guidance_scale, settings.num_inference_steps))
    else:
        given = {k: v for k, v in asdict(settings).items() if k != "sampler" and v is not None}
        unknown = set(given) - set(inspect.signature(pipeline.__call__).parameters)
        if unknown:
            raise ValueError(f"a {type(pipeline).__name__} does not take {' and '.join(unknown)}; leave it away")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(prompt=list(prompts), generator=generators, output_type="pt", **given).images
        images = 2 * images.float().cpu() - 1
    if not images.isfinite().all():
        raise FloatingPointError(f"the pipeline drew values that are not finite for {prompts[0]!r}; use float32")
    return images


def model_key(pipeline: DiffusionPipeline) -> dict:
    """What decides a pipeline's pictures beside their prompts and the settings."""
    scheduler = pipeline.components.get("scheduler")
    return {
        "model": pipeline_hashes(pipeline),
        "options": {k: v for k, v in pipeline.config.items() if isinstance(v, str | int | float) and k[0] != "_"},
        "scheduler": None if scheduler is None else fingerprint({k: str(v) for k, v in scheduler.config.items()}),
    }


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
    model = model_key(pipeline)
    folder = output_dir / subject.name
    for name, prompts in suite.items():
        claim(folder, name, model | drawing_key(subject, prompts, config), config.overwrite)
    missing = [(name, i) for name, part in suite.items() for i in missing_pictures(folder / name, len(part))]
    total = sum(map(len, suite.values()))
    with tqdm(total=total, initial=total - len(missing), desc=f"draw {subject.name}", mininterval=1) as progress:
        for name, indices in _batches(missing, config.batch_size):
            requests = [suite[name].requests[index] for index in indices]
            images = draw(pipeline, family, [r.prompt for r in requests], [r.seed for r in requests], subject.settings)
            check_size(subject.source, images.shape[-1], image_size)
            for index, image in zip(indices, to_uint8(images), strict=True):
                with atomic_path(picture_path(folder / name, index)) as temporary:
                    to_pil(image).save(temporary)
            progress.update(len(indices))
    first = read_image(picture_path(folder / next(iter(suite)), 0))
    check_size(subject.source, first.shape[-1], image_size)
    return model | {"dtype": config.dtype, "image_size": first.shape[-1]}


def drawn_pictures(output_dir: Path, subject: Subject, name: str) -> ImageFolder:
    """The pictures of a set, in the order of its prompts."""
    return ImageFolder(output_dir / subject.name / name)


def _batches(items: Sequence[tuple[str, int]], size: int) -> Iterator[tuple[str, list[int]]]:
    """At most `size` indices of one set at a time, in their order."""
    start = 0
    while start < len(items):
        name = items[start][0]
        indices = [index for own, index in items[start : start + size] if own == name]
        yield name, indices
        start += len(indices)
