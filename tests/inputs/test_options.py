"""Options of every command as people pass them: of another data set, out of range, empty, twice the same pictures."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from PIL import Image
from tiny_clip import save_tiny_clip
from tiny_mae import tiny_mae
from tiny_text_to_image import make

from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.cli.train_base import CONFIGS
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher_file import FisherMismatch
from sa_diffusers.data.sharing import fetch_samples, load_fisher
from sa_diffusers.evaluation.images.options import FoldersConfig, RunConfig
from sa_diffusers.evaluation.options import PipelineEvaluationConfig
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.configuration import BOUNDS, FACTS
from sa_diffusers.runs.base.classifier import ClassifierConfig, train_and_save_classifier
from sa_diffusers.runs.options import ForgetConfig


COMMANDS = (ForgetConfig, ClassifierConfig, AttackConfig, FoldersConfig, RunConfig, PipelineEvaluationConfig)


@pytest.mark.parametrize("cls", [*COMMANDS, *CONFIGS.values()], ids=lambda cls: cls.__name__)
def test_every_number_has_a_bound(cls):
    hints, numbers = get_type_hints(cls), {int, float, list[int], list[float]}
    fields = {
        field.name: field
        for field in dataclasses.fields(cls)
        if {hints[field.name], *get_args(hints[field.name])} & numbers
    }
    unbounded = {name for name, field in fields.items() if not field.metadata.keys() & set(BOUNDS)}
    assert unbounded <= {
        "nudity_threshold",
        "face_threshold",
        "strength_scales",
        "feature_depths",
    }  # they say their range
    assert fields.keys() - unbounded and set(BOUNDS) < FACTS


@pytest.fixture
def pictures(tmp_path) -> None:
    """Folders of pictures, and files that are none of what they stand for."""
    for number, name in enumerate(("pictures", "others")):
        (tmp_path / name).mkdir()
        for index in range(10):
            shade = 20 * index + 3 * number
            Image.new("L", (16, 16), shade).save(tmp_path / name / f"{index}.png")
    (tmp_path / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 42\n")
    (tmp_path / "prompts.txt").write_text("a red six\n")
    (tmp_path / "templates.txt").write_text("a {}\n")


TINY = ("--num_train_steps", 1, "--train_batch_size", 2, "--output_dir", "runs/x")
VAE = ("--family", "conditional_vae", *TINY)
MAE = ("--family", "masked_autoencoder", *TINY)
DIFFUSION = ("--family", "class_conditional", "--attention_resolutions", 8, *TINY)
JUDGE = ("--dataset", "digits8x8", *TINY)
EVALUATE = ("images", "pictures", "others", "--metrics", "prc", "--extractor", "bundled/digits/classifier")
DIGITS = "bundled/digits/pipeline"
SUITE = ("pipelines", DIGITS, "--concept", "seven", "--classifier", "bundled/digits/classifier")
ATTACK = (DIGITS, "--original", DIGITS, "--concept", "seven")


@pytest.mark.parametrize(
    ("command_line", "says"),
    [
        pytest.param(("train_base", *VAE, "--hidden_sizes", 0, 4), ("hidden_sizes > 0", "got 0"), id="no width"),
        pytest.param(("train_base", *VAE, "--latent_dim", -1), ("latent_dim > 0",), id="negative width"),
        pytest.param(("train_base", *VAE, "--num_threads", 0), ("num_threads > 0",), id="no thread"),
        pytest.param(
            ("train_base", *DIFFUSION, "--num_train_timesteps", 0), ("num_train_timesteps > 1",), id="no step"
        ),
        pytest.param(("train_base", *DIFFUSION, "--sample_steps", -1), ("sample_steps > 0",), id="negative steps"),
        pytest.param(("train_base", *MAE, "--holes", "half=0"), ("one comes at all", "half=0"), id="no hole"),
        pytest.param(("train_base", *MAE, "--crop", 100), ("crop 100", "omit it"), id="crop that is not taken"),
        pytest.param(
            ("train_base", *MAE, "--dataset", "pictures", "--data_dir", "pictures:"),
            ("after the colon",),
            id="no class",
        ),
        pytest.param(
            ("train_base", "--data_dir", "pictures", "--exclude_classes", "seven"),
            ("exclude_classes", "imagefolder"),
            id="classes of captions",
        ),
        pytest.param(("train_base", "--dataset", "mnist"), ("--dataset", "'mnist'"), id="data set of another family"),
        pytest.param(("train_base", "--caption_dropout", 2), ("caption_dropout < 1", "got 2"), id="share above one"),
        pytest.param(("train_base", "--data_dir", ""), ("data_dir with a value", "empty name"), id="variable not set"),
        pytest.param(
            ("train_classifier", *JUDGE, "--architecture", "resnet", "--input_size", 0),
            ("input_size > 0",),
            id="no pixel",
        ),
        pytest.param(("train_classifier", "--dataset", "pictures"), ("--data_dir", "got none"), id="no pictures"),
        pytest.param(
            ("train_classifier", "--data_dir", "pictures", "--resolution", 0), ("resolution > 0",), id="no resolution"
        ),
        pytest.param(("train_classifier", *JUDGE[:-1], "prompts.txt"), ("prompts.txt",), id="file for a folder"),
        pytest.param(
            ("evaluate", *EVALUATE, "--real", "pictures", "--concept", "seven"),
            ("--concept", "pictures"),
            id="class of a folder",
        ),
        pytest.param(
            ("evaluate", *EVALUATE, "--split", "test"), ("split is of a data set", "pictures"), id="split of a folder"
        ),
        pytest.param(
            ("evaluate", *EVALUATE, "--real", "digits8x8", "--data_dir", "pictures"),
            ("data_dir", "digits8x8"),
            id="folder of what ships",
        ),
        pytest.param(
            ("evaluate", *EVALUATE, "--output", "pictures"), ("--output", "folder pictures"), id="folder for a file"
        ),
        pytest.param(("evaluate", *SUITE, "--num_i2p", 3), ("--num_i2p", "--i2p"), id="rows of no list"),
        pytest.param(
            ("evaluate", *SUITE, "--output_dir", "prompts.txt"), ("file prompts.txt",), id="file for results"
        ),
        pytest.param(("evaluate", *SUITE, "--compare", ""), ("compare with a value",), id="nothing to compare with"),
        pytest.param(
            ("attack", *ATTACK, "--output_dir", "prompts.txt"), ("file prompts.txt",), id="attack into a file"
        ),
        pytest.param(("attack", *ATTACK, "--control", ""), ("control with a value",), id="no control"),
        pytest.param(
            ("convert", "checkpoint", "pointer.ckpt", "--model", DIGITS, "--output", "x"),
            ("pointer of Git LFS", "git lfs pull"),
            id="pointer of Git LFS",
        ),
        pytest.param(("push", "pictures", "--pipeline", "me/x"), ("does not hold pipeline",), id="no run to push"),
        pytest.param(("verify", "prompts.txt"), ("nothing to check by",), id="nothing to verify"),
        pytest.param(
            ("surrogates", "--concept", "seven", "--surrogate", "nine", "--model", DIGITS, "--samples", "prompts.txt"),
            ("prompts.txt",),
            id="no samples",
        ),
    ],
)
def test_what_would_be_ignored_or_end_in_a_library(refused, pictures, command_line, says):
    refused(*command_line, says=says)


QUICK = (
    "--concept", "seven", "--surrogate", "nine", "--replay_prompts", "prompts.txt", "--concept_templates",
    "templates.txt", "--method", "uce", "--num_inference_steps", 2,
)  # fmt: skip
NAMED = (
    "classifier",
    "clip",
    "samples",
    "fisher",
    "before",
    "eval_prompts",
    "siblings",
    "output_dir",
    "revision",
    "variant",
)


@pytest.mark.parametrize("name", NAMED)
def test_an_empty_name_is_none_that_was_meant(refused, name):
    """A shell makes one of a variable that is not set."""
    refused("forget", "--concept", "seven", "--surrogate", "nine", f"--{name}", " ", says=(f"{name} with a value",))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--compile_backend", "fast"), ("compile_backend", "'fast'", "inductor")),
        (("--method", "sa", "--train_batch_size", 3, "--gradient_accumulation_steps", 2), ("multiple of 2",)),
        (("--forget_images", "pictures"), ("forget_images", "--method encoder")),
        (("--clip", "pictures"), ("pictures cannot be loaded",)),
        (("--clip", "clip", "--surrogate", "noise", "--method", "sa"), ("surrogate in words",)),
        (("--surrogate", "three", "--surrogate", "noise"), ("surrogate for each of 1 concept", "three; noise")),
        (("--log_json", "pictures"), ("cannot write pictures", "--log_json")),
        (("--log_json", "no/where.jsonl"), ("cannot write no/where.jsonl",)),
        (("--fisher", "pictures/0.png", "--method", "sa"), ("pictures/0.png",)),
        (("--model", ""), ("model with a value",)),
    ],
)
def test_forget_refuses_before_it_draws(refused, pictures, tiny_pipeline_dir, tiny_tokenizer, tmp_path, words, says):
    if "clip" in words:
        save_tiny_clip(tmp_path / "clip", tiny_tokenizer)
    quick = QUICK[:2] + QUICK[4:] if "--surrogate" in words else QUICK  # given twice, it is of two concepts
    refused("forget", "--model", tiny_pipeline_dir, *quick, *words, says=says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--forget_images", "pictures", "--retain_images", "pictures"), ("forget (pictures)", "retain (pictures)")),
        (("--forget_images", "digits8x8:3", "--retain_images", "digits8x8:3,4"), ("forget (3)", "retain (3, 4)")),
        (("--forget_images", "pictures:", "--retain_images", "others"), ("after the colon of 'pictures:'",)),
        (("--forget_images", "pictures", "--retain_images", "others", "--masks", "square"), ("expected a mask of",)),
        (("--forget_images", "pictures", "--retain_images", "others", "--lora_rank", 2), ("lora_rank", "encoder")),
        (
            ("--forget_images", "pictures", "--retain_images", "others", "--surrogate", "a nine"),
            ("./pictures", "'a nine'"),
        ),
    ],
)
def test_pictures_to_forget(refused, pictures, tmp_path, words, says):
    tiny_mae().save_pretrained(tmp_path / "model")
    refused("forget", "--model", tmp_path / "model", "--method", "encoder", *words, says=says)


def test_pictures_to_forget_ask_for_a_method_that_does(refused, pictures, tmp_path):
    tiny_mae().save_pretrained(tmp_path / "model")
    refused("forget", "--model", tmp_path / "model", "--forget_images", "pictures", says=("pass --method encoder",))


def test_a_run_that_completes_draws_nothing_to_compare(refused, pictures, tmp_path):
    tiny_mae().save_pretrained(tmp_path / "run" / "pipeline")
    words = ("--real", "others", "--metrics", "prc", "--extractor", "bundled/digits/classifier")
    refused("evaluate", "run", "run", *words, "--prompts", "prompts.txt", says=("completes pictures", "report.html"))


@pytest.mark.parametrize("name", ["flux-dev", "sd3-t5", "klein"])
def test_a_flow_is_drawn_by_ddim_as_by_its_own_levels(tiny_tokenizer, name):
    """The pipelines of FLUX say their own noise levels, of which only the count is taken."""
    pipeline = make(name, tiny_tokenizer)
    drawn = [get_family(pipeline, sampler=s).draw([Condition("nine")], [3], 2.0, 4) for s in ("ddim", "pipeline")]
    assert drawn[0].isfinite().all() and drawn[0].shape == drawn[1].shape


def test_a_file_that_is_there_is_no_repository(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FisherMismatch, match="pictures/0.png is no readable Fisher"):
        load_fisher("pictures/0.png")
    assert fetch_samples("pictures/0.png") == Path("pictures/0.png")


def test_a_classifier_goes_on_with_its_own_training_alone(tmp_path):
    """Of other options what lay there was taken for trained."""
    values = {"dataset": "digits8x8", "num_train_steps": 2, "train_batch_size": 4, "checkpointing_steps": 1}
    config = ClassifierConfig(**values, output_dir=str(tmp_path))
    first, again = train_and_save_classifier(config), train_and_save_classifier(config)
    assert first == again
    with pytest.raises(StageMismatch, match="seed: 0 -> 1"):
        train_and_save_classifier(dataclasses.replace(config, seed=1))
