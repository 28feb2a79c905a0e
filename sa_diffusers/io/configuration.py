"""Configuration dataclasses: fields with help texts, filled from dictionaries and YAML under checks, and back."""

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.model_names import base_name


ConfigT = TypeVar("ConfigT")
FACTS = frozenset(("above", "least", "below", "identity", "otherwise", "everyday"))  # of a field, beside its help


def option(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field with the text that --help prints, and what else is to be known of it.

    Args:
        facts: above, least, below: a number must be above, at least, or below this, where it is not None. identity:
            False where the option says how a run is watched, shared or fitted into memory, and changes no result.
            otherwise: what None stands for, where a method has no value of its own. everyday: True for the few that
            --help shows when it is not asked for more.
    """
    unknown = facts.keys() - FACTS
    if unknown:
        raise TypeError(f"expected facts of {', '.join(sorted(FACTS))}, got {min(unknown)}")
    metadata = {"help": help, **facts}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base of configuration dataclasses: checks the ranges of their fields.

    Raises:
        ValueError: a number out of its range.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            above, least, below = map(field.metadata.get, ("above", "least", "below"))
            if value is None or (above, least, below) == (None, None, None):
                continue
            low = (above is None or value > above) and (least is None or value >= least)
            if not (math.isfinite(value) and low and (below is None or value < below)):
                bound = f"> {above}" if least is None else f">= {least}"
                expected = f"{field.name} {bound}" if below is None else f"{least} <= {field.name} < {below}"
                raise ValueError(f"expected {expected}, got {value}")


def identity_names(cls: type) -> tuple[str, ...]:
    """The fields of a configuration that decide what is computed."""
    return tuple(name for name, field in _init_fields(cls).items() if field.metadata.get("identity", True))


def layered(cls: type, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values of several sources, the later over the earlier, after `cls.consistent(layers)` where it has that.

    A choice in one layer may settle options (a method that has no replay settles its weight). What earlier layers say
    of these was written for another choice, and does not count.
    """
    merged: dict[str, Any] = {}
    for layer in cls.consistent(layers) if hasattr(cls, "consistent") else layers:
        merged |= layer
    return merged


def config_from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Build `cls` from its defaults and `values`, under the checks that a YAML file gets.

    Raises:
        ValueError: an unknown key, a value of another type than its field's, or a field without value and default.
    """
    checked = check_values(cls, values, source="options")
    missing = [name for name, field in _init_fields(cls).items() if name not in checked and _is_required(field)]
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


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, with the user's folder for "~/"; {} where it is empty. Raises ValueError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return {} if found is None else _each(found, lambda text: expanduser(text) if text.startswith("~/") else text)


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


def read_values(cls: type, source: str) -> dict[str, Any]:
    """The checked values of a YAML file, or of one that ships, such as bundled/digits; ValueError names the file."""
    if source.startswith("bundled/") and not source.endswith(".yaml"):
        source = f"bundled/configs/{source.removeprefix('bundled/')}.yaml"
    try:
        values = read_yaml(Path(resolve(source)))
    except OSError as error:
        raise ValueError(f"--config: cannot read {source}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"--config: {source} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected lines of `option: value`, got {_show(values)}")
    return check_values(cls, values, source=source)


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
        if isinstance(value, list):
            return [_convert(item, arguments[0]) for item in value]
    elif hint is float:
        if type(value) in (int, float):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-4, which has no point, as a string
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is str and type(value) is int:  # `fisher_terms: 10`, `concept: 7`
        return str(value)
    elif hint in (int, bool, str, types.NoneType):
        if type(value) is hint:
            return value
    else:
        raise TypeError(f"configuration fields cannot be of type {_describe(hint)}")
    raise _MismatchError


def _init_fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _show(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def suggestion(given: str, known: Any) -> str:
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
