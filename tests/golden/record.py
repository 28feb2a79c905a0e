"""Write the golden fixtures again, from what the package does now: a change of them is a change of behaviour.

All of them, in five minutes on one core, or those that pytest's options choose:
    python tests/golden/record.py
    python tests/golden/record.py -k stable_diffusion

`run_of_0_1/` is not written again: it is the folder of a run of version 0.1 on the tiny pipeline of
tests/conftest.py, without its pictures, its page, its lock and the pipeline's weights. Later versions must say what it
is, and leave it whole.
"""

import os
import sys
from pathlib import Path

import pytest


def main(argv: list[str]) -> int:
    """Run the tests beside this file so that they write what they compute; returns pytest's exit code."""
    os.environ["GOLDEN_RECORD"] = "1"
    return int(pytest.main([str(Path(__file__).parent), "-m", "slow or not slow", *argv]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
