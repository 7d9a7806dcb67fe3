"""Lists of the first n images of every class: a data set in small, without a copy of it.

    python -m studies.subset DIR OUT --train 500 --val 200
    python main_moco_isl.py ... OUT/train.csv

DIR has train/ and val/ with a folder a class. OUT/train.csv and OUT/val.csv name the chosen images
by absolute paths; every script takes the first for a DIR.
"""

import argparse
import csv
import io
import sys
from collections import Counter
from pathlib import Path

from moco_isl import data, files
from moco_isl.errors import BadInput
from moco_isl.evaluation.subject import labelled


def first_of_each(dataset: data.ImageFiles, most: int) -> list[int]:
    """The first `most` images of every class. Raises BadInput where a class has fewer."""
    if most < 1:
        raise BadInput(f"{most} images a class: expected 1 or more")
    seen: Counter[int] = Counter(dict.fromkeys(range(len(dataset.classes)), 0))
    chosen = []
    for i, label in enumerate(dataset.labels.tolist()):
        seen[label] += 1
        if seen[label] <= most:
            chosen.append(i)
    name, least = min(seen.items(), key=lambda item: item[1])
    if least < most:
        raise BadInput(f"class {dataset.classes[name]} has {least} images: expected {most} or more")
    return chosen


def write_list(dataset: data.ImageFiles, chosen: list[int], path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label"])
    for i in chosen:
        writer.writerow([Path(dataset.path(i)).resolve(), dataset.classes[dataset.labels[i]]])
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(text.getvalue(), path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--train", type=int, default=500, metavar="n", help="images a class (500)")
    parser.add_argument("--val", type=int, default=200, metavar="n", help="images a class (200)")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise BadInput(f"{args.out} exists: expected a new folder")
        splits = {split: labelled("folder", args.dir, split) for split in ("train", "val")}
        chosen = {split: first_of_each(x, getattr(args, split)) for split, x in splits.items()}
        for split, images in chosen.items():
            write_list(splits[split], images, args.out / f"{split}.csv")
    except BadInput as error:
        print(f"studies.subset: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{args.out}: {len(chosen['train'])} images to train on, {len(chosen['val'])} to judge by"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
