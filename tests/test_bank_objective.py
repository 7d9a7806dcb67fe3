"""The paper's own objective, the softmax over all images, Eq. 4 to 8: whole steps against loops,
its memory, its rounds.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_moco_isl
from moco_isl import pretraining
from moco_isl.bank import FeatureBank
from moco_isl.errors import BadInput
from moco_isl.isl import ISL
from moco_isl.losses import bank_loss, local_aggregation
from moco_isl.mining.positives import PositiveSets
from moco_isl.objectives.bank import Instance
from moco_isl.training import reading
from moco_isl.training.engine import learning_rate
from tests.ranks import run_ranks
from tests.test_builder import images, tiny

C, M, T = 8, 40, 0.1
SETS = {0: [3, 9, 31], 1: [2], 4: [5], 7: []}  # and their ways back


def with_norm(num_classes=C):
    """An encoder in which training and evaluation differ."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.BatchNorm1d(16), nn.ReLU())
    net.add_module("fc", nn.Linear(16, num_classes))
    return net


def build(encoder=tiny, sets=True, **options):
    torch.manual_seed(0)
    isl = ISL(Instance(encoder, C, T=T), M, **options)
    if sets:
        pairs = [(i, j) for i, members in SETS.items() for j in members]
        isl.positives = PositiveSets.from_edges(
            M, *torch.tensor(pairs).T, weight=torch.linspace(0.5, 1, len(pairs))
        )
    return isl


def softmax_by_loops(f, bank, absent=()):
    """p_n of Eq. 4 for one feature; absent: rows that do not count, of which p_n is 0."""
    e = [torch.exp(sum(f[c] * v[c] for c in range(C)) / T) for v in bank]
    e = [0 * x if n in absent else x for n, x in enumerate(e)]
    return [x / sum(e) for x in e]


def step_by_loops(isl, f, bank, index, second):
    """Eq. 5 (or the mean of logs) plus 0.5 x Eq. 6 of the batch in float64.

    f: [N, C] with gradient. second: features of the other views.
    """
    total = 0
    offsets, members, weights = (
        x.tolist() for x in (isl.positives.offsets, isl.positives.members, isl.positives.weights)
    )
    for row, i in enumerate(index.tolist()):
        mined = list(
            zip(members[offsets[i] : offsets[i + 1]], weights[offsets[i] : offsets[i + 1]])
        )
        sizes = len(mined)
        start = isl.turn * isl.P % sizes if sizes > isl.P else 0
        pulled = [mined[(start + n) % sizes] for n in range(min(isl.P, sizes))]
        waiting = {j for j, _ in mined} - {j for j, _ in pulled}
        p = softmax_by_loops(f[row], bank, waiting)
        own = 1.0
        if isl.own and pulled:
            own = isl.own / (1 - isl.own) * sum(w for _, w in pulled)
        terms = [(own, p[i])] + [(w, p[j]) for j, w in pulled]
        if isl.form == "logsum":
            total = total - torch.log(sum(w * x for w, x in terms))
        else:
            total = total - sum(w * torch.log(x) for w, x in terms) / sum(w for w, _ in terms)
        hard = (
            bank[min((j for j, _ in mined), key=lambda j: float(bank[i] @ bank[j]))]
            if mined
            else second[row]
        )
        p_h = softmax_by_loops(hard, bank, waiting)
        total = total + isl.hpe * sum(
            h * torch.log(h / x) for n, (h, x) in enumerate(zip(p_h, p)) if n not in waiting
        )
    return total / len(index)


