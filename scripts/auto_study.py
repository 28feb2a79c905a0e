"""What `--surrogate auto` chooses for the digits, inks and strokes of the bundled models.

    python scripts/auto_study.py --output_dir runs/auto_study
    python scripts/auto_study.py --output_dir runs/auto_forgets --models digits --forget --seeds 0 1 2
    python scripts/auto_study.py --output_dir runs/auto_inks --models digits --forget --seeds 0 1 2 \\
        --concepts yellow green cyan blue pink --among red yellow green cyan blue pink

Only chooses, half a minute a concept on one core: by the words that ship, and without the siblings that are known of
these, unless --siblings says so; or of the words that --among names. --forget also forgets each concept with the
chosen surrogate, and with the one that is known by hand, two minutes each, and says whether the first does well
enough, or as well as the second; among named words, whether it does well enough. At the end it counts the digits and
inks that do, by the means over the seeds. Writes auto.json, of which docs/results has a copy. The same command
resumes.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import write_json, write_text
from sa_diffusers.io.configuration import config_from_dict, layered, read_values
from sa_diffusers.io.loading import load_pipeline, pipeline_hashes
from sa_diffusers.io.model_names import folder_name
from sa_diffusers.io.stages import Artifact, content_fingerprint
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.inputs import read_inputs
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages import auto
from sa_diffusers.runs.surrogates.settling import settle_surrogates


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("bold, thick",)
CONCEPTS = [*(f"{name}, {i}" for i, name in enumerate(NUMBERS)), "red", *STROKES]
MODELS = ("digits", "digits_flow")
RECIPES = {"digits": "digits_edit"}  # by which configuration a model forgets, where that is not its own
FEW = {"eval_images_concept": 32, "eval_images_class": 16, "eval_images_other": 64, "track_steps": None}
LEFT, KEPT = "concept_probability_unseen", "retained_accuracy"
ENOUGH = {LEFT: 0.02, KEPT: 0.985}  # whatever the surrogate that is known by hand does


def choose(
    model: str, concept: str, folder: Path, known: bool = False, seed: int = 0, among: Sequence[str] = ()
) -> dict[str, Any]:
    """The choice for one concept, with its seconds, and what is written by hand in assets/surrogates.yaml.

    Args:
        among: words to choose among, the concept's own left out; none: those that `auto` finds.
    """
    given: dict[str, Any] = {"concept": concept, "surrogate": "auto", "classifier": [], "seed": seed}
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
    words = [word for word in among if not inputs.concepts.named_in(word)]
    with patch.object(auto, "candidates", lambda *_: words) if among else nullcontext():
        settle_surrogates(context)
    (choice,) = context.value("auto")
    return choice | {"by_hand": find_concept(concept).surrogate, "seconds": round(context.spent["surrogate"], 1)}


def forget_with(model: str, concept: str, surrogate: str, folder: Path, seed: int = 0) -> dict[str, Any]:
    """What forgetting with a surrogate leaves; the folder's first run draws and estimates what serves all."""
    shared = folder.parent / "shared.txt"
    given = {"concept": concept, "surrogate": surrogate, "seed": seed, "output_dir": str(folder)}
    if shared.exists() and (first := Path(shared.read_text())) != folder:
        given |= {"samples": str(first / "samples"), "fisher": str(first / "fisher.safetensors")}
    values = read_values(ForgetConfig, f"bundled/{RECIPES.get(model, model)}")
    options = config_from_dict(ForgetConfig, layered(ForgetConfig, values, FEW | given | {"num_threads": None}))
    after = run_forgetting(options).metrics["after"]
    if not shared.exists():
        write_text(str(folder), shared)
    return {"surrogate": surrogate} | {name: after[name] for name in (*ENOUGH, "concept_rate_when_unnamed")}


def meets(chosen: Mapping[str, float], by_hand: Mapping[str, float] = ENOUGH) -> bool:
    """Whether the chosen surrogate does well enough, or as well as the one known by hand."""
    most, least = max(ENOUGH[LEFT], by_hand[LEFT]), min(ENOUGH[KEPT], by_hand[KEPT])
    return chosen[LEFT] <= most and chosen[KEPT] >= least


def study(model: str, concept: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The choice of one seed and, if asked, what forgetting by it leaves, and by the surrogate known by hand."""
    folder, name = args.output_dir / model, concept.split(",")[0]
    folder = folder / f"seed_{seed}" if seed else folder
    among = f"_among_{fingerprint({'words': args.among})[:8]}" if args.among else ""
    choice = choose(model, concept, folder / f"{name}{among}", args.siblings, seed, args.among)
    if args.forget:
        words = dict.fromkeys(filter(None, (choice["chosen"], None if args.among else choice["by_hand"])))
        folders = {word: folder / f"{name}_to_{folder_name(word)}" for word in words}
        runs = {word: forget_with(model, concept, word, path, seed) for word, path in folders.items()}
        choice["forgotten"] = list(runs.values())
        by_hand = ENOUGH if args.among else runs.get(choice["by_hand"], ENOUGH)
        choice["meets"] = meets(runs[choice["chosen"]], by_hand)
    return choice


def counted(choices: Mapping[str, Mapping[str, Any]], among: bool) -> str:
    """How many concepts meet the bars by the means over the seeds; a stroke gives way to nothing, and does not count.

    Args:
        choices: of a model, by concept; those of later seeds stand in the first one's "seeds".
        among: whether words were named to choose among, and what is known by hand says nothing.
    """
    fine = {}
    for concept, first in choices.items():
        if concept not in STROKES and "forgotten" in first:
            runs = [one["forgotten"] for one in (first, *first.get("seeds", {}).values())]
            chosen, by_hand = ({key: fmean(own[side][key] for own in runs) for key in ENOUGH} for side in (0, -1))
            fine[concept] = meets(chosen, ENOUGH if among or not first["by_hand"] else by_hand)
    missed = ", ".join(concept for concept, well in fine.items() if not well)
    return f"{sum(fine.values())} of {len(fine)} meet the bars" + (f"; missed: {missed}" if missed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/auto_study"), help="default: %(default)s")
    parser.add_argument("--models", nargs="+", default=MODELS, help="default: %(default)s")
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS, help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--among", nargs="+", default=[], help="words to choose among; default: what auto finds")
    parser.add_argument("--siblings", action="store_true", help="let it know the concepts' siblings")
    parser.add_argument("--forget", action="store_true", help="also forget with what was chosen, and judge that")
    args = parser.parse_args()
    with friendly_errors():
        found: dict[str, dict[str, Any]] = {}
        for model in args.models:
            for concept in args.concepts:
                for seed in args.seeds:
                    choice = study(model, concept, seed, args)
                    first = found.setdefault(model, {}).setdefault(concept, choice)
                    if first is not choice:
                        first.setdefault("seeds", {})[str(seed)] = choice
                    write_json(found, args.output_dir / "auto.json")
            if args.forget:
                print(f"{model}: {counted(found[model], bool(args.among))}")


if __name__ == "__main__":
    main()
