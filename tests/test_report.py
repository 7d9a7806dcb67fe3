"""The report: its numbers against loops, what a run records, the page in a real browser."""

import base64
import io
import json
import math
import os
import re
import shutil
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import main_moco_isl
from moco_isl import data
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.errors import BadInput
from moco_isl.miners.gan import GANMiner
from moco_isl.mining import record as records
from moco_isl.mining.gan import Discriminator, Generator
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.reach import same_class_found
from moco_isl.mining.rounds import NOTHING_SURE
from moco_isl.mining.triplets import TripletSampler
from moco_isl.report import __main__ as command
from moco_isl.report import figures, grids, outcome, runs, sections, verdict
from moco_isl.report.charts import Line, line_chart
from moco_isl.run import checkpoint
from tests import chromium

DIGITS = (
    "--dataset digits -a digits --mlp --moco-dim 16 --moco-k 256 --moco-t 0.1 --moco-m 0.9 -b 256"
    " -j 0 --seed 1 -p 2".split()
)
MINED = "--epochs 3 --isl-start 1 --isl-every 1 --isl-budget 3 --knn-every 1".split()


def train(out, *flags, stop=None):
    return main_moco_isl.main([*DIGITS, *MINED, "--out", str(out), *map(str, flags)], stop)


def report(*argv):
    return command.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def knn(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "nearest"
    assert train(out, "--miner", "knn") == 0
    return out


@pytest.fixture(scope="module")
def gan(tmp_path_factory):
    """Sixty iterations collapse: its rounds are refused, or find nothing."""
    out = tmp_path_factory.mktemp("runs") / "adversary"
    assert train(out, "--miner", "gan", "--isl-gan-iters", 60, "--isl-gan-min-iters", 60) == 0
    return out


@pytest.fixture(scope="module")
def page_of_one(knn, tmp_path_factory):
    page = tmp_path_factory.mktemp("pages") / "one.html"
    assert report(knn, "--labels", "--out", page) == 0
    return page


@pytest.fixture(scope="module")
def page_of_two(knn, gan, tmp_path_factory):
    page = tmp_path_factory.mktemp("pages") / "two.html"
    assert report(knn, gan, "--labels", "--out", page) == 0
    return page


@pytest.fixture(scope="module")
def digits():
    return data.build_dataset("digits")


@pytest.fixture
def small():
    """Sets, features and labels (one image without) of 40 images in 3 classes."""
    generator = torch.Generator().manual_seed(3)
    features = F.normalize(torch.randn(40, 6, generator=generator), dim=1)
    labels = torch.randint(3, (40,), generator=generator)
    labels[7] = -1
    src, dst = (torch.randint(40, (60,), generator=generator) for _ in range(2))
    sets = PositiveSets.from_edges(40, src, dst, sureness=torch.rand(60, generator=generator))
    return features, labels, sets


# ---------------------------------------------------------------- numbers


def edges(sets):
    return [
        (i, int(sets.members[e]), float(sets.sureness[e]))
        for i in range(sets.num_images)
        for e in range(int(sets.offsets[i]), int(sets.offsets[i + 1]))
    ]


def share(pairs, labels):
    known = [(a, b) for a, b in pairs if labels[a] >= 0 and labels[b] >= 0]
    return sum(int(labels[a]) == int(labels[b]) for a, b in known) / len(known)


def test_precision_curves_are_those_of_loops(small):
    features, labels, sets = small
    record = runs.Record(records.round_record(features, sets, None, sets))
    curves, _, _, unseen = sections.judge(record, labels)
    stored = features.half().float()
    cosine = lambda a, b: float(stored[a] @ stored[b])
    for size in (1, 3, 10):
        own = [
            (a, b)
            for a in range(40)
            for b in sorted((b for b in range(40) if b != a), key=lambda b: -cosine(a, b))[:size]
        ]
        assert curves["own"][size] == pytest.approx(share(own, labels), abs=1e-6)
        ranked = sorted(
            ((a, b) for a in range(40) for b in range(40) if a != b), key=lambda p: -cosine(*p)
        )[: size * 40]
        assert curves["pairs"][size] == pytest.approx(share(ranked, labels), abs=1e-6)
    best = sorted(edges(sets), key=lambda e: -e[2])
    for size in (1, 2):
        assert curves["mined"][size] == pytest.approx(
            share([(a, b) for a, b, _ in best[: size * 40]], labels), abs=1e-6
        )
    assert list(curves["mined"])[-1] == sets.mean_size and 5 not in curves["mined"], (
        "the curve ends where the sets do"
    )
    assert curves["mined"][sets.mean_size] == pytest.approx(
        share([(a, b) for a, b, _ in best], labels), abs=1e-6
    )
    assert unseen == 0.0 and "ranked" not in curves


def test_own_nearest_and_all_pairs_are_the_rounds_baselines():
    from moco_isl.mining.baselines import baselines

    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(300, 16, generator=generator), dim=1).half().float()
    labels = torch.randint(4, (300,), generator=generator)
    empty = PositiveSets.empty(300)
    curves, *_ = sections.judge(
        runs.Record(records.round_record(features, empty, None, empty)), labels
    )
    expected = baselines(features, labels, (1, 5, 50))
    for i, size in enumerate((1, 5, 50)):
        assert curves["own"][size] == pytest.approx(expected["own_nearest"][i], abs=1e-6)
        # half-precision ties
        assert curves["pairs"][size] == pytest.approx(expected["all_pairs"][i], abs=2e-4)
    assert curves["mined"] == {}