@pytest.mark.parametrize("form", ["logsum", "meanlog"])
@pytest.mark.parametrize("hpe", [0.0, 0.5])
@pytest.mark.parametrize(("P", "own"), [(32, None), (2, None), (2, 0.4)])
def test_step_equals_loops_in_value_and_gradient(form, hpe, P, own):
    """Where P is 2, a set of 3 is pulled at in turns; none of it is a negative in any turn."""
    # sets of 3, 1, 1, none, 1
    isl = build(form=form, hpe=hpe, P=P, own=own)
    isl.turn = 1
    index = torch.tensor([0, 1, 4, 7, 9])
    bank = isl.bank.rows.double()
    loss = isl(images(5, 0), images(5, 1), index)
    loss.backward()

    truth = build()
    f = truth.model.encode(images(5, 0)).double()
    second = truth.model.encode(images(5, 1)).double().detach()
    slow = step_by_loops(isl, f, bank, index, second)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), abs=2e-5)
    assert isl.parts["loss"].item() == pytest.approx(
        isl.parts["isl"].item() + hpe * isl.parts["hpe"].item(), abs=1e-6
    )
    for mine, by_loops in zip(isl.model.parameters(), truth.model.parameters()):
        assert (mine.grad - by_loops.grad).abs().max() < 2e-5 * max(1, by_loops.grad.abs().max())


@pytest.mark.parametrize("hpe", [0.0, 0.5])
def test_the_local_form_takes_whole_sets_and_adds_the_hard_positives_of_eq_6(hpe):
    isl = build(form="local", hpe=hpe, P=1, background=10)
    index = torch.tensor([0, 1, 4, 7, 9])
    bank = isl.bank.rows.clone()
    loss = isl(images(5, 0), images(5, 1), index)
    loss.backward()  # after the bank has moved
    members, weight = isl.positives.lookup(index, 3)
    close = torch.cat([index[:, None], members], dim=1)
    weight = torch.cat([torch.ones(5, 1), weight], dim=1)
    f = build().model.encode(images(5, 0))
    assert isl.parts["isl"].item() == pytest.approx(
        local_aggregation(f, bank, close, weight, T, 10).item(), abs=1e-5
    )
    assert loss.item() == pytest.approx(
        isl.parts["isl"].item() + hpe * isl.parts["hpe"].item(), abs=1e-6
    )
    assert (isl.parts["hpe"].item() > 0) == bool(hpe)


def test_before_its_first_round_the_local_form_is_instance_discrimination():
    local, plain = build(form="local", hpe=0, sets=False), build(hpe=0, sets=False)
    local.active = False
    index = torch.arange(5)
    assert local(images(5, 0), index).item() == plain(images(5, 0), index).item()


def test_the_published_hard_positive_is_the_most_similar_member():
    index = torch.tensor([0])
    paper, published = build(), build(variant="published")
    members, present = paper.whole_sets(index)
    cosine = lambda j: float(paper.bank.rows[0] @ paper.bank.rows[j])
    other = torch.zeros(1, C)
    for isl, choose in ((paper, min), (published, max)):
        found = isl.hard_positive(index, members, present, other)
        assert torch.equal(found[0], isl.bank.rows[choose(SETS[0], key=cosine)])
    with pytest.raises(BadInput, match="--isl-as code: expected paper or published"):
        build(variant="code")


def test_rows_move_by_eq_8_after_the_loss():
    isl, index = build(bank_mix=0.3), torch.tensor([7, 0, 12])
    before = isl.bank.rows.clone()
    isl(images(3, 0), images(3, 1), index)
    f = isl.model.encode(images(3, 0)).detach()
    for row, i in enumerate(index.tolist()):
        v = [0.7 * float(before[i, c]) + 0.3 * float(f[row, c]) for c in range(C)]
        norm = sum(x * x for x in v) ** 0.5
        assert isl.bank.rows[i].tolist() == pytest.approx([x / norm for x in v], abs=1e-6)
    others = [i for i in range(M) if i not in index.tolist()]
    assert torch.equal(isl.bank.rows[others], before[others])


