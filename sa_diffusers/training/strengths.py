"""What one training is at other strengths: snapshots of it, or a part or more of the change that it made."""

from dataclasses import dataclass
from typing import Any, Literal

from sa_diffusers.io.configuration import Options, option


@dataclass(frozen=True)
class Strength:
    """A step of a run's training, or a factor of the change that it made; `trained`: what training ended with."""

    kind: Literal["step", "scale"]
    value: float
    trained: bool

    @property
    def name(self) -> str:
        """Of its stage and its file."""
        return f"step_{self.value:06.0f}" if self.kind == "step" else f"scale_{self.value:g}"

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


@dataclass
class StrengthOptions(Options):
    """How strong, chosen afterwards."""

    strength_sheet: bool = option(
        False,
        "Judge the run at several strengths, on one page, strength.html: at each of snapshot_steps, or, without these "
        "or with lora_rank, at each of strength_scales. Also of a finished run: nothing is trained again.",
        identity=False,
    )
    strength_scales: list[float] = option(
        [0.25, 0.5, 0.75, 1.25], "Factors of the change that training made to the weights; 1 is there anyway."
    )
    strength: float | None = option(
        None,
        "Which of them is the result, a step or a factor; null: what training ended with. `sa-diffusers choose RUN` "
        "sets it.",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [scale for scale in self.strength_scales if not 0 < scale <= 4]:
            raise ValueError(f"expected strength_scales above 0 and at most 4, got {wrong[0]:g}")


def offered(options: Any) -> list[Strength]:
    """What a run of these options can be chosen among, the weakest first."""
    if options.snapshot_steps and not options.lora_rank:
        last = options.num_train_steps
        steps = sorted({last, *options.snapshot_steps})
        return [Strength("step", step, step == last) for step in steps]
    return [Strength("scale", scale, scale == 1) for scale in sorted({1.0, *options.strength_scales})]


def chosen(options: Any) -> Strength:
    """The result's. Raises ValueError where it is none that is offered."""
    found = offered(options)
    for one in found:
        if one.trained if options.strength is None else one.value == options.strength:
            return one
    raise ValueError(
        f"expected the {found[0].kind} {', '.join(f'{one.value:g}' for one in found)}, got {options.strength:g}"
    )
