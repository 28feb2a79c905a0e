"""Draw and judge a model before and after, with a classifier or, where there is none, by pictures and its own loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.data.sampling import Request, SamplingSettings
from sa_diffusers.evaluation.forgetting import FLOORS, METRICS, Examination, JudgedSet, draw_sets, floors, measure
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import explain_read_errors, load_tensors, save_tensors
from sa_diffusers.report.pictures import to_pil, to_uint8


GROUPS = {"concept": "Concept", "unseen": "Unseen phrasings", "unnamed": "Not named", "retained": "Retained"}
SHOWN = 16  # pictures of each group on the page
NO_METRICS = (*METRICS, *FLOORS, "classifier_accuracy")


@dataclass
class Findings:
    """What one model was found to do: numbers, 95 % intervals, and some of the pictures behind them.

    Attributes:
        values, intervals: by metric; None where nothing could be measured.
        pictures: uint8 [N, 3, H, W]; `captions` are (group, prompt) of each.
        by_classifier: the numbers of each further classifier, by its name.
        key: what decided all this: the model's hashes, prompts, seeds, sampler, classifiers.
    """

    values: dict
    intervals: dict
    pictures: Tensor
    captions: list[tuple[str, str]]
    by_classifier: dict[str, dict]
    key: dict = field(default_factory=dict)

    def check(self, key: dict) -> "Findings":
        """Itself. Raises ValueError, naming what differs, when it was found under another key."""
        differing = sorted(name for name in self.key | key if self.key.get(name) != key.get(name))
        if differing:
            raise ValueError(f"the evaluation to reuse was made with other {', '.join(differing)}; omit --before")
        return self

    def save(self, path: Path) -> None:
        header = {k: getattr(self, k) for k in ("values", "intervals", "captions", "by_classifier", "key")}
        save_tensors({"pictures": self.pictures}, path, findings=header)

    @classmethod
    def load(cls, path: Path) -> "Findings":
        """Read a file written by `save`. Raises DamagedFile."""
        tensors, notes = load_tensors(path)
        with explain_read_errors(path):
            return cls(**tensors, **notes["findings"])


def judge(
    family: Family,
    classifiers: dict[str, ImageClassifier],
    exams: dict[str, Examination],
    settings: SamplingSettings,
    seed: int,
) -> Findings:
    """Draw the examination's pictures and let every classifier read them; the first one's numbers come first."""
    first = next(iter(exams))
    images = draw_sets(family, exams[first].sets, settings)
    results = {}
    for name, classifier in classifiers.items():
        # The pictures were drawn for the first examination; a further classifier differs in how it names the concept.
        exam = replace(exams[first], attribute=exams[name].attribute, index=exams[name].index)
        values, intervals = measure(classifier, exam, images)
        values |= floors(family, classifier, exam, 256, seed)
        values["classifier_accuracy"] = (classifier.config.accuracy or {}).get(exam.attribute)
        results[name] = (values, intervals)
    captions, shown = [], []
    for name, part in images.items():
        picked = torch.linspace(0, len(part) - 1, min(SHOWN, len(part))).long()
        shown.append(part[picked])
        captions += [(GROUPS[name], exams[first].sets[name].requests[index].condition.text) for index in picked]
    values, intervals = results.pop(first)
    return Findings(values, intervals, to_uint8(torch.cat(shown)), captions, {n: v for n, (v, _) in results.items()})


def look(
    family: Family, concept_prompts: Sequence[Request], other_prompts: Sequence[Request], settings: SamplingSettings
) -> Findings:
    """Without a classifier: pictures to look at, and no number but their count."""
    sets = {"Concept": JudgedSet(list(concept_prompts), []), "Retained": JudgedSet(list(other_prompts), [])}
    images = torch.cat(list(draw_sets(family, sets, settings).values()))
    captions = [(name, request.condition.text) for name, judged in sets.items() for request in judged.requests]
    values = dict.fromkeys(NO_METRICS) | {"num_images": len(images)}
    return Findings(values, dict.fromkeys(NO_METRICS), to_uint8(images), captions, {})


def pairs(before: Findings, after: Findings) -> list[dict]:
    """Pictures of the same prompt and seed side by side, as `report` takes them."""
    rows = zip(before.captions, before.pictures, after.pictures, strict=True)
    return [
        {"group": g, "prompt": p or "(empty prompt)", "before": to_pil(b), "after": to_pil(a)} for (g, p), b, a in rows
    ]
