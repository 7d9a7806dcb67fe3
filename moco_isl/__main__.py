"""`moco-isl NAME ...`, or `python -m moco_isl NAME ...`: runs one of the commands."""

import argparse
import difflib
import importlib
import sys

from moco_isl import __version__, files
from moco_isl.commands import COMMANDS
from moco_isl.errors import BadInput


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moco-isl",
        usage="%(prog)s NAME [flags]",
        description="\n".join(
            [
                "moco-isl NAME --help shows the flags of a command.",
                "",
                *(f"  {name:<10} {command.what}" for name, command in COMMANDS.items()),
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moco_isl {__version__}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command that argv begins with, or list all of them; returns the exit code."""
    files.print_any_name()
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"
    if name in COMMANDS:
        # on demand: most of them import torch, which takes a second
        return importlib.import_module(COMMANDS[name].module).main(argv[1:])
    if name in ("-h", "--help", "--version"):
        get_parser().parse_args([name])
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(COMMANDS)}"
    print(f"error: no command '{files.shown(files.short(name))}': {hint}", file=sys.stderr)
    return BadInput.exit_code


if __name__ == "__main__":
    sys.exit(main())