def test_precision_by_value_groups_evenly_and_leaves_nan_out():
    value = torch.tensor([0.1, 0.9, 0.5, 0.6, 0.2, float("inf")])
    correct = torch.tensor([0.0, 1.0, 1.0, float("nan"), 1.0, 1.0])
    assert figures.precision_by(value, correct, 2) == [
        pytest.approx((0.15, 0.5, 2)),
        pytest.approx((0.7, 1.0, 2)),
    ]
    assert figures.precision_by(value[:0], correct[:0]) == []


def test_unseen_counts_anchors_whose_list_ends_too_early():
    near = torch.tensor([[0.9, 0.8], [0.3, 0.2]])
    assert figures.unseen(near, 100, 1) == 0.0  # the bound is 0.8: no list ends above it
    assert figures.unseen(near, 100, 1.5) == 0.5  # the bound is 0.3: the first list ends above it
    assert figures.unseen(near, 3, 1.5) == 0.0  # these lists hold everything


def test_sizes_hubs_and_confusion_by_hand():
    # 0: 1 2, 1: 0 2, 2: 0 1, 3: 2
    src, dst = torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.tensor([1, 2, 0, 2, 0, 1, 2])
    sets = PositiveSets.from_edges(5, src, dst, symmetric=False)
    assert figures.share_with_at_least(sets.sizes()) == [1.0, 0.8, 0.6]
    assert figures.hubs(sets, 2) == [(2, 3), (0, 2)]
    labels = torch.tensor([0, 1, 1, 2, -1])
    counts = figures.confusion(sets, labels, 3)
    assert counts.tolist() == [[0, 2, 0], [2, 0, 0], [0, 1, 0]]
    assert figures.worst_pairs(counts) == [(0, 1, 4), (1, 2, 1)]
    assert figures.confusion(sets, torch.tensor([0, -1, 1, 2, 0]), 3).tolist() == [
        [0, 1, 0],
        [1, 0, 0],
        [0, 1, 0],
    ], "no label, no mistake"


# ---------------------------------------------------------------- what is recorded


def test_a_record_gives_back_sets_and_neighbours_in_either_form(small, monkeypatch):
    features, _, sets = small
    kept = records.round_record(features, sets, None, sets)
    monkeypatch.setattr(records, "FEATURE_BYTES", 0)
    lists = records.round_record(features, sets, None, sets)
    assert "features" in kept and "near" not in kept and "near" in lists and "features" not in lists
    assert not any("label" in name for name in [*kept, *lists]) and all(
        isinstance(x, torch.Tensor) for x in kept.values()
    )
    for record in (runs.Record(kept), runs.Record(lists)):
        assert edges(record.sets) == edges(sets)
        assert record.anchors.tolist() == list(range(40))
        near, cosine = record.nearest
        for a in range(40):
            assert a not in near[a] and len(set(near[a].tolist())) == 39
            assert torch.allclose(cosine[a], features[near[a]] @ features[a], atol=2e-3) and bool(
                (cosine[a].diff() <= 1e-3).all()
            )
        expected = torch.tensor([float(features[a] @ features[b]) for a, b, _ in edges(sets)])
        assert torch.allclose(record.cosine, expected, atol=1e-3)


