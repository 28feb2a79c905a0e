"""Read tensors from somebody else's pickle without running anything that it names.

Unpickling calls whatever functions the file asks for, so `pickle.load` hands the machine to whoever wrote the file.
Here a file may build plain containers and dense tensors. Any other global that it names becomes an inert placeholder,
which is never imported, takes every call, and is listed.
"""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class RefusedFile(ValueError):
    """A file is no pickle of tensors, or asks for more than one may."""


class Placeholder:
    """Stands for a class or function that was not imported, for its instances and for its results."""

    origin = ""  # "module.name" of what it stands for

    def __new__(cls, *_: object, **__: object) -> "Placeholder":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _take(self, *_: object, **__: object) -> object:
        return self

    # What unpickling does to an object: call it, set its state, fill it.
    __call__ = __setstate__ = __setitem__ = append = extend = add = _take


class RefusedTensor(Placeholder):
    """Stands for a tensor that was to be made from a placeholder."""


class _Entries(dict):
    """Stands for an OrderedDict, such as a state dict; its attributes (torch's `_metadata`) are left out."""

    __slots__ = ()
    __setstate__ = Placeholder._take


class _Allowed:
    """A function that a file may call, and that it cannot change: unpickling sets the state of any object."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the file sets the state of a function")


def _placeholders(value: object) -> Iterator[Placeholder | type[Placeholder]]:
    """Those in nested containers."""
    if isinstance(value, Placeholder) or (isinstance(value, type) and issubclass(value, Placeholder)):
        yield value
    elif isinstance(value, dict):
        yield from _placeholders(list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _placeholders(item)


def _unless_placeholder(rebuild: Callable[..., object]) -> _Allowed:
    """`rebuild`, which is not called where an argument is a placeholder or holds one."""

    def call(*arguments: object) -> object:
        found = next(_placeholders(arguments), None)
        if found is None:
            return rebuild(*arguments)
        refused = RefusedTensor()
        refused.origin = found.origin
        return refused

    return _Allowed(call)


def _tensor(storage: object, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor:
    """As torch's `_rebuild_tensor_v2`, without gradient and hooks."""
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, None, *rest[2:3])


def _storage(data: bytes) -> object:
    """A storage in a plain pickle is a file of torch.save's in itself."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # its message would advise to load the file without any checks
        raise pickle.UnpicklingError("a tensor's storage holds more than numbers") from error


_ALLOWED = {
    "collections.OrderedDict": _Allowed(_Entries),
    "torch._utils._rebuild_tensor_v2": _unless_placeholder(_tensor),
    "torch._utils._rebuild_parameter": _unless_placeholder(lambda data, *_: data),
    "torch.storage._load_from_bytes": _unless_placeholder(_storage),
}


def _restricted_module(dropped: set[str]) -> SimpleNamespace:
    """What stands in for the module `pickle`; adds to `dropped` the globals that were not imported."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            origin = f"{module}.{name}"
            if origin in _ALLOWED:
                return _ALLOWED[origin]
            dropped.add(origin)
            return type("Placeholder", (Placeholder,), {"origin": origin})

    return SimpleNamespace(
        __name__="restricted_pickle",
        Unpickler=Unpickler,
        load=lambda file, **options: Unpickler(file, **options).load(),
    )


def read_restricted(path: str | Path) -> tuple[Any, list[str]]:
    """Read .safetensors, a plain pickle, or a file of torch.save's: its zip format, memory-mapped, or the older one.

    Returns:
        What the file holds, with its tensors on the CPU and a `Placeholder` for every object of another kind; and the
        names of the globals that were not imported, sorted. Raises FileNotFoundError, RefusedFile.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; expected a checkpoint or a pickle of tensors")
    if said := pointer(path):
        raise RefusedFile(f"{path}: {said}")
    dropped: set[str] = set()
    try:
        return _read(path, _restricted_module(dropped)), sorted(dropped)
    except Exception as error:  # a broken pickle may raise anything
        named = f"; it names {', '.join(map(repr, sorted(dropped)[:10]))}, not imported" if dropped else ""
        raise RefusedFile(
            f"{path} cannot be read as tensors in plain containers: {type(error).__name__}: {error}{named}; expected "
            "a file of torch.save's, or a pickled dict of tensors"
        ) from error


def pointer(path: Path) -> str:
    """What to do about a file that is a pointer of Git LFS in place of the file; "" of any other."""
    with open(path, "rb") as file:
        found = file.read(24) == b"version https://git-lfs."
    return "this is a pointer of Git LFS: fetch the file itself by `git lfs pull`, or download it" if found else ""


def _read(path: Path, restricted: SimpleNamespace) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    options = {"map_location": "cpu", "pickle_module": restricted, "weights_only": False}
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # where torch.load also looks
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                raise pickle.UnpicklingError("a TorchScript archive holds a program")
        return torch.load(path, mmap=True, **options)
    if tarfile.is_tarfile(path):  # torch.load would unpack it
        raise pickle.UnpicklingError("a tar archive of a torch older than 0.1.10")
    with open(path, "rb") as file:
        first = restricted.load(file)
    # The older format of torch.save is a row of pickles, and the first of them is a number.
    is_older = isinstance(first, int) and first == torch.serialization.MAGIC_NUMBER
    return torch.load(path, **options) if is_older else first
