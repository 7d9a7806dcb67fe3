"""Numbers for the labels of images that come as texts: of a list, tar shards, or a table.

Letters: M images.
"""

from collections.abc import Sequence

import torch

from moco_isl.data.folders import Layout, many, skipped_words
from moco_isl.errors import BadInput
from moco_isl.files import short

Labels = tuple[torch.Tensor | None, list[str] | None, Layout]  # int64 [M], names, in words


def number(
    texts: Sequence[str | None],
    of: str,
    known: list[str] | None = None,
    skipped: dict | None = None,
) -> Labels:
    """(labels [M], the classes' names, what there is in words) of the labels of M images.

    There are none, and the words say why, where an image has none (None) or all have the same one.
    of: the source, for messages. known: the classes to number by, such as those of train. skipped:
    what was left out -> how often. Raises BadInput for a label that is not among `known`.
    """
    M = len(texts)
    missing = sum(text is None for text in texts)
    named = set(texts) - {None}
    classes = known or sorted(named, key=_in_order(named))
    if extra := sorted(named - set(classes)):
        raise BadInput(
            f"{of} has a label that train lacks: '{short(extra[0])}'; expected a subset of the"
            f" {len(classes)} classes of train; leave its images out"
        )
    summary = f"{many(M, 'image')}, {many(len(named), 'class')}"
    layout = Layout(summary + skipped_words(skipped or {}))
    if missing:
        layout.unlabelled = f"{missing} of {M} have none" if named else "it names none"
        if named:
            layout.warnings.append(
                f"{missing} of {M} images have no label: all are used, and none has a label;"
                " expected one for each, or for none"
            )
    elif len(classes) == 1:
        layout.unlabelled = f"all have the label '{short(classes[0])}'"
        layout.warnings.append(
            f"{layout.unlabelled}: nothing can be judged by one class, so they count as without"
            " labels"
        )
    if layout.unlabelled:
        return None, None, layout
    numbers = {name: i for i, name in enumerate(classes)}
    return torch.tensor([numbers[text] for text in texts]), classes, layout


def _in_order(names: set[str]):
    """The key by which names are sorted: by value where all are whole numbers."""
    return int if all(name.isascii() and name.isdecimal() for name in names) else None
