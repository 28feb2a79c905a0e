"""The losses against their formulas, written out one sample and one number at a time in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from sa_diffusers.core.losses import DiffusionLoss, FlowMatchingLoss, VAELoss
from sa_diffusers.models import ConditionalVAE


T = 10
ALPHAS = torch.linspace(0.99, 0.02, T, dtype=torch.float64)


def model(noisy, timesteps, scale):
    """A denoiser whose answer depends on everything it is given, and on each sample alone."""
    return SimpleNamespace(sample=torch.sin(noisy) * scale[:, None, None, None] + timesteps[:, None, None, None] / T)


@pytest.fixture
def batch() -> dict:
    return {"sample": torch.randn(5, 2, 3, 4, dtype=torch.float64), "scale": torch.rand(5, dtype=torch.float64)}


TERMS = torch.tensor([0, 9, 4, 4, 7])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_the_written_out_formula(batch, prediction_type, reduction):
    noise = torch.randn_like(batch["sample"])
    expected = []
    for x, scale, t, eps in zip(batch["sample"], batch["scale"], TERMS.tolist(), noise, strict=True):
        alpha, sigma = math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])
        errors = []
        for pixel, e in zip(x.flatten().tolist(), eps.flatten().tolist(), strict=True):
            target = e if prediction_type == "epsilon" else alpha * e - sigma * pixel
            errors.append((math.sin(alpha * pixel + sigma * e) * scale.item() + t / T - target) ** 2)
        expected.append(sum(errors) / (len(errors) if reduction == "mean" else 1))
    values = DiffusionLoss(ALPHAS, prediction_type, reduction)(model, batch, TERMS, noise)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_a_perfect_v_prediction_costs_nothing(batch):
    """v = alpha eps - sigma x is what recovers x = alpha x_t - sigma v, so the loss of that v must be 0."""
    noise = torch.randn_like(batch["sample"])
    alpha, sigma = (a.sqrt()[TERMS].view(-1, 1, 1, 1) for a in (ALPHAS, 1 - ALPHAS))

    def knows_the_sample(noisy, timesteps, scale):
        return SimpleNamespace(sample=(alpha * noisy - batch["sample"]) / sigma)

    values = DiffusionLoss(ALPHAS, "v_prediction")(knows_the_sample, batch, TERMS, noise)
    torch.testing.assert_close(values, torch.zeros(5, dtype=torch.float64))


def test_each_value_depends_on_its_own_sample_only(batch):
    loss, noise = DiffusionLoss(ALPHAS), torch.randn_like(batch["sample"])
    whole = loss(model, batch, TERMS, noise)
    for row in range(5):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(
            loss(model, alone, TERMS[row : row + 1], noise[row : row + 1]), whole[row : row + 1]
        )


def test_agrees_with_the_noise_and_velocity_of_diffusers(batch):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=T)
    sample, noise = batch["sample"].float(), torch.randn(5, 2, 3, 4)
    seen = {}

    def remember(noisy, timesteps, scale):
        seen["noisy"] = noisy
        return SimpleNamespace(sample=torch.zeros_like(noisy))

    values = DiffusionLoss(scheduler.alphas_cumprod, "v_prediction", "sum")(
        remember, {"sample": sample, "scale": batch["scale"]}, TERMS, noise
    )
    torch.testing.assert_close(seen["noisy"], scheduler.add_noise(sample, noise, TERMS))
    torch.testing.assert_close(values, scheduler.get_velocity(sample, noise, TERMS).square().flatten(1).sum(1))


def test_signal_to_noise():
    expected = [ALPHAS[t].item() / (1 - ALPHAS[t].item()) for t in TERMS.tolist()]
    torch.testing.assert_close(
        DiffusionLoss(ALPHAS).signal_to_noise(TERMS), torch.tensor(expected, dtype=torch.float64)
    )


def test_noise_is_a_function_of_the_generator(batch):
    loss = DiffusionLoss(ALPHAS)
    first, again, other = (loss.sample_noise(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert first.shape == batch["sample"].shape
    assert first.dtype == torch.float64
    assert (first != other).all()


@pytest.mark.parametrize("arguments", [{"prediction_type": "sample"}, {"reduction": "none"}])
def test_other_types_are_refused(arguments):
    with pytest.raises(ValueError, match=f"got '{next(iter(arguments.values()))}'"):
        DiffusionLoss(ALPHAS, **arguments)


@pytest.fixture
def vae() -> ConditionalVAE:
    return ConditionalVAE(image_size=3, num_channels=2, num_classes=4, hidden_sizes=(6,), latent_dim=3).double().eval()


@pytest.fixture
def images() -> dict:
    return {"sample": torch.rand(5, 2, 3, 3, dtype=torch.float64), "labels": torch.tensor([0, 3, 1, 1, 2])}


def vae_terms(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.long)


def test_vae_loss_equals_the_written_out_formula(vae, images):
    noise = torch.randn(5, 3, dtype=torch.float64)
    expected = []
    for x, label, eps in zip(images["sample"], images["labels"], noise, strict=True):
        mean, log_variance = (part[0] for part in vae.encode(x[None], label[None]))
        latents, kl = [], 0.0
        for m, v, e in zip(mean.tolist(), log_variance.tolist(), eps.tolist(), strict=True):
            deviation = math.exp(v / 2)
            latents.append(m + deviation * e)
            # KL between two Gaussians (Kingma & Welling 2014, App. B)
            kl += math.log(1 / deviation) + (deviation**2 + m**2) / 2 - 0.5
        decoded = vae.decode(torch.tensor([latents], dtype=torch.float64), label[None])[0]
        pixels = zip(x.flatten().tolist(), decoded.flatten().tolist(), strict=True)
        expected.append(kl - sum(p * math.log(q) + (1 - p) * math.log(1 - q) for p, q in pixels))
    values = VAELoss(3)(vae, images, vae_terms(5), noise)
    torch.testing.assert_close(values.detach(), torch.tensor(expected, dtype=torch.float64))


def test_each_vae_value_depends_on_its_own_sample_only(vae, images):
    loss, noise = VAELoss(3), torch.randn(5, 3, dtype=torch.float64)
    whole = loss(vae, images, vae_terms(5), noise)
    for row in range(5):
        alone = {key: value[row : row + 1] for key, value in images.items()}
        torch.testing.assert_close(loss(vae, alone, vae_terms(1), noise[row : row + 1]), whole[row : row + 1])


def test_vae_gradient_equals_finite_differences(vae, images):
    """Through the posterior's noise as well: the gradient with respect to the encoder, not the decoder's alone."""
    noise = torch.randn(5, 3, dtype=torch.float64)
    parameters = dict(vae.named_parameters())

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        chosen = dict(zip(parameters, tensors, strict=True))
        return VAELoss(3)(lambda *a, **k: torch.func.functional_call(vae, chosen, a, k), images, vae_terms(5), noise)

    assert torch.autograd.gradcheck(value, tuple(p.detach().requires_grad_() for p in parameters.values()))


def test_vae_noise_is_a_function_of_the_generator(images):
    first, again, other = (VAELoss(3).sample_noise(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert first.shape == (5, 3)
    assert first.dtype == torch.float64
    assert (first != other).all()


LEVELS = torch.linspace(0.1, 1, T, dtype=torch.float64) ** 2  # of a flow, in no even steps
WEIGHTS = {  # of diffusers' training scripts, at a noise level s; they have the third by preconditioning the output
    "none": lambda s: 1.0,
    "sigma_sqrt": lambda s: s**-2,
    "preconditioned": lambda s: s**2,
    "cosmap": lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2)),
}


def velocity(hidden_states, timestep, scale):
    return model(hidden_states, timestep, scale)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_flow_matching_is_the_written_out_formula(batch, weighting):
    noise, expected = torch.randn_like(batch["sample"]), []
    for x, scale, t, eps in zip(batch["sample"], batch["scale"], TERMS.tolist(), noise, strict=True):
        s = LEVELS[t].item()
        errors = []
        for pixel, e in zip(x.flatten().tolist(), eps.flatten().tolist(), strict=True):
            noisy = (1 - s) * pixel + s * e
            errors.append(WEIGHTS[weighting](s) * (math.sin(noisy) * scale.item() + s - (e - pixel)) ** 2)
        expected.append(sum(errors) / len(errors))
    loss = FlowMatchingLoss(LEVELS, weighting=weighting)
    values = loss(velocity, batch, TERMS, noise)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    targets = loss.predict(velocity, batch, TERMS, noise)
    assert not loss(velocity, batch, TERMS, noise, targets).any()


def test_preconditioned_is_the_error_of_the_sample_that_a_velocity_points_to(batch):
    """As the script for Stable Diffusion 3 has it: -s v + x_s against the sample."""
    noise, s = torch.randn_like(batch["sample"]), LEVELS[TERMS].view(-1, 1, 1, 1)
    noisy = (1 - s) * batch["sample"] + s * noise
    predicted = noisy - s * velocity(noisy, T * LEVELS[TERMS], batch["scale"]).sample
    expected = (predicted - batch["sample"]).square().flatten(1).mean(1)
    values = FlowMatchingLoss(LEVELS, weighting="preconditioned")(velocity, batch, TERMS, noise)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("density", ["logit_normal", "mode"])
def test_terms_of_training_have_the_density_that_was_asked_for(density):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    loss = FlowMatchingLoss(torch.linspace(0.001, 1, 1000), density=density)
    terms = loss.sample_terms(20_000, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    places = compute_density_for_timestep_sampling(density, 20_000, 0.0, 1.0, 1.29)
    shares, expected = (torch.histc(v.float(), 10, 0, 1000) / 20_000 for v in (terms, 999 - (places * 1000).long()))
    assert abs(shares - expected).max() < 0.015 < abs(shares - 0.1).max()
    uniform = FlowMatchingLoss(LEVELS).sample_terms(50, torch.Generator().manual_seed(3))
    assert uniform.equal(torch.randint(T, (50,), generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("levels", "options", "says"),
    [
        (LEVELS.flip(0), {}, "ascend"),
        (LEVELS - 0.02, {}, "ascend"),
        (LEVELS, {"weighting": "snr"}, "a weighting of none, preconditioned"),
        (LEVELS, {"density": "normal"}, "a density of uniform"),
    ],
)
def test_wrong_flows_are_refused(levels, options, says):
    with pytest.raises(ValueError, match=says):
        FlowMatchingLoss(levels, **options)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_predictions_differ_by_the_divergence_of_what_they_draw(kind):
    """Of two Gaussians N(m, 1), whose best predictions are known, it is |m_1 - m_2|^2 / 2."""
    torch.manual_seed(0)
    means, steps = torch.randn(2, 3, dtype=torch.float64), torch.arange(1, 1001) / 1000
    if kind == "flow":
        loss = FlowMatchingLoss(steps)
    else:
        loss = DiffusionLoss((1 - steps.double() * 0.9999) ** 2, kind)
    terms, weights = loss.divergence_terms(12)
    assert len(terms.unique()) == 12
    signal = 1 - steps if kind == "flow" else loss.alphas_cumprod.sqrt()
    noise = steps if kind == "flow" else (1 - loss.alphas_cumprod).sqrt()
    signal, noise = signal[terms, None].double(), noise[terms, None].double()
    seen = signal * means[0] + noise * torch.randn(12, 3)
    clean = [m + signal / (signal**2 + noise**2) * (seen - signal * m) for m in means]  # E[x | seen]
    found = [(seen - signal * x) / noise for x in clean]  # E[eps | seen]
    if kind != "epsilon":
        lost = noise if kind == "v_prediction" else 1
        kept = signal if kind == "v_prediction" else 1
        found = [kept * eps - lost * x for eps, x in zip(found, clean, strict=True)]
    total = (weights[:, None] * (found[0] - found[1]).square()).sum()
    torch.testing.assert_close(total, (means[0] - means[1]).square().sum() / 2, rtol=0.02, atol=0)
