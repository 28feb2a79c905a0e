"""The picture of the robust study: how soon further training brings the concept back, and what robustness costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from studies.figures import save_figure
from studies.robust import BACK, CONTROLS, VECTORS, Numbers, curve, mean


def draw_robustness(concepts: Mapping[str, Mapping[str, Sequence[Numbers]]], path: Path) -> None:
    """Save a PNG with two panels a concept, of the means of seeds and searches: P of the concept over the steps of
    relearning; and over the change of kept pictures, P under vectors that a search found, which is low at the left in
    a model that forgot deep at no cost.

    Args:
        concepts: of robust.json.
    """
    figure = Figure(figsize=(4.2 * len(concepts) + 1.5, 6.5), layout="constrained")
    panels = figure.subplots(2, len(concepts), squeeze=False, sharey=True)
    colours = {
        row: f"C{number}" for number, row in enumerate(dict.fromkeys(r for of in concepts.values() for r in of))
    }
    for (concept, rows), relearning, price in zip(concepts.items(), *panels, strict=True):
        for row in rows:
            points, style = curve(rows, row), "o--" if row in CONTROLS else "o-"
            relearning.plot(list(points), list(points.values()), style, label=row, color=colours[row])
            change = mean(rows, row, "change")
            if row not in CONTROLS and change is not None:
                for marker, vectors in zip("os", VECTORS, strict=True):
                    found = mean(rows, row, vectors)
                    price.plot([change], [found if found is not None else float("nan")], marker, color=colours[row])
        relearning.axhline(BACK, color="grey", linewidth=0.8, linestyle=":")
        relearning.set(title=concept, xlabel="steps of relearning", ylim=(-0.03, 1.03))
        price.set(xlabel="change of kept pictures (RMS)", xlim=(0, None))
        relearning.grid(alpha=0.3)
        price.grid(alpha=0.3)
    panels[0, 0].set_ylabel("P(concept), asked by name")
    panels[1, 0].set_ylabel("P(concept), found vectors\n(round: one, square: four)")
    lines = {line.get_label(): line for axis in panels[0] for line in axis.get_lines() if line.get_label() in colours}
    figure.legend(lines.values(), lines.keys(), loc="outside right", fontsize=9)
    save_figure(figure, path)
