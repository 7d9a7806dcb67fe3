"""Detection: the files that are read, the score, the networks, the training and how it goes on."""

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_isl.builder import MoCo
from moco_isl.encoders import Taps, build_encoder, evaluating
from moco_isl.errors import BadInput
from moco_isl.evaluation.detection import batches, boxes, command, picture, scenes
from moco_isl.evaluation.detection import model as detectors
from moco_isl.evaluation.detection.boxes import BoxedImages
from moco_isl.evaluation.detection.scoring import Found, score
from moco_isl.evaluation.detection.tuning import Schedule, Tuning
from moco_isl.run import checkpoint
from moco_isl.run.backbone import load_backbone
from moco_isl.run.signals import Never
from studies import detection_digits as study
from tests.ranks import run_ranks

SMALL = "--data digits --max-images 12 --rois 8 --proposals 8 -b 4 -j 0 --device cpu --seed 3"
SHORT = f"{SMALL} --iterations 6 --warmup 2 --precise-bn 2 -p 2"


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory):
    """An untrained MoCo of a small ResNet whose batch norm has seen something."""
    torch.manual_seed(0)
    build = partial(build_encoder, "resnet18w8", stem="cifar")
    model = MoCo(build, dim=16, K=32, mlp=True)
    with torch.no_grad():
        for _ in range(3):
            model.encoder_q(torch.rand(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("detection") / "file.pth.tar"
    state = {f"module.{n}": t for n, t in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": "resnet18w8", "state_dict": state}, path)
    return path


def run(file, *more, **options):
    return command.main([str(file), *(word for x in more for word in str(x).split())], **options)


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def last(out):
    return checkpoint.load(Path(out) / "checkpoint_last.pth.tar")


# ---- Pascal VOC and COCO -------------------------------------------------------------------------

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin>"
    "<ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
)


def voc(folder, sets, size=(48, 36)):
    """A folder of VOC's layout. sets: name -> {image: [(class, difficult, box as in the file)]}."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, images in sets.items():
        (folder / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{i}\n" for i in images))
        for i, objects in images.items():
            body = "".join(OBJECT.format(c, hard, *box) for c, hard, box in objects)
            head = f"<filename>{i}.jpg</filename><size><width>{size[0]}</width>"
            head += f"<height>{size[1]}</height><depth>3</depth></size>"
            xml = f"<annotation>{head}{body}</annotation>"
            (folder / "Annotations" / f"{i}.xml").write_text(xml)
            noise = np.random.default_rng(len(i)).integers(0, 255, (size[1], size[0], 3), np.uint8)
            Image.fromarray(noise).save(folder / "JPEGImages" / f"{i}.jpg")
    return folder


CAT, DOG = ("cat", 0, (1, 1, 20, 30)), ("dog", 1, (10, 5, 48, 36))


@pytest.fixture
def devkit(tmp_path):
    voc(tmp_path / "VOCdevkit/VOC2007", {"trainval": {"a": [CAT, DOG]}, "test": {"t": [CAT]}})
    voc(tmp_path / "VOCdevkit/VOC2012", {"trainval": {"b": [CAT], "c": []}})
    return tmp_path


def test_voc_by_default_is_mocos_train_and_test(devkit):
    for root in (devkit, devkit / "VOCdevkit"):
        train = boxes.read(str(root), None)
        assert train.source == "VOC2007+VOC2012:trainval" and train.classes == boxes.VOC_CLASSES
        assert [Path(row.image).stem for row in train.rows] == ["a", "b", "c"]
    row = train.rows[0]
    assert row.boxes.tolist() == [[0, 0, 20, 30], [9, 4, 48, 36]]  # from 0 on, half open
    assert [train.classes[k] for k in row.labels] == ["cat", "dog"]
    assert row.difficult.tolist() == [False, True] and not row.crowd.any()
    assert (row.width, row.height) == (48, 36)
    assert len(train.with_objects()) == 2 and train.open(0).size == (48, 36)
    test = boxes.read(str(devkit), None, train)
    assert test.source == "VOC2007:test" and len(test) == 1
    one = boxes.read(str(devkit / "VOCdevkit/VOC2012"), None)
    assert one.source == "VOC2012:trainval" and len(one) == 2
    assert len(boxes.read(str(devkit), "2012:trainval")) == 2


def test_a_voc_folder_of_another_name_has_the_classes_of_train(tmp_path):
    voc(tmp_path / "mine", {"trainval": {"a": [("zebra", 0, (1, 1, 9, 9)), CAT]}, "test": {}})
    assert boxes.read(str(tmp_path / "mine"), None).classes == ["cat", "zebra"]


def coco(root, split="val2017", **changes):
    """A folder of COCO's layout, its categories not numbered from 0 on."""
    content = {
        "images": [
            {"id": 7, "file_name": "x.jpg", "width": 48, "height": 36},
            {"id": 5, "file_name": "y.jpg", "width": 48, "height": 36},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 90, "bbox": [2, 3, 10, 20], "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 18, "bbox": [0, 0, 48.4, 36], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 18, "bbox": [5.5, 5, 4, 4]},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 90, "name": "brush"}],
    } | changes
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    for one in content["images"]:
        Image.new("RGB", (48, 36), "red").save(root / split / one["file_name"])
    return root


def test_coco(tmp_path):
    coco(tmp_path, "train2017")
    coco(tmp_path, "val2017", categories=[{"id": 90, "name": "brush"}, {"id": 18, "name": "dog"}])
    train = boxes.read(str(tmp_path), None)
    test = boxes.read(str(tmp_path), None, train)
    for split in (train, test):
        assert split.classes == ["dog", "brush"]
        x, y = split.rows
        assert x.boxes.tolist() == [[5.5, 5, 9.5, 9]] and x.labels.tolist() == [0]
        # the box that oversteps by less than a pixel is cut off
        assert y.boxes.tolist() == [[2, 3, 12, 23], [0, 0, 48, 36]] and y.labels.tolist() == [1, 0]
        assert y.crowd.tolist() == [False, True] and split.open(1).size == (48, 36)
    assert len(boxes.read(str(tmp_path), "annotations/instances_val2017.json")) == 2


# ---- the score -----------------------------------------------------------------------------------


def boxed(*objects, index=0):
    """An image of 100 x 100; objects: (box, label, difficult, crowd)."""
    return boxes._boxed(
        str(index), (100, 100), [(*one, *(False,) * (4 - len(one))) for one in objects]
    )


def found(*detections, index=0):
    """detections: (box, label, score)."""
    at, labels, scores = zip(*detections) if detections else ((), (), ())
    return Found(index, list(map(list, at)), list(labels), list(scores))


def judged(rows, detections, classes="a"):
    return score(BoxedImages(rows, list(classes), "test"), detections)


A, B, AWAY = (10, 10, 20, 20), (60, 60, 80, 80), (30, 60, 40, 70)


def test_scores_computed_by_hand():
    assert judged([boxed((A, 0))], [found((A, 0, 0.9))])["AP"] == pytest.approx(100)
    # an overlap of 0.62 is right at 0.50, 0.55 and 0.60 of ten
    part = judged([boxed((A, 0))], [found(((10, 10, 20, 16.2), 0, 0.9))])
    assert (part["AP"], part["AP50"], part["AP75"]) == pytest.approx((30, 100, 0))
    # right, wrong, right: precision 1 up to a recall of 1/2 (51 of 101), then 2/3
    mixed = judged([boxed((A, 0), (B, 0))], [found((A, 0, 0.9), (AWAY, 0, 0.8), (B, 0, 0.7))])
    assert mixed["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    # a second detection of an object is wrong
    twice = judged([boxed((A, 0), (B, 0))], [found((A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7))])
    assert twice["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert judged([boxed((A, 0))], [found()])["AP"] == 0
    other = judged([boxed((A, 0), (B, 1))], [found((A, 0, 0.9), (B, 0, 0.1))], classes="abc")
    assert [row["AP"] for row in other["classes"]] == [pytest.approx(100), 0, None]
    assert other["AP"] == pytest.approx(50) and [r["objects"] for r in other["classes"]] == [
        1,
        1,
        0,
    ]


def test_what_lies_on_a_difficult_object_or_a_crowd_is_passed_over():
    inside = (62, 62, 66, 66)  # covers 4 % of B
    hard, crowd = (B, 0, True, False), (B, 0, False, True)
    on_it = [found((B, 0, 0.9), ((60, 60, 80, 79), 0, 0.8), (A, 0, 0.7))]
    for passed in (hard, crowd):
        assert judged([boxed((A, 0), passed)], on_it)["AP"] == pytest.approx(100)
    small = [found((inside, 0, 0.9), (A, 0, 0.7))]
    assert judged([boxed((A, 0), crowd)], small)["AP"] == pytest.approx(100)
    # as VOC has it, the overlap with a difficult object has to be one of the whole
    assert judged([boxed((A, 0), hard)], small)["AP"] == pytest.approx(50)
    assert judged([boxed((A, 0), hard)], [found()])["classes"][0]["objects"] == 1


def slow_ap(rows, detections, label, least):
    """AP of a class at one overlap, by loops: COCO's 101 recalls, VOC's difficult objects."""
    ranked = [
        (-s, one.index, box)
        for one in detections
        for box, k, s in zip(one.boxes, one.labels, one.scores)
        if k == label
    ]
    taken, right, total = set(), [], 0
    for row in rows:
        total += sum(k == label and not hard for k, hard in zip(row.labels, row.difficult))
    for _, i, box in sorted(ranked, key=lambda x: x[:2]):
        best, at = least, None
        of_class = [j for j, k in enumerate(rows[i].labels) if k == label]
        for hard in (False, True):
            for j in of_class:
                overlap = iou(box, rows[i].boxes[j])
                free = (i, j) not in taken or hard
                if rows[i].difficult[j] == hard and free and overlap >= best:
                    best, at = overlap, j
            if at is not None:
                break
        if at is None:
            right.append(False)
        elif not rows[i].difficult[at]:
            taken.add((i, at))
            right.append(True)
    precisions = [sum(right[: n + 1]) / (n + 1) for n in range(len(right))]
    recalls = [sum(right[: n + 1]) / total for n in range(len(right))]
    at = [
        max((p for p, r in zip(precisions, recalls) if r >= x / 100), default=0) for x in range(101)
    ]
    return 100 * sum(at) / 101


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
    return width * height / (area(a) + area(b) - width * height)


def test_scores_are_those_of_a_slow_reference():
    draw = np.random.default_rng(0)
    rows, detections = [], []
    for i in range(12):
        corners = draw.integers(0, 60, (4, 2))
        sides = draw.integers(12, 40, (4, 2))
        at = np.concatenate([corners, corners + sides], 1)
        objects = [(box, int(draw.integers(2)), bool(draw.random() < 0.25)) for box in at.tolist()]
        rows.append(boxed(*objects, index=i))
        moved = at[draw.integers(0, 4, 7)] + draw.integers(-4, 5, (7, 4))
        scores = draw.permutation(7) / 7 + draw.random(7) / 100
        labels = draw.integers(0, 2, 7).tolist()
        detections.append(found(*zip(moved.astype(float).tolist(), labels, scores), index=i))
    result = judged(rows, detections, "ab")
    for k, row in enumerate(result["classes"]):
        assert row["AP50"] == pytest.approx(slow_ap(rows, detections, k, 0.5))
        assert row["AP75"] == pytest.approx(slow_ap(rows, detections, k, 0.75))
        assert 0 < row["AP75"] < row["AP50"] < 100


# ---- scenes and batches --------------------------------------------------------------------------


def test_scenes_are_a_function_of_their_seed():
    one, again = scenes.make_scenes("train", 20), scenes.make_scenes("train", 30)
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(one.rows, again.rows))
    same = scenes.make_scenes("train", 20)
    assert np.array_equal(one.pixels, same.pixels)
    for other in (scenes.make_scenes("train", 20, seed=1), scenes.make_scenes("val", 20)):
        assert not np.array_equal(one.pixels, other.pixels)
    assert {len(row.boxes) for row in again.rows} == {1, 2, 3, 4}
    assert set(np.concatenate([row.labels for row in again.rows])) == set(range(10))
    for i, row in enumerate(one.rows):
        assert (row.boxes >= 0).all() and (row.boxes <= scenes.S).all()
        outside = np.array(one.open(i))[:, :, 0].astype(int)
        for x1, y1, x2, y2 in row.boxes.astype(int):
            assert outside[y1:y2, x1:x2].max() > 100, "there is ink in every box"
            outside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = 0
        assert outside.max() < 64 + 1, "and noise alone around them"


def test_an_epoch_has_every_image_once_and_begins_anywhere():
    whole = list(batches.Stream(10, 4, 1, 0, 5))
    items = [item for batch in whole for item in batch]
    assert sorted(items) == [(e, i) for e in (0, 1) for i in range(10)]
    assert list(batches.Stream(10, 4, 1, 3, 5)) == whole[3:]
    assert items[:10] != [(0, i) for _, i in items[10:]]


def test_boxes_move_with_the_image():
    """A white rectangle on black: what is white afterwards lies in the box."""
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[8:24, 10:50] = 255

    class White(BoxedImages):
        def open(self, i):
            return Image.fromarray(picture)

    rows = [boxes._boxed("x", (80, 40), [((10, 8, 50, 24), 1, False, False)])] * 16
    items = batches._Items(White(rows, ["a", "b"], "x"), [20, 40, 80], 120, True, 0)
    seen = set()
    for i in range(16):
        one = items[0, i]
        _, ys, xs = (one.image > 127).nonzero(as_tuple=True)
        white = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (white - one.boxes[0]).abs().max() <= 1
        assert one.labels.tolist() == [1] and items[0, i].key == one.key
        seen.add((tuple(one.image.shape[1:]), bool(one.boxes[0, 0] > one.image.shape[2] / 4)))
    # the longer side is at most 120 pixels, so the shorter one 60
    assert {shape for shape, _ in seen} == {(20, 40), (40, 80), (60, 120)}
    assert {mirrored for _, mirrored in seen} == {True, False}


def test_the_learning_rate():
    plan = Schedule(iterations=24_000, batch_size=16, lr=0.02, steps=[18_000, 22_000], warmup=100)
    at = [0, 50, 100, 17_999, 18_000, 22_000]
    expected = [0.00002, 0.01001, 0.02, 0.02, 0.002, 0.0002]
    assert [plan.rate(i) for i in at] == pytest.approx(expected)


# ---- networks ------------------------------------------------------------------------------------


def detector(encoder, kind="c4", bn="train", **given):
    options = {"rois": 16, "proposals": 10, "roi_size": 0, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return detectors.build_detector(encoder, 3, kind=kind, bn=bn, **options | given)


def sample(side=64, seed=0):
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([2])}
    return image, target


@pytest.mark.parametrize("name,stem", [("resnet18w8", "cifar"), ("resnet50w8", "imagenet")])
@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_every_tensor_of_the_backbone_arrives(name, stem, kind, tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "file.pth"
    torch.save(build_encoder(name, 7, stem).state_dict(), path)
    load = lambda: load_backbone(path, name, stem)[0]
    x = torch.rand(2, 3, 64, 64)
    layers = ["conv2", "conv3", "conv4", "conv5"]
    taps = Taps(load(), layers)
    with evaluating(taps), torch.no_grad():
        expected = taps(x)
    model = detector(load(), kind).eval()
    with torch.no_grad():
        if kind == "c4":
            body = model.backbone(x)
            seen = [body["0"], model.roi_heads.box_head.layer4(body["0"])]
            expected = [expected["conv4"], expected["conv5"]]
            grid = model.roi_heads.box_roi_pool(body, [torch.tensor([[0.0, 0, 32, 32]])] * 2, [])
            assert grid.shape == (2, model.backbone.out_channels, 14, 14)
            assert model.roi_heads.box_head(grid).shape == (2, expected[1].shape[1])
        else:
            seen = model.backbone.body(x).values()
            expected = [expected[layer] for layer in layers]
            assert len(model.backbone(x)) == 5
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    stride = 64 // expected[-1].shape[-1]
    sizes = model.rpn.anchor_generator.sizes
    if stem == "imagenet":
        assert stride == 32
        flat = [side for level in sizes for side in level]
        assert flat == [32, 64, 128, 256, 512]
    backbone = {n: t for n, t in load().state_dict().items() if not n.startswith("fc.")}
    arrived = {
        re.sub(r"^(backbone\.body\.|backbone\.|roi_heads\.box_head\.)", "", n): t
        for n, t in model.state_dict().items()
    }
    assert all(torch.equal(t, arrived[n]) for n, t in backbone.items())


@pytest.mark.parametrize("bn", ["frozen", "train"])
def test_all_but_frozen_batch_norm_is_trained(bn):
    torch.manual_seed(0)
    model = detector(build_encoder("resnet18w8", 1, "cifar"), bn=bn).train()
    optimizer = torch.optim.SGD(detectors.groups(model, 1e-4), lr=0.01)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for step in range(2):
        image, target = sample(seed=step)
        detectors.set_keys(model, [step])
        sum(model([image], [target]).values()).backward()
        optimizer.step()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    norms = {n for n in before if re.search(r"bn\d\.|downsample\.1\.|norm\.|running", n)}
    assert moved == before.keys() - (norms if bn == "frozen" else set())
    assert (len(optimizer.param_groups) == 2) == (bn == "train")
    assert bn == "frozen" or optimizer.param_groups[1]["weight_decay"] == 0


def test_draws_of_regions_do_not_depend_on_the_batch():
    sampler = detectors.Sampler(8, 0.5)
    matched = [torch.tensor([1] * 6 + [0] * 20 + [-1] * 9), torch.tensor([0] * 30 + [2] * 2)]
    sampler.keys = [11, 12]
    right, wrong = sampler(matched)
    assert [int(x.sum()) for x in right] == [4, 2] and [int(x.sum()) for x in wrong] == [4, 6]
    assert all(
        (m[r.bool()] >= 1).all() and (m[w.bool()] == 0).all()
        for m, r, w in zip(matched, right, wrong)
    )
    sampler.keys = [12]
    alone = sampler(matched[1:])
    assert torch.equal(alone[0][0], right[1]) and torch.equal(alone[1][0], wrong[1])
    sampler.view = 1
    assert not torch.equal(sampler(matched[1:])[1][0], wrong[1])


@pytest.mark.parametrize("name", ["alexnet", "digits", "vit_b_16"])
def test_a_backbone_without_stages_is_refused(name):
    with pytest.raises(BadInput, match="has no stages layer1 to layer4: Faster R-CNN needs a ResN"):
        detectors.require_stages(build_encoder(name, 1), name, "x.pth")


# ---- training ------------------------------------------------------------------------------------


def tuned(rank, world, file, flags, steps):
    """The weights after some steps, and what is detected, of this rank's process."""
    torch.use_deterministic_algorithms(False)
    args = command.get_parser().parse_args([file, *flags.split()])
    command.check_args(args)
    task = command.Task(args)
    task.check()
    names = ("sizes", "test_size", "flip", "seed")
    reading = batches.Reading(
        **{name: getattr(args, name) for name in names},
        longest=args.max_size,
        workers=0,
        device=torch.device("cpu"),
    )
    plan = Schedule(steps, args.batch_size, 0.02, [], 0)
    tuning = Tuning(
        task.detector(),
        task.images,
        reading,
        plan,
        momentum=0.9,
        weight_decay=1e-4,
        amp="off",
        origin={},
        flags={},
        folder=None,
        stop=Never(),
    )
    tuning.model.train()
    for samples in reading.train(task.images["train"], args.batch_size, 0, steps):
        tuning.step(samples)
    weights = {n: t.clone().numpy() for n, t in tuning.model.state_dict().items()}
    found = tuning.detect()
    return weights, found and [(x.index, np.array(x.boxes), x.labels) for x in found]


def test_two_ranks_equal_one(moco_file):
    """Of fewer regions than there are, so that each image has as many and the means agree."""
    flags = f"{SMALL} --bn frozen"
    (weights, found), (other, none) = run_ranks(2, tuned, str(moco_file), flags, 3)
    alone, seen = tuned(0, 1, str(moco_file), flags, 3)
    assert none is None
    for name, value in alone.items():
        assert np.array_equal(weights[name], other[name]), name
        np.testing.assert_allclose(weights[name], value, atol=2e-5, err_msg=name)
    assert [x[0] for x in found] == [x[0] for x in seen] == list(range(12))
    for mine, its in zip(found, seen):
        assert mine[2] == its[2]
        np.testing.assert_allclose(mine[1], its[1], atol=0.05)


@pytest.fixture(scope="module")
def unbroken(moco_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert run(moco_file, SHORT, "--out", out) == 0
    return out


def same_as(unbroken, out):
    a, b = last(unbroken), last(out)
    for part in (lambda x: x["detector"]["model"], lambda x: x["optimizer"]["state"]):
        for name, value in part(a).items():
            its = part(b)[name]
            value, its = (x["momentum_buffer"] if isinstance(x, dict) else x for x in (value, its))
            assert torch.equal(value, its), name
    for name in ("AP", "AP50", "AP75", "classes"):
        assert results(unbroken)[name] == results(out)[name]
    lines = [
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (unbroken, out)
    ]
    plain = lambda line: {k: x for k, x in line.items() if not re.search("time|images_per_s", k)}
    assert list(map(plain, lines[0])) == list(map(plain, lines[1])) and len(lines[0]) == 4
    assert (unbroken / picture.NAME).read_bytes() == (out / picture.NAME).read_bytes()


def test_a_stopped_run_goes_on_as_if_it_had_not(moco_file, unbroken, tmp_path, capsys):
    polls = iter([False, False, True])
    assert run(moco_file, SHORT, "--out", tmp_path / "x", stop=lambda: next(polls, True)) == 75
    assert "saved at iteration 3 of 6: go on with --resume auto" in capsys.readouterr().err
    assert last(tmp_path / "x")["detector"]["total"] == 3
    assert run(moco_file, SHORT, "--out", tmp_path / "x", "--resume auto") == 0
    same_as(unbroken, tmp_path / "x")


def test_a_killed_run_goes_on_from_what_was_saved(moco_file, unbroken, tmp_path, monkeypatch):
    step = Tuning.step

    def dies(self, samples):
        if self.iteration == 5:
            raise KeyboardInterrupt
        return step(self, samples)

    out = tmp_path / "x"
    with monkeypatch.context() as patched:
        patched.setattr(Tuning, "step", dies)
        assert run(moco_file, SHORT, "--save-every 4 --out", out) == 130
    assert run(moco_file, SHORT, "--save-every 4 --resume auto --out", out) == 0
    same_as(unbroken, out)
    # a finished run is judged again
    (out / "results.json").unlink()
    assert run(moco_file, SHORT, "--resume auto --out", out) == 0
    assert results(out)["AP"] == results(unbroken)["AP"]


def test_statistics_of_batch_norm_are_means_over_batches(moco_file):
    args = command.get_parser().parse_args([str(moco_file), *SHORT.split()])
    command.check_args(args)
    task = command.Task(args)
    task.check()
    reading = batches.Reading([64], 64, 64, False, 0, 0, torch.device("cpu"))
    options = {"momentum": 0, "weight_decay": 0, "amp": "off", "origin": {}, "flags": {}}
    plan = Schedule(1, 4, 0.1, [], 0)
    model = task.detector()
    tuning = Tuning(model, task.images, reading, plan, **options, folder=None, stop=Never())
    seen = []
    model.backbone.bn1.register_forward_hook(lambda m, x, y: seen.append(x[0].mean((0, 2, 3))))
    tuning.measure_bn(3)
    assert len(seen) == 3
    torch.testing.assert_close(model.backbone.bn1.running_mean, torch.stack(seen).mean(0))
    assert model.backbone.bn1.momentum == 0.1 and not any(
        p.grad is not None for p in model.parameters()
    )


# ---- the command ---------------------------------------------------------------------------------


def test_what_is_written(unbroken, moco_file):
    found = results(unbroken)
    assert found["pretrained"] == str(moco_file) and found["arch"] == "resnet18w8"
    assert found["epoch"] == 3 and found["iterations"] == 6
    assert [row["class"] for row in found["classes"]] == [str(d) for d in range(10)]
    assert all(0 <= found[name] <= 100 for name in ("AP", "AP50", "AP75"))
    with Image.open(unbroken / picture.NAME) as image:
        colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert (0x2E, 0xCC, 0x71) in colours, "the truth is drawn"


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_from_scratch_on_files(kind, tmp_path, capsys):
    if kind == "voc":
        voc(
            tmp_path / "mine",
            {"trainval": {"a": [CAT, DOG], "b": [CAT]}, "test": {"t": [CAT, DOG]}},
        )
    else:
        coco(coco(tmp_path / "mine", "train2017"))
    flags = "-a resnet18w8 --stem cifar --iterations 2 --sizes 32 40 --test-size 36 --rois 4"
    flags += " --proposals 4 -b 2 -j 1 --precise-bn 0 --device cpu --seed 1 --model fpn --data"
    assert run("none", flags, tmp_path / "mine", "--out", tmp_path / "x") == 0
    said = capsys.readouterr().out
    assert "=> resnet18w8 from scratch" in said and "2 classes" in said
    assert "linear scaling gives --lr 0.0025 --iterations 192000 --warmup 800" in said
    assert results(tmp_path / "x")["test_images"] == (1 if kind == "voc" else 2)
    assert (tmp_path / "x" / picture.NAME).is_file()


def test_the_commands_of_the_page(moco_file, tmp_path, monkeypatch):
    """All are parsed; those of the scenes run, shortened."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/detection.md").read_text()
    lines = re.findall(
        r"^python -m moco_isl\.evaluation\.detection (.*)", page.replace("\\\n", " "), re.M
    )
    assert len(lines) >= 4
    ran = 0
    for line in lines:
        words = line.split()
        args = command.get_parser().parse_args(words)
        command.check_args(args)
        if args.data == "digits" and not ran:
            words = [str(moco_file), *words[1:], *SHORT.split(), "--out", f"out{ran}"]
            assert command.main(words) == 0
            ran += 1
    assert ran


def test_the_table_of_the_study_is_of_differences_of_seeds(capsys):
    args = study.get_parser().parse_args(["--seeds", "0", "1", "--iterations", "5"])
    of = lambda *aps: [{"AP": ap, "AP50": 2 * ap, "AP75": ap / 2} for ap in aps]
    starts = list(study.ROWS)
    given = {(row, 5): of(10 + k, 20 + 3 * k) for k, row in enumerate(starts)}
    given |= {(row, None): [{"knn": 90.0}, {"knn": 92.0}] for row in starts[1:]}
    table = study.Result("x", "x", torch.device("cpu"), [])
    study.show(given, args, table)
    assert [row["over"] for row in table.rows] == ["", "+2.0 ± 1.4", "+4.0 ± 2.8", "+6.0 ± 4.2"]
    assert [row["epochs"] for row in table.rows] == ["", 60, 90, 90]
    assert table.rows[1]["AP"] == "17.0 ± 8.5" and table.rows[1]["knn"] == "91.0 ± 1.4"
    assert study.sentences(given, args) == [
        "After 5 iterations pretraining is worth +4.0 ± 2.8 points of AP, and mining +2.0 ± 1.4 at"
        " equal epochs."
    ]


DIGITS = ["--data", "digits"]
BAD = {
    "no file": (["--data", "digits"], "nothing to judge: name the FILE"),
    "no data": (["FILE"], "no --data: expected VOCdevkit"),
    "no arch": (["none", *DIGITS], "none says no network: give -a"),
    "no stages": (["none", "-a", "alexnet", *DIGITS], "has no stages layer1 to layer4"),
    "no such folder": (["FILE", "--data", "gone"], "--data 'gone' is no folder"),
    "empty folder": (["FILE", "--data", "empty"], "--data 'empty' holds no data set known here"),
    "splits of scenes": (["FILE", *DIGITS, "--train", "x"], "leave --train and --test out"),
    "too long": (["FILE", *DIGITS, "-b", "0"], "--batch-size 0 is out of range"),
    "sync on a CPU": (
        ["FILE", *DIGITS, "--multiprocessing-distributed", "--nproc-per-node", "2"],
        "--bn sync over several ranks needs GPUs",
    ),
    "batch of ranks": (
        ["FILE", *DIGITS, "-b", "3", "--multiprocessing-distributed", "--nproc-per-node", "2"],
        "--batch-size 3 does not divide into 2 ranks",
    ),
    "no 2012": (["FILE", "--data", "kit"], "names 2012, and --data 'kit' has VOC2007"),
    "no set": (["FILE", "--data", "kit/VOC2007", "--train", "train"], "train.txt' is missing"),
}
BAD_VOC = {  # what is done to a good folder -> what is said
    "no annotations": ("rm Annotations", "'kit/VOC2007' has no folder Annotations"),
    "an annotation is missing": (
        "rm Annotations/a.xml",
        "a.xml' is missing: expected an annotation",
    ),
    "not XML": ("Annotations/a.xml=<x", "a.xml' cannot be read"),
    "an unknown class": ("cat>cta", "'cta' is not of VOC's 20 classes; did you mean cat?"),
    "outside": ("<xmax>20>70", "box 0 0 70 30 lies outside of its image of 48 x 36 pixels"),
    "no area": ("<xmax>20>0", "box 0 0 0 30 has no area"),
    "no number": ("<xmax>20>x", "has an object without a bndbox of four numbers"),
    "an image is missing": ("rm JPEGImages/a.jpg", "its image 'kit/VOC2007/JPEGImages/a.jpg' is"),
    "an empty split": ("ImageSets/Main/trainval.txt=", "VOC2007:trainval names no image"),
    "no object": ("<object>.*</object>>", "no image of VOC2007:trainval has an object to train"),
}
BAD_COCO = {
    "no JSON": ("{", "cannot be read"),
    "a list": ("[]", "is no such file: expected the annotations of COCO"),
    "no categories": ({"categories": 1}, "is no such file: expected the annotations of COCO"),
    "an unknown category": (
        {"annotations": [{"image_id": 5, "category_id": 3, "bbox": [1, 1, 2, 2]}]},
        "annotation 0: category_id 3 is not among its 2 categories",
    ),
    "an unknown image": (
        {"annotations": [{"image_id": 6, "category_id": 18, "bbox": [1, 1, 2, 2]}]},
        "annotation 0: image_id 6 is not among its images",
    ),
    "no bbox": ({"annotations": [{"image_id": 5, "category_id": 18}]}, "has no image_id, category"),
    "no area": (
        {"annotations": [{"image_id": 5, "category_id": 18, "bbox": [1, 1, 0, 2]}]},
        "annotation 0: box 1 1 1 3 has no area",
    ),
    "two categories of one id": (
        {"categories": [{"id": 18, "name": "dog"}, {"id": 18, "name": "brush"}]},
        "has two categories of one id",
    ),
    "two categories of one name": (
        {"categories": [{"id": 18, "name": "dog"}, {"id": 90, "name": "dog"}]},
        "has two categories of one name",
    ),
    "two images of one id": (
        {
            "images": [
                {"id": 5, "file_name": x, "width": 48, "height": 36} for x in ("x.jpg", "y.jpg")
            ]
        },
        "has two images of one id",
    ),
    "an id that is a list": (
        {"annotations": [{"image_id": [5], "category_id": 18, "bbox": [1, 1, 2, 2]}]},
        "annotation 0, has no image_id, category_id or bbox",
    ),
    "a bbox that is a text": (
        {"annotations": [{"image_id": 5, "category_id": 18, "bbox": "1122"}]},
        "annotation 0, has no image_id, category_id or bbox",
    ),
    "a size that is none": (
        {"images": [{"id": 5, "file_name": "x.jpg", "width": math.inf, "height": 36}]},
        "whose id, size or name is none",
    ),
    "an image is missing": (
        {"images": [{"id": 5, "file_name": "gone.jpg", "width": 48, "height": 36}]},
        "annotation 2: image_id 7 is not among its images",
    ),
}


def refused(argv, moco_file, capsys):
    """What is said of flags that cannot work: one line, exit code 2, and nothing is written."""
    argv = [str(moco_file) if word == "FILE" else word for word in argv]
    if "digits" not in argv:
        argv += ["-j", "0"]
    assert command.main([*argv, "--device", "cpu", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not Path("out").exists()
    return said


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    sets = {"trainval": {"a": [CAT]}, "test": {"t": [CAT]}}
    voc(tmp_path / "kit/VOC2007", sets)
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_bad_flags(name, place, moco_file, capsys):
    argv, expected = BAD[name]
    if name == "no 2012":
        voc(place / "kit/VOC2008", {})
    assert expected in refused(argv, moco_file, capsys)


def test_an_encoder_of_grey_images_is_refused(place, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = build_encoder("resnet18w8", 16, "cifar", 32, 1)
    state = {f"module.encoder_q.{name}": x for name, x in encoder.state_dict().items()}
    file = tmp_path / "grey.pth.tar"
    args = {"dataset": "folder", "image_size": 32, "channels": 1}
    content = {"epoch": 1, "arch": "resnet18w8", "state_dict": state, "args": args}
    torch.save(content, file)
    said = refused(["FILE", "--data", "kit"], file, capsys)
    assert "takes images of 1 channels, and detection reads those of 3" in said


@pytest.mark.parametrize("name", BAD_VOC)
def test_bad_voc(name, place, moco_file, capsys):
    change, expected = BAD_VOC[name]
    folder = place / "kit/VOC2007"
    what, _, to = change.partition("=")
    if change.startswith("rm "):
        path = folder / change[3:]
        path.rename(place / "elsewhere")
    elif "=" in change and "/" in what and "<" not in what:
        (folder / what).write_text(to)
    else:
        was, to = change.rsplit(">", 1)
        path = folder / "Annotations/a.xml"
        text = re.sub(
            rf"{was}", f"<xmax>{to}" if was.startswith("<xmax") else to, path.read_text(), count=1
        )
        assert text != path.read_text()
        path.write_text(text)
    assert expected in refused(["FILE", "--data", "kit/VOC2007"], moco_file, capsys)


@pytest.mark.parametrize("name", BAD_COCO)
def test_bad_coco(name, place, moco_file, capsys):
    change, expected = BAD_COCO[name]
    coco(coco(place / "coco", "train2017", **(change if isinstance(change, dict) else {})))
    if isinstance(change, str):
        (place / "coco/annotations/instances_train2017.json").write_text(change)
    assert expected in refused(["FILE", "--data", "coco"], moco_file, capsys)


def test_bad_boxes_are_left_out_when_asked(tmp_path):
    bad = ("dog", 0, (5, 5, 4, 9))
    voc(tmp_path / "VOC2007", {"trainval": {"a": [CAT, bad], "b": [bad]}})
    with pytest.raises(BadInput, match="the first of 2 bad boxes.*--max-bad-boxes 2"):
        boxes.read(str(tmp_path), None, most_bad=1)
    kept = boxes.read(str(tmp_path), None, most_bad=2)
    assert [len(row.boxes) for row in kept.rows] == [1, 0] and len(kept.with_objects()) == 1


def test_a_class_that_train_lacks_is_refused_in_the_test(tmp_path):
    sets = {"trainval": {"a": [CAT]}, "test": {"t": [("zebra", 0, (1, 1, 9, 9))]}}
    train = boxes.read(str(voc(tmp_path / "mine", sets)), None)
    with pytest.raises(BadInput, match="t.xml': 'zebra' is not a class of --train"):
        boxes.read(str(tmp_path / "mine"), None, train)


def test_a_broken_image_is_named(place, moco_file, capsys):
    (place / "kit/VOC2007/JPEGImages/a.jpg").write_bytes(b"no image")
    flags = "--data kit/VOC2007 --sizes 32 --rois 4 --proposals 4 -b 1 -j 0 --device cpu --out out"
    assert run(moco_file, flags) == 3
    assert "JPEGImages/a.jpg' cannot be read, or is not of the 48 x 36" in capsys.readouterr().err


def test_another_file_or_other_settings_are_refused(unbroken, moco_file, tmp_path, capsys):
    out = tmp_path / "x"
    torch.save(torch.load(moco_file) | {"epoch": 4}, tmp_path / "other.pth")
    again = f"{SHORT} --resume {unbroken} --out {out}"
    assert run(tmp_path / "other.pth", again) == 2
    assert "was trained from another FILE" in capsys.readouterr().err
    assert run(moco_file, again, "--lr 1") == 2
    assert "--lr was 0.05 and is now 1.0" in capsys.readouterr().err
    assert run(moco_file, f"{SHORT} --resume {moco_file} --out {out}") == 2
    assert "is no checkpoint of this command" in capsys.readouterr().err
    assert not out.exists()
