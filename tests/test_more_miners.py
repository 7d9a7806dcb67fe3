"""The miners of the methods that ISL is compared with, each against loops: AND (entropy), PAD
(diffusion), LA (cluster).
"""

import math

import pytest
import torch
import torch.nn.functional as F

from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.miners.average import AverageMiner
from moco_isl.miners.cluster import ClusterMiner, kmeans
from moco_isl.miners.diffusion import DiffusionMiner, diffuse, subgraphs
from moco_isl.miners.entropy import EntropyMiner
from moco_isl.miners.gan import GANMiner
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.oracle import OracleMiner
from moco_isl.mining.groups import Groups
from moco_isl.mining.positives import PositiveSets
from moco_isl.ops.neighbors import topk
from moco_isl.ops.softmax import entropy
from tests.ranks import run_ranks

M, C = 60, 8


def unit(n=M, seed=0):
    return F.normalize(torch.randn(n, C, generator=torch.Generator().manual_seed(seed)), dim=1)


def planted(per_group=10, groups=6, noise=0.05, seed=0):
    """Rows around `groups` orthogonal directions, in order of the groups: their labels are i //
    per_group.
    """
    centres = torch.eye(C)[:groups].repeat_interleave(per_group, 0)
    return F.normalize(centres + noise * unit(len(centres), seed), dim=1), torch.arange(
        groups
    ).repeat_interleave(per_group)


def mine(miner, features, old=None):
    return miner.mine(
        features, old or PositiveSets.empty(len(features)), torch.Generator().manual_seed(0)
    )


def sets_of(positives):
    offsets, members = positives.offsets.tolist(), positives.members.tolist()
    return [set(members[a:b]) for a, b in zip(offsets, offsets[1:])]


def nearest_by_loops(x, i, k):
    cosine = [float(x[i] @ x[j]) for j in range(len(x))]
    return sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosine[j])[:k]


# ---- entropy -------------------------------------------------------------------------------------


def entropies_by_loops(x, T):
    result = []
    for i in range(len(x)):
        e = [math.exp(float(x[i] @ x[j]) / T) for j in range(len(x))]
        result.append(-sum(v / sum(e) * math.log(v / sum(e)) for v in e))
    return result


@pytest.mark.parametrize("chunk", [7, 1000])
def test_entropy_equals_loops(chunk):
    x = unit().double()
    assert torch.allclose(
        entropy(x.float(), x.float(), 0.1, chunk).double(),
        torch.tensor(entropies_by_loops(x, 0.1)).double(),
        atol=1e-4,
    )


