"""How a set of generated images compares with a set of real ones, from a feature vector of each image.

Any features serve; `extractors.py` has some, and `metrics.py` the distances whose published numbers mean those of one
Inception network.
"""

import torch
from torch import Tensor


def manifold_metrics(*, real: Tensor, generated: Tensor, k: int = 5, chunk_size: int = 512) -> dict[str, float]:
    """Compare two sets by balls around each sample that reach to its k-th nearest neighbour in its own set.

    Args:
        real: features [N, D]; compare sets of one size, since the balls shrink as a set grows.
        generated: features [M, D].
        k: neighbours, below N and M. A point on the surface of a ball counts as inside.
        chunk_size: rows of the distance matrix held at once; the result does not depend on it.

    Returns:
        precision: share of generated samples among the real ones, and recall: share of real samples among the
        generated ones (Kynkaanniemi et al. 2019, Eq. 1-2). density: like precision, but counting every real
        neighbourhood that a generated sample lies in, and coverage: share of real samples with a generated one in
        their neighbourhood, which outliers among the generated samples do not raise (Naeem et al. 2020). All lie in
        [0, 1] but density, which has no upper bound.

    Raises:
        ValueError: other shapes, too few samples for k, or values that are not finite.
    """
    _check(real, generated, minimum=k + 1)
    if k < 1:
        raise ValueError(f"expected k >= 1, got {k}")
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


def _check(real: Tensor, generated: Tensor, minimum: int) -> None:
    if real.dim() != 2 or generated.dim() != 2 or real.shape[1] != generated.shape[1]:
        shapes = f"{list(real.shape)} and {list(generated.shape)}"
        raise ValueError(f"expected features [N, D] and [M, D] of one width, got {shapes}")
    if min(len(real), len(generated)) < minimum:
        raise ValueError(f"expected at least {minimum} samples of each set, got {len(real)} and {len(generated)}")
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("expected finite features, got NaN or infinity: the images or the network are broken")
