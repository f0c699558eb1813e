"""The sweep as a step, on data of seconds: what MLflow and Optuna hold of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from pipeline.data.batches import EvalBatches
from pipeline.sweep import watch, worker
from pipeline.sweep.study.claim import Claim
from tests.pipeline.sweep.step.sweeping import SHORT, SPACE, parent, space, states, study, swept, trials
from tests.steps.lab import TEST, TRAIN, Lab, Seen, deliver, ending, journal, points, run_id, see, write_npz

VAL = TRAIN // 5  # the lab's dataset.val_fraction


def assert_runs_are_trials(lab: Lab, found: Seen) -> None:
    """The study, in which the third trial was pruned, and what MLflow holds of it."""
    assert (found.status, set(found.children)) == ("FINISHED", {"trial 0", "trial 1", "trial 2"})
    assert found.tags["asib.study"] == study(lab).study_name
    assert found.name.startswith("sweep small")
    assert states(lab) == ["COMPLETE", "COMPLETE", "PRUNED"]
    for trial in study(lab).trials:
        run = found.children[f"trial {trial.number}"]
        assert (run.tags["asib.study"], run.tags["asib.trial"]) == (study(lab).study_name, str(trial.number))
        assert trial.user_attrs["config_hash"] == run.tags["asib.config_hash"]
        assert trial.intermediate_values == {e: v[0] for (name, e), v in run.metrics.items() if name == "student/acc"}
        assert {k: float(run.params[k]) for k in SPACE} == trial.params
        seen = {name for name, _ in run.metrics}
        assert not any("test" in name or name.startswith("final/acc") for name in seen), "the test split stays unseen"
        if trial.number < 2:
            assert run.status == "FINISHED"
            assert set(trial.intermediate_values) == {1, 3}
            assert trial.value == run.metrics["final/val_acc", 3][0]
        else:
            assert (run.status, run.tags["asib.outcome"], run.tags["asib.pruned_epoch"]) == ("KILLED", "pruned", "1")
            assert "median" in run.tags["asib.pruned_reason"]
            assert set(trial.intermediate_values) == {1}
    best = study(lab).best_trial
    assert found.metrics["sweep/best_value", 3] == [best.value]
    counts = [found.metrics[f"sweep/{state}", 3] for state in ("complete", "pruned", "running", "failed")]
    assert counts == [[2], [1], [0], [0]]
    assert json.loads(found.tags["asib.best_params"]) == best.params
    assert {"best.yaml", "study/study.html", "study/history.png", "checkpoints/student.safetensors"} <= found.artifacts


def test_trials_and_runs_are_one_thing(finished: Lab, sqlite_uri: str) -> None:
    deliver(sqlite_uri, parent(finished))
    assert_runs_are_trials(finished, see(sqlite_uri, run_id(parent(finished))))


@pytest.mark.slow
def test_trials_know_their_runs_while_the_sweep_goes_on(
    lab: Lab, sqlite_uri: str, online: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with pictures
    for module in (worker, watch):  # trials of a second end before delivery has their runs
        monkeypatch.setattr(module, "note_run", lambda *_: False)
    monkeypatch.setattr(Claim, "should_prune", lambda claim: claim.number == 2)
    swept(lab, "log_model=true", *online, pruner={"name": "median"})
    found = see(sqlite_uri, run_id(parent(lab)))
    assert_runs_are_trials(lab, found)
    for trial in study(lab).trials:
        assert trial.user_attrs["run_id"] == found.children[f"trial {trial.number}"].id
    assert len(found.models_out) == 1
    assert f"runs/{study(lab).best_trial.user_attrs['run_id']}" in found.tags["mlflow.note.content"]


@pytest.mark.slow
def test_a_sweep_never_looks_at_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the teachers either that it fine-tunes itself: neither an image read nor a metric written."""
    whole = EvalBatches.__iter__
    evaluated: set[int] = set()

    def noting(self: EvalBatches) -> Iterator[tuple[Tensor, Tensor]]:
        evaluated.add(len(self.labels))
        return whole(self)

    monkeypatch.setattr(EvalBatches, "__iter__", noting)
    lab = Lab(tmp_path / "fresh")
    swept(lab, *SHORT, trials=1)
    folders = [parent(lab), *parent(lab).glob("teacher_*"), *trials(lab)]
    assert len(folders) == 4
    written = {name for folder in folders for name, _ in points(folder)}
    assert not [name for name in written if name.startswith(("test/", "final/acc", "final/teacher"))]
    assert {"teacher/acc", "final/val_acc"} <= written
    assert VAL in evaluated
    assert TEST not in evaluated


