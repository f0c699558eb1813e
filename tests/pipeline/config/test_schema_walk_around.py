"""Keys of what surrounds training: data, networks, teachers, tasks, and the record of a run. Each of them acts."""

import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import zoo
from pipeline.config import Config, flatten
from pipeline.data import image_files, sources
from pipeline.data.image_files import ImageFiles, Wanted
from pipeline.data.sources import ImageData
from pipeline.distill import bank, continual, distill, export, networks, results, teachers, train
from pipeline.errors import UserError
from pipeline.evaluate.request import Request
from pipeline.journal import Entry, read_entries
from pipeline.runs import git, machine, run_log
from pipeline.runs.folders import STUDENT
from pipeline.runs.opening import open_run
from pipeline.training.loop import Verdict
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from tests.pipeline.config import test_schema_walk
from tests.pipeline.config.walk import Case, Keys, Observer, assert_acts, images, place
from tests.pipeline.training.builders import CPU


@contextlib.contextmanager
def quiet() -> Iterator[mock.Mock]:
    """Without pictures and tables; the mock is asked when a model is logged."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    with (
        mock.patch.object(results, "curves"),
        mock.patch.object(results, "confusion"),
        mock.patch.object(export, "log_student") as logged,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            yield logged
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.set_num_threads(threads)


def data_set(keys: Keys) -> Any:
    """The digest of the images and what they are prepared with, or what is said of their absence."""
    with mock.patch("torchvision.datasets.CIFAR10", side_effect=RuntimeError("asked for")):
        data = sources.load(place().config(keys).dataset)
    return {"digest": data.digest, "mean": data.mean, "std": data.std}


def pictures_read(keys: Keys) -> Any:
    """One of the pictures in folders, and who read it."""
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(place().path)}):
        images = sources.load(place().config({**PICTURES, **keys}).dataset).train_x
    assert isinstance(images, ImageFiles)
    with mock.patch.object(image_files, "DataLoader", side_effect=image_files.DataLoader) as loader:
        (seen,) = images.views([Wanted(np.array([4]))], CPU)
    return {"x": seen, "workers": loader.call_args.kwargs["num_workers"]}


def asked_of_the_zoo(build: Callable[[Config, ImageData], Any]) -> Observer:
    """What is asked for when a network is built."""

    def observer(keys: Keys) -> Any:
        with (
            mock.patch.object(zoo, "create_model", side_effect=UserError("asked")) as made,
            contextlib.suppress(UserError),
        ):
            build(place().config(keys), images())
        return {"args": str(made.call_args)}

    return observer


first_teacher = asked_of_the_zoo(lambda c, d: networks.build_teacher(c, d, 0))
its_student = asked_of_the_zoo(networks.build_student)


def stem(keys: Keys) -> Any:
    """The first convolution of a timm network."""
    net = networks.build_student(place().config(keys), sources.load(place().config(keys).dataset))
    return str(net.net.conv1)


def teacher_weights(keys: Keys) -> Any:
    """Hashes of the teachers' weights that a distillation states."""
    saved = place().path / "teacher.safetensors"
    if not saved.exists():
        c = place().config({**keys, "seed": 5})
        data = sources.load(c.dataset)
        made = Config.model_validate({**c.model_dump(), "finetune": {"seed": 77}})
        networks.save(networks.build_teacher(made, data, 0), saved, c, data)
    run = open_run("distill", place().config(keys))
    with quiet():
        found = teachers.obtain(run, sources.load(run.config.dataset), networks.build_student(run.config, images()))
    run.close()
    return [t.hash for t in found]


class Patient:
    """A trial's watch that lets it go on."""

    reason = ""

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> Verdict:
        return Verdict.GO_ON

    def still_ours(self) -> bool:
        return True


def tasks_learned(keys: Keys) -> Any:
    """The student after each task, what was kept then, and its row of the accuracy matrix."""
    run = open_run("continual", place().config(keys))
    with quiet():
        continual.trial(run, sources.load(run.config.dataset), Patient())
    run.close()
    folders = sorted(run.folder.glob("task_*"))
    tensors = [load_file(folder / name) for folder in folders for name in (continual.KEPT, STUDENT)]
    return {"tensors": tensors, "rows": [(folder / continual.ROW).read_text() for folder in folders]}


