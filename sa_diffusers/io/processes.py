"""Which process this is, of how many, and its device."""

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """Accelerate's state of this process; it honours ACCELERATE_USE_CPU, which PartialState alone ignores."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
