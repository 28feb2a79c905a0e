"""The pictures of Table 1: what each row draws, and how its forgetting went."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from studies.figures import save_histories, save_samples


SHOWN = 8  # pictures of the forgotten class, and as many of the others
PARTS = {"concept": "“{}”, to be forgotten", "retained": "other classes"}
PANELS = {"concept_probability": "P(forgotten)", "retained_accuracy": "others right"}


def draw_figures(folder: Path, concept: str, titles: Mapping[str, str]) -> None:
    """Write samples.png, a line a row, and curves.png, over the optimiser's steps, from what the rows left.

    Args:
        folder: of the table; each row's folder holds table1.safetensors and, if it forgot, history.json.
        titles: of the rows, by the name of their folder, in their order.
    """
    pictures = {title: load_file(folder / name / "table1.safetensors") for name, title in titles.items()}
    headings = [heading.format(concept) for heading in PARTS.values()]
    rows = {title: [own[part] for part in PARTS] for title, own in pictures.items()}
    save_samples(rows, headings, folder / "samples.png")
    histories = {title: folder / name / "history.json" for name, title in titles.items()}
    found = {title: json.loads(path.read_text()) for title, path in histories.items() if path.exists()}
    save_histories(found, PANELS, folder / "curves.png")
