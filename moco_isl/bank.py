"""What is remembered of every image between its visits: its feature, and where in the queue its
keys are.

Letters: M images, N batch, C feature dimension, K queue length, P positives, S slots remembered of
an image. Neither is a module's buffer: MoCo's state-dict keys stay as they are, and
DistributedDataParallel does not resend them at every step. Every rank is given the rows of all
ranks, so all ranks hold equal copies.
"""

import torch
import torch.nn.functional as F

from moco_isl.schema import Holds, Number, Tensor


class FeatureBank:
    """One unit row an image: none before the first `fill`, or random ones to start from."""

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.device, self.dtype = device, dtype
        self.rows: torch.Tensor | None = None  # [M, C]

    @property
    def filled(self) -> bool:
        return self.rows is not None

    def fill_random(
        self, num_images: int, dim: int, generator: torch.Generator | None = None
    ) -> None:
        self.rows = F.normalize(torch.randn(num_images, dim, generator=generator), dim=1).to(
            self.device, self.dtype
        )

    def lookup(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of index [...], as float32 [..., C]."""
        return self.rows[index].float()

    def mean(self, most: int = 1 << 16) -> torch.Tensor:
        """[C] float32: of all rows, or of up to `most` or so, evenly spread: at every step all of a
        million would be too many.
        """
        return self.rows[:: max(1, len(self.rows) // most)].float().mean(0)

    @torch.no_grad()
    def fill(self, features: torch.Tensor) -> None:
        """Overwrite all rows by features [M, C]."""
        self.rows = features.to(self.device, self.dtype, copy=True)

    @torch.no_grad()
    def update(self, index: torch.Tensor, features: torch.Tensor, mix: float) -> None:
        """v_i <- unit((1 - mix) v_i + mix f_i), Eq.

        8. index: [n], features: [n, C], of all ranks.
        """
        if mix < 1:
            features = F.normalize(torch.lerp(self.lookup(index), features.float(), mix), dim=1)
        self.rows[index] = features.to(self.rows.dtype)

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.rows = (
            None if state["rows"] is None else state["rows"].to(self.device, self.dtype, copy=True)
        )

    @staticmethod
    def state_shape(dim: int) -> dict:
        return {"rows": (Tensor("float", ("M", dim)), None)}


class QueueSlots:
    """Which queue slots hold keys of an image, so that they can be left out of its negatives in O(N
    P).

    An image is remembered in its S latest slots; S is chosen such that none is forgotten while the
    epochs visit every image once: within K consecutive keys an image then comes at most ceil(K / M)
    + 1 times a view.

    held: how many slots, from the first on, hold keys and not the random rows that a new queue
    begins with; None: nobody has counted yet.
    """

    def __init__(self, num_images: int, K: int, views: int = 1, device: torch.device | str = "cpu"):
        S = views * (-(-K // num_images) + 1)
        # [M, S], the latest slots, round robin
        self.slots = torch.zeros(num_images, S, dtype=torch.int32, device=device)
        self.visits = torch.zeros(num_images, dtype=torch.int64, device=device)  # [M]
        # [K], -1: a key of no known image
        self.owner = torch.full((K,), -1, dtype=torch.int64, device=device)
        self.held: int | None = None

    def write(self, slots: torch.Tensor, index: torch.Tensor) -> None:
        """The keys of images index [n] were just written to slots [n]; no image twice in one
        call.
        """
        self.owner[slots] = index
        self.slots[index, self.visits[index] % self.slots.shape[1]] = slots.to(torch.int32)
        self.visits[index] += 1
        if self.held is not None:
            self.held = min(self.held + len(slots), len(self.owner))

    def take_over(self, owner: torch.Tensor, oldest: int) -> None:
        """Of a queue that was written elsewhere: whose key each slot holds, owner [K] (-1:
        unknown).

        The next key goes into slot `oldest`.
        """
        owner = owner.to(self.owner.device)
        # [K], the oldest first
        slots = (torch.arange(len(owner), device=owner.device) + oldest) % len(owner)
        slots = slots[owner[slots] >= 0]  # [n]
        images, order = owner[slots].sort(stable=True)  # [n] each
        first = torch.searchsorted(images, images)  # [n], where an image's keys begin
        # [n], 0: an image's oldest key
        turn = torch.arange(len(images), device=owner.device) - first
        most = int(turn.max()) + 1 if len(turn) else 0
        if most > self.slots.shape[1]:  # of a run with two keys a visit
            self.slots = self.slots.new_zeros(len(self.slots), most)
        for number in range(most):
            self.write(slots[order][turn == number], images[turn == number])

    def absent(self, images: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """[N, (1 + P) S] int64: the slots that hold one of the row's images, K where there is none
        to name.

        images: [N, 1 + P], present: [N, 1 + P] bool, False for padding.
        """
        slots = self.slots[images].long()  # [N, 1 + P, S]
        holds = (self.owner[slots] == images[..., None]) & present[..., None]
        return torch.where(holds, slots, len(self.owner)).flatten(1)

    def state_dict(self) -> dict:
        return {"slots": self.slots, "visits": self.visits, "owner": self.owner, "held": self.held}

    def load_state_dict(self, state: dict) -> None:
        for name in ("slots", "visits", "owner"):
            setattr(self, name, state[name].to(getattr(self, name), copy=True))
        self.held = state.get("held")  # older files do not say

    @staticmethod
    def state_shape(K: int) -> dict:
        slots = Tensor("int", ("M", "S"), low=0, high=K - 1)
        return {
            "slots": Holds(slots, lambda x: x.shape[1] > 0, "a slot or more of each image"),
            "visits": Tensor("int", ("M",), low=0),
            "owner": Tensor("int", (K,), low=-1, high="M"),
            "held": (Number(0, K, whole=True), None),
        }
