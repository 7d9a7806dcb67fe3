"""Communication between ranks.

Without a process group this is a world of one: rank 0 of 1, and every call is the identity.
"""

import torch
import torch.distributed as dist

from moco_isl.errors import Interrupted


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def shard(n: int) -> tuple[int, int]:
    """This rank's contiguous share [start, stop) of n items; shares differ by at most one."""
    return n * rank() // world_size(), n * (rank() + 1) // world_size()


def broadcast(x: torch.Tensor, src: int = 0) -> torch.Tensor:
    """Overwrite x on every rank by that of rank `src`; returns x."""
    if active():
        dist.broadcast(x, src)
    return x


def broadcast_object(obj, src: int = 0):
    """The object of rank `src`, on every rank. For small plain values, which travel pickled."""
    box = [obj]
    if active():
        dist.broadcast_object_list(box, src)
    return box[0]


def gather_objects(obj) -> list:
    """The objects of all ranks in rank order, on every rank. For small plain values."""
    if not active():
        return [obj]
    boxes = [None] * world_size()
    dist.all_gather_object(boxes, obj)
    return boxes


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    if active():
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def all_reduce_max(x: torch.Tensor) -> torch.Tensor:
    if active():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def stop_mining_together(stopped: bool, device: torch.device) -> None:
    """Raise Interrupted on every rank where `stopped` is True on one. All ranks call it."""
    if int(all_reduce_max(torch.tensor(int(stopped), device=device))):
        raise Interrupted("mining was interrupted")


@torch.no_grad()
def exchange_rows(x: torch.Tensor) -> torch.Tensor:
    """Send part r of x [n, ...] to rank r; the parts received stand in the order of the ranks.

    A second call takes everything back. n must be equal on all ranks and divide by their number.
    """
    if world_size() == 1:
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous())
    return out


@torch.no_grad()
def all_gather_features(
    index: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """index int64 [n] and features [n, C] of all ranks in rank order, as float16 in one message.

    n must be equal on all ranks: it is not asked for, so nothing waits for the device. A rank's own
    features come back rounded too, so all ranks hold equal rows. A world of one rounds nothing.
    """
    if world_size() == 1:
        return index, rows
    parts = [index[:, None].view(torch.uint8), rows.to(torch.float16).view(torch.uint8)]
    packed = torch.cat(parts, 1)  # [n, 8 + 2 C], bytes
    everything = packed.new_empty(world_size() * len(packed), packed.shape[1])
    dist.all_gather_into_tensor(everything, packed)
    index = everything[:, :8].contiguous().view(torch.int64)[:, 0]
    rows = everything[:, 8:].contiguous().view(torch.float16).float()
    return index, rows


@torch.no_grad()
def all_gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order: [n_r, ...] on rank r -> [sum of n_r, ...] on all.

    Ranks may differ in n_r.
    """
    if world_size() == 1:
        return x
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = len(x)
    counts = all_reduce_sum(counts).tolist()
    padding = x.new_zeros(max(counts) - len(x), *x.shape[1:])
    padded = torch.cat([x, padding])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts)])
