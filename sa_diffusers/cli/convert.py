"""Import files of the authors' Stable Diffusion code; nothing that a file names is imported or run.

A checkpoint with CompVis's or diffusers' names (.ckpt, .safetensors), over the base pipeline that it was trained from:
    sa-diffusers convert checkpoint last.ckpt --ema --model CompVis/stable-diffusion-v1-4 --output runs/theirs
Their Fisher, for `sa-diffusers forget --fisher`. It is that of the raw weights of sd-v1-4-full-ema.ckpt, so that:
    sa-diffusers convert checkpoint sd-v1-4-full-ema.ckpt --model CompVis/stable-diffusion-v1-4 --output runs/raw
    sa-diffusers convert fisher full_fisher_dict.pkl --model runs/raw --output runs/fisher.safetensors
"""

import argparse
from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import plain_parser
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.processes import say


def tell_dropped(dropped: list[str]) -> None:
    """Names as Python writes them: they come from the file, which may hold a terminal's commands."""
    if dropped:
        more = f" and {len(dropped) - 10} more" if len(dropped) > 10 else ""
        say(f"dropped, never imported: {', '.join(map(ascii, dropped[:10]))}{more}")


def convert_fisher(args: argparse.Namespace) -> None:
    from sa_diffusers.families.authors_files import import_fisher

    if args.output.suffix != ".safetensors":
        raise ValueError(f"expected --output to end in .safetensors, got {args.output}")
    fisher, dropped = import_fisher(args.file, args.model)
    with atomic_path(args.output) as temporary:
        fisher.save(temporary)
    tell_dropped(dropped)
    say(f"{args.output}: {len(fisher.tensors)} tensors, for --model {args.model} alone")


def convert_checkpoint(args: argparse.Namespace) -> None:
    from sa_diffusers.families import get_family
    from sa_diffusers.families.authors_files import KEPT, import_checkpoint
    from sa_diffusers.io.loading import save_pipeline

    pipeline, ignored, dropped = import_checkpoint(args.file, args.model, args.ema)
    save_pipeline(pipeline, args.output, get_family(pipeline).module, "float32")
    tell_dropped(dropped)
    if kept := ignored.pop(KEPT, 0):
        say(f"{kept} tensors of the trained part are not in the file, and stay those of {args.model}")
    if ignored:
        counts = ", ".join(f"{ascii(name)} ({count})" for name, count in sorted(ignored.items()))
        say(f"not taken from the file, tensors of: {counts}; all but the trained part is that of {args.model}")
    say(f"{args.output}: the trained part has the {'EMA' if args.ema else 'raw'} weights of {args.file}")


def main(argv: list[str] | None = None) -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=plain_parser)
    fisher = kinds.add_parser("fisher", help="pickled Fisher to a .safetensors file for --fisher")
    fisher.set_defaults(convert=convert_fisher)
    checkpoint = kinds.add_parser("checkpoint", help="checkpoint to a pipeline")
    checkpoint.set_defaults(convert=convert_checkpoint)
    checkpoint.add_argument("--ema", action="store_true", help="take the EMA weights, which the authors sample from")
    for kind in (fisher, checkpoint):
        kind.add_argument("file", type=Path, help="the file to import")
        kind.add_argument("--model", required=True, help="pipeline that the file belongs to: folder or hub id")
        kind.add_argument("--output", type=Path, required=True, help="what to write; must not exist")
    args = parser.parse_args(argv)
    with friendly_errors(argv):
        if args.output.exists():
            raise ValueError(f"{args.output} exists; pass another --output, or remove it")
        args.convert(args)
