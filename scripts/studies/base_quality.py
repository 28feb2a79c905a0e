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

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.digits.captions import caption, fill, held_out_templates, random_attributes
from sa_diffusers.data.digits.images import ColoredDigits
from sa_diffusers.data.sampling import Request, SamplingSettings, draw_samples
from sa_diffusers.evaluation.images.metrics import manifold_metrics
from sa_diffusers.evaluation.judges.classifier import ImageClassifier, Score, score_images
from sa_diffusers.families import Family
from sa_diffusers.io.configuration import option
from studies.figures import save_figure


# What a base model must reach to be worth forgetting in; diversity as a share of the real-against-real value.
BARS = {"accuracy": 0.97, "worst_accuracy": 0.93, "held_out_accuracy": 0.92, "diversity": 0.90}


@dataclass
class EvaluateBaseConfig:
    model: str = option("bundled/digits/pipeline", "Pipeline: folder, hub id or bundled.")
    classifier: str = option("bundled/digits/classifier", "Classifier: folder or bundled.")
    data_dir: str = option("ylecun/mnist", "Real digits: hub id or local folder of MNIST.")
    output_dir: str = option("runs/evaluate_base", "Folder for metrics.json and pictures.")
    num_images: int = option(2000, "Images of composed prompts, and as many for diversity.")
    num_held_out_images: int = option(1026, "Images of held-out sentence frames.")
    num_inference_steps: int = option(20, "Steps of the sampler, the one of the model's kind.")
    guidance_scale: float = option(2.5, "Classifier-free guidance; 1: none.")
    batch_size: int = option(64, "Images drawn at once; changes no image.")
    seed: int = option(0, "Seed of prompts and images.")


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
    requests = [Request(Condition(p.text), derive_seed(seed, description, index)) for index, p in enumerate(prompts)]
    settings = SamplingSettings(guidance_scale, num_inference_steps, batch_size)
    latents = draw_samples(family, requests, settings, description=description).latents
    return torch.cat([family.decode(part) for part in latents.split(batch_size)])


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
    classifier: ImageClassifier, reference: DiversityReference, generated: Tensor
) -> dict[str, dict[str, float]]:
    """Overlap of generated with real images on the classifier's features, beside that of real with real images.

    Returns:
        {"generated": the four metrics, "real": the same for the second real set in their place, "ratio": their
        quotients}; 1 is as varied as reality.
    """

    first = classifier.features_of(reference.first)
    metrics = {
        name: manifold_metrics(real=first, generated=classifier.features_of(images))
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
    save_figure(figure, path, dpi=100)


def evaluate(
    family: Family, classifier: ImageClassifier, real: ColoredDigits, config: EvaluateBaseConfig
) -> tuple[dict, list[tuple[Tensor, Prompt]]]:
    """Measure everything; returns the metrics, and a dozen images with their prompts of each part."""
    reference = diversity_reference(real, config.num_images, config.seed)
    prompts = {
        "composed": composed_prompts(config.num_images, config.seed),
        "held_out": held_out_prompts(config.num_held_out_images, config.seed),
        "diversity": reference.prompts,
    }
    names = ("seed", "guidance_scale", "num_inference_steps", "batch_size")
    settings = {name: getattr(config, name) for name in names}
    images = {name: draw_images(family, part, **settings, description=name) for name, part in prompts.items()}
    metrics = {
        "composed": attribute_accuracy(classifier, images["composed"], prompts["composed"]),
        "held_out": attribute_accuracy(classifier, images["held_out"], prompts["held_out"]),
        "templates": template_accuracy(classifier, images["held_out"], prompts["held_out"]),
        "diversity": diversity(classifier, reference, images["diversity"]),
    }
    return metrics, [pair for name in prompts for pair in list(zip(images[name], prompts[name], strict=True))[:12]]


def compare_with_bars(metrics: dict) -> list[tuple[str, float, float, str]]:
    """Rows of (what, measured, bar, remark)."""
    rows = []
    for attribute, m in metrics["composed"].items():
        rows.append((attribute, m["accuracy"], BARS["accuracy"], _interval(m["interval"], m["num_images"])))
        worst = f"{m['worst_class']}, 95 % interval {m['worst_interval'][0]:.3f} to {m['worst_interval'][1]:.3f}"
        rows.append((f"{attribute}, worst class", m["worst_accuracy"], BARS["worst_accuracy"], worst))
    for attribute, m in metrics["held_out"].items():
        remark = _interval(m["interval"], m["num_images"])
        rows.append((f"{attribute}, held-out frames", m["accuracy"], BARS["held_out_accuracy"], remark))
    for name in ("recall", "coverage"):
        values = {kind: metrics["diversity"][kind][name] for kind in ("generated", "real", "ratio")}
        remark = f"{values['generated']:.3f} generated / {values['real']:.3f} real"
        rows.append((f"{name} against real", values["ratio"], BARS["diversity"], remark))
    return rows


def _interval(interval: tuple[float, float], num_images: int) -> str:
    return f"{num_images} images, 95 % interval {interval[0]:.3f} to {interval[1]:.3f}"
