"""Measure a pipeline of coloured digits: does it draw what prompts name, new phrasings included, and how varied is it?

The bundled pipeline (real digits from the hub, or a local folder in its layout):
    python scripts/evaluate_base.py --data_dir ylecun/mnist
One that you trained:
    python scripts/evaluate_base.py --model runs/digits_base/pipeline --output_dir runs/my_evaluation
"""

import time
from dataclasses import asdict
from pathlib import Path

from sa_diffusers.cli.parse import parse_config
from sa_diffusers.data.digits.images import ColoredDigits, load_strokes
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.families import get_family
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.io.processes import process_state
from studies.base_quality import EvaluateBaseConfig, compare_with_bars, evaluate, save_grid


def main() -> None:
    config = parse_config(EvaluateBaseConfig, description=__doc__)
    output_dir = Path(config.output_dir)
    classifier = load_classifier(resolve(config.classifier)).to(process_state().device)
    pipe = load_pipeline(config.model, revision=None, variant=None, dtype="float32")
    real = ColoredDigits(*load_strokes(config.data_dir, "test", output_dir / "data"), seed=config.seed)

    start = time.perf_counter()
    metrics, examples = evaluate(get_family(pipe), classifier, real, config)
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
