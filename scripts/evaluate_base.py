"""Measure a pipeline of coloured digits: does it draw what prompts name, new phrasings included, and how varied is it?

The bundled pipeline (real digits from the hub, or a local folder in its layout):
    python scripts/evaluate_base.py --data_dir ylecun/mnist
One that you trained:
    python scripts/evaluate_base.py --model runs/digits_base/pipeline --output_dir runs/my_evaluation
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from sa_diffusers.cli.parse import parse_config
from sa_diffusers.data.digits import ColoredDigits, load_strokes
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.families import Family, get_family
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.io.processes import process_state
from studies.base_quality import (
    Prompt,
    attribute_accuracy,
    composed_prompts,
    diversity,
    diversity_reference,
    draw_images,
    held_out_prompts,
    save_grid,
    template_accuracy,
)


# What a base model must reach to be worth forgetting in; diversity as a share of the real-against-real value.
BARS = {"accuracy": 0.97, "worst_accuracy": 0.93, "held_out_accuracy": 0.92, "diversity": 0.90}


@dataclass
class EvaluateBaseConfig:
    model: str = field(default="bundled/digits/pipeline", metadata={"help": "Pipeline: folder, hub id or bundled."})
    classifier: str = field(default="bundled/digits/classifier", metadata={"help": "Classifier: folder or bundled."})
    data_dir: str = field(default="ylecun/mnist", metadata={"help": "Real digits: hub id or local folder of MNIST."})
    output_dir: str = field(default="runs/evaluate_base", metadata={"help": "Folder for metrics.json and pictures."})
    num_images: int = field(default=2000, metadata={"help": "Images of composed prompts, and as many for diversity."})
    num_held_out_images: int = field(default=1026, metadata={"help": "Images of held-out sentence frames."})
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of the sampler (DPM-Solver++)."})
    guidance_scale: float = field(default=2.5, metadata={"help": "Classifier-free guidance; 1: none."})
    batch_size: int = field(default=64, metadata={"help": "Images drawn at once; changes no image."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts and images."})


def evaluate(
    family: Family, classifier: ImageClassifier, real: ColoredDigits, config: EvaluateBaseConfig
) -> tuple[dict, list[tuple[torch.Tensor, Prompt]]]:
    """Measure everything; returns the metrics, and a dozen images with their prompts of each part."""
    reference = diversity_reference(real, config.num_images, config.seed)
    prompts = {
        "composed": composed_prompts(config.num_images, config.seed),
        "held_out": held_out_prompts(config.num_held_out_images, config.seed),
        "diversity": reference.prompts,
    }
    images = {
        name: draw_images(
            family,
            part,
            seed=config.seed,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
            batch_size=config.batch_size,
            description=name,
        )
        for name, part in prompts.items()
    }
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


def main() -> None:
    config = parse_config(EvaluateBaseConfig, description=__doc__)
    output_dir = Path(config.output_dir)
    classifier = load_classifier(resolve(config.classifier)).to(process_state().device)
    pipe = load_pipeline(config.model, revision=None, variant=None, dtype="float32")
    real = ColoredDigits(*load_strokes(config.data_dir, "test", output_dir / "data"), seed=config.seed)

    start = time.perf_counter()
    metrics, examples = evaluate(get_family(pipe, sampler="dpmsolver++"), classifier, real, config)
    seconds = time.perf_counter() - start
    rows = compare_with_bars(metrics)
    print(f"{'':28} measured   bar")
    for name, measured, bar, remark in rows:
        print(f"{name:28} {measured:8.3f} {bar:5.2f}  {'' if measured >= bar else 'BELOW  '}{remark}")
    print("the worst held-out frames:")
    for template, by_attribute in sorted(metrics["templates"].items(), key=lambda item: min(item[1].values()))[:6]:
        print(f"  {template}: {', '.join(f'{name} {share:.2f}' for name, share in by_attribute.items())}")

    bars = [{"name": name, "measured": measured, "bar": bar} for name, measured, bar, _ in rows]
    write_json({"config": asdict(config), "seconds": seconds, "bars": bars, **metrics}, output_dir / "metrics.json")
    save_grid(examples, output_dir / "images.png")
    print(f"saved {output_dir / 'metrics.json'} and {output_dir / 'images.png'}")


if __name__ == "__main__":
    main()
