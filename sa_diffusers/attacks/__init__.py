"""Attacks that bring a forgotten concept back from a text-to-image model.

By vectors in its token space, words that anybody can type, training, changed weights, or a picture of the concept.
"""

from sa_diffusers.attacks.found import FoundEmbedding, FoundText, draw_found
from sa_diffusers.attacks.searches import attack_embedding, attack_text
from sa_diffusers.attacks.target_loss import AttackSettings


__all__ = ["AttackSettings", "FoundEmbedding", "FoundText", "attack_embedding", "attack_text", "draw_found"]
