"""The page of an evaluation of pipelines: the result, pictures of equal prompt and seed, then each set's numbers."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from PIL import Image

from sa_diffusers.evaluation.images.image_sets import ImageSet
from sa_diffusers.evaluation.prompts.prompt_suite import WHAT, PromptSet
from sa_diffusers.evaluation.suite.judging import Values
from sa_diffusers.evaluation.suite.numbers import MEASURES, Measurement, cell, split_tables
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.report.page import TEMPLATES
from sa_diffusers.report.pictures import SMALL, mosaic, to_pil, to_uint8


LARGEST = 256  # pixels a side of a picture on the page
# Which number orders pictures, the first there is: how far a kept one has changed, how much one shows the concept.
CHANGED = ("perceptual_change", "pixel_change")
SHOWING = ("concept_probability", "identity", "clip_score")


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
    judged = [name for name in values if name != reference] or [reference]
    for name in judged:
        pair = list(dict.fromkeys([reference, name]))
        changed = _highest(suite, values[name], CHANGED, "keeps", shown)
        if changed:
            found.append(Section(f"{name}: kept pictures that changed most", "They should have stayed as they were.",
                                 pair, changed))  # fmt: skip
        showing = _highest(suite, values[name], SHOWING, "asks", shown)
        if showing:
            found.append(Section(f"{name}: pictures that show the concept most", "Of all that ask for it.", pair,
                                 showing))  # fmt: skip
    for name in values:
        exposed = [
            Place(group, index)
            for group, own in values[name].items()
            for index in own.get("exposed", torch.empty(0)).nonzero()[:, 0].tolist()
        ]
        if exposed:
            explanation = f"{len(exposed):,} pictures; the first {min(shown, len(exposed))} of them."
            pair = list(dict.fromkeys([reference, name]))
            found.append(Section(f"{name}: pictures with an exposed part", explanation, pair, exposed[:shown]))
    for group, part in suite.items():
        places = [Place(group, index) for index in range(min(shown, len(part)))]
        found.append(Section(group, f"The first of {len(part):,} prompts that {WHAT[group]}." if group in WHAT else "",
                             list(values), places))  # fmt: skip
    return found


def _highest(
    suite: Mapping[str, PromptSet], values: Values, measures: Sequence[str], purpose: str, count: int
) -> list[Place]:
    """The pictures of all sets of a purpose with the highest numbers by the first of the measures that there is."""
    groups = [name for name, part in suite.items() if part.purpose == purpose]
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
    *,
    title: str,
    found: Mapping,
    notes: Sequence[str],
    suite: Mapping[str, PromptSet],
    pictures: Mapping[str, Mapping[str, ImageSet]],
    values: Mapping[str, Values],
    results: Mapping[str, Sequence[Measurement]],
    blurred: bool,
    shown: int,
    options: str,
) -> None:
    """Write one HTML page that needs nothing else: no network, no script, pictures inside.

    Args:
        found: what evaluation.json holds; "result", "pipelines" and "reference" are shown.
        pictures: by pipeline, the reference first, and by set.
        blurred: replace every picture by a mosaic.
        shown: pictures in each section.
        options: every setting, as text.
    """
    reference = next(iter(values))

    def figure(section: Section, place: Place) -> dict:
        request = suite[place.group].requests[place.index]
        tiles = [
            {"label": name} | _picture(pictures[name][place.group], place.index, blurred) for name in section.pipelines
        ]
        return {"tiles": tiles, "prompt": request.prompt, "seed": request.seed, "remark": place.remark,
                "group": place.group}  # fmt: skip

    shown_sections = [
        {"section": section, "figures": [figure(section, place) for place in section.places]}
        for section in sections(suite, values, shown, reference)
    ]
    explanations = {label: text for label, _, text in MEASURES.values()}
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("evaluation.html.j2").render(
        title=title, found=found, notes=notes, tables=split_tables(results, suite), cell=cell,
        explanations=explanations, sections=shown_sections, blurred=blurred, options=options,
    )  # fmt: skip
    with atomic_path(path) as new:
        new.write_text(page, encoding="utf-8")


def _picture(image_set: ImageSet, index: int, blurred: bool) -> dict:
    """A picture for the page, at most `LARGEST` pixels a side; the browser enlarges small ones."""
    image = to_pil(to_uint8(image_set.images([index])[0]))
    small = max(image.size) <= SMALL
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    (mosaic(image) if blurred else image).save(buffer, format="PNG")
    return {"uri": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", "small": small}
