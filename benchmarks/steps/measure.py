"""One case measured: limit, ours and plain, step by step and round by round."""

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain_loop import WORKERS, PlainLoop
from benchmarks.steps import card
from benchmarks.steps.cases import Case, first_images
from benchmarks.steps.clock import algorithms, in_turn, ratios, spread, timed, untouched_memory, wait_until_quiet
from benchmarks.steps.limit import Limit, best
from benchmarks.steps.ours import Ours, make_teachers
from pipeline.data.sources import ImageData
from pipeline.distill import networks

AHEAD = 2 * WORKERS
"""Batches that a loader's workers make in advance (torch's prefetch factor is 2)."""
MOST = 200
"""Batches in a round of one step."""


def measure(
    case: Case,
    data: ImageData,
    machine: Mapping[str, Any],
    rounds: int,
    seconds: float,
    compile_: bool,
    more: tuple[str, ...],
) -> dict[str, Any]:
    """The case's line of the results.

    Args:
        machine: as `card.rates` gives it.
        seconds: for the rounds, all contestants together.
        compile_: whether the limit is tried through torch.compile too.
        more: overrides of ours' configuration.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="asib-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = case.config(folder, 1, more)
        device = networks.device_of(config)
        few = first_images(data, 2 * case.batch)
        student = networks.build_student(config, few)
        teachers = make_teachers(case, few, folder)
        limits, tried = best(
            case,
            lambda kind: Limit(case, config, student, teachers, device, kind),
            compile_,
            steps=1 if device.type == "cpu" else 10,
        )
        nets = {"student": student} | {f"teacher_{k}": t for k, t in enumerate(teachers)}
        batches = batches_of(case, tried, rounds, seconds)
        images = first_images(data, max(batches * case.batch, case.images))
        with ExitStack() as stack:
            ours = stack.enter_context(closing(Ours(case, images, rounds + 1, folder, more, batches=batches)))
            turns: dict[str, Callable[[str], float]] = {
                "limit": lambda which: limits[which].seconds(which, batches),
                "ours": ours.seconds,
            }
            if case.method == "asib":
                plain = PlainLoop(config, data, student, teachers, 1 + batches + AHEAD, case.dtype, device)
                stack.enter_context(closing(plain))
                turns["plain"] = lambda which: plain_seconds(plain, which, batches)
            for which in case.steps:  # not counted: the first of each phase
                ours.seconds(which)
                if "plain" in turns:
                    plain_seconds(plain, which, 1)
            taken = _rounds(case, turns, ours, rounds)
        steps = {}
        for which, limit in limits.items():
            work = card.work(nets, which, limit.x[:2], limit.clean and "fusion" in limit.networks)
            found = _summary(taken[which], batches * case.batch)
            speed = found["images_per_second"]["ours"]["median"]
            uses = card.used(speed, work, machine, case.precision)
            steps[which] = {"limit_kind": limit.kind, **found, "work": work, "ours_uses": uses}
    gc.collect()
    memory = {}
    if device.type == "cuda":
        memory["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "case": case.name,
        "method": case.method,
        "pair": case.pair.name,
        "precision": case.precision,
        "batch": case.batch,
        "batches_per_round": batches,
        "limit_tried_seconds_per_step": tried,
        "steps": steps,
        **memory,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def batches_of(case: Case, tried: Mapping[str, Mapping[str, Any]], rounds: int, seconds: float) -> int:
    """Batches per round: as many as the seconds allow, the same for all contestants."""
    fastest = {which: min(t[which] for t in tried.values() if which in t) for which in case.steps}
    # at most three contestants, and ours' first epochs, which are not counted
    return max(1, min(MOST, round(seconds / (sum(fastest.values()) * (3 * rounds + 1)))))


def _rounds(
    case: Case, turns: Mapping[str, Callable[[str], float]], ours: Ours, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds in rounds of one A-step's and one B-step's contestants: ours follows its plan, A and B alternating.

    Returns:
        By step and contestant; and ours' `evaluation` and `saving` outside its turn.
    """
    found: dict[str, dict[str, list[float]]] = {
        which: {name: [] for name in (*turns, "evaluation", "saving")} for which in case.steps
    }
    for number in range(rounds):
        for which, seconds in found.items():
            for name in in_turn(turns, number):
                wait_until_quiet()
                seconds[name].append(turns[name](which))
            seconds["evaluation"].append(ours.evaluation_seconds)
            seconds["saving"].append(ours.saving_seconds)
    return found


def plain_seconds(plain: PlainLoop, which: str, batches: int) -> float:
    """Seconds that `batches` steps of the plain loop take; workers start with full queues and refill them."""
    with algorithms(deterministic=False), untouched_memory(plain.device):
        iterator = iter(plain.loader)
        next(iterator)
        wait_until_quiet()
        seconds = timed(plain.device, lambda: plain.step(which, next(iterator)), batches)
        for _ in iterator:
            pass  # made in advance: plain's workers are idle in the others' turns
    return seconds


def _summary(seconds: Mapping[str, list[float]], images: int) -> dict[str, Any]:
    """Images per second of each contestant, their ratios round by round, what ours does besides."""
    speed = {
        name: [images / value for value in seconds[name]] for name in ("limit", "ours", "plain") if name in seconds
    }
    return {
        "images_per_second": {name: spread(values) for name, values in speed.items()},
        **{f"ours_to_{name}": ratios(speed["ours"], other) for name, other in speed.items() if name != "ours"},
        "ours_evaluation_seconds": spread(seconds["evaluation"], 3),
        "ours_saving_seconds": spread(seconds["saving"], 3),
    }
