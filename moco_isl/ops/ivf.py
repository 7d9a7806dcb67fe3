"""Approximate search by faiss: an inverted file that `neighbors.topk` takes in place of a bank.

The bank's rows are sorted into lists, one around each centroid of a k-means. A query is compared
with the centroids, and then only with the rows of the `nprobe` lists whose centroids are nearest.
faiss is an extra: pip install 'moco_isl[faiss]'. It is imported when the first index is built.

Letters: M bank rows, Q queries, C feature dimension, k neighbours, L lists.
"""

import importlib.util
import math

import torch

from moco_isl.errors import BadInput, missing_package
from moco_isl.ops.kmeans import kmeans
from moco_isl.ops.neighbors import Tick, in_order, topk

Tensor = torch.Tensor

CHOICES = ("exact", "ivf", "auto")
WINS = {"cpu": 100_000, "cuda": 14_000_000}  # rows from which "auto" takes an index
RECALL = 0.95  # share of a sample's nearest to be found; nprobe is raised until it is
NEAREST = 10  # nearest rows of a query over which recall is measured
SAMPLE = 1000  # rows of the bank that are searched to measure it
PER_LIST = 40  # rows a list that the k-means is fitted to
ITERATIONS = 10  # iterations of the k-means
_HALF_FROM = 8 << 30  # bytes of a float32 copy from which the lists hold float16
_SPARE = 6  # rows found beyond k in lists of float16, so that rounding costs no true neighbour
_QUERIES = 1024  # queries in one call of faiss
_NUMBERS = 1 << 23  # numbers in the rows that are compared again at a time
_ROWS = 1 << 16  # added in one call


def installed() -> bool:
    return importlib.util.find_spec("faiss") is not None


def check_choice(choice: str) -> None:
    """Raise BadInput where `choice` is none of CHOICES, or is "ivf" and faiss is not installed."""
    if choice not in CHOICES:
        raise BadInput(f"index {choice!r} is unknown: use {', '.join(CHOICES)}")
    if choice == "ivf" and not installed():
        raise missing_package("an approximate index (ivf)", "faiss", "'moco_isl[faiss]'")


def wanted(choice: str, rows: Tensor) -> bool:
    """Whether `choice` asks for an index of these rows [M, C]."""
    if choice == "auto":
        return installed() and wins(len(rows), rows.device)
    return choice == "ivf"


def wins(M: int, device: torch.device) -> bool:
    """Whether an index of M rows pays on this device."""
    return M >= WINS.get(device.type, WINS["cpu"])


