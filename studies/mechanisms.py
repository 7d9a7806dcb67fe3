"""How should a mined set pull? Mechanisms beside the loss of the product, one change a row.

    python -m studies.mechanisms digits --start runs/start_digits/moco,seed={seed}
    python -m studies.mechanisms tiny100 --data DIR --start runs/start_tiny100/moco,seed={seed}

Every row trains the same epochs from the same MoCo v2, a seed at a time, mined by neighbourhood
means of features and views; the row none has no sets. Widths are positives an image. The oracle's
rows draw sets of known precision from the labels instead, the nearest right and the nearest wrong
ones, to find where each mechanism breaks even; of several precisions there is a table of these and
a picture of the curves. A run that has ended is not run again.

`Mechanism` is the queue objective with switches for what peers do differently. Letters as in
moco_isl/objectives/queue.py; s a positive's row, w its weight in the target.
"""

import itertools
import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common
from moco_isl import files
from moco_isl.data.augment import BatchAugmentation, DigitAugmentation
from moco_isl.encoders import feature_dim, head_name
from moco_isl.losses import FORMS, accuracy, softmax_over, with_own_key
from moco_isl.mining.estimate import Views
from moco_isl.objectives import OBJECTIVES
from moco_isl.objectives.base import Parts
from moco_isl.objectives.queue import QueueObjective
from moco_isl.options import opt

Tensor = torch.Tensor
RATE = 0.03  # of the modules that are not MoCo's own


