"""Options as fields of a dataclass: how one is declared and checked, read from words, and written as words again.

A field says everything about an option once: its type, its default, its help and its range. The command line
(cli/options.py), `python -m moeify.benchmark.layers`, recipes and the Python API read it from there, and `command_line`
renders the command that repeats a run. Imports nothing heavy.
"""

import dataclasses
import math
import numbers
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, get_args, get_origin

from moeify.errors import UsageError, unknown
from moeify.plugins import SINGULAR, names_in

# Fields whose option is not their name: a short one, and one that is a word of Python.
SPELLED = {"out": "-o", "machine": "--for"}
NUMBERS = {int: "whole number", float: "number"}
# One item of a list: in double quotes, which are doubled inside, or without commas.
ITEM = re.compile(r'\s*(?:"((?:[^"]|"")*)"\s*|([^,]*))(?:,|$)')
# Panels of the help, in their order; those that only one command has stand between the first and the last two.
FIRST, METHOD, OUTPUT, ADVANCED = "Options", "Method", "Output", "Advanced"
# Nothing has so many experts, tokens or steps.
COUNTABLE = 1 << 31


def option(
    default: Any,
    text: str,
    *,
    auto: str = "",
    name: str = "",
    short: str = "",
    panel: str = FIRST,
    least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
    form: str = "",
    plugin: str = "",
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: None where a run finds the value itself; a tuple for an option that takes a list.
        text: the help, one line of 80 columns with the default behind it.
        auto: the default in words, where it is None or an empty tuple.
        name: of the value in the help; N, X or NAME follow from its type.
        short: a second spelling of one letter, such as -v.
        panel: of the help, under which it stands.
        least, above, below: the range of a number, of each one in a tuple.
        form: a regular expression that a text must match as a whole.
        plugin: the folder of moeify whose files are the names that it takes.
    """
    told = {"text": text, "auto": auto, "name": name, "short": short, "panel": panel}
    limits = {"least": least, "above": above, "below": below, "form": form, "plugin": plugin}
    return dataclasses.field(default=default, metadata={**told, **limits})


class Options:
    """Base of dataclasses of options: values are checked when one is made, and recipes refuse unknown keys."""

    # For pydantic, which validates these classes inside a recipe.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Bring values into their plain form; raise UsageError unless each is a known name and in its range."""
        for field in fields(type(self)):
            # Frozen for everyone else.
            object.__setattr__(self, field.name, _plain(field, getattr(self, field.name)))
        for field in fields(type(self)):
            value = getattr(self, field.name)
            if value == () and field.default:
                raise UsageError(f"{flag(field.name)} is empty", f"{flag(field.name)} takes one value or more")
            for item in value if isinstance(value, tuple) else (value,):
                _check(field, item)

    @classmethod
    def chosen(cls, options: Self | None, choices: Mapping[str, Any]) -> Self:
        """The options of a function's caller, who may also name some one by one.

        Args:
            options: None for the defaults.
            choices: by name; they replace those.

        Raises:
            UsageError: there is no such option, or a value is not possible.
        """
        known = [field.name for field in fields(cls)]
        if strange := [name for name in choices if name not in known]:
            raise unknown(f"an option of {cls.__name__}", strange[0], known)
        given = {} if options is None else {name: getattr(options, name) for name in known}
        return cls(**{**given, **choices})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From a JSON object that has lists for tuples and may have further keys."""
        known = {field.name for field in fields(cls)}
        items = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**{key: value for key, value in items.items() if key in known})


def fields(kind: type[Options]) -> tuple[dataclasses.Field[Any], ...]:
    """The options of a class; the class is a dataclass."""
    assert dataclasses.is_dataclass(kind)
    return dataclasses.fields(kind)


def flag(name: str) -> str:
    """How an option is spelled."""
    return SPELLED.get(name) or "--" + name.replace("_", "-")


def is_repeated(field: dataclasses.Field[Any]) -> bool:
    return get_origin(field.type) is tuple


def item_type(field: dataclasses.Field[Any]) -> Any:
    """The type of one value: of an item of a tuple, and of what may be None."""
    if is_repeated(field) or get_origin(field.type) not in (None, Literal):
        return get_args(field.type)[0]
    return field.type


def choices(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The names that an option takes; none if it takes others as well."""
    return get_args(item_type(field)) if get_origin(item_type(field)) is Literal else ()


def help_text(field: dataclasses.Field[Any]) -> str:
    """The help of an option, with its default."""
    default, text = default_text(field), str(field.metadata["text"])
    return f"{text} [{default}]" if default else text


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default of an option in words; empty for a switch that is off, and where nothing happens without it."""
    default: Any = field.default
    if default is None or default is False or default == ():
        return str(field.metadata["auto"])
    if default is True:
        return "on"
    return ",".join(map(str, default)) if is_repeated(field) else str(default)


def value_name(field: dataclasses.Field[Any]) -> str:
    """What stands for the value of an option in the help; empty for a switch."""
    kind = item_type(field)
    if kind is bool:
        return ""
    name: str = field.metadata["name"] or {int: "N", float: "X"}.get(kind, "NAME")
    return f"{name},..." if is_repeated(field) else name


def parse(field: dataclasses.Field[Any], words: Sequence[str]) -> tuple[Any, ...]:
    """The values of an option from its words, numbers and names alike.

    Raises:
        UsageError: a word is no number.
    """
    kind, parts = item_type(field), items(words) if is_repeated(field) else words
    try:
        return tuple(kind(part) if kind in NUMBERS else part for part in parts)
    except ValueError as error:
        name, what = flag(field.name), f"{NUMBERS[kind]}s" if is_repeated(field) else f"a {NUMBERS[kind]}"
        one = "0.5" if field.metadata["below"] == 1 else "8"
        example = f"write {name} {one}" if one == "0.5" or not is_repeated(field) else f"write {name} 1,8"
        raise UsageError(f"{name} {' '.join(words)}: expected {what}", example) from error


def items(words: Sequence[str]) -> list[str]:
    """The items of a list: a word holds one, or several between commas; one with a comma stands in double quotes."""
    found = (match.groups() for word in words for match in ITEM.finditer(word))
    return [item for whole, bare in found if (item := bare.strip() if whole is None else whole.replace('""', '"'))]


def as_item(value: object) -> str:
    """A value as `items` reads it back."""
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",]|^\s|\s$', text) else text


def command_line(command: str, *parts: str | Options, **further: Any) -> str:
    """The command that repeats a run, quoted for a shell; options that have their default are left out.

    Args:
        command: its name.
        parts: arguments and options, in their order.
        further: options that belong to no dataclass, by name; None and False are left out.
    """
    words = ["moeify", command]
    for part in parts:
        # A path that begins like an option.
        words += [f"./{part}" if part.startswith("-") else part] if isinstance(part, str) else _words(part)
    for name, value in further.items():
        if value is not None and value is not False:
            words += [flag(name)] if value is True else _repeated(name, value)
    return quoted(words)


def quoted(words: Sequence[str]) -> str:
    """A command that a shell reads back as these words, on one line and free of control characters.

    Words with such characters stand in quotes that bash, zsh and POSIX of 2024 know: $'one\\012two'.
    """
    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{_escaped(word)}'" for word in words)


def _escaped(word: str) -> str:
    return "".join(letter if letter.isprintable() and letter not in "'\\" else _octal(letter) for letter in word)


def _octal(letter: str) -> str:
    """The bytes of a letter; half ones are bytes of a file name that is not UTF-8."""
    errors = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass"
    return "".join(f"\\{byte:03o}" for byte in letter.encode(errors=errors))


def _words(options: Options) -> Iterator[str]:
    """The options that differ from their defaults."""
    for field in fields(type(options)):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            yield flag(field.name) if value else flag(f"no_{field.name}")
        elif is_repeated(field):
            yield from (flag(field.name), ",".join(map(as_item, value)))
        else:
            yield from (flag(field.name), str(value))


def _repeated(name: str, values: Any) -> list[str]:
    """Items that take no commas, each with the option; `items` reads those of a list."""
    if not isinstance(values, (list, tuple)):
        return [flag(name), str(values)]
    return [word for item in values for word in (flag(name), str(item) if name == "set" else as_item(item))]


def check_text(text: str) -> str:
    """The text, if it can be a name or a path.

    Raises:
        ValueError: it is empty, or holds what no file name can hold.
    """
    if not text.strip():
        raise ValueError("expected a text that is not empty")
    if "\0" in text:
        raise ValueError("expected a text without NUL characters")
    return text


def several(value: Any) -> tuple[Any, ...]:
    """One item, or several, as a tuple: what a caller may give where a list is expected."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else (value,)


def names_of(value: Any) -> tuple[str, ...]:
    """One name or path, or several, as texts."""
    return tuple(os.fspath(item) for item in several(value))


def _plain(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value as recipes and the command line give it: lists as tuples, paths and torch's names as text.

    Raises:
        UsageError: it is of another type.
    """
    if value is None:
        # Of an option that must have a value, the default says its type.
        return value if field.default is None else _typed(field, value)
    return tuple(_typed(field, item) for item in several(value)) if is_repeated(field) else _typed(field, value)


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    """One value, of the type of its option."""
    kind = item_type(field)
    if kind in NUMBERS:
        number: Any = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, number) and not isinstance(value, bool):
            # One of numpy becomes one of Python; what is too large for that is out of range.
            return kind(value) if abs(value) < COUNTABLE else value
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    elif type(value).__module__ == "torch":
        # torch.float32, torch.device("cuda:1")
        return str(value).removeprefix("torch.")
    expected = f"a {NUMBERS[kind]}" if kind in NUMBERS else "True or False" if kind is bool else "a text"
    raise UsageError(f"{flag(field.name)} is {value!r:.60}, expected {expected}", f"give {field.name} {expected}")


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise UsageError unless one value is a known name, a text that can be a name, or in its range."""
    name, known = flag(field.name), choices(field)
    if value is None or isinstance(value, bool) or (known and value in known):
        return
    if known:
        raise unknown(f"a value of {name}", str(value), known, f"{name} takes")
    if isinstance(value, str):
        _check_word(field, value)
    elif not _in_range(field, value):
        share = 1 < value <= 100 and field.metadata["below"] == 1
        question = f"did you mean {value / 100:g}? " if share else ""
        raise UsageError(f"{name} {_shown(value)} is out of range", f"{question}{name} takes {_range(field)}")
    elif abs(value) >= COUNTABLE and isinstance(value, int):
        raise UsageError(f"{name} {_shown(value)} is out of range", f"{name} takes less than {COUNTABLE:,}")


def _check_word(field: dataclasses.Field[Any], value: str) -> None:
    """Raise UsageError unless a text can be a name, and is one that its option knows."""
    name, folder = flag(field.name), field.metadata["plugin"]
    try:
        check_text(value)
    except ValueError as error:
        raise UsageError(f"{name} {value!r}: {error}", f"leave {name} out, or name something") from error
    if field.metadata["form"] and not re.fullmatch(field.metadata["form"], value):
        raise UsageError(f"{value!r:.100} is not a value of {name}", f"{name}: {field.metadata['text']}")
    if folder and value != field.default and value not in (names := names_in(folder)):
        raise unknown(SINGULAR[folder], value, names)


def _in_range(field: dataclasses.Field[Any], value: float) -> bool:
    """Whether a number is finite and in the range of its option."""
    least, above, below = (field.metadata[key] for key in ("least", "above", "below"))
    low = (least is None or value >= least) and (above is None or value > above)
    # Whole numbers of any length are compared without making them floats.
    return low and value < below and (isinstance(value, int) or math.isfinite(value))


def _shown(value: float) -> str:
    """A number; Python refuses to write a whole one of more than 4,300 digits."""
    return f"of {value.bit_length():,} bits" if isinstance(value, int) and value.bit_length() > 100 else str(value)


def _range(field: dataclasses.Field[Any]) -> str:
    """A range in words."""
    least, above, below = (field.metadata[key] for key in ("least", "above", "below"))
    if below < math.inf and item_type(field) is int:
        return f"{least:,} to {below - 1:,}"
    if least is None and above is None:
        return "finite numbers"
    low = f"{least:g} or more" if least is not None else f"more than {above:g}"
    return low if below == math.inf else f"{low} and less than {below:g}"
