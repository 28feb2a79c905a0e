"""Files of a saved pipeline for other programs, written with it or asked for since."""

from pathlib import Path
from typing import Any

from sa_diffusers.families import Family
from sa_diffusers.io.loading import add_variant
from sa_diffusers.models.single_file import is_single_file, save_single_file
from sa_diffusers.training.lora import LORA_FILE, save_lora_for_others


FOR_OTHERS = SINGLE_FILE, LORA_FOR_OTHERS = "pipeline.safetensors", "lora.safetensors"


def save_for_others(family: Family, folder: Path, options: Any) -> None:
    """The model and the adapter that `folder` holds, each in one file, where that was asked for and is not there.

    The model, as the module is now, by the names of the file that it came in; the adapter in float16.
    """
    if not options.save_single_file:
        return
    whole, adapter = folder / SINGLE_FILE, folder / "lora" / LORA_FILE
    if is_single_file(options.model) and not whole.exists():
        save_single_file(Path(options.model), family.module, whole, family.pipeline.scheduler.config)
    if adapter.exists() and not (others := folder / LORA_FOR_OTHERS).exists():
        save_lora_for_others(family, adapter, options.lora_alpha or options.lora_rank, others)


def add_what_was_asked_since(family: Family, folder: Path, options: Any) -> None:
    """Float16 copies, and the files for others, of a pipeline that an earlier command has saved."""
    if options.save_variant:
        add_variant(family.pipeline, folder / "pipeline", options.save_variant)
    save_for_others(family, folder, options)
