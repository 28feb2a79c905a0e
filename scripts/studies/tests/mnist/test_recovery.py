"""Part 3 of the MNIST study: what is counted of the attacks and their controls, against hand computations."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

from sa_diffusers.data.labelled_images import LabelledImages, load_labelled_images
from sa_diffusers.evaluation.judges.classifier import Score
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from studies.mnist.attacks import joint, probes, recovery, restarts
from studies.mnist.attacks.inputs import noisy_condition, posterior_sample
from studies.mnist.attacks.probes import contrast, random_probes, walks
from studies.mnist.attacks.recovered import Reading
from studies.mnist.attacks.restarts import (
    RANDOM,
    Gallery,
    attacked_decoders,
    judged,
    make_gallery,
    measure,
    side_by_side,
    start_latents,
    verdict,
)
from studies.mnist.attacks.setting import (
    FORGOT,
    NEVER,
    ORIGINAL,
    counts,
    histogram_cell,
    set_up,
    share_cell,
    spell,
    summary,
)
from studies.mnist.sections import merge, merge_named
from studies.mnist.strips import Strip, strips_figure
from studies.mnist.study import Study, StudyConfig


def tiny_vae(seed: int) -> ConditionalVAE:
    torch.manual_seed(seed)
    return ConditionalVAE(8, hidden_sizes=(16,), latent_dim=3).eval()


@pytest.fixture
def study(tmp_path) -> Study:
    """On real images; the base, the one that never saw a 1 and the one that forgot differ in their weights."""
    study = Study(StudyConfig(base_config="configs/digits8x8_cvae.yaml", output_dir=str(tmp_path), num_threads=1))
    torch.manual_seed(1)
    names = {"digit": [str(digit) for digit in range(10)]}
    study.__dict__["classifiers"] = {
        name: DigitClassifier(names, image_size=8, kernel_size=3, padding=1, channels=(4, 4), num_features=8).eval()
        for name in ("judge", "second", "third")
    }
    study.__dict__["test_images"] = load_labelled_images("digits8x8", "", "test")
    train = load_labelled_images("digits8x8", "", "train")
    study.__dict__["train_images"] = LabelledImages(train.images[:300], train.labels[:300], train.names)

    def save(name: str, seed: int) -> Path:
        if not (tmp_path / name).exists():
            ConditionalVAEPipeline(tiny_vae(seed)).save_pretrained(tmp_path / name)
        return tmp_path / name

    study.base = lambda latent_dim=None, without=None: save("base", 1) if without is None else save("never", 2)
    study.forget = lambda name, concept, **options: (save("forgot", 3), {})
    return study


def reading(guesses: list[int], probabilities: list[float]) -> Reading:
    found = torch.tensor(guesses)
    score = Score(int((found == 1).sum()), len(found))
    return Reading(torch.tensor(probabilities), found, found.bincount(minlength=10), score)


# --- what is counted


def test_summary_counts_the_first_reader_and_the_votes_of_the_others() -> None:
    readings = [
        reading([1, 1, 7, 0], [0.9, 0.5, 0.2, 0.0]),
        reading([1, 7, 1, 1], [0.4, 0.1, 0.5, 0.6]),
        reading([1, 1, 7, 1], [0.8, 0.8, 0.1, 0.7]),
        reading([1, 0, 1, 7], [1.0, 0.0, 1.0, 0.0]),
    ]
    found = summary(readings)
    assert (found["count"], found["total"], found["histogram"]) == (2, 4, [1, 2, 0, 0, 0, 0, 0, 1, 0, 0])
    assert found["interval"] == list(Score(2, 4).interval)
    assert found["probability"] == pytest.approx(0.4)
    assert found["held_out"] == [0.75, 0.75, 0.5]
    assert found["held_out_probability"] == pytest.approx((0.4 + 0.6 + 0.5) / 3)
    assert found["majority"] == 3  # by 3, 1, 2 and 2 of the three
    json.dumps(found)


def test_half_of_the_held_out_readers_is_no_majority() -> None:
    others = [reading([1, 1], [1.0, 1.0]), reading([0, 1], [0.0, 1.0])]
    assert summary([reading([7, 7], [0.0, 0.0]), *others])["majority"] == 1


def test_without_held_out_readers_nothing_is_said_of_them() -> None:
    found = summary([reading([1, 1], [1.0, 1.0])])
    assert (found["held_out"], found["held_out_probability"], found["majority"]) == ([], None, 0)
    assert share_cell([]) == "–"
    assert judged(found, held_out=False) == Score(2, 2)


def test_cells_and_sentences() -> None:
    assert spell([7, 7, 7, 1, 7]) == "7 x 3, 1 x 1, 7 x 1"
    assert histogram_cell([20, 8, 0, 5]) == "0:20 1:8 3:5"
    assert share_cell([0.25, 0.5, 0.75]) == "0.50 (0.25 to 0.75)"
    assert counts({"a": {"count": 3, "total": 9}, "b": {"count": 0, "total": 9}}) == "3 of 9 (a), 0 of 9 (b)"
    part = {"text": ["t"], "tables": [1], "figures": [2]}
    merged = merge([part | {"numbers": {"x": 1}}, part | {"numbers": {"y": 2}}])
    assert merged == {"text": ["t", "t"], "tables": [1, 1], "figures": [2, 2], "numbers": {"x": 1, "y": 2}}
    named = merge_named({"a": part | {"numbers": {"x": 1}}, "b": part | {"numbers": {"x": 2}}})
    assert named == merged | {"numbers": {"a": {"x": 1}, "b": {"x": 2}}}


def test_contrast_is_the_pixels_standard_deviation() -> None:
    images = torch.stack([torch.full((1, 2, 2), 0.5), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])])
    torch.testing.assert_close(contrast(images), torch.tensor([0.0, 0.5]))


# --- what the decoders are given


def test_the_latents_are_those_of_the_original_and_the_decoders_each_their_own(study) -> None:
    setting = set_up(study)
    for name, seed in ((ORIGINAL, 1), (NEVER, 2), (FORGOT, 3)):
        torch.testing.assert_close(dict(setting.victims[name].state_dict()), dict(tiny_vae(seed).state_dict()))
    data = study.test_images
    first = int((data.labels == 7).nonzero()[0])
    mean, _ = tiny_vae(1).encode(data.sample([first]), torch.tensor([7]))
    torch.testing.assert_close(setting.first_means(7, 1), mean.detach())
    assert data.labels[setting.test_indices(4, 5)].tolist() == [4] * 5
    assert len(setting.test_indices(4, 10_000)) == int((data.labels == 4).sum())


def test_walks_go_through_the_means_under_their_conditions(study) -> None:
    setting = set_up(study)
    deceptive, double, triangular = (probe.attempt(setting.victims[FORGOT].decode) for probe in walks(setting))
    means = {digit: setting.first_means(digit, 1)[0] for digit in (7, 1, 4)}
    assert [len(walk.images) for walk in (deceptive, double, triangular)] == [12, 12, 23]
    for walk in (deceptive, double):
        torch.testing.assert_close(walk.latents[[0, -1]], torch.stack([means[7], means[1]]))
    torch.testing.assert_close(triangular.latents[[0, 11, 22]], torch.stack([means[7], means[1], means[4]]))
    assert deceptive.conditions.argmax(1).tolist() == [7] * 12 and deceptive.conditions.sum() == 12
    assert double.conditions[[0, -1]].argmax(1).tolist() == [7, 1]
    assert triangular.conditions[[0, 11, 22]].argmax(1).tolist() == [7, 1, 4]


def test_random_probes_weaken_or_disturb_the_condition(study) -> None:
    setting = set_up(study)
    weak, full, flat, plain = (probe.attempt(setting.victims[ORIGINAL].decode) for probe in random_probes(setting))
    for attempt, scale in ((weak, 0.1), (full, 1.0)):
        assert len(attempt.images) == 100
        torch.testing.assert_close(attempt.conditions.sum(0), scale * 100 * torch.eye(10)[1])
    torch.testing.assert_close(flat.conditions, plain.conditions.softmax(1))
    assert len(plain.images) == 10 and plain.conditions.argmax(1).tolist() == [1] * 10
    data, indices = study.test_images, setting.test_indices(1, 10)
    latents = posterior_sample(*tiny_vae(1).encode(data.sample(indices), data.labels[indices]), seed=0)
    for attempt in (flat, plain):
        torch.testing.assert_close(
            attempt.latents,
            noisy_condition(tiny_vae(1).decode, latents, data.labels[indices], 0, num_classes=10).latents,
        )


def test_every_model_gets_its_share_of_the_rows() -> None:
    models = [tiny_vae(seed) for seed in (1, 2, 3)]
    latents, condition = torch.randn(5, 3), torch.rand(5, 10)
    images = side_by_side(models)(latents, condition)
    for row, model in enumerate([models[0], models[0], models[1], models[1], models[2]]):
        torch.testing.assert_close(images[row], model.decode(latents[row : row + 1], condition[row : row + 1])[0])
    torch.testing.assert_close(
        side_by_side(models)(latents[:2], condition[:2])[1], models[1].decode(latents, condition)[1]
    )


def test_half_of_the_restarts_come_from_real_images_and_half_from_the_prior(study) -> None:
    setting = set_up(study)
    latents = start_latents(setting, 7, 400)
    sevens = int((study.test_images.labels == 7).sum())
    assert latents.shape == (400, 3) and sevens < 200
    torch.testing.assert_close(latents[:sevens], setting.first_means(7, 200))
    prior = latents[sevens:]
    torch.testing.assert_close(prior.mean(0), torch.zeros(3), atol=0.2, rtol=0)
    torch.testing.assert_close(prior.std(0), torch.ones(3), atol=0.15, rtol=0)
    few = start_latents(setting, 7, 6)
    torch.testing.assert_close(few[:3], latents[:3])
    torch.testing.assert_close(few[3:], prior[:3])


def test_the_untrained_decoders_are_neither_the_original_nor_each_other(study) -> None:
    decoders = attacked_decoders(set_up(study))
    assert list(decoders) == [FORGOT, RANDOM, NEVER, ORIGINAL]
    latents, condition = torch.zeros(4, 3), torch.zeros(4, 10)
    untrained = decoders[RANDOM](latents, condition)
    images = [*untrained, decoders[ORIGINAL](latents, condition)[0], decoders[FORGOT](latents, condition)[0]]
    assert all(not a.isclose(b).all() for i, a in enumerate(images) for b in images[:i])


# --- what came out


def flat(*values: float) -> torch.Tensor:
    """Images of 2 x 2 equal pixels; two of them are twice the difference of their values apart."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2)


