"""COCO's average precision, by pycocotools.

AP is the mean over classes and over ten overlaps, 0.50 to 0.95, of the precision interpolated at
101 recalls; AP50 and AP75 are those at one overlap. It is not VOC 2007's AP at 11 points.
"""

import contextlib
import io
from dataclasses import dataclass

import numpy as np

from moco_isl.errors import missing_package
from moco_isl.evaluation.detection.boxes import BoxedImages

_OVERLAPS = {"AP": slice(None), "AP50": 0, "AP75": 5}  # of 0.50, 0.55, ... 0.95


@dataclass
class Found:
    """What was detected in image `index`, as plain lists, best first.

    boxes (x1, y1, x2, y2) in pixels of the image, labels from 0 on, scores in [0, 1].
    """

    index: int
    boxes: list[list[float]]
    labels: list[int]
    scores: list[float]


def require_package() -> None:
    """Raise BadInput where pycocotools is not installed."""
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise missing_package("detection", "pycocotools", "'moco_isl[detection]'") from None


def score(images: BoxedImages, found: list[Found]) -> dict:
    """AP, AP50 and AP75 in per cent, and of each class; None of a class that no image has.

    found: of every image, in any order. Objects that are difficult, and crowds, count neither as
    found nor as missed, and what is found on them is passed over.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Passing(COCOeval):
        """COCOeval that passes over any number of detections on a difficult object, as VOC does.

        COCO's crowds are passed over so, but their overlap is measured otherwise: by the part of a
        detection that lies on them.
        """

        def computeIoU(self, image, category):
            objects = self._gts[image, category]
            for one in objects:
                one["iscrowd"] = one["crowd"]
            found = super().computeIoU(image, category)
            for one in objects:
                one["iscrowd"] = one["ignore"]
            return found

    truth = COCO()
    truth.dataset = _truth(images)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        detected = truth.loadRes(rows) if (rows := _rows(found)) else None
        if detected is not None:
            judged = Passing(truth, detected, "bbox")
            judged.params.areaRng, judged.params.areaRngLbl = [[0, 1e10]], ["all"]
            judged.params.maxDets = [100]
            judged.evaluate()
            judged.accumulate()
    objects = np.zeros(len(images.classes), dtype=int)
    for row in images.rows:
        np.add.at(objects, row.labels[~(row.difficult | row.crowd)], 1)
    shape = (10, 101, len(images.classes))
    precision = np.zeros(shape) if detected is None else judged.eval["precision"][:, :, :, 0, 0]
    return _table(precision, images.classes, objects.tolist())


def _truth(images: BoxedImages) -> dict:
    """The objects as COCO's file has them; iscrowd is what is passed over."""
    annotations = []
    for i, row in enumerate(images.rows):
        for box, label, difficult, crowd in zip(
            row.boxes.tolist(), row.labels.tolist(), row.difficult.tolist(), row.crowd.tolist()
        ):
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": label,
                    "bbox": [box[0], box[1], width, height],
                    "area": width * height,
                    "iscrowd": int(difficult or crowd),
                    "crowd": int(crowd),
                }
            )
    return {
        "info": {},
        "images": [{"id": i} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(images.classes)],
    }


def _rows(found: list[Found]) -> list[dict]:
    return [
        {
            "image_id": one.index,
            "category_id": label,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        for one in sorted(found, key=lambda one: one.index)
        for box, label, score in zip(one.boxes, one.labels, one.scores)
    ]


def _table(precision: np.ndarray, classes: list[str], objects: list[int]) -> dict:
    """precision: [overlaps, recalls, classes], -1 where a class has no object."""
    rows = []
    for k, name in enumerate(classes):
        row = {"class": name, "objects": objects[k]}
        for what, at in _OVERLAPS.items():
            row[what] = 100 * float(precision[at, :, k].mean()) if objects[k] else None
        rows.append(row)
    there = [row for row in rows if row["objects"]]
    mean = lambda what: sum(row[what] for row in there) / len(there) if there else None
    return {what: mean(what) for what in _OVERLAPS} | {"classes": rows}
