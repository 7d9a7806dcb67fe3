"""What is told of features and loss without labels: closed forms, loops, and a run's lines."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import main_moco_isl
from moco_isl.builder import MoCo
from moco_isl.encoders import build_encoder, evaluating, head_name, without_head
from moco_isl.evaluation.linear import probe_accuracy
from moco_isl.isl import ISL
from moco_isl.losses import alignment, info_nce
from moco_isl.objectives.bank import Instance
from moco_isl.training import health
from tests.ranks import run_ranks
from tests.runs import DIGITS


def unit(n, C, seed=0):
    return F.normalize(torch.randn(n, C, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---------------------------------------------------------------- features


def test_rank_me_of_features_whose_rank_is_known():
    assert health.rank_me(torch.eye(8)) == pytest.approx(8)
    assert health.rank_me(torch.ones(20, 8)) == pytest.approx(1, abs=1e-4)
    rows = torch.zeros(40, 8)
    rows[:20, 0] = 3.0  # singular values 3 sqrt(20) and sqrt(20): shares 3/4 and 1/4
    rows[20:, 1] = 1.0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert health.rank_me(rows) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert math.isnan(health.rank_me(torch.tensor([[math.nan, 1.0]])))


def test_rank_me_is_that_of_the_singular_values():
    rows = unit(50, 12) * torch.linspace(0.1, 2, 12)
    share = torch.linalg.svdvals(rows.double())
    share = share / share.sum()
    expected = math.exp(-sum(float(p) * math.log(float(p)) for p in share))
    assert health.rank_me(rows) == pytest.approx(expected, rel=1e-6)


def test_the_collapsed_directions_are_counted_in_any_rotation():
    rows = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    rows[:, 7:] *= 1e-4  # 3 of 10 hardly differ
    rotation = torch.linalg.qr(torch.randn(10, 10))[0]
    assert health.collapsed_share(rows) == pytest.approx(0.3)
    assert health.collapsed_share(rows @ rotation + 5) == pytest.approx(0.3)
    assert health.collapsed_share(torch.ones(30, 4)) == 1


def test_uniformity_is_that_of_a_loop_over_pairs():
    rows = unit(23, 6)
    total = 0.0
    for i in range(23):
        for j in range(23):
            if i != j:
                total += math.exp(-2 * float((rows[i] - rows[j]).square().sum()))
    assert health.uniformity(rows) == pytest.approx(math.log(total / (23 * 22)), abs=1e-5)
    assert health.uniformity(torch.eye(16)) == pytest.approx(-4)  # all at a distance of sqrt 2
    assert health.uniformity(unit(1, 6).expand(9, 6)) == pytest.approx(0, abs=1e-5)


def test_alignment_is_the_mean_squared_distance_of_two_views():
    q, k = unit(9, 5), unit(9, 5, seed=1)
    assert alignment(q, k) == pytest.approx(float((q - k).square().sum(1).mean()), abs=1e-6)
    assert alignment(q, q) == pytest.approx(0, abs=1e-6)


def test_of_many_features_evenly_spread_ones_are_looked_at(monkeypatch):
    monkeypatch.setattr(health, "MOST", 10)
    monkeypatch.setattr(health, "PAIRED", 5)
    rows = unit(40, 6)
    found = health.figures_of(rows)
    assert found["rankme"] == pytest.approx(health.rank_me(rows[::4]))
    assert found["uniformity"] == pytest.approx(health.uniformity(rows[::8]))


# ---------------------------------------------------------------- the band of the loss


@pytest.mark.parametrize("K, T, C", [(256, 0.2, 64), (1024, 0.1, 128)])
def test_the_ends_of_the_band_are_losses_of_the_two_extremes(K, T, C):
    band = health.band_of(K, 0, T, C)
    n = 400
    same = unit(1, C).expand(n, C)
    assert band.high == pytest.approx(float(info_nce(same, same, same[:1].expand(K, C), T)[0]))
    q = unit(n, C)  # the views of an image are equal, images lie evenly on the sphere
    loss = float(info_nce(q, q, unit(K, C, seed=1), T)[0])
    assert band.low == pytest.approx(loss, rel=0.06)
    assert band.place(band.low) == 0 and band.place(band.high) == pytest.approx(1)


@pytest.mark.parametrize("copies", [1, 2, 1.5])
def test_an_image_s_own_keys_in_the_queue_raise_the_low_end(copies):
    C, K, T, M = 128, 512, 0.1, 4000
    q = unit(M, C)
    n = 200
    losses = []
    for i in range(n):  # image i has `copies` keys in the queue, on average
        own = math.ceil(copies) if i % 2 else math.floor(copies)
        others = unit(K - own, C, seed=i + 5)
        queue = torch.cat([q[i : i + 1].expand(own, C), others])
        losses.append(float(info_nce(q[i : i + 1], q[i : i + 1], queue, T)[0]))
    low = health.band_of(K, copies, T, C).low
    assert low == pytest.approx(sum(losses) / n, rel=0.03)
    assert low > health.band_of(K, 0, T, C).low


def test_a_word_is_said_where_the_loss_leaves_the_band():
    assert health.word_of(0.5, 1000, 10) == ""
    assert health.word_of(0.99, 40, 10) == ""  # it has risen, and may fall yet
    assert "no lower than that of an encoder that tells" in health.word_of(0.99, 1000, 10)
    assert "no lower than that of an encoder that tells" in health.word_of(1.3, 1000, 10)
    assert "batch norm may give images away" in health.word_of(0.05, 10, 10)
    assert health.word_of(0.05, 9, 10) == health.word_of(math.nan, 100, 10) == ""


def test_features_that_are_alike_and_stay_so_are_named():
    assert "all features are alike (mean cosine 0.999)" in health.alike(0.999, 0.999)
    assert health.alike(0.999, 0.98) != "" and health.alike(0.9, 0.9) == ""
    assert health.alike(0.992, 0.999) == ""  # they part
    assert health.alike(None, math.inf) == ""


# ---------------------------------------------------------------- objectives


def test_the_queue_s_features_are_the_keys_that_steps_have_written():
    encoder = lambda num_classes: build_encoder("digits", num_classes)
    isl = ISL(MoCo(encoder, dim=8, K=32, mlp=True), num_images=50)
    assert isl.recent_features().shape == (0, 8) and isl.negatives() is None  # it is active
    isl.active = False
    assert isl.negatives() == (32, 32 / 50)
    images = torch.randn(2, 10, 3, 16, 16)
    isl(*images, torch.arange(10))
    assert torch.equal(isl.recent_features(), isl.model.queue[:, :10].t())
    assert 0 <= float(isl.parts["alignment"]) <= 4


def test_the_bank_s_features_are_its_rows():
    encoder = lambda num_classes: build_encoder("digits", num_classes)
    isl = ISL(Instance(encoder, dim=8), num_images=20)
    isl.active = False
    before = isl.bank.rows.clone()
    images = torch.randn(2, 10, 3, 16, 16)
    isl(*images, torch.arange(10))
    assert isl.negatives() == (19, 0.0) and isl.recent_features().shape == (20, 8)
    moved = isl.bank.lookup(torch.arange(10))
    assert not torch.equal(moved, before[:10])


def test_without_its_head_an_encoder_returns_its_backbone_and_gets_the_head_back():
    encoder = build_encoder("resnet18w16", 8, "cifar")
    head = encoder.get_submodule(head_name(encoder))
    x = torch.randn(2, 3, 16, 16)
    with evaluating(encoder), torch.no_grad():
        whole = encoder(x)
        with without_head(encoder) as bare:
            backbone = bare(x)
        assert torch.equal(head(backbone), whole) and torch.equal(encoder(x), whole)
    assert encoder.get_submodule(head_name(encoder)) is head


# ---------------------------------------------------------------- the probe


def test_the_probe_is_scikit_learn_s_softmax_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)
    truth = torch.randint(0, 4, (600,), generator=generator)
    x = centres[truth] + 0.9 * torch.randn(600, 6, generator=generator)
    found = probe_accuracy(x[:400], truth[:400], x[400:], truth[400:])
    mean, spread = x[:400].mean(0), x[:400].std(0)
    scaled = ((x - mean) / spread).numpy()
    # C of scikit-learn weighs the sum of the losses against half of the squares
    model = linear_model.LogisticRegression(C=1 / (1e-4 * 400), max_iter=1000)
    model.fit(scaled[:400], truth[:400].numpy())
    expected = 100 * model.score(scaled[400:], truth[400:].numpy())
    assert found == pytest.approx(expected, abs=0.51)  # one of 200 may fall on the other side
    assert 60 < found < 100


def test_the_probe_leaves_out_images_without_a_label():
    x = torch.tensor([[0.0, 1], [0, 1.1], [1, 0], [1.1, 0], [9, 9]])
    labels = torch.tensor([0, 0, 1, 1, -1])
    assert probe_accuracy(x, labels, x, labels) == 100
    assert math.isnan(probe_accuracy(x[4:], labels[4:], x, labels))


# ---------------------------------------------------------------- a run


def lines_of(out, kind):
    found = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_a_run_says_and_logs_what_its_features_look_like(tmp_path, capfd):
    out = tmp_path / "out"
    flags = ["--epochs", "3", "--knn-every", "2", "--probe-every", "3"]
    assert main_moco_isl.main([*DIGITS, *flags, "--out", str(out)]) == 0
    said = capfd.readouterr().out
    epochs = lines_of(out, "epoch")
    for line in epochs:
        assert 1 <= line["rankme"] <= 16 and 0 <= line["collapsed"] <= 1
        assert -4.1 < line["uniformity"] <= 0 and 0 <= line["alignment"] <= 4
        assert line["loss_low"] < line["loss"] < 1.1 * line["loss_high"]
        assert f"=> epoch {line['epoch']}: RankMe {line['rankme']:.1f} of 16" in said
    assert epochs[-1]["loss_high"] == pytest.approx(math.log(129))
    assert [("knn" in line, "probe" in line) for line in epochs] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    assert epochs[2]["probe"] > 50
    assert f"=> epoch 2: linear probe of the backbone {epochs[2]['probe']:.2f} %" in said


def test_a_run_that_learns_nothing_says_so(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(health, "LEAST_STEPS", 5)
    monkeypatch.setattr(health, "PATIENCE", 1)
    flags = ["--epochs", "3", "--lr", "0", "--out", str(tmp_path / "out")]
    assert main_moco_isl.main([*DIGITS, *flags]) == 0
    said = capfd.readouterr().out
    assert "=> warning: epoch 2: after" in said
    assert "the loss is no lower than that of an encoder that tells nothing apart" in said


def test_a_probe_needs_images_held_out(tmp_path, capfd):
    flags = ["--probe-every", "1", "--knn-holdout", "0", "--out", str(tmp_path / "out")]
    assert main_moco_isl.main([*DIGITS, *flags]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "add --knn-holdout" in said
    assert not (tmp_path / "out").exists()


def _epochs_of_ranks(rank, world, out):
    flags = ["--epochs", "1", "--probe-every", "1", "--out", out]
    assert main_moco_isl.main([*DIGITS, *flags]) == 0
    return None


def test_two_ranks_log_one_line_with_figures_of_all_images(tmp_path):
    out = tmp_path / "out"
    run_ranks(2, _epochs_of_ranks, str(out))
    (line,) = lines_of(out, "epoch")
    assert line["rankme"] > 1 and line["probe"] > 50 and line["alignment"] >= 0


def test_rotnet_keeps_no_features_and_says_nothing(tmp_path, capfd):
    flags = ["--objective", "rotnet", "--epochs", "1", "--out", str(tmp_path / "out")]
    base = [x for x in DIGITS if x != "--mlp"]
    assert main_moco_isl.main([*base, *flags]) == 0
    assert "RankMe" not in capfd.readouterr().out
