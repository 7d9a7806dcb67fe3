"""`isl.mine(model, dataset, miner)`: the passes it builds, what it says, and what it refuses.

M images, C feature dimension.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision import transforms

from moco_isl import data
from moco_isl.builder import MoCo
from moco_isl.encoders import build_encoder
from moco_isl.errors import BadInput, RunFailed
from moco_isl.isl import ISL
from moco_isl.loader import TwoCropsTransform, WithIndex
from moco_isl.miners.average import AverageMiner
from moco_isl.miners.gan import GANMiner
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.mining.rounds import RoundMiner
from moco_isl.objectives.bank import Instance
from moco_isl.objectives.rotnet import Rotation
from moco_isl.run.signals import Never
from tests.ranks import run_ranks
from tests.test_builder import C, tiny

M, SIDE = 60, 12
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
quiet = pytest.mark.filterwarnings("ignore:this encoder has taken no step")
pytestmark = quiet


def net(num_classes=C):
    """An encoder of images of SIDE pixels without batch norm, so that two ranks equal one."""
    conv = torch.nn.Conv2d(3, 8, 3, stride=2)
    return torch.nn.Sequential(
        conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(200, num_classes)
    )


def with_norm(num_classes=C):
    return build_encoder("digits", num_classes)


def pixels(n=M):
    """[n, 3, SIDE, SIDE] uint8, of three kinds."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=g)
    noise = torch.randint(-30, 31, (n, 3, SIDE, SIDE), generator=g)
    return (kinds[torch.arange(n) % 3] + noise).clamp(0, 255).to(torch.uint8)


