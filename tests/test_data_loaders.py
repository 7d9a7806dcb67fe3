"""Loaders: equal batches with any workers, ranks and starts; broken images; processes that die."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moco_isl.builder import MoCo
from moco_isl.data import (
    build_dataset,
    eval_loader,
    get_augmentation,
    get_eval_transform,
    holdout,
    load_into_memory,
    loaders,
    train_loader,
    view_loader,
)
from moco_isl.data import workers as reading
from moco_isl.errors import BadInput, RunFailed
from moco_isl.isl import ISL
from moco_isl.loader import TwoCropsTransform, WithIndex
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
M = 14


def make_images(folder, n=M, side=20):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((side, side)).save(folder / f"{i:02}.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_images(root / "train")
    return root


def loader_of(root, size=16, **options):
    options = {"batch_size": 4, "seed": 3, **options}
    augmentation = get_augmentation("folder", aug_plus=True, size=size)
    return train_loader(build_dataset("folder", root), augmentation=augmentation, **options)


def digits_loader(dataset=None, seed=0, **options):
    augmentation = get_augmentation("digits", aug_plus=True)
    dataset = build_dataset("digits") if dataset is None else dataset
    return train_loader(dataset, augmentation=augmentation, seed=seed, **options)


def eval_of(root, size=20, **options):
    transform = get_eval_transform("folder", size)
    return eval_loader(build_dataset("folder", root), transform=transform, **options)


def batches(loader, epoch, start=0):
    return [(im_q, im_k, index) for (im_q, im_k), index in loader.epoch(epoch, start)]


def same(a, b):
    pairs = [pair for one, other in zip(a, b) for pair in zip(one, other)]
    return len(a) == len(b) and all(torch.equal(*pair) for pair in pairs)


# ---------------------------------------------------------------- the same batches


def test_workers_and_starts_do_not_change_a_bit(folder):
    plain, several = loader_of(folder), loader_of(folder, workers=2)
    try:
        whole = [batches(plain, epoch) for epoch in (0, 1)]
        assert same(batches(several, 0), whole[0])
        next(iter(several.epoch(1)))  # left early, with more asked for already
        assert same(batches(several, 1), whole[1])  # by the same workers
        assert same(batches(several, 1, start=2), whole[1][2:])
        assert same(batches(plain, 0, start=3), whole[0][3:])
        assert batches(several, 0, start=4) == batches(plain, 0, start=4) == []
        order = [torch.cat([index for _, _, index in epoch]) for epoch in whole]
        assert not torch.equal(*order) and torch.equal(*(x.sort().values for x in order))
    finally:
        several.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(several.epoch(0))


def test_every_image_once_an_epoch_and_two_views_of_it(folder):
    loader = loader_of(folder)
    got = batches(loader, 0)
    assert len(loader) == len(got) == 4 and [len(i) for _, _, i in got] == [4, 4, 4, 2]
    assert torch.cat([i for _, _, i in got]).sort().values.tolist() == list(range(M))
    im_q, im_k, index = got[0]
    assert im_q.shape == im_k.shape == (4, 3, 16, 16)
    assert (im_q.dtype, index.dtype) == (torch.float32, torch.int64)
    assert not torch.equal(im_q, im_k)


def test_skipped_images_are_not_loaded(folder, monkeypatch):
    loader = loader_of(folder)
    want = batches(loader, 0)[2:]
    opened = []
    kind = type(loader.reader.dataset)
    image = kind.image
    noted = lambda self, i, at_least=None: opened.append(i) or image(self, i)
    monkeypatch.setattr(kind, "image", noted)
    assert same(batches(loader, 0, start=2), want) and len(opened) == 6


def test_iterating_leaves_the_users_generators_alone(folder):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    batches(loader_of(folder), 0)
    list(eval_of(folder, 16, batch_size=5))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(
    "batch_size, multiple, sizes",
    [(4, 2, [4, 4, 4, 2]), (4, 4, [4, 4, 4]), (20, 4, [12]), (14, 1, [14]), (28, 1, [14])],
)
def test_the_last_batch_is_kept_and_trimmed(folder, batch_size, multiple, sizes):
    held = load_into_memory(build_dataset("folder", folder))
    for dataset, on_device in ((build_dataset("folder", folder), False), (held, True)):
        augmentation = get_augmentation("folder", aug_plus=False, size=16, on_device=on_device)
        loader = train_loader(
            dataset, augmentation=augmentation, batch_size=batch_size, seed=0, multiple=multiple
        )
        assert len(loader) == len(sizes) and [len(i) for _, i in loader.epoch(0)] == sizes
    indices = [torch.cat([i for _, i in loader.epoch(epoch)]) for epoch in range(2)]
    assert all(len(set(i.tolist())) == sum(sizes) for i in indices) and not torch.equal(*indices)


def test_batch_sizes_that_cannot_be_are_refused(folder):
    with pytest.raises(BadInput, match="batch size 6 does not divide by 4"):
        loader_of(folder, batch_size=6, multiple=4)
    with pytest.raises(BadInput, match=r"too few images \(14\) for 16"):
        loader_of(folder, batch_size=16, multiple=16)
    with pytest.raises(BadInput, match="load_into_memory"):
        digits_loader(build_dataset("folder", folder), batch_size=2)


def test_one_image_alone_is_no_batch():
    """Its dense layers' batch norm would raise; 1,437 images leave one over batches of 4."""
    loader = digits_loader(batch_size=4)
    seen = [torch.cat(list(loader.plan.rows(epoch, 0))).tolist() for epoch in (0, 1)]
    out = [set(range(1437)) - set(rows) for rows in seen]
    assert len(loader) == 359 and [len(left) for left in out] == [1, 1] and out[0] != out[1]
    assert len(digits_loader(batch_size=1)) == 1437
    single, _ = holdout(build_dataset("digits"), 1436, seed=0)
    with pytest.raises(BadInput, match=r"too few images \(1\) for 1 .*: expected at least 2"):
        digits_loader(single, batch_size=4)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_has_two_images_in_every_step(monkeypatch, world):
    """Against the rule in plain words.

    Of the images left over each rank takes an equal share that divides by `multiple`, as large as
    possible; a share of one image is left out.
    """
    monkeypatch.setattr(loaders.dist, "world_size", lambda: world)
    for multiple in (1, 2, 3):
        for B in (world * multiple * n for n in (1, 2, 5)):
            for M in range(1, 3 * B):
                share = max(s for s in range(0, M % B + 1, multiple) if s * world <= M % B)
                kept = [B // world] * (M // B)
                if share >= max(1, min(2, B // world)):
                    kept.append(share)
                if not kept:
                    with pytest.raises(BadInput, match=rf"too few images \({M}\)"):
                        loaders._Plan(M, B, 0, multiple)
                    continue
                plan, seen = loaders._Plan(M, B, 0, multiple), []
                for rank in range(world):
                    monkeypatch.setattr(loaders.dist, "rank", lambda rank=rank: rank)
                    rows = list(plan.rows(0, 0))
                    assert len(plan) == len(rows) and [len(x) for x in rows] == kept
                    seen += torch.cat(rows).tolist()
                assert len(set(seen)) == len(seen) == sum(kept) * world
                plan.start_step = len(plan) + 1  # as of a run that began with one more step
                assert len(plan) == 0 and list(plan) == []


def dense_batch_norm_on_ranks(rank, world, M):
    """[(size, loss)] of this rank's batches, of 64 over all ranks, in an epoch.

    The network has a batch norm behind a dense layer.
    """

    def encoder(num_classes):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.BatchNorm1d(8))
        net.add_module("fc", nn.Linear(8, num_classes))
        return net

    torch.manual_seed(0)
    dataset, _ = holdout(build_dataset("digits"), 1437 - M, seed=0)
    loader = digits_loader(dataset, batch_size=64)
    isl = ISL(MoCo(encoder, 8, 64), M)
    return [(len(index), isl(*views, index).item()) for views, index in loader.epoch(0)]


@pytest.mark.parametrize("M, sizes", [(66, [32]), (67, [32]), (68, [32, 2])])
def test_two_ranks_and_a_remainder_of_one_image_each(M, sizes):
    for found in run_ranks(2, dense_batch_norm_on_ranks, M):
        assert [size for size, _ in found] == sizes and all(np.isfinite(loss) for _, loss in found)


def rank_batches(rank, world, root, in_memory):
    loader = loader_of(root)
    if in_memory:
        dataset = load_into_memory(build_dataset("folder", root))
        augmentation = get_augmentation("folder", aug_plus=True, size=16, on_device=True)
        loader = train_loader(dataset, augmentation=augmentation, batch_size=4, seed=3)
    return [[x.numpy() for x in batch] for batch in batches(loader, 1, 1)]


@pytest.mark.parametrize("in_memory", [False, True])
def test_two_ranks_share_the_batches_of_one(folder, in_memory):
    whole = rank_batches(0, 1, str(folder), in_memory)
    ranks = run_ranks(2, rank_batches, str(folder), in_memory)
    # the last two images are one a rank, and left out
    assert len(whole) == 3 and len(ranks[0]) == len(ranks[1]) == 2
    for batch, first, second in zip(whole, *ranks):
        assert len(first[2]) == len(second[2])
        for x, a, b in zip(batch, first, second):
            np.testing.assert_allclose(np.concatenate([a, b]), x, atol=1e-5 if in_memory else 0)


def test_images_in_memory_have_the_same_interface():
    loader = digits_loader(batch_size=128)
    whole = batches(loader, 2)
    assert len(loader) == len(whole) == 12
    assert same(batches(loader, 2, 5), whole[5:]) and batches(loader, 2, 12) == []
    assert torch.cat([i for _, _, i in whole]).sort().values.tolist() == list(range(1437))
    assert loader.bad_images() == []
    loader.close()


@pytest.mark.parametrize("views", [1, 3])
def test_as_many_views_as_asked_for(folder, views):
    both = next(loader_of(folder).epoch(0))[0]
    got = next(loader_of(folder, views=views).epoch(0))[0]
    assert len(got) == views and all(torch.equal(a, b) for a, b in zip(got, both))


@pytest.mark.parametrize("kind", ["files", "files finished on the device", "memory"])
def test_every_image_is_viewed_once_in_order_as_its_epoch_would(folder, kind):
    dataset = build_dataset("folder", folder)
    augmentation = get_augmentation("folder", aug_plus=True, size=16, on_device=kind != "files")
    dataset = load_into_memory(dataset) if kind == "memory" else dataset
    options = {"augmentation": augmentation, "seed": 3}
    trained = {}
    for q_s, k_s, index in batches(train_loader(dataset, batch_size=4, **options), 1):
        trained |= {int(i): (q, k) for q, k, i in zip(q_s, k_s, index)}
    for shards in ([(0, M)], [(0, 5), (5, 5), (5, M)]):
        parts = [view_loader(dataset, batch_size=3, shard=shard, **options) for shard in shards]
        got = [batch for loader in parts for batch in batches(loader, 1)]
        assert len(got) == sum(map(len, parts))
        assert torch.cat([index for *_, index in got]).tolist() == list(range(M))
        for q_s, k_s, index in got:
            for q, k, i in zip(q_s, k_s, index.tolist()):
                assert torch.allclose(q, trained[i][0], atol=1e-5)
                assert torch.allclose(k, trained[i][1], atol=1e-5)


def test_views_of_broken_images_are_of_their_stand_ins(broken):
    augmentation = get_augmentation("folder", aug_plus=True, size=16)
    dataset = build_dataset("folder", broken)
    loader = view_loader(dataset, augmentation=augmentation, batch_size=4, seed=0)
    index = torch.cat([index for *_, index in batches(loader, 0)])
    assert index.tolist() == list(range(M)) and len(loader.bad_images()) == 3


def test_fast_decodes_large_photos_smaller_and_shows_the_same(tmp_path):
    (tmp_path / "train").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "train" / "x.jpg", quality=95)
    plain, fast = (loader_of(tmp_path, batch_size=1, size=64, fast=fast) for fast in (False, True))
    large, small = plain.reader(0)[0], fast.reader(0)[0]
    assert large.size == (1200, 900) and small.size == (300, 225)
    large, small = (np.asarray(x.resize((100, 75)), dtype=float) for x in (large, small))
    assert 0 < np.abs(large - small).mean() < 1  # of 255
    (im_q, _), _ = next(fast.epoch(0))
    assert im_q.shape == (1, 3, 64, 64)


# ---------------------------------------------------------------- evaluation


MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]


