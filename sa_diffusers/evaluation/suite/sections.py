"""Which pictures the page of an evaluation of pipelines shows: beside each other those of equal prompt and seed."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from sa_diffusers.evaluation.images.sets import ImageSet
from sa_diffusers.evaluation.judging import Values
from sa_diffusers.evaluation.measurements import MEASURES
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.evaluation.suite.prompt_suite import WHAT
from sa_diffusers.report.pictures import figure, to_pil, to_uint8


# Which number orders pictures, the first there is: how far a kept one has changed, how much one shows the concept.
CHANGED = ("perceptual_change", "pixel_change")
SHOWING = ("concept_probability", "identity", "clip_score")
# Of the sets of a purpose the pictures with the highest number: title and explanation.
MOST = (
    ("keeps", CHANGED, "kept pictures that changed most", "They should have stayed as they were."),
    ("asks", SHOWING, "pictures that show the concept most", "Of all that ask for it."),
)


@dataclass(frozen=True)
class Section:
    """Some pictures under a heading, each as drawn by `pipelines`: (set, index in it, remark)."""

    title: str
    explanation: str
    pipelines: list[str]
    places: list[tuple[str, int, str]]


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
            if rated := next(filter(None, (_rated(groups, values[name], measure) for measure in measures)), None):
                found.append(Section(f"{name}: {title}", explanation, pairs[name], rated[:shown]))
    for name, measured in values.items():
        if exposed := [
            (group, index, "")
            for group, own in measured.items()
            for index in own.get("exposed", torch.empty(0)).nonzero()[:, 0].tolist()
        ]:
            explanation = f"{len(exposed):,} pictures; the first {min(shown, len(exposed))} of them."
            found.append(Section(f"{name}: pictures with an exposed part", explanation, pairs[name], exposed[:shown]))
    for group, part in suite.items():
        explanation = f"The first of {len(part):,} prompts that {WHAT[group]}." if group in WHAT else ""
        places = [(group, index, "") for index in range(min(shown, len(part)))]
        found.append(Section(group, explanation, list(values), places))
    return found


def _rated(groups: Iterable[str], values: Values, measure: str) -> list[tuple[str, int, str]]:
    """The pictures of some sets that a measure has a number for, the highest first."""
    rated = [
        (value, name, index)
        for name in groups
        for index, value in enumerate(values.get(name, {}).get(measure, torch.empty(0)).tolist())
        if value == value  # no NaN
    ]
    label, spec, _ = MEASURES[measure]
    return [(name, index, f"{label} {value:{spec}}") for value, name, index in sorted(rated, key=lambda row: -row[0])]


def figures(
    suite: Mapping[str, PromptSet], pictures: Mapping[str, Mapping[str, ImageSet]], blurred: bool, section: Section
) -> Iterator[dict]:
    """The pictures of a section as the page takes them, by each of its pipelines, or mosaics where they are blurred.

    Args:
        pictures: by pipeline and by set.
    """
    for group, index, remark in section.places:
        images = {name: to_pil(to_uint8(pictures[name][group].images([index])[0])) for name in section.pipelines}
        text = suite[group].requests[index].condition.text
        yield figure(images, text, f"{remark}, {group}" if remark else "", blurred)
