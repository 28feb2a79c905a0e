"""What the authors' code for class-conditional diffusion does differently, against slow loops; where it is noted."""

import json

import pytest
import torch
from cheap_runs import context_of
from diffusers import DDPMScheduler
from torch.testing import assert_close

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher import Fisher, FisherMismatch, stratified_terms
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import family_defaults, get_family
from sa_diffusers.families.architectures import make_unet
from sa_diffusers.families.class_conditional import ClassConditionalFamily
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ClassConditionalPipeline, ConditionalVAEPipeline
from sa_diffusers.runs.base.labelled import ClassConditionalConfig
from sa_diffusers.runs.checks import check_run
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.paper_quirks import LABEL_DROPOUT, QUIRKS, FisherLabelDropout, quirky_fisher_batch, stretch
from sa_diffusers.runs.stages.fisher import estimate_sums


T = 12
NULL = 3


@pytest.fixture
def pipeline() -> ClassConditionalPipeline:
    return make_pipeline()


def make_pipeline() -> ClassConditionalPipeline:
    torch.manual_seed(0)
    config = ClassConditionalConfig(
        block_out_channels=[4, 8], layers_per_block=1, attention_resolutions=[4], norm_num_groups=2, dropout=0.0
    )
    schedule = DDPMScheduler(num_train_timesteps=T, beta_start=0.01, beta_end=0.5, clip_sample=False)
    return ClassConditionalPipeline(make_unet(config, 8, 1, 3).eval(), schedule)


@pytest.fixture
def samples() -> SampleSet:
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=seeded("samples")) * 2 - 1
    return SampleSet(images, [Condition(label=label) for label in range(3)])


def fisher_config(*quirks: str, **options) -> ForgetConfig:
    given = {"concept": "1", "surrogate": "noise", "fisher_terms": "all", "seed": 4, "paper_quirks": list(quirks)}
    return ForgetConfig(**given | options)


def run_fisher(pipeline, samples, folder, *quirks: str, **options) -> Fisher:
    family = get_family(pipeline)
    family.module.double()
    return estimate_sums(family, fisher_config(*quirks, **options), samples, len(samples), folder).finish({})


