"""The sweep as a step, on data of seconds, its workers in this process: what MLflow and Optuna hold, and faults."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from torch import Tensor

from pipeline.data.batches import EvalBatches
from pipeline.distill import distill, train
from pipeline.errors import Interrupted
from pipeline.files import release
from pipeline.journal import take
from pipeline.launch import worker as launched
from pipeline.runs.run import Run
from pipeline.runs.signals import Stop
from pipeline.sweep import driver as sweep
from pipeline.sweep import watch, worker
from pipeline.sweep.request import Plan
from pipeline.sweep.study import report
from pipeline.sweep.study.claim import Claim
from pipeline.sweep.study.plots import draw
from pipeline.sweep.study.study import Study
from tests.steps.lab import (
    STUDENT,
    TEST,
    TRAIN,
    Done,
    Lab,
    Seen,
    deliver,
    ending,
    journal,
    points,
    run_id,
    same_tensors,
    see,
    signal_at,
    write_npz,
)
from tests.steps.sweep_kills import only_study

LAUNCHER = Plan.launcher
VAL = TRAIN // 5  # the lab's dataset.val_fraction
SHORT = ("method.num_stages=1", "method.student_epochs_per_stage=[1]")  # half a trial, where its length does not matter
PER_TRIAL = 16  # questions that the loop asks for a signal
SPACE = {
    "method.kd_alpha": {"type": "float", "low": 0.1, "high": 0.9},
    "method.tau": {"type": "float", "low": 1, "high": 8},
}


class WorkerStop(Stop):
    """The signal that the worker has got: `last`. One that only raises Interrupted has got none."""

    last: Stop

    def __init__(self) -> None:
        super().__init__()
        WorkerStop.last = self


class InProcess:
    """Stands where workers are launched: the worker's life goes on in this process, to its end."""

    def __init__(self, *_: Any) -> None:
        self.codes: list[int] = []

    def check(self) -> None: ...

    def alive(self) -> int:
        return 0

    def stop(self) -> None: ...

    def start(self, work: Callable[..., int], count: int, **arguments: Any) -> None:
        """The worker handles signals meanwhile; one that it left for is also the driver's, as from a terminal."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.codes += [work(index=0, **arguments)]
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if WorkerStop.last.signum:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module", autouse=True)
def _workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        tracking = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI")
        for name in (*tracking, "RANK", "WORLD_SIZE", "ASIB_STORAGE"):
            patched.delenv(name, raising=False)
        patched.setattr(Plan, "launcher", InProcess)
        patched.setattr(launched, "Stop", WorkerStop)
        patched.setattr(sweep, "TICK_S", 0.0)
        yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these trials; `finished` has one."""
    monkeypatch.setattr(report, "draw", lambda *_: ())


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned once for this module."""
    lab = Lab(tmp_path_factory.mktemp("teachers"))
    done = lab.step("finetune")
    assert done.code == 0, done.err
    return lab.runs / "teachers"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teachers: Path) -> Lab:
    """A sweep, off line, that nothing has disturbed; its third trial was pruned. Only to be looked at."""
    lab = Lab(tmp_path_factory.mktemp("finished"))
    shutil.copytree(teachers, lab.runs / "teachers")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "draw", lambda *study: islice(draw(*study), 1))
        patched.setattr(Claim, "should_prune", lambda claim: claim.number == 2)
        swept(lab, pruner={"name": "median"})
    return lab


@pytest.fixture
def lab(tmp_path: Path, teachers: Path) -> Lab:
    lab = Lab(tmp_path / "lab")
    shutil.copytree(teachers, lab.runs / "teachers")
    return lab


@pytest.fixture
def online(sqlite_uri: str) -> tuple[str, str]:
    """Overrides by which the sweep is delivered while it runs."""
    return "tracking.mode=online", f"tracking.uri={sqlite_uri}"


@pytest.fixture
def before_each_trial(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Run], None]], None]:
    """Let something happen where a trial would begin to train."""
    original = distill.trial

    def arrange(act: Callable[[Run], None]) -> None:
        def trial(run: Run, watch: Any) -> dict[str, float]:
            act(run)
            return original(run, watch)

        monkeypatch.setattr(distill, "trial", trial)

    return arrange


def space(lab: Lab, **changes: Any) -> str:
    """`sweep=…` of a small study."""
    content: dict[str, Any] = {
        "space": SPACE,
        "sampler": {"name": "random", "seed": 3},
        "pruner": {"name": "none"},
        "trials": 3,
        "heartbeat_seconds": 1,
        "grace_seconds": 3,
    }
    path = lab.folder / "small.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return f"sweep={path}"


def study(lab: Lab) -> optuna.Study:
    return only_study(f"sqlite:///{lab.runs / 'studies.db'}")


def states(lab: Lab) -> list[str]:
    return [trial.state.name for trial in study(lab).trials]


def parent(lab: Lab) -> Path:
    (folder,) = lab.runs.glob("*-sweep-*")
    return folder


def trials(lab: Lab) -> list[Path]:
    return sorted(parent(lab).glob("trials/*"))


def swept(lab: Lab, *overrides: str, **changes: Any) -> Done:
    done = lab.step("sweep", space(lab, **changes), *overrides)
    assert done.code == 0, done.err
    return done


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
def test_an_equal_configuration_is_not_run_again(lab: Lab) -> None:
    swept(lab, *SHORT, space={"method.tau": {"type": "int", "low": 4, "high": 4}}, trials=2)
    assert states(lab) == ["COMPLETE"] * 2
    assert len(trials(lab)) == 1
    assert len({trial.value for trial in study(lab).trials}) == 1


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


# several seeds -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_seeds(tmp_path_factory: pytest.TempPathFactory, teachers: Path) -> list[Lab]:
    """The same two trials with one seed each, in three sweeps: where the numbers of several seeds come from."""
    labs = []
    for seed in range(3):
        lab = Lab(tmp_path_factory.mktemp("single") / str(seed))
        shutil.copytree(teachers, lab.runs / "teachers")
        swept(lab, *SHORT, f"seed={seed}", trials=2)
        labs.append(lab)
    return labs


def assert_trials_are_means(lab: Lab, single: list[Lab]) -> None:
    """Two trials over the seeds of `single`, each of whose runs is point for point the one of a single seed."""
    done = [trial for trial in study(lab).trials if trial.state.name == "COMPLETE"]
    assert len(done) == 2
    for place, trial in enumerate(done):
        alone = [study(other).trials[place] for other in single]
        assert [trial.params] * len(single) == [other.params for other in alone]
        values = [float(other.value or 0) for other in alone]
        assert trial.intermediate_values == dict(enumerate(values))
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
        assert trial.value == pytest.approx(mean)
        assert trial.user_attrs["std"] == {"final/val_acc": pytest.approx(std)}
        folder = Path(trial.user_attrs["folder"])
        written = {name: values for (name, _), values in points(folder).items()}
        assert written == {
            "final/val_acc": [trial.value],
            "final/val_acc_std": [trial.user_attrs["std"]["final/val_acc"]],
        }
        for index, other in enumerate(single):
            assert points(folder / f"seed_{index}") == points(trials(other)[place])
            assert ending(folder / f"seed_{index}") == ("FINISHED", "completed", 0)


@pytest.mark.slow
def test_a_trial_of_several_seeds_is_their_mean(lab: Lab, single_seeds: list[Lab], sqlite_uri: str) -> None:
    done = swept(lab, *SHORT, "seeds=3", "sweep.pruner=none", trials=2)
    assert_trials_are_means(lab, single_seeds)
    best = study(lab).best_trial
    assert f"best: final/val_acc {best.value:.4g} ± {best.user_attrs['std']['final/val_acc']:.4g}" in done.out
    first = Path(best.user_attrs["folder"]) / "seed_0"
    assert same_tensors(parent(lab) / STUDENT, first / STUDENT)
    deliver(sqlite_uri, parent(lab))
    found = see(sqlite_uri, run_id(parent(lab)))
    assert found.metrics["sweep/best_value", 2] == [best.value]
    for trial in study(lab).trials:
        run = found.children[f"trial {trial.number}"]
        assert (run.status, set(run.children)) == ("FINISHED", {"seed 0", "seed 1", "seed 2"})
        assert {seed.tags["asib.trial"] for seed in run.children.values()} == {str(trial.number)}


@pytest.mark.slow
@pytest.mark.parametrize("place", [3, 1])
def test_an_interrupted_trial_is_continued_at_its_seed(
    lab: Lab, single_seeds: list[Lab], before_each_trial: Any, place: int
) -> None:
    """The worker leaves in the middle of the given run of six: every seed before it is not looked at again."""
    begun: list[tuple[str, str]] = []

    def leave(run: Run) -> None:
        begun.append((run.parent.folder.name if run.parent else "", run.folder.name))
        if len(begun) == place + 1:
            raise Interrupted(15)

    before_each_trial(leave)
    swept(lab, *SHORT, "seeds=3", "sweep.pruner=none", trials=2)
    second = "0001" if place > 2 else "0002"  # the retry has a number too
    whole = [(trial, f"seed_{seed}") for trial in ("0000", second) for seed in range(3)]
    assert begun == [*whole[: place + 1], *whole[place:]]
    assert states(lab).count("FAIL") == 1
    assert_trials_are_means(lab, single_seeds)


@pytest.mark.slow
def test_a_trial_that_is_worse_on_its_first_seeds_is_pruned(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Claim, "should_prune", lambda claim: (claim.number, claim._epoch) == (1, 1))
    swept(lab, *SHORT, "seeds=3", "seed=4", pruner="wilcoxon", trials=2)
    assert states(lab) == ["COMPLETE", "PRUNED"]
    pruned = study(lab).trials[1]
    assert set(pruned.intermediate_values) == {0, 1}
    assert pruned.user_attrs["asib.seed"] == 5
    assert "over 2 seeds was worse than the best trial's for the wilcoxon pruner" in pruned.user_attrs["asib.reason"]
    assert [path.name for path in sorted(trials(lab)[1].glob("seed_*"))] == ["seed_0", "seed_1"]
    tags = [entry.data["values"] for entry in journal(trials(lab)[1]) if entry.kind == "tags"]
    assert {"asib.pruned_seed": "5"}.items() <= tags[-1].items()


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


@pytest.fixture
def stopped_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may train."""

    def never(*_: Any) -> Any:
        raise AssertionError("it was to be refused")

    monkeypatch.setattr(sweep, "sweep", never)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["workers=0"], "workers=0"),
        (["trials=0"], "trials=0"),
        (["seeds=0"], "seeds=0"),
        (["seeds=3", "sweep.pruner=median"], "sweep.pruner.name=median with seeds=3"),
        (["method.tau=2"], "method.tau"),
        (["storage=postgresql://nobody:secret@127.0.0.1:1/none"], "127.0.0.1"),
        (["cluster=slrum"], "slurm"),
        (["join=none-such"], "studies.db"),
    ],
)
@pytest.mark.usefixtures("stopped_before_torch")
def test_bad_input_is_one_line(lab: Lab, arguments: list[str], said: str) -> None:
    done = lab.step("sweep", space(lab), *arguments)
    assert done.code == 2, done.err
    (line,) = done.lines
    assert said in line
    assert "secret" not in done.err
    assert not list(lab.runs.glob("*-sweep-*"))