@pytest.mark.slow
def test_the_best_configuration_from_the_server_is_that_trial_again(
    lab: Lab, sqlite_uri: str, online: tuple[str, str]
) -> None:
    swept(lab, *SHORT, *online, trials=2)
    found, best = see(sqlite_uri, run_id(parent(lab))), study(lab).best_trial
    here = [f"output_dir={lab.folder / 'again'}", f"dataset.path={lab.data}", "log_model=false", *online]
    again = lab.raw("distill", [f"cfg=runs:/{found.id}/best.yaml", *here])
    assert again.code == 0, again.err
    (folder,) = (lab.folder / "again").glob("*-distill-*")
    repeated = see(sqlite_uri, run_id(folder))
    assert repeated.tags["asib.config_hash"] == best.user_attrs["config_hash"]
    assert repeated.metrics["final/val_acc", 1] == [best.value]


@pytest.mark.slow
def test_the_same_command_goes_on_and_never_exceeds_its_total(lab: Lab, finished: Lab) -> None:
    swept(lab, *SHORT, trials=1)
    swept(lab, *SHORT, "trials=2", trials=1)
    assert [trial.params for trial in study(lab).trials] == [trial.params for trial in study(finished).trials[:2]]
    assert states(lab) == ["COMPLETE"] * 2
    assert len(list(lab.runs.glob("*-sweep-*"))) == 1, "one run for the study"
    assert ending(parent(lab)) == ("FINISHED", "completed", 0)


@pytest.mark.slow
def test_an_equal_configuration_is_not_run_again(lab: Lab) -> None:
    swept(lab, *SHORT, space={"method.tau": {"type": "int", "low": 4, "high": 4}}, trials=2)
    assert states(lab) == ["COMPLETE"] * 2
    assert len(trials(lab)) == 1
    assert len({trial.value for trial in study(lab).trials}) == 1


@pytest.mark.slow
def test_several_objectives_leave_a_front(lab: Lab) -> None:
    objectives = [
        {"metric": "final/val_acc", "direction": "maximize"},
        {"metric": "cost/gmacs", "direction": "minimize"},
    ]
    swept(
        lab,
        *SHORT,
        objectives=objectives,
        trials=2,
        space={"method.cccp_nt": {"type": "int", "low": 1, "high": 3}, **SPACE},
    )
    front = study(lab).best_trials
    assert {path.name for path in parent(lab).glob("front_*.yaml")} == {f"front_{t.number:04d}.yaml" for t in front}


@pytest.mark.slow
def test_a_sweep_stops_when_it_no_longer_improves(lab: Lab) -> None:
    space = {"method.tau": {"type": "int", "low": 4, "high": 4}}  # nothing can improve on the first trial
    done = swept(lab, *SHORT, "sweep.stop.patience=2", space=space, trials=9)
    assert states(lab) == ["COMPLETE"] * 3
    reason = "the last 2 completed trials brought no improvement (stop.patience=2)"
    assert f"the study stops after 3 of 9 trials: {reason}" in done.err
    assert f"stopped: {reason}" in done.out
    assert states(lab) == ["COMPLETE"] * 3
    swept(lab, *SHORT, "sweep.stop.patience=2", space=space, trials=9)
    assert len(states(lab)) == 3
    swept(lab, *SHORT, space=space, trials=4)
    assert len(states(lab)) == 4


@pytest.mark.slow
def test_a_study_made_anew_takes_nothing_from_the_one_before(lab: Lab) -> None:
    swept(lab, *SHORT, trials=2)
    first, values = parent(lab), [trial.value for trial in study(lab).trials]
    for file in lab.runs.glob("studies.db*"):
        file.unlink()
    swept(lab, *SHORT, trials=2)
    (second,) = set(lab.runs.glob("*-sweep-*")) - {first}
    assert len(list(second.glob("trials/*"))) == 2
    assert [trial.value for trial in study(lab).trials] == values
    swept(lab, *SHORT, "trials=3", trials=2)
    assert len(list(lab.runs.glob("*-sweep-*"))) == 2
    assert len(list(second.glob("trials/*"))) == 3


@pytest.mark.slow
def test_a_finished_sweep_once_more_doubles_nothing(lab: Lab) -> None:
    swept(lab, *SHORT, "log_model=true", trials=1)
    before = points(parent(lab))
    swept(lab, *SHORT, "log_model=true", trials=1)
    assert points(parent(lab)) == before
    assert [entry.kind for entry in journal(parent(lab))].count("model") == 1


@pytest.mark.slow
def test_a_study_begun_off_line_goes_on_with_a_server(lab: Lab, sqlite_uri: str, online: tuple[str, str]) -> None:
    swept(lab, *SHORT, trials=1)
    swept(lab, *SHORT, "trials=2", *online, trials=1)
    found = see(sqlite_uri, run_id(parent(lab)))
    assert set(found.children) == {f"trial {number}" for number in range(2)}
    assert {run.status for run in found.children.values()} == {"FINISHED"}
    assert {len(values) for run in found.children.values() for values in run.metrics.values()} == {1}


@pytest.mark.slow
def test_other_data_under_the_same_name_is_another_study(lab: Lab) -> None:
    swept(lab, *SHORT, trials=1)
    write_npz(lab.data, seed=1)
    done = lab.step("sweep", space(lab, trials=1), *SHORT, "trials=5")
    assert done.code == 2
    assert "other data" in done.err
    assert states(lab) == ["COMPLETE"]
