"""Judge text-to-image pipelines side by side: draw what is missing, measure, write numbers, tables and a page."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from sa_diffusers.evaluation.drawing import count_pictures, draw_suite
from sa_diffusers.evaluation.images.comparison import SHARES
from sa_diffusers.evaluation.images.metrics import FeatureSet, compute_features, image_metrics
from sa_diffusers.evaluation.images.sets import ImageFolder, ImageSet
from sa_diffusers.evaluation.judges.nudity import V2_NAMES
from sa_diffusers.evaluation.judging import Values, judge_pictures
from sa_diffusers.evaluation.measurements import (
    MEASURES,
    Measurement,
    cell,
    headline,
    markdown,
    measurements,
    summary,
    tables,
)
from sa_diffusers.evaluation.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.subjects import check_subjects, open_subjects
from sa_diffusers.evaluation.suite.inputs import EvaluationInputs, describe_plan, read_inputs
from sa_diffusers.evaluation.suite.sections import figures, sections
from sa_diffusers.io.artifacts import check_foreign, run_lock
from sa_diffusers.io.atomic_files import check_disk, write_json, write_text
from sa_diffusers.io.configuration import public_values
from sa_diffusers.io.model_names import folder_name
from sa_diffusers.io.processes import process_state, say
from sa_diffusers.report.page import write_page


PNG_BYTES = 500_000  # an upper bound for a picture of 512 pixels a side; small ones take less
READING = (
    "Each number is a mean over n pictures with its 95 % interval: of shares Wilson's, of their differences Bonett "
    "and Price's, else Student's. Pictures of one prompt count for what they tell of others; a single picture tells "
    "nothing of them, and has no interval, and a single prompt's interval is of that prompt alone. Below it, the "
    "difference to the first pipeline over the same prompts and seeds.",
    "Suppressed is not proven erased: whoever has the weights may train or attack the concept back.",
)
Pictures = Mapping[str, Mapping[str, ImageSet]]  # by pipeline, the reference first, and by set


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
    subjects = open_subjects(config.sources, config.names, config.drawn_as)
    inputs = read_inputs(config, subjects)
    suite, size, alike = inputs.suite, inputs.image_size, "change" in config.metric_names
    there = count_pictures(config, subjects, suite, output_dir)
    say(describe_plan(config, subjects, inputs, output_dir, there))
    check_disk(output_dir, PNG_BYTES * (len(subjects) * sum(map(len, suite.values())) - there))
    check_subjects(subjects, size, alike, config.variant)
    with run_lock(output_dir):
        pipelines, pictures = {}, {}
        for subject in subjects:
            drawn = draw_suite(subject, suite, output_dir, config, size)
            size = (size or drawn["image_size"]) if alike else size
            pipelines[subject.name] = asdict(subject) | drawn
            pictures[subject.name] = {name: ImageFolder(output_dir / subject.name / name) for name in suite}
        values, results = judge_all(config, inputs, pictures)
        document = {
            "concept": list(inputs.concept.phrasings),
            "neighbours": list(inputs.concept.siblings),
            "forgotten_besides": list(inputs.forgotten),
            "reference": subjects[0].name,
            "result": headline(results, suite, inputs.concept.name),
            "pipelines": pipelines,
            "sets": {name: {"purpose": part.purpose, "num_images": len(part)} for name, part in suite.items()},
            "judges": inputs.judged_by,
            "results": {name: [asdict(row) for row in rows] for name, rows in results.items()},
            "notes": inputs.notes,
            "options": asdict(config),
            "seconds": round(time.perf_counter() - start, 2),
        }
        shown = tables(results, suite)
        _write_values(inputs, values, output_dir)
        _write_page(config, inputs, document, shown, values, pictures, output_dir)
        write_json(document, output_dir / "evaluation.json")  # last: it says that all is there
    lines = "\n".join([*document["result"], "", summary(shown[0])]).strip()
    return document | {"output_dir": str(output_dir), "summary": lines}


def judge_all(
    config: PipelineEvaluationConfig, inputs: EvaluationInputs, pictures: Pictures
) -> tuple[dict[str, Values], dict[str, list[Measurement]]]:
    """Let every judge look at every picture, and sum up: by pipeline the values of each picture, and the means."""
    attribute = None if inputs.classifier is None else inputs.classifier.attribute
    first, values, results = next(iter(pictures)), {}, {}
    for name, own in pictures.items():
        reference = None if name == first else pictures[first]
        values[name] = judge_pictures(inputs.judges, inputs.suite, own, reference, config.batch_size, name)
        before = None if name == first else values[first]
        results[name] = measurements(inputs.suite, values[name], before, attribute)
    for more in (distances(config, inputs, pictures), exposed_parts(values)):
        for name, rows in more.items():
            results[name] += rows
    return values, results


def exposed_parts(values: Mapping[str, Values]) -> dict[str, list[Measurement]]:
    """How many parts of each kind NudeNet found, by the paper's names and as it counts them (Table 3).

    Of the sets in which there is one at all; "total" is all of them, and an image that shows several is one image.
    """
    found: dict[str, list[Measurement]] = {name: [] for name in values}
    for group in next(iter(values.values())):
        counts = {
            name: {paper: own[group][label] for label, paper in V2_NAMES.items() if label in own[group]}
            for name, own in values.items()
        }
        if any(part.any() for parts in counts.values() for part in parts.values()):
            for name, parts in counts.items():
                found[name] += [
                    Measurement(f"exposed parts: {group}", paper, int(part.sum()), None, len(part),
                                remark=f"in {int((part > 0).sum()):,} pictures")
                    for paper, part in {**parts, "total": sum(parts.values())}.items()
                ]  # fmt: skip
    return found


def distances(
    config: PipelineEvaluationConfig, inputs: EvaluationInputs, pictures: Pictures
) -> dict[str, list[Measurement]]:
    """fid, kid, is and prc of the kept sets' pictures, against the reference's own and against real images.

    No interval stands with them: a resampled set has its pictures several times, which moves the FID away from what
    it is of as many different ones, and the neighbours of precision and recall to distance 0.
    """
    if inputs.extractor is None:
        return {}

    def features(name: str, sets: Sequence[ImageSet]) -> FeatureSet:
        parts = [compute_features(inputs.extractor, part, config.batch_size) for part in sets]
        logits = [part.logits for part in parts if part.logits is not None]
        return FeatureSet(name, torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)

    drawn = {name: features(name, [own[group] for group in inputs.kept]) for name, own in pictures.items()}
    first = next(iter(drawn))
    against = {f"distance to {first}": drawn[first]}
    if inputs.real is not None:
        against["distance to real"] = features(inputs.real.name, [inputs.real])
    found: dict[str, list[Measurement]] = {name: [] for name in drawn}
    for group, real in against.items():
        for name, generated in drawn.items():
            if real is generated:
                continue
            numbers = image_metrics(
                real=real, generated=generated, metrics=config.compared, extractor=inputs.extractor, settings=config
            )
            shares = {key: value for key, value in numbers.pop("prc", {}).items() if key in SHARES}
            for key, value in (numbers | shares).items():
                value = value.get("generated", value) if isinstance(value, Mapping) else value
                mean = value["mean"] if isinstance(value, Mapping) else value
                found[name].append(Measurement(group, key, mean, None, len(generated.features)))
    return found


def _write_values(inputs: EvaluationInputs, values: Mapping[str, Values], output_dir: Path) -> None:
    """values.json of each pipeline: every picture's prompt, seed, labels and numbers."""
    prompts = {
        group: [{"prompt": candidate.prompt, "seed": request.seed, "labels": candidate.labels}
                for request, candidate in zip(part.requests, part.candidates, strict=True)]
        for group, part in inputs.suite.items()
    }  # fmt: skip
    for name, own in values.items():
        numbers = {  # JSON has no NaN
            group: {m: [one if one == one else None for one in found.tolist()] for m, found in measures.items()}
            for group, measures in own.items()
        }
        write_json({"prompts": prompts, "values": numbers}, output_dir / name / "values.json")


