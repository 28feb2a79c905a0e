"""Make a plain pipeline of the adapters of a chain of runs, or of a run with an adapter a concept.

    sa-diffusers merge runs/many --output_dir runs/all
    sa-diffusers merge runs/many --concepts seven eight --output_dir runs/seven-and-eight

Nothing is trained. Adapters that were trained by themselves add; TIES is there to be compared with.
"""

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import plain_parser


def main(argv: list[str] | None = None) -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="Folder of the last run.")
    parser.add_argument("--concepts", nargs="+", default=[], metavar="NAME", help="Whose adapters; default: all.")
    parser.add_argument("--how", choices=["sum", "ties"], default="sum", help="How they join.")
    parser.add_argument("--density", type=float, default=0.5, metavar="X", help="Share that TIES keeps.")
    parser.add_argument("--output_dir", required=True, help="New folder.")
    given = parser.parse_args(argv)
    with friendly_errors(argv):
        from sa_diffusers.runs.adapters.chains import merge

        density = given.density if given.how == "ties" else None
        merge(given.run, given.output_dir, given.concepts, density).say()
