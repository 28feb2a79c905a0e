"""The conditional VAE: model, pipeline, family, base training, and forgetting by the same run as Stable Diffusion."""

import json

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers import ConditionalVAE, ConditionalVAEPipeline, forget
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.data.sampling import FreshNoise, FreshSamples, frozen_family
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.families import family_defaults, get_family
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.hub import ModelLoadError
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.runs.base.labelled import ConditionalVAEConfig, negative_elbo, train_conditional_vae
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from studies.mnist.study import Study, StudyConfig


@pytest.fixture
def pipeline() -> ConditionalVAEPipeline:
    torch.manual_seed(0)
    return ConditionalVAEPipeline(ConditionalVAE(image_size=8, num_classes=3, hidden_sizes=(12, 8), latent_dim=2))


@pytest.fixture
def start(few_pictures, pipeline, tmp_path):
    """Run a small forgetting of class 0 of the pipeline, from disk as scripts/forget.py does."""
    pipeline.save_pretrained(tmp_path / "base")
    names = [str(index) for index in range(3)]
    DigitClassifier({"digit": names}, image_size=8, kernel_size=3, padding=1).save_pretrained(tmp_path / "judge")

    def run(name: str, **options):
        small = {
            "num_samples": 60, "num_surrogate_samples": 20, "fisher_samples": 60, "num_train_steps": 4,
            "train_batch_size": 8, "eval_images_concept": 10, "eval_images_class": 10, "concept": "0",
            "surrogate": "noise", "model": str(tmp_path / "base"), "classifier": [str(tmp_path / "judge")],
            "output_dir": str(tmp_path / name), "checkpointing_steps": None,
        }  # fmt: skip
        return run_forgetting(
            config_from_dict(ForgetConfig, family_defaults("ConditionalVAEPipeline") | small | options)
        )

    return run


def test_an_index_is_the_same_condition_as_its_one_hot_row(pipeline):
    vae, labels = pipeline.vae, torch.tensor([2, 0, 1, 2])
    weights = torch.nn.functional.one_hot(labels, 3).float()
    sample, latents = torch.rand(4, 1, 8, 8), torch.randn(4, 2)
    assert_close(vae.decode(latents, labels), vae.decode(latents, weights), rtol=0, atol=0)
    for given, same in zip(vae.encode(sample, labels), vae.encode(sample, weights), strict=True):
        assert_close(given, same, rtol=0, atol=0)
    assert not vae.decode(latents, labels).allclose(vae.decode(latents, labels.flip(0)))


def test_the_paper_s_architecture_is_the_default():
    vae = ConditionalVAE()
    widths = [
        [(m.in_features, m.out_features) for m in part if hasattr(m, "in_features")]
        for part in (vae.encoder, vae.decoder)
    ]
    assert widths == [[(794, 512), (512, 256), (256, 16)], [(18, 256), (256, 512), (512, 784)]]


def test_the_pipeline_draws_labels_and_survives_saving(pipeline, tmp_path):
    def picture(p, **options):
        return p(["2", 0], generator=torch.Generator().manual_seed(3), output_type="pt", **options).images

    images = picture(pipeline)
    assert images.shape == (2, 1, 8, 8) and 0 <= images.min() and images.max() <= 1
    pipeline.save_pretrained(tmp_path)
    assert_close(picture(ConditionalVAEPipeline.from_pretrained(tmp_path)), images, rtol=0, atol=0)
    assert_close(picture(load_pipeline(str(tmp_path), None, None, "float32")), images, rtol=0, atol=0)
    assert pipeline(1).images[0].size == (8, 8)
    assert pipeline([1, 1], output_type="np").images.shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="no class 'nine'; it has 0, 1, 2"):
        pipeline("nine")
    with pytest.raises(ValueError, match=r"expected latents \[1, 2\]"):
        pipeline(1, latents=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="a name for each class"):
        ConditionalVAEPipeline(pipeline.vae, {"0": "zero"})


