"""Configuration dataclasses: fields with help texts, filled from dictionaries and YAML under checks, and back."""

import dataclasses
import difflib
import math
import os
import reprlib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sa_diffusers.io.atomic_files import read_text
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.model_names import base_name


ConfigT = TypeVar("ConfigT")
BOUNDS = ("above", "least", "below")
# Of a field, beside its help.
FACTS = frozenset((*BOUNDS, "identity", "later", "otherwise", "everyday", "blank", "listed"))


def option(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field with the text that --help prints, and what else is to be known of it.

    Args:
        facts: above, least, below: a number, or each of several, must be above, at least, or below this, where it is
            not None. blank: True where an empty text means something. listed: True where a command line may repeat it,
            which is one text with "; " between. identity: False where the option says how a run is watched, shared or
            fitted into memory, and changes no result. later: True where runs were made before there was such an
            option, and did what its default does; see `unsaid`. otherwise: what None stands for, where a method has no
            value of its own. everyday: True for the few that --help shows when it is not asked for more.
    """
    unknown = facts.keys() - FACTS
    if unknown:
        raise TypeError(f"expected facts of {', '.join(sorted(FACTS))}, got {min(unknown)}")
    metadata = {"help": help, **facts}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base of configuration dataclasses; raises ValueError for a value of another type than its field's, as of a YAML
    file, a number out of its range, or an empty text, such as a shell makes of a variable that is not set."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _init_fields(type(self))}
        for name, value in check_values(type(self), given, source=type(self).__name__).items():
            setattr(self, name, value)
            field = _init_fields(type(self))[name]
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int | float):
                    _check_range(name, one, *map(field.metadata.get, BOUNDS))
                elif (
                    isinstance(one, str) and not one.strip() and one != field.default and "blank" not in field.metadata
                ):
                    raise ValueError(f"expected {name} with a value, got an empty name; omit it for the default")


def identity_names(cls: type) -> tuple[str, ...]:
    """The fields of a configuration that decide what is computed."""
    return tuple(name for name, field in _init_fields(cls).items() if field.metadata.get("identity", True))


def unsaid(config: Any) -> set[str]:
    """Later options at their defaults: what names a run, or is its key, leaves them out, and finds runs of before."""
    later = [field for field in _init_fields(type(config)).values() if field.metadata.get("later")]
    return {field.name for field in later if getattr(config, field.name) == _default(field)}


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def layered(cls: type, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values of several sources, the later over the earlier, after `cls.consistent(layers)` where it has that."""
    merged: dict[str, Any] = {}
    for layer in cls.consistent(layers) if hasattr(cls, "consistent") else layers:
        merged |= layer
    return merged


def config_from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Build `cls` from its defaults and `values`; ValueError as `check_values`, or for a field left without value."""
    checked = check_values(cls, values, source="options")
    required = [n for n, f in _init_fields(cls).items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in checked]
    if missing:
        raise ValueError(f"options: expected a value for {', '.join(missing)}, got none")
    return cls(**checked)


def config_to_yaml(config: Any, path: str | Path) -> None:
    """Write every field of a configuration dataclass to a YAML file; `parse_config` reads it back as an equal one.

    The user's own folder is written as "~".
    """
    home = f"{Path.home()}/"
    values = {name: getattr(config, name) for name in _init_fields(type(config))}
    values = _each(values, lambda text: f"~/{text.removeprefix(home)}" if text.startswith(home) else text)
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=119), encoding="utf-8")


def read_back(path: str | Path) -> dict[str, Any]:
    """What `config_to_yaml` wrote, with the user's own folder in the place of "~"."""
    return _each(read_yaml(path), lambda text: os.path.expanduser(text) if text.startswith("~/") else text)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, names of options apart."""
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [_each(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def public_values(value: Any) -> Any:
    """A configuration as others may read it: of a path outside the working directory its last part alone."""
    return _each(value, lambda text: base_name(text) if text.startswith(("/", "~/", "../")) else text)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """What a YAML file maps, {} where it is empty; ValueError names the file."""
    try:
        values = yaml.safe_load(read_text(resolve(str(path))))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # beside YAMLError whatever a tag such as "!!bool 2" makes Python's constructors raise
        mark, said = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = "" if mark is None else f", line {mark.line + 1},"
        raise ValueError(f"{path}{line} is not valid YAML: {' '.join(str(said).split())}") from error
    if not isinstance(values, dict | None):
        raise ValueError(f"{path}: expected lines of `option: value`, got {_show(values)}")
    return values or {}


def read_values(cls: type, source: str) -> dict[str, Any]:
    """The checked values of a YAML file, or of one that ships, such as bundled/digits; ValueError names the file."""
    if source.startswith("bundled/") and not source.endswith(".yaml"):
        source = f"bundled/configs/{source.removeprefix('bundled/')}.yaml"
    return check_values(cls, read_yaml(source), source=source)


def check_values(cls: type, values: dict[str, Any], source: str) -> dict[str, Any]:
    """`values` with every value converted to its field's type; ValueError for unknown keys and wrong types."""
    hints = get_type_hints(cls)
    known = _init_fields(cls)
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{source}: unknown option {key!r}" + suggestion(str(key), known))
        try:
            checked[key] = _convert(value, hints[key])
        except _MismatchError:
            message = f"{source}: {key}: expected {_describe(hints[key])}, got {_show(value)}"
            raise ValueError(message) from None
    return checked


class _MismatchError(Exception):
    """A value is not of the type asked for. Not a TypeError, so that a bug inside `_convert` does not look like it."""


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, without loss: of all numbers and strings only an int or "1e-4" becomes a float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for member in arguments:
            try:
                return _convert(value, member)
            except _MismatchError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):  # True == 1
            return value
    elif origin is list:
        if isinstance(value, str):  # one item
            value = [value]
        if isinstance(value, list | tuple):
            return [_convert(item, arguments[0]) for item in value]
    elif hint is float:
        if type(value) in (int, float):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-4, which has no point, as a string
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif hint is str and isinstance(value, str) and value.startswith("~/"):  # no shell has read it
        return os.path.expanduser(value)
    elif hint is str and type(value) is int:  # `fisher_terms: 10`, `concept: 7`
        return str(value)
    elif hint in (int, bool, str, types.NoneType):
        if type(value) is hint:
            return value
    else:
        raise TypeError(f"configuration fields cannot be of type {_describe(hint)}")
    raise _MismatchError


def _check_range(name: str, value: float, above: float | None, least: float | None, below: float | None) -> None:
    low = (above is None or value > above) and (least is None or value >= least)
    if not (math.isfinite(value) and low and (below is None or value < below)):
        bound = f"> {above}" if above is not None else "finite" if least is None else f">= {least}"
        low = f"{above} <" if least is None else f"{least} <="
        expected = f"{name} {bound}" if below is None else f"{low} {name} < {below}"
        raise ValueError(f"expected {expected}, got {value}")


def _init_fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _show(value: Any) -> str:
    return "null" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"


def suggestion(given: str, known: Any) -> str:
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