class IVF:
    """An inverted file of unit rows [M, C], float32 or half precision, on any device.

    rows: the bank itself. lists: L. nprobe: lists a query looks into. recall: how much of the 10
    nearest of 1,000 rows of the bank is found, measured against the exact search. It can be lower
    for a k above 10 and for queries that are no rows of the bank, such as the proxies of a GAN.

    The lists hold a copy of the bank: in float32, or in float16 where the bank is in half precision
    or the copy would take 8 GiB. The same rows give the same index: sample and k-means have fixed
    seeds.
    """

    def __init__(self, rows: Tensor, tick: Tick | None = None, recall: float = RECALL):
        """Build it. recall: what nprobe is raised for; 1 makes every query look into all lists."""
        import faiss

        M, C = rows.shape
        self.rows = rows
        self.lists = max(1, min(round(4 * math.sqrt(M)), M // 8))
        half = rows.dtype != torch.float32 or 4 * rows.numel() >= _HALF_FROM
        self._spare = _SPARE if half else 0
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(M, generator=generator).to(rows.device)
        sample = rows[order[: PER_LIST * self.lists]]
        _, centroids = kmeans(sample, self.lists, ITERATIONS, generator, tick)

        faiss.omp_set_num_threads(torch.get_num_threads())
        metric = faiss.METRIC_INNER_PRODUCT
        quantizer = faiss.IndexFlatIP(C)
        quantizer.add(_numpy(centroids))
        if half:
            kind = faiss.ScalarQuantizer.QT_fp16
            index = faiss.IndexIVFScalarQuantizer(quantizer, C, self.lists, kind, metric, False)
        else:
            index = faiss.IndexIVFFlat(quantizer, C, self.lists, metric)
        index.train(_numpy(centroids))  # the centroids are there: this only declares it trained
        if rows.device.type == "cuda" and faiss.get_num_gpus():
            resources = faiss.StandardGpuResources()
            index = faiss.index_cpu_to_gpu(resources, rows.device.index or 0, index)
        for part in rows.split(_ROWS):
            if tick is not None:
                tick()
            index.add(_numpy(part))
        self._index = index
        self._raise_nprobe(order[:SAMPLE], recall, tick)

    def __len__(self) -> int:
        return len(self.rows)

    def _raise_nprobe(self, sample: Tensor, target: float, tick: Tick | None) -> None:
        """Take the fewest lists, in steps of a fourth, by which the sample's recall is the target.

        Two standard errors are taken off the recall: the sample may be easier than all rows.
        """
        k = min(NEAREST, len(self) - 1)
        queries = self.rows[sample]
        self.nprobe = 0
        self.recall = 1.0
        if k == 0:
            self.nprobe = self.lists
            return
        least = topk(queries, self.rows, k, sample, tick=tick)[0][:, -1:] - 1e-6  # [S, 1]
        while self.nprobe < self.lists:
            self.nprobe = min(self.lists, max(self.nprobe + 1, self.nprobe * 5 // 4))
            cosine, _ = self._look(queries, k, sample, tick)
            found = (cosine >= least).double().mean(1)  # [S]; equal rows are equally good
            self.recall = float(found.mean())
            error = float(found.std(correction=0)) / math.sqrt(len(found))
            if self.recall - 2 * error >= target and target < 1:
                return

    def topk(
        self, queries: Tensor, k: int, exclude: Tensor | None = None, tick: Tick | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `neighbors.topk` of this bank, but some of the nearest rows may be missing.

        Cosines are exact. A query whose lists hold fewer than k rows is searched exactly.
        """
        cosine, row = self._look(queries, k, exclude, tick)
        few = (row[:, -1] < 0).nonzero().squeeze(1)
        if len(few):
            own = None if exclude is None else exclude[few]
            cosine[few], row[few] = topk(queries[few], self.rows, k, own, tick=tick)
        return cosine, row

    def _look(
        self, queries: Tensor, k: int, exclude: Tensor | None, tick: Tick | None
    ) -> tuple[Tensor, Tensor]:
        """As `topk`, but search only the lists.

        Where they hold fewer than k rows the last ones are -1, with cosine -inf.
        """
        wide = k + (exclude is not None) + self._spare
        step = max(1, min(_QUERIES, _NUMBERS // (wide * queries.shape[1])))
        cosine = torch.empty(len(queries), k, device=self.rows.device)
        row = torch.empty(len(queries), k, dtype=torch.int64, device=self.rows.device)
        self._index.nprobe = self.nprobe
        for i in range(0, len(queries), step):
            if tick is not None:
                tick()
            q = queries[i : i + step]
            found = torch.from_numpy(self._index.search(_numpy(q), wide)[1])  # [n, wide]
            found = found.to(self.rows.device)
            exact = torch.einsum("qc,qkc->qk", q.float(), self.rows[found.clamp(min=0)].float())
            absent = found < 0
            if exclude is not None:
                absent |= found == exclude[i : i + step, None]
            exact = exact.masked_fill(absent, -torch.inf)
            value, at = in_order(exact, found.masked_fill(absent, -1))
            cosine[i : i + step] = value[:, :k]
            row[i : i + step] = at[:, :k]
        return cosine, row


def _numpy(rows: Tensor):
    """Rows as faiss takes them: float32, contiguous, on the CPU."""
    return rows.float().contiguous().cpu().numpy()
