"""Overlap and distance of feature sets, against cases that are known and a brute-force oracle."""

import math

import pytest
import torch

from sa_diffusers.evaluation.images.metrics import frechet_distance, manifold_metrics


def brute_force(real: list[list[float]], generated: list[list[float]], k: int) -> dict[str, float]:
    """The definitions, word for word, in plain Python."""

    def balls(points):
        radii = [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]
        return list(zip(points, radii, strict=True))

    hits = [[math.dist(centre, g) <= radius for centre, radius in balls(real)] for g in generated]
    reverse = [[math.dist(centre, r) <= radius for centre, radius in balls(generated)] for r in real]
    return {
        "precision": sum(map(any, hits)) / len(generated),
        "recall": sum(map(any, reverse)) / len(real),
        "density": sum(map(sum, hits)) / (k * len(generated)),
        "coverage": sum(map(any, zip(*hits, strict=True))) / len(real),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_equals_brute_force(k, chunk_size):
    real, generated = torch.randn(23, 4), torch.randn(31, 4) * 0.7 + 0.4
    result = manifold_metrics(real=real, generated=generated, k=k, chunk_size=chunk_size)
    assert result == pytest.approx(brute_force(real.double().tolist(), generated.double().tolist(), k))


def test_a_set_overlaps_wholly_with_itself():
    features = torch.randn(40, 8)
    result = manifold_metrics(real=features, generated=features.clone())
    assert (result["precision"], result["recall"], result["coverage"]) == (1, 1, 1)


def test_distant_sets_do_not_overlap():
    result = manifold_metrics(real=torch.randn(40, 8), generated=torch.randn(40, 8) + 1000)
    assert result == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_swapping_the_sets_swaps_precision_and_recall():
    one, other = torch.randn(50, 3), torch.randn(60, 3) * 0.5
    forward, backward = manifold_metrics(real=one, generated=other), manifold_metrics(real=other, generated=one)
    assert (forward["precision"], forward["recall"]) == (backward["recall"], backward["precision"])
    assert forward["precision"] != forward["recall"]


def test_the_surface_of_a_ball_is_inside():
    real, generated = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[-1.0], [3.0], [10.0]])
    assert manifold_metrics(real=real, generated=generated, k=1)["precision"] == pytest.approx(2 / 3)


def test_one_mode_of_two_is_precise_but_neither_recalled_nor_covered():
    modes = torch.cat([torch.randn(50, 3), torch.randn(50, 3) + 100])
    result = manifold_metrics(real=modes, generated=modes[:50])
    assert (result["precision"], result["recall"], result["coverage"]) == (1, 0.5, 0.5)


def test_density_exceeds_one_where_real_samples_crowd():
    result = manifold_metrics(real=torch.randn(100, 2), generated=torch.randn(100, 2) * 0.01)
    assert result["density"] > 1


def test_frechet_distance_of_axis_aligned_gaussians():
    points = torch.randn(500, 4, dtype=torch.float64)
    points = (points - points.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov()).T)  # exactly N(0, I)
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, -2.0, 0.5])
    # Commuting covariances: |shift|^2 + sum (1 - scale)^2.
    expected = shift.square().sum().item() + (1 - scale).square().sum().item()
    assert frechet_distance(real=points, generated=points * scale + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real=points, generated=points) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_singular_covariances():
    line = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None] * torch.tensor([[3.0, 4.0]])
    spread = torch.linspace(-1, 1, 9, dtype=torch.float64).std().item() * 5
    assert frechet_distance(real=line, generated=2 * line) == pytest.approx(spread**2)
