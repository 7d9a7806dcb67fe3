"""How ISL's GAN is trained on cached features.

Letters: M images, N batch of anchors, C feature dimension, B iterations drawn at once.
"""

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from moco_isl.errors import Interrupted, RunFailed, first_line
from moco_isl.mining.gan import (
    Discriminator,
    GANFit,
    GANSettings,
    Generator,
    discriminator_loss,
    generator_loss,
)
from moco_isl.mining.gan_watch import Watch, collapse, settled
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.triplets import TripletSampler, training_search
from moco_isl.ops.neighbors import Tick

Tensor = torch.Tensor

COMPILE_FROM = 50_000  # iterations: fewer likely save less time than compiling takes (an estimate)


@torch.enable_grad()  # the caller may have turned gradients off
def fit_gan(
    features: Tensor,
    positives: PositiveSets,
    settings: GANSettings,
    seed: int,
    state: dict | None = None,
    tick: Tick | None = None,
    kind: type["Trainer"] | None = None,
) -> GANFit:
    """Train G and D on features [M, C] (unit rows) and the positive sets.

    state: a `Trainer.state` to start from. kind: of GAN, `Trainer` where None. Stops between the
    least and the most iterations, once losses and proxies have settled, and keeps the weights with
    the smallest hub among those looked at from the least on (of equal ones the latest).
    Raises BadInput where there are too few images, RunFailed at a loss that is not finite, and
    whatever tick raises. tick is called every iteration; on a GPU, every CUDA graph.
    """
    started = time.perf_counter()
    trainer = (kind or Trainer)(features, positives, settings, state, seed)
    probe = Watch(trainer)
    least, most = settings.span(trainer.M)
    every = max(1, min(most // 40, 500))  # iterations from look to look
    a_pass = trainer.a_pass
    history = []
    best = None  # the best look so far, and the state at that time
    read = 0  # iterations whose losses were read
    i = 0
    while i < most:
        if tick is not None:
            tick()
        i += trainer.run(min(most - i, every - i % every, a_pass - i % a_pass))
        if i % a_pass == 0:
            trainer.shuffle()
        if i % every and i != most:
            continue
        look = {"iteration": i, **trainer.read_losses(i - read), **probe.look()}
        history.append(look)
        read = i
        if i < least:
            continue
        if best is None or look["hub"] <= best[0]["hub"]:
            best = look, trainer.state()
        collapsed = collapse(look["hub"], look["distinct"], probe.natural, settings)
        if not collapsed and settled(history):  # collapsed proxies settle too
            break
    kept, state = best
    trainer.load(state)
    report = {name: value for name, value in kept.items() if name != "iteration"}
    report |= {
        "iteration_kept": kept["iteration"],
        "iterations": i,
        "natural_hub": probe.natural,
        "probe_bank": len(probe.rows),
        "fit_seconds": time.perf_counter() - started,
        "history": {name: [round(look[name], 4) for look in history] for name in kept},
    }
    why = collapse(kept["hub"], kept["distinct"], probe.natural, settings)
    optimizers = {name: state[name] for name in ("adam_G", "adam_D")}
    return GANFit(trainer.G, trainer.D, report, why, optimizers)


def make_proxy(G: Generator, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """G(a, p, n), as a function that can be compiled once for all G."""
    return G(a, p, n)


class Forms(NamedTuple):
    """The parts of an iteration that may be compiled."""

    proxy: Callable = make_proxy
    loss_of_D: Callable = discriminator_loss
    loss_of_G: Callable = generator_loss


@functools.cache
def _compiled(fn: Callable) -> Callable:
    """`fn`, compiled once for all fits.

    The networks are its arguments, so later rounds reuse what was compiled.
    """
    return torch.compile(fn, dynamic=False)


class Trainer:
    """Trains the GAN by iterations that read no value back from the device.

    An iteration draws triplets, steps D, and steps G.

    On a GPU up to `GRAPH` iterations are one CUDA graph, and their triplets are drawn at once:
    draws do not depend on the networks. `shuffle` draws the random numbers of a whole pass over the
    anchors, so that triplets are the same for any number of iterations a graph. Products on a GPU
    are in TF32, also those that find the hardest negative (one within 0.005 of it is as hard).

    Another kind of GAN overrides `sampler_kind`, `networks` or `loss_of_D` (studies/gans.py).
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
        self.s = settings
        self.features = features
        self.on_gpu = features.device.type == "cuda"
        self.M, C = features.shape
        self.N = min(settings.batch, self.M)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.G, self.D = self.networks(C)
        self.G.to(features.device)
        self.D.to(features.device)
        self.adam_G = self._adam(self.G)
        self.adam_D = self._adam(self.D)
        if state is not None:
            self.load(state)
        self.losses = torch.zeros(2, device=features.device)  # sums of D's, G's since the last read
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # number of iterations -> their graph
        self.warm: dict[int, int] = {}  # how often so many iterations were run to warm up
        self._prepare_draws(positives, seed)
        self.forms = Forms()
        wanted = settings.compile
        if wanted is None:
            wanted = self.on_gpu and settings.span(self.M)[1] >= COMPILE_FROM
        if wanted:
            self.compile()

    # ---- networks and losses

    def networks(self, C: int) -> tuple[Generator, Discriminator]:
        return Generator(C), Discriminator(C)

    def loss_of_D(self, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor) -> Tensor:
        return self.forms.loss_of_D(self.D, a, p, n, proxy, self.s.lam)

    def loss_of_G(self, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor) -> Tensor:
        self.D.requires_grad_(False)  # a compiled form computes every gradient that is asked for
        loss = self.forms.loss_of_G(self.D, a, p, n, proxy, self.s.lam)
        self.D.requires_grad_(True)
        return loss

    def _adam(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), self.s.lr, fused=True, capturable=self.on_gpu)

    def compile(self) -> None:
        """Compile the networks and Eq. 1 and try them out; where that fails, warn and go on plain.

        What a kind of GAN computes itself in `loss_of_D` is not compiled.
        """
        plain = self.forms
        self.forms = Forms(*map(_compiled, plain))
        try:
            with _tf32(self.features.device):
                self._try_out()
        except Interrupted:
            raise
        except Exception as error:  # the compilers raise almost anything
            what = "the GAN's networks are not compiled, plain ones used instead"
            warnings.warn(f"{what}: {type(error).__name__}: {first_line(error)}", stacklevel=2)
            self.forms = plain

    def _try_out(self) -> None:
        """Losses and gradients of an iteration, without its steps."""
        # Any images do, in three tensors: the same tensor given thrice would be compiled otherwise.
        a, p, n = self.features[self.anchors[:1].expand(3, -1)].float().unbind()  # each [N, C]
        proxy = self.forms.proxy(self.G, a, p, n)
        torch.autograd.grad(self.loss_of_D(a, p, n, proxy.detach()), list(self.D.parameters()))
        torch.autograd.grad(self.loss_of_G(a, p, n, proxy), list(self.G.parameters()))

    # ---- triplets

    def _prepare_draws(self, positives: PositiveSets, seed: int) -> None:
        """The sampler, and room for the random numbers of a pass over the anchors."""
        device = self.features.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.a_pass = self.M // self.N  # iterations of a pass
        self.most = min(self.GRAPH, self.a_pass) if self.on_gpu else 1  # iterations drawn at once
        batch = self.most * self.N
        search = training_search(self.features)
        self.sampler = self.sampler_kind(
            self.features, positives, batch, self.generator, self.s.triplets, search, self.s.own_row
        )
        self.anchors = torch.empty(self.a_pass, self.N, dtype=torch.int64, device=device)
        self.u = torch.empty(self.a_pass, self.N, device=device)  # which positive of an anchor
        # where the window of candidates of each iteration begins
        self.offsets = torch.empty(self.a_pass, 1, dtype=torch.int64, device=device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)  # iterations of this pass
        self.lane = torch.arange(self.most, device=device)
        self.shuffle()

    def shuffle(self) -> None:
        """Before each pass: new orders of anchors and of candidates, new random numbers."""
        draw = {"generator": self.generator, "device": self.generator.device}
        self.sampler.shuffle()
        order = torch.randperm(self.M, **draw)
        self.anchors.copy_(order[: self.anchors.numel()].view_as(self.anchors))
        self.u.copy_(torch.rand(self.u.shape, **draw))
        self.offsets.copy_(torch.randint(self.M, self.offsets.shape, **draw))
        self.cursor.zero_()

    def draw(self, iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the images a, p, n, each [B, N], of the next anchors of the pass.

        Each iteration has its own window of candidates for n. An anchor comes once a pass, so each
        of its triplets (five passes are the method's epoch) is drawn anew.
        """
        at = (self.cursor + self.lane[:iterations]) % self.a_pass  # [B]
        self.cursor.add_(iterations)
        drawn = [x[at] for x in (self.anchors, self.u, self.offsets)]
        if iterations == 1:  # without B: a CPU multiplies matrices faster than a batch of one
            drawn = [x[0] for x in drawn]
        a, u, offset = drawn
        p = self.sampler.draw_positives(a, u)
        n = self.sampler.draw_negatives(a, offset)
        return tuple(images.view(iterations, self.N) for images in (a, p, n))

    # ---- iterations

    def step(self, iterations: int = 1) -> None:
        """Run so many iterations, at most `self.most`."""
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

    def _update(self, adam: torch.optim.Optimizer, network: nn.Module, loss: Tensor) -> None:
        params = list(network.parameters())
        grads = torch.autograd.grad(loss, params)  # G's step needs no gradients of D
        for param, grad in zip(params, grads):
            param.grad = grad
        adam.step()

    def read_losses(self, iterations: int) -> dict[str, float]:
        """Mean losses of the iterations since the last read."""
        loss_D, loss_G = (self.losses / iterations).tolist()
        self.losses.zero_()
        if not math.isfinite(loss_D + loss_G):
            lower = f"lower its learning rate ({self.s.lr:g})"
            raise RunFailed(f"the GAN's losses are not finite: {lower}")
        return {"loss_D": loss_D, "loss_G": loss_G}

    # ---- CUDA graphs

    def run(self, left: int = 1) -> int:
        """Run at most `left` iterations; returns how many.

        A CPU runs one. A GPU runs `self.most` or one, first to warm up, then as a captured graph.
        """
        if not self.on_gpu:
            self.step()
            return 1
        iterations = self.most if left >= self.most else 1
        warm = self.warm.get(iterations, 0)
        if warm < self.WARM_UPS:
            self.warm_up(iterations)
            self.warm[iterations] = warm + 1
            return iterations
        if iterations not in self.graphs:
            self.capture(iterations)
        self.graphs[iterations].replay()
        return iterations

    def warm_up(self, iterations: int = 1) -> None:
        """Run iterations on the stream that will be captured.

        What libraries and optimizers set up at their first call must not be in the graph.
        """
        device = self.features.device
        stream = _capture_stream(device)
        main = torch.cuda.current_stream(device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream), _tf32(device), warnings.catch_warnings():
            # Adam warns that it is capturable and was not captured.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            self.step(iterations)
        main.wait_stream(stream)

    def capture(self, iterations: int = 1) -> None:
        """Capture so many iterations as a CUDA graph that `run` replays. `warm_up` comes first."""
        device = self.features.device
        stream = _capture_stream(device)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # thread_local: NCCL's watch or a loader's pinning thread may use CUDA meanwhile.
        capturing = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with _tf32(device), capturing:
            self.step(iterations)
        self.graphs[iterations] = graph

    # ---- state

    def state(self) -> dict:
        """Copies of the weights and of Adam's moments: {"G", "D", "adam_G", "adam_D"}."""
        return {
            "G": copy.deepcopy(self.G.state_dict()),
            "D": copy.deepcopy(self.D.state_dict()),
            "adam_G": copy.deepcopy(self.adam_G.state_dict()["state"]),
            "adam_D": copy.deepcopy(self.adam_D.state_dict()["state"]),
        }

    def load(self, state: dict) -> None:
        """Take a `state`. Adam starts anew where it has no moments, as on ranks other than 0."""
        self.G.load_state_dict(state["G"])
        self.D.load_state_dict(state["D"])
        for name, adam in (("adam_G", self.adam_G), ("adam_D", self.adam_D)):
            if name in state:
                groups = adam.state_dict()["param_groups"]
                moments = copy.deepcopy(state[name])  # Adam writes into the tensors it is given
                adam.load_state_dict({"state": moments, "param_groups": groups})


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures.

    All fits share it, because cuBLAS keeps a workspace for each stream.
    """
    return torch.cuda.Stream(device)


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """A context in which float32 products that CUDA computes or captures are in TF32.

    Outside, where features are compared, they keep full precision.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
