"""The evaluate step: modes and splits find what training found, other code's checkpoints what ours find; bad input is
refused; a published checkpoint scores what was published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from pipeline.config import DatasetConfig
from pipeline.data.sources import load
from pipeline.data.splits import split
from pipeline.evaluate import correctness, speed
from tests.cifar100 import SHARED
from tests.steps.lab import Done, Lab, deliver, journal, points, run_id, see, tensors, write_npz
from tests.steps.predictions import crown

QUICK = "speed=false"


def last(folder: Path) -> dict[str, float]:
    """Every metric's last value in a run's record."""
    return {name: values[-1] for (name, _), values in sorted(points(folder).items(), key=lambda item: item[0][1])}


def tags(folder: Path) -> dict[str, str]:
    return {k: v for e in journal(folder) if e.kind == "tags" for k, v in e.data["values"].items()}


def evaluated(lab: Lab, *overrides: str) -> Done:
    done = lab.step("evaluate", QUICK, *overrides)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def student(undisturbed: Done) -> Path:
    """A distilled student's weights."""
    return undisturbed.folder / "checkpoints/student.safetensors"


@pytest.fixture(scope="module")
def alone(bench: Lab, student: Path) -> Done:
    """The student's evaluation, without its teachers."""
    return evaluated(bench, f"student={student}", "teachers=false")


@pytest.fixture(scope="module")
def synergy(bench: Lab, student: Path) -> Done:
    return evaluated(bench, f"model={student}", "mode=synergy")


@pytest.fixture(scope="module")
def average(bench: Lab, undisturbed: Done) -> Done:
    return evaluated(bench, "mode=average")


@pytest.fixture(scope="module")
def baseline(bench: Lab) -> Done:
    """A run that has trained the student without teachers, and so without a fusion."""
    done = bench.step("baseline")
    assert done.code == 0, done.err
    return done


# what training found -----------------------------------------------------------------------------------------------


def test_each_mode_finds_what_the_distillation_found(
    bench: Lab, undisturbed: Done, synergy: Done, average: Done
) -> None:
    before = last(undisturbed.folder)
    single = evaluated(bench, f"model={undisturbed.folder}")
    for done, expected in ((single, "acc_val_selected"), (synergy, "synergy_acc"), (average, "teacher_avg_acc")):
        found = last(done.folder)
        assert found["test/acc"] == before[f"final/{expected}"]
        for k in (0, 1):
            assert found[f"test/teacher_{k}/acc"] == before[f"final/teacher_{k}_acc"]
    assert tags(synergy.folder)["asib.mode"] == "synergy"
    assert tags(synergy.folder)["asib.teachers"] == tags(undisturbed.folder)["asib.teachers"]


def test_costs_of_a_mode_are_those_of_its_networks(
    undisturbed: Done, student: Path, alone: Done, synergy: Done, average: Done
) -> None:
    """Parameters by counting tensors; multiply-accumulates as the distillation counted them."""
    teachers = [undisturbed.folder / f"teacher_{k}/checkpoints/teacher.safetensors" for k in (0, 1)]
    fusion = undisturbed.folder / "checkpoints/fusion.safetensors"

    def size(*files: Path) -> int:
        skipped = ("running_mean", "running_var", "num_batches_tracked")
        return sum(v.size for file in files for k, v in tensors(file).items() if not k.endswith(skipped))

    before = last(undisturbed.folder)
    macs = {name: before[f"cost/macs_per_image/{name}"] for name in ("student", "teacher_0", "teacher_1", "fusion")}
    for done, files, expected in (
        (alone, [student], macs["student"]),
        (average, teachers, macs["teacher_0"] + macs["teacher_1"]),
        (synergy, [student, *teachers, fusion], sum(macs.values())),
    ):
        found = last(done.folder)
        assert (found["parameters/total"], found["cost/macs_per_image"]) == (size(*files), expected)
    assert not [name for name in last(alone.folder) if "teacher" in name]


