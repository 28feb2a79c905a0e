"""From defaults, YAML files and the command line to one checked configuration dataclass."""

import argparse
import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

from sa_diffusers.io.configuration import FACTS, ConfigT, layered, read_values, suggestion


DEBUG = "--debug"
EVERYWHERE = ("debug", "quiet", "log_json")
METAVARS = {int: "N", float: "X", str: "TEXT"}
_ABSENT = object()  # stands for an option that the command line does not name


@dataclass(frozen=True)
class Given(Generic[ConfigT]):
    """What files and the command line say of a configuration, each value checked for itself."""

    cls: type[ConfigT]
    layers: list[dict[str, Any]]
    error: Callable[[str], NoReturn]

    def get(self, name: str) -> Any:
        """An option's value: what is said, or its default."""
        return layered(self.cls, *self.layers).get(name, getattr(self.cls, name, None))

    def config(self, defaults: Mapping[str, Any] | None = None) -> ConfigT:
        """`cls` from its defaults < `defaults` < what is given. Exits with code 2 where its own checks raise."""
        try:
            return self.cls(**layered(self.cls, dict(defaults or {}), *self.layers))
        except ValueError as error:
            self.error(str(error))


def parse_config(
    cls: type[ConfigT], argv: list[str] | None = None, description: str = "", prog: str | None = None
) -> ConfigT:
    """Build `cls` from its defaults < the YAML files of `--config`, in their order < the command line; see below."""
    return parse_given(cls, argv, description, prog).config()


def parse_given(
    cls: type[ConfigT], argv: list[str] | None = None, description: str = "", prog: str | None = None
) -> Given[ConfigT]:
    """Read the YAML files of `--config`, in their order, and the command line, which goes over them.

    Args:
        cls: a dataclass whose fields are int, float, bool, str, Literal, list of these, or one of these or None.
        argv: the arguments after the program's name; None for this process's own.
        description: printed above the options by `--help`.
        prog: the command that takes them, with its subcommand; None: the program's name.

    Exits with code 2 and a message on stderr for an unknown or abbreviated flag, a YAML file that cannot be read, an
    unknown key in it, and a value of another type than its field's.
    """
    # A first pass for --config alone: its values are the defaults that the second pass, and --help, start from.
    files = plain_parser(add_help=False)
    files.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file with values for the options below, or one that ships: bundled/digits; repeat it to let "
        "later files override earlier ones.",
    )
    parser = _ConfigParser(cls, description, parents=[files], prog=prog)
    paths = getattr(files.parse_known_args(argv)[0], "config", [])
    try:
        layers = [read_values(cls, path) for path in paths]
    except ValueError as error:
        parser.error(str(error))
    from_files = layered(cls, *layers)
    parser.set_defaults(**from_files)
    for action in parser._actions:  # argparse has no public way to say that a required option has been given already
        action.required = action.required and action.dest not in from_files

    hints = get_type_hints(cls)
    for action in parser._actions:
        if types.NoneType in get_args(hints.get(action.dest)):
            action.type = _or_null(action.type or str)
            if action.choices is not None:
                action.metavar = "{" + ",".join(map(str, action.choices)) + "}"  # as it would be without None
                action.choices = [*action.choices, None]

    names = {action.dest for action in parser._actions} - {"config", *EVERYWHERE}  # which are no options of `cls`
    namespace, rest = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, _ABSENT)))
    if rest:
        flags = {option for action in parser._actions for option in action.option_strings}
        parser.error(f"unknown argument {rest[0]!r}" + suggestion(rest[0].split("=")[0], flags))
    given = {key: value for key, value in vars(namespace).items() if key in names and value is not _ABSENT}
    return Given(cls, [*layers, given], parser.error)


def plain_parser(description: str | None = None, **kwargs: Any) -> argparse.ArgumentParser:
    """A parser with the options that say how any command speaks, and the lines of its description as they are."""
    kwargs |= {"formatter_class": _HelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=description, **kwargs)
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="Print errors alone.")
    parser.add_argument(
        "--log_json",
        "--log-json",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="Append what happens to a file, a JSON object a line (docs/events.md).",
    )
    parser.add_argument(DEBUG, action="store_true", default=argparse.SUPPRESS, help="Show the traceback of an error.")
    return parser


