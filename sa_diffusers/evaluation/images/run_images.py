"""Draw the images that a run is judged by, and let a classifier read them class by class."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.sampling import DrawingOptions, Request, SamplingSettings, draw_samples
from sa_diffusers.evaluation.forgetting import Examination, JudgedSet, labelled_classes, measure
from sa_diffusers.evaluation.images.image_sets import DrawnImages, index_batches
from sa_diffusers.evaluation.judges.classifier import ImageClassifier, score_images
from sa_diffusers.families import Family, family_defaults
from sa_diffusers.io.loading import read_model_index


READINGS = (
    "concept_probability", "concept_entropy", "retained_accuracy", "retained_worst_accuracy", "retained_probability",
    "retained_worst_probability",
)  # fmt: skip
DRAWING = ("guidance_scale", "num_inference_steps", "sampler")  # the options that an image depends on


@dataclass(frozen=True)
class RunOptions:
    """How a run's images are drawn, and the concept that it forgot (None: none)."""

    concept: str | None
    sampler: str
    guidance_scale: float
    num_inference_steps: int
    eval_batch_size: int

    @property
    def settings(self) -> SamplingSettings:
        return SamplingSettings(self.guidance_scale, self.num_inference_steps, self.eval_batch_size)


def read_run(
    run: str | Path, *, settings_of: str | Path | None = None, **options: str | float | int | None
) -> RunOptions:
    """The options of a run's own evaluation, from its config.yaml; what that lacks from its kind of pipeline.

    Args:
        run: folder with `pipeline/`, and where it has forgotten something with `config.yaml` and `metrics.json`.
        settings_of: folder of another run whose guidance, steps and sampler are taken in place of the run's. A base
            run has no `config.yaml`: without this its images are drawn unlike those of the run that forgot on it.
        options: values to take in place of both runs', by the names of `RunOptions`; None: the runs'.

    Raises:
        ValueError: no pipeline in one of the folders.
        ModelLoadError: a pipeline that cannot be read.
    """
    folder = Path(run)
    for name, path in (("run", run), ("settings_of", settings_of)):
        if path is not None and not (Path(path) / "pipeline").is_dir():
            raise ValueError(f"expected the folder of a run, with `pipeline/` inside, got {path}; check --{name}")
    values = {name: getattr(DrawingOptions, name) for name in RunOptions.__annotations__ if name != "concept"}
    values |= {"concept": None, **family_defaults(read_model_index(str(folder / "pipeline"))["_class_name"])}
    if (folder / "config.yaml").exists():
        values |= yaml.safe_load((folder / "config.yaml").read_text()) | {"concept": None}
    if (folder / "metrics.json").exists():  # written last: before that the concept has not been forgotten
        values["concept"] = json.loads((folder / "metrics.json").read_text()).get("concept")
    if settings_of is not None:
        other = read_run(settings_of)
        values |= {name: getattr(other, name) for name in DRAWING}
    values |= {name: value for name, value in options.items() if value is not None}
    return RunOptions(**{name: values[name] for name in RunOptions.__annotations__})


def forgotten_label(labels: Sequence[str], concept: str | None) -> str | None:
    """The class that a concept is, None for None. Raises ValueError where no class has its name."""
    if concept is None:
        return None
    for name in split_phrasings(concept):
        if name in labels:
            return name
    raise ValueError(f"expected the concept to be one of the classes {', '.join(labels)}, got {concept!r}")


@dataclass(frozen=True)
class ClassImages:
    """Images drawn of some classes, and the class that was asked for in each."""

    images: DrawnImages
    labels: list[str]


def draw_classes(
    family: Family, labels: Sequence[str], num_images: int, settings: SamplingSettings, seed: int, name: str
) -> ClassImages:
    """`num_images` of each class; image i of a class is a function of the seed, the class and i."""
    asked = [label for label in labels for _ in range(num_images)]
    seeds = [derive_seed(seed, "evaluate", label, index) for label in labels for index in range(num_images)]
    requests = [Request(label, own) for label, own in zip(asked, seeds, strict=True)]
    samples = draw_samples(family, requests, settings, description=f"draw {name}")
    return ClassImages(DrawnImages(name, family, samples), asked)


def draw_prompts(
    family: Family, prompts: Sequence[str], settings: SamplingSettings, seed: int, name: str
) -> DrawnImages:
    """One image a prompt; each is a function of the seed, the prompt and its place in the list."""
    requests = [Request(prompt, derive_seed(seed, "evaluate", prompt, i)) for i, prompt in enumerate(prompts)]
    return DrawnImages(name, family, draw_samples(family, requests, settings, description=f"draw {name}"))


def check_classifier(classifier: ImageClassifier, family: Family) -> None:
    """Raise ValueError where a classifier cannot read a model's images, or does not know its classes."""
    labelled_classes(classifier, family.labels)
    if classifier.config.image_size != family.resolution:
        raise ValueError(
            f"the classifier reads images of {classifier.config.image_size} pixels, the model draws "
            f"{family.resolution}; pass another --classifier"
        )


def classifier_readings(classifier: ImageClassifier, retained: ClassImages, forgotten: ClassImages | None) -> dict:
    """What a classifier reads in images of the retained classes and of the forgotten one.

    Returns:
        The probability of the forgotten class in its own images and their entropy (nats), means; of the retained
        images the share read right and the mean probability of the class asked for, over all of them and in the worst
        class; the share of every class; 95 % intervals; and the classifier's own share right on real images, None if
        it was never measured. None stands where nothing was drawn. Ready for JSON.

    Raises:
        ValueError: the classifier does not know a class, or reads images of another size.
    """
    named = [*retained.labels, *(forgotten.labels if forgotten else [])]
    rows = {row["prompt"]: row for row in labelled_classes(classifier, list(dict.fromkeys(named)))}
    attribute = next(name for name in rows[named[0]] if name not in ("prompt", "form"))
    classes = classifier.config.attributes[attribute]

    def judged(labels: Sequence[str]) -> JudgedSet:
        return JudgedSet([], [{attribute: rows[label][attribute]} for label in labels])

    nothing = torch.empty(0)
    images = {name: nothing for name in ("concept", "unseen", "unnamed")} | {"retained": _all(retained)}
    if forgotten:
        images["concept"] = _all(forgotten)
    index = classes.index(rows[forgotten.labels[0]][attribute]) if forgotten else 0
    exam = Examination(
        attribute, index, judged(forgotten.labels if forgotten else []), judged([]), judged([]),
        judged(retained.labels),
    )  # fmt: skip
    values, intervals = measure(classifier, exam, images)
    shares = score_images(classifier, images["retained"], exam.retained.labels)[attribute]
    by_class = {name: score.share for name, score in shares.items()}
    return {
        "classifier_accuracy": (classifier.config.accuracy or {}).get(attribute),
        **{name: values[name] for name in READINGS},
        "retained_worst_class": min(by_class, key=by_class.__getitem__),
        "class_accuracy": by_class,
        "intervals": {name: intervals[name] for name in READINGS},
    }


def _all(drawn: ClassImages) -> Tensor:
    return torch.cat([drawn.images.images(indices) for indices in index_batches(drawn.images, 64)])
