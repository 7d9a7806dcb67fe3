"""Part A: on this GPU the fast path computes what the plain one does, and the scripts run."""

import contextlib
import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import main_knn
import main_lincls
import main_moco_isl
from benchmarks.pack.record import Context
from moco_isl import data
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.ops import fused
from moco_isl.run import checkpoint
from moco_isl.training import fast

ROOT = Path(__file__).parent.parent.parent
TESTS = ("tests/test_fast.py", "tests/test_gan.py", "tests/test_data_draws.py")  # some need a GPU
REHEARSED = "tests/test_pretend_cuda.py"
CHOSEN = "gpu or captured"
CLOSE = 0.02  # relative difference of a loss that half precision explains
APART = 0.1  # relative difference of momenta: those of fewer steps are further apart
CHANCE = 10.0  # per cent, of the digits
OBJECTIVES = ("MoCo", "ISL", "Instance", "bank")
DIGITS = "--dataset digits -a digits --mlp --moco-dim 64 --moco-k 512 --moco-t 0.1 -b 128".split()
DIGITS += "-j 0 --seed 0 -p 1 --epochs 1 --isl-start 0 --fast --miner gan".split()

KERNELS = "fused kernels, C = {}"
STEPS = "12 fast steps equal plain ones, {}"
AUGMENTATION = "compiled augmentation equals the CPU's"
OPTIMIZER = "fused optimizer equals the plain one"
SUITE = "tests of the suite that need a GPU"
RESUMED = "main_moco_isl.py, 8 steps = 4 + resumed 4"
KNN = "main_knn.py"
PROBE = "main_lincls.py"
PLAN = {
    "kernels": [*(KERNELS.format(C) for C in (64, 128, 256)), OPTIMIZER, AUGMENTATION],
    "steps": [STEPS.format(name) for name in OBJECTIVES],
    "suite": [SUITE],
    "scripts": [RESUMED, KNN, PROBE],
}


# ---------------------------------------------------------------- numerics


def kernels(context: Context) -> None:
    for C in (64, 128, 256):
        with context.row("proof", KERNELS.format(C), 40) as row:
            row |= kernels_work(C, context.device)
    with context.row("proof", OPTIMIZER, 20) as row:
        row |= optimizer_equals(context.device)
    with context.row("proof", AUGMENTATION, 60) as row:
        row |= augmentation_equals(context.device, 64 if context.quick else 512)
        row["ok"] &= context.rehearsal or graphs() > 0


def steps(context: Context) -> None:
    for name in OBJECTIVES:
        with context.row("proof", STEPS.format(name), 60) as row:
            row |= steps_equal(name, context.device, context.rehearsal)


def kernels_work(C: int, device: torch.device) -> dict:
    """Whether the fused kernels are used for rows of C numbers, and agree with float64.

    Where a user would be warned that they are left out, the row has failed.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = fused.kernels_for(torch.zeros(1, C, device=device))
        if found is not None:
            g = torch.Generator().manual_seed(C)
            f, rows = (
                torch.nn.functional.normalize(torch.randn(n, C, generator=g), dim=1).to(device)
                for n in (64, 5000)
            )
            fused.check_kernels(
                found, f, rows, torch.randint(5001, (32, 66), generator=g).to(device)
            )
    return {
        "ok": found is not None,
        "said": "; ".join(str(w.message) for w in said) or "agree with float64",
    }


def optimizer_equals(device: torch.device) -> dict:
    """Compare weights after five equal SGD steps, fused on the device and plain on the CPU."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(300, 40, generator=g)
    gradients = torch.randn(5, 300, 40, generator=g)
    found = []
    for where, is_fused in ((torch.device("cpu"), False), (device, True)):
        weight = torch.nn.Parameter(start.clone().to(where))
        optimizer = fast.sgd([weight], 0.05, 0.9, 1e-2, is_fused)
        for gradient in gradients:
            weight.grad = gradient.to(where)
            optimizer.step()
        found.append(weight.detach().cpu())
    off = float((found[0] - found[1]).abs().max())
    return {"ok": off < 1e-5, "said": f"at most {off:.1e} apart after 5 steps"}


