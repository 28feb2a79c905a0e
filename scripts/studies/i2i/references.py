"""What the measures come to without a model that has forgotten."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import seeded
from sa_diffusers.evaluation.completion import JUDGED, measured, ridge, with_random_weights
from sa_diffusers.families import get_family
from sa_diffusers.io.loading import copy_pipeline
from sa_diffusers.methods.stand_ins import stand_ins
from studies.i2i import probes
from studies.i2i.probes import HOLE, Bench, Fills, latent_search, membership, searchable, squares
from studies.i2i.smile import smile


def filled_without_a_model(bench: Bench, seed: int) -> dict[str, dict]:
    """Metrics of holes that are black, or have the moments of the pictures: {"black hole": ..., "noise hole": ...}."""
    found: dict[str, dict] = {"black hole": {}, "noise hole": {}}
    for name, said in JUDGED.items():
        group = bench.groups[name]
        truth = 2 * group.test.sample(torch.arange(len(group.test))) - 1
        noise = stand_ins("noise", "moments", truth, bench.hole, truth, truth, seeded(seed, "noise hole"))
        for row, filling in (("black hole", torch.full_like(truth, -1)), ("noise hole", noise)):
            filled = torch.where(bench.hole, filling, truth)
            found[row][said], _ = measured(truth, filled, bench.hole, group, bench.judge.classifier)
    return found


def references(bench: Bench, seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the measures come to of no model; those that are known stay.

    SMILE of the truth and noise; `latent_search` of the base's decoder behind an encoder with random weights, and
    behind the visible pixels; and `membership_controls`.
    """
    found = dict(known)
    if "smile" not in found:
        truths = [squares(bench.hole)(bench.fills(bench.base, train)[0]) for train in (True, False)]
        noise = [torch.randn(truth.shape, generator=seeded(seed, "reference", len(truth))) for truth in truths]
        found["smile"] = smile(*zip(truths, noise, strict=True), seed)
    if searchable(bench.base) and "visible_pixels" not in found:
        module = with_random_weights(bench.base.module, seed)
        width = module.config.hidden_size

        def pixels(batch: dict) -> Tensor:
            patches = bench.base.loss.patches(batch["sample"])
            shown = patches[:, ~batch["hidden"][0]]
            return F.pad(shown, (0, width - shown.shape[2], 1, 0))

        found["random_encoder"] = latent_search(bench, bench.base, lambda batch: bench.base.features(module, batch)[0])
        found["visible_pixels"] = latent_search(bench, bench.base, pixels)
    if "membership_of" not in found:
        found["membership_of"] = membership_controls(bench, seed)
    return found


def membership_controls(bench: Bench, seed: int) -> dict[str, float]:
    """`membership` by other fills: how far training and test pictures differ by themselves.

    "random_encoder" are fills of the base with random weights in its encoder, "visible_pixels" those of ridge
    regression from the visible pixels, fitted to pictures to retain.
    """
    base = bench.base
    blind = get_family(copy_pipeline(base.pipeline, base.component))
    random = with_random_weights(base.module, seed)
    with torch.no_grad():
        for name, weight in blind.trainable("encoder").items():
            weight.copy_(random.get_parameter(name))
    retained = bench.part("retain", probes.FITTED // 2, train=True).test
    images = 2 * retained.sample(torch.arange(len(retained))) - 1
    hole = bench.hole.expand_as(images[:1]).flatten()

    def visible(images: Tensor) -> Tensor:
        return base.shown(images, [Condition(mask=HOLE)] * len(images)).flatten(1)

    def regressed(truth: Tensor) -> Fills:
        filled = truth.flatten(1).clone()
        filled[:, hole] = ridge(visible(images), images.flatten(1)[:, hole], visible(truth)).clamp(-1, 1).float()
        return truth, filled.view_as(truth)

    fills = [bench.fills(blind, train) for train in (True, False)]
    return {
        "random_encoder": membership(bench, *fills),
        "visible_pixels": membership(bench, *(regressed(truth) for truth, _ in fills)),
    }
