"""Whether the GAN's proxies have collapsed, and whether its training has settled.

Letters: M images, C feature dimension, N batch of anchors, B images of the probe's bank, k nearest
looked at.
"""

import torch

from moco_isl.mining.gan import GANSettings
from moco_isl.ops.neighbors import topk

Tensor = torch.Tensor


class Watch:
    """Looks at the proxies of one sample of triplets among one sample of images: cheap to repeat.

    trainer: a `gan_training.Trainer`. natural: the hub of the features themselves in that bank.
    """

    ANCHORS = 1024
    BANK = 8192
    NEAR = 10

    def __init__(self, trainer):
        self.trainer = trainer
        features = trainer.features
        sampler = trainer.sampler
        device = features.device
        M = trainer.M
        generator = torch.Generator().manual_seed(0)
        anchors = torch.randperm(M, generator=generator)[: self.ANCHORS].to(device)
        bank = torch.randperm(M, generator=generator)[: self.BANK].to(device)
        u = torch.rand(len(anchors), generator=generator).to(device)
        positives = sampler.draw_positives(anchors, u)
        # The sampler was promised at most N anchors at a time.
        parts = anchors.split(trainer.N)
        negatives = torch.cat([sampler.draw_negatives(part, 0) for part in parts])
        self.triplets = features[torch.stack([anchors, positives, negatives])].float()
        self.rows = features[bank].float()  # [B, C]
        place = torch.full((M,), -1, device=device)
        place[bank] = torch.arange(len(bank), device=device)
        self.own = place[anchors]  # the row of each anchor itself, -1 where it is not in the bank
        self.k = min(self.NEAR, len(bank) - 1)
        near = topk(self.triplets[0], self.rows, self.k, self.own)[1]
        self.natural = proxy_statistics(near, len(bank))["hub"]

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Mean score of the proxies, their mean cosines to a, p and n, and `proxy_statistics`."""
        a, p, n = self.triplets
        proxy = self.trainer.G(a, p, n)
        cosine = lambda x: float((proxy * x).sum(1).mean())
        near = topk(proxy, self.rows, self.k, self.own)[1]
        return {
            "score": float(self.trainer.D(a, proxy, n).sigmoid().mean()),
            "cos_anchor": cosine(a),
            "cos_positive": cosine(p),
            "cos_negative": cosine(n),
            **proxy_statistics(near, len(self.rows)),
        }


def proxy_statistics(near: Tensor, B: int) -> dict[str, float]:
    """near [n, k], the rows of a bank of B nearest to n proxies -> {"hub", "distinct"}.

    hub: the share of the proxies that the most popular row is near to. distinct: how many rows are
    the nearest of a proxy, as a share of the most there could be.
    """
    hits = torch.bincount(near.flatten(), minlength=B)
    distinct = near[:, 0].unique()
    return {"hub": int(hits.max()) / len(near), "distinct": len(distinct) / min(len(near), B)}


def collapse(hub: float, distinct: float, natural: float, settings: GANSettings) -> str:
    """Why these statistics are those of a collapse, and what to change; empty where they are not.

    natural: the hub of the features themselves in the same bank; it is large where images are few.
    """
    bound = max(settings.max_hub, min(settings.times_natural * natural, 0.5))
    if hub <= bound and distinct >= settings.min_distinct:
        return ""
    return (
        f"the GAN collapsed, nothing was added: one image is near {100 * hub:.1f} % of the proxies"
        f" (bound {100 * bound:.1f} %), {100 * distinct:.1f} % of their nearest images differ"
        f" (bound {100 * settings.min_distinct:g} %); give it more iterations or a smaller lambda"
    )


# How far the figures of the last looks may lie apart in a training that has settled.
SPREADS = {
    "loss_D": 0.05,
    "loss_G": 0.05,
    "score": 0.05,
    "cos_anchor": 0.01,
    "cos_positive": 0.01,
    "cos_negative": 0.01,
}


def settled(history: list[dict], looks: int = 5) -> bool:
    """Whether the figures of the last looks lie close together and the hub has stopped falling."""
    if len(history) <= looks:
        return False
    last = history[-looks:]
    lowest = lambda name, looked: min(look[name] for look in looked)
    spread = lambda name: max(look[name] for look in last) - lowest(name, last)
    still = all(spread(name) < bound for name, bound in SPREADS.items())
    return still and lowest("hub", last) >= lowest("hub", history[:-looks])
