"""Class-conditional diffusion: training a base model, and forgetting by the same run as Stable Diffusion."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from sa_diffusers import forget
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import Likelihood
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.data.replay import Replay
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import FreshNoise
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.families import family_defaults, get_family
from sa_diffusers.families.architectures import make_unet
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ClassConditionalPipeline, ConditionalVAEPipeline
from sa_diffusers.runs.base.labelled import (
    SHEET_COLUMNS,
    ClassConditionalConfig,
    TrainingBatches,
    train_class_conditional,
)
from sa_diffusers.runs.checks import check_run
from sa_diffusers.runs.context import Inputs, RunContext
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig


NAMES = ["0", "1", "2"]
NULL = 3
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def data() -> LabelledImages:
    """30 images of 8x8, no two alike, and none like the mirror image of any."""
    images = torch.randint(256, (30, 1, 8, 8), generator=seeded("images")).to(torch.uint8)
    return LabelledImages(images, torch.arange(30) % 3, NAMES)


@pytest.fixture
def config(tmp_path) -> ClassConditionalConfig:
    return ClassConditionalConfig(
        block_out_channels=[4, 8], layers_per_block=1, attention_resolutions=[4], norm_num_groups=2, dropout=0.1,
        num_train_timesteps=20, num_train_steps=6, train_batch_size=10, learning_rate=1e-2, ema_decay=0.9,
        checkpointing_steps=2, logging_steps=1, sample_steps=3, output_dir=str(tmp_path / "base"),
    )  # fmt: skip


def weights(pipeline) -> dict[str, torch.Tensor]:
    return dict(pipeline.unet.state_dict())


def which(image: torch.Tensor, data: LabelledImages) -> tuple[int, bool]:
    """The index of an image in [-1, 1] among the data, and whether it is mirrored; slow and obvious."""
    for index, known in enumerate(data.images):
        for mirrored in (False, True):
            pixels = known.flip(-1) if mirrored else known
            if (pixels / 127.5 - 1 - image).abs().max() < 1e-6:
                return index, mirrored
    raise AssertionError("no image of the data")


def test_a_batch_is_a_function_of_its_step(data, config):
    batches, again = TrainingBatches(data, config), TrainingBatches(data, config)
    for step in (5, 0, 5, 2):
        assert_close(batches(step), again(step), rtol=0, atol=0)
    assert not batches(1)["sample"].equal(batches(2)["sample"])
    other = TrainingBatches(data, replace(config, seed=1))
    assert not batches(1)["sample"].equal(other(1)["sample"])
    seen = [which(image, data)[0] for step in range(3) for image in batches(step)["sample"]]
    assert sorted(seen) == list(range(30))  # an epoch shows each image once


@pytest.mark.parametrize("flip", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_labels_are_dropped_and_images_mirrored_at_their_rates(data, config, flip):
    batches, rows = TrainingBatches(data, replace(config, flip=flip, label_dropout=0.1)), []
    for step in range(60):
        batch = batches(step)
        assert -1 <= batch["sample"].min() and batch["sample"].max() <= 1
        for image, label in zip(batch["sample"], batch["class_labels"].tolist(), strict=True):
            index, mirrored = which(image, data)
            assert label in (data.labels[index], NULL)
            rows.append((label == NULL, mirrored))
    dropped, mirrored = torch.tensor(rows, dtype=torch.float64).T
    assert dropped.mean() == pytest.approx(0.1, abs=0.04)  # 3 standard errors of 600
    assert mirrored.mean() == pytest.approx(0.5 if flip else 0, abs=0.06)
    if flip:  # the two know nothing of each other
        assert mirrored[dropped == 1].mean() == pytest.approx(0.5, abs=0.2)
    kept = TrainingBatches(data, replace(config, label_dropout=0.0))
    assert all((kept(step)["class_labels"] != NULL).all() for step in range(6))
    assert (data.labels != NULL).all()  # the data themselves are as they were


@pytest.mark.parametrize("size", [8, 7])
def test_antithetic_timesteps_come_in_pairs_and_are_uniform(size):
    num_terms, half = 6, (size + 1) // 2
    likelihood = Likelihood(DiffusionLoss(torch.linspace(0.99, 0.05, num_terms)), antithetic=True)
    batch, counts = {"sample": torch.zeros(size, 1, 2, 2)}, torch.zeros(num_terms)
    for step in range(1000):
        terms = likelihood.draw(batch, seeded("terms", step))["terms"]
        assert terms.shape == (size,)
        assert (terms[half:] == num_terms - 1 - terms[: size - half]).all()
        counts += torch.bincount(terms, minlength=num_terms)
    assert_close(counts / counts.sum(), torch.full((num_terms,), 1 / num_terms), rtol=0, atol=0.02)


@pytest.mark.parametrize("antithetic", [True, False])
def test_training_takes_antithetic_timesteps_where_asked_for(data, config, monkeypatch, antithetic):
    seen, call = [], Likelihood.__call__

    def record(self, model, batch):
        seen.append(batch["terms"])
        return call(self, model, batch)

    monkeypatch.setattr(Likelihood, "__call__", record)
    train_class_conditional(data, replace(config, antithetic=antithetic, sample_steps=None, num_train_steps=2))
    paired = [bool((terms[5:] == 19 - terms[:5]).all()) for terms in seen]
    assert paired == [antithetic] * 3  # a last look after two steps


def assert_sheets_show_a_row_of_each_class(pipeline, config, folder: Path) -> None:
    sheets = sorted((folder / "progress").iterdir())
    assert [sheet.name for sheet in sheets] == ["0000003.png", "0000006.png"]
    pixels = [torch.frombuffer(bytearray(Image.open(s).convert("L").tobytes()), dtype=torch.uint8) for s in sheets]
    assert not pixels[0].equal(pixels[1])  # the model has changed
    width, height = Image.open(sheets[1]).size
    factor = width // (SHEET_COLUMNS * 8)
    assert (width, height) == (factor * SHEET_COLUMNS * 8, factor * len(NAMES) * 8)
    family, whole = get_family(pipeline), pixels[1].view(height, width)[::factor, ::factor].float() / 127.5 - 1
    for row, column in ((0, 0), (1, 3), (2, SHEET_COLUMNS - 1)):
        seed = derive_seed(config.seed, "sheet", row * SHEET_COLUMNS + column)
        image = family.draw([Condition(NAMES[row])], [seed], config.sample_guidance_scale, 10)[0, 0]
        assert_close(whole[8 * row : 8 * row + 8, 8 * column : 8 * column + 8], image, rtol=0, atol=1.1 / 127.5)


@pytest.mark.slow
def test_sheets_and_an_interrupted_training_resumed(data, config, tmp_path, monkeypatch):
    whole = train_class_conditional(data, config)
    assert not whole.unet.training
    assert_sheets_show_a_row_of_each_class(whole, config, tmp_path / "base")
    saved = ClassConditionalPipeline.from_pretrained(tmp_path / "base" / "pipeline")
    assert_close(weights(saved), weights(whole), rtol=0, atol=0)
    assert saved.labels == NAMES and saved.scheduler.config.num_train_timesteps == 20

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    elsewhere = replace(config, output_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sa_diffusers.runs.base.labelled.draw_sheet", interrupted)
        train_class_conditional(data, elsewhere)
    assert not (tmp_path / "parts" / "pipeline").exists()
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step_0000002"]
    torch.rand(5)  # what else draws from the global generator is of no account
    resumed = train_class_conditional(data, elsewhere)
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    untrained = make_unet(config, 8, 1, 3).state_dict()
    assert not weights(whole)["conv_in.weight"].equal(untrained["conv_in.weight"])


def test_a_class_left_out_is_never_shown_but_keeps_its_label(data, config):
    config = replace(config, sample_steps=None, exclude_classes=["1"], num_train_steps=3)
    left = data.without(config.exclude_classes)
    batches = TrainingBatches(left, config)
    assert set(torch.cat([batches(step)["class_labels"] for step in range(12)]).tolist()) == {0, 2, NULL}
    pipeline = train_class_conditional(left, config)
    assert pipeline.labels == NAMES and pipeline.unet.config.num_class_embeds == 4
    torch.manual_seed(derive_seed(config.seed, "unet"))
    before, after = make_unet(config, 8, 1, 3).class_embedding.weight, pipeline.unet.class_embedding.weight
    assert [bool(row) for row in (before != after).any(1)] == [True, False, True, True]
    assert pipeline("1", num_inference_steps=2).images[0].size == (8, 8)


def test_half_precision_files_hold_what_is_returned_and_another_configuration_is_refused(data, config, tmp_path):
    config = replace(config, save_dtype="float16", sample_steps=None, num_train_steps=1)
    pipeline = train_class_conditional(data, config)
    (file,) = (tmp_path / "base" / "pipeline" / "unet").glob("*.safetensors")
    saved = load_file(file)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert {tensor.dtype for tensor in weights(pipeline).values()} == {torch.float32}
    assert_close({name: tensor.float() for name, tensor in saved.items()}, weights(pipeline), rtol=0, atol=0)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "base" / "pipeline").rglob("*")}
    with pytest.raises(StageMismatch, match="learning_rate: 0.01 -> 0.5"):
        train_class_conditional(data, replace(config, learning_rate=0.5))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "base" / "pipeline").rglob("*")}
    marker = tmp_path / "base" / ".stages" / "base.json"
    older = json.loads(marker.read_text())
    marker.write_text(json.dumps(older | {"key": older["key"] | {"sample_steps": 500}, "fingerprint": "of that"}))
    train_class_conditional(data, replace(config, sample_steps=2, sample_guidance_scale=3.0))  # how it is watched


def test_other_pictures_and_a_folder_of_something_else_are_refused(data, config, tmp_path):
    config = replace(config, sample_steps=None, num_train_steps=1)
    own = tmp_path / "base" / "pipeline" / "unet" / "mine.safetensors"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(StageMismatch, match="holds files of something else; pass another --output_dir"):
        train_class_conditional(data, config)
    assert own.read_text() == "mine"
    config = replace(config, output_dir=str(tmp_path / "other"))
    train_class_conditional(data, config)
    others = LabelledImages(255 - data.images, data.labels, data.names)
    with pytest.raises(StageMismatch, match="pictures: "):
        train_class_conditional(others, config)
    marker = tmp_path / "other" / ".stages" / "base.json"
    older = json.loads(marker.read_text())
    del older["key"]["pictures"]
    marker.write_text(json.dumps(older))
    train_class_conditional(data, config)  # those of before say nothing of pictures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_resolutions": [4, 5]}, r"expected attention_resolutions among \[8, 4\], got 5"),
        ({"block_out_channels": [4] * 5}, "images of 8 pixels cannot be halved 4 times; pass fewer stages"),
    ],
)
def test_a_wrong_architecture_is_refused_before_anything_is_written(data, config, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_class_conditional(data, replace(config, **options))
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("name", ["label_dropout", "dropout"])
def test_shares_outside_their_range_are_refused(name):
    with pytest.raises(ValueError, match=f"expected 0 <= {name} < 1, got 1.0"):
        ClassConditionalConfig(**{name: 1.0})


def test_the_paper_s_unet_for_cifar10():
    """FiLM, attention at 16 pixels and in the middle; Ho et al. 2020 have 35.7 M weights, without FiLM."""
    file = str(CONFIGS / "paper" / "table1" / "cifar10" / "original.yaml")
    config = parse_config(ClassConditionalConfig, ["--config", file])
    with torch.device("meta"):
        unet = make_unet(config, 32, 3, 10)
    count = sum(parameter.numel() for parameter in unet.parameters())
    print(f"the paper's UNet for CIFAR10 has {count / 1e6:.1f} M weights")
    assert count == pytest.approx(35.7e6, rel=0.2)
    blocks = [*unet.down_blocks, *unet.up_blocks[::-1]]
    assert [len(getattr(block, "attentions", ())) for block in blocks] == [0, 2, 0, 0, 0, 3, 0, 0]
    resnets = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    assert len(resnets) == 4 * 2 + 4 * 3 + 2
    assert all(resnet.time_emb_proj.out_features == 2 * resnet.out_channels for resnet in resnets)  # scale and shift
    assert {resnet.dropout.p for resnet in resnets} == {0.1}
    heads = {module.heads for module in unet.modules() if type(module).__name__ == "Attention"}
    assert heads == {1} and unet.class_embedding.num_embeddings == 11


# Forgetting


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Plots take most of the time of runs this small."""
    monkeypatch.setattr("sa_diffusers.runs.results.write_report", lambda path, **_: path.write_text("<html></html>"))
    monkeypatch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 2)