def test_large_sets_are_sampled_the_same_in_every_round():
    anchors = records.sample_anchors(10_000)
    assert len(anchors) == 4096 == len(set(anchors.tolist())) and torch.equal(
        anchors, records.sample_anchors(10_000)
    )
    assert bool((anchors.diff() > 0).all()) and anchors[-1] < 10_000


@torch.no_grad()
def test_ranking_of_the_gan_miner_is_that_of_a_loop(small):
    features, _, sets = small
    miner, empty = GANMiner(iters=10, triplets=2), PositiveSets.empty(40)
    assert miner.ranking(features, empty, torch.arange(3), 5) is None, "no round has been"
    torch.manual_seed(5)
    G, D = Generator(6), Discriminator(6)
    miner.networks = {"G": G.state_dict(), "D": D.state_dict()}
    anchors = torch.tensor([3, 11, 20, 39])
    score, near, cosine = miner.ranking(features, sets, anchors, 5)
    draws = torch.Generator().manual_seed(40)
    sampler = TripletSampler(features, sets, 40, torch.Generator().manual_seed(40), 2)
    windows = sampler.spread(int(torch.randint(40, (1,), generator=draws)))
    u = torch.rand(2, 4, generator=draws)
    for i, anchor in enumerate(anchors.tolist()):
        tries = []
        for t, window in enumerate(windows):
            one = anchors[i : i + 1]
            p = features[sampler.draw_positives(one, u[t, i : i + 1])]
            n = features[sampler.draw_negatives(one, window)]
            proxy = G(features[one], p, n)
            tries.append((float(torch.sigmoid(D(features[one], proxy, n))), proxy[0]))
        best, proxy = max(tries, key=lambda pair: pair[0])
        order = sorted(
            (j for j in range(40) if j != anchor), key=lambda j: -float(features[j] @ proxy)
        )[:5]
        assert float(score[i]) == pytest.approx(best, abs=1e-5) and near[i].tolist() == order
        assert torch.allclose(cosine[i], features[order] @ proxy, atol=1e-5)


def test_precision_of_a_ranking_is_counting():
    labels = torch.tensor([0, 0, 1, 1, -1])
    record = {"ranked": torch.tensor([[1, 2], [2, 0], [3, 4], [4, 2], [0, 1]], dtype=torch.int32)}
    found = records.precision_of_ranking(record, labels, (1, 2))
    # image 4 has no label: neither its own pairs nor those with it count; right are 0-1, 1-0, 2-3,
    # 3-2
    assert found == {"1": pytest.approx(2 / 3), "2": pytest.approx(4 / 6)}
    assert records.precision_of_ranking({}, labels) is None


def test_a_report_writes_what_is_known_and_null_where_a_precision_was_asked_for_in_vain():
    report = records.RoundReport("knn", mean_size=0.0, extra={"share": 0.5})
    figures = report.figures()
    assert figures["share"] == 0.5 and figures["precision_estimate"] is None
    assert not figures.keys() & {"extra", "round", "recall", "memory_gib", "precision"}
    report.baselines = {"sizes": [5.0], "own_nearest": [0.7]}
    assert report.figures()["precision"] is None and "precision 0" not in str(report)
    report.precision = 0.8
    report.precision_own_nearest = 0.7
    assert "; precision 0.800 (own nearest 0.700); " in str(report)


