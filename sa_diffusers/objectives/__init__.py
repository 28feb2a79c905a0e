"""What is minimised: Selective Amnesia, its rivals, and the likelihoods that base models are trained with."""

from .base import NestedBatch, Objective
from .classification import Classification
from .esd import ESD, SelectiveAmnesiaWithESD
from .ewc import ElasticWeightConsolidation
from .likelihood import AutoencoderLikelihood, CaptionMatching, Likelihood
from .low_rank_ewc import LowRankChange, LowRankEWC
from .projection import GradientProjection
from .selective_amnesia import NaiveForgetting, SelectiveAmnesia


__all__ = [
    "AutoencoderLikelihood",
    "CaptionMatching",
    "Classification",
    "ESD",
    "ElasticWeightConsolidation",
    "GradientProjection",
    "Likelihood",
    "LowRankChange",
    "LowRankEWC",
    "NaiveForgetting",
    "NestedBatch",
    "Objective",
    "SelectiveAmnesia",
    "SelectiveAmnesiaWithESD",
]
