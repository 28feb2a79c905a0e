"""Which options make sense with which kind of model: said before anything is drawn."""

import torch

from sa_diffusers.data.concepts.candidates import tries
from sa_diffusers.families.samplers import check_sampler
from sa_diffusers.methods import require
from sa_diffusers.runs.context import RunContext


def check_run(context: RunContext) -> None:
    """Raise ValueError for options, or a method, that make no sense with this kind of model."""
    options, family, kind = context.options, context.family, type(context.family.module).__name__
    terms, count = options.terms, family.loss.num_terms
    if "fisher" in context.needs and not options.fisher and 1 < count < (terms or 0):
        raise ValueError(f"expected fisher_terms from 1 to the model's {count} timesteps, or all; got {terms}")
    if family.sampler is not None:
        what = f"num_inference_steps with the sampler {options.sampler}"
        check_sampler(family.sampler, options.num_inference_steps, what)
    if options.fresh_samples:
        require(family, "fresh_samples", "prior")
    if options.paper_quirks:
        require(family, "paper_quirks", "paper_quirks")
    for name in ("empty_prompt_fraction", "replay_prompt_dropout"):
        if getattr(options, name) and not family.can("guidance"):
            raise ValueError(f"{name}: this model always needs a class; expected 0, got {getattr(options, name)}")
    if not family.guided and "replay_samples" in context.needs and options.replay_negative in ("open", "all"):
        raise ValueError(
            "replay_negative: this model is distilled to draw without guidance, so no prompt leads away; "
            f"expected none or mixture, got {options.replay_negative!r}"
        )
    if options.gradient_checkpointing and not family.module._supports_gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing: a {kind} has none; omit it")
    if family.compute_dtype is not None and not (family.can("denoising") or family.can("completion")):
        raise ValueError(f"a {kind} computes in float32; pass --mixed_precision no")
    if family.compute_dtype == torch.float16 and family.device.type == "cpu":
        raise ValueError("float16 is not for training on a CPU; pass --mixed_precision bf16, or no")
    if options.compile_backend and options.compile_backend not in (known := torch.compiler.list_backends(())):
        raise ValueError(f"expected compile_backend of {', '.join(known)}; got {options.compile_backend!r}")
    if options.clip and not context.favours_words:
        raise ValueError("clip judges between the concept and a surrogate in words, and there is none; omit it")
    if any(tries(one.surrogate) for one in context.concepts):
        require(family, "surrogate auto", "denoising")
    context.method.check(context)
    if context.method.trains:
        family.trainable(options.train_scope)
    if options.lora_rank:
        require(family, "lora_rank", "adapters")
        family.adapted_layers(options.train_scope, options.lora_targets)
    if context.chain and not options.chain_memory and not context.adapters:
        raise ValueError(
            f"chain_memory false keeps what was forgotten before by its adapters, and not every run of the chain of "
            f"{options.after} left some; omit it"
        )
    if options.adapters == "each" and context.chain and not context.adapters:
        raise ValueError(f"adapters each: not every run of the chain of {options.after} left adapters; omit either")
