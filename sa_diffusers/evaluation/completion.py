"""What a model makes of the holes of real pictures: its error, and whether the result is read as what it was."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.picture_groups import PictureGroup
from sa_diffusers.evaluation.forgetting import Findings, spread_rows
from sa_diffusers.evaluation.images.metrics import frechet_distance
from sa_diffusers.evaluation.intervals import mean_interval, share_interval
from sa_diffusers.evaluation.judges.classifier import ImageClassifier, entropies
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import Family
from sa_diffusers.report.pictures import to_uint8


JUDGED = {"forget": "forget", "retain": "retain", "other": "third"}  # groups of pictures, and what metrics.json says
TITLES = {"forget": "To forget", "retain": "To retain", "third": "Neither"}
SHOWN = 12  # pictures of each group on the page
AT_ONCE = 100  # pictures completed at once
FINEST = 4e-10  # a squared error below it is none: 100 dB
DECODED = 1000  # training pictures that a new decoder is fitted to, at most
PENALTIES = tuple(10.0**power for power in range(-5, 3))  # of ridge, as shares of the kernel's mean diagonal


def examine_completions(
    family: Family,
    groups: Mapping[str, PictureGroup],
    judges: Mapping[str, ClassifierJudge],
    masks: Sequence[str],
    seed: int,
    steps: int | None = None,
) -> Findings:
    """Complete the test pictures of every group under every mask; numbers of the first mask come first.

    Values are {"forget" | "retain" | "third": {"masked_mse", "psnr", "accuracy", "feature_cosine", "classifier_score",
    "frechet_distance", "num_images"}}: squared error of the hidden pixels, in [-1, 1], and their peak signal-to-noise
    ratio in dB; share that a classifier reads as their class; cosine with the true picture in its features; what is
    the Inception Score of its probabilities, in one split; distance from the true pictures in its features. Those of a
    further mask stand under "forget, ring", say. "fresh_decoder" is what ridge regression makes of the encoder's
    features of the pictures to forget, beside controls.
    """
    judged = {JUDGED[name]: group for name, group in groups.items() if name in JUDGED}
    values, intervals, captions, shown = {}, {}, [], {"truth": [], "masked": [], "filled": []}
    classifier = next((judge.classifier for judge in judges.values()), None)
    for mask in masks:
        for name, group in judged.items():
            truth, filled, hole = completed(family, group, mask, seed, steps)
            key = name if mask == masks[0] else f"{name}, {mask}"
            values[key], intervals[key] = measured(truth, filled, hole, group, classifier)
            if mask == masks[0]:
                rows = spread_rows(len(truth), SHOWN)
                captions += [(TITLES[name], group.test.names[group.test.labels[row]]) for row in rows]
                shown["truth"].append(truth[rows])
                shown["masked"].append(family.shown(truth[rows], [Condition(mask=mask)] * len(rows)))
                shown["filled"].append(filled[rows])
    decoded = fresh_decoder(family, groups, masks[0], seed)
    values["fresh_decoder"] = {name: errors.mean().item() for name, errors in decoded.items()}
    intervals["fresh_decoder"] = {name: mean_interval(errors, least=0.0) for name, errors in decoded.items()}
    pictures = {name: to_uint8(family.decode(torch.cat(parts))) for name, parts in shown.items()}
    return Findings(values, intervals, pictures.pop("filled"), captions, {}, beside=pictures)


def completed(
    family: Family, group: PictureGroup, mask: str, seed: int, steps: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A group's test pictures, what is made of them under a mask, [N, C, H, W], and the hole [1, 1, H, W]."""
    truth, found = 2 * group.test.sample(torch.arange(len(group.test))) - 1, []
    for part, rows in zip(truth.split(AT_ONCE), torch.arange(len(truth)).split(AT_ONCE), strict=True):
        found.append(family.complete(part, [Condition(mask=mask)] * len(part), (seed + rows).tolist(), steps))
    return truth, torch.cat(found), family.holes([Condition(mask=mask)])


