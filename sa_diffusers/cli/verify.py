"""Check that a run's folder, a saved pipeline or one on the hub is what was written there, and say what to do.

A run, by the hashes that its stages and checkpoints left; a pipeline, by those in its forgotten.json:
    sa-diffusers verify runs/brad-pitt
    sa-diffusers verify me/sd-without-brad-pitt

Exits with 1 where something is damaged or missing, with one line for each.
"""

from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import plain_parser


def main(argv: list[str] | None = None) -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("source", metavar="RUN", help="Folder of a run or of a pipeline, or a hub id of a pipeline.")
    source = parser.parse_args(argv).source
    with friendly_errors(argv):
        from sa_diffusers.io.processes import say

        found, checked = verify(source)
        for line in found:
            print(line)
        if found:
            raise SystemExit(1)
        say(f"{source}: {checked} files are what was written there")


def verify(source: str) -> tuple[list[str], int]:
    """What is wrong, with what to do, a line each; and how many files were checked.

    Raises:
        ValueError: nothing there says what it should hold.
        ModelLoadError: no such repository, or no network.
    """
    from sa_diffusers.io.artifacts import read_marker
    from sa_diffusers.io.atomic_files import DamagedFile, damages
    from sa_diffusers.io.forgotten import FORGOTTEN
    from sa_diffusers.io.hub import fetch
    from sa_diffusers.io.model_names import is_on_hub
    from sa_diffusers.training.checkpoints import damaged

    folder, again = Path(source), "save it again from its run, or copy it again"
    if is_on_hub(source):
        hashes = _hashes(fetch(source, [FORGOTTEN]) / FORGOTTEN)
        folder, again = fetch(source, [FORGOTTEN, *hashes]), "push it again from its run"
    found, checked = [], 0
    for marker in sorted(folder.glob(".stages/[!.]*.json")):
        try:
            files = read_marker(marker)["files"]
        except DamagedFile as error:
            found.append(str(error))
            continue
        checked += 1 + len(files)
        advice = f"delete {marker} and run the same command, which computes the stage '{marker.stem}' again"
        found += [f"{damage}: {advice}" for damage in damages(folder, files)]
    for checkpoint in sorted(folder.glob("checkpoints/step_*[0-9]")):
        checked += 1
        found += [f"{damage}: delete {checkpoint}; training goes on from another" for damage in damaged(checkpoint)]
    if (folder / FORGOTTEN).is_file():
        files = _hashes(folder / FORGOTTEN)
        checked += len(files)
        found += [f"{damage}: {again}" for damage in damages(folder, files)]
    if not checked + len(found):
        raise ValueError(f"expected a run's folder, or a pipeline with {FORGOTTEN}, got {source}: nothing to check by")
    return found, checked


def _hashes(path: Path) -> dict[str, str]:
    """The hash of each file, by a forgotten.json."""
    from sa_diffusers.io.atomic_files import explain_read_errors, read_json

    with explain_read_errors(path):
        return dict(read_json(path, "files")["files"])
