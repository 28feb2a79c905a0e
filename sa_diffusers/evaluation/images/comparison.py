"""From two folders, or a run, to a table: read or draw images, compute their features once, compare them."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import get_args

from sa_diffusers.data.labelled_images import DatasetName, load_labelled_images
from sa_diffusers.evaluation.images.extractors import load_extractor
from sa_diffusers.evaluation.images.metrics import check_counts, check_metrics, compute_features, image_metrics
from sa_diffusers.evaluation.images.options import EvaluateConfig
from sa_diffusers.evaluation.images.run_images import (
    DRAWING,
    READINGS,
    OpenRun,
    classifier_readings,
    forgotten_label,
    open_run,
)
from sa_diffusers.evaluation.images.sets import (
    ImageFolder,
    ImageSet,
    LabelledImageSet,
    RandomSubset,
    check_empty,
    save_images,
)
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.processes import process_state


MEANING = {  # which of the two sets a share is of
    "precision": "share of generated images that lie among the real ones",
    "recall": "share of real images that lie among the generated ones",
    "density": "as precision, but counting every real neighbourhood; may exceed 1",
    "coverage": "share of real images with a generated one in their neighbourhood",
    "concept_probability": "of the forgotten class, in images drawn of it",
    "concept_entropy": "nats, in images drawn of the forgotten class",
    "classifier_accuracy": "of the classifier on real images",
}


def open_real(config: EvaluateConfig, concept: str | None) -> tuple[ImageSet, str | None]:
    """The real images, and the class that is left out of them: None of a folder, whose images have no classes.

    Raises:
        ValueError: as `ImageFolder` and `load_labelled_images`; or the data set has no class of the concept's name.
    """
    left_out = None
    if config.real in get_args(DatasetName):
        data = load_labelled_images(config.real, config.data_dir, config.split)
        left_out = forgotten_label(data.names, concept)
        images: ImageSet = LabelledImageSet(
            f"{config.real} {config.split}", data.without([left_out] if left_out else [])
        )
    else:
        images = ImageFolder(config.real, config.resolution)
    if config.num_real_images is not None and config.num_real_images < len(images):
        images = RandomSubset(images, config.num_real_images, config.seed)
    return images, left_out


def evaluate(config: EvaluateConfig) -> dict:
    """Measure everything that is asked for; numbers, and what they were taken from, ready for JSON.

    Raises:
        ValueError, ModelLoadError: wrong input, before any image is drawn or any feature computed.
    """
    start = time.perf_counter()
    extractor = load_extractor(config.extractor, config.attribute) if config.compared else None
    if extractor is not None:
        check_metrics(config.compared, extractor)
    classifier = None if config.classifier is None else load_classifier(config.classifier).to(process_state().device)
    if config.save_images is not None:
        check_empty(config.save_images)
    run = open_run(config, classifier) if config.run is not None else None
    generated = ImageFolder(config.generated, config.resolution) if run is None else None
    if extractor is not None:
        classes = run is not None and run.family.labels is not None
        real, left_out = open_real(config, run.forgotten if classes else config.concept)
        check_counts(config.compared, (len(real), len(generated if run is None else run.prompts)), config)

    result: dict = {}
    if run is not None:
        generated, result = draw_and_read(config, run, classifier)
    if extractor is not None:
        sets = {"real": real, "generated": generated}
        features = {kind: compute_features(extractor, part, config.feature_batch_size) for kind, part in sets.items()}
        found = {
            kind: {"name": part.name, "num_images": len(part), "image_size": list(part.image_size)}
            for kind, part in sets.items()
        }
        found["real"]["left_out"] = left_out
        found["extractor"] = {"name": config.extractor, "num_features": features["real"].features.shape[1]}
        found |= image_metrics(**features, metrics=config.compared, extractor=extractor, settings=config)
        result = found | result
    return result | {"options": asdict(config), "seconds": round(time.perf_counter() - start, 2)}


def draw_and_read(config: EvaluateConfig, run: OpenRun, classifier: ImageClassifier | None) -> tuple[ImageSet, dict]:
    """Draw a run's images, save them where asked, and let the classifier read them.

    Returns:
        The images to compare with real ones, and the results: how they were drawn, and the readings if there are any.
    """
    how = {name: value for name, value in asdict(run.options).items() if name != "concept"}
    result: dict = {"run": {"forgotten": run.forgotten, **how}}
    if run.family.labels is None:
        drawn = {"drawn": run.draw(run.prompts, config.seed)}
    else:
        count = result["run"]["num_images_per_class"] = config.num_images_per_class
        drawn = {"retained": run.draw(run.prompts, config.seed, ", retained")}
        if run.forgotten is not None and (classifier is not None or config.save_images is not None):
            drawn["forgotten"] = run.draw([run.forgotten] * count, config.seed, ", forgotten")
        if classifier is not None:
            readings = classifier_readings(classifier, drawn["retained"], drawn.get("forgotten"))
            result["classifier"] = {"name": config.classifier} | readings
    if config.save_images is not None:
        save_images(drawn, config.save_images)
    return next(iter(drawn.values())), result


def table(result: dict) -> str:
    """The results for the terminal, a line each: name, value, remark."""
    lines = []
    for kind in ("real", "generated"):
        if kind in result:
            part = result[kind]
            without = f", without {part['left_out']!r}" if part.get("left_out") else ""
            lines.append(f"{kind + ':':<12}{part['num_images']} images of {part['name']}{without}")
    if "real" in result and result.get("run", {}).get("forgotten") and not result["real"]["left_out"]:
        lines.append(f"{'':<12}that must not show {result['run']['forgotten']!r}: images of a folder have no classes")
    if "extractor" in result:
        lines.append(f"{'features:':<12}{result['extractor']['num_features']} of {result['extractor']['name']}")
    if "run" in result:
        used = ", ".join(f"{name} {result['run'][name]}" for name in DRAWING)
        other = result["options"]["settings_of"]
        lines.append(f"{'drawn with:':<12}{used}" + (f"; of {other} what was not given" if other else ""))
    rows = list(_rows(result))
    width = max(len(name) for name, _, _ in rows)
    lines += ["", *(f"{name:<{width}}  {value:>12}  {remark}".rstrip() for name, value, remark in rows)]
    return "\n".join(lines)


def _rows(result: dict) -> Iterator[tuple[str, str, str]]:
    """(name, value, remark) of every number of the table."""
    for name in ("fid", "frechet_distance"):
        if name in result:
            yield name, f"{result[name]:.4f}", "lower is nearer"
    for name in ("kid", "kernel_distance"):
        if name in result:
            part = result[name]
            over = f"over {part['num_subsets']} subsets of {part['subset_size']}"
            spread = f"+- – {over}, which are all images" if part["std"] is None else f"+- {part['std']:.3g} {over}"
            yield name, f"{part['mean']:.4g}", spread
    for name in ("inception_score", "classifier_score"):
        for kind, part in result.get(name, {}).items():
            spread = "one split" if part["std"] is None else f"+- {part['std']:.3g} over {part['num_splits']} splits"
            yield f"{name} of {kind} images", f"{part['mean']:.4f}", spread
    for name in ("precision", "recall", "density", "coverage"):
        if "prc" in result:
            yield name, f"{result['prc'][name]:.4f}", MEANING[name]
    readings = result.get("classifier", {})
    for name in (*READINGS, "classifier_accuracy"):
        if readings.get(name) is not None:
            worst = f"of {readings['retained_worst_class']!r}" if name == "retained_worst_accuracy" else ""
            yield name, f"{readings[name]:.4f}", MEANING.get(name, worst)
