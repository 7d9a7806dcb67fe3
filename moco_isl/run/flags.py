"""Flags of a script: a parser whose errors are one line, config files, and checks of values."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable

from moco_isl import __version__, files
from moco_isl.errors import BadInput
from moco_isl.files import short
from moco_isl.run import plain_yaml

DATASETS = ("folder", "cifar10", "cifar100", "svhn", "digits")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest flag, and which reads flags from a
    YAML file too.
    """

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self.add_argument("--version", action="version", version=f"moco_isl {__version__}")

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
        which = (
            f"at most one {names[0]}, which names the data set"
            if names == ["DIR"]
            else ", ".join(names)
        )
        return f"flags and {which}"

    def parse_args(self, argv: list[str] | None = None, namespace=None) -> argparse.Namespace:
        """Flags of argv; with `--config FILE.yaml` those of the file first, so that the command
        line wins.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if "--config" in self._option_string_actions:
            config, _ = _ConfigOnly().parse_known_args(argv)
            argv = self._from_config(config.config) + argv if config.config else argv
        return super().parse_args(self._data_first(argv), namespace)

    def _data_first(self, argv: list[str]) -> list[str]:
        """argv with what a flag of several values would swallow moved to the front: `--lr 30 DIR`
        and `--layers all DIR` name a DIR.

        Such a flag has a type that does not take a DIR. What begins its values is left to it, to be
        judged.
        """
        front = []
        rest = []
        flag = None
        fewest = 0
        for token in argv:
            if token.startswith("-") and not _takes(float, token):
                flag = self._option_string_actions.get(token)
                flag = flag if flag is not None and flag.nargs in ("*", "+") else None
                fewest = 1 if flag is not None and flag.nargs == "+" else 0
            elif flag is not None and fewest == 0 and not _takes(flag.type, token):
                front.append(token)
                flag = None
                continue
            else:
                fewest = 0
            rest.append(token)
        return front + rest

    def _from_config(self, path: str) -> list[str]:
        """The flags that a YAML file names, as argv; DIR as the default of `data`, which the
        command line may name anew.
        """
        of = files.named("--config", path)
        content = plain_yaml.read(path, "--config", "lines 'flag: value'")
        if not isinstance(content, dict | None):
            raise BadInput(
                f"{of} holds a {'list' if isinstance(content, list) else 'text'}: expected lines"
                " 'flag: value'"
            )
        argv, data = self.argv_of(content or {}, of)
        if data is not None:
            # a positional before the flags would be a second one beside the command line's
            self.set_defaults(data=data)
        # again, such that no flag before it takes what the command line begins with
        return [*argv, "--config", path]

    def argv_of(
        self, settings: dict[str, plain_yaml.Value], of: str
    ) -> tuple[list[str], str | None]:
        """(argv, DIR or None) of flags by name with their values, as `plain_yaml.read` gives them;
        of: the file, for BadInput.
        """
        argv = []
        named = {}
        data = None
        for name, value in settings.items():
            flag = "--" + name.replace("_", "-")
            action = self._option_string_actions.get(flag)
            if name != "data" and (action is None or action.dest in ("config", "help", "version")):
                raise BadInput(
                    f"{of}: no flag named"
                    f" '{short(name)}'{_nearest(flag, self._option_string_actions)}"
                )
            other = named.setdefault("data" if action is None else action.dest, name)
            check(other == name, f"{of}: {other} and {name} are one flag: name it once")
            if name == "data":
                check(not isinstance(value, list | dict), f"{of}: data: expected one path")
                data = value
            elif action.nargs == 0:
                argv += self._switch(flag, value, of)
            elif value is not None:
                argv += _as_argv(flag, action, value, of)
        return argv, data

    def _switch(self, flag: str, value: plain_yaml.Value, of: str) -> list[str]:
        word = value.lower() if isinstance(value, str) else ""
        if word not in ON | OFF:
            given = (
                "nothing"
                if value is None
                else f"'{short(value)}'"
                if isinstance(value, str)
                else "more than a word"
            )
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


class _ConfigOnly(argparse.ArgumentParser):
    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--config")

    def error(self, message: str):
        raise BadInput(message)


def _nearest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6) if word else []
    return f" (did you mean {near[0]}?)" if near else ""


def add_switch(group, *flags: str, help: str, default: bool = False) -> None:
    """A switch that a config file may set and the command line may take back: --x and --no-x."""
    group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DIR",
        nargs="?",
        help=(
            "path to dataset: DIR/train and DIR/val with a folder a class; a flat folder of images"
            " (no labels) works for pretraining; for cifar10, cifar100, svhn: where torchvision"
            " keeps them"
        ),
    )
    group = parser.add_argument_group("data set")
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        default="folder",
        help="what DIR holds (default: folder); digits is embedded and needs no DIR",
    )
    add_switch(
        group,
        "--download",
        help="let torchvision fetch cifar10, cifar100 or svhn into DIR; needed once",
    )
    group.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="S",
        help=(
            "side of a crop in pixels (default: 224 for photos, the native "
            "side for sets of small images)"
        ),
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        help=(
            "keep small images of one size (up to 64 pixels) decoded in this folder, which many"
            " runs may share: later runs map them, and decode anew what has changed since. Larger"
            " ones stay in their files"
        ),
    )
    group.add_argument(
        "--max-bad-images",
        type=int,
        default=0,
        metavar="n",
        help=(
            "go on past this many unreadable images, each named "
            "(default: 0); raise it for a crawl of the web"
        ),
    )


LARGEST = 2**31 - 1  # what a flag that counts something takes


def check(ok: bool, message: str) -> None:
    """Raise BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


