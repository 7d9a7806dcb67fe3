"""Part B: what a step, a round and a search take, with the GPU to themselves."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import common, growth, knn, profiling, step
from benchmarks.pack.record import Context

FORMS = {step.PUBLISHED: "published", step.FAST: "fast", step.WITH_ISL: "fast, ISL on"}
NAMES = {"photos": "R50 224 px, batch 256", "w32": "CIFAR R18 w32, batch 512", "w64": "CIFAR R18 w64, batch 512"}
# ms a step on one H200: what was seen before this code ran there, and the goal
BEFORE = {"photos": {"published": 165.7, "fast": 52.5}}
GOALS = {"photos": 45.0, "w64": 512 / 31_000 * 1e3}
ISL_ADDS = "{}: what ISL adds"
GAN, GAN_COMPILED = "GAN, 20,000 iterations", "GAN, 20,000 iterations, compiled"
MINING, KNN, LOSS = "mining pass, M = 1,281,167", "kNN, 1,281,167 x 50,000, k 200", "bank loss, M = 1,281,167"
PLAN = {
    "photos": [*[f"{NAMES['photos']}, {form}" for form in FORMS.values()], ISL_ADDS.format(NAMES["photos"])],
    "mining": [GAN, GAN_COMPILED, MINING, KNN, LOSS],
    "small": [f"{NAMES[name]}, {form}" for name in ("w64", "w32") for form in ("published", "fast")],
}
LARGEST = 25


class Rows(common.Result):
    """Of a benchmark's rows what it measures; they go into the record."""

    def __init__(self, context: Context, name: str):
        self.context, self.name, self.columns, self.device = context, name, None, context.device
        self.rows, self.notes = [], []

    def add(self, row: dict, of: str | None = None) -> dict:
        self.rows.append(row)
        return row

    def note(self, text: str) -> None:
        self.context.record.add("note", text)


def figures_of(row: dict) -> dict:
    """What the record keeps of a timing."""
    return {key: row.get(key) for key in ("value", "unit", "low", "high", "n", "images_per_s", "memory_gib")}


# ---------------------------------------------------------------- steps


def photos(context: Context) -> None:
    turns, work = steps(context, "photos", tuple(FORMS.values()))
    if {"fast", "fast, ISL on"} <= turns.keys():
        with context.row("figures", ISL_ADDS.format(NAMES["photos"]), 30) as row:
            row |= isl_adds(turns, context.device)
    if "fast" in turns:
        kernels(context, turns["fast"], work.steps)


def small(context: Context) -> None:
    for name in ("w64", "w32"):
        steps(context, name, ("published", "fast"))


def work_of(name: str, quick: bool) -> step.Work:
    work = step.ROWS[name]
    return replace(work, **step.QUICK) if quick else replace(work, steps=8 if work.photos else 20)


def steps(context: Context, name: str, wanted: tuple[str, ...]) -> tuple[dict[str, Callable], step.Work]:
    """Time the forms of a step, one after the other; returns those that could be had, as calls that take `steps` steps."""
    device, work, turns = context.device, work_of(name, context.quick), {}
    for form, build in step.forms(work, device, lambda text: None):
        title = FORMS.get(form)
        if title not in wanted or context.left() < 1:
            continue
        with context.row("figures", f"{NAMES[name]}, {title}", 60) as row:
            before = torch.cuda.memory_allocated(device)
            turn = build()
            turn()  # compilers and cudnn's trials
            common.peak_gib(device, reset=True)
            timing = common.timed(turn, device, repeats=2 if context.quick else 5, warmup=1)
            memory = common.peak_gib(device) - before / 2**30
            timing = common.Timing([seconds / work.steps for seconds in timing.seconds])
            row |= figures_of(timing.row("", images_per_s=work.N / timing.median, memory_gib=memory))
            row |= {"bar": BEFORE.get(name, {}).get(title), "goal": GOALS.get(name) if title == "fast" else None}
            turns[title] = turn
    return turns, work


def isl_adds(turns: dict[str, Callable], device: torch.device) -> dict:
    """Per cent that ISL adds to a step, by pairs of turns that alternate."""
    timings = common.in_turns({form: turns[form] for form in ("fast", "fast, ISL on")}, device, repeats=8, warmup=0)
    extra = [100 * (on / off - 1) for off, on in zip(*(timing.seconds for timing in timings.values()))]
    return {"value": statistics.median(extra), "unit": "%", "low": min(extra), "high": max(extra), "n": len(extra), "goal": 1}


def kernels(context: Context, turn: Callable, steps: int) -> None:
    """The largest kernels of a step as rows, and how many there are."""
    costs = profiling.costs(turn, torch.device("cpu") if context.rehearsal else context.device)
    spent = {name: ms for parts in costs.values() for name, ms in parts.items()}
    total = sum(spent.values())
    for name in sorted(spent, key=spent.get, reverse=True)[:LARGEST]:
        context.record.add("kernels", name[:160], value=spent[name] / steps, share=100 * spent[name] / total)
    context.record.add("kernels", f"all {len(spent)} kinds of kernels", value=total / steps, share=100.0)


# ---------------------------------------------------------------- rounds and searches


def mining_sizes(context: Context) -> argparse.Namespace:
    """What `benchmarks.growth` is asked for."""
    quick = context.quick
    sizes = {"iters": 40, "gan_images": 500, "images": [600], "batch": 16} if quick else {"iters": 20_000, "gan_images": 50_000, "images": [1_281_167], "batch": 256}
    return argparse.Namespace(device=context.device, repeats=1, **sizes)


def warm_gan(context: Context) -> None:
    """Compile the GAN's losses, so that `mining` finds the compiler's work done."""
    args = mining_sizes(context)
    args.iters = 40
    growth.time_gan(args, True)


def mining(context: Context) -> None:
    args, quick, device = mining_sizes(context), context.quick, context.device
    for what, compiled in ((GAN, False), (GAN_COMPILED, True)):
        with context.row("figures", what, 30) as row:
            timing, first = growth.time_gan(args, compiled)
            row |= {**figures_of(timing.row("", "s")), "goal": 6, "said": f"the first 20 in {first:.1f} s"}
    with context.row("figures", MINING, 50) as row:
        rows = Rows(context, "mining")
        growth.measure_mining(args, rows)
        row |= {**figures_of(rows.rows[0]), "goal": 10}
    with context.row("figures", KNN, 40) as row:
        M, Q, k = (5000, 40, 10) if quick else (1_281_167, 50_000, 200)
        found = knn.measure(M, Q, 128, k, device, torch.float32, 1 if quick else 2)
        row |= {"value": found["seconds"], "unit": "s", "n": found["n"], "memory_gib": (found["peak_mib"] or 0) / 1024, "goal": 10,
                "said": f"{found['again_percent'] or 0:.2f} % of the queries searched again"}  # fmt: skip
    with context.row("figures", LOSS, 30) as row:
        rows = Rows(context, "loss")
        growth.measure_loss(args, rows)
        fused = next(found for found in rows.rows if "fused" in found["what"])
        row |= {**figures_of(fused), "goal": growth.BARS["loss"][1]}
