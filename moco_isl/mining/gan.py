"""The GAN on cached features: generator, discriminator, their losses (Eq. 1), their training and
its watchdog.

Letters: M images, C feature dimension, N batch of anchors, k nearest looked at. B: iterations whose
triplets are drawn at once; in the probe, the images of its bank.
"""

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moco_isl.errors import Interrupted, RunFailed
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.triplets import TripletSampler, training_search
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.schema import Tensor as TensorOf
from moco_isl.schema import like

Tensor = torch.Tensor


class Generator(nn.Module):
    """Triplet of features (a, p, n), each [N, C] -> proxy [N, C], unit rows. Layers 3C-2C-C-C."""

    def __init__(self, C: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * C, 2 * C),
            nn.LeakyReLU(0.2),
            nn.Linear(2 * C, C),
            nn.LeakyReLU(0.2),
            nn.Linear(C, C),
        )

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return F.normalize(self.layers(torch.cat([a, p, n], 1)), dim=1)


class Discriminator(nn.Module):
    """Triplet (a, p, n), each [N, C] -> logit [N] that the triplet is a real one; its sigmoid is
    the score. Layers 3C-C-C/2-1.
    """

    def __init__(self, C: int):
        super().__init__()
        self.first = nn.Linear(3 * C, C)
        self.rest = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Linear(C, C // 2), nn.LeakyReLU(0.2), nn.Linear(C // 2, 1)
        )

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return self.rest(self.first(torch.cat([a, p, n], 1))).squeeze(1)

    def with_proxy(
        self, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of (a, p, n), (a, proxy, n), (a, p, proxy), each [N]: forward three times, at
        once.
        """
        if a.device.type == "cuda":  # few launches count there, not the arithmetic
            return self(
                torch.cat([a, a, a]), torch.cat([p, proxy, p]), torch.cat([n, n, proxy])
            ).chunk(3)
        # each [C, C]; products with equal features are shared
        W_a, W_p, W_n = self.first.weight.chunk(3, dim=1)
        from_a = F.linear(a, W_a, self.first.bias)
        from_p = F.linear(p, W_p)
        from_n = F.linear(n, W_n)
        a_p, a_n = from_a + from_p, from_a + from_n
        # [3 N, C]
        rows = torch.cat([a_p + from_n, a_n + F.linear(proxy, W_p), a_p + F.linear(proxy, W_n)])
        return self.rest(rows).squeeze(1).chunk(3)


def discriminator_loss(
    D: Discriminator, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor, lam: float
) -> Tensor:
    """Eq.

    1 as D minimises it: real triplets to 1, the proxy as positive and the proxy as negative to 0.
    Scalar.
    """
    real, as_p, as_n = D.with_proxy(a, p, n, proxy)
    false = (F.softplus(as_p) + lam * F.softplus(as_n)) / (1 + lam)  # [N]
    return (F.softplus(-real) + false).mean()


def generator_loss(
    D: Discriminator, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor, lam: float
) -> Tensor:
    """Eq. 1 as G minimises it, not saturating: both kinds of false triplets to 1. Scalar."""
    _, as_p, as_n = D.with_proxy(a, p, n, proxy)
    return (F.softplus(-as_p) + lam * F.softplus(-as_n)).mean() / (1 + lam)


def make_proxy(G: Generator, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """G(a, p, n)."""
    return G(a, p, n)


class Forms(NamedTuple):
    """What of an iteration may be compiled."""

    proxy: Callable = make_proxy
    loss_of_D: Callable = discriminator_loss
    loss_of_G: Callable = generator_loss


@functools.cache
def _compiled(fn: Callable) -> Callable:
    """One for all fits: the networks are arguments, so a later round finds them compiled."""
    return torch.compile(fn, dynamic=False)


# iterations: fewer of them likely save less time than compiling takes (an estimate)
COMPILE_FROM = 50_000


@dataclass
class GANSettings:
    """iters None: 90 sqrt(M), which is 3,400 at 1,437 images and 20,000 at 50,000; min_iters None:
    a quarter of iters.
    compile: the networks and their losses; None: on a GPU, where the cap is COMPILE_FROM or more.
    """

    iters: int | None = None  # cap
    min_iters: int | None = None
    batch: int = 256  # N
    lam: float = 1.0  # lambda of Eq. 1
    lr: float = 1e-4
    triplets: int = 5  # of an anchor
    # collapsed: one image is among the nearest of more than this share of the proxies, ...
    max_hub: float = 0.05
    times_natural: float = 5.0  # ... and of more than so many times what the features' own hub has
    # collapsed: fewer distinct nearest images than this share of the proxies
    min_distinct: float = 0.1
    compile: bool | None = None

    def span(self, M: int) -> tuple[int, int]:
        """Minimum and cap of iterations for M images."""
        cap = round(90 * math.sqrt(M)) if self.iters is None else self.iters
        return (max(1, cap // 4) if self.min_iters is None else min(self.min_iters, cap)), cap


@dataclass
class GANFit:
    """report: figures of the weights that were kept, and `history`, a list a figure, one entry a
    look. optimizers: the state of Adam at those weights, {"adam_G", "adam_D"}; empty where they
    were fitted elsewhere.
    """

    G: Generator
    D: Discriminator
    report: dict
    why: str = ""  # not empty: collapsed
    optimizers: dict = field(default_factory=dict)


class Trainer:
    """One iteration: draw triplets, step D, step G. Nothing in it reads a value back, so CUDA can
    capture it.

    On a GPU up to `GRAPH` iterations are one CUDA graph, and their triplets are drawn at once: the
    draws do not depend on the networks. What is random in them is drawn by `shuffle`, for a whole
    pass over the anchors, so that they are the same for any number of iterations a graph. Products
    of an iteration are in TF32 there, those of the hardest negative too (a negative within 0.005 of
    the hardest is as hard).

    Another kind of GAN overrides `sampler_kind`, `networks` or `loss_of_D` (`studies/gans.py`
    has some).
    """

    sampler_kind = TripletSampler
    GRAPH = 10  # iterations
    WARM_UPS = 3  # runs of each length before it is captured

    def __init__(
        self,
        features: Tensor,
        positives: PositiveSets,
        settings: GANSettings,
        state: dict | None,
        seed: int,
    ):
        device, (M, C) = features.device, features.shape
        self.s = settings
        self.features = features
        self.M = M
        self.N = min(settings.batch, M)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.G, self.D = self.networks(C)
        self.G.to(device), self.D.to(device)
        adam = lambda net: torch.optim.Adam(
            net.parameters(), settings.lr, fused=True, capturable=device.type == "cuda"
        )
        self.adam_G, self.adam_D = adam(self.G), adam(self.D)
        if state is not None:
            self.load(state)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.a_pass = M // self.N  # iterations of a pass over the anchors
        # iterations drawn at once
        self.most = min(self.GRAPH, self.a_pass) if device.type == "cuda" else 1
        self.sampler = self.sampler_kind(
            features,
            positives,
            self.most * self.N,
            self.generator,
            settings.triplets,
            training_search(features),
        )
        self.anchors = torch.empty(self.a_pass, self.N, dtype=torch.int64, device=device)
        # which member of its set is an anchor's positive
        self.u = torch.empty(self.a_pass, self.N, device=device)
        # of the windows of candidates
        self.offsets = torch.empty(self.a_pass, 1, dtype=torch.int64, device=device)
        # iterations of this pass so far
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.lane = torch.arange(self.most, device=device)
        self.losses = torch.zeros(2, device=device)  # sums of D's and G's since the last read
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by their number of iterations
        self.warm: dict[int, int] = {}  # how often so many iterations were run to warm up
        self.shuffle()
        self.forms = Forms()
        wanted = settings.compile
        if wanted is None:
            wanted = device.type == "cuda" and settings.span(M)[1] >= COMPILE_FROM
        if wanted:
            self.compile()

    def networks(self, C: int) -> tuple[Generator, Discriminator]:
        return Generator(C), Discriminator(C)

    def loss_of_D(self, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor) -> Tensor:
        return self.forms.loss_of_D(self.D, a, p, n, proxy, self.s.lam)

    def loss_of_G(self, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor) -> Tensor:
        # a compiled form computes the gradients of all that asks for one
        self.D.requires_grad_(False)
        loss = self.forms.loss_of_G(self.D, a, p, n, proxy, self.s.lam)
        self.D.requires_grad_(True)
        return loss

    def compile(self) -> None:
        """Compile the networks and Eq. 1, and try them out before anything is trained; where that
        fails, go on without.

        What a kind of GAN computes itself in `loss_of_D` is not compiled.
        """
        plain = self.forms
        self.forms = Forms(*map(_compiled, self.forms))
        try:
            with _tf32(self.features.device):
                self._try_out()
        except Interrupted:
            raise
        except Exception as error:  # the compilers raise almost anything
            reason = (str(error).strip().splitlines() or [""])[0]
            text = (
                "the GAN's networks are not compiled, plain ones used instead:"
                f" {type(error).__name__}: {reason}"
            )
            warnings.warn(text, stacklevel=2)
            self.forms = plain

    def _try_out(self) -> None:
        """Losses and gradients of an iteration, without its steps."""
        # Any images do, but three tensors: of one tensor given three times another form would be
        # compiled.
        a, p, n = self.features[self.anchors[:1].expand(3, -1)].float().unbind()  # each [N, C]
        proxy = self.forms.proxy(self.G, a, p, n)
        torch.autograd.grad(self.loss_of_D(a, p, n, proxy.detach()), list(self.D.parameters()))
        torch.autograd.grad(self.loss_of_G(a, p, n, proxy), list(self.G.parameters()))

    def shuffle(self) -> None:
        """Before each pass over the anchors: a new order of anchors, another of candidates, and
        what the draws need.
        """
        generator, device = self.generator, self.generator.device
        self.sampler.shuffle()
        order = torch.randperm(self.M, generator=generator, device=device)
        self.anchors.copy_(order[: self.anchors.numel()].view_as(self.anchors))
        self.u.copy_(torch.rand(self.u.shape, generator=generator, device=device))
        self.offsets.copy_(
            torch.randint(self.M, self.offsets.shape, generator=generator, device=device)
        )
        self.cursor.zero_()

    def draw(self, iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Images a, p, n, each [B, N]: the next anchors of the pass, with a window of candidates
        for each iteration.

        An anchor comes once a pass, so each of its triplets (five passes are the method's epoch)
        has its own draw.
        """
        at = (self.cursor + self.lane[:iterations]) % self.a_pass  # [B]
        self.cursor.add_(iterations)
        # [B, N], [B, N], [B, 1]
        a = self.anchors[at]
        u = self.u[at]
        offset = self.offsets[at]
        if iterations == 1:  # a CPU multiplies matrices faster than a batch of one
            a = a[0]
            u = u[0]
            offset = offset[0]
        drawn = a, self.sampler.draw_positives(a, u), self.sampler.draw_negatives(a, offset)
        return tuple(images.view(iterations, self.N) for images in drawn)

    def step(self, iterations: int = 1) -> None:
        """So many iterations, at most `self.most`."""
        with torch.no_grad():
            triplets = self.features[torch.stack(self.draw(iterations), 1)].float()  # [B, 3, N, C]
        for triplet in triplets.unbind():
            self.update(*triplet.unbind())

    def update(self, a: Tensor, p: Tensor, n: Tensor) -> None:
        """Step D, then G, on the features of triplets, each [N, C]."""
        proxy = self.forms.proxy(self.G, a, p, n)
        loss_D = self.loss_of_D(a, p, n, proxy.detach())
        self._update(self.adam_D, self.D, loss_D)
        loss_G = self.loss_of_G(a, p, n, proxy)
        self._update(self.adam_G, self.G, loss_G)
        self.losses += torch.stack([loss_D.detach(), loss_G.detach()])

    def _update(self, adam: torch.optim.Optimizer, net: nn.Module, loss: Tensor) -> None:
        params = list(net.parameters())
        # of this net alone: G's step spares D's
        for param, grad in zip(params, torch.autograd.grad(loss, params)):
            param.grad = grad
        adam.step()

    def warm_up(self, iterations: int = 1) -> None:
        """Iterations on the stream that will be captured: what libraries and optimizers set up at
        their first call must not be in the graph.
        """
        device = self.features.device
        stream = _capture_stream(device)
        main = torch.cuda.current_stream(device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream), _tf32(device), warnings.catch_warnings():
            # and is run without, so far
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            self.step(iterations)
        main.wait_stream(stream)

    def capture(self, iterations: int = 1) -> None:
        """From here on `run` replays so many iterations as a CUDA graph.

        After some of `warm_up`.
        """
        device = self.features.device
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # thread_local: what NCCL's watch or a loader's pinning thread asks of CUDA meanwhile is no
        # part of this
        with (
            _tf32(device),
            torch.cuda.graph(
                graph, stream=_capture_stream(device), capture_error_mode="thread_local"
            ),
        ):
            self.step(iterations)
        self.graphs[iterations] = graph

    def run(self, left: int = 1) -> int:
        """At most `left` iterations; returns how many.

        One on a CPU; on a GPU `self.most` or one, warming up or captured.
        """
        iterations = self.most if left >= self.most else 1
        if self.features.device.type != "cuda":
            self.step()
        elif self.warm.get(iterations, 0) < self.WARM_UPS:
            self.warm_up(iterations)
            self.warm[iterations] = self.warm.get(iterations, 0) + 1
        else:
            if iterations not in self.graphs:
                self.capture(iterations)
            self.graphs[iterations].replay()
        return iterations

    def read_losses(self, iterations: int) -> dict[str, float]:
        """Mean losses of the iterations since the last read."""
        loss_D, loss_G = (self.losses / iterations).tolist()
        self.losses.zero_()
        if not math.isfinite(loss_D + loss_G):
            raise RunFailed(
                f"the GAN's losses are not finite: lower its learning rate ({self.s.lr:g})"
            )
        return {"loss_D": loss_D, "loss_G": loss_G}

    def state(self) -> dict:
        """Copies of the weights and of Adam's moments: {"G", "D", "adam_G", "adam_D"}."""
        adam = lambda optimizer: copy.deepcopy(optimizer.state_dict()["state"])
        return {
            "G": copy.deepcopy(self.G.state_dict()),
            "D": copy.deepcopy(self.D.state_dict()),
            "adam_G": adam(self.adam_G),
            "adam_D": adam(self.adam_D),
        }

    def load(self, state: dict) -> None:
        """A state of `state`; without moments, as another rank has it, Adam starts anew."""
        self.G.load_state_dict(state["G"])
        self.D.load_state_dict(state["D"])
        for name, optimizer in (("adam_G", self.adam_G), ("adam_D", self.adam_D)):
            if name in state:
                # a copy: Adam would go on writing into the tensors it is given
                optimizer.load_state_dict(
                    {
                        "state": copy.deepcopy(state[name]),
                        "param_groups": optimizer.state_dict()["param_groups"],
                    }
                )


def networks_shape(C: int) -> dict:
    """What `Trainer.load` takes, as a shape of `schema`: a `Trainer.state`, whose moments may be
    missing.
    """
    with torch.device("meta"):
        G, D = Generator(C), Discriminator(C)

    def moments(network: nn.Module) -> dict:
        dims = [tuple(p.shape) for p in network.parameters()]
        one = lambda d: {
            "step": TensorOf("float", (), low=0),
            "exp_avg": TensorOf("float", d),
            "exp_avg_sq": TensorOf("float", d, low=0),
        }
        return {number: one(d) for number, d in enumerate(dims)}

    return {
        "G": like(G.state_dict()),
        "D": like(D.state_dict()),
        "adam_G?": moments(G),
        "adam_D?": moments(D),
    }


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all fits: cuBLAS keeps a workspace a stream."""
    return torch.cuda.Stream(device)


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """On CUDA: float32 products in TF32, as they are computed or captured here.

    What compares features keeps full ones.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Probe:
    """What the proxies do, on a fixed sample of triplets and of bank rows: cheap enough to be
    looked at often.
    """

    ANCHORS = 1024
    BANK = 8192
    NEAR = 10

    def __init__(self, trainer: Trainer):
        self.trainer, device = trainer, trainer.features.device
        M, generator = trainer.M, torch.Generator().manual_seed(0)
        anchors = torch.randperm(M, generator=generator)[: self.ANCHORS].to(device)
        bank = torch.randperm(M, generator=generator)[: self.BANK].to(device)
        u = torch.rand(len(anchors), generator=generator).to(device)
        sampler = trainer.sampler
        # in pieces of the trainer's batch: the sampler was promised no more anchors at a time
        negatives = torch.cat(
            [sampler.draw_negatives(part, 0) for part in anchors.split(trainer.N)]
        )
        self.triplets = trainer.features[
            torch.stack([anchors, sampler.draw_positives(anchors, u), negatives])
        ].float()
        self.rows = trainer.features[bank].float()  # [B, C]
        at = torch.full((M,), -1, device=device)
        at[bank] = torch.arange(len(bank), device=device)
        self.own = at[anchors]
        self.k = min(self.NEAR, len(bank) - 1)
        self.natural = proxy_statistics(
            topk(self.triplets[0], self.rows, self.k, self.own)[1], len(bank)
        )["hub"]

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Mean score of the proxies as positives, mean cosines to a, p and n, and their
        `proxy_statistics`.
        """
        proxy = self.trainer.G(*self.triplets)
        a, p, n = self.triplets
        near = topk(proxy, self.rows, self.k, self.own)[1]
        cosines = {
            f"cos_{name}": float((proxy * x).sum(1).mean())
            for name, x in zip(("anchor", "positive", "negative"), (a, p, n))
        }
        return {
            "score": float(self.trainer.D(a, proxy, n).sigmoid().mean()),
            **cosines,
            **proxy_statistics(near, len(self.rows)),
        }


def proxy_statistics(near: Tensor, B: int) -> dict[str, float]:
    """near [n, k]: the bank rows nearest to n proxies, of B rows. hub: share of the proxies that
    one row is near to, at most; distinct: how many rows are somebody's nearest, as a share of the
    most there could be.
    """
    hits = torch.bincount(near.flatten(), minlength=B)
    return {
        "hub": int(hits.max()) / len(near),
        "distinct": len(near[:, 0].unique()) / min(len(near), B),
    }


def collapse(hub: float, distinct: float, natural: float, settings: GANSettings) -> str:
    """Empty where the proxies are spread; otherwise why they are not and what to change.

    natural: the hub of the features themselves in the same bank; few images have large ones without
    any collapse.
    """
    bound = max(settings.max_hub, min(settings.times_natural * natural, 0.5))
    if hub <= bound and distinct >= settings.min_distinct:
        return ""
    return (
        f"the GAN collapsed, nothing was added: one image is near {100 * hub:.1f} % of the proxies"
        f" (bound {100 * bound:.1f} %), {100 * distinct:.1f} % of their nearest images differ"
        f" (bound {100 * settings.min_distinct:g} %); give it more iterations (--isl-gan-iters,"
        " --isl-gan-min-iters) or a smaller --isl-lambda"
    )


def settled(history: list[dict], looks: int = 5) -> bool:
    """Losses, score and cosines of the last looks lie close together, and the hub did not fall
    below its earlier best.
    """
    if len(history) <= looks:
        return False
    last, before = history[-looks:], history[:-looks]
    spread = lambda name: max(look[name] for look in last) - min(look[name] for look in last)
    still = (
        spread(name) < bound
        for name, bound in [
            ("loss_D", 0.05),
            ("loss_G", 0.05),
            ("score", 0.05),
            ("cos_anchor", 0.01),
            ("cos_positive", 0.01),
            ("cos_negative", 0.01),
        ]
    )
    return all(still) and min(look["hub"] for look in last) >= min(look["hub"] for look in before)


@torch.enable_grad()  # also where the caller has turned gradients off
def fit_gan(
    features: Tensor,
    positives: PositiveSets,
    settings: GANSettings,
    seed: int,
    state: dict | None = None,
    tick: Tick | None = None,
    kind: type[Trainer] = Trainer,
) -> GANFit:
    """Train G and D on features [M, C] (unit rows) and the positive sets; `state`: where to start
    from, the "G", "D" and where there are some "adam_G", "adam_D" of an earlier fit. kind: of GAN.

    Stops between the minimum and the cap once losses and proxies have settled, and keeps the
    weights with the smallest hub among those looked at from the minimum on (of equal ones the
    latest). Raises BadInput where there are too few images, RunFailed at a loss that is not finite,
    and whatever tick raises, which is called every iteration, on a GPU every graph of
    `Trainer.GRAPH` iterations.
    """
    started = time.perf_counter()
    trainer = kind(features, positives, settings, state, seed)
    probe = _Probe(trainer)
    minimum, cap = settings.span(trainer.M)
    every, a_pass = max(1, min(cap // 40, 500)), trainer.a_pass
    history = []
    best = None
    read = 0
    i = 0
    while i < cap:
        if tick is not None:
            tick()
        i += trainer.run(min(cap - i, every - i % every, a_pass - i % a_pass))
        if i % a_pass == 0:
            trainer.shuffle()
        if i % every and i != cap:
            continue
        history.append({"iteration": i, **trainer.read_losses(i - read), **probe.look()})
        read = i
        if i >= minimum and (best is None or history[-1]["hub"] <= best[0]["hub"]):
            best = history[-1], trainer.state()
        spread = not collapse(history[-1]["hub"], history[-1]["distinct"], probe.natural, settings)
        if i >= minimum and spread and settled(history):  # collapsed proxies lie still too
            break
    kept, state = best
    trainer.load(state)
    report = {
        **kept,
        "iteration_kept": kept["iteration"],
        "iterations": i,
        "natural_hub": probe.natural,
        "probe_bank": len(probe.rows),
        "fit_seconds": time.perf_counter() - started,
        "history": {name: [round(look[name], 4) for look in history] for name in history[0]},
    }
    del report["iteration"]
    return GANFit(
        trainer.G,
        trainer.D,
        report,
        collapse(kept["hub"], kept["distinct"], probe.natural, settings),
        {name: state[name] for name in ("adam_G", "adam_D")},
    )