def test_the_three_splits(bench: Lab, undisturbed: Done, student: Path) -> None:
    done = evaluated(bench, f"student={student}", "split=both", "teachers=false")
    found = last(done.folder)
    assert found["test/acc"] == last(undisturbed.folder)["final/acc_val_selected"]
    val = evaluated(bench, f"student={student}", "split=val", "teachers=false")
    assert last(val.folder)["val/acc"] == last(undisturbed.folder)["final/val_acc"]
    assert "asib.val_contaminated" not in tags(val.folder)
    data = load(DatasetConfig(name="npz", path=str(bench.data)))
    parts = split(data.train_y, 0.2, data.digest, 0)
    for folder, name, index in (
        (done.folder / "train", "train", parts.train),
        (val.folder / "val", "val", parts.val),
        (done.folder, "test", torch.arange(40)),
    ):
        back = pd.read_parquet(folder / correctness.FILE)
        labels = (data.test_y if name == "test" else data.train_y)[index]
        np.testing.assert_array_equal(back["index"], index)
        np.testing.assert_array_equal(back["label"], labels)
        metrics = found | last(val.folder)
        assert 100 * back["correct"].mean() == pytest.approx(metrics[f"{name}/acc"])
        per_class = json.loads((folder / "per_class.json").read_text())
        table = pd.DataFrame(per_class["data"], columns=per_class["columns"])
        means = 100 * back.groupby("label")["correct"].mean()
        np.testing.assert_allclose(table["accuracy"], means)
    assert {"path": "train/per_class.json", "type": "table"} in json.loads(tags(done.folder)["mlflow.loggedArtifacts"])


def test_other_images_of_the_same_classes_are_prepared_as_the_model_was_trained(
    bench: Lab, student: Path, alone: Done, tmp_path: Path
) -> None:
    """A second data set with the same test images but other statistics: the same predictions."""
    with np.load(bench.data) as arrays:
        other = dict(arrays)
    other["x_train"] = other["x_train"] // 2
    np.savez(tmp_path / "darker.npz", **other)
    there = evaluated(bench, f"student={student}", "teachers=false", f"dataset.path={tmp_path / 'darker.npz'}")
    assert last(alone.folder)["test/nll"] == last(there.folder)["test/nll"]
    assert tags(alone.folder)["asib.data_digest"] != tags(there.folder)["asib.data_digest"]


def test_a_students_file_scores_what_its_run_found(
    bench: Lab, undisturbed: Done, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "BUDGET_S", dict.fromkeys(speed.BATCHES, 0.05))
    done = bench.step("evaluate", f"student={student}")
    assert done.code == 0, done.err
    found = points(done.folder)
    assert found["test/acc", 0] == points(undisturbed.folder)["final/acc_val_selected", 3]
    assert found["test/top5", 0] == [100.0]  # of four classes
    assert found["speed/latency_ms_1", 0] < found["speed/latency_ms_256", 0]
    results = json.loads((done.folder / "results.json").read_text())["metrics"]
    assert [results["test/nll"]] == found["test/nll", 0]
    shown = dict(line.split() for line in done.out.splitlines() if line.startswith("test/"))
    assert float(shown["test/acc"]) == pytest.approx(found["test/acc", 0][0], abs=0.005)
    assert (done.folder / "confusion.png").stat().st_size > 1000


def test_the_baseline_is_the_main_jobs_student_alone(baseline: Done) -> None:
    """Cross-entropy only, although the configuration names teachers and distils."""
    found = points(baseline.folder)
    assert {step for name, step in found if name == "student/acc"} == {0, 1}
    assert not [name for name, _ in found if name.startswith(("a_step/", "teacher/", "synergy/"))]
    assert found["b_step/loss", 0] == found["b_step/ce", 0]
    assert not [name for name, _ in found if name.startswith("b_step/kd")]
    assert "student alone" in baseline.out or "trained student" in baseline.out


