"""The closed-form edit against the objective it minimises, row by row in float64, and what it does to a pipeline."""

import copy
import itertools
import time

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sa_diffusers.core.closed_form import ClosedFormEdit, closed_form_edit
from sa_diffusers.core.concepts import Concept, Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.families import get_family
from sa_diffusers.families.scopes import text_maps
from sa_diffusers.families.text_to_image.family import TextToImageFamily
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.methods.uce import concept_edits, edit_of_prompts
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline


WEIGHTS = {"erase_scale": 0.7, "preserve_scale": 0.3, "regularization": 0.2}


def unified_concept_edit(unet: nn.Module, edits, preserve=(), **weights) -> None:
    closed_form_edit(edits, preserve, **weights).apply(text_maps(unet))


def edit_prompts(family: TextToImageFamily, edits, *arguments, **options) -> None:
    found = edit_of_prompts(family, edits, *arguments, **options)
    family.edit(found)


@pytest.fixture
def family(tiny_pipeline) -> TextToImageFamily:
    return get_family(tiny_pipeline(), sampler="ddim")


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 8)


def projections(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies in float64 of the weights that should be edited, found by the parameters' names alone."""
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {name: p.detach().clone().double() for name, p in module.named_parameters() if name.endswith(ends)}


def slow_edit(weight, edits, preserve, erase_scale, preserve_scale, regularization):
    """The paper's Eq. 7 with the weights of the authors' code: one row at a time, and an inverse."""
    left = regularization * weight
    right = regularization * torch.eye(weight.shape[1], dtype=torch.float64)
    for concept, target in edits:
        for c, t in zip(concept.double(), target.double(), strict=True):
            left = left + erase_scale * torch.outer(weight @ t, c)
            right = right + erase_scale * torch.outer(c, c)
    for kept in preserve:
        for c in kept.double():
            left = left + preserve_scale * torch.outer(weight @ c, c)
            right = right + preserve_scale * torch.outer(c, c)
    return left @ torch.inverse(right)


@pytest.mark.parametrize(("count", "scale"), [(0, 0.1), (1, 1.0), (4, 0.25), (12, 0.1)])
def test_few_retained_texts_weigh_more_as_in_the_paper(count, scale):
    edits, preserve = [(rows(2), rows(2))], [rows(3) for _ in range(count)]
    found = closed_form_edit(edits, preserve).change
    assert_close(found, closed_form_edit(edits, preserve, preserve_scale=scale).change, rtol=0, atol=0)


def test_a_regularization_is_refused_where_rounding_would_move_what_has_nothing_to_do_with_the_edit():
    """Up to there the edit is the exact one, by Woodbury: a system that is as well-conditioned as the rows are."""
    torch.manual_seed(0)
    concept, target, kept = (2800 * torch.nn.functional.normalize(torch.randn(2, 64).double()) for _ in range(3))
    with pytest.raises(ValueError, match=r"1e-08 is lost in rounding .* pass 0\.0\d+ or more"):
        closed_form_edit([(concept, target)], [kept], preserve_scale=1, regularization=1e-8)
    found = closed_form_edit([(concept, target)], [kept], preserve_scale=1, regularization=2e-3)
    rows, wanted = torch.cat([concept, kept]), torch.cat([target - concept, torch.zeros(2, 64)])
    exact = wanted.T @ torch.linalg.solve(rows @ rows.T + 2e-3 * torch.eye(4), rows)
    assert_close(found.change, exact, rtol=0, atol=1e-6 * exact.norm().item())


def test_every_layer_equals_the_slow_closed_form(family):
    unet = family.module.double()
    before, others = projections(unet), {n: p.clone() for n, p in unet.state_dict().items()}
    edits, preserve = [(rows(3), rows(3)), (rows(1), rows(1))], [rows(4), rows(2)]
    unified_concept_edit(unet, edits, preserve, **WEIGHTS)
    after = projections(unet)
    assert len(after) == 8  # keys and values of the four cross-attentions
    for name, weight in before.items():
        assert_close(after[name], slow_edit(weight, edits, preserve, **WEIGHTS), rtol=1e-10, atol=1e-10)
        assert (after[name] - weight).abs().max() > 0.01
    for name, tensor in unet.state_dict().items():
        if name not in before:
            assert torch.equal(tensor, others[name]), name


def test_it_minimises_the_objective(family):
    """The same weights by least squares: the rows of the three terms, each times the root of its weight."""
    unet = family.module.double()
    name, weight = next(iter(projections(unet).items()))
    concept, target, kept = rows(5).double(), rows(5).double(), rows(3).double()
    unified_concept_edit(unet, [(concept, target)], [kept], **WEIGHTS)
    e, p, a = (value**0.5 for value in WEIGHTS.values())
    inputs = torch.cat([e * concept, p * kept, a * torch.eye(8, dtype=torch.float64)])
    outputs = torch.cat([e * target @ weight.T, p * kept @ weight.T, a * weight.T])
    assert_close(projections(unet)[name], torch.linalg.lstsq(inputs, outputs).solution.T, rtol=1e-9, atol=1e-9)


def test_limits(family):
    """Without regularisation the concept gets its target's keys and values, and what is preserved keeps its own."""
    unet = family.module.double()
    concept, target, kept = rows(2).double(), rows(2).double(), rows(3).double()
    before = projections(unet)
    unified_concept_edit(unet, [(concept, target)], [kept], preserve_scale=1.0, regularization=1e-9)
    for name, weight in projections(unet).items():
        assert_close(concept @ weight.T, target @ before[name].T, rtol=1e-6, atol=1e-6)
        assert_close(kept @ weight.T, kept @ before[name].T, rtol=1e-6, atol=1e-6)
    held = projections(unet)
    unified_concept_edit(unet, [(concept, target)], [kept], preserve_scale=1.0, regularization=1e12)
    for name, weight in projections(unet).items():
        assert_close(weight, held[name], rtol=1e-9, atol=1e-9)


def test_an_edit_to_itself_changes_nothing(family):
    before, concept = projections(family.module), rows(3)
    unified_concept_edit(family.module, [(concept, concept)], [rows(4)])
    assert_close(projections(family.module), before, rtol=0, atol=0)


def test_half_precision_weights_are_edited_in_float64(family):
    unet, half = family.module, copy.deepcopy(family.module).to(torch.bfloat16)
    edits = [(rows(3), rows(3))]
    expected = {n: slow_edit(w, edits, [], **WEIGHTS).bfloat16() for n, w in projections(half).items()}
    for module in (unet, half):
        unified_concept_edit(module, edits, **WEIGHTS)
    assert half.dtype == torch.bfloat16 and unet.dtype == torch.float32
    assert_close({n: w.bfloat16() for n, w in projections(half).items()}, expected, rtol=1e-2, atol=1e-4)


def last_position(family: TextToImageFamily, prompt: str) -> int:
    """Of the last word's token, from a padded tokenisation: one before the first end token."""
    tokenizer = family.pipeline.tokenizer
    ids = tokenizer(prompt, padding="max_length", truncation=True)["input_ids"]
    return ids.index(tokenizer.eos_token_id) - 1


@pytest.mark.parametrize("target", ["a red nine", "eight", ""])
def test_prompts_are_paired_from_their_last_word_on(family, target):
    """The authors' way, written out: position by position, as far as both prompts go."""
    concept, preserve = "a red seven", ["green", ""]
    embedded = {p: family.embed([p])["encoder_hidden_states"][0] for p in (concept, target, *preserve)}
    first, second = last_position(family, concept), last_position(family, target)
    assert first != second or target == "a red nine"  # the pairing matters
    offsets = range(12 - max(first, second))
    pairs = [(embedded[concept][[first + i]], embedded[target][[second + i]]) for i in offsets]
    kept = [embedded[p] for p in preserve]
    expected = {n: slow_edit(w, pairs, kept, **WEIGHTS).float() for n, w in projections(family.module).items()}
    edit_prompts(family, [(concept, target)], preserve, **WEIGHTS)
    actual = {name: weight.float() for name, weight in projections(family.module).items()}
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_edits_of_a_concept():
    concept = Concept(("seven", "7"), "two")
    expected = [("seven", "two"), ("7", "two"), ("a red seven", "a red two"), ("a red 7", "a red two")]
    assert concept_edits(Concepts([concept]), [["a red {}", "{}"]]) == expected
    for surrogate, kind in (("noise", "noise"), (".", "images")):
        with pytest.raises(ValueError, match="expected a prompt as surrogate"):
            concept_edits(Concepts([Concept(("seven",), surrogate, surrogate_kind=kind)]), [["a {}"]])


@pytest.mark.slow
def test_the_bundled_pipeline_draws_the_surrogate_for_the_concept():
    """A classifier reads three where seven was asked for, in a sentence that was not edited; others stay."""
    classifier = load_classifier(resolve("bundled/digits/classifier"))
    family = get_family(load_pipeline("bundled/digits/pipeline", None, None, "float32"))
    digits = classifier.config.attributes["digit"]
    others = [word for word in digits if word not in ("seven", "three")]

    def read(words: list[str]) -> list[str]:
        asked = [Condition(f"a {ink} {word} on black") for word in words for ink in ("red", "green")]
        images = family.decode(family.draw(asked, range(len(asked)), 2.5, 10))
        return [digits[index] for index in classifier.probabilities(images)["digit"].argmax(1)]

    assert read(["seven"] * 8).count("seven") >= 15
    templates = ["a photo of {}", "draw a {} on white", "the digit {}, please"]
    preserve = ["", *others, "three", *(t.replace("{}", word) for t in templates for word in [*others, "three"])]
    edit_prompts(family, concept_edits(Concepts([Concept(("seven", "7"), "three")]), [templates]), preserve)
    drawn = read(["seven"] * 8)
    assert drawn.count("seven") <= 1 and drawn.count("three") >= 12, drawn
    kept = [word == asked for word, asked in zip(read(others), [o for o in others for _ in range(2)], strict=True)]
    assert sum(kept) >= len(kept) - 2, kept


def test_an_edit_is_loaded_as_it_was_saved(tmp_path):
    edit = closed_form_edit([(rows(2), rows(2))])
    edit.save(tmp_path / "edit.safetensors")
    loaded = ClosedFormEdit.load(tmp_path / "edit.safetensors")
    assert torch.equal(loaded.change, edit.change) and torch.equal(loaded.root, edit.root)


def test_the_edit_is_saved_with_the_pipeline(family, tmp_path):
    from diffusers import StableDiffusionPipeline

    edit_prompts(family, [("seven", "two")])
    family.pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert_close(projections(loaded.unet), projections(family.module), rtol=0, atol=0)


@pytest.mark.parametrize(
    "edits, preserve, options, message",
    [
        ([], [], {}, "one edit or more"),
        ([(rows(2), rows(3))], [], {}, "got 3 for 2"),
        ([(torch.zeros(2, 7), torch.zeros(2, 7))], [], {}, r"expected embeddings \[K, 8\]"),
        ([(rows(2), rows(2))], [torch.zeros(1, 2, 8)], {}, r"got \[1, 2, 8\]"),
        ([(rows(2), torch.full((2, 8), torch.nan))], [], {}, "finite"),
        ([(rows(2), rows(2))], [], {"regularization": 0.0}, "regularization > 0"),
        ([(rows(2), rows(2))], [], {"regularization": 1e-30}, "is lost in rounding .* pass .* or more"),
        ([(rows(2), rows(2))], [], {"erase_scale": -1.0}, "erase_scale > 0"),
        ([(rows(2), rows(2))], [], {"preserve_scale": -0.1}, "preserve_scale >= 0"),
    ],
)
def test_wrong_edits_are_refused_and_change_nothing(family, edits, preserve, options, message):
    before = projections(family.module)
    with pytest.raises(ValueError, match=message):
        unified_concept_edit(family.module, edits, preserve, **options)
    assert_close(projections(family.module), before, rtol=0, atol=0)


def test_wrong_prompts_models_and_adapters_are_refused(family, tiny_tokenizer):
    with pytest.raises(ValueError, match="empty prompt"):
        edit_prompts(family, [("", "two")])
    vae = ConditionalVAE(image_size=4, hidden_sizes=(8,), latent_dim=2, num_classes=2)
    with pytest.raises(ValueError, match="a closed-form edit needs a model that makes keys and values of a text"):
        edit_prompts(get_family(ConditionalVAEPipeline(vae)), [("seven", "two")])
    with pytest.raises(ValueError, match="no cross-attention"):
        unified_concept_edit(nn.Linear(8, 8), [(rows(2), rows(2))])
    from peft import LoraConfig

    family.module.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="fuse or unload"):
        unified_concept_edit(family.module, [(rows(2), rows(2))])


