"""From defaults, YAML files and the command line to one checked configuration dataclass."""

import argparse
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

from sa_diffusers.io.configuration import FACTS, ConfigT, check_values, layered, read_values, suggestion


_ABSENT = object()  # stands for an option that the command line does not name


def parse_config(
    cls: type[ConfigT],
    argv: list[str] | None = None,
    description: str = "",
    defaults: dict[str, Any] | None = None,
) -> ConfigT:
    """Build `cls` from its defaults < `defaults` < the YAML files of `--config`, in their order < the command line.

    Args:
        cls: a dataclass whose fields are int, float, bool, str, Literal, list of these, or one of these or None.
        argv: the arguments after the program's name; None for this process's own.
        description: printed above the options by `--help`.

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
        layers = [check_values(cls, defaults or {}, source="defaults")]
        layers += [read_values(cls, Path(path)) for path in paths]
    except ValueError as error:
        parser.error(str(error))
    from_files = layered(cls, *layers)
    parser.set_defaults(**from_files)
    for action in parser._actions:  # argparse has no public way to say that a required option has been given already
        action.required = action.required and action.dest not in from_files

    for action in parser._actions:
        if types.NoneType in get_args(get_type_hints(cls).get(action.dest)):
            action.type = _or_null(action.type or str)

    names = {action.dest for action in parser._actions} - {"config"}  # which appends to what is there
    namespace, rest = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, _ABSENT)))
    if rest:
        flags = {option for action in parser._actions for option in action.option_strings}
        parser.error(f"unknown argument {rest[0]!r}" + suggestion(rest[0].split("=")[0], flags))
    given = {key: value for key, value in vars(namespace).items() if key != "config" and value is not _ABSENT}
    try:
        return cls(**layered(cls, *layers, given))
    except ValueError as error:
        parser.error(str(error))


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
        kwargs = {name: value for name, value in kwargs.items() if name not in FACTS}
        if "help" in kwargs:
            kwargs["help"] = kwargs["help"].replace("%", "%%")  # argparse would read "10 %" as a format
        return super().add_argument(*args, **kwargs)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds defaults to the options and leaves the description's lines, commands among them, as they are."""


class _ReplaceThenExtend(argparse.Action):
    """`--x a b --x c` is [a, b, c]: argparse's "store" would keep c alone, "extend" would add to the default."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        current = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if current is _ABSENT else current + values)


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

    before = signal.signal(signal.SIGTERM, terminate)
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
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