def measured(
    truth: Tensor, filled: Tensor, hole: Tensor, group: PictureGroup, classifier: ImageClassifier | None
) -> tuple[dict, dict]:
    """Numbers and 95 % intervals of completions, see `examine_completions`; None where no classifier reads them."""
    errors = masked_errors(truth, filled, hole)
    found = {"masked_mse": errors, "psnr": 10 * (4 / errors.clamp(min=FINEST)).log10()}
    values: dict = {name: each.mean().item() for name, each in found.items()}
    values |= dict.fromkeys(("accuracy", "feature_cosine", "classifier_score", "frechet_distance"))
    values["num_images"] = len(truth)
    intervals = {
        "masked_mse": mean_interval(errors, least=0.0),
        "psnr": mean_interval(found["psnr"]),
        "accuracy": None,
    }
    if classifier is not None:
        pair = [images.expand(-1, 3, -1, -1) for images in (truth, filled)]
        attribute, _ = classifier.require_class([group.classes[0]])
        told = classifier.probabilities(pair[1])[attribute].double()
        read = told.argmax(1)
        wanted = {i: classifier.require_class([n])[1] for i, n in enumerate(group.test.names) if n in group.classes}
        right = (read == torch.tensor([wanted[label] for label in group.test.labels.tolist()])).double()
        values["accuracy"], intervals["accuracy"] = right.mean().item(), share_interval(right)
        features = [classifier.features_of(images) for images in pair]
        alike = F.cosine_similarity(*(part.double() for part in features))
        values["feature_cosine"], intervals["feature_cosine"] = alike.mean().item(), mean_interval(alike)
        values["classifier_score"] = (entropies(told.mean(0, keepdim=True)) - entropies(told).mean()).exp().item()
        if len(truth) > 1:
            values["frechet_distance"] = frechet_distance(real=features[0], generated=features[1])
    return values, intervals


def masked_errors(truth: Tensor, filled: Tensor, hole: Tensor) -> Tensor:
    """Mean squared error of the hidden pixels of each picture, [N] of float64."""
    errors = ((truth - filled).double().square() * hole).flatten(1).sum(1)
    return errors / (hole.sum() * truth.shape[1])


def fresh_decoder(family: Family, groups: Mapping[str, PictureGroup], mask: str, seed: int) -> dict[str, Tensor]:
    """Errors [N] of the pictures to forget when ridge regression fills them, fitted to training pictures.

    Of "masked_mse" it is given the encoder's features, of the controls "visible_pixels" and "random_encoder" the
    visible pixels, or what an encoder with random weights of the same spread makes of these. An encoder that has
    erased something must do worse than before; worse than the visible pixels alone it need not do.
    """
    pictures = [groups[name].train for name in ("forget", "retain") if name in groups]
    train = torch.cat([2 * part.sample(spread_rows(len(part), DECODED // 2)) - 1 for part in pictures])
    test = 2 * groups["forget"].test.sample(torch.arange(len(groups["forget"].test))) - 1
    hole = family.holes([Condition(mask=mask)])[0].expand(train.shape[1:]).flatten()
    targets = train.flatten(1)[:, hole]
    random = with_random_weights(family.module, seed)

    def encoded(module: nn.Module, images: Tensor) -> Tensor:
        parts = []
        for part in images.split(AT_ONCE):
            batch = family.batch(part, [Condition(mask=mask)] * len(part))
            batch = {name: tensor.to(family.device) for name, tensor in batch.items()}
            with torch.no_grad():
                parts.append(torch.cat([found.flatten(1) for found in family.features(module, batch)], 1).cpu())
        return torch.cat(parts)

    inputs = {
        "masked_mse": [encoded(family.module, images) for images in (train, test)],
        "visible_pixels": [family.shown(i, [Condition(mask=mask)] * len(i)).flatten(1) for i in (train, test)],
        "random_encoder": [encoded(random, images) for images in (train, test)],
    }
    truth = test.flatten(1)[:, hole].double()
    return {
        name: (ridge(fit, targets, asked).clamp(-1, 1) - truth).square().mean(1)
        for name, (fit, asked) in inputs.items()
    }


def with_random_weights(module: nn.Module, seed: int) -> nn.Module:
    """A copy whose matrices are random, of the same spread."""
    random, generator = copy.deepcopy(module), seeded(seed, "random encoder")
    with torch.no_grad():
        for weight in random.parameters():
            if weight.dim() > 1 and weight.std() > 0:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std().cpu())
    return random


def ridge(inputs: Tensor, targets: Tensor, asked: Tensor) -> Tensor:
    """Ridge regression from inputs [N, D] to targets [N, K] at others [M, D], [M, K]; penalty by leave-one-out.

    The mean of the targets where the inputs tell nothing apart.
    """
    inputs, targets, asked = inputs.double(), targets.double(), asked.double()
    centre, level = inputs.mean(0), targets.mean(0)
    inputs, asked, targets = inputs - centre, asked - centre, targets - level
    values, vectors = torch.linalg.eigh(inputs @ inputs.T)
    if values.mean() <= 0:
        return level.expand(len(asked), -1)
    turned, best = vectors.T @ targets, (float("inf"), values[:0])
    for penalty in PENALTIES:
        shrunk = values.clamp(min=0) / (values.clamp(min=0) + penalty * values.mean())
        leverage = 1 / len(inputs) + vectors.square() @ shrunk  # of the mean, and of the rest
        left = (targets - vectors @ (shrunk[:, None] * turned)) / (1 - leverage)[:, None]
        best = min(best, (left.square().mean().item(), shrunk / values.clamp(min=1e-12)), key=lambda pair: pair[0])
    return asked @ (inputs.T @ (vectors @ (best[1][:, None] * turned))) + level
