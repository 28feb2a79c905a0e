"""The images that a run is judged by, and what a classifier reads in them class by class."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.evaluation.examination import labelled_classes
from sa_diffusers.evaluation.forgetting import MEANS, summarise
from sa_diffusers.evaluation.images.options import RunConfig
from sa_diffusers.evaluation.images.sets import ImageSet
from sa_diffusers.evaluation.judging import ClassifierJudge, judge_pictures
from sa_diffusers.evaluation.options import DrawnAs
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.evaluation.subjects import drawn_as
from sa_diffusers.families import Family, get_family
from sa_diffusers.io.atomic_files import read_json
from sa_diffusers.io.loading import load_pipeline


READINGS = tuple(name for name, (of, _, _) in MEANS.items() if of == "retained" or name in (
    "concept_probability", "concept_entropy"
))  # fmt: skip


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
        drawn_as: how.
        forgotten: the forgotten class; None: none, or a model of free text.
        sets: what is drawn: "retained" or, of free text, "drawn", which are compared with real images; where there is
            a forgotten class that is to be looked at, "forgotten".
        judge: reads them; None: no classifier was asked for.
    """

    family: Family
    drawn_as: DrawnAs
    forgotten: str | None
    sets: dict[str, PromptSet]
    judge: ClassifierJudge | None


def open_run(config: RunConfig) -> OpenRun:
    """Load a run's pipeline, and check that its images can be judged as asked.

    Raises:
        ValueError: no run in a folder, prompts for a model of classes or none for one of free text, a concept that is
            no class, or a classifier that cannot read the images.
        ModelLoadError: a pipeline or classifier that cannot be read.
    """
    for name, path in (("run", config.run), ("settings_of", config.settings_of)):
        if path is not None and not (Path(path) / "pipeline").is_dir():
            raise ValueError(f"expected the folder of a run, with `pipeline/` inside, got {path}; check --{name}")
    settings = drawn_as(config.settings_of or config.run, config.drawn_as)
    concept, done = config.concept, Path(config.run) / "metrics.json"  # which is written after all stages
    if concept is None and done.exists():
        concept = read_json(done).get("concept")
    prompts = read_prompts(config.prompts) if config.prompts else []
    family = get_family(load_pipeline(f"{config.run}/pipeline", None, None, "float32"), sampler=settings.sampler)
    family.module.eval()
    if family.can("completion"):
        raise ValueError(f"{config.run} completes pictures, and draws none to compare: its report.html judges it")
    if family.labels is None:
        if not prompts or config.classifier is not None:
            raise ValueError(f"{config.run} takes free text: expected --prompts, and not the metric classifier")
        seeds = [derive_seed(config.seed, "evaluate", prompt, index) for index, prompt in enumerate(prompts)]
        drawn = PromptSet.seeded("keeps", list(map(Candidate, prompts)), seeds.__getitem__)
        sets, judge, forgotten = {"drawn": drawn}, None, None
    else:
        if prompts:
            raise ValueError(f"expected no --prompts: {config.run} draws its classes {', '.join(family.labels)}")
        forgotten = forgotten_label(family.labels, concept)
        judge = None if config.classifier is None else ClassifierJudge.load(
            config.classifier, [forgotten or family.labels[0]]
        )  # fmt: skip
        sets = _class_sets(config, family, forgotten, judge)
    return OpenRun(family, settings, forgotten, sets, judge)


def _class_sets(
    config: RunConfig, family: Family, forgotten: str | None, judge: ClassifierJudge | None
) -> dict[str, PromptSet]:
    if judge is not None:
        judge.classifier.require_size(family.resolution)
    rows = labelled_classes(judge, family.labels) if judge else [{"prompt": label} for label in family.labels]
    parts = {}
    for row in rows:
        name, labels = row["prompt"], {key: row[key] for key in row if key not in ("prompt", "form")}
        asked = [Candidate(name, labels)] * config.num_images_per_class
        parts[name] = PromptSet.seeded("keeps", asked, partial(derive_seed, config.seed, "evaluate", name))
    own = parts.pop(forgotten) if forgotten else None
    sets = {"retained": sum(parts.values(), PromptSet("keeps", [], []))}
    if own is not None and (judge is not None or config.save_images is not None):
        sets["forgotten"] = PromptSet("asks", own.requests, own.candidates)
    return sets


def classifier_readings(run: OpenRun, pictures: dict[str, ImageSet]) -> dict:
    """What a classifier reads in images of the retained classes and of the forgotten one.

    Returns:
        The numbers of a run's metrics.json that are of these (`READINGS`), the share read right of every class, which
        is the worst, and the classifier's own share right on real images, None if it was never measured. None stands
        where nothing was drawn. Ready for JSON.
    """
    names = {"forgotten": "concept"}
    sets, drawn = ({names.get(name, name): part for name, part in parts.items()} for parts in (run.sets, pictures))
    read = judge_pictures([run.judge], sets, drawn)
    values, intervals = summarise(run.judge.attribute, sets, read)
    rows: dict[str, list[int]] = {}
    for row, labels in enumerate(sets["retained"].labels):
        rows.setdefault(labels[run.judge.attribute], []).append(row)
    by_class = {name: read["retained"]["accuracy"][own].mean().item() for name, own in rows.items()}
    return {
        "classifier_accuracy": run.judge.accuracy,
        **{name: values[name] for name in READINGS},
        "retained_worst_class": min(by_class, key=by_class.__getitem__),
        "class_accuracy": by_class,
        "intervals": {name: intervals[name] for name in READINGS},
    }
