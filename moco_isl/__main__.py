"""`python -m moco_isl`, or `moco-isl` where it is installed: the list of commands."""

import argparse
import sys

from moco_isl import __version__, files

COMMANDS = {  # as installed -> (in a checkout, what it does)
    "main_moco_isl": (
        "python main_moco_isl.py",
        "pretrain an encoder without labels: MoCo v2, and ISL around it",
    ),
    "main_knn": ("python main_knn.py", "judge an encoder by weighted nearest neighbours"),
    "main_lincls": (
        "python main_lincls.py",
        "judge an encoder by linear classifiers, or train the whole network",
    ),
    "moco-isl-report": ("python -m moco_isl.report", "write a page about one run or several"),
    "moco-isl-export": (
        "python -m moco_isl.export",
        "hand the encoder to torchvision, timm, safetensors or detectron2",
    ),
    "moco-isl-submit": ("python launch/submit.py", "run a script on a SLURM cluster"),
    "moco-isl-status": ("python launch/status.py", "what a submitted job is doing"),
    "moco-isl-sweep": ("python launch/sweep.py", "run a script at many settings"),
    "moco-isl": ("python -m moco_isl", "this list"),
}


def get_parser() -> argparse.ArgumentParser:
    head = "The commands, as installed and from a checkout. Each takes --help and --version.\n"
    rows = [f"  {name:<16} {way:<26} {what}" for name, (way, what) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m moco_isl",
        description="\n".join([head, *rows]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moco_isl {__version__}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the list; returns the exit code."""
    files.print_any_name()
    parser = get_parser()
    _, rest = parser.parse_known_args(argv)
    if rest:
        what = f"'{files.shown(rest[0])}' is one argument too many"
        print(f"error: {what}: without any, the commands are listed", file=sys.stderr)
        return 2
    print(parser.description)
    return 0


if __name__ == "__main__":
    sys.exit(main())
