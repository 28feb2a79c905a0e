"""Curves: losses, EWC and how far the concept is forgotten against the step; errors against the size of holes."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# title of a panel: {key in the history: label of its line}
PANELS = {
    "Loss": {
        "surrogate_loss": "surrogate", "replay_loss": "replay samples", "adversary_loss": "surrogate, as found",
        "open_loss": "left open", "forget_loss": "pictures to forget", "retain_loss": "pictures to retain",
        "l1": "l1 of the weights",
    },
    "EWC": {"ewc_penalty": "EWC"},
    "Forgetting": {"concept_probability": "concept probability", "retained_accuracy": "retained accuracy"},
}  # fmt: skip
SIZED = ("ring", "top", "bottom", "left", "right")  # holes that are named with a share of the side
OF_HOLES = {"masked_mse": "Error of hidden pixels", "accuracy": "Accuracy"}
SIDES = {"before": "o--", "after": "o-", "retrained": "o:"}


def curves_png(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Losses, EWC (log scale over two decades) and, where recorded, forgetting, against the step, as a PNG.

    Args:
        history: {"step": int} and values by the keys of PANELS; one that is missing or None leaves a gap.
    """
    import matplotlib.style  # takes most of a second
    from matplotlib.figure import Figure

    keys = [key for lines in PANELS.values() for key in lines]
    series = {key: [(row["step"], row[key]) for row in history if row.get(key) is not None] for key in keys}
    panels = [title for title, lines in PANELS.items() if title != "Forgetting" or any(map(series.get, lines))]
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(4.6 * len(panels), 3.2), layout="constrained")
        for axes, title in zip(figure.subplots(1, len(panels)), panels, strict=True):
            axes.set(title=title, xlabel="optimiser step")
            axes.grid(alpha=0.25)
            for key, label in PANELS[title].items():
                if series[key]:
                    axes.plot(*zip(*series[key], strict=True), label=label, linewidth=1.4)
            if axes.lines:
                axes.legend(frameon=False)
            else:
                axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
            if title == "EWC" and (positive := [value for _, value in series["ewc_penalty"] if value > 0]):
                axes.set_yscale("log" if max(positive) > 100 * min(positive) else "linear")
        return figure_png(figure)


def figure_png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def holes_figure(metrics: Mapping[str, Any], masks: Sequence[str]) -> "Figure | None":
    """Errors and accuracy against the size of holes, a row a kind that was judged in several; None: there is none.

    Args:
        metrics: "before", "after" and maybe "retrained", as metrics.json has them; those of the first mask are not
            named by it.
        masks: judged under, such as "left 25"; without a number it is 50.
    """
    sizes: dict[str, dict[int, str]] = {}
    for mask in masks if "forget" in metrics["after"] else ():
        kind, _, share = mask.partition(" ")
        sizes.setdefault(kind, {})[int(share or 50)] = f", {mask}" if mask != masks[0] else ""
    several = {kind: sorted(sizes[kind].items()) for kind in SIZED if len(sizes.get(kind, ())) > 1}
    if not several:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.2 * len(several)), layout="constrained")
    rows = figure.subplots(len(several), len(OF_HOLES), squeeze=False)
    for (kind, found), row in zip(several.items(), rows, strict=True):
        for axes, (key, title) in zip(row, OF_HOLES.items(), strict=True):
            axes.set(title=title, xlabel=f"{kind}, % of the side", xticks=[share for share, _ in found])
            for side, style in SIDES.items():
                for colour, group in enumerate(("forget", "retain", "third")):
                    known = [(share, metrics.get(side, {}).get(group + name, {}).get(key)) for share, name in found]
                    if points := [point for point in known if point[1] is not None]:
                        axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=f"{group}, {side}")
            if axes.lines:
                axes.legend(frameon=False, fontsize=7)
    return figure
