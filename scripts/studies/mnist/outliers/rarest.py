"""Part 5 of the study: what becomes of the rarest styles of the forgotten digit, and of those that were kept."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from studies.figures import image_grid
from studies.mnist.outliers.styles import NUM_PICTURES, Comparison, Styles, compare, styles_of
from studies.mnist.readings import DIGIT, NEARLY_GREY, forget_one
from studies.mnist.sections import figure, section, table
from studies.mnist.strips import Strip, strips_figure
from studies.mnist.study import Study


@dataclass(frozen=True)
class Cost:
    """A way to measure what forgetting costs: the rise of a measure, or its fall where `sign` is -1.

    Attributes:
        measure: a key of `Decoded.measures`.
        words: its name in a sentence.
    """

    measure: str
    sign: int
    words: str


COSTS = {
    "rise of BCE": Cost("bce", 1, "reconstruction error, nats a picture"),
    "fall of P(digit)": Cost("probability", -1, "probability of their digit"),
    "rise of entropy": Cost("entropy", 1, "entropy of the classifiers' readings, nats"),
}


def compute(study: Study, folder: Path) -> dict:
    """Trains, on first use, the model that forgot by default."""
    models, data, classifiers = forget_one(study), study.train_images, list(study.classifiers.values())
    styles = {name: styles_of(models, data, label, classifiers) for label, name in enumerate(data.names)}
    numbers = {name: each.numbers() for name, each in styles.items()}
    name = data.names[DIGIT]
    kept = {other: each for other, each in numbers.items() if other != name}
    comparisons = {
        name_of_cost: compare(*(_paid(kept, group, cost) for group in ("rarest", "typical")))
        for name_of_cost, cost in COSTS.items()
    }
    decoded = "the rarest first: real, and their codes decoded before and after forgetting."
    figures = [
        figure(
            _forgotten(styles[name], name),
            folder / "forgotten.png",
            f"The {NUM_PICTURES} rarest {name}s of the training set, {decoded} Beneath, the probability of their "
            "digit.",
        ),
        figure(
            _retained({other: styles[other] for other in kept}),
            folder / "retained.png",
            f"The {NUM_PICTURES} rarest of each retained digit, {decoded}",
        ),
        figure(
            _costs(kept),
            folder / "costs.png",
            f"What forgetting costs the {NUM_PICTURES} rarest and the {NUM_PICTURES} most typical images of each "
            "retained digit; BCE in nats a picture.",
        ),
    ]
    return {"title": "Outliers: the rarest styles of the forgotten and of the retained digits"} | section(
        [*_forgotten_text(name, numbers[name]), *_retained_text(kept, comparisons)],
        [_digit_table(numbers), _comparison_table(comparisons, len(kept))],
        figures,
        {"digits": numbers, "comparisons": {cost: asdict(each) for cost, each in comparisons.items()}},
    )


def _paid(kept: dict[str, dict], group: str, cost: Cost) -> list[float]:
    """What each digit's rarest or typical styles lost; below 0 they gained."""
    return [
        cost.sign * (each[group][cost.measure]["after"] - each[group][cost.measure]["before"])
        for each in kept.values()
    ]


def _forgotten_text(name: str, found: dict) -> list[str]:
    def say(group: str) -> str:
        bce, probability, entropy, deviation = (
            f"{found[group][measure]['before']:.3g} → {found[group][measure]['after']:.3g}"
            for measure in ("bce", "probability", "entropy", "deviation")
        )
        return (
            f"reconstruction error {bce} nats a picture, P({name}) {probability}, entropy {entropy} nats, deviation "
            f"from grey {deviation} (within {NEARLY_GREY:g} of it: {found[group]['nearly_grey']['before']:.0%} → "
            f"{found[group]['nearly_grey']['after']:.0%})"
        )

    rare, typical = (found[group]["deviation"]["after"] for group in ("rarest", "typical"))
    return [
        f"The {NUM_PICTURES} rarest of {found['images']:,} {name}s, by the Mahalanobis distance of their codes, "
        f"decoded before → after forgetting: {say('rarest')}. The study shows near-grey texture for all ten.",
        f"The {NUM_PICTURES} most typical: {say('typical')}. Rare {name}s are left "
        f"{'farther from' if rare > typical else 'no farther from'} grey than typical ones ({rare:.3f} against "
        f"{typical:.3f}, of .5).",
    ]


