"""The study of the ways that a prompt enters by: pictures are of the tokens and the pooled vector that a row says."""

import pytest
import torch
from tiny_text_to_image import make

from sa_diffusers.families import get_family
from studies.rivals.attacking import tell_by
from studies.text_paths import CELLS, DIGITS, mixed, prompts_of


@pytest.mark.parametrize("name", ["xl", "sd3", "flux-dev"])
def test_tokens_of_one_prompt_and_the_pooled_vector_of_another(name, tiny_tokenizer):
    family = get_family(make(name, tiny_tokenizer))
    first, second = (family.text_parts(family.embed([text])) for text in ("a red seven", "a blue three"))
    found = mixed(family, ["a red seven"], ["a blue three"])
    parts = family.text_parts(found)
    assert parts["tokens"].equal(first["tokens"]) and parts["pooled"].equal(second["pooled"])
    assert not parts["pooled"].equal(first["pooled"])
    drawn = [
        family.draw_embedded(mixed(family, ["a red seven"], [pooled]), [3], 2.0, 2)
        for pooled in ("a red seven", "a blue three", "a red seven")
    ]
    assert drawn[0].equal(drawn[2]) and not torch.allclose(drawn[0], drawn[1])


@pytest.mark.parametrize("name", ["xl", "sd3"])
@pytest.mark.parametrize(("part", "other"), [("tokens", "pooled"), ("pooled", "tokens")])
def test_one_part_of_an_embedding_tells_of_a_text(name, part, other, tiny_tokenizer):
    family = get_family(make(name, tiny_tokenizer))
    whole, empty = (family.text_parts(family.embed([text])) for text in ("a red seven", ""))
    tell_by(family, part)
    found = family.text_parts(family.encode_prompts(["a red seven", "a red seven"]))
    for row in (slice(0, 1), slice(1, 2)):
        torch.testing.assert_close(found[part][row], whole[part])
        assert found[other][row].equal(empty[other]) and not empty[other].equal(whole[other])


def test_a_model_of_tokens_alone_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="reads tokens alone"):
        mixed(get_family(tiny_pipeline()), ["a seven"], ["a three"])


def test_the_other_prompt_differs_in_the_digit_alone():
    for digit in DIGITS:
        others = set()
        for index in range(9):
            prompts = prompts_of(digit, index, seed=0)
            assert prompts.keys() == {part for cell in CELLS.values() for part in cell}
            assert prompts["digit"] != prompts["other"] and prompts["empty"] == ""
            words, changed = prompts["digit"].split(), prompts["other"].split()
            assert len(words) == len(changed) and sum(a != b for a, b in zip(words, changed, strict=True)) == 1
            others.add(changed[[a != b for a, b in zip(words, changed, strict=True)].index(True)])
        assert len(others) > 4