@pytest.mark.slow
def test_the_published_resnet56_scores_the_published_accuracy(lab: Lab, cifar100: Path) -> None:
    weights = SHARED / "weights/cifar100_resnet56-f2eff4c8.pt"
    if not weights.exists():
        pytest.skip(f"{weights} is not beside this repository")
    data = ["dataset=cifar100", f"dataset.root={cifar100}", "model.student.name=cifar_resnet56", "speed=false"]
    done = lab.raw("evaluate", [*data, f"student={weights}", "tracking=offline", f"output_dir={lab.runs}"])
    assert done.code == 0, done.err
    found = points(done.folder)
    assert found["test/acc", 0] == [pytest.approx(72.63, abs=0.0049)]
    assert found["test/top5", 0][0] > 90


# checkpoints of other code ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def research(undisturbed: Done, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks as the research code saved them: adapters with the teachers, two files for the fusion."""
    folder = tmp_path_factory.mktemp("research")
    fusion = {k: torch.from_numpy(v) for k, v in tensors(undisturbed.folder / "checkpoints/fusion.safetensors").items()}

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in fusion.items() if k.startswith(prefix)}

    torch.save(under("ib_mbm."), folder / "mbm.pth")
    torch.save(under("head."), folder / "synergy_head.pth")
    for k in (0, 1):
        net = tensors(undisturbed.folder / f"teacher_{k}/checkpoints/teacher.safetensors")
        state = {f"backbone.{name}": torch.from_numpy(v) for name, v in net.items()}
        adapter = {f"distillation_adapter.{name}": v for name, v in under(f"adapters.{k}.").items()}
        torch.save({"state_dict": state | adapter}, folder / f"teacher_{k}_ft.pth")
    state = {f"module.{name}": torch.from_numpy(v) for name, v in tensors(student).items()}
    torch.save({"state_dict": state}, folder / "student.pth")
    return folder


def test_checkpoints_of_the_research_code_score_the_same(
    bench: Lab, undisturbed: Done, synergy: Done, research: Path
) -> None:
    given = [f"model.teachers.{k}.checkpoint={research}/teacher_{k}_ft.pth" for k in (0, 1)]
    theirs = evaluated(bench, f"model={research}/student.pth", "mode=synergy", f"fusion={research}", *given)
    assert last(theirs.folder) == last(synergy.folder)
    # the first teacher's network is the student's too
    single = evaluated(bench, f"model={research}/teacher_0_ft.pth", "teachers=false")
    assert last(single.folder)["test/acc"] == last(undisturbed.folder)["final/teacher_0_acc"]


