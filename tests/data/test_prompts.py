"""What prompts say, which of them are drawn, and which are replayed."""

from collections import Counter

import pytest
import torch

from sa_diffusers.core.concepts import Concept, Concepts, mentions, split_phrasings, substitute
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.data.concepts.given import check_surrogate, find_concept
from sa_diffusers.data.prompts import concept_templates, read_prompts, read_templates
from sa_diffusers.data.replay import (
    DistilledSurrogate,
    Replay,
    concept_captions,
    needs_negative,
    negative_requests,
    sample_requests,
    select_replay,
    spread,
    surrogate_requests,
)
from sa_diffusers.data.sample_set import SampleSet


SEVEN = Concept(("seven", "7"), "nine", ("six", "8"))
PITT = Concept(("Brad Pitt",), "a middle aged man")
ALONE = Concepts([SEVEN])


def sample_set(latents: torch.Tensor, prompts: list[str]) -> SampleSet:
    return SampleSet(latents, list(map(Condition, prompts)))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red seven", True),
        ("SEVEN, thin", True),
        ("digit 7.", True),
        ("(7)", True),
        ("seventeen", False),
        ("a seven-sided die", True),  # a hyphen ends a word
        ("17", False),
        ("7th", False),
        ("", False),
    ],
)
def test_mentions_whole_words_in_any_case(prompt, expected):
    assert mentions(prompt, ("seven", "7")) is expected


def test_mentions_phrases_and_takes_them_literally():
    assert mentions("a photo of brad pitt at sea", ["Brad Pitt"])
    assert not mentions("brad and his pit", ["Brad Pitt"])
    assert mentions("mr. t smiles", ["Mr. T"])
    assert not mentions("mrs t smiles", ["Mr. T"])
    assert mentions("learn C++ now", ["c++"])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a Seven and a 7", "a nine and a nine"),
        ("seventeen", "seventeen"),
        ("", ""),
    ],
)
def test_substitute(prompt, expected):
    assert substitute(prompt, dict.fromkeys(("seven", "7"), "nine")) == expected


def test_substitute_prefers_the_longer_phrase_and_takes_the_replacement_literally():
    assert substitute("brad pitt and brad", dict.fromkeys(("brad", "brad pitt"), "{}")) == "{} and {}"
    assert substitute("a seven", dict.fromkeys(("seven",), r"\1 \g<0>")) == r"a \1 \g<0>"


def test_split_phrasings():
    assert split_phrasings(" seven, 7 ,,seven") == ("seven", "7")
    for empty in ("", " , "):
        with pytest.raises(ValueError, match="expected --concept"):
            split_phrasings(empty)


def test_a_known_concept_is_completed():
    found = find_concept("seven, 7", None)
    assert found.surrogate == "three"
    assert found.phrasings == ("seven", "7")
    assert {"six", "6", "zero", "9"} <= set(found.siblings)
    assert not {"seven", "7"} & set(found.siblings)
    assert find_concept("brad pitt", None) == Concept(("brad pitt",), "a middle aged man", ())


def test_what_the_user_says_comes_first():
    found = find_concept("seven", "a drawing of a tree", siblings="three, seven, oak")
    assert found == Concept(("seven",), "a drawing of a tree", ("three", "oak"))
    assert find_concept("a teapot", "a cup") == Concept(("a teapot",), "a cup", ())


def test_an_unknown_concept_shows_how_to_pass_a_surrogate():
    with pytest.raises(ValueError, match="no surrogate is known for 'a teapot'.*--surrogate.*a folder of images"):
        check_surrogate(find_concept("a teapot", None))


def test_a_surrogate_that_names_the_concept_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names the concept \('7'\)"):
        check_surrogate(find_concept("seven, 7", "a big 7"))
    folder = tmp_path / "seven"
    folder.mkdir()
    assert find_concept("seven", str(folder)).surrogate == str(folder)


def test_read_prompts_from_text(tmp_path):
    (tmp_path / "prompts.txt").write_text("# a comment\na red six\n\n  a 9  \n#hash\n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a red six", "a 9"]
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="no prompt in"):
        read_prompts(str(tmp_path / "empty.txt"))


