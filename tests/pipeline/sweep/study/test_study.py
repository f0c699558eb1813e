"""Studies on SQLite and PostgreSQL: claims and their ends, what is best, who may continue what."""

import os
import sqlite3
import threading
import time
from pathlib import Path

import optuna
import psycopg
import pytest
from optuna.trial import TrialState
from sqlalchemy import event

from pipeline.errors import Taken, UserError
from pipeline.sweep.study import storage as study_storage
from pipeline.sweep.study.retry import Counts
from pipeline.sweep.study.study import Study, studies
from tests.pipeline.sweep.study.studies import FACTS, age_heartbeats, claimed, die, heartbeat, sweep
from tests.postgres import ESCAPED, PASSWORD, PostgresServer


def test_each_end_of_a_claim_counts_once(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(trials=6), FACTS)
    claimed(study).complete([0.5])
    pruned = claimed(study)
    pruned.report(0.25, 0)
    pruned.prune("below the median", 0)
    claimed(study).fail("out of memory")
    claimed(study).complete([float("nan")])
    running = claimed(study)
    claimed(study).release()
    assert study.counts() == Counts(complete=1, pruned=1, running=1, waiting=1, failed=2, retried=1)
    again = claimed(study)
    assert (again.number, again.origin, again.attempt) == (6, 5, 1)
    assert study.claim("me") is None
    assert study.last_error() == "final/val_acc is not a number"
    trial = study.trials()[pruned.number]
    assert (trial.state, trial.value, trial.user_attrs["asib.reason"]) == (TrialState.PRUNED, 0.25, "below the median")
    again.complete([0.75])
    running.complete([0.625])
    best = study.best()
    assert best is not None
    assert (best.number, best.value, study.values_of(best)) == (6, 0.75, again.values)
    assert study.counts().used == study.counts().ended == 6


def test_released_trials_do_not_use_up_retries_and_crashes_do(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(trials=1, max_retry=2), FACTS)
    first = claimed(study)
    first.note(folder="runs/a")
    first.report(1.5, 0)
    first.report(2.5, 1)
    first.release()
    for attempt in range(1, 5):
        claim = claimed(study)
        assert (claim.origin, claim.attempt, claim.values, claim.notes["folder"]) == (
            0,
            attempt,
            first.values,
            "runs/a",
        )
        if attempt == 1:
            claim.release()
            continue
        die(claim, study_url)
        counts = study.requeue_stale()
        assert counts == study.requeue_stale()
        assert counts.waiting == (attempt < 4), "the third crash is one more than max_retry"
    assert study.counts() == Counts(failed=1, retried=4)
    assert [t.intermediate_values for t in study.trials()] == [{0: 1.5, 1: 2.5}] * 5
    assert study.claim("me") is None


def test_death_between_failing_and_queueing_is_mended(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(trials=1), FACTS)
    claim = claimed(study)
    study._database.rdb.set_trial_state_values(claim._id, TrialState.FAIL)
    assert study.counts() == Counts(failed=1)
    assert study.requeue_stale() == study.requeue_stale() == Counts(waiting=1, retried=1)
    with pytest.raises(Taken):
        claim.check()
    assert claimed(study).values == claim.values


@pytest.mark.parametrize(("outcome", "waiting", "crashes"), [("pruned", 1, 1), ("released", 1, 0), ("failed", 0, 0)])
def test_death_between_saying_how_a_trial_ends_and_ending_it(
    study_url: str, outcome: str, waiting: int, crashes: int
) -> None:
    study = Study.create(study_url, "s", sweep(trials=1), FACTS)
    claim = claimed(study)
    claim.note(**{"asib.outcome": outcome})
    die(claim, study_url)
    assert study.requeue_stale() == Counts(waiting=waiting, failed=1 - waiting, retried=waiting)
    last = study.trials()[-1]
    assert (last.system_attrs.get("asib:crashes", 0), last.user_attrs.get("asib.outcome")) == (
        crashes,
        None if waiting else "failed",
    )


def test_trial_that_died_while_its_parameters_were_suggested_gets_those_it_would_have_had(
    study_url: str, tmp_path: Path
) -> None:
    whole = claimed(Study.create(f"sqlite:///{tmp_path / 'other.db'}", "s", sweep(), FACTS))
    study = Study.create(study_url, "s", sweep(trials=1), FACTS)
    torso = study.optuna.ask()
    torso.suggest_float("method.ib_beta", 1e-6, 1e-2, log=True)
    claim = claimed(study)
    assert (claim.number, claim.attempt, claim.values) == (1, 1, whole.values)


