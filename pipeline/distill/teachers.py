"""Where a distillation's teachers come from: a checkpoint, an earlier fine-tuning, or a nested fine-tuning."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from models.class_view import ClassView
from models.features import FeatureNet
from models.weights import weights_hash
from pipeline.config import Config
from pipeline.config.continual import ContinualConfig
from pipeline.config.identity import canonical, computation, source_digest
from pipeline.config.places import check_file, output_dir
from pipeline.data.sources import ImageData
from pipeline.data.splits import split
from pipeline.data.subsets import subsets
from pipeline.data.tasks import class_tasks
from pipeline.distill import networks
from pipeline.distill.results import write_results
from pipeline.distill.train import images, load_data, prepare, threads_of, train
from pipeline.errors import UserError
from pipeline.files import read_state, write_atomically
from pipeline.paths import REPOSITORY
from pipeline.runs import naming, opening
from pipeline.runs.run import Run
from pipeline.training import distributed
from pipeline.training.finetune import FineTuning
from pipeline.training.run_data import Scope
from pipeline.training.student import task_of

logger = logging.getLogger("asib")
FINETUNE_KEYS = ("finetune.", "augment.", "dataset.", "optim.use_channels_last", "optim.deterministic")
WEIGHTS = "checkpoints/teacher.safetensors"


@dataclass(frozen=True)
class Teacher:
    """A teacher ready to be distilled.

    Attributes:
        hash: of its weights, and of what it is taught and says of the rest, where that is not all.
        made_by: the run that fine-tuned it, if any, by its journal's or MLflow's id.
        saw_validation: it is not known to have been trained without this run's validation images.
        classes: those that it is taught; empty: all.
    """

    net: FeatureNet
    hash: str
    made_by: str | None
    saw_validation: bool
    classes: tuple[int, ...] = ()


def with_classes(config: Config, data: ImageData) -> Config:
    """The configuration with each teacher's `classes` as `model.overlap` divides these; empty where they are all.

    Of continual learning whose teachers know a task each: with as many teachers for each task, and no tasks any more.

    Raises UserError: the data has no such class; a teacher would have a single one; nobody would teach a class.
    """
    model, own, everything = config.model, config.continual, tuple(range(data.num_classes))
    if own.num_tasks is not None:
        if own.scenario == "classes" and own.teachers != "oracle":
            of_tasks = [(spec, task) for task in class_tasks(own, data.num_classes) for spec in model.teachers]
            specs = tuple(spec.model_copy(update={"classes": tuple(sorted(task))}) for spec, task in of_tasks)
            model = model.model_copy(update={"teachers": specs, "overlap": None})
        config = config.model_copy(update={"continual": ContinualConfig()})
    taught = [tuple(sorted(teacher.classes)) or everything for teacher in model.teachers]
    if model.overlap is not None:
        taught = subsets(len(everything), len(taught), model.overlap, model.overlap_seed)
    for index, classes in enumerate(taught):
        if classes[-1:] > everything[-1:]:
            raise UserError(
                f"model.teachers.{index}.classes names class {classes[-1]}: give numbers from 0 to {everything[-1]}"
            )
        if len(classes) < 2 and own.num_tasks is not None and own.teachers != "oracle":
            raise UserError(
                f"continual.num_tasks={own.num_tasks} has tasks of one class, of which a teacher has nothing to learn: "
                "give fewer tasks, or use continual.teachers=oracle"
            )
        if len(classes) < 2:
            raise UserError(
                f"model.overlap={model.overlap} leaves model.teachers.{index} {len(classes)} of the {len(everything)} "
                "classes, and it needs two: raise it, or take fewer teachers"
            )
    missing = sorted({*everything}.difference(*taught)) if taught else []
    if missing and config.method.ce_alpha == 0:
        raise UserError(
            f"class {missing[0]} ({data.classes[missing[0]]}) was taught to no teacher, and method.ce_alpha=0: nothing "
            "would teach it to the student; raise method.ce_alpha, or add it to a model.teachers.<k>.classes"
        )
    filled = [
        spec.model_copy(update={"classes": () if classes == everything else classes})
        for spec, classes in zip(model.teachers, taught, strict=True)
    ]
    return config.model_copy(update={"model": model.model_copy(update={"teachers": tuple(filled), "overlap": None})})


def identity(config: Config, data: ImageData, index: int) -> str:
    """SHA-256 (hex) of everything that determines a fine-tuned teacher's weights."""
    config = with_classes(config, data)
    teacher, o = config.model.teachers[index], config.optim
    keys = {k: v for k, v in computation(config).items() if k.startswith(FINETUNE_KEYS)}
    keys |= {f"teacher.{k}": v for k, v in teacher.model_dump(exclude={"checkpoint"}).items()}
    keys |= {"index": index, "data": data.digest, "sources": source_digest(REPOSITORY)}
    # of the student's optimiser, only what fine-tuning also uses, and only where it acts
    if config.finetune.optimizer == "sgd":
        keys["optim.momentum"] = o.momentum
    if o.use_amp:
        keys |= {"optim.amp_dtype": o.amp_dtype, "optim.safe_retry_patience": o.safe_retry_patience}
        keys |= {"optim.grad_scaler_init_scale": o.grad_scaler_init_scale if o.amp_dtype == "float16" else None}
    return hashlib.sha256(canonical(keys).encode()).hexdigest()


