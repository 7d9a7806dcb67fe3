"""The fast path: equal to the plain one, piece by piece, and the same for any number of workers and
ranks.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.published import PublishedMoCo, published_step
from moco_isl import builder
from moco_isl.data import augment, build_dataset, get_augmentation, hold_small, train_loader
from moco_isl.data.augment import BatchAugmentation
from moco_isl.data.datasets import ImagesInMemory, decode, decode_pixels
from moco_isl.data.draws import uniform, uniforms
from moco_isl.encoders import build_encoder
from moco_isl.isl import ISL
from moco_isl.losses import (
    linear_kl,
    multi_positive_mean_log,
    multi_positive_nce,
    softmax_over,
)
from moco_isl.objectives import bank, base
from moco_isl.objectives.deepcluster import DeepCluster
from moco_isl.objectives.rotnet import Rotation
from moco_isl.ops import fused, neighbors
from moco_isl.training import engine, fast
from tests import test_builder
from tests.near import assert_same_neighbours
from tests.ranks import run_ranks
from tests.references import hard_positive_kl
from tests.small_training import OBJECTIVES, SIDE, Images, N, front, train, unit

# --------------------------------------------------- photos: workers crop, the device does the rest


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine JPEGs of several sizes, and beside them a grey one, a PNG and a broken one."""
    root = tmp_path_factory.mktemp("photos") / "train"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate(
        [
            (60, 40),
            (40, 60),
            (50, 50),
            (200, 150),
            (150, 200),
            (30, 90),
            (64, 48),
            (33, 35),
            (128, 128),
        ]
    ):
        x = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
            size, Image.BICUBIC
        )
        x.save(root / f"{i}.jpg", quality=95)
    x.convert("L").save(root / "grey.jpg")
    x.save(root / "picture.png")
    (root / "zbroken.jpg").write_bytes((root / "0.jpg").read_bytes()[:300])
    return root.parent


def photo_loader(root, workers=0, size=16, **options):
    augmentation = get_augmentation("folder", aug_plus=True, size=size, on_device=True)
    return train_loader(
        build_dataset("folder", root),
        augmentation=augmentation,
        batch_size=4,
        seed=3,
        workers=workers,
        max_bad_images=1,
        **options,
    )


def batches(loader, epoch, start=0):
    return [(*views, index) for views, index in loader.epoch(epoch, start)]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other)
    )


def test_draws_on_the_host_are_those_on_the_device():
    u = uniforms(5, 3, torch.arange(50), 1, 35)
    for i in range(50):
        draw = uniform(5, 3, i, 1)
        assert [draw(j) for j in range(35)] == u[i].tolist()


@pytest.mark.parametrize(("H", "W"), [(224, 224), (375, 500), (33, 300), (300, 20)])
def test_a_box_on_the_host_is_that_on_the_device(H, W):
    u = uniforms(1, 0, torch.arange(500), 0, 22)
    boxes = augment.crop_boxes(u, H, W, (0.2, 1.0))
    mine = torch.tensor(
        [augment.crop_box(uniform(1, 0, i, 0), H, W, (0.2, 1.0)) for i in range(500)]
    )
    assert (boxes != mine).any(1).sum() <= 1  # float32 and float64 may round one apart


def test_decoding_to_pixels_is_pils(photos):
    for path in sorted((photos / "train").iterdir()):
        if path.stem == "zbroken":
            with pytest.raises((OSError, RuntimeError)):
                decode_pixels(str(path), lambda W, H: min(W, H))
            continue
        pixels, full = decode_pixels(str(path), lambda W, H: min(W, H))
        want = np.asarray(decode(str(path)))
        assert full == want.shape[:2] and np.array_equal(pixels.permute(1, 2, 0).numpy(), want)
    small, full = decode_pixels(str(photos / "train" / "3.jpg"), lambda W, H: 70)
    assert full == (150, 200) and small.shape[1:] == (75, 100)


