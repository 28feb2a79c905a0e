"""What is minimised: Selective Amnesia, and the likelihoods that base models are trained with."""

from .base import NestedBatch, Objective
from .ewc import ElasticWeightConsolidation
from .likelihood import AutoencoderLikelihood, Likelihood
from .selective_amnesia import SelectiveAmnesia


__all__ = [
    "AutoencoderLikelihood",
    "ElasticWeightConsolidation",
    "Likelihood",
    "NestedBatch",
    "Objective",
    "SelectiveAmnesia",
]
