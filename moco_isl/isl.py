"""`ISL`, the objective for a training loop of your own.

    model = MoCo(torchvision.models.resnet50, mlp=True)
    isl = ISL(model, num_images=len(dataset))
    for epoch in range(epochs):
        if epoch % 20 == 0:
            features = extract_features(model.encoder_k, ordered_loader, len(dataset), device)
            isl.mine_features(features, KNNMiner())
        for (im_q, im_k), index in loader:
            loss = isl(im_q, im_k, index)

A step: `objectives/queue.py`. A round: `objectives/base.py` and `mining/rounds.py`.
"""

from torch import nn

from moco_isl.errors import BadInput
from moco_isl.objectives import OBJECTIVES
from moco_isl.objectives.base import Objective


def ISL(model: nn.Module, num_images: int, **options) -> Objective:
    """The objective that goes around a model.

    Around a `MoCo` it is the queue objective, which is MoCo v2 while its `active` is False. Around
    an `Instance` it is the bank objective, a softmax over all images. In a process group it wraps
    the model in DistributedDataParallel itself, and queue and bank become those of rank 0.

    model: bare, neither wrapped nor compiled. num_images: M; `index` of a batch counts in 0 ..
    M - 1. options: the fields of `QueueObjective` or `BankObjective`.
    Raises BadInput for what cannot work.
    """
    objective = _objective_around(model)
    unknown = sorted(options.keys() - objective.options())
    if unknown:
        raise BadInput(
            f"ISL({type(model).__name__}, ...) has no option {', '.join(unknown)}: expected some of"
            f" {', '.join(sorted(objective.options()))}"
        )
    return objective(model, num_images, **options)


def _objective_around(model: nn.Module) -> type[Objective]:
    """Raises BadInput for a model that is wrapped or unknown, and says how one is had."""
    for objective in OBJECTIVES.values():
        if isinstance(model, objective.around):
            return objective
    inner = model
    # of DistributedDataParallel, of torch.compile
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):
        inner = inner.module if hasattr(inner, "module") else inner._orig_mod
    bare = type(inner).__name__
    if isinstance(inner, tuple(objective.around for objective in OBJECTIVES.values())):
        raise BadInput(
            f"ISL was given a {type(model).__name__} around a {bare}: expected the bare {bare}. ISL"
            " wraps it in DistributedDataParallel itself where there are ranks; to compile, give"
            " the bare model to moco_isl.training.fast.compile_encoders"
        )
    same = "moco_isl.builder.MoCo takes the same arguments and state dict"
    hint = same if bare == "MoCo" else "make one around your encoder"
    raise BadInput(
        f"ISL was given a {type(model).__module__}.{type(model).__name__}: expected a"
        f" moco_isl.builder.MoCo or a moco_isl.objectives.bank.Instance; {hint}"
    )
