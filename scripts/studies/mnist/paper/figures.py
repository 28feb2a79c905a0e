"""Figures of the paper's results: samples side by side, and what each classifier reads."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from studies.figures import image_grid
from studies.mnist.spread import FLOORS, Values
from studies.mnist.study import Study, draw


OF_CONCEPT, OF_OTHERS = 4, 2  # pictures of each digit in a row
MARKERS = "osD"
GREY_LINE, NOISE_LINE = {"color": "black", "linestyle": "-"}, {"color": "tab:red", "linestyle": ":"}


def samples_by_digit(study: Study, pipelines: Mapping[str, Path], title: str, of_first: int = OF_OTHERS) -> Figure:
    """A row of samples for each model, all from the same latents: `of_first` of the first digit, OF_OTHERS of each."""
    labels = study.load(study.base()).labels
    counts = {index: OF_OTHERS if index else of_first for index in range(len(labels))}
    rows = {name: _samples(study, pipeline, counts) for name, pipeline in pipelines.items()}
    return _rows_figure(rows, dict(zip(labels, counts.values(), strict=True)), title)


def _samples(study: Study, pipeline: Path, counts: Mapping[int, int]) -> Tensor:
    """So many pictures of each digit, [N, 1, H, W]."""
    model, seed = study.load(pipeline), study.config.seed
    return torch.cat([draw(model, label, count, seed) for label, count in counts.items()])


def _rows_figure(rows: Mapping[str, Tensor], groups: Mapping[str, int], title: str) -> Figure:
    """Rows of images [N, 1, H, W] under their names; `groups` names so many columns each, parted by lines."""
    columns = sum(groups.values())
    height, width = next(iter(rows.values())).shape[-2:]
    figure = Figure(figsize=(1.6 + 0.45 * columns, 0.9 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    picture = image_grid(torch.cat(list(rows.values())), columns).numpy()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, columns, len(rows), 0), aspect=height / width)
    ends = torch.tensor([0, *groups.values()]).cumsum(0).tolist()
    middles = [(start + end) / 2 for start, end in zip(ends, ends[1:], strict=False)]
    for end in ends[1:-1]:
        axes.axvline(end, color="tab:orange", linewidth=1)
    for row in range(1, len(rows)):
        axes.axhline(row, color="white", linewidth=1)
    axes.set_xticks(middles, list(groups))
    axes.set_yticks([row + 0.5 for row in range(len(rows))], list(rows))
    axes.tick_params(length=0, labelsize=11)
    axes.set_title(title, fontsize=12)
    axes.xaxis.tick_top()
    return figure


def classifier_points(every: Mapping[str, Values]) -> Figure:
    """P(0) and entropy of each model by classifier, with what that classifier says of grey and noise as lines."""
    floors = next(iter(every.values()))
    names = list(floors)
    figure = Figure(figsize=(max(9.0, 2.2 + 1.4 * len(names)), 4.6), layout="constrained")
    panels = (("concept_probability", "P(0)"), ("concept_entropy", "entropy (nats)"))
    for column, (axes, (key, label)) in enumerate(zip(figure.subplots(1, 2), panels, strict=True)):
        for place, (title, values) in enumerate(every.items()):
            positions = [index + 0.16 * (place - (len(every) - 1) / 2) for index in range(len(names))]
            axes.plot(positions, [values[name][key] for name in names], MARKERS[place], markersize=7, label=title)
        for (title, keys), style in zip(FLOORS.items(), (GREY_LINE, NOISE_LINE), strict=True):
            heights = [floors[name][keys[column]] for name in names]
            starts = [index - 0.35 for index in range(len(names))]
            axes.hlines(heights, starts, [start + 0.7 for start in starts], label=title, linewidth=1.8, **style)
        axes.set_xticks(range(len(names)), names, rotation=20, fontsize=10)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_title(label, fontsize=12)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    return figure
