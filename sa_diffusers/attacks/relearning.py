"""Bring a concept back by further training: adapters on a few pictures of it under its own name, or of something else.

The latter brings concepts back as well: Suriyakumar et al. 2024 (arXiv 2410.08074).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.attacks.target_loss import AttackSettings, TargetLoss, prepare
from sa_diffusers.attacks.weights import NOTHING, NamedTemplates, changed_weights, loss_of
from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.objectives import Likelihood, LowRankChange
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.families import Family
from sa_diffusers.families.text_to_image.template_encoder import PLACE
from sa_diffusers.io.atomic_files import explain_read_errors, load_tensors, save_tensors
from sa_diffusers.models.precision import kept_state
from sa_diffusers.training.loop import infinite_indices, train
from sa_diffusers.training.lora import add_lora
from sa_diffusers.training.options import TrainingConfig


RANK = 4


@dataclass(frozen=True, eq=False)
class FoundAdapter:
    """What `relearn` trained: changes "NAME.up" [out, r] and "NAME.down" [r, in] of weights, and the concept's word.

    Its `losses` are of that word, before and after; `earlier` are the changes after so many steps on the way.
    """

    tensors: dict[str, Tensor]
    text: str
    losses: list[float]
    earlier: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def after(self, steps: int) -> "FoundAdapter":
        """What there was after so many steps. Raises KeyError where it was not kept."""
        return FoundAdapter(self.earlier[steps], self.text, self.losses)

    def save(self, path: str | Path) -> None:
        earlier = {f"{steps}/{name}": part for steps, kept in self.earlier.items() for name, part in kept.items()}
        save_tensors(self.tensors | earlier, path, text=self.text, losses=self.losses)

    @classmethod
    def load(cls, path: str | Path) -> "FoundAdapter":
        tensors, notes = load_tensors(path)
        with explain_read_errors(path):
            earlier: dict[int, dict[str, Tensor]] = {}
            for key in [key for key in tensors if "/" in key]:
                steps, _, name = key.partition("/")
                earlier.setdefault(int(steps), {})[name] = tensors.pop(key)
            return cls(tensors, notes["text"], notes["losses"], dict(sorted(earlier.items())))

    @contextmanager
    def applied(self, family: Family) -> Iterator[None]:
        """Within the block the model has the changes; afterwards its weights are what they were."""

        def change(name: str, weight: Tensor) -> Tensor:
            up, down = (self.tensors[f"{name}.{part}"].to(weight) for part in ("up", "down"))
            return weight + (up @ down).view_as(weight)

        names = {name.rpartition(".")[0] for name in self.tensors}
        with changed_weights(family.module, names, change):
            yield


def relearn(
    family: Family,
    latents: Tensor,
    templates: Sequence[str],
    concept_words: Sequence[str],
    settings: AttackSettings,
    *,
    others: tuple[Tensor, Sequence[str]] | None = None,
    every: int = 0,
) -> FoundAdapter:
    """Train adapters of all attention on the first `relearn_pictures` targets, by the model's own loss.

    Args:
        family, latents, templates, concept_words: see `attack_embedding`.
        settings: `steps` and `batch_size` of it, at `relearn_rate`; what is said of vectors does not count.
        others: latents [M, C, h, w] of something else and the prompt of each, to train on in the targets' place.
        every: steps from one copy that is kept on the way to the next; 0: none is.

    Raises:
        TypeError, ValueError: as `attack_embedding`. TrainingDiverged: a loss that is not finite.
    """
    prepare(family, latents, templates, concept_words, settings)  # or refused
    asked_for = TargetLoss(family, NamedTemplates(family, templates, concept_words[0]), latents, settings)
    named = [template.replace(PLACE, word) for template in templates for word in concept_words]
    pictures, prompts = (latents[: settings.relearn_pictures], named) if others is None else others
    family.prepare(list(map(Condition, prompts)))
    seed, count = derive_seed(settings.seed, "relearn order"), settings.batch_size

    def batch(step: int) -> Batch:
        chosen = infinite_indices(len(pictures), count, step, seed)
        drawn = torch.randint(len(prompts), (count,), generator=seeded(seed, "relearn", step)).tolist()
        asked = drawn if others is None else chosen
        return family.batch(pictures[chosen], [Condition(prompts[index]) for index in asked])

    losses = [loss_of(asked_for, NOTHING)]
    config = TrainingConfig(
        num_train_steps=settings.steps, train_batch_size=settings.batch_size, learning_rate=settings.relearn_rate,
        checkpointing_steps=None,
    )  # fmt: skip
    with kept_state([family.module]):
        changes = add_lora(family.module, family.adapted_layers("full", "attention"), RANK, RANK, settings.seed)
        earlier: dict[int, dict[str, Tensor]] = {}

        def keep(steps: int, _: dict) -> None:
            if steps < settings.steps:
                earlier[steps] = _tensors(changes)

        try:
            train(
                family.module, Likelihood(family.loss), batch, config, seed=seed, callback=keep,
                callback_steps=every or None, description="relearn",
            )  # fmt: skip
            found = _tensors(changes)
        finally:
            family.module.unload_lora()
    adapter = FoundAdapter(found, concept_words[0], losses, earlier)
    with adapter.applied(family):
        losses.append(loss_of(asked_for, NOTHING))
    return adapter


def _tensors(changes: Mapping[str, LowRankChange]) -> dict[str, Tensor]:
    """Copies of what the adapters are now, by the names of `FoundAdapter`."""
    matrices = {name: change.matrices() for name, change in changes.items()}
    found = {f"{name}.up": up.detach().cpu().clone() for name, (up, _) in matrices.items()}
    return found | {f"{name}.down": down.detach().cpu().clone() for name, (_, down) in matrices.items()}
