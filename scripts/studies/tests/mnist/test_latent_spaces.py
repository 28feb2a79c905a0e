"""Part 4 of the MNIST study: the quarantine, the dead zone and the centroids, against hand computations."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch

from sa_diffusers.data.labelled_images import load_labelled_images
from sa_diffusers.evaluation.judges.classifier import entropies
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from studies.mnist.latent import spaces
from studies.mnist.latent.apart import (
    Null,
    Quarantine,
    centroid_distances,
    centroid_ratio,
    distance_ratio,
    neighbour_purity,
    null_ratios,
    quarantine,
)
from studies.mnist.latent.dead_zone import Plane, decode_plane, plane_latents
from studies.mnist.latent.quarantine import digit_silhouettes, quarantine_text, silhouette_section, structure
from studies.mnist.readings import DIGIT, Readings, forget_one, forget_one_by_encoder, read_digit
from studies.mnist.study import Study, StudyConfig, encode_means, read


# Three classes of two points each: the digit 1 stands to the right, with twice the spread of the others.
POINTS = torch.tensor([[0.0, 0], [0, 2], [10, 0], [10, 4], [0, 10], [0, 12]])
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def tiny_vae(seed: int, latent_dim: int = 3) -> ConditionalVAEPipeline:
    torch.manual_seed(seed)
    return ConditionalVAEPipeline(ConditionalVAE(8, hidden_sizes=(16,), latent_dim=latent_dim))


@pytest.fixture
def classifiers() -> dict[str, DigitClassifier]:
    torch.manual_seed(1)
    names = {"digit": [str(digit) for digit in range(10)]}
    return {
        name: DigitClassifier(names, image_size=8, kernel_size=3, padding=1, channels=(4, 4), num_features=8).eval()
        for name in ("a", "b")
    }


@pytest.fixture
def study(tmp_path, classifiers) -> Study:
    """On 100 real images; what it forgets is a model of other weights."""
    study = Study(StudyConfig(base_config="configs/digits8x8_cvae.yaml", output_dir=str(tmp_path), num_threads=1))
    data = load_labelled_images("digits8x8", "", "test")
    study.__dict__["classifiers"] = classifiers
    study.__dict__["test_images"] = type(data)(data.images[:100], data.labels[:100], data.names)

    def save(name: str, seed: int, latent_dim: int | None):
        folder = tmp_path / f"{name}_{latent_dim}"
        if not folder.exists():
            tiny_vae(seed, latent_dim or 3).save_pretrained(folder)
        return folder

    def forget(name: str, concept: int, *, model=None, **options):
        return save(name, 3 if "encoder" in name else 2, 2 if name.endswith("_2") else None), {}

    study.base = lambda latent_dim=None: save("base", 1, latent_dim)
    study.forget = forget
    return study


def test_quarantine_is_what_the_hand_finds() -> None:
    found = quarantine(POINTS, LABELS, digit=1, k=1)
    assert found.centroid_distance == pytest.approx(math.hypot(10, 4) / 10)  # (10, 2) from (0, 6); others 10 apart
    assert found.spread == pytest.approx(2.0)
    silhouettes = []
    for point, mate in (((10, 0), (10, 4)), ((10, 4), (10, 0))):
        within = math.dist(point, mate)
        outside = np.mean(
            [math.dist(point, p.tolist()) for p, label in zip(POINTS, LABELS, strict=True) if label != 1]
        )
        silhouettes.append((outside - within) / max(outside, within))
    assert found.silhouette == pytest.approx(np.mean(silhouettes))


def test_neighbours_are_counted_without_the_point_itself() -> None:
    torch.testing.assert_close(neighbour_purity(POINTS, LABELS, k=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(neighbour_purity(POINTS, LABELS, k=2), torch.full((3,), 0.5, dtype=torch.float64))
    mixed = torch.tensor([0, 1, 1, 1, 2, 2])  # (0, 2) lies beside (0, 0)
    found = quarantine(POINTS, mixed, digit=1, k=1)
    assert found.purity == pytest.approx(2 / 3)
    assert found.others_purity == pytest.approx((0 + 1) / 2)


def test_purity_equals_a_loop_over_all_pairs() -> None:
    points, labels = torch.randn(60, 4), torch.arange(60) % 3
    expected = torch.zeros(3, dtype=torch.float64)
    for i in range(60):
        distances = sorted((math.dist(points[i].tolist(), points[j].tolist()), j) for j in range(60) if j != i)
        expected[labels[i]] += sum(bool(labels[j] == labels[i]) for _, j in distances[:5]) / 5 / 20
    torch.testing.assert_close(neighbour_purity(points, labels, k=5), expected)


def test_centroid_distances_and_their_ratio() -> None:
    distances = centroid_distances(POINTS, LABELS)
    near, far = math.hypot(10, 1), math.hypot(10, 9)  # (10, 2) from (0, 1) and (0, 11)
    expected = torch.tensor([[0, near, 10], [near, 0, far], [10, far, 0]], dtype=torch.float64)
    torch.testing.assert_close(distances, expected)
    assert distance_ratio(distances, 1) == pytest.approx((near + far) / 2 / 10)
    four = torch.tensor([[0.0, 1, 2, 3], [1, 0, 4, 5], [2, 4, 0, 6], [3, 5, 6, 0]])
    assert distance_ratio(four, 0) == pytest.approx((1 + 2 + 3) / 3 / ((4 + 5 + 6) / 3))


def test_ratios_take_many_sets_of_centroids_at_once() -> None:
    sets = torch.randn(3, 5, 4, dtype=torch.float64)
    labels = torch.arange(5)
    found = centroid_ratio(sets, 2), distance_ratio(torch.stack([centroid_distances(s, labels) for s in sets]), 2)
    for index, points in enumerate(sets.tolist()):
        others = points[:2] + points[3:]
        middle = [sum(values) / 4 for values in zip(*others, strict=True)]
        between = np.mean([math.dist(a, b) for a, b in combinations(others, 2)])
        assert found[0][index].item() == pytest.approx(math.dist(points[2], middle) / between)
        to_others = np.mean([math.dist(points[2], other) for other in others])
        assert found[1][index].item() == pytest.approx(to_others / between)


@pytest.mark.parametrize("latent_dim", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_null_is_that_of_centroids_at_random(latent_dim) -> None:
    """Beside a loop over other draws: about .75 for the middle of the others, about 1 for the mean distance."""
    found = null_ratios(10, latent_dim, seed=0)
    generator, labels = torch.Generator().manual_seed(5), torch.arange(10)
    loops: tuple[list[float], list[float]] = ([], [])
    for _ in range(1000):
        points = torch.randn(10, latent_dim, generator=generator, dtype=torch.float64)
        loops[0].append(float(centroid_ratio(points, 3)))
        loops[1].append(float(distance_ratio(centroid_distances(points, labels), 3)))
    for null, values in zip(found, loops, strict=True):
        assert null.mean == pytest.approx(np.mean(values), abs=0.05)
        assert (null.low, null.high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.15)
    assert found[0].mean == pytest.approx(math.sqrt((1 + 1 / 9) / 2), abs=0.05)
    assert found[1].mean == pytest.approx(1, abs=0.04)
    assert null_ratios(10, latent_dim, seed=0) == found


def test_labels_at_random_have_no_silhouette() -> None:
    points = torch.randn(1000, 8)
    assert quarantine(points, torch.arange(1000) % 10, digit=1).silhouette == pytest.approx(0, abs=0.02)


def test_plane_lies_as_a_plot_does() -> None:
    latents = plane_latents(4).view(20, 20, 4)
    steps = torch.linspace(-3, 3, 20)
    torch.testing.assert_close(latents[7, :, 0], steps)  # rightwards
    torch.testing.assert_close(latents[:, 7, 1], steps.flip(0))  # upwards: row 0 is drawn on top
    assert not latents[..., 2:].any()


def test_readings_are_means_over_the_classifiers(classifiers) -> None:
    images = torch.rand(5, 1, 8, 8)
    found = read_digit(classifiers.values(), images, digit=3)
    each = [read(classifier, images) for classifier in classifiers.values()]
    torch.testing.assert_close(found.probability, (each[0][:, 3] + each[1][:, 3]) / 2)
    torch.testing.assert_close(found.entropy, (entropies(each[0]) + entropies(each[1])) / 2)
    torch.testing.assert_close(found.read_as, torch.stack([p.argmax(1) == 3 for p in each]))
    assert found.shares == [float((p.argmax(1) == 3).double().mean()) for p in each]
    flat = torch.tensor([0.0, 0.5, 0.75])[:, None, None, None].expand(3, 1, 8, 8)
    torch.testing.assert_close(read_digit(classifiers.values(), flat, 3).deviation, torch.tensor([0.5, 0, 0.25]))


def test_decoded_plane_is_each_code_decoded_as_the_digit(classifiers) -> None:
    pipeline = tiny_vae(0)
    plane = decode_plane(pipeline, 4, classifiers.values())
    for index in (0, 25, 399):
        alone = pipeline(4, latents=plane_latents(3)[index : index + 1], output_type="pt").images[0]
        torch.testing.assert_close(plane.images[index], alone)
    torch.testing.assert_close(
        plane.readings.probability, read_digit(classifiers.values(), plane.images, 4).probability
    )


def test_numbers_of_a_plane_split_it_at_the_radius() -> None:
    radius = plane_latents(2).norm(dim=1)
    readings = Readings(torch.rand(400), torch.rand(400), torch.rand(2, 400) > 0.5, radius / 10)
    numbers = Plane(torch.zeros(400, 1, 8, 8), readings).numbers()
    inside = [r / 10 for r in radius.tolist() if r <= 2]
    outside = [r / 10 for r in radius.tolist() if r > 2]
    assert numbers["inside"] == pytest.approx(np.mean(inside))
    assert numbers["outside"] == pytest.approx(np.mean(outside))
    assert numbers["nearly_grey"] == pytest.approx(sum(r < 1 for r in radius.tolist()) / 400)
    assert numbers["read_as"] == pytest.approx(float(readings.read_as.double().mean()))
    assert len(numbers["read_as_by_classifier"]) == 2


def test_runs_have_a_name_for_each_model_and_objective(study) -> None:
    asked = []

    def forget(name: str, concept: int, *, model=None, **options):
        asked.append((name, concept, options.get("latents")))
        return model or study.base(), {}

    study.forget = forget
    assert forget_one(study).before.vae.config.latent_dim == 3
    assert forget_one_by_encoder(study).after.vae.config.latent_dim == 3
    assert forget_one_by_encoder(study, latent_dim=2).after.vae.config.latent_dim == 2
    assert asked == [
        ("forget_0", 0, None),  # whose samples and Fisher the next one shares
        ("forget_1", DIGIT, None),
        ("forget_1_by_encoder", DIGIT, "encoder"),
        ("forget_1_by_encoder_latent_2", DIGIT, "encoder"),
    ]


@pytest.mark.slow
def test_run_writes_what_it_names(study, tmp_path) -> None:
    found = study.part("latent", spaces.compute)
    assert found == json.loads((tmp_path / "latent" / "latent.json").read_text())
    for figure in found["figures"]:
        assert (tmp_path / "latent" / figure["file"]).stat().st_size > 10_000
    assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])
    numbers = found["numbers"]
    assert [row[1] for row in found["tables"][-1]["rows"]] == [
        numbers["centroids"][when]["ratio"] for when in ("before", "after")
    ]
    assert min(numbers["centroids"]["moved"]) > 0
    assert numbers["default"]["plane"] != numbers["dead_zone"]["labels"]["1"]["after"]  # of another run
    moved = [
        encode_means(study.load(path), study.test_images, range(100))
        for path in (tmp_path / "base_None", tmp_path / "forget_1_None")
    ]
    assert numbers["default"]["moved"] == pytest.approx(float((moved[0] - moved[1]).abs().max()))
    assert f"{numbers['latent_2d']['after']['silhouette']:.3f}" in found["text"][7]
    for section, codes in (("tsne", numbers["tsne"]["codes"]), ("latent_2d", numbers["latent_2d"])):
        own = numbers[section]["silhouettes"]
        assert {when: values[DIGIT] for when, values in own.items()} == {
            when: pytest.approx(codes[when]["silhouette"]) for when in ("before", "after")
        }
        assert all(len(values) == 10 for values in own.values()) and own["before"] != own["after"]
    assert sum("codes have a silhouette against all other digits'" in text for text in found["text"]) == 2
    flat, full = (null_ratios(10, size, seed=0) for size in (2, 3))
    assert [Null(**numbers[name]["null"]) for name in ("tsne", "latent_2d", "centroids")] == [
        full[0],
        flat[0],
        full[1],
    ]
    assert [str(full[0]) in found["text"][1], str(flat[0]) in found["text"][7]] == [True, True]
    assert any(f"centroids at random give {full[1]}" in text for text in found["text"])
    study.__dict__["test_images"] = None  # nothing is computed again
    assert study.part("latent", spaces.compute) == found


def test_sentence_counts_what_moved_apart_and_reads_the_silhouette() -> None:
    before, after = Quarantine(0.1, 1.0, 0.2, 0.3, 1.0), Quarantine(0.3, 0.9, 0.4, 0.3, 1.0)
    null = Null(0.75, 0.39, 0.95)
    said = quarantine_text(before, after, "9 images", null)
    assert said.startswith("Over 9 images, 2 of 3 measures")
    assert "mean silhouette of the 1s' codes alone is 0.100 before and 0.300 after: weak structure at most" in said
    assert "the mean over a whole clustering, which this is not (up to 0.25 none, up to 0.5 weak" in said
    assert "give 0.75 in the mean, 95 % of the draws 0.39 to 0.95, less than 1" in said
    assert ": the distance is above that range before and within after." in said
    assert "0 of 3" in quarantine_text(before, before, "9 images", null)
    said = quarantine_text(after, before, "9 images", Null(2.0, 0.95, 3.0))
    assert said.startswith("Over 9 images, 1 of 3 measures") and ": no substantial structure" in said
    assert ": the distance is below that range before and within after." in said


def test_a_silhouette_up_to_a_half_is_weak_at_most() -> None:
    found = [structure(value) for value in (-0.3, 0.25, 0.254, 0.5, 0.51)]
    assert found == ["no substantial structure"] * 2 + ["weak structure at most"] * 2 + ["more than weak structure"]


@pytest.mark.parametrize("chunk_size", [7, 500])
def test_every_digit_has_the_silhouette_of_its_quarantine(chunk_size) -> None:
    points, labels = torch.randn(60, 3), torch.arange(60) % 4
    points[labels == 2] += 2
    found = digit_silhouettes(points, labels, chunk_size)
    assert found == pytest.approx([quarantine(points, labels, digit, k=1).silhouette for digit in range(4)])
    by_hand = []
    for i in range(60):
        distances = [math.dist(points[i].tolist(), other.tolist()) for other in points]
        within = sum(d for d, label in zip(distances, labels, strict=True) if label == labels[i]) / 14
        outside = sum(d for d, label in zip(distances, labels, strict=True) if label != labels[i]) / 45
        by_hand.append((outside - within) / max(outside, within))
    assert found == pytest.approx([np.mean([by_hand[i] for i in range(60) if i % 4 == digit]) for digit in range(4)])


def test_the_digits_silhouette_is_ranked_among_the_ten() -> None:
    before = [0.1, 0.11, 0.3, 0.2, 0.05, 0.0, 0.11, -0.1, 0.02, 0.01]
    after = [0.1, 0.31, 0.3, 0.2, 0.05, 0.0, 0.11, -0.1, 0.02, 0.01]
    found = silhouette_section("9 images", {"before": before, "after": after})
    (text,), (table,) = found["text"], found["tables"]
    assert "before forgetting it is number 3 from the top of 10 (the highest of the others: 0.300, the 2s')" in text
    assert "after forgetting it is the highest of 10 (the highest of the others: 0.300, the 2s')" in text
    assert found["numbers"] == {"silhouettes": {"before": before, "after": after}}
    assert table["rows"] == [["before", *before], ["after", *after]]
    assert table["columns"] == ["codes", *map(str, range(10))] and table["title"].endswith("9 images")


@pytest.mark.slow
def test_codes_that_did_not_change_did_not_move(study, tmp_path) -> None:
    codes = torch.randn(100, 3)
    found = spaces._centroids(study, {"before": codes, "after": codes.clone()}, tmp_path)
    assert found["numbers"]["moved"] == [0.0] * 10
    assert found["tables"][0]["rows"][0][1:] == found["tables"][0]["rows"][1][1:]


def test_summary_separates_the_digit_from_the_others() -> None:
    distances = torch.tensor([[0.0, 4, 2, 3], [4, 0, 5, 6], [2, 5, 0, 1], [3, 6, 1, 0]])
    assert spaces._summary(distances) == pytest.approx(
        {"ratio": 5 / 2, "least_of_digit": 4, "largest_of_digit": 6, "largest_of_others": 3, "largest": 6}
    )
