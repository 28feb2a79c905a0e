"""Set-up shared by all tests: offline, with an empty hub cache, seeded."""

import os
import tempfile


# Before any Hugging Face import: both are read once, at import, and a look-up without a network costs some 20 s.
_hub_cache = tempfile.TemporaryDirectory(prefix="sa_diffusers_hf_home_")  # removed when the session ends
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _hub_cache.name

import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same global random state at the start of every test, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
