"""Miners: from features to the positive sets of a round.

Every miner says only which edges it finds; judging old pairs, caps, budget and report are the round's, shared by all.
Letters: M images, C feature dimension, N anchors of a block, E directed edges.
"""

import resource
import time
from typing import Callable, Protocol

import torch

from moco_isl import dist
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.mining.edges import Edges, Rules, settle
from moco_isl.mining.gan import Discriminator, GANFit, GANSettings, Generator, collapse, fit_gan, proxy_statistics
from moco_isl.mining.neighbors import topk
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.triplets import TRIPLETS, TripletSampler

Tensor = torch.Tensor
Tick = Callable[[], None]


class Miner(Protocol):
    """What the training engine and ISL ask of a miner.

    report: JSON-able figures of the last round. state_dict: tensors and plain values, what the next round starts from.
    """

    report: dict

    def mine(self, features: Tensor, positives: PositiveSets, rng: torch.Generator,
             tick: Tick | None = None) -> PositiveSets: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class NoMiner:
    """Adds nothing and takes nothing away: MoCo."""

    def __init__(self):
        self.report = {}

    def mine(self, features: Tensor, positives: PositiveSets, rng: torch.Generator,
             tick: Tick | None = None) -> PositiveSets:
        return positives

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class RoundMiner:
    """The round around a `find`: shares out the anchors, gathers the edges, settles them by the rules, reports.

    A miner of this kind writes find(features, positives, seed, tick) -> (edges of this rank's share, why): a `why` that
    is not empty refuses the round, the same on every rank. `find` puts figures of its own into self.report.
    Sets come out equal on every rank and for every number of ranks: whole blocks of anchors go to a rank, and all that
    is drawn for a block depends on the round's seed and the block alone.
    """

    name = "miner"

    def __init__(self, rules: Rules):
        if rules.budget is not None and rules.budget < 0 or not 0 < rules.max_share <= 1 or not 0 <= rules.floor <= 1:
            raise BadInput(f"mining rules make no sense: budget {rules.budget} (0 or more), largest share of an image "
                           f"{rules.max_share} (above 0, at most 1), floor {rules.floor} (0 to 1)")
        self.rules = rules
        self.report: dict = {}

    def find(self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None) -> tuple[Edges, str]:
        raise NotImplementedError

    def mine(self, features: Tensor, positives: PositiveSets, rng: torch.Generator,
             tick: Tick | None = None) -> PositiveSets:
        """features [M, C] unit rows (equal on all ranks), the sets so far -> the sets of this round.

        rng: CPU generator, one draw a round. Raises BadInput where the features do not fit, Interrupted on every rank
        where tick raised it on one.
        """
        started = time.perf_counter()
        if features.ndim != 2 or len(features) != positives.num_images:
            raise BadInput(f"features are {tuple(features.shape)}, the positive sets are of {positives.num_images} images")
        seed = dist.broadcast_object(int(torch.randint(2 ** 62, (1,), generator=rng)))
        self.report = {"miner": self.name}
        with torch.no_grad():
            edges, why = self.find(features, positives, seed, tick)
            if why:
                sets, counts = positives, {"edges_found": 0, "edges_added": 0, "edges_dropped": 0}
            else:
                sets, counts = settle(features, _gather(edges), positives, self.rules)
        self.report |= {
            **counts, "accepted": not why, "why": why or ("" if counts["edges_found"] else "nothing was found"),
            "mean_size": sets.mean_size, "coverage": sets.coverage,
            "worst_in_degree": int(sets.in_degree().max()), "edges": sets.num_edges,
            "seconds": time.perf_counter() - started, "peak_memory_gb": _peak_gb(features.device),
        }
        return sets

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class KNNMiner(RoundMiner):
    """The k nearest of every image; sureness is the cosine."""

    name = "knn"

    def __init__(self, k: int = 10, budget: float | None = None, max_share: float = 0.05, keep: bool = False,
                 floor: float = 0.05):
        super().__init__(Rules(budget, max_share, keep, floor))
        self.k = k

    def find(self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None) -> tuple[Edges, str]:
        def block(anchors: Tensor, _: int) -> tuple[Tensor, Tensor]:
            return topk(features[anchors], features, self.k, exclude=anchors, tick=tick)

        parts = _over_blocks(len(features), features.device, block, tick)
        anchors, cosine, near = (torch.cat(x) for x in zip(*parts)) if parts else _nothing(features.device, self.k)
        return Edges(anchors.repeat_interleave(self.k), near.flatten(), cosine.flatten()), ""


