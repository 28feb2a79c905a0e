"""What `--surrogate auto` chooses for the digits, inks and strokes of the bundled models.

    python scripts/auto_study.py --output_dir runs/auto_study

Only chooses, half a minute a concept on one core: by the words that ship, and without the siblings that are known of
these, unless --siblings says so. Writes auto.json, of which docs/results has a copy. The same command resumes.
"""

import argparse
from pathlib import Path
from typing import Any

from sa_diffusers.cli.parse import friendly_errors
from sa_diffusers.data.concepts import find_concept
from sa_diffusers.families import get_family
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.configuration import config_from_dict, layered, read_values
from sa_diffusers.io.loading import load_pipeline, pipeline_hashes
from sa_diffusers.io.stages import Artifact, content_fingerprint
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.inputs import read_inputs
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.surrogates.settling import settle_surrogates


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONCEPTS = [*(f"{name}, {i}" for i, name in enumerate(NUMBERS)), "red", "bold, thick"]
MODELS = ("digits", "digits_flow")


def choose(model: str, concept: str, folder: Path, known: bool) -> dict[str, Any]:
    """The choice for one concept, with its seconds, and what is written by hand in assets/surrogates.yaml."""
    given: dict[str, Any] = {"concept": concept, "surrogate": "auto", "classifier": []}
    given["siblings"] = None if known else concept  # no word is its own sibling
    values = layered(ForgetConfig, read_values(ForgetConfig, f"bundled/{model}"), given)
    options = config_from_dict(ForgetConfig, values).resolved()
    inputs = read_inputs(options)
    pipeline = load_pipeline(options.model, options.revision, options.variant, options.dtype)
    context = RunContext(options, inputs, get_family(pipeline, sampler=options.sampler), folder)
    context.artifacts["model"] = Artifact(pipeline, pipeline_hashes(pipeline))
    context.artifacts |= {
        name: Artifact(value, content_fingerprint(value))
        for name, value in (("prompts", inputs.prompts), ("templates", inputs.templates))
    }
    settle_surrogates(context)
    (choice,) = context.value("auto")
    return choice | {"by_hand": find_concept(concept).surrogate, "seconds": round(context.spent["surrogate"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/auto_study"), help="default: %(default)s")
    parser.add_argument("--models", nargs="+", default=MODELS, help="default: %(default)s")
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS, help="default: %(default)s")
    parser.add_argument("--siblings", action="store_true", help="let it know the concepts' siblings")
    args = parser.parse_args()
    with friendly_errors():
        found: dict[str, dict[str, Any]] = {}
        for model in args.models:
            for concept in args.concepts:
                folder = args.output_dir / model / concept.split(",")[0]
                found.setdefault(model, {})[concept] = choose(model, concept, folder, args.siblings)
                write_json(found, args.output_dir / "auto.json")


if __name__ == "__main__":
    main()
