"""`-e continual`: strategies end to end, what each task sees and keeps, and resuming (docs/continual.md)."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from safetensors import safe_open

from pipeline.data.sources import ImageData
from pipeline.data.splits import split
from pipeline.distill import continual
from pipeline.training.continual.kept import Kept
from pipeline.training.run_data import RunData, Scope
from tests.steps.lab import STUDENT, Done, Lab, deliver, ending, journal, points, run_id, same_tensors, see, signal_at

SHORT = ("tasks=2", "method.num_stages=1", "method.student_epochs_per_stage=[1]", "method.mixup_alpha=0")
KEEPING = ("method=finetune", "continual.buffer_size=12", "continual.lambda_ewc=10", "continual.fisher_images=20")


def row(folder: Path, task: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = json.loads((folder / f"task_{task}" / continual.ROW).read_text())
    return found


def metrics(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "results.json").read_text())["metrics"]
    return found


def same(one: Path, other: Path, tasks: int = 2) -> None:
    """Assert that two runs' tasks have the same weights, memories, matrices and metrics, each metric once."""
    for folder in ("", *(f"task_{k + 1}" for k in range(tasks))):
        assert same_tensors(one / folder / STUDENT, other / folder / STUDENT), folder
        found = points(one / folder)
        assert found == points(other / folder), folder
        assert {len(values) for values in found.values()} == {1}
    for k in range(tasks):
        assert same_tensors(one / f"task_{k + 1}" / continual.KEPT, other / f"task_{k + 1}" / continual.KEPT)
        assert row(one, k + 1) == row(other, k + 1)


def test_a_run_has_a_nested_run_for_each_task_and_the_metrics_of_its_matrix(ready_lab: Lab, sqlite_uri: str) -> None:
    done = ready_lab.step("continual", *SHORT, *KEEPING, "tracking.mode=online", f"tracking.uri={sqlite_uri}")
    assert done.code == 0, done.err
    seen = see(sqlite_uri, run_id(done.folder))
    assert set(seen.children) == {"task 1 of 2", "task 2 of 2"}
    rows = [row(done.folder, k)["test"] for k in (1, 2)]
    r = np.array([one["class_il"] for one in rows])
    found = metrics(done.folder)
    assert found["continual/test_average_acc"] == pytest.approx(r[1].mean())
    assert found["continual/test_forgetting"] == pytest.approx(r[0, 0] - r[1, 0])
    assert found["final/acc_last"] == pytest.approx(r[1].mean())  # tasks of equally many test images
    steps = [seen.steady["continual/test_acc", step] for step in (0, 1)]
    assert steps == [[rows[0]["seen"]], [rows[1]["seen"]]]
    assert {"accuracy_matrix.png", "accuracy_matrix.csv", "tasks.png", "predictions.npz"} <= seen.artifacts
    of_task = seen.children["task 2 of 2"]
    assert {"continual/kept.safetensors", "continual/row.json", STUDENT} <= of_task.artifacts
    assert of_task.metrics["b_step/ewc", 0][0] >= 0
    assert found["cost/memory_bytes"] >= 12 * 16 * 16 * 3
    # the confusion of seen classes is that of the predictions that comparisons read
    kept = np.load(done.folder / "predictions.npz")
    assert 100 * (kept["labels"] == kept["predictions"]).mean() == pytest.approx(found["final/acc_last"])


