"""Flags of a script: a parser whose errors are one line, config files, and checks of values."""

import argparse
import contextlib
import difflib
import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from moco_isl import __version__, commands, files, options
from moco_isl.errors import BadInput
from moco_isl.files import short
from moco_isl.options import Flag, flags_of, listed, one_or_more, opt
from moco_isl.run import plain_yaml

Groups = dict[str, tuple[type, ...]]  # the dataclasses of flags under each title


@dataclass(kw_only=True)
class ConfigOptions:
    """Where more flags are read from."""

    config: str | None = opt(
        None,
        metavar="FILE.yaml",
        may_change=True,
        help="flags by name, values as they would be typed, switches true or false; the command"
        " line wins. A line 'config: OTHER.yaml' starts from another file beside it, whose values"
        " these replace",
    )


class Given(argparse.Namespace):
    """Flags, and in `given` the names of those that were typed or stand in a config file.

    notes: lines about what the flags became. Neither is a flag: vars() leaves them out.
    """

    __slots__ = ("given", "notes")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's, but it names the value of a flag once, and breaks no line within a word.

    So it shows -b, --batch-size BATCH_SIZE, and --isl-rounds stays whole.
    """

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """argparse for flags that are fields (see `moco_isl.options`), with errors of one line.

    An error names the nearest flag. Flags are read from a YAML file too, see `parse_args`.
    prog: the command as it is typed in a checkout; description: names commands so, too.
    """

    def __init__(self, prog: str, description: str, **given):
        super().__init__(
            prog=commands.prog(prog),
            description=commands.as_typed(description),
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **given,
        )
        self.add_argument("--version", action="version", version=f"moco_isl {__version__}")
        self._plugins: _Plugins | None = None
        self._shows_all = False

    def add_groups(self, groups: Groups) -> None:
        for title, kinds in groups.items():
            self.add_options(title, *kinds)

    def add_options(self, title: str, *kinds: type) -> None:
        """Add a group of flags: the fields of these dataclasses.

        A field that several of them share is one flag.
        """
        group = self.add_argument_group(title)
        for kind in kinds:
            for flag in flags_of(kind).values():
                if flag.name not in self._option_string_actions:
                    _add(group, flag, flag.default)
                if flag.rare:
                    self._offer_all()

    def add_plugins(self, flag: str, kinds: dict[str, type], find: Callable[[str], type]) -> None:
        """Let the flag --`flag` choose one of several classes, each with flags of its own.

        find(name) gives the class of a name. The flags of a class that is not in `kinds`, such as
        my.module:MyMiner, are added once argv names it. A flag that the parser has already is
        shared. Raises BadInput for a flag of a class that was not chosen.
        """
        self._plugins = _Plugins(flag, kinds, find, self.add_argument_group(f"--{flag}'s own"))
        for name, kind in kinds.items():
            self._know(name, kind)
        self._offer_all().help = f"show every flag, those of each --{flag} too"

    def _offer_all(self) -> argparse.Action:
        """The flag --help-all."""
        if "--help-all" not in self._option_string_actions:
            self.add_argument("--help-all", action=_HelpAll, help="show every flag")
        return self._option_string_actions["--help-all"]

    def _know(self, name: str, kind: type) -> None:
        for flag in flags_of(kind).values():
            if ":" in name:
                self._require_room(flag, f"--{self._plugins.flag} {name}")
            action = self._option_string_actions.get(flag.name)
            if action is None:
                action = _add(self._plugins.group, flag, None)
                action.owners = {}
            if hasattr(action, "owners"):
                action.owners[name] = flag

    def _require_room(self, flag: Flag, plugin: str) -> None:
        """Raise BadInput where a plug-in's flag is another one than the flag that has its name.

        Those that it inherits are the same; of another plug-in's flag it may have its own default.
        """
        of = f"{plugin}: its field {flag.field}"
        if not all(name.startswith("-") for name in flag.names):
            raise BadInput(f"{of} is no flag: expected a name that begins with --")
        typed_as = lambda flag: (flag.names, flag.kind, flag.several)
        for action in self._actions:
            if flag.dest != action.dest and not set(flag.names) & set(action.option_strings):
                continue
            known = getattr(action, "flag", None)
            same = known == flag
            if hasattr(action, "owners"):
                same = typed_as(known) == typed_as(flag)
            if not same:
                raise BadInput(
                    f"{of} would be {flag.name}, and the script has such a flag already: give the"
                    " field another name"
                )

    def _choose(self, name: str | None) -> None:
        """Take note of the class that the plug-ins' flag names, and of its flags."""
        plugins = self._plugins
        if plugins is None or name is None:
            return
        if ":" in name and name not in plugins.kinds:
            plugins.kinds[name] = plugins.find(name)
            self._know(name, plugins.kinds[name])
        plugins.chosen = name

    def _owned(self) -> list[argparse.Action]:
        return [action for action in self._actions if hasattr(action, "owners")]

    def _settle(self, args: argparse.Namespace) -> None:
        """Give the flags of the chosen class their defaults, and remove those of other classes.

        Raises BadInput where one of those was given.
        """
        for action in self._owned():
            chosen = getattr(args, self._plugins.flag)
            value = getattr(args, action.dest)
            flag = action.owners.get(chosen)
            if flag is not None:
                setattr(args, action.dest, flag.default if value is None else value)
                continue
            if value is not None:
                raise BadInput(
                    f"{action.flag.name} is a flag of --{self._plugins.flag}"
                    f" {' and '.join(action.owners)}, and --{self._plugins.flag} is {chosen}: leave"
                    " it off"
                )
            delattr(args, action.dest)

    def format_help(self) -> str:
        """The help of the common flags, and of the chosen class's own; with --help-all, of all."""
        real = {action: action.help for action in self._actions}
        for action in self._actions:
            flag = getattr(action, "flag", None)
            owners = getattr(action, "owners", {})
            if owners and self._shows_all:
                action.help = "; ".join(f"{name}: {_help(own)}" for name, own in owners.items())
            elif owners and self._plugins.chosen in owners:
                action.help = _help(owners[self._plugins.chosen])
            elif owners or flag and flag.rare and not self._shows_all:
                action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in real.items():
                action.help = text

    def error(self, message: str):
        flag = found[1].split("/")[0] if (found := re.match(r"argument (\S+): ", message)) else ""
        if found := re.search(r"invalid choice: '(.*?)'.*\(choose from (.*)\)", message):
            choices = found[2].replace("'", "")
            message = (
                f"{flag} {short(found[1])}: expected one of"
                f" {choices}{_nearest(found[1], choices.split(', '))}"
            )
        elif found := re.search(r"invalid (int|float) value: (.*)", message):
            message = (
                f"{flag} {short(found[2][1:-1])}: expected a"
                f" {'whole ' if found[1] == 'int' else ''}number"
            )
        elif message.startswith("unrecognized arguments: "):
            rest = message.removeprefix("unrecognized arguments: ")
            first = (rest.split() or [rest])[0]
            if not first.startswith("-"):
                raise BadInput(
                    f"'{short(first)}' is one argument too many: expected"
                    f" {self._what_is_expected()}; see --help"
                )
            message = (
                "no flag"
                f" {short(first)}{_nearest(first.split('=')[0], self._option_string_actions)}"
            )
        elif flag:
            message = f"{flag}: {message.split(': ', 1)[1]}"
        raise BadInput(f"{message}; see --help")

    def _what_is_expected(self) -> str:
        names = [action.metavar for action in self._actions if not action.option_strings]
        return f"flags and {', '.join(names)}"

    def parse_args(self, argv: list[str] | None = None, namespace=None) -> Given:
        """Flags of argv; those of `--config FILE.yaml` come first, so the command line wins."""
        argv = list(sys.argv[1:] if argv is None else argv)
        config = self._said("config", argv)
        if config and "--config" in self._option_string_actions:
            chosen = self._plugins and self._said(self._plugins.flag, argv)
            argv = self._from_config(config, chosen) + argv
        if self._plugins is not None:
            self._choose(self._said(self._plugins.flag, argv))
        argv = self._data_first(argv)
        args = super().parse_args(argv, Given() if namespace is None else namespace)
        args.given = self._given(argv, args)
        args.notes = []
        self._settle(args)
        return args

    def _given(self, argv: list[str], args: argparse.Namespace) -> set[str]:
        """The flags that are not left to their defaults; a positional is given if it is not None.

        argparse sets a default only where the namespace has no value, so a second reading into one
        full of marks leaves the marks of all that was not given.
        """
        mark = object()
        marked = argparse.Namespace(**dict.fromkeys(vars(args), mark))
        for action in self._actions:
            if isinstance(action, argparse._AppendAction):  # it would append to the mark
                setattr(marked, action.dest, None)
        super().parse_args(argv, marked)
        typed = [action.dest for action in self._actions if action.option_strings]
        return {
            name
            for name, value in vars(marked).items()
            if (value not in (mark, None) if name in typed else getattr(args, name) is not None)
        }

    @staticmethod
    def _said(name: str, argv: list[str]) -> str | None:
        """The value of one flag in argv, before the others are looked at."""
        alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        alone.add_argument(f"--{name}", nargs="?")
        return getattr(alone.parse_known_args(argv)[0], name)

    def _data_first(self, argv: list[str]) -> list[str]:
        """Move the words that are no values of a flag, such as DIR, to the front of argv.

        Otherwise argparse would take DIR for a value, as in `--lr 30 DIR` and `--layers all DIR`,
        and would refuse `DIR --mlp DIR`. DIR is told from the values of a flag that takes several
        by the flag's type, which refuses it. Where a flag needs at least one value, the first one
        stays with it, so that a wrong one is reported.
        """
        front = []
        rest = []
        flag = None
        needs = 0  # how many more words are values of the flag for sure
        several = False  # whether others may be
        moves = True  # whether the words up to the next flag are no values
        for token in argv:
            if token.startswith("-") and not _takes(float, token):
                name, given, _ = token.partition("=")
                flag = self._option_string_actions.get(name)
                nargs = 0 if flag is None or given else flag.nargs
                needs = 0 if nargs in (0, "*") else 1
                several = nargs in ("*", "+")
                moves = False
            elif needs:
                needs -= 1
            elif not moves:
                moves = flag is not None and not (several and _takes(flag.type, token))
            (front if moves else rest).append(token)
        return front + rest

    def _from_config(self, path: str, chosen: str | None) -> list[str]:
        """The flags that a YAML file names, as argv; DIR becomes the default of `data`.

        chosen: the plug-in that argv chooses. If the file names another one, its flags are left
        out.
        """
        content = self._settings(path, chosen)
        argv, data = self.argv_of(content, files.named("--config", path))
        if data:
            # a positional before the flags would be a second one beside the command line's
            self.set_defaults(data=one_or_more(data))
        # --config again: otherwise the flag before it could take the first words of argv
        return [*argv, "--config", path]

    def _settings(self, path: str, chosen: str | None, above: tuple[str, ...] = ()) -> dict:
        """What a YAML file says, over what the file says that it names as its own `config`.

        That one's path is relative to the folder of the file. chosen: see `_from_config`. above:
        the files that led here.
        """
        of = files.named("--config", path)
        content = plain_yaml.read(path, "--config", "lines 'flag: value'")
        if not isinstance(content, dict | None):
            raise BadInput(
                f"{of} holds a {'list' if isinstance(content, list) else 'text'}: expected lines"
                " 'flag: value'"
            )
        content = dict(content or {})
        below = content.pop("config", None)
        if below is not None:
            is_file = isinstance(below, str) and below != ""
            check(is_file, f"{of}: config: expected one file to start from")
            above = (*above, os.path.realpath(path))
            file = os.path.join(os.path.dirname(path), below)
            check(
                os.path.realpath(file) not in above,
                f"{of}: config: {short(below)} leads back here: expected a file that does not",
            )
            own = content.get(self._plugins.flag) if self._plugins else None
            chooses = own if chosen is None and isinstance(own, str) else chosen
            content = self._settings(file, chooses, above) | content
        return self._without_plugin(content, chosen)

    def _without_plugin(self, settings: dict, chosen: str | None) -> dict:
        """The settings; without the plug-in they name, and its flags, where another is chosen."""
        own = settings.get(self._plugins.flag) if self._plugins else None
        if chosen is None or not isinstance(own, str) or own == chosen:
            return settings
        with contextlib.suppress(BadInput):  # of a plug-in that is not even chosen
            self._choose(own)
        self._choose(chosen)
        gone = {action.dest for action in self._owned() if chosen not in action.owners}
        gone.add(self._plugins.flag)
        return {name: x for name, x in settings.items() if name.replace("-", "_") not in gone}

    def argv_of(
        self, settings: dict[str, plain_yaml.Value], of: str
    ) -> tuple[list[str], list[str]]:
        """(argv, the DIRs) of flags by name with their values, as `plain_yaml.read` gives them.

        of: the file, for BadInput.
        """
        argv = []
        named = {}
        data = []
        if self._plugins is not None and isinstance(settings.get(self._plugins.flag), str):
            self._choose(settings[self._plugins.flag])
        for name, value in settings.items():
            flag = "--" + name.replace("_", "-")
            action = self._option_string_actions.get(flag)
            of_the_parser = ("config", "help", "help_all", "version")
            if name != "data" and (action is None or action.dest in of_the_parser):
                raise BadInput(
                    f"{of}: no flag named"
                    f" '{short(name)}'{_nearest(flag, self._option_string_actions)}"
                )
            other = named.setdefault("data" if action is None else action.dest, name)
            check(other == name, f"{of}: {other} and {name} are one flag: name it once")
            if name == "data":
                data = listed(value) if not isinstance(value, dict) else [value]
                texts = all(isinstance(x, str) for x in data)
                check(texts, f"{of}: data: expected a path, or a list of them")
            elif action.nargs == 0:
                argv += self._switch(flag, value, of)
            elif value is not None:
                argv += _as_argv(flag, action, value, of)
        return argv, data

    def _switch(self, flag: str, value: plain_yaml.Value, of: str) -> list[str]:
        word = value.lower() if isinstance(value, str) else ""
        if word not in ON | OFF:
            given = "nothing" if value is None else "more than a word"
            if isinstance(value, str):
                given = f"'{short(value)}'"
            raise BadInput(f"{of}: {flag[2:]} is a switch: expected true or false, got {given}")
        if word in ON:
            return [flag]
        return ["--no-" + flag[2:]] if "--no-" + flag[2:] in self._option_string_actions else []


