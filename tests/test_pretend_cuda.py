"""What a GPU alone would run, on a CPU that passes for one (tests/pretend_cuda.py): every
objective, miner and judge on its device, steps without a wait.
"""

import argparse
import json
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import main_knn
import main_lincls
import main_moco_isl
from benchmarks import common, growth, step
from moco_isl import data, ops
from moco_isl.builder import MoCo
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.encoders import build_encoder
from moco_isl.isl import ISL
from moco_isl.losses import softmax_over
from moco_isl.mining.gan import GANSettings
from moco_isl.mining.gan_training import Trainer, fit_gan
from moco_isl.mining.positives import PositiveSets
from moco_isl.ops import fused, neighbors, softmax
from moco_isl.training import fast
from tests.near import assert_same_neighbours
from tests.pretend_cuda import CUDA, Generator, Kernels, OnCuda, pretending_with_kernels

DIGITS = [
    "--dataset",
    "digits",
    "-a",
    "digits",
    "--mlp",
    "--moco-dim",
    "16",
    "--moco-k",
    "256",
    "-b",
    "128",
    "-j",
    "0",
    "--seed",
    "0",
    "-p",
    "100",
    "--epochs",
    "1",
]
MINED = ["--isl-start", "0", "--isl-budget", "3"]


@pytest.fixture
def seen():
    with pretending_with_kernels() as seen:
        yield seen


# ---------------------------------------------------------------- the stand-in itself


def test_the_stand_in_refuses_what_a_gpu_refuses(seen):
    here, there = torch.arange(4.0), torch.arange(4.0, device="cuda")
    assert (
        there.device == CUDA
        and (there + 1).sum().device == CUDA
        and there.cpu().device.type == "cpu"
    )
    # a number may come from the CPU
    assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)
    for wrong in (
        lambda: here + there,
        lambda: here[there.long()],
        lambda: torch.cat([there, here]),
        lambda: there.index_copy(0, torch.tensor([0]), there[:1]),
        lambda: torch.rand(2, device="cuda", generator=Generator()),
        lambda: torch.rand(2, generator=Generator("cuda")),
    ):
        with pytest.raises(RuntimeError):
            wrong()
    with pytest.raises(TypeError):
        there.numpy()
    seen.waits.clear()
    assert there[torch.tensor([1])].device == CUDA and not seen.waits
    float(there[0]), there[there > 1], there.tolist(), there.nonzero(), there.cpu()
    assert seen.waits == ["__float__", "__getitem__", "tolist", "nonzero", "cpu"]
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        there.tolist()


# ---------------------------------------------------------------- training


def waits(seen, flags: list[str], steps: int, folder) -> int:
    """For how many calls a run of so many steps waits."""
    seen.waits.clear()
    assert (
        main_moco_isl.main(
            [
                *DIGITS,
                "--device",
                "cuda",
                "--max-steps",
                str(steps),
                "--out",
                f"{folder}/{steps}",
                *flags,
            ],
            stop=lambda: False,
        )
        == 0
    )
    return len(seen.waits)


