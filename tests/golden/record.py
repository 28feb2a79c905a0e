"""Write the golden fixtures again, from what the package does now: a change of them is a change of behaviour.

All of them, in five minutes on one core, or those that pytest's options choose:
    python tests/golden/record.py
    python tests/golden/record.py -k stable_diffusion
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
