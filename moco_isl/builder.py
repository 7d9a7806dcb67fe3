"""MoCo v1 and v2: https://arxiv.org/abs/1911.05722, https://arxiv.org/abs/2003.04297.

Letters: N batch, C (`dim`) feature dimension, K queue length, m momentum of the key encoder, T
temperature.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from moco_isl import dist
from moco_isl.encoders import get_head, set_head
from moco_isl.errors import BadInput


class MoCo(nn.Module):
    """A query encoder, a key encoder that follows it, and a queue of keys.

    Drop-in for `moco.builder.MoCo`: same arguments, same `forward`, same state-dict keys and
    shapes. It also runs on one device and on a CPU, the batch need not divide K, and `encode` gives
    q and k to callers with a loss of their own.

    Shuffling BN: a key is normalised among other images than its query. That takes several devices,
    or on one a batch norm over parts of the batch (`encoders.split_batch_norm`, or MoCo's own
    SplitBatchNorm).
    """

    shown_of_an_image = 1  # how many images the encoder sees at once of each in the batch

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
    ):
        """Make the query encoder, the key encoder and the queue.

        dim: feature dimension (default: 128)
        K: queue size; number of negative keys (default: 65536)
        m: moco momentum of updating key encoder (default: 0.999)
        T: softmax temperature (default: 0.07)
        base_encoder: called as base_encoder(num_classes=dim)
        """
        super().__init__()
        self.dim = dim
        self.K = K
        self.m = m
        self.T = T
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        if mlp:
            add_mlp(self.encoder_q)
            add_mlp(self.encoder_k)
        self.copy_query_to_key()
        queue = F.normalize(torch.randn(dim, K), dim=0)
        # [C, K], as in MoCo's files; in memory each key is contiguous, for enqueuing whole rows.
        self.register_buffer("queue", queue.t().contiguous().t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._forget_pairs()
        self.register_load_state_dict_post_hook(_after_loading)

    @torch.no_grad()
    def copy_query_to_key(self) -> None:
        """Make the key encoder a copy of the query encoder, without gradient."""
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        """k <- m k + (1 - m) q, for every parameter."""
        if self._pairs is None:  # the walk through a ResNet-50's layers takes half a millisecond
            self._pairs = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(*self._pairs, 1 - self.m)

    def _forget_pairs(self) -> None:
        """Look for parameters and layers again at the next step: they may be other objects now."""
        self._pairs: tuple[list[nn.Parameter], list[nn.Parameter]] | None = None
        self._in_parts: bool | None = None

    def _takes_parts(self) -> bool:
        """Whether a batch norm of the key encoder takes statistics over parts of a batch."""
        if self._in_parts is None:
            norms = [layer for layer in self.encoder_k.modules() if isinstance(layer, _BatchNorm)]
            self._in_parts = any(getattr(layer, "num_splits", 1) > 1 for layer in norms)
        return self._in_parts

    def _apply(self, *args, **kwargs) -> "MoCo":
        """Look for parameters anew after `to`, `half`, `cuda` and the like, which call this."""
        self._forget_pairs()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> "MoCo":
        self._forget_pairs()  # called at every epoch, so that a layer exchanged by hand is noticed
        return super().train(mode)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> torch.Tensor:
        """Write keys [n, C] (those of all ranks) over the oldest slots; returns the slots [n].

        Raises BadInput where n > K.
        """
        self.require_room(len(keys))
        slots = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.K
        self.queue.index_copy_(1, slots, keys.t().to(self.queue.dtype))
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % self.K)
        return slots

    def require_room(self, keys: int) -> None:
        """Raise BadInput where so many keys of one step do not fit into the queue."""
        if keys > self.K:
            raise BadInput(
                f"a step brings {keys} keys, and the queue has K = {self.K} slots: use a smaller"
                " batch (of all ranks), or a larger K"
            )

    @torch.no_grad()
    def _encode_keys(self, im_k: torch.Tensor) -> torch.Tensor:
        """The keys k [N, C], with shuffling BN.

        Each image is encoded on a random rank, or on a single device in a random part of the batch.
        """
        N = len(im_k)
        world = dist.world_size()
        encoded = lambda images: F.normalize(self.encoder_k(images).float(), dim=1)
        if world == 1 and not self._takes_parts():
            return encoded(im_k)
        if N % world == 0:
            # Every rank gives each rank an equal share of its images, in a random order, and gets
            # their keys back. With one rank this only shuffles the batch.
            order = torch.randperm(N, device=im_k.device)
            k = encoded(dist.exchange_rows(im_k[order]))
            return dist.exchange_rows(k)[order.argsort()]
        everything = dist.all_gather_rows(im_k)  # [N * world, 3, S, S]
        order = dist.broadcast(torch.randperm(len(everything), device=im_k.device))
        mine = order.view(world, N)[dist.rank()]
        back = order.argsort().view(world, N)[dist.rank()]
        return dist.all_gather_rows(encoded(everything[mine]))[back]

    def _encode_queries(self, images: torch.Tensor, predictor: nn.Module | None) -> torch.Tensor:
        """Unit rows [N, C], with gradient, of images [N, 3, S, S]; see `encode`."""
        rows = self.encoder_q(images)
        if predictor is not None:
            rows = predictor(rows)
        return F.normalize(rows.float(), dim=1)

    def encode(
        self,
        im_q: torch.Tensor,
        im_k: torch.Tensor,
        symmetric: bool = False,
        predictor: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries with gradient and keys without; moves the key encoder one momentum step.

        im_q, im_k: [N, 3, S, S]. Returns q and k, unit rows [N, C] float32. With `symmetric` each
        view is query once and key once: [2N, C], the second half with the views exchanged.
        predictor: [N, C] -> [N, C], between the query encoder and q, as in MoCo v3.
        """
        q = self._encode_queries(im_q, predictor)
        if symmetric:
            q = torch.cat([q, self._encode_queries(im_k, predictor)])
        with torch.no_grad():
            self._momentum_update_key_encoder()
            k = self._encode_keys(im_k)
            if symmetric:
                k = torch.cat([k, self._encode_keys(im_q)])
        return q, k

    def forward(self, im_q: torch.Tensor, im_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [N, 1 + K] (the own key first) and labels [N], all zero; enqueues the keys."""
        q, k = self.encode(im_q, im_k)
        l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)  # [N, 1]
        l_neg = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())  # [N, K]
        # Divided in float32: under autocast products are float16, which ends at 65,504.
        logits = torch.cat([l_pos, l_neg], dim=1).float() / self.T
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        self.enqueue(dist.all_gather_rows(k))
        return logits, labels


def _after_loading(model: MoCo, _keys) -> None:
    model._forget_pairs()


def add_mlp(encoder: nn.Module) -> None:
    """MoCo v2's head: a hidden layer as wide as the features and a ReLU before the last layer."""
    head = get_head(encoder)
    width = head.weight.shape[1]
    set_head(encoder, nn.Sequential(nn.Linear(width, width), nn.ReLU(), head))