def test_crops_of_photos_are_those_of_images_in_memory(photos):
    """Within rounding to 8 bits, once a direction; near where a photo is decoded smaller."""
    loader = photo_loader(photos, size=12)
    dataset, augmentation = loader.reader.dataset, loader.augmentation
    reduced = 0
    for i in range(len(dataset) - 1):  # the last one is broken
        image = torch.from_numpy(np.array(dataset.image(i))).permute(2, 0, 1)
        u = (
            uniforms(3, 1, torch.tensor([i]), 0, augmentation.draws),
            uniforms(3, 1, torch.tensor([i]), 1, augmentation.draws),
        )
        want = [augmentation.crop(image[None], draws)[0] * 255 for draws in u]
        smallest = min(
            side
            for draws in u
            for side in augment.crop_boxes(draws[:, :22], *image.shape[1:], (0.2, 1.0))[
                0, 2:
            ].tolist()
        )
        scaled = dataset.path(i).endswith(".jpg") and smallest >= 36
        reduced += scaled
        for mine, theirs in zip(loader._loader.dataset[1, i][:2], want):
            off = (mine - theirs).abs()
            # of 255; 12 pixels of noise
            assert off.max() <= 1.01 if not scaled else off.mean() < 12, dataset.path(i)
    assert 2 <= reduced <= 5


def test_finished_crops_are_the_views(photos):
    loader = photo_loader(photos)
    for (im_q, im_k), index in loader.epoch(1):
        crops = [loader._loader.dataset[1, i] for i in index.tolist()]
        for view, mine in enumerate((im_q, im_k)):
            u = uniforms(3, 1, index, view, loader.augmentation.draws)
            assert torch.equal(
                mine, loader.augmentation.finish(torch.stack([crop[view] for crop in crops]), u)
            )


def test_photos_are_the_same_for_any_workers_and_starts(photos):
    plain, several = photo_loader(photos), photo_loader(photos, workers=2)
    try:
        whole = batches(plain, 1)
        assert [len(b[2]) for b in whole] == [4, 4, 4] and whole[0][0].shape == (4, 3, 16, 16)
        assert same(batches(several, 1), whole)
        assert same(batches(several, 1, start=2), whole[2:]) and not same(batches(plain, 0), whole)
        assert [path.endswith("zbroken.jpg") for _, path in several.bad_images()] == [True]
    finally:
        several.close()
    assert len(batches(photo_loader(photos, views=1), 0)[0]) == 2


