"""Bring a concept back by a word that does not exist: new vectors in the text encoder's token space.

Textual inversion (Gal et al. 2023) on a model that forgot: concept inversion (Pham et al. 2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from sa_diffusers.attacks.prompt.found_prompt import FoundEmbedding
from sa_diffusers.attacks.prompt.prompt_attack import (
    AttackSettings,
    TargetLoss,
    TemplateEncoder,
    check_attack,
    check_places,
    frozen_model,
)
from sa_diffusers.families.stable_diffusion import TextToImageFamily


def attack_embedding(
    family: TextToImageFamily,
    latents: Tensor,
    templates: Sequence[str],
    concept_words: Sequence[str],
    settings: AttackSettings,
) -> FoundEmbedding:
    """Minimise the model's denoising loss on targets over K vectors in the concept's place. Its weights stay.

    Args:
        family: of the model under attack.
        latents: targets [N, C, h, w], pictures of the concept by a model that knows it, in this model's latent space.
        templates: prompts with {} in the concept's place.
        concept_words: the words for the concept, such as ("seven", "7").
        settings: `initial` are the words to start from, by default the first of `concept_words`. The tokens of fewer
            than K are repeated, those beyond K are left out.

    Raises:
        TypeError: no text-to-image model.
        ValueError: latents of another shape, no words, or templates that cannot hold the vectors.
        FloatingPointError: a loss that is not finite.
    """
    check_attack(family, latents, concept_words)
    encoder = TemplateEncoder(family, templates, settings.num_tokens)
    words = settings.initial or concept_words[0]
    check_places(encoder, words)
    start = encoder.tokens(words)
    vectors = encoder.table[[start[k % len(start)] for k in range(settings.num_tokens)]].float()
    vectors.requires_grad_()
    scale = encoder.table.float().square().mean().sqrt().item()
    optimizer = torch.optim.Adam([vectors], lr=settings.learning_rate * scale)
    loss = TargetLoss(family, encoder, latents, settings)
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
