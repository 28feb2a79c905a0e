"""How well a pipeline of coloured digits draws what it is asked for, and how varied: the bars of the bundled one."""

import random
import string
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.digits import ColoredDigits, caption, fill, held_out_templates, random_attributes
from sa_diffusers.evaluation.images.distribution import manifold_metrics
from sa_diffusers.evaluation.judges.classifier import ImageClassifier, Score, score_images
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import atomic_path


@dataclass(frozen=True)
class Prompt:
    """A prompt of which is known what it asks for: `named` has the class of each attribute in it, and no other."""

    text: str
    named: dict[str, str]
    template: str | None = None  # the held-out sentence frame it was made from


def compose_prompt(attributes: dict[str, str], rng: random.Random, keep: float = 0.75) -> Prompt:
    """A caption of the training grammar that names each attribute with probability `keep`."""
    named = {attribute: name for attribute, name in attributes.items() if rng.random() < keep}
    return Prompt(caption(named, rng, keep=1.0), named)


def composed_prompts(num_prompts: int, seed: int) -> list[Prompt]:
    """Captions as in training, of random attributes."""
    rngs = [random.Random(f"composed prompt {seed} {index}") for index in range(num_prompts)]
    return [compose_prompt(random_attributes(rng), rng) for rng in rngs]


def held_out_prompts(num_prompts: int, seed: int) -> list[Prompt]:
    """Sentence frames that training never saw, all in turn, filled with random attributes."""
    templates = held_out_templates()
    prompts = []
    for index in range(num_prompts):
        rng = random.Random(f"held-out prompt {seed} {index}")
        template = templates[index % len(templates)]
        slots = {slot for _, slot, _, _ in string.Formatter().parse(template) if slot}
        named = {attribute: name for attribute, name in random_attributes(rng).items() if attribute in slots}
        prompts.append(Prompt(fill(template, named, rng), named, template))
    return prompts


def draw_images(
    family: Family,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    guidance_scale: float,
    num_inference_steps: int,
    batch_size: int = 64,
    description: str = "draw",
) -> Tensor:
    """One image for each prompt: [N, 3, H, W] in [-1, 1]. Each depends on (seed, description, its index) only."""
    seeds = [derive_seed(seed, description, index) for index in range(len(prompts))]
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=description, mininterval=1):
        part = slice(start, start + batch_size)
        texts = [prompt.text for prompt in prompts[part]]
        images.append(family.decode(family.draw(texts, seeds[part], guidance_scale, num_inference_steps)))
    return torch.cat(images)


def attribute_accuracy(
    classifier: ImageClassifier, images: Tensor, prompts: Sequence[Prompt]
) -> dict[str, dict[str, Any]]:
    """For each attribute the share of images that show it as named, with its 95 % interval and its worst class.

    Only prompts that name an attribute count for it. Returns plain numbers, ready for JSON.
    """
    scores = score_images(classifier, images, [prompt.named for prompt in prompts])
    accuracy = {}
    for attribute, by_class in scores.items():
        overall = Score.total_of(by_class.values())
        worst = min(by_class, key=lambda name, by_class=by_class: by_class[name].share)
        accuracy[attribute] = {
            "accuracy": overall.share,
            "interval": overall.interval,
            "num_images": overall.total,
            "worst_class": worst,
            "worst_accuracy": by_class[worst].share,
            "worst_interval": by_class[worst].interval,
            "classes": {name: by_class[name].share for name in sorted(by_class)},
        }
    return accuracy


def template_accuracy(
    classifier: ImageClassifier, images: Tensor, prompts: Sequence[Prompt]
) -> dict[str, dict[str, float]]:
    """For each held-out frame the accuracy of each attribute that it names."""
    accuracy = {}
    for template in dict.fromkeys(prompt.template for prompt in prompts):
        rows = [index for index, prompt in enumerate(prompts) if prompt.template == template]
        scores = score_images(classifier, images[rows], [prompts[index].named for index in rows])
        accuracy[template] = {name: Score.total_of(by_class.values()).share for name, by_class in scores.items()}
    return accuracy


@dataclass(frozen=True)
class DiversityReference:
    """Two sets of real images [N, 3, H, W] without a digit in common, and for the second the prompts that describe it.

    Images drawn from these prompts have the attributes of the second set, one for one. What sets them apart from the
    first set beyond what sets the second apart is therefore the model's doing.
    """

    first: Tensor
    second: Tensor
    prompts: list[Prompt]


def diversity_reference(data: ColoredDigits, num_images: int, seed: int) -> DiversityReference:
    """Draw the two sets, of `num_images` each, from held-out real images.

    Raises:
        ValueError: fewer than 2 * num_images digits.
    """
    if 2 * num_images > len(data):
        raise ValueError(
            f"expected at least {2 * num_images} real images for two sets of {num_images}, got {len(data)}"
        )
    order = torch.randperm(len(data), generator=seeded(seed, "real sets"))[: 2 * num_images].tolist()
    images = torch.stack([data.image(index) for index in order])
    prompts = [
        compose_prompt(data.attributes(index), random.Random(f"full prompt {seed} {index}"), keep=1.0)
        for index in order[num_images:]
    ]
    return DiversityReference(images[:num_images], images[num_images:], prompts)


@torch.no_grad()
def diversity(
    classifier: ImageClassifier, reference: DiversityReference, generated: Tensor, k: int = 5
) -> dict[str, dict[str, float]]:
    """Overlap of generated with real images on the classifier's features, beside that of real with real images.

    Returns:
        {"generated": the four metrics, "real": the same for the second real set in their place, "ratio": their
        quotients}; 1 is as varied as reality.
    """

    def features(images: Tensor) -> Tensor:
        parts = images.split(256)
        return torch.cat([classifier.features(part.to(classifier.device)).cpu() for part in parts])

    first = features(reference.first)
    metrics = {
        name: vars(manifold_metrics(real=first, generated=features(images), k=k))
        for name, images in (("generated", generated), ("real", reference.second))
    }
    return metrics | {"ratio": {name: value / metrics["real"][name] for name, value in metrics["generated"].items()}}


def save_grid(examples: Sequence[tuple[Tensor, Prompt]], path: Path, columns: int = 6) -> None:
    """Save a PNG of images [3, H, W] in [-1, 1], each under its prompt."""
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, (image, prompt) in zip(panels, examples, strict=False):  # the last row may not be full
        axes.imshow(image.add(1).div(2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(textwrap.fill(prompt.text, width=30) or "(empty)", fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