def test_small_images_of_one_size_are_held_others_stay(photos, tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
    held = hold_small(build_dataset("folder", tmp_path))
    assert isinstance(held, ImagesInMemory) and held.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    dataset = build_dataset("folder", photos)
    assert hold_small(dataset) is dataset


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("aug_plus", [True, False])
def test_augmentation_at_once_equals_it_by_rows(aug_plus, monkeypatch):
    """What a GPU runs, all images through all operations, against what a CPU runs, each image
    through its own.
    """
    augmentation = BatchAugmentation(
        (0.4, 0.5, 0.6), (0.2, 0.3, 0.1), size=14, aug_plus=aug_plus, blur=True
    )
    crops = torch.randint(
        0, 256, (40, 3, 14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    u = uniforms(0, 0, torch.arange(40), 0, augmentation.draws)
    with monkeypatch.context() as context:
        context.setattr(augment, "_looks_are_free", lambda images: False)
        at_once = augmentation.finish(crops, u)
    torch.testing.assert_close(augmentation.finish(crops, u), at_once, atol=2e-5, rtol=0)
    alone = torch.cat([augmentation.finish(crops[i : i + 1], u[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(augmentation.finish(crops, u), alone, atol=1e-6, rtol=0)


# -------------------------------------------------------------- the loss and the search in one pass


@pytest.mark.parametrize("chunk", [7, None])
def test_softmax_in_one_pass_is_that_of_whole_logits(chunk):
    """Value and gradient of the queue's losses against the forms that take logits; the queue may
    change before backward.
    """
    N, K, T = 6, 50, 0.2
    q, k, hard, queue = unit(N, 8, 0).requires_grad_(), unit(N, 8, 1), unit(N, 8, 2), unit(K, 8, 3)
    # K: none; some twice
    absent = torch.randint(K + 1, (N, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(N, K + 1, dtype=torch.bool).scatter_(1, absent, True)[:, :K]
    own = (q * k).sum(1, keepdim=True) / T
    logits = [(x @ queue.T / T).masked_fill(mask, -torch.inf) for x in (q, hard)]
    forms = multi_positive_nce, multi_positive_mean_log
    want = [
        *(form(own, logits[0].logsumexp(1)) for form in forms),
        hard_positive_kl(logits[1], logits[0]),
    ]
    lse, top, lse_h, mean_h = softmax_over(q, queue, T, hard=hard, absent=absent, chunk=chunk)
    mine = [form(own, lse) for form in forms] + [linear_kl(q, lse, hard, lse_h, mean_h, T)]
    torch.testing.assert_close(top, logits[0].amax(1))
    grads = [torch.autograd.grad(loss, q, retain_graph=True)[0] for loss in want]
    queue.zero_()
    for loss, grad, other in zip(want, grads, mine):
        torch.testing.assert_close(loss, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            grad, torch.autograd.grad(other, q, retain_graph=True)[0], atol=1e-5, rtol=1e-4
        )


def test_moments_of_a_contiguous_file_are_laid_out_as_the_parameters():
    """A fused kernel walks through memory: given MoCo's moments as they lie in its files, it would
    move other weights.
    """
    gradients = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    moved = []
    for layout, quick in ((torch.contiguous_format, False), (torch.channels_last, True)):
        weight = torch.nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=layout))
        optimizer = fast.sgd([weight], 0.1, 0.9, 1e-4, quick)
        state = optimizer.state_dict() | {"state": {0: {"momentum_buffer": gradients[0].clone()}}}
        fast.load_optimizer(optimizer, state)
        assert optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()
        for gradient in gradients[1:]:
            weight.grad = gradient.to(memory_format=layout)
            optimizer.step()
        moved.append(weight.detach().contiguous())
    torch.testing.assert_close(*moved)


KERNELS = """
import torch
import tests.interpreter
from moco_isl.ops import fused, kernels, neighbors, softmax
from moco_isl.ops.kernels import Tile
from tests.near import assert_same_neighbours

unit = lambda n, C: torch.nn.functional.normalize(torch.randn(n, C), dim=1)
torch.manual_seed(0)
kernels.softmax_tile = lambda C: Tile(16, 32, 1, 1)
kernels.search_tile = lambda C: Tile(16, 64, 1, 1)
f, rows = unit(20, 24), unit(300, 24)
absent = torch.randint(301, (10, 40))
absent[3] = torch.arange(300)[:40]  # a whole tile
fused.check_kernels(kernels, f, rows, absent)
opposite = torch.cat([rows, -rows])
for x, y in zip(kernels.softmax_pass(f, opposite, 0.02), softmax.softmax_pass(f, opposite, 0.02)):
    torch.testing.assert_close(x, y, atol=0.05, rtol=0)
absent = torch.cat([absent, torch.full((10, 260), 300)], 1)
absent[1] = torch.arange(300)  # all rows
lse, mean, top = kernels.softmax_pass(f, rows, 0.1, absent)
plain = softmax.softmax_pass(f, rows, 0.1, absent)
assert torch.equal(lse.isinf(), plain[0].isinf()) and lse.isinf().sum() == top.isinf().sum() == 2
assert (mean[[1, 11]] == 0).all() and (mean - plain[1]).abs().max() < 2e-3
absent = absent[:, :40]
ignores_absent = lambda f, rows, T, absent: kernels.softmax_pass(f, rows, T)
Off = type("Off", (), {**vars(kernels), "softmax_pass": ignores_absent})
try:
    fused.check_kernels(Off, f, rows, absent)
except ArithmeticError as error:
    print(error)
rows = unit(800, 24)  # 13 groups
rows[400:424] = rows[:24] + 3e-4 * torch.randn(24, 24)  # float16 takes them for equal
rows[::64] = rows[0]  # equal rows in more groups than are looked into
rows = torch.nn.functional.normalize(rows, dim=1)
own = torch.arange(24)
for dtype in (torch.float32, torch.float16):
    found = neighbors._topk_fused(kernels, rows[:24], rows.to(dtype), 2, own, None)
    assert_same_neighbours(found, neighbors.topk(rows[:24], rows.to(dtype), 3, own))
print(fused.search(kernels, rows[:4], rows, 2, own[:4])[2].tolist())
"""


def needs_interpreter():
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.0."):
        pytest.skip(
            "the interpreter of Triton 3.0 overflows on -inf and crashes; the kernels themselves"
            " are checked where they are used"
        )


def test_kernels_equal_the_plain_forms():
    """In Triton's interpreter, in a process of its own: it has to be chosen before Triton is
    imported.
    """
    needs_interpreter()
    run = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    caught, sure = run.stdout.splitlines()
    assert "lse is off" in caught and sure == "[False, True, True, True]", run.stdout


EDGES = """
import torch
import tests.interpreter
from moco_isl.ops import fused, kernels, softmax
from moco_isl.ops.kernels import Tile

unit = lambda n, C: torch.nn.functional.normalize(torch.randn(n, C), dim=1)
torch.manual_seed(0)
kernels.softmax_tile = lambda C: Tile(16, 32, 1, 1)
kernels.search_tile = lambda C: Tile(16, 64, 1, 1)

# one anchor, one row, widths that are no multiple of 16
for N, M, C in ((1, 130, 24), (3, 1, 25), (17, 65, 100), (2, 64, 3)):
    f, rows = unit(N, C), unit(M, C)
    fused.check_kernels(kernels, f, rows, torch.full((1, 1), M))  # a logit of none stays
rows = unit(70, 24)
assert [len(x) for x in kernels.softmax_pass(unit(0, 24), rows, 0.1)] == [0, 0, 0]

# the tensors' device is the current one at every start
seen, device_of = [], torch.cuda.device_of
torch.cuda.device_of = lambda x: (seen.append(x), device_of(x))[1]

# not contiguous, and in half precision: as what they hold says
f, groups = unit(20, 24), torch.arange(2).repeat(20, 1)
strided = torch.stack([f, f], 2)[:, :, 0]
columns = torch.arange(140).remainder(71).view(20, 7)[:, ::2]
assert not strided.is_contiguous() and not columns.is_contiguous()
wanted = kernels.softmax_pass(f, rows, 0.1, columns.contiguous())
for x, y in zip(kernels.softmax_pass(strided, rows.T.contiguous().T, 0.1, columns), wanted):
    assert torch.equal(x, y)
halves = f.half(), rows.half()
assert torch.equal(kernels.group_maxima(strided.half(), rows.half()), kernels.group_maxima(*halves))
scores = kernels.rescore(f, rows, groups)
assert torch.equal(kernels.rescore(strided, rows, groups.T.contiguous().T), scores)
assert len(seen) == 6, seen
for dtype in (torch.float16, torch.bfloat16):
    half = f.to(dtype)
    wanted = softmax.softmax_pass(half.float(), rows, 0.1)
    for x, y in zip(kernels.softmax_pass(half, rows, 0.1), wanted):
        torch.testing.assert_close(x, y, atol=5e-3, rtol=0)
    scores = kernels.rescore(half, rows, groups)[:, :70]
    torch.testing.assert_close(scores, half.float() @ rows.T, atol=1e-5, rtol=0)

# the entropy by the fused pass
rows = unit(500, 24)
fused.kernels_for = softmax.kernels_for = lambda rows: kernels
off = softmax.entropy(rows[:40], rows, 0.1, fused=True) - softmax.entropy(rows[:40], rows, 0.1)
assert 0 < float(off.abs().max()) < 0.01, off
"""


def test_kernels_at_the_edges():
    """One anchor, one row, odd widths, half precision, tensors that are not contiguous; in Triton's
    interpreter.
    """
    needs_interpreter()
    run = subprocess.run(
        [sys.executable, "-c", EDGES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("C", [64, 100, 128, 256])
def test_kernels_work_on_this_gpu(C):
    fused._seen_to_work.cache_clear()  # of every width
    f, rows = unit(512, C, 0).cuda(), unit(70_000, C, 1).cuda()
    kernels = fused.kernels_for(rows)
    assert kernels is not None, "they were left out: see the warning"
    fused.check_kernels(kernels, f, rows, torch.randint(70_001, (256, 66), device="cuda"))
    own = torch.arange(512, device="cuda")
    found = neighbors.topk(rows[:512], rows, 10, own)
    assert_same_neighbours(found, neighbors._topk_plain(rows[:512], rows, 11, own, None, None))


# ---------------------------------------------------------------- whole steps of the training loop


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fast_steps_have_the_losses_of_plain_ones(name, monkeypatch):
    """bf16, channels last and traced encoders (by a backend that needs no C++ compiler) against the
    plain path, over three epochs.
    """
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda fn, dynamic, options: compiler(fn, backend="aot_eager", dynamic=dynamic),
    )
    plain = train(front(name, False), False, epochs=3)
    isl = front(name, True)
    isl.model.to(memory_format=torch.channels_last)
    fast.count_batches_at_once(isl.model)
    fast.compile_encoders(isl.model, N)
    mine = train(isl, True, amp="bf16", channels_last=True, epochs=3)
    assert mine == pytest.approx(plain, rel=0.02) and mine != plain
    assert min(plain) < 0.97 * plain[0] or max(plain) > 1.03 * plain[0], (
        "the losses must have moved for this to say anything"
    )


class Graphs:
    """A backend of torch.compile that runs what it is given as it is: how often it compiled, and
    how often that ran.
    """

    def __init__(self):
        self.compiled, self.ran = 0, 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.ran += 1
            return graph(*args)

        return run


@pytest.fixture
def graphs(monkeypatch):
    torch._dynamo.reset()
    compiler, graphs = torch.compile, Graphs()
    forwarded = lambda fn, dynamic, options: compiler(fn, dynamic=dynamic, backend=graphs)
    monkeypatch.setattr(torch, "compile", forwarded)
    return graphs


class Narrow(torch.nn.Module):
    """An encoder that compiles in no time: a convolution, its mean over the image, a layer."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 3)
        self.fc = torch.nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_every_network_of_a_class_is_compiled(graphs, caplog):
    """By itself torch.compile keeps 8 graphs of a function, and would run the ninth network as it
    is.
    """
    with caplog.at_level("WARNING", logger="torch._dynamo"):
        for width in range(8, 17):  # of one class, and no graph of one fits another
            model = bank.Instance(lambda num_classes: Narrow(width, num_classes), 16)
            fast.compile_encoders(model, 2)
            model.encode(torch.randn(2, 3, SIDE, SIDE))
    assert (graphs.compiled, graphs.ran) == (9, 9)
    assert "limit" not in caplog.text


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "inline_inbuilt_nn_modules")
    or not torch._dynamo.config.inline_inbuilt_nn_modules,
    reason="before torch 2.5 each network is compiled anew",
)
def test_equal_networks_share_what_was_compiled(graphs):
    """As those of the runs that a process makes one after the other."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = builder.MoCo(
            lambda num_classes: build_encoder("resnet18w8", num_classes, image_size=SIDE), 16, 64
        )
        fast.compile_encoders(model, 2)
        model.encode(*torch.randn(2, 2, 3, SIDE, SIDE))
    assert (graphs.compiled, graphs.ran) == (2, 6)


@pytest.mark.parametrize("name", ["MoCo", "symmetric MoCo", "Instance", "Rotation", "DeepCluster"])
def test_the_batch_that_a_step_shows_an_encoder_is_the_one_compiled(name, graphs):
    encoder = lambda num_classes: build_encoder("resnet18w8", num_classes, image_size=SIDE)
    models = {
        "Instance": lambda: bank.Instance(encoder, 16),
        "Rotation": lambda: Rotation(encoder),
        "DeepCluster": lambda: DeepCluster(encoder, 10),
    }
    model = models.get(name, lambda: builder.MoCo(encoder, 16))()
    fast.compile_encoders(model, 4)

    def step(n):
        views = torch.randn(2, n, 3, SIDE, SIDE)
        ran = graphs.ran
        (
            model.encode(*views, symmetric=name == "symmetric MoCo")
            if "MoCo" in name
            else model.encode(views[0])
        )
        return graphs.ran - ran

    calls = {"MoCo": 2, "symmetric MoCo": 4}.get(name, 1)  # of encoders, in a step
    assert [step(4), step(2), step(4)] == [calls, 0, calls], "a smaller, last batch runs as it is"
    assert graphs.compiled == (2 if "MoCo" in name else 1)
    model.eval()
    assert step(4) == 0


class Reads(TorchDispatchMode):
    """Where a value, or a shape that depends on values, is asked of the device: each would make the
    host wait for a GPU.
    """

    WAIT = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten._unique2,
        torch.ops.aten.equal,
    )

    def __init__(self, steps):
        super().__init__()
        self.steps, self.found = steps, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexed = func.overloadpacket in (
            torch.ops.aten.index,
            torch.ops.aten.index_put,
            torch.ops.aten.index_put_,
        )
        if (
            func.overloadpacket in self.WAIT
            or indexed
            and any(
                x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)
            )
        ):
            self.found.append((len(self.steps), str(func)))
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """tolist, cpu and numpy, which on a CPU pass no dispatcher."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.reads.found.append((len(self.reads.steps), func.__name__))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_reads_nothing_back(name, monkeypatch):
    """Only after steps 3 and 4, which are logged, and in the very first one, whose batch is looked
    at: that one was before. How many second views the bank objective has to look at is the one
    exception, see below.
    """
    # this one stands for a GPU, whose index is looked at no more
    monkeypatch.setattr(base, "CPU", torch.device("meta"))
    steps, isl = [], front(name, True)
    train(isl, True)
    with Reads(steps) as reads, Lists(reads):
        train(isl, True, print_freq=3, steps=steps)
    counts = [step for step, what in reads.found if step in (1, 2)]
    assert counts == ([1, 2] if name == "bank" else []), reads.found
    assert {step for step, _ in reads.found} >= {3, 4}, "the probe sees those of the log"


def test_the_published_step_reads_every_loss():
    steps, step = [1], published_step(PublishedMoCo("resnet18w16", SIDE, 16, 64))
    with Reads(steps) as reads:
        step(*Images().steps[0][0])
    assert reads.found


def test_second_views_are_counted_before_the_encoder_runs(monkeypatch):
    """The host asks before it queues the encoder and reads behind it: the device is busy while the
    answer travels.
    """
    seen = []

    class Seen(bank.Coming):
        def __init__(self, number):
            seen.append("asked")
            super().__init__(number)

        def __int__(self):
            seen.append("read")
            return super().__int__()

    monkeypatch.setattr(bank, "Coming", Seen)
    isl = front("bank", True)
    isl.model.encoder_q.register_forward_hook(lambda *_: seen.append("encoded"))
    views, index = Images().steps[2]  # images 32 to 47: half of them without a set
    isl(*views, index)
    assert seen == ["asked", "encoded", "read", "encoded"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_on_a_gpu_waits_for_nothing(name):
    """CUDA itself raises where the host would wait."""
    isl = front(name, True, "cuda")
    train(isl, True, amp="bf16", device="cuda")  # kernels are tried out, and memory is found
    others = Images("cuda").steps[1:]
    optimizer = fast.sgd(isl.model.parameters(), 0.05, 0.9, 1e-4, True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for views, index in others:
            with engine.autocast(torch.device("cuda"), "bf16"):
                loss = isl(*views, index)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- ranks

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "all_reduce",
    "broadcast",
    "broadcast_object_list",
    "all_gather_object",
)


def _steps_of_a_rank(rank, world, is_fast):
    """Losses, state, and (collective, bytes that this rank gives) of each of six steps; the
    gradients' all-reduce is DistributedDataParallel's own.
    """
    isl = test_builder._with_positives(ISL(test_builder.moco(), test_builder.M, fast=is_fast), True)
    sent, inner, steps = [], {name: getattr(torch.distributed, name) for name in COLLECTIVES}, []

    def counted(name):
        def call(*args, **options):
            given = (
                args[1]
                if name in ("all_gather", "all_gather_into_tensor", "all_to_all_single")
                else args[0]
            )
            sent.append((name, given.nbytes if isinstance(given, torch.Tensor) else -1))
            return inner[name](*args, **options)

        return call

    def step(*batch):
        sent.clear()
        loss = isl(*batch)
        steps.append(list(sent))
        return loss

    share = slice(rank * 4, rank * 4 + 4) if world > 1 else slice(None)
    optimizer, losses = test_builder.sgd(isl.model), []
    try:
        for name in COLLECTIVES:
            setattr(torch.distributed, name, counted(name))
        for i in range(6):
            im_q, im_k = test_builder.images(8, 10 + i), test_builder.images(8, 20 + i)
            loss = step(
                im_q[share], im_k[share], ((torch.arange(8) + 8 * i) % test_builder.M)[share]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        for name, function in inner.items():
            setattr(torch.distributed, name, function)
    return losses, isl.model.state_dict(), isl.bank.rows, steps


def test_two_fast_ranks_are_one_and_gather_keys_once_in_half_precision():
    truth, state, bank, _ = _steps_of_a_rank(0, 1, True)
    (first, state_1, bank_1, sent), (second, state_2, bank_2, _) = run_ranks(
        2, _steps_of_a_rank, True
    )
    assert [(a + b) / 2 for a, b in zip(first, second)] == pytest.approx(truth, abs=2e-3)
    assert torch.equal(bank_1, bank_2) and all(
        torch.equal(state_1[name], state_2[name]) for name in state_1
    ), "ranks differ"
    assert torch.allclose(bank_1, bank, atol=2e-3) and torch.allclose(
        state_1["queue"], state["queue"], atol=2e-3
    )
    assert all(
        torch.allclose(state_1[name].double(), state[name].double(), atol=2e-3) for name in state
    )
    n, C = 4, test_builder.C
    # shuffling BN: there, and its keys back
    images = ("all_to_all_single", n * 3 * 4 * 4 * 4)
    keys = ("all_to_all_single", n * C * 4)
    assert sent == [[images, keys, ("all_gather_into_tensor", n * (8 + 2 * C))]] * 6, (
        "an index of 8 bytes and C halves a key, once a step"
    )
    _, _, _, plain = run_ranks(2, _steps_of_a_rank, False)[0]
    assert (
        sum(size for _, size in plain[0]) > sum(size for _, size in sent[0]) and len(plain[0]) > 3
    )
