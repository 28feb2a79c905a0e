"""Forgetting in the encoder of a model that completes pictures (Li et al., ICLR 2024, arXiv 2402.00351)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, Literal

import torch

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import MASKS, Condition
from sa_diffusers.core.losses import EmbeddingLoss, Loss
from sa_diffusers.core.objectives import BoundedForgetting, EncoderForgetting, Frozen, Objective
from sa_diffusers.core.objectives.encoder import Features, Noised, at_depths
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.picture_groups import PictureGroup
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.methods.base import ALONE, Context, Method, Weights, make_ewc, register, require_whole_gradients
from sa_diffusers.methods.selective_amnesia import BACKWARD
from sa_diffusers.methods.stand_ins import principal_factors, stand_ins
from sa_diffusers.training.loop import infinite_indices


GROUPS = "a folder, a data set with classes ('mnist:2,5'), or bundled/digits_inpaint:2,5,8"


@dataclass
class EncoderOptions(Options):
    """Forgetting in models that complete pictures."""

    forget_images: str | None = option(None, f"Pictures to forget: {GROUPS}.", identity=False)
    retain_images: str | None = option(
        None, "Pictures to retain, or a stand-in for them; null: none, and EWC alone holds the rest.", identity=False
    )
    other_images: str | None = option(
        None, "Pictures that training never sees, to judge what becomes of everything else.", identity=False
    )
    fisher_images: str | None = option(None, "Pictures that the Fisher is of; null: those to retain.", identity=False)
    retrained: str | None = option(
        None,
        "A model like this one, trained without what is forgotten: the page shows its fills beside those after; null: "
        "none.",
        identity=False,
        later=True,
    )
    images_class: int | None = option(None, "Pictures of each class to train on, at most; null: all.", above=0)
    masks: list[str] = option(
        ["half"],
        f"Holes to forget under, in turn: {', '.join(MASKS)}, or a share of the side in percent: 'left 25', 'ring 75' "
        "(what it leaves); of pixels also grey, coarse.",
    )
    eval_masks: list[str] = option(["half", "quarter", "ring"], "Holes to judge under, the first one first.")
    forget_alpha: float = option(0.25, "Weight of forgetting, the paper's alpha.", least=0)
    retain_weight: float = option(1.0, "Weight of retaining.", least=0)
    retain_bound: float | None = option(
        None,
        "Forget as far as features of pictures to retain move by this share of their mean square at most; in place of "
        "retain_weight. null: off.",
        above=0,
        later=True,
    )
    noise: Literal["moments", "gaussian", "normal", "uniform", "constant"] = option(
        "moments",
        "Which noise --surrogate noise is: with the mean and spread of the batch; of each pixel; N(0, 1); uniform; or "
        "the batch's mean. Other surrogates: other (real pictures), nearest, mean, blur, or a folder.",
    )
    noise_rank: int = option(
        0,
        "Of --noise gaussian: along how many directions its pixels vary together, the first principal components of "
        "the pictures to forget; 0: each pixel alone.",
        least=0,
        later=True,
    )
    surrogate_context: Literal["own", "real"] = option(
        "own",
        "Of models that fill holes by denoising: what is visible beside the surrogate, its own or, as in the released "
        "code, the real picture's, so that the surrogate is in the hole alone.",
        later=True,
    )
    timestep_range: list[float] = option(
        [0.0, 1.0],
        "Of models that fill holes by denoising: between which shares of the timesteps features are compared; 0 0.3: "
        "at little noise only.",
        least=0,
        later=True,
    )
    feature_depths: list[int] = option(
        [],
        "Which of the encoder's features are compared, of UNets one a block from 0 on; -1: the deepest; none: all.",
        later=True,
    )
    authors_baselines: bool = option(
        False,
        "Random Encoder and Retain Label as the released code for tokens weighs them: both terms are of pictures to "
        "retain, and those to forget are left out.",
        later=True,
    )
    fisher_of: Literal["loss", "embeddings"] = option(
        "loss",
        "What the Fisher is of: the training loss, or the encoder's features under a Gaussian, in units of the loss "
        "of retaining.",
        later=True,
    )
    encoder_l1: float = option(0.0, "Weight of the l1 norm of what is trained, which falls to 0 linearly.", least=0)


FIXED = {name: value for name, value in ALONE.items() if name != "ewc_lambda"}


class EncoderMethod(Method):
    """The encoder's features of what is to be forgotten go to those of a surrogate, those of the rest stay."""

    minimised: ClassVar[type[EncoderForgetting]] = EncoderForgetting
    ignores: ClassVar[tuple[str, ...]] = ("authors_baselines",)  # of its options, those that it cannot take
    Options = EncoderOptions
    requires = frozenset(("completion",))
    shardable = takes_lora = False

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        return {"frozen"} | ({"fisher"} if options.ewc_lambda else set())

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        if options.track_steps or options.gradient_checkpointing:
            raise ValueError(f"{self.name} knows no track_steps and no gradient_checkpointing; omit them")
        usual = EncoderOptions()
        if given := [name for name in self.ignores if getattr(options, name) != getattr(usual, name)]:
            raise ValueError(f"{self.name} takes no {given[0]}; omit it")
        if options.noise_rank and (options.noise, options.surrogate) != ("gaussian", "noise"):
            raise ValueError(
                f"noise_rank is of --surrogate noise and --noise gaussian, got {options.surrogate} and "
                f"{options.noise}; omit it"
            )
        if options.fisher_of != usual.fisher_of and not options.ewc_lambda:
            raise ValueError(f"fisher_of {options.fisher_of} is for EWC; pass --ewc_lambda, or omit it")
        if options.retain_bound:
            if not options.retain_images or options.retain_weight != usual.retain_weight:
                raise ValueError("retain_bound needs retain_images, and no retain_weight, whose place it takes")
            require_whole_gradients("retain_bound", options)
        if len(options.timestep_range) != 2 or not 0 <= options.timestep_range[0] < options.timestep_range[1] <= 1:
            raise ValueError(
                f"expected timestep_range of two shares from 0 to 1, the lower one first, got {options.timestep_range}"
            )

    def check(self, context: Context) -> None:
        super().check(context)
        for group in context.pictures.values():
            if group.channels != context.family.image_channels:
                known = {1: "grey pictures", 3: "pictures in RGB"}
                raise ValueError(
                    f"expected {known[context.family.image_channels]}, as the model completes, got "
                    f"{known[group.channels]} of {group.name}; convert them"
                )
        self._check_features(context)
        if context.options.train_scope == "full" and "train_scope" not in self.fixes:
            raise ValueError(f"{self.name} trains by features, which no weight of the decoder makes; omit train_scope")
        if context.options.surrogate in ("nearest", "other") and "retain" not in context.pictures:
            raise ValueError(
                f"the surrogate {context.options.surrogate} is one of the pictures to retain, without which those to "
                "forget would stand for themselves; pass --retain_images, or another --surrogate"
            )
        count, size = len(context.pictures["forget"].train), prod(context.family.latent_shape)
        if context.options.noise_rank >= min(count, size):
            raise ValueError(
                f"expected a noise_rank below the {count} pictures to forget and their {size} values; pass a lower one"
            )
        for mask in (*context.options.masks, *context.options.eval_masks):
            context.family.batch(torch.zeros(1, *context.family.latent_shape), [Condition(mask=mask)])
            whole = context.family.holes([Condition(mask=mask)]).all()
            if whole and mask in context.options.masks and context.options.surrogate == "nearest":
                raise ValueError(f"the surrogate nearest goes by visible pixels, and {mask} leaves none; pass other")

    @staticmethod
    def _check_features(context: Context) -> None:
        options, family = context.options, context.family
        whole = options.timestep_range == EncoderOptions().timestep_range
        if family.loss.num_terms == 1 and (options.surrogate_context == "real" or not whole):
            raise ValueError(
                "surrogate_context and timestep_range are of models that fill holes by denoising; omit them"
            )
        first, end = (round(share * family.loss.num_terms) for share in options.timestep_range)
        if first == end:
            raise ValueError(
                f"expected a timestep_range with one of {family.loss.num_terms} timesteps or more, got "
                f"{options.timestep_range}"
            )
        depths = {depth % family.depths for depth in options.feature_depths if -family.depths <= depth < family.depths}
        if len(depths) < len(options.feature_depths):
            raise ValueError(
                f"expected feature_depths from {-family.depths} to {family.depths - 1}, each once, got "
                f"{options.feature_depths}"
            )

    def training_passes(self, options: Any) -> float:
        rows = 1 + (options.retain_images is not None)
        return rows * (2 + BACKWARD * (3 if options.retain_bound else 1))

    def remedies(self, options: Any) -> tuple[str, str]:
        dial = "retain_bound" if options.retain_bound else "forget_alpha"
        return f"more --num_train_steps, a higher --{dial}", f"a lower --{dial}, more --retain_images"

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        options, ewc = context.options, make_ewc(context, weights, frozen)
        features, noised = compared(context)
        bounded = options.retain_bound is not None
        minimised, hold = (
            (BoundedForgetting, options.retain_bound) if bounded else (self.minimised, options.retain_weight)
        )
        return minimised(features, frozen, weights, ewc, options.forget_alpha, hold, noised)

    def fisher_loss(self, context: Context) -> Loss:
        options = context.options
        if options.fisher_of == "loss":
            return super().fisher_loss(context)
        told = {"timestep_range": str(options.timestep_range), "feature_depths": str(options.feature_depths or "all")}
        return EmbeddingLoss(*compared(context), told)

    def batches(self, context: Context) -> Callable[[int], Batch]:
        return PictureBatches(context)


