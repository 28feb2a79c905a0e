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


READ_KEYS = tuple(name for name, (of, _, _) in MEANS.items() if of == "retained" or name in (
    "concept_probability", "concept_entropy"
))  # fmt: skip


def forgotten_labels(labels: Sequence[str], concept: str | None) -> list[str]:
    """The classes of concepts as a run's records say them ("7, seven; 3"); None: none.

    Raises:
        ValueError: no class has a concept's name.
    """
    found = []
    for part in concept.split(";") if concept else ():
        own = [name for name in split_phrasings(part) if name in labels]
        if not own:
            known = ", ".join(labels)
            raise ValueError(f"expected the concept to be one of the classes {known}, got {part.strip()!r}")
        found.append(own[0])
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class OpenRun:
    """A run whose images can be drawn.

    Attributes:
        drawn_as: how.
        forgotten: the forgotten classes; none of a model of free text.
        sets: what is drawn: "retained" or, of free text, "drawn", which are compared with real images; where there is
            a forgotten class that is to be looked at, "forgotten".
        judge: reads them; None: no classifier was asked for.
    """

    family: Family
    drawn_as: DrawnAs
    forgotten: list[str]
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
        sets, judge, forgotten = {"drawn": drawn}, None, []
    else:
        if prompts:
            raise ValueError(f"expected no --prompts: {config.run} draws its classes {', '.join(family.labels)}")
        forgotten = forgotten_labels(family.labels, concept)
        known = [[name] for name in forgotten or family.labels[:1]]
        judge = None if config.classifier is None else ClassifierJudge.load(config.classifier, *known)
        sets = _class_sets(config, family, forgotten, judge)
    return OpenRun(family, settings, forgotten, sets, judge)


def _class_sets(
    config: RunConfig, family: Family, forgotten: Sequence[str], judge: ClassifierJudge | None
) -> dict[str, PromptSet]:
    if judge is not None:
        judge.classifier.require_size(family.resolution)
    rows = labelled_classes(judge, family.labels) if judge else [{"prompt": label} for label in family.labels]
    parts = {}
    for row in rows:
        name, labels = row["prompt"], {key: row[key] for key in row if key not in ("prompt", "form")}
        asked = [Candidate(name, labels, name if name in forgotten else "")] * config.num_images_per_class
        parts[name] = PromptSet.seeded("keeps", asked, partial(derive_seed, config.seed, "evaluate", name))
    own = sum((parts.pop(name) for name in forgotten), PromptSet("asks", [], []))
    sets = {"retained": sum(parts.values(), PromptSet("keeps", [], []))}
    if len(own) and (judge is not None or config.save_images is not None):
        sets["forgotten"] = own
    return sets


def classifier_readings(run: OpenRun, pictures: dict[str, ImageSet]) -> dict:
    """What a classifier reads in images of the retained classes and of the forgotten one.

    Returns:
        The numbers of a run's metrics.json that are of these (`READ_KEYS`), the share read right of every class, which
        is the worst, and the classifier's own share right on real images, None if it was never measured. None stands
        where nothing was drawn. Ready for JSON.
    """
    names = {"forgotten": "concept"}
    sets, drawn = ({names.get(name, name): part for name, part in parts.items()} for parts in (run.sets, pictures))
    read = judge_pictures([run.judge], sets, drawn)
    values, intervals = summarise(run.judge.attribute, sets, read)
    by_class = values["retained_accuracy_by_class"]
    return {
        "classifier_accuracy": run.judge.accuracy,
        **{name: values[name] for name in READ_KEYS},
        "retained_worst_class": min(by_class, key=by_class.__getitem__),
        "class_accuracy": by_class,
        "intervals": {name: intervals[name] for name in READ_KEYS},
    }
