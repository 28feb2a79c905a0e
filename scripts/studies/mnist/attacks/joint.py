"""Text, table and figures of the sixth attack."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from studies.mnist.attacks import restarts
from studies.mnist.attacks.attempt import one_hot
from studies.mnist.attacks.recovered import Reading, nearest_neighbours
from studies.mnist.attacks.search import ConditionMode, OptimisedAttempt, optimise_input
from studies.mnist.attacks.setting import FORGOT, Setting, counts, share_cell, summary
from studies.mnist.readings import DIGIT, GREY
from studies.mnist.sections import figure, section, table
from studies.mnist.strips import Strip, strips_figure


STEPS, KEEP_EVERY, LEARNING_RATE = 1000, 100, 0.1  # the study's
MODES = get_args(ConditionMode)
MODE_TEXTS = {
    "free": "condition free",
    "simplex": "condition on the simplex",
    "fixed": f"condition fixed at one-hot({DIGIT})",
}
SHOWN = 12


def joint_section(setting: Setting, start_digit: int, folder: Path) -> dict:
    """Text, tables, figures and numbers of the attack on every model under every kind of condition.

    Args:
        start_digit: the digit whose test images and condition the attack starts from.
    """
    latents, gallery = restarts.start_latents(setting, start_digit, restarts.RESTARTS), restarts.make_gallery(setting)
    condition = one_hot(torch.full((len(latents),), start_digit), setting.sizes["num_classes"])
    numbers: dict = {}
    figures = []
    for mode in MODES:
        attempts = attack_all(setting, latents, condition, mode, STEPS)
        numbers[mode] = {name: restarts.measure(setting, gallery, attempt) for name, attempt in attempts.items()}
        figures += [_frames(setting, mode, attempts, folder), _neighbours(setting, gallery, mode, attempts, folder)]
    references = _references(setting, gallery)
    text, tables = _text(numbers, setting, start_digit), [_table(numbers, references)]
    return section(text, tables, figures, {"joint optimisation": numbers | {"references": references}})


def attack_all(
    setting: Setting, latents: Tensor, condition: Tensor, mode: ConditionMode, steps: int
) -> dict[str, OptimisedAttempt]:
    """The attack on every model, from the same starts, against the first classifier."""
    climbed = next(iter(setting.readers.values()))
    return {
        name: optimise_input(
            decode,
            climbed,
            DIGIT,
            latents,
            condition,
            mode,
            steps=steps,
            keep_every=KEEP_EVERY,
            learning_rate=LEARNING_RATE,
            description=f"{name}, {MODE_TEXTS[mode]}",
        )  # fmt: skip
        for name, decode in restarts.attacked_decoders(setting).items()
    }


def _references(setting: Setting, gallery: restarts.Gallery) -> dict[str, dict]:
    """The measures of images that nobody attacked: real ones of the digit, and flat grey."""
    held_out = setting.study.test_images.sample(setting.test_indices(DIGIT, restarts.REFERENCES))
    images = {f"real test {DIGIT}s": held_out, "flat grey": torch.full_like(held_out[:1], GREY)}
    return {name: summary(setting.read(part)) | gallery.compare(part) for name, part in images.items()}


def _table(numbers: Mapping, references: Mapping) -> dict:
    columns = [
        "model", "condition", "read as it by the attacked classifier", "by most held-out ones",
        "held-out, share (range)", "mean P, attacked", "mean P, held-out", "distance to the nearest real one (ratio)",
        "nearest real image is one", "|z|",
    ]  # fmt: skip
    cases = [(name, mode, part) for mode, by_model in numbers.items() for name, part in by_model.items()]
    rows = []
    for name, mode, part in [*cases, *((name, "–", part) for name, part in references.items())]:
        total = part["total"]
        most = f"{part['majority']} of {total}" if part["held_out"] else "–"
        held_out = "–" if part["held_out_probability"] is None else part["held_out_probability"]
        seen = [f"{part['count']} of {total}", most, share_cell(part["held_out"]), part["probability"], held_out]
        rows.append(
            [name, mode, *seen, part["distance_ratio"], part["nearest_is_digit"], part.get("latent_norm", "–")]
        )
    return table(f"Joint optimisation: what is read as a {DIGIT}", columns, rows)


def _text(numbers: Mapping, setting: Setting, start_digit: int) -> list[str]:
    """The study's own attack, then for each kind of condition what came out and what the controls say."""
    held_out = len(setting.readers) - 1
    own = numbers["simplex"][FORGOT]["first_start"]
    others = "" if own["held_out"] is None else f" ({own['held_out']:.2f} by those held out, mean of {held_out})"
    text = [
        f"Joint optimisation as in the study (condition on the simplex, from the first test {start_digit}, {STEPS} "
        f"steps of Adam at {LEARNING_RATE}): in the model that forgot, P({DIGIT}) by the attacked classifier goes "
        f"from {own['before']:.2f} to {own['after']:.2f}{others}. The study reports a slanted stroke that is read as "
        f"a {DIGIT}, and concludes that the digit is suppressed, not erased."
    ]
    judge = _judge(held_out)
    for mode, by_model in numbers.items():
        scores = {name: restarts.judged(part, bool(held_out)) for name, part in by_model.items()}
        agreed = ", ".join(f"{score.right} ({name})" for name, score in scores.items())
        distances = {name: part["distance_ratio"] for name, part in by_model.items()}
        ratios = ", ".join(f"{distance:.2f} ({name})" for name, distance in distances.items())
        text.append(
            f"{MODE_TEXTS[mode].capitalize()}: the attacked classifier reads a {DIGIT} in {counts(by_model)} "
            f"restarts; {judge} in {agreed}. {restarts.verdict(scores, distances)} Distance of the end points to the "
            f"nearest real {DIGIT}, in units of that between real ones: {ratios}."
        )
    return text


