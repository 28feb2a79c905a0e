"""Selective Amnesia for diffusers: make a deep generative model forget a concept on command."""

from importlib import import_module
from typing import Any


__version__ = "0.1.0"

_MODULES = {
    "forget": "runs.forget",
    "forget_sequence": "runs.adapters.chains",
    "run_forgetting": "runs.forget",
    "ForgetConfig": "runs.options",
    "ClassConditionalPipeline": "pipelines",
    "ConditionalVAE": "models",
    "ConditionalVAEPipeline": "pipelines",
    "Forget": "data.concepts.lists",
    "Fisher": "core.fisher",
    "estimate_fisher": "core.fisher",
    "DiffusionLoss": "core.losses",
    "ElasticWeightConsolidation": "core.objectives",
    "MaskedAutoencoderInpaintPipeline": "pipelines",
    "PixelInpaintPipeline": "pipelines",
    "RunStopped": "io.processes",
    "SafeGuidancePipeline": "pipelines",
    "SafeGuidanceSD3Pipeline": "pipelines",
    "SafeGuidanceXLPipeline": "pipelines",
    "SelectiveAmnesia": "core.objectives",
    "TokenInpaintPipeline": "pipelines",
    "load_fisher": "data.sharing",
    "load_samples": "data.sharing",
    "push_fisher": "data.sharing",
    "train": "training.loop",
    "unforget": "runs.adapters.chains",
}
__all__ = ["__version__", *_MODULES]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Lazy, since diffusers takes seconds to import.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
