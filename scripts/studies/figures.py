"""Figures of the studies: written whole, grids and rows of samples, curves over the optimiser's steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.report.pictures import contact_sheet


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> str:
    """Save a matplotlib figure as a PNG, atomically, and return its file name."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    return path.name


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Grey images [N, 1, H, W] in [0, 1] as one picture [rows * H, columns * W]."""
    rows = -(-len(images) // columns)
    padded = torch.cat([images, torch.ones(rows * columns - len(images), *images.shape[1:])])
    height, width = images.shape[-2:]
    return padded.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)


def save_samples(rows: Mapping[str, Sequence[Tensor]], headings: Sequence[str], path: Path) -> None:
    """Save a PNG with a line a row of a table: under each heading its pictures, uint8 [N, 3, H, W], side by side."""
    figure = Figure(figsize=(12, 0.75 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), len(headings), squeeze=False)
    for axes, (title, parts) in zip(grid, rows.items(), strict=True):
        for axis, part in zip(axes, parts, strict=True):
            framed = pad(part.float() / 127.5 - 1, (0, 1, 0, 1), value=1.0)  # white between them
            axis.imshow(contact_sheet(framed, len(part)), interpolation="nearest", aspect="equal")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    for axis, heading in zip(grid[0], headings, strict=True):
        axis.set_title(heading, fontsize=10)
    save_figure(figure, path, dpi=150)


def save_histories(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], panels: Mapping[str, str], path: Path
) -> None:
    """Save a PNG of measures between 0 and 1 over the optimiser's steps, a line a run.

    Args:
        histories: the rows of each run's history.json, by what to call it.
        panels: {measure: what to call it}.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (key, heading) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, history in histories.items():
            rows = [row for row in history if key in row]
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], marker=".", label=name)
        axis.set(xlabel="optimiser step", ylabel=heading, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")
    save_figure(figure, path, dpi=130)