def test_read_prompts_from_a_column(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"caption": "a red six"}\n{"caption": ""}\n{"caption": "a 9"}\n')
    assert read_prompts(str(folder), "caption") == ["a red six", "a 9"]
    with pytest.raises(ValueError, match=r"columns \['caption'\], none is 'prompt'; pass --prompt_column"):
        read_prompts(str(folder))


def test_templates_come_from_the_prompts_that_name_the_concept(tmp_path):
    prompts = [f"a seven, number {{{i}}}, not 7" for i in range(16)] + ["a six"]
    expected = [f"a {{}}, number {i}, not {{}}" for i in range(6)]
    assert concept_templates(SEVEN, prompts, [])[:6] == expected
    assert len(concept_templates(SEVEN, prompts, [])) == 16


def test_too_few_such_prompts_fall_back_on_a_file(tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of {}\n{} at sea\n")
    listed = read_templates(str(tmp_path / "templates.txt"))
    assert concept_templates(PITT, ["Brad Pitt"] * 15, listed) == listed == ["a photo of {}", "{} at sea"]
    (tmp_path / "wrong.txt").write_text("a photo of {}\na photo\n")
    with pytest.raises(ValueError, match="does not: 'a photo"):
        read_templates(str(tmp_path / "wrong.txt"))


def test_spread_takes_every_prompt_before_it_repeats_one():
    prompts = [str(i) for i in range(100)]
    assert sorted(spread(prompts, 100, seed=1)) == sorted(prompts)
    drawn = spread(prompts, 250, seed=1)
    assert sorted(drawn[:100]) == sorted(drawn[100:200]) == sorted(prompts)
    assert drawn[:100] != drawn[100:200]
    assert len(set(drawn[200:])) == 50
    assert spread(prompts, 250, seed=1) == drawn != spread(prompts, 250, seed=2)
    assert spread([], 0, seed=1) == []
    with pytest.raises(ValueError, match="expected prompts to choose 3 from, got none"):
        spread([], 3, seed=1)
    assert drawn[:100] != prompts


def test_sample_requests_draw_the_whole_list_and_a_share_of_empty_prompts():
    prompts = [f"prompt {i}" for i in range(45)]
    requests = sample_requests(prompts, 100, 0.1, seed=3)
    counts = Counter(request.condition.text for request in requests)
    assert counts.pop("") == 10
    assert set(counts.values()) == {2}
    assert len({request.seed for request in requests}) == 100
    # Mixed, so that a stretch of it is spread as the whole is.
    assert 0 < sum(not request.condition.text for request in requests[:50]) < 10
    assert sample_requests(prompts, 100, 0.1, seed=3) == requests
    assert not any(request.condition.text == "" for request in sample_requests(prompts, 10, 0.0, seed=3))


@pytest.mark.parametrize(
    ("prompt", "of_seven", "of_pitt"),
    [
        ("", True, True),
        ("  ", True, True),
        ("a red digit", True, False),
        ("a red six", False, False),
        ("an 8", False, False),
        ("a red seven", False, False),
        ("brad pitt", True, False),
    ],
)
def test_prompts_that_leave_the_concept_open(prompt, of_seven, of_pitt):
    assert SEVEN.left_open_by(prompt) is of_seven
    assert PITT.left_open_by(prompt) is of_pitt


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("open", ["", "a digit"]), ("all", ["", "a digit", "a six"]), ("none", [])],
)
def test_which_prompts_are_drawn_with_the_concept_as_negative(mode, expected):
    prompts = ["", "a digit", "a six", "a seven"]
    assert [p for p in prompts if needs_negative(p, ALONE, mode)] == expected
    samples = sample_set(torch.arange(4.0), prompts)
    requests = negative_requests(samples, ALONE, mode, seed=0)
    assert [request.condition.text for request in requests] == expected
    assert {request.negative for request in requests} <= {Condition("seven, 7")}
    kept = select_replay(samples, ALONE, mode)
    assert sorted(texts(kept.conditions) + expected) == ["", "a digit", "a six"]
    assert kept.latents.tolist() == [float(prompts.index(p)) for p in texts(kept.conditions)]


def test_a_label_says_nothing_of_the_concept():
    samples = SampleSet(torch.zeros(2), [Condition("a six"), Condition(label=7)])
    for select in (
        select_replay,
        lambda *given: negative_requests(*given, seed=0),
        lambda s, c, _: Replay(s, [], c, "none"),
    ):
        with pytest.raises(ValueError, match="expected conditions of text alone, got .*label=7"):
            select(samples, ALONE, "open")


