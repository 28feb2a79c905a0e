"""Figures of sequential forgetting: samples, matrices and curves by round."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.figures import image_grid
from studies.mnist.sections import figure
from studies.mnist.sequential.rounds import DIGITS, STUDY_PROBABILITIES, WATCHED, Round, retained, stage_names
from studies.mnist.study import Study, draw


COLUMNS = 10  # latents in a grid of samples
PANELS = (2, 3)  # the original and five rounds


def save_grids(study: Study, pipelines: Sequence[Path], variant: str, path: Path) -> dict:
    """Samples after each round: a row for each digit asked for, a column for each latent, the same in every panel."""
    drawn = Figure(figsize=(13, 9.2), layout="constrained")
    drawn.suptitle(f"Samples by round, {variant} variant: a row a digit asked for, a column a latent", fontsize=13)
    for axes, stage, folder in zip(drawn.subplots(*PANELS).ravel(), stage_names(), pipelines, strict=True):
        pipeline = study.load(folder)
        count = len(pipeline.labels)
        images = torch.cat([draw(pipeline, label, COLUMNS, study.config.seed) for label in range(count)])
        extent = (0, COLUMNS, count, 0)
        picture = image_grid(images, COLUMNS).numpy()
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        axes.set_title(stage, fontsize=12)
        axes.set_xticks([])
        axes.set_yticks([index + 0.5 for index in range(count)], pipeline.labels, fontsize=10)
        axes.tick_params(length=0)
    return figure(drawn, path, f"The {variant} variant, all models decoding the same {COLUMNS} latents.")


def save_matrices(rounds: Sequence[Round], variant: str, path: Path) -> dict:
    """Heat maps of the mean probabilities after each round, with the entropy beside every digit asked for."""
    drawn = Figure(figsize=(15, 9), layout="constrained")
    drawn.suptitle(f"Mean probability by digit asked for and digit read, {variant} variant", fontsize=13)
    panels = drawn.subplots(*PANELS)
    for axes, stage, found in zip(panels.ravel(), stage_names(), rounds, strict=True):
        image = _heat_map(axes, found)
        axes.set_title(stage, fontsize=12)
    drawn.colorbar(image, ax=panels, shrink=0.6, label="mean probability")
    said = "means over pictures and classifiers in per cent. H is the mean entropy in nats."
    return figure(drawn, path, f"The {variant} variant: {said}")


def _heat_map(axes: Axes, found: Round):
    matrix, entropies = found.probabilities.mean(0), found.entropies.mean(0)
    count = len(matrix)
    image = axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            color = "white" if value > 0.5 else "black"
            text = axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
            text.set_in_layout(False)  # inside the map: nothing to make room for, and there are hundreds of them
    axes.set_xticks(range(count))
    axes.set_yticks(range(count), [f"{digit} (H {value:.2f})" for digit, value in enumerate(entropies.tolist())])
    axes.set_xlabel("read")
    axes.set_ylabel("asked for")
    return image


def save_curves(rounds: Mapping[str, Sequence[Round]], path: Path) -> dict:
    """By round: accuracy on the digits still retained, P(WATCHED), and how far the forgotten digits are from grey."""
    drawn = Figure(figsize=(14, 4.4), layout="constrained")
    panels = drawn.subplots(1, 3)
    numbers = range(len(DIGITS) + 1)
    for place, (variant, own) in enumerate(rounds.items()):
        count = own[0].own.shape[1]
        accuracies = [found.accuracies[:, retained(number, count)].mean(1) for number, found in enumerate(own)]
        watched = [found.own[:, WATCHED] for found in own]
        for axes, values in zip(panels, (accuracies, watched), strict=False):
            # The bars of two variants would hide each other.
            positions = [number + 0.08 * (place - 0.5) for number in numbers]
            spreads = [value.std().item() if len(value) > 1 else 0.0 for value in values]
            axes.errorbar(positions, [v.mean().item() for v in values], spreads, marker="o", capsize=3, label=variant)
        furthest = [own[number].distances[list(DIGITS[:number])].max().item() for number in numbers[1:]]
        panels[2].plot(numbers[1:], furthest, marker="o", label=variant)
    panels[1].plot(numbers, STUDY_PROBABILITIES, "k--", marker="s", label="the study")
    titles = ("accuracy on digits still retained", f"P({WATCHED})", "forgotten digits: largest distance from grey")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=12)
        axes.set_xticks(numbers, stage_names(), rotation=20)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=10)
    panels[2].set_ylim(bottom=0)
    caption = (
        "Left and middle: mean and standard deviation over the classifiers. The distance from grey is the mean of "
        "|pixel − .5| of the forgotten digit that is furthest from it; a drawn digit has about .4."
    )
    return figure(drawn, path, caption)
