"""The model itself as a judge between two conditions, against a loop over pictures, times and noise."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_clip import save_tiny_clip

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.sampling import Request
from sa_diffusers.evaluation.judges.clip import Clip, zero_shot
from sa_diffusers.evaluation.judges.preference import DRAWS, PREFERENCE, ClipPreferenceJudge, PreferenceJudge
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.families import get_family
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages.fisher import changed_names
from sa_diffusers.training.lora import add_lora, fuse_lora


@pytest.fixture(scope="module")
def concepts() -> Concepts:
    return Concepts([find_concept("seven, 7", "nine")])


def asking(prompts: list[str], purpose: str = "asks") -> PromptSet:
    return PromptSet(
        purpose, [Request(Condition(text), 10 + i) for i, text in enumerate(prompts)], list(map(Candidate, prompts))
    )


@pytest.mark.parametrize("surrogate", ["nine", None])
def test_gaps_are_those_of_a_loop(tiny_pipeline, concepts, surrogate):
    family = get_family(tiny_pipeline())
    judge = PreferenceJudge(family, concepts, surrogate is not None, batch_size=2)
    prompts = ["a red seven", "a 7 on black", "seven"]
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    found = [judge._gaps(images[i : i + 2], prompts[i : i + 2], [10 + i, 11 + i][: 3 - i]) for i in (0, 2)]
    instead = ["a red nine", "a nine on black", "nine"] if surrogate else [""] * 3
    for row, (image, prompt, other, gap) in enumerate(zip(images, prompts, instead, torch.cat(found), strict=True)):
        latents = family.encode(image[None], seeded(10 + row, "judge"))
        total = 0.0
        for draw in range(DRAWS):
            time = torch.tensor([(2 * draw + 1) * family.loss.num_terms // (2 * DRAWS)])
            noise = family.loss.sample_noise({"sample": latents}, seeded(10 + row, "judge", draw))
            errors = [
                family.loss(family.module, family.batch(latents, [Condition(text)]), time, noise).item()
                for text in (other, prompt)
            ]
            total += errors[0] - errors[1]
        assert abs(total) > 1e-4 and gap.item() == pytest.approx(total, abs=1e-5)


def test_it_judges_by_the_model_as_it_was(tiny_pipeline, concepts):
    pipeline = tiny_pipeline()
    judge = PreferenceJudge(get_family(pipeline), concepts, True, batch_size=4)
    images, prompts = torch.rand(4, 3, 16, 16) * 2 - 1, asking(["seven", "a red seven", "7", "a 7"])
    before = judge(images, prompts, None)[PREFERENCE]
    judge.freeze()
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.zero_()
    torch.testing.assert_close(judge(images, prompts, None)[PREFERENCE], before)


def test_beside_adapters_only_the_weights_under_them_are_copied(tiny_pipeline, concepts):
    family = get_family(tiny_pipeline())
    judge, module = PreferenceJudge(family, concepts, True, batch_size=4), family.module
    images, prompts = torch.rand(4, 3, 16, 16) * 2 - 1, ["seven", "a red seven", "7", "a 7"]
    before = judge._gaps(images, prompts, range(4))
    layers = family.adapted_layers("full", "attention")
    changed = {f"{name}.weight" for name in layers}
    judge.freeze(changed)
    live = dict(module.named_parameters())
    own = {name for name, weight in judge.family.module.named_parameters() if weight is not live[name]}
    assert own == changed
    for change in add_lora(module, layers, 2, 2, seed=0).values():
        torch.nn.init.normal_(change.up)
    fuse_lora(module)
    torch.testing.assert_close(judge._gaps(images, prompts, range(4)), before)
    judge.family = family
    assert not torch.allclose(judge._gaps(images, prompts, range(4)), before)
    assert judge(images, asking(["a nine"] * 4, "keeps"), None) == {}


def test_clip_chooses_between_the_two_names(tiny_tokenizer, tmp_path, concepts):
    clip = Clip.load(str(save_tiny_clip(tmp_path, tiny_tokenizer)))
    judge, images = ClipPreferenceJudge(clip, concepts), torch.rand(6, 3, 16, 16) * 2 - 1
    fits = zero_shot(clip, images, ["seven", "nine"])
    found = judge(images, asking(["seven"] * 6), None)[PREFERENCE]
    assert found.tolist() == [float(first > second) for first, second in fits.tolist()]
    assert judge.name.startswith("CLIP (") and judge.instead == "“nine”"


def test_where_other_adapters_are_fused_the_whole_model_is_copied(tiny_pipeline):
    options = ForgetConfig(concept="seven", lora_rank=2, train_scope="full", lora_targets="attention")
    alone = SimpleNamespace(options=options, family=get_family(tiny_pipeline()), adapters=[], merge=None)
    names = changed_names(alone)
    assert names and all(name.endswith(".weight") for name in names)
    for other in ({"adapters": ["one.safetensors"]}, {"merge": object()}):
        assert changed_names(SimpleNamespace(**vars(alone) | other)) is None
    for other in ({"lora_rank": None}, {"finish": "edit"}):
        assert changed_names(SimpleNamespace(**vars(alone) | {"options": replace(options, **other)})) is None
