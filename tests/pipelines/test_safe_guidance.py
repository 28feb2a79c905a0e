"""Safe latent diffusion: the guidance against a slow reference and against diffusers' own, and what is refused."""

import math
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from tiny_text_to_image import make
from torch.testing import assert_close

from sa_diffusers.core.conditions import Condition
from sa_diffusers.families import get_family
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.io.loading import copy_pipeline, load_pipeline
from sa_diffusers.pipelines import SafeGuidancePipeline
from sa_diffusers.pipelines.safe_guidance import (
    SAFETY_CONCEPT,
    SAFETY_LEVELS,
    SafelyGuided,
    SafetySettings,
    noise_unit,
    safety_term,
)


CONCEPT = "seven on black"
STEPS = 6
# Of the size that a tiny random model's predictions differ by: some values above the threshold, some weights below 1.
SETTINGS = SafetySettings(warmup_steps=2, scale=40.0, threshold=0.005, momentum_scale=0.3, momentum_beta=0.4)


@pytest.fixture
def pipeline(tiny_pipeline) -> SafeGuidancePipeline:
    return SafeGuidancePipeline(**tiny_parts(tiny_pipeline()), safety_concept=CONCEPT, requires_safety_checker=False)


def tiny_parts(stock: StableDiffusionPipeline) -> dict:
    """Its components, and a UNet whose predictions for two prompts differ by as much as those of a trained one."""
    for name, layer in stock.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
            layer.weight.data.mul_(4)
    return stock.components


def draw(pipeline: StableDiffusionPipeline, prompts=("a red digit", "a blue seven"), seeds=(3, 4), **options):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"} | options
    return pipeline(list(prompts), generator=[torch.Generator().manual_seed(seed) for seed in seeds], **options).images


def slow_term(unconditional, conditional, unsafe, momentum, settings):
    """SLD's Eqs. 4 to 8 as the paper's cases, a number at a time."""
    terms, momenta = [], []
    values = (x.flatten().tolist() for x in (unconditional, conditional, unsafe, momentum))
    for e_u, e_p, e_s, nu in zip(*values, strict=True):
        mu = 0.0 if e_p - e_s >= settings.threshold else min(1.0, settings.scale * abs(e_p - e_s))
        g = mu * (e_s - e_u) + settings.momentum_scale * nu
        terms.append(g)
        momenta.append(settings.momentum_beta * nu + (1 - settings.momentum_beta) * g)
    return (torch.tensor(x, dtype=torch.float64).view_as(unconditional) for x in (terms, momenta))


@pytest.mark.parametrize("settings", [*SAFETY_LEVELS.values(), SETTINGS])
def test_the_term_equals_the_slow_reference(settings):
    parts = [scale * torch.randn(2, 3, 4, 4, dtype=torch.float64) for scale in (1.0, 0.02, 0.02, 1.0)]
    for actual, expected in zip(safety_term(*parts, settings), slow_term(*parts, settings), strict=True):
        assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def slow_draw(family, prompt: str, seed: int, settings: SafetySettings, guidance_scale: float) -> torch.Tensor:
    """One image in float64, one evaluation of the model for each of the three texts. What it predicts is made noise,
    which is guided as the paper says, and taken by DDIM, or of a flow by Euler's method, written out."""
    texts, schedule = [family.embed([text]) for text in ("", prompt, CONCEPT)], family.pipeline.scheduler
    schedule.set_timesteps(STEPS)
    predicts = schedule.config.get("prediction_type", "velocity")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    momentum = torch.zeros_like(latents)
    for step, t in enumerate(schedule.timesteps.tolist()):
        name = "hidden_states" if predicts == "velocity" else "sample"
        given = {name: latents, "timestep": torch.tensor([t])}
        predicted = [family.module(**given, **text).sample for text in texts]
        if predicts == "velocity":
            s = t / schedule.config.num_train_timesteps
            noises = [latents + (1 - s) * v for v in predicted]
        else:
            alpha = schedule.alphas_cumprod[t]
            noises = predicted
            if predicts == "v_prediction":
                noises = [alpha.sqrt() * v + (1 - alpha).sqrt() * latents for v in predicted]
        e_u, e_p, e_s = noises
        g, momentum = slow_term(e_u, e_p, e_s, momentum, settings)
        noise = e_u + guidance_scale * (e_p - e_u - (g if step >= settings.warmup_steps else 0))
        if predicts == "velocity":
            v_u, v_p, _ = predicted
            velocity = (noise - latents) / (1 - s) if s < 1 else v_u + guidance_scale * (v_p - v_u)
            # The scheduler rounds latents, not velocities.
            latents = latents.float() + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * velocity
            continue
        before = t - schedule.config.num_train_timesteps // STEPS
        alpha_before = schedule.alphas_cumprod[before] if before >= 0 else schedule.final_alpha_cumprod
        clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        latents = alpha_before.sqrt() * clean + (1 - alpha_before).sqrt() * noise
    return latents


