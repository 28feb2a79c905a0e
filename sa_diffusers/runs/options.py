"""Every option of a forgetting run, with its default: those for Stable Diffusion 1.x (configs/default.yaml)."""

import math
from dataclasses import dataclass
from typing import Literal

from sa_diffusers.core.paper_quirks import QUIRKS
from sa_diffusers.data.sampling import DrawingOptions
from sa_diffusers.io.configuration import option
from sa_diffusers.training.options import TrainingConfig, check_ranges


# What --method takes, and its name in a card or a table.
METHODS = {
    "sa": "Selective Amnesia",
    "sa+esd": "Selective Amnesia with ESD's guidance",
    "finetune": "fine-tuning on the surrogate",
    "ewc": "fine-tuning with EWC",
    "replay": "fine-tuning with replay",
    "esd-x": "ESD-x",
    "esd-x-strict": "ESD-x (keys and values only)",
    "esd-u": "ESD-u",
    "uce": "Unified Concept Editing",
    "sld-weak": "Safe Latent Diffusion (weak)",
    "sld-medium": "Safe Latent Diffusion (medium)",
    "sld-strong": "Safe Latent Diffusion (strong)",
    "sld-max": "Safe Latent Diffusion (max)",
    "naive": "naive forgetting",
    "projection-symmetric": "gradient projection",
    "projection-alternating": "alternating gradient projection",
    "pcgrad-symmetric": "PCGrad",
    "pcgrad-alternating": "alternating PCGrad",
}
PROJECTIONS = tuple(name for name in METHODS if name.startswith(("projection-", "pcgrad-")))
ESD_METHODS = {"esd-x": "xattn", "esd-x-strict": "xattn-strict", "esd-u": "noxattn"}  # and the scope that makes each
SLD_METHODS = {name: name.removeprefix("sld-") for name in METHODS if name.startswith("sld-")}  # and the level
DRAWS_NO_SURROGATE = (*ESD_METHODS, *SLD_METHODS, "uce")  # of these uce takes the surrogate's words
TRAINS_NOTHING = (*SLD_METHODS, "uce")
_ALONE = ("ewc_lambda", "replay_weight")
# Methods without some terms of Selective Amnesia: the weights that are 0 then.
LEAVES_OUT = {"finetune": _ALONE, "ewc": ("replay_weight",), "replay": ("ewc_lambda",)} | dict.fromkeys(
    DRAWS_NO_SURROGATE, _ALONE
)


