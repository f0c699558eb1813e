"""Every key of the schema acts: for each, a configuration where it can, another value, and what then differs.

Where the table names no observer, the difference is in the student's weights after a tiny run. A key that is missing
from the table fails, and so does one whose change changes nothing.
"""

import contextlib
import functools
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from models import zoo
from models.features import FeatureNet
from pipeline.config import Config, explain, flatten
from pipeline.data import image_files, sources
from pipeline.data.image_files import ImageFiles, Wanted
from pipeline.data.sources import ImageData
from pipeline.distill import bank, continual, distill, export, networks, results, teachers, train
from pipeline.errors import NonFinite, UserError
from pipeline.evaluate.request import Request
from pipeline.journal import Entry, read_entries
from pipeline.runs import git, run_log
from pipeline.runs.folders import STUDENT
from pipeline.runs.opening import open_run
from pipeline.training.evaluation import outputs
from pipeline.training.loop import Loop, Verdict
from pipeline.training.methods.asib import monitor
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from pipeline.training.optim import Precision
from pipeline.training.run_data import Task
from tests.pipeline.training.builders import (
    CPU,
    Calls,
    config,
    differences,
    distillation,
    fine_tuning,
    image_data,
    loop_for,
)

Keys = dict[str, Any]
Observer = Callable[[Keys], Any]

# configurations ------------------------------------------------------------------------------------------------------


def nested(keys: Keys) -> dict[str, Any]:
    """`{"method.tau": 2}` as sections; items of lists by their numbers."""
    tree: dict[str, Any] = {}
    for name, value in keys.items():
        *sections, last = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def tiny(keys: Keys) -> Config:
    """The builders' configuration, of one stage, with these keys."""
    return config(**nested({"method.num_stages": 1, "method.student_epochs_per_stage": [2], **keys}))


def images() -> ImageData:
    return image_data(24, 12)


# observers of training -----------------------------------------------------------------------------------------------


def seen(observer: Observer, keys: Keys) -> Any:
    """What an observer sees; what a configuration is refused with is a difference too."""
    try:
        return observer(keys)
    except ValidationError as error:
        return explain(error)
    except UserError as error:
        return str(error)


def trained(task: Task) -> Loop:
    """The loop that has trained a task, without checkpoints."""
    loop = loop_for(task, Path(tempfile.gettempdir()) / "unused")
    loop.slots = None
    loop.run()
    return loop


@functools.cache
def _run(written: str) -> dict[str, Any]:
    c = tiny(json.loads(written))
    before, task = c.model_dump_json(), distillation(c, images())
    end, rows = task.end_epoch, []
    task.end_epoch = lambda epoch: rows.append(end(epoch)) or rows[-1]  # type: ignore[method-assign, func-returns-value]
    loop = trained(task)
    assert c.model_dump_json() == before, "a run leaves its configuration alone"
    student = {k: v.clone() for k, v in task.student.state_dict().items()}
    scaler = loop.precision.scaler
    task.results()
    return {
        "student": student,
        "rows": rows,
        "plan": task.plan,
        "exported": dict(task.student.state_dict()),
        "averaged": task.state_dict()["student_ema"],
        "scale": None if scaler is None else scaler.get_scale(),
    }


def student(keys: Keys) -> Any:
    """The student's weights after a run."""
    return _run(json.dumps(keys))["student"]


def part(name: str) -> Observer:
    """Another part of what a run leaves: rows, plan, exported, averaged, scale."""

    def observer(keys: Keys) -> Any:
        return _run(json.dumps(keys))[name]

    return observer


def tuned(keys: Keys) -> Any:
    """A fine-tuned network's weights."""
    task = fine_tuning(tiny(keys), images())
    trained(task)
    return dict(task.net.state_dict())


def gate(keys: Keys) -> Any:
    """Gate and share of the averaged teachers, where the snapshot has 70 %, the moving average 30, the teachers 80."""
    task = distillation(tiny(keys), images())
    task.monitor.accuracy, task.monitor.smoothed = 70.0, 30.0
    task.monitor.average_accuracy = lambda: 80.0  # type: ignore[method-assign]
    epoch = next(e for e in task.plan if e.phase == "b")
    task.begin_phase(epoch)
    task.begin_epoch(epoch)
    weights = task.phases["b"].objective.weights
    return [weights.synergy, weights.averaged_share]


