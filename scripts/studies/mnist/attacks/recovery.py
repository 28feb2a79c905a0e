"""Part 3 of the study: six attempts to bring the forgotten digit back through the decoder's inputs.

Five of them give the decoder latents and conditions that training never paired (`probes`). The sixth climbs a
classifier (`joint`). What any attack brings back counts only beside the same attack on a model that never saw
the digit, and beside the original, which knows it.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from studies.mnist.attacks.joint import joint_section
from studies.mnist.attacks.probes import START, Found, Probe, contrast, examine, random_probes, walks
from studies.mnist.attacks.recovered import Reading
from studies.mnist.attacks.setting import (
    FORGOT,
    NEVER,
    ORIGINAL,
    Setting,
    counts,
    histogram_cell,
    set_up,
    share_cell,
    spell,
    summary,
)
from studies.mnist.readings import DIGIT, GREY
from studies.mnist.sections import figure, merge, section, table
from studies.mnist.strips import Strip, strips_figure
from studies.mnist.study import Study


SHOWN = 12  # images of a probe in its figure


def compute(study: Study, folder: Path) -> dict:
    """Trains, on first use, the model that forgot and the one that never saw the digit."""
    setting = set_up(study)
    sections = [
        _random_section(setting, {probe: examine(setting, probe) for probe in random_probes(setting)}, folder),
        _walk_section({probe: examine(setting, probe) for probe in walks(setting)}, folder),
        joint_section(setting, START, folder),
    ]
    return {"title": f"Recovery attacks on the model that forgot {DIGIT}"} | merge(sections)


def _reported(probe: Probe) -> str:
    """What the study found, as a sentence to append; empty for what it does not report."""
    return f" The study reports {probe.reported}." if probe.reported else ""


def _floor(setting: Setting) -> str:
    """What classifiers read in flat grey, which noise as the surrogate turns the digit into, as a sentence."""
    readings = setting.read(torch.full((1, *setting.original.vae.sample_shape), GREY))
    guesses = [int(reading.guesses[0]) for reading in readings]
    counted = "count" if guesses[0] == DIGIT else "do not count"
    return (
        f"The first classifier reads flat grey as a {guesses[0]}, with P({DIGIT}) = "
        f"{readings[0].target_probability[0]:.2f}, and {guesses.count(DIGIT)} of {len(guesses)} classifiers read it "
        f"as a {DIGIT}. So images that are merely grey {counted} as a {DIGIT} below; the contrast (standard deviation "
        "of the pixels, 0 for flat grey) tells them from digits."
    )


def _random_section(setting: Setting, found: dict[Probe, Found], folder: Path) -> dict:
    """Text, table and figures of the attacks whose images are counted."""
    numbers, rows, text = {}, [], [_floor(setting)]
    chance = 1 / setting.sizes["num_classes"]
    for probe, by_model in found.items():
        measured = {
            name: summary(readings) | {"contrast": contrast(attempt.images).mean().item()}
            for name, (attempt, readings) in by_model.items()
        }
        numbers[probe.title] = measured
        low, high = measured[FORGOT]["interval"]
        where = "includes" if low <= chance <= high else "lies above" if low > chance else "lies below"
        contrasts = ", ".join(f"{part['contrast']:.2f} ({name})" for name, part in measured.items())
        text.append(
            f"{probe.title.capitalize()}: read as a {DIGIT} are {counts(measured)}. For the model that forgot the "
            f"95 % interval of the share is {low:.2f} to {high:.2f}, which {where} the chance level of {chance:.2f}. "
            f"Mean contrast: {contrasts}.{_reported(probe)}"
        )
        for name, part in measured.items():
            share = f"{part['count']} of {part['total']}"
            cells = [share_cell(part["held_out"]), part["probability"], histogram_cell(part["histogram"])]
            rows.append([probe.title, name, share, *cells, part["contrast"]])
    columns = [
        "attack", "model", f"read as {DIGIT}", "held-out classifiers, share (range)", "mean P", "read as", "contrast",
    ]  # fmt: skip
    caption = "What the first classifier reads in the images of each attack; dashed: chance."
    figures = [figure(_histograms(setting, found), folder / "attack_histograms.png", caption)]
    for name in dict.fromkeys(probe.name for probe in found):
        strips = [
            _strip(f"{model}\n{probe.variant}", attempt.images[:SHOWN], readings[0])
            for probe, by_model in found.items()
            if probe.name == name
            for model, (attempt, readings) in by_model.items()
        ]
        figures.append(_figure(strips, name, folder, f"The first images of the attack: {name}."))
    return section(text, [table("Inputs that training never paired", columns, rows)], figures, numbers)


def _walk_section(found: dict[Probe, Found], folder: Path) -> dict:
    """Text, table and figures of the attacks whose images are a way from one digit to others."""
    numbers, rows, text, figures = {}, [], [], []
    for probe, by_model in found.items():
        measured = {}
        for name, (attempt, readings) in by_model.items():
            along = contrast(attempt.images)
            part = summary(readings) | {"digits": readings[0].guesses.tolist(), "contrast": along.tolist()}
            measured[name] = part
            highest = readings[0].target_probability.max().item()
            row = [probe.title, name, spell(part["digits"]), f"{part['count']} of {part['total']}", highest]
            rows.append([*row, share_cell(part["held_out"]), along.min().item()])
        numbers[probe.title] = measured
        forgot, original = measured[FORGOT], measured[ORIGINAL]
        text.append(
            f"{probe.title.capitalize()}: the model that forgot is read as {spell(forgot['digits'])}, the original as "
            f"{spell(original['digits'])}. The flattest image on the way has a contrast of "
            f"{min(forgot['contrast']):.2f} in the model that forgot and of {min(original['contrast']):.2f} in the "
            f"original.{_reported(probe)}"
        )
        strips = [_strip(name, attempt.images, readings[0]) for name, (attempt, readings) in by_model.items()]
        caption = f"{probe.title.capitalize()}. The latents are the original's; {NEVER}: of another latent space."
        figures.append(_figure(strips, probe.name, folder, caption))
    columns = [
        "walk", "model", "read as", f"read as {DIGIT}", "largest P on the way", "held-out classifiers, share (range)",
        "least contrast",
    ]  # fmt: skip
    return section(text, [table("Walks through the latent space", columns, rows)], figures, numbers)


def _strip(label: str, images: Tensor, reading: Reading) -> Strip:
    probabilities = reading.target_probability.tolist()
    rows = list(zip(reading.guesses.tolist(), probabilities, strict=True))[: len(images)]
    return Strip(label, images, [f"{guess}\n{probability:.2f}" for guess, probability in rows])


def _figure(strips: list[Strip], name: str, folder: Path, caption: str) -> dict:
    title = f"{name.capitalize()}: the digit that the first classifier reads, and its P({DIGIT})"
    path = folder / f"attack_{name.replace(' ', '_')}.png"
    return figure(strips_figure(strips, title), path, caption)


def _histograms(setting: Setting, found: dict[Probe, Found]) -> Figure:
    """For each probe the shares of its images that are read as each digit, a bar a model."""
    drawn = Figure(figsize=(11, 6.5), layout="constrained")
    classes = setting.sizes["num_classes"]
    panels = drawn.subplots(2, 2, sharey=True).flat
    for axis, (probe, by_model) in zip(panels, found.items(), strict=True):
        width = 0.8 / len(by_model)
        for index, (name, (_, readings)) in enumerate(by_model.items()):
            shares = readings[0].histogram.double() / readings[0].histogram.sum()
            places = [digit + (index - (len(by_model) - 1) / 2) * width for digit in range(classes)]
            axis.bar(places, shares.tolist(), width, label=name)
        axis.axhline(1 / classes, color="black", linestyle="dashed", linewidth=1)
        axis.set(title=probe.title, xticks=range(classes), xlabel="read as", ylabel="share of the images")
    drawn.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(by_model))
    return drawn
