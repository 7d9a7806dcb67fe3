"""The bank objective's loss at the size of ImageNet, forward and backward.

Measured are seconds and peak memory of the streamed form and of whole matrices.

    python -m benchmarks.bank_loss      batch 256, 32 positives, hard positives, M = 10,000 to
                                        1,281,167
    python -m benchmarks.bank_loss --device cpu --images 10000 100000 --threads 2

  streamed     `losses.bank_loss`: the bank in pieces, its gradient found by the forward pass
  fused        the same by our kernel (CUDA)
  half whole   logits of the batch and of the hard positives in float16, two [N, M] matrices; sums
               in float32; backward overwrites them
  plain        log_softmax of whole float32 matrices, by autograd (left out where it would need more
               than --plain-gib)

On a CPU half precision is slow, and its forms need --half; CPU time stands beside the seconds,
which others on the machine lengthen. The error is that of the gradient against float64 on the first
16 images, relative to the longest of their gradients. Memory is what a step adds at most to bank
and batch.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import common
from benchmarks.knn import peak_bytes, unit_rows
from moco_isl.errors import first_line
from moco_isl.losses import bank_loss
from moco_isl.ops.fused import kernels_for

T = 0.07
COLUMNS = [
    ("form", "form"),
    ("images", "M"),
    ("ms", "ms, median"),
    ("cpu_ms", "CPU ms, median"),
    ("n", "n"),
    ("peak_mib", "MiB"),
    ("error", "error of gradient"),
]


class WholeSoftmax(torch.autograd.Function):
    """lse [N] and mean row [N, C] under softmax, by one [N, M] float16 matrix.

    It holds the logits and then, in place, the softmax.
    """

    ROWS = 16  # of it in float32 at a time

    @staticmethod
    def forward(ctx, f: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (f / T).half() @ bank.t()  # [N, M]
        lse = torch.cat([part.float().logsumexp(1) for part in logits.split(WholeSoftmax.ROWS)])
        scale = 1 << 15  # p of a million rows is below what float16 resolves
        for part, of in zip(logits.split(WholeSoftmax.ROWS), lse.split(WholeSoftmax.ROWS)):
            part.copy_((part.float() - of[:, None] + math.log(scale)).exp_())
        mean = (logits @ bank).float() / scale
        ctx.save_for_backward(mean)
        ctx.mark_non_differentiable(mean)
        return lse, mean

    @staticmethod
    def backward(ctx, grad_lse: torch.Tensor, _):
        return grad_lse[:, None] * ctx.saved_tensors[0] / T, None


def half_whole(f, bank, positives, weight, hard):
    lse, _ = WholeSoftmax.apply(f, bank)
    lse_h, mean_h = WholeSoftmax.apply(hard, bank)
    l_pos = torch.einsum("nc,nsc->ns", f, bank[positives].float()) / T
    isl = (lse - torch.logsumexp(l_pos + weight.log(), dim=1)).mean()
    return isl + 0.5 * (((hard - f) * mean_h).sum(1) / T - lse_h + lse).mean()


def plain(f, bank, positives, weight, hard):
    bank = bank.to(f.dtype)
    log_p, log_h = ((x @ bank.t() / T).log_softmax(1) for x in (f, hard.to(f.dtype)))
    isl = -torch.logsumexp(log_p.gather(1, positives) + weight.log(), dim=1).mean()
    return isl + 0.5 * (log_h.exp() * (log_h - log_p)).sum(1).mean()


def streamed(fused: bool):
    def loss(f, bank, positives, weight, hard):
        isl, hp = bank_loss(f, bank, positives, weight, T, hard, fused=fused)
        return isl + 0.5 * hp

    return loss


def gradient(loss, f, *rest) -> torch.Tensor:
    f = f.detach().requires_grad_()
    return torch.autograd.grad(loss(f, *rest), f)[0]


def measure(loss, bank: torch.Tensor, batch: tuple, repeat: int, device: torch.device) -> dict:
    """Seconds of forward and backward (all repeats), MiB they add, error on 16 images."""
    before = peak_bytes(device, reset=True)
    f, *rest = batch
    gradient(loss, f, bank, *rest)
    seconds = []
    cpu = []
    for _ in range(repeat):
        start = time.perf_counter()
        started = time.process_time()
        gradient(loss, f, bank, *rest).sum().item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - started)
    peak = peak_bytes(device)
    few = [x[:16] for x in batch]
    truth = gradient(plain, few[0].double(), bank.double(), *few[1:])
    error = (gradient(loss, few[0], bank, *few[1:]) - truth).norm(dim=1).max() / truth.norm(
        dim=1
    ).max()
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu),
        "all_seconds": seconds,
        "all_cpu_seconds": cpu,
        "peak_mib": (peak - before) / 2**20,
        "error": error.item(),
    }


def rows_of(
    M: int, args: argparse.Namespace, device: torch.device, failed: list[str]
) -> Iterator[dict]:
    """A row a form, as soon as it is measured; why another one failed goes to `failed`."""
    bank = unit_rows(M, args.dim, device, torch.float32, 0)
    g = torch.Generator(device).manual_seed(1)
    index = torch.randint(M, (args.batch,), device=device, generator=g)
    near = lambda noise: F.normalize(
        bank[index] + noise * unit_rows(args.batch, args.dim, device, torch.float32, 2), dim=1
    )
    positives = torch.cat(
        [
            index[:, None],
            torch.randint(M, (args.batch, args.positives), device=device, generator=g),
        ],
        1,
    )
    weight = torch.ones_like(positives, dtype=torch.float32)
    batch = near(0.5), positives, weight, near(1.0)
    half = bank.half()
    forms = [("streamed", bank, streamed(False))]
    if device.type == "cuda" or args.half:
        forms += [
            ("streamed, float16 bank", half, streamed(False)),
            ("half whole", half, half_whole),
        ]
    if device.type == "cuda" and kernels_for(half) is not None:
        forms.append(("fused, float16 bank", half, streamed(True)))
    if 6 * 4 * args.batch * M < args.plain_gib * 2**30:
        forms.append(("plain", bank, plain))
    for name, rows, loss in forms:
        try:
            yield {"form": name, "images": M, **measure(loss, rows, batch, args.repeats, device)}
        except Exception as error:  # of memory or a compiler: the other forms are measured
            failed.append(
                f"{name}, M = {M:,}, is left out, {type(error).__name__}: {first_line(error)}"
            )


def growth(rows: list[dict], name: str) -> float | None:
    """Exponent b of seconds ~ M^b over the sizes measured."""
    points = [(row["images"], row["seconds"]) for row in rows if row["form"] == name]
    return common.exponent(*zip(*points)) if len(points) > 1 else None


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--images", type=int, nargs="+", default=[10_000, 100_000, 1_281_167], metavar="M"
    )
    parser.add_argument("--batch", type=int, default=256, metavar="N")
    parser.add_argument("--dim", type=int, default=128, metavar="C")
    parser.add_argument("--positives", type=int, default=32, metavar="P")
    parser.add_argument(
        "--plain-gib", type=float, default=8.0, help="memory that the plain form may take (8)"
    )
    parser.add_argument("--half", action="store_true", help="forms in half precision on a CPU too")
    args = parser.parse_args(argv)
    common.begin(args)
    if args.quick:
        args.images = [300, 600]
        args.batch = 16
    title = (
        f"Exact bank loss, its forms, forward and backward: batch {args.batch}, C {args.dim},"
        f" {args.positives} positives and hard positives"
    )
    result = common.Result("bank-loss", title, args.device, COLUMNS)
    failed = []
    for M in args.images:
        for row in rows_of(M, args, args.device, failed):
            result.add(
                {
                    **row,
                    "ms": row["seconds"] * 1e3,
                    "cpu_ms": row["cpu_seconds"] * 1e3,
                    "n": args.repeats,
                    "error": f"{row['error']:.1e}",
                }
            )
    for name in dict.fromkeys(row["form"] for row in result.rows):
        if (b := growth(result.rows, name)) is not None:
            result.note(f"{name}: seconds ~ M^b, b = {b:.2f}")
    for text in failed:
        result.note(text)
    common.end(args, result)
    if failed:
        raise RuntimeError(failed[0])


if __name__ == "__main__":
    main()
