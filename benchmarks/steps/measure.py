"""One case measured: limit, ours and plain, step by step and round by round."""

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain_loop import WORKERS, PlainLoop
from benchmarks.steps import card
from benchmarks.steps.cases import Case, first_images
from benchmarks.steps.clock import Window, algorithms, interleaved, ratios, spread, untouched_memory, wait_until_quiet
from benchmarks.steps.limit import Limit, best, kinds
from benchmarks.steps.ours import Ours, make_teachers
from pipeline.data.sources import ImageData
from pipeline.distill import networks

AHEAD = 2 * WORKERS
"""Batches that a loader's workers make in advance (torch's prefetch factor is 2)."""


@dataclass(frozen=True)
class Effort:
    """How long a case may take.

    Attributes:
        seconds: for its rounds, all contestants together.
        fewest, most: batches in a round of one step.
    """

    rounds: int
    seconds: float
    fewest: int = 1
    most: int = 200
    compile: bool = False
    plain: bool = True
    ours: tuple[str, ...] = ()
    """Overrides of ours' configuration."""


def measure(
    case: Case, data: ImageData, device: torch.device, effort: Effort, machine: dict[str, Any]
) -> dict[str, Any]:
    """The case's line of the results; `machine` as `card.rates` gives it."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="asib-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = case.config(folder, 1, str(device), effort.ours)
        few = first_images(data, 2 * case.batch)
        student = networks.build_student(config, few)
        teachers = make_teachers(case, few, folder, device)
        limits, tried = best(
            case,
            lambda kind: Limit(case, config, student, teachers, device, kind),
            kinds(device, effort.compile),
            steps=1 if device.type == "cpu" else 10,
        )
        nets = {"student": student} | {f"teacher_{k}": t for k, t in enumerate(teachers)}
        for which, limit in limits.items():
            limit.work[which] = card.work(nets, which, limit.x[:2], limit.clean)
        batches = batches_of(case, tried, effort)
        images = first_images(data, batches * case.batch)
        plain = (
            PlainLoop(config, data, student, teachers, 1 + batches + AHEAD, case.dtype, device)
            if effort.plain
            else None
        )
        ours = Ours(case, images, effort.rounds + 1, folder, device, effort.ours)
        try:
            found = _steps(case, limits, ours, plain, batches, effort, machine)
        finally:
            if plain is not None:
                plain.close()
            ours.close()
    gc.collect()
    memory = {}
    if device.type == "cuda":
        memory["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "case": case.name,
        "pair": case.pair.name,
        "precision": case.precision,
        "batch": case.batch,
        "batches_per_round": batches,
        "limit_tried_seconds_per_step": tried,
        "steps": found,
        **memory,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def batches_of(case: Case, tried: dict[str, dict[str, float | str]], effort: Effort) -> int:
    """As many in every round as the effort's seconds allow, the same for all."""
    fastest = {which: min(float(t[which]) for t in tried.values() if which in t) for which in case.pair.steps}
    contestants = 3 if effort.plain else 2
    # and ours' first epochs, which are not counted
    per_batch = sum(fastest.values()) * (contestants * effort.rounds + 1)
    return max(effort.fewest, min(effort.most, round(effort.seconds / per_batch)))


def _steps(
    case: Case,
    limits: dict[str, Limit],
    ours: Ours,
    plain: PlainLoop | None,
    batches: int,
    effort: Effort,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """Rounds of one A-step's and one B-step's contestants in turn: ours goes through its plan, A and B alternating."""
    for which in case.pair.steps:  # not counted: the first of each phase
        ours.seconds(which)
        if plain is not None:
            plain_seconds(plain, which, 1)
    seconds: dict[str, dict[str, list[float]]] = {which: {} for which in case.pair.steps}
    around: dict[str, list[dict[str, float]]] = {which: [] for which in case.pair.steps}
    for number in range(effort.rounds):
        for which in case.pair.steps:
            turns = _contestants(which, limits[which], ours, plain, batches)
            names = list(turns)
            shift = number % len(names)
            order = {name: turns[name] for name in names[shift:] + names[:shift]}
            for name, values in interleaved(order, 1, wait_until_quiet).items():
                seconds[which].setdefault(name, []).extend(values)
            around[which].append({"evaluation": ours.evaluation_seconds, "saving": ours.saving_seconds})
    images = batches * case.batch
    return {
        which: _summary(case, which, limits[which], seconds[which], around[which], images, machine)
        for which in case.pair.steps
    }


def _contestants(
    which: str, limit: Limit, ours: Ours, plain: PlainLoop | None, batches: int
) -> dict[str, Callable[[], float]]:
    found = {"limit": lambda: limit.seconds(which, batches), "ours": lambda: ours.seconds(which)}
    if plain is not None:
        found["plain"] = lambda: plain_seconds(plain, which, batches)
    return found


def plain_seconds(plain: PlainLoop, which: str, batches: int) -> float:
    """Seconds that `batches` steps of the plain loop take; workers start with full queues and refill them."""
    with algorithms(deterministic=False), untouched_memory(plain.device):
        iterator = plain.epoch()
        next(iterator)
        wait_until_quiet()
        window = Window(plain.device)
        window.open()
        for _ in range(batches):
            plain.step(which, next(iterator))
        seconds = window.shut()
        for _ in iterator:
            pass  # made in advance: nobody works for plain in another's turn
    return seconds


def _summary(
    case: Case,
    which: str,
    limit: Limit,
    seconds: dict[str, list[float]],
    around: list[dict[str, float]],
    images: int,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """Images per second of each contestant, their ratios round by round, what the step takes of the machine."""
    speed = {name: [images / value for value in values] for name, values in seconds.items()}
    found: dict[str, Any] = {"limit_kind": limit.kind, "images_per_second": {n: spread(v) for n, v in speed.items()}}
    work = limit.work[which]
    found["work"] = {name: round(value, 4) for name, value in work.items()}
    found["ours_uses"] = card.used(found["images_per_second"]["ours"]["median"], work, machine, case.precision)
    found["ours_to_limit"] = ratios(speed["ours"], speed["limit"])
    if "plain" in speed:
        found["ours_to_plain"] = ratios(speed["ours"], speed["plain"])
    found["ours_evaluation_seconds"] = spread([a["evaluation"] for a in around], 3)
    found["ours_saving_seconds"] = spread([a["saving"] for a in around], 3)
    return found
