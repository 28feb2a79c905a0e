"""One order for what the header of a safetensors file says, so that equal contents are equal files."""

import json
from pathlib import Path


def sort_metadata(path: str | Path) -> None:
    """Sort the file's metadata by name, in place: the library writes two or more of them in a random order.

    Raises:
        ValueError: the header has another form than the library gives it.
        KeyError: there is no metadata.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"expected a header of {size} bytes in {path}, got {len(text)} when written again")
        file.seek(8)
        file.write(text.ljust(size))
