"""Part B: what a step, a round and a search take, with the GPU to themselves."""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import common, growth, knn, profiling, step
from benchmarks.pack.record import Context

FORMS = {step.PUBLISHED: "published", step.FAST: "fast", step.WITH_ISL: "fast, ISL on"}
NAMES = {
    "photos": "R50 224 px, batch 256",
    "w32": "CIFAR R18 w32, batch 512",
    "w64": "CIFAR R18 w64, batch 512",
}
# ms a step on one H200: what was seen before this code ran there, and the goal
BEFORE = {"photos": {"published": 165.7, "fast": 52.5}}
GOALS = {"photos": 45.0, "w64": 512 / 31_000 * 1e3, "w32": 512 / 80_000 * 1e3}
ISL_ADDS = "{}: what ISL adds"
PROFILE = "all kernels of a fast ResNet-50 step"
GAN = "GAN, 20,000 iterations"
GAN_COMPILED = "GAN, 20,000 iterations, compiled"
MINING = "mining pass, M = 1,281,167"
KNN = "kNN, 1,281,167 x 50,000, k 200"
LOSS = "bank loss, M = 1,281,167"
PLAN = {
    "photos": [
        *(f"{NAMES['photos']}, {form}" for form in FORMS.values()),
        ISL_ADDS.format(NAMES["photos"]),
        PROFILE,
    ],
    "mining": [GAN, GAN_COMPILED, MINING, KNN, LOSS],
    "small": [
        f"{NAMES[name]}, {form}" for name in ("w64", "w32") for form in ("published", "fast")
    ],
}
KEPT = ("value", "unit", "low", "high", "n", "images_per_s", "memory_gib")  # of a timing
LARGEST = 25


class Rows(common.Result):
    """Collects a benchmark's rows, and sends its notes to the record."""

    def __init__(self, context: Context, name: str):
        self.context = context
        self.name = name
        self.columns = None
        self.device = context.device
        self.rows = []

    def add(self, row: dict, of: str | None = None) -> dict:
        self.rows.append(row)
        return row

    def note(self, text: str) -> None:
        self.context.record.add("note", text)


def figures_of(row: dict) -> dict:
    """What the record keeps of a timing."""
    return {key: row.get(key) for key in KEPT}


# ---------------------------------------------------------------- steps


def photos(context: Context) -> None:
    """Measure the forms that users have first, and the published one, which is known, last."""
    forms = Forms(context, "photos")
    for form in ("fast", "fast, ISL on"):
        forms.time(form)
    if {"fast", "fast, ISL on"} <= forms.turns.keys():
        with context.row("figures", ISL_ADDS.format(NAMES["photos"]), 30) as row:
            row |= isl_adds(forms.turns, context.device)
    if "fast" in forms.turns:
        with context.row("figures", PROFILE, 30) as row:
            row |= kernels(context, forms.turns["fast"], forms.work.steps)
    forms.time("published")


def small(context: Context) -> None:
    forms = {name: Forms(context, name) for name in ("w32", "w64")}
    for form in ("fast", "published"):
        for name in forms:
            forms[name].time(form)


def work_of(name: str, quick: bool) -> step.Work:
    work = step.ROWS[name]
    if quick:
        return replace(work, **step.QUICK)
    return replace(work, steps=8 if work.photos else 20)


class Forms:
    """The forms of a step as `step.forms` has them.

    turns: those that could be had, as calls that take `work.steps` steps.
    """

    def __init__(self, context: Context, name: str):
        self.context = context
        self.name = name
        self.work = work_of(name, context.quick)
        found = step.forms(self.work, context.device, lambda text: None)
        self.builds = {FORMS[form]: build for form, build in found if form in FORMS}
        self.turns: dict[str, Callable] = {}
        self.memory = 0  # bytes held before the form, or before the one whose model it shares

    def time(self, form: str) -> None:
        """A row of one form. "fast, ISL on" has the model of "fast", which must be there."""
        context = self.context
        device = self.context.device
        with context.row("figures", f"{NAMES[self.name]}, {form}", 60) as row:
            if form != "fast, ISL on":
                self.memory = torch.cuda.memory_allocated(device)
            turn = self.builds[form]()
            turn()  # compilers and cudnn's trials
            common.peak_gib(device, reset=True)
            repeats = 3 if form == "published" else 5
            timing = common.timed(turn, device, 2 if context.quick else repeats, warmup=1)
            memory = common.peak_gib(device) - self.memory / 2**30
            timing = common.Timing([seconds / self.work.steps for seconds in timing.seconds])
            rate = self.work.N / timing.median
            row |= figures_of(timing.row("", images_per_s=rate, memory_gib=memory))
            row["bar"] = BEFORE.get(self.name, {}).get(form)
            row["goal"] = GOALS.get(self.name) if form == "fast" else None
            self.turns[form] = turn


