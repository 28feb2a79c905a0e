"""Selective Amnesia for diffusers: make a deep generative model forget a concept on command."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import ForgetConfig
    from .fisher import Fisher, estimate_fisher
    from .forgetting import forget, run_forgetting
    from .losses import DiffusionLoss
    from .objectives import ElasticWeightConsolidation, SelectiveAmnesia
    from .training import train

__version__ = "0.1.0"

_MODULES = {
    "forget": "forgetting",
    "run_forgetting": "forgetting",
    "ForgetConfig": "config",
    "Fisher": "fisher",
    "estimate_fisher": "fisher",
    "DiffusionLoss": "losses",
    "ElasticWeightConsolidation": "objectives",
    "SelectiveAmnesia": "objectives",
    "train": "training",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    # Lazy, since diffusers takes seconds to import.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
