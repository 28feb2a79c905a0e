"""Attacks on the prompt of a text-to-image model: exact fillings, exact gradients, and what they leave untouched."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers.attacks import AttackSettings, FoundEmbedding, FoundText, attack_embedding, attack_text, draw_found
from sa_diffusers.attacks.relearning import FoundAdapter, relearn
from sa_diffusers.attacks.searches import Search, Vocabulary
from sa_diffusers.attacks.target_loss import TargetLoss, frozen_model
from sa_diffusers.attacks.weights import change_weights
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families import get_family
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder
from sa_diffusers.io.artifacts import hash_tensors
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline


TEMPLATES = ["a {}", "a red {} on black", "{}, {} on white"]
WORDS = ("seven", "7")
SETTINGS = AttackSettings(steps=6, batch_size=4, keep_every=2)


@pytest.fixture(autouse=True)
def few_fixed(monkeypatch):
    """Candidates are compared on fewer (latent, noise, timestep)."""
    monkeypatch.setattr("sa_diffusers.attacks.target_loss.NUM_FIXED", 16)


@pytest.fixture
def family(tiny_pipeline):
    return get_family(tiny_pipeline())


@pytest.fixture
def latents():
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def rows_of(family, word: str) -> torch.Tensor:
    """The table's rows of a word's tokens."""
    ids = family.pipeline.tokenizer(word, add_special_tokens=False).input_ids
    return family.pipeline.text_encoder.get_input_embeddings().weight.detach()[ids]


def state(family) -> list:
    """What an attack must leave as it was: weights, gradients, modes, and what hangs on the modules."""
    found = []
    for module in (family.module, family.pipeline.text_encoder):
        found += [hash_tensors(module.state_dict()), [part.training for part in module.modules()]]
        found += [[(p.requires_grad, p.grad) for p in module.parameters()]]
        found += [[len(part._forward_hooks) for part in module.modules()], "forward" in module.__dict__]
    return found


@pytest.mark.parametrize("word", ["seven", "7", "red seven", "wo"])
def test_a_words_own_rows_give_its_own_embeddings(family, word):
    vectors = rows_of(family, word)
    encoder = TemplateEncoder(family, TEMPLATES, len(vectors))
    expected = family.embed([template.replace("{}", word) for template in TEMPLATES])
    assert_close(encoder(vectors, range(3)), expected, rtol=0, atol=1e-6)
    moved = encoder(vectors.roll(1, dims=1), [0])
    tokens = "encoder_hidden_states"
    assert not torch.allclose(moved[tokens], expected[tokens][:1], atol=1e-3)


def test_every_vector_stands_in_its_own_place(family):
    first, second = rows_of(family, "green seven"), rows_of(family, "seven green")
    assert len(first) == 2 and not torch.equal(first, second)
    encoder = TemplateEncoder(family, TEMPLATES, 2)
    assert_close(encoder(second, [2]), family.embed(["seven green, seven green on white"]))


def finite_differences(family, latents, values: torch.Tensor, words: str, step: int, along: list) -> torch.Tensor:
    """Slopes, by central differences, of a loop that draws, fills, noises and denoises by itself."""
    table = family.pipeline.text_encoder.get_input_embeddings().weight
    ids = family.pipeline.tokenizer(words, add_special_tokens=False).input_ids
    generator = seeded(SETTINGS.seed, "prompt attack", step)
    chosen = torch.randint(len(latents), (4,), generator=generator)
    rows = torch.randint(len(TEMPLATES), (4,), generator=generator)
    terms = [int((place + torch.rand(1, generator=generator)) * 20 / 4) for place in range(4)]  # of 20 timesteps
    noises = torch.randn((4, *latents.shape[1:]), generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def value(moved: torch.Tensor) -> float:
        kept, total = table.clone(), 0.0
        table[ids] = moved  # the words' rows are replaced in the table itself, and templates read as ordinary text
        for index, row, term, noise in zip(chosen, rows, terms, noises, strict=True):
            embedded = family.pipeline.encode_prompt([TEMPLATES[row].replace("{}", words)], "cpu", 1, False)[0]
            alpha = family.loss.alphas_cumprod.double()[term]
            noisy = alpha.sqrt() * latents[index] + (1 - alpha).sqrt() * noise
            predicted = family.module(noisy[None], term, encoder_hidden_states=embedded).sample[0]
            total += (predicted - noise).square().mean().item() / 4
        table.copy_(kept)
        return total

    width = 1e-5
    return torch.tensor(
        [(value(values + width * d) - value(values - width * d)) / (2 * width) for d in along]
    ).double()


def test_the_gradient_is_that_of_the_loss_in_float64(family, latents):
    for part in (family.module, family.pipeline.text_encoder):
        part.double()
    vectors = (rows_of(family, "green seven") + 0.01).requires_grad_()
    assert vectors.shape == (2, 8)
    loss = TargetLoss(family, TemplateEncoder(family, TEMPLATES, 2), latents.double(), SETTINGS)
    with frozen_model(family):
        (gradient,) = torch.autograd.grad(loss.at_step(vectors, 3), vectors)
    along = list(torch.randn(4, *vectors.shape).double())  # directions that no wrong entry of a gradient escapes
    expected = finite_differences(family, latents.double(), vectors.detach(), "green seven", 3, along)
    assert expected.abs().min() > 0
    found = torch.stack([(gradient * d).sum() for d in along])
    assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("attack", [attack_embedding, attack_text])
def test_the_model_is_left_as_it_was_and_the_seed_decides_the_rest(family, latents, attack):
    family.module.train()
    next(family.module.parameters()).requires_grad_(False)
    family.pipeline.text_encoder.eval()
    before = state(family)
    words = ["green seven"]
    with torch.no_grad():  # as where pictures are drawn
        first = attack(family, latents, TEMPLATES, words, SETTINGS)
    assert str(state(family)) == str(before)
    torch.manual_seed(5)
    again = attack(family, latents, TEMPLATES, words, SETTINGS)
    other = attack(family, latents, TEMPLATES, words, replace(SETTINGS, seed=1, steps=1))
    key = "vectors" if attack is attack_embedding else "token_ids"
    assert_close(getattr(first, key), getattr(again, key), rtol=0, atol=0)
    assert first.losses == again.losses and first.losses[:2] != other.losses
    assert len(first.losses) == 4  # at 0, 2, 4, 6


def test_the_embedding_attack_goes_down_from_where_it_starts_and_keeps_its_best(family, latents):
    settings = replace(SETTINGS, steps=16, learning_rate=0.3, keep_every=8, num_tokens=3)
    found = attack_embedding(family, latents, TEMPLATES, WORDS, settings)
    encoder = TemplateEncoder(family, TEMPLATES, 3)
    own = rows_of(family, "seven")
    start = own[[k % len(own) for k in range(3)]]
    loss = TargetLoss(family, encoder, latents, SETTINGS)
    assert found.losses[0] == pytest.approx(loss.fixed(start))
    assert min(found.losses) == pytest.approx(loss.fixed(found.vectors))
    assert min(found.losses) < found.losses[0]
    wild = attack_embedding(family, latents, TEMPLATES, WORDS, replace(settings, learning_rate=1e4, steps=8))
    assert wild.losses[0] <= wild.losses[1] and torch.equal(wild.vectors, start)


def test_it_computes_in_the_precision_of_the_family(tiny_pipeline, latents):
    founds = []
    for dtype in (None, torch.bfloat16):
        family = get_family(tiny_pipeline(), compute_dtype=dtype)
        founds.append(attack_embedding(family, latents, TEMPLATES, WORDS, SETTINGS))
        assert founds[-1].vectors.dtype == torch.float32
    exact, rounded = founds
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=0.02)


def test_the_start_may_be_another_word(family, latents):
    loss = TargetLoss(family, TemplateEncoder(family, TEMPLATES, 1), latents, SETTINGS)
    expected = [loss.fixed(rows_of(family, word)) for word in ("nine", "seven")]
    for attack in (attack_embedding, attack_text):
        # Two words for the concept, which one token cannot be: the text attack does not try them.
        settings = replace(SETTINGS, steps=1, keep_every=1, initial="nine")
        found = attack(family, latents, TEMPLATES, ["green seven"], settings)
        assert found.losses[0] == pytest.approx(expected[0])
        assert found.losses[0] != pytest.approx(expected[1])


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_found_text_is_what_its_tokens_say(family, latents, num_tokens):
    tokenizer = family.pipeline.tokenizer
    settings = replace(SETTINGS, num_tokens=num_tokens, learning_rate=1.0, steps=4)
    found = attack_text(family, latents, TEMPLATES, WORDS, settings)
    assert len(found.token_ids) == num_tokens
    assert tokenizer(found.text, add_special_tokens=False).input_ids == found.token_ids
    # And so it does in the templates: vectors in their place say the same.
    rows = family.pipeline.text_encoder.get_input_embeddings().weight.detach()[found.token_ids]
    by_row = TemplateEncoder(family, TEMPLATES, num_tokens)(rows, range(3))
    assert_close(family.embed([template.replace("{}", found.text) for template in TEMPLATES]), by_row)
    loss = TargetLoss(family, TemplateEncoder(family, TEMPLATES, num_tokens), latents, settings)
    assert loss.fixed(rows) == pytest.approx(found.losses[-1])


@pytest.mark.slow
def test_the_text_attack_finds_the_best_single_token(family, latents):
    """Against trying every word: with a table this small, steps enough come by the best of them."""
    settings = replace(SETTINGS, steps=80, learning_rate=2.0)
    encoder = TemplateEncoder(family, TEMPLATES, 1)
    vocabulary, loss = Vocabulary(encoder), TargetLoss(family, encoder, latents, settings)
    lowest = min(loss.fixed(encoder.table[[i]]) for i in vocabulary.words.tolist())
    start = loss.fixed(encoder.table[vocabulary.words[:1]])
    found = attack_text(family, latents, TEMPLATES, ["green seven"], settings)
    assert found.losses[-1] <= lowest + 1e-6 < start


def test_a_candidate_is_given_up_as_soon_as_it_is_behind(family, latents, monkeypatch):
    monkeypatch.setattr("sa_diffusers.attacks.target_loss.NUM_FIXED", 48)
    loss = TargetLoss(family, TemplateEncoder(family, TEMPLATES, 1), latents, SETTINGS)
    word = rows_of(family, "nine")
    parts = loss.fixed_parts(word)
    assert len(parts) == 3 and loss.fixed(word) == pytest.approx(sum(parts) / 3) and len(set(parts)) == 3
    assert loss.fixed_parts(word, [part + 1e-3 for part in parts]) == parts
    assert loss.fixed_parts(word, [parts[0] - 1e-3, 9, 9]) == parts[:1]
    assert loss.fixed_parts(word, [parts[0] + 1e-3, parts[1] - 2e-3, 9]) == parts[:2]


def test_the_search_keeps_the_lowest_of_what_it_was_shown(family, latents):
    encoder = TemplateEncoder(family, TEMPLATES, 1)
    loss, vocabulary = TargetLoss(family, encoder, latents, SETTINGS), Vocabulary(encoder, ["red"])
    search, shown = Search(loss, vocabulary), {}
    for word in ("nine", "red", "seven", "a", "nine", "black", "digit"):
        (index,) = encoder.tokens(word)
        allowed = word != "red" and index not in shown
        if allowed:
            shown[index] = loss.fixed(encoder.table[[index]])
        assert search.consider([index]) == (allowed and shown[index] == min(shown.values()))
        if shown:
            assert search.best == [min(shown, key=shown.__getitem__)]
            assert fmean(search.lowest) == pytest.approx(min(shown.values()))


def test_exchanges_are_what_the_gradient_promises(family, latents, monkeypatch):
    monkeypatch.setattr("sa_diffusers.attacks.searches.NUM_PROMISING", 3)
    monkeypatch.setattr("sa_diffusers.attacks.searches.NUM_EXCHANGES", 40)
    encoder = TemplateEncoder(family, TEMPLATES, 2)
    vocabulary = Vocabulary(encoder)
    search = Search(TargetLoss(family, encoder, latents, SETTINGS), vocabulary)
    ids, gradient = vocabulary.words[:2].tolist(), torch.randn(2, 8)
    found = {tuple(other) for other in search.exchanges(ids, gradient, torch.Generator().manual_seed(0))}
    expected = set()
    for place in range(2):
        change = {
            w: float(gradient[place] @ (encoder.table[w] - encoder.table[ids[place]]))
            for w in vocabulary.words.tolist()
        }
        for word in sorted(change, key=change.__getitem__)[:3]:
            expected.add(tuple([word, ids[1]] if place == 0 else [ids[0], word]))
    assert found == expected
    search.consider(next(iter(found)))
    again = {tuple(other) for other in search.exchanges(ids, gradient, torch.Generator().manual_seed(0))}
    assert len(again) == len(found) - 1


def test_forbidden_words_never_come(family, latents):
    encoder = TemplateEncoder(family, TEMPLATES, 2)
    free, bound = Vocabulary(encoder), Vocabulary(encoder, ["SE", "7"])
    texts = [bound.text([i]) for i in bound.tokens.tolist()]
    assert not [text for text in texts if "se" in text.lower() or "7" in text]
    assert [free.text([i]) for i in free.tokens.tolist() if "se" in free.text([i])]
    s, e = (family.pipeline.tokenizer.convert_tokens_to_ids(token) for token in ("s", "e</w>"))
    assert {s, e} <= set(bound.tokens.tolist()) and not bound.readable([s, e])
    settings = replace(SETTINGS, initial="seven", steps=3)  # it starts from the word itself
    assert "se" not in attack_text(family, latents, TEMPLATES, WORDS, settings, ["se", "7"]).text
    letters = [chr(code) for code in range(33, 0x180)]
    with pytest.raises(ValueError, match="no token of the tokenizer is a word without"):
        Vocabulary(encoder, letters)


def test_of_a_list_only_words_that_are_one_token_come(family, latents, monkeypatch):
    monkeypatch.setattr("sa_diffusers.attacks.searches.FEWEST_LISTED", 2)
    encoder = TemplateEncoder(family, TEMPLATES, 2)
    listed = ["Red", "nine", "seven", "incomprehensibilities", "green"]
    vocabulary = Vocabulary(encoder, ["seven"], listed)
    assert {vocabulary.text([i]) for i in vocabulary.tokens.tolist()} == {"red", "nine", "green"}
    ids = {word: encoder.tokens(word)[0] for word in ("red", "black", "green")}
    assert vocabulary.readable([ids["red"], ids["green"]]) and not vocabulary.readable([ids["red"], ids["black"]])
    found = attack_text(family, latents, TEMPLATES, ["black"], replace(SETTINGS, num_tokens=2), ["seven"], listed)
    assert set(found.text.split()) <= {"red", "nine", "green"} and len(found.token_ids) == 2
    with pytest.raises(ValueError, match="expected 2 or more words of the list that are one token each, got 1"):
        Vocabulary(encoder, ["seven"], ["seven", "red"])


def test_what_does_not_read_as_its_tokens_gives_way_to_whole_words(family):
    encoder = TemplateEncoder(family, TEMPLATES, 2)
    vocabulary = Vocabulary(encoder)
    ids = family.pipeline.tokenizer.convert_tokens_to_ids(["s", "e</w>"])
    own = family.pipeline.tokenizer("se", add_special_tokens=False).input_ids
    assert vocabulary.readable(ids) == (own == ids)
    inner = family.pipeline.tokenizer.convert_tokens_to_ids(["a", "b"])  # the text "ab" has its own end
    assert not vocabulary.readable(inner)
    projected = vocabulary.project(encoder.table[inner])
    assert set(projected) <= set(vocabulary.words.tolist()) and vocabulary.readable(projected)
    beside_comma = TemplateEncoder(family, ["a {}, red"], 1)
    (mark,) = encoder.tokens("!")
    assert not Vocabulary(beside_comma).readable([mark])  # "!," is one word
    assert Vocabulary(TemplateEncoder(family, ["a {} red"], 1)).readable([mark])
    words = family.pipeline.tokenizer("red seven", add_special_tokens=False).input_ids
    assert vocabulary.project(encoder.table[words] + 1e-4) == words


@pytest.mark.parametrize("kind", ["embedding", "text"])
def test_drawing_what_is_the_word_is_drawing_the_word(family, kind, tmp_path):
    rows = rows_of(family, "seven")
    ids = family.pipeline.tokenizer("seven", add_special_tokens=False).input_ids
    found = FoundEmbedding(rows, [0.5]) if kind == "embedding" else FoundText("seven", ids, [0.5])
    found.save(tmp_path / "found")
    found = type(found).load(tmp_path / "found")
    assert found.losses == [0.5]
    drawn = draw_found(family, found, TEMPLATES, [3, 4, 5, 6, 7], 2.0, 3, batch_size=2)
    prompts = ["a seven", "a red seven on black", "seven, seven on white", "a seven", "a red seven on black"]
    assert_close(drawn, family.draw(list(map(Condition, prompts)), [3, 4, 5, 6, 7], 2.0, 3), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(drawn, family.draw([Condition("a nine")] * 5, [3, 4, 5, 6, 7], 2.0, 3), atol=1e-3)


def test_wrong_input_is_refused(family, latents, tiny_pipeline):
    def attack(latents=latents, templates=TEMPLATES, words=WORDS, family=family, **options):
        return attack_embedding(family, latents, templates, words, replace(SETTINGS, **options))

    with pytest.raises(ValueError, match="must hold {} .*: 'a seven'"):
        attack(templates=["a {}", "a seven"])
    with pytest.raises(ValueError, match="at least one template"):
        attack(templates=[])
    with pytest.raises(ValueError, match="a word of its own, got 'a {}s'"):
        attack(templates=["a {}s"])
    with pytest.raises(ValueError, match="the text encoder reads 12"):
        attack(num_tokens=10)
    with pytest.raises(ValueError, match=r"target latents \[N, 4, 8, 8\], at least one, got \[5, 4, 8, 4\]"):
        attack(latents[..., :4])
    with pytest.raises(ValueError, match="at least one"):
        attack(latents[:0])
    with pytest.raises(ValueError, match="expected words for the concept"):
        attack(words=[" "])
    with pytest.raises(FloatingPointError, match="step 0 is not finite"):
        attack(latents * float("nan"))
    for name in ("num_tokens", "steps", "batch_size", "keep_every"):
        with pytest.raises(ValueError, match=f"{name} >= 1, got 0"):
            replace(SETTINGS, **{name: 0})
    with pytest.raises(ValueError, match="learning_rate > 0"):
        replace(SETTINGS, learning_rate=0.0)
    with pytest.raises(ValueError, match=r"expected vectors \[K, 8\], got \[1, 9\]"):
        draw_found(family, FoundEmbedding(torch.zeros(1, 9), []), TEMPLATES, [0], 1.0, 2)
    with pytest.raises(ValueError, match="got .'a seven'."):
        draw_found(family, FoundText("nine", [0], []), ["a seven"], [0], 1.0, 2)
    other = get_family(ConditionalVAEPipeline(ConditionalVAE(image_size=8)))
    with pytest.raises(TypeError, match="expected a text-to-image model.* got a ConditionalVAEFamily"):
        attack(family=other)


def test_what_relearning_says_of_a_name_of_several_tokens_is_of_all_of_them(family, latents):
    said = family, latents, ["a {}"], ["red seven"], replace(SETTINGS, steps=1, relearn_pictures=3)
    assert relearn(*said).losses[0] == pytest.approx(change_weights(*said, precision="int8").losses[0], rel=1e-6)
    assert relearn(*said).losses[0] != pytest.approx(relearn(*said[:3], ["red"], said[4]).losses[0], rel=1e-6)


def test_relearning_lowers_the_loss_of_the_concepts_word_and_leaves_the_model_as_it_was(family, latents, tmp_path):
    settings = replace(SETTINGS, steps=6, relearn_pictures=3, relearn_rate=3e-2)
    before = state(family)
    found = relearn(family, latents, ["a {}"], ["seven"], settings)
    assert str(state(family)) == str(before) and not hasattr(family.module, "peft_config")
    assert found.losses[1] < found.losses[0]
    loss = TargetLoss(family, TemplateEncoder(family, ["a {}"], 1), latents, settings)
    assert found.losses[0] == pytest.approx(loss.fixed(rows_of(family, "seven")))
    found.save(tmp_path / "found.safetensors")
    loaded = FoundAdapter.load(tmp_path / "found.safetensors")
    assert_close(loaded.tensors, found.tensors, rtol=0, atol=0)
    with loaded.applied(family):
        assert found.losses[1] == pytest.approx(loss.fixed(rows_of(family, "seven")))
    drawn = draw_found(family, loaded, ["a {}"], [1, 2], 2.0, 2)
    plain = draw_found(family, FoundText("seven", [], []), ["a {}"], [1, 2], 2.0, 2)
    assert str(state(family)) == str(before) and not torch.equal(drawn, plain)
    fewer = relearn(family, latents[:3], ["a {}"], ["seven"], settings)  # the others were never trained on
    assert_close(fewer.tensors, found.tensors, rtol=0, atol=0)


def test_relearning_keeps_copies_on_the_way_and_trains_on_something_else(family, latents, tmp_path, monkeypatch):
    settings = replace(SETTINGS, steps=5, relearn_pictures=3, relearn_rate=3e-2)
    plain = relearn(family, latents, ["a {}"], ["seven"], settings)
    found = relearn(family, latents, ["a {}"], ["seven"], settings, every=2)
    assert_close(found.tensors, plain.tensors, rtol=0, atol=0)  # to look changes nothing
    found.save(tmp_path / "found.safetensors")
    loaded = FoundAdapter.load(tmp_path / "found.safetensors")
    assert list(loaded.earlier) == [2, 4] and loaded.tensors.keys() == plain.tensors.keys()
    shorter = relearn(family, latents, ["a {}"], ["seven"], replace(settings, steps=4))
    assert_close(loaded.after(4).tensors, shorter.tensors, rtol=0, atol=0)
    assert not torch.equal(*(next(iter(one.values())) for one in loaded.earlier.values()))
    # Of its own pictures under the concept's own words it is the same training, whatever else the targets are.
    others = latents[:3], ["a seven"] * 3
    same = relearn(family, latents[3:], ["a {}"], ["seven"], settings, others=others)
    assert_close(same.tensors, plain.tensors, rtol=0, atol=0)
    asked, batch = [], family.batch
    monkeypatch.setattr(family, "batch", lambda *given: asked.append(given) or batch(*given))
    prompts = ["a nine", "a red nine", "a green nine"]
    other = relearn(family, latents, ["a {}"], ["seven"], settings, others=(latents[:3], prompts))
    for pictures, conditions in asked:
        for picture, condition in zip(pictures, conditions, strict=True):
            assert torch.equal(picture, latents[prompts.index(condition.text)])  # each under the prompt that drew it
    assert not torch.equal(*(next(iter(one.tensors.values())) for one in (other, plain)))
