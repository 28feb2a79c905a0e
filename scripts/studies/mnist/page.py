"""The page of the MNIST study: what its parts found, in their order."""

import json
from pathlib import Path

from sa_diffusers.io.atomic_files import atomic_path, write_json
from sa_diffusers.report.page import write_page
from sa_diffusers.report.pictures import data_uri
from sa_diffusers.report.tables import markdown_table
from studies.mnist.attacks import recovery
from studies.mnist.latent import spaces
from studies.mnist.outliers import rarest
from studies.mnist.paper import results
from studies.mnist.projection import comparison
from studies.mnist.sequential import turns
from studies.mnist.spread import short_names
from studies.mnist.study import Study


PARTS = {
    "paper": results.compute,
    "sequential": turns.compute,
    "attacks": recovery.compute,
    "latent": spaces.compute,
    "outliers": rarest.compute,
    "projection": comparison.compute,
    "chain": turns.compute_chain,
}


def collect(study: Study) -> None:
    """Write study.json, study.md and report.html from the parts that are finished."""
    files = {name: study.folder / name / f"{name}.json" for name in PARTS}
    found = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    accuracy = {name: (judge.config.accuracy or {}).get("digit") for name, judge in study.classifiers.items()}
    write_json({"classifiers": accuracy, "parts": found}, study.folder / "study.json")
    with atomic_path(study.folder / "study.md") as temporary:
        temporary.write_text(_markdown(found))
    write_page(
        study.folder / "report.html",
        Path(__file__).with_suffix(".html.j2"),
        title=f"Selective Amnesia on {'MNIST' if study.base_config.dataset == 'mnist' else 'digits8x8'}",
        parts=found,
        missing=[name for name in PARTS if name not in found],
        picture=lambda part, file: data_uri((study.folder / part / file).read_bytes()),
        classifiers={short_names(accuracy)[name]: value for name, value in accuracy.items()},
        settings={key: value for key, value in vars(study.config).items() if value is not None},
        steps=study.base_config.num_train_steps,
    )


def _markdown(found: dict[str, dict]) -> str:
    return "\n\n".join(f"## {part['title']}\n\n{part_markdown(part)}" for part in found.values()) + "\n"


def part_markdown(part: dict) -> str:
    """What a part says, its paragraphs and then its tables, but those of every classifier, which the page has."""
    tables = [one for one in part["tables"] if "every classifier" not in one["title"]]
    shown = [f"**{one['title']}**\n\n{markdown_table(one['columns'], one['rows'])}" for one in tables]
    return "\n\n".join([*part["text"], *shown])
