"""The approximate index against exact search and loops, and rounds of the main script that search
by it.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

import main_moco_isl
from moco_isl.errors import BadInput, Interrupted
from moco_isl.miners.average import AverageMiner
from moco_isl.miners.cluster import ClusterMiner
from moco_isl.miners.diffusion import DiffusionMiner
from moco_isl.miners.entropy import EntropyMiner
from moco_isl.miners.knn import KNNMiner
from moco_isl.mining.positives import PositiveSets
from moco_isl.ops import ivf
from moco_isl.ops.neighbors import topk
from tests.ranks import run_ranks
from tests.runs import DIGITS, metrics
from tests.test_neighbors import loop_topk, rows

HERE = ivf.installed()
needs_faiss = pytest.mark.skipif(not HERE, reason="faiss is not installed")


def crowds(M: int = 2000, C: int = 16, seed: int = 0) -> torch.Tensor:
    """Unit rows around M / 20 centres."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(M // 20, C, generator=g)
    own = torch.randint(M // 20, (M,), generator=g)
    return F.normalize(centres[own] + 0.5 * torch.randn(M, C, generator=g), dim=1)


def hits(found, expected) -> float:
    """Share of the expected rows found, by loops."""
    count = 0
    for ours, theirs in zip(found.tolist(), expected.tolist()):
        count += sum(row in ours for row in theirs)
    return count / expected.numel()


@needs_faiss
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_lists_are_exact(exclude, dtype):
    bank = rows(1500, 16).to(dtype)
    index = ivf.IVF(bank, recall=1)
    assert index.nprobe == index.lists > 1 and index.recall == 1 and len(index) == 1500
    own = torch.arange(0, 300, 3) if exclude else None
    if exclude:
        own[4] = -1
    queries = bank[:300:3].float()
    cosine, row = topk(queries, index, 7, own)
    expected, scores = loop_topk(queries, bank.float(), 7, own)
    assert torch.equal(row, expected) and cosine.dtype == torch.float32
    assert torch.allclose(cosine, scores.gather(1, expected), atol=1e-6)


@needs_faiss
def test_recall_is_what_loops_count():
    bank = crowds()
    index = ivf.IVF(bank)
    assert ivf.RECALL <= index.recall <= 1 and index.nprobe < index.lists // 2
    some = torch.arange(0, len(bank), 4)
    _, row = topk(bank[some], index, 10, some)
    expected, _ = loop_topk(bank[some], bank, 10, some)
    # of a fourth of all, and of a half of them
    assert hits(row, expected) == pytest.approx(index.recall, abs=0.03)
    assert not (row == some[:, None]).any()


@needs_faiss
def test_cosines_are_exact_and_fall_and_equal_rows_go_by_number():
    bank = rows(100, 8).repeat(10, 1)  # rows i, i + 100, i + 200, ... are the same
    index = ivf.IVF(bank)
    cosine, row = topk(bank[:50], index, 20)
    assert torch.allclose(cosine, torch.einsum("qc,qkc->qk", bank[:50], bank[row]), atol=1e-6)
    assert bool((cosine.diff(dim=1) <= 1e-6).all())
    assert [sorted(x) == x and len({j % 100 for j in x}) == 1 for x in row[:, :10].tolist()] == [
        True
    ] * 50


@needs_faiss
def test_what_the_lists_do_not_hold_is_searched_exactly():
    bank = crowds(800)
    index = ivf.IVF(bank)
    own = torch.arange(40)
    found = index._look(bank[:40], 400, own, None)[1]
    assert bool((found[:, -1] == -1).all()), "or this tests nothing"
    expected, _ = loop_topk(bank[:40], bank, 400, own)
    assert torch.equal(topk(bank[:40], index, 400, own)[1], expected)
    with pytest.raises(ValueError, match="bank of 800"):
        topk(bank[:40], index, 800, own)


@needs_faiss
@pytest.mark.parametrize("M", [1, 2, 9])
def test_a_handful_of_rows(M):
    bank = rows(M)
    _, row = topk(bank, ivf.IVF(bank), 1)
    assert row[:, 0].tolist() == list(range(M))


@needs_faiss
def test_tick_ends_building_and_searching(monkeypatch):
    bank, calls = crowds(), []
    ivf.IVF(bank, lambda: calls.append(None))
    assert len(calls) > ivf.ITERATIONS
    for last in (1, len(calls) // 2, len(calls)):
        left = iter(range(last - 1))

        def tick():
            if next(left, None) is None:
                raise Interrupted("now")

        with pytest.raises(Interrupted):
            ivf.IVF(bank, tick)
        miner, sets = KNNMiner(5, index="ivf"), PositiveSets.empty(len(bank))
        left = iter(range(last - 1))
        with pytest.raises(Interrupted, match="mining was interrupted"):
            miner.mine(bank, sets, torch.Generator(), tick)
    index = ivf.IVF(bank)
    with pytest.raises(Interrupted):
        topk(bank[:5], index, 3, tick=tick)


MINERS = [KNNMiner, AverageMiner, DiffusionMiner, EntropyMiner]


@needs_faiss
@pytest.mark.parametrize("kind", MINERS)
def test_miners_build_an_index_once_a_bank_and_find_nearly_the_same(kind, monkeypatch):
    bank, built, inner = crowds(), [], ivf.IVF
    monkeypatch.setattr(
        "moco_isl.mining.rounds.IVF", lambda *given: built.append(inner(*given)) or built[-1]
    )
    found = {}
    for index in ("exact", "ivf"):
        miner = kind(index=index)
        sets = miner.mine(bank, PositiveSets.empty(len(bank)), torch.Generator().manual_seed(0))
        found[index] = set(zip(sets.sources().tolist(), sets.members.tolist()))
        assert (miner.report.recall is not None) == (index == "ivf")
    assert len(built) == (2 if kind is AverageMiner else 1)
    assert miner.report.recall == min(index.recall for index in built)
    assert len(found["exact"] & found["ivf"]) > 0.85 * len(found["exact"])


def test_an_index_is_refused_where_nothing_is_searched():
    with pytest.raises(BadInput, match="--miner cluster looks for no nearest images"):
        ClusterMiner(index="ivf")
    assert ClusterMiner(index="auto").report.recall is None


def _mined(rank, world, index):
    bank = crowds()
    miner = AverageMiner(k=10, candidates=5, index=index)
    sets = miner.mine(bank, PositiveSets.empty(len(bank)), torch.Generator().manual_seed(rank))
    return sets.offsets, sets.members, miner.report.recall


@needs_faiss
def test_ranks_mine_the_same():
    one, two = run_ranks(2, _mined, "ivf")
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


def test_auto_is_exact_for_small_banks_and_without_faiss(monkeypatch):
    few, many = torch.empty(99_999, 0), torch.empty(100_000, 0)
    monkeypatch.setattr(ivf, "installed", lambda: True)
    assert [ivf.wanted(choice, few) for choice in ivf.CHOICES] == [False, True, False]
    assert [ivf.wanted(choice, many) for choice in ivf.CHOICES] == [False, True, True]
    monkeypatch.setattr(ivf, "installed", lambda: False)
    assert not ivf.wanted("auto", many)
    with pytest.raises(BadInput, match=r"pip install 'moco_isl\[faiss\]'"):
        KNNMiner(5, index="ivf")
    with pytest.raises(BadInput, match="expected exact or ivf or auto"):
        KNNMiner(5, index="hnsw")


# ---- the main script -----------------------------------------------------------------------------


@needs_faiss
@pytest.mark.parametrize("miner", ["knn", "average"])
def test_rounds_of_the_main_script(miner, tmp_path, capsys):
    argv = [
        *DIGITS,
        "--epochs",
        "2",
        "--miner",
        miner,
        "--isl-start",
        "0",
        "--isl-every",
        "1",
    ]
    assert main_moco_isl.main([*argv, "--isl-index", "ivf", "--out", str(tmp_path / "ivf")]) == 0
    said = capsys.readouterr().out
    rounds = [line for line in metrics(tmp_path / "ivf") if line["kind"] == "round"]
    assert len(rounds) == 2
    for line in rounds:
        assert ivf.RECALL <= line["recall"] <= 1
        assert f"recall {line['recall']:.3f} of the approximate search" in said
        assert 0 < line["precision_own_nearest"] <= 1 and line["precision_all_pairs"] is None
        assert "all_pairs" not in line["baselines"]
    assert "all pairs" not in said
    capsys.readouterr()
    other = [
        *argv,
        "--isl-index",
        "exact",
        "--out",
        str(tmp_path / "ivf"),
        "--resume",
        "auto",
        "--epochs",
        "3",
    ]
    assert main_moco_isl.main(other) == 2
    assert "--isl-index was 'ivf' and is now 'exact'" in capsys.readouterr().err


def test_a_large_exact_run_is_told_of_the_index(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ivf.WINS, "cpu", 400)
    argv = [*DIGITS, "--miner", "knn", "--isl-start", "0", "--max-steps", "1"]
    assert main_moco_isl.main([*argv, "--out", str(tmp_path / "large")]) == 0
    assert "437 images are searched exactly" in capsys.readouterr().out
    monkeypatch.setitem(ivf.WINS, "cpu", 438)
    assert main_moco_isl.main([*argv, "--out", str(tmp_path / "small")]) == 0
    assert "searched exactly" not in capsys.readouterr().out


def test_without_faiss_it_is_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ivf, "installed", lambda: False)
    argv = [*DIGITS, "--miner", "knn", "--isl-index", "ivf", "--out", str(tmp_path / "new")]
    assert main_moco_isl.main(argv) == 2
    said = capsys.readouterr().err
    assert "index (ivf) needs the package faiss: pip install 'moco_isl[faiss]'\n" in said
    assert said.count("\n") == 1 and not (tmp_path / "new").exists()


def test_exact_runs_never_import_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    miner = KNNMiner(5)
    miner.mine(crowds(400), PositiveSets.empty(400), torch.Generator())
    assert miner.report.recall is None
