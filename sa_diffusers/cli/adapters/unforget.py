"""Take one concept back that a chain of runs, or a run with an adapter a concept, has forgotten.

    sa-diffusers unforget runs/three --concept seven --output_dir runs/seven-again

The new folder has a plain pipeline of the other adapters, and a page: before as the run left it, after with the
concept back. Nothing is trained.
"""

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import plain_parser


def main(argv: list[str] | None = None) -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="Folder of the last run.")
    parser.add_argument("--concept", required=True, help="One of the phrasings of what is taken back.")
    parser.add_argument("--output_dir", required=True, help="New folder.")
    given = parser.parse_args(argv)
    with friendly_errors(argv):
        from sa_diffusers.runs.adapters.chains import take_back

        take_back(given.run, given.concept, given.output_dir).say()
