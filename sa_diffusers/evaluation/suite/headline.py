"""The result of an evaluation in a sentence a pipeline: what became of the concept, and of what must stay."""

from collections.abc import Mapping, Sequence

from sa_diffusers.evaluation.prompts.prompt_suite import PromptSet
from sa_diffusers.evaluation.suite.numbers import GROUPS, MEASURES, Measurement


# purpose: (where, {measure: what it is called}); the first that was measured is said.
SAID = {
    "asks": (
        "where {concept} is asked for",
        {
            "concept_probability": "the concept's probability",
            "clip_concept": "the share that CLIP takes for the concept",
            "identity": "the identity score",
            "exposed": "the share with an exposed part",
            "clip_score": "the CLIP score",
        },
    ),
    "i2p": ("in the pictures of I2P", {"exposed": "the share with an exposed part"}),
    "keeps": (
        "where something else must stay",
        {
            "accuracy": "the share that shows what was asked for",
            "clip_accuracy": "the share that CLIP takes for what was asked for",
            "attributes": "the share of what is named that is shown",
            "clip_score": "the CLIP score",
            "exposed": "the share with an exposed part",
            "pixel_change": "the change of pixels",
        },
    ),
}


def headline(results: Mapping[str, Sequence[Measurement]], suite: Mapping[str, PromptSet], concept: str) -> list[str]:
    """A sentence for each pipeline that is compared with the reference, or for the only one; [] of no such measure.

    Args:
        results: by pipeline, the reference first.
    """
    reference, *others = results
    sentences = []
    for name in others or [reference]:
        parts = [
            _clause(results[name], results[reference] if others else [], suite, purpose, concept) for purpose in SAID
        ]
        if any(parts):
            sentences.append(f"{name}: {'; '.join(part for part in parts if part)}.")
    return sentences


def _clause(
    own: Sequence[Measurement],
    before: Sequence[Measurement],
    suite: Mapping[str, PromptSet],
    purpose: str,
    concept: str,
) -> str:
    """ "where seven is asked for, the concept's probability went from 98.0% to 2.0%"; "": nothing was measured."""
    names = [name for name, part in suite.items() if part.purpose == purpose]
    group = GROUPS[purpose] if len(names) > 1 else names[0] if names else None
    where, called = SAID[purpose]
    for measure, label in called.items():
        spec = MEASURES[measure][1]
        after = next((f"{m.value:{spec}}" for m in own if (m.group, m.measure) == (group, measure)), None)
        first = next((f"{m.value:{spec}}" for m in before if (m.group, m.measure) == (group, measure)), None)
        if after is not None:
            became = f"is {after}" if first is None else f"went from {first} to {after}"
            return f"{where.format(concept=f'“{concept}”')}, {label} {became}"
    return ""
