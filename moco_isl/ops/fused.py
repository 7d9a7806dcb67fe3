"""Where the fused kernels serve, and the search by them. Plain forms: softmax.py, neighbors.py.

Letters: N anchors, Q queries, M rows, C feature dimension, k neighbours.
"""

import functools
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from moco_isl.errors import Interrupted, first_line

Tensor = torch.Tensor

_WIDEST = 256  # C that still fits a tile
_ROUNDING = 1.1e-3  # a float16 score of unit rows is off by less: 2^-11 a factor, and float32 sums
_BYTES = 1 << 30  # memory of the group maxima, or of the rescored rows, held at a time


def kernels_for(rows: Tensor) -> ModuleType | None:
    """The module of kernels, or None where it does not serve these rows.

    It serves rows of at most 256 numbers, on a CUDA device where it was seen to work.
    """
    C = rows.shape[1]
    return _seen_to_work(rows.device, C) if rows.device.type == "cuda" and C <= _WIDEST else None


def try_out(device: torch.device, C: int) -> bool:
    """Whether the kernels serve rows of C numbers on this device.

    Compiles and checks them now instead of in the first step.
    """
    return device.type == "cuda" and C <= _WIDEST and _seen_to_work(device, C) is not None


@functools.cache
def _seen_to_work(device: torch.device, C: int) -> ModuleType | None:
    """The kernels if they compile for this width and are right on a small case; else None.

    They are compared with float64, and a warning says where they fail. Each width is tried, because
    its tiles take other registers and shared memory.
    """
    try:
        from moco_isl.ops import kernels

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unit = lambda n: F.normalize(torch.randn(n, C), dim=1).to(device)
            f = unit(40)
            rows = unit(3000)
            absent = torch.randint(3001, (20, 900)).to(device)
        with torch.autocast(device.type, enabled=False):  # the first use may be within a step
            check_kernels(kernels, f, rows, absent)
    except Interrupted:
        raise
    except Exception as error:  # Triton, its compiler and the driver raise almost anything
        what = "fused kernels are left out, plain ones used instead"
        warnings.warn(f"{what}: {type(error).__name__}: {first_line(error)}", stacklevel=2)
        return None
    return kernels


def check_kernels(
    kernels: ModuleType, f: Tensor, rows: Tensor, absent: Tensor, T: float = 0.1
) -> None:
    """Raise ArithmeticError where the kernels are off by more than float16 explains.

    f [N, C], rows [M, C], absent [n, R].
    """
    truth = f.double() @ rows.double().T  # [N, M]
    logits = F.pad(truth / T, (0, 1))  # the last column for none
    logits = logits.scatter_(1, absent.repeat(len(f) // len(absent), 1), -torch.inf)[:, :-1]
    lse, mean, top = kernels.softmax_pass(f, rows, T, absent)
    maxima = kernels.group_maxima(f.half(), rows.half()).T  # [N, groups]
    groups = torch.arange(maxima.shape[1], device=f.device).repeat(len(f), 1)
    scores = kernels.rescore(f, rows, groups)[:, : len(rows)]
    best = torch.stack([part.amax(1) for part in truth.split(kernels.GROUP, 1)], 1)
    for name, found, wanted, bound in [
        ("lse", lse, logits.logsumexp(1), 0.01),
        ("mean", mean, logits.softmax(1) @ rows.double(), 0.002),
        ("top", top, logits.amax(1), 0.02),
        ("maxima", maxima, best, 2e-3),
        ("scores", scores, truth, 1e-5),
    ]:
        off = (found.double() - wanted).abs().max().item()
        if not off <= bound:
            raise ArithmeticError(f"{name} is off by {off:.2g}, more than {bound:g}")


def spare(k: int) -> int:
    """Groups looked into beyond k, for those whose best score float16 cannot tell from the k-th.

    They are more where k is large. With 6 at k 200, 90 % of the queries were unsure among 100,000
    rows around ten tight centres, and half among 400,000 random ones.
    """
    return max(6, k // 4)


def search(
    kernels: ModuleType,
    queries: Tensor,
    bank: Tensor,
    k: int,
    exclude: Tensor | None = None,
    tick: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """queries [Q, C], bank [M, C] -> cosine [Q, k] float32, falling, row [Q, k] int64, sure [Q].

    A kernel finds the best float16 score of every group of 64 rows and writes no other. The k best
    rows lie in the k groups with the largest of these; their rows are scored again in float32.
    sure: whatever the rounding to float16 did, no row that was left out is one of the k best.
    exclude [Q]: a row that the query may not find, -1 for none.
    """
    size = kernels.GROUP
    bank = bank.contiguous()
    half = bank if bank.dtype == torch.float16 else bank.half()
    groups = -(-len(bank) // size)
    looked = min(groups, k + (exclude is not None) + spare(k))  # an own row may lift its group
    step = max(1, min(_BYTES // (4 * groups), _BYTES // (4 * looked * size)))
    cosine = torch.empty(len(queries), k, device=bank.device)
    row = torch.empty(len(queries), k, dtype=torch.int64, device=bank.device)
    sure = torch.ones(len(queries), dtype=torch.bool, device=bank.device)
    for i in range(0, len(queries), step):
        if tick is not None:
            tick()
        q = queries[i : i + step].contiguous()
        maxima = kernels.group_maxima(q.half(), half).T.contiguous()  # [n, groups]
        best, near = maxima.topk(min(looked + 1, groups), dim=1)
        near = near[:, :looked].contiguous()
        scores = kernels.rescore(q, bank, near)  # [n, looked * size]
        rows = (near[:, :, None] * size + torch.arange(size, device=bank.device)).flatten(1)
        if exclude is not None:
            scores.masked_fill_(rows == exclude[i : i + step, None], -torch.inf)
        value, at = scores.topk(k, dim=1)
        cosine[i : i + step] = value
        row[i : i + step] = rows.gather(1, at)
        if looked < groups:
            sure[i : i + step] = value[:, -1] > best[:, looked] + _ROUNDING
    return cosine, row, sure