ON, OFF = {"true", "on", "yes"}, {"false", "off", "no"}


def _as_argv(flag: str, action: argparse.Action, value: str | list | dict, of: str) -> list[str]:
    """A flag with its value or values from a config file, as they would stand in argv."""
    values = value if isinstance(value, list) else [value]
    several = action.nargs in ("*", "+")
    # its type may take several from one text, such as 1,5,10
    as_one_text = action.type not in (None, str, int, float)
    if (
        not all(isinstance(x, str) for x in values)
        or isinstance(value, list)
        and not (several or as_one_text)
    ):
        raise BadInput(
            f"{of}: {flag[2:]}: expected"
            f" {'a value, or a list of them' if several or as_one_text else 'one value'}"
        )
    if not several:
        return [f"{flag}={','.join(values)}"]
    for x in values:
        check(
            not x.startswith("-") or _takes(float, x),
            f"{of}: {flag[2:]}: '{short(x)}' looks like a flag: expected a value",
        )
    return [flag, *values]


def _takes(kind: Callable | None, text: str) -> bool:
    """Whether an argument's type takes a text."""
    try:
        (kind or str)(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return True


def _nearest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6) if word else []
    return f" (did you mean {near[0]}?)" if near else ""


class _Plugins:
    """Classes of which a flag chooses one, see `Parser.add_plugins`."""

    def __init__(self, flag: str, kinds: dict[str, type], find: Callable, group):
        self.flag = flag
        self.kinds = dict(kinds)
        self.find = find
        self.group = group
        self.chosen: str | None = None


class _HelpAll(argparse.Action):
    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        parser._shows_all = True
        parser.print_help()
        parser.exit()


class _OneOrMore(argparse.Action):
    """A positional argument of any number of values, see `one_or_more`."""

    def __call__(self, parser, namespace, values, option_string=None):
        if isinstance(values, list):  # else the default
            values = one_or_more(values)
        setattr(namespace, self.dest, values)


def _add(group, flag: Flag, default) -> argparse.Action:
    """Add a flag to a group of arguments."""
    given = {"default": default, "help": _help(flag), "metavar": flag.metavar}
    names = flag.names
    if flag.kind is bool:
        given |= {"action": argparse.BooleanOptionalAction}
        given.pop("metavar")
    else:
        given |= {"type": _type(flag), "choices": None if flag.plugin else flag.choices}
        given["nargs"] = flag.several
    if names[0].startswith("-"):
        given["dest"] = flag.dest
    elif flag.several:
        given["action"] = _OneOrMore
    else:
        given["nargs"] = "?"
    action = group.add_argument(*names, **given)
    action.flag = flag
    return action


def _help(flag: Flag) -> str:
    default = "" if flag.kind is bool else flag.default_text
    text = f"{flag.help} (default: {default})" if default else flag.help
    return text.replace("%", "%%")


def _type(flag: Flag) -> Callable | None:
    if flag.plugin:
        return functools.partial(_named, flag.choices)
    if flag.parse is not None:
        return functools.partial(_parsed, flag.parse)
    return None if flag.kind is str else flag.kind


def _named(choices: tuple[str, ...], text: str) -> str:
    if text not in choices and ":" not in text:
        known = ", ".join(map(repr, [*choices, "my.module:Name"]))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known})")
    return text


def _parsed(parse: Callable, text: str):
    try:
        return parse(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check(ok: bool, message: str) -> None:
    """Raise BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


def check_ranges(args: argparse.Namespace, *kinds: type) -> None:
    """Check the fields of these dataclasses against their ranges. Raises BadInput."""
    for kind in kinds:
        for flag in flags_of(kind).values():
            value = getattr(args, flag.dest)
            options.check_range(flag.name, value, flag.low, flag.high, flag.low_open)


def take(kind: type, args: argparse.Namespace, **more):
    """Make an instance of a dataclass from the values of flags.

    A field that is a flag takes the value of that flag. Another field that needs a value takes the
    value of the flag with its name. more: fields that are no flags. Raises BadInput where a value
    is out of range.
    """
    check_ranges(args, kind)
    own = flags_of(kind)
    values = {name: getattr(args, flag.dest) for name, flag in own.items()}
    for name in options.needed(kind) - own.keys() - more.keys():
        values[name] = getattr(args, name)
    return kind(**values, **more)


def kinds_of(groups: Groups) -> list[type]:
    return [kind for kinds in groups.values() for kind in kinds]


def dests(*kinds: type) -> set[str]:
    """The names in args.json of all flags of these dataclasses."""
    return {flag.dest for kind in kinds for flag in flags_of(kind).values()}


def may_change(*kinds: type) -> set[str]:
    """The names in args.json of the flags that a resumed run may change."""
    found = [flag for kind in kinds for flag in flags_of(kind).values()]
    return {flag.dest for flag in found if flag.may_change}