def test_distances_are_in_units_of_those_between_real_images() -> None:
    gallery = Gallery(flat(0.0, 0.5, 1.0), torch.tensor([1, 7, 1]), scale=0.4)
    found = gallery.compare(flat(0.1, 0.45, 0.7))
    # from 0 or 1: 0.2, 0.9, 0.6; the nearest of all are 0 (a 1), 0.5 (a 7) and 0.5
    assert found == {"distance_ratio": pytest.approx(0.6 / 0.4), "nearest_is_digit": pytest.approx(1 / 3)}


def test_the_scale_is_the_distance_of_test_images_from_training_images(study) -> None:
    data, train = study.test_images, study.train_images
    train.labels = train.labels.roll(1)  # so that the nearest image of all is not labelled a 1
    ones = [image.flatten().tolist() for image in train.sample(range(len(train)))[train.labels == 1]]
    distances = [
        min(math.dist(image.flatten().tolist(), other) for other in ones)
        for image in data.sample((data.labels == 1).nonzero()[:, 0])
    ]
    gallery = make_gallery(set_up(study))
    assert gallery.scale == pytest.approx(statistics.median(distances), abs=1e-5)
    assert len(gallery.of_digit) == len(ones) < len(gallery.images) == len(train)


def test_measure_follows_the_first_start(study) -> None:
    setting = set_up(study)
    gallery = make_gallery(setting)
    attempts = joint.attack_all(setting, torch.randn(4, 3), torch.rand(4, 10), "simplex", steps=5)
    attempt = attempts[ORIGINAL]
    found = measure(setting, gallery, attempt)
    readings = setting.read(attempt.images)
    assert found["first_start"]["before"] == pytest.approx(setting.read(attempt.frames[0])[0].target_probability[0])
    assert found["first_start"]["after"] == pytest.approx(readings[0].target_probability[0].item(), rel=1e-4)
    others = [float(other.target_probability[0]) for other in readings[1:]]
    assert found["first_start"]["held_out"] == pytest.approx(sum(others) / 2)
    norms = sorted(math.hypot(*row) for row in attempt.latents.tolist())
    assert found["latent_norm"] == pytest.approx((norms[1] + norms[2]) / 2)
    assert found["distance_ratio"] == gallery.compare(attempt.images)["distance_ratio"]