def test_eval_loader_gives_all_images_in_order(folder):
    dataset = build_dataset("folder", folder)
    transform = get_eval_transform("folder", 20)
    for held, workers in ((dataset, 0), (dataset, 1), (load_into_memory(dataset), 0)):
        loader = eval_loader(held, transform=transform, batch_size=5, workers=workers)
        got = list(loader)
        assert len(loader) == 3 and torch.cat([i for _, i in got]).tolist() == list(range(M))
        for image, i in zip(torch.cat([x for x, _ in got]), range(M)):
            pixels = torch.tensor(np.asarray(dataset[i][0])) / 255  # [H, W, 3]
            want = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
            torch.testing.assert_close(image, want.permute(2, 0, 1), atol=1e-5, rtol=1e-5)
        loader.close()


@pytest.mark.parametrize("shards", [[(0, 5), (5, 9), (9, 14)], [(0, 0), (0, 14)]])
def test_shards_cover_each_image_once(folder, shards):
    files = build_dataset("folder", folder)
    transform = get_eval_transform("folder", 20)
    for dataset in (files, load_into_memory(files)):
        seen = []
        for shard in shards:
            loader = eval_loader(dataset, transform=transform, batch_size=4, shard=shard)
            seen += [i for _, index in loader for i in index.tolist()]
        assert seen == list(range(M))


