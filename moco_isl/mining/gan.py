"""The GAN on cached features: generator, discriminator, their losses (Eq. 1), their training and its watchdog.

Letters: M images, C feature dimension, N batch of anchors, B images of the probe's bank.
"""

import math
import time
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from moco_isl.errors import RunFailed
from moco_isl.mining.neighbors import topk
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.triplets import TripletSampler

Tensor = torch.Tensor


class Generator(nn.Module):
    """Triplet of features (a, p, n), each [N, C] -> proxy [N, C], unit rows. Layers 3C-2C-C-C."""

    def __init__(self, C: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * C, 2 * C), nn.LeakyReLU(0.2), nn.Linear(2 * C, C), nn.LeakyReLU(0.2),
                                    nn.Linear(C, C))

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return F.normalize(self.layers(torch.cat([a, p, n], 1)), dim=1)


class Discriminator(nn.Module):
    """Triplet (a, p, n), each [N, C] -> logit [N] that the triplet is a real one; sigmoid of it is the score."""

    def __init__(self, C: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * C, C), nn.LeakyReLU(0.2), nn.Linear(C, C // 2), nn.LeakyReLU(0.2),
                                    nn.Linear(C // 2, 1))

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return self.layers(torch.cat([a, p, n], 1)).squeeze(1)


def discriminator_loss(D: Discriminator, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor, lam: float) -> Tensor:
    """Eq. 1 as D minimises it: real triplets to 1, the proxy as positive and the proxy as negative to 0."""
    real, as_p, as_n = D(torch.cat([a, a, a]), torch.cat([p, proxy, p]), torch.cat([n, n, proxy])).chunk(3)
    return F.softplus(-real).mean() + (F.softplus(as_p).mean() + lam * F.softplus(as_n).mean()) / (1 + lam)


def generator_loss(D: Discriminator, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor, lam: float) -> Tensor:
    """Eq. 1 as G minimises it, not saturating: both kinds of false triplets to 1."""
    as_p, as_n = D(torch.cat([a, a]), torch.cat([proxy, p]), torch.cat([n, proxy])).chunk(2)
    return (F.softplus(-as_p).mean() + lam * F.softplus(-as_n).mean()) / (1 + lam)


@dataclass
class GANSettings:
    iters: int = 20_000  # cap
    min_iters: int = 5_000
    batch: int = 256  # N
    lam: float = 1.0  # lambda of Eq. 1
    lr: float = 1e-4
    probes: int = 40  # looks at the proxies until the cap
    max_hub: float = 0.05  # share of all images whose proxies one image may stand beside
    min_distinct: float = 0.1  # share of proxies that must have a nearest row of their own


@dataclass
class GANFit:
    G: Generator
    D: Discriminator
    report: dict
    why: str = ""  # not empty: collapsed


class _Trainer:
    """One iteration: draw triplets, step D, step G. Nothing in it reads a value back, so CUDA can capture it."""

    def __init__(self, features: Tensor, positives: PositiveSets, settings: GANSettings, state: dict | None,
                 seed: int):
        device, (M, C) = features.device, features.shape
        self.s, self.features, self.M = settings, features, M
        self.N = min(settings.batch, M)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.G, self.D = Generator(C), Discriminator(C)
        if state is not None:
            self.G.load_state_dict(state["G"])
            self.D.load_state_dict(state["D"])
        self.G.to(device), self.D.to(device)
        on_gpu = device.type == "cuda"
        adam = lambda net: torch.optim.Adam(net.parameters(), settings.lr, fused=True, capturable=on_gpu)
        self.adam_G, self.adam_D = adam(self.G), adam(self.D)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.sampler = TripletSampler(features, positives, self.N, self.generator)
        self.anchors = self.sampler.order.clone()  # [M] passes over all anchors, in an order of their own
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.lane = torch.arange(self.N, device=device)
        self.losses = torch.zeros(2, device=device)  # sums of D's and G's since last read
        self.graph = None

    def shuffle(self) -> None:
        """Once a pass over the anchors: a new order of anchors and of candidates."""
        self.sampler.shuffle()
        self.anchors.copy_(torch.randperm(self.M, generator=self.generator, device=self.generator.device))

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images (a, p, n), each [N]: the next anchors of the pass with a fresh window of candidates."""
        a = self.anchors[(self.cursor + self.lane) % self.M]
        self.cursor.add_(self.N).remainder_(self.M)
        device = self.cursor.device
        offset = torch.randint(self.M, (1,), generator=self.generator, device=device)
        u = torch.rand(self.N, generator=self.generator, device=device)
        return a, self.sampler.draw_positives(a, u), self.sampler.draw_negatives(a, offset)

    def step(self) -> None:
        with torch.no_grad():
            a, p, n = self.features[torch.cat(self.draw())].float().chunk(3)  # each [N, C]
        proxy = self.G(a, p, n)
        loss_D = discriminator_loss(self.D, a, p, n, proxy.detach(), self.s.lam)
        self._update(self.adam_D, self.D, loss_D)
        loss_G = generator_loss(self.D, a, p, n, proxy, self.s.lam)
        self._update(self.adam_G, self.G, loss_G)
        self.losses += torch.stack([loss_D.detach(), loss_G.detach()])

    def _update(self, adam: torch.optim.Optimizer, net: nn.Module, loss: Tensor) -> None:
        params = list(net.parameters())
        for param, grad in zip(params, torch.autograd.grad(loss, params)):  # only this net's: G's step leaves D alone
            param.grad = grad
        adam.step()

    def capture(self) -> None:
        """From here on `run` replays one iteration as a CUDA graph. Call after a few plain iterations (they warm up)."""
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.step()

    def run(self) -> None:
        """One iteration: plain, or the captured one."""
        self.step() if self.graph is None else self.graph.replay()

    def read_losses(self, iterations: int) -> tuple[float, float]:
        """Mean losses of D and G since the last read."""
        losses = (self.losses / max(iterations, 1)).tolist()
        self.losses.zero_()
        return losses[0], losses[1]

    def weights(self) -> dict:
        return {name: {key: x.detach().clone() for key, x in net.state_dict().items()}
                for name, net in (("G", self.G), ("D", self.D))}

    def set_weights(self, weights: dict) -> None:
        self.G.load_state_dict(weights["G"])
        self.D.load_state_dict(weights["D"])


class _Probe:
    """What the proxies do, on a fixed sample of anchors and of bank rows: cheap enough to be looked at often."""

    ANCHORS, BANK, NEAR = 1024, 8192, 10

    def __init__(self, trainer: _Trainer):
        self.trainer, device = trainer, trainer.features.device
        M, generator = trainer.M, torch.Generator().manual_seed(0)
        self.anchors = torch.randperm(M, generator=generator)[:self.ANCHORS].to(device)
        self.bank = torch.randperm(M, generator=generator)[:self.BANK].to(device)
        u = torch.rand(len(self.anchors), generator=generator).to(device)
        sampler = trainer.sampler
        images = torch.stack([self.anchors, sampler.draw_positives(self.anchors, u), sampler.draw_negatives(self.anchors, 0)])
        self.triplets = trainer.features[images].float()  # [3, n, C]
        self.rows = trainer.features[self.bank].float()  # [B, C]

    @torch.no_grad()
    def look(self) -> dict:
        """hub and distinct as `proxy_statistics` gives them for the sample; mean score, cosines to a, p, n."""
        a, p, n = self.triplets
        proxy = self.trainer.G(a, p, n)
        score = self.trainer.D(a, proxy, n).sigmoid()
        cosine, near = topk(proxy, self.rows, min(self.NEAR, len(self.rows)))
        return {"score": float(score.mean()), "cos_anchor": float((proxy * a).sum(1).mean()),
                "cos_positive": float((proxy * p).sum(1).mean()), "cos_negative": float((proxy * n).sum(1).mean()),
                **proxy_statistics(near, len(self.rows))}


def proxy_statistics(near: Tensor, B: int) -> dict:
    """near [n, k]: bank rows nearest to n proxies, of B rows. hub: share of the proxies that the most frequent row is
    near to; distinct: how many rows are somebody's nearest, over the most there can be."""
    hits = torch.bincount(near.flatten(), minlength=B)
    distinct = len(near[:, 0].unique())
    return {"hub": int(hits.max()) / len(near), "distinct": distinct / min(len(near), B)}


def collapse(hub: float, distinct: float, settings: GANSettings) -> str:
    """Empty where the proxies are spread; otherwise a line that says why they are not and what to change."""
    if hub <= settings.max_hub and distinct >= settings.min_distinct:
        return ""
    return (f"the GAN collapsed: one image is near {100 * hub:.1f} % of the proxies (at most {100 * settings.max_hub:g} %) and "
            f"{100 * distinct:.1f} % of them have a nearest image of their own (at least {100 * settings.min_distinct:g} %); "
            f"nothing was added. Train it longer (--isl-gan-iters, --isl-gan-min-iters), more slowly or with a smaller lambda")


def _settled(history: list[dict], patience: int = 4) -> bool:
    """Losses and cosines of the last looks all lie close together, and the hub no longer falls."""
    if len(history) <= patience:
        return False
    last = history[-patience:]
    spread = lambda name: max(look[name] for look in last) - min(look[name] for look in last)
    quiet = all(spread(name) < 0.02 for name in ("cos_anchor", "cos_negative", "score"))
    level = all(spread(name) < 0.03 for name in ("loss_D", "loss_G"))
    return quiet and level and min(look["hub"] for look in last) >= min(look["hub"] for look in history[:-patience])


@torch.enable_grad()  # also where a caller has turned gradients off
def fit_gan(features: Tensor, positives: PositiveSets, settings: GANSettings, seed: int, state: dict | None = None,
            tick: Callable[[], None] | None = None) -> GANFit:
    """Train G and D on features [M, C] (unit rows) and sets of positives; `state` {"G", "D"} is where to start from.

    Stops between min_iters and iters once losses and proxies have settled, and keeps the weights with the smallest hub
    among those looked at after the minimum (of equal ones the latest). Raises RunFailed where a loss is not finite,
    BadInput where there are too few images, and whatever tick raises.
    """
    started, s = time.perf_counter(), settings
    trainer = _Trainer(features, positives, s, state, seed)
    probe = _Probe(trainer)
    every = max(1, min(s.iters // s.probes, 500))
    a_pass = max(1, trainer.M // trainer.N)
    history, best, since = [], None, 0
    for i in range(1, s.iters + 1):
        if tick is not None:
            tick()
        trainer.run()
        since += 1
        if features.device.type == "cuda" and trainer.graph is None and i == 3:
            trainer.capture()
        if i % a_pass == 0:
            trainer.shuffle()
        if i % every and i != s.iters:
            continue
        loss_D, loss_G = trainer.read_losses(since)
        since = 0
        if not math.isfinite(loss_D + loss_G):
            raise RunFailed(f"the GAN's losses are not finite after {i} iterations: lower its learning rate ({s.lr:g})")
        history.append({"iteration": i, "loss_D": loss_D, "loss_G": loss_G, **probe.look()})
        if (i >= s.min_iters or i == s.iters) and (best is None or history[-1]["hub"] <= best[0]["hub"]):
            best = history[-1], trainer.weights()
        if i >= s.min_iters and _settled(history):
            break
    trainer.set_weights(best[1])
    report = {"iterations": i, "kept_iteration": best[0]["iteration"], **{k: v for k, v in best[0].items() if k != "iteration"},
              "seconds": time.perf_counter() - started, "history": history}
    return GANFit(trainer.G, trainer.D, report, collapse(best[0]["hub"], best[0]["distinct"], s))
