"""What is remembered of every image between its visits: its feature, and its keys in the queue.

Letters: M images, N batch, C feature dimension, K queue length, P positives, S slots remembered of
an image. Neither class is a module's buffer: MoCo's state-dict keys stay as they are, and
DistributedDataParallel does not resend them at every step. Every rank is given the rows of all
ranks, so all ranks hold equal copies.
"""

import torch
import torch.nn.functional as F

from moco_isl.schema import Holds, Number, Tensor


class FeatureBank:
    """One unit row of C numbers an image. Before the first `fill` there are none: all read as 0."""

    def __init__(
        self, dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.dim = dim
        self.device = device
        self.dtype = dtype
        self.rows: torch.Tensor | None = None  # [M, C]

    @property
    def filled(self) -> bool:
        return self.rows is not None

    def fill_random(self, num_images: int, generator: torch.Generator | None = None) -> None:
        rows = torch.randn(num_images, self.dim, generator=generator)
        self.rows = F.normalize(rows, dim=1).to(self.device, self.dtype)

    @torch.no_grad()
    def fill(self, features: torch.Tensor) -> None:
        """Overwrite all rows by features [M, C]."""
        self.rows = features.to(self.device, self.dtype, copy=True)

    def lookup(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of index [...], as float32 [..., C]."""
        if self.rows is None:
            return torch.zeros(*index.shape, self.dim, device=self.device)
        return self.rows[index].float()

    def mean(self, most: int = 1 << 16) -> torch.Tensor:
        """The mean row of the bank, [C] float32.

        Of more than `most` rows, about `most` evenly spread ones are averaged, because every step
        asks for the mean.
        """
        return self.rows[:: max(1, len(self.rows) // most)].float().mean(0)

    @torch.no_grad()
    def update(self, index: torch.Tensor, features: torch.Tensor, mix: float) -> None:
        """Eq. 8: v_i <- unit((1 - mix) v_i + mix f_i).

        index: [n], features: [n, C], of all ranks.
        """
        if mix < 1:
            features = F.normalize(torch.lerp(self.lookup(index), features.float(), mix), dim=1)
        self.rows[index] = features.to(self.rows.dtype)

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        rows = state["rows"]
        self.rows = None if rows is None else rows.to(self.device, self.dtype, copy=True)

    @staticmethod
    def state_shape(dim: int) -> dict:
        return {"rows": (Tensor("float", ("M", dim)), None)}


class QueueSlots:
    """Which queue slots hold keys of an image, to leave them out of its negatives in O(N P).

    An image is remembered in its S latest slots. Within K consecutive keys an image comes at most
    ceil(K / M) + 1 times a view while every epoch visits each image once, and S is that number.
    """

    def __init__(self, num_images: int, K: int, views: int = 1, device: torch.device | str = "cpu"):
        S = views * (-(-K // num_images) + 1)
        # [M, S], the latest slots, round robin
        self.slots = torch.zeros(num_images, S, dtype=torch.int32, device=device)
        self.visits = torch.zeros(num_images, dtype=torch.int64, device=device)  # [M]
        # [K], -1: a key of no known image
        self.owner = torch.full((K,), -1, dtype=torch.int64, device=device)
        # How many slots, from the first on, hold keys and not the random rows of a new queue.
        self.held: int | None = None  # None: not counted yet

    def write(self, slots: torch.Tensor, index: torch.Tensor) -> None:
        """The keys of images index [n] were just written to slots [n]; no image twice in a call."""
        self.owner[slots] = index
        self.slots[index, self.visits[index] % self.slots.shape[1]] = slots.to(torch.int32)
        self.visits[index] += 1
        if self.held is not None:
            self.held = min(self.held + len(slots), len(self.owner))

    def absent(self, images: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """[N, (1 + P) S] int64: the slots that hold one of the row's images, K for no slot.

        images: [N, 1 + P], present: [N, 1 + P] bool, False for padding.
        """
        slots = self.slots[images].long()  # [N, 1 + P, S]
        holds = (self.owner[slots] == images[..., None]) & present[..., None]
        return torch.where(holds, slots, len(self.owner)).flatten(1)

    @torch.no_grad()
    def count_held(self, queue: torch.Tensor, pointer: torch.Tensor) -> int:
        """How many slots of queue [C, K], from the first on, hold keys.

        A file of MoCo's does not record it. The slots before the pointer (where the next key goes)
        hold keys. So do all others, unless they are still as random as the queue began: the mean of
        n random unit rows has a squared length of about 1 / n, and that of keys, which have a
        direction in common, a larger one. A few keys may be taken for random; that changes a mean
        over all others little. Waits for the device when asked for the first time.
        """
        if self.held is None:
            oldest = int(pointer)
            rest = queue[:, oldest:].float()  # [C, n]
            written = bool((self.owner[oldest:] >= 0).all())
            alike = float(rest.mean(1).square().sum()) > 6 / rest.shape[1]
            self.held = queue.shape[1] if written or alike else oldest
        return self.held

    def take_over(self, owner: torch.Tensor, oldest: int) -> None:
        """Learn whose keys a queue holds that another run has written: owner [K], -1 for unknown.

        The next key goes into slot `oldest`.
        """
        K = len(owner)
        owner = owner.to(self.owner.device)
        slots = (torch.arange(K, device=owner.device) + oldest) % K  # [K], the oldest first
        slots = slots[owner[slots] >= 0]  # [n]
        images, order = owner[slots].sort(stable=True)  # [n] each
        first = torch.searchsorted(images, images)  # [n], where an image's keys begin
        turn = torch.arange(len(images), device=owner.device) - first  # [n], 0: its oldest key
        most = int(turn.max()) + 1 if len(turn) else 0
        if most > self.slots.shape[1]:  # that run had two keys a visit
            self.slots = self.slots.new_zeros(len(self.slots), most)
        for number in range(most):
            self.write(slots[order][turn == number], images[turn == number])

    def state_dict(self) -> dict:
        return {"slots": self.slots, "visits": self.visits, "owner": self.owner, "held": self.held}

    def load_state_dict(self, state: dict) -> None:
        for name in ("slots", "visits", "owner"):
            setattr(self, name, state[name].to(getattr(self, name), copy=True))
        self.held = state["held"]

    @staticmethod
    def state_shape(K: int) -> dict:
        slots = Tensor("int", ("M", "S"), low=0, high=K - 1)
        return {
            "slots": Holds(slots, lambda x: x.shape[1] > 0, "a slot or more of each image"),
            "visits": Tensor("int", ("M",), low=0),
            "owner": Tensor("int", (K,), low=-1, high="M"),
            "held": (Number(0, K, whole=True), None),
        }