def test_eval_view_is_the_centre_of_a_resize():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    want = image.resize((341, 256), Image.Resampling.BILINEAR).crop((58, 16, 282, 240))
    got = get_eval_transform("folder")(image)
    assert torch.equal(got, torch.from_numpy(np.asarray(want).copy()).permute(2, 0, 1))


# ---------------------------------------------------------------- broken images


@pytest.fixture
def broken(tmp_path):
    make_images(tmp_path / "train")
    for i in (3, 4, 13):
        path = tmp_path / "train" / f"{i:02}.jpg"
        path.write_bytes(path.read_bytes()[:-200])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_named_and_counted(broken, workers):
    loader = loader_of(broken, workers=workers, max_bad_images=3)
    index = torch.cat([i for _, i in loader.epoch(0)])
    assert sorted(index.tolist()) == list(range(M))
    assert loader.bad_images() == [(i, str(broken / "train" / f"{i:02}.jpg")) for i in (3, 4, 13)]
    loader.close()
    with pytest.raises(RunFailed, match=r"unreadable images? \(.*0[34].jpg.*expected at most 2"):
        loader = loader_of(broken, workers=workers, max_bad_images=2)
        try:
            batches(loader, 0)
        finally:
            loader.close()


def test_the_stand_in_is_the_next_readable_image(broken):
    loader = eval_of(broken, batch_size=M)
    images, index = next(iter(loader))
    assert index.tolist() == list(range(M))
    for i, stand_in in ((3, 5), (4, 5), (13, 0)):
        assert torch.equal(images[i], images[stand_in])
    assert [i for i, _ in loader.bad_images()] == [3, 4, 13]