def synergy_scores(keys: Keys) -> Any:
    """What the synergy's accuracy is taken of."""
    task = distillation(tiny(keys), images())
    with mock.patch.object(monitor, "accuracy", side_effect=lambda scores, y: float(scores.abs().sum())):
        return [task.monitor.synergy_accuracy(outputs(task.student, task.data.eval))]


def patience(keys: Keys) -> Any:
    """After how many non-finite steps a run ends."""
    task = fine_tuning(tiny(keys), images())
    objective = task.phases["finetune"].objective
    forward = objective.forward

    def bad(*args: Any) -> Any:
        return {k: v * float("nan") for k, v in forward(*args).items()}

    with mock.patch.object(objective, "forward", side_effect=bad) as steps, contextlib.suppress(NonFinite):
        trained(task)
    return steps.call_count


def first_images(keys: Keys) -> Any:
    """The first training batch."""
    task = distillation(tiny(keys), images())
    batch = next(iter(task.batches.epoch(task.draws(task.plan[0]))))
    return {"x": batch.x, "index": batch.index, "strides": batch.x.stride()}


def evaluation_batches(keys: Keys) -> Any:
    """Images per forward pass of an evaluation."""
    task = distillation(tiny(keys), images())
    calls = Calls(task.student)
    task.end_epoch(next(e for e in task.plan if e.phase == "b"))
    return calls.seen


def compiled(keys: Keys) -> Any:
    with mock.patch.object(FeatureNet, "compile_pass"):  # it takes seconds
        return distillation(tiny(keys), images()).compiled


def precision(keys: Keys) -> Any:
    return Precision(tiny(keys).optim, CPU).name


# observers of what surrounds a run -----------------------------------------------------------------------------------


