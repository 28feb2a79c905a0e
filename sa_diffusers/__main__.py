"""The command `sa-diffusers`, or `python -m sa_diffusers`: one word chooses what it does."""

import sys
from importlib import import_module

from sa_diffusers import __version__


COMMANDS = {  # word: (module of sa_diffusers.cli, what it does)
    "forget": ("forget", "make a pipeline forget a concept"),
    "evaluate": ("evaluate", "judge pipelines, a run, or folders of images"),
    "attack": ("attack", "try to bring a forgotten concept back"),
    "unforget": ("adapters.unforget", "take a concept back that a run has forgotten"),
    "merge": ("adapters.merge", "make a pipeline of some of a run's adapters"),
    "push": ("push", "push what a run left to the hub"),
    "choose": ("adapters.choose", "make another strength of a run its result"),
    "verify": ("verify", "check that what a run left, or the hub has, is whole"),
    "convert": ("convert", "import a checkpoint, or the authors' Fisher"),
    "train-base": ("train_base", "train a model to forget concepts of afterwards"),
    "train-classifier": ("train_classifier", "train a classifier that judges pictures"),
    "surrogates": ("surrogates", "order surrogates by how much they would change"),
}
HELP = f"""usage: sa-diffusers COMMAND [--help] ...

Selective Amnesia for diffusers: make a deep generative model forget a concept on command.

    sa-diffusers forget --config bundled/digits        the bundled example: offline, in minutes
    sa-diffusers forget --concept "Brad Pitt" --surrogate "a middle aged man"
    accelerate launch -m sa_diffusers.cli.forget ...   the same on several devices

commands:
{chr(10).join(f"  {name:<18}{what}" for name, (_, what) in COMMANDS.items())}
  --version         print the version
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first of the arguments names; None: those of this process."""
    word, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if word in ("--help", "-h", "help"):
        print(HELP, end="")
    elif word == "--version":
        print(f"sa_diffusers {__version__}")
    elif word not in COMMANDS:
        print(f"sa-diffusers: error: unknown command {word!r}; expected {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    else:
        sys.argv[0] = f"sa-diffusers {word}"  # the program's name in its help and errors
        import_module(f"sa_diffusers.cli.{COMMANDS[word][0]}").main(rest)


if __name__ == "__main__":
    main()
