"""Judge text-to-image pipelines side by side: draw what is missing, measure, write numbers, tables and a page."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.evaluation.judges.nudity import TOTAL, V2_NAMES, count
from sa_diffusers.evaluation.suite.checks import check_subjects
from sa_diffusers.evaluation.suite.distances import distances
from sa_diffusers.evaluation.suite.drawing import draw_suite, drawn_pictures
from sa_diffusers.evaluation.suite.folder import check_output_dir, count_pictures
from sa_diffusers.evaluation.suite.headline import headline
from sa_diffusers.evaluation.suite.inputs import EvaluationInputs, describe_plan, notes, read_inputs
from sa_diffusers.evaluation.suite.judging import Pictures, Values, judge_pictures
from sa_diffusers.evaluation.suite.numbers import Measurement, markdown, measurements, summary
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.page import write_page
from sa_diffusers.evaluation.suite.subjects import Subject, open_subjects
from sa_diffusers.io.artifacts import RunLock
from sa_diffusers.io.atomic_files import atomic_path, check_disk, write_json
from sa_diffusers.io.processes import process_state


PNG_BYTES = 500_000  # an upper bound for a picture of 512 pixels a side; small ones take less


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
    slug = "-".join(re.findall(r"\w+", config.phrasings[0].lower()))
    output_dir = Path(config.output_dir or Path("runs") / f"evaluate-{slug}")
    check_output_dir(output_dir)
    subjects = open_subjects(config)
    inputs = read_inputs(config, subjects[0])
    there = count_pictures(config, subjects, inputs.suite, output_dir)
    print(describe_plan(config, subjects, inputs, output_dir, there), flush=True)
    check_disk(output_dir, PNG_BYTES * (len(subjects) * sum(map(len, inputs.suite.values())) - there))
    check_subjects(config, subjects, inputs.image_size)
    with RunLock(output_dir):
        keys = draw_all(config, subjects, inputs, output_dir)
        pictures = {
            subject.name: {name: drawn_pictures(output_dir, subject, name) for name in inputs.suite}
            for subject in subjects
        }
        values, detections = judge_all(config, inputs, pictures)
        results = measure_all(config, inputs, pictures, values)
        for name, rows in exposed_parts(inputs, detections).items():
            results[name] += rows
        found = _as_json(config, subjects, inputs, keys, results, detections)
        found["seconds"] = round(time.perf_counter() - start, 2)
        _write(config, inputs, pictures, values, results, found, output_dir)
    lines = "\n".join([*found["result"], "", summary(results, inputs.suite)]).strip()
    return found | {"output_dir": str(output_dir), "summary": lines}


def draw_all(
    config: PipelineEvaluationConfig, subjects: list[Subject], inputs: EvaluationInputs, output_dir: Path
) -> dict[str, dict]:
    """Draw with one pipeline after the other; what decided each one's pictures, by its name."""
    size = inputs.image_size
    keys: dict[str, dict] = {}
    for subject in subjects:
        keys[subject.name] = draw_suite(subject, inputs.suite, output_dir, config, size)
        if "change" in config.metric_names:
            size = size or keys[subject.name]["image_size"]
    return keys


def judge_all(
    config: PipelineEvaluationConfig, inputs: EvaluationInputs, pictures: Mapping[str, Pictures]
) -> tuple[dict[str, Values], dict[str, dict]]:
    """Every picture's values, by pipeline, and how many exposed parts of each kind NudeNet found in each set."""
    values, detections = {}, {}
    reference = None
    for name, own in pictures.items():
        values[name] = judge_pictures(inputs.judges, inputs.suite, own, reference, config.batch_size, name)
        reference = reference or own
        if inputs.body is not None and inputs.body.exposed:
            detections[name] = {group: _counts(found) for group, found in inputs.body.exposed.items()}
            inputs.body.exposed = {}
    return values, detections


def _counts(found: list) -> dict[str, dict]:
    """By NudeNet's label: detections, the pictures with one, and what the paper calls the label."""
    return {
        label: {"paper": V2_NAMES.get(label, label), "detections": number, "pictures": pictures}
        for label, (number, pictures) in count(found).items()
    }


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