def graphs() -> int:
    """Graphs that were compiled since the compiler was reset."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def steps_equal(name: str, device: torch.device, rehearsal: bool) -> dict:
    """Compare the losses of 12 fast steps with the plain path's.

    Fast: bf16, channels last, compiled, fused optimizer and loss. The row also fails where nothing
    was compiled or the kernels were left out.
    """
    from tests import small_training as small

    plain = small.train(small.front(name, False, device), False, device=device, epochs=3)
    torch._dynamo.reset()
    compiled = graphs()
    isl = small.front(name, True, device)
    isl.model.to(memory_format=torch.channels_last)
    fast.compile_encoders(isl.model, small.N)
    mine = small.train(isl, True, amp="bf16", channels_last=True, device=device, epochs=3)
    there = rehearsal or (
        graphs() > compiled and fused.kernels_for(torch.zeros(1, 16, device=device)) is not None
    )
    off = max(abs(a - b) / abs(b) for a, b in zip(mine, plain))
    moved = max(plain) / min(plain) - 1
    said = f"{len(mine)} losses, at most {100 * off:.2f} % apart; they moved by {100 * moved:.0f} %"
    said += "" if there else "; but nothing was compiled, or the kernels were left out"
    return {"ok": off <= CLOSE and moved > 0.03 and len(mine) == 12 and there, "said": said}


def augmentation_equals(device: torch.device, N: int) -> dict:
    """Compare views of N images by the compiled augmentation on the device with the CPU's.

    The two round differently, and a crop that then lies a pixel elsewhere gives another view: one
    in a hundred may differ.
    """
    images = torch.randint(
        0, 256, (N, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)  # [N, 3, 32, 32], of blocks
    views = []
    for where in (torch.device("cpu"), device):
        augmentation = data.get_augmentation("cifar10", aug_plus=True, size=32, on_device=True)
        if where.type == "cuda":
            fast.compile_augmentation(augmentation, 2 * N, where)
        loader = data.train_loader(
            ImagesInMemory(images.clone(), None, None, "random"),
            augmentation=augmentation,
            batch_size=N,
            seed=0,
            device=where,
        )
        with fast.numerics(True, where):
            views.append(torch.cat([x.cpu() for x in next(iter(loader.epoch(0)))[0]]))
    off = (views[0] - views[1]).abs().amax((1, 2, 3))  # [2 N]
    same = float((off < 0.02).float().mean())
    said = f"{100 * same:.1f} % of {len(off)} views within 0.02 of a standard deviation"
    return {"ok": same >= 0.99, "said": f"{said}, median {float(off.median()):.1e}"}


# ---------------------------------------------------------------- the suite


class Reporter:
    """A pytest plugin that makes a row of every test as it ends."""

    def __init__(self, context: Context):
        self.context = context
        self.passed = 0
        self.failed = 0

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.passed:
            return
        said = f"{report.duration:.1f} s"
        if report.failed:
            said = (str(report.longrepr).strip().splitlines() or [""])[-1]
        elif report.skipped:
            said = str(
                report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            )
        ok = report.passed
        if report.skipped and self.context.rehearsal:
            ok = None  # what needs a GPU; on a GPU no test may be skipped
        self.passed = self.passed + bool(report.passed)
        self.failed = self.failed + (ok is False)
        self.context.record.add(
            "proof", f"test {report.nodeid.split('::', 1)[-1]}", ok=ok, said=said[:300]
        )


def suite(context: Context) -> None:
    import pytest

    seen = Reporter(context)
    files = [*TESTS, *([REHEARSED] if context.rehearsal else [])]
    with context.row("proof", SUITE) as row:
        flags = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            CHOSEN,
            *(str(ROOT / name) for name in files),
        ]
        code = pytest.main(flags, plugins=[seen])
        row |= {
            "ok": int(code) == 0 and seen.passed > 0 and not seen.failed,
            "said": f"{seen.passed} passed, {seen.failed} failed or skipped",
        }


# ---------------------------------------------------------------- the scripts


def scripts(context: Context) -> None:
    folder = context.work / "scripts"
    device = ["--device", context.device.type]
    iters = "40" if context.quick else "400"
    flags = [*DIGITS, *device, "--isl-gan-iters", iters, "--isl-gan-min-iters", iters]

    def run(out: str, steps: int) -> int:
        own = ["--max-steps", str(steps), "--out", str(folder / out), "--resume", "auto"]
        return main_moco_isl.main([*flags, *own], lambda: False)

    with context.row("proof", RESUMED, 80) as row:
        codes = [run("once", 8), run("twice", 4), run("twice", 8)]
        once, twice = (losses(folder / name) for name in ("once", "twice"))
        off = max((abs(a - b) / abs(a) for a, b in zip(once, twice)), default=1.0)
        apart = states_apart(folder / "once", folder / "twice")
        equal = len(once) == len(twice) == 8 and off <= CLOSE and apart <= APART
        row["ok"] = codes == [0, 0, 0] and equal
        row["said"] = (
            f"exit codes {codes}, {len(once)} and {len(twice)} losses, at most {100 * off:.3f} %"
            f" apart; momenta and queues {100 * apart:.2f} %"
        )
    file = str(folder / "once" / "checkpoint_last.pth.tar")
    judge = ["--pretrained", file, "--dataset", "digits", "-j", "0", *device]
    with context.row("proof", KNN, 30) as row:
        row |= judged(lambda: main_knn.main(judge))
    with context.row("proof", PROBE, 30) as row:
        probe = ["--epochs", "10", "--lr", "1", "--seed", "0", "--out", str(folder / "probe")]
        row |= judged(lambda: main_lincls.main([*judge, *probe]))


def states_apart(a: Path, b: Path) -> float:
    """Relative difference of two runs' last momenta, or of their queues if that is larger."""
    files = [checkpoint.load(folder / "checkpoint_last.pth.tar") for folder in (a, b)]
    momenta = [
        torch.cat(
            [x["momentum_buffer"].cpu().flatten() for x in file["optimizer"]["state"].values()]
        )
        for file in files
    ]
    queues = [file["state_dict"]["module.queue"].cpu() for file in files]
    return max(float((x - y).norm() / x.norm()) for x, y in (momenta, queues))


def losses(folder: Path) -> list[float]:
    """The loss of every step of a run."""
    path = folder / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [line["loss"] for line in lines if line["kind"] == "step"]


def judged(main: Callable[[], int]) -> dict:
    """Exit code of a script that judges the digits, and the accuracy it prints of the backbone."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main()
    print(said.getvalue(), flush=True)
    found = re.search(r"^backbone .*?(\d+\.\d\d)", said.getvalue(), re.MULTILINE)
    top1 = float(found[1]) if found else 0.0
    return {
        "ok": code == 0 and top1 > 3 * CHANCE,
        "said": f"exit code {code}, top-1 {top1:.1f} % by the backbone (chance {CHANCE:g} %)",
    }


def device_facts() -> str:
    """GPU, driver and torch in one line."""
    if not torch.cuda.is_available():
        return "no GPU"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        facts = "--query-gpu=name,driver_version,memory.total"
        query = ["nvidia-smi", facts, "--format=csv,noheader"]
        run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        python = sys.version.split()[0]
        return f"{run.stdout.strip()}, torch {torch.__version__}, Python {python}"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