def test_an_image_depends_on_its_own_seed_and_not_on_the_batch(pipeline):
    family = get_family(pipeline)
    images = family.draw([Condition("0"), Condition("1"), Condition(label=2)], [5, 6, 7])
    one = [Condition(label=1)]
    assert_close(family.draw(one, [6], negative=[Condition()]), images[1:2])
    assert_close(family.draw([Condition("2")], [7]), images[2:])
    assert not family.draw(one, [7]).allclose(images[1:2])
    assert_close(family.encode(family.decode(images), torch.Generator()), images)
    for given in ({"guidance_scale": 2.0}, {"negative": [Condition("0")]}, {"negative": [Condition(label=0)]}):
        with pytest.raises(ValueError, match="no guidance: expected guidance_scale 1 and no negative condition, got"):
            family.draw(one, [6], **given)
    with pytest.raises(ValueError, match="expected train_scope to be one of full, got 'xattn'"):
        family.trainable("xattn")


def test_fresh_samples_come_from_the_frozen_copy_and_change_every_step(pipeline):
    family = get_family(pipeline)
    source = FreshSamples(frozen_family(family), [Condition("1"), Condition("2")])
    first, again, second = (source.batch(family, 6, step, seed=1) for step in (0, 0, 1))
    assert_close(first, again, rtol=0, atol=0)
    assert set(first["labels"].tolist()) <= {1, 2} and not first["sample"].equal(second["sample"])
    with torch.no_grad():
        for parameter in pipeline.vae.parameters():
            parameter.zero_()
    assert_close(source.batch(family, 6, 0, seed=1), first, rtol=0, atol=0)

    noise = FreshNoise([Condition("0")]).batch(family, 500, 0, seed=1)
    assert set(noise["labels"].tolist()) == {0}
    assert_close(noise["sample"].mean().item(), 0.5, atol=0.01, rtol=0)
    assert_close(noise["sample"].std().item(), 12**-0.5, atol=0.01, rtol=0)  # uniform, also for a single channel


@pytest.mark.parametrize("method", ["sa", "naive", "projection-symmetric", "pcgrad-alternating"])
def test_every_method_runs_through_the_same_stages(start, tmp_path, method):
    latents = "encoder" if method == "naive" else "drawn"
    outcome = start(method, method=method, latents=latents, ewc_lambda=0.0 if "-" in method else 0.4)
    metrics = json.loads((tmp_path / method / "metrics.json").read_text())
    assert {"concept_probability", "concept_entropy", "retained_probability", "grey_entropy"} <= set(metrics["after"])
    loaded = ConditionalVAEPipeline.from_pretrained(tmp_path / method / "pipeline")
    assert_close(dict(loaded.vae.state_dict()), dict(outcome.pipeline.vae.state_dict()), rtol=0, atol=0)
    base = ConditionalVAEPipeline.from_pretrained(tmp_path / "base").vae.state_dict()
    assert not loaded.vae.state_dict()["decoder.0.weight"].equal(base["decoder.0.weight"])
    assert (
        "from sa_diffusers import ConditionalVAEPipeline" in (tmp_path / method / "pipeline" / "README.md").read_text()
    )


