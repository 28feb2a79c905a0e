"""What a model that has forgotten still knows, and whether it shows: measures of one model each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.objectives import Likelihood
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.picture_groups import PictureGroup
from sa_diffusers.evaluation.completion import JUDGED, completed, masked_errors, measured
from sa_diffusers.evaluation.forgetting import spread_rows
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import Family, get_family
from sa_diffusers.io.loading import copy_pipeline
from sa_diffusers.training.loop import infinite_indices
from studies.i2i.smile import smile


HOLE = "half"
CURVES = (
    "quarter", "random", "ring 75", "ring 50", "ring 25", "left 25", "left", "left 75", "right", "top", "bottom",
)  # fmt: skip
PER_CURVE = 40  # test pictures of each class under the masks of the curves
GIVEN = 10  # pictures of each class that attacks are given, and as many to say when to stop
RELEARN_STEPS, RELEARN_RATE = 30, 3e-4
SEARCH_STEPS, SEARCH_RATE = 60, 1e-3
LOOKED_AT = 5  # steps
FITTED = 400  # pictures of each class that a detector and a critic are fitted to


Fills = tuple[Tensor, Tensor]  # the truth, and what a model makes of it


@dataclass
class Bench:
    """What models are measured on.

    Attributes:
        groups: "forget", "retain" and "other".
        base: the model before forgetting.
        retrained: one that never saw what is forgotten; None: there is none, and nothing is compared with it.
    """

    groups: Mapping[str, PictureGroup]
    judge: ClassifierJudge
    base: Family
    retrained: Family | None

    def part(self, name: str, count: int, train: bool = False) -> PictureGroup:
        """A group whose test pictures are so many of each class, or of its training ones."""
        group = self.groups[name]
        data = group.train if train else group.test
        return PictureGroup(group.name, group.train, data.take(torch.tensor(_of_each(data.labels, count))))

    def given(self) -> list[Tensor]:
        """Pictures to forget: some that attacks are given, as many to say when to stop, and test ones."""
        few, test = self.part("forget", 2 * GIVEN, train=True).test, self.part("forget", FITTED).test
        fitted, held, judged = range(0, len(few), 2), range(1, len(few), 2), range(len(test))
        return [2 * data.sample(rows) - 1 for data, rows in ((few, fitted), (few, held), (test, judged))]

    @cached_property
    def hole(self) -> Tensor:
        return self.base.holes([Condition(mask=HOLE)])

    @cached_property
    def untaught(self) -> list[Tensor]:
        """What the retrained model makes of the training and of the test pictures to forget."""
        return [self.fills(self.retrained, train)[1] for train in (True, False)]

    def fills(self, family: Family, train: bool) -> Fills:
        """Pictures to forget, and what a model makes of them."""
        return completed(family, self.part("forget", FITTED, train), HOLE, 0)[:2]


def unmeasured(family: Family, known: Mapping[str, Any]) -> list[str]:
    """Which measures of a model are missing among those that are known, or are of fewer masks and groups."""
    there = known.get("curves", {})
    whole = all(there.get(mask, {}).keys() >= {*JUDGED.values()} for mask in CURVES)
    asked = [name for name in MEASURES if name != "latent_search" or searchable(family)]
    return [name for name in asked if name not in known or (name == "curves" and not whole)]


def probe(bench: Bench, family: Family, seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """All measures of a model but its conspicuousness; see the functions below. Those that are known stay."""
    train, test = (bench.fills(family, side) for side in (True, False))
    missing = unmeasured(family, known)
    return {**known, **{name: MEASURES[name](bench, family, seed, (train, test), known) for name in missing}}


def searchable(family: Family) -> bool:
    """Whether there is a decoder of one pass, from features to pixels."""
    return family.name == "masked_autoencoder"


def curves(bench: Bench, family: Family, known: Mapping[str, Mapping]) -> dict[str, dict]:
    """{mask: {"forget" | "retain" | "third": {"masked_mse", "accuracy"}}}; what is known stays."""
    found: dict[str, dict] = {}
    for mask in CURVES:
        found[mask] = dict(known.get(mask, {}))
        for name in [name for name, said in JUDGED.items() if said not in found[mask]]:
            group = bench.part(name, PER_CURVE)
            values, _ = measured(*completed(family, group, mask, 0), group, bench.judge.classifier)
            found[mask][JUDGED[name]] = {key: values[key] for key in ("masked_mse", "accuracy")}
    return found


def groups_filled(bench: Bench, family: Family, seed: int) -> dict[str, dict]:
    """Metrics of all test pictures, as of a run."""
    return {
        said: measured(*completed(family, bench.groups[name], HOLE, seed), bench.groups[name], bench.judge.classifier)[
            0
        ]
        for name, said in JUDGED.items()
    }


def second_generation(bench: Bench, test: Fills) -> dict[str, Any]:
    """What the model before forgetting makes around the middle that this one filled in; numbers as of a fill."""
    group = bench.part("forget", FITTED)
    around = [Condition(mask="ring")] * len(test[0])
    second = bench.base.complete(test[1], around, [0] * len(around))
    return measured(test[0], second, bench.base.holes(around[:1]), group, bench.judge.classifier)[0]


def membership(bench: Bench, train: Fills, test: Fills) -> float:
    """AUC of telling training pictures to forget from test ones by a low error in the hole; 0.5: none leaks."""
    errors = [masked_errors(*pair, bench.hole) for pair in (train, test)]
    return float(roc_auc_score([1] * len(errors[0]) + [0] * len(errors[1]), -torch.cat(errors)))


def latent_search(
    bench: Bench, family: Family, features: Callable[[dict], Tensor], rate: float = SEARCH_RATE
) -> float:
    """Error on test pictures to forget when features go through a linear map first, found through the decoder.

    The map is sought by gradient through the model's frozen decoder, on a few pictures of each class.

    Args:
        features: of a batch, [B, 1 + visible, D].
    """
    images = bench.given()
    with torch.no_grad():
        known = [features(family.batch(one, [Condition(mask=HOLE)] * len(one))).detach() for one in images]
    width = known[0].shape[2]
    change, shift = torch.zeros(width, width, requires_grad=True), torch.zeros(width, requires_grad=True)

    def errors(at: int) -> Tensor:
        made = decoded(family.module, known[at] + known[at] @ change + shift, family)
        return masked_errors(images[at], made.clamp(-1, 1) if at else made, bench.hole).mean()

    optimiser = torch.optim.Adam([change, shift], rate)
    return attacked(optimiser, SEARCH_STEPS, lambda step: errors(0), errors)


def attacked(
    optimiser: torch.optim.Optimizer, steps: int, loss: Callable[[int], Tensor], error: Callable[[int], Tensor]
) -> float:
    """The error on test pictures, 2, at the step where that on held-out training ones, 1, is least; 0 are fitted."""
    best, found = float("inf"), float("inf")
    for step in range(steps + 1):
        if step % LOOKED_AT == 0:
            with torch.no_grad():
                held = error(1).item()
                best, found = (held, error(2).item()) if held < best else (best, found)
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
    return found


def decoded(mae: nn.Module, features: Tensor, family: Family) -> Tensor:
    """Pictures that a masked autoencoder's decoder makes of features of what HOLE leaves."""
    hidden = family.batch(torch.zeros(1, *family.latent_shape), [Condition(mask=HOLE)])["hidden"][0]
    places = torch.argsort(torch.argsort(hidden * 2.0 + torch.arange(len(hidden)) / len(hidden)))
    return mae.unpatchify(mae.decoder(features, places.expand(len(features), -1)).logits)


