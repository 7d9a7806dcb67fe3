"""MoCo v2 as it was published, written anew: what the other forms of a step are measured against.

Full-precision parameters, contiguous images, no compiler, one momentum update a parameter, logits
of own key and queue joined in one tensor, and a pipeline of PIL operations for the images.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms

from moco_isl.encoders import build_encoder
from moco_isl.loader import GaussianBlur

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def encoder_with_mlp(arch: str, dim: int, size: int) -> nn.Module:
    """An encoder whose classifier is MoCo v2's head."""
    encoder = build_encoder(arch, dim, image_size=size)
    width = encoder.fc.weight.shape[1]
    encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    return encoder


class PublishedMoCo(nn.Module):
    """The published model on one GPU: logits [N, 1 + K] of im_q, im_k [N, 3, S, S]."""

    def __init__(
        self, arch: str, size: int, dim: int = 128, K: int = 65536, m: float = 0.999, T: float = 0.2
    ):
        super().__init__()
        self.K = K
        self.m = m
        self.T = T
        self.query = encoder_with_mlp(arch, dim, size)
        self.key = encoder_with_mlp(arch, dim, size)
        for mine, theirs in zip(self.key.parameters(), self.query.parameters()):
            mine.data.copy_(theirs.data)
            mine.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.next = 0

    @torch.no_grad()
    def follow(self) -> None:
        for mine, theirs in zip(self.key.parameters(), self.query.parameters()):
            mine.data = mine.data * self.m + theirs.data * (1.0 - self.m)

    def forward(self, im_q: torch.Tensor, im_k: torch.Tensor) -> torch.Tensor:
        q = F.normalize(self.query(im_q), dim=1)
        with torch.no_grad():
            self.follow()
            k = F.normalize(self.key(im_k), dim=1)
        own = torch.einsum("nc,nc->n", q, k)[:, None]
        others = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([own, others], dim=1) / self.T
        self.queue[:, self.next : self.next + len(k)] = k.T.to(self.queue.dtype)
        self.next = (self.next + len(k)) % self.K
        return logits


def published_step(model: PublishedMoCo, lr: float = 0.03):
    """step(im_q, im_k): forward, cross-entropy, accuracy, backward, SGD.

    It reads the loss back in every step, as the published script does.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)

    def step(im_q: torch.Tensor, im_k: torch.Tensor, amp: torch.dtype | None = None) -> float:
        with torch.autocast(im_q.device.type, dtype=amp, enabled=amp is not None):
            logits = model(im_q, im_k)
            loss = F.cross_entropy(
                logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            )
        logits.topk(5, dim=1).indices.t().eq(0).float().sum(1).cumsum(0)  # Acc@1 to Acc@5
        value = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return value

    return step


def published_pipeline(size: int = 224) -> transforms.Compose:
    """MoCo v2's augmentation of one PIL image to one normalised view."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
