"""Where a run's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

    for logger in open_loggers("wandb,mlflow", folder, flags, total=None):
        logger.log({"epoch/loss": 5.2}, total=100)
        logger.close("FINISHED")

Each library is an extra and keeps its own settings, such as WANDB_MODE=offline or
MLFLOW_TRACKING_URI. A resumed run continues the same run there: its name lies in the run's folder.
"""

import contextlib
import os
import secrets
import time
from pathlib import Path

from moco_isl import files
from moco_isl.errors import BadInput, first_line, missing_package

PROJECT = "moco_isl"  # where neither WANDB_PROJECT nor MLFLOW_EXPERIMENT_NAME says another
NAMES = "logged_to_{}.txt"  # in the run's folder: what the library calls the run
FINISHED, KILLED, FAILED = "FINISHED", "KILLED", "FAILED"  # how a run ended, in MLflow's words


class TensorBoard:
    """Events in the run's folder. What a kill left behind `total` steps is hidden."""

    extra = "tensorboard"

    @staticmethod
    def library():
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter

    def __init__(self, folder: Path, flags: dict, total: int | None):
        self.writer = self.library()(folder, purge_step=total or 0)

    def log(self, values: dict[str, float], total: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, total)

    def close(self, how: str) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, with the flags as its config and steps on the x axis."""

    extra = "wandb"

    @staticmethod
    def library():
        import wandb

        return wandb

    def __init__(self, folder: Path, flags: dict, total: int | None):
        wandb = self.library()
        known = _read_name(folder, "wandb") if total is not None else None
        name = known or secrets.token_hex(4)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                dir=folder,
                id=name,
                name=folder.name,
                resume="allow",
                config=flags,
            )
        except wandb.errors.Error as error:
            raise BadInput(
                f"--log wandb: {first_line(error).rstrip('.')}; expected a login (wandb login, or"
                " WANDB_API_KEY) or WANDB_MODE=offline"
            ) from error
        self.run.define_metric("total")
        self.run.define_metric("*", step_metric="total")
        _write_name(folder, "wandb", name)

    def log(self, values: dict[str, float], total: int) -> None:
        self.run.log({**values, "total": total})

    def close(self, how: str) -> None:
        self.run.finish(exit_code=0 if how == FINISHED else 1)


class MLflow:
    """A run of MLflow, with the flags as its parameters and steps on the x axis."""

    extra = "mlflow"

    @staticmethod
    def library():
        import mlflow

        return mlflow

    def __init__(self, folder: Path, flags: dict, total: int | None):
        mlflow = self.library()
        known = _read_name(folder, "mlflow") if total is not None else None
        try:
            self.client = mlflow.MlflowClient()
            if known:
                self.client.update_run(known, status="RUNNING")
            self.name = known or self._create(folder, flags)
        except Exception as error:  # of its store: a database, a server, a folder
            raise BadInput(
                f"--log mlflow cannot use its store: {first_line(error)}; expected"
                " MLFLOW_TRACKING_URI to name one that can be written (a server, or"
                " sqlite:///mlflow.db)"
            ) from error
        _write_name(folder, "mlflow", self.name)

    def _create(self, folder: Path, flags: dict) -> str:
        """The id of a new run in the experiment, which is made where it is missing."""
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(wanted)
        experiment = found.experiment_id if found else self.client.create_experiment(wanted)
        run = self.client.create_run(experiment, run_name=folder.name).info.run_id
        for name, value in flags.items():
            self.client.log_param(run, name, str(value)[:6000])  # the length that MLflow keeps
        return run

    def log(self, values: dict[str, float], total: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow takes letters, digits and _-./ alone in a name
        metrics = [Metric(name.replace("@", "_"), x, now, total) for name, x in values.items()]
        self.client.log_batch(self.name, metrics=metrics)

    def close(self, how: str) -> None:
        self.client.set_terminated(self.name, how)


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def listed(text: str) -> str:
    """A text such as "wandb,mlflow", each name once. Raises BadInput for an unknown logger."""
    asked = [name for name in text.split(",") if name]
    for name in asked:
        if name not in LOGGERS:
            raise BadInput(
                f"no logger named {files.short(name)!r}: expected some of {', '.join(LOGGERS)},"
                " with commas between them"
            )
    return ",".join(dict.fromkeys(asked))


def require_installed(asked: str) -> None:
    """Raise BadInput where the library of a logger is not installed; asked: see `listed`."""
    for name in filter(None, asked.split(",")):
        try:
            LOGGERS[name].library()
        except ImportError as error:
            extra = f"'moco_isl[{LOGGERS[name].extra}]'"
            raise missing_package(f"--log {name}", name, extra) from error


class Guarded:
    """A logger whose failure ends its own log and not the run: a line says so once."""

    def __init__(self, name: str, logger, say):
        self.name = name
        self.logger = logger
        self.say = say

    def log(self, values: dict[str, float], total: int) -> None:
        if self.logger is None:
            return
        try:
            self.logger.log(values, total)
        except Exception as error:  # a server that is gone, a full disk: libraries raise anything
            self.logger = None
            self.say(
                f"=> warning: --log {self.name} failed ({first_line(error)}): this run goes on"
                " without it; metrics.jsonl has all figures"
            )

    def close(self, how: str) -> None:
        if self.logger is not None:
            with contextlib.suppress(Exception):  # what was logged is all that can be kept
                self.logger.close(how)


def open_loggers(
    asked: str, folder: Path, flags: dict, total: int | None, say=print
) -> list[Guarded]:
    """The loggers of a text (see `listed`) for the run in a folder.

    flags: of the run, plain values. total: steps done of the run in the folder, which is continued
    under the name that lies there; None: a new run. say: prints a line. Raises BadInput where one
    cannot start.
    """
    found = []
    try:
        for name in filter(None, asked.split(",")):
            found.append(Guarded(name, LOGGERS[name](folder, flags, total), say))
    except BaseException:
        for logger in found:
            logger.close(FAILED)
        raise
    return found


def _read_name(folder: Path, logger: str) -> str | None:
    path = folder / NAMES.format(logger)
    return path.read_text().strip() or None if path.is_file() else None


def _write_name(folder: Path, logger: str, name: str) -> None:
    (folder / NAMES.format(logger)).write_text(name + "\n")
