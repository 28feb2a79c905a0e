"""Drawing samples: a picture depends on its own request alone, and an interrupted drawing goes on where it stopped."""

import pytest
import torch
from cheap_runs import interrupt_call
from torch.testing import assert_close

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.sampling import Request, SamplingSettings, draw_samples
from sa_diffusers.families import get_family
from sa_diffusers.families.text_to_image.family import TextToImageFamily


SETTINGS = SamplingSettings(guidance_scale=2.0, num_inference_steps=3, batch_size=2)
REQUESTS = [Request(Condition(f"a {word}"), seed) for seed, word in enumerate("red green blue seven nine".split())]


@pytest.fixture(params=["dpmsolver++", "ddim"])
def family(request, tiny_pipeline) -> TextToImageFamily:
    return get_family(tiny_pipeline(), sampler=request.param)


def with_batch_size(size: int) -> SamplingSettings:
    return SamplingSettings(SETTINGS.guidance_scale, SETTINGS.num_inference_steps, size)


def test_the_order_of_the_requests_is_kept_for_any_batch_size(family):
    alone = [draw_samples(family, [request], SETTINGS).latents for request in REQUESTS]
    for size in (2, 8):
        drawn = draw_samples(family, REQUESTS, with_batch_size(size))
        assert drawn.conditions == [request.condition for request in REQUESTS]
        torch.testing.assert_close(drawn.latents, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_prompt_seed_and_negative_prompt_each_matter(family):
    def draw(prompt, seed, negative=""):
        request = Request(Condition(prompt), seed, Condition(negative))
        return draw_samples(family, [request], SETTINGS).latents

    base = draw("a seven", 1)
    torch.testing.assert_close(draw("a seven", 1), base, rtol=0, atol=0)
    for other in (draw("a nine", 1), draw("a seven", 2), draw("a seven", 1, "red")):
        assert (other - base).abs().max() > 1e-4


def test_what_was_drawn_before_a_stop_is_taken_for_what_was_asked(family, tmp_path):
    """Whatever is known of other requests then, and the next time."""
    known = {request.fingerprint: torch.zeros(4, 8, 8) for request in REQUESTS[:2]}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_call(patch, TextToImageFamily, "draw", 1)
        draw_samples(family, REQUESTS, SETTINGS, tmp_path, known=known)
    drawn = draw_samples(family, REQUESTS, SETTINGS, tmp_path).latents
    torch.testing.assert_close(drawn, draw_samples(family, REQUESTS, SETTINGS).latents, rtol=1e-4, atol=1e-5)


def test_equals_the_stock_pipeline(tiny_pipeline):
    """Our embeddings, seeds and scales are those that diffusers itself would use."""
    pipeline = tiny_pipeline()
    drawn = draw_samples(get_family(pipeline, sampler="ddim"), REQUESTS[:1], SETTINGS)
    stock = pipeline(
        REQUESTS[0].condition.text, num_inference_steps=3, guidance_scale=2.0, output_type="latent",
        generator=torch.Generator().manual_seed(REQUESTS[0].seed),
    )  # fmt: skip
    torch.testing.assert_close(drawn.latents, stock.images, rtol=1e-5, atol=1e-6)


def test_keys_of_text_read_as_before_there_were_labels():
    asked = Request(Condition("a seven"), 3)
    assert asked.key == {"prompt": "a seven", "seed": 3, "negative_prompt": ""}
    others = [Request(*given) for given in (
        (Condition("a seven", 7), 3), (Condition("a seven"), 4), (Condition("a seven"), 3, Condition("red")),
        (Condition("a seven"), 3, Condition(label=7)), (Condition(label=7), 3),
    )]  # fmt: skip
    keys = [asked.key] + [other.key for other in others]
    assert all(keys.count(key) == 1 for key in keys)


def interrupt_after(family, count: int, monkeypatch) -> list[list[Condition]]:
    """Let `family.draw` fail like Ctrl-C after `count` calls; returns the conditions of each call so far."""
    calls, draw = [], family.draw

    def counted(conditions, *arguments, **options):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(list(conditions))
        return draw(conditions, *arguments, **options)

    monkeypatch.setattr(family, "draw", counted)
    return calls


def test_an_interrupted_drawing_goes_on_and_draws_nothing_twice(family, tmp_path, monkeypatch):
    whole = draw_samples(family, REQUESTS, SETTINGS)
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = interrupt_after(family, 2, patch)
        draw_samples(family, REQUESTS, SETTINGS, parts)
    with monkeypatch.context() as patch:
        second = interrupt_after(family, 9, patch)
        resumed = draw_samples(family, REQUESTS, SETTINGS, parts)
    assert [asked for call in first + second for asked in call] == whole.conditions
    assert resumed.conditions == whole.conditions == [request.condition for request in REQUESTS]
    torch.testing.assert_close(resumed.latents, whole.latents, rtol=0, atol=0)


def test_values_that_are_not_finite_are_refused(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite for 'a red'; use float32"):
        draw_samples(get_family(pipeline), REQUESTS, SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_pipelines_samplers_and_missing_parts_are_refused(tiny_pipeline):
    from diffusers import DDIMPipeline

    pipeline = tiny_pipeline()
    with pytest.raises(TypeError, match="cannot forget in a DDIMPipeline; expected one of: .*StableDiffusionPipeline"):
        get_family(DDIMPipeline(pipeline.unet, pipeline.scheduler))
    with pytest.raises(ValueError, match="one of dpmsolver.*, got 'euler'"):
        get_family(pipeline, sampler="euler")
    pipeline.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        get_family(pipeline)


def test_the_safety_checker_is_never_run(tiny_pipeline, safety_checker):
    """It would blacken samples; it stays where it is."""
    from transformers import CLIPImageProcessor

    pipeline = tiny_pipeline(safety_checker=safety_checker, feature_extractor=CLIPImageProcessor())
    family = get_family(pipeline)
    images = family.decode(draw_samples(family, REQUESTS[:2], SETTINGS).latents)
    assert images.shape == (2, 3, 16, 16)
    assert pipeline.safety_checker is safety_checker


def test_the_text_encoder_is_fetched_once_for_all_batches(tiny_pipeline, monkeypatch):
    family = get_family(tiny_pipeline())
    encoded, encode = [], family.pipeline.encode_prompt
    monkeypatch.setattr(family.pipeline, "encode_prompt", lambda p, *rest: encoded.append(p) or encode(p, *rest))
    requests = [*REQUESTS, Request(Condition("a red seven"), 9, Condition("seven"))]
    draw_samples(family, requests, SETTINGS)
    assert sorted(encoded) == sorted([text] for text in {r.condition.text for r in requests} | {"", "seven"})


def test_the_autoencoder_never_takes_more_pixels_at_once_than_fit_a_small_card(tiny_pipeline, monkeypatch):
    family = get_family(tiny_pipeline())
    latents = torch.randn(5, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    images = family.decode(latents)
    encoded = family.encode(images, torch.Generator().manual_seed(1))
    vae, sizes = family.pipeline.vae, []
    for name in ("encode", "decode"):
        whole = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda part, whole=whole: sizes.append(len(part)) or whole(part))
    monkeypatch.setattr("sa_diffusers.families.text_to_image.family.PIXELS_AT_ONCE", 2 * family.resolution**2)
    assert_close(family.decode(latents), images)
    assert_close(family.encode(images, torch.Generator().manual_seed(1)), encoded)
    assert sizes == [2, 2, 1, 2, 2, 1]
    monkeypatch.setattr("sa_diffusers.families.text_to_image.family.PIXELS_AT_ONCE", 1)
    assert len(family.decode(latents)) == 5 and sizes[6:] == [1] * 5


def test_decode_and_encode_are_scaled_alike(tiny_pipeline):
    family = get_family(tiny_pipeline())
    vae = family.pipeline.vae
    latents = torch.randn(2, 4, 8, 8)
    images = family.decode(latents)
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(
        images, vae.decode(latents / vae.config.scaling_factor).sample.detach().clamp(-1, 1), rtol=1e-5, atol=1e-6
    )
    draws = family.encode(images.repeat(200, 1, 1, 1), torch.Generator().manual_seed(0)).unflatten(0, (200, 2))
    mean = vae.encode(images).latent_dist.mean.detach() * vae.config.scaling_factor
    spread = draws.std(0)
    assert ((draws.mean(0) - mean).abs() < 5 * spread / 200**0.5 + 1e-6).all()
    torch.testing.assert_close(
        spread.mean(),
        (vae.encode(images).latent_dist.std.detach() * vae.config.scaling_factor).mean(),
        rtol=0.05,
        atol=0,
    )


def test_v_prediction_is_taken_from_the_scheduler(tiny_pipeline):
    assert get_family(tiny_pipeline("v_prediction")).loss.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="prediction_type 'sample', expected epsilon or v_prediction"):
        get_family(tiny_pipeline("sample"))
