"""lightly's MoCo and NNCLR as training steps, put together as its documentation does."""

from collections.abc import Callable

import torch
from torch import nn

from moco_isl.encoders import build_encoder, feature_dim, set_head

Step = Callable[[torch.Tensor, torch.Tensor], float]
ABSENT = "lightly is not installed: its rows are left out (pip install lightly)"


def backbone(arch: str, size: int) -> tuple[nn.Module, int]:
    encoder = build_encoder(arch, image_size=size)
    width = feature_dim(encoder)
    set_head(encoder, nn.Identity())
    return encoder, width


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(
        [p for module in modules for p in module.parameters()],
        0.03,
        momentum=0.9,
        weight_decay=1e-4,
    )


def moco_step(
    arch: str, size: int, dim: int, K: int, device: torch.device, m: float = 0.999, T: float = 0.2
) -> Step:
    """MoCo v2 by lightly: its projection head, its momentum update, its loss with a memory bank."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    def side() -> tuple[nn.Module, nn.Module]:
        encoder, width = backbone(arch, size)
        return encoder.to(device), MoCoProjectionHead(width, width, dim).to(device)

    encoder, head = side()
    encoder_k, head_k = side()
    for mine, theirs in ((encoder_k, encoder), (head_k, head)):
        mine.load_state_dict(theirs.state_dict())
        deactivate_requires_grad(mine)
    criterion = NTXentLoss(temperature=T, memory_bank_size=(K, dim)).to(device)
    optimizer = sgd(encoder, head)

    def step(im_q: torch.Tensor, im_k: torch.Tensor) -> float:
        update_momentum(encoder, encoder_k, m)
        update_momentum(head, head_k, m)
        q = head(encoder(im_q).flatten(1))
        with torch.no_grad():
            k = head_k(encoder_k(im_k).flatten(1))
        loss = criterion(q, k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def nnclr_step(
    arch: str, size: int, dim: int, K: int, device: torch.device, T: float = 0.1
) -> Step:
    """NNCLR by lightly: both views through one encoder, neighbours out of a memory bank of K."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule

    encoder, width = backbone(arch, size)
    project = NNCLRProjectionHead(width, 2048, dim)
    predict = NNCLRPredictionHead(dim, 4096, dim)
    nearest = NNMemoryBankModule(size=(K, dim))
    criterion = NTXentLoss(temperature=T)
    for module in (encoder, project, predict, nearest, criterion):
        module.to(device)
    optimizer = sgd(encoder, project, predict)

    def step(im_1: torch.Tensor, im_2: torch.Tensor) -> float:
        z_1, z_2 = (project(encoder(image).flatten(1)) for image in (im_1, im_2))
        p_1 = predict(z_1)
        p_2 = predict(z_2)
        n_1 = nearest(z_1.detach(), update=False)
        n_2 = nearest(z_2.detach(), update=True)
        loss = 0.5 * (criterion(n_1, p_2) + criterion(n_2, p_1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
