"""Training curves: losses, EWC and, where it was recorded, how far the concept is forgotten, against the step."""

import io
from collections.abc import Mapping, Sequence
from typing import Any


# title of a panel: {key in the history: label of its line}
PANELS = {
    "Loss": {
        "surrogate_loss": "surrogate", "replay_loss": "replay samples", "adversary_loss": "surrogate, as found",
        "open_loss": "left open",
    },
    "EWC": {"ewc_penalty": "EWC"},
    "Forgetting": {"concept_probability": "concept probability", "retained_accuracy": "retained accuracy"},
}  # fmt: skip


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
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
