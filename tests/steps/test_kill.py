"""kill -9 at any moment, then `resume=<run id>`: here, or from the tracking server alone (docs/tracking.md)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import MlflowServer, Wire
from tests.steps.lab import (
    BATCHES,
    STUDENT,
    At,
    Done,
    Lab,
    client,
    deliver,
    journal,
    points,
    run_id,
    same_run,
    see,
    until,
)
from tests.warm import Fork

pytestmark = pytest.mark.slow


def checkpoints(folder: Path) -> int:
    return sum(entry.kind == "checkpoint" for entry in journal(folder))


MOMENTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    # only the journal is there
    "before the first checkpoint": ("distill", lambda run: (run / "teacher_0/journal.jsonl").exists()),
    "in a nested fine-tuning": ("distill", lambda run: checkpoints(run / "teacher_1") >= 2),
    "in an A-step": ("distill", lambda run: checkpoints(run) >= 2),
    "in a B-step": ("distill", lambda run: checkpoints(run) >= BATCHES + 3),
    "after training": ("distill", lambda run: (run / STUDENT).exists()),
    "in the main job's distillation": ("main", lambda run: checkpoints(run / "distill") >= 3),
}


def killed(lab: Lab, uri: str, moment: str) -> str:
    """The id of a run whose process was killed then, when delivery has brought over what there was."""
    step, reached = MOMENTS[moment]
    online = (f"tracking.uri={uri}", "tracking.mode=online", "checkpoint.every_seconds=1e-6")
    process = lab.start(step, *online)
    try:
        until(lambda: [p for p in lab.run_folders() if (p / "journal.jsonl").exists()] or process.poll() is not None)
        (folder,) = lab.run_folders()
        until(lambda: reached(folder) or process.poll() is not None)
        assert process.poll() is None, "it ended before it was killed"
    finally:
        process.kill()
    until(lambda: (folder / "delivery.json").exists())
    name = run_id(folder)
    until(lambda: client(uri).get_run(name).info.status == "KILLED")
    assert journal(folder)[-1].kind != "end"
    return name


PLACES = ("same machine", "server alone")
PAIRS = [(moment, place) for moment in MOMENTS for place in PLACES]
if int(os.environ.get("ASIB_ROUNDS", "1")) < 2:  # half a minute each: every moment once, the places in turn
    PAIRS = [(moment, PLACES[number % 2]) for number, moment in enumerate(MOMENTS)]


@pytest.mark.parametrize(("moment", "place"), PAIRS)
def test_a_killed_run_continued_equals_an_undisturbed_one(
    lab: Lab, undisturbed: Done, sqlite_uri: str, moment: str, place: str
) -> None:
    name = killed(lab, sqlite_uri, moment)
    before = see(sqlite_uri, name)
    step = MOMENTS[moment][0]
    if place == "server alone":
        while lab.runs.exists():  # the killed run's delivery may still be at work there
            shutil.rmtree(lab.runs, ignore_errors=True)
    done = lab.step(step, "tracking.mode=online", f"tracking.uri={sqlite_uri}", f"resume={name}")
    assert done.code == 0, done.err
    (folder,) = lab.run_folders()
    after = see(sqlite_uri, name)  # asserts that no nested run came twice
    assert {run.status for run in (after, *after.children.values())} == {"FINISHED"}
    assert {child: seen.id for child, seen in before.children.items()}.items() <= {
        child: seen.id for child, seen in after.children.items()
    }.items()

    distilled = folder if step == "distill" else folder / "distill"
    seen = after if step == "distill" else after.children["distill"]
    same_run(distilled, undisturbed.folder)
    assert seen.steady == points(undisturbed.folder)
    for key in ("teacher_0", "teacher_1"):
        assert after.children[key].steady == points(undisturbed.folder / key)
    for run in (after, *after.children.values()):
        assert {len(values) for values in run.metrics.values()} == {1} or not run.metrics


def test_the_main_job_goes_on_when_the_server_vanishes_and_is_delivered_later(
    lab: Lab, undisturbed: Done, mlflow_server: MlflowServer, wire: Wire, deliveries: list[Fork]
) -> None:
    arguments = ["tracking.mode=online", f"tracking.uri={wire.uri}", "tracking.finish_seconds=1"]
    done = lab.disturbed(At(2, wire.cut), "main", *arguments)  # before any teacher is there
    assert done.code == 0, done.err
    assert "python -m steps.deliver" in done.lines[-1]
    assert points(done.folder / "distill") == points(undisturbed.folder)

    for delivery in deliveries:  # it goes on trying as long as its trainer, this process, lives
        delivery.kill()
    deliver(mlflow_server.uri, done.folder)
    found = see(mlflow_server.uri, run_id(done.folder))
    assert found.status == "FINISHED"
    assert set(found.children) == {"student_alone", "teacher_0", "teacher_1", "distill", "evaluate"}
    assert found.children["distill"].steady == points(undisturbed.folder)
    assert len(found.children["distill"].models_in) == 2
