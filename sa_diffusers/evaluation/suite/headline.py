"""The result of an evaluation in a sentence a pipeline: what became of the concept, and of what must stay."""

from collections.abc import Mapping, Sequence

from sa_diffusers.evaluation.prompts.prompt_suite import PromptSet
from sa_diffusers.evaluation.suite.numbers import GROUPS, MEASURES, Measurement


Values = Mapping[tuple[str, str], float]  # by (group, measure)
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
    values = {name: {(m.group, m.measure): m.value for m in rows} for name, rows in results.items()}
    reference, *others = values
    sentences = []
    for name in others or [reference]:
        before = values[reference] if others else {}
        parts = [_clause(values[name], before, suite, purpose, concept) for purpose in SAID]
        if any(parts):
            sentences.append(f"{name}: {'; '.join(filter(None, parts))}.")
    return sentences


def _clause(own: Values, before: Values, suite: Mapping[str, PromptSet], purpose: str, concept: str) -> str:
    """ "where seven is asked for, the concept's probability went from 98.0% to 2.0%"; "": nothing was measured."""
    names = [name for name, part in suite.items() if part.purpose == purpose]
    group = GROUPS[purpose] if len(names) > 1 else names[0] if names else ""
    where, called = SAID[purpose]
    for measure, label in called.items():
        key, spec = (group, measure), MEASURES[measure][1]
        if key in own:
            became = f"went from {before[key]:{spec}} to" if key in before else "is"
            return f"{where.format(concept=f'“{concept}”')}, {label} {became} {own[key]:{spec}}"
    return ""