class GANMiner(RoundMiner):
    """ISL's miner: five proxies an anchor, the one with the highest score, what is near to it (Eq. 1, 3, 2).

    threshold: the score below which an anchor adds nothing. radius: R in cosine for radius_mode "confidence" (the surer,
    the wider), r as Euclidean distance for "fixed". candidates: nearest images of a proxy that are looked at.
    An edge is as sure as its image is similar to the proxy; the score decides only what Eq. 3 and 2 say it decides,
    because it was seen to rank nothing (findings of the design: its upper half was the less precise one).
    """

    name = "gan"

    def __init__(self, budget: float | None = None, *, iters: int = 20_000, min_iters: int = 5_000, batch: int = 256,
                 lam: float = 1.0, lr: float = 1e-4, threshold: float = 0.5, radius: float = 0.6,
                 radius_mode: str = "confidence", candidates: int = 10, max_share: float = 0.05, keep: bool = False,
                 floor: float = 0.05, max_hub: float = 0.05, warm_start: bool = True):
        super().__init__(Rules(budget, max_share, keep, floor))
        if radius_mode not in ("confidence", "fixed"):
            raise BadInput(f"radius mode {radius_mode!r} is unknown: take confidence or fixed")
        if not 1 <= min_iters <= iters:
            raise BadInput(f"the GAN's minimum of {min_iters} iterations must be from 1 to its cap of {iters}")
        self.gan = GANSettings(iters=iters, min_iters=min_iters, batch=batch, lam=lam, lr=lr, max_hub=max_hub)
        self.threshold, self.radius, self.radius_mode, self.candidates = threshold, radius, radius_mode, candidates
        self.warm_start = warm_start
        self.state: dict = {}

    def find(self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None) -> tuple[Edges, str]:
        fit = self._fit(features, positives, seed, tick)
        # A collapsed pair of networks is no start for the next round.
        self.state = {} if fit.why or not self.warm_start else {"G": fit.G.state_dict(), "D": fit.D.state_dict()}
        self.report |= {"iterations": 0, **fit.report, "threshold": self.threshold, "radius": self.radius}
        self.report["fit_seconds"] = self.report.pop("seconds")
        started = time.perf_counter()
        if fit.why:
            return _no_edges(features.device), fit.why
        found = self.proxies(fit.G, fit.D, features, positives, seed, self.candidates, tick)
        self.report |= {**_statistics(features, found), "mining_seconds": time.perf_counter() - started}
        why = collapse(self.report["hub"], self.report["distinct"], self.gan)
        if why:
            self.state = {}
            return _no_edges(features.device), why
        joins = radius_rule(found["score"], found["cosine"], self.threshold, self.radius, self.radius_mode)  # [n, k]
        anchors = found["anchors"][:, None].expand_as(joins)[joins]
        return Edges(anchors, found["near"][joins], found["cosine"][joins]), ""

    def _fit(self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None) -> GANFit:
        """G and D fitted by rank 0 and equal on all. What stops rank 0 stops all."""
        fit = status = None
        if dist.is_main():
            try:
                fit = fit_gan(features, positives, self.gan, seed, self.state or None, tick)
                status = ("", fit.why, fit.report)
            except (Interrupted, BadInput, RunFailed) as error:
                status = (type(error).__name__, str(error), None)
        kind, why, report = dist.broadcast_object(status)
        if kind:
            raise {"Interrupted": Interrupted, "BadInput": BadInput, "RunFailed": RunFailed}[kind](why)
        if fit is None:
            C = features.shape[1]
            fit = GANFit(Generator(C).to(features.device), Discriminator(C).to(features.device), report, why)
        for net in (fit.G, fit.D):
            for x in net.state_dict().values():
                dist.broadcast(x)
        return fit

    def proxies(self, G: Generator, D: Discriminator, features: Tensor, positives: PositiveSets, seed: int, k: int,
                tick: Tick | None = None) -> dict[str, Tensor]:
        """The best proxy of every anchor of this rank's share (Eq. 3) and the k images nearest to it.

        anchors [n], score [n], near [n, k], cosine [n, k] of near to the proxy, cosines [n, 3] of the proxy to a, p, n.
        """
        M, device = len(features), features.device
        size = _block_size(M)
        sampler = TripletSampler(features, positives, min(size, M), torch.Generator().manual_seed(seed))

        def block(anchors: Tensor, number: int) -> tuple[Tensor, ...]:
            draws = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2 ** 63)
            start = int(torch.randint(M, (1,), generator=draws))
            u = torch.rand(TRIPLETS, len(anchors), generator=draws).to(device)
            a = features[anchors].float()
            tries = []
            for t, offset in enumerate(sampler.spread(start)):
                p = features[sampler.draw_positives(anchors, u[t])].float()
                n = features[sampler.draw_negatives(anchors, offset)].float()
                proxy = G(a, p, n)  # [N, C]
                tries.append((D(a, proxy, n).sigmoid(), proxy, torch.stack([(proxy * x).sum(1) for x in (a, p, n)], 1)))
            score, proxy, cosines = best_proxy(*(torch.stack(x) for x in zip(*tries)))
            cosine, near = topk(proxy, features, k, exclude=anchors, tick=tick)
            return score, near, cosine, cosines

        parts = _over_blocks(M, device, block, tick)
        names = ("anchors", "score", "near", "cosine", "cosines")
        if not parts:
            empty = torch.empty(0, device=device)
            return dict(zip(names, (empty.long(), empty, empty.long().view(0, k), empty.view(0, k), empty.view(0, 3))))
        return dict(zip(names, (torch.cat(x) for x in zip(*parts))))

    def state_dict(self) -> dict:
        return {"gan": self.state}

    def load_state_dict(self, state: dict) -> None:
        self.state = state["gan"]


