"""Set-up shared by all tests: offline, with an empty hub cache, seeded; and a Stable Diffusion in miniature."""

import gc
import os
import sys
import tempfile


# Before any Hugging Face import: both are read once, at import, and a look-up without a network costs some 20 s.
_hub_cache = tempfile.TemporaryDirectory(prefix="sa_diffusers_hf_home_")  # removed when the session ends
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _hub_cache.name
os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for child processes: tests run side by side, a core each
# Whatever the environment says: compiling every module, and rewriting its asserts, takes each worker 10 s a start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import random  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402


WORDS = "zero one two three four five six seven eight nine a red green blue digit on black white 7 9".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: not any(mark.args for mark in item.iter_markers("slow")))


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need go through its millions of objects again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same global random state at the start of every test, whichever tests ran before it."""
    import torch  # not above: the process that hands out the tests has no use for it

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from sa_diffusers.models.tokenizer import train_tokenizer

    return train_tokenizer([" ".join(WORDS)] * 3, num_merges=60, max_length=12)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_tokenizer) -> Callable:
    """A factory of real Stable Diffusion pipelines: 16x16 images, 8x8x4 latents, 20 timesteps, random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def make_tiny_pipeline(
        prediction_type: str = "epsilon", seed: int = 0, **components: object
    ) -> StableDiffusionPipeline:
        torch.manual_seed(seed)
        ids = {f"{name}_token_id": getattr(tiny_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text_config = CLIPTextConfig(
            vocab_size=len(tiny_tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=12, projection_dim=8, **ids,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, mid_block_add_attention=False, sample_size=16,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=2,
            cross_attention_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        scheduler = DDIMScheduler(
            num_train_timesteps=20, clip_sample=False, steps_offset=1, prediction_type=prediction_type
        )
        parts = {"safety_checker": None, "feature_extractor": None} | components
        pipeline = StableDiffusionPipeline(
            vae=vae, text_encoder=CLIPTextModel(text_config), tokenizer=tiny_tokenizer, unet=unet, scheduler=scheduler,
            requires_safety_checker=parts["safety_checker"] is not None, **parts,
        )  # fmt: skip
        for module in (vae, pipeline.text_encoder, unet):
            module.eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make_tiny_pipeline


@pytest.fixture(scope="module")
def few_pictures():
    """And no page, whose plots take most of the time of runs this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 2)
        patch.setattr("sa_diffusers.runs.results.write_report", lambda path, **_: path.write_text("<html></html>"))
        yield


@pytest.fixture(scope="module")
def run_cheaply(few_pictures, tiny_pipeline_dir, tmp_path_factory) -> Callable:
    """Forget "seven, 7" in a folder, from the saved pipeline, with some options changed; returns the outcome."""
    from cheap_runs import CHEAP, PROMPTS

    from sa_diffusers.io.configuration import config_from_dict, layered
    from sa_diffusers.runs.forget import run_forgetting
    from sa_diffusers.runs.options import ForgetConfig

    prompts = tmp_path_factory.mktemp("prompts")
    (prompts / "replay.txt").write_text("\n".join(PROMPTS))
    (prompts / "templates.txt").write_text("a {}\na red {}\na green {} on black")
    options = CHEAP | {
        "concept": "seven, 7",
        "surrogate": "nine",
        "model": str(tiny_pipeline_dir),
        "replay_prompts": str(prompts / "replay.txt"),
        "concept_templates": str(prompts / "templates.txt"),
    }

    def run(output_dir: Path, **changes):
        values = layered(ForgetConfig, options, {"output_dir": str(output_dir)} | changes)
        return run_forgetting(config_from_dict(ForgetConfig, values))

    return run


@pytest.fixture
def safety_checker(monkeypatch):
    """A real safety checker that fails when it is run."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    def run(*arguments: object, **options: object) -> None:
        raise AssertionError("the safety checker was run")

    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    monkeypatch.setattr(StableDiffusionSafetyChecker, "forward", run)
    return StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tiny_pipeline, tmp_path_factory) -> Path:
    """The pipeline of seed 0, saved; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder
