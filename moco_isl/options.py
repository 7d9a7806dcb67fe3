"""A flag is a field: one dataclass field holds a flag's name, default, range and help.

    @dataclass(eq=False)
    class MyMiner(RoundMiner):
        hops: int = opt(3, low=1, help="steps of a walk (3)")        # the flag --hops

The field is the only place of the flag. `moco_isl.run.flags` makes from it the parser, the checks
of ranges and what --resume may change, and `moco_isl.flags_page` writes docs/flags.md.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass

from moco_isl.errors import BadInput, first_line
from moco_isl.files import short

LARGEST = 2**31 - 1  # the largest whole number that a flag takes, unless it says another `high`


@dataclass(frozen=True)
class Flag:
    """A flag as its field describes it; `opt` says what each part means."""

    field: str
    dest: str  # its name in a Namespace and in args.json
    names: tuple[str, ...]  # as they are typed; a positional argument has no dashes
    default: object
    kind: type  # the type of one value: int, float, str or bool
    several: str | None  # "*" or "+" where it takes a list
    optional: bool  # None is a value: not given
    help: str
    low: float | None
    high: float
    low_open: bool
    choices: tuple[str, ...] | None
    plugin: bool
    parse: Callable[[str], object] | None
    metavar: str | None
    may_change: bool
    rare: bool

    @property
    def name(self) -> str:
        """The name that messages and docs use."""
        long = [name for name in self.names if name.startswith("--")]
        return next((name for name in long if name == "--" + dashed(self.dest)), self.names[-1])

    @property
    def range(self) -> str:
        """The values that it takes, in words; '' for any of its kind."""
        if self.choices:
            return ", ".join([*self.choices, *(["my.module:Name"] if self.plugin else [])])
        if self.low is None or self.low < -LARGEST:
            return ""
        bounds = f"{'more than' if self.low_open else 'at least'} {self.low:g}"
        return bounds if self.high >= LARGEST else f"{bounds}, at most {self.high:g}"

    @property
    def default_text(self) -> str:
        """The default as it would be typed; on or off of a switch, '' for none."""
        if self.default is None or self.default == "":
            return ""
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        values = self.default if isinstance(self.default, list) else [self.default]
        return " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values)


def opt(
    default,
    *names: str,
    help: str,
    low: float | None = None,
    high: float = math.inf,
    low_open: bool = False,
    choices: tuple[str, ...] | None = None,
    plugin: bool = False,
    several: str | None = None,
    parse: Callable[[str], object] | None = None,
    metavar: str | None = None,
    may_change: bool = False,
    rare: bool = False,
):
    """A dataclass field that is a flag.

    The annotation of the field says the kind of its values; with None in it, None stands for a flag
    that was not given. names: as typed on the command line; without any, --name-of-the-field.
    low, high: the least and the largest value; low_open: `low` itself is not allowed.
    choices: the words that it takes; plugin: and any my.module:Name.
    several: "+" or "*" for a list of values; a positional one is then as `one_or_more` says.
    parse: makes the value of a text, or raises BadInput.
    may_change: a resumed run may say another value. rare: --help leaves it to --help-all.
    """
    about = {
        "names": names,
        "help": help,
        "low": low,
        "high": high,
        "low_open": low_open,
        "choices": choices and tuple(choices),
        "plugin": plugin,
        "several": several,
        "parse": parse,
        "metavar": metavar,
        "may_change": may_change,
        "rare": rare,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"flag": about})
    return dataclasses.field(default=default, metadata={"flag": about})


def listed(value: str | os.PathLike | list | tuple | None) -> list[str]:
    """The values of a positional flag that takes one or several, such as DIR; [] for none."""
    if value is None:
        return []
    several = value if isinstance(value, list | tuple) else [value]
    return [os.fspath(one) for one in several]


def one_or_more(values: list[str]) -> str | list[str] | None:
    """The value that such a flag has for these: none is None, one a text, more a list."""
    return values if len(values) > 1 else next(iter(values), None)


def default_of(function: Callable, parameter: str):
    """The default that a function's signature has: for a flag whose default stands there."""
    return inspect.signature(function).parameters[parameter].default


@functools.cache
def flags_of(kind: type) -> dict[str, Flag]:
    """The flags that the fields of a dataclass are, by field; {} for any other class."""
    if not dataclasses.is_dataclass(kind):
        return {}
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        if "flag" not in field.metadata:
            continue
        about = dict(field.metadata["flag"])
        names = about.pop("names") or ("--" + dashed(field.name),)
        dest = field.name
        if names[-1].startswith("--") and "--" + dashed(dest) not in names:
            dest = next(name for name in names if name.startswith("--"))[2:].replace("-", "_")
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value, optional = _kind(hints[field.name])
        found[field.name] = Flag(
            field.name, dest, names, default, value, optional=optional, **about
        )
    return found


def needed(kind: type) -> set[str]:
    """The fields of a dataclass that have no default; none of any other class."""
    missing = dataclasses.MISSING
    return {
        field.name
        for field in (dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ())
        if field.init and field.default is missing and field.default_factory is missing
    }


def _kind(hint) -> tuple[type, bool]:
    """(int, float, str or bool that values of an annotation are, whether None is one too)."""
    parts = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
    plain = [kind for kind in (str, float, int, bool) if kind in parts]
    inner = [x for part in parts for x in typing.get_args(part)]  # the int in list[int]
    return [*plain, *inner][0], type(None) in parts


def dashed(name: str) -> str:
    return name.replace("_", "-")


def typed_flags(values: dict) -> list[str]:
    """Flags by name in args.json with their values, as the words of a command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{dashed(name)}")
        else:
            several = value if isinstance(value, list) else [value]
            words += [f"--{dashed(name)}", *map(str, several)]
    return words


def check_values(options) -> None:
    """Check the fields of a dataclass against their ranges and choices. Raises BadInput."""
    for name in flags_of(type(options)):
        check_value(options, name)


def check_value(options, name: str) -> None:
    """Check one field of a dataclass, as `check_values`. Raises BadInput."""
    flag = flags_of(type(options))[name]
    value = getattr(options, name)
    what = f"{type(options).__name__}: {name}"
    check_range(what, value, flag.low, flag.high, flag.low_open)
    known = not flag.choices or value is None or value in flag.choices
    if not known and not (flag.plugin and ":" in value):
        raise BadInput(f"{what} is {value!r}: expected {' or '.join(flag.choices)}")


def check_range(
    what: str, value, low: float | None, high: float = math.inf, low_open: bool = False
) -> None:
    """Raise BadInput unless a value, or every value of a list, lies in [low, high] or (low, high].

    Infinity and NaN never do, nor do whole numbers above LARGEST where `high` allows any.
    None and texts have no range. what: names the value in the message.
    """
    values = value if isinstance(value, list | tuple) else [value]
    for v in values if low is not None else []:
        if v is None or isinstance(v, str):
            continue
        most = LARGEST if isinstance(v, int) and high == math.inf else high
        finite = isinstance(v, int) or math.isfinite(v)
        above = low < v if low_open else low <= v
        if above and v <= most and finite:
            continue
        bounds = f"{'more than' if low_open else 'at least'} {low:g}"
        if most < LARGEST or v > most:  # LARGEST is named only to a value above it
            bounds += f" and at most {LARGEST if most == LARGEST else format(most, 'g')}"
        bounds += "" if finite else ", and finite"
        raise BadInput(f"{what} {short(str(v))} is out of range: expected {bounds}")


def load_object(name: str, flag: str):
    """What `my.module:Name` names; modules of the current folder are found too. Raises BadInput."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    expected = "expected module:name of a Python module that can be imported"
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module of somebody else's may raise anything
        reason = first_line(error)
        raise BadInput(f"{flag} {short(name)}: {short(reason, 150)}; {expected}") from error
    if not hasattr(found, attribute):
        raise BadInput(f"{flag} {short(name)}: {module} has no '{short(attribute)}'; {expected}")
    return getattr(found, attribute)