@pytest.mark.parametrize(
    ("forgot", "untrained", "never", "distance", "expected"),
    [
        (0, 0, 0, 1.0, "recovers nothing"),
        (32, 32, 32, 1.0, f"the controls ({RANDOM}, {NEVER})"),
        (32, 3, 29, 1.0, f"the control ({NEVER})"),
        (32, 3, 11, 1.0, "nearer to real ones: something of the 1 can still be reached"),
        (32, 3, 11, 2.0, "no nearer to real ones"),  # than the never-trained, at 2
        (20, 3, 11, 1.0, f"the control ({NEVER})"),  # .45 to .77 and .20 to .52
    ],
)
def test_what_the_controls_say(forgot, untrained, never, distance, expected) -> None:
    scores = {
        FORGOT: Score(forgot, 32),
        RANDOM: Score(untrained, 32),
        NEVER: Score(never, 32),
        ORIGINAL: Score(32, 32),
    }
    distances = {FORGOT: distance, RANDOM: 3.0, NEVER: 2.0, ORIGINAL: 0.8}
    assert expected in verdict(scores, distances)


# --- figures and the whole part


def test_strips_show_every_image_and_caption() -> None:
    strips = [Strip("above", torch.rand(3, 1, 4, 4), ["1", "2", "3"]), Strip("below", torch.rand(2, 1, 4, 4))]
    figure = strips_figure(strips, "title")
    shown = figure.axes[0].images
    torch.testing.assert_close(
        torch.stack([torch.from_numpy(image.get_array().data) for image in shown]),
        torch.cat([strip.images[:, 0] for strip in strips]),
    )
    assert all(image.get_clim() == (0, 1) for image in shown)
    texts = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert set(texts) == {"above", "1", "2", "3", "below"}
    for caption, image in zip("123", shown, strict=False):  # beneath its image, y pointing down
        left, right, bottom, _ = image.get_extent()
        assert left < texts[caption][0] < right and bottom < texts[caption][1] < shown[3].get_extent()[3]
    with pytest.raises(ValueError, match="a caption an image, got 1 for 2"):
        strips_figure([Strip("x", torch.rand(2, 1, 4, 4), ["1"])], "title")
    with pytest.raises(ValueError, match="at least one strip"):
        strips_figure([], "title")


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [True, False])
def test_the_part_is_a_page_of_all_attacks(study, monkeypatch, held_out) -> None:
    monkeypatch.setattr(probes, "LATENTS", 12)
    monkeypatch.setattr(joint, "STEPS", 2)
    monkeypatch.setattr(joint, "KEEP_EVERY", 1)
    monkeypatch.setattr(restarts, "RESTARTS", 5)
    monkeypatch.setattr(joint, "SHOWN", 2)
    monkeypatch.setattr(recovery, "SHOWN", 2)
    if not held_out:
        study.__dict__["classifiers"] = {"judge": study.classifiers["judge"]}
    found = study.part("attacks", recovery.compute)
    assert len(found["text"]) == 1 + 4 + 3 + 1 + 3 and len(found["tables"]) == 3
    for table in found["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert [len(table["rows"]) for table in found["tables"]] == [12, 9, 3 * 4 + 2]
    files = {figure["file"] for figure in found["figures"]}
    assert len(files) == len(found["figures"]) == 12
    for name in files:
        Image.open(study.folder / "attacks" / name).verify()
    numbers = found["numbers"]["joint optimisation"]
    assert {mode: set(part) for mode, part in numbers.items() if mode != "references"} == {
        mode: {FORGOT, RANDOM, NEVER, ORIGINAL} for mode in ("free", "simplex", "fixed")
    }
    assert numbers["fixed"][FORGOT]["total"] == 5
    monkeypatch.setattr(recovery, "set_up", None)  # it is not computed again
    assert study.part("attacks", recovery.compute) == found


@pytest.mark.parametrize(
    ("held_out", "words"),
    [(0, "the attacked classifier (none"), (1, "the one held-out classifier"), (3, "most of the 3 held-out")],
)
def test_the_judge_is_named_whoever_is_held_out(held_out, words) -> None:
    assert joint._judge(held_out).startswith(words)


def test_the_modes_are_those_of_the_attack() -> None:
    assert set(joint.MODES) == set(joint.MODE_TEXTS)
    assert restarts.RESTARTS >= 16
