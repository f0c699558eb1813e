"""A grid of runs: its cells, and the interrupted run of the same grid that a command continues. Needs no torch."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.compose.shortcuts import wants_dry_run
from pipeline.config import Config, config_hash, for_nested, sources_of
from pipeline.config.identity import canonical
from pipeline.config.places import output_dir
from pipeline.launch.workers import Workers
from pipeline.paths import REPOSITORY
from pipeline.runs.folders import interrupted
from pipeline.training.bank.policy import shared

if TYPE_CHECKING:
    from pipeline.data.sources import ImageData
    from pipeline.runs.records import Record
    from pipeline.runs.run import Run

logger = logging.getLogger("asib")
PLAN_TAG = "asib.plan"


@dataclass(frozen=True)
class Cell:
    """One run of a grid. `row`: what it is called, without its seed; `pair`: its teachers and student, of a table."""

    row: str
    config: Config
    tags: Mapping[str, str] = field(default_factory=dict)
    pair: str = ""

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.config.seed}"

    @property
    def folder(self) -> str:
        """The beginning of its folder's name."""
        return re.sub(r"[^\w.+-]+", "_", self.row) + f"-seed{self.config.seed}"


@dataclass
class Child:
    """A cell and its result's identity. `folder` and `run_id`: where its results are, once it has any."""

    cell: Cell
    identity: str
    folder: Path | None = None
    run_id: str | None = None
    reused: bool = False

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def config(self) -> Config:
        return self.cell.config

    @property
    def key(self) -> str:
        """The name of its folder: each identity has its own, so that stale results are never continued."""
        return f"{self.cell.folder}-{self.identity[:8]}"


More: TypeAlias = "Callable[[Sequence[tuple[Cell, Record]]], Sequence[Cell]]"
"""Further cells, once the results of the first ones are known."""
Report: TypeAlias = "Callable[[Run, ImageData, Sequence[tuple[Cell, Record]]], None]"
"""What a grid says of its results beside their comparison."""


@dataclass(frozen=True)
class Plan:
    """A grid.

    Attributes:
        digest: equal for equal commands and sources.
        params: what the parent run states.
        workers: who trains the cells; if `needless`, the step's own process.
        best: whether the cell that is best on validation is the parent's model.
        baseline, anyway: as a comparison takes them.
    """

    cells: tuple[Cell, ...]
    force: bool
    digest: str
    params: Mapping[str, str]
    workers: Workers
    best: bool = True
    baseline: str | None = None
    anyway: bool = False
    more: More = lambda results: ()
    report: Report = lambda run, data, results: None

    def words(self) -> str:
        """What DRY_RUN=1 shows."""
        jobs = [] if self.workers.needless else [self.workers.launcher(Path()).plan()]
        return "\n".join([f"{len(self.cells)} runs", *(cell.name for cell in self.cells), *jobs])


def nested(config: Config) -> Config:
    """A cell's configuration: it logs no model, and shares the bank with the others."""
    return shared(for_nested(config))


def digest_of(config: Config, cells: Sequence[Cell], **more: object) -> str:
    """SHA-256 (hex) of what a grid of runs computes and where its results go."""
    pairs = dict.fromkeys(cell.config.model.teachers for cell in cells)
    what = {
        "children": [[cell.row, config_hash(cell.config)] for cell in cells],
        "teachers": [[t.model_dump() for t in teachers] for teachers in pairs],
        "sources": sorted({sources_of(cell.config, REPOSITORY) for cell in cells}),
        "to": [config.tracking.mode, config.tracking.uri, config.tracking.experiment],
        "amp": config.optim.use_amp,  # not part of the hash, but it changes the identity
        **more,
    }
    return hashlib.sha256(canonical(what).encode()).hexdigest()


def continued(config: Config, step: str, digest: str, workers: Workers) -> Config:
    """The parent run's configuration, which continues an interrupted run of the same grid if there is one.

    Raises UserError: workers that cannot start.
    """
    if not workers.needless and not wants_dry_run(os.environ):
        workers.launcher(output_dir(config)).check()
    if config.resume is None:
        before = interrupted(output_dir(config), step, PLAN_TAG, digest)
        if before is not None:
            logger.info("continuing %s, which was interrupted", before)
            config = config.model_copy(update={"resume": str(before)})
    return config