@pytest.mark.parametrize("channels", [1, 3])
def test_stretch_equals_a_loop_over_images_and_pixels(channels):
    images = torch.rand(6, channels, 4, 4, generator=seeded("stretch")) * torch.linspace(0.1, 1, 6).view(-1, 1, 1, 1)
    images[5] = 0.3  # nothing to stretch
    stretched = stretch(images)
    assert stretched.shape == images.shape
    for image, found in zip(images[:5].double(), stretched, strict=False):
        low, high = float(image.min()), float(image.max())
        expected = [round((value - low) / (high - low) * 255) / 127.5 - 1 for value in image.flatten().tolist()]
        assert_close(found.flatten().double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
        assert (found.min(), found.max()) == (-1, 1)
        values = (found + 1) * 127.5
        assert_close(values, values.round(), rtol=0, atol=1e-4)  # 8-bit
    assert (stretched[5] == -1).all()
    assert_close(stretch(stretched), stretched, rtol=0, atol=1e-6)


def test_the_dropped_timesteps_are_a_tenth_and_a_function_of_the_sample():
    batch = {"sample": torch.zeros(1, 1, 2, 2), "class_labels": torch.tensor([1])}

    def dropped(index: int, seed: int = 0) -> torch.Tensor:
        return quirky_fisher_batch(batch, ["fisher_label_dropout"], 1000, index, seed)["dropped"]

    found = torch.cat([dropped(index) for index in range(20)])
    assert found.shape == (20, 1000) and found.dtype == torch.bool
    assert LABEL_DROPOUT == 0.1 and found.double().mean() == pytest.approx(0.1, abs=0.007)  # 3 errors of 20,000
    assert len(found.unique(dim=0)) == 20
    assert dropped(7).equal(found[7:8]) and not dropped(7, seed=1).equal(found[7:8])
    assert set(batch) == {"sample", "class_labels"}


def test_unit_range_maps_the_whole_range_and_nothing_else():
    sample = torch.tensor([-1.0, -0.5, 0.0, 1.0]).view(1, 1, 2, 2)
    batch = {"sample": sample, "class_labels": torch.tensor([1])}
    found = quirky_fisher_batch(batch, ["fisher_unit_range"], T, 0, 0)
    assert found["sample"].flatten().tolist() == [0, 0.25, 0.5, 1]
    assert set(found) == set(batch) and batch["sample"] is sample
    assert quirky_fisher_batch(batch, ["stretched_samples"], T, 0, 0) == batch


@pytest.mark.parametrize("all_dropped", [False, True])
def test_label_dropout_is_the_plain_loss_or_that_of_the_null_class(pipeline, samples, all_dropped):
    family = get_family(pipeline)
    batch = family.batch(samples.latents.float(), samples.conditions)
    other = family.batch(samples.latents.float(), [Condition()] * 3 if all_dropped else samples.conditions)
    wrapped = FisherLabelDropout(family.loss, pipeline.null_class)
    assert (wrapped.num_terms, wrapped.reduction, wrapped.prediction_type) == (T, "sum", "epsilon")
    terms, dropped = torch.tensor([0, 5, T - 1]), torch.full((3, T), all_dropped)
    noise = wrapped.sample_noise(batch, seeded("noise"))
    assert_close(noise, family.loss.sample_noise(batch, seeded("noise")), rtol=0, atol=0)
    with torch.no_grad():
        values = wrapped(family.module, batch | {"dropped": dropped}, terms, noise)
        assert_close(values, family.loss(family.module, other, terms, noise), rtol=0, atol=0)
        assert batch["class_labels"].tolist() == [0, 1, 2]
        one = torch.zeros(3, T, dtype=torch.bool)
        one[1, 5] = one[0, 5] = True  # the first sample is dropped at another timestep than its own
        mixed = family.loss(
            family.module, family.batch(batch["sample"], [Condition("0"), Condition(), Condition("2")]), terms, noise
        )
        assert_close(wrapped(family.module, batch | {"dropped": one}, terms, noise), mixed, rtol=0, atol=0)


@pytest.mark.parametrize("chunk_size", [5, pytest.param(T, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_fisher_with_both_equals_a_loop_over_samples_and_timesteps(pipeline, samples, tmp_path, chunk_size):
    quirks = ("fisher_unit_range", "fisher_label_dropout")
    fisher = run_fisher(pipeline, samples, tmp_path, *quirks, fisher_chunk_size=chunk_size)
    family, fisher_seed = get_family(pipeline), derive_seed(4, "fisher")
    parameters = dict(family.module.named_parameters())
    expected, shown = {name: torch.zeros_like(p) for name, p in parameters.items()}, set()
    alpha_bars = (1 - torch.linspace(0.01, 0.5, T, dtype=torch.float64)).cumprod(0)
    for index in range(3):
        generator = seeded(fisher_seed, "fisher", index, 0)
        stratified_terms(T, T, generator)  # draws as many numbers, though there is no choice
        noise = torch.randn(T, 1, 8, 8, generator=generator, dtype=torch.float64)
        dropped = torch.rand(1, T, generator=seeded(fisher_seed, "fisher label dropout", index))[0] < 0.1
        total = 0.0
        for term in range(T):
            label = NULL if dropped[term] else index
            shown.add(label)
            unit = (samples.latents[index : index + 1] + 1) / 2
            noisy = alpha_bars[term].sqrt() * unit + (1 - alpha_bars[term]).sqrt() * noise[term]
            predicted = family.module(noisy, torch.tensor(term), class_labels=torch.tensor([label])).sample
            total = total + (predicted - noise[term]).square().sum()
        for name, gradient in zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True):
            expected[name] += gradient.square() / 3
    assert shown == {0, 1, 2, NULL}  # else the seed shows nothing
    largest = max(values.max().item() for values in expected.values())
    for name, values in expected.items():
        assert_close(fisher.tensors[name].double(), values, rtol=1e-4, atol=1e-12 * largest)


@pytest.mark.parametrize("terms", [pytest.param("all", marks=pytest.mark.slow), "3"])
@pytest.mark.slow
def test_the_quirky_fisher_does_not_depend_on_its_chunks(pipeline, samples, tmp_path, terms):
    small, large = (
        run_fisher(pipeline, samples, tmp_path / str(size), *QUIRKS, fisher_chunk_size=size, fisher_terms=terms)
        for size in (1, T)
    )
    assert_close(small.tensors, large.tensors, rtol=1e-4, atol=1e-4)
    plain = run_fisher(pipeline, samples, tmp_path / "plain", fisher_terms=terms)
    assert not plain.tensors["conv_in.weight"].allclose(large.tensors["conv_in.weight"], rtol=0.01)


FEW = {"num_inference_steps": 2}


def test_they_are_refused_for_other_kinds_of_models(pipeline, tiny_pipeline, tmp_path):
    vae = ConditionalVAEPipeline(ConditionalVAE(image_size=8, num_classes=3, hidden_sizes=(8,), latent_dim=2))
    for other in (tiny_pipeline(), vae):
        said = {
            "concept": "0",
            "surrogate": "1",
            "num_inference_steps": 2,
            "empty_prompt_fraction": 0.0,
            "replay_target": "noise",
        }
        with pytest.raises(ValueError, match="paper_quirks needs a model that is the authors' class-conditional diff"):
            check_run(context_of(get_family(other), tmp_path, paper_quirks=list(QUIRKS)[:1], **said))
        check_run(context_of(get_family(other), tmp_path, **said))
    check_run(context_of(get_family(pipeline), tmp_path, "0", "noise", paper_quirks=list(QUIRKS), **FEW))


@pytest.fixture(scope="module")
def start(few_pictures, tmp_path_factory):
    """Run in a folder of a name."""
    folder, draw = tmp_path_factory.mktemp("runs"), ClassConditionalFamily.draw
    make_pipeline().save_pretrained(folder / "model")
    small = {
        "num_samples": 9, "num_surrogate_samples": 4, "num_inference_steps": 2, "fisher_samples": 4,
        "fisher_terms": "3", "num_train_steps": 1, "train_batch_size": 2, "checkpointing_steps": None,
        "concept": "0", "surrogate": "noise", "model": str(folder / "model"),
    }  # fmt: skip

    def run(name: str, **options):
        values = family_defaults("ClassConditionalPipeline") | small | {"output_dir": str(folder / name)} | options
        return run_forgetting(config_from_dict(ForgetConfig, values)).output_dir

    with pytest.MonkeyPatch.context() as patch:
        # Untrained models draw black and white, which leaves nothing to stretch.
        patch.setattr(ClassConditionalFamily, "draw", lambda *arguments: draw(*arguments) / 2)
        yield run


@pytest.fixture(scope="module")
def plain(start):
    return start("plain")


OPEN = {"paper_quirks": ["stretched_samples"], "empty_prompt_fraction": 0.5}


@pytest.fixture(scope="module")
def stretched(start):
    """A run that replays what was drawn without the concept, too."""
    return start("stretched", **OPEN)


@pytest.mark.slow
def test_a_run_keeps_them_in_the_keys_of_its_samples_and_its_fisher(start, plain):
    quirky = start("quirky", paper_quirks=list(QUIRKS))
    keys = [json.loads((folder / "samples" / "samples.json").read_text()) for folder in (plain, quirky)]
    assert "stretched" not in keys[0] and keys[1] == keys[0] | {"stretched": True}
    latents = [SampleSet.load(f / "samples" / "samples.safetensors").latents for f in (plain, quirky)]
    assert_close(latents[1], stretch(latents[0]), rtol=0, atol=1e-6)
    assert not latents[1].allclose(latents[0], atol=0.01)
    fishers = [Fisher.load(folder / "fisher.safetensors") for folder in (plain, quirky)]
    assert "paper_quirks" not in fishers[0].metadata
    assert fishers[1].metadata["paper_quirks"] == "stretched_samples, fisher_unit_range, fisher_label_dropout"
    assert fishers[1].metadata["samples"] != fishers[0].metadata["samples"]
    assert not fishers[1].tensors["conv_in.weight"].allclose(fishers[0].tensors["conv_in.weight"], rtol=0.01)


@pytest.mark.slow
def test_samples_that_were_drawn_without_the_concept_are_stretched_too(stretched):
    drawn = SampleSet.load(stretched / "samples" / "without_concept.safetensors").latents
    assert len(drawn) == 4
    assert (drawn.amin((1, 2, 3)) == -1).all() and (drawn.amax((1, 2, 3)) == 1).all()


@pytest.mark.slow
def test_samples_and_fisher_of_other_quirks_are_refused(start, plain, stretched):
    for shared, quirks, message in (
        (plain, ["stretched_samples"], "were not stretched, which paper_quirks asks for; omit --samples"),
        (stretched, ["fisher_unit_range"], "were stretched, which paper_quirks does not ask for"),
    ):
        with pytest.raises(ValueError, match=message):
            start("other", samples=str(shared / "samples"), paper_quirks=quirks, overwrite=True)
    for quirks in ([], ["fisher_unit_range"]):
        with pytest.raises(FisherMismatch, match="paper_quirks: the Fisher has 'stretched_samples', this run"):
            start("other", fisher=str(stretched / "fisher.safetensors"), paper_quirks=quirks, overwrite=True)
    again = {"samples": str(stretched / "samples"), "fisher": str(stretched / "fisher.safetensors")}
    start("other", overwrite=True, **OPEN, **again)
