"""What is minimised: Selective Amnesia, and the likelihoods that base models are trained with."""

from .base import NestedBatch, Objective
from .classification import Classification
from .ewc import ElasticWeightConsolidation
from .likelihood import AutoencoderLikelihood, CaptionMatching, Likelihood
from .selective_amnesia import SelectiveAmnesia


__all__ = [
    "AutoencoderLikelihood",
    "CaptionMatching",
    "Classification",
    "ElasticWeightConsolidation",
    "Likelihood",
    "NestedBatch",
    "Objective",
    "SelectiveAmnesia",
]
