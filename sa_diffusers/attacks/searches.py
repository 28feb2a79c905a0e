"""Bring a concept back by a word that does not exist, or by words that anybody can type, found by their gradient.

On the denoising loss of target pictures. New vectors in the text encoder's token space are textual inversion (Gal et
al. 2023) on a model that forgot: concept inversion (Pham et al. 2023). For typed words, as in UnlearnDiffAtk (Zhang et
al. 2024), two searches share one gradient: PEZ (Wen et al. 2023), with vectors that move freely and of which each
forward pass sees the nearest rows of the token table; and exchanges of single tokens that the gradient promises to be
better, each tried out (as in GCG, Zou et al. 2023), since PEZ's vectors stay near the tokens they began with.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import Generator, Tensor

from sa_diffusers.attacks.found import FoundEmbedding, FoundText
from sa_diffusers.attacks.target_loss import AttackSettings, TargetLoss, frozen_model, prepare
from sa_diffusers.core.concepts import fold
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families import Family
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder
from sa_diffusers.io.processes import progress_bar


NUM_EXCHANGES = 2  # tried at each step
NUM_PROMISING = 256  # of each place
FEWEST_LISTED = 8  # words of a list


def attack_embedding(
    family: Family, latents: Tensor, templates: Sequence[str], concept_words: Sequence[str], settings: AttackSettings
) -> FoundEmbedding:
    """Minimise the model's denoising loss on targets over K vectors in the concept's place. Its weights stay.

    Args:
        latents: targets [N, C, h, w], pictures of the concept by a model that knows it, in this model's latent space.
        templates: prompts with {} in the concept's place.
        concept_words: such as ("seven", "7").
        settings: `initial` are the words to start from, by default the first of `concept_words`. The tokens of fewer
            than K are repeated, those beyond K are left out.

    Raises:
        TypeError: no text-to-image model.
        ValueError: latents of another shape, no words, or templates that cannot hold the vectors.
        FloatingPointError: a loss that is not finite.
    """
    loss = prepare(family, latents, templates, concept_words, settings)
    vectors = loss.encoder.start(settings.initial or concept_words[0]).float().requires_grad_()
    optimizer = settings.optimizer(vectors, loss.encoder.scale)
    losses: list[float] = []
    with frozen_model(family):
        for step in progress_bar(range(settings.steps + 1), "attack: token embedding", "steps"):
            if step % settings.keep_every == 0 or step == settings.steps:
                losses.append(loss.fixed(vectors))
                if losses[-1] == min(losses):
                    best = vectors.detach().cpu().clone()
            if step < settings.steps:
                (vectors.grad,) = torch.autograd.grad(loss.at_step(vectors, step), [vectors])
                optimizer.step()
    return FoundEmbedding(best, losses)


class Vocabulary:
    """The tokens that an attack may use, and how vectors become a text of them. Raises ValueError: none is left.

    Args:
        encoder: of the templates that the text must keep its tokens in.
        forbidden: words or phrases that no token and no text may contain, in any case, not even within another word.
        listed: words that alone may be used, where they are one token each; None: any.
    """

    def __init__(self, encoder: TemplateEncoder, forbidden: Sequence[str] = (), listed: Sequence[str] | None = None):
        self.encoder, self.tokenizer, self.table = encoder, encoder.tokenizer, encoder.table
        self.forbidden = [fold(phrase) for phrase in forbidden if fold(phrase)]
        special = set(self.tokenizer.all_special_ids)
        shared = encoder.shared.ge(0).all(0)[: len(self.tokenizer)].nonzero()[:, 0].tolist()
        texts = {i: self.text([i]) for i in shared if i not in special}
        texts = {i: text for i, text in texts.items() if text.isprintable() and not self._is_forbidden(text)}
        # A token at a word's end reads as itself wherever it stands between spaces; others join their neighbours.
        words = [i for i, text in texts.items() if text.isalnum()]
        read = encoder.readers[0].single([texts[i] for i in words]) if words else []
        words = [i for i, one in zip(words, read, strict=True) if one == i]
        if not words:
            names = ", ".join(self.forbidden)
            raise ValueError(
                "no token of the tokenizer is a word" + (f" without {names}; forbid less" if names else "")
            )
        if listed is not None:
            words = [i for i in words if fold(texts[i]) in set(map(fold, listed))]
            texts = {i: texts[i] for i in words}
            if len(words) < FEWEST_LISTED:
                raise ValueError(
                    f"expected {FEWEST_LISTED} or more words of the list that are one token each, got {len(words)}; "
                    "pass another --word_list"
                )
        self.words, self.tokens = (torch.tensor(ids, device=encoder.device) for ids in (words, list(texts)))
        self._listed = None if listed is None else set(words)
        self._readable: dict[tuple[int, ...], bool] = {}

    def text(self, token_ids: Sequence[int]) -> str:
        return self.encoder.text(token_ids)

    def readable(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens' text may be used, and reads as them, alone and in every template."""
        key = tuple(token_ids)
        if key not in self._readable:
            text = self.text(key)
            self._readable[key] = (
                not self._is_forbidden(text)
                and (self._listed is None or self._listed.issuperset(key))
                and self.encoder.tokens(text) == list(key)
                and self.encoder.reads_as(text, key)
            )
        return self._readable[key]

    def draw(self, settings: AttackSettings) -> list[int]:
        """K whole words at random."""
        generator = seeded(settings.seed, "discrete prompt")
        chosen = torch.randint(len(self.words), (settings.num_tokens,), generator=generator)
        return self.words[chosen.to(self.words.device)].tolist()

    def project(self, vectors: Tensor) -> list[int]:
        """The tokens nearest to vectors [K, D]; where their text does not read as them, the nearest whole words."""
        nearest = self._nearest(vectors, self.tokens)
        return nearest if self.readable(nearest) else self._nearest(vectors, self.words)

    def _nearest(self, vectors: Tensor, among: Tensor) -> list[int]:
        return among[torch.cdist(vectors.float(), self.table[among].float()).argmin(1)].tolist()

    def _is_forbidden(self, text: str) -> bool:
        return any(phrase in fold(text) for phrase in self.forbidden)