RUNS = {
    "MoCo": ["--fast"],
    "MoCo, photos": ["--fast", "--no-on-device"],
    "plain": ["--no-fast"],
    "ISL": ["--fast", "--miner", "knn", *MINED],
    "ISL, symmetric": [
        "--fast",
        "--symmetric",
        "--bn-splits",
        "2",
        "--miner",
        "knn",
        "--isl-half-bank",
        "--isl-loss",
        "meanlog",
        *MINED,
    ],
    "bank objective": ["--fast", "--objective", "bank", "--miner", "knn", *MINED],
    "rotations": ["--fast", "--objective", "rotnet"],
    "clusters": ["--fast", "--objective", "deepcluster"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_for_nothing(seen, name, tmp_path):
    assert waits(seen, RUNS[name], 1, tmp_path) == waits(seen, RUNS[name], 3, tmp_path)


@pytest.mark.parametrize("miner", ["gan", "entropy", "diffusion", "cluster", "average", "oracle"])
def test_miners_keep_to_the_device(seen, miner, tmp_path):
    more = {
        "gan": ["--isl-gan-iters", "40", "--isl-gan-min-iters", "40"],
        "oracle": ["--research-labels", "--oracle-precision", "0.5", "--oracle-wrong", "near"],
    }
    waits(seen, ["--fast", "--miner", miner, *MINED, *more.get(miner, [])], 1, tmp_path)
    lines = [
        json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any(line["kind"] == "round" for line in lines)


def test_judging_and_going_on_keep_to_the_device(seen, tmp_path):
    waits(
        seen,
        ["--fast", "--miner", "knn", *MINED, "--knn-every", "1", "--knn-holdout", "100"],
        2,
        tmp_path,
    )
    again = [
        *DIGITS,
        "--device",
        "cuda",
        "--fast",
        "--miner",
        "knn",
        *MINED,
        "--knn-every",
        "1",
        "--knn-holdout",
        "100",
    ]
    assert (
        main_moco_isl.main(
            [*again, "--max-steps", "3", "--out", f"{tmp_path}/2", "--resume", "auto"],
            stop=lambda: False,
        )
        == 0
    )
    file = f"{tmp_path}/2/checkpoint_last.pth.tar"
    assert (
        main_knn.main(["--pretrained", file, "--dataset", "digits", "--device", "cuda", "-j", "0"])
        == 0
    )
    assert (
        main_lincls.main(
            [
                "--pretrained",
                file,
                "--dataset",
                "digits",
                "--device",
                "cuda",
                "-j",
                "0",
                "--epochs",
                "1",
                "--out",
                f"{tmp_path}/probe",
            ]
        )
        == 0
    )


@pytest.mark.parametrize("name", ["cifar10", "digits", "folder"])
def test_augmentation_on_the_device_is_that_on_the_cpu(seen, name):
    images = torch.randint(
        0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    batches, size = [], 72 if name == "folder" else 16  # larger than 64: with a blur
    for device in ("cpu", "cuda"):
        augmentation = data.get_augmentation(name, aug_plus=True, size=size, on_device=True)
        fast.compile_augmentation(augmentation, 16, torch.device(device))
        dataset = ImagesInMemory(images.clone(), None, None, "random")
        views, index = next(
            iter(
                data.train_loader(
                    dataset, augmentation=augmentation, batch_size=8, seed=0, device=device
                ).epoch(0)
            )
        )
        assert all(x.device.type == device for x in (*views, index))
        batches.append([x.cpu() for x in views])
    assert not [wait for wait in seen.waits if wait != "cpu"]
    torch.testing.assert_close(*batches, atol=1e-5, rtol=1e-5)


def test_autocast_leaves_the_fused_softmax_alone(seen):
    f, rows = (
        F.normalize(torch.randn(n, 16, generator=Generator().manual_seed(n)), dim=1)
        for n in (6, 200)
    )
    wanted = softmax_over(f, rows, 0.1, hard=f)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = softmax_over(f.to(CUDA), rows.to(CUDA), 0.1, hard=f.to(CUDA), fused=True)
    for x, y in zip(found, wanted):
        assert isinstance(x, OnCuda) and x.dtype == torch.float32
        torch.testing.assert_close(x.cpu(), y, atol=2e-3, rtol=2e-3)


def test_kernels_are_tried_out_without_autocast(monkeypatch):
    """Their first use may come from within a step, and the reference products would be in half
    precision.
    """
    monkeypatch.setattr(ops, "kernels", Kernels, raising=False)
    monkeypatch.setitem(sys.modules, "moco_isl.ops.kernels", Kernels)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused._seen_to_work.__wrapped__(torch.device("cpu"), 128) is Kernels


def test_a_fast_isl_tries_the_kernels_out_when_it_is_made(seen, monkeypatch):
    tried = []
    monkeypatch.setattr(fused, "_seen_to_work", lambda device, C: tried.append((device, C)))
    encoder = lambda num_classes: build_encoder("digits", num_classes)
    model = MoCo(encoder, 16, 64).to("cuda")
    ISL(model, 100)
    assert not tried
    ISL(model, 100, fast=True)
    assert tried == [(CUDA, 16)]


@pytest.mark.parametrize("is_fast", [True, False])
def test_convolutions_are_chosen_by_trial_on_both_paths(is_fast):
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    with fast.numerics(is_fast, CUDA):
        assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == ("high" if is_fast else before[1])
    assert (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()) == before
    with fast.numerics(is_fast, torch.device("cpu")):
        assert torch.backends.cudnn.benchmark == before[0]


# ---------------------------------------------------------------- mining


def test_the_fused_search_on_the_device_finds_what_the_plain_one_does(seen):
    rows = F.normalize(torch.randn(3000, 16, generator=Generator().manual_seed(0)), dim=1)
    own = torch.arange(40)
    wanted = neighbors.topk(rows[:40], rows, 5, own)
    found = neighbors.topk(rows[:40].to(CUDA), rows.to(CUDA), 5, own.to(CUDA))
    assert_same_neighbours((found[0].cpu(), found[1].cpu()), wanted)


@pytest.mark.parametrize(("centres", "spread", "share"), [(1000, 0.8, 0.0), (10, 0.3, 0.2)])
def test_few_queries_are_searched_again_though_k_is_large(seen, centres, spread, share):
    """100,000 rows, k 200.

    Around ten tight centres many rows are as near as the k-th: 6 spare groups left 90 % unsure.
    """
    g = Generator().manual_seed(0)
    middle = torch.randn(centres, 16, generator=g)[torch.randint(centres, (100_000,), generator=g)]
    rows = F.normalize(middle + spread * torch.randn(100_000, 16, generator=g), dim=1)
    own, queries = torch.arange(60), rows[:60]
    wanted = neighbors.topk(queries, rows, 201, own)
    own, queries, rows = own.to(CUDA), queries.to(CUDA), rows.to(CUDA)
    assert neighbors.searched_again(queries, rows, 200, own) <= share
    assert neighbors.searched_again(queries, rows, 10, own) <= 0.1
    found = neighbors.topk(queries, rows, 200, own)
    assert_same_neighbours((found[0].cpu(), found[1].cpu()), wanted)
    assert neighbors.searched_again(queries, rows, 500) is None, (
        "too few groups of rows for that: searched plainly"
    )
    if share:
        with mock.patch.object(fused, "spare", lambda k: 6):
            assert neighbors.searched_again(queries, rows, 200, own) > 0.7


def test_the_fused_entropy_is_near_the_plain_one(seen):
    rows = F.normalize(torch.randn(3000, 16, generator=Generator().manual_seed(0)), dim=1)
    # a dense place: entropies differ
    rows[:1000] = F.normalize(rows[:1] + 0.1 * rows[:1000], dim=1)
    wanted = softmax.entropy(rows, rows, 0.1)
    found = softmax.entropy(rows.to(CUDA), rows.to(CUDA), 0.1, fused=True).cpu()
    assert 0 < float((found - wanted).abs().max()) < 0.01
    quarter = 750  # the anchors of a first round
    chosen = [set(x.sort(stable=True).indices[:quarter].tolist()) for x in (found, wanted)]
    assert len(chosen[0] & chosen[1]) >= 0.99 * quarter


def test_a_captured_gan_waits_for_nothing_and_learns_what_the_plain_one_does(seen):
    features = F.normalize(torch.randn(300, 16, generator=Generator().manual_seed(0)), dim=1)
    src = torch.arange(200)
    settings = GANSettings(iters=30, min_iters=30, batch=32)
    nets = []
    for device in ("cpu", "cuda"):
        sets = PositiveSets.from_edges(300, src.to(device), (src.to(device) * 7 + 1) % 300)
        fit = fit_gan(features.to(device), sets, settings, seed=0)
        nets.append([x.cpu() for x in (*fit.G.state_dict().values(), *fit.D.state_dict().values())])
    torch.testing.assert_close(*nets, atol=1e-4, rtol=1e-3)


class Operations(TorchDispatchMode):
    """Counts the operations that a GPU would launch a kernel for, roughly: all but views and empty
    tensors.
    """

    FREE = {
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "squeeze",
        "split",
        "unbind",
        "detach",
        "alias",
        "permute",
        "as_strided",
        "empty",
        "empty_like",
        "new_empty",
        "_record_function_enter_new",
        "_record_function_exit",
    }

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in self.FREE
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5),
    reason="the stand-in for a GPU cannot be counted through before torch 2.5",
)
def test_ten_iterations_at_once_take_fewer_launches_than_ten(seen):
    """One took 204, not compiled, before their draws were made at once."""
    features = F.normalize(torch.randn(2600, 128, generator=Generator().manual_seed(0)), dim=1).to(
        CUDA
    )
    src = torch.arange(1000, device=CUDA)
    trainer = Trainer(
        features, PositiveSets.from_edges(2600, src, src + 1000), GANSettings(), None, seed=0
    )
    launches = {}
    for iterations in (10, 1):
        trainer.step(iterations)
        with Operations() as found:
            trainer.step(iterations)
        launches[iterations] = found.count / iterations
    assert launches[10] <= 118 < 165 < launches[1] < 180


def test_a_fit_on_the_device_captures_ten_iterations_and_one(seen):
    """Ten where neither a look nor a new pass comes before their end.

    TF32 is on while an iteration is run or captured, only then.
    """
    precisions, ticks, trainers = [], [], []

    class Watched(Trainer):
        def update(self, *triplet):
            precisions.append(torch.get_float32_matmul_precision())
            super().update(*triplet)

    def kind(*args):
        trainers.append(Watched(*args))
        return trainers[0]

    features = F.normalize(torch.randn(220, 16, generator=Generator().manual_seed(0)), dim=1)
    settings = GANSettings(iters=440, min_iters=440, batch=20, compile=True)
    fit = fit_gan(
        features.to(CUDA),
        PositiveSets.empty(220, CUDA),
        settings,
        seed=0,
        tick=lambda: ticks.append(1),
        kind=kind,
    )
    assert fit.report["history"]["iteration"] == list(range(11, 441, 11))
    assert set(trainers[0].graphs) == {1, 10}
    assert len(ticks) == 40 * 2, "a pass and a look have 11 iterations: a graph of 10, one of 1"
    # Three warm-ups and the capture of each; a real graph keeps the products of its capture.
    assert precisions.count("high") == 4 * (10 + 1)
    assert torch.get_float32_matmul_precision() == "highest"


def test_gradients_of_the_gan_lie_as_its_weights():
    """By torch.autograd.grad, which promises nothing of it; the fused optimizer walks through the
    memory of both.
    """
    trainer = Trainer(
        F.normalize(torch.randn(100, 16), dim=1),
        PositiveSets.empty(100),
        GANSettings(batch=16),
        None,
        0,
    )
    trainer.step()
    assert all(
        p.grad.stride() == p.stride() for net in (trainer.G, trainer.D) for p in net.parameters()
    )


# ---------------------------------------------------------------- benchmarks


def test_steps_compiled_otherwise_are_forms_of_their_own(seen, tmp_path):
    asked = []
    flags = ["--rows", "w32", "--quick", "--repeats", "1", "--no-floor", "--forms", *step.OPTIONS]
    with mock.patch.object(
        torch, "compile", lambda fn, dynamic, options: asked.append(options) or fn
    ):
        step.main([*flags, "--device", "cuda", "--out", str(tmp_path)])
    rows = [
        row["what"] for row in json.loads((tmp_path / "step-w32-h200.json").read_text())["rows"]
    ]
    assert {step.FAST, *(f"{step.FAST}, {name}" for name in step.OPTIONS)} <= set(rows)
    for options in step.OPTIONS.values():
        assert asked.count(options) == 2 + 5  # both encoders, and five parts of the augmentation
    with pytest.raises(SystemExit):
        step.main(["--rows", "w32", "--quick", "--forms", "combo_kernels", "--device", "cpu"])


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_bars_of_an_h200_stand_beside_its_figures_alone(seen, gpu, monkeypatch):
    monkeypatch.setattr(growth, "fit_gan", lambda *_: None)
    args = argparse.Namespace(device=torch.device("cuda"), gan_images=100, iters=20_000, repeats=1)
    with mock.patch.object(torch.cuda, "get_device_name", lambda *_: gpu):
        assert common.is_h200(torch.device("cuda")) == (gpu == "NVIDIA H200")
        assert not common.is_h200(torch.device("cpu"))
        result = common.Result("growth-gan", "GAN", torch.device("cuda"))
        growth.measure_gan(args, result)
    assert ("bar" in result.rows[0]) == (gpu == "NVIDIA H200")


def test_steps_of_the_bank_keep_to_the_device(seen, tmp_path):
    step.main(
        [
            "--rows",
            "bank",
            "--quick",
            "--repeats",
            "1",
            "--no-floor",
            "--device",
            "cuda",
            "--out",
            str(tmp_path),
        ]
    )
    rows = json.loads((tmp_path / "step-bank-h200.json").read_text())["rows"]
    assert {step.FAST, step.WITH_ISL} <= {found["what"] for found in rows}