def test_only_images_without_positives_have_their_second_view_encoded():
    """N = 16: whole eighths of the batch, no more; in eval mode, with the averages of batch norm
    left alone.
    """
    isl, seen = build(with_norm), []
    isl.model.encoder_q.register_forward_pre_hook(
        lambda module, inputs: seen.append((len(inputs[0]), module.training))
    )
    everyone = torch.arange(M)
    # 30 to 39 have none
    isl.positives = PositiveSets.from_edges(M, everyone[:30], (everyone[:30] + 1) % 30)
    for index, expected in [
        (torch.arange(14, 30), []),
        (torch.arange(17, 33), [4]),
        (torch.arange(15, 31), [2]),
    ]:
        seen.clear()
        isl(images(16, 0), images(16, 1), index)
        assert seen == [(16, True)] + [(n, False) for n in expected]
    isl.positives = PositiveSets.empty(M)
    before = isl.model.encoder_q[2].running_mean.clone()
    isl.second_views(images(16, 1), torch.ones(16, dtype=torch.bool))
    assert torch.equal(isl.model.encoder_q[2].running_mean, before) and isl.model.encoder_q.training


def test_second_views_land_on_their_images():
    isl = build(with_norm)
    wanted = torch.tensor([False, True, False, False, True, True, False, False])
    found = isl.second_views(images(8, 1), wanted)
    isl.model.eval()
    assert torch.allclose(found[wanted], isl.model.encode(images(8, 1))[wanted], atol=1e-6)


def test_one_view_will_do_without_hard_positives():
    one, two = build(hpe=0), build(hpe=0)
    index = torch.tensor([0, 1, 7])
    assert one(images(3, 0), index).item() == two(images(3, 0), images(3, 1), index).item()
    assert one.parts["hpe"] == 0


# ---- precision and memory ------------------------------------------------------------------------


def large(M, N=16, C=64, S=9):
    """Features near rows of a bank, positives, weights (some padding), hard positives."""
    g = torch.Generator().manual_seed(M)
    bank = F.normalize(torch.randn(M, C, generator=g), dim=1)
    index = torch.randperm(M, generator=g)[:N]
    f, hard = (
        F.normalize(bank[index] + noise * torch.randn(N, C, generator=g), dim=1)
        for noise in (0.1, 0.2)
    )
    weight = (torch.rand(N, S, generator=g) > 0.3).float()
    weight[:, 0] = 1
    positives = torch.cat([index[:, None], torch.randint(M, (N, S - 1), generator=g)], dim=1)
    return f, bank, positives, weight, hard


def exact(f, bank, positives, weight, hard, form):
    """Loss and gradient in float64, all N x M logits at once."""
    f = f.double().requires_grad_()
    log_p = (f @ bank.double().T / 0.07).log_softmax(1)
    log_h = (hard.double() @ bank.double().T / 0.07).log_softmax(1)
    of = log_p.gather(1, positives)
    isl = (
        -(of + weight.double().log()).logsumexp(1)
        if form == "logsum"
        else -(weight * of).sum(1) / weight.sum(1)
    )
    loss = (isl + 0.5 * (log_h.exp() * (log_h - log_p)).sum(1)).mean()
    return loss.detach(), torch.autograd.grad(loss, f)[0]


@pytest.mark.parametrize("form", ["logsum", "meanlog"])
@pytest.mark.parametrize(
    ("dtype", "of_loss", "of_gradient"),
    [(torch.float32, 1e-5, 1e-5), (torch.float16, 1e-3, 3e-3), (torch.bfloat16, 1e-2, 4e-2)],
)
@pytest.mark.parametrize("rows", [500, 100_000])
def test_error_of_a_bank_in_half_precision_is_bounded(form, dtype, of_loss, of_gradient, rows):
    """Against float64 on the rows before they were rounded; the gradient's error by the longest
    gradient of the batch. At 100,000 rows the shares
    are smaller than float16 resolves: they have to be scaled.
    """
    f, bank, positives, weight, hard = large(rows)
    value, gradient = exact(f, bank, positives, weight, hard, form)
    mine = f.clone().requires_grad_()
    isl, hp = bank_loss(mine, bank.to(dtype), positives, weight, 0.07, hard, form)
    (isl + 0.5 * hp).backward()
    assert isl.dtype == mine.grad.dtype == torch.float32
    assert abs((isl + 0.5 * hp).item() - value.item()) < of_loss
    assert (mine.grad - gradient).norm(dim=1).max() < of_gradient * gradient.norm(dim=1).max()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, views of larger ones aside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        fresh = [
            x.numel()
            for x in tree_leaves(out)
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in made
        ]
        self.numel = max([self.numel, *fresh])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_of_the_size_of_the_batch_times_the_bank_is_held(dtype):
    f, bank, positives, weight, hard = large(50_000)
    mine, bank = f.requires_grad_(), bank.to(dtype)
    with Largest() as largest:
        isl, hp = bank_loss(mine, bank, positives, weight, 0.07, hard, chunk=1000)
        (isl + hp).backward()
    assert largest.numel <= 2 * 16 * 1000, "[N, chunk], of features and hard positives"
    with Largest() as largest:
        exact(f.detach(), bank, positives, weight, hard, "logsum")
    assert largest.numel >= 16 * 50_000, "the plain form does hold it: the probe sees that"


