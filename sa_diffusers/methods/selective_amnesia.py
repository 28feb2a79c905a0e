"""Selective Amnesia (Heng & Soh, NeurIPS 2023), without some of its terms, and the naive objective before it."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.objectives import (
    ElasticWeightConsolidation,
    LowRankEWC,
    NaiveForgetting,
    Objective,
    SelectiveAmnesia,
)
from sa_diffusers.methods.base import Context, Frozen, Method, Weights, editor, register, require
from sa_diffusers.methods.sources import Sources, distils_replay, distils_surrogate


BACKWARD = 2.0  # a backward pass costs about two forward passes


class SelectiveAmnesiaMethod(Method):
    """Fit the surrogate under the concept's prompts, replay everything else, hold the weights that matter by EWC."""

    minimised: ClassVar[type[SelectiveAmnesia]] = SelectiveAmnesia

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        needs = {
            "surrogate": True,
            "samples": distils_surrogate(options, concepts),
            "replay_samples": bool(options.replay_weight),
            "fisher": bool(options.ewc_lambda),
            "frozen": distils_replay(options) or options.surrogate_target == "model",
            "edit": options.start == "edit",
        }
        return {name for name, needed in needs.items() if needed}

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        editor(options.edit)
        if options.replay_weight and options.replay_negative != "none" and options.negative_guidance_scale <= 1:
            raise ValueError(
                f"a negative prompt works through guidance: expected negative_guidance_scale > 1, got "
                f"{options.negative_guidance_scale}; or pass --replay_negative none"
            )

    def check(self, context: Context) -> None:
        super().check(context)
        options = context.options
        for name in ("replay_target", "surrogate_target"):
            used = options.replay_weight or name == "surrogate_target"
            if used and getattr(options, name) == "model" and not context.family.can("denoising"):
                raise ValueError(f"{name}: this model predicts no noise; expected 'noise', got 'model'")
        if options.start == "edit":
            require(context.family, "start: an edit", "text_maps")
            if not any(map(context.family.reads_text, context.family.trainable(options.train_scope))):
                raise ValueError(
                    f"start: an edit is one of maps of text, which train_scope {options.train_scope} leaves out; pass "
                    "another"
                )
            editor(options.edit).check(context)

    def training_passes(self, options: Any) -> float:
        rows = 1 + (options.replay_weight > 0)
        frozen = distils_replay(options) + (options.surrogate_target == "model")
        return rows * (1 + BACKWARD + options.gradient_checkpointing) + frozen

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        ewc = make_ewc(context, weights, frozen)
        return self.minimised(context.family.loss, ewc, context.options.replay_weight, frozen)

    def batches(self, context: Context) -> Callable[[int], Batch]:
        return Sources(context, self.own_samples)


class NaiveMethod(SelectiveAmnesiaMethod):
    """Make the concept's own samples unlikely."""

    minimised = NaiveForgetting
    takes_lora = favours = False
    own_samples = True

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        if options.latents == "drawn":
            raise ValueError(
                f"{self.name}: with the latents that they were drawn with, a model's own samples have no gradient; "
                "pass latents 'encoder'"
            )


def make_ewc(
    context: Context, weights: Weights, frozen: Frozen | None
) -> ElasticWeightConsolidation | LowRankEWC | None:
    """The penalty on changes of what is trained, or None without a Fisher."""
    options, fisher = context.options, context.value("fisher")
    if fisher is None:
        return None
    dtype, device = getattr(torch, options.ewc_dtype), "cpu" if options.ewc_device == "cpu" else None
    if options.lora_rank:
        return LowRankEWC(weights, fisher.tensors, options.ewc_lambda, dtype, device)
    anchor = dict(frozen.named_parameters()) if isinstance(frozen, nn.Module) else None
    return ElasticWeightConsolidation(
        weights, fisher.tensors, options.ewc_lambda, anchor=anchor, fisher_dtype=dtype, device=device
    )


DEFAULT = "sa"
register(
    SelectiveAmnesiaMethod(DEFAULT, "Selective Amnesia", "Selective Amnesia"),
    SelectiveAmnesiaMethod(
        "finetune",
        "fine-tuning on the surrogate",
        "its surrogate alone",
        ewc_lambda=0.0,
        replay_weight=0.0,
        surrogate_target="noise",
    ),
    SelectiveAmnesiaMethod("ewc", "fine-tuning with EWC", "its surrogate with EWC", replay_weight=0.0),
    SelectiveAmnesiaMethod("replay", "fine-tuning with replay", "its surrogate with replay", ewc_lambda=0.0),
    NaiveMethod(
        "naive",
        "naive forgetting",
        "make the concept unlikely, with nothing in its place",
        surrogate_target="noise",
        start="model",
    ),
)
