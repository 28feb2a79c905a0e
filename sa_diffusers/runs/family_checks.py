"""Which options make sense with which kind of model: said before anything is drawn."""

import torch

from sa_diffusers.data.prompts import Concept
from sa_diffusers.families import Family
from sa_diffusers.families.scopes import adapted_layers
from sa_diffusers.families.stable_diffusion import TextToImageFamily
from sa_diffusers.methods.uce import concept_edits
from sa_diffusers.runs.options import ESD_METHODS, SLD_METHODS, ForgetConfig


def check_family(config: ForgetConfig, family: Family, concept: Concept) -> None:
    """Raise ValueError for options that make no sense with this kind of model."""
    diffusion, kind = family.loss.num_terms > 1, type(family.module).__name__
    if getattr(family.module, "peft_config", None):
        raise ValueError("the model has adapters loaded; fuse or unload them first (pipeline.unload_lora_weights())")
    if config.fresh_samples and diffusion:
        raise ValueError("fresh_samples: a diffusion model would sample for minutes every step; leave it away")
    if config.replay_target == "model" and config.replay_weight and not diffusion:
        raise ValueError("replay_target: a VAE predicts no noise; expected 'noise', got 'model'")
    if config.surrogate_target == "model" and not diffusion:
        raise ValueError("surrogate_target: a VAE predicts no noise; expected 'noise', got 'model'")
    for name in ("empty_prompt_fraction", "replay_prompt_dropout"):
        if getattr(config, name) and not family.unconditional:
            raise ValueError(f"{name}: this model always needs a class; expected 0, got {getattr(config, name)}")
    if config.paper_quirks and not (diffusion and family.labels):
        raise ValueError("paper_quirks are those of class-conditional diffusion; leave them away for other models")
    if config.gradient_checkpointing and not family.module._supports_gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing: a {kind} has none; leave it away")
    _check_precision(family, diffusion, kind)
    _check_method(config, family, concept, diffusion, kind)


def _check_precision(family: Family, diffusion: bool, kind: str) -> None:
    if family.compute_dtype is not None and not diffusion:
        raise ValueError(f"a {kind} computes in float32; pass --mixed_precision no")
    if family.compute_dtype == torch.float16 and family.device.type == "cpu":
        raise ValueError("float16 is not for training on a CPU; pass --mixed_precision bf16, or no")


def _check_method(config: ForgetConfig, family: Family, concept: Concept, diffusion: bool, kind: str) -> None:
    method = config.method
    if method in (*ESD_METHODS, "sa+esd") and not (diffusion and family.unconditional):
        raise ValueError(f"{method} guides a diffusion model, which a {kind} is not; pass another --method")
    if method in ESD_METHODS and family.labels:
        raise ValueError(
            f"{method} is made by its scope of cross-attention, which a {kind} lacks; pass another --method"
        )
    if method in SLD_METHODS:
        if family.labels or not (diffusion and family.unconditional):
            raise ValueError(f"{method} guides by a text, which a {kind} does not read; pass another --method")
        if config.guidance_scale <= 1:
            raise ValueError(
                f"{method} is a part of guidance; expected guidance_scale > 1, got {config.guidance_scale}"
            )
    if method == "uce" or config.start == "edit":
        if not isinstance(family, TextToImageFamily):
            what = "method uce" if method == "uce" else "start: an edit"
            raise ValueError(f"{what} changes what a model makes of text, and a {kind} reads none; leave it away")
        concept_edits(concept, [])
    if config.start == "edit" and config.train_scope == "noxattn":
        raise ValueError(
            "start: an edit is one of cross-attention, which train_scope noxattn leaves out; pass another"
        )
    if config.lora_rank:
        if not hasattr(family.module, "add_adapter"):
            raise ValueError(f"lora_rank: a {kind} takes no adapters; pass --lora_rank null")
        adapted_layers(family.module, config.train_scope, config.lora_targets)
