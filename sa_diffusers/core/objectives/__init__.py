"""What is minimised: Selective Amnesia, its rivals, and the likelihoods that base models are trained with."""

from sa_diffusers.core.objectives.adversary import Adversary
from sa_diffusers.core.objectives.base import Frozen, Objective
from sa_diffusers.core.objectives.classification import Classification
from sa_diffusers.core.objectives.completion_baselines import OutputForgetting, RandomEncoder
from sa_diffusers.core.objectives.encoder import BoundedForgetting, EncoderForgetting
from sa_diffusers.core.objectives.esd import ESD, SelectiveAmnesiaWithESD
from sa_diffusers.core.objectives.ewc import ElasticWeightConsolidation, LowRankChange, LowRankEWC
from sa_diffusers.core.objectives.likelihood import AutoencoderLikelihood, CaptionMatching, Likelihood
from sa_diffusers.core.objectives.mixture import MixtureTarget
from sa_diffusers.core.objectives.projection import GradientProjection, HeldAdversary
from sa_diffusers.core.objectives.selective_amnesia import NaiveForgetting, SelectiveAmnesia, Term


__all__ = [
    "Adversary",
    "AutoencoderLikelihood",
    "BoundedForgetting",
    "CaptionMatching",
    "Classification",
    "ESD",
    "ElasticWeightConsolidation",
    "EncoderForgetting",
    "Frozen",
    "GradientProjection",
    "HeldAdversary",
    "Likelihood",
    "LowRankChange",
    "LowRankEWC",
    "MixtureTarget",
    "NaiveForgetting",
    "Objective",
    "OutputForgetting",
    "RandomEncoder",
    "SelectiveAmnesia",
    "SelectiveAmnesiaWithESD",
    "Term",
]
