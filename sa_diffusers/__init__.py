"""Selective Amnesia for diffusers: make a deep generative model forget a concept on command."""

from importlib import import_module


__version__ = "0.1.0"

_MODULES = {
    "forget": "forgetting",
    "run_forgetting": "forgetting",
    "ForgetConfig": "config",
    "ClassConditionalPipeline": "pipelines",
    "ConditionalVAE": "models",
    "ConditionalVAEPipeline": "pipelines",
    "Fisher": "fisher",
    "estimate_fisher": "fisher",
    "DiffusionLoss": "losses",
    "ElasticWeightConsolidation": "objectives",
    "SafeGuidancePipeline": "pipelines",
    "SelectiveAmnesia": "objectives",
    "train": "training",
}
__all__ = ["__version__", *_MODULES]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str):
    # Lazy, since diffusers takes seconds to import.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