def store(config: Config, data: ImageData, index: int) -> Path:
    """Where a fine-tuned teacher is kept for other runs on this machine."""
    return output_dir(config) / "teachers" / f"{identity(config, data, index)[:24]}.safetensors"


def obtain(
    run: Run, data: ImageData, student: FeatureNet, test: bool = True, config: Config | None = None, nested: str = ""
) -> list[Teacher]:
    """All teachers of a run's configuration, or of `config`, in order; unsuitable ones are refused before fine-tuning.

    `test`: False if the test split must not be seen: teachers fine-tuned here are then not evaluated on it. `nested`:
    what the names of nested fine-tunings begin with, in a run that has several sets of teachers.

    Raises UserError: a checkpoint is missing or does not fit, or the teachers cannot be fused.
    """
    config = with_classes(config or run.config, data)
    nets = _build(config, data, student)
    found: dict[int, Teacher] = {}
    order = sorted(range(len(nets)), key=lambda k: config.model.teachers[k].checkpoint is None)  # checkpoints first
    for index in order:
        found[index] = _obtain(run, config, data, index, nets[index], test, nested)
    return [found[index] for index in range(len(nets))]


def validate_early(config: Config, data: ImageData) -> None:
    """Refuse now whatever `obtain` would refuse later, as far as that needs no run. Raises UserError."""
    config = with_classes(config, data)
    nets = _build(config, data, networks.build_student(config, data))
    for index, (net, spec) in enumerate(zip(nets, config.model.teachers, strict=True)):
        if spec.checkpoint is not None and not spec.checkpoint.startswith("runs:/"):
            networks.load(net, check_file(spec.checkpoint, _key(config, index)), _key(config, index), data)


def _build(config: Config, data: ImageData, student: FeatureNet) -> list[FeatureNet]:
    dataset = config.dataset
    # an impossible split would otherwise be refused only after fine-tuning
    split(data.train_y, dataset.val_fraction, data.digest, dataset.split_seed)
    nets = [networks.build_teacher(config, data, index) for index in range(len(config.model.teachers))]
    task = task_of(config.method)
    task.check(config, student, data.num_classes)
    task.check_teachers(config, student, nets, data.num_classes)
    return nets


def _key(config: Config, index: int) -> str:
    return f"model.teachers.{index}.checkpoint={config.model.teachers[index].checkpoint}"