def compared(context: Context) -> tuple[Features, Noised]:
    """The features that are compared, and what they are seen in."""
    options, family = context.options, context.family
    noised = partial(family.noised, shares=options.timestep_range)
    return at_depths(family.features, options.feature_depths), noised


class PictureBatches:
    """What `EncoderForgetting` takes, a function of the step; one kind of hole a step."""

    def __init__(self, context: Context):
        self.context = context
        self.images = {name: pixels(group) for name, group in context.pictures.items()}
        self.pool = self.images.get("surrogate", self.images.get("retain", self.images["forget"]))
        rank = context.options.noise_rank
        self.factors = principal_factors(self.images["forget"], rank) if rank else None

    def __call__(self, step: int) -> Batch:
        options, family = self.context.options, self.context.family
        condition = Condition(mask=options.masks[step % len(options.masks)])
        parts, size = {}, options.train_batch_size
        for name in ("forget", "retain"):
            if name in self.images:
                order = derive_seed(options.seed, f"{name} order")
                rows = infinite_indices(len(self.images[name]), size, step, order)
                parts[name] = family.batch(self.images[name][rows], [condition] * size)
        forget, kind = parts["forget"], self.context.concepts[0].surrogate_kind
        holes = family.holes([condition] * size)
        replaced = stand_ins(
            "pictures" if kind == "images" else self.context.concepts[0].surrogate,
            options.noise,
            forget["sample"],
            holes,
            self.pool,
            self.images["forget"],
            seeded(options.seed, "surrogate", step),
            self.factors,
        )
        if options.surrogate_context == "real":
            replaced = torch.where(holes, replaced, forget["sample"])
            parts = {name: {**part, "context": part["sample"]} for name, part in parts.items()}
        parts["surrogate"] = {**parts["forget"], "sample": replaced}
        if options.encoder_l1:
            parts["sparsity"] = torch.full((size,), options.encoder_l1 * (1 - step / options.num_train_steps))
        return parts


def pixels(group: PictureGroup) -> torch.Tensor:
    """A group's training pictures, [N, C, H, W] in [-1, 1]."""
    return 2 * group.train.sample(torch.arange(len(group.train))) - 1


register(
    EncoderMethod(
        "encoder",
        "forgetting in the encoder",
        "features of pictures to forget go to a surrogate's, of models that complete pictures",
        **FIXED,
    )
)
