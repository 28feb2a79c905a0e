"""What pictures are asked for by, and what families cannot read."""

import pytest
import torch

from sa_diffusers.core.conditions import Condition, classes, texts
from sa_diffusers.families import get_family


def test_words_and_classes():
    assert texts([Condition("a red seven"), Condition()]) == ["a red seven", ""]
    assert classes([Condition("seven"), Condition(), Condition(label=0), Condition("a seven", 7)]) == [
        "seven",
        "",
        0,
        7,
    ]
    assert [str(Condition("it's")), str(Condition(label=0))] == ['"it\'s"', "class 0"]


@pytest.mark.parametrize(
    ("read", "given", "message"),
    [
        (
            texts,
            Condition("a seven", 0),
            r"conditions of text alone, got .*label=0.*\); pass Condition\('a red seven'\)",
        ),
        (texts, "a seven", "conditions of text alone, got 'a seven'; pass"),
        (classes, "seven", r"conditions, got 'seven'; pass Condition\('seven'\) or Condition\(label=7\)"),
        (classes, 7, "conditions, got 7; pass"),
    ],
)
def test_what_says_nothing_is_refused(read, given, message):
    with pytest.raises(ValueError, match=message):
        read([Condition("a nine"), given])


def test_a_model_of_free_text_reads_no_class(tiny_pipeline):
    family, asked = get_family(tiny_pipeline()), [Condition(label=3)]
    for ask in (
        lambda: family.draw(asked, [0], 2.0, 2),
        lambda: family.draw([Condition("a two")], [0], 2.0, 2, asked),
        lambda: family.batch(torch.zeros(1, *family.latent_shape), asked),
        lambda: family.prepare(asked),
    ):
        with pytest.raises(ValueError, match="expected conditions of text alone, got .*label=3"):
            ask()
