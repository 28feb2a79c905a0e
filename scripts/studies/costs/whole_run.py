"""A whole run of a model in its real size, with random weights, on the CPU: its memory beside what is counted."""

import gc
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from sa_diffusers.families.scopes import adapted_layers
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.processes import reporting
from sa_diffusers.models.single_file import read_shapes, shipped
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.lora import add_lora
from studies.costs.architectures import DENOISERS, build_vae
from studies.costs.counting import decoding_bytes, forward_bytes, step_bytes, weight_bytes
from studies.costs.memory import LORA_RANK, on_meta
from studies.rows import table_of


REPO = "stabilityai/stable-diffusion-xl-base-1.0"
LATENTS, SCOPE, TARGETS = 4, "xattn-strict", "attention"
# The fewest of everything. Such a CPU computes in float32: half precision has no fast kernels on it.
RUN: dict[str, Any] = {
    "concept": "seven, 7", "surrogate": "three", "classifier": ["bundled/digits/classifier"],
    "eval_prompts": "bundled/digits/eval_prompts.jsonl", "dtype": "float32", "num_samples": 2,
    "num_surrogate_samples": 1, "num_inference_steps": 1, "sample_batch_size": 1,
    "lora_rank": LORA_RANK, "lora_targets": TARGETS,
    "train_scope": SCOPE, "fisher_samples": 2, "fisher_terms": "10", "fisher_layers": "trained", "num_train_steps": 2,
    "train_batch_size": 1, "lr_warmup_steps": 0, "gradient_checkpointing": True, "checkpointing_steps": None,
    "eval_images_concept": 1, "eval_images_class": 1, "eval_images_other": 1, "eval_batch_size": 1,
}  # fmt: skip


def run_whole(folder: Path, seed: int = 0) -> tuple[dict[str, Any], str]:
    """Forget in Stable Diffusion XL in `folder`; peak memory by stage in GB, measured and counted, and as Markdown.

    A run that was stopped goes on, and is not measured where it was before.
    """
    model = folder / "model"
    if not (model / "model_index.json").is_file():
        build_pipeline(model, LATENTS, seed)
        gc.collect()  # modules lie in cycles, and the run has need of their room
    config = config_from_dict(ForgetConfig, RUN | {"model": str(model), "output_dir": str(folder / "run")})
    watch = MemoryWatch()
    with reporting(callback=watch):
        run_forgetting(config)
    counted = count_stages(model)
    rows = [
        {"stage": stage, "seconds": seconds, "measured": peak / 1e9, "counted": (watch.start + counted[kind]) / 1e9}
        for stage, (seconds, peak) in watch.found.items()
        if (kind := stage if stage in counted else "drawing")
    ]
    report = {"latents": LATENTS, "scope": SCOPE, "options": RUN, "swapped": watch.swapped / 1e9, "stages": rows}
    text = (
        f"Stable Diffusion XL of random weights at {8 * LATENTS} pixels, a LoRA of rank {LORA_RANK} on {SCOPE}, in "
        "float32 on a CPU, all parts in main memory: peak in GB (10^9 bytes), with what the process had before it "
        f"read a weight.\n\n{table_of(rows)}"
    )
    return report, text


def build_pipeline(folder: Path, latents: int, seed: int) -> None:
    """Save the pipeline of the configurations that ship, its random weights in half precision.

    Args:
        latents: height and width of those the UNet is said to draw; it has the same weights for any.
    """
    home = Path(shipped(REPO).name)
    index = json.loads((home / "model_index.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        parts = {name: _part(home / name, *given) for name, given in index.items() if isinstance(given, list)}
    finally:
        torch.set_default_dtype(before)
    parts["unet"].register_to_config(sample_size=latents)
    pipeline = getattr(diffusers, index["_class_name"])(**{name: part for name, part in parts.items() if part})
    pipeline.save_pretrained(folder)


def _part(folder: Path, library: str | None, name: str | None) -> Any:
    if name is None:
        return None
    kind = getattr(diffusers if library == "diffusers" else transformers, name)
    if library == "diffusers":
        return kind.from_config(kind.load_config(folder))
    if "Tokenizer" in name:
        return kind.from_pretrained(folder)
    return kind(kind.config_class.from_pretrained(folder))


def count_stages(model: Path) -> dict[str, float]:
    """Bytes by stage: the weights of all parts in float32, and what a stage takes besides."""
    denoiser = on_meta(DENOISERS["sdxl"])
    shapes = (shape for path in model.glob("*/*.safetensors") for shape in read_shapes(path).values())
    parts = sum(4 * shape.numel() for shape in shapes)
    drawing = max(forward_bytes(denoiser, 2, None, LATENTS), decoding_bytes(on_meta(build_vae), 1, LATENTS))
    layers = adapted_layers(denoiser, SCOPE, TARGETS)
    for name in layers:
        denoiser.get_submodule(name).weight.requires_grad_(True)
    sums = weight_bytes(denoiser, trained_only=True)
    fisher = 2 * sums + step_bytes(denoiser, 10, None, True, LATENTS)  # sums, the first draw, the second
    denoiser = on_meta(DENOISERS["sdxl"])
    add_lora(denoiser, layers, LORA_RANK, LORA_RANK, seed=0)
    trained = weight_bytes(denoiser, trained_only=True)
    held = sums + 4 * trained + step_bytes(denoiser, 2, None, True, LATENTS)  # EWC's; the adapter and Adam's moments
    return {"drawing": parts + drawing, "fisher": parts + fisher, "train": parts + held}


class MemoryWatch:
    """Of every stage its seconds and the most that the process held, as Linux counts it."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, int]] = {}
        self.start, self.swapped = _status("VmRSS"), 0

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "begun":
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        if event["event"] == "ended" and not event["reused"]:
            self.found[event["stage"]] = event["seconds"], _status("VmHWM")
            self.swapped = max(self.swapped, _status("VmSwap"))


def _status(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
