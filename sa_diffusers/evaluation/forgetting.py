"""Has it forgotten, and what did that cost: pictures drawn before and after from the same seeds, read by classifiers.

Without a classifier there are the pictures, to be looked at.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.core.batches import to
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.sample_set import uniform_noise
from sa_diffusers.data.sampling import Request
from sa_diffusers.evaluation.images.sets import ImageSet
from sa_diffusers.evaluation.intervals import mean_interval, share_interval
from sa_diffusers.evaluation.judges.classifier import entropies
from sa_diffusers.evaluation.judges.preference import PREFERENCE, ClipPreferenceJudge, PreferenceJudge
from sa_diffusers.evaluation.judging import RIGHT, SHOWS, ClassifierJudge, Judge, Values, judge_pictures, worst_class
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import explain_read_errors, load_tensors, save_tensors
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.report.pictures import to_pil, to_uint8


# Means of metrics.json: set, measure, and whether over the class alone that fares worst.
MEANS = {
    "concept_probability": ("concept", "concept_probability", False),
    "concept_entropy": ("concept", "concept_entropy", False),
    "concept_probability_unseen": ("unseen", "concept_probability", False),
    "concept_rate_when_unnamed": ("unnamed", "concept_shown", False),
    "retained_accuracy": ("retained", "accuracy", False),
    "retained_worst_accuracy": ("retained", "accuracy", True),
    "retained_probability": ("retained", "probability", False),
    "retained_worst_probability": ("retained", "probability", True),
}
ATTRIBUTES = {"concept_attribute_accuracy": "concept", "attribute_accuracy": "retained"}  # by attribute, of which set
BY_CLASS = "retained_accuracy_by_class"
# Of each of several concepts, the worst first: of which set, and measure.
BY_CONCEPT = {f"{name}_by_concept": MEANS[name][:2] for name in ("concept_probability", "concept_probability_unseen")}
RATE_BY_CONCEPT = "concept_rate_when_unnamed_by_concept"
FLOORS = ("noise_probability", "noise_entropy", "grey_probability", "grey_entropy")
GROUPS = {"concept": "Concept", "unseen": "Unseen phrasings", "unnamed": "Not named", "retained": "Retained"}
SHOWN = 16  # pictures of each group on the page
# Of a stage's key: what decides a picture beside what it is asked for by.
DRAWN_BY = ("model", "guidance_scale", "num_inference_steps", "sampler", "compute_dtype", "bits")
LATENTS = "latents"  # tensor of a file of findings
Measured = tuple[float | None, tuple[float, float] | None]  # a mean and its 95 % interval


def measure(
    judge: ClassifierJudge, sets: Mapping[str, PromptSet], pictures: Mapping[str, ImageSet]
) -> tuple[dict, dict]:
    """Numbers and 95 % intervals of one model; every key stands in both, None where there is nothing to measure."""
    return summarise(judge.attribute, sets, judge_pictures([judge], sets, pictures))


def summarise(
    attribute: str, sets: Mapping[str, PromptSet], read: Values
) -> tuple[dict[str, float | dict | None], dict]:
    """As `measure`, of what a classifier has read in each picture."""

    classes = {name: [one.word or one.labels.get(attribute) for one in part.candidates] for name, part in sets.items()}

    def mean(name: str, measure: str, of: str | bool = False) -> Measured:
        """Over all pictures of a set, those of one class or concept, or (True) of the class that fares worst."""
        values = read.get(name, {}).get(measure, torch.empty(0))
        rows = values.isfinite().nonzero()[:, 0].tolist()
        if not rows:
            return None, None
        if of:
            one = worst_class(values, classes[name])[0] if of is True else of
            rows = [row for row in rows if classes[name][row] == one]
        groups = sets[name].groups(attribute)
        interval = partial(mean_interval, least=0.0) if measure == "concept_entropy" else share_interval
        return values[rows].mean().item(), interval(values[rows], groups=[groups[row] for row in rows])

    found = {key: mean(*of) for key, of in MEANS.items()}
    values, intervals = ({key: pair[i] for key, pair in found.items()} for i in (0, 1))
    for key, name in ATTRIBUTES.items():
        parts = {m.removeprefix(RIGHT): mean(name, m) for m in read.get(name, {}) if m.startswith(RIGHT)}
        for side, i in ((values, 0), (intervals, 1)):
            # No attribute beside the concept's: null, as for nothing measured.
            side[key] = {part: pair[i] for part, pair in parts.items() if pair[0] is not None} or None
    kept = dict.fromkeys(one for one in classes.get("retained", ()) if one is not None)
    parts = {BY_CLASS: {one: mean("retained", "accuracy", one) for one in kept}}
    for key, (name, measure) in BY_CONCEPT.items():
        words = set(classes.get(name, ()))
        parts[key] = {word: mean(name, measure, word) for word in words} if len(words) > 1 else {}
    shown = (measure for measure in read.get("unnamed", {}) if measure.startswith(SHOWS))
    parts[RATE_BY_CONCEPT] = {measure.removeprefix(SHOWS): mean("unnamed", measure) for measure in shown}
    for key in (*BY_CONCEPT, RATE_BY_CONCEPT):
        parts[key] = dict(sorted(parts[key].items(), key=lambda one: (-(one[1][0] or 0.0), one[0])))
    for side, i in ((values, 0), (intervals, 1)):
        side |= {key: {one: pair[i] for one, pair in part.items()} or None for key, part in parts.items()}
    return values, intervals


def floors(family: Family, judge: ClassifierJudge, count: int, seed: int) -> dict[str, float]:
    """What the classifier says of pictures with nothing in them: what a concept forgotten to noise should come to.

    Uniform noise and flat grey, through the autoencoder of latents where the family has one. Returns the mean
    probability of the concept, of several the highest, and the mean entropy (nats) for each.
    """
    found = {}
    grey = torch.zeros(1, 3, family.resolution, family.resolution)
    for name, images in (("noise", torch.stack(uniform_noise(family, count, seed))), ("grey", grey)):
        parts = [
            family.decode(family.encode(part, seeded(seed, "floor", 64 * i)))
            for i, part in enumerate(images.split(64))
        ]
        read = judge.classifier.probabilities(torch.cat(parts))
        found[f"{name}_probability"] = max(read[one][:, index].mean().item() for one, index in judge.targets)
        found[f"{name}_entropy"] = entropies(read[judge.attribute]).mean().item()
    return found


def measure_preference(
    family: Family, judge: PreferenceJudge | ClipPreferenceJudge, asking: PromptSet, pictures: ImageSet, seed: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The share of pictures that are taken for the concept, its interval by prompts, and what is said of noise."""
    found = judge_pictures([judge], {"concept": asking}, {"concept": pictures})["concept"][PREFERENCE]
    if (asked := (seed, *asking.prompts)) not in judge.said_of_noise:
        noise = torch.stack(uniform_noise(family, 16, seed))
        rows = spread_rows(len(asking), len(noise))
        judge.said_of_noise[asked] = judge(noise[: len(rows)], asking.take(rows), None)[PREFERENCE].mean().item()
    groups, words = asking.groups(""), [one.word for one in asking.candidates]
    values, intervals = {PREFERENCE: found.mean().item(), "noise_preference": judge.said_of_noise[asked]}, {}
    intervals[PREFERENCE] = share_interval(found, groups=groups)
    if len(set(words)) > 1:
        rows = {one: [row for row, word in enumerate(words) if word == one] for one in dict.fromkeys(words)}
        rows = dict(sorted(rows.items(), key=lambda part: -found[part[1]].mean().item()))  # the worst first
        by_concept = f"{PREFERENCE}_by_concept"
        values[by_concept] = {one: found[part].mean().item() for one, part in rows.items()}
        intervals[by_concept] = {
            one: share_interval(found[part], groups=[groups[row] for row in part]) for one, part in rows.items()
        }
    return values, intervals


