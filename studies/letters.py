"""Letters of many fonts as a folder of images: A to J in the fonts that this machine has.

    python -m studies.letters OUT               OUT/train and OUT/val, a folder a letter
    python -m studies.letters OUT --check 300   and three lists for --isl-check, OUT/check_0.txt and
                                                so on: names and labels of 300 images each, drawn by
                                                chance

Images of 28 pixels, 250 a letter in train and 50 in val; font, size and place are drawn. Other
machines have other fonts, so figures compare on one machine alone.
"""

import argparse
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHIJ"
NUMBERS = {"train": 250, "val": 50}  # images a letter
SIDE = 28
FEWEST = 20  # fonts


def draw(font: str, letter: str, size: int, dx: int, dy: int) -> Image.Image:
    """The letter in black on white, dx and dy pixels off the middle."""
    image = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(image)
    type_ = ImageFont.truetype(font, size)
    left, top, right, bottom = pen.textbbox((0, 0), letter, font=type_)
    x = (SIDE - (right - left)) / 2 - left + dx
    y = (SIDE - (bottom - top)) / 2 - top + dy
    pen.text((x, y), letter, font=type_, fill=0)
    return image


def has_letters(font: str) -> bool:
    """Whether A and B come out, and differ: symbol fonts draw boxes."""
    try:
        a, b = (draw(font, letter, 20, 0, 0) for letter in "AB")
    except (OSError, ValueError):
        return False
    dark = lambda image: image.getextrema()[0] < 128
    return dark(a) and dark(b) and a.tobytes() != b.tobytes()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--fonts",
        type=Path,
        metavar="DIR",
        default=Path("/usr/share/fonts"),
        help="where .ttf and .otf files are, at any depth (/usr/share/fonts)",
    )
    parser.add_argument("--check", type=int, default=0, metavar="n", help="write three lists of n")
    args = parser.parse_args(argv)
    wrong = lambda text: print(f"studies.letters: {text}", file=sys.stderr) or 2
    if args.out.exists():
        return wrong(f"{args.out} exists: expected a new folder")
    total = len(LETTERS) * NUMBERS["train"]
    if not 0 <= args.check <= total:
        return wrong(f"--check {args.check}: expected at most the {total} images of train")
    # Noto has hundreds of files for scripts without these letters
    files = (f for f in args.fonts.rglob("*.[to]tf") if "Noto" not in f.name)
    fonts = [font for font in sorted(map(str, files)) if has_letters(font)]
    if len(fonts) < FEWEST:
        return wrong(f"{args.fonts} has {len(fonts)} fonts with letters: expected {FEWEST} or more")
    rng = random.Random(0)
    names = []
    for split, number in NUMBERS.items():
        for letter in LETTERS:
            folder = args.out / split / letter
            folder.mkdir(parents=True)
            for i in range(number):
                place = rng.randint(17, 23), rng.randint(-2, 2), rng.randint(-2, 2)
                draw(rng.choice(fonts), letter, *place).save(folder / f"{i:03d}.png")
                if split == "train":
                    names.append(f"{letter}/{i:03d}.png, {letter}\n")
    for seed in range(3 if args.check else 0):
        drawn = random.Random(seed).sample(names, args.check)
        (args.out / f"check_{seed}.txt").write_text("".join(drawn))
    print(f"{args.out}: {len(fonts)} fonts, {total} images to train on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
