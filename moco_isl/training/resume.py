"""What a run has to remember to go on as if it had never stopped, and what of its flags may change meanwhile."""

import random

import torch

from moco_isl import dist
from moco_isl.errors import BadInput

# everything that changes neither what is computed nor in which order
MAY_CHANGE = {
    "data", "download", "workers", "print_freq", "progress", "tensorboard", "device", "gpu", "world_size", "rank", "dist_url", "dist_backend",
    "dist_timeout", "multiprocessing_distributed", "nproc_per_node", "resume", "init", "out", "config", "keep", "save_every", "max_steps",
    "knn_every", "max_bad_images", "start_epoch", "compile", "research_labels",
}  # fmt: skip


def check_same(saved: dict, now: dict) -> None:
    """Raise BadInput that names both values of each flag that differs between the saved run and this one, and may not."""
    changed = [name for name in saved if name not in MAY_CHANGE and name in now and saved[name] != now[name]]
    if "epochs" in changed and not now.get("cos") and now["epochs"] > saved["epochs"]:
        changed.remove("epochs")  # a stepwise schedule is the same one, longer
    if changed:
        pairs = ", ".join(f"--{name.replace('_', '-')} was {saved[name]!r} and is now {now[name]!r}" for name in changed)
        raise BadInput(f"cannot resume with other settings: {pairs}. Give the same flags, or start a new run with --init and another --out")


def rng_of_ranks(device: torch.device) -> list[dict]:
    """The state of every generator of every rank, in rank order, on all ranks."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return dist.gather_objects(state)


def restore_rng(states: list[dict], device: torch.device) -> bool:
    """Put this rank's generators back; False where there are more or fewer ranks than when it was saved: then they stay as they are."""
    if len(states) != dist.world_size():
        return False
    state = states[dist.rank()]
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    return True
