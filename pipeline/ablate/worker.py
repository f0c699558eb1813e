"""A grid's worker: takes cells that nobody works on, one by one, and trains each in a run nested in the grid's.

A cell is taken by the lock of its file in `claims`, which ends with the worker's process. The file itself is empty, or
says how the cell diverged: the driver's next start forgets that.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.ablate.plan import Cell
from pipeline.config import Config
from pipeline.distill import distill
from pipeline.errors import Interrupted, NonFinite
from pipeline.files import locked
from pipeline.journal import Carrier
from pipeline.launch import followers
from pipeline.launch.worker import begin, carrier, free_memory
from pipeline.runs import opening
from pipeline.runs.folders import ended
from pipeline.runs.run import Run
from pipeline.training import distributed

logger = logging.getLogger("asib")
PATIENCE_S = 0.5
"""How long to wait for a claim: whoever asks whether it is taken holds it for a moment."""


def claim_of(home: Path, key: str) -> Path:
    """The file of a cell's claim. `home`: the grid's folder; `key`: the name of the cell's."""
    return home / "claims" / key


def divergence(home: Path, key: str) -> str:
    """How the cell diverged; empty if it did not."""
    return claim_of(home, key).read_text()


def train(parent: Run, key: str, cell: Cell, folder: Path | None = None, distant: bool = False) -> Path:
    """Distil a cell in a run nested in `parent`, begun or continued; return its folder. Others as `opening.child`."""
    nested = opening.child(parent, "distill", key, cell.config, cell.name, folder, distant)
    nested.journal.tags(dict(cell.tags))
    with nested.nested():
        followers.tell(nested)
        distill.distill(nested)
    return nested.folder


def work(index: int, folder: str, stands_for: Carrier, config: Config, cells: Mapping[str, Cell], distant: bool) -> int:
    """Train cells until none is left that nobody works on; called by submitit.

    Args:
        folder: the grid's.
        stands_for: the grid's run.
        config: that run's.
        cells: by the names of their folders.
        distant: whether the grid was begun on another machine.

    Returns:
        0, or 128 + its number after a signal.
    """
    stop = begin()
    if os.environ.get("RANK", "0") != "0":
        return followers.follow(stop, distill.distill)
    home = Path(folder)
    run = carrier(config, home, stands_for, stop)
    try:
        distributed.join()
        run.ready()
        for key, cell in cells.items():
            with locked(claim_of(home, key), patience=PATIENCE_S) as ours:
                if not ours or ended(home / key) or divergence(home, key):
                    continue
                logger.info("%s", cell.name)
                try:
                    train(run, key, cell, home / key, distant)
                except NonFinite as error:  # the others do not depend on it
                    claim_of(home, key).write_text(str(error))
                free_memory()
        followers.tell(None)
        return 0
    except Interrupted as stopped:
        return 128 + stopped.signum
    except Exception:
        if stop():  # it reached another process of the group first
            return 128 + stop()
        raise
    finally:
        run.close()