def test_a_run_leaves_a_record_a_round_and_a_resumed_one_the_same(knn, tmp_path, capsys):
    assert sorted(p.name for p in (knn / "rounds").iterdir()) == ["round_0001.pt", "round_0002.pt"]
    lines = [json.loads(line) for line in (knn / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    record = runs.read_run(knn, "nearest").rounds[1].load()
    assert record.sets.num_edges == rounds[1]["edges"] and record.sets.mean_size == pytest.approx(
        rounds[1]["mean_size"]
    )
    steps = iter(range(100))
    flags = ("--miner", "knn")
    # in the last epoch, after both rounds
    assert train(tmp_path / "run", *flags, stop=lambda: next(steps) == 15) == 75
    (tmp_path / "run" / "rounds" / "round_0002.pt").unlink(missing_ok=True)
    steps = iter(range(100))
    shutil.copytree(tmp_path / "run", tmp_path / "earlier")
    again = tmp_path / "earlier"
    early = sorted(again.glob("checkpoint_0*.pth.tar"))[0]  # before any round
    early.replace(again / "checkpoint_last.pth.tar")
    assert train(again, *flags, "--resume", "auto") == 0
    for name in ("round_0001.pt", "round_0002.pt"):
        resumed = checkpoint.load(again / "rounds" / name)
        unbroken = checkpoint.load(knn / "rounds" / name)
        assert resumed.keys() == unbroken.keys() and all(
            torch.equal(resumed[k], unbroken[k]) for k in resumed
        )


# ---------------------------------------------------------------- charts


def test_a_chart_is_whole_svg_that_follows_the_page():
    chart = line_chart(
        "A <title>",
        [
            Line([0, 1, 2], [0.5, None, math.nan], "a & b"),
            Line([0, 1], [1, 2], "second", "c2", "--"),
        ],
        "x",
        "y",
        marks=[(1, True), (0, False)],
    )
    one, other = str(chart.inline(1)), str(chart.inline(2))
    ids = re.findall(r'\bid="([^"]+)"', one)
    assert len(ids) == len(set(ids)) and not set(ids) & set(re.findall(r'\bid="([^"]+)"', other))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', one)) <= set(ids)
    tree = xml.etree.ElementTree.fromstring(
        one.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    )
    assert tree.get("aria-label") == "A <title>"
    assert "var(--c1)" in one and "var(--c2)" in one and "var(--bad)" in one and "#01" not in one
    assert not re.findall(r"https?://(?!www\.w3\.org)", one)
    assert [item["label"] for item in chart.legend] == [
        "a & b",
        "second",
        "round of mining",
        "refused round",
    ]
    assert line_chart("nothing", [Line([0, 1], [None, math.nan])], "x", "y") is None


def test_a_lone_round_lies_at_a_whole_epoch():
    svg = line_chart("t", [Line([3], [50.8])], "epochs", "y").svg
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"2", "3", "4"} <= set(texts) and not {"2.9", "3.1"} & set(texts)


# ---------------------------------------------------------------- verdict


def run_of(last=None, miner="knn", form="meanlog", path="run", knn=None, **more):
    rounds = []
    if last is not None:
        line = {"round": 1, "epoch": 0, "mean_size": 5.0, "coverage": 0.9, "edges": 100} | last
        rounds = [runs.Round(line, Path("none"))]
    epochs = [{"epoch": 0}, {"epoch": 1} | ({} if knn is None else {"knn": knn})]
    flags = {"miner": miner, "isl_loss": form} | more
    return runs.Run(Path(path), Path(path).name, flags, {}, [], epochs, rounds)


def judged(precision, table=None, **more):
    return verdict.judge(run_of({"precision": precision} | more), table=table)


@pytest.mark.parametrize(
    "mined, plain, tone, words",
    [
        (91.26, 90.0, "good", "Mining helped: kNN +1.3 points"),
        (85.0, 90.0, "bad", "Mining hurt: kNN −5.0 points"),
        (89.1, 90.0, "open", "Mining changed no more than chance may: kNN −0.9 points"),
        (89.98, 90.0, "open", "Mining changed no more than chance may: kNN +0.0 points"),
    ],
)
def test_the_outcome_comes_first_and_decides_the_tone(mined, plain, tone, words):
    """Whatever the precision is: wide sets with one in five wrong were worth most."""
    twin = run_of(miner="none", path="plain", knn=plain)
    for precision in (0.5, 0.82, 0.99):
        run = run_of({"precision": precision, "mean_size": 148.2}, knn=mined)
        found = verdict.judge(run, [run, twin])
        assert found.tone == tone
        assert found.text == (
            f"{words} against the same epochs without it (plain)."
            f" {100 * precision:.0f} of 100 mined pairs are right, 148 an image."
        )


def results(folder, rows, epoch="2", **figures):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"epoch": epoch, "dataset": "digits", "protocol": "val", rows: [], **figures}
    (folder / "results.json").write_text(json.dumps(content))


