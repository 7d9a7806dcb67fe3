"""ISL: images near confident proxies, which a GAN makes of triplets, become positives."""

from dataclasses import dataclass

import torch

from moco_isl import dist
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.mining.edges import Edges
from moco_isl.mining.gan import Discriminator, GANFit, GANSettings, Generator, networks_shape
from moco_isl.mining.gan_training import fit_gan
from moco_isl.mining.gan_watch import collapse
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, block_size, over_blocks
from moco_isl.mining.triplets import TripletSampler, largest_set
from moco_isl.mining.variant import is_published, variant_option
from moco_isl.ops.ivf import IVF
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.options import opt

Tensor = torch.Tensor
USUAL = GANSettings()


@dataclass(eq=False)
class GANMiner(RoundMiner):
    """ISL's miner: images near (Eq. 2) the best proxy (Eq. 3) that a GAN (Eq. 1) makes.

    batch, lr: of the GAN's training, see GANSettings. G, D and their Adam moments are where the
    next round starts, unless they collapsed.

    An edge is as sure as its image is similar to the proxy. Edges are not ranked by the proxy's
    score: in a trial the proxies in the upper half of the scores were the less precise ones.
    """

    name = "gan"
    candidates: int | None = opt(
        None,
        "--isl-candidates",
        low=1,
        metavar="k",
        help="nearest images of a proxy that may join (10, or as many as the budget if it is more)",
    )
    threshold: float = opt(
        0.5,
        "--isl-threshold",
        low=0,
        high=1,
        metavar="s",
        help="a proxy whose score is not above this adds nothing",
    )
    radius: float = opt(
        0.6,
        "--isl-radius",
        low=0,
        high=2,
        metavar="r",
        help="cosine (confidence) or Euclidean distance (fixed) within which images join",
    )
    radius_mode: str = opt(
        "confidence",
        "--isl-radius-mode",
        choices=("confidence", "fixed"),
        help="confidence: the surer the proxy, the wider, as the published code; fixed: Eq. 2",
    )
    triplets: int = opt(
        GANSettings.triplets,
        "--isl-triplets",
        low=1,
        metavar="n",
        help="triplets an anchor; the best proxy counts",
    )
    lam: float = opt(
        GANSettings.lam,
        "--isl-lambda",
        low=0,
        metavar="l",
        help="Eq. 1: larger makes proxies explore more",
    )
    variant: str = variant_option()
    iters: int | None = opt(
        GANSettings.iters,
        "--isl-gan-iters",
        low=1,
        metavar="n",
        help="most iterations of the GAN in a round (90 times the root of the number of images,"
        " 20,000 at 50,000)",
    )
    min_iters: int | None = opt(
        GANSettings.min_iters,
        "--isl-gan-min-iters",
        low=1,
        metavar="n",
        help="least iterations (a quarter of the most); a short GAN collapses onto one image",
    )
    batch: int = GANSettings.batch
    lr: float = GANSettings.lr

    def __post_init__(self):
        super().__post_init__()
        if None not in (self.min_iters, self.iters) and self.min_iters > self.iters:
            raise BadInput(
                f"--isl-gan-min-iters {self.min_iters} is more than --isl-gan-iters {self.iters}"
            )
        self.settings = GANSettings(
            self.iters,
            self.min_iters,
            self.batch,
            self.lam,
            self.lr,
            self.triplets,
            own_row=is_published(self.variant),
        )
        # weights of G and D; on rank 0, which fits them, the state of their optimizers too
        self.networks: dict | None = None

    def mine(self, features: Tensor, positives: PositiveSets, *args, **more) -> PositiveSets:
        """As `RoundMiner.mine`; no set is so large that the next round would find no negatives."""
        self.rules.largest = largest_set(positives.num_images, self.triplets)
        return super().mine(features, positives, *args, **more)

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M, device = len(features), features.device
        fit = self.fit(features, positives, seed, tick)
        own = {"threshold": self.threshold, "radius": self.radius}
        self.report.extra |= fit.report | own
        why, none = fit.why, torch.empty(0, device=device)
        if not why:
            k = min(self.candidates or max(10, self.most(M)), M - 1)
            bank = self.searchable(features, tick)
            anchors, score, near, cosine, to_triplet = best_proxies(
                fit, features, positives, seed, k, self.settings, tick, bank
            )
            figures = _statistics(M, score, near, to_triplet)
            self.report.extra |= figures
            # a hub's share is smaller in a larger bank
            natural = fit.report["natural_hub"] * fit.report["probe_bank"] / M
            why = collapse(figures["hub"], figures["distinct"], natural, self.settings)
        self.networks = (
            None if why else {"G": fit.G.state_dict(), "D": fit.D.state_dict(), **fit.optimizers}
        )
        if why:
            return Edges(none.long(), none.long(), none), why
        # [n, candidates]
        joins = radius_rule(score, cosine, self.threshold, self.radius, self.radius_mode)
        self.report.why = self._silence(joins)
        return Edges(anchors[:, None].expand_as(joins)[joins], near[joins], cosine[joins]), ""

    def _silence(self, joins: Tensor) -> str:
        """Why a round that did not collapse found nothing; empty where it found something."""
        if int(dist.all_reduce_max(joins.any().int())):
            return ""
        highest = self.report.extra["score_max"]
        if highest <= self.threshold:
            return (
                f"no proxy scored above {self.threshold:g} (the best {highest:.2f}): the"
                " discriminator still tells them all from real triplets; give the GAN more"
                " iterations or lower --isl-threshold"
            )
        return (
            f"no image lies within the radius of a proxy: change --isl-radius ({self.radius:g},"
            f" {self.radius_mode})"
        )

    def fit(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None = None
    ) -> GANFit:
        """Fit G and D on rank 0, and give them to all ranks.

        An error that ends the fit on rank 0 is raised on all ranks.

        What ends rank 0's fit is raised on all.
        """
        fit, status = None, None
        if dist.is_main():
            try:
                fit = fit_gan(features, positives, self.settings, seed, self.networks, tick)
                status = "", fit.why, fit.report
            except (Interrupted, BadInput, RunFailed) as error:
                status = type(error).__name__, str(error), None
        error, text, report = dist.broadcast_object(status)
        if error:
            raise {"Interrupted": Interrupted, "BadInput": BadInput, "RunFailed": RunFailed}[error](
                text
            )
        if fit is None:
            C = features.shape[1]
            fit = GANFit(
                Generator(C).to(features.device), Discriminator(C).to(features.device), report, text
            )
        for x in (*fit.G.state_dict().values(), *fit.D.state_dict().values()):
            dist.broadcast(x)
        return fit

    @torch.no_grad()
    def ranking(
        self, features: Tensor, positives: PositiveSets, anchors: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The images that the last round's proxies of some anchors [A] rank first, for reports.

        The threshold, the radius and the budget are not applied. features [M, C] and positives:
        those with which the round started. Returns the score of each anchor's best proxy [A], the k
        images nearest to it [A, k] and their cosine to it [A, k]; None where the round collapsed.
        Its triplets are drawn anew.
        """
        if self.networks is None:
            return None
        M, C = features.shape
        G = Generator(C).to(features.device)
        D = Discriminator(C).to(features.device)
        G.load_state_dict(self.networks["G"])
        D.load_state_dict(self.networks["D"])
        draws = torch.Generator().manual_seed(M)
        sampler = sampler_of_all(features, positives, M, self.settings)
        parts = []
        for part in anchors.split(block_size(M)):
            score, proxy, _ = best_of(*proxies_of(G, D, features, sampler, part, draws))
            cosine, near = topk(proxy, features, k, part)
            parts.append((score, near, cosine))
        return tuple(torch.cat(x) for x in zip(*parts))

    def state_dict(self) -> dict:
        return {"networks": self.networks}

    def load_state_dict(self, state: dict) -> None:
        self.networks = state["networks"]

    def state_shape(self, dim: int) -> dict:
        return {"networks": (networks_shape(dim), None)}


@torch.no_grad()
def best_proxies(
    fit: GANFit,
    features: Tensor,
    positives: PositiveSets,
    seed: int,
    k: int,
    settings: GANSettings = USUAL,
    tick: Tick | None = None,
    bank: Tensor | IVF | None = None,
) -> list[Tensor]:
    """The best proxy (Eq. 3) of every anchor of this rank's share, and its k nearest images.

    settings: those of the fit. bank: what the images are searched in, `RoundMiner.searchable` of
    the features; None: the features. The anchor is never among them. Returns anchors [n], score
    [n], near [n, k], cosine of near to the proxy [n, k], cosines of the proxy to a, p, n [n, 3].
    What is drawn for an anchor depends on the seed and its block: not on the ranks.
    """
    M, device = len(features), features.device
    sampler = sampler_of_all(features, positives, seed, settings)

    def block(anchors: Tensor, number: int) -> tuple[Tensor, ...]:
        draws = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63)
        proxies = proxies_of(fit.G, fit.D, features, sampler, anchors, draws)
        score, proxy, to_triplet = best_of(*proxies)
        cosine, near = topk(proxy, features if bank is None else bank, k, anchors, tick=tick)
        return score, near, cosine, to_triplet

    return over_blocks(M, device, block, tick)


def sampler_of_all(
    features: Tensor, positives: PositiveSets, seed: int, settings: GANSettings
) -> TripletSampler:
    """A sampler for any of the images as anchors, up to all of them at once."""
    draws = torch.Generator().manual_seed(seed)
    M = len(features)
    sampler = TripletSampler(
        features, positives, M, draws, settings.triplets, own_row=settings.own_row
    )
    sampler.capacity = None  # nothing is captured here
    return sampler


def proxies_of(
    G: Generator,
    D: Discriminator,
    features: Tensor,
    sampler: TripletSampler,
    anchors: Tensor,
    draws: torch.Generator,
) -> tuple[Tensor, ...]:
    """The proxies of each of anchors [N], one for each of its t triplets.

    Returns scores [t, N], proxies [t, N, C], and their cosines to a, p, n [t, N, 3].
    """
    windows = sampler.spread(int(torch.randint(sampler.M, (1,), generator=draws)))
    u = torch.rand(sampler.triplets, len(anchors), generator=draws).to(features.device)
    a, tries = features[anchors].float(), []
    for t, window in enumerate(windows):
        p = features[sampler.draw_positives(anchors, u[t])].float()
        n = features[sampler.draw_negatives(anchors, window)].float()
        proxy = G(a, p, n)  # [N, C]
        cosines = torch.stack([(proxy * x).sum(1) for x in (a, p, n)], 1)  # [N, 3]
        tries.append((D(a, proxy, n).sigmoid(), proxy, cosines))
    return tuple(torch.stack(x) for x in zip(*tries))


def best_of(score: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The highest of scores [t, N] of t triplets an anchor (Eq. 3), and its values.

    values: [t, N, ...]. Returns scores [N] and the values [N, ...].
    """
    score, t = score.max(0)
    row = torch.arange(len(t), device=t.device)
    return score, *(value[t, row] for value in values)


def radius_rule(
    score: Tensor, cosine: Tensor, threshold: float, radius: float, mode: str
) -> Tensor:
    """Which images become positives (Eq. 2): [N, k] bool, by the proxies' scores [N].

    cosine [N, k]: of images to the proxy. "confidence": cosine > R + (1 - s)(1 - R); "fixed":
    Euclidean distance < r, with d^2 = 2 - 2 cos; both where s > threshold.
    """
    if mode == "confidence":
        near = cosine > (radius + (1 - score) * (1 - radius))[:, None]
    else:
        near = 2 - 2 * cosine < radius**2
    return near & (score > threshold)[:, None]


def _statistics(M: int, score: Tensor, near: Tensor, to_triplet: Tensor) -> dict:
    """The watchdog's figures over the best proxies of all ranks.

    The hub is looked for among at most ten nearest, as in the probe.
    """
    hits = dist.all_reduce_sum(torch.bincount(near[:, :10].flatten(), minlength=M))
    nearest = dist.all_reduce_sum(torch.bincount(near[:, 0], minlength=M))
    histogram = dist.all_reduce_sum(torch.histc(score, 10, 0, 1).long()).tolist()
    highest = float(dist.all_reduce_max(score.max() if len(score) else score.new_zeros(())))
    means = (
        dist.all_reduce_sum(torch.cat([score[:, None], to_triplet], 1).double().sum(0)) / M
    ).tolist()
    names = ("score", "cos_anchor", "cos_positive", "cos_negative")
    return {
        **dict(zip(names, means)),
        "score_max": highest,
        "score_histogram": histogram,
        "hub": int(hits.max()) / M,
        "distinct": int((nearest > 0).sum()) / M,
    }
