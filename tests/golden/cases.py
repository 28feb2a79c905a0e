"""What the golden fixtures record: the runs, their options, and the numbers that are read out of a run's folder.

Nothing in here may know how the package is divided into modules: it uses the lazy names of `sa_diffusers`, the command
lines of `scripts/`, the files of `configs/`, and the files that a run leaves. Each recipe passes only those options
that its method uses, since others may be refused.
"""

import io
import json
import math
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import sa_diffusers


GOLDEN = Path(__file__).parent
ROOT = GOLDEN.parents[1]
Options = dict[str, object]

PROMPTS = [f"a {ink} {digit}" for ink in ("red", "green") for digit in "six seven eight nine".split()] + ["a digit"]
TEMPLATES = ["a {}", "a red {}", "a green {} on black"]

# Options by what they belong to; a recipe is made of those that its method has.
LOOK: Options = {"num_inference_steps": 2, "guidance_scale": 2.0, "eval_batch_size": 16}
TRAIN: Options = {
    "num_train_steps": 5, "train_batch_size": 2, "learning_rate": 3e-3, "lr_warmup_steps": 0,
    "checkpointing_steps": None, "logging_steps": 1,
    # Large: weights whose gradient is nothing but rounding would take whole steps by its sign, which every processor
    # has otherwise.
    "adam_epsilon": 1e-3,
}  # fmt: skip
SAMPLES: Options = {"num_samples": 8, "replay_guidance_scale": 2.0, "sample_batch_size": 4}
SURROGATE: Options = {"surrogate": "nine", "num_surrogate_samples": 4}
EWC: Options = {"ewc_lambda": 1.0, "fisher_samples": 2, "fisher_terms": "2"}
ESD: Options = {"esd_inference_steps": 4}
EDIT: Options = {"uce_preserve_scale": 0.1}
PROJECTION: Options = {"ewc_lambda": 0.0, "replay_target": "noise"}
SA = LOOK | TRAIN | SAMPLES | SURROGATE | EWC

# On the tiny Stable Diffusion of conftest.py, concept "seven, 7". IMAGES stands for a folder of images.
IMAGES = "<images>"
STABLE_DIFFUSION: dict[str, Options] = {
    "sa": {"method": "sa"} | SA,
    "sa+esd": {"method": "sa+esd"} | SA | ESD,
    "finetune": {"method": "finetune"} | LOOK | TRAIN | SURROGATE,
    "ewc": {"method": "ewc"} | SA,
    "replay": {"method": "replay"} | LOOK | TRAIN | SAMPLES | SURROGATE,
    **{name: {"method": name} | LOOK | TRAIN | ESD for name in ("esd-x", "esd-x-strict", "esd-u")},
    "uce": {"method": "uce", "surrogate": "nine"} | LOOK | EDIT,
    **{f"sld-{level}": {"method": f"sld-{level}"} | LOOK for level in ("weak", "medium", "strong", "max")},
    "naive": {"method": "naive"} | LOOK | TRAIN | SAMPLES | EWC | {"num_surrogate_samples": 4},
    **{
        f"{how}-{turns}": {"method": f"{how}-{turns}"} | LOOK | TRAIN | SAMPLES | SURROGATE | PROJECTION
        for how in ("projection", "pcgrad")
        for turns in ("symmetric", "alternating")
    },
    "sa, lora": SA | {"lora_rank": 2},
    "sa, lora of convolutions, from the edit": SA
    | EDIT
    | {"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": "attention+conv", "start": "edit"},
    "sa, from the edit": SA | EDIT | {"start": "edit"},
    "sa, noise": SA | {"surrogate": "noise"},
    "sa, surrogate as the model sees it": SA | {"surrogate_target": "model"},
    "sa, folder of images": SA | {"surrogate": IMAGES},
    "sa, as in the paper": SA | {"replay_target": "noise", "replay_negative": "none", "fisher_terms": "all"},
    "sa, cross-attention": SA | {"train_scope": "xattn"},
    "sa, averaged, in parts, with dropped prompts": SA
    | {"ema_decay": 0.5, "gradient_accumulation_steps": 2, "replay_prompt_dropout": 0.5, "replay_negative": "all"},
}