@dataclass(eq=False, repr=False, kw_only=True)
class Mechanism(QueueObjective):
    """The queue objective, changed by what is switched on."""

    mix: bool = opt(False, "--m-mix", help="s = unit(l s + (1 - l) k), l uniform, MNN's")
    fresh: bool = opt(False, "--m-fresh", help="members that the queue holds, by their key there")
    live: int = opt(0, "--m-live", low=0, help="the n keys of the queue nearest to k, NNCLR's")
    soft: float = opt(0.0, "--m-soft", low=0, help="w = softmax(k s / t) x confidence, ASCL's")
    twice: int = opt(0, "--m-twice", low=0, help="keys of n images near by the bank, CMSF's")
    drop: float = opt(0.0, "--m-drop", low=0, high=1, help="share of the queue nearest to k left")
    apart: bool = opt(False, "--m-apart", help="each positive against the negatives alone")
    core: int = opt(0, "--m-core", low=0, help="pull at the n surest of the set alone")
    attract: bool = opt(True, "--m-attract", help="whether the set pulls at all")
    pull: float = opt(0.0, "--m-pull", low=0, help="weight of 2 - 2 h(q) s, h a predictor, MSF's")
    head: float = opt(0.0, "--m-head", low=0, help="weight of the mined loss behind its own head")
    weak: bool = opt(False, "--m-weak", help="a weak view for the key")
    sure: bool = opt(False, "--m-sure", help="own key's share: 1 less the mean weight of the set")
    backbone: bool = opt(False, "--m-backbone", help="mine in the backbone's features")

    def __post_init__(self) -> None:
        super().__post_init__()
        weaken(self.weak)
        if self.backbone:
            self.with_backbone = WithBackbone(self.model.encoder_k)
        self.extra: nn.Module | None = None
        C = self.model.dim
        if self.pull:
            self.extra = nn.Sequential(
                nn.Linear(C, 2 * C), nn.BatchNorm1d(2 * C), nn.ReLU(), nn.Linear(2 * C, C)
            )
        if self.head:
            width = feature_dim(self.model.encoder_q)
            layers = lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, C))
            self.extra = layers()
            self.follower = layers()
            self.follower.load_state_dict(self.extra.state_dict())
            self.seen = {}
            for name in ("encoder_q", "encoder_k"):
                encoder = getattr(self.model, name)
                head = encoder.get_submodule(head_name(encoder))
                head.register_forward_pre_hook(
                    lambda module, inputs, name=name: self.seen.__setitem__(name, inputs[0])
                )
            self.rows = F.normalize(torch.randn(self.num_images, C), dim=1)
            self.known = torch.zeros(self.num_images, dtype=torch.bool)
            self.keys = F.normalize(torch.randn(self.model.K, C), dim=1)
        if self.extra is not None:
            self.optimizer = torch.optim.SGD(
                self.extra.parameters(), RATE, momentum=0.9, weight_decay=5e-4
            )

    @property
    def encoder(self) -> nn.Module:
        return self.with_backbone if self.backbone else super().encoder

    def mine_features(self, features: Tensor, miner, rng=None, tick=None, views=None, number=None):
        if self.backbone:
            C = self.model.dim
            if not self.bank.filled:
                self.bank.fill(F.normalize(features[:, -C:].float(), dim=1))
            of_backbone = lambda rows: F.normalize(rows[:, :-C].float(), dim=1)
            features = of_backbone(features)
            views = views and Views(*map(of_backbone, views[:2]), views.pixels)
        return super().mine_features(features, miner, rng, tick, views, number)

    def step(self, im_q: Tensor, im_k: Tensor, index: Tensor) -> Parts:
        if self.extra is not None:  # its gradient is that of the step before
            self.optimizer.step()
            self.optimizer.zero_grad()
        slot = int(self.model.queue_ptr)
        parts = super().step(im_q, im_k, index)
        if self.head:
            with torch.no_grad():
                for mine, its in zip(self.follower.parameters(), self.extra.parameters()):
                    mine.lerp_(its, 1 - self.model.m)
                slots = (slot + torch.arange(len(index))) % self.model.K
                self.keys[slots] = self.rows[index] = self.z_k
                self.known[index] = True
        return parts

    def loss(self, q: Tensor, k: Tensor, index: Tensor) -> Parts:
        if not self.active:
            return super().loss(q, k, index)
        T = self.model.T
        queue = self.model.queue.t()  # [K, C]
        members, present = self.whole_sets(index)  # [N, L]
        mined, weight = self.positives.lookup(index, self.P, self.turn)  # [N, P]
        if self.core:
            mined, weight = self.positives.lookup(index, self.core)
        rows = self.moved(self.bank.lookup(mined))  # [N, P, C]
        if self.fresh:
            rows = self.from_queue(mined, rows)
        alike = torch.cat([index[:, None], members], dim=1)
        own = torch.ones_like(present[:, :1])
        absent = self.slots.absent(alike, torch.cat([own, present], dim=1))
        if self.live or self.drop:
            near = self.nearest_keys(k @ queue.t(), absent)  # [N, n]
            absent = torch.cat([absent, near], dim=1)
            if self.live:
                rows = queue[near[:, : self.live]]
                weight = torch.ones(rows.shape[:2])
        if self.twice:
            slots, weight = self.near_by_the_bank(index)  # [N, n]
            rows = queue[slots]
            absent = torch.cat([absent, slots], dim=1)
        if self.mix:
            lam = torch.rand(*rows.shape[:2], 1)
            rows = F.normalize(lam * rows + (1 - lam) * k[:, None], dim=2)
        if self.soft:
            weight = self.by_similarity(k, rows, weight)
        if not self.attract:
            weight = torch.zeros_like(weight)
        l_own = (q * k).sum(1, keepdim=True) / T
        lse, top, _, _ = softmax_over(q, queue, T, absent=absent)
        if self.head or self.pull:
            isl = FORMS[self.form](l_own, lse, torch.ones_like(l_own))
            beside = self.pulled(q, rows, weight) if self.pull else self.behind_head(index, absent)
            factor = self.pull or self.head
            return self.result(isl + factor * beside, l_own, top)
        l_pos = torch.cat([l_own, (q[:, None] * rows).sum(2) / T], dim=1)
        if self.sure:
            sure = (weight.sum(1) / (weight > 0).sum(1).clamp(min=1)).clamp(max=0.99)
            factor = sure / (1 - sure) / weight.sum(1).clamp(min=1e-9)  # [N]
            weight = weight * factor[:, None]
        weight = with_own_key(weight, self.own)
        if self.apart:
            logs = l_pos - torch.logaddexp(l_pos, lse[:, None])  # [N, 1 + P]
            isl = -((weight * logs).sum(1) / weight.sum(1)).mean()
        else:
            isl = FORMS[self.form](l_pos, lse, weight)
        return self.result(isl, l_own, top)

    def result(self, loss: Tensor, l_own: Tensor, top: Tensor) -> Parts:
        none = loss.new_zeros(())
        return {"loss": loss, "isl": loss.detach(), "hpe": none, "acc1": accuracy(l_own, top)}

    def from_queue(self, mined: Tensor, rows: Tensor) -> Tensor:
        """The latest key of a member where the queue holds one, else its row."""
        last = (self.slots.visits[mined] - 1).clamp(min=0) % self.slots.slots.shape[1]
        slot = self.slots.slots[mined].gather(2, last[..., None])[..., 0].long()  # [N, P]
        held = self.slots.owner[slot] == mined
        return torch.where(held[..., None], self.model.queue.t()[slot], rows)

    def nearest_keys(self, similarity: Tensor, absent: Tensor) -> Tensor:
        """The slots nearest to k [N, n] beside those that are no negatives anyway."""
        K = self.model.K
        n = max(self.live, round(self.drop * K))
        padded = F.pad(similarity, (0, 1))
        own = absent if self.drop else absent[:, : self.slots.slots.shape[1]]
        return padded.scatter(1, own, -2.0)[:, :K].topk(n, dim=1).indices

    def near_by_the_bank(self, index: Tensor) -> tuple[Tensor, Tensor]:
        owner = self.slots.owner  # [K]
        rows = self.bank.lookup(owner.clamp(min=0))  # [K, C]
        similarity = self.bank.lookup(index) @ rows.t()
        unknown = (owner < 0) | (owner == index[:, None])
        slots = similarity.masked_fill(unknown, -2.0).topk(self.twice, dim=1).indices
        return slots, torch.ones(slots.shape)

    def by_similarity(self, k: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """w of sum 1 an image at most: the sharper, the more of it."""
        logits = (k[:, None] * rows).sum(2) / self.soft
        p = logits.masked_fill(weight == 0, -torch.inf).softmax(1).nan_to_num()
        size = (weight > 0).sum(1).clamp(min=2)
        entropy = -(p * p.clamp(min=1e-9).log()).sum(1)
        return p * (1 - 0.5 * entropy / size.log())[:, None]

    def pulled(self, q: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        self.extra.train()
        towards = F.normalize(self.extra(q).float(), dim=1)
        away = 2 - 2 * (towards[:, None] * rows).sum(2)
        return ((weight * away).sum(1) / weight.sum(1).clamp(min=1)).mean()

    def behind_head(self, index: Tensor, absent: Tensor) -> Tensor:
        """The mean of logs with a projection, a queue and a bank of its own."""
        T = self.model.T
        z_q = F.normalize(self.extra(self.seen["encoder_q"]).float(), dim=1)
        with torch.no_grad():
            self.z_k = F.normalize(self.follower(self.seen["encoder_k"]).float(), dim=1)
        mined, weight = self.positives.lookup(index, self.P, self.turn)
        weight = weight * self.known[mined]
        lse, _, _, _ = softmax_over(z_q, self.keys, T, absent=absent)
        l_own = (z_q * self.z_k).sum(1, keepdim=True) / T
        l_pos = torch.cat([l_own, (z_q[:, None] * self.rows[mined]).sum(2) / T], dim=1)
        return FORMS["meanlog"](l_pos, lse, with_own_key(weight, None))


class WithBackbone(nn.Module):
    """Images -> [unit(h), unit(z)], the backbone's features h before an encoder's output z."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.of = encoder
        self.h = None
        head = encoder.get_submodule(head_name(encoder))
        head.register_forward_pre_hook(lambda module, inputs: setattr(self, "h", inputs[0]))

    def forward(self, images: Tensor) -> Tensor:
        z = self.of(images)
        return torch.cat([F.normalize(x.float(), dim=1) for x in (self.h, z)], dim=1)


def weaken(weak: bool) -> None:
    """Make the second view of an image a crop (of digits: a turn) alone, or a whole view again."""
    for kind, first, still in ((BatchAugmentation, 23, 0.999), (DigitAugmentation, 4, 0.5)):
        plain = getattr(kind, "plain_draw", kind.draw)
        kind.plain_draw = plain

        def draw(self, start, plain=plain, first=first, still=still):
            u = plain(self, start)
            u[len(u) // 2 :, first:] = still
            return u

        kind.draw = draw if weak else plain


OBJECTIVES["mechanism"] = Mechanism
import main_moco_isl  # noqa: E402  its flags are made from OBJECTIVES
from studies import breakeven  # noqa: E402
from studies.figures import HERE, Judge, Result, linear, metrics  # noqa: E402

SETS = {  # flags of the data set, epochs and rounds, the two widths, k of kNN
    "digits": {
        "flags": [
            *("--config", str(HERE / "flags_digits.yaml"), "--amp", "bf16", "--channels-last"),
            *"--epochs 30 --isl-every 10 --lr 0.02".split(),
        ],
        "widths": (5, 100),
        "k": 50,
    },
    "tiny100": {
        "flags": [
            *("--config", str(HERE / "flags_tiny100.yaml")),
            *"--epochs 5 --isl-every 5 --lr 0.02".split(),
        ],
        "widths": (5, 50),
        "k": 200,
    },
}
MINED = "--miner studies.with_views:WithViews --isl-max-share 0.2 --isl-loss meanlog --isl-hpe 0"
ORACLE = (
    "--miner oracle --research-labels --oracle-right near --oracle-wrong near --isl-loss meanlog"
    " --isl-hpe 0"
)
FIGURES = {"knn": "kNN %", "one_shot": "1-shot %", "linear": "linear %"}
NONE = {"none": "", "none, weak view": "--objective mechanism --m-weak"}
ROWS = {  # name -> flags
    "mean of logs": "",
    "own key .2": "--isl-own 0.2",
    "own key .5": "--isl-own 0.5",
    "own key .75": "--isl-own 0.75",
    "each positive alone": "--m-apart",
    "each alone, own key .5": "--m-apart --isl-own 0.5",
    "mixed with the own key": "--m-mix",
    "fresh keys of the set": "--m-fresh",
    "5 nearest keys, every step": "--m-live 5 --isl-own 0.5",
    "weak view for the key": "--m-weak",
    "soft weights": "--m-soft 0.05",
    "weights by the estimate": "--miner studies.with_views:Weighed",
    "own key by the estimate": "--miner studies.with_views:Weighed --m-sure",
    "mined in backbone features": "--m-backbone",
    "means taken twice": "--miner studies.with_views:Twice",
    "near by the bank, current key": "--m-twice 5 --isl-own 0.5",
    "the set left out, not pulled": "--no-m-attract",
    "the set and 1 % of the queue left out": "--m-drop 0.01 --no-m-attract",
    "the set and 3 % of the queue left out": "--m-drop 0.03 --no-m-attract",
    "the set and 10 % of the queue left out": "--m-drop 0.1 --no-m-attract",
    "5 surest pulled": "--m-core 5",
    "cosine behind a predictor": "--m-pull 1",
    "a head of its own": "--m-head 1",
    "Eq. 5": "--isl-loss logsum",
    "Eq. 5 and hard positives": "--objective queue --isl-loss logsum --isl-hpe 0.5",
}


def flags_of(row: str, width: float, precision: float | None) -> str:
    if row in NONE:
        return f"--miner none {NONE[row]}"
    found = f"{MINED} --isl-budget {width:g}"
    if precision is not None:
        found = f"{ORACLE} --oracle-size {width:g} --oracle-precision {precision:g}"
    return f"--objective mechanism --isl-max-positives 64 {found} {ROWS[row]}"


def run(out: Path, seed: int, flags: list[str], start: str) -> float:
    """Train unless it has ended; returns the seconds of this process."""
    began = time.process_time()
    init = Path(start.format(seed=seed)) / "checkpoint_last.pth.tar"
    own = ["--seed", str(seed), "--init", str(init), "--out", str(out), "--keep", "1"]
    code = main_moco_isl.main([*flags, *own, "--save-epochs", "1000"])
    if code:
        sys.exit(code)
    return time.process_time() - began


def figures(args, judge: Judge, row: str, width: float, precision: float | None, seed: int) -> dict:
    """Figures of one run, kept beside it."""
    name = f"{row},{width:g}" + ("" if precision is None else f",{precision:g}") + f",seed={seed}"
    out = args.folder / name.replace(" ", "_").replace("%", "pc")
    kept = out / "figures.json"
    if kept.exists():
        return json.loads(kept.read_text())
    flags = [*([str(args.data)] if args.data else []), *SETS[args.of]["flags"]]
    given = [*flags, *flags_of(row, width, precision).split(), "--print-freq", "100000"]
    shutil.rmtree(out, ignore_errors=True)  # of a run that was ended
    seconds = run(out, seed, given, args.start)
    found = judge(out / "checkpoint_last.pth.tar") | {"seconds": seconds}
    rounds = [line for line in metrics(out) if line["kind"] == "round"]
    found["reach"] = rounds[-1].get("reach") if rounds else None
    found["precision"] = rounds[-1]["precision"] if rounds else None
    if args.linear:
        images = flags[:1] if args.data else ["--dataset", args.of]
        found["linear"] = linear(out / "checkpoint_last.pth.tar", images, out / "linear")
    files.write_text(json.dumps(found) + "\n", kept)
    return found


def table(args, runs: dict[tuple, dict[int, dict]]) -> Result:
    """runs: (row, width, precision of the oracle) -> seed -> figures."""
    title = f"How a mined set pulls: mechanisms, {args.of}"
    columns = [("row", "mechanism"), ("width", "positives an image"), ("precision", "precision")]
    for key, heading in FIGURES.items():
        columns += [(key, heading), (f"gain_{key}", f"gain, {heading.replace(' %', '')}")]
    name = f"mechanisms-{args.of}" + ("-oracle" if args.precisions else "")
    result = Result(name, title, args.device, [*columns, ("seconds", "seconds"), ("n", "n")])
    result.unshown = tuple(f"{key}_gains" for key in FIGURES)
    none = runs["none", 0, None]
    for (row, width, precision), seeds in runs.items():
        right = [x["precision"] for x in seeds.values() if x.get("precision") is not None]
        cells = {"row": row, "width": width, "n": len(seeds)}
        cells["precision"] = precision or (statistics.fmean(right) if right else None)
        cells["seconds"] = statistics.fmean(x["seconds"] for x in seeds.values())
        for key in FIGURES:
            if any(key not in x for x in seeds.values()):
                continue
            cells[key] = common.spread([x[key] for x in seeds.values()])
            pairs = [x[key] - none[seed][key] for seed, x in seeds.items() if key in none[seed]]
            cells[f"gain_{key}"] = common.spread(pairs, "+") if seeds is not none else None
            cells[f"{key}_gains"] = pairs if precision is not None else None
        result.add(cells)
    result.note(
        "Gains are over the row none, in points, paired by seed; mean ± standard deviation of n"
        " seeds. Precision is that of the last round, by labels, which steer nothing"
        + (", but of the oracle's sets, which are drawn by them." if args.precisions else ".")
    )
    return result


def break_evens(args, rows: list[dict]) -> Result:
    """Where each mechanism's gain crosses zero, and a picture of the curves; rows of `table`."""
    curves: dict[str, dict[str, breakeven.Gains]] = {}
    for row in rows:
        for key in FIGURES:
            if row.get(f"{key}_gains"):
                of = curves.setdefault(key, {}).setdefault((row["row"], row["width"]), {})
                of[row["precision"]] = row[f"{key}_gains"]
    name = f"mechanisms-{args.of}-breakeven"
    title = f"Break-even precision by mechanism, {args.of}"
    columns = [("row", "mechanism"), ("width", "positives an image")]
    columns += [(key, FIGURES[key].removesuffix(" %")) for key in curves]
    result = Result(name, title, args.device, [*columns, ("n", "n")])
    for at in curves["knn"]:
        cells = {key: breakeven.in_words(lines[at]) for key, lines in curves.items()}
        n = min(map(len, curves["knn"][at].values()))
        result.add({"row": at[0], "width": at[1], "n": n, **cells})
    result.note(
        "From which precision on sets drawn by labels help, right and wrong ones near. In brackets:"
        " 5th to 95th percentile of 1,000 bootstrap draws of the seeds."
    )
    if args.picture:
        panels = {}
        for key, lines in curves.items():
            several = len({width for _, width in lines}) > 1
            named = {f"{row}, {w:g}" if several else row: x for (row, w), x in lines.items()}
            panels[FIGURES[key].removesuffix(" %")] = named
        breakeven.draw_panels(panels, "points over no sets", args.picture, sharey=False)
        print(f"  written: {args.picture}")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("of", choices=SETS)
    parser.add_argument("--data", type=Path, help="its folder")
    parser.add_argument("--start", required=True, help="folders of the MoCo v2, {seed} in them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rows", nargs="+", choices=[*NONE, *ROWS], default=list(ROWS), metavar="ROW"
    )
    parser.add_argument("--widths", type=float, nargs="+", help="positives an image")
    parser.add_argument(
        "--precisions", type=float, nargs="+", default=[], help="of an oracle's sets"
    )
    parser.add_argument("--linear", action="store_true", help="a linear probe of every run too")
    parser.add_argument(
        "--picture", type=Path, metavar="OUT.svg", help="the curves of several --precisions"
    )
    parser.add_argument("--folder", type=Path, help="of the runs (runs/mechanisms_<of>)")
    args = parser.parse_args(argv)
    common.begin(args)
    args.folder = args.folder or Path("runs") / f"mechanisms_{args.of}"
    given = SETS[args.of]
    judge = Judge([*([str(args.data)] if args.data else []), *given["flags"]], given["k"], "cpu")
    points = [(row, 0, None) for row in NONE if row == "none" or row in args.rows]
    points += itertools.product(
        [row for row in args.rows if row in ROWS],
        args.widths or given["widths"],
        args.precisions or [None],
    )
    runs = {point: {} for point in points}
    for seed, point in itertools.product(args.seeds, points):
        runs[point][seed] = figures(args, judge, *point, seed)
    found = table(args, runs)
    common.end(args, found)
    if len(args.precisions) > 1:
        common.end(args, break_evens(args, found.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
