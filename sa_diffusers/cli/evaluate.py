r"""Measure images: any text-to-image pipelines side by side, a run of this package, or two folders.

Text-to-image pipelines, ours or not, by what is left of a concept and of everything else; the first is the reference:
    python scripts/evaluate.py bundled/digits/pipeline --compare runs/digits-seven --concept "seven, 7"
    python scripts/evaluate.py CompVis/stable-diffusion-v1-4 --compare runs/brad-pitt other/model \
        --concept "Brad Pitt" --neighbours "Tom Cruise, Johnny Depp" --metrics clip,identity,change
Two folders of images, by FID, KID, Inception Score, precision and recall:
    python scripts/evaluate.py real_images my_images --metrics fid,prc
A run of scripts/forget.py or scripts/train_base.py, whose images are drawn first, by the features of a classifier:
    python scripts/evaluate.py runs/forget_0 --real mnist --metrics fid,prc,classifier \
        --extractor runs/mnist_classifier/classifier --classifier runs/mnist_classifier/classifier

The first word decides: `python scripts/evaluate.py bundled/digits/pipeline --help` has the options for pipelines.

A run that forgot a class is compared over the retained classes alone. The default extractor, Inception, needs
`pip install -c constraints.txt -e ".[fid]"`; with any other the FID is called frechet_distance, the KID
kernel_distance and the Inception Score classifier_score, and none of them compares with published numbers. Precision
is the share of generated images that lie among the real ones, recall that of real images among the generated ones.
A folder alone stands for --run, two for --real and --generated, in this order.
"""

import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise, takewhile
from pathlib import Path

from sa_diffusers.cli.parse import friendly_errors, parse_config
from sa_diffusers.evaluation.images.options import EvaluateConfig
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig


# What only an evaluation of pipelines has; of these, what nobody would give who means anything else.
PIPELINE_FLAGS = {"--concept", "--compare", "--i2p", "--help", "-h"}
PIPELINES_ONLY = {"--pipeline", "--compare", "--names"}
PIPELINE_METRICS = {"clip", "change", "nudity", "identity"}
MANY, NONE = ("--compare", "--names"), ("--show_nsfw", "--overwrite")  # options by the words they take; others: one


def name_folders(argv: list[str]) -> list[str]:
    """The command line with the options' names put before leading folders."""
    folders = leading_words(argv)
    names = {1: ["--run"], 2: ["--real", "--generated"]}.get(len(folders), [])
    named = [word for pair in zip(names, folders, strict=False) for word in pair]
    return named + argv[len(folders) if names else 0 :]


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments; None: those of this process."""
    argv = sys.argv[1:] if argv is None else argv
    if advice := misplaced(argv):
        print(f"{Path(sys.argv[0]).name}: error: {advice} (--help explains every option)", file=sys.stderr)
        raise SystemExit(2)
    if is_for_pipelines(argv):
        named = ["--pipeline", *argv] if leading_words(argv) else argv
        config = parse_config(PipelineEvaluationConfig, named, description=__doc__)
        with friendly_errors(argv):
            from sa_diffusers.evaluation.suite.evaluate import evaluate_pipelines

            found = evaluate_pipelines(config)
            print(f"\n{found['summary']}\n\nsaved {found['output_dir']}: report.html, evaluation.md, evaluation.json")
        return
    config = parse_config(EvaluateConfig, name_folders(argv), description=__doc__)
    with friendly_errors(argv):
        from sa_diffusers.evaluation.images.comparison import evaluate, table
        from sa_diffusers.io.atomic_files import write_json

        result = evaluate(config)
        output = config.output or (Path(config.run) / "evaluate.json" if config.run else None)
        if output is not None:
            write_json(result, output)
        print(f"\n{table(result)}" + (f"\n\nsaved {output}" if output is not None else ""))


def kind_of(word: str) -> str | None:
    """ "text" of a text-to-image pipeline or a run of one, "classes" of other pipelines; None: no pipeline here."""
    if word.startswith("bundled/"):
        return "text"
    for index in (Path(word, "model_index.json"), Path(word, "pipeline", "model_index.json")):
        if index.is_file():
            from sa_diffusers.families import family_class  # only now: it takes seconds, which --help can do without

            name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
            family = family_class(name[-1] if isinstance(name, list) else name)
            return "classes" if family and "text" not in family.capabilities else "text"
    return None


def is_for_pipelines(argv: list[str]) -> bool:
    """Whether the first word is a text-to-image pipeline, rather than images or a run to compare with real images.

    A run of one is meant as a pipeline where a concept or pipelines to compare with are given, and so is what may be a
    hub id, or is mistyped.
    """
    words, flags = leading_words(argv), {word.split("=")[0] for word in argv}
    if flags & PIPELINES_ONLY:
        return True
    if len(words) != 1:
        return False
    metrics = " ".join(
        after for before, after in pairwise(["", *argv]) if "--metrics" in (before, after.split("=")[0])
    )
    asked = bool(flags & PIPELINE_FLAGS) or bool(set(re.findall(r"\w+", metrics)) & PIPELINE_METRICS)
    if words[0].startswith("bundled/") or Path(words[0], "model_index.json").is_file():
        return True
    kind = kind_of(words[0])
    return asked and (kind == "text" or kind is None and not Path(words[0]).exists())


def leading_words(argv: Sequence[str]) -> list[str]:
    """The words before the first option."""
    return list(takewhile(lambda word: not word.startswith("-"), argv))


def misplaced(argv: list[str]) -> str | None:
    """What was probably meant where pipelines stand in another place than the first; None: nothing is wrong there."""
    words = leading_words(argv)
    rest, flags = argv[len(words) :], {word.split("=")[0] for word in argv}
    if words and "--pipeline" in flags:
        return f"the first word, {words[0]}, is the pipeline to judge already: leave --pipeline away"
    if len(words) > 1:
        kinds = [kind_of(word) for word in words]
        if "text" in kinds or flags & PIPELINES_ONLY:
            first = kinds.index("text") if "text" in kinds else 0  # a second --compare adds to the one given here
            return _meant([words[first], "--compare", *words[:first], *words[first + 1 :], *rest])
        if "classes" in kinds and len(words) == 2:
            run = kinds.index("classes")
            return _meant(["--run", words[run], "--real", words[1 - run], *rest])
    if not words and "--pipeline" not in flags:
        for index in _strays(argv):
            if kind_of(argv[index]) or flags & (PIPELINES_ONLY | {"--concept"}):
                return _meant([argv[index], *argv[:index], *argv[index + 1 :]]) + " The pipeline comes first."
    return None


def _meant(argv: list[str]) -> str:
    return f"did you mean: python scripts/evaluate.py {shlex.join(argv)} ?"


def _strays(argv: list[str]) -> list[int]:
    """Where words stand that no option takes."""
    found, takes = [], 0.0
    for index, word in enumerate(argv):
        if word.startswith("-"):
            name, _, value = word.partition("=")
            takes = 0 if value or name in NONE else math.inf if name in MANY else 1
        elif takes:
            takes -= 1
        else:
            found.append(index)
    return found


if __name__ == "__main__":
    main()