# On 8x8 images of three classes, concept "0"; beside the defaults of the kind of model.
LABELLED: Options = TRAIN | {
    "num_samples": 30, "num_surrogate_samples": 12, "eval_batch_size": 16, "learning_rate": 1e-3,
    "train_batch_size": 8,
}  # fmt: skip
CLASSES = LABELLED | {"num_inference_steps": 2}
CLASSES_EWC: Options = {"fisher_samples": 4, "fisher_terms": "2"}
CLASS_CONDITIONAL: dict[str, Options] = {
    "sa": {"method": "sa"} | CLASSES | CLASSES_EWC,
    "sa, a class": {"method": "sa", "surrogate": "1"} | CLASSES | CLASSES_EWC,
    "naive": {"method": "naive"} | CLASSES | CLASSES_EWC,
    "finetune": {"method": "finetune"} | {k: v for k, v in CLASSES.items() if k != "num_samples"},
}
CONDITIONAL_VAE: dict[str, Options] = {
    "sa, fresh samples": {"method": "sa", "fisher_samples": 30} | LABELLED,
    "sa, fresh samples of a class": {"method": "sa", "surrogate": "1", "fisher_samples": 30} | LABELLED,
    "sa, kept samples": {"method": "sa", "fresh_samples": False, "latents": "encoder", "fisher_samples": 30}
    | LABELLED,
    "naive": {"method": "naive", "latents": "encoder", "fisher_samples": 30} | LABELLED,
}
# The handful that runs every time.
FAST = {
    ("conditional_vae", "sa, fresh samples"), ("conditional_vae", "naive"),
}  # fmt: skip