@pytest.fixture
def pipeline() -> ClassConditionalPipeline:
    torch.manual_seed(0)
    config = ClassConditionalConfig(
        block_out_channels=[4, 8], layers_per_block=1, attention_resolutions=[4], norm_num_groups=2, dropout=0.0
    )
    schedule = DDPMScheduler(num_train_timesteps=20, beta_start=0.01, beta_end=0.4, clip_sample=False)
    return ClassConditionalPipeline(make_unet(config, 8, 1, 3).eval(), schedule)


SMALL = {
    "num_samples": 30, "num_surrogate_samples": 12, "num_inference_steps": 2, "fisher_samples": 4, "fisher_terms": "2",
    "num_train_steps": 4, "train_batch_size": 8, "checkpointing_steps": None, "learning_rate": 1e-3,
    "lr_warmup_steps": 0,
}  # fmt: skip


@pytest.fixture
def start(pipeline, tmp_path):
    """Run a small forgetting of class 0 of the pipeline, from disk as scripts/forget.py does."""
    pipeline.save_pretrained(tmp_path / "model")
    DigitClassifier({"digit": NAMES}, image_size=8, kernel_size=3, padding=1).save_pretrained(tmp_path / "judge")

    def run(name: str, **options):
        given = {
            "concept": "0", "surrogate": "noise", "model": str(tmp_path / "model"), "output_dir": str(tmp_path / name),
            "classifier": [str(tmp_path / "judge")], "eval_images_concept": 6, "eval_images_class": 6,
        }  # fmt: skip
        values = family_defaults("ClassConditionalPipeline") | SMALL | given | options
        return run_forgetting(config_from_dict(ForgetConfig, values))

    return run


