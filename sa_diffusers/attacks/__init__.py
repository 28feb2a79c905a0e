"""Attacks that bring a forgotten concept back through the conditions of a text-to-image model.

By vectors in its token space, or by words that anybody can type.
"""

from sa_diffusers.attacks.prompt.discrete_prompt import attack_text
from sa_diffusers.attacks.prompt.found_prompt import FoundEmbedding, FoundText, draw_found
from sa_diffusers.attacks.prompt.prompt_attack import AttackSettings
from sa_diffusers.attacks.prompt.token_embedding import attack_embedding


__all__ = ["AttackSettings", "FoundEmbedding", "FoundText", "attack_embedding", "attack_text", "draw_found"]