def write_inputs(folder: Path) -> dict[str, str]:
    """Prompts, templates and a folder of images, in `folder`; returns where they lie."""
    (folder / "replay.txt").write_text("\n".join(PROMPTS))
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    (folder / "images").mkdir()
    rows, columns = np.mgrid[:16, :16]
    for index in range(3):
        channels = [rows * 16, columns * 16, (rows + columns) * 4 * (index + 1)]
        pixels = np.stack(channels, axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    return {
        "replay_prompts": str(folder / "replay.txt"),
        "concept_templates": str(folder / "templates.txt"),
        IMAGES: str(folder / "images"),
    }


def forget_in_stable_diffusion(name: str, model: Path, inputs: dict[str, str], output_dir: Path) -> dict:
    """Numbers of one of `STABLE_DIFFUSION`, run from the saved pipeline."""
    files = {key: path for key, path in inputs.items() if key != IMAGES}
    options = {key: inputs[IMAGES] if value == IMAGES else value for key, value in STABLE_DIFFUSION[name].items()}
    given = {"concept": "seven, 7", "model": str(model), "output_dir": str(output_dir)} | files
    sa_diffusers.run_forgetting(sa_diffusers.ForgetConfig(**given | options))
    return measure(output_dir, model)


def forget_in_class_conditional(name: str, folder: Path) -> dict:
    """Numbers of one of `CLASS_CONDITIONAL`."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, norm_num_groups=2, norm_eps=1e-6, dropout=0.0, num_class_embeds=4,
        resnet_time_scale_shift="scale_shift",
    ).eval()  # fmt: skip
    schedule = DDPMScheduler(12, beta_start=0.01, beta_end=0.5, clip_sample=False)
    return forget_labelled(sa_diffusers.ClassConditionalPipeline(unet, schedule), CLASS_CONDITIONAL[name], folder)


def forget_in_conditional_vae(name: str, folder: Path) -> dict:
    """Numbers of one of `CONDITIONAL_VAE`."""
    torch.manual_seed(0)
    vae = sa_diffusers.ConditionalVAE(image_size=8, num_classes=3, hidden_sizes=(12, 8), latent_dim=2)
    return forget_labelled(sa_diffusers.ConditionalVAEPipeline(vae), CONDITIONAL_VAE[name], folder)


def forget_labelled(pipeline, options: Options, folder: Path) -> dict:
    pipeline.save_pretrained(folder / "base")
    surrogate, rest = options.get("surrogate", "noise"), {k: v for k, v in options.items() if k != "surrogate"}
    sa_diffusers.forget(pipeline, "0", surrogate, output_dir=folder / "run", **rest)
    return measure(folder / "run", folder / "base")


def measure(run: Path, base: Path) -> dict:
    """What training said and left: the history by columns, and norms (L2, in float64) of the saved module's weights.

    Of the weights every tenth, by name, has its norm recorded, besides that of all and that of their change.
    """
    (after,) = (load_file(path) for path in weight_files(run / "pipeline"))
    (before,) = (load_file(path) for path in weight_files(base))
    history = json.loads((run / "history.json").read_text())
    assert before.keys() == after.keys()
    change = {name: after[name].double() - before[name].double() for name in before}
    return {
        "history": {key: [row.get(key) for row in history] for key in (history[0] if history else {})},
        "weights": {name: norm([after[name]]) for name in sorted(after)[::10]},
        "all_weights": norm(after.values()),
        "change": norm(change.values()),
    }


def weight_files(pipeline: Path) -> list[Path]:
    """The weights of the trained module, of whatever kind of pipeline: a UNet, or a VAE where there is none."""
    unet = sorted(pipeline.glob("unet/*.safetensors"))
    return unet or sorted(pipeline.glob("vae/*.safetensors"))


def norm(tensors) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


# Base models and forgetting by command line, each well below a minute on one core. The large epsilon as above.
# In float32 on every processor.
RUN = ("--num_threads", "1", "--adam_epsilon", "1e-4", "--mixed_precision", "no")
NUM_CONCEPT, NUM_CLASS, NUM_OTHER = 8, 3, 8  # pictures judged: of the concept, of each other class, of other prompts
JUDGED = ("--eval_images_concept", str(NUM_CONCEPT), "--eval_images_class", str(NUM_CLASS))
DIGITS = (
    *RUN, *JUDGED, "--eval_images_other", str(NUM_OTHER), "--eval_batch_size", "20",
    "--num_samples", "40", "--num_surrogate_samples", "20", "--num_inference_steps", "4", "--sample_batch_size", "20",
    "--fisher_samples", "6", "--fisher_terms", "2",
    "--num_train_steps", "10", "--train_batch_size", "4", "--lr_warmup_steps", "2", "--logging_steps", "1",
    "--checkpointing_steps", "null", "--track_steps", "null",
)  # fmt: skip
DIGITS_RUNS: dict[str, Sequence[str]] = {
    "digits": ("--config", "configs/digits.yaml", *DIGITS),
    "digits_edit": ("--config", "configs/digits_edit.yaml", *DIGITS),
}
CLASSIFIER = (
    "--config", "configs/digits8x8_classifier.yaml", "--adam_epsilon", "1e-4", "--num_train_steps", "300",
    "--lr_warmup_steps", "20", "--checkpointing_steps", "300",
)  # fmt: skip
BASES: dict[str, Sequence[str]] = {
    "digits8x8_base": (
        "--config", "configs/digits8x8_base.yaml", *RUN, "--num_train_steps", "40", "--train_batch_size", "32",
        "--lr_warmup_steps", "10", "--logging_steps", "10", "--checkpointing_steps", "40", "--sample_steps", "null",
    ),
    "digits8x8_cvae": (
        "--config", "configs/digits8x8_cvae.yaml", *RUN, "--num_train_steps", "300", "--logging_steps", "50",
        "--checkpointing_steps", "300",
    ),
}  # fmt: skip
LABELLED_RUN = (
    *RUN, *JUDGED, "--concept", "0", "--surrogate", "noise", "--num_train_steps", "10", "--train_batch_size", "16",
    "--logging_steps", "1", "--checkpointing_steps", "null", "--num_samples", "100",
)  # fmt: skip
LABELLED_RUNS: dict[str, Sequence[str]] = {
    "digits8x8_base": (
        *LABELLED_RUN, "--num_inference_steps", "4", "--fisher_samples", "20", "--fisher_terms", "2",
        "--lr_warmup_steps", "2",
    ),
    "digits8x8_cvae": (*LABELLED_RUN, "--fisher_samples", "100"),
}  # fmt: skip


def run_script(script: str, *arguments: str) -> str:
    """Standard output of scripts/<script>.py at the repository's root, in this process, to import everything once."""
    path = ROOT / "scripts" / f"{script}.py"
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [str(path), *arguments]
    try:
        with redirect_stdout(printed), chdir(ROOT):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, f"{script} ended with {ended.code}"
    finally:
        sys.argv = argv
    return printed.getvalue()


def forget_digits(name: str, folder: Path) -> dict:
    """Numbers of one of `DIGITS_RUNS`."""
    run_script("forget", *DIGITS_RUNS[name], "--output_dir", str(folder / "run"))
    return results(folder / "run")


def train_classifier(folder: Path) -> str:
    """Where the classifier of 8x8 digits lies then."""
    run_script("train_classifier", *CLASSIFIER, "--output_dir", str(folder))
    return str(folder / "classifier")


def forget_labelled_digits(name: str, classifier: str, folder: Path) -> dict:
    """Numbers of a base model of `BASES` and of forgetting a class of it."""
    run_script("train_base", *BASES[name], "--output_dir", str(folder / "base"))
    models = ("--model", str(folder / "base" / "pipeline"), "--classifier", classifier)
    run_script("forget", *models, *LABELLED_RUNS[name], "--output_dir", str(folder / "run"))
    (history,) = (folder / "base" / "checkpoints").rglob("history.json")
    return {"base": json.loads(history.read_text())[-1]} | results(folder / "run")


def results(run: Path) -> dict:
    """metrics.json without what it took and the intervals, which follow from the rest; and the history's last row."""
    metrics, history = (json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "history"))
    return {"metrics": {when: metrics[when] for when in ("before", "after")}, "last": history[-1]}


