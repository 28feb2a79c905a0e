"""One adapter per kind of pipeline, a file each; `get_family` chooses it."""

from sa_diffusers.families.base import (
    CAPABILITIES,
    Family,
    checked_family,
    family_class,
    family_defaults,
    find_family,
    get_family,
    own_pipeline_classes,
    register,
)


__all__ = [
    "CAPABILITIES",
    "Family",
    "checked_family",
    "family_class",
    "family_defaults",
    "find_family",
    "get_family",
    "own_pipeline_classes",
    "register",
]
