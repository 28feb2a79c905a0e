"""SPEED (Li et al., ICLR 2026, arXiv 2503.07392): a closed-form edit in the null space of what is retained."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.null_space import NullSpaceEdit, null_space_edit
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.replay import spread
from sa_diffusers.data.sharing import SPEED_FILE, locate
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import load_tensors, save_tensors
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.io.hub import provenance
from sa_diffusers.io.loading import model_hash
from sa_diffusers.io.processes import process_state
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
    speed_retained: str | None = option(
        None,
        "Embeddings of retained prompts to reuse, where they are the same: a file, a run's folder, or a hub id.",
        identity=False,
    )


class SpeedMethod(UCEMethod):
    """A closed-form edit of the same maps and rows: each layer's lies in the null space of retained prompts."""

    Options = SpeedOptions
    Edit = NullSpaceEdit

    def check(self, context: Context) -> None:
        super().check(context)
        if not self._retained(context):
            raise ValueError("SPEED retains replay prompts, got none without the concept; pass others")
        if context.options.speed_retained:
            _known(context)

    def edit(self, context: Context) -> dict[str, NullSpaceEdit]:
        options, family = context.options, context.family
        pairs, retained = edits_of(context), self._retained(context)
        family.prepare([Condition(prompt) for pair in pairs for prompt in pair])
        kept = _kept(context, retained)
        edits = [paired_rows(family, *pair) for pair in pairs]
        return {
            part: null_space_edit(
                maps,
                [pair[part] for pair in edits],
                kept[part].flatten(0, 1),
                _nothing(kept[f"{part} of nothing"], options.seed),
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
        return f"SPEED's edit at threshold {options.speed_threshold:g}"


def _kept(context: Context, retained: list[str]) -> dict[str, Tensor]:
    """Of each part of what prompts are encoded as, by its name that of retained prompts [N, R, D], of a last word of
    each of R encoders, and that of the empty prompt [K, D]; on the CPU.

    What is not known already is computed, and all of it left in the run's folder. Raises as `_known`.
    """
    family, (known, places) = context.family, _known(context)
    missing = [prompt for prompt in retained if prompt not in places]
    if missing or not known:
        family.prepare(list(map(Condition, ["", *missing])))
    kept = {}
    for part in family.text_maps():
        kept[part] = torch.stack([
            known[part][places[prompt]] if prompt in places else _last_word(family, prompt, part).cpu()
            for prompt in retained
        ])  # fmt: skip
        name = f"{part} of nothing"
        kept[name] = known[name] if known else embedded_rows(family, "")[part].cpu()
    if (missing or not known) and process_state().is_main_process:
        origin = provenance(context.options.model, context.options.revision)
        notes = {"text_encoders": _encoders(family), "prompts": retained, "provenance": origin}
        save_tensors(kept, context.folder / SPEED_FILE, **notes)
    return kept


def _known(context: Context) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What the file holds that the options name, or that an earlier edit left in the run's folder, and each prompt's
    row.

    Raises FileNotFoundError, DamagedFile, ModelLoadError (not on the hub); ValueError: the file that the options name
    is of other text encoders.
    """
    given, path = context.options.speed_retained, context.folder / SPEED_FILE
    if given:
        path = locate(given, SPEED_FILE)
        if not path.is_file():
            raise FileNotFoundError(f"no embeddings at {path}; expected a file such as <run>/{SPEED_FILE}")
    elif not path.is_file():
        return {}, {}
    tensors, notes = load_tensors(path, "text_encoders", "prompts")
    if notes["text_encoders"] != _encoders(context.family):
        if given:
            raise ValueError(f"speed_retained: {path} is of other text encoders; omit it to compute it")
        return {}, {}
    return tensors, {prompt: row for row, prompt in enumerate(notes["prompts"])}


def _encoders(family: Family) -> list[str]:
    return [model_hash(encoder) for encoder in family.text_encoders]


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