def test_an_outcome_is_read_from_what_the_scripts_wrote(tmp_path):
    knn = lambda k, top1: {"feature": "output", "k": k, "T": 0.1, "top1": top1}
    linear = lambda top1: [
        {"layer": "backbone", "lr": 1, "top1": 99.0, "chosen": False},
        {"layer": "backbone", "lr": 3, "top1": top1, "chosen": True},
    ]
    few = lambda top1: [{"shots": 1, "top1": top1}, {"shots": 5, "top1": 0}]
    mined = run_of({"precision": 0.97}, path=tmp_path / "mined", knn=50.0)
    plain = run_of(miner="none", path=tmp_path / "plain")
    told = lambda: verdict.judge(mined, [mined, plain])
    results(mined.path, "results", results=[knn(200, 12.0), knn(50, 95.0)])
    results(mined.path / "probe", "classifiers", 2, classifiers=linear(76.0), few_labels=few(80.4))
    results(plain.path / "knn", "results", results=[knn(50, 93.9)])
    assert "Mining helped: kNN +1.1 points" in told().text, "of one k, not the logged one"
    results(plain.path / "lin", "classifiers", 2, classifiers=linear(78.5), few_labels=few(61.6))
    assert told().tone == "open"
    assert (
        "helped in one figure and hurt in another: 1-shot +18.8, kNN +1.1, linear −2.5 points"
        in told().text
    )
    for folder in ("knn", "lin"):  # of another epoch
        results(plain.path / folder, "results", "1", results=[knn(50, 20.0)])
    assert told().text.endswith("judge it and plain with python main_knn.py --out RUN/knn.")
    (plain.path / "knn" / "results.json").write_text("{")
    with pytest.raises(BadInput, match="cannot read"):
        told()


def test_a_twin_differs_in_mining_only():
    like = {"arch": "digits", "init": "a", "lr": 0.1, "batch_size": 8, "dataset": "digits"}
    mined = run_of({}, **like, seed=1, knn=91.0)
    plain = run_of(miner="none", path="plain", **like, seed=0, knn=90.0)
    same_seed = run_of(miner="none", path="same", **like, seed=1, knn=90.0)
    assert outcome.find_twin(mined, [mined, plain]) is plain
    assert outcome.find_twin(mined, [mined, plain, same_seed]) is same_seed
    others = [{"init": "b"}, {"lr": 0.2}, {"dataset": "cifar10"}, {"image_size": 64}]
    for other in (*others, {"optimizer": "adamw"}, {"isl_rounds": 4}, {"predictor": 64}):
        assert outcome.find_twin(mined, [run_of(miner="none", **like | other)]) is None
    older = run_of(miner="none", path="older", **like, seed=1, knn=90.0)
    now = run_of({}, **like, seed=1, optimizer="sgd", isl_rounds=1, predictor=0, channels=3)
    assert outcome.find_twin(now, [now, older]) is older, "it was trained with the defaults"
    same_seed.epochs.pop()
    assert outcome.find_twin(mined, [mined, same_seed]) is None
    found = verdict.judge(mined, [mined, same_seed])
    assert found.text.endswith("run the same with --miner none and give both runs.")


def test_without_an_outcome_only_high_precision_lets_expect_a_gain():
    good = judged(0.95)
    assert good.tone == "good" and "95 of 100 mined pairs are right, 5 an image." in good.text
    assert "Expect a gain; to see, run the same with --miner none" in good.text
    for precision in (0.3, 0.55, 0.8, 0.9):
        found = judged(precision)
        assert found.tone == "open" and "Whether mining helps is open" in found.text
    assert "more than 99 of 100" in judged(0.9999).text and "100 of 100" in judged(1.0).text
    assert judged(0.8, {"meanlog": {5.0: 0.7, 50.0: 0.9}}).tone == "good"
    below = judged(0.8, {"meanlog": {1.0: 0.99, 5.0: 0.85}})
    assert below.tone == "bad" and "Expect a loss (break-even measured at 0.85)" in below.text
    assert judged(0.95, {"meanlog": {5.0: 0.94}}).tone == "open"
    assert judged(0.95, {"logsum": {5.0: 0.99}}).tone == "good"


def test_an_estimate_without_labels_decides_nothing():
    assert "plain MoCo" in verdict.judge(run_of(miner="none")).text
    assert "still to come" in verdict.judge(run_of()).text
    for last, words in [
        ({}, "needs labels (--labels)"),
        ({"precision_estimate": 0.97, "precision_at_most": 0.99}, "calls 97 of 100 mined pairs"),
        ({"precision_estimate": None, "precision_at_most": 0.97}, "calls at most 97 of 100"),
        ({"precision_estimate": 0.97, "labels_checked": 300}, "By labelled images 97 of 100"),
    ]:
        found = verdict.judge(run_of(last), table={"meanlog": {5.0: 0.8}})
        assert found.tone == "open" and words in found.text


