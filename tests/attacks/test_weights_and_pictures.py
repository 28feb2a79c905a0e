"""Attacks that search nothing: on the weights, and from a picture of the concept."""

from importlib.util import find_spec
from itertools import pairwise

import pytest
import tiny_text_to_image
import torch
from diffusers import DDIMScheduler
from torch.testing import assert_close

from sa_diffusers.attacks import AttackSettings, FoundText, draw_found
from sa_diffusers.attacks.pictures import CLEAN, FoundPictures, invert, path, walk
from sa_diffusers.attacks.weights import FoundWeights, change_weights, rounded
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import hash_tensors
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.models.quantization import originals, quantized


TEMPLATES = ["a {}", "a red {} on black"]
SEEDS = [3, 4, 5, 6, 7]
KINDS = ("epsilon", "v_prediction", "xl", "sd3", "flux-dev", "flux-schnell", "klein")


def slow(kind: str):
    return pytest.param(kind, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def few_fixed(monkeypatch):
    monkeypatch.setattr("sa_diffusers.attacks.target_loss.NUM_FIXED", 16)


@pytest.fixture(scope="module")
def family_of(tiny_pipeline, tiny_tokenizer):
    def make(kind: str):
        own = kind in tiny_text_to_image.NAMES
        pipeline = tiny_text_to_image.make(kind, tiny_tokenizer) if own else tiny_pipeline(kind)
        return get_family(pipeline, sampler="ddim")

    return make


def pictures(family, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *family.latent_shape, generator=torch.Generator().manual_seed(1))


def state(family) -> str:
    return hash_tensors(family.module.state_dict())


@pytest.mark.parametrize("precision, levels", [("int8", 127), ("int4", 7)])
def test_rounding_to_integers_takes_the_nearest_of_evenly_spaced_levels(precision, levels):
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    flat, found = weight.flatten(), rounded(weight, precision).flatten()
    length = 45 if precision == "int8" else 64
    for start in range(0, len(flat), length):
        part = flat[start : start + length]
        most = part.abs().max()
        grid = most * torch.arange(-levels, levels + 1) / levels
        assert_close(found[start : start + length], grid[(part[:, None] - grid).abs().argmin(1)])


def test_eight_bits_with_an_exponent_are_torchs_and_stay_finite():
    weight = torch.tensor([[1.0, 1.03, 1000.0, -1.5e-3]])
    assert_close(rounded(weight, "fp8"), torch.tensor([[1.0, 1.0, 448.0, -(2.0**-9) / 2 * 1]]), rtol=0, atol=1e-3)
    assert rounded(weight, "fp8")[0, :3].tolist() == [1.0, 1.0, 448.0]


def test_rounding_to_fp8_is_diffusers_load(tiny_pipeline):
    """By what `enable_layerwise_casting` stores; it leaves norms and ends as they are, and rounds biases as well."""
    module = tiny_pipeline().unet
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    module.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    stored = {name: weight for name, weight in module.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert len(stored) > len(before) / 2
    for name, weight in stored.items():
        assert_close(weight.float(), rounded(before[name], "fp8"), rtol=0, atol=0)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra 8bit is not installed")
def test_rounding_to_int8_is_bitsandbytes_load(tiny_pipeline):
    """By what its layers store; it rounds to half precision first, which may move a weight by one level."""
    module = tiny_pipeline().unet
    with quantized(module, 8):
        layers = originals(module)
        assert layers
        for name, linear in layers.items():
            own = module.get_submodule(name).weight
            levels = linear.weight.abs().amax(1, keepdim=True) / 127
            stored = own.data.float() * (own.SCB[:, None] / 127)
            assert_close(stored / levels, rounded(linear.weight.data, "int8") / levels, rtol=0, atol=1.1)
            assert_close(stored, linear.weight.data, rtol=0, atol=0.6 * levels.max().item())


@pytest.mark.parametrize("rule", [{"precision": "int4"}, {"precision": "fp8"}, {"share": 0.25}])
def test_the_word_is_asked_for_in_changed_weights_which_come_back(rule, tiny_pipeline, tiny_pipeline_dir, tmp_path):
    rule |= {"original": str(tiny_pipeline_dir)} if "share" in rule else {}
    forgotten = tiny_pipeline()
    forgotten.unet = tiny_pipeline(seed=1).unet
    family, latents = get_family(forgotten), torch.randn(3, 4, 8, 8)
    before = state(family)
    found = change_weights(family, latents, TEMPLATES, ["seven", "7"], AttackSettings(), **rule)
    assert state(family) == before and found.losses[0] != found.losses[1]
    found.save(tmp_path / "found.json")
    assert FoundWeights.load(tmp_path / "found.json") == found
    drawn = draw_found(family, found, TEMPLATES, SEEDS, 2.0, 2)
    assert state(family) == before
    original = load_pipeline(str(tiny_pipeline_dir), None, None, "float32").unet.state_dict()
    for name, weight in family.module.named_parameters():  # by hand, for good
        if "share" in rule:
            weight.data = 0.75 * weight.data + 0.25 * original[name]
        elif weight.dim() > 1:
            weight.data = rounded(weight.data, rule["precision"])
    assert state(family) != before
    assert_close(drawn, draw_found(family, FoundText("seven", [], []), TEMPLATES, SEEDS, 2.0, 2))


def test_weights_come_back_where_drawing_fails(tiny_pipeline):
    family, found = get_family(tiny_pipeline()), FoundWeights("seven", [], "int4")
    before = state(family)
    with pytest.raises(KeyError, match="stop"), found.applied(family):
        assert state(family) != before
        raise KeyError("stop")
    assert state(family) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_from_pure_noise_is_the_samplers(family_of, kind):
    """Against diffusers' own schedulers, on the terms that they choose."""
    family = family_of(kind)
    scheduler, noise = family.sampler, pictures(family)
    scheduler.set_timesteps(4)
    times = scheduler.timesteps
    told = family.embed(["a seven"] * 3)
    levels = family.loss.times(torch.arange(family.loss.num_terms)).double()
    terms = [int((levels - time).abs().argmin()) for time in times.double()]
    assert all(one > two for one, two in pairwise(terms))
    latents = noise
    with torch.no_grad():
        for time in times:
            predicted = family.loss.call(family.module, latents, time.expand(3).to(latents), told)
            latents = scheduler.step(predicted, time, latents).prev_sample
    end = 0 if isinstance(scheduler, DDIMScheduler) and not scheduler.config.set_alpha_to_one else CLEAN
    assert_close(walk(family, noise, [*terms, end], told), latents, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [slow("epsilon"), "sd3"])
def test_pictures_lead_to_noise_and_back(family_of, kind):
    family = family_of(kind)
    latents = pictures(family)
    terms = list(range(CLEAN, family.loss.num_terms))
    told = family.embed([""] * 3)
    errors = []
    for step in (10, 5, 1):
        up = [*terms[::step]]
        there = walk(family, latents, up, told)
        errors.append((walk(family, there, up[::-1], told) - latents).square().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1 * errors[0]
    found = invert(family, latents, 4, batch_size=2)
    drawn = draw_found(family, found, TEMPLATES, SEEDS, 2.0, 4)
    assert len(drawn) == 3  # one a picture, whatever the seeds are
    assert (drawn - latents).square().mean() < (pictures(family, 6)[3:] - latents).square().mean() / 4


@pytest.mark.parametrize("kind", ["epsilon", slow("sd3"), slow("flux-dev")])
def test_a_noised_picture_is_drawn_on_and_the_less_noise_the_nearer(family_of, kind):
    family = family_of(kind)
    latents = pictures(family)

    def draw(strength: float, text: str = "seven", count: int = 3, **changes) -> torch.Tensor:
        found = FoundPictures(changes.get("latents", latents), "image_to_image", text, strength)
        return draw_found(family, found, TEMPLATES, SEEDS[:count], 2.0, 10, changes.get("batch_size", 2))

    distances = [(draw(strength) - latents).square().mean() for strength in (0.1, 0.5, 0.9)]
    assert distances[0] < distances[1] < distances[2]
    five = draw(0.5, count=5)
    assert len(five) == 3  # at most one a picture: more would count it twice
    assert_close(draw(0.5, batch_size=5, count=5), five, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(draw(0.5, text=""), draw(0.5), atol=1e-4)
    if kind == "sd3":  # a flow ends in noise alone: this is drawing, from which no picture is to be seen
        asked = family.embed(["a seven", "a red seven on black", "a seven"])
        noise = torch.stack(
            [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS[:3]]
        )
        alone, away = (
            walk(family, noise, path(family, 10), *told) for told in ((asked, family.embed([""] * 3), 2.0), (asked,))
        )
        assert_close(draw(1.0, latents=-latents), alone, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(alone, away, atol=1e-3)


def test_what_is_not_hidden_stays_and_every_template_meets_all_halves(family_of):
    family = family_of("epsilon")
    latents = pictures(family, 8)
    found = FoundPictures(latents, "inpainting", "seven")
    drawn = draw_found(family, found, TEMPLATES, list(range(8)), 2.0, 4)
    changed = ((drawn - latents).abs() > 1e-6).view(4, 2, 4, 8, 8)  # a half, a template
    assert changed[0, ..., 4:].all() and changed[1, ..., 4:, :].all()
    assert changed[2, ..., :4].all() and changed[3, ..., :4, :].all() and changed.double().mean() == 0.5


@pytest.mark.parametrize("kind", ["epsilon", "flux-dev"])
def test_pictures_are_drawn_on_by_the_guidance_that_is_asked_for(family_of, kind):
    family = family_of(kind)
    found = FoundPictures(pictures(family), "image_to_image", "seven", 0.5)
    none, one, two = (draw_found(family, found, TEMPLATES, SEEDS, scale, 4) for scale in (0.0, 1.0, 4.0))
    assert torch.equal(none, one) == (kind == "epsilon")  # below 1 pipelines guide nothing; FLUX is told it
    assert not torch.allclose(one, two, atol=1e-5)
    assert kind == "epsilon" or family.loss.guidance == 3.5


def test_what_is_found_is_kept(tmp_path):
    found = FoundPictures(torch.randn(2, 4, 8, 8), "image_to_image", "seven", 0.3)
    found.save(tmp_path / "found")
    loaded = FoundPictures.load(tmp_path / "found")
    assert torch.equal(loaded.latents, found.latents)
    assert (loaded.attack, loaded.text, loaded.strength, loaded.losses) == ("image_to_image", "seven", 0.3, [])