def _or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert`, but "null" is None, as in YAML."""

    def converted(text: str) -> Any:
        return None if text == "null" else convert(text)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse names it in its errors
    return converted


class _ConfigParser(HfArgumentParser):
    """HfArgumentParser whose options stand in groups, once each, the everyday ones first, with help in plain text."""

    def __init__(self, cls: type, description: str, **kwargs: Any):
        super().__init__(
            cls,
            description=description,
            usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
            allow_abbrev=False,
            add_help=False,
            formatter_class=_HelpFormatter,
            **kwargs,
        )
        own = {action.dest for action in self._actions}
        for name, field in concern_of(cls).items():  # argparse knows groups, but has no public way to move into one
            groups = {group.title: group for group in self._action_groups}
            group = groups.get(field) or self.add_argument_group(field)
            moved = [action for action in self._optionals._group_actions if action.dest == name]
            group._group_actions += moved
            self._optionals._group_actions = [a for a in self._optionals._group_actions if a not in moved]
        self.everyday = {f.name for f in dataclasses.fields(cls) if f.metadata.get("everyday")} or own
        self.topics = cls.topics() if hasattr(cls, "topics") else {}
        more = "; all: every option" if self.everyday != own else ""
        more += "; methods: what there is; or a method, for its own" if self.topics else ""
        self.add_argument("-h", "--help", action=_Help, nargs="?", metavar="TOPIC", help=f"Print this{more}.")

    def error(self, message: str) -> NoReturn:
        """The message alone: the usage of some seventy options would bury it."""
        self.exit(2, f"{self.prog}: error: {message} (--help all explains every option)\n")

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        if kwargs.get("nargs") == "+":
            kwargs.setdefault("action", _ReplaceThenExtend)
        if kwargs.get("listed"):
            kwargs["action"] = _Joined
        kwargs = {name: value for name, value in kwargs.items() if name not in FACTS}
        if kwargs.get("action") == "store_false":  # --no_x, which stands beside --x
            kwargs["help"] = argparse.SUPPRESS
        elif "choices" not in kwargs and kwargs.get("type") in METAVARS:
            kwargs.setdefault("metavar", METAVARS[kwargs["type"]])
        if "help" in kwargs:
            kwargs["help"] = kwargs["help"].replace("%", "%%")  # argparse would read "10 %" as a format
        return super().add_argument(*args, **kwargs)

    def format_help_of(self, topic: str | None) -> str:
        """The help for the everyday options, for "all", or for a topic beside the everyday ones.

        Raises:
            ValueError: an unknown topic.
        """
        known = {"all": ("", [action.dest for action in self._actions]), **self.topics}
        if topic is not None and topic not in known:
            raise ValueError(f"expected --help alone or with one of {', '.join(known)}; got {topic!r}")
        about, names = known.get(topic, ("", ()))
        shown = set() if names is None else {"config", "help", "quiet", "log_json", *self.everyday, *names}
        for action in self._actions:
            if action.dest not in shown:
                action.help = argparse.SUPPRESS
        if about:
            self.description = f"{topic}: {about}"
        return self.format_help()


def concern_of(cls: type) -> dict[str, str]:
    """What each option is about: the first sentence of the class of options that brings it in."""
    found = {}
    for field in dataclasses.fields(cls):
        owner = next(base for base in reversed(cls.__mro__) if field.name in vars(base).get("__annotations__", {}))
        found[field.name] = re.split(r"\.\s|\.$", owner.__doc__)[0].replace("%", "%%")
    return found


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds defaults to the options and leaves the description's lines, commands among them, as they are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, "", [], False) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """The option with underscores alone, --no_x beside --x that is on by default; with dashes it is the same."""
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next(text for text in action.option_strings if text.startswith("--"))
        if isinstance(action, _Help):
            return f"-h, {name} [{action.metavar}]"
        if action.nargs == "?":
            return f"{name}, --no_{action.dest}" if action.default is True else name
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class _Help(argparse.Action):
    """Print the help that was asked for, and end."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            print(parser.format_help_of(values), end="")
        except ValueError as error:
            parser.error(str(error))
        parser.exit()


class _ReplaceThenExtend(argparse.Action):
    """`--x a b --x c` is [a, b, c]: argparse's "store" would keep c alone, "extend" would add to the default."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        current = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if current is _ABSENT else current + values)


class _Joined(argparse.Action):
    """`--x a --x b` is "a; b"."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        current = getattr(namespace, self.dest)
        if current is not _ABSENT and None in (current, values):
            parser.error(f"{option_string}: expected a text each time, or null alone")
        setattr(namespace, self.dest, values if current is _ABSENT else f"{current}; {values}")
