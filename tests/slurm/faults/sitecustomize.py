"""Faults at an exact place of a job, for the tests.

On PYTHONPATH and with MOCO_ISL_FAULTS set, Python loads this before anything else. It is a JSON
list of {"rank": r, "life": l, "at": place, "poll": n, "do": what, "name": x}; no rank or life: any.
at: start (of the interpreter), join, step (the n-th time that training asks whether to stop), gan,
    mining (the n-th ask inside), save (the n-th checkpoint is written, not yet renamed), end (main
    has come back).
do: hold (write NAME.at into MOCO_ISL_FAULT_DIR, wait until asked to stop or NAME.go is there; of an
    array's element i NAME_i.at), deaf (wait for NAME.go alone), sleep:s, raise, kill, exit:c.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path


def _matches(fault: dict, place: str) -> bool:
    rank = int(os.environ.get("SLURM_PROCID", os.environ.get("SUBMITIT_LOCAL_GLOBALID", "0")))
    life = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return (
        fault["at"] == place and fault.get("rank", rank) == rank and fault.get("life", life) == life
    )


def fire(place: str, asked=lambda: False) -> None:
    """Do what is due at this place."""
    for fault in FAULTS:
        if _matches(fault, place):
            fault["count"] = fault.get("count", 0) + 1
            if fault["count"] == fault.get("poll", 1):
                _do(fault, asked)


def _do(fault: dict, asked) -> None:
    what, _, value = fault["do"].partition(":")
    mark = Path(os.environ["MOCO_ISL_FAULT_DIR"]) / fault.get("name", what)
    element = f"_{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
    mark.with_name(f"{mark.name}{element}.at").write_text(str(os.getpid()))
    if what in ("hold", "deaf"):
        end = time.monotonic() + 150
        while (
            not mark.with_suffix(".go").exists()
            and not (what == "hold" and asked())
            and time.monotonic() < end
        ):
            time.sleep(0.05)
    elif what == "sleep":
        time.sleep(float(value))
    elif what == "raise":
        raise ValueError("boom, on purpose")
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(int(value))


def _place() -> str:
    """Where the run is while it asks whether to stop: gan, mining, step, or none of these."""
    frame, place = sys._getframe(2), ""
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name == "fit_gan":
            return "gan"
        if name == "train_one_epoch":
            return "step"
        place = "mining" if "/moco_isl/mining/" in file else place
        frame = frame.f_back
    return place


def arm_job(module) -> None:
    ask, leave = module.StopSignals.__call__, module.Task._main

    def asked(self) -> bool:
        fire(_place(), lambda: ask(self))
        return ask(self)

    def main(self, *args):
        code = leave(self, *args)
        fire("end")
        return code

    module.StopSignals.__call__, module.Task._main = asked, main


def arm_rendezvous(module) -> None:
    join = module.join

    def late(*args):
        fire("join")
        return join(*args)

    module.join = late


def arm_checkpoint(module) -> None:
    replace = os.replace

    def renamed(source, target, **options):
        if str(target).endswith("checkpoint_last.pth.tar"):
            fire("save")
        replace(source, target, **options)

    os.replace = renamed


ARM = {
    "launch.job": arm_job,
    "launch.rendezvous": arm_rendezvous,
    "moco_isl.run.checkpoint": arm_checkpoint,
}


class Armourer(importlib.abc.MetaPathFinder):
    """Changes a module of ARM right after it was executed."""

    def find_spec(self, name, path, target=None):
        if name not in ARM:
            return None
        arm = ARM.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            arm(module)

        spec.loader.exec_module = exec_module
        return spec


FAULTS = (
    json.loads(os.environ.get("MOCO_ISL_FAULTS", "[]")) if "SUBMITIT_EXECUTOR" in os.environ else []
)
if FAULTS:
    sys.meta_path.insert(0, Armourer())
    fire("start")
