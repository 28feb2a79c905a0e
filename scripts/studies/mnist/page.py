"""The page of the MNIST study: what its parts found, in their order."""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2

from sa_diffusers.io.atomic_files import atomic_path, write_json
from sa_diffusers.report.page import TEMPLATES
from studies.mnist import outliers
from studies.mnist.attacks import recovery
from studies.mnist.latent import spaces
from studies.mnist.paper import results
from studies.mnist.projection import comparison
from studies.mnist.sequential import turns
from studies.mnist.study import Study


PARTS = {
    "paper": results.run,
    "sequential": turns.run,
    "attacks": recovery.run,
    "latent": spaces.run,
    "outliers": outliers.run,
    "projection": comparison.run,
}


def collect(study: Study) -> None:
    """Write study.json, study.md and report.html from the parts that are finished."""
    files = {name: study.folder / name / f"{name}.json" for name in PARTS}
    found = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    accuracy = {name: (judge.config.accuracy or {}).get("digit") for name, judge in study.classifiers.items()}
    write_json({"classifiers": accuracy, "parts": found}, study.folder / "study.json")
    with atomic_path(study.folder / "study.md") as temporary:
        temporary.write_text(_markdown(found))
    with atomic_path(study.folder / "report.html") as temporary:
        temporary.write_text(_html(study, found, accuracy))


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.4g}"


def _markdown(found: dict[str, dict]) -> str:
    blocks = []
    for part in found.values():
        blocks += [f"## {part['title']}", " ".join(part["text"])]
        for table in part["tables"]:
            rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
            lines = "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows)
            blocks.append(f"**{table['title']}**\n\n{lines}")
    return "\n\n".join(blocks) + "\n"


def _html(study: Study, found: dict[str, dict], accuracy: dict[str, float]) -> str:
    def picture(part: str, file: str) -> str:
        return "data:image/png;base64," + base64.b64encode((study.folder / part / file).read_bytes()).decode()

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = _cell
    names = {name: Path(name).parent.name if Path(name).name == "classifier" else name for name in accuracy}
    return environment.get_template("study.html.j2").render(
        title="Selective Amnesia on MNIST"
        if study.base_config.dataset == "mnist"
        else "Selective Amnesia on digits8x8",
        parts=found,
        missing=[name for name in PARTS if name not in found],
        picture=picture,
        classifiers={names[name]: value for name, value in accuracy.items()},
        settings={key: value for key, value in vars(study.config).items() if value is not None},
        steps=study.base_config.num_train_steps,
    )