def test_chunks_do_not_matter():
    f, bank, positives, weight, hard = large(3000)
    found = [
        bank_loss(f, bank, positives, weight, 0.07, hard, chunk=chunk)
        for chunk in (1, 7, 1000, 5000)
    ]
    for isl, hp in found[1:]:
        assert isl.item() == pytest.approx(
            found[0][0].item(), abs=1e-5
        ) and hp.item() == pytest.approx(found[0][1].item(), abs=1e-5)


def test_autocast_changes_nothing():
    f, bank, positives, weight, hard = large(3000)
    plain = bank_loss(f, bank, positives, weight, 0.07, hard)
    with torch.autocast("cpu", torch.bfloat16):
        inside = bank_loss(f, bank, positives, weight, 0.07, hard)
    assert plain[0].item() == inside[0].item() and plain[1].item() == inside[1].item()


def test_a_bank_in_half_precision_stays_so():
    isl = build(bank_dtype=torch.float16)
    isl(images(3, 0), images(3, 1), torch.tensor([0, 1, 7])).backward()
    assert isl.bank.rows.dtype == torch.float16
    assert torch.allclose(isl.bank.rows.float().norm(dim=1), torch.ones(M), atol=2e-3)
    other = FeatureBank(C, dtype=torch.float16)
    other.load_state_dict(isl.bank.state_dict())
    assert torch.equal(other.rows, isl.bank.rows)
    other.fill(torch.ones(2, C))
    assert other.rows.dtype == torch.float16


# ---- ranks ---------------------------------------------------------------------------------------


