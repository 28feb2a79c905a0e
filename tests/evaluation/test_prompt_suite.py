"""The prompts that judge a pipeline: what each set says, its labels and its seeds."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sa_diffusers.core.concepts import mentions
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.prompts import read_labelled_prompts, read_prompts
from sa_diffusers.data.sampling import Request
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.evaluation.options import ASKING, LANGUAGES, PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.inputs import _prompt_sources
from sa_diffusers.evaluation.suite.prompt_suite import SHORT, TEMPLATES, PromptSources, build_suite, misspell
from sa_diffusers.io.bundled import resolve


SEVEN = find_concept("seven, 7", "noise")
PERSON = find_concept("Brad Pitt", "noise", "Tom Cruise, Will Smith")
ASSETS = Path(resolve("bundled/stable_diffusion"))


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(resolve("bundled/digits/classifier"))


@pytest.fixture(scope="module")
def digits() -> PromptSources:
    return PromptSources(
        prompts=read_prompts("bundled/digits/replay_prompts.txt"),
        rows=read_labelled_prompts("bundled/digits/eval_prompts.jsonl"),
        with_labelled=True,
        templates=None,
        synonyms=(),
        combined=[],
        translations={},
        i2p=[],
        real_vocabulary=False,
        fits=lambda prompt: len(prompt.split()) <= 30,
    )


@pytest.fixture(scope="module")
def words(digits) -> PromptSources:
    """Of a model that knows real words."""
    prompts = read_prompts("bundled/stable_diffusion/replay_prompts.txt")
    return replace(digits, prompts=prompts, rows=[], real_vocabulary=True, fits=lambda prompt: True)


def texts(suite, name: str) -> list[str]:
    return [request.condition.text for request in suite[name].requests]


def test_the_sets_of_the_digits(digits, classifier):
    suite = build_suite(SEVEN, digits, classifier, 60, 3)
    asking = ["concept", "paraphrases", "long", "combined"]
    assert list(suite) == [*asking, "neighbours", "unrelated", "open", "labelled"]
    assert {name for name, part in suite.items() if part.purpose == "asks"} == set(asking)
    rows = {row["prompt"]: row for row in digits.rows}
    for name, part in suite.items():
        assert [len(part)] * 3 == [len(part.requests), len(part.candidates), len(part.labels)] and len(part) == 60
        assert [r.seed for r in part.requests] == [derive_seed(3, name, i) for i in range(60)]
        for text, labels, word in zip(
            texts(suite, name), part.labels, [one.word for one in part.candidates], strict=True
        ):
            assert mentions(text, ["seven", "7"]) == (name in asking), (name, text)
            assert (labels.get("digit") == "seven") == (name in asking)
            if name in ("neighbours", *asking) and word:
                assert mentions(text, [word, "7"] if name in asking else [word])
            if text in rows:  # the labels that the file gives, but for the word that was put in
                assert labels == {k: v for k, v in rows[text].items() if k not in ("prompt", "form")}
    assert {rows[text]["form"] for text in texts(suite, "paraphrases")} == {"held_out"}
    assert all(len(labels) > 1 for labels in suite["combined"].labels)
    assert {labels["digit"] for labels in suite["neighbours"].labels} == set(classifier.config.attributes["digit"]) - {
        "seven"
    }
    assert any(set(labels) & {"ink", "stroke"} for labels in suite["concept"].labels)


def test_what_else_was_forgotten_is_neither_kept_nor_left_open(digits, classifier):
    gone = replace(digits, forgotten=("eight", "4", "red"), combined=["{} beside a red line", "{} on black"])
    suite = build_suite(SEVEN, gone, classifier, 60, 3)
    kept = {"zero", "one", "two", "three", "five", "six", "nine"}
    assert {labels["digit"] for labels in suite["neighbours"].labels} == kept
    for name, part in suite.items():
        assert not any(mentions(text, gone.forgotten) for text in texts(suite, name)), name
        if part.purpose != "asks":  # nor by another word for it
            assert not {"eight", "four", "red"} & {value for labels in part.labels for value in labels.values()}
    assert set(texts(suite, "combined")) == {"seven on black"}
    every = build_suite(SEVEN, replace(gone, forgotten=SEVEN.siblings), classifier, 60, 3)
    assert "open" in every and not {"neighbours", "unrelated"} & every.keys()


def test_long_prompts_hold_the_concept_in_their_middle_and_are_read_to_the_end(digits, words, classifier):
    for text in texts(build_suite(SEVEN, digits, classifier, 30, 0), "long"):
        place = [i for i, word in enumerate(text.replace(",", " ,").split()) if mentions(word, ["seven", "7"])]
        assert len(text.split()) <= 30 and place and not mentions(text, SEVEN.siblings)
        assert 0 < place[0] < len(text.split())
    for line in (line for line in (ASSETS / "long_templates.txt").read_text("utf-8").splitlines() if line[0] != "#"):
        before, _, after = line.partition("{}")
        assert after and 10 <= len(before.split()) <= 40 and len(after.split()) >= 5
        assert len(line.split()) <= 60  # well inside CLIP's 77 tokens
    assert all("Brad Pitt" in text for text in texts(build_suite(PERSON, words, None, 12, 0), "long"))


def test_equal_arguments_choose_equal_prompts_and_every_prompt_comes_before_one_comes_again(digits, classifier):
    suite = build_suite(SEVEN, digits, classifier, 40, 0)
    assert suite == build_suite(SEVEN, digits, classifier, 40, 0)
    assert suite != build_suite(SEVEN, digits, classifier, 40, 1)
    repeated = texts(build_suite(SEVEN, replace(digits, combined=["{} red", "{} blue"]), classifier, 6, 0), "combined")
    assert sorted(repeated) == ["7 blue"] * 3 + ["seven red"] * 3


def test_words_of_a_real_vocabulary(words):
    changed = replace(words, synonyms=("William Bradley Pitt",), translations={"de": "Herr Pitt"})
    suite = build_suite(PERSON, changed, None, 50, 0)
    assert list(suite) == [
        "concept", "paraphrases", "long", "misspellings", "languages", "neighbours", "unrelated"
    ]  # fmt: skip
    wrong = misspell("Brad Pitt")
    assert all(any(word in text for word in wrong) for text in texts(suite, "misspellings"))
    assert not any(mentions(text, ["Brad Pitt"]) for text in texts(suite, "misspellings"))
    frames = yaml.safe_load((ASSETS / "language_templates.yaml").read_text("utf-8"))
    assert tuple(frames) == LANGUAGES
    expected = {
        frame.replace("{}", "Herr Pitt" if language == "de" else "Brad Pitt")
        for language, lines in frames.items()
        for frame in lines
    }
    assert len(expected) == 36 and set(texts(suite, "languages")) == expected
    assert any("William Bradley Pitt" in text for text in texts(suite, "paraphrases"))
    assert {word for word in [one.word for one in suite["neighbours"].candidates]} == {"Tom Cruise", "Will Smith"}
    assert all(labels == {} for part in suite.values() for labels in part.labels)
    seen = read_prompts(TEMPLATES)
    new = read_prompts("bundled/stable_diffusion/paraphrase_frames.txt")
    assert not set(seen) & set(new) and all(frame.count("{}") == 1 for frame in new)


@pytest.mark.parametrize("plurals", [False, True])
def test_a_plural_names_the_concept_where_a_run_counts_it(words, plurals):
    prompts = [f"two dogs in scene {index}" for index in range(20)] + ["a red house", "a dog"]
    dog = find_concept("dog", "noise", "cat, fox", plurals)
    suite = build_suite(dog, replace(words, prompts=prompts), None, 40, 0, ["unrelated", "concept"])
    assert any("dogs" in text for text in texts(suite, "unrelated")) is not plurals
    assert ("two dogs in scene 3" in texts(suite, "concept")) is plurals


def test_misspellings_of_known_words():
    assert misspell("seven") == [
        "sven", "seeven", "sveen", "seen", "sevven", "seevn", "sevn", "seveen", "sevne", "seve", "sevenn"
    ]  # fmt: skip
    assert misspell("7") == misspell("a cat") == []  # too short
    assert all(text.startswith("Jo ") for text in misspell("Jo Smith"))
    assert len(misspell("Jo Smith")) == len(misspell("Smith"))


def test_combined_prompts_name_the_concept(digits, classifier):
    suite = build_suite(SEVEN, replace(digits, combined=["a red 7", "{} on black"]), classifier, 2, 0)
    assert sorted(texts(suite, "combined")) == ["7 on black", "a red 7"]
    with pytest.raises(ValueError, match="must name 'seven' or hold {}; this does not: 'a red eight'"):
        build_suite(SEVEN, replace(digits, combined=["a red eight"]), classifier, 2, 0)


def test_rows_of_i2p_keep_their_seeds(words):
    rows = [Request(Condition("someone at a beach"), 17), Request(Condition("someone else"), 3)]
    suite = build_suite(PERSON, replace(words, i2p=rows), None, 5, 0, names=["i2p"])
    assert suite["i2p"].requests == rows
    assert list(suite) == ["i2p"] and suite["i2p"].purpose == "i2p"


def test_what_is_not_there_is_refused(digits, words, classifier, tmp_path):
    with pytest.raises(ValueError, match="no prompts for the set 'misspellings'"):
        build_suite(SEVEN, digits, classifier, 5, 0, names=["concept", "misspellings"])
    with pytest.raises(ValueError, match="no prompts for the set 'neighbours'"):
        build_suite(replace(PERSON, siblings=()), words, None, 5, 0, names=["neighbours"])
    (tmp_path / "frames.txt").write_text("a photo of {}\na photo\n")
    own = replace(words, templates=str(tmp_path / "frames.txt"))
    with pytest.raises(ValueError, match="must hold {} where the concept goes; this one does not: 'a photo'"):
        build_suite(PERSON, own, None, 5, 0)


def test_levels_of_asking_go_from_the_name_to_descriptions_without_it(digits, words, classifier):
    short, long = "a bar over a slanted line", "a bar at the top from whose right end a slanted line goes down"
    changed = replace(digits, prefixes=("a neat {}", "one plain {}"), descriptions=(short, long))
    suite = build_suite(SEVEN, changed, classifier, 4, 0)
    asking = ["concept", "prefixes", "paraphrases", "described", "described_long", "long", "combined"]
    assert list(suite)[:7] == asking and all(suite[name].purpose == "asks" for name in asking)
    assert sorted(texts(suite, "prefixes")) == ["a neat 7", "a neat seven", "one plain 7", "one plain seven"]
    assert set(texts(suite, "described")) == {short} and set(texts(suite, "described_long")) == {long}
    assert all(labels["digit"] == "seven" for name in asking for labels in suite[name].labels)
    with pytest.raises(ValueError, match="describe 'seven' without its name; this one names it: 'like a 7'"):
        build_suite(SEVEN, replace(digits, descriptions=("like a 7",)), classifier, 4, 0)
    cut = replace(changed, fits=lambda prompt: len(prompt.split()) < 12)
    assert "described_long" not in build_suite(SEVEN, cut, classifier, 4, 0)


def test_bundled_prompts_of_each_level_say_what_they_should():
    config = PipelineEvaluationConfig(pipeline="some/model", concept="Brad Pitt", metrics="clip")
    sources = _prompt_sources(config, None, False, "Brad Pitt")
    suite = build_suite(PERSON, sources, None, 12, 0)
    assert list(suite) == [name for name in ASKING if name in suite] + ["neighbours", "unrelated"]
    assert set(ASKING) == set(suite) - {"neighbours", "unrelated"}
    assert all(text.count("{}") == 1 for text in [*sources.prefixes, *sources.combined])
    for name, descriptions in yaml.safe_load((ASSETS / "descriptions.yaml").read_text("utf-8")).items():
        concept = find_concept(name, "noise", None, plurals=True)
        assert not any(concept.named_in(text) for text in descriptions)
        lengths = [len(text.split()) for text in descriptions]
        assert min(lengths) <= SHORT < max(lengths) <= 45 and len(lengths) >= 6
    grammar = read_prompts("bundled/digits/prefix_templates.txt")
    assert all(text.count("{}") == 1 and text.index("{}") > 5 for text in grammar)
