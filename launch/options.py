"""The command lines of submit.py and sweep.py.

They say what is asked of the cluster, and have the flags of the script, which the script's own
parser reads.

What is asked of the cluster, and the flags of the script, parsed by the script's own parser.
"""

import argparse
import contextlib
import importlib
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# `python launch/submit.py` puts only launch/ there
sys.path[:0] = [p for p in [str(ROOT)] if p not in sys.path]

from launch.job import SCRIPTS
from moco_isl import __version__, commands, files
from moco_isl.errors import BadInput
from moco_isl.run.flags import HelpFormatter

# names that would reach the job through sbatch and mean something else there
FOREIGN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_VISIBLE_DEVICES", "GROUP_RANK", "ROLE_RANK"),
)
FOREIGN_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "TORCHELASTIC_", "PMI", "OMPI_")
# without it neither sbatch nor the job's own scontrol finds a cluster of this name
FAMILIAR = {"SLURM_CONF"}

# These stand in the sbatch file, or in a command, where what follows a line end would run as a
# command. --setup, --container and --python hold shell commands.
ONE_LINE = (
    *("job_dir", "name", "partition", "account", "qos", "comment", "constraint", "exclude"),
    *("container", "python", "sbatch", "srun", "env"),
)
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SBATCH_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

RANGES = {  # lowest and highest value
    "nodes": (1, 100_000),
    "tasks_per_node": (1, 1000),
    "gpus_per_node": (0, 1000),
    "cpus_per_task": (1, 10_000),
    "timeout": (1, 10_000_000),
    "signal_delay": (0, 10_000_000),
    "array_parallelism": (1, 1_000_000),
    "max_restarts": (0, 1_000_000),
    "mem_gb": (0.01, 1_000_000),
    "join_timeout": (0, 1_000_000),
    "poll": (0.01, 100_000),
}


CLUSTERS = {
    "slurm": "submit, several runs as a job array",
    "local": "processes of this machine, in the background",
    "debug": "one task in this very process",
    "none": "one after another on this machine",
}


class LauncherParser(argparse.ArgumentParser):
    """prog, description: as `flags.Parser` has them."""

    def __init__(self, prog: str = "", description: str = "", **given):
        super().__init__(
            prog=commands.prog(prog) if prog else None,
            description=commands.as_typed(description),
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **given,
        )

    def add_version(self) -> None:
        self.add_argument("--version", action="version", version=f"moco_isl {__version__}")

    def error(self, message: str):
        raise BadInput(f"{message[:300]}; see --help")


