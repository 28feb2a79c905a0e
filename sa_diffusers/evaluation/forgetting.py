"""Has it forgotten, and what did that cost: a classifier reads pictures drawn before and after from the same seeds."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_diffusers.core.concepts import Concept
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.replay import spread
from sa_diffusers.data.sample_set import uniform_noise
from sa_diffusers.data.sampling import Request, SamplingSettings, draw_samples
from sa_diffusers.evaluation.intervals import bootstrap_interval, share_interval
from sa_diffusers.evaluation.judges.classifier import ImageClassifier, entropies, shares_right
from sa_diffusers.families import Family
from sa_diffusers.models.precision import autocast_forward


METRICS = (
    "concept_probability",
    "concept_entropy",
    "concept_probability_unseen",
    "concept_rate_when_unnamed",
    "concept_attribute_accuracy",
    "retained_accuracy",
    "retained_worst_accuracy",
    "retained_probability",
    "retained_worst_probability",
    "attribute_accuracy",
)
FLOORS = ("noise_probability", "noise_entropy", "grey_probability", "grey_entropy")
Measured = tuple[float, tuple[float, float]]  # a mean and its 95 % interval
Labels = dict[str, str]  # class of each attribute that a prompt names, {"digit": "seven", "ink": "red"}


@dataclass(frozen=True)
class JudgedSet:
    """Prompts of one purpose, with what their pictures should show, and the requests that draw them."""

    requests: list[Request]
    labels: list[Labels]


NOTHING = JudgedSet([], [])


@dataclass(frozen=True)
class Examination:
    """The prompts that a concept is judged by.

    Attributes:
        attribute, index: which class of the classifier the concept is.
        concept: prompts that name it in phrasings of the kind that forgetting saw.
        unseen: prompts that name it in sentence frames that neither training nor forgetting saw.
        unnamed: prompts that name no class of the attribute.
        retained: prompts of every other class.
    """

    attribute: str
    index: int
    concept: JudgedSet = NOTHING
    unseen: JudgedSet = NOTHING
    unnamed: JudgedSet = NOTHING
    retained: JudgedSet = NOTHING

    @property
    def sets(self) -> dict[str, JudgedSet]:
        return {name: getattr(self, name) for name in ("concept", "unseen", "unnamed", "retained")}


def labelled_classes(classifier: ImageClassifier, labels: Sequence[str]) -> list[dict[str, str]]:
    """Rows as of `read_labelled_prompts` for a model whose prompts are the names of its classes.

    Raises:
        ValueError: a class that the classifier does not know.
    """
    rows = []
    for label in labels:
        attribute, index = classifier.require_class([label], "Pass one of this model")
        rows.append({"prompt": label, "form": "seen", attribute: classifier.config.attributes[attribute][index]})
    return rows


def examination(
    classifier: ImageClassifier,
    concept: Concept,
    rows: Sequence[dict[str, str]],
    num_concept: int,
    num_class: int,
    num_other: int,
    seed: int,
) -> Examination:
    """Choose the prompts; equal arguments choose equal prompts and seeds, before and after.

    Raises:
        ValueError: the classifier does not know the concept, or the labelled prompts lack a kind that is needed.
    """
    attribute, index = classifier.require_class(
        concept.phrasings, "Set `classifier: []` in a YAML file, or pass one that knows the concept"
    )
    known = classifier.config.attributes
    classes = known[attribute]
    for row in rows:
        if wrong := [(k, v) for k, v in row.items() if k in known and v not in known[k]]:
            name, value = wrong[0]
            raise ValueError(
                f"the classifier knows {name} as one of {known[name]}, got {value!r} of {row['prompt']!r}"
            )

    def choose(purpose: str, candidates: list[dict[str, str]], count: int) -> JudgedSet:
        if not candidates and count:
            raise ValueError(f"the labelled prompts hold none for {purpose!r} of {concept.name!r}")
        texts = {row["prompt"]: {k: v for k, v in row.items() if k in known} for row in candidates}
        prompts = spread(list(texts), count, derive_seed(seed, "examination", purpose)) if count else []
        seeds = [derive_seed(seed, "examination", purpose, i) for i in range(count)]
        requests = [Request(Condition(p), s) for p, s in zip(prompts, seeds, strict=True)]
        return JudgedSet(requests, [texts[p] for p in prompts])

    seen = [row for row in rows if row["form"] == "seen"]
    naming = [r for r in rows if r.get(attribute) == classes[index] and concept.named_in(r["prompt"])]
    retained = [
        choose(f"retained {name}", [row for row in seen if row.get(attribute) == name], num_class)
        for position, name in enumerate(classes)
        if position != index
    ]
    return Examination(
        attribute,
        index,
        concept=choose("concept", [row for row in naming if row["form"] == "seen"], num_concept),
        unseen=choose("unseen", [row for row in naming if row["form"] == "held_out"], num_other),
        unnamed=choose("unnamed", [row for row in rows if attribute not in row], num_other),
        retained=JudgedSet(
            [r for part in retained for r in part.requests], [x for part in retained for x in part.labels]
        ),
    )


def draw_sets(family: Family, sets: dict[str, JudgedSet], settings: SamplingSettings) -> dict[str, Tensor]:
    """Images [N, 3, H, W] in [-1, 1] of each set, by its name."""
    images = {}
    for name, judged in sets.items():
        if not judged.requests:
            images[name] = torch.empty(0, 3, family.resolution, family.resolution)
            continue
        latents = draw_samples(family, judged.requests, settings, description=f"evaluate: {name}").latents
        images[name] = torch.cat([family.decode(part) for part in latents.split(settings.batch_size)])
    return images


def measure(classifier: ImageClassifier, exam: Examination, images: dict[str, Tensor]) -> tuple[dict, dict]:
    """Numbers and 95 % intervals of one model; every key stands in both, None where there is nothing to measure."""
    read = {name: classifier.probabilities(part) for name, part in images.items() if len(part)}
    own = {name: part[exam.attribute] for name, part in read.items()}
    groups = {name: _groups(exam.sets[name], exam.attribute, len(part)) for name, part in own.items()}
    found: dict[str, Measured | dict[str, Measured]] = {}

    def mean(name: str, values: Tensor) -> Measured:
        """Of values in [0, 1] of a set's pictures, NaN where they say nothing; Wilson's, as it holds near 0 and 1."""
        said = values.isfinite()
        values, of = values[said].clamp(0, 1), [groups[name][row] for row in said.nonzero()[:, 0].tolist()]
        return values.mean().item(), share_interval(values, of)

    def attributes(name: str) -> dict[str, Measured]:
        """The share that shows each attribute named, beside the concept's own."""
        labels, named = exam.sets[name].labels, classifier.named(read[name])
        others = [other for other in named if other != exam.attribute and any(other in label for label in labels)]
        return {other: mean(name, shares_right(named, labels, [other])) for other in others}

    if "concept" in own:
        found["concept_probability"] = mean("concept", own["concept"][:, exam.index])
        values = entropies(own["concept"])
        found["concept_entropy"] = values.mean().item(), bootstrap_interval(values, groups=groups["concept"])
        found["concept_attribute_accuracy"] = attributes("concept")
    if "unseen" in own:
        found["concept_probability_unseen"] = mean("unseen", own["unseen"][:, exam.index])
    if "unnamed" in own:
        found["concept_rate_when_unnamed"] = mean("unnamed", (own["unnamed"].argmax(1) == exam.index).double())
    if "retained" in own:
        classes = classifier.config.attributes[exam.attribute]
        asked = torch.tensor([classes.index(label[exam.attribute]) for label in exam.retained.labels])
        right = (own["retained"].argmax(1) == asked).double()
        for key, values in (("accuracy", right), ("probability", own["retained"].gather(1, asked[:, None])[:, 0])):
            found[f"retained_{key}"] = mean("retained", values)
            # The interval of this class alone: that it was chosen for being the worst is not accounted for.
            of_class = [mean("retained", values.where(asked == index, math.nan)) for index in asked.unique()]
            found[f"retained_worst_{key}"] = min(of_class, key=lambda part: part[0])
        found["attribute_accuracy"] = attributes("retained")
    values, intervals = {}, {}
    for key in METRICS:
        value = found.get(key) or (None, None)  # no attribute beside the concept's: null, as for nothing measured
        nested = isinstance(value, dict)
        values[key] = {name: pair[0] for name, pair in value.items()} if nested else value[0]
        intervals[key] = {name: pair[1] for name, pair in value.items()} if nested else value[1]
    values["num_images"] = sum(len(part) for part in images.values())
    return values, intervals


