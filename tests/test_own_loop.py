"""A training loop of a user's own around `ISL`: what it may not hand in is refused in a line, and
ranks agree whatever their seeds are.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from moco_isl.builder import MoCo
from moco_isl.encoders import extract_features
from moco_isl.errors import BadInput, RunFailed
from moco_isl.isl import ISL
from moco_isl.loader import WithIndex
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.objectives import base
from moco_isl.objectives.bank import Instance
from moco_isl.run.signals import Stop
from moco_isl.training import engine
from tests.ranks import run_ranks
from tests.test_builder import C, K, M, images, moco, tiny


def around(name, **options):
    return ISL(moco() if name == "queue" else Instance(tiny, C), M, **options)


def memory(isl):
    """All that a step leaves behind, but the networks."""
    state = isl.state_dict()
    tensors = [state["bank"]["rows"], *(state.get("slots") or {}).values()]
    queue = [isl.model.queue, isl.model.queue_ptr] if isl.has_queue else []
    return [x.clone() for x in (*tensors, *queue) if isinstance(x, torch.Tensor)]


WRONG = [
    ("labels", torch.tensor([3, 1, 3, 3]), "image 3 comes 3 times in one step"),
    (
        "an image twice",
        torch.tensor([0, 7, 2, 7]),
        "image 7 comes 2 times in one step: expected each at most once",
    ),
    ("-1", torch.tensor([0, -1, 2, 3]), "index -1 is none of 20 images: expected 0 to 19"),
    ("M", torch.tensor([0, M, 2, 3]), "index 20 is none of 20 images"),
    (
        "real numbers",
        torch.arange(4.0),
        "index of a batch is of type torch.float32: expected an int64 tensor",
    ),
    ("a mask", torch.tensor([True, False, True, True]), "is of type torch.bool"),
    ("a list", [0, 1, 2, 3], "is of type list"),
    ("a column", torch.arange(4)[:, None], r"index of 4 images has shape \[4, 1\]: expected \[4\]"),
    ("too few", torch.arange(3), r"has shape \[3\]: expected \[4\]"),
]


@pytest.mark.parametrize("objective", ["queue", "bank"])
@pytest.mark.parametrize(
    ("index", "said"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_a_wrong_index_is_refused_in_any_step_and_nothing_of_it_stays(objective, index, said):
    isl = around(objective)
    for _ in range(2):
        before = memory(isl)
        with pytest.raises(BadInput, match=said):
            isl(images(4, 0), images(4, 1), index)
        assert all(torch.equal(x, y) for x, y in zip(memory(isl), before))
        isl(images(4, 0), images(4, 1), torch.arange(4))


def test_on_a_gpu_values_are_looked_at_in_the_first_step_alone(monkeypatch):
    """A CPU stands for it here: reading an index back would make the host wait in every step.

    Types and shapes cost nothing.
    """
    monkeypatch.setattr(base, "CPU", torch.device("meta"))
    isl, twice = around("queue"), torch.tensor([0, 7, 2, 7])
    with pytest.raises(BadInput, match="image 7 comes 2 times"):
        isl(images(4, 0), images(4, 1), twice)
    isl(images(4, 0), images(4, 1), torch.arange(4))
    isl(images(4, 0), images(4, 1), twice)
    with pytest.raises(BadInput, match="float32"):
        isl(images(4, 0), images(4, 1), torch.arange(4.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_other_whole_numbers_are_the_same_index(dtype):
    losses = []
    for kind in (dtype, torch.int64):
        isl = around("queue")
        for _ in range(2):
            losses.append(
                isl(images(4, 0), images(4, 1), torch.tensor([5, 1, 0, 9], dtype=kind)).item()
            )
    assert losses[:2] == losses[2:]


class Pictures(Dataset):
    def __init__(self, views=2):
        self.views = views

    def __len__(self):
        return M

    def __getitem__(self, i):
        views = [images(1, self.views * i + view)[0] for view in range(self.views)]
        return views if self.views == 2 else views[0], i % 2


def test_a_part_of_a_data_set_counts_its_own_images():
    """WithIndex around the part counts in it; a part of WithIndex counts in the whole, which is
    refused unless the whole is meant.
    """
    part = [3, 19, 8, 12]
    (im_q, im_k), index = next(iter(DataLoader(Subset(WithIndex(Pictures()), part), batch_size=4)))
    with pytest.raises(BadInput, match=r"index 19 is none of 4 images.*WithIndex\(Subset"):
        ISL(moco(), len(part))(im_q, im_k, index)
    ISL(moco(), M)(im_q, im_k, index)
    loader = DataLoader(WithIndex(Subset(Pictures(), part)), batch_size=4)
    (im_q, im_k), index = next(iter(loader))
    ISL(moco(), len(part))(im_q, im_k, index)
    assert index.tolist() == [0, 1, 2, 3]
    ordered = DataLoader(Subset(WithIndex(Pictures(views=1)), part), batch_size=2)
    with pytest.raises(BadInput, match="index 19 is none of 4 images"):
        extract_features(tiny(), ordered, len(part), "cpu")
    with pytest.raises(BadInput, match="is of type torch.float64"):
        extract_features(tiny(), [(images(2, 0), torch.tensor([0.0, 1.0]).double())], 2, "cpu")


@pytest.mark.parametrize(("n", "symmetric"), [(K + 1, False), (K // 2 + 1, True)])
def test_a_step_that_brings_more_keys_than_the_queue_has_slots_is_refused(n, symmetric):
    keys = n * (2 if symmetric else 1)
    isl = ISL(moco(), 100, symmetric=symmetric)
    with pytest.raises(
        BadInput,
        match=f"a step brings {keys} keys, and the queue has K = 24 slots: use a smaller batch",
    ):
        isl(images(n, 0), images(n, 1), torch.arange(n))
    if not symmetric:
        with pytest.raises(BadInput, match=f"a step brings {keys} keys"):
            moco()(images(n, 0), images(n, 1))
    isl(images(n - 1, 0), images(n - 1, 1), torch.arange(n - 1))


def test_batches_of_another_form_are_refused():
    with pytest.raises(BadInput, match=r"was given 2 arguments: expected isl\(im_q, im_k, index\)"):
        around("queue")(images(4, 0), torch.arange(4))
    with pytest.raises(BadInput, match=r"was given 2 arguments: expected isl\(im_q, im_k, index\)"):
        around("bank")(images(4, 0), torch.arange(4))
    assert around("bank", hpe=0)(images(4, 0), torch.arange(4)).isfinite()
    with pytest.raises(BadInput, match="4 images and 3 second views"):
        around("queue")(images(4, 0), images(3, 1), torch.arange(4))


def test_a_batch_of_no_images_is_refused():
    with pytest.raises(BadInput, match="batch of no images"):
        around("queue")(images(4, 0)[:0], images(4, 1)[:0], torch.arange(0))


@pytest.mark.parametrize("objective", ["queue", "bank"])
def test_first_images_of_nan_are_refused_and_later_ones_show_in_the_loss(objective):
    isl, broken = around(objective), images(4, 0)
    broken[2, 0, 3, 1] = torch.nan
    before = memory(isl)
    for views in ((broken, images(4, 1)), (images(4, 1), broken)):
        with pytest.raises(BadInput, match="images of the first step hold NaN or infinity"):
            isl(*views, torch.arange(4))
    assert all(torch.equal(x, y) for x, y in zip(memory(isl), before))
    isl(images(4, 0), images(4, 1), torch.arange(4))
    assert isl(broken, images(4, 1), torch.arange(4)).isnan()


@pytest.mark.parametrize("miner", [NoMiner, KNNMiner])
def test_features_that_are_not_finite_are_not_mined(miner):
    isl = ISL(moco(), M)
    good = F.normalize(torch.randn(M, C, generator=torch.Generator().manual_seed(0)), dim=1)
    for value, row in ((torch.nan, 7), (torch.inf, 0)):
        bad = good.clone()
        bad[row, 3] = value
        with pytest.raises(
            BadInput, match=f"features of 1 of 20 images hold NaN or infinity, image {row} for one"
        ):
            isl.mine_features(bad, miner())
        with pytest.raises(BadInput, match="second views of 1 of 20 images"):
            isl.mine_features(good, miner(), views=(good, bad))
        with pytest.raises(
            RunFailed, match="features from which round 1 was to be mined hold NaN or infinity"
        ):
            engine.mine_round(isl, miner(), bad, None, 0, Stop(lambda: False))
    for shape in ((M - 1, C), (M,)):
        with pytest.raises(BadInput, match="do not fit positive sets of 20 images"):
            isl.mine_features(torch.ones(shape), miner())
    with pytest.raises(BadInput, match="features of type list"):
        isl.mine_features([[1.0]], miner())
    assert isl.round == 0 and not isl.bank.filled


def test_a_wrapped_model_is_refused_with_what_to_do():
    class Parallel(nn.Module):
        """As DistributedDataParallel and DataParallel name what they wrap."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    for model, name in (
        (Parallel(moco()), "Parallel"),
        (torch.compile(moco()), "OptimizedModule"),
        (torch.compile(Parallel(moco())), "OptimizedModule"),
    ):
        with pytest.raises(
            BadInput,
            match=(
                f"ISL was given a {name} around a MoCo: expected the bare MoCo. ISL wraps it in"
                " DistributedDataParallel itself"
            ),
        ):
            ISL(model, M)
    with pytest.raises(
        BadInput,
        match=(
            "given a torch.nn.modules.linear.Linear: expected a moco_isl.builder.MoCo or a"
            " moco_isl.objectives.bank.Instance"
        ),
    ):
        ISL(nn.Linear(2, 2), M)