def test_broken_images_of_a_set_in_memory_are_counted_too(broken):
    held = load_into_memory(build_dataset("folder", broken))
    augmentation = get_augmentation("folder", aug_plus=True, size=16, on_device=True)
    options = {"augmentation": augmentation, "batch_size": 7, "seed": 0}
    loader = train_loader(held, max_bad_images=3, **options)
    assert len(batches(loader, 0)) == 2 and [i for i, _ in loader.bad_images()] == [3, 4, 13]
    with pytest.raises(RunFailed, match="3 unreadable images .*03.jpg"):
        batches(train_loader(held, max_bad_images=2, **options), 0)


def test_nothing_readable_at_all(tmp_path):
    make_images(tmp_path / "train", 3)
    for path in (tmp_path / "train").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(RunFailed, match="none of 3 images could be read"):
        batches(loader_of(tmp_path, batch_size=2, max_bad_images=100), 0)
    with pytest.raises(RunFailed, match="none of 3 images could be read"):
        list(eval_of(tmp_path, 16, batch_size=2))


# ---------------------------------------------------------------- processes


def test_workers_outlive_stop_signals_and_end_with_close(folder):
    others = set(multiprocessing.active_children())
    loader = loader_of(folder, workers=2)
    whole = batches(loader, 0)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for worker in workers:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGHUP"):
            os.kill(worker.pid, getattr(signal, name))
    assert same(batches(loader, 0), whole)
    loader.close()
    assert all(worker.exitcode is not None for worker in workers)


def test_a_killed_worker_fails_the_run_with_its_cause(folder):
    others = set(multiprocessing.active_children())
    loader = loader_of(folder, workers=1, batch_size=2)
    steps = loader.epoch(0)
    next(steps)
    worker = (set(multiprocessing.active_children()) - others).pop()
    said = r"was ended from outside|DataLoader worker \(pid.* killed by signal"
    with pytest.raises(RuntimeError, match=said):
        # torch raises where the news finds the parent: here, or in the loop
        os.kill(worker.pid, signal.SIGKILL)
        for epoch in range(1, 5):
            batches(loader, epoch)
    loader.close()


def small_shared_memory() -> bool:
    """Whether a process can be given a /dev/shm of its own here."""
    command = "unshare -m mount -t tmpfs tmpfs /dev/shm".split()
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def raiser(error):
    def raises(*_, **__):
        raise error

    return raises


NO_SPACE = (
    "unable to allocate shared memory(shm) for file </torch_7_8_0>: No space left on device (28)"
)
NO_FILES = (
    "unable to open shared memory object </torch_7_8_0> in read-write mode: Too many open files"
    " (24)"
)