@pytest.mark.slow
def test_finetuning_forgets_what_replay_remembers_and_joint_training_never_loses(ready_lab: Lab) -> None:
    long = ("tasks=2", "method.num_stages=1", "method.student_epochs_per_stage=[6]", "method.mixup_alpha=0")
    accuracy = {}
    for method, *more in (("finetune",), ("replay", "continual.buffer_size=60"), ("joint",)):
        done = ready_lab.step("continual", *long, f"method={method}", *more)
        assert done.code == 0, done.err
        accuracy[method] = row(done.folder, 2)["val"]["class_il"]
    assert accuracy["finetune"][0] < 10  # not one image of a past class is called so
    assert accuracy["replay"][0] > accuracy["finetune"][0] + 20
    assert np.mean(accuracy["joint"]) >= np.mean(accuracy["finetune"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        ("method=lwf",),
        ("method=icarl", "continual.buffer_size=12"),
        ("method=der", "continual.buffer_size=12", "method.logits=old"),
        ("method=asib", "continual.past=true", "continual.buffer_size=12", "continual.buffer_rule=balanced"),
        ("method=aver", "continual.past=true", "continual.teachers=tasks", "continual.lambda_ewc=1"),
        ("method=kd", "continual.scenario=teachers", "method.tau=2"),
    ],
    ids=lambda strategy: "-".join(strategy[:2]),
)
def test_strategies_and_teachers_end_to_end(ready_lab: Lab, strategy: tuple[str, ...]) -> None:
    done = ready_lab.step("continual", *SHORT, "method.kd_alpha=0.5", *strategy)
    assert done.code == 0, done.err
    assert 0 <= metrics(done.folder)["continual/test_average_acc"] <= 100
    logged = {name for name, _ in points(done.folder / "task_2")}
    distils = {"method=lwf": "lwf", "method=icarl": "lwf", "method=der": "der", "method=aver": "aver"}
    assert f"b_step/{distils.get(strategy[0], 'kd')}" in logged


@pytest.mark.slow
def test_teachers_of_one_kind_that_come_one_after_another_are_told_apart(ready_lab: Lab) -> None:
    twins = "model.teachers=[{name: cifar_resnet8}, {name: cifar_resnet8}]"
    done = ready_lab.step("continual", *SHORT, "method=kd", "continual.scenario=teachers", twins)
    assert done.code == 0, done.err
    logged = {name for name, _ in points(done.folder)}
    assert {"0_cifar_resnet8/test_acc", "1_cifar_resnet8/test_acc"} <= logged


# what a task sees and keeps ------------------------------------------------------------------------------------------


def test_replayed_images_are_of_past_tasks_only_and_never_of_the_validation_split(ready_lab: Lab) -> None:
    done = ready_lab.step("continual", *SHORT, "method=replay", *KEEPING[1:], "tasks=4")
    assert done.code == 0, done.err
    arrays = np.load(ready_lab.data)
    labels = torch.from_numpy(arrays["y_train"])
    tags = {k: v for e in journal(done.folder) if e.kind == "tags" for k, v in e.data["values"].items()}
    asked = [word for word in tags["asib.command"].split() if "tasks=" in word]
    assert asked == ["continual.num_tasks=4"], "once, and not as `tasks` too"
    assert "all seen; replay, seed 0" in done.out
    order = [int(c) for c in tags["asib.class_order"].split(",")]
    parts = split(labels, 0.2, tags["asib.data_digest"], 0)
    for task in range(1, 5):
        kept = Kept.read(done.folder / f"task_{task}" / continual.KEPT).memory
        assert len(kept.index) == len(kept.index.unique()) == 12  # never more than stated
        assert set(labels[kept.index].tolist()) <= set(order[:task])
        assert torch.isin(kept.index, parts.train).all()
        assert kept.seen == 32 * task


def test_a_batch_has_its_share_of_kept_images_and_the_masks_number_the_classes(small: ImageData) -> None:
    from tests.pipeline.training.builders import CPU, config

    given = config(dataset={"batch_size": 8, "val_fraction": 0.25})
    parts = split(small.train_y, 0.25, small.digest, 0)
    past = parts.train[small.train_y[parts.train] == 3][:5]
    scope = Scope((3, 1), (1,), memory=past, share=0.25)
    data = RunData(given, small, CPU, scope)
    draws = data.train.draw(None, 0.0, lambda name: torch.Generator().manual_seed(0))
    seen: list[int] = []
    for batch in data.train.epoch(draws):
        old = torch.isin(batch.index, past)
        assert int(old.sum()) == 2 or len(batch.y) < 8
        assert batch.y[old].eq(0).all()  # class 3 is the first of the task's
        assert batch.y[~old].eq(1).all()
        seen += batch.index[~old].tolist()
    assert sorted(seen) == sorted(parts.train[small.train_y[parts.train] == 1].tolist())
    assert set(data.eval.labels.tolist()) == set(data.test.labels.tolist()) == {0, 1}