class Pictures(Dataset):
    """PIL images with a label, as torchvision has them; `transform` is applied to the image."""

    def __init__(self, transform=None, n=M, labels=True):
        self.images = [transforms.functional.to_pil_image(x) for x in pixels(n)]
        self.transform = transform
        self.reads = 0
        if labels:
            self.targets = [i % 3 for i in range(n)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.reads += 1
        image = self.images[i]
        image = image if self.transform is None else self.transform(image)
        return (image, self.targets[i]) if hasattr(self, "targets") else image


def around(kind=MoCo, encoder=net, n=M, **options):
    torch.manual_seed(0)
    model = MoCo(encoder, C, 64, 0.9, 0.2) if kind is MoCo else kind(encoder, C)
    return ISL(model, n, **options)


def by_hand(encoder, mean=MEAN, std=STD):
    """Features of the pictures as a user would compute them: [M, C] unit rows."""
    x = (pixels() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        return F.normalize(encoder.eval()(x), dim=1)


@pytest.mark.parametrize("kind", [MoCo, Instance])
def test_it_mines_what_a_pass_by_hand_gives(kind):
    isl, other = around(kind), around(kind)
    found = isl.mine(isl.model, Pictures(), KNNMiner(budget=[2]), batch_size=7)
    expected = other.mine_features(by_hand(other.encoder), KNNMiner(budget=[2]))
    assert torch.equal(isl.positives.members, other.positives.members)
    assert torch.equal(isl.positives.offsets, other.positives.offsets)
    assert isl.round == 1 and found.mean_size == expected.mean_size == 2
    if kind is MoCo:
        assert torch.allclose(isl.bank.rows, by_hand(other.encoder), atol=1e-5)
    labels = torch.arange(M) % 3
    assert found.precision == pytest.approx(isl.positives.precision(labels))
    center = by_hand(other.encoder).mean(0)
    assert found.mean_cosine == pytest.approx(float(center @ center), abs=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_batches_nor_workers_change_what_is_mined(workers):
    one, two = around(), around()
    given = data.ImagesInMemory(pixels(), None, None, "pictures") if workers == 0 else Pictures()
    one.mine(one.model, given, KNNMiner())
    two.mine(two.model, Pictures(), KNNMiner(), batch_size=11, workers=workers)
    assert torch.equal(one.positives.members, two.positives.members)


def test_encoders_that_are_meant():
    """The model means its key encoder; an encoder itself, and another of C outputs, are taken."""
    rows = {}
    for name in ("model", "key", "query", "other", "other MoCo"):
        isl = around()
        with torch.no_grad():
            isl.model.encoder_q[0].weight.mul_(-1)
        torch.manual_seed(5)
        other = MoCo(net, C, 64)
        given = {
            "model": isl.model,
            "key": isl.model.encoder_k,
            "query": isl.model.encoder_q,
            "other": other.encoder_k,
            "other MoCo": other,
        }[name]
        isl.mine(given, Pictures(), KNNMiner())
        rows[name] = isl.bank.rows
        assert given.training and isl.model.training
    assert torch.equal(rows["model"], rows["key"]) and torch.equal(
        rows["other"], rows["other MoCo"]
    )
    different = (rows["model"], rows["query"], rows["other"])
    assert not any(torch.equal(a, b) for a, b in zip(different, different[1:]))


class Sees(RoundMiner):
    """A miner that notes what it is given, and mines by turns."""

    name = "sees"
    uses_views = True

    def find(self, features, positives, seed, tick):
        self.seen = self.views
        return KNNMiner().find(features, positives, seed, tick)


def test_views_are_those_of_the_augmentation_and_come_only_where_they_are_wanted():
    isl, miner, pictures = around(), Sees(), Pictures()
    isl.mine(isl.model, pictures, miner)
    first, second, small = miner.seen
    rows = isl.bank.rows
    assert first.shape == second.shape == rows.shape and len(small) == M
    assert not torch.equal(first, second) and not torch.equal(first, rows)
    # by the draws that a training epoch of this number makes
    views = data.get_augmentation("folder", aug_plus=True, size=SIDE)
    loader = data.train_loader(data.own_images(pictures), augmentation=views, batch_size=M, seed=0)
    ((im_q, im_k), index) = next(iter(loader.epoch(0)))
    with torch.no_grad():
        expected = F.normalize(isl.model.encoder_k.eval()(im_k), dim=1)
    assert torch.allclose(second[index], expected, atol=1e-5)
    for miner, passes in ((KNNMiner(), 1), (AverageMiner(), 1), (AverageMiner(budget="auto"), 3)):
        pictures.reads = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            isl.mine(isl.model, pictures, miner)
        assert M * passes <= pictures.reads < M * passes + 20, miner  # 16 are looked at for a side


def test_the_second_round_draws_other_views():
    isl, miner = around(), Sees()
    seen = []
    for _ in range(2):
        isl.mine(isl.model, Pictures(), miner)
        seen.append(miner.seen.first)
    assert not torch.equal(*seen) and isl.round == 2


# ---- data sets


class Dicts(Dataset):
    def __len__(self):
        return M

    def __getitem__(self, i):
        return {"picture": pixels()[i], "label": i % 3}


@pytest.mark.parametrize(
    "given",
    [
        Pictures(transforms.ToTensor()),
        Pictures(labels=False),
        WithIndex(Pictures()),
        Dicts(),
        Subset(Pictures(n=M + 9), range(M)),
        data.ImagesInMemory(pixels(), torch.arange(M) % 3, ["a", "b", "c"], "mine"),
    ],
    ids=["tensors", "no labels", "WithIndex", "dicts", "Subset", "in memory"],
)
def test_any_data_set_of_these_images_gives_these_sets(given):
    isl, other = around(), around()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = isl.mine(isl.model, given, KNNMiner())
    other.mine_features(by_hand(other.encoder), KNNMiner())
    assert torch.equal(isl.positives.members, other.positives.members)
    unlabelled = isinstance(given, Pictures) and not hasattr(given, "targets")
    assert (found.precision is None) == unlabelled


def test_items_are_read_for_their_labels_once():
    isl, given = around(), Subset(Pictures(), range(M))
    with pytest.warns(UserWarning, match="all 60 items were read for their labels"):
        isl.mine(isl.model, given, KNNMiner())
    given.dataset.reads = 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        isl.mine(isl.model, given, KNNMiner())
    assert given.dataset.reads < 2 * M and not any("items were read" in str(x) for x in said)


def test_the_digits_are_normalised_and_turned_as_a_run_does():
    digits = data.build_dataset("digits")
    isl = around(encoder=with_norm, n=len(digits))
    isl.mine(isl.model, digits, KNNMiner())
    loader = data.eval_loader(
        digits, transform=data.get_eval_transform("digits"), batch_size=len(digits)
    )
    with torch.no_grad():
        expected = F.normalize(isl.model.encoder_k.eval()(next(iter(loader))[0]), dim=1)
    assert torch.allclose(isl.bank.rows, expected, atol=1e-5)
    part, rest = data.holdout(digits, 400, 0)
    assert data.set_of(part) == data.set_of(rest) == "digits"


def test_a_users_own_mean_and_std_and_side_are_kept():
    isl, half = around(), (0.5, 0.5, 0.5)
    isl.mine(isl.model, Pictures(), KNNMiner(), mean=half, std=half)
    assert torch.allclose(isl.bank.rows, by_hand(isl.model.encoder_k, half, half), atol=1e-5)
    isl = around(encoder=with_norm)
    isl.mine(isl.model, Pictures(), KNNMiner(), size=16)
    rows = isl.bank.rows
    isl = around(encoder=with_norm)
    isl.mine(isl.model, Pictures(), KNNMiner())
    assert rows.shape == isl.bank.rows.shape and not torch.allclose(rows, isl.bank.rows, atol=1e-3)


def test_images_of_other_channels_are_measured():
    def grey(num_classes):
        return build_encoder("resnet18w16", num_classes, image_size=SIDE, channels=1)

    values = pixels()[:, :1]
    isl = around(encoder=grey)
    isl.mine(isl.model, data.ImagesInMemory(values, None, None, "grey"), KNNMiner())
    mean, std = (values / 255).mean(), (values / 255).std(correction=0)
    with torch.no_grad():
        rows = F.normalize(isl.model.encoder_k.eval()((values / 255 - mean) / std), dim=1)
    assert torch.allclose(isl.bank.rows, rows, atol=1e-4)


def test_an_image_that_cannot_be_read_is_warned_of(tmp_path):
    for i in range(12):
        Image.new("RGB", (SIDE, SIDE), (20 * i, 9 * i, 5)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "03.png").write_bytes(b"no image")
    isl = around(n=12)
    with pytest.warns(UserWarning, match="1 images cannot be read, .*03.png for one"):
        isl.mine(isl.model, data.build_dataset("folder", tmp_path), KNNMiner())
    assert torch.equal(isl.bank.rows[3], isl.bank.rows[4])


# ---- what it says


def trained(isl):
    """One step, so that the encoder does not look untrained."""
    x = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    isl(x, x.flip(3), torch.arange(8))
    return isl


def said_by(isl, miner, model=None):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = isl.mine(isl.model if model is None else model, Pictures(), miner)
    return found, [str(x.message) for x in said]


UNTRAINED = "this encoder has taken no step"


@pytest.mark.parametrize("encoder", [net, with_norm])
def test_an_untrained_encoder_is_warned_of_and_a_trained_one_is_not(encoder):
    def warned(isl, model=None):
        return any(UNTRAINED in line for line in said_by(isl, KNNMiner(), model)[1])

    isl = around(encoder=encoder)
    assert warned(isl) and warned(isl)
    assert isl.slots.held is None  # not counted for good: weights may still be loaded
    trained(isl)
    assert not warned(isl)
    again = around(encoder=encoder)  # a file of MoCo's: the same weights, and no step here
    again.model.load_state_dict(isl.model.state_dict())
    assert not warned(again)
    fresh = around(encoder=encoder)
    assert not warned(fresh, copy.deepcopy(isl.model.encoder_q))
    assert warned(trained(around(encoder=encoder)), fresh.model) == (encoder is with_norm)


def test_a_collapsed_encoder_is_warned_of():
    isl = trained(around())
    with torch.no_grad():
        isl.model.encoder_k[-1].weight.mul_(1e-4)
        isl.model.encoder_k[-1].bias.fill_(1.0)
    found, said = said_by(isl, KNNMiner())
    assert len(said) == 1 and said[0].startswith("all features are alike (mean cosine 1.000)")
    assert found.mean_cosine > 0.999 and found.precision is not None


class Refuses(RoundMiner):
    name = "refuses"

    def find(self, features, positives, seed, tick):
        return None, "G has collapsed"


def test_a_refused_round_keeps_the_sets_and_is_warned_of():
    isl = trained(around())
    first, said = said_by(isl, KNNMiner(budget=[2]))
    assert said == [] and first.accepted
    members = isl.positives.members.clone()
    found, said = said_by(isl, Refuses())
    line = "the round was refused, and the sets stay as they were: G has collapsed"
    assert said == [f"refuses: {line}"] and not found.accepted
    assert torch.equal(isl.positives.members, members)
    assert str(found).splitlines()[-1] == f"  {line[0].upper()}{line[1:]}."


def test_a_round_that_finds_nothing_sure_is_warned_of():
    isl = trained(around())
    found, said = said_by(isl, AverageMiner(budget="auto"))
    assert len(said) == 1 and said[0].startswith("average: nothing sure enough to add this round")
    assert found.edges == 0 and "0.0 positives an image" in str(found)


def test_the_result_reads_as_plain_lines():
    isl = trained(around())
    found, _ = said_by(isl, KNNMiner(budget=[2]))
    lines = str(found).splitlines()
    assert lines[0] == (
        f"Round 1 by knn: 2.0 positives an image; {100 * found.coverage:.0f} % of 60 images have"
        " any."
    )
    own = 100 * found.precision_own_nearest
    right = f"  Right by the labels: {100 * found.precision:.1f} %"
    assert lines[1] == f"{right} ({own:.1f} % of as many own nearest)."
    assert lines[2].startswith("  120 positives came in and 0 went, in ") and len(lines) == 3
    assert str(said_by(isl, NoMiner())[0]) == "Nothing was mined: this miner finds no positives."
    known = copy.copy(found)
    known.precision = known.precision_own_nearest = None
    known.precision_estimate, known.precision_at_most = 0.87, 0.91
    assert "  Right by the estimate without labels: 87.0 to 91.0 %." in str(known)
    known.labels_checked, known.precision_at_least = 300, 0.8
    assert "  Right by 300 labelled images: 87.0 % (80.0 to 91.0 %)." in str(known)


# ---- what it refuses


class Stream(IterableDataset):
    def __iter__(self):
        yield from Pictures()


CROPS = TwoCropsTransform(transforms.ToTensor())
NORMAL = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
WRONG = {
    "two views": (
        Pictures(CROPS),
        "the data set: item 0 holds 2 views of its image, as TwoCropsTransform makes them:"
        " expected the image alone; give the images without augmentation",
    ),
    "WithIndex of views": (WithIndex(Pictures(CROPS)), "item 0 holds 2 views"),
    "a stream": (Stream(), "the data set is an IterableDataset, a Stream: a stream has no"),
    "normalised": (Pictures(NORMAL), "item 0 is no image: a tensor of torch.float32 from -"),
    "too few": (Pictures(n=M - 1), "the data set holds 59 images, and this ISL counts 60"),
    "none": (Pictures(n=0), "the data set: no images for train; expected one at least"),
    "a path": (3, "the data set is a int: expected a torch Dataset with len"),
}


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)
def test_data_sets_that_cannot_be_mined_are_refused(given, said):
    isl = around()
    with pytest.raises(BadInput) as error:
        isl.mine(isl.model, given, KNNMiner())
    assert str(error.value).startswith(said) or said in str(error.value)
    assert "\n" not in str(error.value) and "--dataset" not in str(error.value)
    assert isl.round == 0 and not isl.bank.filled


def test_a_random_transform_is_warned_of():
    isl = around()
    given = Pictures(transforms.RandomCrop(SIDE, padding=SIDE))
    with pytest.warns(UserWarning, match="item 0 differs from one read to the next"):
        isl.mine(isl.model, given, KNNMiner())


def wrong_models():
    isl = around()
    meta = net().to("meta")
    yield "net", isl, "given a str as model: expected the model that this ISL is around"
    yield net(C + 1), isl, rf"the encoder gives \[9\] for an image: expected \[{C}\]"
    yield torch.nn.Flatten(), isl, r"the encoder gives \[432\] for an image"
    yield tiny(), isl, "the encoder does not take images of 3 channels and 12 pixels"
    yield meta, isl, "the encoder is on meta, and this ISL on cpu: expected both on one device"


@pytest.mark.parametrize("case", range(5))
def test_models_that_cannot_be_mined_from_are_refused(case):
    model, isl, said = list(wrong_models())[case]
    with pytest.raises(BadInput, match=said):
        isl.mine(model, Pictures(), KNNMiner())
    assert isl.round == 0


def test_other_wrong_arguments_are_refused():
    isl, pictures = around(), Pictures()
    for miner, said in (
        (KNNMiner, r"the miner is a class: expected an object, KNNMiner\(\)"),
        ("knn", "the miner is a str: expected one of moco_isl.miners"),
    ):
        with pytest.raises(BadInput, match=said):
            isl.mine(isl.model, pictures, miner)
    for wrong in ({"size": 0}, {"size": 2.5}, {"batch_size": 0}, {"workers": -1}):
        (name,) = wrong
        with pytest.raises(BadInput, match=f"^{name} is .*: expected a whole number of"):
            isl.mine(isl.model, pictures, KNNMiner(), **wrong)
    with pytest.raises(BadInput, match="expected mean and std together, one number a channel"):
        isl.mine(isl.model, pictures, KNNMiner(), mean=(0.5,), std=(0.5,))
    with pytest.raises(BadInput, match="expected mean and std together"):
        isl.mine(isl.model, pictures, KNNMiner(), mean=MEAN)
    rotation = ISL(Rotation(net), M)
    with pytest.raises(BadInput, match="ISL around a Rotation has no use for positives"):
        rotation.mine(rotation.model, pictures, KNNMiner())


def test_features_that_are_not_finite_are_not_mined():
    isl = around()
    with torch.no_grad():
        isl.model.encoder_k[0].weight[0] = torch.nan
    with pytest.raises(RunFailed, match="features from which round 1 was to be mined hold NaN"):
        isl.mine(isl.model, Pictures(), KNNMiner())
    assert isl.round == 0 and not isl.bank.filled


def test_nobody_asks_to_stop():
    with Never() as stop:
        assert not stop.here() and not stop.agreed() and list(stop.watch([1, 2], 3)) == [1, 2]
        stop.tick()


# ---- ranks


def _mine_on_rank(rank, world, kind):
    isl = trained_alike(around(kind))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = isl.mine(isl.model, Pictures(), Sees(budget=[2]), batch_size=16)
        isl.mine(isl.model, Pictures(), Refuses())
    words = [str(x.message) for x in said if "DDP" not in str(x.message)]
    return isl.positives.members, isl.positives.offsets, isl.bank.rows, found.precision, words


def trained_alike(isl):
    isl.begun = True
    return isl


@pytest.mark.parametrize("kind", [MoCo, Instance])
def test_two_ranks_mine_what_one_does(kind):
    alone = _mine_on_rank(0, 1, kind)
    pair = run_ranks(2, _mine_on_rank, kind)
    for members, offsets, rows, precision, _ in pair:
        assert torch.equal(members, alone[0]) and torch.equal(offsets, alone[1])
        assert torch.allclose(rows, alone[2], atol=1e-5)
        assert precision == pytest.approx(alone[3])
    assert pair[0][4] == alone[4] and len(alone[4]) == 1 and pair[1][4] == []  # rank 0 warns


def test_the_gan_is_carried_from_round_to_round():
    isl, miner = trained(around()), GANMiner(iters=3, min_iters=1)
    for number in (1, 2):
        found, _ = said_by(isl, miner)
        assert found.round == isl.round == number and found.miner == "gan"


def test_a_pil_image_of_any_mode_is_read():
    class Modes(Pictures):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image.convert(["L", "RGBA", "P"][i % 3]), label

    isl = around()
    assert isl.mine(isl.model, Modes(), KNNMiner()).edges > 0
    assert isinstance(Modes()[0][0], Image.Image)