FAMILIES = [
    "epsilon", "v_prediction", "xl", "xl-v", "sd3",
    pytest.param("sd3-t5", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.fixture
def led(tiny_pipeline, tiny_tokenizer, request):
    """The family of a pipeline that is led away."""
    name = request.param
    stock = make(name, tiny_tokenizer) if name.startswith(("xl", "sd3")) else tiny_pipeline(name)
    if "unet" in stock.components:
        tiny_parts(stock)
        stock.scheduler = make_scheduler("ddim", stock.scheduler)
    return get_family(stock, sampler="pipeline").safely_guided(CONCEPT, "medium", "pipeline")


@pytest.mark.parametrize("led", FAMILIES, indirect=True)
@torch.no_grad()
def test_the_sampler_equals_a_slow_one_image_by_image_in_units_of_the_noise(led):
    pipeline = led.pipeline.to(torch.float64)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):  # the scheduler would compute with them in float32
        if hasattr(pipeline.scheduler, name):
            setattr(pipeline.scheduler, name, getattr(pipeline.scheduler, name).double())
    drawn = draw(pipeline, safety=SETTINGS)
    slow = [slow_draw(led, *request, SETTINGS, 5.0) for request in (("a red digit", 3), ("a blue seven", 4))]
    assert_close(drawn, torch.cat(slow), rtol=1e-9, atol=1e-9)
    assert (drawn - draw(led.stock(**pipeline.components))).abs().max() > 0.01


def test_differences_of_predictions_are_made_ones_of_the_noise():
    """By what each kind of model predicts of the same picture and noises."""
    picture, noises = torch.randn(4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    velocity = DDIMScheduler(prediction_type="v_prediction")
    signal = velocity.alphas_cumprod[700].double().sqrt()
    # Of noisy latents: the same ones, whose picture a prediction of the noise says.
    noisy = signal * picture + (1 - signal**2).sqrt() * noises[0]
    pictures = (noisy - (1 - signal**2).sqrt() * noises) / signal
    predicted = signal * noises - (1 - signal**2).sqrt() * pictures
    expected = noises[1] - noises[0]
    for timestep in (torch.tensor(700), torch.tensor(699.6)):
        assert_close(noise_unit(velocity, timestep) * (predicted[1] - predicted[0]), expected, rtol=1e-6, atol=1e-6)
    noisy = 0.25 * picture + 0.75 * noises[0]
    predicted = noises - (noisy - 0.75 * noises) / 0.25
    unit = noise_unit(FlowMatchEulerDiscreteScheduler(shift=3.0), torch.tensor([750.0, 750.0]))
    assert_close(unit * (predicted[1] - predicted[0]), expected)
    assert noise_unit(DDIMScheduler(), torch.tensor(700)) == 1
    with pytest.raises(ValueError, match="got a DDIMScheduler with prediction_type 'sample'"):
        noise_unit(DDIMScheduler(prediction_type="sample"), torch.tensor(700))


@pytest.mark.parametrize(
    ("scheduler", "level"),
    [
        pytest.param(DDIMScheduler, "medium", marks=pytest.mark.slow),
        pytest.param(DDIMScheduler, "max", marks=pytest.mark.slow),
        (PNDMScheduler, "strong"),
        (DPMSolverMultistepScheduler, "max"),
    ],
)
def test_equals_the_deprecated_pipeline_of_diffusers(tiny_pipeline, scheduler, level):
    safe = pytest.importorskip(
        "diffusers.pipelines.deprecated.stable_diffusion_safe", reason="diffusers has removed its safe pipeline"
    )
    parts = tiny_parts(tiny_pipeline())
    parts["scheduler"] = scheduler.from_config(parts["scheduler"].config)
    ours = SafeGuidancePipeline(**parts, requires_safety_checker=False, safety_concept=CONCEPT, safety_level=level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = safe.StableDiffusionPipelineSafe(**parts, requires_safety_checker=False)
        theirs.safety_concept = CONCEPT
        options = {"output_type": "np", "negative_prompt": ["", "white"], "num_inference_steps": 13}
        expected = draw(theirs, **options, **getattr(safe.SafetyConfig, level.upper()))
    actual = draw(ours, **options)
    assert_close(torch.from_numpy(actual), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    stock = draw(StableDiffusionPipeline(**parts, requires_safety_checker=False), **options)
    assert abs(actual - stock).max() > 1e-3


def test_the_levels_are_those_of_the_paper():
    assert SAFETY_LEVELS == {
        "weak": SafetySettings(warmup_steps=15, scale=200, threshold=0.0, momentum_scale=0.0, momentum_beta=0.0),
        "medium": SafetySettings(warmup_steps=10, scale=1000, threshold=0.01, momentum_scale=0.3, momentum_beta=0.4),
        "strong": SafetySettings(warmup_steps=7, scale=2000, threshold=0.025, momentum_scale=0.5, momentum_beta=0.7),
        "max": SafetySettings(warmup_steps=0, scale=5000, threshold=1.0, momentum_scale=0.5, momentum_beta=0.7),
    }


def test_the_default_concept_is_that_of_diffusers(tiny_pipeline):
    safe = pytest.importorskip("diffusers.pipelines.deprecated.stable_diffusion_safe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = safe.StableDiffusionPipelineSafe(**tiny_pipeline().components, requires_safety_checker=False)
    assert theirs.safety_concept == SAFETY_CONCEPT


def test_without_strength_it_is_the_stock_pipeline(pipeline):
    stock = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    off = SafetySettings(0, 0.0, 1.0, 0.5, 0.5)
    assert_close(draw(pipeline, safety=off), draw(stock), rtol=1e-4, atol=1e-5)


def test_at_full_strength_the_concept_is_the_negative_prompt(pipeline):
    """With mu = 1 everywhere, e_p - e_u - (e_S - e_u) = e_p - e_S is what is guided along, from e_u."""
    embeds = pipeline.encode_prompt(CONCEPT, "cpu", 1, False)[0]
    prompts = pipeline.encode_prompt(["a red digit"] * 2, "cpu", 1, True)
    full = SafetySettings(0, 1e12, math.inf, 0.0, 0.0)
    guided = SafelyGuided(pipeline.unet, {"encoder_hidden_states": embeds}, full, lambda timestep: 1.0)
    latents = torch.randn(1, 4, 8, 8).repeat(4, 1, 1, 1)
    with torch.no_grad():
        away, towards = guided(latents, torch.tensor(5), encoder_hidden_states=torch.cat([prompts[1], prompts[0]]))[
            0
        ].chunk(2)
        e_p, e_s = pipeline.unet(latents[:2], 5, torch.cat([prompts[0][:1], embeds])).sample
    assert_close((towards - away)[0], e_p - e_s, rtol=1e-4, atol=1e-5)


def test_an_image_depends_on_its_own_seed_alone_and_runs_do_not_share_momentum(pipeline):
    together = draw(pipeline, safety=SETTINGS)
    assert_close(draw(pipeline, safety=SETTINGS), together, rtol=0, atol=0)
    for index, (prompt, seed) in enumerate((("a red digit", 3), ("a blue seven", 4))):
        assert_close(draw(pipeline, [prompt], [seed], safety=SETTINGS)[0], together[index], rtol=1e-4, atol=1e-4)


def test_the_level_and_the_concept_matter(pipeline):
    parts = pipeline.components
    drawn = [
        draw(SafeGuidancePipeline(**parts, requires_safety_checker=False, safety_concept=concept, safety_level=level),
             num_inference_steps=12)
        for concept, level in ((CONCEPT, "medium"), (CONCEPT, "max"), ("green", "medium"))
    ]  # fmt: skip
    for other in drawn[1:]:
        assert (other - drawn[0]).abs().max() > 1e-3


def test_a_stock_pipeline_without_text_encoder_takes_embeddings(pipeline):
    """How a family draws: nothing but the UNet and the scheduler, and embeddings of all texts."""
    bare = SafeGuidancePipeline(None, None, None, pipeline.unet, pipeline.scheduler, None, None, None, False)
    bare.vae_scale_factor = pipeline.vae_scale_factor
    texts = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in ("a red digit", "", CONCEPT)]
    bare.set_progress_bar_config(disable=True)
    drawn = bare(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1], safety_concept_embeds=texts[2], safety=SETTINGS,
        generator=torch.Generator().manual_seed(3), num_inference_steps=STEPS, guidance_scale=5.0,
        output_type="latent", height=16, width=16,
    ).images  # fmt: skip
    assert_close(drawn, draw(pipeline, ["a red digit"], [3], safety=SETTINGS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("led", ["epsilon", "xl", "sd3"], indirect=True)
def test_a_family_draws_what_the_pipeline_does(led):
    """With the warm-up as the same share of its steps; of a copy, too, as forgetting makes one."""
    pipeline = led.pipeline
    for each in (pipeline, copy_pipeline(pipeline, led.component)):
        family = get_family(each, sampler="pipeline")
        drawn = family.draw([Condition("a red digit"), Condition("a blue seven")], [3, 4], 5.0, STEPS)
        settings = SAFETY_LEVELS[pipeline.config.safety_level].for_steps(STEPS)
        assert_close(drawn, draw(pipeline, safety=settings), rtol=1e-4, atol=1e-5)


def test_made_from_another_pipeline(tiny_pipeline, pipeline):
    made = SafeGuidancePipeline.from_pipe(tiny_pipeline(), safety_concept=CONCEPT, requires_safety_checker=False)
    assert made.config.safety_concept == CONCEPT


def test_the_unet_is_put_back_whatever_happens(pipeline):
    unet, config = pipeline.unet, dict(pipeline.config)

    def stop(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, safety=SETTINGS, callback_on_step_end=stop)
    draw(pipeline, safety=SETTINGS)
    assert pipeline.unet is unet and dict(pipeline.config) == config


@pytest.mark.slow
def test_a_compiled_unet_is_guided_too(pipeline):
    """Compiled once before, as in a run: what guides must not be inside what was compiled."""
    expected = draw(pipeline, safety=SETTINGS)
    pipeline.unet.compile(backend="eager")
    assert_close(draw(pipeline, safety=SETTINGS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("led", ["epsilon", "xl", "sd3-t5"], indirect=True)
def test_saved_and_loaded_by_its_own_class_and_by_the_stock_one(led, tmp_path):
    level = led.safely_guided(CONCEPT, "max", "pipeline").pipeline
    level.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path), None, None, "float32")
    assert type(loaded) is type(level) and isinstance(level, led.own_classes)
    assert (loaded.config.safety_concept, loaded.config.safety_level) == (CONCEPT, "max")
    assert_close(draw(loaded), draw(level), rtol=1e-5, atol=1e-6)
    stock = led.stock(**led.pipeline.components)
    assert_close(draw(led.stock.from_pretrained(tmp_path)), draw(stock), rtol=1e-5, atol=1e-6)
    assert (draw(level) - draw(stock)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 1.0}, "guidance_scale > 1"),
        ({"guidance_rescale": 0.7}, "guidance_rescale"),
        ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 8)]}, "ip_adapter_image_embeds"),
    ],
)
def test_options_that_would_switch_safety_off_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline, safety=SETTINGS, **options)