def add_cluster_options(parser: argparse.ArgumentParser, clusters: tuple[str, ...]) -> None:
    parser.add_version()
    group = parser.add_argument_group("what a job gets")
    group.add_argument(
        "--cluster",
        choices=clusters,
        default=clusters[0],
        help="; ".join(f"{name}: {CLUSTERS[name]}" for name in clusters) + f" ({clusters[0]})",
    )
    group.add_argument(
        "--nodes", "--nnodes", type=int, default=1, metavar="n", help="nodes of a job (1)"
    )
    group.add_argument(
        "--gpus-per-node",
        "--ngpus",
        "--gpus",
        type=int,
        default=1,
        metavar="n",
        help="GPUs of a node, one process each (1); 0: CPU only",
    )
    group.add_argument(
        "--tasks-per-node",
        type=int,
        metavar="n",
        help="processes of a node (default: one a GPU); for CPU runs, with --gpus-per-node 0",
    )
    group.add_argument(
        "--cpus-per-task",
        type=int,
        metavar="n",
        help="cores of a process (10 with GPUs, else 1): its loading workers run there",
    )
    group.add_argument(
        "--mem-gb", type=float, metavar="x", help="memory of a node (default: the cluster's)"
    )
    group.add_argument(
        "--timeout",
        type=int,
        default=2800,
        metavar="min",
        help="time limit of one life of a job, in minutes (2800); what takes longer is requeued",
    )
    group.add_argument(
        "--signal-delay",
        type=int,
        default=120,
        metavar="s",
        help="seconds before the time limit at which the run is told to save (120)",
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=30,
        metavar="n",
        help=(
            "how often a run may save and be requeued (30), by time limit or preemption; what "
            "the admin or a failed node requeues is not counted"
        ),
    )
    group.add_argument(
        "--join-timeout",
        type=float,
        default=300,
        metavar="s",
        help="seconds within which all ranks must have come together (300)",
    )

    group = parser.add_argument_group("where it runs")
    group.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    for name in ("account", "qos", "comment"):
        group.add_argument(f"--{name}", metavar="NAME")
    group.add_argument("--constraint", metavar="FEATURE", help="features of the nodes")
    group.add_argument(
        "--use-volta32",
        "--use_volta32",
        action="store_const",
        const="volta32gb",
        dest="constraint",
        help="--constraint volta32gb",
    )
    group.add_argument("--exclude", metavar="NODES", help="nodes to avoid")
    group.add_argument(
        "--array-parallelism",
        type=int,
        default=256,
        metavar="n",
        help="how many elements of a job array run at once (256)",
    )
    group.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of sbatch, such as gres=gpu:a100:8; repeatable",
    )
    group.add_argument(
        "--srun",
        action="append",
        default=[],
        metavar="ARG",
        help="any option of srun, such as --srun=--container-image=X; repeatable",
    )

    group = parser.add_argument_group("its environment")
    group.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="CMD",
        help=(
            "shell command that runs as it stands on the first node before the job, such as 'module"
            " load cuda'; repeatable"
        ),
    )
    group.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="K=V",
        help="environment variable, its value taken as it stands and not as shell; repeatable",
    )
    group.add_argument(
        "--container",
        default="",
        metavar="CMD",
        help=(
            "shell command that runs what follows it in a container, such as 'apptainer exec --nv"
            " moco.sif'; scontrol has to work inside, for the requeueing"
        ),
    )
    group.add_argument(
        "--python",
        metavar="CMD",
        help=(
            "shell command that starts Python on the nodes (default: this one, in a container:"
            " python)"
        ),
    )


def check_cluster_options(opts: argparse.Namespace) -> None:
    """Raise BadInput for what cannot work; fills in what depends on others."""
    _check_texts(opts)
    check_numbers(opts)
    if opts.tasks_per_node is None:
        opts.tasks_per_node = max(1, opts.gpus_per_node)
    if opts.cpus_per_task is None:
        opts.cpus_per_task = 10 if opts.gpus_per_node else 1
    _check(
        opts.gpus_per_node in (0, opts.tasks_per_node),
        f"--tasks-per-node {opts.tasks_per_node} with --gpus-per-node {opts.gpus_per_node}:"
        " expected one process a GPU, or --gpus-per-node 0",
    )
    _check(
        opts.signal_delay < 60 * opts.timeout,
        f"--signal-delay {opts.signal_delay} s is not before the time limit of {opts.timeout} min",
    )
    _check(
        opts.cluster == "slurm" or opts.nodes == 1,
        f"--nodes {opts.nodes} needs --cluster slurm: this machine is one node",
    )
    _check(
        opts.cluster != "debug" or opts.tasks_per_node == 1,
        "--cluster debug is one task in this process: for several use --cluster local",
    )


def check_numbers(opts: argparse.Namespace) -> None:
    """Raise BadInput for a number that is out of range."""
    for name, (low, high) in RANGES.items():
        value = getattr(opts, name, None)
        if value is not None and not low <= value <= high:
            given = str(value) if len(str(value)) < 20 else f"{str(value)[:17]}..."
            raise BadInput(f"--{flag_of(name)} {given} is out of range: expected {low} to {high}")


def _check_texts(opts: argparse.Namespace) -> None:
    """Raise BadInput for a text that would mean something else in the sbatch file."""
    for name in ONE_LINE:
        value = getattr(opts, name)
        for text in value if isinstance(value, list) else [value or ""]:
            require_one_line(text, f"--{flag_of(name)}", utf8=opts.cluster == "slurm")
    for text in opts.setup:
        require_one_line(text, "--setup", but="\n\t", utf8=opts.cluster == "slurm")
    for pair in opts.env:
        name, equals, _ = pair.partition("=")
        expected = "NAME=VALUE, with a name of letters, digits and _ that begins with no digit"
        _check(bool(equals and ENV_NAME.fullmatch(name)), f"--env '{pair}': expected {expected}")
    for pair in opts.sbatch:
        expected = (
            "an option of sbatch with or without a value, such as gres=gpu:a100:8 or exclusive"
        )
        _check(
            bool(SBATCH_KEY.fullmatch(pair.partition("=")[0])),
            f"--sbatch '{pair}': expected {expected}",
        )


