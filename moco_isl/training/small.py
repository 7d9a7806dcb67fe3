"""Flags that suit a small data set. MoCo's defaults are made for a million images.

Letters: M images, K queue length, m momentum of the key encoder.
"""

import math

FEW = 1000  # images below which not much is to be expected
STEPS = 20  # the least steps of an epoch that a batch should leave
SMALLEST_BATCH = 32
SUITED = ("batch_size", "lr", "moco_k", "moco_m", "dc_every")  # flags that follow M
CLUSTERED = 200  # the least steps that DeepCluster's classifier should have before it begins anew
LAG = 5  # epochs that the key encoder may lag behind, at most


def power_of_two(most: float) -> int:
    """The largest power of two that is at most `most`, and 1 below 1."""
    return 2 ** (int(most).bit_length() - 1) if most >= 1 else 1


def suited(M: int, values: dict, free: set[str], parts: int = 1, views: int = 1) -> dict:
    """The flags among batch_size, lr, moco_k, moco_m and dc_every that M images want otherwise.

    values: of all of them, the defaults or what was given. free: those that may change. parts: by
    which the batch has to divide. views: keys of an image in a step.

    A batch leaves 20 steps or more of an epoch, or is 32; the learning rate follows it (linear
    scaling). The queue is at most half of the images, so that few of its keys are an image's own.
    The key encoder averages over 1 / (1 - m) steps, and these are at most 5 epochs, or 100 steps.
    DeepCluster clusters every dc_every epochs, which have 200 steps or more.
    """
    batch = values["batch_size"]
    if "batch_size" in free:
        wanted = min(batch, max(SMALLEST_BATCH, power_of_two(M / STEPS)))
        batch = batch if wanted % parts or wanted < 2 * parts else wanted
    steps = max(M // batch, 1)
    m = math.floor(1000 * (1 - 1 / (LAG * steps))) / 1000
    found = {
        "batch_size": batch,
        "lr": values["lr"] * batch / values["batch_size"],
        "moco_k": min(values["moco_k"], max(power_of_two(M / 2), views * batch)),
        "moco_m": min(values["moco_m"], max(0.99, m)),
        "dc_every": max(values["dc_every"], -(-CLUSTERED // steps)),
    }
    return {name: x for name, x in found.items() if name in free and x != values[name]}


def what_to_expect(M: int) -> str:
    """A plain sentence about few images; '' where they are enough."""
    if M >= FEW:
        return ""
    return (
        f"{M} images are few to learn from without labels: expect features of colours and textures"
        " more than of things, and start from weights that you have (--init) where you can"
    )
