"""Gloo ranks on this CPU: forked once a session from a server that has imported the package, and
used by every test that asks for them.
"""

import atexit
import queue
import tempfile
import traceback

import torch

from tests.runs import SERVER

_pools: dict[int, tuple] = {}


def _serve(rank: int, world: int, store: str, jobs, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    while (job := jobs.get()) is not None:
        fn, args = job
        try:
            results.put((rank, fn(rank, world, *args), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()


def _pool(world: int) -> tuple:
    if world not in _pools:
        store = tempfile.mktemp(prefix="moco_isl_store_")
        jobs, results = [SERVER.SimpleQueue() for _ in range(world)], SERVER.Queue()
        workers = [
            SERVER.Process(target=_serve, args=(r, world, store, jobs[r], results), daemon=True)
            for r in range(world)
        ]
        for worker in workers:
            worker.start()
        _pools[world] = jobs, results, workers
    return _pools[world]


@atexit.register
def _stop() -> None:
    for jobs, _, workers in _pools.values():
        for job in jobs:
            job.put(None)
        for worker in workers:
            worker.join(timeout=10)
    _pools.clear()


def run_ranks(world: int, fn, *args, timeout: float = 120) -> list:
    """fn(rank, world, *args) on `world` gloo ranks; their results in rank order.

    Raises with the traceback of the first that fails.
    """
    jobs, results, _ = _pool(world)
    for job in jobs:
        job.put((fn, args))
    answers = {}
    try:
        while len(answers) < world:
            rank, value, error = results.get(timeout=timeout)
            if error:
                raise AssertionError(f"rank {rank} of {world}:\n{error}")
            answers[rank] = value
    except (AssertionError, queue.Empty):
        # the others may hang in a collective: do not reuse this pool
        for worker in _pools.pop(world)[2]:
            worker.terminate()
        raise
    return [answers[rank] for rank in range(world)]