def test_the_layers_are_found_by_path_component():
    block = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(8, 8), "to_v": nn.Linear(8, 8)})})
    model = nn.ModuleDict(
        {"0": block, "attn1": copy.deepcopy(block["attn2"]), "my_attn2": copy.deepcopy(block["attn2"])}
    )
    assert set(text_maps(model)) == {"0.attn2.to_k", "0.attn2.to_v"}


@pytest.mark.slow
def test_a_model_of_real_size_takes_seconds():
    """The 32 layers of Stable Diffusion 1.x, three phrasings and 100 preserved prompts of 77 tokens of 768."""
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    layers = itertools.product(range(len(widths)), ("to_k", "to_v"))
    unet = nn.ModuleDict({str(i): nn.ModuleDict({"attn2": nn.ModuleDict()}) for i in range(len(widths))})
    for index, kind in layers:
        unet[str(index)]["attn2"][kind] = nn.Linear(768, widths[index], bias=False)
    edits = [(torch.randn(75, 768), torch.randn(75, 768)) for _ in range(3)]
    preserve = [torch.randn(77, 768) for _ in range(100)]
    start = time.process_time()
    unified_concept_edit(unet, edits, preserve)
    seconds = time.process_time() - start
    print(f"edited in {seconds:.1f} s of CPU")
    assert seconds < 20
