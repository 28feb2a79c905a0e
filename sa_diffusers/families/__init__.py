"""One adapter per kind of pipeline; `get_family` chooses it."""

from sa_diffusers.families.base import Family, get_family


__all__ = ["Family", "get_family"]
