"""Which pictures the page of an evaluation of pipelines shows: beside each other those of equal prompt and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sa_diffusers.evaluation.images.sets import ImageSet
from sa_diffusers.evaluation.judging import Values
from sa_diffusers.evaluation.measurements import MEASURES
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.evaluation.suite.prompt_suite import WHAT
from sa_diffusers.report.pictures import embed, to_pil, to_uint8


# Which number orders pictures, the first there is: how far a kept one has changed, how much one shows the concept.
CHANGED = ("perceptual_change", "pixel_change")
SHOWING = ("concept_probability", "identity", "clip_score")
# Of the sets of a purpose the pictures with the highest number: title and explanation.
MOST = (
    ("keeps", CHANGED, "kept pictures that changed most", "They should have stayed as they were."),
    ("asks", SHOWING, "pictures that show the concept most", "Of all that ask for it."),
)


@dataclass(frozen=True)
class Place:
    """A picture of a suite: its set, its index there, and what is said of it."""

    group: str
    index: int
    remark: str = ""


@dataclass(frozen=True)
class Section:
    """Some pictures under a heading, each as drawn by `pipelines`."""

    title: str
    explanation: str
    pipelines: list[str]
    places: list[Place]


def sections(
    suite: Mapping[str, PromptSet], values: Mapping[str, Values], shown: int, reference: str
) -> list[Section]:
    """What the page shows: the worst of each pipeline first, then the beginning of each set.

    Args:
        shown: pictures in each section.
    """
    found = []
    pairs = {name: list(dict.fromkeys([reference, name])) for name in values}
    for name in [name for name in values if name != reference] or [reference]:
        for purpose, measures, title, explanation in MOST:
            groups = [group for group, part in suite.items() if part.purpose == purpose]
            if highest := _highest(groups, values[name], measures, shown):
                found.append(Section(f"{name}: {title}", explanation, pairs[name], highest))
    for name, measured in values.items():
        exposed = [
            Place(group, index)
            for group, own in measured.items()
            for index in own.get("exposed", torch.empty(0)).nonzero()[:, 0].tolist()
        ]
        if exposed:
            explanation = f"{len(exposed):,} pictures; the first {min(shown, len(exposed))} of them."
            found.append(Section(f"{name}: pictures with an exposed part", explanation, pairs[name], exposed[:shown]))
    for group, part in suite.items():
        explanation = f"The first of {len(part):,} prompts that {WHAT[group]}." if group in WHAT else ""
        places = [Place(group, index) for index in range(min(shown, len(part)))]
        found.append(Section(group, explanation, list(values), places))
    return found


def _highest(groups: Sequence[str], values: Values, measures: Sequence[str], count: int) -> list[Place]:
    """The pictures of some sets with the highest numbers by the first of the measures that there is."""
    for measure in measures:
        rated = [
            (value, name, index)
            for name in groups
            for index, value in enumerate(values[name].get(measure, torch.empty(0)).tolist())
            if value == value  # no NaN
        ]
        if rated:
            label, spec, _ = MEASURES[measure]
            highest = sorted(rated, key=lambda row: -row[0])[:count]
            return [Place(name, index, f"{label} {value:{spec}}") for value, name, index in highest]
    return []


def figure(
    suite: Mapping[str, PromptSet],
    pictures: Mapping[str, Mapping[str, ImageSet]],
    blurred: bool,
    section: Section,
    place: Place,
) -> dict:
    """A picture as the page takes it, drawn by each pipeline of a section, or a mosaic where it is blurred.

    Args:
        pictures: by pipeline and by set.
    """
    request = suite[place.group].requests[place.index]
    images = {name: pictures[name][place.group].images([place.index])[0] for name in section.pipelines}
    tiles = [{"label": name} | embed(to_pil(to_uint8(image)), blurred) for name, image in images.items()]
    return {"tiles": tiles, "prompt": request.prompt, "seed": request.seed, **vars(place)}