def _retained_text(kept: dict[str, dict], comparisons: dict[str, Comparison]) -> list[str]:
    lines = [
        "The study supposes that rare styles of the remembered digits suffer more, but shows only the forgotten "
        "digit's. Here both, as losses of the rarest and of the most typical images of the retained digits. The "
        "intervals are over the digits of one run (one base model, one forgetting run): they say how far the digits "
        "agree, not what another base model or another seed would give."
    ]
    for name, cost in COSTS.items():
        each = comparisons[name]
        lines.append(
            f"Loss in {cost.words}: {each.rarest:+.3g} for the rarest and {each.typical:+.3g} for the typical images "
            f"(difference {each.rarest - each.typical:+.3g}, 95 % interval {each.low:+.3g} to {each.high:+.3g} over "
            f"the {len(kept)} digits of this one run, of which {each.wins} with a larger loss for the rarest): the "
            f"rarest lose {each.verdict}."
        )
    before = [_mean(kept, group, "before") for group in ("rarest", "typical")]
    after = [_mean(kept, group, "after") for group in ("rarest", "typical")]
    rises = [end / start - 1 for start, end in zip(before, after, strict=True)]
    correlations = [each["spearman_bce"] for each in kept.values()]
    lines.append(
        f"The reconstruction error was {before[0]:.3g} nats a picture for the rarest and {before[1]:.3g} for the "
        f"typical images before, so these are changes of {rises[0]:+.1%} and {rises[1]:+.1%}. Over all training "
        f"images of a retained digit, the rank correlation of their rarity with the change is {min(correlations):.2f} "
        f"to {max(correlations):.2f}."
    )
    return lines


def _mean(kept: dict[str, dict], group: str, model: str) -> float:
    """Mean reconstruction error over the digits."""
    return sum(each[group]["bce"][model] for each in kept.values()) / len(kept)


def _digit_table(numbers: dict[str, dict]) -> dict:
    measures = {"BCE": ("bce", ".1f"), "P(digit)": ("probability", ".3f"), "entropy": ("entropy", ".3f")}
    groups = ("rarest", "typical")
    rows = []
    for name, each in numbers.items():
        cells = [
            f"{each[group][measure]['before']:{spec}} → {each[group][measure]['after']:{spec}}"
            for measure, spec in measures.values()
            for group in groups
        ]
        rows.append([name, *cells, each["spearman_bce"]])
    names = [f"{measure}, {group}" for measure in measures for group in groups]
    title = f"The {NUM_PICTURES} rarest and {NUM_PICTURES} most typical images of each digit, before → after"
    return table(title, ["digit", *names, "Spearman of rarity and rise of BCE"], rows)


def _comparison_table(comparisons: dict[str, Comparison], count: int) -> dict:
    rows = [
        [cost, each.rarest, each.typical, each.rarest - each.typical, each.low, each.high, f"{each.wins} of {count}"]
        for cost, each in comparisons.items()
    ]
    columns = ["cost", "rarest", "typical", "difference", "95 % interval over the digits, low", "high"]
    title = "What forgetting costs the retained digits (above 0: worse), means over the digits of one run"
    return table(title, [*columns, "digits whose rarest lose more"], rows)


def _forgotten(styles: Styles, name: str) -> Figure:
    rarest = styles.rarity.argsort(descending=True)[:NUM_PICTURES]
    strips = [Strip("real", styles.real)]
    for when, decoded in (("before", styles.before), ("after", styles.after)):
        captions = [f"P {value:.2f}" for value in decoded.measures["probability"][rarest].tolist()]
        strips.append(Strip(when, decoded.images, captions))
    return strips_figure(strips, f"The rarest {name}s, decoded before and after forgetting")


def _retained(styles: dict[str, Styles]) -> Figure:
    drawn = Figure(figsize=(15, 5), layout="constrained")
    shown = {
        "real": [each.real for each in styles.values()],
        "decoded before forgetting": [each.before.images for each in styles.values()],
        "decoded after forgetting": [each.after.images for each in styles.values()],
    }
    for axis, (title, rows) in zip(drawn.subplots(1, 3), shown.items(), strict=True):
        framed = F.pad(torch.cat(rows), (1, 1, 1, 1), value=0.5)  # grey lines: neighbours would run together
        picture, size = image_grid(framed, NUM_PICTURES).numpy(), framed.shape[-1]
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=14)
        axis.set_xticks([])
        axis.set_yticks([size * (row + 0.5) - 0.5 for row in range(len(rows))], list(styles), fontsize=13)
    return drawn


def _costs(kept: dict[str, dict]) -> Figure:
    drawn = Figure(figsize=(13, 4.8), layout="constrained")
    for axis, name in zip(drawn.subplots(1, 2), ("rise of BCE", "fall of P(digit)"), strict=True):
        for group, marker in (("rarest", "C0o"), ("typical", "C1s")):
            axis.plot(
                list(kept), _paid(kept, group, COSTS[name]), marker, markersize=10, fillstyle="none", label=group
            )
        axis.axhline(0, color="0.6", linewidth=1)
        axis.set_title(name, fontsize=14)
        axis.set_xlabel("retained digit", fontsize=12)
        axis.tick_params(labelsize=12)
        axis.legend(fontsize=12)
    return drawn
