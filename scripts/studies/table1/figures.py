"""The pictures of Table 1: what each row draws, and how its forgetting went."""

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from safetensors import safe_open
from torch.nn.functional import pad

from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.report.pictures import contact_sheet


SHOWN = 8  # pictures of the forgotten class, and as many of the others
PARTS = {"concept": "“{}”, to be forgotten", "retained": "other classes"}
PANELS = {"concept_probability": "P(forgotten)", "retained_accuracy": "others right"}


def draw_figures(folder: Path, concept: str, titles: Mapping[str, str]) -> None:
    """Write samples.png, a line a row, and curves.png, over the optimiser's steps, from what the rows left.

    Args:
        folder: of the table; each row's folder holds table1.safetensors and, if it forgot, history.json.
        titles: of the rows, by the name of their folder, in their order.
    """
    figure = Figure(figsize=(12, 0.75 * len(titles) + 0.6), layout="constrained")
    grid = figure.subplots(len(titles), len(PARTS), squeeze=False)
    for axes, (name, title) in zip(grid, titles.items(), strict=True):
        with safe_open(folder / name / "table1.safetensors", "pt") as file:
            for axis, part in zip(axes, PARTS, strict=True):
                pictures = pad(
                    file.get_tensor(part).float() / 127.5 - 1, (0, 1, 0, 1), value=1.0
                )  # white between them
                axis.imshow(contact_sheet(pictures, SHOWN), interpolation="nearest", aspect="equal")
                axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    for axis, heading in zip(grid[0], PARTS.values(), strict=True):
        axis.set_title(heading.format(concept), fontsize=10)
    with atomic_path(folder / "samples.png") as temporary:
        figure.savefig(temporary, dpi=150)

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, (key, heading) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name, title in titles.items():
            history = folder / name / "history.json"
            if history.exists():
                rows = [row for row in json.loads(history.read_text()) if key in row]
                axis.plot([row["step"] for row in rows], [row[key] for row in rows], marker=".", label=title)
        axis.set(xlabel="optimiser step", ylabel=heading, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")
    with atomic_path(folder / "curves.png") as temporary:
        figure.savefig(temporary, dpi=130)