def _write_page(
    config: PipelineEvaluationConfig,
    inputs: EvaluationInputs,
    document: Mapping,
    shown: tuple[list, list],
    values: Mapping[str, Values],
    pictures: Pictures,
    output_dir: Path,
) -> None:
    """evaluation.md and report.html."""
    title, document = f"What is left of “{inputs.concept.name}”", public_values(document)
    accuracy = document["judges"]["classifier_accuracy"] or {}
    rights = ", ".join(f"{value:.1%} ({name})" for name, value in accuracy.items())
    said = {"classifier": f", right in {rights}" if rights else ""}
    remarks = [*READING, *document["notes"]]
    remarks[len(READING) : len(READING)] = [
        f"{name.capitalize()}: {by}{said.get(name, '')}."
        for name, by in document["judges"].items()
        if by is not None and name != "classifier_accuracy"
    ]
    write_text(markdown([*shown[0], *shown[1]], title, [*document["result"], *remarks]), output_dir / "evaluation.md")
    write_page(
        output_dir / "report.html", "evaluation.html.j2", title=title, found=document, notes=remarks, tables=shown,
        cell=cell, explanations={label: text for label, _, text in MEASURES.values()},
        sections=sections(inputs.suite, values, config.pictures_shown, document["reference"]),
        figures_of=partial(figures, inputs.suite, pictures, config.blurred), blurred=config.blurred,
        options=json.dumps(document["options"], indent=2, ensure_ascii=False),
    )  # fmt: skip
