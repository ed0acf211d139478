"""Dataclasses <-> JSON and command line: each field is a flag, a line of --help and a key of config.json.

The settings themselves stand with the code that reads them.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import field
from pathlib import Path

from mini.errors import UserError as UserError  # for all that have options, too


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)', or nothing when no name is close."""
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# ---------------------------------------------------------------- a dataclass of options
def option(default, help: str, choices: tuple = (), low: float = -math.inf, high: float | None = None, **extra):
    """A dataclass field with its line of --help, and what it may be: one of the choices, or within low..high.

    high: None is what LARGEST says of its type.
    extra: flag=False is no flag; positional="1" or "+" has no --name; resume=True may differ when a run goes on;
    fixed=True is settled by a run for all that start from it; head=True asks for a head of the model.
    """
    start = dict(default_factory=list) if default == [] else dict(default=default)
    return field(metadata=dict(help=help, choices=choices, low=low, high=high, **extra), **start)


LARGEST = {int: 2**31, float: 1e38}  # where an option says nothing else: no size is larger, no float32 much


class Checked:
    """A dataclass of options; UserError for a value outside its field's choices or bounds, as nan always is."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices", ())
            low, high = f.metadata.get("low", -math.inf), f.metadata.get("high")
            if choices and value not in choices:
                raise UserError(f"--{f.name} {value}: choose one of {', '.join(choices)}{nearest(str(value), choices)}")
            for number in value if isinstance(value, list) else [value]:
                most = LARGEST.get(type(number)) if high is None else high
                if type(number) in LARGEST and not max(low, -most) <= number <= most:  # nor is nan
                    bounds = [f"at least {low:,}"] * (low > -math.inf) + [f"at most {most:,}"] * (number > most)
                    raise UserError(f"--{f.name} {number}: must be {' and '.join(bounds) or 'a number'}")


# ---------------------------------------------------------------- dataclasses <-> JSON
def field_names(cls) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def from_dict(cls, values: object, where: str | Path):
    """A dataclass from the object of a JSON file; each value has to be of its field's type, a missing one its default.

    where: the file, for messages. Raises UserError for anything else.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: should be an object {{...}}, not {shown(values)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise UserError(f"{where}: unknown {', '.join(unknown)}: was this made by a newer version of mini?")
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: no {name!r}")
    known = {name: of_type(values[name], f.type, f"{where}: {name}") for name, f in fields.items() if name in values}
    try:
        return cls(**known)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def of_type(value: object, kind, place: str):
    """The value, if it is of this type; raises UserError if not. A float may lack its .0."""
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if dataclasses.is_dataclass(origin) and isinstance(value, dict):
            return from_dict(origin, value, place)
        if origin is list and isinstance(value, list):
            return [of_type(v, inner[0], f"{place}[{i}]") for i, v in enumerate(value)]
        if origin is dict and isinstance(value, dict):
            return {k: of_type(v, inner[1], f"{place}.{k}") for k, v in value.items()} if inner else value
        if type(value) is int and abs(value) >= 2**63:  # which no tensor holds
            break
        if origin is object or type(value) is origin or (origin is float and type(value) is int):
            return value
    raise UserError(f"{place} should be {type_name(kind)}, not {shown(value)}")


def type_name(kind) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    lists = {list: "a list", dict: "an object"}
    return " or ".join(names.get(o) or lists.get(typing.get_origin(o) or o, "an object") for o in options)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---------------------------------------------------------------- dataclasses <-> command line
def parse_value(name: str, text: str | list[str], kind):
    """A flag's text as its field's type, which is int, float, bool, str, or for each layer one."""
    if isinstance(text, list):  # a positional argument with several values
        return text
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    lists = [option for option in options if typing.get_origin(option) is list]
    try:
        if lists and "," in text:
            return [parse_value(name, part, typing.get_args(lists[0])[0]) for part in text.split(",")]
        if bool in options:
            return {"true": True, "false": False}[text.lower()]
        if int in options:
            number = float(text) if "e" in text.lower() else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if float in options:
            return float(text)
        return text.lower() if text in ("True", "False") else text  # of flags like --compile, with true and auto
    except (ValueError, KeyError, OverflowError):
        wanted = "true or false" if bool in options else "a whole number" if int in options else "a number"
        raise UserError(f"--{name} {text}: expected {wanted}") from None


WIDE = functools.partial(argparse.HelpFormatter, max_help_position=34, width=118)


class Parser(argparse.ArgumentParser):
    """argparse, but its complaints are UserErrors and name the flag that was probably meant."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")

    def refuse_unknown(self, unknown: list[str]) -> None:
        known = {flag for action in self._actions for flag in action.option_strings}
        for word in unknown:
            if word.startswith("-"):
                flag = word.split("=")[0]
                raise UserError(f"unknown flag {flag}{nearest(flag, known)}; see --help")
        if unknown:
            raise UserError(f"unexpected argument {unknown[0]!r}; see --help")


def add_flags(parser: argparse.ArgumentParser, cls, defaults: dict, without: set[str]) -> None:
    """One flag for each field of a dataclass but those `without`, in a group of its own, its default shown."""
    title = cls.__name__.removesuffix("Config").removesuffix("Options").lower()
    group = parser.add_argument_group(title, cls.__doc__.splitlines()[0])
    for f in dataclasses.fields(cls):
        if not f.metadata.get("flag", True) or f.name in without:
            continue
        default = defaults.get(f.name, f.default)
        shown = str(default).lower() if isinstance(default, bool) else default
        help = f.metadata["help"].replace("%", "%%")
        if nargs := f.metadata.get("positional"):  # "1" or, as in argparse, "+" for one or more
            group.add_argument(f.name, metavar=f.name.upper(), nargs=None if nargs == "1" else nargs, help=help)
            continue
        kind = (typing.get_args(f.type) or (f.type,))[0]
        metavar = "|".join(f.metadata["choices"]) or {int: "N", float: "X", bool: "true|false"}.get(kind, "S")
        group.add_argument(f"--{f.name}", metavar=metavar, help=f"{help} [{shown}]", default=argparse.SUPPRESS)


def peek(argv: list[str], name: str, default: str) -> str:
    """The value of one flag, for what has to be known before the others make sense."""
    parser = Parser(allow_abbrev=False, add_help=False)
    parser.add_argument(f"--{name}", default=default)
    return getattr(parser.parse_known_args(argv)[0], name)


def parse_flags(argv: list[str], classes: list, description: str, presets: dict[str, dict] | None = None,
                without: set[str] = frozenset(), **defaults):  # fmt: skip
    """Reads a command line into dataclasses: the fields' defaults < preset < defaults < flags.

    presets: those of --preset, the first of them its default. without: fields that are no flags of this command.
    Where two classes have a field of the same name, the first of them has the flag.

    Returns ([one object for each class], the names of the flags that were given).
    Raises UserError for anything unknown or misspelt, naming the nearest flag.
    """
    said = description == classes[0].__doc__  # by the first group
    parser = Parser(description=None if said else description, allow_abbrev=False, formatter_class=WIDE)
    if presets:
        names, first = ", ".join(presets), next(iter(presets))
        parser.add_argument("--preset", metavar="NAME", default=first, help=f"{names} [{first}]")
        name = peek(argv, "preset", first)
        if name not in presets:
            raise UserError(f"unknown preset {name}{nearest(name, presets)}: choose one of {names}")
        defaults = presets[name] | defaults
    flags = [(f.name, cls) for cls in classes for f in dataclasses.fields(cls) if f.metadata.get("flag", True)]
    owners = {name: cls for name, cls in reversed(flags) if name not in without}
    for cls in classes:
        add_flags(parser, cls, defaults, {name for name in field_names(cls) if owners.get(name) is not cls})
    known, unknown = parser.parse_known_args(argv)
    parser.refuse_unknown(unknown)

    given = {name: text for name, text in vars(known).items() if name != "preset"}
    positional = {f.name for cls in classes for f in dataclasses.fields(cls) if f.metadata.get("positional")}
    for name, text in given.items():
        if not text or (isinstance(text, list) and "" in text):
            place = name.upper() if name in positional else f"--{name}"
            raise UserError(f"{place}: it is empty; give a value, or leave it out")
    objects = []
    for cls in classes:
        values = {n: v for n, v in defaults.items() if n in field_names(cls) and owners.get(n, cls) is cls}
        for f in dataclasses.fields(cls):
            if f.name in given and owners[f.name] is cls:
                values[f.name] = parse_value(f.name, given[f.name], f.type)
        objects.append(cls(**values))
    return objects, set(given)


def dispatch(argv: list[str], commands: dict[str, tuple[Callable, str]], program: str) -> None:
    """Calls the command that argv names with the rest of argv; commands: {name: (function, what it does)}."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:10} {what}" for name, (_, what) in commands.items()]
        print("\n".join([f"usage: {program} COMMAND ... (COMMAND --help lists its flags)", "", *lines]))
        return
    name, *rest = argv
    if name not in commands:
        raise UserError(f"unknown command {name}{nearest(name, commands)}: choose one of {', '.join(commands)}")
    sys.argv[0] = f"{program} {name}"
    commands[name][0](rest)


# How PyTorch says so, on a GPU and on the CPU; and of sizes that no memory has.
NO_MEMORY = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs a command on sys.argv; a user's mistake becomes one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # half a character, which a command line can hold, ends no command
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        return
    except UserError as error:
        message, status = f"error: {error}", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:  # a full disk, a folder that may not be written
        what = error.strerror or (error.args[0] if error.args else type(error).__name__)
        if isinstance(error, FileExistsError) and Path(error.filename or "").is_file():
            what = "is a file, where a folder should be: name another"
        message, status = f"error: {error.filename or 'the system'}: {what}", 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        what = (str(error).splitlines() or ["MemoryError"])[0]
        message, status = f"error: not enough memory here ({what}): give smaller sizes", 2
    # One line, whatever a file that it quotes has in it.
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if first_to_say(message):
        print(message, file=sys.stderr)
    raise SystemExit(status)


def first_to_say(message: str) -> bool:
    """Whether no other of torchrun's processes on this machine has said the same: what all of them see is one line."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return True
    common = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1]  # of this start alone
    with contextlib.suppress(OSError):
        os.close(os.open(common / hashlib.sha256(message.encode(errors="replace")).hexdigest(), os.O_CREAT | os.O_EXCL))
        return True
    return not common.is_dir()