def measure_all(
    config: PipelineEvaluationConfig,
    inputs: EvaluationInputs,
    pictures: Mapping[str, Pictures],
    values: Mapping[str, Values],
) -> dict[str, list[Measurement]]:
    """Means, intervals, differences to the first pipeline, and distances of distributions, by pipeline."""
    attribute = None if inputs.classifier is None else inputs.classifier.attribute
    reference, results = None, {}
    for name, own in values.items():
        results[name] = measurements(inputs.suite, own, reference, attribute, config.seed)
        reference = reference or own
    for name, found in distances(config, inputs, pictures).items():
        results[name] += found
    return results


def _as_json(
    config: PipelineEvaluationConfig,
    subjects: list[Subject],
    inputs: EvaluationInputs,
    keys: Mapping[str, dict],
    results: Mapping[str, list[Measurement]],
    detections: Mapping[str, dict],
) -> dict:
    """evaluation.json: what was measured of whom, by what."""
    judges = {
        "classifier": None if inputs.classifier is None else config.judge,
        "classifier_accuracy": None if inputs.classifier is None else inputs.classifier.classifier.config.accuracy,
        "clip": None if inputs.clip is None else inputs.clip.name,
        "nudity": None if inputs.body is None else inputs.body.description,
        "identity": None if inputs.body is None or inputs.body.scorer is None else inputs.body.scorer.name,
        "extractor": None if inputs.extractor is None else config.extractor,
    }
    return {
        "concept": list(inputs.concept.phrasings),
        "neighbours": list(inputs.concept.siblings),
        "reference": subjects[0].name,
        "result": headline(results, inputs.suite, inputs.concept.name),
        "pipelines": {subject.name: asdict(subject) | keys[subject.name] for subject in subjects},
        "sets": {name: {"purpose": part.purpose, "num_images": len(part)} for name, part in inputs.suite.items()},
        "judges": judges,
        "results": {name: [asdict(found) for found in rows] for name, rows in results.items()},
        "exposed": detections,
        "notes": notes(inputs),
        "options": asdict(config),
    }


def _write(
    config: PipelineEvaluationConfig,
    inputs: EvaluationInputs,
    pictures: Mapping[str, Pictures],
    values: Mapping[str, Values],
    results: Mapping[str, list[Measurement]],
    found: dict,
    output_dir: Path,
) -> None:
    prompts = {
        group: [{"prompt": r.prompt, "seed": r.seed, "labels": row}
                for r, row in zip(part.requests, part.labels, strict=True)]
        for group, part in inputs.suite.items()
    }  # fmt: skip
    for name, own in values.items():
        numbers = {group: {m: _plain(v) for m, v in measures.items()} for group, measures in own.items()}
        write_json({"prompts": prompts, "values": numbers}, output_dir / name / "values.json")
    title = f"What is left of “{inputs.concept.name}”"
    remarks = [*READING, *_judged_by(found["judges"]), *found["notes"]]
    with atomic_path(output_dir / "evaluation.md") as temporary:
        temporary.write_text(markdown(results, title, [*found["result"], *remarks]), encoding="utf-8")
    write_page(
        output_dir / "report.html", title=title, found=found, notes=remarks, suite=inputs.suite, pictures=pictures,
        values=values, results=results, blurred=config.blurred, shown=config.pictures_shown,
        options=json.dumps(found["options"], indent=2, ensure_ascii=False),
    )  # fmt: skip
    write_json(found, output_dir / "evaluation.json")  # last: it says that all is there


READING = (
    "Each number is a mean over n pictures with its 95 % interval, by the bootstrap, or Wilson's near 0 and 100 %, "
    "where a bootstrap knows nothing of what has not been seen; below it, the difference to the first pipeline over "
    "the same prompts and seeds.",
    "Suppressed is not proven erased: whoever has the weights may train or attack the concept back.",
)


def _judged_by(judges: Mapping) -> list[str]:
    accuracy = judges["classifier_accuracy"]
    rights = "" if not accuracy else ", right in " + ", ".join(f"{v:.1%} ({k})" for k, v in accuracy.items())
    return [
        f"{name.capitalize()}: {judges[name]}{rights if name == 'classifier' else ''}."
        for name in ("classifier", "clip", "nudity", "identity", "extractor")
        if judges[name] is not None
    ]


def _plain(values: Tensor) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [value if value == value else None for value in values.tolist()]
