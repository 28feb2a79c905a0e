"""Attacks that try to bring a forgotten concept back through a model's inputs, and what they brought back.

Those on a decoder take plain callables, a `Decoder` and a `Reader`: any model of latents and condition weights may be
attacked. Those on a prompt take the family of a text-to-image model.
"""

from sa_diffusers.attacks.base import Attempt, Decoder, Reader, one_hot
from sa_diffusers.attacks.latent_search import OptimisedAttempt, optimise_input
from sa_diffusers.attacks.measures import Neighbours, Reading, nearest_neighbours, random_decoder, reader, recovered
from sa_diffusers.attacks.probes import interpolate, noisy_condition, posterior_sample, random_latents
from sa_diffusers.attacks.prompt.discrete_prompt import attack_text
from sa_diffusers.attacks.prompt.found_prompt import FoundEmbedding, FoundText, draw_found
from sa_diffusers.attacks.prompt.prompt_attack import AttackSettings
from sa_diffusers.attacks.prompt.token_embedding import attack_embedding


__all__ = [
    "AttackSettings",
    "Attempt",
    "Decoder",
    "FoundEmbedding",
    "FoundText",
    "Neighbours",
    "OptimisedAttempt",
    "Reader",
    "Reading",
    "attack_embedding",
    "attack_text",
    "draw_found",
    "interpolate",
    "nearest_neighbours",
    "noisy_condition",
    "one_hot",
    "optimise_input",
    "posterior_sample",
    "random_decoder",
    "random_latents",
    "reader",
    "recovered",
]
