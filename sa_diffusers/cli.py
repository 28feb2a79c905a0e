"""From defaults, YAML files and the command line to one checked configuration dataclass, and back to YAML."""

import argparse
import dataclasses
import difflib
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


ConfigT = TypeVar("ConfigT")


def parse_config(
    cls: type[ConfigT],
    argv: list[str] | None = None,
    description: str = "",
    defaults: dict[str, Any] | None = None,
) -> ConfigT:
    """Build `cls` from its defaults < `defaults` < the YAML files of `--config`, in their order < the command line.

    Args:
        cls: a dataclass whose fields are int, float, bool, str, Literal, list of these, or one of these or None. Each
            field's metadata may hold "help" and any other keyword of `ArgumentParser.add_argument`.
        argv: the arguments after the program's name; None for this process's own.
        description: printed above the options by `--help`.
        defaults: values in place of the class's own.

    Exits with code 2 and a message on stderr for an unknown or abbreviated flag, a YAML file that cannot be read, an
    unknown key in it, a value of another type than its field's, and a ValueError of the class's own checks.
    """
    # A first pass for --config alone: its values are the defaults that the second pass, and --help, start from.
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file with values for the options below; repeat it to let later files override earlier ones.",
    )
    parser = _ConfigParser(
        cls, parents=[files], description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    paths = getattr(files.parse_known_args(argv)[0], "config", [])
    try:
        from_files = _check_values(cls, defaults or {}, source="defaults")
        from_files |= {key: value for path in paths for key, value in _read_yaml(cls, Path(path)).items()}
    except ValueError as error:
        parser.error(str(error))
    parser.set_defaults(**from_files)
    for action in parser._actions:  # argparse has no public way to say that a required option has been given already
        action.required = action.required and action.dest not in from_files

    for action in parser._actions:
        if types.NoneType in get_args(get_type_hints(cls).get(action.dest)):
            action.type = _or_null(action.type or str)

    namespace, rest = parser.parse_known_args(argv)
    if rest:
        flags = {option for action in parser._actions for option in action.option_strings}
        parser.error(f"unknown argument {rest[0]!r}" + _suggestion(rest[0].split("=")[0], flags))
    values = {key: value for key, value in vars(namespace).items() if key != "config"}
    try:
        return cls(**values)
    except ValueError as error:
        parser.error(str(error))


def config_from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Build `cls` from its defaults and `values`, under the checks that a YAML file gets.

    Raises:
        ValueError: an unknown key, a value of another type than its field's, or a field without value and default.
    """
    checked = _check_values(cls, values, source="options")
    missing = [name for name, field in _init_fields(cls).items() if name not in checked and _is_required(field)]
    if missing:
        raise ValueError(f"options: expected a value for {', '.join(missing)}, got none")
    return cls(**checked)


def config_to_yaml(config: Any, path: str | Path) -> None:
    """Write every field of a configuration dataclass to a YAML file; `parse_config` reads it back as an equal one."""
    values = {name: getattr(config, name) for name in _init_fields(type(config))}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=119), encoding="utf-8")


def _or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert`, but "null" is None, as in YAML."""

    def converted(text: str) -> Any:
        return None if text == "null" else convert(text)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse names it in its errors
    return converted


class _ConfigParser(HfArgumentParser):
    """HfArgumentParser whose list options can be repeated and whose help texts are plain text."""

    def error(self, message: str) -> NoReturn:
        """The message alone: the usage of some seventy options would bury it."""
        self.exit(2, f"{self.prog}: error: {message} (--help explains every option)\n")

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        if kwargs.get("nargs") == "+":
            kwargs.setdefault("action", _ReplaceThenExtend)
        if "help" in kwargs:
            kwargs["help"] = kwargs["help"].replace("%", "%%")  # argparse would read "10 %" as a format
        return super().add_argument(*args, **kwargs)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds defaults to the options and leaves the description's lines, commands among them, as they are."""


class _ReplaceThenExtend(argparse.Action):
    """`--x a b --x c` is [a, b, c]: argparse's "store" would keep c alone, "extend" would add to the default."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        current = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if current is self.default else current + values)


def _read_yaml(cls: type, path: Path) -> dict[str, Any]:
    """The checked values of one YAML file; ValueError names the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from error
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of `option: value`, got {_show(values)}")
    return _check_values(cls, values, source=str(path))


def _check_values(cls: type, values: dict[str, Any], source: str) -> dict[str, Any]:
    """`values` with every value converted to its field's type; ValueError for unknown keys and wrong types."""
    hints = get_type_hints(cls)
    known = _init_fields(cls)
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{source}: unknown option {key!r}" + _suggestion(str(key), known))
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


def _suggestion(given: str, known: Any) -> str:
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


_MEMORY = (  # after an error of torch, which this module does not import
    "\nTake less at once (--train_batch_size, --sample_batch_size, --fisher_chunk_size, --eval_batch_size) or try "
    "--mixed_precision bf16, --gradient_checkpointing, --fisher_device cpu, --ewc_device cpu, --lora_rank 16, where "
    "the script has them; README, Cost, says what each takes. What was finished is kept."
)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """End the program on an error with its message alone and a non-zero exit code, as a user wants it.

    Ctrl-C ends it with 130, SIGTERM with 143; what was finished is kept, and the same command goes on from there. An
    error of another kind is a bug and keeps its traceback; SA_DIFFUSERS_TRACEBACK=1 shows every traceback.
    """

    def terminate(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    resume = "Run the same command again to continue."
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted. {resume}", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as error:
        if error.code == 143:
            print(f"\nterminated. {resume}", file=sys.stderr)
        raise
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        if os.environ.get("SA_DIFFUSERS_TRACEBACK"):
            raise
        print(f"error: {error}{_MEMORY if type(error).__name__ == 'OutOfMemoryError' else ''}", file=sys.stderr)
        raise SystemExit(1) from None
