"""FID, KID, Inception Score, precision and recall of generated images against real ones, from one pass of a network.

Only with the features of the one Inception network do the first three bear these names; with any other they are called
Frechet distance, kernel distance and classifier score, and compare with nothing but themselves.

FID and KID are the same with real and generated images exchanged, while precision and recall change places. What the
published tables of Selective Amnesia call precision is probably the recall here: the command in the authors' README
gives the generated images to the evaluator as the reference and the real ones as the samples. That the tables were
made by this command is inferred.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.evaluation.images.extractors import Extractor, InceptionExtractor
from sa_diffusers.evaluation.images.sets import ImageSet, index_batches
from sa_diffusers.evaluation.options import MetricSettings
from sa_diffusers.io.processes import process_state, progress_bar


# What each metric is called in the results: with Inception's features, and with any others.
NAMES = {
    "fid": ("fid", "frechet_distance"),
    "kid": ("kid", "kernel_distance"),
    "is": ("inception_score", "classifier_score"),
    "prc": ("prc", "prc"),
}


@dataclass(frozen=True)
class FeatureSet:
    """What a network says of the images of one set: `features` [N, D], and class `logits` [N, K] if it reads them."""

    name: str
    features: Tensor
    logits: Tensor | None = None


@torch.no_grad()
def compute_features(extractor: nn.Module, image_set: ImageSet, batch_size: int = 64) -> FeatureSet:
    """Features of every image, float32 on the CPU, in eval mode, from one pass of the network.

    Args:
        extractor: an `Extractor`, or any module that maps images [B, 3, H, W] in [-1, 1] to features [B, D]. It is
            moved to the device of this process.

    Raises:
        ValueError: features of another shape, or values that are not finite.
    """
    device, training = process_state().device, extractor.training
    extractor.eval().to(device)
    features, logits = [], []
    try:
        for indices in progress_bar(index_batches(image_set, batch_size), f"features: {image_set.name}", "batches"):
            images = image_set.images(indices).to(device)
            ours = isinstance(extractor, Extractor)
            found, read = extractor.features_and_logits(images) if ours else (extractor(images), None)
            if found.shape[:-1] != images.shape[:1]:
                raise ValueError(f"expected features [{len(images)}, D], got {list(found.shape)}; flatten them")
            features.append(found.float().cpu())
            logits += [] if read is None else [read.float().cpu()]
    finally:
        extractor.train(training)
    if not all(part.isfinite().all() for part in (*features, *logits)):
        raise ValueError(f"expected finite features of {image_set.name}, got NaN or infinity: the network is broken")
    return FeatureSet(image_set.name, torch.cat(features), torch.cat(logits) if logits else None)


def check_metrics(metrics: Sequence[str], extractor: nn.Module) -> None:
    """Raise ValueError for an unknown metric, or one that needs class logits which the extractor does not read."""
    unknown = [name for name in metrics if name not in NAMES]
    if unknown:
        raise ValueError(f"expected metrics of {', '.join(NAMES)}, got {unknown[0]!r}")
    if "is" in metrics and not (isinstance(extractor, Extractor) and extractor.has_logits):
        raise ValueError(
            "the metric 'is' needs class logits: expected Inception or a classifier (with --attribute where it has "
            f"several), got {type(extractor).__name__}"
        )


def check_counts(metrics: Sequence[str], counts: Sequence[int], settings: MetricSettings) -> None:
    """Raise ValueError where a metric needs more images than one of the sets holds."""
    needed = {
        "fid": (2, "2"),
        "kid": (2, "2"),
        "is": (settings.num_splits, "one a split"),
        "prc": (settings.num_neighbours + 1, "more than the neighbours"),
    }
    for name in metrics:
        number, reason = needed[name]
        available = min(*counts, settings.max_prc_images) if name == "prc" else min(counts)
        if available < number:
            raise ValueError(
                f"the metric {name!r} needs {number} images of each set ({reason}), got {available}; give more"
            )


def image_metrics(
    *,
    real: FeatureSet,
    generated: FeatureSet,
    metrics: Sequence[str],
    extractor: nn.Module,
    settings: MetricSettings | None = None,
) -> dict:
    """Compare two sets by the features that one extractor has computed of both.

    Args:
        metrics: some of "fid", "kid", "is" and "prc".
        extractor: it decides what the metrics are called.

    Returns:
        By the names of `NAMES`: the Frechet distance (a number); mean and std of the kernel distance over subsets;
        mean and std of the score over splits, for each set; precision, recall, density and coverage with the names of
        the two sets. A std is None where nothing tells it. Beside them stand the settings of each. Ready for JSON.

    Raises:
        ValueError: unknown metrics, no logits, too few images, or features of two widths.
    """
    settings = settings or MetricSettings()
    check_metrics(metrics, extractor)
    check_counts(metrics, (len(real.features), len(generated.features)), settings)
    if real.features.shape[1] != generated.features.shape[1]:
        widths = f"{real.features.shape[1]} and {generated.features.shape[1]}"
        raise ValueError(f"expected features of one width, got {widths}: they come from two networks")
    sets = {"real": real.features, "generated": generated.features}
    ours = isinstance(extractor, InceptionExtractor)
    found: dict = {}
    for name in metrics:
        key = NAMES[name][0 if ours else 1]
        if name == "fid":
            found[key] = frechet_distance(**sets)
        elif name == "kid":
            found[key] = kernel_inception_distance(**sets, settings=settings)
        elif name == "is":
            scored = {"generated": generated, "real": real}
            found[key] = {kind: inception_score(part.logits, settings) for kind, part in scored.items()}
        else:
            found[key] = {"real": real.name, "generated": generated.name}
            found[key] |= precision_and_recall(**sets, settings=settings)
    return found


def frechet_distance(*, real: Tensor, generated: Tensor) -> float:
    """FID of feature sets [N, D] and [M, D] by torchmetrics, in float64: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)).

    Heusel et al. 2017, Eq. 6. It falls as the sets grow; compare only values of sets of the same size.
    """
    metric = FrechetInceptionDistance(_features_as_they_are(real.shape[1]))
    return _of_both(metric, real, generated).item()


def kernel_inception_distance(*, real: Tensor, generated: Tensor, settings: MetricSettings) -> dict[str, float | None]:
    """KID of feature sets [N, D] and [M, D] by torchmetrics, in float64: mean and std over random subsets.

    The unbiased squared MMD with the kernel (x y / D + 1)^3 (Binkowski et al. 2018, section 4). A subset has
    `subset_size` images of either set, or all of the smaller set where that has fewer; the means may be negative.

    The std is None where a subset is all images of both sets: then every subset is the same, and their spread of 0
    says nothing of the error, which is that of having these images and no others. Where it is all of one set alone,
    the std is that of choosing from the other.
    """
    size = min(settings.subset_size, len(real), len(generated))
    network = _features_as_they_are(real.shape[1])
    with _torchmetrics(settings.seed, "kernel distance"):
        metric = KernelInceptionDistance(network, subsets=settings.num_subsets, subset_size=size)
        mean, std = _of_both(metric, real, generated)
    spread = None if size == max(len(real), len(generated)) else std.item()
    return {"mean": mean.item(), "std": spread, "num_subsets": settings.num_subsets, "subset_size": size}


def inception_score(logits: Tensor, settings: MetricSettings) -> dict[str, float | None]:
    """Inception Score of class logits [N, K] by torchmetrics, in float64: mean and std over random splits.

    exp(E_x KL(p(y | x) || p(y))) (Salimans et al. 2016, section 4), from 1 to K. The std of a single split is None.
    """
    with _torchmetrics(settings.seed, "classifier score"):
        metric = InceptionScore(_features_as_they_are(logits.shape[1]), splits=settings.num_splits)
        metric.update(logits.double())
        mean, std = metric.compute()
    num_splits = len(torch.empty(len(logits)).chunk(settings.num_splits))  # may be fewer than asked for
    return {"mean": mean.item(), "std": std.item() if num_splits > 1 else None, "num_splits": num_splits}


def precision_and_recall(*, real: Tensor, generated: Tensor, settings: MetricSettings) -> dict[str, float]:
    """The four values of `manifold_metrics` for equally many images of feature sets [N, D] and [M, D]."""
    count = min(len(real), len(generated), settings.max_prc_images)
    chosen = {}
    for name, features in (("real", real), ("generated", generated)):
        order = torch.randperm(len(features), generator=seeded(settings.seed, "prc", name))
        chosen[name] = features[order[:count]].to(_device())
    values = manifold_metrics(**chosen, k=settings.num_neighbours)
    return values | {"num_neighbours": settings.num_neighbours, "num_images": count}


def manifold_metrics(*, real: Tensor, generated: Tensor, k: int = 5, chunk_size: int = 512) -> dict[str, float]:
    """Compare two sets by balls around each sample that reach to its k-th nearest neighbour in its own set.

    Args:
        real: finite features [N, D]; compare sets of one size, since the balls shrink as a set grows.
        generated: features [M, D].
        k: neighbours, below N and M. A point on the surface of a ball counts as inside.
        chunk_size: rows of the distance matrix held at once; the result does not depend on it.

    Returns:
        precision: share of generated samples among the real ones, and recall: share of real samples among the
        generated ones (Kynkaanniemi et al. 2019, Eq. 1-2). density: like precision, but counting every real
        neighbourhood that a generated sample lies in, and coverage: share of real samples with a generated one in
        their neighbourhood, which outliers among the generated samples do not raise (Naeem et al. 2020). All lie in
        [0, 1] but density, which has no upper bound.
    """
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = (_radii(features, k, chunk_size) for features in (real, generated))  # [N], [M]
    num_balls_of_real = torch.zeros(len(generated), dtype=torch.long, device=real.device)  # that a sample lies in
    recalled, covered = [], []
    for rows, radii in zip(real.split(chunk_size), real_radii.split(chunk_size), strict=True):
        distances = _distances(rows, generated)  #                                               [chunk, M]
        inside = distances <= radii[:, None]
        num_balls_of_real += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distances <= generated_radii).any(1))
    return {
        "precision": (num_balls_of_real > 0).double().mean().item(),
        "recall": torch.cat(recalled).double().mean().item(),
        "density": num_balls_of_real.double().mean().item() / k,
        "coverage": torch.cat(covered).double().mean().item(),
    }


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # By subtraction: the shortcut through a matrix product gives equal points a distance above 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, k: int, chunk_size: int) -> Tensor:
    """Distance of each sample [N, D] to its k-th nearest neighbour, itself not counted: [N]."""
    parts = [_distances(rows, features).kthvalue(k + 1).values for rows in features.split(chunk_size)]
    return torch.cat(parts)


def _of_both(metric: Metric, real: Tensor, generated: Tensor) -> Any:
    """What a metric of torchmetrics finds of two sets of features, in float64."""
    metric.to(_device())
    metric.update(real.to(_device()).double(), real=True)
    metric.update(generated.to(_device()).double(), real=False)
    return metric.compute()


def _features_as_they_are(width: int) -> nn.Module:
    """The network that torchmetrics asks for, when features have been computed already."""
    network = nn.Identity()
    network.num_features = width
    return network


def _device() -> torch.device:
    """The device of this process where it knows float64, else the CPU."""
    device = process_state().device
    return device if device.type in ("cuda", "xpu") else torch.device("cpu")


@contextmanager
def _torchmetrics(seed: int, purpose: str) -> Iterator[None]:
    """Torch's global CPU generator, which torchmetrics draws from, as a function of the seed, and restored afterwards.

    Without its warnings that features are kept in memory, which they are here anyway, and of a single split.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all extracted features", UserWarning)
        warnings.filterwarnings("ignore", "std\\(\\): degrees of freedom")
        torch.default_generator.manual_seed(derive_seed(seed, purpose))
        yield