def check_range(
    args: argparse.Namespace,
    name: str,
    low: float,
    high: float = float("inf"),
    low_open: bool = False,
) -> None:
    """The value(s) of flag `name` lie in [low, high], or (low, high]; infinity and NaN never do,
    nor whole numbers above LARGEST without `high`.
    """
    value = getattr(args, name)
    for v in value if isinstance(value, list) else [value]:
        if v is None:
            continue
        most = LARGEST if isinstance(v, int) and high == math.inf else high
        finite = isinstance(v, int) or math.isfinite(v)
        inside = (low < v if low_open else low <= v) and v <= most and finite
        bounds = f"{'more than' if low_open else 'at least'} {low:g}"
        if most < LARGEST or v > most:  # of LARGEST only who is above it needs to hear
            bounds += f" and at most {LARGEST if most == LARGEST else format(most, 'g')}"
        bounds += "" if finite else ", and finite"
        check(
            inside, f"--{name.replace('_', '-')} {short(str(v))} is out of range: expected {bounds}"
        )


def check_data_options(args: argparse.Namespace) -> None:
    for flag, path in (("DIR", args.data), ("--cache", args.cache)):
        check(
            path != "",
            f"{flag} is an empty text: expected a folder; '.' is the one this is started in",
        )
    if args.data is not None:
        files.kind(args.data, "DIR")  # raises where nobody can look at it
    if args.cache is not None:
        check(
            args.dataset == "folder",
            f"--cache keeps images of a folder decoded, and those of --dataset {args.dataset} need"
            " no decoding: leave it off",
        )
        # a full cache is only read
        files.require_folder(args.cache, "--cache", may_be_read_only=True)
    check_range(args, "image_size", 0, 4096)
    check_range(args, "max_bad_images", 0)
    if args.dataset == "digits":
        check(
            args.data is None,
            f"two data sets are named: --dataset digits is embedded, and DIR is '{args.data}': drop"
            " one of them",
        )
    else:
        check(
            args.data is not None,
            f"no data: --dataset {args.dataset} needs a DIR; for a first try without any, use"
            " --dataset digits",
        )
    check(
        not args.download or args.dataset in ("cifar10", "cifar100", "svhn"),
        f"--download works for cifar10, cifar100 and svhn, not for --dataset {args.dataset}",
    )