def test_nothing_to_keep():
    with pytest.raises(ValueError, match="every replay prompt mentions 'seven'"):
        select_replay(sample_set(torch.zeros(3), ["a seven", "", "a 7"]), ALONE, "open")


def test_captions_use_every_phrasing_and_the_surrogate_the_same_sentences():
    templates = [f"a {{}} of kind k{i}" for i in range(10)]
    pairs = concept_captions([templates], ALONE, 30, seed=0)
    assert sum("seven" in caption for caption, *_ in pairs) == 15
    assert all(substitute(caption, dict.fromkeys(SEVEN.phrasings, "{}")) == template for caption, template, _ in pairs)
    assert Counter(template for _, template, _ in pairs) == dict.fromkeys(templates, 3)
    requests = surrogate_requests(pairs, ALONE, seed=0)
    assert [r.condition.text for r in requests] == [template.replace("{}", "nine") for _, template, _ in pairs]
    assert len({r.seed for r in requests}) == 30


class TextFamily:
    def batch(self, latents, conditions):
        return {"sample": latents, "prompts": texts(conditions)}


def test_distilled_replay_shows_samples_under_other_prompts_but_open_ones_under_their_own():
    samples = sample_set(torch.arange(4.0), ["a six", "", "a red digit", "an 8"])
    prompts = ["a six", "an 8", "one six", "a seven", "a red digit", ""]
    replay = Replay(samples, prompts, ALONE, "open")
    assert replay.prompts == ["a six", "an 8", "one six"]  # neither the concept nor what leaves it open
    assert not Replay(samples, prompts, ALONE, "all").distilled.any()  # all were drawn away from the concept
    shown = set()
    for step in range(30):
        batch = replay.batch(TextFamily(), 4, step, seed=0)
        for latent, prompt, distilled in zip(batch["sample"], batch["prompts"], batch["distilled"], strict=True):
            assert distilled == (int(latent) in (0, 3))
            if distilled:
                shown.add((int(latent), prompt))
            else:
                assert prompt == samples.conditions[int(latent)].text
    assert shown == {(index, prompt) for index in (0, 3) for prompt in replay.prompts}


def test_without_negatives_all_replay_is_distilled_and_the_empty_prompt_kept():
    samples = sample_set(torch.arange(3.0), ["a six", "", "a red digit"])
    replay = Replay(samples, ["a six", "a seven", "a red digit"], ALONE, "none")
    assert replay.prompts == ["a six", "a red digit"] and replay.distilled.all()
    shown = set()
    for step in range(20):
        batch = replay.batch(TextFamily(), 3, step, seed=0)
        shown |= {(int(latent), prompt) for latent, prompt in zip(batch["sample"], batch["prompts"], strict=True)}
    assert shown == {(1, "")} | {(index, prompt) for index in (0, 2) for prompt in replay.prompts}


def test_a_distilled_surrogate_reads_as_the_surrogate_on_any_picture():
    surrogate = sample_set(torch.arange(4.0).view(4, 1), ["a seven", "draw 7", "a red seven", "7 on white"])
    others = sample_set(torch.arange(10.0, 13.0).view(3, 1), ["a two", "a seven", ""])
    source = DistilledSurrogate(surrogate, others, ALONE)
    seen, captions = set(), set()
    for step in range(40):
        batch = source.batch(TextFamily(), 4, step, seed=0)
        assert batch["distilled"].all() and set(batch["frozen"]) == {"prompts"}
        for latent, prompt, frozen in zip(batch["sample"], batch["prompts"], batch["frozen"]["prompts"], strict=True):
            seen.add(int(latent))
            captions.add(prompt)
            assert prompt in source.prompts and frozen == source.surrogate_prompt(prompt)
    assert seen == {0, 1, 2, 3, 10, 11, 12} and captions == set(texts(surrogate.conditions))
    assert source.surrogate_prompt("a red seven") == f"a red {SEVEN.surrogate}"
    assert set(int(x) for x in DistilledSurrogate(surrogate, None, ALONE).samples.latents) == {0, 1, 2, 3}