@pytest.mark.slow
def test_forgetting_leaves_a_pipeline_that_stock_diffusers_loads(start, pipeline, tmp_path):
    outcome = start("run", track_steps=2)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for judged in (metrics["before"], metrics["after"]):
        assert {
            "concept_probability", "concept_entropy", "retained_accuracy", "retained_worst_accuracy",
            "retained_probability", "noise_probability", "noise_entropy", "grey_probability", "replay_loss",
        } <= set(judged)  # fmt: skip
        assert judged["num_images"] == 18
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline", trust_remote_code=True)
    assert type(loaded).__name__ == "ClassConditionalPipeline" and loaded.labels == NAMES
    assert_close(weights(loaded), weights(outcome.pipeline), rtol=0, atol=0)
    assert not weights(loaded)["conv_in.weight"].equal(weights(pipeline)["conv_in.weight"])
    generators = [[torch.Generator().manual_seed(3)] for _ in range(2)]
    images = [p(["2"], 2.0, 3, generator=g, output_type="pt").images
              for p, g in zip((loaded, outcome.pipeline), generators, strict=True)]  # fmt: skip
    assert_close(*images)
    samples = SampleSet.load(tmp_path / "run" / "samples" / "samples.safetensors")
    assert samples.latents.shape == (30, 1, 8, 8) and set(texts(samples.conditions)) == set(NAMES)
    assert (tmp_path / "run" / "progress" / "step_000004.png").exists()
    assert "ClassConditionalPipeline" in (tmp_path / "run" / "pipeline" / "README.md").read_text()


