"""From two folders, or a run, to a table: read or draw images, compute their features once, compare them."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import get_args

from sa_diffusers.data.labelled_images import DatasetName, load_labelled_images
from sa_diffusers.data.sampling import SamplingSettings
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.images.extractors import load_extractor
from sa_diffusers.evaluation.images.metrics import check_counts, check_metrics, compute_features, image_metrics
from sa_diffusers.evaluation.images.options import FoldersConfig, RunConfig
from sa_diffusers.evaluation.images.run_images import READ_KEYS, classifier_readings, forgotten_labels, open_run
from sa_diffusers.evaluation.images.sets import (
    ImageFolder,
    ImageSet,
    LabelledImageSet,
    RandomSubset,
    check_empty,
    save_images,
)
from sa_diffusers.evaluation.options import MetricSettings
from sa_diffusers.report.tables import aligned


SHARES = ("precision", "recall", "density", "coverage")
MEANING = {  # which of the two sets a share is of
    "precision": "share of generated images that lie among the real ones",
    "recall": "share of real images that lie among the generated ones",
    "density": "as precision, but counting every real neighbourhood; may exceed 1",
    "coverage": "share of real images with a generated one in their neighbourhood",
    "concept_probability": "of the forgotten class, in images drawn of it",
    "concept_entropy": "nats, in images drawn of the forgotten class",
    "classifier_accuracy": "of the classifier on real images",
}


def open_real(config: MetricSettings, resolution: int | None, concept: str | None) -> tuple[ImageSet, list[str]]:
    """The real images, and the classes that are left out of them: none of a folder, whose images have no classes.

    Raises:
        ValueError: as `ImageFolder` and `load_labelled_images`; or the data set has no class of the concept's name.
    """
    left_out = []
    if config.real in get_args(DatasetName):
        data = load_labelled_images(config.real, config.data_dir, config.split)
        left_out = forgotten_labels(data.names, concept)
        images: ImageSet = LabelledImageSet(f"{config.real} {config.split}", data.without(left_out))
    else:
        images = ImageFolder(config.real, resolution)
    if config.num_real_images is not None and config.num_real_images < len(images):
        images = RandomSubset(images, config.num_real_images, config.seed)
    return images, left_out


def evaluate(config: FoldersConfig | RunConfig) -> dict:
    """Measure everything that is asked for; numbers, and what they were taken from, ready for JSON.

    Raises:
        ValueError, ModelLoadError: wrong input, before any image is drawn or any feature computed.
    """
    start = time.perf_counter()
    extractor = load_extractor(config.extractor, config.attribute) if config.compared else None
    if extractor is not None:
        check_metrics(config.compared, extractor)
    run = None
    if isinstance(config, RunConfig):
        if config.save_images is not None:
            check_empty(config.save_images)
        run = open_run(config)
        count = len(next(iter(run.sets.values())))
    else:
        generated = ImageFolder(config.generated, config.resolution)
        count = len(generated)
    if extractor is not None:
        classes = run is not None and run.family.labels is not None
        real, left_out = open_real(config, config.resolution, "; ".join(run.forgotten) if classes else config.concept)
        check_counts(config.compared, (len(real), count), config)

    result: dict = {}
    if run is not None:
        how = run.drawn_as
        settings = SamplingSettings(how.guidance_scale, how.num_inference_steps, config.sample_batch_size)
        pictures = draw_sets(run.family, run.sets, settings, config.run)
        counted = {} if run.family.labels is None else {"num_images_per_class": config.num_images_per_class}
        result["run"] = {"forgotten": "; ".join(run.forgotten) or None, **asdict(how), **counted}
        generated = next(iter(pictures.values()))
        if run.judge is not None:
            result["classifier"] = {"name": config.classifier} | classifier_readings(run, pictures)
        if config.save_images is not None:
            save_images(pictures, config.save_images)
    if extractor is not None:
        sets = {"real": real, "generated": generated}
        features = {kind: compute_features(extractor, part, config.feature_batch_size) for kind, part in sets.items()}
        found = {
            kind: {"name": part.name, "num_images": len(part), "image_size": list(part.image_size)}
            for kind, part in sets.items()
        }
        found["real"]["left_out"] = "; ".join(left_out) or None
        found["extractor"] = {"name": config.extractor, "num_features": features["real"].features.shape[1]}
        found |= image_metrics(**features, metrics=config.compared, extractor=extractor, settings=config)
        result = found | result
    return result | {"options": asdict(config), "seconds": round(time.perf_counter() - start, 2)}


def table(result: dict) -> str:
    """The results for the terminal."""
    lines = []
    for kind in ("real", "generated"):
        if kind in result:
            part = result[kind]
            without = f", without {part['left_out']!r}" if part.get("left_out") else ""
            lines.append(f"{kind}: {part['num_images']} images of {part['name']}{without}")
    run = result.get("run", {})
    if "real" in result and run.get("forgotten") and not result["real"]["left_out"]:
        lines.append(f"real images must not show {run['forgotten']!r}: those of a folder have no classes")
    if "extractor" in result:
        lines.append(f"features: {result['extractor']['num_features']} of {result['extractor']['name']}")
    if run:
        used = ", ".join(f"{name} {run[name]}" for name in ("guidance_scale", "num_inference_steps", "sampler"))
        other = result["options"]["settings_of"]
        lines.append(f"drawn with: {used}" + (f"; of {other} what was not given" if other else ""))
    return "\n".join([*lines, "", aligned(list(_rows(result)))])


def _rows(result: dict) -> Iterator[tuple[str, str, str]]:
    """(name, value, remark) of every number of the table."""
    for name, part in result.items():
        if name in ("fid", "frechet_distance"):
            yield name, f"{part:.4f}", "lower is nearer"
        elif name in ("kid", "kernel_distance"):
            over = f"over {part['num_subsets']} subsets of {part['subset_size']}"
            spread = f"+- – {over}, which are all images" if part["std"] is None else f"+- {part['std']:.3g} {over}"
            yield name, f"{part['mean']:.4g}", spread
        elif name in ("inception_score", "classifier_score"):
            for kind, score in part.items():
                over = f"+- {score['std']:.3g} over {score['num_splits']} splits" if score["std"] is not None else ""
                yield f"{name} of {kind} images", f"{score['mean']:.4f}", over or "one split"
        elif name == "prc":
            yield from ((key, f"{part[key]:.4f}", MEANING[key]) for key in SHARES)
        elif name == "classifier":
            for key in (*READ_KEYS, "classifier_accuracy"):
                worst = f"of {part['retained_worst_class']!r}" if key == "retained_worst_accuracy" else ""
                if part[key] is not None:
                    yield key, f"{part[key]:.4f}", MEANING.get(key, worst)