@pytest.mark.parametrize("num_images", [0, -1, 2.5, [1, 2], None])
def test_num_images_is_a_number_of_images(num_images):
    with pytest.raises(BadInput, match="expected how many images there are, len.dataset."):
        ISL(moco(), num_images)


@pytest.mark.parametrize(
    "option", [{"P": 0}, {"hpe": -0.5}, {"hpe": float("nan")}, {"bank_mix": 1.5}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(BadInput, match=f"^{next(iter(option))} is .*: expected"):
        ISL(moco(), M, **option)


def test_features_that_the_bank_cannot_hold_are_not_mined():
    """Such as those of the backbone: the bank took them, and the next step ended in a traceback."""
    isl, rows = around("queue"), torch.randn(M, C + 1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(BadInput, match=f"features have {C + 1} numbers an image: expected {C}"):
        isl.mine_features(F.normalize(rows, dim=1), KNNMiner())
    assert not isl.bank.filled and isl.round == 0
    isl.mine_features(F.normalize(rows[:, :C], dim=1), KNNMiner())
    # the bank is full: only neighbours are looked for
    isl.mine_features(F.normalize(rows, dim=1), KNNMiner())


@pytest.mark.parametrize("objective", ["queue", "bank"])
def test_features_that_are_no_unit_rows_are_not_mined(objective):
    """Products of such rows are no cosines: the longest would be everybody's nearest."""
    isl = around(objective)
    rows = F.normalize(torch.randn(M, C, generator=torch.Generator().manual_seed(0)), dim=1)
    rows[3] *= 5
    with pytest.raises(
        BadInput, match=f"features of 1 of {M} images are no unit rows, one has length 5: expected"
    ):
        isl.mine_features(rows, KNNMiner())
    rows[3] = 0  # of an encoder that has died
    isl.mine_features(rows.half(), KNNMiner())


def test_an_unknown_option_is_refused():
    said = r"ISL\(MoCo, ...\) has no option recentre, seeds: expected some of P, .*, variant$"
    with pytest.raises(BadInput, match=said):
        ISL(moco(), M, seeds=1, recentre=True)
    with pytest.raises(BadInput, match=r"ISL\(Instance, ...\) has no option symmetric: expected"):
        around("bank", symmetric=True)


def test_an_unknown_form_is_refused():
    with pytest.raises(BadInput, match="form 'sum' is unknown here: use logsum or meanlog"):
        ISL(moco(), M, form="sum")


# ---- ranks ---------------------------------------------------------------------------------------


def _seeded_by_rank(rank, world, objective):
    torch.manual_seed(rank)
    if objective == "queue":
        model = MoCo(tiny, C, 64, m=0.9, T=0.2)
        isl = ISL(model, 60)
    else:
        model = Instance(tiny, C, T=0.2)
        isl = ISL(model, 60, seed=rank)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)
    for step in range(3):  # 48 keys of two ranks: 16 slots stay as they began
        loss = isl(
            images(8, 10 * step + rank),
            images(8, 100 + 10 * step + rank),
            torch.arange(8) + 16 * step + 8 * rank,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict(), isl.bank.rows, isl.slots.owner if isl.has_queue else None


@pytest.mark.parametrize("objective", ["queue", "bank"])
def test_ranks_of_different_seeds_hold_equal_queues_banks_and_weights(objective):
    (state, *rest), (other, *others) = run_ranks(2, _seeded_by_rank, objective)
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(rest, others))
    if objective == "queue":
        torch.manual_seed(0)
        assert torch.equal(state["queue"][:, 48:], MoCo(tiny, C, 64).queue[:, 48:]), (
            "those of rank 0"
        )


def _wrong_together(rank, world):
    torch.manual_seed(0)
    found = []
    isl = ISL(MoCo(tiny, C, K), M)
    for index in (torch.arange(4), torch.arange(4) + 4 * rank):
        try:
            isl(images(4, rank), images(4, 2 + rank), index)
        except BadInput as error:
            found.append(str(error))
    for attempt in (
        lambda: ISL(MoCo(tiny, C, K), M + rank),
        lambda: isl(images(13, 0), images(13, 1), torch.arange(13)),
    ):
        try:
            attempt()
        except BadInput as error:
            found.append(str(error))
    return found, isl.slots.owner


def test_what_is_wrong_between_ranks_is_said_on_each():
    for found, owner in run_ranks(2, _wrong_together):
        assert len(found) == 3
        assert found[0].startswith("image 0 comes 2 times in one step") and found[1].startswith(
            "num_images is 20, 21 on the ranks"
        )
        assert found[2].startswith("a step brings 26 keys, and the queue has K = 24 slots")
        assert owner[:8].tolist() == list(range(8)) and (owner[8:] == -1).all()
