"""Make another strength of a run its result: pipeline, card, numbers, hashes and page are then of that one.

    sa-diffusers choose runs/brad-pitt --step 120
    sa-diffusers choose runs/brad-pitt --scale 0.75

A run offers the steps of its --snapshot_steps and its last one or, without these or with --lora_rank, factors of the
change that it made, its --strength_scales and 1. strength.html shows them all where it was run with --strength_sheet.
Nothing is lost: what training ended with is kept, and can be chosen again.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import plain_parser


if TYPE_CHECKING:
    from sa_diffusers.runs.forget import Outcome


def main(argv: list[str] | None = None) -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="Folder of a finished run.")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--step", type=int, metavar="N", help="The pipeline as it was after this step of training.")
    wanted.add_argument("--scale", type=float, metavar="S", help="This factor of the change that training made.")
    given = parser.parse_args(argv)
    with friendly_errors(argv):
        choose(given.run, *(("step", given.step) if given.scale is None else ("scale", given.scale))).say()


def choose(run: Path, kind: str, value: float) -> "Outcome":
    """Make a strength the result of a run, and judge it where its sheet has not.

    Raises:
        ValueError: no finished run, or none of what it offers.
        StageMismatch: the run's model, classifier or files are not what they were.
    """
    from sa_diffusers.io.artifacts import Marker, run_lock
    from sa_diffusers.io.configuration import config_from_dict
    from sa_diffusers.io.loading import read_run_options
    from sa_diffusers.runs.forget import run_forgetting
    from sa_diffusers.runs.options import ForgetConfig
    from sa_diffusers.runs.stages.strengths import ChoiceStage
    from sa_diffusers.training.strengths import offered

    values = read_run_options(run)
    if not values or not (run / ".stages" / "after.json").exists():
        raise ValueError(f"expected the folder of a finished run, got {run}")
    anew: dict = {"output_dir": str(run), "overwrite": False, "push_to_hub": False, "strength": None}
    config = config_from_dict(ForgetConfig, values | anew)
    if config.finish:
        raise ValueError(f"{run} ended with an edit, which is whole or not there; expected a run without --finish")
    there = {(one.kind, one.value): one for one in offered(config)}
    if (kind, value) not in there:
        known = ", ".join(f"--{one}" for one in there.values())
        raise ValueError(f"{run} offers {known}; expected one of these, got --{kind} {value:g}")
    anew["strength"] = None if there[kind, value].trained else value
    config = config_from_dict(ForgetConfig, values | anew)  # or refused, where its methods or adapters have no other
    with run_lock(run):
        Marker(run, ChoiceStage.name, {}).clear()  # another choice replaces it
    return run_forgetting(config)
