"""Class-conditional diffusion: its pipeline, with and without this package, its family, and its Fisher."""

import ast
import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from torch.testing import assert_close

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher import stratified_terms
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import get_family
from sa_diffusers.families.architectures import make_unet
from sa_diffusers.families.class_conditional import ClassConditionalFamily
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.io.loading import load_pipeline, read_model_index
from sa_diffusers.pipelines import ClassConditionalPipeline
from sa_diffusers.runs.base.labelled import ClassConditionalConfig
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages.fisher import estimate_sums


T = 12
NAMES = ["zero", "one", "two"]
NULL = 3
SMALL = ClassConditionalConfig(
    block_out_channels=[4, 8], layers_per_block=1, attention_resolutions=[4], norm_num_groups=2, dropout=0.0
)


def make_pipeline(channels: int = 1) -> ClassConditionalPipeline:
    """8x8 images, three classes, random weights whose classes differ."""
    torch.manual_seed(0)
    unet = make_unet(SMALL, 8, channels, len(NAMES)).eval()
    schedule = DDPMScheduler(T, beta_start=0.01, beta_end=0.5, clip_sample=False)
    pipeline = ClassConditionalPipeline(unet, schedule, {str(index): name for index, name in enumerate(NAMES)})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ddim_schedule() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=T, beta_start=0.01, beta_end=0.5, clip_sample=False)


@pytest.fixture
def pipeline() -> ClassConditionalPipeline:
    return make_pipeline()


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def draw(pipeline, labels=("two", 0, ""), guidance_scale=2.0, steps=4, **options) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(index) for index in range(len(labels))]
    options = {"generator": generators, "output_type": "pt"} | options
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(list(labels), guidance_scale, steps, **options).images


def slow_image(unet, label: int, negative: int, scale: float, timesteps: list[int], seed: int, ddim: bool):
    """Ho et al. 2020, Eq. 7, or Song et al. 2021, Eq. 12 with eta = 0, one image in float64."""
    betas = torch.linspace(0.01, 0.5, T, dtype=torch.float64)
    alpha_bars = [1.0, *(1 - betas).cumprod(0).tolist()]  # of timesteps -1, 0, 1, ...
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(1, 1, 8, 8, generator=generator).double()
    for position, timestep in enumerate(timesteps):
        towards, away = (
            unet(sample, torch.tensor(timestep), class_labels=torch.tensor([condition])).sample
            for condition in (label, negative)
        )
        noise = away + scale * (towards - away)
        previous = timesteps[position + 1] if position + 1 < len(timesteps) else -1
        now, then = alpha_bars[timestep + 1], alpha_bars[previous + 1]
        clean = (sample - (1 - now) ** 0.5 * noise) / now**0.5
        if ddim:
            sample = then**0.5 * clean + (1 - then) ** 0.5 * noise
            continue
        alpha = now / then
        sample = then**0.5 * (1 - alpha) / (1 - now) * clean + alpha**0.5 * (1 - then) / (1 - now) * sample
        if timestep > 0:
            step_noise = torch.randn(1, 1, 8, 8, generator=generator).double()
            sample = sample + ((1 - then) / (1 - now) * (1 - alpha)) ** 0.5 * step_noise
    return (sample.clamp(-1, 1) + 1) / 2