def replay_loss(family: Family, replay, count: int, seed: int) -> float:
    """Mean denoising loss on the first `count` replay samples, of which there is one or more; one timestep each, the
    same noise at every call."""
    values = []
    for start in range(0, min(count, len(replay)), 8):
        part = replay.take(range(start, min(start + 8, count, len(replay))))
        batch = to(family.batch(part.latents, part.conditions), family.device)
        generator = seeded(seed, "replay loss", start)
        terms = family.loss.sample_terms(len(part), generator).to(family.device)
        with torch.no_grad(), autocast_forward(family.module, family.compute_dtype):
            values += family.loss(family.module, batch, terms, family.loss.sample_noise(batch, generator)).tolist()
    return sum(values) / len(values)


@dataclass
class Findings:
    """What one model was found to do: numbers, 95 % intervals, and some of the pictures behind them.

    Attributes:
        values, intervals: by metric; None where nothing could be measured.
        pictures: uint8 [N, 3, H, W]; `captions` are (group, prompt) of each.
        by_classifier: the numbers of each further classifier, by its name.
        key: what decided all this: the model's hashes, prompts, seeds, sampler, classifiers.
        beside: further pictures [N, 3, H, W] to show beside these, by what they are.
        drawn: latents by the fingerprints of requests, of all pictures that were read; for other runs of this model.
    """

    values: dict
    intervals: dict
    pictures: Tensor
    captions: list[tuple[str, str]]
    by_classifier: dict[str, dict]
    key: dict = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def misfit(self, key: dict, requests: Iterable[Request]) -> str | None:
        """Why its pictures are none of those that the key and requests ask for; None where some are."""
        differing = [name for name in DRAWN_BY if self.key.get(name) != key.get(name)]
        if differing:
            return f"was drawn with other {', '.join(differing)}"
        if self.key != key and self.drawn.keys().isdisjoint(one.fingerprint for one in requests):
            return "holds none of this run's pictures: other prompts, another seed, or a file of an older version"
        return None

    def save(self, path: Path) -> None:
        header = {k: getattr(self, k) for k in ("values", "intervals", "captions", "by_classifier", "key")}
        latents = {LATENTS: torch.stack(list(self.drawn.values()))} if self.drawn else {}
        tensors = {"pictures": self.pictures, **self.beside, **latents}
        # Files of tensors are sorted by name; a page shows them in their own order.
        save_tensors(tensors, path, findings=header, requests=list(self.drawn), beside=list(self.beside))

    @classmethod
    def load(cls, path: Path) -> "Findings":
        """Read a file written by `save`. Raises DamagedFile."""
        tensors, notes = load_tensors(path)
        with explain_read_errors(path):
            drawn = dict(zip(notes.get("requests", ()), tensors.pop(LATENTS, ()), strict=True))
            pictures, order = tensors.pop("pictures"), notes.get("beside", tensors)
            beside = {name: tensors[name] for name in order}
            return cls(pictures=pictures, beside=beside, drawn=drawn, **notes["findings"])


