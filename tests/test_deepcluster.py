"""DeepCluster: its parts against slow references, its two traps, ranks, files, and whole runs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import main_knn
import main_lincls
import main_moco_isl
import moco_isl
from moco_isl import data, export, pretraining
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.data.draws import counted
from moco_isl.encoders import build_encoder, extract_features, without_head
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.isl import ISL
from moco_isl.loader import WithIndex
from moco_isl.objectives.deepcluster import DeepCluster, even_draws, nmi, whitened
from moco_isl.ops.kmeans import kmeans_by_distance
from moco_isl.report import __main__ as report
from moco_isl.report.runs import read_runs
from moco_isl.report.sections import cluster_chart
from moco_isl.run import checkpoint
from studies import figures
from tests.ranks import run_ranks
from tests.runs import Kill, Running, differences, photos, run
from tests.test_builder import images, tiny

M = 24
DIGITS = "--dataset digits -a digits --objective deepcluster -j 0 --seed 1 --device cpu".split()
CLUSTERS = "-b 32 --lr 0.2 --wd 1e-5 --dc-clusters 50 --dc-every 2".split()


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=draws(seed))


# ---- features, k-means, NMI


@pytest.mark.parametrize("components", [3, 256])
def test_whitening_is_that_of_sklearn(components):
    from sklearn.decomposition import PCA

    features = randn(60, 10) @ randn(10, 10, seed=1) + 5
    theirs = PCA(min(components, 10), whiten=True).fit_transform(features.double().numpy())
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    found = whitened(features, components)
    assert found.shape == theirs.shape
    # directions have no sign, products of rows have
    np.testing.assert_allclose(found @ found.T, theirs @ theirs.T, atol=1e-4)


def test_whitening_leaves_out_directions_that_are_not_there():
    flat = torch.cat([randn(40, 4), torch.zeros(40, 3), torch.ones(40, 2)], dim=1)
    assert whitened(flat, 256).shape == (40, 4)
    assert whitened(randn(5, 30), 256).shape == (5, 4)  # five points span four directions
    assert whitened(torch.ones(6, 3), 256).isfinite().all()  # a collapsed encoder


@pytest.mark.parametrize("kinds", [(3, 7), (1, 4), (1, 1), (20, 20)])
def test_nmi_is_that_of_sklearn(kinds):
    from sklearn.metrics import normalized_mutual_info_score

    a, b = (torch.randint(kind, (200,), generator=draws(i)) for i, kind in enumerate(kinds))
    theirs = normalized_mutual_info_score(a, b, average_method="geometric")
    assert nmi(a, b) == pytest.approx(theirs, abs=1e-9)


def test_nmi_does_not_look_at_the_numbers_of_clusters():
    a = torch.randint(9, (300,), generator=draws())
    renamed = torch.randperm(9, generator=draws(1))[a]
    assert not torch.equal(a, renamed) and nmi(a, renamed) == pytest.approx(1)


def kmeans_by_loops(rows, centroids, iterations):
    """Lloyd's algorithm, row by row; of clusters that never become empty."""
    rows, centroids = rows.double().numpy(), centroids.double().numpy().copy()
    nearest = lambda: [int(np.argmin([((x - c) ** 2).sum() for c in centroids])) for x in rows]
    cluster = nearest()
    for _ in range(iterations):
        for g in range(len(centroids)):
            centroids[g] = np.mean([x for x, own in zip(rows, cluster) if own == g], axis=0)
        cluster = nearest()
    return cluster, centroids


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_kmeans_equals_loops(iterations):
    rows, G = torch.nn.functional.normalize(randn(80, 5), dim=1), 4
    start = rows[torch.randperm(80, generator=draws(2))[:G]]
    wanted, means = kmeans_by_loops(rows, start, iterations)
    cluster, centroids, refilled = kmeans_by_distance(rows, G, iterations, draws(2))
    assert refilled == 0 and cluster.tolist() == wanted
    if iterations < 20:  # at its end it stops where nothing changes, one round of means earlier
        np.testing.assert_allclose(centroids, means, atol=1e-5)