def _obtain(run: Run, config: Config, data: ImageData, index: int, net: FeatureNet, test: bool, nested: str) -> Teacher:
    spec = config.model.teachers[index]
    key, kept = _key(config, index), store(config, data, index)
    made_by: str | None = None
    if spec.checkpoint is not None:
        path, made_by = locate(run, spec.checkpoint, WEIGHTS, key)
    elif config.finetune.epochs == 0:
        return _ready(config, data, index, net, None, spec.pretrained)
    else:
        if kept.exists():
            logger.info("teacher %d: %s, fine-tuned before", index, spec.name)
        else:
            finetune(run, index, test, config, nested)
        path = kept if kept.exists() else run.folder / f"{nested}teacher_{index}" / WEIGHTS
        key = f"{path} (delete it to fine-tune again)"
        made_by = (read_state(kept.with_suffix(".json")) or {}).get("journal")
    metadata = networks.load(net, path, key, data)
    if not metadata.get("mean"):
        logger.info("teacher %d: %s", index, networks.preparation(net, data))
    return _ready(config, data, index, net, made_by, networks.saw_validation(metadata, config, data))


def _ready(
    config: Config, data: ImageData, index: int, net: FeatureNet, made_by: str | None, saw_validation: bool
) -> Teacher:
    """A teacher with its weights, from now on saying of classes that it is not taught what `model.unseen` says."""
    classes, digest = config.model.teachers[index].classes, weights_hash(net.net)
    if classes:
        known = torch.zeros(data.num_classes, dtype=torch.bool)
        known[list(classes)] = True
        net.show(ClassView(torch.arange(data.num_classes), known, config.model.unseen))
        says = {"weights": digest, "classes": classes, "unseen": config.model.unseen}
        digest = hashlib.sha256(canonical(says).encode()).hexdigest()
    return Teacher(net, digest, made_by, saw_validation, classes)


def locate(run: Run, source: str, artifact: str, key: str) -> tuple[Path, str | None]:
    """A weights file on this machine for a path or `runs:/<id>[/artifact]`, and the run that made it."""
    if source.startswith("runs:/"):
        parts = source.removeprefix("runs:/").strip("/").split("/", 1)
        name = parts[1] if len(parts) == 2 else artifact
        return run.fetch(f"runs:/{parts[0]}/{name}", run.folder / "fetched" / parts[0]), parts[0]
    return check_file(source, key), None


def finetune(
    parent: Run, index: int, test: bool = True, config: Config | None = None, nested: str = ""
) -> dict[str, float]:
    """A nested run that fine-tunes one teacher, and keeps it for other runs on this machine.

    `test`: whether it is evaluated on the test split at its end; `config`: instead of the parent's; `nested`: what its
    name begins with.
    """
    key = f"{nested}teacher_{index}"
    done = parent.finished_child(key)
    if done is not None:
        return done
    config = config or parent.config
    name = f"{key} {naming.shown(config.model.teachers[index].name)} s{config.seed}"
    run = opening.child(parent, "finetune", key, with_classes(config, images(config)), name)
    with run.nested():
        prepare(run.config, threads_of(run))
        data = load_data(run)
        net = networks.build_teacher(run.config, data, index)
        device = networks.device_of(run.config)
        classes = run.config.model.teachers[index].classes
        net.show(ClassView(torch.tensor(classes)) if classes else None)
        task = FineTuning(run.config, data, net, device, Scope(classes) if classes else None)
        run.journal.tags({"asib.teacher": str(index), "asib.eval_split": task.data.eval_split})
        name = run.config.model.teachers[index].name
        part = f", of {len(classes)} of {data.num_classes} classes" if classes else ""
        logger.info("fine-tuning teacher %d, %s%s, for %d epochs", index, name, part, run.config.finetune.epochs)
        loop = train(run, task, data, part=f"teacher_{index}")
        results = task.results(test)
        loop.finish(results)
        net.show(None)  # the whole head is kept
        if not run.follower:
            path, kept = run.folder / WEIGHTS, store(run.config, data, index)
            networks.save(net, path, run.config, data)
            networks.save(net, kept, run.config, data)
            made_by = {"journal": run.journal.id, "folder": str(run.folder)}
            write_atomically(kept.with_suffix(".json"), json.dumps(made_by))
            run.journal.artifact(path, "checkpoints")
            run.journal.tags({"asib.weights": weights_hash(net.net)})
            model = run.folder / "model"
            model.mkdir(exist_ok=True)
            (model / path.name).unlink(missing_ok=True)
            os.link(path, model / path.name)
            run.journal.model(model, name="teacher", kind="weights", metrics=results)
        write_results(run, results)
    distributed.barrier()
    return results