class Place:
    """A folder with two small data sets, in which runs are made; made once."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="asib-walk-")
        self.path = Path(self._folder.name)
        rng = np.random.default_rng(0)
        for name in ("one", "two"):
            arrays: dict[str, Any] = {
                f"x_{s}": rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for s, n in (("train", 24), ("test", 9))
            }
            np.savez(self.path / f"{name}.npz", **arrays, y_train=np.arange(24) % 3, y_test=np.arange(9) % 3)
        for k, pixels in enumerate(arrays["x_test"]):
            for split, shown in (("train", pixels), ("val", 255 - pixels)):
                (folder := self.path / "pictures" / split / str(k % 3)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(shown).save(folder / f"{k}.png")

    def config(self, keys: Keys) -> Config:
        base = {
            "output_dir": str(self.path / "runs"),
            "device": "cpu",
            "threads": 1,
            "log_model": False,
            "dataset.name": "npz",
            "dataset.path": str(self.path / "one.npz"),
            "dataset.batch_size": 8,
            "dataset.val_fraction": 0.25,
            "model.student.name": "cifar_resnet8",
            "method.student_epochs_per_stage": [1],
            "method.kd_target": "avg",
            "tracking.mode": "offline",
        }
        return Config.model_validate(nested(json.loads(json.dumps(base | keys).replace("{here}", str(self.path)))))


@functools.cache
def place() -> Place:
    return Place()


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


NOTHING: Keys = {}


class Case(NamedTuple):
    """`base` is where the key can act; `to` is its other value, with which `more` must change (rules between keys)."""

    to: Any
    base: Keys = NOTHING
    observer: Observer = student
    more: Keys = NOTHING


def m(**keys: Any) -> Keys:
    return {f"method.{k}": v for k, v in keys.items()}


def where(base: Keys, **to: Any) -> dict[str, Case]:
    """Cases of several keys of the method that act where these do."""
    return {key: Case(value, base) for key, value in m(**to).items()}


AUTO = m(kd_target="auto", kd_ens_alpha=0.1, enable_kd_after_syn_acc=0.6)
GATED = m(kd_target="avg", kd_sample_gate=True, kd_sample_thr=1.0, kd_sample_min_ratio=0.0, kd_sample_max_ratio=0.5)
DISAGREE = m(kd_target="avg", use_disagree_weight=True, disagree_lambda_high=3.0)
DKD = m(kd_target="avg", kd_loss="dkd")
FEATURES = m(feat_kd_alpha=0.3, feat_kd_key="distill_feat")
WIDE = {**FEATURES, **m(ib_mbm_out_dim=6, distill_out_dim=6)}
TUNED = m(use_teacher_finetuning=True, teacher_ce_alpha=0.5)
STAGES = m(num_stages=2, student_epochs_per_stage=[1, 1])
FROZEN = {**STAGES, **m(use_partial_freeze=True, student_freeze_schedule=[-1, 0])}
PRETRAINED = {"model.student.name": "resnet18", "model.student.pretrained": True}
HELD = {**TUNED, **m(use_partial_freeze=True, teacher_freeze_level=1)}
CLAMPED = m(use_loss_clamp=True, loss_clamp_max=0.5)
EMA = {"optim.ema_decay": 0.5}
SGD = {"optim.optimizer": "sgd"}
STEP = {"schedule.type": "step", "schedule.milestones": [1]}
FINE_STEP = {f"finetune.{key}": value for key, value in STEP.items()}
HALF = {"optim.use_amp": True, "optim.amp_dtype": "float16"}
TWO = m(kd_two_view_start_epoch=0, kd_two_view_stop_epoch=2)
MIXED = m(cutmix_alpha_distill=1.0)
WARM = m(teacher_adapt_kd_warmup=2, kd_ens_alpha=0.5)
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

SEEN_IN_THE_STUDENT = {
    "seed": 1, "dataset.batch_size": 6, "dataset.val_fraction": 0.5, "method.name": "fitnet",
    "method.module": "nobody.nothing",
    "method.synergy_only_epochs": 1, "method.ce_alpha": 0.1, "method.kd_alpha": 0.9, "method.renorm_ce_kd": True,
    "method.kd_target": "weighted_conf", "method.kd_loss": "dkd", "method.tau": 2.0, "method.tau_schedule": [4.0, 1.0],
    "method.tau_syn": 1.0, "method.synergy_logit_scale": 0.3, "method.use_mu_for_kd": False, "method.hybrid_beta": 0.5,
    "method.kd_warmup_epochs": 3, "method.kd_max_ratio": 1e-3, "method.kd_cooldown_epochs": 1,
    "method.kd_uncertainty_weight": 0.9, "method.kd_sample_gate": True, "method.enable_kd_after_syn_acc": 1.0,
    "method.use_ib": False, "method.ib_beta": 1.0, "method.beta_schedule": [1.0, 0.0, 3], "method.ib_mbm_query_dim": 7,
    "method.ib_mbm_out_dim": 12, "method.ib_mbm_n_head": 4, "method.ib_mbm_feature_norm": "l2",
    "method.ib_mbm_logvar_clip": 0.01, "method.ib_mbm_min_std": 2.0, "method.ib_mbm_lr_factor": 0.1,
    "method.ib_mbm_reg_lambda": 5.0, "method.learnable_q": True, "method.synergy_head_dropout": 0.5,
    "method.synergy_temp_learnable": True, "method.use_cccp": True, "method.cccp_nt": 2, "method.cccp_ns": 2,
    "method.synergy_ce_alpha": 0.1, "method.teacher_adapt_alpha_kd": 2.0, "method.max_cw": 0.4,
    "method.use_distillation_adapter": False, "method.distill_out_dim": 4, "method.feat_kd_alpha": 0.3,
    "method.label_smoothing": 0.4, "method.ce_label_smoothing": 0.4, "method.mixup_alpha": 0.8,
    "method.cutmix_alpha_distill": 0.8, "optim.optimizer": "adam", "optim.student_lr": 3e-3,
    "optim.student_weight_decay": 0.5, "optim.a_step_optimizer": "sgd", "optim.a_step_lr": 1e-3,
    "optim.a_step_weight_decay": 0.5, "optim.use_amp": True, "schedule.lr_warmup_epochs": 1, "schedule.min_lr": 5e-3,
}  # fmt: skip
"""Another value, which alone changes the student's weights after a run."""
SEEN_IN_FINE_TUNING = {
    "finetune.epochs": 2, "finetune.seed": 1, "finetune.optimizer": "sgd", "finetune.lr": 3e-3,
    "finetune.weight_decay": 0.5, "finetune.schedule.lr_warmup_epochs": 2, "finetune.schedule.min_lr": 5e-3,
    "finetune.cutmix_alpha": 1.0, "finetune.label_smoothing": 0.3,
}  # fmt: skip
SEEN_IN_IMAGES = {
    "dataset.split_seed": 1, "optim.use_channels_last": False, "augment.crop_flip": False,
    "augment.pad_mode": "reflect", "augment.randaugment": True,
}  # fmt: skip