class Search:
    """The best text so far of a vocabulary, by the loss on the fixed set of targets, within `frozen_model`."""

    def __init__(self, loss: TargetLoss, vocabulary: Vocabulary):
        self.loss, self.vocabulary = loss, vocabulary
        self.best: list[int] | None = None
        self.lowest: list[float] = []  # its parts
        self._tried: set[tuple[int, ...]] = set()

    def consider(self, token_ids: Sequence[int]) -> bool:
        """Compare tokens with the best, once; whether they are better."""
        if tuple(token_ids) in self._tried:
            return False
        self._tried.add(tuple(token_ids))
        if not self.vocabulary.readable(token_ids):
            return False
        parts = self.loss.fixed_parts(self.vocabulary.table[list(token_ids)], self.lowest)
        if self.best is not None and (len(parts) < len(self.lowest) or sum(parts) >= sum(self.lowest)):
            return False
        self.best, self.lowest = list(token_ids), parts
        return True

    def exchanges(self, token_ids: list[int], gradient: Tensor, generator: Generator) -> Iterator[list[int]]:
        """NUM_EXCHANGES times one token exchanged for a whole word: at random, one not tried yet, among the
        NUM_PROMISING that lower the loss most if it went on as its gradient [K, D] at the tokens says."""
        words, table = self.vocabulary.words, self.vocabulary.table
        promised = gradient.float() @ table[words].float().T  # [K, words]; the token's own place is the same for all
        promising = words[promised.argsort(1)[:, :NUM_PROMISING]].tolist()
        for place in torch.randint(len(token_ids), (NUM_EXCHANGES,), generator=generator).tolist():
            candidates = [[*token_ids[:place], word, *token_ids[place + 1 :]] for word in promising[place]]
            candidates = [ids for ids in candidates if tuple(ids) not in self._tried]
            if candidates:
                yield candidates[int(torch.randint(len(candidates), (1,), generator=generator))]


def attack_text(
    family: Family,
    latents: Tensor,
    templates: Sequence[str],
    concept_words: Sequence[str],
    settings: AttackSettings,
    forbidden: Sequence[str] = (),
    listed: Sequence[str] | None = None,
) -> FoundText:
    """Minimise the model's denoising loss on targets over K tokens in the concept's place. Its weights stay.

    Args:
        family, latents, templates: see `attack_embedding`.
        concept_words: also tried as they are, where they come to K tokens and are not forbidden.
        settings: `initial` are the words to start from; None: K whole words at random, so that other seeds start
            elsewhere.
        forbidden, listed: see `Vocabulary`.

    Raises:
        TypeError, ValueError, FloatingPointError: as `attack_embedding` and `Vocabulary`; or no text was found.
    """
    loss = prepare(family, latents, templates, concept_words, settings)
    encoder, vocabulary = loss.encoder, Vocabulary(loss.encoder, forbidden, listed)
    table = vocabulary.table.float()
    vectors = table[vocabulary.draw(settings)] if settings.initial is None else encoder.start(settings.initial).float()
    optimizer = settings.optimizer(vectors, encoder.scale)
    search = Search(loss, vocabulary)
    losses: list[float] = []
    with frozen_model(family):
        for ids in map(encoder.tokens, concept_words):
            if len(ids) == settings.num_tokens:
                search.consider(ids)
        for step in progress_bar(range(settings.steps + 1), "attack: discrete prompt", "steps"):
            ids = vocabulary.project(vectors)
            search.consider(ids)
            if search.best and (step % settings.keep_every == 0 or step == settings.steps):
                losses.append(fmean(search.lowest))
            if step == settings.steps:
                break
            seen = table[ids].requires_grad_()
            (vectors.grad,) = torch.autograd.grad(loss.at_step(seen, step), [seen])
            generator = seeded(settings.seed, "exchanges", step)
            better = [other for other in search.exchanges(ids, vectors.grad, generator) if search.consider(other)]
            optimizer.step()
            if better:
                vectors.copy_(table[better[-1]])  # the search goes on from there
    if search.best is None:
        without = f"holds one of {', '.join(forbidden)}, or " if forbidden else ""
        raise ValueError(
            f"every text that the attack came by {without}is read as other tokens in a template; pass more --steps"
            + (", or forbid less" if forbidden else "")
        )
    return FoundText(vocabulary.text(search.best), search.best, losses)
