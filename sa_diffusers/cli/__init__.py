"""Commands, one a file; each has `main(argv)`, whose None is the arguments of this process."""

import ctypes
import os
import sys


# transformers would begin every command with notices about torchvision, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Of malloc.h: from which size on a block is a mapping of its own (glibc takes 32 MiB at most), and how much memory
# that is free a process keeps. A pass on the CPU makes and frees hundreds of tensors of some MB: their pages would go
# back to the system and be faulted in again each time, for a fifth of the time of a small UNet's pass.
_MALLOPT = {-3: 32 << 20, -1: 256 << 20}


def _keep_freed_memory() -> None:
    theirs = any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc's alone
    if mallopt and not theirs:
        for parameter, size in _MALLOPT.items():
            mallopt(parameter, size)


_keep_freed_memory()