def isl_adds(turns: dict[str, Callable], device: torch.device) -> dict:
    """Per cent that ISL adds to a step, by pairs of turns that alternate."""
    pair = {form: turns[form] for form in ("fast", "fast, ISL on")}
    off, on = common.in_turns(pair, device, repeats=8, warmup=0).values()
    extra = [100 * (b / a - 1) for a, b in zip(off.seconds, on.seconds)]
    return {**figures_of(common.extremes("", extra, "%")), "goal": 1}


def kernels(context: Context, turn: Callable, steps: int) -> dict:
    """The largest kernels of a step as rows of their own; what all of them take together."""
    costs = profiling.costs(turn, torch.device("cpu") if context.rehearsal else context.device)
    spent = {name: ms for parts in costs.values() for name, ms in parts.items()}
    total = sum(spent.values())
    for name in sorted(spent, key=spent.get, reverse=True)[:LARGEST]:
        context.record.add(
            "kernels", name[:160], value=spent[name] / steps, share=100 * spent[name] / total
        )
    said = f"{len(spent)} kinds of kernels by torch.profiler"
    return {"value": total / steps, "unit": "ms", "said": said}


# ---------------------------------------------------------------- rounds and searches


def mining_sizes(context: Context) -> argparse.Namespace:
    """What `benchmarks.growth` is asked for."""
    sizes = {"iters": 20_000, "gan_images": 50_000, "images": [1_281_167], "batch": 256}
    if context.quick:
        sizes = {"iters": 40, "gan_images": 500, "images": [600], "batch": 16}
    return argparse.Namespace(device=context.device, repeats=1, **sizes)


def warm_gan(context: Context) -> None:
    """Compile the GAN's losses, so that `mining` finds the compiler's work done."""
    args = mining_sizes(context)
    args.iters = 40
    growth.time_gan(args, True)


def mining(context: Context) -> None:
    args = mining_sizes(context)
    quick = context.quick
    device = context.device
    for what, compiled in ((GAN, False), (GAN_COMPILED, True)):
        with context.row("figures", what, 30) as row:
            timing, first = growth.time_gan(args, compiled)
            row |= figures_of(timing.row("", "s"))
            row |= {"goal": 6, "said": f"the first 20 in {first:.1f} s"}
    with context.row("figures", MINING, 50) as row:
        rows = Rows(context, "mining")
        growth.measure_mining(args, rows)
        row |= {**figures_of(rows.rows[0]), "goal": 10}
    with context.row("figures", KNN, 40) as row:
        M, Q, k = (5000, 40, 10) if quick else (1_281_167, 50_000, 200)
        found = knn.measure(M, Q, 128, k, device, torch.float32, 1 if quick else 2)
        again = found["again_percent"]
        row |= {"value": found["seconds"], "unit": "s", "n": found["n"], "goal": 10}
        row["memory_gib"] = (found["peak_mib"] or 0) / 1024
        row["said"] = "not by the kernel"
        if again is not None:
            row["said"] = f"{again:.2f} % of the queries searched again"
    with context.row("figures", LOSS, 30) as row:
        rows = Rows(context, "loss")
        growth.measure_loss(args, rows)
        fused = next((found for found in rows.rows if "fused" in found["what"]), None)
        if fused is None:
            raise RuntimeError("not by the kernel: it was left out")
        row |= {**figures_of(fused), "goal": growth.BARS["loss"][1]}
