"""One adapter per kind of pipeline; `get_family` chooses it."""

from .base import Family, get_family


__all__ = ["Family", "get_family"]
