"""Pictures of the study: fills, errors by how much is hidden, and where fills lie among real pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from sa_diffusers.core.conditions import Condition
from sa_diffusers.evaluation.completion import TITLES, completed
from sa_diffusers.families import Family
from studies.figures import save_figure
from studies.i2i.equal import kind_of
from studies.i2i.probes import HOLE, Bench
from studies.mnist.strips import Strip, strips_figure


SHOWN, PLACED = 4, 50  # pictures of each class in rows, and as points


def save_figures(bench: Bench, found: Mapping[str, Any], families: Mapping[str, Family], folder: Path) -> None:
    """fills.png, curves.png and tsne.png of models by what they are called."""
    group = bench.part("forget", SHOWN)
    truth = completed(bench.base, group, HOLE, 0)[0]
    shown = {"truth": truth, "shown": bench.base.shown(truth, [Condition(mask=HOLE)] * len(truth))}
    shown |= {name: completed(family, group, HOLE, 0)[1] for name, family in families.items()}
    strips = [Strip(name, (images.clamp(-1, 1) + 1) / 2) for name, images in shown.items()]
    save_figure(strips_figure(strips, f"Pictures to forget: {kind_of(found).title}"), folder / "fills.png")
    save_figure(_curves({name: found[name] for name in families}), folder / "curves.png")
    save_figure(_places(bench, families), folder / "tsne.png")


def _curves(found: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(kind_of(found).title)
    for axis, (group, title) in zip(figure.subplots(1, len(TITLES), sharey=True), TITLES.items(), strict=True):
        for name, runs in found.items():
            curves = next(iter(runs.values()))["probes"]["curves"]
            axis.plot(list(curves), [part[group]["masked_mse"] for part in curves.values()], "o-", label=name)
        axis.set(title=title, ylabel="error of hidden pixels")
        axis.tick_params(axis="x", rotation=45)
    axis.legend(fontsize=8)
    return figure


def _places(bench: Bench, families: Mapping[str, Family]) -> Figure:
    """t-SNE of the classifier's features of the true pictures and of all fills, fitted together."""
    group = bench.part("forget", PLACED)
    sets = {"truth": completed(bench.base, group, HOLE, 0)[0]}
    sets |= {name: completed(family, group, HOLE, 0)[1] for name, family in families.items()}
    with torch.no_grad():
        features = [bench.judge.classifier.features(images.expand(-1, 3, -1, -1)) for images in sets.values()]
    places = TSNE(random_state=0, n_jobs=1).fit_transform(torch.cat(features).numpy())
    figure = Figure(figsize=(3 * len(sets), 3.2), layout="constrained")
    axes = figure.subplots(1, len(sets), sharex=True, sharey=True)
    for axis, name, part in zip(axes, sets, torch.from_numpy(places).split(len(features[0])), strict=True):
        axis.scatter(places[:, 0], places[:, 1], s=3, color="0.85")
        for label in group.test.labels.unique().tolist():
            of = part[group.test.labels == label]
            axis.scatter(of[:, 0], of[:, 1], s=8, label=group.test.names[label])
        axis.set(title=name, xticks=[], yticks=[])
    axes[0].legend(fontsize=8)
    return figure