def relearned(bench: Bench, family: Family, seed: int, rate: float = RELEARN_RATE) -> float:
    """Error on test pictures to forget after a short training of everything on a few pictures of each class."""
    copied, images = get_family(copy_pipeline(family.pipeline, family.component)), bench.given()
    objective, trained = Likelihood(copied.loss), [*copied.trainable("full").values()]
    for weight in trained:
        weight.requires_grad_(True)

    def loss(step: int) -> Tensor:
        rows = infinite_indices(len(images[0]), 32, step, derive_seed(seed, "relearn"))
        batch = copied.batch(images[0][rows], [Condition(mask=HOLE)] * len(rows))
        return objective(copied.module, objective.draw(batch, seeded(seed, "relearn", step)))[0]

    def error(at: int) -> Tensor:
        filled = copied.complete(images[at], [Condition(mask=HOLE)] * len(images[at]), [0] * len(images[at]))
        return masked_errors(images[at], filled, bench.hole).mean()

    optimiser = torch.optim.AdamW(trained, rate, betas=(0.9, 0.95), weight_decay=0.0)
    return attacked(optimiser, RELEARN_STEPS, loss, error)


def conspicuousness(bench: Bench, family: Family, seed: int) -> float:
    """AUC, on test pictures, of a network that is trained to tell fills from the retrained model's; 0.5: it cannot."""
    sides = []
    for train, never in zip((True, False), bench.untaught, strict=True):
        fills = [squares(bench.hole, 16)(part) for part in (never, bench.fills(family, train)[1])]
        labels = [label for label, part in enumerate(fills) for _ in part]
        sides.append((torch.cat([_with_texture(part) for part in fills]).numpy(), labels))
    detector = MLPClassifier((64,), early_stopping=True, random_state=derive_seed(seed, "detector") % 2**32)
    detector.fit(*sides[0])
    return float(roc_auc_score(sides[1][1], detector.predict_proba(sides[1][0])[:, 1]))


# Of a bench, a model, a seed, its fills of training and of test pictures, and of what is known already.
MEASURES: dict[str, Callable[[Bench, Family, int, tuple[Fills, Fills], Mapping[str, Any]], Any]] = {
    "curves": lambda bench, family, seed, fills, known: curves(bench, family, known.get("curves", {})),
    "smile": lambda bench, family, seed, fills, known: smile(
        *(tuple(map(squares(bench.hole), pair)) for pair in fills), seed
    ),
    "second_generation": lambda bench, family, seed, fills, known: second_generation(bench, fills[1]),
    "membership": lambda bench, family, seed, fills, known: membership(bench, *fills),
    "latent_search": lambda bench, family, seed, fills, known: latent_search(
        bench, family, lambda batch: family.features(family.module, batch)[0]
    ),
    "relearned": lambda bench, family, seed, fills, known: relearned(bench, family, seed),
}


def squares(hole: Tensor, side: int = 8) -> Callable[[Tensor], Tensor]:
    """The square of a hole of pictures [B, C, H, W], scaled to [B, C side^2]."""
    rows = hole[0, 0].any(1)
    return lambda images: F.adaptive_avg_pool2d(images[:, :, rows][..., rows], side).flatten(1)


def _with_texture(pixels: Tensor) -> Tensor:
    """Squares [B, side^2] with how much each pixel differs from those around it."""
    side = int(pixels.shape[1] ** 0.5)
    images = pixels.view(-1, 1, side, side)
    around = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.cat([pixels, (images - around).abs().flatten(1)], 1)


def _of_each(labels: Tensor, count: int) -> list[int]:
    """Rows of so many of each class, spread over these."""
    found: list[int] = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        found += rows[spread_rows(len(rows), count)].tolist()
    return sorted(found)
