"""SPEED (Li et al., ICLR 2026, arXiv 2503.07392): a closed-form edit in the null space of what is retained."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.null_space import NullSpaceEdit, null_space_edit
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.replay import spread
from sa_diffusers.families import Family
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.methods.base import ALONE, Context, register
from sa_diffusers.methods.uce import UCEMethod, edits_of, embedded_rows, paired_rows


CENTRES = 3  # of the empty prompt's tokens, kept exactly beside its first


@dataclass
class SpeedOptions(Options):
    """SPEED, as a method and as a start."""

    speed_retain_prompts: int = option(500, "Replay prompts that it retains.", above=0)
    speed_augmentations: int = option(10, "Noisy copies of each; 0: neither copies nor filter.", least=0)
    speed_threshold: float = option(
        0.1,
        "Mean square along a direction of embeddings, below which it holds nothing retained; 1e-4 for many.",
        above=0,
    )
    speed_retain_scale: float = option(1.0, "Weight of the change of the matrices themselves.", above=0)


class SpeedMethod(UCEMethod):
    """A closed-form edit of the same maps and rows: each layer's lies in the null space of retained prompts."""

    Options = SpeedOptions
    Edit = NullSpaceEdit

    def check(self, context: Context) -> None:
        super().check(context)
        if not self._retained(context):
            raise ValueError("SPEED retains replay prompts, got none without the concept; pass others")

    def edit(self, context: Context) -> dict[str, NullSpaceEdit]:
        options, family = context.options, context.family
        pairs, retained = edits_of(context), self._retained(context)
        prompts = ["", *retained, *(prompt for pair in pairs for prompt in pair)]
        family.prepare(list(map(Condition, prompts)))
        edits = [paired_rows(family, *pair) for pair in pairs]
        return {
            part: null_space_edit(
                maps,
                [pair[part] for pair in edits],
                torch.cat([_last_word(family, prompt, part) for prompt in retained]),
                _nothing(embedded_rows(family, "")[part], options.seed),
                generator=seeded(options.seed, "edit"),
                augmentations=options.speed_augmentations,
                threshold=options.speed_threshold,
                retain_scale=options.speed_retain_scale,
            )
            for part, maps in family.text_maps().items()
        }

    @staticmethod
    def _retained(context: Context) -> list[str]:
        kept = [prompt for prompt in context.prompts if prompt and not context.concepts.named_in(prompt)]
        return spread(kept, min(context.options.speed_retain_prompts, len(kept)), context.options.seed)

    def remedies(self, options: Any) -> tuple[str, str]:
        return "a higher --speed_threshold, a nearer --surrogate", "a lower --speed_threshold"

    def strength(self, options: Any) -> str:
        """What an edit that training starts at is called in a page."""
        return f"SPEED's edit at threshold {options.speed_threshold:g}"


def _last_word(family: Family, prompt: str, part: str) -> Tensor:
    """The embedding [1, D] of a prompt's last word of each encoder, or its pooled one."""
    rows = embedded_rows(family, prompt)[part]
    return rows if part == "pooled" else rows[[start for start, _ in family.last_words(prompt)]]


def _nothing(rows: Tensor, seed: int) -> Tensor:
    """What is kept exactly of the empty prompt's rows [K, D]: the first, and centres of the others."""
    from sklearn.cluster import KMeans  # seconds, which --help need not take

    first, others = rows[:1], rows[1:].double().cpu()
    if len(others.unique(dim=0)) > CENTRES:
        means = KMeans(CENTRES, n_init=1, random_state=seed % 2**32).fit(others.numpy()).cluster_centers_
        others = torch.from_numpy(means)
    return torch.cat([first.double().cpu(), others])


register(
    SpeedMethod(
        "speed",
        "SPEED",
        "a closed-form edit that keeps the null space of retained prompts, without training",
        **ALONE,
    )
)