def test_empty_clusters_are_refilled():
    # 90 equal rows: nearly all of the first centroids are the same point, and lose all rows to one
    rows = torch.cat([torch.zeros(90, 3), 10 + randn(60, 3)])
    first = torch.randperm(150, generator=draws(5))[:12]
    assert (first < 90).sum() > 4
    cluster, _, refilled = kmeans_by_distance(rows, 12, 20, draws(5))
    assert refilled > 0
    size = cluster.bincount(minlength=12)
    assert (size[cluster[0]] >= 90).all() and len(cluster[:90].unique()) == 1
    assert (size > 0).sum() >= 10, "the others share the rows that differ"


# ---- the first trap: most images in few clusters


@pytest.mark.parametrize("sizes", [(90, 6, 3, 1, 0), (97, 2, 2), (40, 0, 0, 40, 40), (7,)])
def test_draws_are_even_over_clusters(sizes):
    cluster = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    cluster = cluster[torch.randperm(len(cluster), generator=draws(3))]
    drawn = even_draws(cluster, draws())
    M, used = len(cluster), sum(size > 0 for size in sizes)
    assert len(drawn) == M
    counts = cluster[drawn].bincount(minlength=len(sizes)).tolist()
    for size, count in zip(sizes, counts):
        assert count in ((M // used, -(-M // used)) if size else (0,))
    for g, (size, count) in enumerate(zip(sizes, counts)):
        own = drawn[cluster[drawn] == g]
        if count < size:  # without repetition
            assert len(own.unique()) == count
    assert torch.equal(drawn, even_draws(cluster, draws()))
    assert not torch.equal(drawn, even_draws(cluster, draws(1)))


def test_small_clusters_are_drawn_from_evenly():
    cluster = torch.tensor([0] * 996 + [1] * 4)
    total = sum(even_draws(cluster, draws(i)).bincount(minlength=1000) for i in range(20))
    # 20 times 500 draws of four images: 2,500 each, standard deviation 43
    assert (total[996:] - 2500).abs().max() < 5 * 43


def test_a_constant_answer_earns_nothing():
    """Drawn as they come, 95 % of the images in one cluster make a constant answer a good one."""
    cluster = torch.tensor([0] * 950 + [1] * 25 + [2] * 25)
    drawn = cluster[even_draws(cluster, draws())]

    def best_constant(labels):
        share = labels.bincount(minlength=3).double() / len(labels)
        return torch.special.entr(share).sum().item()  # its cross-entropy

    assert best_constant(cluster) < 0.25
    assert best_constant(drawn) == pytest.approx(math.log(3), abs=1e-4)


# ---- the second trap: the numbers of clusters mean nothing from one clustering to the next


def build(M=M, k=4, **options):
    torch.manual_seed(0)
    return ISL(DeepCluster(tiny, k), M, **options)


def features_of(isl, M=M):
    with torch.no_grad():
        return isl.model.encoder_q(images(M, 0))


def sgd(isl, lr=0.5):
    return torch.optim.SGD(isl.parameters(), lr, momentum=0.9)


def train(isl, optimizer, steps, index=None):
    index = torch.arange(M) if index is None else index
    for _ in range(steps):
        loss = isl(images(M, 0)[index], index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_clustering_begins_the_classifier_and_its_momentum_anew():
    isl = build(M, k=6)
    optimizer = sgd(isl)
    features = features_of(isl)
    assert isl.recluster(features, optimizer).nmi is None
    train(isl, optimizer, 60)
    classifier, encoder = isl.model.classifier, isl.model.encoder_q
    learned, old = classifier.weight.clone(), isl.cluster.clone()
    assert all(p in optimizer.state for p in isl.parameters())

    found = isl.recluster(features_of(isl), optimizer)
    assert 0 < found.nmi <= 1 and found.used <= found.clusters == 6
    assert not torch.equal(isl.cluster, old), "other numbers, if not other clusters"
    # the old classifier would be sure of wrong numbers
    stale = nn.functional.linear(encoder(images(M, 0)), learned, classifier.bias)
    assert nn.functional.cross_entropy(stale, isl.cluster).item() > math.log(6) + 0.5
    assert isl(images(M, 0), torch.arange(M)).item() == pytest.approx(math.log(6), abs=0.02)
    assert (
        classifier.weight.std().item() == pytest.approx(0.01, rel=0.2) and not classifier.bias.any()
    )
    assert not any(p in optimizer.state for p in classifier.parameters())
    assert all(p in optimizer.state for p in encoder.parameters())


def test_each_clustering_is_a_function_of_seed_and_epoch():
    isl, same, other = build(), build(), build(seed=1)
    features = features_of(isl)
    for one in (isl, same, other):
        one.recluster(features, sgd(one), epoch=3)
    assert torch.equal(isl.cluster, same.cluster) and torch.equal(isl.order(), same.order())
    assert torch.equal(isl.model.classifier.weight, same.model.classifier.weight)
    assert not torch.equal(isl.model.classifier.weight, other.model.classifier.weight)
    first = isl.order()
    isl.turn += 1  # the next epoch of the same clusters
    assert not torch.equal(isl.order(), first)
    saved = isl.state_dict()
    later = build()
    later.load_state_dict(saved)
    assert torch.equal(later.cluster, isl.cluster) and later.epoch == 3


def test_what_is_reported_beside_labels():
    isl = build()
    labels = torch.arange(M) % 4
    found = isl.recluster(features_of(isl), sgd(isl), labels=labels)
    assert found.nmi_labels == pytest.approx(nmi(isl.cluster, labels))
    assert found.largest == isl.cluster.bincount().max().item() / M
    assert "of 4 clusters hold images" in str(found) and "with the labels" in str(found)
    labels[:] = -1
    assert isl.recluster(features_of(isl), sgd(isl), labels=labels).nmi_labels is None


def test_loss_equals_loops():
    isl = build()
    isl.recluster(features_of(isl), sgd(isl))
    index = torch.tensor([5, 5, 2, 17])  # an image may come twice in a step
    view = images(4, 7)
    total, right = 0, 0
    for image, i in zip(view, index):
        logits = isl.model.classifier(isl.model.encoder_q(image[None]))[0].double()
        total = total - logits[isl.cluster[i]] + torch.log(sum(torch.exp(x) for x in logits))
        right += int(logits.argmax()) == int(isl.cluster[i])
    assert isl(view, index).item() == pytest.approx(total.item() / 4, abs=1e-6)
    assert isl.parts["acc1"].item() == pytest.approx(100 * right / 4)


def of_ranks(rank, world):
    isl = build()
    optimizer = sgd(isl, lr=0.02)  # a rounding that moves an image to another cluster shows at once
    share = slice(rank * M // world, (rank + 1) * M // world)
    for _ in range(2):
        isl.recluster(features_of(isl), optimizer)
        train(isl, optimizer, 2, isl.order()[share])
    weights = torch.cat([p.detach().flatten() for p in isl.parameters()])
    return weights, isl.cluster, isl.order()


def test_two_ranks_are_one():
    alone = of_ranks(0, 1)
    for weights, cluster, order in run_ranks(2, of_ranks):
        assert torch.allclose(weights, alone[0], atol=1e-6)
        assert torch.equal(cluster, alone[1]) and torch.equal(order, alone[2])


def test_bad_input_is_refused_and_changes_nothing():
    isl = build()
    with pytest.raises(BadInput, match="recluster"):
        isl(images(4, 0), torch.arange(4))
    features = features_of(isl)
    with pytest.raises(BadInput, match="expected"):
        isl.recluster(features[:, :3], sgd(isl))
    with pytest.raises(RunFailed, match="diverged"):
        isl.recluster(features * math.nan, sgd(isl))

    def stop():
        raise Interrupted("asked to stop")

    before = isl.model.classifier.weight.clone()
    with pytest.raises(Interrupted):
        isl.recluster(features, sgd(isl), tick=stop)
    assert isl.epoch == -1 and torch.equal(isl.model.classifier.weight, before)
    with pytest.raises(BadInput, match="3 images"):
        ISL(DeepCluster(tiny, 4), 3)
    with pytest.raises(BadInput, match="expected 5"):
        ISL(DeepCluster(tiny, 4), M, clusters=5)


# ---- draws that repeat, in the loaders


def test_every_coming_of_an_image_has_a_number_of_its_own():
    order = torch.tensor([3, 1, 3, 3, 0, 1])
    assert counted(order, 10).tolist() == [3, 1, 13, 23, 0, 11]
    assert torch.equal(counted(torch.arange(5), 5), torch.arange(5))


@pytest.mark.parametrize("kind", ["memory", "files", "photos on the device"])
def test_repeated_images_get_other_views(kind, tmp_path):
    photos(tmp_path, n=8)
    dataset = data.build_dataset("folder", tmp_path)
    if kind == "memory":
        pixels = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=draws())
        dataset = ImagesInMemory(pixels, None, None, "random")
    on_device = kind != "files"
    augmentation = data.get_augmentation(
        "folder", aug_plus=False, size=16, on_device=on_device, crop=(0.08, 1.0)
    )
    options = {"augmentation": augmentation, "batch_size": 4, "seed": 0, "views": 1}
    loader = data.train_loader(dataset, **options)
    order = torch.tensor([2, 5, 2, 2, 7, 5, 2, 0])
    steps = [(view, index) for (view,), index in loader.epoch(1, 0, order)]
    views = torch.cat([view for view, _ in steps])
    index = torch.cat([i for _, i in steps])
    assert torch.equal(index, order)
    twos = views[order == 2]
    assert all(not torch.equal(a, b) for i, a in enumerate(twos) for b in twos[:i])
    # the first coming of an image is that of an epoch without repetition
    plain = {int(i): image for (view,), index in loader.epoch(1) for image, i in zip(view, index)}
    for at, i in enumerate(order.tolist()):
        if i not in order[:at].tolist():
            torch.testing.assert_close(views[at], plain[i])
    # from the middle of the epoch, and by workers, the same
    ((late,), _) = next(iter(loader.epoch(1, 1, order)))
    torch.testing.assert_close(late, views[4:])
    loader.close()
    if kind != "memory":
        loader = data.train_loader(dataset, workers=1, **options)
        parallel = torch.cat([view for (view,), _ in loader.epoch(1, 0, order)])
        torch.testing.assert_close(parallel, views)
        loader.close()


def test_crops_and_flips_alone_keep_the_colours():
    pixels = torch.arange(3, dtype=torch.uint8).mul(80).view(1, 3, 1, 1).expand(64, 3, 16, 16)
    dataset = ImagesInMemory(pixels.contiguous(), None, None, "plain")
    for on_device in (True, False):
        views = data.get_augmentation(
            "cifar10", aug_plus=False, size=16, on_device=on_device, crop=(0.08, 1.0)
        )
        loader = data.train_loader(dataset, augmentation=views, batch_size=64, seed=0, views=1)
        ((view,), _) = next(iter(loader.epoch(0)))
        assert (view - view[:1, :, :1, :1]).abs().max() < 1e-4


# ---- whole runs


def main(*argv):
    return main_moco_isl.main([str(x) for x in argv])


def lines(out, kind):
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 epochs on the digits."""
    out = tmp_path_factory.mktemp("deepcluster") / "run"
    assert main(*DIGITS, *CLUSTERS, "--epochs", 6, "--knn-every", 6, "--out", out) == 0
    return out


def test_a_run_learns_and_says_so(trained):
    found = lines(trained, "clusters")
    assert [line["epoch"] for line in found] == [0, 2, 4]
    assert "nmi" not in found[0] and all(0 < line["nmi"] < 1 for line in found[1:])
    assert all(line["used"] <= line["clusters"] == 50 for line in found)
    epochs = lines(trained, "epoch")
    assert epochs[5]["loss"] < epochs[4]["loss"] < math.log(50)
    untrained = 83
    assert epochs[-1]["knn"] > untrained + 5


def test_the_report_draws_how_alike_clusterings_are(trained, tmp_path):
    (run,) = read_runs([trained])
    with_labels = run.clusterings[1]["nmi_labels"]
    assert 0 < with_labels < 1
    chart = cluster_chart(run)
    assert [line["label"] for line in chart.legend] == [
        "with the clustering before",
        "with the labels",
    ]
    assert report.main([str(trained), "--out", str(tmp_path / "page.html")]) == 0
    assert "Clusterings" in (tmp_path / "page.html").read_text()

    run.clusterings = [line for line in run.clusterings if line["epoch"] == 0]
    assert cluster_chart(run).legend[0]["label"] == "with the labels"  # there was none before
    run.clusterings = []
    assert cluster_chart(run) is None


def test_the_file_is_read_by_all_that_judge_and_export(trained, tmp_path, capsys):
    file = trained / "checkpoint_last.pth.tar"
    content = checkpoint.load(file)
    names = content["state_dict"]
    assert {name.split(".")[1] for name in names} == {"encoder_q", "classifier"}
    assert not any(name.startswith("module.encoder_q.fc") for name in names)
    encoder, info = moco_isl.run.backbone.load_backbone(file)
    assert info["head"] is None and info["feature_dim"] == 128
    with without_head(encoder):
        assert encoder(torch.zeros(1, 3, 16, 16)).shape == (1, 128)

    assert main_knn.main(["--pretrained", str(file), "--dataset", "digits", "-j", "0"]) == 0
    said = capsys.readouterr().out
    assert "backbone" in said and "output" not in said.split("feature ")[-1]
    probe = ["--epochs", "1", "-b", "256", "--out", str(tmp_path / "probe")]
    argv = ["--pretrained", str(file), "--dataset", "digits", "-j", "0", *probe]
    assert main_lincls.main(argv) == 0
    to = ["--to", "safetensors", "--out", str(tmp_path / "backbone.safetensors")]
    assert export.main([str(file), *to]) == 0
    kept = moco_isl.run.backbone.load_backbone(tmp_path / "backbone.safetensors")[0]
    assert torch.equal(kept.conv3[0].weight, encoder.conv3[0].weight)

    from moco_isl.embed import command
    from moco_isl.report import __main__ as report

    page = tmp_path / "page.html"
    assert report.main([str(trained), "--out", str(page)]) == 0 and page.exists()
    rows = tmp_path / "rows.csv"
    where = ["--dataset", "digits", "--out", str(rows), "-j", "0"]
    assert command.main([str(file), *where]) == 0
    assert len(rows.read_text().splitlines()[1].split(",")) >= 128
    study = figures.Judge(["--dataset", "digits"], 20, "cpu")
    assert study.features(file)[0][0].shape == (1437, 128)


def test_init_from_other_files_and_by_other_objectives(trained, tmp_path, capsys):
    small = "--epochs 1 --max-steps 2 -b 32 -j 0 --seed 0 --dataset digits -a digits".split()
    moco = [*small, "--moco-dim", 16, "--moco-k", 64]
    assert main(*moco, "--out", tmp_path / "moco") == 0
    encoder = build_encoder("digits", 10)
    torch.save(encoder.state_dict(), tmp_path / "supervised.pth")
    ours = [*small, "--objective", "deepcluster", "--dc-clusters", 20]
    for i, start in enumerate([tmp_path / "moco", tmp_path / "supervised.pth", trained]):
        capsys.readouterr()
        assert main(*ours, "--init", start, "--lr", 0, "--out", tmp_path / f"to{i}") == 0
        assert "classifier" in capsys.readouterr().out
        state = checkpoint.load(tmp_path / f"to{i}" / "checkpoint_last.pth.tar")["state_dict"]
        theirs = encoder.state_dict()
        if i != 1:
            theirs = checkpoint.load(start / "checkpoint_last.pth.tar")["state_dict"]
        weight = "conv2.0.weight" if i == 1 else "module.encoder_q.conv2.0.weight"
        assert torch.equal(state["module.encoder_q.conv2.0.weight"], theirs[weight])
    none = "it has no head, which is drawn anew"
    other = "its classifier does not fit, and is drawn anew"
    for objective, said in (("queue", none), ("rotnet", other), ("bank", none)):
        capsys.readouterr()
        flags = ["--objective", objective, "--init", trained, "--out", tmp_path / objective]
        assert main(*small, *flags) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("way", ["digits", "photos by workers"])
def test_kill_and_resume_equals_unbroken(way, tmp_path):
    flags = [*DIGITS, "-b", 64, "--lr", 0.1, "--dc-clusters", 30, "--knn-holdout", 1000]
    if way != "digits":
        plain = [x for x in photos(tmp_path / "photos") if x not in ("--mlp", "--aug-plus")]
        workers = ["-j", 1, "--objective", "deepcluster", "--dc-clusters", 5]
        flags = [*plain, *workers]
    flags = [*flags, "--epochs", 4, "--dc-every", 2, "--save-every", 3, "-p", 1]
    run([*flags, "--out", tmp_path / "whole"], tmp_path / "whole.log")
    out, log = tmp_path / "parts", tmp_path / "log"
    # while a file is written in the middle of epoch 1, which trains on the clusters of epoch 0
    kill = (0, Kill("save", 4 if way == "digits" else 3, 0.0))
    assert Running([*flags, "--out", out], log, kill=kill).codes() == [-9]
    run([*flags, "--out", out, "--resume", "auto"], log)
    assert differences(tmp_path / "whole", out) == []


def test_steps_end_anywhere_and_go_on(tmp_path):
    flags = [*DIGITS, "-b", 64, "--dc-clusters", 30, "--knn-holdout", 1000, "--epochs", 2]
    flags += ["--dc-every", 1]
    assert main(*flags, "--out", tmp_path / "whole") == 0
    parts = [*flags, "--resume", "auto", "--out", tmp_path / "parts"]
    # stopped in the pass that takes the features, and in k-means, of the first epoch
    for at, step in ((1, "features"), (9, "k-means")):
        calls = itertools.count(1)
        argv = [str(x) for x in parts]
        assert main_moco_isl.main(argv, stop=lambda: next(calls) >= at) == 75, step
        saved = checkpoint.load(tmp_path / "parts" / "checkpoint_last.pth.tar")["isl"]
        assert saved["total"] == 0 and saved["state"]["clustered"] == -1
    for steps in (3, 7, 9):
        assert main(*parts, "--max-steps", steps) == 0
    assert main(*parts) == 0
    whole, parts = (
        checkpoint.load(tmp_path / name / "checkpoint_last.pth.tar") for name in ("whole", "parts")
    )
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][name])
    assert torch.equal(whole["isl"]["state"]["cluster"], parts["isl"]["state"]["cluster"])
    assert lines(tmp_path / "whole", "epoch")[-1]["loss"] == pytest.approx(
        lines(tmp_path / "parts", "epoch")[-1]["loss"], abs=0
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dc-clusters 5000", "--dc-clusters 5000 is more than the 1,437 images"),
        ("--miner knn", "no use for positives"),
        ("--objective queue --dc-clusters 9", "--dc-clusters belongs to --objective deepcluster"),
        ("--symmetric", "--symmetric belongs to --objective queue"),
        ("--dc-every 0", "at least 1"),
    ],
)
def test_bad_flags_are_refused(flags, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(*DIGITS, "--out", out, *flags.split()) == 2
    assert words in capsys.readouterr().err and not out.exists()


def test_flags_of_a_head_are_said_to_change_nothing():
    flags = [*DIGITS, "--mlp", "--moco-dim", "64", "--moco-t", "0.2", "--isl-hpe", "0"]
    args = pretraining.get_parser().parse_args(flags)
    pretraining.check_args(args)
    (line,) = [note for note in args.notes if "warning" in note]
    for flag in ("--mlp", "--moco-dim", "--moco-t", "--isl-hpe"):
        assert flag in line
    args = pretraining.get_parser().parse_args(DIGITS)
    pretraining.check_args(args)
    assert not args.notes


# ---- in a loop of a user's own


class Pictures(Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def test_a_loop_of_ones_own():
    pixels = data.build_dataset("digits").images[:300].float() / 255
    dataset = Pictures(pixels)
    torch.manual_seed(0)
    base = lambda num_classes: build_encoder("digits", num_classes)
    model = DeepCluster(base, clusters=20)
    isl = ISL(model, num_images=len(dataset))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    views = WithIndex(dataset, lambda x: x + 0.1 * torch.randn_like(x))
    ordered = DataLoader(WithIndex(dataset), batch_size=100)
    losses = []
    for epoch in range(21):
        if epoch % 10 == 0:
            features = extract_features(model.encoder_q, ordered, 300, "cpu", normalize=False)
            assert "clusters hold images" in str(isl.recluster(features, optimizer))
        isl.turn = epoch
        for view, index in DataLoader(views, batch_size=30, sampler=isl.order().tolist()):
            loss = isl(view, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(20), abs=0.05)
    ended = [sum(losses[end - 10 : end]) / 10 for end in (100, 200)]
    assert max(ended) < math.log(20) - 0.1, ended
    assert losses[100] == pytest.approx(math.log(20), abs=0.3), "started anew"
