"""Ways to forget, a file each: `registry` holds them by name."""

from sa_diffusers.methods.base import Context, Method, editor, get, register, registry, require
from sa_diffusers.methods.selective_amnesia import DEFAULT, ROBUST


__all__ = ["DEFAULT", "ROBUST", "Context", "Method", "editor", "get", "register", "registry", "require"]