@pytest.mark.slow
def test_interrupted_forgetting_goes_on(start, tmp_path, monkeypatch):
    options = {"classifier": [], "num_samples": 12, "num_train_steps": 3, "checkpointing_steps": 2}
    whole = start("whole", **options)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sa_diffusers.runs.stages.train.save_pipeline", interrupted)
        start("parts", **options)
    resumed = start("parts", **options)
    assert_close(weights(resumed.pipeline), weights(whole.pipeline), rtol=0, atol=0)
    metrics = json.loads((tmp_path / "parts" / "metrics.json").read_text())
    assert {"samples", "surrogate", "fisher", "before"} <= set(metrics["seconds"]["reused"])


@pytest.mark.slow
def test_noise_as_the_surrogate_is_uniform_in_pixels_and_new_every_step(start, tmp_path, monkeypatch):
    shown, batch = [], FreshNoise.batch

    def record(self, *arguments):
        shown.append(batch(self, *arguments))
        return shown[-1]

    monkeypatch.setattr(FreshNoise, "batch", record)
    start("noise", num_surrogate_samples=60, num_train_steps=3, train_batch_size=20, ewc_lambda=0.0)
    surrogate = SampleSet.load(tmp_path / "noise" / "surrogate" / "surrogate.safetensors")
    assert surrogate.latents.shape == (60, 1, 8, 8) and set(surrogate.conditions) == {Condition("0")}
    trained = torch.cat([part["sample"] for part in shown])
    assert trained.shape == (60, 1, 8, 8) and len(trained.unique(dim=0)) == 60
    assert all(part["class_labels"].tolist() == [0] * 20 for part in shown)
    for images in (surrogate.latents, trained):
        assert -1 <= images.min() < -0.99 and 0.99 < images.max() <= 1
        assert images.mean() == pytest.approx(0, abs=0.04)
        assert images.std() == pytest.approx(3**-0.5, abs=0.02)