@pytest.mark.parametrize("led", ["sd3"], indirect=True)
def test_options_of_other_pipelines_that_safety_is_not_defined_with_are_refused(led):
    with pytest.raises(ValueError, match="skip_guidance_layers: safety guidance is not defined with it"):
        draw(led.pipeline, safety=SETTINGS, skip_guidance_layers=[0])
    with pytest.raises(ValueError, match="expected safety_concept_embeds and safety_concept_pooled_embeds"):
        draw(led.pipeline, safety=SETTINGS, safety_concept_embeds=torch.zeros(1, 4, 32))
    stock = led.stock(**led.pipeline.components)
    usual = draw(stock, num_inference_steps=28, guidance_scale=7.0)
    off = SafetySettings(0, 0.0, 1.0, 0.5, 0.5)
    as_usual = draw(led.pipeline, safety=off, num_inference_steps=None, guidance_scale=None)
    assert_close(as_usual, usual, rtol=1e-4, atol=1e-5)


def test_a_sampler_that_ends_within_the_warm_up_is_refused(pipeline):
    medium = SAFETY_LEVELS["medium"]
    with pytest.raises(ValueError, match="got 10; or pass safety=settings.for_steps"):
        draw(pipeline, num_inference_steps=10)
    assert [medium.for_steps(steps).warmup_steps for steps in (50, 20, 10, 100)] == [10, 4, 2, 20]
    assert medium.for_steps(10) == SafetySettings(2, 1000, 0.01, 0.3, 0.4)
    shortened = draw(pipeline, num_inference_steps=10, safety=medium.for_steps(10))
    stock = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    assert (shortened - draw(stock, num_inference_steps=10)).abs().max() > 1e-3


def test_settings_out_of_range_are_refused(pipeline):
    for wrong in ({"warmup_steps": -1}, {"scale": math.inf}, {"momentum_scale": -0.1}, {"momentum_beta": 1.0}):
        good = {"warmup_steps": 0, "scale": 1.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum_beta": 0.0}
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SafetySettings(**good | wrong)
    with pytest.raises(ValueError, match="weak, medium, strong, max"):
        SafeGuidancePipeline(**pipeline.components, requires_safety_checker=False, safety_level="extreme")
    with pytest.raises(ValueError, match="safety_concept"):
        SafeGuidancePipeline(**pipeline.components, requires_safety_checker=False, safety_concept=" ")
