"""Attacks that try to bring a forgotten concept back through a decoder's inputs, and what they brought back.

They take plain callables, a `Decoder` and a `Reader`: any model of latents and condition weights may be attacked.
"""

from .base import Attempt, Decoder, Reader, one_hot
from .measures import Neighbours, Reading, nearest_neighbours, random_decoder, reader, recovered
from .optimisation import OptimisedAttempt, optimise_input
from .probes import interpolate, noisy_condition, posterior_sample, random_latents


__all__ = [
    "Attempt",
    "Decoder",
    "Neighbours",
    "OptimisedAttempt",
    "Reader",
    "Reading",
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
