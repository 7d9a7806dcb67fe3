"""MoCo v2 with Instance Similarity Learning: mining positives, training on them, evaluation."""

import importlib

__version__ = "0.1.0"

_ON_DEMAND = {  # name -> the module it is in: importing moco_isl alone imports no torch
    "load_backbone": "moco_isl.embed.backbone",
    "embed": "moco_isl.embed",
    "pretrain": "moco_isl.pretraining",
}


def __getattr__(name: str):
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_ON_DEMAND[name])
    # a module that can be called is what its name stands for
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_DEMAND])
