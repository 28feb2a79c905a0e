"""Figures of the latent spaces, each before and after forgetting side by side."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from studies.figures import image_grid


WHEN = ("before forgetting", "after forgetting")
SIZE = {"fontsize": 12}


def scatter_pair(
    pair: Sequence[Tensor], labels: Tensor, names: Sequence[str], title: str, axis_names: tuple[str, str], shared: bool
) -> Figure:
    """Two scatter plots coloured by class.

    Args:
        pair: points [N, 2] before and after.
        title: what the points are.
        shared: whether both plots have the same coordinates, and so the same limits.
    """
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=shared, sharey=shared)
    for axis, points, when in zip(axes, pair, WHEN, strict=True):
        for label, name in enumerate(names):
            chosen = points[labels == label].numpy()
            axis.scatter(chosen[:, 0], chosen[:, 1], s=8, color=f"C{label}", label=name, linewidths=0, alpha=0.7)
        _name(axis, f"{title}, {when}", *axis_names)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right center", title="digit", markerscale=4, **SIZE)
    return figure


def manifold_pair(pair: Sequence[Tensor], digit: str, reach: float) -> Figure:
    """Square grids of images decoded as a digit, [N, 1, H, W] in [0, 1], before and after.

    Args:
        reach: the codes of the grid run from -reach to reach.
    """
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    for axis, images, when in zip(figure.subplots(1, 2), pair, WHEN, strict=True):
        picture = image_grid(images, round(len(images) ** 0.5)).numpy()
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(-reach, reach, -reach, reach))
        _name(axis, f"Codes decoded as a {digit}, {when}")
    return figure


def plane_maps(maps: dict[str, Sequence[Tensor]], reach: float) -> Figure:
    """Values [rows, columns] over a plane of codes, a row a measure and its pair of before and after."""
    figure = Figure(figsize=(11, 4.8 * len(maps)), layout="constrained")
    for axes, (name, pair) in zip(figure.subplots(len(maps), 2, squeeze=False), maps.items(), strict=True):
        most = max(float(values.max()) for values in pair)
        for axis, values, when in zip(axes, pair, WHEN, strict=True):
            extent = (-reach, reach, -reach, reach)
            picture = axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=most, extent=extent)
            _name(axis, f"{name}, {when}")
        figure.colorbar(picture, ax=axes)
    return figure


def heat_maps(pair: Sequence[Tensor], names: Sequence[str]) -> Figure:
    """Distances [classes, classes] between the classes' centroids, in one colour scale."""
    figure = Figure(figsize=(14, 6.6), layout="constrained")
    most = max(float(distances.max()) for distances in pair)
    axes = figure.subplots(1, 2)
    for axis, distances, when in zip(axes, pair, WHEN, strict=True):
        picture = axis.imshow(distances.numpy(), cmap="viridis", vmin=0, vmax=most)
        axis.set_xticks(range(len(names)), names, **SIZE)
        axis.set_yticks(range(len(names)), names, **SIZE)
        axis.set_title(f"Distances between centroids, {when}", fontsize=13)
        for row, values in enumerate(distances.tolist()):
            for column, value in enumerate(values):
                colour = "white" if value < 0.6 * most else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    figure.colorbar(picture, ax=axes)
    return figure


def movement_arrows(pair: Sequence[Tensor], names: Sequence[str], explained: Sequence[float]) -> Figure:
    """Arrows from each centroid before to the same after, in the plane of a PCA of both.

    Args:
        pair: coordinates [classes, 2] before and after.
        explained: shares of the variance that the two axes explain.
    """
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    axis = figure.subplots()
    for label, (name, start, end) in enumerate(zip(names, pair[0].tolist(), pair[1].tolist(), strict=True)):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": f"C{label}", "linewidth": 2})
        axis.plot(*start, "o", color=f"C{label}", markersize=5)
        axis.annotate(name, end, (4, 4), textcoords="offset points", fontsize=15, color=f"C{label}", weight="bold")
    both = [point for points in pair for point in points.tolist()]
    axis.scatter(*zip(*both, strict=True), alpha=0)  # annotations alone do not set the limits of the axes
    axis.margins(0.08)
    axis.set_aspect("equal", "datalim")
    components = (f"principal component {k} ({share:.0%} of the variance)" for k, share in enumerate(explained, 1))
    _name(axis, "Centroids from before (dot) to after (arrow's head)", *components)
    return figure


def _name(axis: Axes, title: str, x: str = "latent dimension 0", y: str = "latent dimension 1") -> None:
    axis.set_title(title, fontsize=13)
    axis.set_xlabel(x, **SIZE)
    axis.set_ylabel(y, **SIZE)
