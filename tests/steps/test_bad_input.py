"""Bad input ends a step with one line that names the key and says what to do, code 2, and nothing half-written."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models import weights, zoo
from pipeline.training.checkpoint import Slots
from tests.servers import free_port
from tests.steps import lab as labs
from tests.steps.lab import PER_EPOCH, At, Done, Lab, deliver, ending, points, run_id, same_run, see, write_npz


def refused(lab: Lab, done: Done, *needles: str) -> None:
    """One line on standard error, with these words in it; no temporary file, and no folder of a run."""
    labs.refused(done, *needles)
    assert "fine-tuning" not in done.err, "refused after training"
    assert not [p for p in lab.folder.rglob("*") if ".part" in p.name]
    assert done.new == []


def some_weights(path: Path, name: str = "cifar_resnet8", classes: int = 4) -> str:
    """Write those of a network that has learned nothing; their hash."""
    net = zoo.create_model(name, classes, pretrained=False, small_input=None, image_size=16, in_chans=3)
    weights.save_weights(net, path, {})
    return weights.weights_hash(net.net)


# before there is a run, and within it: one table -------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(bench: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that do not do."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    whole = bench.data.read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    write_npz(folder / "labels.npz", y_test=np.full(40, 9))
    (folder / "garbage.safetensors").write_bytes(b"\x07" * 1000)
    (folder / "garbage.pt").write_bytes(b"\x80\x04" + b"\x07" * 1000)
    some_weights(folder / "resnet8.safetensors")
    some_weights(folder / "resnet14.safetensors", "cifar_resnet14")
    some_weights(folder / "five_classes.safetensors", classes=5)
    (folder / "a_file").write_text("in the way")
    (folder / "list.yaml").write_text("- method\n")
    return folder


TEACHER = "model.teachers.0.checkpoint"
CHECKPOINT = TEACHER + "={files}/"
WIDTHS = ["model.teachers.1.name=cifar_wrn_16_2", "method.use_distillation_adapter=false"]
LATER = ["model.teachers.0.name=cifar_resnet14", "model.teachers.1.checkpoint={files}/none.pt"]
GRAPHS = ["model.teachers.0.name=cifar_resnet14", "device=cpu", "optim.compile=graphs"]
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
    "no pictures for timm": (
        "distill",
        ["dataset=timm", "dataset.name=timm", "dataset.path=null", "dataset.id=folder/a", "dataset.root={files}/empty"],
        ["dataset.id=folder/a: dataset.train_split=train: Found 0 images in subfolders of"],
    ),
    "npz truncated": ("distill", ["dataset.path={files}/truncated.npz"], ["dataset.path={files}/truncated.npz"]),
    "labels out of range": ("baseline", ["dataset.path={files}/labels.npz"], ["dataset.path=", "y_test holds 9"]),
    "teacher of another architecture": (
        "distill",
        [CHECKPOINT + "resnet14.safetensors"],
        [TEACHER + "=", "resnet14", "cifar_resnet8"],
    ),
    "teacher of other classes": (
        "distill",
        [CHECKPOINT + "five_classes.safetensors"],
        [TEACHER + "=", "num_classes is 5 in the checkpoint, 4 here"],
    ),
    "teacher unreadable": (
        "distill",
        [CHECKPOINT + "garbage.safetensors"],
        [TEACHER + "=", "cannot be read as safetensors"],
    ),
    "teacher unreadable, pt": ("distill", [CHECKPOINT + "garbage.pt"], [TEACHER + "=", "cannot be read"]),
    "teacher missing": ("distill", [CHECKPOINT + "none.pt"], [CHECKPOINT + "none.pt: no such file", "runs:/<id>"]),
    "teacher unknown": ("distill", ["model.teachers.0.name=cifar_resnet9"], ["model.teachers.0.name=cifar_resnet9"]),
    "student unknown": ("baseline", ["model.student.name=cifar_resnet9"], ["model.student.name=cifar_resnet9"]),
    "weights unknown": (
        "baseline",
        ["model.student.name=resnet18.nope"],
        ["model.student.name=resnet18.nope", "a1_in1k"],
    ),
    "no student": ("evaluate", [], ["student is not set", "model=runs:/<id>"]),
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
    **{
        f"{what}, {step}": (step, overrides, needles)
        for step in ("distill", "main")  # which trains the student alone first
        for what, overrides, needles in (
            (
                "teachers of different width",
                WIDTHS,
                ["method.use_distillation_adapter=false", "[64, 128]", "set it to true"],
            ),
            ("a later teacher missing", LATER, ["model.teachers.1.checkpoint={files}/none.pt: no such file"]),
            ("CUDA graphs on a processor", GRAPHS, ["optim.compile=graphs", "device=cpu", "optim.compile=true"]),
        )
    },
    "no name of a model": ("distill", ["register=a/b", "log_model=true"], ["register=a/b", "a-b"]),
    "nothing to register": ("distill", ["register=a", "log_model=false"], ["register=a needs log_model=true"]),
    "nothing to fine-tune": ("finetune", ["model/teacher=none", "model.teachers=[]"], ["model.teachers"]),
    "teacher unknown, finetune": ("finetune", ["model.teachers.1.name=resnet9"], ["model.teachers.1.name=resnet9"]),
    "synergy without a fusion": (
        "evaluate",
        ["student={files}/resnet8.safetensors", "mode=synergy"],
        ["mode=synergy"],
    ),
    "compare of an unknown parent": ("compare", ["parent=abc"], ["parent=abc", "no such run"]),
    "compare of unknown runs": ("compare", ["runs=abc,def"], ["runs=abc", "no such run"]),
    "nothing to distil": ("main", ["method.kd_alpha=0"], ["method.kd_alpha"]),
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


@pytest.mark.parametrize("case", ["misspelt key", "teacher unreadable", "no key=value"])
def test_debug_shows_where_it_came_from(bench: Lab, undisturbed: Done, files: Path, case: str) -> None:
    step, overrides, needles = CASES[case]
    done = bench.step(step, *(o.format(files=files) for o in overrides), "debug=true")
    assert done.code == 2
    assert "Traceback" in done.err
    assert needles[0] in done.lines[-1]


# resume ------------------------------------------------------------------------------------------------------------


def test_a_run_is_not_continued_with_anything_else(
    ready_lab: Lab, killed: Path, undisturbed: Done, sqlite_uri: str
) -> None:
    deliver(sqlite_uri, killed)
    write_npz(ready_lab.folder / "other.npz", seed=5)
    other = some_weights(ready_lab.folder / "other.safetensors")
    state, _ = Slots(killed / "checkpoints").read()
    before = state["header"]
    known = [
        f"model.teachers.{k}.checkpoint={undisturbed.folder}/teacher_{k}/checkpoints/teacher.safetensors"
        for k in (0, 1)
    ]

    def resume(step: str, *overrides: str) -> Done:
        return ready_lab.step(step, f"resume={killed}", *overrides)

    refused(ready_lab, resume("baseline"), "of step distill", "steps.distill")
    done = resume("distill", "method.tau=2")
    refused(ready_lab, done, "configuration", "method.tau", before["config_hash"][:12])
    assert done.lines[0].count(before["config_hash"][:12]) == 1
    done = resume("distill", f"dataset.path={ready_lab.folder}/other.npz", *known)  # so that data alone differ
    refused(ready_lab, done, "data ", before["data_digest"])
    done = resume("distill", f"{TEACHER}={ready_lab.folder}/other.safetensors")
    refused(ready_lab, done, "teachers ", other, *before["teachers"])

    # and nothing is lost by having tried
    right = resume("distill")
    assert right.code == 0, right.err
    same_run(killed, undisturbed.folder)
    deliver(sqlite_uri, killed)
    after = see(sqlite_uri, run_id(killed))
    assert after.steady == points(undisturbed.folder)
    assert (after.status, after.tags["asib.outcome"]) == ("FINISHED", "completed")


def test_a_finished_run_is_not_continued(bench: Lab, undisturbed: Done) -> None:
    before = (undisturbed.folder / "journal.jsonl").read_bytes()
    done = bench.step("distill", f"resume={undisturbed.folder}")
    refused(bench, done, "resume=", "finished", "extend=true")
    assert (undisturbed.folder / "journal.jsonl").read_bytes() == before


def test_a_run_without_a_whole_checkpoint_is_not_continued(ready_lab: Lab, killed: Path) -> None:
    for slot in (killed / "checkpoints").glob("slot*.safetensors"):
        slot.write_bytes(slot.read_bytes()[:-100])
    refused(ready_lab, ready_lab.step("distill", f"resume={killed}"), "no whole checkpoint")


# no disk space -----------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_before_training(
    bench: Lab, undisturbed: Done, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(4)
    done = bench.step("baseline", f"output_dir={disk}")
    refused(bench, done, f"output_dir={disk}", "MB free")
    assert not list(disk.rglob("*.safetensors"))


def test_a_disk_that_fills_up_ends_the_run_and_it_goes_on_when_there_is_room(
    undisturbed: Done, stopped: Path, bench: Lab, small_disk: Callable[[int], Path], sqlite_uri: str
) -> None:
    disk = small_disk(24)
    shutil.copytree(bench.runs / "teachers", disk / "teachers")
    folder = shutil.copytree(stopped, disk / stopped.name)

    def fill() -> None:
        """Leave a few kB; a checkpoint may be being written meanwhile."""
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(65536)):
                pass
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - 65536)

    again = (f"output_dir={disk}", f"resume={folder}")
    done = bench.disturbed(At(PER_EPOCH, fill), "distill", *again)
    labs.refused(done, "MB could not be written (No space left on device", "output_dir")
    assert ending(folder) == ("FAILED", "refused", 2)
    assert not list(disk.rglob("*.part"))
    (disk / "filler").unlink()
    deliver(sqlite_uri, folder)
    failed = see(sqlite_uri, run_id(folder))
    assert (failed.status, failed.tags["asib.outcome"], failed.tags["asib.exit_code"]) == ("FAILED", "refused", "2")
    assert failed.tags["asib.error"] == done.lines[0]

    resumed = bench.step("distill", *again)
    assert resumed.code == 0, resumed.err
    same_run(folder, undisturbed.folder)
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
    labs.refused(done, "MB could not be written (File too large", "output_dir")
    assert ending(done.folder) == ("FAILED", "refused", 2), "it had begun"


# the tracking server -----------------------------------------------------------------------------------------------


def test_a_server_that_does_not_answer_is_named_before_training(lab: Lab) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    done = lab.step("baseline", "tracking.mode=online", f"tracking.uri={uri}")
    refused(lab, done, uri, "does not answer", "tracking=offline")
    assert not list(lab.runs.rglob("*.safetensors"))


def test_resume_of_a_run_that_the_server_does_not_know(lab: Lab, sqlite_uri: str) -> None:
    for name, advice in ((32 * "0", "check the id"), (8 * "0", "give the whole id, of 32 characters")):
        done = lab.step("distill", "tracking.mode=online", f"tracking.uri={sqlite_uri}", f"resume={name}")
        refused(lab, done, f"resume={name}", f"knows no run {name}: {advice}")
        assert "READ" not in done.err, "whoever has the file reads all of it"
    assert lab.run_folders() == []