def test_entropy_of_equal_rows_is_log_m():
    x = unit(1).expand(M, C)
    assert entropy(x[:3], x, 0.1).tolist() == pytest.approx([math.log(M)] * 3, abs=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_entropy_miner_gives_the_surest_their_nearest_and_more_of_them_each_round(k):
    x = unit(seed=1)
    H = entropies_by_loops(x.double(), 0.2)
    surest = sorted(range(M), key=lambda i: H[i])
    miner = EntropyMiner(k, share=0.4, T=0.2, budget=None, max_share=1.0)
    for n, anchors in [(1, 24), (2, 48), (3, 60), (4, 60)]:
        found = mine(miner, x)
        truth = [set() for _ in range(M)]
        for i in surest[:anchors]:
            for j in nearest_by_loops(x, i, k):
                truth[i].add(j)
        assert sets_of(found) == truth, f"round {n}"
        assert miner.report.extra["share"] == pytest.approx(anchors / M)


def test_entropy_budget_leaves_out_the_least_sure_anchors():
    x = unit(seed=2)
    H = entropies_by_loops(x.double(), 0.2)
    surest = sorted(range(M), key=lambda i: H[i])
    found = mine(EntropyMiner(2, share=1.0, T=0.2, budget=0.5, max_share=1.0), x)
    truth = [set() for _ in range(M)]
    for i in surest[: M // 4]:  # two edges each
        truth[i] = set(nearest_by_loops(x, i, 2))
    assert sets_of(found) == truth and found.num_edges == M / 2


def test_the_sets_of_an_anchor_round_replace_those_before():
    """Its neighbours are no anchors of it, and no pair stays that was not found again."""
    miner = EntropyMiner(1, share=0.5, T=0.2, budget=None, max_share=1.0)
    first = mine(miner, unit(seed=1))
    miner.rounds = 0
    second = mine(miner, unit(seed=2), first)
    miner.rounds = 0
    assert sets_of(second) == sets_of(mine(miner, unit(seed=2)))
    assert miner.report.edges_found == M / 2
    own = sets_of(second)
    assert any(i not in own[j] for i in range(M) for j in own[i])
    assert int(second.in_degree().max()) > 1


def test_a_cap_of_directed_edges_counts_in_how_many_sets_an_image_is():
    x = unit(seed=2)
    H = entropies_by_loops(x.double(), 0.2)
    found = mine(EntropyMiner(4, share=1.0, T=0.2, budget=None, max_share=2 / M), x)
    room = [2] * M
    truth = [set() for _ in range(M)]
    for i in sorted(range(M), key=lambda i: H[i]):
        for j in sorted(nearest_by_loops(x, i, 4)):  # equally sure, so by their number
            if room[j]:
                room[j] -= 1
                truth[i].add(j)
    assert sets_of(found) == truth and int(found.sizes().max()) > 2


def test_entropy_counts_its_rounds_across_a_resume():
    miner, other = EntropyMiner(share=0.25), EntropyMiner(share=0.25)
    mine(miner, unit())
    other.load_state_dict(miner.state_dict())
    mine(other, unit())
    assert other.report.extra["share"] == 0.5


# ---- diffusion -----------------------------------------------------------------------------------


def graph_by_loops(x, k):
    S = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i in range(len(x)):
        for j in nearest_by_loops(x, i, k):
            S[i, j] = max(float(x[i] @ x[j]), 0) / k
    return S


def graph(x, k):
    cosine, near = topk(x, x, k, torch.arange(len(x)))
    return near, cosine.clamp(min=0) / k


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diffusion_equals_powers_of_the_matrix(steps):
    x, k = unit(), 6
    S = graph_by_loops(x.double(), k)
    truth, power = torch.zeros_like(S), torch.eye(M, dtype=torch.float64)
    for t in range(steps):
        power = power @ S
        truth = truth + 0.8**t * power
    truth.fill_diagonal_(0)
    near, sparse = graph(x, k)
    image, value = diffuse(torch.arange(M), near, sparse, steps, 0.8, M + 5)
    found = torch.zeros(M, M, dtype=torch.float64).scatter_add_(1, image, value.double())
    assert torch.allclose(found, truth, atol=1e-6)
    assert bool((value[:, :-1] >= value[:, 1:]).all()), "the highest first"


def test_diffusion_keeps_the_highest():
    near, S = graph(unit(), 6)
    image, value = diffuse(torch.arange(M), near, S, 3, 0.9, M)
    few, best = diffuse(torch.arange(M), near, S, 3, 0.9, 4)
    assert torch.equal(few, image[:, :4]) and torch.equal(best, value[:, :4])


def reachable_by_loops(near, width, nodes):
    """Of each of nodes, those it reaches by pointing at the first `width` of its row in near."""
    found = {}
    for i in nodes:
        seen, stack = {i}, [i]
        while stack:
            for j in near[stack.pop()][:width]:
                if j in nodes and j not in seen:
                    seen.add(j)
                    stack.append(j)
        found[i] = seen
    return found


def subgraphs_by_loops(near, largest):
    """Sets of images that reach each other; those that are too large are taken apart."""
    done, rest = set(), set(range(len(near)))
    for width in range(max(map(len, near)), -1, -1):
        reach = reachable_by_loops(near, width, rest)
        groups = {frozenset(j for j in reach[i] if i in reach[j]) for i in rest}
        small = {group for group in groups if len(group) <= largest}
        done |= small
        rest -= set().union(*small)
    return done


@pytest.mark.parametrize("largest", [2, 7, 30, M])
def test_subgraphs_are_those_whose_images_reach_each_other(largest):
    near = topk(unit(seed=5), unit(seed=5), 4, torch.arange(M))[1]
    found = subgraphs(near, torch.ones_like(near, dtype=torch.bool), largest)
    groups = {frozenset((found == g).nonzero().flatten().tolist()) for g in found.unique()}
    assert groups == subgraphs_by_loops(near.tolist(), largest)
    assert any(1 < len(group) <= largest for group in groups)


def test_padding_points_at_no_image():
    near = torch.tensor([[1], [0], [0]])
    points = torch.tensor([[True], [False], [True]])
    assert subgraphs(near, points, 3).unique().numel() == 3
    points[1] = True
    assert subgraphs(near, points, 3).tolist() == [0, 0, 1], "2 reaches 0, and 0 not 2"


def test_the_sets_of_the_diffusion_are_its_subgraphs():
    x = unit(seed=7)
    near, S = graph(x, 5)
    pointed, F_ = diffuse(torch.arange(M), near, S, 2, 0.9, 5)
    groups = subgraphs_by_loops([row[f > 0].tolist() for row, f in zip(pointed, F_)], 8)
    miner = DiffusionMiner(k=5, steps=2, largest=8, budget=None, max_share=1.0)
    found = sets_of(mine(miner, x))
    for group in groups:
        for i in group:
            assert found[i] == group - {i}
    assert miner.report.extra["largest_subgraph"] == max(map(len, groups)) > 2
    alone = sum(len(g) == 1 for g in groups) / M
    assert miner.report.extra["alone"] == pytest.approx(alone)


def test_a_bridge_of_one_direction_does_not_join_two_groups():
    """The nearest of image 0 is in the other group, where all have nearer ones of their own."""
    x, labels = planted(per_group=8, groups=2, noise=0.3, seed=3)
    x[0] = F.normalize(0.6 * x[0] + 0.8 * x[8], dim=0)
    labels[0] = 1
    found = mine(DiffusionMiner(k=3, steps=2, largest=16, budget=None, max_share=1.0), x)
    assert found.precision(labels) == 1 and found.num_edges > 16


def test_a_subgraph_is_bounded_where_nobody_says_how():
    """Not by --isl-max-share, which PAD has at 1: 5 % of the images, or 4 times the budget."""
    x = unit(400)
    for options, most in (({"budget": "all"}, 20), ({"budget": "all", "max_share": 1.0}, 20)):
        miner = DiffusionMiner(**options)
        assert 2 < int(mine(miner, x).sizes().max()) + 1 <= most
    wide = DiffusionMiner(budget=90.0)
    mine(wide, x)
    assert 20 < wide.report.extra["largest_subgraph"] <= 360


def test_all_pairs_are_all():
    """No cap on an image: only --isl-max-share then bounds in how many sets it is."""
    x = unit(400)
    everything = mine(ClusterMiner(4, 1, budget="all"), x)
    assert everything.num_edges == sum(
        int(n) * (int(n) - 1)
        for n in kmeans(
            x,
            4,
            20,
            torch.Generator().manual_seed(
                int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(0)))
            ),
        )[0].bincount()
    )
    bounded = mine(ClusterMiner(4, 1, budget="all", max_share=0.05), x)
    assert int(bounded.in_degree().max()) == 20


