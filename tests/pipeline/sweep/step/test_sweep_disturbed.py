"""Sweeps whose trials fail, or whose workers are stopped or lost: each trial is continued, or ends as it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distill import train
from pipeline.errors import Interrupted
from pipeline.files import release
from pipeline.journal import take
from pipeline.runs.run import Run
from pipeline.sweep.study.claim import Claim
from pipeline.sweep.study.study import Study
from tests.pipeline.sweep.step.sweeping import SHORT, WorkerStop, parent, space, states, study, swept, trials
from tests.steps.lab import Lab, ending, journal, points, run_id, see, signal_at

PER_TRIAL = 16  # questions that the loop asks for a signal


@pytest.mark.slow
@pytest.mark.parametrize("question", [1, 8, PER_TRIAL + 6])
def test_an_interrupted_trial_is_continued_from_its_checkpoint(
    lab: Lab, finished: Lab, monkeypatch: pytest.MonkeyPatch, question: int
) -> None:
    count = 1 + question // PER_TRIAL
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(question).loop)
        stopped = lab.step("sweep", space(lab, trials=count))
    assert stopped.code == 143, stopped.err
    assert ending(parent(lab)) == ("KILLED", "killed", 143)
    assert "WAITING" in states(lab)
    swept(lab, trials=count)
    counted = states(lab)
    assert (counted.count("COMPLETE"), counted.count("FAIL")) == (count, 1)
    for ours, theirs in zip(trials(lab), trials(finished), strict=False):
        assert points(ours) == points(theirs)
        assert ending(ours) == ("FINISHED", "completed", 0)


@pytest.mark.slow
def test_a_trial_whose_folder_a_lost_worker_still_holds_goes_on_in_a_copy_that_is_whole(
    lab: Lab, finished: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(13).loop)
        assert lab.step("sweep", space(lab, trials=1)).code == 143
    (held,) = trials(lab)
    lock = take(held)
    try:
        swept(lab, trials=1)
    finally:
        release(lock)
    _, copy = trials(lab)
    assert points(copy) == points(trials(finished)[0])
    named = [entry.data["path"] for entry in journal(copy) if entry.kind == "artifact"]
    assert "config.yaml" in named
    assert [name for name in named if not (copy / name).exists()] == [], "what its record names is there"


@pytest.mark.slow
def test_out_of_memory_fails_the_trial_not_the_sweep(
    lab: Lab, sqlite_uri: str, online: tuple[str, str], before_each_trial: Any
) -> None:
    def fail(run: Run) -> None:
        if run.folder.name == "0001":
            raise torch.OutOfMemoryError("tried to allocate 8 EiB")

    before_each_trial(fail)
    swept(lab, *SHORT, *online, trials=2)
    assert states(lab) == ["COMPLETE", "FAIL"]
    found = see(sqlite_uri, run_id(parent(lab)))
    assert found.children["trial 1"].status == "FAILED"
    assert "8 EiB" in found.children["trial 1"].tags["asib.error"]
    assert "8 EiB" in study(lab).trials[1].user_attrs["asib.error"]
    assert found.metrics["sweep/failed", 2] == [1]


@pytest.mark.slow
def test_diverged_trials_fail_with_their_reason_and_do_not_end_the_worker(lab: Lab) -> None:
    """No accuracy of chance reaches the study; three in a row are three bad configurations, not a bad machine."""
    decays = {"optim.student_weight_decay": {"type": "grid", "values": [3e-4, 1e4, 1e5, 1e6, 1e-3]}}
    swept(lab, "optim.student_lr=1e3", space=decays, sampler={"name": "grid", "seed": 0}, trials=5)
    found = {trial.params["optim.student_weight_decay"]: trial for trial in study(lab).trials}
    for decay, trial in found.items():
        assert trial.state.name == ("COMPLETE" if decay < 1 else "FAIL")
        if decay > 1:
            assert trial.user_attrs["asib.error"].startswith("student: ")
            assert trial.intermediate_values == {}


@pytest.mark.slow
def test_when_every_trial_fails_the_sweep_does(lab: Lab, before_each_trial: Any) -> None:
    def fail(run: Run) -> None:
        raise RuntimeError("broken everywhere")

    before_each_trial(fail)
    done = lab.step("sweep", space(lab), "trials=50")
    assert done.code == 1
    assert "broken everywhere" in done.err
    assert len(states(lab)) < 50, "it does not burn the whole study"
    assert ending(parent(lab))[0] == "FAILED"


@pytest.mark.slow
def test_a_run_that_had_finished_when_its_worker_left_is_taken_as_it_is(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = Claim.complete, list[int]()

    def complete(claim: Claim, *values: Any) -> None:
        if not left:
            left.append(claim.number)
            raise Interrupted(15)  # after the run's end, before the study knows
        original(claim, *values)

    monkeypatch.setattr(Claim, "complete", complete)
    swept(lab, *SHORT, trials=1)
    assert (left, states(lab)) == ([0], ["FAIL", "COMPLETE"])
    assert all("resume" not in [entry.kind for entry in journal(folder)] for folder in trials(lab))


@pytest.mark.slow
def test_a_trial_killed_before_it_had_stated_what_it_is_states_it_when_it_goes_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = Run.describe, list[Path]()

    def describe(run: Run) -> None:
        if run.folder.name == "0000" and not left:
            left.append(run.folder)
            run.journal.close()  # as the process's end does
            raise Interrupted(15)
        original(run)

    monkeypatch.setattr(Run, "describe", describe)
    swept(lab, *SHORT, trials=1)
    for folder in trials(lab):
        params = [entry.data["values"] for entry in journal(folder) if entry.kind == "params"]
        assert "method.tau" in params[0]
        assert (folder / "config.yaml").exists()


@pytest.mark.slow
def test_an_error_that_follows_from_a_signal_is_no_failure_of_the_trial(lab: Lab, before_each_trial: Any) -> None:
    left: list[Run] = []

    def leave(run: Run) -> None:
        if not left:
            left.append(run)
            WorkerStop.last.signum = 15
            raise RuntimeError("Connection closed by peer")  # as when a process that trains along has left

    before_each_trial(leave)
    stopped = lab.step("sweep", space(lab, trials=1), *SHORT)
    assert stopped.code == 143, stopped.err
    assert states(lab) == ["FAIL", "WAITING"]
    swept(lab, *SHORT, trials=1)
    assert states(lab) == ["FAIL", "COMPLETE"]


@pytest.mark.slow
def test_a_trial_that_was_to_be_pruned_when_its_worker_died_is_pruned_in_mlflow_too(
    lab: Lab, sqlite_uri: str, online: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def should_prune(claim: Claim) -> bool:
        if not claim.origin:
            asked.append(claim.number)
            if len(asked) == 1:
                raise Interrupted(15)
        return not claim.origin

    monkeypatch.setattr(Claim, "should_prune", should_prune)
    swept(lab, *SHORT, *online, pruner={"name": "median"}, trials=2)
    assert sorted(states(lab)) == ["COMPLETE", "FAIL", "PRUNED"]
    run = see(sqlite_uri, run_id(parent(lab))).children["trial 0"]
    assert (run.status, run.tags["asib.outcome"], run.tags["asib.pruned_epoch"]) == ("KILLED", "pruned", "1")


@pytest.mark.slow
def test_reaping_leaves_a_sweep_whose_driver_lives(lab: Lab, online: tuple[str, str], before_each_trial: Any) -> None:
    seen: list[str] = []

    def reap(run: Run) -> None:
        if not seen:
            name = study(lab).study_name
            Study.open(f"sqlite:///{lab.runs / 'studies.db'}", name).note(driver_seen=0.0)  # a long trial, a slow clock
            done = lab.raw("sweep", ["reap=true", *online, f"output_dir={lab.runs}"])
            assert done.code == 0, done.err
            seen.append(done.out)

    before_each_trial(reap)
    swept(lab, *SHORT, *online, trials=1)
    assert seen[0].startswith("0 runs")