@pytest.fixture
def small() -> ImageData:
    from tests.pipeline.training.builders import image_data

    return image_data(96)


def test_the_past_student_is_a_network_of_its_own_and_stays_as_it_was(
    ready_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second task it shares no memory with the student, and its outputs do not change while that is trained."""
    found: list[tuple[set[int], set[int], torch.Tensor, torch.Tensor]] = []
    fit = continual.fit

    def watched(run, data, student, taught, *more):  # type: ignore[no-untyped-def]
        x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
        nets = [t.net for t in taught]
        before = nets[0].eval()(x).logits.detach() if nets else None
        made = fit(run, data, student, taught, *more)
        if nets:
            places = [{p.data_ptr() for p in net.parameters()} for net in (student, nets[0])]
            assert before is not None
            found.append((places[0], places[1], before, nets[0].eval()(x).logits.detach()))
        return made

    monkeypatch.setattr(continual, "fit", watched)
    done = ready_lab.step("continual", *SHORT, "method=lwf")
    assert done.code == 0, done.err
    ((student, past, before, after),) = found
    assert not student & past
    assert torch.equal(before, after)
    assert (before[:, 2:] == -1e4).all()  # of classes that it had not seen it says nothing


def test_the_order_of_classes_is_part_of_what_is_continued(ready_lab: Lab) -> None:
    stopped = ready_lab.disturbed(signal_at(2), "continual", *SHORT, *KEEPING)
    assert stopped.code == 143
    line = ready_lab.step("continual", *SHORT, *KEEPING, "continual.order=identity", f"resume={stopped.folder}")
    assert line.code == 2
    assert "continual.order" in line.err


# resuming ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(bench: Lab) -> Done:
    """A run that nothing disturbs."""
    done = bench.step("continual", *SHORT, *KEEPING)
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize("question", [2, 6])
def test_a_run_ended_by_a_signal_and_continued_equals_an_undisturbed_one(
    ready_lab: Lab, whole: Done, sqlite_uri: str, question: int
) -> None:
    stopped = ready_lab.disturbed(signal_at(question, signal.SIGINT), "continual", *SHORT, *KEEPING)
    assert stopped.code == 130
    assert ending(stopped.folder) == ("KILLED", "killed", 130)
    resumed = ready_lab.step("continual", *SHORT, *KEEPING, f"resume={stopped.folder}")
    assert (resumed.code, resumed.new) == (0, []), resumed.err
    same(stopped.folder, whole.folder)
    deliver(sqlite_uri, stopped.folder)
    seen = see(sqlite_uri, run_id(stopped.folder))
    assert seen.status == "FINISHED"
    assert {len(values) for values in seen.metrics.values()} == {1}


@pytest.mark.slow
def test_runs_killed_at_ten_random_moments_equal_an_undisturbed_one(ready_lab: Lab, tmp_path: Path) -> None:
    """kill -9 of a run of four tasks with replay and weight consolidation, again and again until it has ended."""
    given = (*SHORT, *KEEPING, "tasks=4", "method.student_epochs_per_stage=[4]", "checkpoint.every_seconds=1e-6")
    undisturbed = ready_lab.step("continual", *given)
    assert undisturbed.code == 0, undisturbed.err
    other = Lab(tmp_path / "killed")
    draw, kills, name = random.Random(0), 0, None
    while True:
        process = other.start("continual", *given, *([f"resume={name}"] if name else []), log=tmp_path / "log")
        try:
            code = process.wait(draw.uniform(0.4, 1.2) if kills < 10 else 300)
        except Exception:  # of whichever kind the fork's time-out is
            process.kill()
            process.wait()
            kills += 1
            name = next((str(folder) for folder in other.run_folders() if (folder / "journal.jsonl").exists()), None)
            for folder in other.run_folders() if name is None else ():  # killed before it had begun
                shutil.rmtree(folder)
            continue
        assert code == 0, (tmp_path / "log").read_text()
        break
    (folder,) = other.run_folders()
    same(folder, undisturbed.folder, tasks=4)
    assert kills == 10


def test_a_finished_tasks_file_states_what_it_holds(whole: Done) -> None:
    with safe_open(whole.folder / "task_1" / continual.KEPT, "pt") as file:
        names = set(file.keys())
    assert {"memory.index", "memory.logits", "memory.known"} < names
    assert {name.split(".")[0] for name in names} == {"memory", "fisher", "anchor"}


@pytest.mark.slow
def test_a_sweep_weighs_consolidation_by_validation_alone(ready_lab: Lab, sqlite_uri: str) -> None:
    given = ("continual.num_tasks=2", "method=ewc", *SHORT[1:], "sweep=lambda_ewc", "trials=2", "workers=1")
    done = ready_lab.step("sweep", *given, "tracking.mode=online", f"tracking.uri={sqlite_uri}")
    assert done.code == 0, done.err
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{ready_lab.runs / 'studies.db'}")
    trials = optuna.load_study(
        study_name=study.study_name, storage=f"sqlite:///{ready_lab.runs / 'studies.db'}"
    ).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    assert len({trial.params["continual.lambda_ewc"] for trial in trials}) == 2
    for trial in trials:
        folder = done.folder / "trials" / f"{trial.number:04d}"
        found = metrics(folder)
        assert trial.values == [found["final/val_acc"]]
        of_tasks = [name for name, _ in points(folder)] + [name for name, _ in points(folder / "task_2")]
        assert not [name for name in (*found, *of_tasks) if "test" in name or name == "final/acc_last"]


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "tasks is not given: tasks=5"),
        (("tasks=3",), "continual.num_tasks=3 does not divide 4 classes equally: give 2 or 4 tasks"),
        (("tasks=1",), "continual.num_tasks=1 leaves nothing to forget"),
        (("tasks=2", "continual.order=[0,1,1,2]"), "continual.order is no permutation of 0…3"),
        (("tasks=2", "continual.order=[1,0]"), "continual.order names 2 classes, and the data has 4"),
        (
            ("tasks=2", "method=der", "continual.buffer_size=0", "method.mixup_alpha=0"),
            "method=der replays kept images: give continual.buf",
        ),
        (("tasks=2", "method=icarl", "continual.buffer_size=0"), "continual.classifier=nearest_mean classifies by"),
        (("tasks=2", "method=icarl", "continual.buffer_size=3"), "continual.buffer_size=3 keeps no image of some"),
        (("tasks=2", "method=joint", "continual.buffer_size=9"), "continual.joint=true trains on all that was seen"),
        (("tasks=2", "method=ewc", "continual.buffer_size=9"), "continual.ce_classes=new has no logits for past"),
        (("tasks=2", "continual.replay_ratio=1.5", "continual.buffer_size=9"), "continual.replay_ratio: got 1.5"),
        (("tasks=3", "continual.scenario=teachers"), "continual.scenario=teachers has a task for each teacher"),
        (("tasks=2", "continual.teachers=task", "finetune.epochs=0"), "finetune.epochs=0"),
        (
            ("tasks=2", "method=kd", "continual.past=true", "model.teachers=[{name: cifar_resnet8}]"),
            "method=kd distils from 1 teacher, and continual.past makes them 2",
        ),
        (("tasks=4", "method=aver", "continual.teachers=task"), "continual.num_tasks=4 has tasks of one class"),
        (("tasks=2", "method=lfw"), "method=lfw: no such option; did you mean lwf?"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value) or "no tasks",
)
def test_bad_input_is_refused_in_one_line(ready_lab: Lab, given: tuple[str, ...], said: str) -> None:
    assert said in ready_lab.refuses("continual", *given)


def test_a_method_that_learns_from_its_past_needs_tasks(ready_lab: Lab) -> None:
    assert "give continual.num_tasks" in ready_lab.refuses("distill", "method=lwf")


def test_images_kept_in_vain_are_named(ready_lab: Lab) -> None:
    done = ready_lab.step("distill", "continual.buffer_size=9", "method.student_epochs_per_stage=[1,0]")
    assert "has no effect here: continual.buffer_size: continual.num_tasks is null" in done.err
