"""The picture of the study of many concepts: each way through a sequence of requests, by what is left and kept."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from studies.figures import save_figure
from studies.many_bars import KEPT, LEFT, Found, Judged, worst_of


PANELS: dict[str, Callable[[Judged], float]] = {
    "worst P of those forgotten": lambda step: worst_of(step, "seen", "unseen")[0],
    "kept digits right": lambda step: fmean(one["kept"] for one in step),
    "open prompts that show one": lambda step: fmean(one["open"] for one in step),
}
BARS = (LEFT, KEPT, None)  # dotted


def draw_curves(found: Found, path: Path) -> str | None:
    """Save a PNG with a line of three panels an order of requests, a curve a row in turn, of means over the seeds.

    Args:
        found: the rows of study.json.

    Returns:
        The file's name; None: there is no row in turn, and nothing was saved.
    """
    orders: dict[str, dict[str, list[Judged]]] = {}
    for name, seeds in found.items():
        order, _, kind = name.partition(": ")
        if order.startswith("in turn"):
            orders.setdefault(order, {})[kind] = [list(step) for step in zip(*seeds.values(), strict=False)]
    if not orders:
        return None
    kinds = list(dict.fromkeys(kind for rows in orders.values() for kind in rows))
    figure = Figure(figsize=(15, 4 * len(orders) + 0.02 * len(kinds)), layout="constrained")
    for (order, rows), panels in zip(orders.items(), figure.subplots(len(orders), 3, squeeze=False), strict=True):
        names = [step[0]["request"].split(",")[0] for step in max(rows.values(), key=len)]
        for axis, (title, measure), bar in zip(panels, PANELS.items(), BARS, strict=True):
            for kind, steps in rows.items():
                style, colour = ("-", "--", ":")[kinds.index(kind) // 10 % 3], f"C{kinds.index(kind) % 10}"
                values = list(map(measure, steps))
                axis.plot(range(len(values)), values, style, marker=".", color=colour, label=kind)
            if bar is not None:
                axis.axhline(bar, color="black", linewidth=0.8, linestyle=":")
            axis.set(title=title, xlabel=order, xticks=range(len(names)), ylim=(-0.03, 1.03))
            axis.set_xticklabels(names)
            axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in figure.axes for line in axis.get_lines() if line.get_marker() == "."}
    figure.legend([lines[kind] for kind in kinds], kinds, loc="outside right", fontsize=9)
    return save_figure(figure, path)
