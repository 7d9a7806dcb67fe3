"""`--miner studies.with_views:WithViews`: neighbourhood means that always look at two views.

The product takes views only where --isl-trust needs them for its estimate. The studies compare sets
of a given width, whatever an estimate says.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco_isl.miners.average import AverageMiner


@dataclass(eq=False)
class WithViews(AverageMiner):
    """AverageMiner over features and views."""

    name = "average with views"
    uses_views: ClassVar[bool] = True
