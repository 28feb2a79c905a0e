"""Several concepts: lists of them are read or refused whole; each is replaced, replayed and asked for with others."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from sa_diffusers import Forget
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.core.concepts import Concept, Concepts, mentions
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.data.concepts.lists import as_options, concepts_of, read_rows, split_rows
from sa_diffusers.data.replay import (
    DistilledSurrogate,
    concept_captions,
    filled,
    negative_requests,
    select_replay,
    surrogate_requests,
)
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.methods.esd import esd_batch
from sa_diffusers.methods.uce import concept_edits
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.loop import infinite_indices


TWO = concepts_of(split_rows("seven, 7; red", "three; green"))
DIGITS = concepts_of(split_rows("seven, 7; eight, 8; six, 6"))


class TextFamily:
    latent_shape = (1,)

    def batch(self, latents, conditions):
        return {"sample": latents, "prompts": texts(conditions)}


def sample_set(prompts: list[str], shares: int = 1) -> SampleSet:
    return SampleSet(torch.arange(float(len(prompts)))[:, None], list(map(Condition, prompts)), shares)


def written(tmp_path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_file_of_concepts_is_completed_by_what_ships(tmp_path):
    table = 'concept,surrogate,siblings,kind\n"seven, 7",three,,\nred,,,\nteapot,a cup,"jug, cup, teapot",\n'
    listed = """
- {concept: "seven, 7", surrogate: three}
- concept: red
- concept: teapot
  surrogate: a cup
  siblings: jug, cup, teapot
