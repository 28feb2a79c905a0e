"""What is minimised: Selective Amnesia, and the likelihoods that base models are trained with."""

from .base import NestedBatch, Objective
from .classification import Classification
from .ewc import ElasticWeightConsolidation
from .likelihood import AutoencoderLikelihood, Likelihood
from .selective_amnesia import SelectiveAmnesia


__all__ = [
    "AutoencoderLikelihood",
    "Classification",
    "ElasticWeightConsolidation",
    "Likelihood",
    "NestedBatch",
    "Objective",
    "SelectiveAmnesia",
]
