"""A grid's driver: workers train its cells, here or through Slurm, and are replaced when they die."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.ablate import worker
from pipeline.ablate.plan import Child
from pipeline.errors import Interrupted
from pipeline.files import is_locked
from pipeline.journal import FILE, Carrier, read_entries
from pipeline.launch.crew import Crew
from pipeline.launch.worker import free_memory
from pipeline.launch.workers import Workers
from pipeline.runs import records
from pipeline.runs.folders import ended
from pipeline.runs.run import Run
from pipeline.training.checkpoint import Slots

logger = logging.getLogger("asib")
TICK_S = 1.0


def train(run: Run, workers: Workers, children: Sequence[Child]) -> list[str]:
    """Have the children trained, and note their folders; return what became of those that diverged.

    Raises:
        Interrupted: a signal arrived; the workers have written their checkpoints.
        HelperFailed: too many workers ended without progress.
    """
    if not children:
        return []
    free_memory()  # the workers' GPUs are this process's
    home = run.folder.absolute()
    for child in children:
        claim = worker.claim_of(home, child.key)
        claim.parent.mkdir(exist_ok=True)
        claim.write_text("")
    try:
        _drive(run, workers, children, home)
    finally:
        for child in children:  # off line, or in an outage, this run's delivery brings them to the server
            if (home / child.key / FILE).exists() and not records.delivered_whole(home / child.key):
                run.journal.child(home / child.key)
    failed = []
    for child in children:
        if why := worker.divergence(home, child.key):
            failed.append(f"{child.name}: {why}")
        else:
            child.folder = run.folder / child.key
    return failed


def _drive(run: Run, workers: Workers, children: Sequence[Child], home: Path) -> None:
    crew = Crew(workers.launcher(home / "launched"), workers.number, worker.work, run.stop)
    stands_for = Carrier(run.run_id or "", run.journal.id, run.config.tracking.experiment, home)
    arguments = {
        "folder": str(home),
        "stands_for": stands_for,
        "config": run.config,
        "cells": {child.key: child.cell for child in children},
        "distant": run.distant,
    }
    left, before = [*children], _progress(home, children)
    with run.stop.between_batches():
        try:
            while True:
                taken = [child for child in left if is_locked(worker.claim_of(home, child.key))]
                for child in [child for child in left if child not in taken and _over(home, child)]:
                    left.remove(child)
                    logger.info("%s is done; %d of %d are left", child.name, len(left), len(children))
                if not left:
                    break
                if run.stop():
                    raise Interrupted(run.stop())
                if (now := _progress(home, left)) != before:
                    before = now
                    crew.progressed()
                crew.fill(len(left) - len(taken), len(taken), lambda: _last_error(home, left), **arguments)
                time.sleep(TICK_S)
        except BaseException:
            crew.leave("the same command continues")
            raise
        crew.wait(run.config.tracking.finish_seconds + 5)


def _over(home: Path, child: Child) -> bool:
    """Whether nobody is to train it any more: it has finished, or diverged."""
    return ended(home / child.key) or bool(worker.divergence(home, child.key))


def _progress(home: Path, left: Sequence[Child]) -> list[int]:
    """Changes with every checkpoint, and with every child that ends."""
    manifests = [Slots(home / child.key / "checkpoints").manifest for child in left]
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in manifests]


def _last_error(home: Path, left: Sequence[Child]) -> str | None:
    """What a child failed of that is to be tried again."""
    for child in left:
        entries, _ = read_entries(home / child.key / FILE)
        if entries and entries[-1].kind == "end" and (said := entries[-1].data["message"]):
            return f"{child.name}: {said}"
    return None
