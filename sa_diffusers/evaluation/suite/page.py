"""The page of an evaluation of pipelines: the result, pictures of equal prompt and seed, then each set's numbers."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from PIL import Image

from sa_diffusers.evaluation.before_after import to_pil, to_uint8
from sa_diffusers.evaluation.images.image_sets import ImageSet
from sa_diffusers.evaluation.prompts.prompt_suite import WHAT, PromptSet
from sa_diffusers.evaluation.suite.judging import Values
from sa_diffusers.evaluation.suite.numbers import MEASURES, Measurement, cell, split_tables
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.report.page import SMALL, TEMPLATES


LARGEST = 256  # pixels a side of a picture on the page
MOSAIC = 8  # tiles a side of a blurred one, fewer of small ones: what they hide is not in the file
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


def write_page(
    path: Path,
    config: PipelineEvaluationConfig,
    *,
    title: str,
    found: Mapping,
    notes: Sequence[str],
    suite: Mapping[str, PromptSet],
    pictures: Mapping[str, Mapping[str, ImageSet]],
    values: Mapping[str, Values],
    results: Mapping[str, Sequence[Measurement]],
) -> None:
    """Write one HTML page that needs nothing else: no network, no script, pictures inside.

    Args:
        config: says whether every picture is blurred, and how many each section has.
        found: what evaluation.json holds; "result", "pipelines", "reference" and "options" are shown.
        pictures: by pipeline, the reference first, and by set.
    """

    def figure(section: Section, place: Place) -> dict:
        request = suite[place.group].requests[place.index]
        tiles = [
            {"label": name} | _picture(pictures[name][place.group], place.index, config.blurred)
            for name in section.pipelines
        ]
        return {"tiles": tiles, "prompt": request.prompt, "seed": request.seed, "remark": place.remark,
                "group": place.group}  # fmt: skip

    shown_sections = [
        {"section": section, "figures": [figure(section, place) for place in section.places]}
        for section in sections(suite, values, config.pictures_shown, next(iter(values)))
    ]
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("evaluation.html.j2").render(
        title=title, found=found, notes=notes, tables=split_tables(results, suite), cell=cell,
        explanations={label: text for label, _, text in MEASURES.values()}, sections=shown_sections,
        blurred=config.blurred, options=json.dumps(found["options"], indent=2, ensure_ascii=False),
    )  # fmt: skip
    with atomic_path(path) as new:
        new.write_text(page, encoding="utf-8")


def mosaic(image: Image.Image) -> Image.Image:
    """The picture as mean colours of at most `MOSAIC` x `MOSAIC` tiles, smoothed, in its own size.

    A tile is at least 8 pixels a side, so that small pictures are hidden, too.
    """
    tiles = [max(1, min(MOSAIC, side // 8)) for side in image.size]
    return image.resize(tiles, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def _picture(image_set: ImageSet, index: int, blurred: bool) -> dict:
    """A picture for the page, at most `LARGEST` pixels a side; the browser enlarges small ones."""
    image = to_pil(to_uint8(image_set.images([index])[0]))
    small = max(image.size) <= SMALL
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    (mosaic(image) if blurred else image).save(buffer, format="PNG")
    return {"uri": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", "small": small}