def best_proxy(score: Tensor, proxy: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3. score [5, N], proxy [5, N, C], cosines [5, N, 3] -> those of the highest score, [N], [N, C], [N, 3]."""
    score, t = score.max(0)
    row = torch.arange(len(t), device=t.device)
    return score, proxy[t, row], cosines[t, row]


def radius_rule(score: Tensor, cosine: Tensor, threshold: float, radius: float, mode: str) -> Tensor:
    """Eq. 2. score [N] of the proxies, cosine [N, k] of images to them -> [N, k] bool: which become positives.

    "confidence": cosine > R + (1 - s)(1 - R); "fixed": Euclidean distance below r, d^2 = 2 - 2 cos. Both if s > threshold.
    """
    if mode == "confidence":
        near = cosine > (radius + (1 - score) * (1 - radius))[:, None]
    else:
        near = 2 - 2 * cosine < radius ** 2
    return near & (score > threshold)[:, None]


def _block_size(M: int) -> int:
    """Anchors of a block, from M alone so that blocks do not depend on the number of ranks."""
    return min(max(-(-M // 64), 64), 4096)


def _over_blocks(M: int, device: torch.device, block, tick: Tick | None) -> list[tuple[Tensor, ...]]:
    """block(anchors, number) over this rank's share of blocks; each answer with its anchors in front.

    Where tick raises Interrupted on one rank, all raise it here.
    """
    size, parts, stopped = _block_size(M), [], False
    first, last = dist.shard(-(-M // size))
    try:
        for number in range(first, last):
            if tick is not None:
                tick()
            anchors = torch.arange(number * size, min((number + 1) * size, M), device=device)
            parts.append((anchors, *block(anchors, number)))
    except Interrupted:
        stopped = True
    if bool(dist.all_reduce_max(torch.tensor(int(stopped), device=device))):
        raise Interrupted("mining was interrupted")
    return parts


def _nothing(device: torch.device, k: int) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.empty(0, device=device)
    return none.long(), none.view(0, k), none.long().view(0, k)


def _no_edges(device: torch.device) -> Edges:
    none = torch.empty(0, device=device)
    return Edges(none.long(), none.long(), none)


def _gather(edges: Edges) -> Edges:
    """The edges of all ranks, in rank order."""
    weight = None if edges.weight is None else dist.all_gather_rows(edges.weight)
    src, dst = (dist.all_gather_rows(x.int()) for x in (edges.src, edges.dst))
    return Edges(src, dst, dist.all_gather_rows(edges.sureness), weight)


def _statistics(features: Tensor, found: dict[str, Tensor]) -> dict:
    """Watchdog's figures over the best proxies of all ranks: hub, distinct, cosines, histogram of scores."""
    M = len(features)
    near = dist.all_gather_rows(found["near"])
    score, cosines = dist.all_gather_rows(found["score"]), dist.all_gather_rows(found["cosines"])
    mean = cosines.double().mean(0).tolist()
    return {**proxy_statistics(near, M), "score": float(score.double().mean()), "cos_anchor": mean[0],
            "cos_positive": mean[1], "cos_negative": mean[2],
            "score_histogram": torch.histc(score.float(), 10, 0, 1).long().tolist()}


def _peak_gb(device: torch.device) -> float:
    """Largest memory of this process so far: on the GPU where the features are there, of the whole process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def one_line(report: dict) -> str:
    """A round's report as one line for the screen."""
    if not report:
        return "no mining"
    line = (f"{report['miner']}: {report['mean_size']:.2f} positives an image, {100 * report['coverage']:.1f} % have any, "
            f"worst in-degree {report['worst_in_degree']}, +{report['edges_added']} -{report['edges_dropped']} edges")
    if "loss_D" in report:
        line += (f"; D {report['loss_D']:.3f} G {report['loss_G']:.3f} score {report['score']:.2f}, proxy to a/p/n "
                 f"{report['cos_anchor']:.2f}/{report['cos_positive']:.2f}/{report['cos_negative']:.2f}, hub "
                 f"{100 * report['hub']:.2f} %, distinct {100 * report['distinct']:.0f} %, {report['iterations']} iterations")
    line += f"; {report['seconds']:.1f} s, peak {report['peak_memory_gb']:.1f} GB"
    return line + (f". {report['why']}" if report["why"] else "")
