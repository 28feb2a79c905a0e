"""Names of files that ship with the package: "bundled/digits/pipeline" is a folder, wherever it is installed."""

from pathlib import Path


ASSETS = Path(__file__).parents[1] / "assets"


def resolve(name: str) -> str:
    """Turn "bundled/<path>" into a path inside the package; leave every other path or hub id as it is.

    Raises:
        FileNotFoundError: no such bundled file.
    """
    if not name.startswith("bundled/"):
        return name
    path = ASSETS / name.removeprefix("bundled/")
    if not path.exists():
        known = ", ".join(f"bundled/{p.relative_to(ASSETS)}" for p in sorted(ASSETS.glob("*/*")))
        raise FileNotFoundError(f"{name} does not ship with sa_diffusers; what does: {known}")
    return str(path)


def beside(model: str, file: str) -> str | None:
    """The path of a file that ships beside a bundled model; None where none does, and for other models."""
    path = Path(resolve(model)).parent / file
    return str(path) if ASSETS in path.parents and path.is_file() else None
