"""Gloo ranks on this CPU, forked from a server that has imported the package.

Every call has ranks of its own: what one leaves behind, such as half of a collective, cannot reach
the next.
"""

import queue
import tempfile
import traceback

import torch

from tests.runs import SERVER


def _serve(rank: int, world: int, store: str, job, results, read) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    fn, args = job
    try:
        results.put((rank, fn(rank, world, *args), None))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    read.get()  # a tensor is read from the process that sent it
    torch.distributed.destroy_process_group()


def run_ranks(world: int, fn, *args, timeout: float = 120) -> list:
    """fn(rank, world, *args) on `world` gloo ranks; their results in rank order.

    Raises with the traceback of the first that fails.
    """
    store = tempfile.mktemp(prefix="moco_isl_store_")
    job = fn, args
    results = SERVER.Queue()
    read = SERVER.SimpleQueue()
    workers = [
        SERVER.Process(target=_serve, args=(r, world, store, job, results, read), daemon=True)
        for r in range(world)
    ]
    for worker in workers:
        worker.start()
    answers = {}
    try:
        while len(answers) < world:
            rank, value, error = results.get(timeout=timeout)
            if error:
                raise AssertionError(f"rank {rank} of {world}:\n{error}")
            answers[rank] = value
    except (AssertionError, queue.Empty):
        for worker in workers:
            worker.terminate()
        raise
    for _ in workers:
        read.put(None)
    for worker in workers:
        worker.join(timeout=10)
        worker.terminate()
    return [answers[rank] for rank in range(world)]
