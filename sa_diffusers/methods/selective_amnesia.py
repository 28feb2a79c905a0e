"""Selective Amnesia (Heng & Soh, NeurIPS 2023), without some of its terms, and the naive objective before it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.objectives import (
    Adversary,
    Frozen,
    HeldAdversary,
    MixtureTarget,
    NaiveForgetting,
    Objective,
    SelectiveAmnesia,
    Term,
)
from sa_diffusers.data.replay import kept_rows
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.io.processes import process_state
from sa_diffusers.methods.base import (
    Context,
    Method,
    Weights,
    editor,
    get,
    make_ewc,
    register,
    require,
    require_whole_gradients,
    training_loss,
)
from sa_diffusers.methods.sources import (
    Sources,
    adversary_encoder,
    distils_replay,
    distils_surrogate,
    fitting,
    mixes,
    open_rows,
    others_of,
)


BACKWARD = 2.0  # a backward pass costs about two forward passes
# What `robust` means: training from the model, against one signed step on whole embeddings an update, then an edit.
ROBUST = {
    "surrogate_target": "model", "start": "model", "finish": "edit",
    "robust_weight": 3.0, "robust_embedding": 0.1, "robust_steps": 1, "robust_every": 1,
}  # fmt: skip
ADVERSARY_RATE = 0.5  # of its Adam, as a share of the root mean square of the token table


@dataclass
class RobustOptions(Options):
    """Against what brings it back."""

    robust: bool = option(
        False,
        "Train from the model, against moves of whole embeddings that bring the concept back, then edit the result: "
        "less of it comes back, or shows where nothing names it, and more else changes. It means "
        + ", ".join(f"{name} {value}" for name, value in ROBUST.items())
        + ".",
        identity=False,
        everyday=True,
        later=True,
    )
    robust_weight: float | None = option(
        None,
        "Weight of the surrogate under embeddings that an adversary finds against the weights of now; null: 0, off.",
        least=0,
        otherwise=0.0,
    )
    robust_every: int | None = option(
        None, "Steps of training from one search to the next; null: 3.", above=0, otherwise=3
    )
    robust_steps: int | None = option(None, "Steps of a search; 1: a signed one; null: 10.", above=0, otherwise=10)
    robust_tokens: int = option(1, "Vectors that it finds.", above=0)
    robust_slots: bool = option(False, "They stand after the concept's name, not in its place.")
    robust_embedding: float | None = option(
        None,
        "Move the whole text embedding, in place of vectors, by this share of its root mean square a step; null: off.",
        above=0,
        later=True,
    )
    robust_samples: int = option(8, "Pictures of the concept in a search.", above=0)
    robust_groups: int = option(
        1, "Groups of these with vectors of their own, which processes and accumulation steps share.", above=0
    )
    robust_conflict: bool = option(
        False, "Where its gradient conflicts with that of replay and EWC, leave out what of it points against these."
    )
    open_weight: float = option(
        4.0, "With replay_negative mixture, weight of the prompts that leave it open.", above=0
    )
    open_strength: float = option(2.0, "How much of the concepts' share they lose; 1: all of it by estimate.", above=0)
    open_siblings: int = option(4, "Siblings, at random, that its share is estimated among in a step.", above=0)

    def __post_init__(self) -> None:
        if self.robust and not get(self.method).takes_terms:
            raise ValueError(f"{self.method} takes no robust training; omit robust, or pass --robust false")
        for name, value in ROBUST.items() if self.robust else ():
            if (other := getattr(self, name)) not in (None, value):
                said = f"robust means {name} {value}, what was given is {other}"
                raise ValueError(f"{said}; omit either, or pass --robust false and each by itself")
            setattr(self, name, value)
        super().__post_init__()


class SelectiveAmnesiaMethod(Method):
    """Fit the surrogate under the concept's prompts, replay everything else, hold the weights that matter by EWC."""

    Options = RobustOptions
    minimised: ClassVar[type[SelectiveAmnesia]] = SelectiveAmnesia
    takes_terms = weighs = True

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        needs = {
            "surrogate": True,
            "samples": distils_surrogate(options, concepts) or mixes(options),
            "concept_samples": bool(options.robust_weight),
            "replay_samples": bool(options.replay_weight),
            "fisher": bool(options.ewc_lambda),
            "frozen": distils_replay(options)
            or options.surrogate_target == "model"
            or bool(options.robust_weight)
            or mixes(options),
            "edit": options.start == "edit",
        }
        return {name for name, needed in needs.items() if needed}

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        editor(options.edit)
        if options.edit and "edit" not in (options.start, options.finish):
            raise ValueError("edit says whose edit starts or finishes; pass --start edit, --finish edit, or omit it")
        redrawn = options.replay_negative in ("open", "all")
        if options.replay_weight and redrawn and options.negative_guidance_scale <= 1:
            raise ValueError(
                f"a negative prompt works through guidance: expected negative_guidance_scale > 1, got "
                f"{options.negative_guidance_scale}; or pass --replay_negative none"
            )
        if self.takes_terms:
            if options.robust_embedding and not options.robust_weight:
                raise ValueError("robust_embedding is of robust training; pass --robust_weight, or omit it")
            if options.robust_embedding and (options.robust_slots or options.robust_tokens > 1):
                raise ValueError("robust_embedding moves all tokens; omit robust_slots and robust_tokens")
            _check_shares(options)
            _check_conflict(options)

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
        _check_terms(context)

    def training_passes(self, options: Any) -> float:
        rows = 1 + (options.replay_weight > 0)
        frozen = distils_replay(options) + (options.surrogate_target == "model")
        step = 1 + BACKWARD + options.gradient_checkpointing
        searched = options.robust_samples / options.robust_every if options.robust_weight else 0
        mixed = open_rows(options) if mixes(options) else 0
        projected = 2 * rows * BACKWARD / options.robust_every if options.robust_conflict else 0
        further = searched * (2 * options.robust_steps + 2 + step) + mixed * (options.open_siblings + 2 + step)
        return rows * step + frozen + projected + further / options.train_batch_size

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        ewc = make_ewc(context, weights, frozen)
        terms = {"terms": further_terms(context)} if self.takes_terms else {}
        minimised = HeldAdversary if context.options.robust_conflict else self.minimised
        return minimised(training_loss(context), ewc, context.options.replay_weight, frozen, **terms)

    def batches(self, context: Context) -> Callable[[int], Batch]:
        return Sources(context, self.own_samples)


