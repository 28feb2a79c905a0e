"""The prompts that forgetting is judged by: they ask for the concepts, keep to what must stay, or leave it open."""

from collections.abc import Sequence
from functools import partial

from sa_diffusers.core.concepts import Concepts, mentions
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet, Purpose, choose


PURPOSES: dict[str, Purpose] = {"concept": "asks", "unseen": "asks", "unnamed": "open", "retained": "keeps"}


def labelled_classes(judge: ClassifierJudge, labels: Sequence[str]) -> list[dict[str, str]]:
    """Rows as of `read_labelled_prompts` for a model whose prompts are the names of its classes.

    Raises:
        ValueError: a class that the classifier does not know.
    """
    rows = []
    for label in labels:
        attribute, index = judge.classifier.require_class([label])
        rows.append({"prompt": label, "form": "seen", attribute: judge.classifier.config.attributes[attribute][index]})
    return rows


def examination(
    judge: ClassifierJudge,
    concepts: Concepts,
    rows: Sequence[dict[str, str]],
    num_concept: int,
    num_class: int,
    num_other: int,
    seed: int,
    forgotten: Sequence[str] = (),
) -> dict[str, PromptSet]:
    """The prompts that concepts are judged by; equal arguments choose equal prompts and seeds, before and after.

    Each is examined as it would be alone, but for what stays: that names none of them.

    Args:
        forgotten: phrasings of what else the model forgot before, which no prompt asks for.

    Returns:
        concept: prompts that name one in phrasings of the kind that forgetting saw; unseen: in sentence frames that
        neither training nor forgetting saw; unnamed: prompts that name no class of an attribute of theirs; retained:
        prompts of every other class of these.

    Raises:
        ValueError: the labelled prompts lack a kind that is needed.
    """
    known = judge.classifier.config.attributes
    for row in rows:
        for name, value in row.items():
            if value not in known.get(name, [value]):
                said = f"got {value!r} of {row['prompt']!r}"
                raise ValueError(f"the classifier knows {name} as one of {known[name]}, {said}")
    targets = [(attribute, known[attribute][index]) for attribute, index in judge.targets]
    found = [judge.classifier.find_class([word]) for word in forgotten]
    gone = {(attribute, known[attribute][index]) for attribute, index in filter(None, found)} - set(targets)
    plurals = concepts[0].plurals
    rows = [row for row in rows if not (row.items() & gone or mentions(row["prompt"], forgotten, plurals))]

    def chosen(purpose: Purpose, name: str, word: str, candidates: list[dict[str, str]], count: int) -> PromptSet:
        if not candidates and count:
            raise ValueError(f"the labelled prompts hold none for {name!r} of {word or concepts.name!r}")
        found = [Candidate(row["prompt"], {k: v for k, v in row.items() if k in known}, word) for row in candidates]
        seed_of = partial(derive_seed, seed, "examination", name)
        return choose(purpose, found, count, seed_of(), seed_of)

    sets = {name: PromptSet(purpose, [], []) for name, purpose in PURPOSES.items()}
    for concept, (attribute, own) in zip(concepts, targets, strict=True):
        naming = [row for row in rows if row.get(attribute) == own and concept.named_in(row["prompt"])]
        for name, form, count in (("concept", "seen", num_concept), ("unseen", "held_out", num_other)):
            candidates = [row for row in naming if row["form"] == form]
            sets[name] += chosen("asks", name, concept.name, candidates, count)
    others = [row for row in rows if not row.items() & set(targets)]
    attributes = dict.fromkeys(attribute for attribute, _ in targets)
    open_ones = [row for row in others if not attributes.keys() <= row.keys()]
    sets["unnamed"] = chosen("open", "unnamed", "", open_ones, num_other)
    seen = [row for row in others if row["form"] == "seen"]
    for attribute in attributes:
        for name in (name for name in known[attribute] if (attribute, name) not in (*targets, *gone)):
            candidates = [row for row in seen if row.get(attribute) == name]
            sets["retained"] += chosen("keeps", f"retained {name}", name, candidates, num_class)
    return sets
