"""Commands, one a file; each has `main(argv)`, whose None is the arguments of this process."""

import ctypes
import os
import sys


# transformers would begin every command with notices about torchvision, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Of malloc.h: from which size on a block is a mapping of its own (glibc takes 32 MiB at most), and how much memory
# that is free a process keeps. A pass on the CPU makes and frees hundreds of tensors of some MB: their pages would go
# back to the system and be faulted in again each time, which costs a small UNet's pass more than its norms do.
_MALLOPT = {-3: 32 << 20, -1: 256 << 20}
_THEIRS = {f"MALLOC_{name}_" for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX", "TOP_PAD")}  # a user's own


def _keep_freed_memory() -> None:
    theirs = _THEIRS & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc's alone
    if mallopt and not theirs:
        for parameter, size in _MALLOPT.items():
            mallopt(parameter, size)


_keep_freed_memory()
