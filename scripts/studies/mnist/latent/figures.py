"""Figures of the latent spaces, each before and after forgetting side by side."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from studies.mnist.study import image_grid, save_figure


WHEN = ("before forgetting", "after forgetting")


def scatter_pair(
    path: Path,
    pair: Sequence[Tensor],
    labels: Tensor,
    names: Sequence[str],
    title: str,
    axis_names: tuple[str, str],
    shared: bool,
) -> str:
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
        axis.set_title(f"{title}, {when}", fontsize=13)
        axis.set_xlabel(axis_names[0], fontsize=12)
        axis.set_ylabel(axis_names[1], fontsize=12)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right center", title="digit", markerscale=4, fontsize=12)
    return save_figure(figure, path)


def manifold_pair(path: Path, pair: Sequence[Tensor], digit: str, reach: float) -> str:
    """Square grids of images decoded as a digit, [N, 1, H, W] in [0, 1], before and after.

    Args:
        reach: the codes of the grid run from -reach to reach.
    """
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    for axis, images, when in zip(figure.subplots(1, 2), pair, WHEN, strict=True):
        columns = round(len(images) ** 0.5)
        picture = image_grid(images, columns).numpy()
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(-reach, reach, -reach, reach))
        _label_plane(axis, f"Codes decoded as a {digit}, {when}")
    return save_figure(figure, path)


def plane_maps(path: Path, maps: dict[str, Sequence[Tensor]], reach: float) -> str:
    """Values [rows, columns] over a plane of codes, a row a measure and its pair of before and after."""
    figure = Figure(figsize=(11, 4.8 * len(maps)), layout="constrained")
    for axes, (name, pair) in zip(figure.subplots(len(maps), 2, squeeze=False), maps.items(), strict=True):
        most = max(float(values.max()) for values in pair)
        for axis, values, when in zip(axes, pair, WHEN, strict=True):
            extent = (-reach, reach, -reach, reach)
            picture = axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=most, extent=extent)
            _label_plane(axis, f"{name}, {when}")
        figure.colorbar(picture, ax=axes)
    return save_figure(figure, path)


def _label_plane(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=13)
    axis.set_xlabel("latent dimension 0", fontsize=12)
    axis.set_ylabel("latent dimension 1", fontsize=12)


def heat_maps(path: Path, pair: Sequence[Tensor], names: Sequence[str]) -> str:
    """Distances [classes, classes] between the classes' centroids, in one colour scale."""
    figure = Figure(figsize=(14, 6.6), layout="constrained")
    most = max(float(distances.max()) for distances in pair)
    axes = figure.subplots(1, 2)
    for axis, distances, when in zip(axes, pair, WHEN, strict=True):
        picture = axis.imshow(distances.numpy(), cmap="viridis", vmin=0, vmax=most)
        axis.set_xticks(range(len(names)), names, fontsize=12)
        axis.set_yticks(range(len(names)), names, fontsize=12)
        axis.set_title(f"Distances between centroids, {when}", fontsize=13)
        for row, values in enumerate(distances.tolist()):
            for column, value in enumerate(values):
                colour = "white" if value < 0.6 * most else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    figure.colorbar(picture, ax=axes)
    return save_figure(figure, path)


def movement_arrows(path: Path, pair: Sequence[Tensor], names: Sequence[str], explained: Sequence[float]) -> str:
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
    axis.set_title("Centroids from before (dot) to after (arrow's head)", fontsize=13)
    axis.set_xlabel(f"principal component 1 ({explained[0]:.0%} of the variance)", fontsize=12)
    axis.set_ylabel(f"principal component 2 ({explained[1]:.0%} of the variance)", fontsize=12)
    return save_figure(figure, path)
