"""`--miner tests.viewing:ViewingGAN`: the GAN, in rounds that look at two views of every image."""

from dataclasses import dataclass
from typing import ClassVar

from moco_isl.miners.gan import GANMiner


@dataclass(eq=False)
class ViewingGAN(GANMiner):
    uses_views: ClassVar[bool] = True
