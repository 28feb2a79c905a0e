"""Attacks that bring a forgotten concept back through the conditions of a text-to-image model.

By vectors in its token space, or by words that anybody can type.
"""

from sa_diffusers.attacks.found import FoundEmbedding, FoundText, draw_found
from sa_diffusers.attacks.searches import attack_embedding, attack_text
from sa_diffusers.attacks.target_loss import AttackSettings


__all__ = ["AttackSettings", "FoundEmbedding", "FoundText", "attack_embedding", "attack_text", "draw_found"]