def _judge(held_out: int) -> str:
    """Who decides what was brought back, where so many classifiers are held out."""
    few = {0: "the attacked classifier (none is held out)", 1: "the one held-out classifier"}
    return few.get(held_out, f"most of the {held_out} held-out classifiers")


def _frames(setting: Setting, mode: str, attempts: Mapping[str, OptimisedAttempt], folder: Path) -> dict:
    """The attack from the study's own start, a strip a model."""
    strips = []
    for name, attempt in attempts.items():
        readings = setting.read(attempt.frames[:, 0])
        seen = zip(attempt.steps, readings[0].target_probability, _held_out(readings), strict=True)
        captions = [f"step {step}\n{climbed:.2f}\n{others:.2f}" for step, climbed, others in seen]
        strips.append(Strip(name, attempt.frames[:, 0], captions))
    title = f"{MODE_TEXTS[mode].capitalize()}: P({DIGIT}) by the attacked classifier, and by those held out (mean)"
    caption = f"Joint optimisation from the study's start, {MODE_TEXTS[mode]}."
    return figure(strips_figure(strips, title), folder / f"joint_{mode}_frames.png", caption)


def _neighbours(
    setting: Setting, gallery: restarts.Gallery, mode: str, attempts: Mapping[str, OptimisedAttempt], folder: Path
) -> dict:
    """End points of some restarts, each above the nearest real image of the digit."""
    real, strips = gallery.of_digit, []
    for name, attempt in attempts.items():
        picked = torch.linspace(0, len(attempt.images) - 1, min(SHOWN, len(attempt.images))).long()
        images = attempt.images[picked]
        found = nearest_neighbours(images, real)
        strips.append(Strip(name, images, [f"{p:.2f}" for p in _held_out(setting.read(images))]))
        ratios = [f"x {distance / gallery.scale:.2f}" for distance in found.distances]
        strips.append(Strip(f"nearest real {DIGIT}", real[found.indices], ratios))
    title = f"{MODE_TEXTS[mode].capitalize()}: end points, P({DIGIT}) by held-out classifiers; nearest real {DIGIT}"
    caption = (
        f"End points of some restarts, {MODE_TEXTS[mode]}, above the nearest real {DIGIT} with its distance in units "
        "of that between real ones."
    )
    return figure(strips_figure(strips, title), folder / f"joint_{mode}_neighbours.png", caption)


def _held_out(readings: Sequence[Reading]) -> Tensor:
    """P of the digit in each image [N], the mean over the held-out classifiers; nan where there is none."""
    if not readings[1:]:
        return torch.full_like(readings[0].target_probability, torch.nan)
    return torch.stack([reading.target_probability for reading in readings[1:]]).mean(0)
