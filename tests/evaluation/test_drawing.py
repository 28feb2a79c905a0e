"""Pictures of sets in memory: what is known of a model is not drawn again, and as many at once as fit."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.sampling import MOST, Request, SamplingSettings, blank_pass, draw_samples, largest_batch
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import get_family
from sa_diffusers.models.memory import TensorBytes


def test_known_pictures_are_not_drawn(tiny_pipeline):
    """The known one stands where its request does, twice; the others are what drawing each alone gives."""
    family, settings = get_family(tiny_pipeline()), SamplingSettings(2.0, 2, None)
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
    alone = [draw_samples(family, [one], SamplingSettings(2.0, 2, 1)).latents[0] for one in asked[1:3]]
    (marked,) = known.values()
    torch.testing.assert_close(drawn["keeps"].latents, torch.stack([marked, *alone, marked]), rtol=1e-4, atol=1e-5)
    assert len(drawn["asks"]) == 0 and drawn["open"].latents[0].equal(marked)


def test_pictures_to_judge_by_are_gone_on_with(tiny_pipeline, tmp_path, monkeypatch):
    family, settings = get_family(tiny_pipeline()), SamplingSettings(2.0, 2, 2)
    sets = {
        name: PromptSet.of(name, [Request(Condition(f"a {name}"), seed) for seed in range(4)])
        for name in ("asks", "keeps")
    }
    whole, draw, calls = draw_sets(family, sets, settings), family.draw, []

    def interrupted(*arguments, **options):
        calls.append(arguments[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(family, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_sets(family, sets, settings, parts_dir=tmp_path)
    resumed = draw_sets(family, sets, settings, parts_dir=tmp_path)
    assert len(calls) == 5
    for name, part in whole.items():
        assert torch.equal(resumed[name].latents, part.latents)


@pytest.mark.parametrize(("fitting", "batch"), [(0.2, 1), (5.5, 5), (1e6, MOST)])
def test_as_many_are_drawn_at_once_as_fit(tiny_pipeline, monkeypatch, fitting, batch):
    """Each is two passes, with guidance; half of the memory is theirs. A module that is compiled is measured, too."""
    family = get_family(tiny_pipeline())
    run = blank_pass(family, 1)
    with TensorBytes() as counted:
        run()
    free = SimpleNamespace(available=fitting * 2 * 2 * counted.peak)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    family.module.compile(backend="eager")
    assert largest_batch(family) == batch


def test_a_pass_of_more_pictures_takes_as_many_times_the_bytes(tiny_pipeline):
    family, peaks = get_family(tiny_pipeline()), []
    for count in (1, 6):
        run = blank_pass(family, count)
        with TensorBytes() as counted:
            run()
        peaks.append(counted.peak)
    assert peaks[1] == pytest.approx(6 * peaks[0], rel=0.1)