def record(keys: Keys) -> Any:
    """The first entry of a run's journal, its folder's place and its tags."""
    run = open_run("distill", place().config(keys))
    run.close()
    header, *rest = read_entries(run.folder / "journal.jsonl")[0]
    rung = [v for e in rest if e.kind == "tags" for k, v in e.data["values"].items() if k == "asib.rung"]
    head = {k: header.data[k] for k in ("name", "experiment")}
    return {**head, "rung": rung, "parent": str(run.folder.parent)}


def difference_logged(keys: Keys) -> Any:
    """Whether a run keeps what its sources differ in from their commit."""
    with mock.patch.object(git, "difference", return_value="- a\n+ b\n"):
        run = open_run("distill", place().config(keys))
        run.close()
    return (run.folder / "git.diff").exists()


def delivery(keys: Keys) -> Any:
    """Whether a delivery is begun, where to, and how long its end is waited for."""
    with mock.patch("pipeline.tracking.start.start_delivery") as start:
        start.return_value.finish.return_value = True
        run = open_run("distill", place().config(keys))
        run.close()
    ended = start.return_value.finish.call_args
    return [start.call_args and start.call_args.kwargs["uri"], ended and ended.args]


def machine_read(keys: Keys) -> Any:
    """Whether the machine is watched while a run works."""
    run = open_run("distill", place().config(keys))
    with machine.watched(run):
        pass
    run.close()
    names = (
        name for e in read_entries(run.folder / "journal.jsonl")[0] if e.kind == "metrics" for name in e.data["values"]
    )
    return sorted(names)


@functools.cache
def finished_run() -> str:
    run = open_run("distill", place().config({"checkpoint.keep": True}))
    with quiet():
        distill.distill(run)
    run.close()
    return str(run.folder)


def continuation(keys: Keys) -> Any:
    """What becomes of `resume`: a new run, or one that stands at a checkpoint."""
    given = {k: finished_run() if v == "{finished}" else v for k, v in keys.items()}
    run = open_run("distill", place().config(given))
    found = {"again": str(run.folder) == finished_run(), "state": run.state is not None}
    run.close()
    return found


def logged(keys: Keys) -> Any:
    """What the log shows, and where it is written."""
    log, shown = logging.getLogger("asib"), place().config(keys).log
    before, handlers = log.level, log.handlers[:]
    try:
        run_log.configure(shown)
        return log.level, [getattr(handler, "baseFilename", "") for handler in log.handlers[len(handlers) :]]
    finally:
        log.setLevel(before)
        log.handlers[:] = handlers


def distilled(look: Callable[[list[Entry], mock.Mock], Any]) -> Observer:
    """What there is to see in the journal of a distillation, or of the models that it logs."""

    def observer(keys: Keys) -> Any:
        run = open_run("distill", place().config(keys))
        with quiet() as logged:
            distill.distill(run)
        run.close()
        return look(read_entries(run.folder / "journal.jsonl")[0], logged)

    return observer


checkpoints = distilled(lambda entries, _: [e.kind for e in entries].count("checkpoint"))
models_logged = distilled(lambda _, logged: logged.call_count)
registered = distilled(
    lambda entries, _: [
        (e.data["registered"], e.data["alias"], sorted(e.data["tags"])) for e in entries if e.kind == "register"
    ]
)


def evaluated(keys: Keys) -> Any:
    """The accuracy of the student that is named, or that none is."""
    from pipeline.evaluate.evaluate import evaluate  # imports scikit-learn

    given = {
        k: f"{finished_run()}/checkpoints/student.safetensors" if v == "{finished}" else v for k, v in keys.items()
    }
    run = open_run("evaluate", place().config(given))
    with quiet():
        try:
            return evaluate(run, Request(teachers="false", speed=False))
        finally:
            run.close()


