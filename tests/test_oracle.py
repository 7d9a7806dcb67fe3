"""Positives drawn from labels: as many right ones as asked for, wrong ones from where they should
be, equal on ranks, and said everywhere.
"""

import contextlib
import io
import json

import pytest
import torch
import torch.nn.functional as F

from moco_isl.errors import BadInput
from moco_isl.miners.oracle import OracleMiner, draw_pairs, nearest_by_label
from moco_isl.mining.positives import PositiveSets
from moco_isl.run import checkpoint
from tests.ranks import run_ranks
from tests.runs import DIGITS, differences
from tests.test_bad_input import ask

M = 300
LABELS = torch.randint(5, (M,), generator=torch.Generator().manual_seed(1))


def rows(seed=0):
    return F.normalize(torch.randn(M, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def mine(miner, features=None, seed=0):
    return miner.mine(
        rows() if features is None else features,
        PositiveSets.empty(M),
        torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize(
    "wrong, right", [("uniform", "uniform"), ("near", "uniform"), ("near", "near")]
)
@pytest.mark.parametrize("size, precision", [(2, 0.95), (5, 0.8), (20, 0.65), (0.5, 1.0), (3, 0.0)])
def test_sets_have_the_size_and_the_precision_that_were_asked_for(size, precision, wrong, right):
    sets = mine(OracleMiner(LABELS, precision, size, wrong, right))
    pairs = round(size * M / 2)
    assert sets.num_edges == 2 * pairs
    assert sets.precision(LABELS) == pytest.approx(round(precision * pairs) / pairs)
    if size >= 2:  # every image has its turn as an anchor
        assert sets.coverage > 0.95


def test_drawn_pairs_are_distinct_and_of_the_kind_asked_for():
    labels = LABELS.clone()
    labels[:40] = -1
    labels[40] = 9  # alone in its class
    for right in (True, False):
        a, b = draw_pairs(labels, right, 1500, torch.Generator().manual_seed(0))
        assert len({frozenset(pair) for pair in zip(a.tolist(), b.tolist())}) == 1500 and bool(
            (a != b).all()
        )
        assert (
            bool(((labels[a] == labels[b]) == right).all())
            and int(torch.minimum(labels[a], labels[b]).min()) >= 0
        )
        assert right != bool((torch.cat([a, b]) == 40).any())


def test_partners_are_drawn_uniformly():
    """Of one class of 4 all 6 pairs, of two classes of 4 all 16 between them: each about equally
    often.
    """
    labels = torch.tensor([0, 1] * 4)
    for right, there in ((True, 12), (False, 16)):
        count = {}
        for seed in range(800):
            a, b = draw_pairs(labels, right, 4, torch.Generator().manual_seed(seed))
            for pair in zip(a.tolist(), b.tolist()):
                count[pair] = count.get(pair, 0) + 1
        expected = 800 * 4 / there
        assert len(count) == there and all(
            abs(n - expected) < 5 * expected**0.5 for n in count.values()
        ), count


@pytest.mark.parametrize("same", [False, True])
def test_neighbours_by_label_equal_loops(monkeypatch, same):
    monkeypatch.setattr("moco_isl.miners.oracle._COLUMNS", 70)
    x, labels = rows(), LABELS.clone()
    labels[5] = -1
    cosine, near = nearest_by_label(x, labels, torch.arange(M), same, 3)
    for i in range(M):
        others = [
            j
            for j in range(M)
            if j != i and (labels[j] == labels[i]) == same and labels[j] >= 0 and labels[i] >= 0
        ]
        best = sorted(others, key=lambda j: -float(x[i] @ x[j]))[:3]
        if i == 5:
            assert cosine[i].max() == -torch.inf
        else:
            assert near[i].tolist() == best and cosine[i].tolist() == pytest.approx(
                [float(x[i] @ x[j]) for j in best], abs=1e-6
            )


@pytest.mark.parametrize("same", [False, True])
def test_near_pairs_are_each_images_nearest_of_their_kind(same):
    sets = mine(OracleMiner(LABELS, 1.0 if same else 0.0, 2.0, "near", "near"))
    _, near = nearest_by_label(rows(), LABELS, torch.arange(M), same, 3)
    first = {frozenset(pair) for pair in zip(range(M), near[:, 0].tolist())}
    second = {frozenset(pair) for pair in zip(range(M), near[:, 1].tolist())}
    found = {frozenset(pair) for pair in zip(sets.sources().tolist(), sets.members.tolist())}
    assert len(found) == M and first <= found and found - first <= second


def test_a_round_draws_anew_and_keeps_nothing():
    miner, x = OracleMiner(LABELS, 0.8, 4), rows()
    first = mine(miner, x, 0)
    second = miner.mine(x, first, torch.Generator().manual_seed(1))
    assert second.num_edges == first.num_edges and not torch.equal(second.members, first.members)
    assert torch.equal(mine(miner, x, 0).members, first.members)


def _on_ranks(rank, world, origin):
    return mine(OracleMiner(LABELS, 0.7, 4, origin, origin)).state_dict()


@pytest.mark.parametrize("origin", ["uniform", "near"])
def test_ranks_draw_what_one_draws(origin):
    alone = _on_ranks(0, 1, origin)
    for sets in run_ranks(2, _on_ranks, origin):
        assert all(torch.equal(sets[key], alone[key]) for key in alone)


def test_what_labels_cannot_give_is_refused():
    for words, make in {
        "expected at least 0 and at most 1": lambda: OracleMiner(LABELS, 1.1),
        "more than 0": lambda: OracleMiner(LABELS, size=0),
        "wrong is 'far': expected uniform or near": lambda: OracleMiner(LABELS, wrong="far"),
        "right is 'far': expected uniform or near": lambda: OracleMiner(LABELS, right="far"),
        "needs 15000 right pairs": lambda: OracleMiner(LABELS, size=100),
        "wrong pairs, and these labels make 0": lambda: OracleMiner(torch.zeros(50).long(), 0.5),
    }.items():
        with pytest.raises(BadInput, match=words):
            make()


# ---- a run ---------------------------------------------------------------------------------------

ORACLE = [
    *DIGITS,
    "--epochs",
    "2",
    "--miner",
    "oracle",
    "--isl-start",
    "0",
    "--isl-every",
    "1",
    "--oracle-precision",
    "0.8",
    "--oracle-size",
    "4",
]


@pytest.mark.parametrize("objective", ["queue", "bank"])
def test_a_run_says_everywhere_that_labels_were_used_and_resumes_exactly(tmp_path, objective):
    flags = [
        *ORACLE,
        "--oracle-wrong",
        "near",
        "--oracle-right",
        "near",
        "--research-labels",
        "--objective",
        objective,
    ]
    code, out, err = ask([*flags, "--out", str(tmp_path / "whole")])
    assert (code, err) == (0, "") and "=> warning: --research-labels" in out
    rounds = [line for line in out.splitlines() if line.startswith("=> oracle: ")]
    assert len(rounds) == 2 and all(
        "LABELS WERE USED (--research-labels), right ones near, wrong ones near" in line
        for line in rounds
    )
    lines = [
        line
        for line in map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "round"
    ]
    assert len(lines) == 2 and all(
        line["labels_used"] and line["precision"] == pytest.approx(0.8, abs=2e-3) for line in lines
    )
    assert json.loads((tmp_path / "whole" / "args.json").read_text())["labels_used"] is True
    content = checkpoint.load(tmp_path / "whole" / "checkpoint_last.pth.tar")
    assert content["args"]["research_labels"] is True and content["isl"]["miner"] == {
        "labels_used": True
    }
    assert all(
        bool(checkpoint.load(path)["labels_used"])
        for path in (tmp_path / "whole" / "rounds").iterdir()
    )
    assert ask([*flags, "--max-steps", "10", "--out", str(tmp_path / "broken")])[0] == 0
    assert ask([*flags, "--resume", "auto", "--out", str(tmp_path / "broken")])[0] == 0
    assert [
        x for x in differences(tmp_path / "whole", tmp_path / "broken") if "max_steps" not in x
    ] == []
    if objective == "queue":
        _, out, _ = ask(
            [
                *DIGITS,
                "--epochs",
                "1",
                "--max-steps",
                "1",
                "--init",
                str(tmp_path / "whole" / "checkpoint_last.pth.tar"),
                "--out",
                str(tmp_path / "child"),
            ]
        )
        assert "labels were used in the training of" in out
        _the_report_says_so(tmp_path / "whole")


def _the_report_says_so(run):
    from moco_isl.report import __main__ as command

    with contextlib.redirect_stdout(io.StringIO()):
        assert command.main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "Research, labels were used: " in text and "<dd>labels were used</dd>" in text


def test_a_run_without_labels_says_nothing_of_them(tmp_path):
    code, out, _ = ask(
        [
            *DIGITS,
            "--epochs",
            "1",
            "--max-steps",
            "1",
            "--miner",
            "knn",
            "--isl-start",
            "0",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert code == 0 and "knn: " in out and "LABELS" not in out
    assert json.loads((tmp_path / "run" / "args.json").read_text())["labels_used"] is False
    assert "labels_used" not in checkpoint.load(tmp_path / "run" / "rounds" / "round_0001.pt")