@pytest.mark.parametrize(
    ("ddim", "scale", "negative"), [(True, 1.0, None), (False, 2.5, None), (True, 2.5, ["one", 2, "zero"])]
)
@torch.no_grad()
def test_images_equal_a_slow_loop_of_one_image_at_a_time(pipeline, ddim, scale, negative):
    steps = 4 if ddim else T
    if ddim:
        pipeline.register_modules(scheduler=ddim_schedule())
    images = draw(pipeline, ("two", 0, ""), scale, steps, negative_labels=negative)
    unet, timesteps = copy.deepcopy(pipeline.unet).double(), list(range(0, T, T // steps))[::-1]
    avoided = [NULL] * 3 if negative is None else [1, 2, 0]
    expected = [
        slow_image(unet, label, avoided[seed], scale, timesteps, seed, ddim) for seed, label in enumerate([2, 0, NULL])
    ]
    assert_close(images.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert 0.05 < images.std()
    assert (draw(pipeline, ("one", 0, ""), scale, steps, negative_labels=negative)[0] - images[0]).abs().max() > 1e-3


def test_latents_are_the_noise_to_start_from(pipeline):
    pipeline.register_modules(scheduler=ddim_schedule())
    latents = [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(index)) for index in range(3)]
    images = draw(pipeline)
    assert_close(draw(pipeline, latents=torch.cat(latents), generator=None), images, rtol=0, atol=0)
    assert not draw(pipeline, latents=torch.cat(latents[::-1])).allclose(images, atol=0.01)


def test_one_negative_label_holds_for_all(pipeline):
    one, each = (draw(pipeline, negative_labels=given) for given in ("one", ["one"] * 3))
    assert_close(one, each, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", ["pipeline", pytest.param("ddim", marks=pytest.mark.slow), "dpmsolver++"])
def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(pipeline, sampler):
    family = get_family(pipeline, sampler=sampler)
    labels, seeds = list(map(Condition, ("zero", "one", "two", ""))), [5, 6, 7, 8]
    negative = list(map(Condition, ("", "two", "", "one")))
    images = family.draw(labels, seeds, 2.0, 6, negative)
    for index in range(4):
        rows = slice(index, index + 1)
        alone = family.draw(labels[rows], seeds[rows], 2.0, 6, negative[rows])
        assert_close(alone, images[rows], rtol=1e-4, atol=1e-5)
    one = [Condition(label=1)]
    assert_close(family.draw(one, [6], 2.0, 6, [Condition("one", 2)]), images[1:2], rtol=1e-4, atol=1e-5)
    assert (family.draw(one, [9], 2.0, 6, [Condition(label=2)]) - images[1:2]).abs().max() > 0.1
    assert (family.draw(one, [6], 2.0, 6, [Condition(label=0)]) - images[1:2]).abs().max() > 1e-3
    assert -1 <= images.min() and images.max() <= 1 and images.min() < -0.1


def test_labels_are_names_or_indices_and_the_empty_one_is_the_null_class(pipeline):
    assert pipeline.labels == NAMES and pipeline.null_class == NULL
    assert pipeline.class_indices(["two", 0, "", "one"]).tolist() == [2, 0, NULL, 1]
    assert pipeline.class_indices("one").tolist() == [1] and pipeline.class_indices(2).tolist() == [2]
    assert_close(draw(pipeline, ("two", "zero")), draw(pipeline, (2, 0)), rtol=0, atol=0)
    unnamed = ClassConditionalPipeline(pipeline.unet, pipeline.scheduler)
    assert unnamed.labels == ["0", "1", "2"] and unnamed.class_indices("2").tolist() == [2]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["nine"], {}, "no class 'nine'; it has zero, one, two"),
        ([3], {}, "no class 3; it has zero"),  # the null class is asked for by its name alone
        ([-1], {}, "no class -1"),
        ([0, 1], {"negative_labels": ["one", "two", "zero"]}, "expected 1 or 2 negative labels, got 3"),
        ([0], {"negative_labels": "nine"}, "no class 'nine'"),
        ([0], {"latents": torch.zeros(2, 1, 8, 8)}, r"expected latents \[1, 1, 8, 8\], got \[2, 1, 8, 8\]"),
        ([0, 1], {"generator": [torch.Generator()]}, "expected one generator, or 2, got 1"),
        ([0], {"output_type": "jpg"}, "expected output_type 'pil', 'np' or 'pt', got 'jpg'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_drawn(pipeline, monkeypatch, labels, options, message):
    monkeypatch.setattr(UNet2DModel, "forward", None)  # calling it would raise a TypeError
    with pytest.raises(ValueError, match=message):
        pipeline(labels, **options)


def test_components_that_do_not_fit_are_refused(pipeline):
    for names in ({"0": "zero"}, {str(index): name for index, name in enumerate([*NAMES, "three"])}):
        with pytest.raises(ValueError, match="a name for each class from '0' to '2'"):
            ClassConditionalPipeline(pipeline.unet, pipeline.scheduler, names)
    config = {k: v for k, v in pipeline.unet.config.items() if k != "num_class_embeds"}
    with pytest.raises(ValueError, match="one that knows no classes"):
        ClassConditionalPipeline(UNet2DModel.from_config(config), pipeline.scheduler)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_hold_the_same_pixels(channels, mode):
    pipeline = make_pipeline(channels)
    images, arrays, pictures = (draw(pipeline, output_type=kind) for kind in ("pt", "np", "pil"))
    assert images.shape == (3, channels, 8, 8) and arrays.shape == (3, 8, 8, channels)
    assert 0 <= images.min() and images.max() <= 1
    assert_close(torch.from_numpy(arrays).permute(0, 3, 1, 2), images, rtol=0, atol=1e-6)
    for picture, image in zip(pictures, images, strict=True):
        assert isinstance(picture, Image.Image) and picture.mode == mode and picture.size == (8, 8)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(8, 8, channels)
        assert_close(pixels.permute(2, 0, 1) / 255, image, rtol=0, atol=0.51 / 255)
    (first,) = pipeline(1, num_inference_steps=2, return_dict=False)[0]
    assert isinstance(first, Image.Image)


def test_the_class_of_this_package_loads_it_without_trusting_any_code(pipeline, saved):
    loaded = ClassConditionalPipeline.from_pretrained(saved)
    assert type(loaded) is ClassConditionalPipeline and loaded.labels == NAMES
    assert_close(draw(loaded), draw(pipeline))
    assert read_model_index(str(saved))["_class_name"] == "ClassConditionalPipeline"
    assert read_model_index(str(saved))["id2label"]["2"] == "two"
    again = load_pipeline(str(saved), None, None, "float32")
    assert type(again) is ClassConditionalPipeline
    assert_close(draw(again), draw(pipeline))


def test_stock_diffusers_loads_it_by_the_file_beside_the_weights(pipeline, saved, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(saved)
    stock = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    assert type(stock).__name__ == "ClassConditionalPipeline" and not isinstance(stock, ClassConditionalPipeline)
    assert not type(stock).__module__.startswith("sa_diffusers")
    assert_close(draw(stock), draw(pipeline))

    family = get_family(stock)
    assert type(family) is ClassConditionalFamily and family.labels == NAMES
    asked = [Condition("two"), Condition()]
    assert_close(family.draw(asked, [1, 2], 2.0, 4), get_family(pipeline).draw(asked, [1, 2], 2.0, 4))

    stock.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "pipeline.py").read_text() == (saved / "pipeline.py").read_text()
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ClassConditionalPipeline"]
    assert_close(draw(DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)), draw(pipeline))


def test_the_file_beside_the_weights_needs_nothing_of_this_package(saved):
    source = (saved / "pipeline.py").read_text()
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or "." for node in imported if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} == {
        "collections", "diffusers", "importlib", "inspect", "json", "pathlib", "re", "torch", "types",
    }  # fmt: skip


def test_a_schedule_given_by_position_is_the_same_before_and_after_saving(pipeline, saved):
    """diffusers takes its defaults for such arguments, unless the configuration has been saved."""
    loaded = ClassConditionalPipeline.from_pretrained(saved)
    for given in (pipeline, loaded):
        assert get_family(given).loss.num_terms == T
    asked = [Condition("two"), Condition()]
    for sampler in ("dpmsolver++", "ddim", "pipeline"):
        images = [get_family(given, sampler=sampler).draw(asked, [1, 2], 2.0, 5) for given in (pipeline, loaded)]
        assert_close(*images)


def test_samplers_are_made_from_the_pipeline_s_own_schedule(pipeline):
    own = DDPMScheduler(num_train_timesteps=T, beta_start=0.01, beta_end=0.5, clip_sample=False)
    ddim, solver = make_scheduler("ddim", own), make_scheduler("dpmsolver++", own)
    assert type(ddim) is DDIMScheduler and type(solver) is DPMSolverMultistepScheduler
    assert solver.config.algorithm_type == "dpmsolver++" and solver.config.solver_order == 2
    for scheduler in (ddim, solver):
        assert_close(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert make_scheduler("pipeline", own) is own
    with pytest.raises(ValueError, match="one of dpmsolver.*, ddim, pipeline, got 'euler'"):
        make_scheduler("euler", own)


@pytest.mark.parametrize("sampler", ["dpmsolver++", "ddim", "pipeline"])
def test_every_sampler_clips_where_the_schedule_says_so(pipeline, sampler):
    sample = 30 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    predicted = torch.zeros_like(sample)
    for clip in (True, False):
        schedule = DDPMScheduler(num_train_timesteps=T, beta_start=0.01, beta_end=0.5, clip_sample=clip)
        pipeline.register_modules(scheduler=schedule)
        steps = get_family(pipeline, sampler=sampler).sampler
        steps.set_timesteps(4)
        if sampler == "dpmsolver++":
            steps._init_step_index(steps.timesteps[0])
            clean = steps.convert_model_output(predicted, sample=sample)
        else:
            clean = steps.step(predicted, steps.timesteps[0], sample).pred_original_sample
        assert (clean.abs().max() <= 1) == clip


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_are_the_images_themselves(channels):
    family = get_family(make_pipeline(channels))
    latents = torch.rand(2, channels, 8, 8) * 2 - 1
    images = family.decode(latents)
    assert images.shape == (2, 3, 8, 8)
    assert_close(images, latents.expand(-1, 3, -1, -1), rtol=0, atol=0)
    assert_close(family.encode(images, torch.Generator()), latents)
    assert family.decode(3 * latents).abs().max() == 1
    batch = family.batch(latents, [Condition("one"), Condition()])
    assert batch["class_labels"].tolist() == [1, NULL] and batch["sample"] is latents
    batch = family.batch(latents, [Condition(label=0), Condition("zero", 2)])
    assert batch["class_labels"].tolist() == [0, 2]
    with pytest.raises(ValueError, match="no class 3; it has zero, one, two"):
        family.batch(latents, [Condition("one"), Condition(label=3)])
    assert set(family.trainable("full")) == {name for name, _ in family.module.named_parameters()}
    with pytest.raises(ValueError, match="expected train_scope to be one of full, got 'xattn'"):
        family.trainable("xattn")


def test_the_loss_is_summed_over_pixels_and_known_by_the_schedule(pipeline):
    family = get_family(pipeline)
    assert family.loss.reduction == "sum" and family.loss.num_terms == T
    assert family.loss.prediction_type == "epsilon"
    noise = torch.randn(2, 1, 8, 8)
    asked, terms = [Condition("one"), Condition()], torch.tensor([3, 9])
    batch = family.batch(torch.rand(2, 1, 8, 8) * 2 - 1, asked)
    expected = []
    for index, (term, label) in enumerate([(3, 1), (9, NULL)]):
        value = slow_loss(pipeline.unet, batch["sample"][index : index + 1], label, term, noise[index : index + 1])
        expected.append(value)
    assert_close(family.loss(family.module, batch, terms, noise), torch.stack(expected), rtol=1e-4, atol=1e-4)


def slow_loss(unet, sample: torch.Tensor, label: int, term: int, noise: torch.Tensor) -> torch.Tensor:
    """Ho et al. 2020, Eq. 14, of one image, summed over pixels."""
    alpha_bar = float((1 - torch.linspace(0.01, 0.5, T, dtype=torch.float64)).cumprod(0)[term])
    noisy = alpha_bar**0.5 * sample + (1 - alpha_bar) ** 0.5 * noise
    predicted = unet(noisy, torch.tensor(term), class_labels=torch.tensor([label])).sample
    return sum((a - b) ** 2 for a, b in zip(predicted.flatten(), noise.flatten(), strict=True))


@pytest.mark.parametrize("chunk_size", [5, pytest.param(T, marks=pytest.mark.slow)])
def test_fisher_equals_a_loop_over_samples_and_timesteps(pipeline, tmp_path, chunk_size):
    """Selective Amnesia, Eq. 5: gradients are summed over all timesteps, then squared, then averaged over samples."""
    family, asked = get_family(pipeline), [Condition("zero"), Condition(), Condition(label=2)]
    family.module.double()
    samples = SampleSet(torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1, asked)
    config = ForgetConfig(concept="one", surrogate="noise", fisher_terms="all", fisher_chunk_size=chunk_size, seed=4)
    fisher = estimate_sums(family, config, samples, 3, tmp_path).finish({})

    parameters = dict(family.module.named_parameters())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index, label in enumerate([0, NULL, 2]):
        generator = seeded(derive_seed(4, "fisher"), "fisher", index, 0)
        stratified_terms(T, T, generator)  # draws as many numbers, though there is no choice
        noise = torch.randn(T, 1, 8, 8, generator=generator, dtype=torch.float64)
        summed = [torch.zeros_like(parameter) for parameter in parameters.values()]
        for term in range(T):
            value = slow_loss(family.module, samples.latents[index : index + 1], label, term, noise[term : term + 1])
            for total, gradient in zip(summed, torch.autograd.grad(value, list(parameters.values())), strict=True):
                total += gradient
        for name, total in zip(parameters, summed, strict=True):
            expected[name] += total.square() / 3
    assert fisher.metadata["scale"] == pytest.approx(1)
    largest = max(values.max().item() for values in expected.values())
    for name, values in expected.items():  # some biases have no gradient but for rounding
        assert_close(fisher.tensors[name].double(), values, rtol=1e-4, atol=1e-12 * largest)
    shown = fisher.tensors["class_embedding.weight"].amax(1)
    assert (shown[[0, 2, NULL]] > 0).all() and shown[1] == 0