def test_a_round_that_added_nothing_is_said():
    refused = judged(0.95, accepted=False, why="the GAN collapsed: all on one image")
    assert "5 an image; the last round added nothing: the GAN collapsed." in refused.text
    assert verdict.judge(run_of({"edges": 0, "why": "it collapsed"})).tone == "bad"
    unsure = verdict.judge(run_of({"edges": 0, "why": f"{NOTHING_SURE}: of the surest pairs 40 %"}))
    assert unsure.tone == "open" and f"left no positives: {NOTHING_SURE}." in unsure.text
    research = verdict.judge(run_of({"precision": 0.95}, research_labels=True))
    assert research.text.startswith("Research, labels were used: 95 of 100")


def test_breakeven_files(tmp_path):
    file = tmp_path / "breakeven.json"
    file.write_text('{"meanlog": {"5": 0.84, "20": 0.8}, "logsum": 0.7}')
    table = verdict.read_breakeven(file)
    assert (
        verdict.breakeven_of(table, "meanlog", 8) == 0.84
        and verdict.breakeven_of(table, "meanlog", 15) == 0.8
    )
    assert (
        verdict.breakeven_of(table, "logsum", 15) == 0.7
        and verdict.breakeven_of(table, "other", 15) is None
    )
    for broken in ('{"meanlog": "high"}', "[1]", "{", '{"meanlog": 84}'):
        file.write_text(broken)
        with pytest.raises(BadInput, match="cannot read --breakeven"):
            verdict.read_breakeven(file)


# ---------------------------------------------------------------- grids


