"""Push what a finished run left to the hub, each part with its card, to a repository of its own.

    sa-diffusers push runs/brad-pitt --pipeline me/sd-without-brad-pitt
    sa-diffusers push runs/brad-pitt --fisher me/sd-fisher --fisher_dtype float16 --samples me/sd-samples

Others reuse these by `forget --fisher me/sd-fisher --samples me/sd-samples`. Log in first: `hf auth login`.
A push that fails half way leaves nothing half made on the hub, and loses nothing: run the same command again.
"""

from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import plain_parser


def main(argv: list[str] | None = None) -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("run", type=Path, help="Folder of the run.")
    parser.add_argument("--pipeline", metavar="ID", help="Repository for the pipeline that has forgotten.")
    parser.add_argument("--lora", metavar="ID", help="Repository for the LoRA, of a run that trained one.")
    parser.add_argument("--fisher", metavar="ID", help="Repository for the Fisher.")
    parser.add_argument("--samples", metavar="ID", help="Data set repository for the samples.")
    parser.add_argument("--speed_retained", metavar="ID", help="Repository for what SPEED read of retained prompts.")
    parser.add_argument(
        "--fisher_dtype", choices=["float32", "float16"], default="float32", help="float16: half the size, rounded."
    )
    parser.add_argument(
        "--samples_dtype", choices=["float32", "float16"], default="float32", help="The same of the samples."
    )
    parser.add_argument("--private", action="store_true", help="Make new repositories private.")
    options = parser.parse_args(argv)
    parts = ("pipeline", "lora", "fisher", "samples", "speed_retained")
    ids = {part: getattr(options, part) for part in parts if getattr(options, part)}
    if not ids:
        parser.error(f"expected the repository of at least one part: --{', --'.join(parts)}")
    with friendly_errors(argv):
        from sa_diffusers.data.sharing import push_run
        from sa_diffusers.io.processes import say

        dtypes = {"fisher_dtype": options.fisher_dtype, "samples_dtype": options.samples_dtype}
        urls = push_run(options.run, ids, private=options.private, **dtypes)
        for part, url in urls.items():
            say(f"{part}: {url}")