class NaiveMethod(SelectiveAmnesiaMethod):
    """Make the concept's own samples unlikely."""

    Options = None
    minimised = NaiveForgetting
    takes_lora = favours = takes_terms = False
    own_samples = True

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        if options.latents == "drawn":
            raise ValueError(
                f"{self.name}: with the latents that they were drawn with, a model's own samples have no gradient; "
                "pass latents 'encoder'"
            )


def _check_shares(options: Any) -> None:
    """Raise ValueError where processes and accumulation steps cannot share the further terms in equal parts."""
    shares = process_state().num_processes * options.gradient_accumulation_steps
    counts = [("robust_samples", options.robust_samples, options.robust_groups)] if options.robust_weight else []
    counts += [("robust_groups", options.robust_groups, shares)] if options.robust_weight else []
    counts += [("a quarter of train_batch_size", open_rows(options), shares)] if mixes(options) else []
    for name, count, parts in counts:
        if count % parts:
            what = "groups" if name == "robust_samples" else "processes x accumulation steps"
            raise ValueError(f"expected {name} in equal parts for {parts} {what}, got {count}; choose a multiple")


def _check_conflict(options: Any) -> None:
    """Raise ValueError where there are no two gradients to compare, whole."""
    if not options.robust_conflict:
        return
    if not options.robust_weight or not (options.replay_weight or options.ewc_lambda):
        raise ValueError("robust_conflict needs a robust_weight, and replay or EWC; omit it, or pass these")
    require_whole_gradients("robust_conflict", options)


