"""Several concepts are judged each by itself, and what was forgotten never counts as what should stay."""

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers.core.concepts import Concept, Concepts, mentions
from sa_diffusers.evaluation.examination import examination
from sa_diffusers.evaluation.forgetting import summarise
from sa_diffusers.evaluation.images.sets import ImageSet
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.evaluation.judging import ClassifierJudge, judge_pictures
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.report.metrics_table import metric_rows
from sa_diffusers.report.verdict import verdict


KNOWN = {"ink": ["red", "blue", "green"], "digit": ["six", "seven", "eight"], "background": ["black", "white"]}
CONCEPTS = Concepts([Concept(("seven",), "six"), Concept(("eight",), "six"), Concept(("red",), "blue")])
FORGOTTEN = {("digit", "seven"), ("digit", "eight"), ("ink", "red")}


def rows() -> list[dict[str, str]]:
    found = []
    for form, how in (("seen", "a {}"), ("held_out", "draw {}")):
        for ink in (None, *KNOWN["ink"]):
            for digit in (None, *KNOWN["digit"]):
                for background in (None, "black"):
                    named = {"ink": ink, "digit": digit, "background": background}
                    labels = {name: value for name, value in named.items() if value}
                    words = " ".join(filter(None, (ink, digit or "digit", background and "on black")))
                    found.append({"prompt": how.format(words), "form": form, **labels})
    return found


@pytest.fixture(scope="module")
def judge() -> ClassifierJudge:
    torch.manual_seed(3)
    classifier = AttributeClassifier(KNOWN, image_size=16, channels=(8, 8), num_features=12).eval()
    found = {one.name: classifier.require_class(one.phrasings) for one in CONCEPTS}
    (_, first), *others = found.items()
    return ClassifierJudge(classifier, *first, dict(others), "seven")


@pytest.fixture(scope="module")
def sets(judge) -> dict:
    return examination(judge, CONCEPTS, rows(), 8, 6, 10, seed=0)


def test_each_is_asked_for_as_it_would_be_alone(judge, sets):
    assert [one.word for one in sets["concept"].candidates] == ["seven"] * 8 + ["eight"] * 8 + ["red"] * 8
    for i, concept in enumerate(CONCEPTS):
        alone = ClassifierJudge(judge.classifier, *judge.targets[i])
        own = examination(alone, Concepts([concept]), rows(), 8, 6, 10, seed=0)
        for name, count in (("concept", 8), ("unseen", 10)):
            assert sets[name].requests[i * count : (i + 1) * count] == own[name].requests


def test_nothing_forgotten_is_retained_or_left_open(sets):
    for part in (sets["retained"], sets["unnamed"]):
        assert not any(map(CONCEPTS.named_in, part.prompts))
        assert not any(set(labels.items()) & FORGOTTEN for labels in part.labels)
    assert set(one.word for one in sets["retained"].candidates) == {"six", "blue", "green"}
    assert all(not {"ink", "digit"} <= labels.keys() for labels in sets["unnamed"].labels)


def test_what_was_forgotten_before_is_no_longer_asked_for(judge):
    own = ClassifierJudge(judge.classifier, "digit", 1)
    sets = examination(own, Concepts(CONCEPTS[:1]), rows(), 8, 6, 10, seed=0, forgotten=("eight", "red", "Van Gogh"))
    assert {one.word for one in sets["retained"].candidates} == {"six"} and len(sets["concept"]) == 8
    for part in sets.values():
        assert not any(mentions(prompt, ["eight", "red"]) for prompt in part.prompts)
    again = examination(own, Concepts(CONCEPTS[:1]), rows(), 8, 6, 10, seed=0, forgotten=())
    assert again == examination(own, Concepts(CONCEPTS[:1]), rows(), 8, 6, 10, seed=0)


