"""Bring a concept back by a word that does not exist: new vectors in the text encoder's token space.

Textual inversion (Gal et al. 2023) on a model that forgot: concept inversion (Pham et al. 2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from sa_diffusers.attacks.found import FoundEmbedding
from sa_diffusers.attacks.target_loss import AttackSettings, frozen_model, prepare
from sa_diffusers.families import Family


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
    vectors = loss.encoder.table[loss.encoder.start(settings.initial or concept_words[0])].float()
    vectors.requires_grad_()
    optimizer = settings.optimizer(vectors, loss.encoder.table)
    losses: list[float] = []
    with frozen_model(family):
        for step in tqdm(range(settings.steps + 1), desc="attack: token embedding", mininterval=1):
            if step % settings.keep_every == 0 or step == settings.steps:
                losses.append(loss.fixed(vectors))
                if losses[-1] == min(losses):
                    best = vectors.detach().cpu().clone()
            if step < settings.steps:
                (vectors.grad,) = torch.autograd.grad(loss.at_step(vectors, step), [vectors])
                optimizer.step()
    return FoundEmbedding(best, losses)