@dataclass
class ForgetConfig(DrawingOptions, TrainingConfig):
    """Options of `scripts/forget.py` and `sa_diffusers.forget`; those of the optimiser are inherited.

    Raises:
        ValueError: values that cannot work, before anything is loaded.
    """

    # What to forget, and in which model
    concept: str = option("", "Concept to forget: one or several phrasings of it, separated by commas ('seven, 7').")
    surrogate: str | None = option(
        None,
        "What takes its place: a prompt, a folder of images, or noise; null: looked up in assets/surrogates.yaml.",
    )
    siblings: str | None = option(
        None,
        "Words, separated by commas, that could stand in the concept's place; prompts with none of them leave it "
        "open. null: looked up in assets/surrogates.yaml.",
    )
    model: str = option("CompVis/stable-diffusion-v1-4", "Pipeline: hub id, local folder, or bundled/digits/pipeline.")
    revision: str | None = option(None, "Revision of a hub model.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32",
        "Precision of the frozen parts and of the saved pipeline; the trained weights are float32 meanwhile.",
    )
    output_dir: str | None = option(None, "Folder of the run; null: runs/<concept>.")
    num_threads: int | None = option(
        None, "CPU threads of each process; null: as the environment says (`accelerate launch` says 1)."
    )
    overwrite: bool = option(False, "Discard what the output folder holds of another configuration.")
    seed: int = option(0, "Seed of every random number.")

    # Prompts
    replay_prompts: str = option(
        "bundled/stable_diffusion/replay_prompts.txt",
        "Prompts of what to keep: a text file, or a data set with a column; labels: the classes of a model that has "
        "them.",
    )
    prompt_column: str = option("prompt", "Column of --replay_prompts where that is a data set.")
    concept_templates: str = option(
        "bundled/stable_diffusion/concept_templates.txt",
        "Text file of prompts with {} in the concept's place; used if fewer than 16 of --replay_prompts name it.",
    )

    # Samples
    samples: str | None = option(None, "Samples of this model to reuse: another run's samples/ folder, or a hub id.")
    num_samples: int = option(2000, "Samples for replay and Fisher, spread over the prompts.")
    empty_prompt_fraction: float = option(0.1, "Share of the samples drawn for the empty prompt, which guidance uses.")
    num_surrogate_samples: int = option(400, "Surrogate pictures.")
    fresh_samples: bool = option(
        False,
        "Draw replay and surrogate samples anew every step from a frozen copy of the model (VAEs only).",
    )
    latents: Literal["encoder", "drawn"] = option(
        "encoder",
        "Latents of a VAE's samples in training: from its encoder, as in the paper, or those that fresh samples were "
        "drawn with, which is faster and spares the encoder.",
    )
    replay_guidance_scale: float = option(7.5, "Guidance of the samples for replay and Fisher.")
    sample_batch_size: int = option(
        8, "Pictures drawn at once by each process; a fixed grid, part of the run's identity."
    )
    replay_negative: Literal["open", "all", "none"] = option(
        "open",
        "Which replay prompts are drawn with the concept as negative prompt: those that leave it open (the empty "
        "prompt, and where siblings are known those that name none), so that it goes where it is not named, too; all; "
        "or none, which changes least of what is kept and leaves the concept where nothing names it.",
    )
    negative_guidance_scale: float = option(
        1.5,
        "Guidance of replay samples with a negative prompt: weak, since guidance away from the concept distorts "
        "everything else in the picture.",
    )

    # Method
    method: Literal[*METHODS] = option(
        "sa",
        "How to forget. sa: Selective Amnesia; finetune, ewc, replay: its surrogate alone, with EWC or with replay, "
        "whatever ewc_lambda and replay_weight say of what is left out; esd-*: guidance away from the concept, in the "
        "scope that the name says, without any samples; sa+esd: both; uce: a closed-form edit of cross-attention, "
        "without training; sld-*: guidance away from it while drawing, with the weights as they are; naive: make the "
        "concept unlikely, with nothing in its place; projection-*: no EWC, the gradients of surrogate and replay are "
        "made orthogonal, always or (pcgrad-*) where they conflict.",
    )
    train_scope: Literal["full", "xattn", "xattn-strict", "noxattn"] = option(
        "full",
        "Weights to train: all of the UNet, cross-attention, its keys and values alone, or all but cross-attention, "
        "the output and the time embedding.",
    )
    lora_rank: int | None = option(
        None, "Train low-rank adapters of this rank and leave the weights as they are; null: train the weights."
    )
    lora_alpha: float | None = option(
        None, "The adapters' change is alpha / rank * B A; null: the rank, which gives 1."
    )
    lora_targets: Literal["attention", "attention+conv"] = option(
        "attention", "Layers of the scope that get an adapter: projections of attention, or convolutions besides."
    )
    ewc_lambda: float = option(
        50.0, "Weight of EWC in the authors' units: lambda sum F delta^2, no 1/2; 0: no Fisher."
    )
    ewc_dtype: Literal["float32", "bfloat16"] = option("float32", "Precision that training keeps the Fisher in.")
    ewc_device: Literal["device", "cpu"] = option(
        "device", "Where training keeps Fisher and anchor: with the weights, or in main memory, streamed every step."
    )
    replay_weight: float = option(1.0, "Weight of the replay loss; 0: no replay.")
    replay_prompt_dropout: float = option(
        0.0,
        "Share of the replay samples shown under the empty prompt, or the null class of a class-conditional model, so "
        "that what guidance leads away from is replayed, too.",
    )
    replay_target: Literal["noise", "model"] = option(
        "model",
        "What replay samples are denoised towards: the noise that was drawn, each under its own prompt, as in the "
        "paper; or what the model before forgetting predicts, under any prompt. The latter takes a copy of it in "
        "memory and a sixth more time, and kept more on the bundled digits.",
    )
    surrogate_target: Literal["noise", "model"] = option(
        "noise",
        "What surrogate samples are denoised towards, under the concept's prompt: the noise that was drawn, as in the "
        "paper; or what the model before forgetting predicts of them under the surrogate's prompt. A folder of images "
        "or noise as surrogate has no prompt, and keeps the former.",
    )
    start: Literal["model", "edit"] = option(
        "model",
        "Where training starts: at the model as it is; or where uce's edit would put the weights (with its options), "
        "so that the concept's words already read as the surrogate's, and training completes and repairs that. EWC "
        "still holds to the model before the edit and would undo it at its usual weight: see configs/digits_edit.yaml "
        "for settings that fit. Methods that draw no surrogate, and naive, start at the model.",
    )
    esd_guidance: float = option(1.0, "ESD's eta: how far its target is guided away from the concept.")
    esd_start_guidance: float = option(3.0, "Guidance towards the concept of the latents that ESD is trained on.")
    esd_inference_steps: int = option(50, "Noise levels of the sampler that draws them.")
    esd_authors_latents: bool = option(
        False, "Draw them as ESD's code does: two levels cleaner than the model is told, and none from pure noise."
    )
    esd_weight: float = option(1.0, "Weight of ESD's term in sa+esd.")
    uce_erase_scale: float = option(1.0, "Weight of the concept's words in a closed-form edit.")
    uce_preserve_prompts: int = option(500, "Replay prompts that it should keep, beside the empty prompt.")
    uce_preserve_scale: float = option(0.1, "Weight of these.")
    uce_regularization: float = option(0.5, "Weight of the change of the matrices themselves.")
    fisher: str | None = option(None, "Fisher of this model to reuse: a file, a run's folder, or a hub id.")
    fisher_samples: int = option(1000, "Samples the Fisher averages over, at most num_samples.")
    fisher_terms: str = option(
        "10",
        "Timesteps in each of the two draws of the cheap estimator, or all: every timestep, the paper's estimator.",
    )
    fisher_chunk_size: int = option(10, "Timesteps in one forward pass; changes memory and speed, not the result.")
    fisher_device: Literal["auto", "device", "cpu"] = option(
        "auto",
        "Where the Fisher is summed up: with the weights, or in main memory; auto: there only for want of room.",
    )

    before: str | None = option(
        None, "Evaluation of the unforgotten model by another run to reuse: its evaluation/before.safetensors."
    )

    # Speed and memory; mixed_precision, gradient_checkpointing and optimizer stand with the options of training
    compile_backend: str | None = option(
        None, "Compile the trained module by this backend of torch.compile, such as inductor; null: not."
    )
    channels_last: bool = option(False, "Keep its weights in the memory format that convolutions on GPUs like best.")
    offload: bool = option(
        True, "On a GPU, keep text encoder and VAE in main memory while nothing is encoded or decoded."
    )

    # While training
    snapshot_steps: list[int] = option(
        [], "Save the pipeline as it is after each of these steps, to snapshots/: one run, several strengths."
    )
    track_steps: int | None = option(None, "Draw pictures (and let the classifier read them) every so many steps.")
    track_images: int = option(16, "Pictures drawn then: half of the concept, half of the rest.")
    early_stop: float | None = option(
        None,
        "Stop when the concept's probability in the tracked pictures is at most this; needs track_steps, classifier.",
    )

    paper_quirks: list[str] = option(
        [],
        "What the authors' code for class-conditional diffusion does differently from the paper: stretched_samples, "
        "fisher_unit_range, fisher_label_dropout.",
    )

    # Evaluation
    classifier: list[str] = option([], "Classifier for evaluation only: folder or hub id; may be repeated.")
    eval_prompts: str | None = option(None, "Labelled prompts (JSON lines) that the classifier can judge.")
    eval_images_concept: int = option(200, "Pictures of the concept in seen phrasings.")
    eval_images_class: int = option(100, "Pictures of each retained class.")
    eval_images_other: int = option(
        300, "Pictures each of unseen phrasings and of prompts that do not name the concept."
    )

    # Sharing
    save_variant: Literal["fp16"] | None = option(
        None, "fp16: save the weights in float16 besides, as a variant of the pipeline."
    )
    push_to_hub: bool = option(False, "Push the pipeline, or with lora_rank the adapter, when all is done.")
    hub_model_id: str | None = option(None, "Repository to push to; null: <base model's name>-without-<concept>.")
    hub_private: bool = option(False, "Make that repository private.")

    # Training
    num_train_steps: int = option(250, "Optimiser steps.")
    train_batch_size: int = option(
        8, "Surrogate samples, and as many replay samples, in an optimiser step; all processes and parts share them."
    )
    learning_rate: float = option(5e-5, "Peak learning rate; never scaled silently.")
    lr_warmup_steps: int = option(10, "Optimiser steps of linear warm-up.")
    checkpointing_steps: int | None = option(125, "Save a checkpoint every so many steps; null: none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for left_out in LEAVES_OUT.get(self.method, ()):
            setattr(self, left_out, 0.0)
        if self.method in (*DRAWS_NO_SURROGATE, "finetune", "naive", *PROJECTIONS):
            self.surrogate_target = "noise"
        if self.method in (*DRAWS_NO_SURROGATE, "naive"):
            self.start = "model"
        self.train_scope = ESD_METHODS.get(self.method, self.train_scope)
        if self.fisher_terms != "all" and not (self.fisher_terms.isdigit() and int(self.fisher_terms) > 0):
            raise ValueError(f"expected fisher_terms to be a positive number or all, got {self.fisher_terms!r}")
        check_ranges(
            self,
            "num_samples", "num_surrogate_samples", "num_inference_steps", "sample_batch_size", "fisher_samples",
            "fisher_chunk_size", "eval_batch_size", "track_images", "track_steps", "num_threads", "lora_rank",
            "lora_alpha", "esd_inference_steps", "uce_erase_scale", "uce_regularization",
        )  # fmt: skip
        check_ranges(
            self,
            "ewc_lambda", "replay_weight", "guidance_scale", "replay_guidance_scale", "negative_guidance_scale",
            "uce_preserve_prompts", "uce_preserve_scale", "esd_guidance", "esd_start_guidance", "esd_weight",
            "seed", "eval_images_concept", "eval_images_class", "eval_images_other",
            zero=True,
        )  # fmt: skip
        if not 0 <= self.empty_prompt_fraction < 1:
            raise ValueError(f"expected 0 <= empty_prompt_fraction < 1, got {self.empty_prompt_fraction}")
        if not 0 <= self.replay_prompt_dropout < 1:
            raise ValueError(f"expected 0 <= replay_prompt_dropout < 1, got {self.replay_prompt_dropout}")
        if self.replay_prompt_dropout and self.fresh_samples:
            raise ValueError("replay_prompt_dropout: a model that draws fresh samples has no guidance; expected 0")
        unknown = [quirk for quirk in self.paper_quirks if quirk not in QUIRKS]
        if unknown:
            raise ValueError(f"expected paper_quirks to be of {', '.join(QUIRKS)}; got {unknown[0]!r}")
        if self.latents == "drawn" and not self.fresh_samples:
            raise ValueError("latents: drawn needs fresh_samples; samples that were kept have lost theirs")
        if self.latents == "drawn" and self.method == "naive":
            raise ValueError(
                "naive: with the latents that they were drawn with, a model's own samples have no gradient; pass "
                "latents 'encoder'"
            )
        if self.method in PROJECTIONS and (
            self.ewc_lambda or self.replay_weight != 1 or self.replay_target == "model"
        ):
            raise ValueError(
                f"{self.method} works without EWC, on the paper's replay: expected ewc_lambda 0, replay_weight 1, "
                "replay_target noise"
            )
        if self.method in PROJECTIONS and (self.compile_backend or self.mixed_precision == "fp16"):
            raise ValueError(
                f"{self.method} takes two gradients of one pass, unscaled: expected no compile_backend, and not fp16"
            )
        if self.replay_weight and self.replay_negative != "none" and self.negative_guidance_scale <= 1:
            raise ValueError(
                f"a negative prompt works through guidance: expected negative_guidance_scale > 1, got "
                f"{self.negative_guidance_scale}; or pass --replay_negative none"
            )
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("lora_alpha needs lora_rank; leave it away, or give the rank of the adapters")
        if self.lora_rank is not None and self.method in (*TRAINS_NOTHING, "naive", *PROJECTIONS):
            raise ValueError(f"lora_rank: adapters are not trained by {self.method}; pass --lora_rank null")
        late = [step for step in self.snapshot_steps if not 1 <= step <= self.num_train_steps]
        if late or (self.snapshot_steps and self.method in TRAINS_NOTHING):
            raise ValueError(
                f"expected snapshot_steps between 1 and num_train_steps {self.num_train_steps}, of a method that "
                f"trains; got {self.snapshot_steps} for {self.method}"
            )
        if self.early_stop is not None and not (self.track_steps and self.classifier):
            raise ValueError("early_stop needs track_steps and a classifier")

    @property
    def callback_steps(self) -> int | None:
        """How often training must stop to be looked at: whatever is tracked or saved falls on a multiple of it."""
        return math.gcd(self.track_steps or 0, *self.snapshot_steps) or None

    @property
    def terms(self) -> int | None:
        """Timesteps in a draw of the Fisher's estimator; None for all of them."""
        return None if self.fisher_terms == "all" else int(self.fisher_terms)