def test_diffusion_without_affinities_says_so():
    # each the other's nearest, at a cosine of -1: no affinity
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    miner = DiffusionMiner(k=1)
    assert mine(miner, x).num_edges == 0
    assert "no two images reach each other" in miner.report.why


# ---- clusters ------------------------------------------------------------------------------------


def test_kmeans_finds_planted_groups():
    x, labels = planted()
    best = max(
        (kmeans(x, 6, 20, torch.Generator().manual_seed(seed)) for seed in range(5)),
        key=lambda found: float((x @ found[1].T).amax(1).sum()),
    )
    together = best[0][:, None] == best[0]
    assert torch.equal(together, labels[:, None] == labels)
    for g in range(6):
        assert torch.allclose(best[1][g], F.normalize(x[best[0] == g].mean(0), dim=0), atol=1e-5)


def test_kmeans_equals_loops():
    x, G = unit(seed=4), 7
    centroids = (
        x[torch.randperm(M, generator=torch.Generator().manual_seed(9))[:G]].double().tolist()
    )
    for _ in range(3):
        assigned = [
            max(range(G), key=lambda g: sum(a * b for a, b in zip(row, centroids[g])))
            for row in x.double().tolist()
        ]
        for g in range(G):
            total = sum(x[i].double() for i in range(M) if assigned[i] == g)
            centroids[g] = (total / total.norm()).tolist()
    found, mine_ = kmeans(x, G, 3, torch.Generator().manual_seed(9))
    assert found.tolist() == assigned
    assert torch.allclose(mine_.double(), torch.tensor(centroids).double(), atol=1e-5)


