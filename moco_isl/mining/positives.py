"""Mined sets of positives, one an image, as compressed sparse rows (CSR) on a device.

Letters: M images in the data set, E directed edges, N batch, P positives of an image after padding.
"""

import functools

import torch

from moco_isl import schema

Tensor = torch.Tensor


class PositiveSets:
    """For every image, the other images that count as its positives.

    Set i is members[offsets[i]:offsets[i + 1]], the surest first, and among equally sure ones the
    lowest index first.

      offsets  [M + 1] int64
      members  [E] int32 (M < 2^31), images
      weights  [E] float32, what an edge counts in the loss: 1 unless a miner says otherwise
      sureness [E] float32, what edges are ranked by, on the miner's own scale; never used in a loss
    """

    def __init__(self, offsets: Tensor, members: Tensor, weights: Tensor, sureness: Tensor):
        self.offsets = offsets
        self.members = members
        self.weights = weights
        self.sureness = sureness

    @classmethod
    def empty(cls, M: int, device: torch.device | str = "cpu") -> "PositiveSets":
        offsets = torch.zeros(M + 1, dtype=torch.int64, device=device)
        none = torch.empty(0, device=device)
        return cls(offsets, none.int(), none, none.clone())

    @classmethod
    def from_edges(
        cls,
        M: int,
        src: Tensor,
        dst: Tensor,
        weight: Tensor | None = None,
        symmetric: bool = True,
        sureness: Tensor | None = None,
    ) -> "PositiveSets":
        """Sets from edges src [E] -> dst [E], in any order and with doubles.

        Self edges go; of a double edge (either direction where `symmetric`) the largest weight and
        the largest sureness stay; `symmetric` adds the reverse of every edge. Missing weights are
        1, missing sureness is 0 (order by index).
        Raises ValueError for an image outside 0..M-1. Needs about 60 bytes a directed edge while it
        works.
        """
        ends = [int(x) for side in (src, dst) if len(side) for x in side.aminmax()]
        if ends and (min(ends) < 0 or max(ends) >= M):
            raise ValueError(f"edges must join images 0 to {M - 1}")
        src, dst, (weight, sureness) = distinct_edges(M, src, dst, [weight, sureness], symmetric)
        if symmetric:
            # Ties are then in order: of any image first its partners of lower index, ascending,
            # then those of higher index.
            src, dst = torch.cat([dst, src]), torch.cat([src, dst])
            weight, sureness = (
                None if x is None else torch.cat([x, x]) for x in (weight, sureness)
            )
        if symmetric or sureness is not None:
            order = _surest_first(src, sureness)
            dst = dst[order]
            weight, sureness = (None if x is None else x[order] for x in (weight, sureness))
            del order
        offsets = torch.zeros(M + 1, dtype=torch.int64, device=src.device)
        torch.cumsum(torch.bincount(src, minlength=M), 0, out=offsets[1:])
        ones = lambda: torch.ones(len(dst), device=dst.device)
        return cls(
            offsets,
            dst.int(),
            ones() if weight is None else weight,
            ones() * 0 if sureness is None else sureness,
        )

    @property
    def device(self) -> torch.device:
        return self.members.device

    @property
    def num_images(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_edges(self) -> int:
        """Directed edges E: a pair that is mutual counts twice."""
        return len(self.members)

    def sizes(self) -> Tensor:
        """[M] int64, members of each set."""
        return self.offsets.diff()

    @functools.cached_property
    def largest(self) -> int:
        """Members of the largest set. Waits for the device when asked for the first time."""
        return int(self.sizes().max()) if self.num_edges else 0

    @property
    def mean_size(self) -> float:
        return self.num_edges / max(self.num_images, 1)

    @property
    def coverage(self) -> float:
        """Share of images with a positive."""
        return float((self.sizes() > 0).float().mean()) if self.num_images else 0.0

    def in_degree(self) -> Tensor:
        """[M] int64, in how many sets each image stands."""
        return torch.bincount(self.members, minlength=self.num_images)

    def sources(self) -> Tensor:
        """[E] int64, the image whose set each edge belongs to."""
        return torch.repeat_interleave(self.sizes(), output_size=self.num_edges)

    def precision(self, labels: Tensor) -> float:
        """Share of edges whose two ends have the same label, labels [M]; logged, never used.

        A label below 0 is an unknown one: edges to it and from it are not counted. NaN without
        edges.
        """
        same = same_label(labels.to(self.device), self.sources(), self.members)  # [E]
        return float(same.double().nanmean())

    def lookup(self, index: Tensor, P: int, turn: int = 0) -> tuple[Tensor, Tensor]:
        """The positives [N, P] int64 of the images index [N] and their weights [N, P].

        Padding is the image itself at weight 0. A set larger than P gives P consecutive members.
        With every `turn` (the epoch) that window moves on by P, and starts again at the end of the
        set. So each positive has its turn without a random draw, which all ranks and a resumed run
        would have to repeat.
        """
        if not self.num_edges:
            return index[:, None].repeat(1, P), torch.zeros(len(index), P, device=index.device)
        column = torch.arange(P, device=index.device)
        first = self.offsets[index][:, None]  # [N, 1]
        size = self.offsets[index + 1][:, None] - first  # [N, 1]
        around = size.clamp(min=1)
        start = torch.where(size > P, turn * P % around, 0)
        valid = column < size  # [N, P]
        edge = torch.where(valid, first + (start + column) % around, 0)
        members = torch.where(valid, self.members[edge].long(), index[:, None])
        return members, torch.where(valid, self.weights[edge], 0)

    def to(self, device: torch.device | str) -> "PositiveSets":
        return PositiveSets(
            *(x.to(device) for x in (self.offsets, self.members, self.weights, self.sureness))
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "offsets": self.offsets,
            "members": self.members,
            "weights": self.weights,
            "sureness": self.sureness,
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "PositiveSets":
        return cls(
            state["offsets"].long(),
            state["members"].int(),
            state["weights"].float(),
            state["sureness"].float(),
        )

    @staticmethod
    def state_shape(*names: str, edges: str = "E") -> schema.Holds:
        """The shape of sets in a file: offsets, members, and these values of the edges.

        edges: the letter of their number in the file.
        """
        shape = {
            "offsets": schema.Tensor("int", ("M+1",), low=0),
            "members": schema.Tensor("int", (edges,), low=0, high="M"),
        }
        shape |= {name: schema.Tensor("float", (edges,)) for name in names}
        return schema.Holds(shape, _is_csr, "offsets that rise from 0 to the number of members")


def _is_csr(state: dict[str, Tensor]) -> bool:
    offsets = state["offsets"].long()
    return (
        int(offsets[0]) == 0
        and int(offsets[-1]) == len(state["members"])
        and bool((offsets.diff() >= 0).all())
    )


def same_label(labels: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Whether the labels [M] of images a and b (shapes that broadcast) agree: 1 or 0, float32.

    NaN where one of them is below 0, for unknown.
    """
    a = labels[a]
    b = labels[b]
    return torch.where((a >= 0) & (b >= 0), (a == b).float(), torch.nan)


def distinct_edges(
    M: int, src: Tensor, dst: Tensor, values: list[Tensor | None], undirected: bool
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Edges src [E], dst [E] without doubles and self edges, sorted by (src, dst).

    Of a double edge the largest of each of `values` [E] stays. Where `undirected`, i -> j and
    j -> i are one edge, returned as lower -> higher.
    """
    # One int64 key an edge: M squared fits for any M below 3e9.
    key = torch.minimum(src, dst).long() if undirected else src.long()
    key = key.mul_(M) if key is not src else key * M
    key += torch.maximum(src, dst) if undirected else dst
    other = src != dst
    if not bool(other.all()):
        key = key[other]
        values = [None if x is None else x[other] for x in values]
    del other
    if all(x is None for x in values):
        key = torch.unique_consecutive(key.sort().values)
    else:
        key, order = key.sort()
        new = torch.ones_like(key, dtype=torch.bool)
        torch.ne(key[1:], key[:-1], out=new[1:])
        if bool(new.all()):
            values = [None if x is None else x.float()[order] for x in values]
        else:
            group = new.cumsum(0).sub_(1)  # [E], which distinct edge
            key = key[new]
            lowest = torch.full((len(key),), -torch.inf, device=key.device)
            largest = lambda x: lowest.scatter_reduce(0, group, x.float()[order], "amax")
            values = [None if x is None else largest(x) for x in values]
    return torch.div(key, M, rounding_mode="floor"), key % M, values


def _surest_first(src: Tensor, sureness: Tensor | None) -> Tensor:
    """[E] the stable order by (src, falling sureness): equal ones stay as they came."""
    if sureness is None:
        return src.sort(stable=True).indices
    bits = sureness.view(torch.int32).long()
    # floats of one sign are in the order of their bits, read as integers
    bits = torch.where(bits < 0, -0x80000000 - bits, bits)
    return (src << 32).sub_(bits).sort(stable=True).indices
