"""Attacks on a decoder's inputs: against loops, and on a decoder that can draw the class and one that cannot."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.models import ConditionalVAE
from studies.mnist.attacks.attempt import one_hot
from studies.mnist.attacks.inputs import interpolate, noisy_condition, posterior_sample, random_latents
from studies.mnist.attacks.recovered import nearest_neighbours, random_decoder, reader, recovered
from studies.mnist.attacks.search import optimise_input


MODES = ["free", "simplex", "fixed"]
TARGET = 2


def make_patterns() -> torch.Tensor:
    """One image a class, [3, 1, 8, 8]: bright on the left, above, and in a ring."""
    patterns = torch.zeros(3, 1, 8, 8)
    patterns[0, :, :, :4] = 1
    patterns[1, :, :4] = 1
    patterns[2, :, 1:-1, 1:-1] = 1
    patterns[2, :, 3:5, 3:5] = 0
    return patterns


def make_vae() -> ConditionalVAE:
    return ConditionalVAE(image_size=8, num_classes=3, hidden_sizes=(16,), latent_dim=2)


def read_by_distance(images: torch.Tensor) -> torch.Tensor:
    """Logits by the distance from each class's pattern."""
    return -(images[:, None] - make_patterns()).square().mean((2, 3, 4)) * 30


def read_by_angle(images: torch.Tensor) -> torch.Tensor:
    """Logits by the angle with each class's pattern: another reader."""
    centred = [F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True)) for x in (images, make_patterns())]
    return 8 * centred[0] @ centred[1].T