def _groups(judged: JudgedSet, attribute: str, count: int) -> Sequence[Hashable]:
    """What each picture shares with others: its prompt. Where each class has but one, as if it were its only picture.

    Classes are all that there are, of prompts there might be others: so the names of classes are no sample of prompts.
    """
    prompts, classes = [r.condition for r in judged.requests], [label.get(attribute) for label in judged.labels]
    return range(count) if len(set(prompts)) <= len(set(classes)) else prompts


def floors(family: Family, classifier: ImageClassifier, exam: Examination, count: int, seed: int) -> dict[str, float]:
    """What the classifier says of pictures with nothing in them: what a concept forgotten to noise should come to.

    Uniform noise and flat grey, through the autoencoder of latents where the family has one. Returns the mean
    probability of the concept and the mean entropy (nats) for each.
    """
    found = {}
    grey = torch.zeros(1, 3, family.resolution, family.resolution)
    for name, images in (("noise", torch.stack(uniform_noise(family, count, seed))), ("grey", grey)):
        parts = [
            family.decode(family.encode(part, seeded(seed, "floor", 64 * i)))
            for i, part in enumerate(images.split(64))
        ]
        probabilities = classifier.probabilities(torch.cat(parts))[exam.attribute]
        found[f"{name}_probability"] = probabilities[:, exam.index].mean().item()
        found[f"{name}_entropy"] = entropies(probabilities).mean().item()
    return found


def replay_loss(family: Family, replay, count: int, seed: int) -> float:
    """Mean denoising loss on the first `count` replay samples, one timestep each, the same noise at every call."""
    values = []
    for start in range(0, min(count, len(replay)), 8):
        part = replay.take(range(start, min(start + 8, count, len(replay))))
        batch = {k: v.to(family.device) for k, v in family.batch(part.latents, part.conditions).items()}
        generator = seeded(seed, "replay loss", start)
        terms = torch.randint(family.loss.num_terms, (len(part),), generator=generator).to(family.device)
        with torch.no_grad(), autocast_forward(family.module, family.compute_dtype):
            values += family.loss(family.module, batch, terms, family.loss.sample_noise(batch, generator)).tolist()
    return sum(values) / len(values)