def test_teachers_in_one_token(bench: Lab, student: Path, research: Path, tmp_path: Path) -> None:
    """An `mbm.pth` that takes both teachers concatenated is what it is, and not refused for its width."""
    for file in research.glob("*.pth"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = torch.load(tmp_path / "mbm.pth", weights_only=True)
    state["kv_proj.weight"] = torch.cat([state["kv_proj.weight"], torch.zeros_like(state["kv_proj.weight"])], dim=1)
    torch.save(state, tmp_path / "mbm.pth")
    given = [f"model.teachers.{k}.checkpoint={research}/teacher_{k}_ft.pth" for k in (0, 1)]
    evaluated(bench, f"model={student}", "mode=synergy", f"fusion={tmp_path}", *given)


# bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(student: Path, research: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that do not do."""
    folder = tmp_path_factory.mktemp("bad")
    write_npz(folder / "names.npz", class_names=np.array(["oak", "birch", "cedar", "date"]))
    write_npz(folder / "five.npz", classes=5)
    write_npz(folder / "larger.npz", size=32)
    (folder / "half").mkdir()
    (folder / "half/mbm.pth").write_bytes((research / "mbm.pth").read_bytes())
    (folder / "empty").mkdir()
    return folder


TWICE = [
    "model.teachers.0.name=cifar_wrn_16_1",
    "model.teachers.0.checkpoint={research}/teacher_1_ft.pth",
    "model.teachers.1.checkpoint={research}/teacher_1_ft.pth",
]
SYNERGY = ("model={student}", "mode=synergy")
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no model": ([], ["student is not set", "model=runs:/<id>"]),
    "two models": (["model=a.pt", "student=b.pt"], ["model=a.pt and student=b.pt"]),
    "unknown mode": (["model={student}", "mode=synergi"], ["mode=synergi", "did you mean synergy?"]),
    "unknown split": (["model={student}", "split=validation"], ["split=validation", "test, train, val, both"]),
    "no validation": (["model={student}", "split=val", "dataset.val_fraction=0"], ["split=val", "val_fraction=0"]),
    "no teachers": (
        ["mode=average", "model.teachers=[]", "method.kd_alpha=0"],
        ["mode=average", "model.teachers is empty"],
    ),
    "fusion without synergy": (["model={student}", "fusion={research}"], ["fusion=", "mode=synergy"]),
    "another number of classes": (
        ["model={student}", "dataset.path={files}/five.npz"],
        ["model={student}", "num_classes is 4 in the checkpoint, 5 here"],
    ),
    "other class names": (
        ["model={student}", "dataset.path={files}/names.npz"],
        ["model={student}", "other classes (", "oak"],
    ),
    "another image size": (
        ["model={student}", "dataset.path={files}/larger.npz"],
        ["model={student}", "image size is 16 in the checkpoint, 32 here"],
    ),
    "an empty folder": (["model={files}/empty"], ["model={files}/empty", "no .safetensors file"]),
    "a fusion as model": (["model={research}/mbm.pth"], ["mbm.pth", "mode=synergy", "fusion={research}"]),
    "another scheme": (["model=s3://a/b"], ["model=s3://a/b", "models:/<name>@<alias>"]),
    "half a version": (["model=models:/a/1/b/c"], ["models:/a/1/b/c", "models:/<name>/<version>"]),
    "no fusion": (["model={research}/student.pth", "mode=synergy"], ["mode=synergy", "fusion="]),
    "a run without a fusion": (
        ["model={baseline}", "mode=synergy"],
        ["student={baseline}/checkpoints/student.safetensors", "has no fusion; mode=single and mode=average work"],
    ),
    "a run without a fusion as fusion": (
        [*SYNERGY, "fusion={baseline}"],
        ["fusion={baseline}", "has no fusion; mode=single and mode=average work", "fusion=runs:/<id>"],
    ),
    "half a fusion": ([*SYNERGY, "fusion={files}/half"], ["fusion={files}/half", "no synergy_head.pth"]),
    "adapters missing": (
        [*SYNERGY, "fusion={research}"],
        ["mbm.pth", "model.teachers.0.checkpoint", "distillation_adapter."],
    ),
    "another width": ([*SYNERGY, "method.ib_mbm_out_dim=32"], ["fusion=", "mis-shaped", "(16,"]),
    "other heads": ([*SYNERGY, "method.ib_mbm_n_head=2"], ["method.ib_mbm_n_head=2", "had 4", "config.yaml"]),
    "other teachers": ([*SYNERGY, *TWICE], ["model.teachers: the fusion was trained with teachers"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_code_2(
    bench: Lab, student: Path, baseline: Done, research: Path, files: Path, case: str
) -> None:
    overrides, needles = REFUSED[case]
    places = {"student": student, "baseline": baseline.folder, "research": research, "files": files}
    done = bench.step("evaluate", QUICK, *(text.format(**places) for text in overrides))
    assert done.code == 2, done.err
    assert len(done.lines) == 1, done.err
    for needle in needles:
        assert needle.format(**places) in done.lines[0]
    assert not [folder for folder in done.new if (folder / "results.json").exists()]


@pytest.mark.parametrize("given", ["model=absent.pt", "student=absent.pt", "fusion=absent.pt"])
def test_a_missing_file_is_refused_before_there_is_a_run(bench: Lab, student: Path, given: str) -> None:
    needed = [f"model={student}", "mode=synergy"] if given.startswith("fusion") else []
    done = bench.step("evaluate", QUICK, *needed, given)
    assert (done.code, len(done.lines), done.new) == (2, 1, []), done.err
    assert f"{given}: no such file or folder; give runs:/<id>" in done.err


def test_a_missing_student_is_no_error_where_it_has_no_part(bench: Lab) -> None:
    evaluated(bench, "student=absent.pt", "mode=average")


def test_teachers_that_are_not_there_are_no_error_without_need(bench: Lab, student: Path) -> None:
    """They are left out, and nothing is fine-tuned for a comparison that nobody asked for."""
    done = evaluated(bench, f"model={student}", "finetune.seed=99")
    assert not [name for name in last(done.folder) if "teacher" in name]
    assert "not compared with teachers" in done.err
    assert not (done.folder / "teacher_0").exists()


# registered models -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_registered_models_are_fetched_by_alias_version_and_run(bench: Lab, undisturbed: Done, sqlite_uri: str) -> None:
    """On a server: the version behind an alias is the run's model, its input, and named by a tag."""
    settings = yaml.safe_load(bench.cfg.read_text())
    bench.cfg.with_name("logged.yaml").write_text(yaml.safe_dump(settings | {"log_model": True}))
    made = bench.raw("distill", [f"cfg={bench.cfg.with_name('logged.yaml')}", f"output_dir={bench.runs}"])
    assert made.code == 0, made.err
    deliver(sqlite_uri, made.folder)
    source = run_id(made.folder)
    model = crown(sqlite_uri, source, "tree-student")
    online = ["tracking.mode=online", f"tracking.uri={sqlite_uri}", "teachers=false"]
    for name in ("models:/tree-student@champion", "models:/tree-student/1", f"runs:/{source}"):
        done = evaluated(bench, f"model={name}", *online)
        assert last(done.folder)["test/acc"] == last(made.folder)["final/acc_val_selected"]
        seen = see(sqlite_uri, run_id(done.folder))
        assert seen.steady == points(done.folder)
        assert seen.models_in == [model]
        assert seen.tags["asib.student"] == source
        assert seen.tags["asib.weights"] == see(sqlite_uri, source).tags["asib.weights"]
        assert seen.tags.get("asib.model") == (None if name.startswith("runs:/") else "models:/tree-student/1")
        assert (seen.tags["asib.mode"], seen.tags["asib.eval_split"]) == ("single", "test")
        pictures = {"confusion.png", "reliability.png", "correctness.parquet", "per_class.json"}
        assert pictures <= seen.artifacts
    synergy = evaluated(bench, "model=models:/tree-student@champion", "mode=synergy", *online[:2])
    assert last(synergy.folder)["test/acc"] == last(made.folder)["final/synergy_acc"]
    unknown = ("models:/tree-student@nobody", "models:/tree-student/9", "models:/nobody/1", f"runs:/{'0' * 32}")
    for name in unknown:
        refused = bench.step("evaluate", QUICK, f"model={name}", *online)
        assert (refused.code, len(refused.lines), refused.new) == (2, 1, []), refused.err
        assert f"model={name}: " in refused.lines[0]


@pytest.mark.slow
def test_a_run_on_a_server_without_a_fusion_is_no_missing_file(bench: Lab, baseline: Done, sqlite_uri: str) -> None:
    """An unknown run, and a file that is given by name, still cannot be fetched."""
    deliver(sqlite_uri, baseline.folder)
    source = run_id(baseline.folder)
    online = ["tracking.mode=online", f"tracking.uri={sqlite_uri}", "mode=synergy", QUICK]
    for more, needle in (
        ([], f"student=runs:/{source}: that run has no fusion; mode=single and mode=average work"),
        ([f"fusion=runs:/{source}"], f"fusion=runs:/{source}: that run has no fusion"),
        ([f"fusion=runs:/{source}/fusion.safetensors"], "cannot be fetched"),
        (["fusion=runs:/" + 32 * "0"], "cannot be fetched"),
    ):
        done = bench.step("evaluate", f"model=runs:/{source}", *online, *more)
        assert (done.code, len(done.lines)) == (2, 1), done.err
        assert needle in done.lines[0]
