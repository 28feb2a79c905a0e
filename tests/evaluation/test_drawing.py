"""Pictures of sets in memory: what is known of a model is not drawn again."""

import torch

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.sampling import Request, SamplingSettings, draw_samples
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import get_family


def test_known_pictures_are_not_drawn(tiny_pipeline):
    """The known one stands where its request does, twice; the others are what drawing each alone gives."""
    family, settings = get_family(tiny_pipeline()), SamplingSettings(2.0, 2, 3)
    asked = [
        Request(Condition(text), seed) for text, seed in (("a six", 1), ("a nine", 1), ("a six", 2), ("a six", 1))
    ]
    known = {asked[0].fingerprint: torch.full(family.latent_shape, 7.0)}
    sets = {
        "keeps": PromptSet.of("keeps", asked),
        "asks": PromptSet.of("asks", []),
        "open": PromptSet.of("open", asked[:1]),
    }
    drawn = draw_sets(family, sets, settings, known=known)
    alone = [draw_samples(family, [one], settings).latents[0] for one in asked[1:3]]
    (marked,) = known.values()
    torch.testing.assert_close(drawn["keeps"].latents, torch.stack([marked, *alone, marked]), rtol=1e-4, atol=1e-5)
    assert len(drawn["asks"]) == 0 and drawn["open"].latents[0].equal(marked)
