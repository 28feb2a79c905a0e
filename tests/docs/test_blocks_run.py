"""Every command and Python block of README and docs runs, small, and leaves whole pages."""

import json
import os
import runpy
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features
from datasets import Image as HubImage
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from snippets import ROOT, Block, blocks

import sa_diffusers
from sa_diffusers.__main__ import main
from sa_diffusers.attacks.plan import ALL
from sa_diffusers.io.bundled import resolve
from tests.browser import assert_whole


# By the order in which a reader needs them; every other page follows.
ORDER = [
    "docs/howto/class_conditional.md",
    "README.md", "docs/index.md", "docs/howto/concepts.md", "docs/howto/base_model.md", "docs/howto/did_it_work.md",
    "docs/evaluation.md",
]  # fmt: skip
TOYS = ("docs/new_family.md", "docs/new_method.md")  # tests/runs/test_toys.py runs these
DIGITS = "bundled/digits/pipeline"
INSTEAD = {  # of what is on a hub or on the reader's disk, or large
    DIGITS: "small",
    "CompVis/stable-diffusion-v1-4": "small",
    "my/model": "small",
    "models/my-flux": "small",
    "models/my-xl.safetensors": "small",  # tests/models/test_single_file.py reads such files
    "black-forest-labs/FLUX.2-klein-4B": "small",
    "runs/cifar10_base/pipeline": "runs/digits8x8_base/pipeline",
    "airplane": "0",
    "me/sd-fisher": "runs/brad-pitt",
    "me/sd-samples": "runs/brad-pitt/samples",
    "me/sd-without-brad-pitt": "runs/brad-pitt",
    "runs/digits-edit": "runs/digits-seven",
    "ylecun/mnist": "mnist_files",
}
# Installing and launching of processes have tests of their own.
ELSEWHERE = ("pip", "pytest", "make")
DRAW = "--num_inference_steps 2 --guidance_scale 2"
FEW = "--num_train_steps 2 --lr_warmup_steps 0 --checkpointing_steps null"
BUDGETS = {
    "forget": f"{FEW} --num_threads 1 --num_samples 8 --num_surrogate_samples 4 --fisher_samples 6 --fisher_terms 4 "
    "--overwrite --train_batch_size 2 --track_steps null --ema_decay null --eval_images_concept 2 "
    "--eval_images_class 1 --eval_images_other 2",
    "surrogates": "",
    "choose": "",
    "verify": "",
    "attack": f"--num_targets 2 --num_images 2 --num_restarts 1 --steps 1 --keep_every 1 {DRAW}",
    "train_base": f"{FEW} --num_threads 1 --train_batch_size 4",
    "train_classifier": f"{FEW} --train_batch_size 4",
    "evaluate pipelines": f"--num_images 2 {DRAW}",
    "evaluate images": "--num_neighbours 1",
    "evaluate run": "--num_images_per_class 4 --num_neighbours 1",
}
OF_TEXT = {  # options that other kinds of model refuse
    "forget": f"{DRAW} --replay_prompts prompts.txt",
    "train_base": "--vae_steps 2 --text_steps 2 --vae_batch_size 4 --text_batch_size 4",
}
OF_TOKENS = "--vq_warmup_steps 2 --vq_steps 2"
WITHOUT_TEXT = ("8x8", "cvae", "cifar10", "inpaint")
PYTHON_BUDGET = {
    "num_samples": 8, "num_surrogate_samples": 4, "fisher_samples": 6, "fisher_terms": "4", "num_train_steps": 2,
    "lr_warmup_steps": 0, "train_batch_size": 2, "num_inference_steps": 2, "overwrite": True, "eval_images_concept": 2,
    "eval_images_class": 1, "eval_images_other": 2, "replay_prompts": "prompts.txt",
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What lies on the reader's disk: the repository's scripts and settings, a model, pictures, prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 4)
    for name in ("configs", "scripts"):
        os.symlink(ROOT / name, name)
    pipeline = StableDiffusionPipeline.from_pretrained(resolve(DIGITS), dtype=torch.float32)
    unet = {"block_out_channels": (8, 16), "attention_head_dim": 2}
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | unet)
    vae = {"block_out_channels": (4, 8, 8), "norm_num_groups": 2}
    pipeline.vae = AutoencoderKL.from_config(dict(pipeline.vae.config) | vae)
    pipeline.save_pretrained("small")
    lines = [{"file_name": f"{i}.png", "text": "a red seven", "digit": ("seven", "three")[i % 2]} for i in range(24)]
    for folder in ("my_images", "real_images"):
        Path(folder).mkdir()
        for i, line in enumerate(lines):
            Image.new("RGB", (32, 32), (10 * i, 5 * i, 90)).save(f"{folder}/{line['file_name']}")
    Path("my_images/metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    asked = [
        {"prompt": f"a {ink} {digit}", "form": form, "digit": digit}
        for ink, form in (("red", "seen"), ("green", "held_out")) for digit in ("seven", "three")
    ] + [{"prompt": "a red digit", "form": "seen", "ink": "red"}]  # fmt: skip
    Path("my_prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in asked))
    write_mnist(Path("mnist_files"))
    monkeypatch.setattr("sa_diffusers.attacks.pictures.INVERSION_STEPS", 2)
    labels = {options["attack"]: label for label, options in reversed(ALL.items())}  # one of each kind
    few = {label: ALL[label] | {"steps": 1} for label in labels.values()}
    monkeypatch.setattr("sa_diffusers.attacks.plan.ALL", few)
    Path("prompts.txt").write_text("a red three\na green four\na blue nine\n")
    return tmp_path


def write_mnist(folder: Path) -> None:
    """A few strokes of every class, in the files of MNIST."""
    features = Features({"image": HubImage(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    for split in ("train", "test"):
        images = [Image.new("L", (28, 28)) for _ in range(20)]
        for index, image in enumerate(images):
            image.paste(255, (8 + index % 10, 4, 12 + index % 10, 24))
        folder.mkdir(exist_ok=True)
        rows = {"image": images, "label": [index % 10 for index in range(20)]}
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def small(words: list[str]) -> None:
    """Run a command at a small budget; of an option that is given twice the later one counts."""
    words = [INSTEAD.get(word, word) for word in words if word != "--push_to_hub"]
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        words = ["python", args.training_script, *args.training_script_args]
    if "--snapshot_steps" in words:  # a list that is given twice is one list
        words = [word for word in words if not word.isdecimal()] + ["--snapshot_steps", "1"]
        words.remove("--snapshot_steps")
    name, rest = Path(words[1]).stem.replace("-", "_"), words[2:]
    given = [*rest, *BUDGETS[f"{name} {rest[0]}" if name == "evaluate" else name].split()]
    if "--strength_sheet" in rest:
        given += ["--strength_scales", "0.75"]
    if not any(kind in word for kind in WITHOUT_TEXT for word in rest):
        given += OF_TEXT.get(name, "").split()
        if name in ("forget", "surrogates"):
            given += ["--model", "small"] * ("--model" not in rest)
    if any("token_inpaint" in word for word in rest):
        given += OF_TOKENS.split()
    AcceleratorState._reset_state(reset_partial_state=True)  # every command is a process of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [words[1], *given])
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
        else:
            main([words[1], *given])


def run(step: str | tuple[str, ...], page: str, names: dict[str, Any]) -> None:
    """Run a Python block of a page, or a command."""
    if isinstance(step, str):
        option = "output_dir=" if "output_dir=" in step else "callback="
        code = step.replace(option, f"**BUDGET, {option}").replace("CompVis/stable-diffusion-v1-4", "small")
        exec(compile(code, page, "exec"), names)
    elif step[0] not in ELSEWHERE and "--help" not in step:
        small(list(step))


@pytest.mark.slow("minutes")
def test_every_block_runs_and_leaves_whole_pages(place: Path, subtests: pytest.Subtests) -> None:
    found = [block for language in ("bash", "python") for block in blocks(language)]
    found = [block for block in found if block.why is None and block.page not in TOYS]
    places = {page: position for position, page in enumerate(ORDER)}
    found.sort(key=lambda block: (places.get(block.page, len(ORDER)), block.page, block.line))
    steps: dict[str | tuple[str, ...], Block] = {}  # what several pages say runs once
    for block in found:
        for step in [block.text] if block.language == "python" else map(tuple, block.commands):
            steps.setdefault(step, block)
    model = StableDiffusionPipeline.from_pretrained("small")  # what a page calls `pipe` where it does not say more
    names: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"BUDGET": PYTHON_BUDGET, "sa_diffusers": sa_diffusers, "pipe": model}
    )
    failed = []
    for step, block in steps.items():
        print(time.strftime("%X"), block, step, flush=True)
        try:
            run(step, block.page, names[block.page])
        except (Exception, SystemExit) as error:
            print(repr(error))
            failed.append(f"{block}: {step}: {error!r}")
    assert failed == []
    pages = sorted(page for page in place.glob("runs/**/*.html") if page.name in ("report.html", "strength.html"))
    assert len(pages) > 10
    assert_whole(pages, place, subtests)