def test_kmeans_starts_an_empty_cluster_anew_from_the_worst_placed_row():
    # most rows equal: drawn twice, one of two equal centroids stays empty
    x = torch.cat([unit(1).expand(20, C), unit(3, 5)])
    equal = next(
        s
        for s in range(99)
        if (torch.randperm(23, generator=torch.Generator().manual_seed(s))[:3] < 20).sum() >= 2
    )
    cluster, _ = kmeans(x, 3, 20, torch.Generator().manual_seed(equal))
    assert cluster.bincount(minlength=3).min() > 0 and len(cluster[:20].unique()) == 1


@pytest.mark.parametrize("candidates", [6, None])
def test_cluster_miner_equals_loops(candidates):
    x = unit(seed=6)
    miner = ClusterMiner(5, 3, candidates=candidates, budget=None, max_share=1.0)
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(0)))
    cluster = [
        kmeans(x, 5, 20, torch.Generator().manual_seed((seed + h) % 2**63))[0].tolist()
        for h in range(3)
    ]
    truth = [set() for _ in range(M)]
    for i in range(M):
        agree = {j: sum(own[i] == own[j] for own in cluster) for j in range(M) if j != i}
        close = sorted(
            (j for j in agree if agree[j]), key=lambda j: (-agree[j], -float(x[i] @ x[j]))
        )[:candidates]
        for j in close:
            truth[i].add(j), truth[j].add(i)
    assert sets_of(mine(miner, x)) == truth


def test_cluster_miner_takes_what_more_clusterings_agree_on_first():
    x, labels = planted(noise=0.5, seed=8)
    small, large = (mine(ClusterMiner(6, 5, 30, budget=b, max_share=1.0), x) for b in (2.0, 20.0))
    assert small.precision(labels) > large.precision(labels)
    assert small.sureness.min() >= 4.5, "pairs that all five put together come first"


def test_clusters_too_large_to_be_held_end_the_run(monkeypatch):
    monkeypatch.setattr("moco_isl.mining.groups._PAIRS", M)
    with pytest.raises(RunFailed, match="the largest of the groups has 60 images.*isl-clusters"):
        mine(ClusterMiner(1, 1, budget="all"), unit())


def test_groups_and_pieces_of_any_size_have_the_same_others():
    group = torch.randint(5, (3, M), generator=torch.Generator().manual_seed(0))
    images, shared = Groups(group).others(torch.arange(M))
    for i in range(M):
        truth = {j: int((group[:, i] == group[:, j]).sum()) for j in range(M) if j != i}
        truth = {j: n for j, n in truth.items() if n}
        there = shared[i] > 0
        assert dict(zip(images[i][there].tolist(), shared[i][there].tolist())) == truth
    one = Groups(group).others(torch.tensor([7]))
    there = shared[7] > 0
    assert torch.equal(one[0][0], images[7][there]) and torch.equal(one[1][0], shared[7][there])


# ---- all of them ---------------------------------------------------------------------------------

MINERS = {
    "entropy": lambda: EntropyMiner(2, share=0.5, budget=2.0),
    "diffusion": lambda: DiffusionMiner(k=8, steps=2, budget=2.0),
    "cluster": lambda: ClusterMiner(8, 3, budget=2.0),
}


