"""Studies shared by processes: exact totals, kills at random moments, workers that were stopped and come back."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import Taken
from pipeline.sweep.study.retry import CRASHES, history
from pipeline.sweep.study.study import Study
from tests.pipeline.sweep.study.studies import FACTS, FORK, age_heartbeats, claimed, running, score, sweep, work


def alone(folder: Path, count: int) -> list[dict[str, Any]]:
    """The parameters that a single worker is given."""
    study = Study.create(f"sqlite:///{folder / 'alone.db'}", "s", sweep(trials=count), FACTS)
    for claim in [claimed(study) for _ in range(count)]:
        claim.complete([0.0])
    return [trial.params for trial in study.trials()]


@pytest.mark.parametrize(("processes", "total"), [(3, 9), pytest.param(8, 40, marks=pytest.mark.slow)])
def test_several_processes_run_exactly_the_trials_asked_for(
    study_url: str, tmp_path: Path, processes: int, total: int
) -> None:
    Study.create(study_url, "s", sweep(trials=total), FACTS).close()
    with running(processes, work, study_url, "s") as workers:
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * processes
    trials = Study.open(study_url, "s").trials()
    assert [trial.number for trial in trials] == list(range(total))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert [trial.value for trial in trials] == [score(trial.params) for trial in trials]
    assert [trial.params for trial in trials] == alone(tmp_path, total), "as one worker would have been told"


def create_and_take_one(url: str, start: Any) -> None:
    start.wait()
    claimed(Study.create(url, "s", sweep(trials=6), FACTS)).complete([1.0])


@pytest.mark.slow
def test_first_use_of_a_fresh_database_by_six_processes(study_url: str, tmp_path: Path) -> None:
    if study_url.startswith("sqlite"):  # which has its tables
        study_url = f"sqlite:///{tmp_path / 'fresh.db'}"
    with running(6, create_and_take_one, study_url, FORK.Barrier(6)) as workers:
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * 6
    assert Study.open(study_url, "s").counts().complete == 6


def chains(trials: list[FrozenTrial]) -> list[list[FrozenTrial]]:
    """The attempts at each configuration, first to last; in the order of the configurations."""
    replaced = {number for trial in trials for number in history(trial)}
    found = [[trials[n] for n in (*history(t), t.number)] for t in trials if t.number not in replaced]
    return sorted(found, key=lambda attempts: attempts[0].number)


def trials_running(url: str) -> int:
    with closing(Study.open(url, "s")) as study:
        return study.counts().running


@pytest.mark.slow
def test_kills_at_random_moments_change_no_total(study_url: str, tmp_path: Path) -> None:
    total, dice, kills = 16, random.Random(5), 0
    Study.create(study_url, "s", sweep(trials=total), FACTS).close()
    deadline = time.monotonic() + 240
    with running(4, work, study_url, "s", 0.3) as workers:

        def kill(*places: int) -> int:
            """Replace these workers, and tell how many trials were running while they were dead."""
            for place in places:
                workers[place].kill()
                workers[place].join()
            orphans = trials_running(study_url)
            for place in places:
                workers[place] = FORK.Process(target=work, args=(study_url, "s", 0.3))
                workers[place].start()
            return orphans

        orphans = 0
        # On a busy machine the random moments may all fall into the starts of workers: some must die in their trials.
        while orphans == 0 and time.monotonic() < deadline:
            while trials_running(study_url) == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
            orphans = kill(*range(4))
            kills += 4
        while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
            time.sleep(dice.uniform(0.0, 0.4))
            if kills < 16:
                kill(dice.randrange(4))
                kills += 1
        assert [worker.exitcode for worker in workers] == [0] * 4
    study = Study.open(study_url, "s")
    counts, trials = study.counts(), study.trials()
    assert (counts.used, counts.complete + counts.failed, counts.running) == (total, total, 0)
    assert 1 <= orphans <= counts.retried + counts.failed <= kills
    tried = chains(trials)
    assert len(tried) == total
    for attempts in tried:
        assert len(attempts) <= 3, "max_retry is 2"
        assert attempts[-1].state == TrialState.COMPLETE or len(attempts) == 3
        assert [t.system_attrs.get(CRASHES, 0) for t in attempts] == list(range(len(attempts)))
        for before, after in itertools.pairwise(attempts):
            assert before.state == TrialState.FAIL
            assert before.params in ({}, after.params) or len(before.params) < 2, "only one dead in its claim lacks any"
            assert before.intermediate_values.items() <= after.intermediate_values.items()
    assert [attempts[-1].params for attempts in tried] == alone(tmp_path, total)


def be_stopped(url: str, line: Connection) -> None:
    """Claim, be stopped and continued, and tell what each method says then."""
    claim = claimed(Study.open(url, "s"))
    claim.report(1.0, 0)
    line.send(claim.values)
    line.recv()
    said: list[str] = []
    calls: list[Callable[[], object]] = [
        claim.check,
        lambda: claim.report(2.0, 1),
        claim.should_prune,
        lambda: claim.note(folder="mine"),
        lambda: claim.complete([9.0]),
        lambda: claim.prune("late", 1),
        lambda: claim.fail("late"),
        claim.release,
    ]
    for call in calls:
        try:
            call()
            said.append("nothing")
        except Exception as error:
            said.append("taken" if isinstance(error, Taken) else repr(error))
    line.send(said)


def heard(line: Connection) -> Any:
    assert line.poll(60)
    return line.recv()


def test_worker_back_from_the_dead_finds_its_trial_taken(study_url: str) -> None:
    # rare heartbeats: one that is stopped in the middle of a write holds the lock of a SQLite file
    Study.create(study_url, "s", sweep(trials=1, heartbeat_seconds=60, grace_seconds=120), FACTS).close()
    here, there = FORK.Pipe()
    with running(1, be_stopped, study_url, there) as (worker,):
        values = heard(here)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        age_heartbeats(study_url)
        study = Study.open(study_url, "s")
        claim = claimed(study)
        assert (claim.number, claim.attempt, claim.values) == (1, 1, values)
        os.kill(worker.pid, signal.SIGCONT)
        here.send("go on")
        assert heard(here) == ["taken"] * 8
        claim.complete([5.0])
    first, second = study.trials()
    assert (first.state, first.intermediate_values) == (TrialState.FAIL, {0: 1.0})
    assert (second.state, second.value) == (TrialState.COMPLETE, 5.0)