TABLE: dict[str, Case] = {
    **{key: Case(to) for key, to in SEEN_IN_THE_STUDENT.items()},
    **{key: Case(to, observer=tuned) for key, to in SEEN_IN_FINE_TUNING.items()},
    **{key: Case(to, observer=first_images) for key, to in SEEN_IN_IMAGES.items()},
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
    "dataset.eval_batch_size": Case(5, observer=evaluation_batches),
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
    # stages
    "method.num_stages": Case(2, observer=part("plan"), more=m(student_epochs_per_stage=[1, 1])),
    "method.student_epochs_per_stage": Case([1], observer=part("plan")),
    "method.teacher_adapt_epochs": Case(1, observer=part("plan")),
    # targets and weights of the B-step
    **where(DKD, dkd_alpha=3.0, dkd_beta=2.0, dkd_warmup_epochs=3),
    "method.kd_view": Case("mixed", MIXED),
    "method.teacher_weights": Case([0.9, 0.1], m(kd_target="avg")),
    "method.kd_ens_alpha": Case(0.2, m(teacher_adapt_kd_warmup=2)),
    "method.kd_ens_alpha_max": Case(0.5, AUTO, gate),
    "method.teacher_adapt_kd_warmup": Case(1, WARM),
    "method.kd_sample_thr": Case(0.5, {**GATED, **m(kd_sample_max_ratio=1.0)}),
    "method.kd_sample_min_ratio": Case(0.3, {**GATED, **m(kd_sample_thr=0.01)}),
    **where(GATED, kd_sample_max_ratio=0.2, kd_sample_reweight=False),
    **where(TWO, kd_two_view_start_epoch=1, kd_two_view_stop_epoch=1),
    "method.gate_source": Case("ema", m(enable_kd_after_syn_acc=0.5), gate),
    "method.plus": Case(["kd"], m(kd_target="avg")),
    **where(m(kd_target="avg", plus=["kd"]), plus_alpha=0.3, plus_tau=2.0),
    "method.standardise": Case(True, m(kd_target="avg")),
    "method.use_disagree_weight": Case(True, m(disagree_lambda_high=3.0)),
    **where(DISAGREE, disagree_mode="both_wrong", disagree_lambda_high=0.1),
    "method.disagree_lambda_low": Case(0.1, {**DISAGREE, **m(disagree_mode="both_wrong")}),
    # fusion
    **where({**STAGES, **m(ib_beta=1.0)}, ib_beta_warmup_epochs=4, ib_epochs_per_stage=1),
    "method.synergy_temp_init": Case(1.0, m(synergy_temp_learnable=True)),
    "method.cccp_alpha": Case(2.0, m(use_cccp=True)),
    # the A-step
    **where(TUNED, teacher_ce_alpha=2.0, reg_lambda=5.0),
    "method.min_cw": Case(2.5, m(max_cw=3.0)),
    "method.teacher_eval_every": Case(2, observer=part("rows")),
    "method.synergy_ema_alpha": Case(0.1, {**STAGES, "optim.a_step_lr": 0.05}, part("rows")),
    "method.synergy_eval_teacher_indices": Case([0], observer=synergy_scores),
    "method.use_teacher_finetuning": Case(True, m(teacher_ce_alpha=0.5)),
    # feature distillation
    "method.feat_kd_key": Case("feat_2d", WIDE),
    **where(FEATURES, ib_mbm_query_key="distill_feat", feat_kd_norm="l2", feat_kd_huber_beta=0.1, feat_kd_clip=0.5),
    # partial freezing
    "method.use_partial_freeze": Case(True, {**STAGES, **m(student_freeze_schedule=[-1, 0])}),
    "method.student_freeze_level": Case(0, {**PRETRAINED, **m(use_partial_freeze=True)}),
    **where(FROZEN, student_freeze_schedule=[-1, 1], student_freeze_bn=True),
    **where(HELD, teacher_freeze_level=2, teacher_freeze_bn=False, teacher_bn_head_only=True),
    **where(HELD, teacher_freeze_scope="features_classifier"),
    # regularisation
    "method.use_loss_clamp": Case(True, m(loss_clamp_max=0.5)),
    **where(CLAMPED, loss_clamp_mode="hard", loss_clamp_max=1.0, loss_clamp_warmup_epochs=1),
    **where(CLAMPED, disable_loss_clamp_in_a=True),
    # optimisers and precision
    "optim.momentum": Case(0.1, SGD),
    "optim.grad_clip_norm": Case(0.01, SGD),
    "optim.ema_decay": Case(0.9, EMA, part("averaged")),
    "optim.ema_update_every": Case(3, EMA, part("averaged")),
    "optim.select_weights": Case("ema", EMA, part("exported")),
    "optim.amp_dtype": Case("float16", {"optim.use_amp": True}),
    "optim.grad_scaler_init_scale": Case(64.0, HALF, part("scale")),
    "optim.safe_retry_patience": Case(3, {"finetune.epochs": 9}, patience),
    "optim.deterministic": Case(False, observer=prepared),
    "optim.compile": Case(True, observer=compiled),
    "schedule.type": Case("step", more={"schedule.milestones": [1]}),
    "schedule.milestones": Case([2], STEP),
    "schedule.gamma": Case(0.5, STEP),
    # fine-tuning
    "finetune.schedule.type": Case("step", {}, tuned, {"finetune.schedule.milestones": [1]}),
    "finetune.schedule.milestones": Case([2], FINE_STEP, tuned),
    "finetune.schedule.gamma": Case(0.5, FINE_STEP, tuned),
}
REFUSED = ("method.name", "method.module", "method.ib_mbm_query_dim", "method.use_distillation_adapter", "device",
           "dataset.root", "dataset.download", "resume", "extend", "student", "continual.scenario",
           "continual.teachers")  # fmt: skip