# `--help` of each script, and where the options depend on one of them, for each of its values.
HELP: dict[str, Sequence[str]] = {path.stem: () for path in sorted((ROOT / "scripts").glob("*.py"))} | {
    "train_base-class_conditional": ("--family", "class_conditional"),
    "train_base-conditional_vae": ("--family", "conditional_vae"),
    "train_base-masked_autoencoder": ("--family", "masked_autoencoder"),
    "train_base-token_inpaint": ("--family", "token_inpaint"),
    "train_base-pixel_inpaint": ("--family", "pixel_inpaint"),
    **{f"evaluate-{command}": (command,) for command in ("run", "images", "pipelines")},
}
del HELP["evaluate"]  # its options are its commands'


def help_of(name: str) -> str:
    """What `python scripts/<script>.py ... --help all` prints."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "119"
    try:
        printed = run_script(name.split("-")[0], *HELP[name], "--help", "all")
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    # In defaults that lie in the package, which are wrapped by the length of where that is.
    return re.sub(r"\(default:\s+<root>", "(default: <root>", printed.replace(str(ROOT), "<root>"))


def options_in(text: str) -> set[str]:
    """The options that a help text explains: each at the beginning of its paragraph, maybe after a short form."""
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, flags=re.MULTILINE))


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """{"a": {"b": [1]}} -> ("a/b/0", 1)."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(part, f"{name}/{key}" if name else str(key))
    else:
        yield name, value
