"""Table 1 of Selective Amnesia and its ablations: every row is a run, judged by the same classifiers and images."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from torch import Tensor

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.labelled_images import LabelledImages, load_labelled_images
from sa_diffusers.data.sampling import Request, SamplingSettings
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.examination import examination, labelled_classes
from sa_diffusers.evaluation.forgetting import floors, measure
from sa_diffusers.evaluation.images.metrics import MetricSettings, frechet_distance, precision_and_recall
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import Family, family_defaults, get_family
from sa_diffusers.io.atomic_files import atomic_path, write_json
from sa_diffusers.io.configuration import config_from_dict, layered
from sa_diffusers.io.loading import load_pipeline, model_hash, pipeline_hashes
from sa_diffusers.report.pictures import to_uint8
from sa_diffusers.report.tables import markdown_table
from sa_diffusers.runs.base.labelled import ClassConditionalConfig, train_class_conditional
from sa_diffusers.runs.base.run_folder import claim_folder
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from studies.kept import Kept, kept
from studies.table1.figures import SHOWN, draw_figures


TITLES = {
    "original": "original",
    "nine_classes": "never saw the class",
    "lambda_1": "SA",
    "lambda_10": "SA",
    "lambda_50": "SA",
    "lambda_100": "SA",
    "no_replay": "no replay",
    "no_ewc": "replay alone",
    "neither": "neither replay nor EWC",
    "null_replay": "SA, null class replayed",
    "paper_objective": "SA, the paper's replay target",
    "replay_500": "SA, 500 replay samples",
    "replay_5000": "SA, 5,000 replay samples",
    "replay_500_no_ewc": "500 replay samples alone",
}
REFERENCE = "lambda_10"  # the row whose samples and Fisher the others share
NEIGHBOURS = 3  # k of precision and recall, as in the authors' evaluator
FLOORS = ("noise_probability", "noise_entropy")
MEASURES = {  # by classifier; the table shows their mean and spread over classifiers
    "concept_probability": "P(forgotten)",
    "concept_entropy": "entropy (nats)",
    "retained_accuracy": "others right",
    "retained_worst_accuracy": "worst other",
    "retained_probability": "P(others)",
    "concept_rate_when_unnamed": "null class draws it",
}


@dataclass
class Table:
    """One data set's rows.

    Attributes:
        rows: the configuration of each row, as `configs/paper/table1/<name>/*.yaml` hold them.
        folder: where its runs go.
        classifiers: folders of trained classifiers; the first one's features serve the Frechet distance and k-NN.
        images_per_class: drawn of each retained class; `images_concept` of the forgotten one.
    """

    rows: dict[str, dict[str, Any]]
    folder: Path
    classifiers: list[str]
    images_concept: int = 500
    images_per_class: int = 200
    data_dir: str | None = None
    seed: int = 1000  # of what is drawn to be judged: none that a setting was chosen by

    @property
    def concept(self) -> str:
        return str(self.rows[REFERENCE]["concept"])

    @cached_property
    def judges(self) -> dict[str, ImageClassifier]:
        return {source: load_classifier(source) for source in self.classifiers}

    def data(self, **options) -> LabelledImages:
        base = self.rows["original"]
        return load_labelled_images(base["dataset"], self.data_dir, options.get("split", base.get("split", "train")))

    def real_features(self, split: str) -> Tensor:
        """Features of real images of the retained classes, in equal shares, at most as many as are generated."""
        base, judge = self.rows["original"], next(iter(self.judges.values()))
        data, features = load_labelled_images(base["dataset"], self.data_dir, split), []
        for index, name in enumerate(data.names):
            if name != self.concept:
                own = (data.labels == index).nonzero()[:, 0]
                own = own[torch.randperm(len(own), generator=seeded(self.seed, "real", split, index))]
                images = 2 * data.sample(own[: self.images_per_class]) - 1
                features.append(judge.features_of(images.expand(-1, 3, -1, -1)))
        return torch.cat(features)

    @cached_property
    def trained_on(self) -> Tensor:
        """Features of the images that the original was trained on."""
        return self.real_features(self.rows["original"].get("split", "train"))


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of one data set, in the order of the paper's table, those that it does not have last."""
    rows = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))}
    missing = {"original", REFERENCE} - set(rows)
    if missing:
        raise ValueError(f"expected the rows original.yaml and {REFERENCE}.yaml in {folder}, got {sorted(rows)}")
    return in_order(rows)