"""Keys one of whose two values is refused here."""


def schema_keys() -> set[str]:
    return set(flatten(Config.model_validate({"model": {"teachers": [{}]}})))


def test_every_key_of_the_schema_is_in_the_table_and_no_other() -> None:
    assert set(TABLE) == schema_keys()


@pytest.mark.parametrize("key", TABLE)
def test_changing_the_key_changes_what_it_is_for(key: str) -> None:
    case = TABLE[key]
    before, after = seen(case.observer, case.base), seen(case.observer, {**case.base, key: case.to, **case.more})
    if key not in REFUSED:
        assert not isinstance(before, str) or case.observer in (data_set, stem, precision), before
        assert type(before) is type(after), after
    assert differences(before, after) != []


def test_the_observer_sees_nothing_where_nothing_differs() -> None:
    """Runs are reproducible: what differs above differs by the key."""
    first = _run(json.dumps({}))
    _run.cache_clear()
    assert differences(first, _run(json.dumps({}))) == []
    assert differences(tuned({}), tuned({})) == []


def test_a_configuration_is_no_scratch_pad() -> None:
    """The research code kept results in its configuration: here it cannot be written to."""
    c = tiny({})
    for section, name in ((c, "seed"), (c.method, "tau"), (c.optim, "use_amp"), (c.model.teachers[0], "checkpoint")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))
    with pytest.raises(ValidationError):
        c.method.result = 1.0  # type: ignore[attr-defined]
