"""Bad input ends a step with one line that names the key and says what to do, code 2, and nothing half-written."""

from __future__ import annotations

import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.distill import train
from tests.steps.lab import (
    BATCHES,
    At,
    Done,
    Lab,
    deliver,
    ending,
    points,
    run_id,
    same_tensors,
    see,
    signal_at,
    write_npz,
)

PER_EPOCH = BATCHES + 1


def nothing_half_written(lab: Lab, done: Done) -> None:
    """No temporary file, and no folder of a run that was refused before it began."""
    assert not [p for p in lab.folder.rglob("*") if ".part" in p.name]
    assert done.new == []


def refused(lab: Lab, done: Done, *needles: str) -> None:
    """One line on standard error, with these words in it."""
    assert done.code == 2, done.err
    assert len(done.lines) == 1, done.err
    assert "fine-tuning" not in done.err, "refused after training"
    for needle in needles:
        assert needle in done.lines[0]
    nothing_half_written(lab, done)


# before there is a run, and within it: one table -------------------------------------------------------------------


@dataclass
class Case:
    """A step's bad input: overrides (with the workplace's files) and what its line has to say."""

    step: str
    overrides: list[str]
    needles: list[str]


@pytest.fixture(scope="module")
def files(bench: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that do not do."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    whole = bench.data.read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    write_npz(folder / "labels.npz", y_test=np.full(40, 9))
    write_npz(folder / "five.npz", classes=5)
    (folder / "garbage.safetensors").write_bytes(b"\x07" * 1000)
    (folder / "garbage.pt").write_bytes(b"\x80\x04" + b"\x07" * 1000)
    for name, architecture, classes in (
        ("resnet8", "cifar_resnet8", 4),
        ("resnet14", "cifar_resnet14", 4),
        ("five_classes", "cifar_resnet8", 5),
    ):
        from models import weights, zoo

        net = zoo.create_model(architecture, classes, pretrained=False, small_input=None, image_size=16, in_chans=3)
        weights.save_weights(net, folder / f"{name}.safetensors", {})
    (folder / "a_file").write_text("in the way")
    (folder / "list.yaml").write_text("- method\n")
    return folder


TEACHER = "model.teachers.0.checkpoint"
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "unknown config": ("distill", ["cfg=nope"], ["cfg=nope", "no such experiment", "quickstart"]),
    "config near miss": ("distill", ["cfg=quickstat"], ["cfg=quickstat", "did you mean quickstart?"]),
    "config is no mapping": ("distill", ["cfg={files}/list.yaml"], ["list.yaml", "list"]),
    "no key=value": ("distill", ["method.tau"], ["'method.tau' is not key=value"]),
    "misspelt key": ("distill", ["method.kd_alhpa=0.4"], ["method.kd_alhpa", "did you mean method.kd_alpha"]),
    "wrong type": ("distill", ["dataset.batch_size=many"], ["dataset.batch_size", "many"]),
    "out of range": ("distill", ["method.tau=0"], ["method.tau", "0"]),
    "data set missing": (
        "distill",
        ["dataset=cifar100", "dataset.name=cifar100", "dataset.root={files}/empty"],
        ["dataset.root={files}/empty", "CIFAR100", "dataset.download=true"],
    ),
    "npz missing": ("distill", ["dataset.path={files}/none.npz"], ["dataset.path={files}/none.npz", "no such file"]),
    "npz truncated": ("distill", ["dataset.path={files}/truncated.npz"], ["dataset.path={files}/truncated.npz"]),
    "labels out of range": ("baseline", ["dataset.path={files}/labels.npz"], ["dataset.path=", "y_test holds 9"]),
    "teacher of another architecture": (
        "distill",
        [TEACHER + "={files}/resnet14.safetensors"],
        [TEACHER + "=", "resnet14", "cifar_resnet8"],
    ),
    "teacher of other classes": (
        "distill",
        [TEACHER + "={files}/five_classes.safetensors"],
        [TEACHER + "=", "num_classes is 5 in the checkpoint, 4 here"],
    ),
    "teacher unreadable": (
        "distill",
        [TEACHER + "={files}/garbage.safetensors"],
        [TEACHER + "=", "cannot be read as safetensors"],
    ),
    "teacher unreadable, pt": ("distill", [TEACHER + "={files}/garbage.pt"], [TEACHER + "=", "cannot be read"]),
    "teacher missing": (
        "distill",
        [TEACHER + "={files}/none.pt"],
        [TEACHER + "={files}/none.pt: no such file", "runs:/<id>"],
    ),
    "teacher unknown": ("distill", ["model.teachers.0.name=cifar_resnet9"], ["model.teachers.0.name=cifar_resnet9"]),
    "student unknown": ("baseline", ["model.student.name=cifar_resnet9"], ["model.student.name=cifar_resnet9"]),
    "weights unknown": (
        "baseline",
        ["model.student.name=resnet18.nope"],
        ["model.student.name=resnet18.nope", "a1_in1k"],
    ),
    "no student": ("evaluate", [], ["student is not set", "student=runs:/<id>"]),
    "student missing": ("evaluate", ["student={files}/none.pt"], ["student={files}/none.pt: no such file"]),
    "student of another architecture": (
        "evaluate",
        ["student={files}/resnet14.safetensors"],
        ["student=", "resnet14", "cifar_resnet8"],
    ),
    "student of other classes": (
        "evaluate",
        ["student={files}/five_classes.safetensors"],
        ["student=", "num_classes is 5 in the checkpoint, 4 here"],
    ),
    "student unreadable": ("evaluate", ["student={files}/garbage.pt"], ["student=", "cannot be read"]),
    "teachers of different width": (
        "distill",
        ["model.teachers.1.name=cifar_wrn_16_2", "method.use_distillation_adapter=false"],
        ["method.use_distillation_adapter=false", "[64, 128]", "set it to true"],
    ),
    "teachers of different width, main": (
        "main",
        ["model.teachers.1.name=cifar_wrn_16_2", "method.use_distillation_adapter=false"],
        ["method.use_distillation_adapter=false", "[64, 128]", "set it to true"],
    ),
    "a later teacher missing": (
        "distill",
        ["model.teachers.0.name=cifar_resnet14", "model.teachers.1.checkpoint={files}/none.pt"],
        ["model.teachers.1.checkpoint={files}/none.pt: no such file"],
    ),
    "a later teacher missing, main": (
        "main",
        ["model.teachers.0.name=cifar_resnet14", "model.teachers.1.checkpoint={files}/none.pt"],
        ["model.teachers.1.checkpoint={files}/none.pt: no such file"],
    ),
    "nothing to fine-tune": ("finetune", ["model/teacher=none", "model.teachers=[]"], ["model.teachers"]),
    "no such GPU, finetune": ("finetune", ["device=cuda:7"], ["device=cuda:7", "device=cpu"]),
    "no such GPU, evaluate": ("evaluate", ["student={files}/resnet8.safetensors", "device=cuda:7"], ["device=cuda:7"]),
    "teacher unknown, finetune": ("finetune", ["model.teachers.1.name=resnet9"], ["model.teachers.1.name=resnet9"]),
    "synergy without a fusion": (
        "evaluate",
        ["student={files}/resnet8.safetensors", "mode=synergy"],
        ["mode=synergy"],
    ),
    "compare of an unknown parent": ("compare", ["parent=abc"], ["parent=abc", "no such run"]),
    "compare of unknown runs": ("compare", ["runs=abc,def"], ["runs=abc", "no such run"]),
    "nothing to distil": ("main", ["method.kd_alpha=0"], ["method.kd_alpha"]),
    "no such GPU": ("baseline", ["device=cuda:7"], ["device=cuda:7", "device=cpu"]),
    "CUDA graphs on a processor": (
        "distill",
        ["model.teachers.0.name=cifar_resnet14", "device=cpu", "optim.compile=graphs"],
        ["optim.compile=graphs", "device=cpu", "optim.compile=true"],
    ),
    "CUDA graphs on a processor, main": (
        "main",
        ["model.teachers.0.name=cifar_resnet14", "device=cpu", "optim.compile=graphs"],
        ["optim.compile=graphs", "device=cpu", "optim.compile=true"],
    ),
    "output_dir is a file": ("baseline", ["output_dir={files}/a_file"], ["output_dir={files}/a_file", "folder"]),
    "resume of an unknown run": ("distill", ["resume=0123456789abcdef"], ["resume=0123456789abcdef", "no such run"]),
    "nothing left to train on": ("distill", ["dataset.val_fraction=0.999"], ["dataset.val_fraction=0.999", "class 0"]),
    "reap neither true nor false": ("sweep", ["reap=maybe"], ["reap=maybe: give true or false"]),
    "anyway neither true nor false": ("compare", ["runs=a,b", "anyway=2"], ["anyway=2: give true or false"]),
    "speed neither true nor false": ("evaluate", ["model=x.pt", "speed=maybe"], ["speed=maybe: give true or false"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_code_2(bench: Lab, undisturbed: Done, files: Path, case: str) -> None:
    step, overrides, needles = CASES[case]
    done = bench.step(step, *(o.format(files=files) for o in overrides))
    refused(bench, done, *(n.format(files=files) for n in needles))
    assert "Traceback" not in done.err


@pytest.mark.parametrize("case", ["misspelt key", "teacher unreadable", "no key=value"])
def test_debug_shows_where_it_came_from(bench: Lab, undisturbed: Done, files: Path, case: str) -> None:
    step, overrides, needles = CASES[case]
    done = bench.step(step, *(o.format(files=files) for o in overrides), "debug=true")
    assert done.code == 2
    assert "Traceback" in done.err
    assert needles[0] in done.lines[-1]


# resume ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, bench: Lab, undisturbed: Done) -> Lab:
    """A workplace with one distillation that ended in its second epoch."""
    lab = Lab(tmp_path_factory.mktemp("interrupted"))
    shutil.copytree(bench.runs / "teachers", lab.runs / "teachers")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(PER_EPOCH + 2).loop)
        assert lab.step("distill").code == 143
    return lab


@pytest.fixture
def killed(interrupted: Lab) -> Iterator[tuple[Lab, Path]]:
    """The same, as it was, for every test."""
    (folder,) = interrupted.run_folders()
    kept = interrupted.folder / "kept"
    shutil.copytree(folder, kept)
    yield interrupted, folder
    shutil.rmtree(folder)
    kept.rename(folder)


RESUMES: dict[str, tuple[str, list[str], list[str]]] = {
    "other step": ("baseline", [], ["of step distill", "steps.distill"]),
    "other configuration": ("distill", ["method.tau=2"], ["configuration", "method.tau"]),
    "other data": ("distill", ["dataset.path={lab}/other.npz"], ["data "]),
    "other teachers": ("distill", [TEACHER + "={lab}/other.safetensors"], ["teachers "]),
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_run_is_not_continued_with_anything_else(
    killed: tuple[Lab, Path], undisturbed: Done, sqlite_uri: str, case: str
) -> None:
    lab, folder = killed
    deliver(sqlite_uri, folder)
    step, overrides, needles = RESUMES[case]
    write_npz(lab.folder / "other.npz", seed=5)
    from models import weights, zoo

    net = zoo.create_model("cifar_resnet8", 4, pretrained=False, small_input=None, image_size=16, in_chans=3)
    weights.save_weights(net, lab.folder / "other.safetensors", {})
    before = _header(folder)
    overrides = [o.format(lab=lab.folder) for o in overrides]
    if case == "other data":  # teachers that are there, so that data alone differ
        mine = undisturbed.folder
        overrides += [
            f"model.teachers.{k}.checkpoint={mine}/teacher_{k}/checkpoints/teacher.safetensors" for k in (0, 1)
        ]
    done = lab.step(step, f"resume={folder}", *overrides)
    refused(lab, done, f"resume={folder}", *needles)
    if case == "other configuration":
        assert before["config_hash"][:12] in done.err
        assert done.lines[0].count(before["config_hash"][:12]) == 1
    if case == "other data":
        assert before["data_digest"] in done.err
    if case == "other teachers":
        assert all(known in done.err for known in before["teachers"])
        assert weights.weights_hash(net.net) in done.err

    # and nothing is lost by having tried
    right = lab.step("distill", f"resume={folder}")
    assert right.code == 0, right.err
    assert points(folder) == points(undisturbed.folder)
    name = "checkpoints/student.safetensors"
    assert same_tensors(folder / name, undisturbed.folder / name)
    deliver(sqlite_uri, folder)
    after = see(sqlite_uri, run_id(folder))
    assert after.steady == points(undisturbed.folder)
    assert (after.status, after.tags["asib.outcome"]) == ("FINISHED", "completed")


def _header(folder: Path) -> dict[str, Any]:
    from pipeline.training.checkpoint import Slots

    state, _ = Slots(folder / "checkpoints").read()
    return dict(state["header"])


def test_a_finished_run_is_not_continued(bench: Lab, undisturbed: Done) -> None:
    before = (undisturbed.folder / "journal.jsonl").read_bytes()
    done = bench.step("distill", f"resume={undisturbed.folder}")
    refused(bench, done, "resume=", "finished", "extend=true")
    assert (undisturbed.folder / "journal.jsonl").read_bytes() == before


def test_extending_only_adds_epochs_at_the_end(ready_lab: Lab) -> None:
    first = ready_lab.step("distill", "tracking.mode=offline")
    longer = ["method.student_epochs_per_stage=[2,1]", "extend=true"]
    refused(ready_lab, ready_lab.step("distill", f"resume={first.folder}", *longer), "[2, 1]", "[1, 1]", "extend")


def test_a_run_without_a_whole_checkpoint_is_not_continued(killed: tuple[Lab, Path]) -> None:
    lab, folder = killed
    for slot in (folder / "checkpoints").glob("slot*.safetensors"):
        slot.write_bytes(slot.read_bytes()[:-100])
    refused(lab, lab.step("distill", f"resume={folder}"), "no whole checkpoint")


# no disk space -----------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_before_training(
    bench: Lab, undisturbed: Done, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(4)
    done = bench.step("baseline", f"output_dir={disk}")
    assert done.code == 2
    assert len(done.lines) == 1
    assert f"output_dir={disk}" in done.lines[0]
    assert "MB free" in done.lines[0]
    assert not list(disk.rglob("*.safetensors"))


def test_a_disk_that_fills_up_ends_the_run_and_it_goes_on_when_there_is_room(
    undisturbed: Done, bench: Lab, small_disk: Callable[[int], Path], sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(24)
    shutil.copytree(bench.runs / "teachers", disk / "teachers")

    def fill() -> None:
        """Leave a few kB."""
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"x" * (free - 65536))

    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", At(2 * PER_EPOCH + 1, fill).loop)
        done = bench.step("distill", f"output_dir={disk}")
    (folder,) = [p for p in disk.iterdir() if (p / "journal.jsonl").exists()]
    assert done.code == 2, done.err
    assert len(done.lines) == 1, done.err
    assert "MB could not be written (No space left on device" in done.lines[0]
    assert "output_dir" in done.lines[0]
    assert ending(folder) == ("FAILED", "refused", 2)
    assert not list(disk.rglob("*.part"))
    (disk / "filler").unlink()
    deliver(sqlite_uri, folder)
    failed = see(sqlite_uri, run_id(folder))
    assert (failed.status, failed.tags["asib.outcome"], failed.tags["asib.exit_code"]) == ("FAILED", "refused", "2")
    assert failed.tags["asib.error"] == done.lines[0]

    resumed = bench.step("distill", f"output_dir={disk}", f"resume={folder}")
    assert resumed.code == 0, resumed.err
    assert points(folder) == points(undisturbed.folder)
    deliver(sqlite_uri, folder)
    assert see(sqlite_uri, failed.id).steady == points(undisturbed.folder)


def test_a_checkpoint_larger_than_a_file_may_be_ends_the_run(bench: Lab, undisturbed: Done) -> None:
    """The same without the right to mount: the limit of a file's size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        done = bench.step("baseline")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert "MB could not be written (File too large" in done.lines[0]
    assert "output_dir" in done.lines[0]
    assert ending(done.folder) == ("FAILED", "refused", 2), "it had begun"


# the tracking server -----------------------------------------------------------------------------------------------


def test_a_server_that_does_not_answer_is_named_before_training(lab: Lab) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = lab.step("baseline", "tracking.mode=online", f"tracking.uri={uri}")
    refused(lab, done, uri, "does not answer", "tracking=offline")
    assert not list(lab.runs.rglob("*.safetensors"))


def test_resume_of_a_run_that_the_server_does_not_know(lab: Lab, sqlite_uri: str) -> None:
    done = lab.step("distill", "tracking.mode=online", f"tracking.uri={sqlite_uri}", "resume=" + 32 * "0")
    refused(lab, done, "resume=" + 32 * "0", "knows no run")
    assert lab.run_folders() == []
