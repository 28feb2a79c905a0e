"""Safe Latent Diffusion (Schramowski et al., CVPR 2023): led away from the concept while it draws."""

from typing import Any

from sa_diffusers.families import Family
from sa_diffusers.methods.base import ALONE, Context, Method, register


LEVELS = ("weak", "medium", "strong", "max")


class SLDMethod(Method):
    """Guidance away from a text at one of the paper's levels."""

    requires = frozenset(("safe_guidance",))
    trains = takes_lora = favours = False

    def __init__(self, level: str):
        super().__init__(
            f"sld-{level}",
            f"Safe Latent Diffusion ({level})",
            "guidance away from the concept while drawing, with the weights as they are",
            **ALONE,
        )
        self.level = level

    def check(self, context: Context) -> None:
        super().check(context)
        scale = context.options.guidance_scale
        if scale <= 1:
            raise ValueError(f"{self.name} is a part of guidance; expected guidance_scale > 1, got {scale}")

    def remedies(self, options: Any) -> tuple[str, str]:
        at, last = LEVELS.index(self.level), len(LEVELS) - 1
        weaker, stronger = (f"--method sld-{LEVELS[min(max(at + step, 0), last)]}" for step in (-1, 1))
        other = "a --method that trains"
        return other if at == last else stronger, weaker if at else other

    def wrap(self, context: Context) -> Family:
        words = ", ".join(one.said for one in context.concepts)
        return context.family.safely_guided(words, self.level, context.options.sampler)


register(*map(SLDMethod, LEVELS))