"""
    found = [concepts_of(read_rows(written(tmp_path, *one))) for one in (("a.csv", table), ("a.yaml", listed))]
    assert found[0] == found[1] and [one.surrogate for one in found[0]] == ["three", "green", "a cup"]
    assert found[0][2] == Concept(("teapot",), "a cup", ("jug", "cup"))
    assert "nine" in found[0][0].siblings and "blue" in found[0][1].siblings  # each of its own kind
    assert found[0][:2] == TWO


def test_all_of_a_kind_have_the_siblings_that_one_row_gives(tmp_path):
    file = 'concept,surrogate,siblings,kind\njug,cup,,vessel\npot,cup,"cup, jug, pot",vessel\nsept,three,,digit\n'
    jug, pot, sept = concepts_of(read_rows(written(tmp_path, "a.csv", file)))
    assert (jug.siblings, pot.siblings) == (("cup", "pot"), ("cup", "jug")) and "nine" in sept.siblings


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ("seven,three\n\"7, seven\",five", "line 3: a duplicate of .*line 2"),
        ("cat,dog\ncat food,bread", "line 3: its words overlap those of .*line 2"),
        ("seven,eight\neight,five", "line 2: the surrogate 'eight' is itself forgotten, by .*line 3"),
        ("seven,three\nteapot,", "line 3: no surrogate is known for 'teapot'"),
        ("seven,a big seven\nred,", "line 2: the surrogate 'a big seven' names the concept"),
        ("seven,three\n,", "line 3: expected --concept with one or several phrasings"),
        ("seven,three\nred,noise", "line 3: expected surrogates of one kind, got noise beside prompt of .*line 2"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_refused_by_its_line(tmp_path, rows, fault):
    with pytest.raises(ValueError, match=fault):
        concepts_of(read_rows(written(tmp_path, "list.csv", f"concept,surrogate\n{rows}\n")))


def test_every_fault_of_a_list_is_named_at_once(tmp_path):
    file = written(
        tmp_path, "a.yaml", "- concept: cat\n- {concept: cat, surrogate: dog}\n- {concept: dog, kind: pet}\n"
    )
    with pytest.raises(ValueError, match="nothing is known of the kind 'pet'") as error:
        concepts_of(read_rows(file))
    assert [line.split(": ")[0][-6:] for line in str(error.value).split("\n")] == ["line 1", "line 3"]
    kinds = written(
        tmp_path, "b.csv", 'concept,surrogate,siblings,kind\nyak,ox,"ox, emu",beast\nemu,ox,"ox, elk",beast\n'
    )
    with pytest.raises(ValueError, match="line 3: other rows of the kind 'beast' have other siblings"):
        concepts_of(read_rows(kinds))
    unknown = "- {concept: cat, surogate: dog}\n- {concept: cow, surrogate: ox, knd: pet}\n"
    with pytest.raises(ValueError, match="line 1: unknown column 'surogate'; (.|\n)*line 2: unknown column 'knd'"):
        read_rows(written(tmp_path, "c.yaml", unknown))
    for text, says in (
        ("concept: cat", "expected a list"),
        ("", "holds none"),
        ("- cat", "expected `concept"),
        ("[", "is not valid"),
    ):
        with pytest.raises(ValueError, match=says):
            read_rows(written(tmp_path, "d.yaml", text))


def test_a_command_line_repeats_a_concept_with_its_surrogate(capsys):
    given = ["--concept", "seven, 7", "--surrogate", "three", "--concept", "red", "--surrogate", "green"]
    config = parse_config(ForgetConfig, given)
    assert (config.concept, config.surrogate) == ("seven, 7; red", "three; green")
    assert concepts_of(split_rows(config.concept, config.surrogate)) == TWO
    for wrong in (["--surrogate", "null", "--surrogate", "x"], ["--concepts", "x.csv", "--concept", "y"]):
        with pytest.raises(SystemExit):
            parse_config(ForgetConfig, wrong)
    assert "expected a text each time" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected surrogate for each of 2 concepts, separated by ';', got 1"):
        split_rows("seven; red", "three")


def test_the_later_of_a_list_and_of_concepts_holds(tmp_path):
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("concept,surrogate\nseven,three\n")
    (tmp_path / "run.yaml").write_text(f"concepts: {tmp_path / 'one.csv'}\n")
    second = str(tmp_path / "two.csv")
    over_concept = parse_config(ForgetConfig, ["--config", "bundled/digits", "--concepts", second])
    assert (over_concept.concepts, over_concept.concept, over_concept.surrogate) == (second, "", None)
    over_list = parse_config(ForgetConfig, ["--config", str(tmp_path / "run.yaml"), "--concept", "red"])
    assert (over_list.concepts, over_list.concept) == (None, "red")


def test_python_lists_say_the_same_as_options(tmp_path):
    rows = [Forget("seven, 7", "three"), Forget("red"), Forget("sept", tmp_path, kind="digit")]
    options = as_options(rows[:2])
    assert options["concept"] == "seven, 7; red" and options["surrogate"] == "three; green"
    assert concepts_of(split_rows(**options)) == TWO
    assert as_options([rows[1]])["surrogate"] is None  # looked up, as where it is alone
    assert ForgetConfig(**as_options([Forget("a teapot", "a cup")])).siblings is None
    with pytest.raises(ValueError, match="concept 3 .*expected surrogates of one kind, got images"):
        as_options(rows)
    apart = as_options([rows[0], Forget("man; woman", "a person; anybody")])
    assert [(row.concept.strip(), row.surrogate.strip()) for _, row in split_rows(**apart)][1] == (
        "man; woman",
        "a person; anybody",
    )
    assert ForgetConfig(**apart).concept == r"seven, 7; man\; woman"
    with pytest.raises(ValueError, match="concept 2 .*no surrogate is known"):
        as_options([rows[0], Forget("teapot")])
    some = as_options([rows[0], Forget("a teapot", "a cup")])  # siblings of the first alone
    assert concepts_of(split_rows(**some))[1].siblings == ()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red seven, 7 on red", "a green three, three on green"),
        ("a blue three", "a blue three"),
        ("RED_SEVENS and a seven", "green_SEVENS and a three"),
    ],
)
def test_all_pairs_are_replaced_at_once(prompt, expected):
    assert TWO.replaced_in(prompt) == expected
    # The longer phrase first, and nothing that was put in is replaced again.
    assert Concepts([Concept(("a b",), "c"), Concept(("d",), "a b")]).replaced_in("a b d") == "c a b"


def test_captions_and_edits_replace_the_other_concepts_too():
    templates = [["a {}", "a red {}"], ["a {} thing", "a {} seven"]]
    captions = concept_captions(templates, TWO, 9, seed=0)
    assert [concept.name for *_, concept in captions] == ["seven", "red"] * 4 + ["seven"]
    requests = surrogate_requests(captions, TWO, seed=0)
    assert {r.condition.text for r in requests} == {"a three", "a green three", "a green thing"}
    assert [TWO.replaced_in(caption) for caption, *_ in captions] == [r.condition.text for r in requests]
    edits = concept_edits(TWO, templates)
    assert dict(edits) == {caption: TWO.replaced_in(caption) for caption, _ in edits} and len(edits) == 3 * 2 + 3
    assert filled("{} sevens", TWO[1], TWO) == "green sevens"  # the template decides, not where the surrogate reads


def test_a_prompt_is_open_by_the_siblings_of_each_kind():
    assert TWO[0].left_open_by("a red digit") and not TWO[0].left_open_by("a blue three")
    assert TWO[1].left_open_by("a three") and not TWO[1].left_open_by("a blue digit")
    assert TWO.left_open_by("draw it") and not TWO.left_open_by("a red digit") and not TWO.left_open_by("a three")
    samples = sample_set(["a blue three", "a blue digit", "a three", "a red digit", "a 7", ""])
    assert texts(select_replay(samples, TWO, "open").conditions) == ["a blue three"]
    requests = negative_requests(samples, TWO, "open", seed=0)
    said = [(r.condition.text, r.negative.text) for r in requests[:2]]
    assert said == [("a blue digit", "seven, 7"), ("a three", "red")]


def test_none_of_two_kinds_shows_where_a_prompt_names_neither():
    requests = negative_requests(sample_set(["draw it", ""] * 30), TWO, "open", seed=0)
    for request in requests:  # one is kept away, and something of the other's kind is named
        kept = TWO[request.negative.text != "red"]
        assert mentions(request.condition.text, TWO.siblings_of(kept)) and not TWO.named_in(request.condition.text)
    assert {request.negative.text for request in requests} == {"seven, 7", "red"}


def test_of_several_of_a_kind_a_sibling_that_stays_is_drawn():
    samples = sample_set(["a red digit", "", "a red eight", "a red two", "some figure"] * 20)
    requests = negative_requests(samples, DIGITS, "open", seed=0)
    count = Counter(r.negative.text for r in requests)
    assert count.keys() == {"seven, 7", "eight, 8", "six, 6"} and min(count.values()) >= 12
    said = [r.condition.text for r in requests]
    assert not any(map(DIGITS.named_in, said)) and all(mentions(text, DIGITS[0].siblings) for text in said)
    assert "a red digit, zero" in said and len(set(said)) > 30  # every one that stays
    alone = negative_requests(samples, Concepts(DIGITS[:1]), "open", seed=0)
    assert {r.condition.text for r in alone} == {"a red digit", "", "some figure"}


def test_with_a_concept_more_what_was_drawn_serves_again():
    two, templates = Concepts(DIGITS[:2]), [[f"k{i} {{}}" for i in range(9)]] * 3
    drawn, again = (
        {r.fingerprint for r in surrogate_requests(concept_captions(templates[:n], some, 30, 0), some, 0)}
        for n, some in ((2, two), (3, DIGITS))
    )
    assert len(drawn) == len(again) == 30 and len(again - drawn) == 10  # the third's
    samples = sample_set(["a red digit", "", "some figure"] * 60)
    drawn, again = ({r.fingerprint for r in negative_requests(samples, some, "open", 0)} for some in (two, DIGITS))
    # A third keep the new one away, and an eighth of the others were drawn with it.
    assert len(again - drawn) == pytest.approx(180 * (1 / 3 + 2 / 3 / 8), rel=0.2)


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_a_walk_through_shares_takes_as_many_of_each(batch_size):
    taken = [i for step in range(12) for i in infinite_indices(11, batch_size, step, 5, shares=3)]
    assert [index % 3 for index in taken] == [i % 3 for i in range(len(taken))]
    assert sorted(taken[:9]) == list(range(9)) and (len(taken) < 18 or sorted(taken[9:18]) == list(range(9)))
    assert taken[:9] != list(range(9))


def test_batches_hold_the_concepts_in_equal_shares():
    names = [(f"seven {i}", f"eight {i}", f"six {i}") for i in range(5)]
    surrogate = sample_set([name for row in names for name in row], shares=3)
    for source in (surrogate, DistilledSurrogate(surrogate, sample_set(["x"] * 4), DIGITS)):
        shown = [source.batch(TextFamily(), 6, step, seed=1)["prompts"] for step in range(20)]
        assert all(Counter(text.split()[0] for text in part) == {"seven": 2, "eight": 2, "six": 2} for part in shown)
        assert len({text for part in shown for text in part}) == 15
    options = SimpleNamespace(train_batch_size=600, seed=0)
    concepts = Concepts([Concept(("a",), "x"), Concept(("b", "c", "d"), "x")])
    context = SimpleNamespace(options=options, family=TextFamily(), concepts=concepts)
    counts = Counter(esd_batch(context, 0)["concept"]["prompts"])
    assert counts["a"] == pytest.approx(300, abs=40) and counts["b"] == pytest.approx(100, abs=30)