def test_naive_forgetting_raises_the_concept_s_own_loss(start):
    rows = json.loads(
        (
            start("naive", method="naive", latents="encoder", num_train_steps=40, learning_rate=1e-2).output_dir
            / "history.json"
        ).read_text()
    )
    assert rows[-1]["surrogate_loss"] > rows[0]["surrogate_loss"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"concept": "7"}, "no class for the concept '7'; it has 0, 1, 2"),
        ({"surrogate": "a dog"}, "no class for the surrogate 'a dog'"),
        ({"empty_prompt_fraction": 0.1}, "empty_prompt_fraction: this model always needs a class"),
        (
            {"method": "projection-symmetric", "ewc_lambda": 1.0},
            "projection-symmetric works with ewc_lambda 0.0 alone",
        ),
        ({"method": "naive"}, "have no gradient"),
        ({"replay_target": "model"}, "replay_target: this model predicts no noise"),
        ({"fresh_samples": False}, "drawn needs fresh_samples"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_drawn(start, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        start("wrong", **options)
    assert not (tmp_path / "wrong" / "samples").exists()


def test_forget_in_python_leaves_the_given_pipeline_alone(pipeline):
    before = {name: tensor.clone() for name, tensor in pipeline.vae.state_dict().items()}
    small = {"num_samples": 20, "fisher_samples": 20, "num_train_steps": 2, "train_batch_size": 4}
    forgotten = forget(pipeline, "1", "noise", **small)
    assert type(forgotten) is ConditionalVAEPipeline and forgotten.labels == ["0", "1", "2"]
    assert_close(dict(pipeline.vae.state_dict()), before, rtol=0, atol=0)
    assert not forgotten.vae.state_dict()["decoder.0.weight"].equal(before["decoder.0.weight"])


def test_base_training_lowers_the_loss_and_resumes_exactly(tmp_path):
    images = torch.zeros(30, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(30) % 3
    for index, label in enumerate(labels.tolist()):
        images[index, 0, 2 * label : 2 * label + 3] = 255
    data = LabelledImages(images, labels, ["0", "1", "2"])

    def train(name: str, steps: int) -> ConditionalVAEPipeline:
        config = ConditionalVAEConfig(
            num_train_steps=60, train_batch_size=10, learning_rate=1e-2, hidden_sizes=[12], latent_dim=2,
            checkpointing_steps=steps, output_dir=str(tmp_path / name),
        )  # fmt: skip
        return train_conditional_vae(data, config)

    whole = train("whole", 60)
    assert negative_elbo(whole, data).mean() < 20 < 64 * torch.tensor(2.0).log()
    train("parts", 20)
    again = train("parts", 20)  # goes on from its last checkpoint, and so computes nothing
    assert_close(dict(again.vae.state_dict()), dict(whole.vae.state_dict()), rtol=0, atol=0)


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.slow
def test_a_study_repeats_a_run_only_for_other_classifiers_and_refuses_other_options(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "base")
    for judge in ("first", "second"):
        names = {"digit": [str(index) for index in range(3)]}
        DigitClassifier(names, image_size=8, kernel_size=3, padding=1).save_pretrained(tmp_path / judge)

    def study(*judges: str) -> Study:
        return Study(
            StudyConfig(
                output_dir=str(tmp_path / "study"),
                model=str(tmp_path / "base"),
                num_images=4,
                forget_steps=2,
                classifier=[str(tmp_path / judge) for judge in judges],
                num_threads=1,
            )  # fmt: skip
        )

    small = {"num_samples": 20, "fisher_samples": 20, "train_batch_size": 4}
    _, metrics = study("first").forget("zero", 0, **small)
    with monkeypatch.context() as patch:
        patch.setattr("studies.mnist.study.run_forgetting", None)  # calling it would raise
        assert study("first").forget("zero", 0, **small)[1] == metrics
    with pytest.raises(StageMismatch, match="learning_rate"):
        study("first").forget("zero", 0, **small, learning_rate=0.5)
    monkeypatch.setattr("sa_diffusers.runs.stages.train.train", None)  # judged anew, not trained anew
    _, judged = study("first", "second").forget("zero", 0, **small)
    assert judged["after"] == metrics["after"] and len(judged["by_classifier"]["after"]) == 1


def test_what_is_no_class_is_refused_with_what_to_do(start, tmp_path):
    with pytest.raises(ValueError, match="A class has one name: repeat --concept"):
        start("two", concept="0, 1")
    with pytest.raises(ValueError, match="None was given, and this is the usual one: pass --surrogate noise"):
        start("usual", concept="2", surrogate=None)
    (tmp_path / "run").mkdir()
    (tmp_path / "base").rename(tmp_path / "run" / "pipeline")
    with pytest.raises(ModelLoadError, match="did you mean .*run/pipeline"):
        start("folder", model=str(tmp_path / "run"))
