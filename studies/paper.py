"""What the studies of the paper's Figures 3, 4 and 5 share: their runs, and how they are drawn.

The runs of a figure are a sweep, launch/recipes/sweep_figure*.yaml. A run that has ended is not
made again; one that was interrupted goes on.
"""

import argparse
import io
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common
from launch import options, sweep
from moco_isl import files
from moco_isl.errors import BadInput, Interrupted, RunFailed
from studies.ink import style_of
from studies.judge import TrainedRun, runs_of

RECIPES = Path(sweep.__file__).parent / "recipes"
MARK = "of the paper, made by moco_isl"  # tells a picture of ours from other files
TOLD = 1.0  # points: of a single seed smaller differences are none


# ---------------------------------------------------------------- the command and its runs


def get_parser(description: str, sweeps: str) -> argparse.ArgumentParser:
    """The flags of a figure's command. sweeps: how the names of its sweeps begin."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [path.stem.removeprefix(sweeps) for path in sorted(RECIPES.glob(f"{sweeps}*.yaml"))]
    parser.add_argument("of", metavar="OF", help=f"{', '.join(names)}, or a file SWEEP.yaml")
    parser.add_argument("--data", metavar="DIR", help="images, in place of those that it names")
    parser.add_argument("--job-dir", type=Path, metavar="DIR", help="of the runs (runs/<sweep>)")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="(beside the runs)")
    parser.add_argument("--out", metavar="DIR", help="where the JSON goes (studies/results)")
    parser.set_defaults(sweeps=sweeps, names=names)
    return parser


@dataclass
class Runs:
    """The runs of a figure. name: digits, cifar5k, ...; picture: the file to draw."""

    name: str
    all: list[TrainedRun]
    picture: Path

    def train(self, rows: list[str] | None = None) -> dict[str, list[TrainedRun]]:
        """Row -> its runs by seed, all of them ended. rows: those that are needed; None: all.

        Raises RunFailed where a run does not end well.
        """
        wanted = [run for run in self.all if rows is None or run.row in rows]
        left = {run.folder.name: run.flags for run in wanted if not run.ended()}
        if left:
            folder = wanted[0].folder.parent
            sweep.make_folders([folder / name for name in left])
            if sweep.run_here("pretrain", left, folder):
                raise RunFailed(f"not all runs in {folder} have ended: see what they said above")
        found: dict[str, list[TrainedRun]] = {}
        for run in wanted:
            found.setdefault(run.row, []).append(run)
        return found


def read_runs(args: argparse.Namespace, figure: str) -> Runs:
    """The runs that the flags name. Raises BadInput before anything is trained."""
    is_file = args.of.endswith((".yaml", ".yml"))
    if not is_file and args.of not in args.names:
        raise BadInput(f"no runs '{args.of}': expected {', '.join(args.names)} or SWEEP.yaml")
    file = Path(args.of) if is_file else RECIPES / f"{args.sweeps}{args.of}.yaml"
    plan = sweep.read_plan(file)
    if plan["script"] != "pretrain":
        raise BadInput(f"{file} runs {plan['script']}: expected a sweep of pretrainings")
    folder = Path(options.folder_of(str(args.job_dir or f"runs/{file.stem}"), "none"))
    name = file.stem.removeprefix(args.sweeps)
    for settings in plan["points"].values():
        settings |= {"data": args.data} if args.data else {}
    runs = runs_of(plan, folder)
    for run in runs:
        if not run.ended():
            options.parse_script("pretrain", run.flags, 1, 1)
    picture = args.picture or folder / f"{figure}.svg"
    files.require_ours(picture, lambda path: MARK in path.read_text(errors="replace"), "--picture")
    return Runs(name, runs, picture)


def exit_code(figure: str, make: Callable[[], None]) -> int:
    """Run `make`; bad input, failed runs and Ctrl-C become one line. Returns the exit code."""
    files.print_any_name()
    try:
        make()
    except (BadInput, RunFailed) as error:
        print(f"studies.{figure}: {files.shown(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\n=> interrupted: the same command goes on where this one was", file=sys.stderr)
        return Interrupted.exit_code
    return 0


# ---------------------------------------------------------------- differences, in words


def told(pairs: list[float]) -> int:
    """Whether differences paired by seed are more than nothing (1), less (-1), or neither (0).

    Their mean has to be beyond their standard deviation; a single one beyond TOLD points.
    """
    spread = statistics.stdev(pairs) if len(pairs) > 1 else TOLD
    mean = statistics.fmean(pairs)
    return (mean > spread) - (mean < -spread)


def points(pairs: list[float]) -> str:
    """Differences as text: +1.2 ± 0.3."""
    return common.spread(pairs, "+")


HOLDS = {1: "The claim holds here", 0: "The claim holds in part here", -1: "Not so here"}


# ---------------------------------------------------------------- the picture


@contextmanager
def drawn(path: Path, columns: int, title: str, sharey: bool = False):
    """The axes of a row of panels, written to an SVG: dark ink on white, on a dark page too."""
    import matplotlib
    from matplotlib.figure import Figure

    style = style_of("paper", font_size=10, axes_titlesize=10.5)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.4 * columns, 3.2), layout="constrained", facecolor="white")
        figure.suptitle(title, fontsize=11.5, fontweight="bold", x=0.01, ha="left")
        yield figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]
        figure.savefig(page := io.StringIO(), format="svg", metadata={"Date": None, "Title": MARK})
    write(page.getvalue(), path)


def line(axes, curve: dict[float, list[float]], label: str, colour: str) -> None:
    """Means over seeds with their standard deviations, and a dot a seed. curve: x -> values."""
    x = sorted(curve)
    mean = [statistics.fmean(curve[at]) for at in x]
    spread = [statistics.stdev(curve[at]) if len(curve[at]) > 1 else 0.0 for at in x]
    axes.errorbar(x, mean, spread, color=colour, label=label, marker="o", markersize=4, capsize=3)
    if any(spread):
        dots = [(at, value) for at in x for value in curve[at]]
        axes.scatter(*zip(*dots), color=colour, s=6, alpha=0.5)


def write(picture: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(picture, path)
    print(f"  written: {path}", flush=True)