def two_rounds(rank, world, name):
    miner = MINERS[name]()
    rng, positives = torch.Generator().manual_seed(3), PositiveSets.empty(300)
    for seed in (0, 1):
        positives = miner.mine(unit(300, seed), positives, rng)
    return positives.state_dict()


@pytest.mark.parametrize("name", MINERS)
def test_ranks_find_what_one_finds(name):
    alone = two_rounds(0, 1, name)
    for sets in run_ranks(2, two_rounds, name):
        assert all(torch.equal(sets[key], alone[key]) for key in ("offsets", "members"))


def interrupted(rank, world, name):
    def tick():
        if rank == 1:
            raise Interrupted("asked to")

    try:
        MINERS[name]().mine(
            unit(300), PositiveSets.empty(300), torch.Generator().manual_seed(3), tick
        )
    except Interrupted:
        return "interrupted"


@pytest.mark.parametrize("name", MINERS)
def test_a_tick_that_stops_one_rank_stops_all(name):
    assert run_ranks(2, interrupted, name) == ["interrupted"] * 2


@pytest.mark.parametrize("name", MINERS)
def test_on_planted_groups_every_pair_is_right(name):
    x, labels = planted(per_group=20, groups=6, noise=0.2)
    found = mine(MINERS[name](), x)
    assert found.precision(labels) == 1 and found.num_edges > 60


def test_senseless_settings_are_refused():
    for wrong in (
        lambda: EntropyMiner(0),
        lambda: EntropyMiner(share=0.0),
        lambda: EntropyMiner(share=1.5),
        lambda: EntropyMiner(T=0),
        lambda: DiffusionMiner(k=0),
        lambda: DiffusionMiner(decay=0.0),
        lambda: ClusterMiner(clusters=0),
        lambda: ClusterMiner(candidates=0),
        lambda: ClusterMiner(keep=True),
        lambda: DiffusionMiner(largest=1),
    ):
        with pytest.raises(BadInput):
            wrong()


# ---- hardly any images ---------------------------------------------------------------------------

FEW = {
    "knn": lambda k: KNNMiner(k, budget=None, max_share=1),
    "average": lambda k: AverageMiner(k, k, budget=None, max_share=1),
    "entropy": lambda k: EntropyMiner(k, 1.0, budget=None, max_share=1),
    "diffusion": lambda k: DiffusionMiner(k, largest=k + 1, budget=None, max_share=1),
    "cluster": lambda k: ClusterMiner(1, 1, candidates=k, budget=None, max_share=1),
    "gan": lambda k: GANMiner(candidates=k),
}


@pytest.mark.parametrize("name", FEW)
def test_a_single_image_has_no_positives_and_the_round_says_why(name):
    miner, old = FEW[name](20), PositiveSets.empty(1)
    for views in (None, (unit(1), unit(1))):
        sets = miner.mine(unit(1), old, torch.Generator().manual_seed(0), None, views)
        assert sets_of(sets) == [set()] and not miner.report.accepted
        assert "a single image has no others that could be like it" in str(miner.report)


@pytest.mark.parametrize("name", ["knn", "average", "entropy", "diffusion", "cluster"])
@pytest.mark.parametrize("few", [2, 3, 5])
def test_with_as_many_neighbours_as_images_all_others_are_positives(name, few):
    """Of images that are alike; as many neighbours as there are, and more, are all there are."""
    features = F.normalize(unit(few).abs(), dim=1)
    for k in (few - 1, few, 20):
        for views in (None, (features, features)):
            sets = FEW[name](k).mine(
                features, PositiveSets.empty(few), torch.Generator().manual_seed(0), None, views
            )
            assert sets_of(sets) == [{j for j in range(few) if j != i} for i in range(few)]


def test_what_needs_more_images_says_so():
    with pytest.raises(BadInput, match="mine more images"):
        mine(FEW["gan"](20), unit(2))
    with pytest.raises(BadInput, match="ask for smaller sets"):
        OracleMiner(torch.zeros(1, dtype=torch.int64))