@pytest.mark.parametrize(
    "text, words",
    [(NO_SPACE, "docker run --shm-size"), (NO_FILES, "ulimit -n"), ("?", "see its error above")],
)
def test_a_batch_that_cannot_be_handed_over_ends_the_epoch(folder, monkeypatch, text, words):
    """multiprocessing would print the error and drop the batch: the parent would wait for ever."""
    loader = loader_of(folder, workers=1)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", raiser(RuntimeError(text)))
    try:
        with pytest.raises(RuntimeError) as caught:
            batches(loader, 0)
    finally:
        loader.close()
    # raised in the loop, or where torch's news found this process
    assert words in (reading.trouble(caught.value) or str(caught.value))


def test_few_open_files_are_not_the_images_fault(folder, monkeypatch):
    loader = loader_of(folder, max_bad_images=99)
    error = OSError(errno.EMFILE, "Too many open files", "a.jpg")
    monkeypatch.setattr(loader.reader.dataset, "image", raiser(error))
    with pytest.raises(RunFailed, match="too many files are open"):
        batches(loader, 0)
    assert loader.bad_images() == []


WORKER = "DataLoader worker (pid 7)"
CAUGHT = "in DataLoader worker process 0.\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (f"{WORKER} is killed by signal: Bus error. ... out of shared memory", "--shm-size"),
        (f"Caught RuntimeError {CAUGHT}Traceback: {NO_SPACE}", "--workers (-j"),
        (f"{WORKER} exited unexpectedly with exit code 28. Details are lost.", "--batch-size (-b)"),
        ("received 0 items of ancdata", "too many files are open"),
        (f"Caught OSError {CAUGHT}[Errno 24] Too many open files: 'a.jpg'", "ulimit -n"),
        (f"{WORKER} is killed by signal: Killed.", "ended from outside (pid 7)"),
    ],
)
def test_what_the_machine_ran_out_of_is_said_in_a_line(text, words):
    error = (OSError if "OSError" in text else RuntimeError)(text)
    assert words in reading.trouble(error) and "\n" not in reading.trouble(error)


def test_other_errors_are_not_taken_for_the_workers():
    full = OSError(errno.ENOSPC, "No space left")
    for error in (EOFError(), ConnectionResetError(), full, RuntimeError("unable to")):
        assert reading.trouble(error) == ""


@pytest.mark.skipif(not small_shared_memory(), reason="no file system can be mounted here")
def test_a_full_shared_memory_ends_a_run_with_3_and_a_line(folder, tmp_path):
    flags = (
        "-a digits --image-size 16 --mlp --moco-dim 16 --moco-k 16 -b 4 -j 1 --seed 1 --device cpu"
        f" --epochs 1 --out {tmp_path}/out"
    )
    command = [sys.executable, "main_moco_isl.py", str(folder), *flags.split()]
    mount = 'mount -t tmpfs -o size=60k tmpfs /dev/shm && exec "$0" "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the shared memory (/dev/shm, 0.0586 MiB in all) is full")
    assert "--shm-size" in line


SCRIPT = """
import sys
from moco_isl.data import build_dataset, get_augmentation, train_loader

augmentation = get_augmentation("folder", aug_plus=False, size=16)
dataset = build_dataset("folder", sys.argv[1])
loader = train_loader(dataset, augmentation=augmentation, batch_size=2, seed=0, workers=2)
steps = loader.epoch(0)
next(steps)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def parents(folder):
    """Two processes, each with two workers in the middle of an epoch.

    The workers hold their parent's stdout, which ends with the last of them.
    """
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    processes = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_workers_die_with_a_killed_parent(parents):
    parents[0].kill()
    parents[0].communicate(timeout=60)
    assert parents[0].returncode == -signal.SIGKILL


def test_a_parent_that_forgets_to_close_still_ends(parents):
    _, errors = parents[1].communicate("\n", timeout=60)
    assert parents[1].returncode == 0 and errors == ""


# ---------------------------------------------------------------- a user's own data set


def test_with_index_around_a_users_own_data_set():
    class Own(torch.utils.data.Dataset):
        def __init__(self, transform=None):
            self.transform = transform or (lambda x: x)

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return self.transform(torch.full((3, 2, 2), float(i))), "label"

    jitter = TwoCropsTransform(lambda x: x + torch.rand(()) / 2)
    for dataset in (WithIndex(Own(jitter)), WithIndex(Own(), transform=jitter)):
        (im_q, im_k), index = next(iter(torch.utils.data.DataLoader(dataset, batch_size=5)))
        assert index.tolist() == list(range(5)) and im_q.shape == im_k.shape == (5, 3, 2, 2)
        assert torch.equal(im_q.floor()[:, 0, 0, 0], index.float()) and not torch.equal(im_q, im_k)