def test_same_configuration_is_found_and_repeated(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(constraints=[{"metric": "parameters/student", "max": 10}]), FACTS)
    first, second, third, fourth = (claimed(study) for _ in range(4))
    first.note(config_hash="aa")
    assert second.same_as("aa") is None, "it runs"
    first.complete([0.5], [9])
    third.note(config_hash="bb")
    third.report(0.125, 0)
    third.prune("no use", 0)
    twin = second.same_as("aa")
    assert twin is not None
    assert twin.number == 0
    second.repeat(twin)
    pruned = fourth.same_as("bb")
    assert pruned is not None
    fourth.repeat(pruned)
    trials = study.trials()
    assert [(t.state.name, t.value) for t in trials] == [("COMPLETE", 0.5)] * 2 + [("PRUNED", 0.125)] * 2
    assert [study.source_of(t).number for t in trials] == [0, 0, 2, 2]
    assert trials[1].constraints == {"0": -1.0}


def test_best_keeps_to_the_constraints(study_url: str) -> None:
    bounds = [{"metric": "parameters/student", "max": 1e6}, {"metric": "images_per_second", "min": 100, "max": 500}]
    study = Study.create(study_url, "s", sweep(constraints=bounds), FACTS)
    assert study.best() is None
    for value, *measured in ((0.9, 2e6, 200), (0.8, 1e6, 99), (0.7, 1e6, 501), (0.5, 1e6, 100), (0.6, 5e5, 500)):
        claimed(study).complete([value], measured)
    best = study.best()
    assert best is not None
    assert best.value == 0.6
    assert [all(x <= 0 for x in t.constraints.values()) for t in study.trials()] == [False] * 3 + [True] * 2


def test_front_of_two_objectives(study_url: str) -> None:
    objectives = [{"metric": "final/val_acc"}, {"metric": "cost/seconds", "direction": "minimize"}]
    study = Study.create(study_url, "s", sweep(objectives=objectives), FACTS)
    for accuracy, seconds in ((80, 5), (90, 9), (70, 4), (85, 9), (90, 10), (60, 4)):
        claim = claimed(study)
        assert not claim.should_prune()
        claim.complete([accuracy, seconds])
    assert [trial.number for trial in study.front()] == [0, 1, 2]
    assert study.best() is None


def test_study_goes_on_with_its_facts_and_new_totals(study_url: str) -> None:
    made = Study.create(study_url, "s", sweep(trials=1), {**FACTS, "parent_run": "abc"})
    made.note(driver_seen=5)
    claimed(made).complete([1.0])
    assert made.claim("me") is None
    Study.create(study_url, "s", sweep(trials=2, grace_seconds=9), {**FACTS, "parent_run": "other"})
    opened = Study.open(study_url, "s")
    assert (opened.sweep.trials, opened.sweep.grace_seconds) == (2, 9)
    assert (opened.facts["parent_run"], opened.facts["driver_seen"]) == ("abc", 5)
    claimed(opened).complete([2.0])
    assert opened.claim("me") is None
    assert studies(study_url) == ["s"]


def test_study_whose_maker_died_before_stating_its_facts_is_taken_up(study_url: str) -> None:
    database = study_storage.Database(study_url, create=True)
    optuna.create_study(storage=database.rdb, study_name="s", direction="maximize")
    Study.create(study_url, "s", sweep(), {**FACTS, "parent_run": "abc"})
    assert Study.open(study_url, "s").facts["parent_run"] == "abc"


def test_studies_of_others_are_refused(study_url: str) -> None:
    Study.create(study_url, "mine", sweep(), FACTS)
    database = study_storage.Database(study_url, create=False)
    optuna.create_study(storage=database.rdb, study_name="theirs").optimize(lambda trial: 1.0, n_trials=1)
    wider = sweep(space={**sweep().model_dump()["space"], "method.tau": {"type": "float", "low": 1, "high": 9}})
    with pytest.raises(UserError, match=r"space.method.tau.high \(8.0 there, 9.0 here\) differ: give study="):
        Study.create(study_url, "mine", wider, {"digest": "e" * 64})
    with pytest.raises(
        UserError, match=r"digest dddddddddd, here eeeeeeeeee\): the configuration or the sources differ"
    ):
        Study.refuse_other(study_url, "mine", "e" * 64, sweep(trials=3))
    with pytest.raises(UserError, match="did you mean mine"):
        Study.open(study_url, "mien")
    for refused in (
        lambda: Study.open(study_url, "theirs"),
        lambda: Study.create(study_url, "theirs", sweep(), FACTS),
        lambda: Study.refuse_other(study_url, "theirs", "d" * 64, sweep()),
    ):
        with pytest.raises(UserError, match="was not made by this program"):
            refused()
    Study.refuse_other(study_url, "mine", "d" * 64, sweep())
    Study.refuse_other(study_url, "new", "d" * 64, sweep())