def three_steps(rank, world):
    isl = build(hpe=0.5)
    optimizer = torch.optim.SGD(isl.model.parameters(), 0.5)
    share = slice(rank * 6 // world, (rank + 1) * 6 // world)
    losses = []
    for step in range(3):
        index = (torch.arange(6) * 7 + step) % M
        loss = isl(images(6, 2 * step)[share], images(6, 2 * step + 1)[share], index[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, isl.bank.rows


def test_two_ranks_are_one():
    alone, bank = three_steps(0, 1)
    results = run_ranks(2, three_steps)
    assert torch.tensor([losses for losses, _ in results]).mean(0).tolist() == pytest.approx(
        alone, abs=1e-5
    )
    for _, rows in results:
        assert torch.allclose(rows, bank, atol=1e-5)


# ---- rounds --------------------------------------------------------------------------------------


def test_learning_rate_decays_twice_in_each_round():
    rates = [
        learning_rate(e, lr=1.0, epochs=40, cos=False, schedule=[6, 8], rounds=4) for e in range(40)
    ]
    assert rates == pytest.approx(([1.0] * 6 + [0.1] * 2 + [0.01] * 2) * 4)
    assert learning_rate(25, lr=1.0, epochs=40, cos=True, schedule=[], rounds=2) == pytest.approx(
        learning_rate(5, lr=1.0, epochs=20, cos=True, schedule=[])
    )


def flags(line):
    args = main_moco_isl.get_parser().parse_args(["--dataset", "digits", *line.split()])
    pretraining.check_args(args)
    return args


def test_rounds_set_what_hangs_on_them():
    args = flags("--epochs 800 --isl-rounds 4 --miner gan")
    assert (args.schedule, args.isl_start, args.isl_every) == ([120, 160], 200, 200)
    args = flags("--epochs 400 --isl-rounds 4 --schedule 10 20 --isl-start 0")
    assert (args.schedule, args.isl_start, args.isl_every) == ([10, 20], 0, 100)
    assert flags("--epochs 40 --isl-rounds 4").schedule == [6, 8] and flags(
        "--epochs 4 --isl-rounds 2"
    ).schedule == [2, 2]
    args = flags("--epochs 100")
    assert (args.schedule, args.isl_start, args.isl_every) == ([120, 160], 50, 20)
    with pytest.raises(BadInput, match="multiple of 3"):
        flags("--epochs 100 --isl-rounds 3")


SMALL = (
    "--dataset digits -a digits --moco-dim 16 --moco-t 0.1 -b 128 -j 0 --seed 1 --knn-holdout 1000"
    " -p 100 --objective bank".split()
)


def run(out, line):
    assert main_moco_isl.main([*SMALL, "--out", str(out), *line.split()]) == 0
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("miner", ["entropy", "diffusion", "cluster"])
def test_rounds_mine_between_them_and_the_budget_grows(tmp_path, miner):
    share = "--isl-share 0.5" if miner == "entropy" else ""
    lines = run(
        tmp_path,
        f"--epochs 3 --isl-rounds 3 --miner {miner} --isl-budget 1.5 3 {share}",
    )
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [(line["epoch"], line["miner"]) for line in rounds] == [(1, miner), (2, miner)]
    assert [line["mean_size"] for line in rounds] == pytest.approx([1.5, 3.0], abs=0.01)
    assert all(0 < line["precision"] <= 1 for line in rounds)


def test_a_round_may_mine_from_the_bank(tmp_path, monkeypatch):
    """As AND and LA: no pass over the images, and the rows are those that the epoch left."""
    flags = "--epochs 2 --isl-hpe 0 --isl-start 1 --miner knn --isl-budget all --isl-neighbors 3"
    passes = []
    count = lambda reader, *given: passes.append(1) or whole(reader, *given)
    whole = reading.Reader.features
    monkeypatch.setattr(reading.Reader, "features", count)
    for source in ("pass", "bank"):
        passes.clear()
        run(tmp_path / source, f"{flags} --isl-from {source}")
        assert bool(passes) == (source == "pass")
    record = torch.load(tmp_path / "bank" / "rounds" / "round_0001.pt", weights_only=True)
    before = tmp_path / "before"
    run(before, "--epochs 2 --max-steps 4 --save-every 4 --isl-hpe 0 --isl-start 1")
    state = torch.load(before / "checkpoint_last.pth.tar", weights_only=True)["isl"]["state"]
    rows = state["bank"]["rows"]
    near = (rows @ rows.T).fill_diagonal_(-2).topk(3).indices
    edges = {(i, j) for i, row in enumerate(near.tolist()) for j in row}
    offsets, members = record["offsets"], record["members"]
    found = {(i, int(j)) for i in range(len(rows)) for j in members[offsets[i] : offsets[i + 1]]}
    assert found == edges | {(j, i) for i, j in edges}


def test_a_bank_that_starts_from_a_file_holds_its_features(tmp_path):
    run(tmp_path / "a", "--epochs 1 --isl-hpe 0")
    run(
        tmp_path / "b",
        "--epochs 1 --max-steps 1 --lr 0 --isl-bank-mix 1 --isl-half-bank --init"
        f" {tmp_path / 'a' / 'checkpoint_last.pth.tar'}",
    )
    rows = torch.load(tmp_path / "b" / "checkpoint_last.pth.tar", weights_only=True)["isl"][
        "state"
    ]["bank"]["rows"]
    random_rows = build(sets=False).bank.rows
    assert rows.dtype == torch.float16
    mean = lambda x: F.normalize(x.float(), dim=1).mean(0).norm()
    assert mean(rows) > 0.5 > mean(random_rows), (
        "features of an encoder share a direction, random rows do not"
    )