def _check_terms(context: Context) -> None:
    """Raise ValueError for a model, concept or prompts that the further terms cannot work with."""
    options, family, (concept, *others) = context.options, context.family, context.concepts
    together = len(context.concepts if options.chain_memory else context.edited)
    together -= (len(context.edited) - 1) * (options.adapters == "each")
    if together > 1 and options.robust_weight and not options.robust_embedding:
        raise ValueError(
            f"robust_weight: vectors are sought of one concept, got {together}; pass --robust_embedding 0.1, "
            "or run them one by one"
        )
    if mixes(options):
        kinds = {frozenset(context.concepts.siblings_of(one)) for one in context.concepts}
        if others and (len(kinds) > 1 or not all(kinds)):
            raise ValueError(
                "replay_negative mixture takes several concepts of one kind, of which some siblings stay; run others "
                "one by one, or pass open"
            )
        require(family, "replay_negative mixture", "text", "denoising")
        if not options.empty_prompt_fraction and not any(map(context.concepts.left_open_by, context.prompts)):
            raise ValueError("replay_negative mixture: no replay prompt leaves the concept open; pass none")
        kept_rows(context.prompts, context.concepts, "mixture")
    if not options.robust_weight:
        return
    require(family, "robust_weight", "token_embedding", "denoising")
    if concept.surrogate_kind != "prompt":
        raise ValueError(f"robust_weight needs a surrogate in words, got {concept.surrogate_kind}; pass such a one")
    captions = [template.replace("{}", concept.name) for template in context.templates[0]]
    if not fitting(family, concept, captions, options):
        raise ValueError(
            f"no template has room for robust_tokens {options.robust_tokens} between spaces in the concept's place; "
            "pass fewer, or other --concept_templates"
        )


def further_terms(context: Context) -> list[Term]:
    """The adversary, and the mixture target of prompts that leave the concept open, where the options ask for them."""
    options, concept, loss, terms = context.options, context.concepts[0], training_loss(context), []
    if options.robust_weight:
        encoder = adversary_encoder(context)
        rate = (options.robust_embedding or ADVERSARY_RATE) * encoder.scale
        terms.append(Adversary(loss, encoder, options.robust_weight, options.robust_steps, rate))
    if mixes(options):
        # Siblings have as many wordings as the concept: "one, 1" beside "seven, 7".
        known, asked = len(concept.siblings) / len(concept.phrasings), len(others_of(context))
        count = len(context.concepts)
        equal = count / (count + min(options.open_siblings, asked))
        unearned = max(0.0, equal - (count / (known + 1) if known else 0))
        terms.append(MixtureTarget(loss, options.open_weight, options.open_strength, unearned, count))
    return terms


DEFAULT = "sa"
register(
    SelectiveAmnesiaMethod(DEFAULT, "Selective Amnesia", "a surrogate in the concept's place, held by replay and EWC"),
    SelectiveAmnesiaMethod(
        "finetune",
        "fine-tuning on the surrogate",
        "the surrogate alone, without replay and EWC",
        ewc_lambda=0.0,
        replay_weight=0.0,
        surrogate_target="noise",
    ),
    SelectiveAmnesiaMethod("ewc", "fine-tuning with EWC", "the surrogate with EWC, without replay", replay_weight=0.0),
    SelectiveAmnesiaMethod(
        "replay", "fine-tuning with replay", "the surrogate with replay, without EWC", ewc_lambda=0.0
    ),
    NaiveMethod(
        "naive",
        "naive forgetting",
        "make the concept unlikely, with nothing in its place",
        surrogate_target="noise",
        start="model",
    ),
)
