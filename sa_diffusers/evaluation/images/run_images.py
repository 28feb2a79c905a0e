"""Draw the images that a run is judged by, and let a classifier read them class by class."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path

from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.data.sampling import DrawingOptions, Request, draw_samples
from sa_diffusers.evaluation.forgetting import Examination, JudgedSet, labelled_classes, measure
from sa_diffusers.evaluation.images.options import EvaluateConfig
from sa_diffusers.evaluation.images.sets import DrawnImages
from sa_diffusers.evaluation.judges.classifier import ImageClassifier, score_images
from sa_diffusers.families import Family, family_defaults, get_family
from sa_diffusers.io.loading import load_pipeline, read_model_index, read_run_options


READINGS = (
    "concept_probability", "concept_entropy", "retained_accuracy", "retained_worst_accuracy", "retained_probability",
    "retained_worst_probability",
)  # fmt: skip
DRAWING = ("guidance_scale", "num_inference_steps", "sampler")  # the options that an image depends on


@dataclass
class RunOptions(DrawingOptions):
    """How a run's images are drawn, and the concept that it forgot (None: none)."""

    concept: str | None = None


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
    values = family_defaults(read_model_index(str(folder / "pipeline"))["_class_name"])
    values |= read_run_options(folder) | {"concept": None}
    if (folder / "metrics.json").exists():  # written last: before that the concept has not been forgotten
        values["concept"] = read_json(folder / "metrics.json")["concept"]
    if settings_of is not None:
        other = read_run(settings_of)
        values |= {name: getattr(other, name) for name in DRAWING}
    values |= {name: value for name, value in options.items() if value is not None}
    return RunOptions(**{field.name: values[field.name] for field in fields(RunOptions) if field.name in values})


def forgotten_label(labels: Sequence[str], concept: str | None) -> str | None:
    """The class that a concept is, None for None. Raises ValueError where no class has its name."""
    if concept is None:
        return None
    for name in split_phrasings(concept):
        if name in labels:
            return name
    raise ValueError(f"expected the concept to be one of the classes {', '.join(labels)}, got {concept!r}")


@dataclass(frozen=True)
class OpenRun:
    """A run whose images can be drawn.

    Attributes:
        options: how to draw.
        prompts: what the images to compare with real ones are asked for by; the names of classes where it has some.
        forgotten: the forgotten class, which is not among them; None: none, or a model of free text.
    """

    name: str
    family: Family
    options: RunOptions
    prompts: list[str]
    forgotten: str | None

    def draw(self, prompts: Sequence[str], seed: int, what: str = "") -> DrawnImages:
        """An image a prompt; each is a function of the seed, the prompt and a number.

        The number is the prompt's place in the list, or among its equals where it is the name of a class.
        """
        number_of: dict[str, Iterator[int]] = defaultdict(count)
        numbers = count() if self.family.labels is None else (next(number_of[prompt]) for prompt in prompts)
        requests = [Request(Condition(p), derive_seed(seed, "evaluate", p, next(numbers))) for p in prompts]
        samples = draw_samples(self.family, requests, self.options.judged, description=f"draw {self.name}{what}")
        return DrawnImages(self.name + what, self.family, samples)


def open_run(config: EvaluateConfig, classifier: ImageClassifier | None) -> OpenRun:
    """Load a run's pipeline, and check that its images can be judged as asked.

    Raises:
        ValueError: no run in a folder, prompts for a model of classes or none for one of free text, a concept that is
            no class, or a classifier that cannot read the images.
    """
    given = {name: getattr(config, name) for name in ("concept", "settings_of", *DRAWING)}
    options = read_run(config.run, eval_batch_size=config.sample_batch_size, **given)
    prompts = read_prompts(config.prompts) if config.prompts else []
    family = get_family(load_pipeline(f"{config.run}/pipeline", None, None, "float32"), sampler=options.sampler)
    family.module.eval()
    if family.labels is None:
        if not prompts or classifier is not None:
            raise ValueError(f"{config.run} takes free text: expected --prompts, and not the metric classifier")
        return OpenRun(config.run, family, options, prompts, None)
    if prompts:
        raise ValueError(f"expected no --prompts: {config.run} draws its classes {', '.join(family.labels)}")
    if classifier is not None:
        labelled_classes(classifier, family.labels)  # all are known to it
        classifier.require_size(family.resolution)
    forgotten = forgotten_label(family.labels, options.concept)
    asked = [label for label in family.labels if label != forgotten for _ in range(config.num_images_per_class)]
    return OpenRun(config.run, family, options, asked, forgotten)


def classifier_readings(classifier: ImageClassifier, retained: DrawnImages, forgotten: DrawnImages | None) -> dict:
    """What a classifier reads in images of the retained classes and of the forgotten one.

    Returns:
        The probability of the forgotten class in its own images and their entropy (nats), means; of the retained
        images the share read right and the mean probability of the class asked for, over all of them and in the worst
        class; the share of every class; 95 % intervals; and the classifier's own share right on real images, None if
        it was never measured. None stands where nothing was drawn. Ready for JSON.

    Raises:
        ValueError: the classifier does not know a class, or reads images of another size.
    """
    asked = [*retained.prompts, *(forgotten.prompts if forgotten else [])]
    rows = {row["prompt"]: row for row in labelled_classes(classifier, list(dict.fromkeys(asked)))}
    attribute = next(name for name in rows[asked[0]] if name not in ("prompt", "form"))
    images = {"retained": retained.images(range(len(retained)))}
    judged = JudgedSet([], [{attribute: rows[label][attribute]} for label in retained.prompts])
    exam = Examination(attribute, 0, retained=judged)
    if forgotten:
        images["concept"] = forgotten.images(range(len(forgotten)))
        name = rows[forgotten.prompts[0]][attribute]
        index = classifier.config.attributes[attribute].index(name)
        exam = Examination(attribute, index, JudgedSet([], [{}] * len(forgotten)), retained=judged)
    values, intervals = measure(classifier, exam, images)
    shares = score_images(classifier, images["retained"], judged.labels)[attribute]
    by_class = {name: score.share for name, score in shares.items()}
    return {
        "classifier_accuracy": (classifier.config.accuracy or {}).get(attribute),
        **{name: values[name] for name in READINGS},
        "retained_worst_class": min(by_class, key=by_class.__getitem__),
        "class_accuracy": by_class,
        "intervals": {name: intervals[name] for name in READINGS},
    }