@pytest.fixture(scope="module")
def vae() -> ConditionalVAE:
    """Trained on slightly different copies of the patterns until it draws each class that it is asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_vae()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        labels = torch.arange(3).repeat(8)
        for _ in range(150):
            images = (make_patterns()[labels] + 0.1 * torch.randn(24, 1, 8, 8)).clamp(0, 1)
            output = model(images, labels, torch.randn(24, 2))
            prior = (output.mean.square() + output.log_variance.exp() - output.log_variance - 1).sum() / 2
            loss = F.binary_cross_entropy_with_logits(output.logits, images, reduction="sum") + prior
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


@pytest.fixture
def flat_vae(vae) -> ConditionalVAE:
    """A decoder that draws one grey image whatever it is given: it cannot draw any class."""
    flat = copy.deepcopy(vae)
    for parameter in flat.decoder[-1].parameters():
        parameter.data.zero_()
    return flat


def starts(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 2), one_hot(torch.zeros(count, dtype=torch.long), 3)


def attack(decode, mode="simplex", start=None, **options):
    latents, condition = starts() if start is None else start
    options = {"steps": 60, "keep_every": 20} | options
    return optimise_input(decode, read_by_distance, TARGET, latents, condition, mode, **options)


def same(one, other, **tolerances) -> None:
    for name, value in vars(one).items():
        torch.testing.assert_close(value, getattr(other, name), **tolerances)


# --- inputs that training never paired


def test_random_latents_ask_with_the_scaled_one_hot_row(vae):
    attempt = random_latents(vae.decode, 1, 400, 0.1, seed=3, latent_dim=2, num_classes=3)
    torch.testing.assert_close(attempt.conditions, torch.tensor([[0.0, 0.1, 0.0]]).expand(400, 3))
    torch.testing.assert_close(attempt.images, vae.decode(attempt.latents, attempt.conditions).detach())
    assert not attempt.images.requires_grad
    torch.testing.assert_close(attempt.latents.mean(0), torch.zeros(2), atol=0.2, rtol=0)
    torch.testing.assert_close(attempt.latents.T.cov(), torch.eye(2), atol=0.25, rtol=0)


def test_random_latents_at_full_strength_are_plain_sampling(vae):
    attempt = random_latents(vae.decode, TARGET, 20, 1.0, seed=0, latent_dim=2, num_classes=3)
    torch.testing.assert_close(attempt.images, vae.decode(attempt.latents, torch.full((20,), TARGET)).detach())
    assert recovered(attempt.images, {"distance": read_by_distance}, TARGET)["distance"].recovered.right == 20


def test_random_latents_depend_on_seed_and_index_alone(vae):
    few, many, other = (
        random_latents(vae.decode, 0, count, 1.0, seed=seed, latent_dim=2, num_classes=3)
        for count, seed in ((3, 5), (30, 5), (3, 6))
    )
    torch.testing.assert_close(few.latents, many.latents[:3], rtol=0, atol=0)
    assert not few.latents.isclose(other.latents).any()


def test_a_posterior_sample_has_the_posteriors_mean_and_variance():
    mean, log_variance = torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 1.0])
    sample = posterior_sample(mean.expand(2000, 2), log_variance.expand(2000, 2), seed=0)
    torch.testing.assert_close(sample.mean(0), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(sample.var(0), log_variance.exp(), atol=0, rtol=0.15)
    again = posterior_sample(mean.expand(5, 2), log_variance.expand(5, 2), seed=0)
    torch.testing.assert_close(again, sample[:5])


def test_noisy_conditions_with_and_without_softmax(vae):
    latents, labels = torch.randn(500, 2), torch.arange(500) % 3
    flat, plain = (
        noisy_condition(vae.decode, latents, labels, seed=1, num_classes=3, softmax=softmax)
        for softmax in (True, False)
    )
    noise = plain.conditions - F.one_hot(labels, 3)
    assert noise.min() >= 0 and 0.099 < noise.max() <= 0.1 + 1e-6
    torch.testing.assert_close(noise.mean(0), torch.full((3,), 0.05), atol=0.005, rtol=0)
    exponents = plain.conditions.exp()
    torch.testing.assert_close(flat.conditions, exponents / exponents.sum(1, keepdim=True))
    torch.testing.assert_close((flat.latents - latents).std(0), torch.full((2,), 0.1), atol=0.01, rtol=0)
    for attempt in (flat, plain):
        torch.testing.assert_close(attempt.images, vae.decode(attempt.latents, attempt.conditions).detach())


def test_noise_depends_on_the_seed_and_none_changes_nothing(vae):
    latents, labels = torch.randn(3, 2), torch.tensor([0, 1, 2])
    one, again, other = (noisy_condition(vae.decode, latents, labels, seed=s, num_classes=3) for s in (1, 1, 2))
    same(one, again, rtol=0, atol=0)
    assert not one.latents.isclose(other.latents).any() and not one.conditions.isclose(other.conditions).any()
    still = noisy_condition(
        vae.decode, latents, labels, 1, num_classes=3, latent_noise=0, condition_noise=0, softmax=False
    )
    torch.testing.assert_close(still.images, vae.decode(latents, labels).detach())


# --- walks


def test_a_walk_goes_in_equal_steps_through_its_keys(vae):
    # Far enough apart for a + (b - a) to differ from b.
    latents, conditions = torch.tensor([[1000, 0.1], [0.3, 1000], [300, 0.7]]), torch.eye(3)
    walk = interpolate(vae.decode, list(latents), list(conditions), steps_per_leg=12)
    assert walk.images.shape == (23, 1, 8, 8)
    for path, keys in ((walk.latents, latents), (walk.conditions, conditions)):
        torch.testing.assert_close(path[[0, 11, 22]], keys, rtol=0, atol=0)  # the middle once, shared by both legs
        slow = [keys[i // 11] + (keys[min(i // 11 + 1, 2)] - keys[i // 11]) * (i % 11) / 11 for i in range(23)]
        torch.testing.assert_close(path, torch.stack(slow))
    torch.testing.assert_close(walk.images, vae.decode(walk.latents, walk.conditions).detach())


def test_equal_conditions_stay_as_they_are(vae):
    condition = torch.rand(3)
    walk = interpolate(vae.decode, torch.randn(2, 2), [condition, condition], steps_per_leg=7)
    torch.testing.assert_close(walk.conditions, condition.expand(7, 3), rtol=0, atol=0)


# --- optimised inputs


@pytest.mark.parametrize("mode", ["free", "simplex", "fixed"])
def test_equals_a_loop_over_the_starts(vae, mode):
    latents, condition = starts(3)
    result = attack(vae.decode, mode, (latents, condition), steps=5, keep_every=2)
    assert result.steps == (0, 2, 4, 5)
    for index in range(3):
        z, c = latents[index : index + 1].clone(), condition[index : index + 1].clone()
        c = torch.tensor([[0.0, 0.0, 1.0]]) if mode == "fixed" else c.requires_grad_()
        moving = [z.requires_grad_()] + ([c] if mode != "fixed" else [])
        optimizer = torch.optim.Adam(moving, lr=0.1)
        for step in range(6):
            weights = c.exp() / c.exp().sum() if mode == "simplex" else c
            image = copy.deepcopy(vae).decode(z, weights)
            loss = F.cross_entropy(read_by_distance(image), torch.tensor([TARGET]))
            if step in result.steps:
                row = result.steps.index(step)
                torch.testing.assert_close(result.frames[row, index], image[0].detach())
                torch.testing.assert_close(result.target_probability[row, index], (-loss).exp().detach())
            if step < 5:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(result.latents[index], z[0].detach())
        torch.testing.assert_close(result.conditions[index], weights[0].detach())
    torch.testing.assert_close(result.images, result.frames[-1], rtol=0, atol=0)
    torch.testing.assert_close(result.images, vae.decode(result.latents, result.conditions).detach())


@pytest.mark.parametrize("mode", MODES)
def test_brings_back_a_class_that_the_decoder_can_draw(vae, mode):
    result = attack(vae.decode, mode)
    if mode != "fixed":  # which begins with the class's own condition
        assert result.target_probability[0].max() < 0.5
    assert result.target_probability[-1].min() > 0.8
    readings = recovered(result.images, {"climbed": read_by_distance, "held out": read_by_angle}, TARGET)
    assert readings["held out"].recovered.right == 4
    torch.testing.assert_close(readings["climbed"].target_probability, result.target_probability[-1])


@pytest.mark.parametrize("mode", MODES)
def test_finds_nothing_where_the_decoder_cannot_draw_the_class(flat_vae, mode):
    result = attack(flat_vae.decode, mode)
    torch.testing.assert_close(result.images, torch.full((4, 1, 8, 8), 0.5))
    torch.testing.assert_close(result.target_probability, result.target_probability[:1].expand(4, 4))


def test_simplex_conditions_are_probabilities_and_free_ones_need_not_be(vae):
    simplex, free = attack(vae.decode, "simplex").conditions, attack(vae.decode, "free").conditions
    torch.testing.assert_close(simplex.sum(1), torch.ones(4))
    assert simplex.min() >= 0
    assert free.min() < 0 and not free.sum(1).isclose(torch.ones(4)).any()


def test_what_is_held_does_not_move_and_the_starts_are_not_written_to(vae):
    latents, condition = starts()
    before = latents.clone(), condition.clone()
    fixed = attack(vae.decode, "fixed", (latents, condition))
    torch.testing.assert_close(fixed.conditions, one_hot(torch.full((4,), TARGET), 3), rtol=0, atol=0)
    assert not fixed.latents.isclose(latents).any()
    assert not attack(vae.decode, "free", (latents, condition)).conditions.isclose(condition).all()
    torch.testing.assert_close((latents, condition), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_models_are_left_as_they_were(vae, mode):
    # In training mode, as both are when they are made: batch norm and dropout would leave their marks.
    classifier = DigitClassifier({"shape": ["left", "top", "ring"]}, image_size=8, kernel_size=3, padding=1)
    models = vae.train(), classifier.train()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    with torch.no_grad():  # a caller's setting that must not matter
        result = optimise_input(vae.decode, reader(classifier, "shape"), TARGET, *starts(), mode, steps=3)
    expected = classifier.probabilities((2 * result.images - 1).expand(-1, 3, -1, -1))["shape"][:, TARGET]
    torch.testing.assert_close(result.target_probability[-1], expected)
    assert vae.training and classifier.training
    for model, weights in zip(models, before, strict=True):
        torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_decoder_without_a_condition_can_be_attacked(vae):
    labels = torch.zeros(4, dtype=torch.long)
    result = attack(lambda latents, condition: vae.decode(latents, labels), "free")
    torch.testing.assert_close(result.conditions, one_hot(labels, 3), rtol=0, atol=0)


def test_frames_stay_as_they_were_when_the_latents_are_the_image():
    latents = torch.rand(2, 64)
    result = attack(lambda z, c: z.unflatten(1, (1, 8, 8)), "fixed", (latents, torch.zeros(2, 3)))
    torch.testing.assert_close(result.frames[0].flatten(1), latents, rtol=0, atol=0)


# --- measures


def test_recovered_counts_what_each_reader_reads():
    images = torch.cat([make_patterns()[[2, 2, 0]], torch.rand(300, 1, 8, 8)])
    readings = recovered(images, {"distance": read_by_distance, "angle": read_by_angle}, TARGET, batch_size=7)
    for read, reading in zip((read_by_distance, read_by_angle), readings.values(), strict=True):
        probabilities = torch.cat([read(image[None]).softmax(1) for image in images])
        torch.testing.assert_close(reading.target_probability, probabilities[:, TARGET])
        guesses = probabilities.argmax(1).tolist()
        assert reading.guesses.tolist() == guesses
        assert reading.histogram.tolist() == [guesses.count(i) for i in range(3)]
        assert (reading.recovered.right, reading.recovered.total) == (guesses.count(TARGET), 303)


def test_nearest_neighbours_equal_a_loop():
    images, real = torch.rand(9, 1, 8, 8), torch.rand(40, 1, 8, 8)
    found = nearest_neighbours(images, real, chunk_size=4)
    for index, image in enumerate(images.flatten(1).tolist()):
        slow = [math.dist(image, other) for other in real.flatten(1).tolist()]
        assert found.indices[index] == slow.index(min(slow))
        assert found.distances[index].item() == pytest.approx(min(slow), abs=1e-6)


def test_a_copy_is_at_no_distance():
    real = torch.rand(40, 1, 8, 8)
    found = nearest_neighbours(real.flip(0), real)
    torch.testing.assert_close(found.distances, torch.zeros(40), rtol=0, atol=0)
    torch.testing.assert_close(found.indices, torch.arange(40).flip(0))


def test_a_reader_shows_grey_images_to_a_classifier_of_colours_in_its_range():
    classifier = AttributeClassifier({"ink": ["red", "blue"], "size": ["a", "b", "c"]}, image_size=16)
    images = torch.rand(2, 1, 16, 16)
    expected = classifier(torch.cat([images] * 3, 1) * 2 - 1)["size"]
    torch.testing.assert_close(reader(classifier, "size")(images), expected)
    torch.testing.assert_close(reader(classifier, "size")(images.repeat(1, 3, 1, 1)), expected)


def test_a_random_decoder_is_the_same_architecture_with_weights_of_its_seed(vae):
    state = torch.get_rng_state()
    before = copy.deepcopy(vae.state_dict())
    one, again, other = (random_decoder(vae, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    torch.testing.assert_close(dict(vae.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(dict(one.state_dict()), dict(again.state_dict()), rtol=0, atol=0)
    assert one.config == vae.config and not one.training
    assert random_decoder(copy.deepcopy(vae).type(torch.float64), 0).dtype == torch.float64
    for name, weight in one.state_dict().items():
        assert weight.shape == before[name].shape
        assert not weight.isclose(before[name]).all() and not weight.isclose(other.state_dict()[name]).all()