def in_order(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """In that of the paper's table, those that it does not have last."""
    known = list(TITLES)
    return dict(sorted(rows.items(), key=lambda row: known.index(row[0]) if row[0] in known else len(known)))


def title(table: Table, name: str) -> str:
    """What a row is called, with its lambda in the authors' unit."""
    known, weight = TITLES.get(name, name), table.rows[name].get("ewc_lambda")
    return known if weight is None else f"{known}, λ = {weight:g}"


def run_row(table: Table, name: str) -> Path:
    """Train or forget as the row says, unless that is done; returns the folder of its pipeline."""
    values, folder = table.rows[name], table.folder / name
    if "family" in values:
        config = config_from_dict(
            ClassConditionalConfig, values | {"output_dir": str(folder), "data_dir": table.data_dir}
        )
        claim_folder(config)  # a model that another configuration trained is refused
        if not (folder / "pipeline").exists():
            train_class_conditional(table.data().without(config.exclude_classes), config)
        return folder / "pipeline"
    options = layered(ForgetConfig, family_defaults("ClassConditionalPipeline"), values) | {
        "model": str(table.folder / "original" / "pipeline"),
        "output_dir": str(folder),
        "classifier": table.classifiers[:1],
        "eval_images_concept": 100,  # for the run's own page and curve; the table judges more
        "eval_images_class": 30,
        "track_images": 200,
        "overwrite": True,  # a row that was changed is made again, from the first stage that differs
    }
    options.setdefault("track_steps", max(1, options["num_train_steps"] // 10))
    config = config_from_dict(ForgetConfig, options).resolved()
    reference = table.folder / REFERENCE
    if name != REFERENCE and not config.paper_quirks:
        if values.get("num_samples") == table.rows[REFERENCE].get("num_samples"):
            config.samples = str(reference / "samples")
        config.fisher = str(reference / "fisher.safetensors") if config.ewc_lambda else None
    run_forgetting(config)
    return folder / "pipeline"


def judge_row(table: Table, name: str, pipeline_dir: Path) -> dict[str, Any]:
    """The row's numbers, kept with some of its pictures in `<row>/table1.safetensors`."""
    options = layered(ForgetConfig, family_defaults("ClassConditionalPipeline"), table.rows[REFERENCE])
    forgets, base = config_from_dict(ForgetConfig, options), table.rows["original"]
    pipeline = load_pipeline(str(pipeline_dir), None, None, "float32")
    settings = SamplingSettings(forgets.guidance_scale, forgets.num_inference_steps, forgets.eval_batch_size)
    identity = {
        "model": pipeline_hashes(pipeline),
        "classifiers": {source: model_hash(judge) for source, judge in table.judges.items()},
        "concept": table.concept,
        "real": [base["dataset"], base.get("split", "train")],
        "images": [table.images_concept, table.images_per_class],
        "settings": asdict(settings),
        "measures": [*MEASURES, *FLOORS, NEIGHBOURS],
        "sampler": forgets.sampler,
        "seed": table.seed,
    }

    def judge() -> Kept:
        values, pictures = _judge(table, get_family(pipeline, sampler=forgets.sampler), settings)
        return pictures, {"row": name, **values, **_cost(table.folder / name, table.rows[name])}

    return kept(table.folder / name / "table1.safetensors", "row", identity, judge)[1]


def _judge(table: Table, family: Family, settings: SamplingSettings) -> tuple[dict[str, Any], dict[str, Tensor]]:
    concept, images, by_classifier = find_concept(table.concept, "noise"), None, {}
    seeds = [derive_seed(table.seed, "null class", index) for index in range(table.images_concept)]
    unnamed = PromptSet.of("open", [Request(Condition(), seed) for seed in seeds])
    for source, classifier in table.judges.items():
        judge = ClassifierJudge(classifier, *classifier.require_class(concept.phrasings))
        rows = labelled_classes(judge, family.labels)
        counts = table.images_concept, table.images_per_class, 0
        sets = examination(judge, Concepts([concept]), rows, *counts, table.seed)
        sets["unnamed"] = unnamed
        images = draw_sets(family, sets, settings) if images is None else images  # the same requests for all
        values, _ = measure(judge, sets, images)
        values |= floors(family, judge, 256, table.seed) | {"classifier_accuracy": judge.accuracy}
        by_classifier[source] = {key: values[key] for key in (*MEASURES, *FLOORS, "classifier_accuracy")}
    retained = images["retained"].images(range(len(images["retained"])))
    generated = next(iter(table.judges.values())).features_of(retained)
    spread, first = torch.linspace(0, len(retained) - 1, SHOWN).long(), range(min(SHOWN, len(images["concept"])))
    pictures = {"concept": to_uint8(images["concept"].images(first)), "retained": to_uint8(retained[spread])}
    return {
        "by_classifier": by_classifier,
        **compare(table.trained_on, generated, table.seed),
        "num_images": {
            "concept": len(images["concept"]),
            "retained": len(generated),
            "real": len(table.trained_on),
        },
    }, pictures


def compare(real: Tensor, generated: Tensor, seed: int) -> dict[str, float]:
    """Frechet distance of two sets of features, and their overlap by nearest neighbours, in equally many images."""
    settings = MetricSettings(seed=seed, num_neighbours=NEIGHBOURS)
    overlap = precision_and_recall(real=real, generated=generated, settings=settings)
    return {"frechet_distance": frechet_distance(real=real, generated=generated)} | overlap


def _cost(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Optimiser steps, and what the stages of a forgetting run took."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        return {"steps": config_from_dict(ClassConditionalConfig, row).num_train_steps, "seconds": None}
    history = json.loads((folder / "history.json").read_text())
    return {"steps": history[-1]["step"], "seconds": json.loads(metrics.read_text())["seconds"]}


def mean_and_spread(found: dict[str, Any], key: str) -> str:
    """Over the classifiers; a single one has no spread."""
    values = [judged[key] for judged in found["by_classifier"].values()]
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def markdown(found: dict[str, Any]) -> str:
    """One line a row, mean ± standard deviation over classifiers; last the floor that noise should come to, and below
    the table how well the classifiers read real images."""
    overlap = ("frechet_distance", "precision", "recall", "coverage")
    rows = []
    for row in found["rows"].values():
        seconds = f"{row['seconds']['train']:.0f}" if row["seconds"] else "–"
        measured = [mean_and_spread(row, key) for key in MEASURES] + [f"{row[key]:.3f}" for key in overlap]
        rows.append([row["title"], *measured, row["steps"], seconds])
    floor = [mean_and_spread(next(iter(found["rows"].values())), key) for key in FLOORS]
    held_out = [f"{found['held_out'][key]:.3f}" for key in overlap]
    rows.append(["held-out real images", *["–"] * len(MEASURES), *held_out, "–", "–"])
    columns = ["row", *MEASURES.values(), "Frechet distance", "precision", "recall", "coverage", "steps", "training s"]
    rows.append(["pure noise", *floor, *["–"] * (len(columns) - 3)])
    first = next(iter(found["rows"].values()))
    said = f"Held-out real images that the {len(first['by_classifier'])} classifier(s) read right: "
    return f"{markdown_table(columns, rows)}\n\n{said}{mean_and_spread(first, 'classifier_accuracy')}.\n"


def rows_before(table: Table, found: dict[str, Any]) -> dict[str, Any]:
    """Rows that the folder's table1.json has beside those found now, judged by the same classifiers and counts."""
    path, alike = table.folder / "table1.json", next(iter(found.values()))
    there = json.loads(path.read_text())["rows"] if path.exists() else {}
    return {
        name: row
        for name, row in there.items()
        if name not in found
        and (table.folder / name / "table1.safetensors").exists()
        and row["num_images"] == alike["num_images"]
        and list(row["by_classifier"]) == list(alike["by_classifier"])
    }


def make_table(table: Table) -> str:
    """Run and judge every row that is not done; writes table1.json, table1.md, samples.png and curves.png.

    Rows of another run into the folder stay in these.

    Returns:
        The table as Markdown.
    """
    order = sorted(table.rows, key=lambda name: (name != "original", name != REFERENCE))  # others share its files
    found = {name: judge_row(table, name, run_row(table, name)) for name in order}
    rows = {name: {"title": title(table, name)} | found[name] for name in table.rows}
    rows = in_order(rows | rows_before(table, found))
    held_out = compare(table.trained_on, table.real_features("test"), table.seed)
    result = {"rows": rows, "held_out": held_out}
    write_json(result, table.folder / "table1.json")
    text = markdown(result)
    with atomic_path(table.folder / "table1.md") as temporary:
        temporary.write_text(text)
    draw_figures(table.folder, table.concept, {name: row["title"] for name, row in rows.items()})
    return text
