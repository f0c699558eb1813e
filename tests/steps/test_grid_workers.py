"""Tables and ladders with several workers: the same numbers as in one process, whatever is killed meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.ablate import driver, worker
from pipeline.distill import train
from pipeline.errors import UserError
from pipeline.launch import worker as launched
from pipeline.launch.workers import Workers
from tests.pipeline.sweep.step.sweeping import InProcess, WorkerStop
from tests.steps.lab import Lab, ending, journal, points, run_id, see, signal_at, until
from tests.steps.test_table import PAIRS, found, write

ONE = {
    "pairs": {"one": PAIRS["one"]},
    "methods": {"average": ["method.kd_target=avg"], "synergy": ["method.kd_target=synergy"]},
}
LONG = ("methods=average", "seeds=0,1", "method.student_epochs_per_stage=[4,4]")
PER_AVERAGE = 8  # questions that the loop asks for a signal


def words(lab: Lab, *more: str, **changes: Any) -> list[str]:
    return [write(lab, **ONE | changes), f"cfg={lab.cfg}", f"output_dir={lab.runs}", *more]


def same(folder: Path, other: Path) -> None:
    """Assert that two grids have the same table, and their cells the same points, each once."""
    pd.testing.assert_frame_equal(found(folder), found(other))
    cells = sorted(path.name for path in other.glob("*-seed?-*"))
    assert sorted(path.name for path in folder.glob("*-seed?-*")) == cells
    for name in cells:
        assert points(folder / name) == points(other / name)
        assert {len(values) for values in points(folder / name).values()} == {1}


def by_one_process(lab: Lab, *more: str, **changes: Any) -> Path:
    """The folder of the table that one process makes elsewhere, with the same teachers."""
    other = Lab(lab.folder / "one process")
    shutil.copytree(lab.runs / "teachers", other.runs / "teachers")
    done = other.raw("table", words(other, *more, **changes))
    assert done.code == 0, done.err
    return done.folder


class Survived(InProcess):
    """A worker that fails leaves the driver alone, as its process would."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.folder = "launched"

    def start(self, work: Callable[..., int], count: int, **arguments: Any) -> None:
        try:
            super().start(work, count, **arguments)
        except UserError:
            self.codes += [2]


@pytest.fixture
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers' lives go on in this process."""
    monkeypatch.setattr(Workers, "launcher", Survived)
    monkeypatch.setattr(launched, "Stop", WorkerStop)
    monkeypatch.setattr(driver, "TICK_S", 0.0)


@pytest.mark.usefixtures("_in_process")
@pytest.mark.slow
def test_interrupted_workers_continue_and_make_the_table_that_one_process_makes(
    ready_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = by_one_process(ready_lab)
    assert len(list(quiet.glob("average_one_*_epochs-seed0-*"))) == 1, "a second round"
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(PER_AVERAGE + 9).loop)
        stopped = ready_lab.raw("table", words(ready_lab, "workers=2"))
    assert (stopped.code, ending(stopped.folder)) == (143, ("KILLED", "killed", 143)), stopped.err
    assert sorted(ending(cell)[0] for cell in stopped.folder.glob("*-seed0-*")) == ["FINISHED", "KILLED"]
    again = ready_lab.raw("table", words(ready_lab, "workers=3"))
    assert (again.code, again.new) == (0, []), again.err
    same(stopped.folder, quiet)


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_a_cell_that_diverges_is_named_and_not_tried_again_by_the_others(ready_lab: Lab) -> None:
    wild = ["method.kd_target=avg", "optim.student_lr=1e6", "optim.student_weight_decay=1e6"]  # AdamW: -1e12 in a step
    methods = {"average": ["method.kd_target=avg"], "wild": wild}
    done = ready_lab.raw("table", words(ready_lab, "workers=2", methods=methods, equal_cost=False))
    assert (done.code, ending(done.folder)) == (1, ("FAILED", "failed", 1)), done.err
    assert done.lines[-1].startswith("wild one seed 0: ")
    (cell,) = done.folder.glob("wild_one-seed0-*")
    assert ending(cell) == ("FAILED", "failed", 1)
    assert "resume" not in [entry.kind for entry in journal(cell)]
    assert list(found(done.folder)["method"]) == ["average"]


