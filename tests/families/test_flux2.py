"""What FLUX.2 Klein alone promises: prompts within a chat, and models distilled to draw without guidance."""

import pytest
import torch
from tiny_text_to_image import make
from torch.testing import assert_close

from sa_diffusers.core.conditions import Condition
from sa_diffusers.families import get_family
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder


@pytest.fixture(scope="module")
def pipeline(tiny_tokenizer):
    return make("klein", tiny_tokenizer)


def chat(pipeline, prompt: str) -> list[int]:
    """A prompt's tokens as the pipeline reads them."""
    turn = [{"role": "user", "content": prompt}]
    text = pipeline.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return pipeline.tokenizer(text, padding="max_length", max_length=24).input_ids


@pytest.mark.parametrize(("prompt", "last"), [("a red seven", " seven"), ("nine", "nine"), ("", "\n")])
def test_a_prompts_last_word_is_found_within_the_chat(pipeline, prompt, last):
    family = get_family(pipeline)
    ((start, end),) = family.last_words(prompt)
    assert pipeline.tokenizer.decode(chat(pipeline, prompt)[start]) == last and end == 24


def test_a_template_is_the_chat_that_the_pipeline_makes_of_it(pipeline):
    """A word is the same token wherever a word comes before it; what no word comes before is another one."""
    encoder = TemplateEncoder(get_family(pipeline), ["a {}", "a red {} on black"], 1)
    assert encoder.readers[0].read(["a seven"]).tolist() == [chat(pipeline, "a seven")]
    assert encoder.tokens("seven") == pipeline.tokenizer(" seven").input_ids
    assert encoder.reads_as("seven", encoder.tokens("seven")) and not encoder.reads_as("seven", encoder.tokens("nine"))
    encoder.check_places("seven")
    with pytest.raises(ValueError, match="put spaces around it"):
        TemplateEncoder(get_family(pipeline), ["a-{}"], 1).check_places("seven")


def test_a_distilled_model_draws_without_guidance_as_its_pipeline_does(tiny_tokenizer):
    distilled = make("klein-distilled", tiny_tokenizer)
    family, led = get_family(distilled), get_family(make("klein", tiny_tokenizer))
    found = [family.draw([Condition("a seven")], [3], scale, 2) for scale in (1.0, 4.0)]
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(led.draw([Condition("a seven")], [3], 1.0, 2), found[0], rtol=0, atol=0)
    assert not torch.allclose(led.draw([Condition("a seven")], [3], 4.0, 2), found[0], atol=1e-3)
    assert (family.guided_passes, led.guided_passes) == (1, 2)