def test_numbers_are_those_of_a_loop_over_pictures(judge, sets):
    pictures = {name: torch.rand(len(part), 3, 16, 16) * 2 - 1 for name, part in sets.items()}
    read = {name: judge(images, sets[name], None) for name, images in pictures.items()}
    values, intervals = summarise(judge.attribute, sets, read)
    of = {name: judge.classifier.probabilities(images) for name, images in pictures.items()}
    asked, shown, right, alone = {}, [], {}, {}
    for row, one in enumerate(sets["concept"].candidates):
        attribute, index = dict(zip(("seven", "eight", "red"), judge.targets, strict=True))[one.word]
        asked.setdefault(one.word, []).append(of["concept"][attribute][row, index].item())
    for row, labels in enumerate(sets["unnamed"].labels):
        best = {name: KNOWN[name][int(p[row].argmax())] for name, p in of["unnamed"].items()}
        for name, own in FORGOTTEN:
            alone.setdefault(own, []).extend([best[name] == own] if name not in labels else [])
        shown.append(any(best[name] == own for name, own in FORGOTTEN if name not in labels))
    for row, one in enumerate(sets["retained"].candidates):
        name = "digit" if one.word == "six" else "ink"
        right.setdefault(one.word, []).append(KNOWN[name][int(of["retained"][name][row].argmax())] == one.word)
    means = {word: sum(each) / len(each) for word, each in asked.items()}
    assert values["concept_probability_by_concept"] == pytest.approx(means)
    assert list(values["concept_probability_by_concept"]) == sorted(means, key=means.get, reverse=True)
    assert values["concept_probability"] == pytest.approx(sum(means.values()) / 3)
    assert values["concept_rate_when_unnamed"] == pytest.approx(sum(shown) / len(shown))
    rates, bounds = (part["concept_rate_when_unnamed_by_concept"] for part in (values, intervals))
    assert rates == pytest.approx({word: sum(each) / len(each) for word, each in alone.items()})
    assert list(rates.values()) == sorted(rates.values(), reverse=True) and len(set(rates.values())) > 1
    assert all(bounds[word][0] <= rate <= bounds[word][1] for word, rate in rates.items())
    assert f"Not named: {next(iter(rates))}" in [row.label for row in metric_rows({"before": values, "after": values})]
    assert values["retained_accuracy_by_class"] == pytest.approx({n: sum(r) / len(r) for n, r in right.items()})
    assert intervals["concept_probability_unseen_by_concept"].keys() == means.keys()
    # An attribute counts beside a concept where it is another one's, and what is named of it has not been forgotten.
    ink = read["concept"]["right: ink"]
    for row, one in enumerate(sets["concept"].candidates):
        assert ink[row].isnan() == (one.word == "red" or one.labels.get("ink") in (None, "red"))
    assert_close(read["concept"]["concept_probability"][:8], of["concept"]["digit"][:8, 1].double())


def test_pictures_of_classes_without_labels_count_one_by_one():
    """Two classes by their names are no sample of two prompts; two phrasings of one concept are."""
    classes = [Candidate(name, word=name) for name in ("0", "1") * 4]
    said = [Candidate(prompt, word="seven") for prompt in ("a seven", "a 7") * 4]
    for candidates, expected in ((classes, range(8)), (said, ["a seven", "a 7"] * 4)):
        assert PromptSet.seeded("asks", candidates, int).groups("") == expected


def test_what_batches_lack_leaves_every_value_at_its_picture(judge, sets):
    """Of kept prompts the first batches have no ink to be right beside."""
    part = sets["retained"]
    rows = sorted(range(len(part)), key=lambda row: part.candidates[row].word != "six")
    kept = {"retained": part.take(rows)}
    pictures = {"retained": Drawn(torch.rand(len(rows), 3, 16, 16) * 2 - 1)}
    at_once, by_two = (judge_pictures([judge], kept, pictures, batch_size=size)["retained"] for size in (99, 2))
    assert at_once.keys() == by_two.keys()
    for name, values in by_two.items():
        assert_close(values, at_once[name], equal_nan=True, msg=name)


class Drawn(ImageSet):
    def __init__(self, pixels: torch.Tensor):
        super().__init__("drawn", (16, 16), len(pixels))
        self.pixels = pixels

    def images(self, indices) -> torch.Tensor:
        return self.pixels[list(indices)]


def test_two_concepts_are_two_classes(tmp_path, judge):
    judge.classifier.save_pretrained(tmp_path)
    loaded = ClassifierJudge.load(str(tmp_path), *(one.phrasings for one in CONCEPTS))
    assert loaded.targets == judge.targets and (loaded.others, loaded.name) == (judge.others, "seven")
    with pytest.raises(ValueError, match="knows 'seven' and 'Seven' as one class"):
        ClassifierJudge.load(str(tmp_path), ("seven",), ("Seven",))


def test_the_one_that_is_left_most_decides_and_is_named():
    by = {"seven": 0.02, "eight": 0.4}
    bounds = {"seven": (0.0, 0.05), "eight": (0.3, 0.5)}
    after = {"concept_probability": 0.21, "concept_probability_by_concept": dict(reversed(by.items()))}
    before = {"concept_probability": 1.0, "concept_probability_by_concept": by}
    intervals = {"before": {}, "after": {"concept_probability": (0.1, 0.2), "concept_probability_by_concept": bounds}}
    metrics = {"before": before, "after": after, "intervals": intervals, "surrogate": "three"}
    said, advice = verdict(metrics, ("more steps", "fewer steps"))
    assert said.startswith("Not forgotten: asked for, “eight” shows with 40.0% [30.0%, 50.0%].") and "more" in advice
    labels = [row.label for row in metric_rows(metrics)]
    assert labels.index("Asked for: eight") < labels.index("Asked for: seven")