@pytest.mark.usefixtures("_in_process")
def test_workers_that_only_fail_are_given_up_in_one_line(ready_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(*_: Any) -> None:
        tried.append(1)
        raise UserError("no room")

    monkeypatch.setattr(worker.distill, "distill", fail)
    done = ready_lab.raw("table", words(ready_lab, "workers=2"))
    assert (done.code, ending(done.folder)) == (1, ("FAILED", "failed", 1))
    assert "workers ended without a result: average one seed 0: no room; see " in done.lines[-1]
    assert 2 <= len(tried) <= 7


@pytest.mark.slow
def test_a_worker_killed_with_minus_9_is_replaced_and_loses_nothing(ready_lab: Lab, sqlite_uri: str) -> None:
    lab, more = ready_lab, {"equal_cost": False}
    quiet = by_one_process(lab, *LONG, **more)
    online = ["tracking.mode=online", f"tracking.uri={sqlite_uri}"]
    log = lab.folder / "driver.log"
    process = lab.start_raw("table", words(lab, *LONG, "workers=2", *online, **more), log)
    until(lambda: list(lab.runs.glob("*-table-*/*-seed?-*/checkpoints/manifest.json")), 120)
    (folder,) = lab.run_folders()
    cell = next(folder.glob("*-seed?-*/checkpoints/manifest.json")).parents[1].name
    (theirs,) = (path.parent.name for path in folder.glob("workers/*/journal.jsonl") if cell in path.read_text())
    os.kill(int(theirs.split("-")[-2]), signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    same(folder, quiet)
    told = [e.data["values"] for e in journal(folder / cell) if e.kind == "tags"]
    assert any(values.get("asib.resumed_from", "").startswith("epoch ") for values in told)
    seen = see(sqlite_uri, run_id(folder))
    assert {seen.status, *(child.status for child in seen.children.values())} == {"FINISHED"}
    assert set(seen.children) == {"average one seed 0", "average one seed 1"}
    assert {len(values) for child in seen.children.values() for values in child.metrics.values()} == {1}


@pytest.mark.slurm
def test_a_ladder_through_slurm(ready_lab: Lab, sqlite_uri: str, slurm: Any) -> None:
    given = ["cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "cluster.time_minutes=10"]
    online = ["tracking.mode=online", f"tracking.uri={sqlite_uri}"]
    done = ready_lab.step("ablate", "rungs=l0_baseline", "seeds=0,1", "workers=2", *given, *online)
    assert done.code == 0, done.err
    found = see(sqlite_uri, run_id(done.folder))
    assert (found.status, set(found.children)) == ("FINISHED", {"l0_baseline seed 0", "l0_baseline seed 1"})
    assert {child.status for child in found.children.values()} == {"FINISHED"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("workers=0", "workers=0"),
        ("cluster=slrum", "did you mean slurm"),
        ("cluster.partition=gpu", "it is a key of slurm"),
        ("cluster.gpus=[99]", "cluster.gpus: no GPU 99"),
    ],
)
@pytest.mark.parametrize("step", ["table", "ablate"])
def test_workers_that_cannot_be_are_refused_before_there_is_a_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, step: str, given: str, said: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    own = words(lab, given) if step == "table" else lab.arguments("rungs=l0_baseline", given)
    done = lab.raw(step, own)
    assert (done.code, done.new, len(done.lines)) == (2, [], 1)
    assert said in done.lines[0]


@pytest.mark.parametrize("step", ["table", "ablate"])
def test_a_dry_run_shows_the_cells_and_the_jobs(lab: Lab, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    more = ("workers=3", "cluster=slurm", "cluster.partition=gpu")
    done = lab.raw(step, words(lab, *more) if step == "table" else lab.arguments("rungs=l0_baseline", *more))
    assert (done.code, done.new) == (0, []), done.err
    assert ("average one seed 0" if step == "table" else "l0_baseline seed 0") in done.out
    assert "#SBATCH --array=0-2%" in done.out
    assert "#SBATCH --partition=gpu" in done.out
