"""Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761): new keys and values for a concept's text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sa_diffusers.core.closed_form import ClosedFormEdit, Edit, closed_form_edit
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.replay import filled, spread
from sa_diffusers.families import Family
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.methods.base import ALONE, Context, Method, register, require


@dataclass
class UCEOptions(Options):
    """Unified Concept Editing, as a method and as a start."""

    uce_erase_scale: float = option(1.0, "Weight of the concept's words in a closed-form edit.", above=0)
    uce_preserve_prompts: int = option(500, "Replay prompts that it should keep, beside the empty prompt.", least=0)
    uce_preserve_scale: float | None = option(
        None, "Weight of these; null: the paper's, 1 / n of n prompts and at least 0.1.", least=0
    )
    uce_regularization: float = option(0.5, "Weight of the change of the matrices themselves.", above=0)


class UCEMethod(Method):
    """A closed-form edit of the maps that read text, without training: the concept's words read as the surrogate's."""

    Options = UCEOptions
    requires = frozenset(("text_maps",))
    trains = takes_lora = False
    favours_nothing = True

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        return {"edit"}

    def check(self, context: Context) -> None:
        super().check(context)
        concept_edits(context.concepts, [[] for _ in context.concepts])

    def edit(self, context: Context) -> dict[str, ClosedFormEdit]:
        options, concepts = context.options, context.concepts
        kept = [prompt for prompt in context.prompts if not concepts.named_in(prompt)]
        return edit_of_prompts(
            context.family,
            edits_of(context),
            ["", *spread(kept, min(options.uce_preserve_prompts, len(kept)), options.seed)],
            erase_scale=options.uce_erase_scale,
            preserve_scale=options.uce_preserve_scale,
            regularization=options.uce_regularization,
        )

    def remedies(self, options: Any) -> tuple[str, str]:
        return (
            "a higher --uce_erase_scale, a nearer --surrogate",
            "a lower --uce_erase_scale, a higher --uce_preserve_scale",
        )

    def strength(self, options: Any) -> str:
        """What an edit that training starts at is called in a page."""
        return f"UCE's edit at erase scale {options.uce_erase_scale:g}"


def edit_of_prompts(
    family: Family,
    edits: Sequence[tuple[str, str]],
    preserve: Sequence[str] = ("",),
    **weights: float,
) -> dict[str, ClosedFormEdit]:
    """`closed_form_edit` for prompts: what each draws, and what it should draw; `family.edit` takes the result.

    One edit for all maps that read tokens, and one for those that read a pooled text, where a model has such. As in
    the code of the paper, a token's row is the last word's token or one of the padding after it, paired with the
    target's at the same distance from its last word; of what is preserved it is any token.

    Args:
        edits: (concept, target) prompts, such as ("Brad Pitt", "a middle aged man"). The target "" stands for nothing
            in particular: its rows begin with the start token, as in the authors' code.
        preserve: prompts that should draw what they did. The authors' code keeps "" where nothing else is given.
        weights: erase_scale, preserve_scale, regularization; see `closed_form_edit`.

    Raises:
        ValueError: as `closed_form_edit` and its check of the maps; a model without free text; an empty concept.
    """
    require(family, "a closed-form edit", "text_maps")
    if not all(concept.strip() for concept, _ in edits):
        raise ValueError("expected a concept, got an empty prompt: editing it would change every picture")
    family.prepare([Condition(prompt) for pair in (*edits, preserve) for prompt in pair])
    kept = [embedded_rows(family, prompt) for prompt in preserve]
    pairs = [paired_rows(family, *pair) for pair in edits]
    found = {}
    for part, maps in family.text_maps().items():
        found[part] = closed_form_edit([pair[part] for pair in pairs], [rows[part] for rows in kept], **weights)
        found[part].check(maps)
    return found


def edits_of(context: Context) -> list[tuple[str, str]]:
    """`concept_edits` of what a run's edit is to forget."""
    edited = context.edited
    return concept_edits(edited, context.templates[-len(edited) :], context.concepts)


def concept_edits(
    concepts: Concepts, templates: Sequence[Sequence[str]], beside: Concepts | None = None
) -> list[tuple[str, str]]:
    """The edits that forget concepts: each phrasing to the surrogate, alone and in each template ("a photo of {}").

    Args:
        templates: of each concept.
        beside: all concepts that are replaced in the rest of a template; None: these.

    Raises:
        ValueError: a surrogate that is no prompt.
    """
    if concepts.surrogate_kind != "prompt":
        raise ValueError(
            f"a closed-form edit (method uce, start edit) puts one text in the place of another: expected a prompt as "
            f"surrogate, got {concepts[0].surrogate!r}"
        )
    # Towards nothing is, as in the authors' code, towards the empty prompt: "a photo of" still says something.
    return [
        (text.replace("{}", phrasing), one.surrogate and filled(text, one, beside or concepts))
        for one, own in zip(concepts, templates, strict=True)
        for text in dict.fromkeys(["{}", *own])
        for phrasing in one.phrasings
    ]


def embedded_rows(family: Family, prompt: str) -> dict[str, Tensor]:
    """What a prompt is encoded as, [K, D] of each part."""
    parts = family.text_parts(family.embed([prompt]))
    return {part: rows if part == "pooled" else rows[0] for part, rows in parts.items()}


def paired_rows(family: Family, concept: str, target: str) -> dict[str, Edit]:
    """The embeddings of two prompts: of tokens, [K, D] each, those from the last word's on, cut to one length."""
    first, second = (embedded_rows(family, prompt) for prompt in (concept, target))
    pairs = {part: (first[part], second[part]) for part in first}
    kept: tuple[list[int], list[int]] = [], []
    for stretches in zip(family.last_words(concept), family.last_words(target), strict=True):
        length = min(end - start for start, end in stretches)
        for places, (start, _) in zip(kept, stretches, strict=True):
            places += range(start, start + length)
    pairs["tokens"] = first["tokens"][kept[0]], second["tokens"][kept[1]]
    return pairs


register(
    UCEMethod(
        "uce",
        "Unified Concept Editing",
        "a closed-form edit of cross-attention, without training",
        **ALONE,
    )
)