def require_one_line(text: str, what: str, but: str = "", utf8: bool = False) -> None:
    """Raise BadInput for control characters and line ends, all except those in `but`.

    utf8: also for the bytes of a name that is no UTF-8, which an sbatch file cannot have.
    """
    kinds = ("Cc", "Zl", "Zp", "Cs") if utf8 else ("Cc", "Zl", "Zp")
    bad = [c for c in text if c not in but and unicodedata.category(c) in kinds]
    if bad:
        text = text if len(text) < 100 else f"{text[:100]}..."
        found = files.shown(bad[0])
        expected = "expected UTF-8 text in one line, leave it out"
        raise BadInput(f"{what} '{text}' holds {found}: {expected}")


def folder_of(job_dir: str, cluster: str) -> str:
    """--job-dir as an absolute path. Raises BadInput."""
    try:
        folder = str(Path(job_dir).expanduser().absolute())
    except RuntimeError as error:  # ~name of a user who is not there
        raise BadInput(f"--job-dir '{job_dir}': {error}; write the path out") from error
    # it may lie in a folder whose name has a line end
    require_one_line(folder, "--job-dir", utf8=cluster == "slurm")
    return folder


def flag_of(name: str) -> str:
    return name.replace("_", "-")


def split_flags(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and the script's flags.

    All after `--` is the script's, and so is what stands before it and the launcher does not know.

    The script's are all after `--`, and before it what the launcher does not know.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    opts, flags = parser.parse_known_args(argv[:cut])
    return opts, flags + argv[cut + 1 :]


def take_run_flags(flags: list[str]) -> tuple[list[str], str]:
    """The flags without --resume, and its value ('auto' if it was not there).

    Raises BadInput for --out: the run folder is the launcher's business.
    """
    mine = LauncherParser(add_help=False)
    mine.add_argument("--resume", default="auto")
    mine.add_argument("--out")
    taken, flags = mine.parse_known_args(flags)
    _check(
        taken.out is None,
        f"--out {taken.out}: the launcher gives the script its run folder; say --job-dir"
        f" {taken.out}",
    )
    _check(
        taken.resume in ("auto", "") or files.kind(taken.resume, "--resume") == "file",
        f"no file at --resume '{taken.resume}': expected a checkpoint (nothing was submitted)",
    )
    return flags, taken.resume or "auto"


def script_parser(script: str) -> argparse.ArgumentParser:
    return importlib.import_module(SCRIPTS[script]).get_parser()


def takes(script: str, flag: str) -> bool:
    """Whether a script has a flag."""
    return any(flag in action.option_strings for action in script_parser(script)._actions)


def parse_script(
    script: str, flags: list[str], nodes: int, tasks_per_node: int, check: bool = True
) -> argparse.Namespace:
    """The script's own reading of its flags, as if it were one of its ranks.

    check: also the script's own checks. Raises BadInput, as the script does.
    """
    module = importlib.import_module(SCRIPTS[script])
    as_rank = {
        "RANK": "0",
        "WORLD_SIZE": str(nodes * tasks_per_node),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(tasks_per_node),
    }
    with clean_environment(), _environment(as_rank):
        args = module.get_parser().parse_args(flags)
        if check:
            module.check_args(args)
    return args


def words(text: str, option: str) -> list[str]:
    """A quoted list of flags, split as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{option} {text!r}: {error}") from error


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """This process's environment without what a shell inside another job, or torchrun, has set."""
    is_foreign = lambda name: name in FOREIGN or name.startswith(FOREIGN_PREFIXES)
    foreign = {k: v for k, v in os.environ.items() if is_foreign(k) and k not in FAMILIAR}
    for name in foreign:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(foreign)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise BadInput(message)