def decoded(source):
    kind, text = source.split(";base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def test_anchors_and_rows_of_grids():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 8, 8) * 40
    src, dst, sureness = [0, 1, 3, 0, 2], [1, 2, 4, 5, 3], [0.9, 0.5, 0.8, 0.7, 0.2]
    sets = PositiveSets.from_edges(
        6, torch.tensor(src), torch.tensor(dst), sureness=torch.tensor(sureness)
    )
    features = F.normalize(torch.eye(6) + 0.1, dim=1)
    record = runs.Record(records.round_record(features, sets, None, sets))
    chosen = grids.choose(record, labels, 3)
    assert chosen["surest"] == [0, 3] and chosen["least"][0] == 2 and chosen["mistakes"] == [0, 2]
    assert chosen["random"] == sorted(set(chosen["random"])) and "mistakes" not in grids.choose(
        record, None
    )
    album = grids.Album(ImagesInMemory(images, labels, ["ant", "bee", "cow"], "six"), labels)
    row = grids.positives_row(record, 0, 1, "random", album)
    assert (
        [(c.index, c.wrong) for c in row.cells] == [(1, False), (5, True)]
        and row.size == 2
        and "class cow" in row.cells[1].text
    )
    assert [c.index for c in grids.positives_row(record, 0, 1, "mistakes", album).cells] == [5, 1]
    assert [c.index for c in grids.positives_row(record, 0, 1, "least", album).cells] == [5, 1]
    assert all((decoded(album.source(i)) == 40 * i).all() for i in range(6))
    blind = grids.Album(album.dataset, None).cell(5, 0)
    assert blind.wrong is None and "class" not in blind.text


def test_thumbnails_of_photos_and_of_broken_files(tmp_path):
    wide = Image.new("RGB", (300, 100), (200, 0, 0))
    wide.paste((0, 0, 200), (100, 0, 200, 100))  # the middle square is blue
    wide.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    dataset = data.build_dataset("folder", tmp_path)
    photo = decoded(grids.data_uri(dataset, 0))
    assert photo.shape == (96, 96, 3) and (photo[..., 2] > 150).all()
    assert (decoded(grids.data_uri(dataset, 1)) == 128).all()


def test_rounds_shown_keep_the_first_and_the_last():
    assert grids.pick(range(3), 4) == [0, 1, 2] and grids.pick(range(10), 4) == [0, 3, 6, 9]


# ---------------------------------------------------------------- the page


class Cells(HTMLParser):
    """Grid cells: (grid, run, anchor, round) -> [(index, source, wrong)]; hubs and all other text
    beside.
    """

    def __init__(self, text):
        super().__init__()
        self.rows = {}
        self.column = None
        self.row = None
        self.wrong = False
        self.text = []
        self.images = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if "data-anchor" in a:
            self.column = a["data-grid"], a["data-run"], int(a["data-anchor"])
        if "data-round" in a:
            self.row = *self.column, a["data-round"]
            self.rows[self.row] = []
        if tag == "article":
            self.row = None
        if tag == "span" and "picture" in (a.get("class") or ""):
            self.wrong = "wrong" in a["class"].split()
        if tag == "img":
            self.images.append((int(a["data-index"]), a["src"]))
            if self.row:
                self.rows[self.row].append((int(a["data-index"]), a["src"], self.wrong))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_what_was_recorded(knn, gan, page_of_two, digits):
    text = page_of_two.read_text()
    page = Cells(text)
    titles = {key[0] for key in page.rows}
    assert {"Random images", "The surest pairs", "The least sure pairs"} <= titles
    assert {key[1] for key in page.rows} == {"nearest", "adversary"}
    records = {
        name: {str(r.number): r.load() for r in runs.read_run(path, name).rounds}
        for name, path in (("nearest", knn), ("adversary", gan))
    }
    shown = 0
    for (title, run, anchor, number), cells in page.rows.items():
        for index, source, wrong in cells:
            assert (decoded(source) == digits.images[index].permute(1, 2, 0).numpy()).all()
            assert wrong == (digits.labels[index] != digits.labels[anchor])
        indices = [index for index, *_ in cells]
        if number == "nearest":
            record = records[run]["2"]
            assert indices == record.nearest[0][anchor, :8].tolist()
            continue
        sets = records[run][number].sets
        members = sets.members[sets.offsets[anchor] : sets.offsets[anchor + 1]].tolist()
        if title == "The least sure pairs":
            members = members[::-1]
        if title == "The worst mistakes":
            members = [m for m in members if digits.labels[m] != digits.labels[anchor]] + [
                m for m in members if digits.labels[m] == digits.labels[anchor]
            ]
        assert indices == members[:8]
        shown += len(indices)
    assert shown > 100
    assert all(
        (decoded(source) == digits.images[index].permute(1, 2, 0).numpy()).all()
        for index, source in page.images
    )
    words = " ".join(page.text)
    assert (
        "Comparison" in words
        and "Which classes the wrong pairs join" in words
        and "Refused" in words
    )
    logged = json.loads((knn / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{logged['knn']:.2f}" in words
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "<script" not in text


def test_a_page_without_labels_says_nothing_about_classes(knn, tmp_path):
    lines = [json.loads(line) for line in (knn / "metrics.jsonl").read_text().splitlines()]
    run = tmp_path / "unlabelled"
    shutil.copytree(knn, run)
    drop = ("knn", "precision", "precision_own_nearest", "precision_all_pairs", "baselines")
    drop += ("same_class_found",)
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({k: v for k, v in line.items() if k not in drop}) + "\n" for line in lines
        )
        + '{"kind": "ste'
    )
    assert report(run) == 0
    page = Cells((run / "report.html").read_text())
    words = " ".join(page.text)
    assert (
        "calls at most" in words
        and "Worst hub" in words
        and "Reach of the sets" in words
        and page.rows
        and not any(wrong for cells in page.rows.values() for *_, wrong in cells)
    )
    assert (
        "Precision against" not in words
        and "The worst mistakes" not in words
        and "Same-class pairs found" not in words
        and not re.search(r"class \d", words)
    )
    assert report(run, "--labels", "--out", tmp_path / "with.html") == 0
    sets = runs.read_run(run, "x").rounds[1].load().sets
    labels = data.build_dataset("digits").labels
    words = Cells((tmp_path / "with.html").read_text()).text
    assert "Same-class pairs found" in words
    for figure in (sets.precision(labels), same_class_found(sets, labels)):
        assert f"{100 * figure:.1f}" in " ".join(words), "filled in from the labels"


def test_bad_input_is_one_line_and_exit_code_2(knn, tmp_path, capsys):
    def refused(*argv):
        capsys.readouterr()
        assert report(*argv) == 2
        out = capsys.readouterr()
        assert out.out == "" and out.err.count("\n") == 1 and out.err.startswith("error: ")
        return out.err

    assert "no such run" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "metrics.jsonl is missing" in refused(tmp_path / "empty")
    assert "named twice" in refused(knn, knn)
    assert "is a folder" in refused(knn, "--out", tmp_path)
    (tmp_path / "notes.html").write_text("<!DOCTYPE html><title>moco_isl</title>")
    for theirs in (
        tmp_path / "notes.html",
        knn / "metrics.jsonl",
        knn / "checkpoint_last.pth.tar",
        "/dev/null",
    ):
        before = Path(theirs).read_bytes()
        assert (
            "not written over" in refused(knn, "--out", theirs)
            and Path(theirs).read_bytes() == before
        )
    assert "no such file; expected JSON like" in refused(knn, "--breakeven", tmp_path / "none.json")
    moved = tmp_path / "moved"
    shutil.copytree(knn, moved)
    facts = json.loads((moved / "args.json").read_text())
    facts["args"] |= {"dataset": "folder", "data": str(tmp_path / "gone")}
    (moved / "args.json").write_text(json.dumps(facts))
    assert "--data DIR" in refused(moved, "--labels")
    assert report(moved) == 0 and "no grids of images" in capsys.readouterr().err
    assert "No images" in (moved / "report.html").read_text()
    (tmp_path / "others").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "others" / "a.png")
    assert "mined 1437 images" in refused(moved, "--labels", "--data", tmp_path / "others")
    (moved / "metrics.jsonl").write_text('{"kind": "step"\n{"kind": "step"}\n')
    assert "line 1" in refused(moved)
    (moved / "metrics.jsonl").write_text("")
    assert "logged nothing yet" in refused(moved)
    (tmp_path / "torn").mkdir()
    shutil.copytree(knn, tmp_path / "torn", dirs_exist_ok=True)
    (tmp_path / "torn" / "rounds" / "round_0002.pt").write_bytes(b"torn")
    assert "round_0002.pt" in refused(tmp_path / "torn")


