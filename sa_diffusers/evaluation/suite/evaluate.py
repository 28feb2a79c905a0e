"""Judge text-to-image pipelines side by side: draw what is missing, measure, write numbers, tables and a page."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from sa_diffusers.evaluation.images.sets import ImageFolder
from sa_diffusers.evaluation.judges.nudity import TOTAL, count
from sa_diffusers.evaluation.suite.distances import distances
from sa_diffusers.evaluation.suite.drawing import count_pictures, draw_suite
from sa_diffusers.evaluation.suite.inputs import EvaluationInputs, describe_plan, notes, read_inputs
from sa_diffusers.evaluation.suite.judging import Pictures, Values, judge_pictures
from sa_diffusers.evaluation.suite.numbers import (
    MEASURES,
    Measurement,
    cell,
    headline,
    markdown,
    measurements,
    split_tables,
    summary,
)
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.sections import figure, sections
from sa_diffusers.evaluation.suite.subjects import Subject, check_subjects, open_subjects
from sa_diffusers.io.artifacts import RunLock, check_foreign
from sa_diffusers.io.atomic_files import check_disk, write_json, write_text
from sa_diffusers.io.configuration import public_values
from sa_diffusers.io.model_names import folder_name
from sa_diffusers.io.processes import process_state
from sa_diffusers.report.page import write_page


PNG_BYTES = 500_000  # an upper bound for a picture of 512 pixels a side; small ones take less
READING = (
    "Each number is a mean over n pictures with its 95 % interval: of shares Wilson's, of their differences Bonett "
    "and Price's, else by the bootstrap. Pictures of one prompt count for what they tell of others. Below it, the "
    "difference to the first pipeline over the same prompts and seeds.",
    "Suppressed is not proven erased: whoever has the weights may train or attack the concept back.",
)


@dataclass(frozen=True)
class Found:
    """What was found of each pipeline, by its name, the reference first.

    Attributes:
        keys: what decided its pictures.
        pictures, values: by set; `values` of each picture.
        exposed: by set and NudeNet's label, the exposed parts.
        results: means, intervals, differences to the reference, and distances of distributions.
    """

    keys: dict[str, dict] = field(default_factory=dict)
    pictures: dict[str, Pictures] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)
    exposed: dict[str, dict[str, dict]] = field(default_factory=dict)
    results: dict[str, list[Measurement]] = field(default_factory=dict)


def evaluate_pipelines(config: PipelineEvaluationConfig) -> dict:
    """Draw and judge every pipeline; the folder then holds evaluation.json, evaluation.md, report.html and pictures.

    Returns:
        What evaluation.json holds, with "summary", lines for the terminal, and "output_dir".

    Raises:
        ValueError, ModelLoadError: wrong input, before any pipeline is loaded; and an output folder with files of
            somebody else. What only loading or drawing tells (a class's own size) is refused at the first batch.
        StageMismatch: the folder holds pictures of other prompts or settings.
    """
    if process_state().num_processes > 1:
        raise ValueError("this evaluation runs in one process: start it by python, not by accelerate launch")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    start = time.perf_counter()
    output_dir = Path(config.output_dir or Path("runs") / f"evaluate-{folder_name(config.phrasings[0])}")
    check_foreign(output_dir, "evaluation.json", "*/values.json")
    subjects = open_subjects(config)
    inputs = read_inputs(config, subjects[0])
    there = count_pictures(config, subjects, inputs.suite, output_dir)
    print(describe_plan(config, subjects, inputs, output_dir, there), flush=True)
    check_disk(output_dir, PNG_BYTES * (len(subjects) * sum(map(len, inputs.suite.values())) - there))
    check_subjects(config, subjects, inputs.image_size)
    with RunLock(output_dir):
        found = Found()
        draw_all(config, subjects, inputs, output_dir, found)
        judge_all(config, inputs, found)
        document = _as_json(config, subjects, inputs, found)
        document["seconds"] = round(time.perf_counter() - start, 2)
        _write(config, inputs, found, document, output_dir)
    lines = "\n".join([*document["result"], "", summary(found.results, inputs.suite)]).strip()
    return document | {"output_dir": str(output_dir), "summary": lines}


def draw_all(
    config: PipelineEvaluationConfig,
    subjects: Sequence[Subject],
    inputs: EvaluationInputs,
    output_dir: Path,
    found: Found,
) -> None:
    """Draw with one pipeline after the other: `found.keys` and `found.pictures`."""
    size = inputs.image_size
    for subject in subjects:
        key = found.keys[subject.name] = draw_suite(subject, inputs.suite, output_dir, config, size)
        if "change" in config.metric_names:
            size = size or key["image_size"]
        folder = output_dir / subject.name
        found.pictures[subject.name] = {name: ImageFolder(folder / name) for name in inputs.suite}


def judge_all(config: PipelineEvaluationConfig, inputs: EvaluationInputs, found: Found) -> None:
    """Let every judge look at every picture, and sum up: `found.values`, `found.exposed` and `found.results`."""
    attribute = None if inputs.classifier is None else inputs.classifier.attribute
    first = next(iter(found.pictures))
    for name, own in found.pictures.items():
        reference = None if name == first else found.pictures[first]
        values = judge_pictures(list(inputs.judges.values()), inputs.suite, own, reference, config.batch_size, name)
        before = None if name == first else found.values[first]
        found.values[name] = values
        found.results[name] = measurements(inputs.suite, values, before, attribute, config.seed)
        if inputs.body is not None and inputs.body.exposed:
            found.exposed[name] = {group: count(parts) for group, parts in inputs.body.exposed.items()}
            inputs.body.exposed = {}
    for more in (distances(config, inputs, found.pictures), exposed_parts(inputs, found.exposed)):
        for name, rows in more.items():
            found.results[name] += rows


def exposed_parts(inputs: EvaluationInputs, detections: Mapping[str, dict]) -> dict[str, list[Measurement]]:
    """The counts of each kind by the paper's names (Table 3), of the sets in which there is one at all."""
    groups = {g for found in detections.values() for g, counts in found.items() if counts[TOTAL]["detections"]}
    return {
        name: [
            Measurement(f"exposed parts: {group}", part["paper"], part["detections"], None, len(inputs.suite[group]),
                        remark=f"in {part['pictures']:,} pictures")
            for group, counts in found.items() if group in groups
            for part in counts.values()
        ]
        for name, found in detections.items()
    }  # fmt: skip


def _as_json(
    config: PipelineEvaluationConfig, subjects: Sequence[Subject], inputs: EvaluationInputs, found: Found
) -> dict:
    """evaluation.json: what was measured of whom, by what."""
    judge, body = inputs.classifier, inputs.body
    judges = {
        "classifier": None if judge is None else config.judge,
        "classifier_accuracy": None if judge is None else judge.classifier.config.accuracy,
        "clip": inputs.clip_name,
        "nudity": None if body is None else body.description,
        "identity": None if body is None or body.scorer is None else body.scorer.name,
        "extractor": None if inputs.extractor is None else config.extractor,
    }
    return {
        "concept": list(inputs.concept.phrasings),
        "neighbours": list(inputs.concept.siblings),
        "reference": subjects[0].name,
        "result": headline(found.results, inputs.suite, inputs.concept.name),
        "pipelines": {subject.name: asdict(subject) | found.keys[subject.name] for subject in subjects},
        "sets": {name: {"purpose": part.purpose, "num_images": len(part)} for name, part in inputs.suite.items()},
        "judges": judges,
        "results": {name: [asdict(row) for row in rows] for name, rows in found.results.items()},
        "exposed": found.exposed,
        "notes": notes(inputs),
        "options": asdict(config),
    }


def _write(
    config: PipelineEvaluationConfig, inputs: EvaluationInputs, found: Found, document: dict, output_dir: Path
) -> None:
    prompts = {
        group: [{"prompt": r.condition.text, "seed": r.seed, "labels": row}
                for r, row in zip(part.requests, part.labels, strict=True)]
        for group, part in inputs.suite.items()
    }  # fmt: skip
    for name, own in found.values.items():
        numbers = {  # JSON has no NaN
            group: {m: [one if one == one else None for one in values.tolist()] for m, values in measures.items()}
            for group, measures in own.items()
        }
        write_json({"prompts": prompts, "values": numbers}, output_dir / name / "values.json")
    title, public = f"What is left of “{inputs.concept.name}”", public_values(document)
    remarks = [*READING, *_judged_by(public["judges"]), *document["notes"]]
    write_text(markdown(found.results, title, [*document["result"], *remarks]), output_dir / "evaluation.md")
    shown = sections(inputs.suite, found.values, config.pictures_shown, document["reference"])
    figure_of = partial(figure, inputs.suite, found.pictures, config.blurred)
    write_page(
        output_dir / "report.html", "evaluation.html.j2", title=title, found=public, notes=remarks,
        tables=split_tables(found.results, inputs.suite), cell=cell,
        explanations={label: text for label, _, text in MEASURES.values()},
        sections=shown, figure_of=figure_of, blurred=config.blurred,
        options=json.dumps(public["options"], indent=2, ensure_ascii=False),
    )  # fmt: skip
    write_json(document, output_dir / "evaluation.json")  # last: it says that all is there


def _judged_by(judges: Mapping) -> list[str]:
    accuracy = judges["classifier_accuracy"]
    rights = "" if not accuracy else ", right in " + ", ".join(f"{v:.1%} ({k})" for k, v in accuracy.items())
    return [
        f"{name.capitalize()}: {judges[name]}{rights if name == 'classifier' else ''}."
        for name in ("classifier", "clip", "nudity", "identity", "extractor")
        if judges[name] is not None
    ]