def examine(
    family: Family,
    sets: Mapping[str, PromptSet],
    pictures: Mapping[str, ImageSet],
    judges: Mapping[str, ClassifierJudge],
    seed: int,
    preference: Judge | None = None,
    earlier: Findings | None = None,
) -> Findings:
    """Let every judge read the pictures of all sets; the first one's numbers come first.

    Args:
        preference: judges those that ask for the concept where no classifier does.
        earlier: of the model before, whose floors are these: forgetting changes neither autoencoder nor judge.
    """
    results, drawn = {}, {"num_images": sum(map(len, sets.values()))}
    for name, judge in judges.items():
        values, intervals = measure(judge, sets, pictures)
        known = earlier.by_classifier.get(name, earlier.values) if earlier else floors(family, judge, 256, seed)
        values |= {key: known[key] for key in FLOORS} | {"classifier_accuracy": judge.accuracy}
        results[name] = values | drawn, intervals
    several = (BY_CLASS, *BY_CONCEPT, RATE_BY_CONCEPT)
    nothing = dict.fromkeys((*MEANS, *ATTRIBUTES, *several, *FLOORS, "classifier_accuracy"))
    values, intervals = results.pop(next(iter(judges))) if judges else (nothing | drawn, nothing)
    if preference is not None:
        preferred, interval = measure_preference(family, preference, sets["concept"], pictures["concept"], seed)
        values, intervals = values | preferred, intervals | interval
    shown = {name: spread_rows(len(part), SHOWN) for name, part in sets.items() if part.requests}
    captions = [(GROUPS[name], sets[name].prompts[row]) for name, rows in shown.items() for row in rows]
    some = torch.cat([pictures[name].images(rows) for name, rows in shown.items()])
    return Findings(values, intervals, to_uint8(some), captions, {name: v for name, (v, _) in results.items()})


def spread_rows(total: int, count: int) -> list[int]:
    """At most `count` indices spread evenly over `total`."""
    return torch.linspace(0, total - 1, min(count, total)).long().tolist()


def pairs(before: Findings, after: Findings, retrained: Findings | None = None) -> list[dict]:
    """Pictures of the same prompt and seed side by side, as `report` takes them; maybe of a model retrained, too."""
    rows = zip(before.captions, before.pictures, after.pictures, strict=True)
    return [
        {"group": g, "prompt": p or "(empty prompt)", "before": to_pil(b), "after": to_pil(a)}
        | ({"beside": {name: to_pil(part[i]) for name, part in before.beside.items()}} if before.beside else {})
        | ({"retrained": to_pil(retrained.pictures[i])} if retrained else {})
        for i, ((g, p), b, a) in enumerate(rows)
    ]
