"""The pictures of a table of methods: erasure against damage at every strength, and what each method draws."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from studies.figures import save_figure, save_samples
from studies.rivals.matching import ERASED


PANELS = {
    "retained": "other classes right",
    "worst": "worst other class right",
    "attributes": "other attributes right",
    "change": "change of kept pictures (RMS)",
}
LEAST = 1e-3  # probabilities below are drawn here: the axis is logarithmic


def draw_curves(lines: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Save a PNG with one panel a measure, one line a method over its strengths.

    Args:
        lines: {method: {measure: [(P of the concept in unseen phrasings, value), ...]}}, weakest first.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    for axis, (measure, heading) in zip(figure.subplots(2, 2).ravel(), PANELS.items(), strict=True):
        for number, (method, measures) in enumerate(lines.items()):
            x = [max(LEAST, erasure) for erasure, _ in measures[measure]]
            y = [value for _, value in measures[measure]]
            style = "o-" if number < 10 else "s--"  # ten colours come round again
            axis.plot(x, y, style, markersize=4, linewidth=1.2, label=method, color=f"C{number % 10}")
        axis.axvline(ERASED, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="P(concept), unseen phrasings", title=heading)
        axis.invert_xaxis()  # to the right: more is forgotten
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right", fontsize=9)
    save_figure(figure, path, dpi=120)


def draw_samples(rows: Mapping[str, Tensor], concept: str, path: Path) -> None:
    """Save a PNG with a line a method: pictures that ask for the concept, then others, the same seeds throughout.

    Args:
        rows: uint8 [2 n, 3, H, W], n of each.
    """
    parts = {method: pictures.split(len(pictures) // 2) for method, pictures in rows.items()}
    save_samples(parts, (f"asked for “{concept}”", "asked for others"), path)
