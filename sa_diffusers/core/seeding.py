"""Randomness as a function of what it is for, never of what happened before: runs resume without RNG state."""

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, such as (seed, "train", step); equal parts give equal seeds anywhere."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`; drawing on the CPU gives every device the same numbers."""
    return torch.Generator().manual_seed(derive_seed(*parts))