def test_what_this_machine_lacks_is_said_before_any_trial(lab: Lab) -> None:
    done = lab.step("sweep", space(lab), "device=cpu", "optim.compile=graphs")
    assert done.code != 0
    assert "optim.compile=graphs" in done.lines[-1]
    assert done.new == []
    assert not optuna.get_all_study_names(f"sqlite:///{lab.runs / 'studies.db'}"), "no study either"


def test_a_dry_run_shows_the_jobs_and_leaves_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setattr(Plan, "launcher", LAUNCHER)
    done = lab.step("sweep", space(lab), "workers=2", "cluster=slurm", "storage=postgresql://me:se/cret@nowhere:1/x")
    assert (done.code, done.new) == (0, []), done.err
    assert "val_fraction" in done.out
    assert "3 trials, 2 at a time" in done.out
    assert "#SBATCH" in done.out
    assert "cret" not in done.out
    assert not list(lab.runs.glob("*.db")), "not even the study's database"


@pytest.mark.usefixtures("stopped_before_torch")
def test_a_second_sweep_of_a_study_is_told_to_join(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def began(run: Run, plan: Any) -> None:
        run.journal.tags({"asib.study": plan.name})
        run.ready()
        again = lab.step("sweep", space(lab))
        assert again.code == 2
        (line,) = again.lines
        assert "join=small-" in line
        assert str(run.folder) in line

    monkeypatch.setattr(sweep, "sweep", began)
    done = lab.step("sweep", space(lab))
    assert done.code == 0, done.err
    assert len(list(lab.runs.glob("*-sweep-*"))) == 1


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
