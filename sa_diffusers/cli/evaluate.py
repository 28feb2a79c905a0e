r"""Measure images: of text-to-image pipelines side by side, of a run of this package, or of two folders.

evaluate pipelines PIPELINE: any text-to-image pipelines, ours or not, by what is left of a concept and of everything
else; the first is the reference:
    sa-diffusers evaluate pipelines bundled/digits/pipeline --compare runs/digits-seven --concept "seven, 7"
    sa-diffusers evaluate pipelines CompVis/stable-diffusion-v1-4 --compare runs/brad-pitt other/model \
        --concept "Brad Pitt" --neighbours "Tom Cruise, Johnny Depp" --metrics clip,identity,change
evaluate images REAL GENERATED: two folders of images, by FID, KID, Inception Score, precision and recall:
    sa-diffusers evaluate images real_images my_images --metrics fid,prc
evaluate run RUN: a run of `forget` or `train-base`, whose images are drawn first, by the features of
a classifier:
    sa-diffusers evaluate run runs/forget_0 --real mnist --metrics fid,prc,classifier \
        --extractor runs/mnist_classifier/classifier --classifier runs/mnist_classifier/classifier

`evaluate run --help` has the options of a run, and so with the others.

A run that forgot a class is compared over the retained classes alone. The default extractor, Inception, needs
`pip install "sa_diffusers[fid]"`; with any other the FID is called frechet_distance, the KID
kernel_distance and the Inception Score classifier_score, and none of them compares with published numbers. Precision
is the share of generated images that lie among the real ones, recall that of real images among the generated ones.
"""

import sys
from itertools import takewhile
from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.evaluation.images.options import FoldersConfig, RunConfig
from sa_diffusers.evaluation.options import PipelineEvaluationConfig


# The options of each subcommand, and those that its leading words stand for.
COMMANDS = {
    "run": (RunConfig, ["--run"]),
    "images": (FoldersConfig, ["--real", "--generated"]),
    "pipelines": (PipelineEvaluationConfig, ["--pipeline"]),
}


def main(argv: list[str] | None = None) -> None:
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    name = Path(sys.argv[0]).name
    if command in ("-h", "--help"):
        print(f"usage: {name} {'|'.join(COMMANDS)} ...\n\n{__doc__}", end="")
        raise SystemExit(0)
    if command not in COMMANDS:
        said = f"expected {', '.join(COMMANDS)} as the first word, got {command!r}"
        print(f"{name}: error: {said} (--help shows each)", file=sys.stderr)
        raise SystemExit(2)
    config_class, names = COMMANDS[command]
    words = list(takewhile(lambda word: not word.startswith("-"), rest))
    named = [word for pair in zip(names, words, strict=False) for word in pair]
    with friendly_errors(rest):
        from sa_diffusers.io.processes import say

        arguments = named + rest[len(named) // 2 :]
        config = parse_config(config_class, arguments, description=__doc__, prog=f"{name} {command}")
        if isinstance(config, PipelineEvaluationConfig):
            from sa_diffusers.evaluation.suite.evaluate import evaluate_pipelines

            found = evaluate_pipelines(config)
            say(f"\n{found['summary']}\n\nsaved {found['output_dir']}: report.html, evaluation.md, evaluation.json")
            return
        from sa_diffusers.evaluation.images.comparison import evaluate, table
        from sa_diffusers.io.atomic_files import write_json

        result = evaluate(config)
        output = config.output or (Path(config.run) / "evaluate.json" if command == "run" else None)
        if output is not None:
            write_json(result, output)
        say(f"\n{table(result)}" + (f"\n\nsaved {output}" if output is not None else ""))