def prepared(keys: Keys) -> Any:
    """Threads and determinism of the process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with (
        mock.patch.object(torch, "set_num_threads") as threads,
        mock.patch.object(torch, "use_deterministic_algorithms") as asked,
        mock.patch.dict(os.environ),
    ):
        train.prepare(place().config(keys))
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    return [str(threads.call_args), str(asked.call_args)]


def bank_of(keys: Keys) -> Any:
    """Where the banks of a distillation are, and how large they may be."""
    made = place().config(keys)
    data = sources.load(made.dataset)
    nets = [networks.build_teacher(made, data, 0)]
    student, opener = networks.build_student(made, data), bank.opener(made, data, ["hash"])
    attached = Distillation(made, data, student, nets, CPU, opener).bank
    if attached is None:
        return []
    attached.close()
    return [str(attached.cache.folder), attached.cache.limit]


def device(keys: Keys) -> Any:
    return str(networks.device_of(place().config(keys)))


def error_style(keys: Keys) -> Any:
    """What is written to standard error of a run that is refused."""
    from steps import distill

    logger = logging.getLogger("asib")
    before = (list(logger.handlers), logger.level, logger.propagate)
    written = io.StringIO()
    arguments = [f"{k}={str(v).lower()}" for k, v in keys.items()] + ["dataset.name=npz"]
    try:
        with contextlib.redirect_stderr(written), mock.patch.dict(os.environ):
            os.environ.pop("MLFLOW_RUN_ID", None)
            assert distill.main(arguments) == 2
    finally:
        logger.handlers, logger.level, logger.propagate = before
    return "Traceback" in written.getvalue()


# the table -----------------------------------------------------------------------------------------------------------

FETCHED = {"method.kd_alpha": 0.5, "finetune.epochs": 1, "model.teachers.0.name": "cifar_resnet8"}
DIVIDED = {**FETCHED, "model.teachers.1.name": "cifar_resnet8", "model.overlap": 0.5}
TASKS = {"continual.num_tasks": 3}
KEEPING = {**TASKS, "continual.buffer_size": 6}
HOLDING = {**TASKS, "continual.lambda_ewc": 10.0, "continual.fisher_images": 4}
NAMED = {"model.teachers.0.name": "resnet18"}
TAUGHT = {"method.kd_alpha": 0.5, "finetune.epochs": 0, "model.teachers.0.name": "cifar_resnet8",
          "model.teachers.0.checkpoint": "{here}/none", "output_dir": "{here}/runs"}  # fmt: skip
BANKED = {**TAUGHT, "bank": "lazy"}
ONLINE = {"tracking.mode": "online", "tracking.uri": "sqlite:///a.db"}
PICTURES = {"dataset.name": "image_folder", "dataset.root": "{here}/pictures", "dataset.path": None,
            "dataset.image_size": 16}  # fmt: skip
LISTED = {**PICTURES, "dataset.name": "imagenet100"}
TIMM = {**PICTURES, "dataset.name": "timm", "dataset.id": "folder/"}
TORCHVISION = {"dataset.name": "cifar10", "dataset.root": "{here}/nothing"}

TABLE: dict[str, Case] = {
    # bookkeeping
    "device": Case("cuda:99", observer=device),
    "threads": Case(2, observer=prepared),
    "output_dir": Case("{here}/elsewhere", observer=record),
    "bank": Case("lazy", TAUGHT, bank_of),
    "bank_folder": Case("{here}/bank", BANKED, bank_of),
    "bank_gb": Case(1.0, BANKED, bank_of),
    "run_name": Case("mine", observer=record),
    "rung": Case("l1_ib", observer=record),
    "student": Case("{finished}", observer=evaluated),
    "resume": Case("{finished}", observer=continuation),
    "extend": Case(True, {"resume": "{finished}"}, continuation),
    "log_model": Case(True, observer=models_logged),
    "register": Case("a-model", {"log_model": True}, registered),
    "debug": Case(True, observer=error_style),
    "checkpoint.every_seconds": Case(1e-9, observer=checkpoints),
    "checkpoint.keep": Case(True, observer=distilled(lambda entries, _: entries[-1].data.get("resumable", True))),
    "log.level": Case("warning", observer=logged),
    "log.filename": Case("{here}/all.log", observer=logged),
    "tracking.mode": Case("online", observer=delivery),
    "tracking.uri": Case("sqlite:///other.db", ONLINE, delivery),
    "tracking.experiment": Case("other", observer=record),
    "tracking.git_diff": Case(False, observer=difference_logged),
    "tracking.finish_seconds": Case(7.0, ONLINE, delivery),
    "tracking.system_metrics": Case(True, observer=machine_read),
    # data and networks
    "dataset.name": Case("cifar100_sample", observer=data_set),
    "dataset.root": Case("{here}/nothing", {"dataset.name": "cifar10"}, data_set),
    "dataset.path": Case("{here}/two.npz", observer=data_set),
    "dataset.class_list": Case("cmc", {**LISTED, "dataset.class_list": "podnet"}, data_set),
    "dataset.id": Case("torch/cifar10", {**TIMM, "dataset.id": "torch/cifar100"}, data_set),
    "dataset.train_split": Case("val", TIMM, data_set),
    "dataset.test_split": Case("train", TIMM, data_set),
    "dataset.download": Case(True, TORCHVISION, data_set),
    "dataset.image_size": Case(12, observer=pictures_read),
    "dataset.workers": Case(0, {"dataset.workers": 1}, pictures_read),
    "dataset.normalisation": Case("published", {"dataset.name": "cifar100_sample"}, data_set),
    "dataset.mean": Case([0.2] * 3, observer=data_set),
    "dataset.std": Case([0.7] * 3, observer=data_set),
    "dataset.small_input": Case(False, {"model.student.name": "resnet18"}, stem),
    "model.student.name": Case("cifar_resnet20", observer=its_student),
    "model.student.pretrained": Case(True, {"model.student.name": "resnet18"}, its_student),
    "model.teachers.0.name": Case("resnet34", NAMED, first_teacher),
    "model.teachers.0.pretrained": Case(False, NAMED, first_teacher),
    "model.teachers.0.checkpoint": Case("{here}/teacher.safetensors", FETCHED, teacher_weights),
    "model.teachers.0.efficientnet_dropout": Case(0.1, {"model.teachers.0.name": "efficientnet_b0"}, first_teacher),
    "model.teachers.0.classes": Case([0, 1], FETCHED, teacher_weights),
    "model.overlap": Case(1.0, DIVIDED, teacher_weights),
    "model.overlap_seed": Case(1, DIVIDED, teacher_weights),
    "model.unseen": Case("masked", DIVIDED, teacher_weights),
    # tasks, one after another
    "continual.num_tasks": Case(2, {**TASKS, "continual.base_classes": 1}, tasks_learned),
    "continual.scenario": Case("teachers", TASKS, tasks_learned),
    "continual.base_classes": Case(2, {"continual.num_tasks": 2, "continual.base_classes": 1}, tasks_learned),
    "continual.order": Case([1, 0, 2], TASKS, tasks_learned),
    "continual.order_seed": Case(1, {**TASKS, "continual.order": "seed"}, tasks_learned),
    "continual.joint": Case(True, TASKS, tasks_learned),
    "continual.past": Case(True, {**TASKS, **FETCHED}, tasks_learned),
    "continual.teachers": Case("task", {**TASKS, **FETCHED}, tasks_learned),
    "continual.buffer_size": Case(4, TASKS, tasks_learned),
    "continual.buffer_rule": Case("herding", KEEPING, tasks_learned),
    "continual.replay_ratio": Case(0.2, KEEPING, tasks_learned),
    "continual.ce_classes": Case("new", TASKS, tasks_learned),
    "continual.classifier": Case("nearest_mean", KEEPING, tasks_learned),
    "continual.lambda_ewc": Case(10.0, TASKS, tasks_learned),
    "continual.fisher": Case("exact", HOLDING, tasks_learned),
    "continual.fisher_images": Case(2, HOLDING, tasks_learned),
    # the process
    "optim.deterministic": Case(False, observer=prepared),
}
REFUSED = ("device", "dataset.root", "dataset.download", "resume", "extend", "student", "continual.scenario",
           "continual.teachers")  # fmt: skip
"""Keys one of whose two values is refused here."""


def test_every_key_of_the_schema_is_in_one_of_the_tables_and_no_other() -> None:
    in_training = test_schema_walk.TABLE
    assert not in_training.keys() & TABLE.keys()
    assert {*in_training, *TABLE} == set(flatten(Config.model_validate({"model": {"teachers": [{}]}})))


@pytest.mark.parametrize("key", TABLE)
def test_changing_the_key_changes_what_it_is_for(key: str) -> None:
    assert_acts(key, TABLE[key], record, REFUSED, texts=(data_set, stem))