@pytest.mark.slow
def test_another_class_as_the_surrogate_is_drawn_under_its_own_label(start, pipeline, tmp_path):
    start("class", surrogate="2", num_train_steps=1, ewc_lambda=0.0, replay_target="noise", replay_prompt_dropout=0.5)
    surrogate = SampleSet.load(tmp_path / "class" / "surrogate" / "surrogate.safetensors")
    assert set(surrogate.conditions) == {Condition("0")}
    drawn = get_family(pipeline).draw(
        [Condition("2")],
        [derive_seed(0, "surrogate", 4)],
        family_defaults("ClassConditionalPipeline")["guidance_scale"],
        2,
    )
    assert_close(surrogate.latents[4:5], drawn, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_another_class_can_be_taught_by_the_frozen_model(start):
    """The first loss is the distance of its predictions for two classes, below that from the noise that was drawn."""
    losses = {}
    options = {"surrogate": "2", "num_train_steps": 1, "ewc_lambda": 0.0, "replay_weight": 0.0, "classifier": []}
    for target in ("model", "noise"):
        outcome = start(f"to_{target}", surrogate_target=target, **options)
        losses[target] = json.loads((outcome.output_dir / "history.json").read_text())[0]["surrogate_loss"]
    assert 0 < losses["model"] < 0.5 * losses["noise"]


@pytest.mark.slow
def test_forget_in_python_leaves_the_given_pipeline_alone(pipeline):
    before = {name: tensor.clone() for name, tensor in weights(pipeline).items()}
    options = SMALL | {"num_train_steps": 2, "num_samples": 8, "fisher_samples": 2}
    forgotten = forget(pipeline, "1", "noise", **options)
    assert type(forgotten) is ClassConditionalPipeline and forgotten.labels == NAMES
    assert_close(weights(pipeline), before, rtol=0, atol=0)
    assert not weights(forgotten)["conv_in.weight"].equal(before["conv_in.weight"])


@pytest.mark.slow
def test_a_class_is_chosen_in_the_place_of_one(pipeline, tmp_path):
    """The one whose embedding is nearest; the null class is as far as nothing in its place."""
    ((name, embedding),) = [(n, w) for n, w in pipeline.unet.named_parameters() if len(w) == NULL + 1 and w.ndim == 2]
    with torch.no_grad():
        embedding.mul_(30)
        embedding[2] = embedding[0] + 0.3 * (embedding[2] - embedding[0])
    options = SMALL | {"num_train_steps": 2, "num_samples": 8, "fisher_samples": 2, "progress": False}
    forgotten = forget(pipeline, "0", "auto", output_dir=tmp_path, **options)
    (choice,) = json.loads((tmp_path / "surrogate" / "auto.json").read_text())["choices"]
    assert choice["chosen"] == forgotten.metrics["surrogate"] == "2" and choice["words"] == choice["compared"] == 2
    vae = ConditionalVAEPipeline(ConditionalVAE(image_size=8, num_classes=10, hidden_sizes=(12, 8), latent_dim=2))
    with pytest.raises(ValueError, match="surrogate auto needs a model that"):
        forget(vae, "0", "auto", output_dir=tmp_path / "vae", progress=False)


@pytest.mark.parametrize("distil", [True, False])
def test_the_null_class_is_shown_at_its_rate_and_never_with_the_frozen_target(pipeline, distil):
    samples = SampleSet(torch.rand(10, 1, 8, 8), [Condition("1"), Condition("2")] * 5)
    concepts, family, rows = Concepts([find_concept("0", "noise")]), get_family(pipeline), []
    replay = Replay(samples, NAMES, concepts, "open", distil, dropout=0.3)
    for step in range(100):
        batch = replay.batch(family, 10, step, seed=1)
        assert_close(batch, replay.batch(family, 10, step, seed=1), rtol=0, atol=0)
        for image, label, distilled in zip(*(batch[k] for k in ("sample", "class_labels", "distilled")), strict=True):
            index = int((samples.latents == image).flatten(1).all(1).nonzero())
            rows.append((int(label), int(samples.conditions[index].text), bool(distilled)))
    null = [row for row in rows if row[0] == NULL]
    assert len(null) / len(rows) == pytest.approx(0.3, abs=0.05)
    assert not any(distilled for _, _, distilled in null)
    assert {own for _, own, _ in null} == {1, 2}
    rest = [row for row in rows if row[0] != NULL]
    assert {label for label, _, _ in rest} == {1, 2} and {distilled for _, _, distilled in rest} == {distil}
    assert any(label != own for label, own, _ in rest) == distil  # the frozen model answers under any other prompt
    plain = Replay(samples, NAMES, concepts, "open", distil)
    assert all((plain.batch(family, 10, step, seed=1)["class_labels"] != NULL).all() for step in range(5))


@pytest.mark.slow
def test_replay_for_the_null_class_changes_what_training_sees(start, monkeypatch):
    seen, batch = [], Replay.batch

    def record(self, *arguments, **options):
        found = batch(self, *arguments, **options)
        seen.append((found["class_labels"] == NULL).float().mean().item())
        return found

    monkeypatch.setattr(Replay, "batch", record)
    for target in ("model", "noise"):
        seen.clear()
        start(f"to_{target}", replay_prompt_dropout=0.5, replay_target=target, ewc_lambda=0.0, classifier=[])
        assert len(seen) == 4 and sum(seen) / 4 == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("target", ["model", pytest.param("noise", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_dropout_is_off_where_the_model_is_held_to_its_own_predictions(start, pipeline, tmp_path, target):
    pipeline.unet.register_to_config(dropout=0.1)
    pipeline.save_pretrained(tmp_path / "model")
    outcome = start("run", replay_target=target, ewc_lambda=0.0, num_train_steps=1, classifier=[])
    resnets = [module for module in outcome.pipeline.unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    assert {resnet.dropout.p for resnet in resnets} == {0.0 if target == "model" else 0.1}
    assert outcome.pipeline.unet.config.dropout == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concept": "7"}, "no class for the concept '7'; it has 0, 1, 2"),
        ({"surrogate": "a dog"}, "no class for the surrogate 'a dog'"),
        ({"train_scope": "xattn"}, "expected train_scope to be one of full, got 'xattn'"),
        ({"fresh_samples": True}, "fresh_samples needs a model that decodes latents of a known prior in one pass"),
        ({"replay_prompt_dropout": 1.0}, "expected 0 <= replay_prompt_dropout < 1, got 1.0"),
        ({"replay_prompt_dropout": 0.1, "fresh_samples": True}, "fresh samples has no guidance"),
        ({"paper_quirks": ["wrong"]}, "expected paper_quirks to be of stretched_samples, .*; got 'wrong'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_drawn(start, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        start("wrong", **options)
    assert not (tmp_path / "wrong" / "samples").exists()


def test_options_of_guidance_are_allowed_only_where_there_is_a_null_class(pipeline, tmp_path):
    family = get_family(pipeline)
    given = {"empty_prompt_fraction": 0.1, "replay_prompt_dropout": 0.2, "num_inference_steps": 2}
    options = ForgetConfig(concept="0", surrogate="noise", **given)
    inputs = Inputs(Concepts([find_concept("0", "noise", None)]), [], [], {}, {})
    context = RunContext(options.resolved(), inputs, family, tmp_path)
    assert check_run(context) is None
    family.capabilities = family.capabilities - {"guidance"}
    with pytest.raises(ValueError, match="empty_prompt_fraction: this model always needs a class"):
        check_run(context)