def test_a_run_that_has_just_begun_and_a_plain_one(tmp_path, knn):
    shutil.copytree(knn, tmp_path / "young")
    lines = (knn / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "young" / "metrics.jsonl").write_text(lines[0] + "\n")
    assert report(tmp_path / "young", "--labels") == 0
    words = " ".join(Cells((tmp_path / "young" / "report.html").read_text()).text)
    assert "still to come" in words and "Loss" in words and "Rounds of mining" not in words
    assert report(tmp_path / "young", knn) == 0, "compared with one that has mined"
    first_round = next(line for line in lines if '"round"' in line)
    (tmp_path / "young" / "metrics.jsonl").write_text(first_round + "\n")
    assert report(tmp_path / "young", "--labels") == 0, "ended in its first round"


# ---------------------------------------------------------------- the page in a browser


@pytest.fixture(scope="module")
def browser():
    path = chromium.find()
    if path is None:
        reason = "no Chromium here: apt-get install chromium"
        (
            pytest.fail(reason)
            if os.environ.get("MOCO_ISL_REQUIRE_CHROMIUM") == "1"
            else pytest.skip(reason)
        )
    with chromium.Browser(path) as browser:
        yield browser


def test_the_browser_complains_where_there_is_reason_to(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><img src='missing.png'><script>console.error('one'); setTimeout(() =>"
        " fetch('http://127.0.0.1:9/'), 0); nothing.at.all</script></body>"
    )
    browser.open(page.as_uri())
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    said = " ".join(browser.complaints)
    assert (
        "console.error: ['one']" in said
        and "nothing is not defined" in said
        and "ERR_FILE_NOT_FOUND" in said
        and "request: http" in said
    )


PIXELS = """[...document.querySelectorAll('.row img')].map(image => {
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
    const pixels = [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    const width = image.getBoundingClientRect().width;
    return [+image.dataset.index, width, pixels.filter((_, i) => i % 4 == 0)];
})"""


@pytest.mark.parametrize("name", ["page_of_one", "page_of_two"])
def test_the_page_renders(browser, name, digits, request):
    page, colours = request.getfixturevalue(name), []
    for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
        browser.open(page.as_uri(), width, dark=dark)
        assert browser.complaints == []
        assert (
            browser.evaluate("innerWidth") == width
            and browser.evaluate("document.documentElement.scrollWidth") <= width
        ), "nothing sticks out"
        sizes = browser.evaluate(
            "[...document.querySelectorAll('figure svg')].map(s => {const r ="
            " s.getBoundingClientRect(); return [r.width, r.height]})"
        )
        assert len(sizes) >= 10 and all(250 < w <= width and h > 150 for w, h in sizes)
        text = browser.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        line = browser.evaluate(
            "getComputedStyle(document.querySelector('figure svg path[style*=\"--c1\"]')).stroke"
        )
        colours.append(
            (text, line, browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        )
    assert colours[0] == colours[2] and colours[1] == colours[3]
    assert all(light != dark for light, dark in zip(*colours[:2])), (
        "every colour follows the scheme"
    )
    found = browser.evaluate(PIXELS)
    assert len(found) > 100
    for index, width, red in found:
        assert width >= 30 and red == digits.images[index, 0].flatten().tolist(), (
            "the image the page names is the image it shows"
        )