def test_bad_databases_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, but long enough to be looked at as one " * 10)
    with sqlite3.connect(tmp_path / "mlflow.db") as mlflow:
        mlflow.execute("create table alembic_version (version_num)")
        mlflow.execute("create table experiments (experiment_id)")
    (tmp_path / "a_file").touch()
    for url, words in {
        "mysql://a:secret@b/c": "give sqlite:///<file>, or postgresql://",
        "sqlite://": "give sqlite:///<file>",
        f"sqlite:///{tmp_path}/text.db": "not a SQLite database",
        f"sqlite:///{tmp_path}/mlflow.db": "is MLflow's database: give the studies one of their own",
        f"sqlite:///{tmp_path}/a_file/x.db": "a_file",
        "postgresql://u:secret@127.0.0.1:9/d": "Connection refused",
        "postgresql://u:se/cr@et@127.0.0.1:9/d": "storage=postgresql://u:",
        "postgresql://u:secret@host:port/d": "storage=postgresql://u:",
    }.items():
        with pytest.raises(UserError) as error:
            Study.create(url, "s", sweep(), FACTS)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert "secret" not in str(error.value)
        assert "cr@et" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        Study.open(f"sqlite:///{tmp_path}/none.db", "s")
    assert studies(f"sqlite:///{tmp_path}/none.db") == []


@pytest.mark.postgres
def test_server_refusals_do_not_tell_the_password(postgres_server: PostgresServer) -> None:
    url = postgres_server.url("nowhere")
    for bad, words in ((url, "make it with createdb"), (url.replace("postgres:", "nobody:"), "password")):
        with pytest.raises(UserError, match=words) as error:
            Study.create(bad, "s", sweep(), FACTS)
        assert PASSWORD not in str(error.value)
        assert ESCAPED not in str(error.value)


@pytest.mark.postgres
def test_server_that_goes_away_for_a_while_costs_reports_but_no_results(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    study = Study.create(postgres_url, "s", sweep(grace_seconds=60), FACTS)
    claim = claimed(study)
    claim.report(1.0, 0)
    postgres_server.stop()
    claim.report(2.0, 1)
    claim.check()
    assert not claim.should_prune()
    back = threading.Timer(0.5, postgres_server.start)
    back.start()
    claim.complete([3.0])
    back.join()
    trial = study.trials()[0]
    assert (trial.value, trial.intermediate_values) == (3.0, {0: 1.0})


def test_a_trial_that_has_its_result_refuses_another(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(), FACTS)
    claim = claimed(study)
    claim.complete([1.0])
    with pytest.raises(Taken):
        claim.complete([2.0])
    assert [trial.value for trial in study.trials()] == [1.0]


@pytest.mark.parametrize("lost", ["write", "answer"])
def test_a_result_is_recorded_once_whatever_an_outage_takes(study_url: str, lost: str) -> None:
    study = Study.create(study_url, "s", sweep(grace_seconds=60), FACTS)
    claim, events = claimed(study), list[str]()

    def interrupt(connection: object, cursor: object, statement: str, *rest: object) -> None:
        events.append("write" if statement.startswith("UPDATE trials") else "other")
        if "outage" not in events and (events[-1] == "write" if lost == "write" else "commit" in events):
            events.append("outage")
            raise study_storage.OperationalError(statement, {}, Exception("server closed the connection"))

    engine = study._database.engine
    event.listen(engine, "before_cursor_execute", interrupt)
    event.listen(engine, "commit", lambda _: events.append("commit") if "write" in events else None)
    claim.complete([3.0])
    assert "outage" in events
    assert events.count("write") == {"write": 2, "answer": 1}[lost]
    assert [(trial.state, trial.value) for trial in study.trials()] == [(TrialState.COMPLETE, 3.0)]


def test_database_that_stays_away_ends_in_one_line(study_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.create(study_url, "s", sweep(), FACTS)
    monkeypatch.setattr(study_storage, "PATIENCE_S", 0.0)

    def away() -> None:
        raise study_storage.OperationalError("SELECT", {}, Exception("the disk\nis gone"))

    with pytest.raises(UserError, match=r"storage=.*: the disk is gone: check the"):
        study._database.patiently(away)


def test_heart_beats_while_the_worker_is_busy(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(grace_seconds=600), FACTS)
    claim = claimed(study)
    age_heartbeats(study_url)
    deadline = time.monotonic() + 60
    while "2020" in heartbeat(study_url) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert study.requeue_stale().running == 1
    claim.complete([1.0])
    assert not claim._heart.is_alive()


@pytest.mark.postgres
def test_training_holds_no_connection_between_heartbeats(postgres_server: PostgresServer, postgres_url: str) -> None:
    study = Study.create(postgres_url, "s", sweep(grace_seconds=600), FACTS)
    claimed(study)
    name = postgres_url.rpartition("/")[2]
    deadline = time.monotonic() + 60
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as server:
        while time.monotonic() < deadline:
            open_ones = server.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", [name]).fetchone()
            if open_ones == (0,):
                break
            time.sleep(0.05)
    assert open_ones == (0,)
    assert study.counts().running == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
def test_a_new_database_has_the_permissions_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        study_storage.Database(f"sqlite:///{tmp_path}/study.db", create=True).close()
    finally:
        os.umask(before)
    left = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert left == {"study.db": mode, "study.db.lock": mode}
