"""What the schema's types cannot say: defaults that follow from other keys, and the rules between keys."""

import posixpath
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from pydantic import BaseModel

from pipeline.config import methods
from pipeline.config.datasets import PUBLISHED, TIMM, DatasetConfig
from pipeline.config.model import StudentConfig, TeacherConfig
from pipeline.config.sections import Sections
from pipeline.config.words import written

MAX_REGISTERED_NAME = 256
"""Length of the column in the registry's database."""


def derive(data: Any, schema: type[Sections]) -> Any:
    """Fill in defaults that follow from other keys, as the schema's method has them."""
    if not isinstance(data, dict):
        return data
    if data.get("bank") is False:  # YAML reads off as false
        data = {**data, "bank": "off"}
    method, model = _as_dict(data.get("method")), _as_dict(data.get("model"))
    student = _as_dict((model or {}).get("student"))
    if method is None:
        return data
    settings: Any = schema.model_fields["method"].annotation
    derived = settings.derived(method, str((student or {}).get("name", "")).lower())
    return {**data, "method": derived} if derived is not method else data


def _as_dict(section: Any) -> dict[str, Any] | None:
    """Return a section that was omitted or given as YAML or an object; None if validation will refuse it."""
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    return {} if section is None else section if isinstance(section, dict) else None


def check(config: Sections) -> None:
    """Raise ValueError for the first broken rule; the message names the key and what to do."""
    groups = (
        _epochs, _models, _subsets, _student_learns, _samples, _own, _continual, _freezing, _schedules, _surroundings,
    )  # fmt: skip
    for message in chain.from_iterable(group(config) for group in groups):
        raise ValueError(message)


def _own(config: Sections) -> Iterator[str]:
    return config.method.rules(config)


def _continual(config: Sections) -> Iterator[str]:
    return config.continual.rules(config)


def _epochs(config: Sections) -> Iterator[str]:
    m = config.method
    total = sum(m.student_epochs_per_stage)
    if len(m.student_epochs_per_stage) != m.num_stages:
        yield (
            f"method.student_epochs_per_stage={list(m.student_epochs_per_stage)} does not fit "
            f"method.num_stages={m.num_stages}: give one number of B-epochs for each stage"
        )
    if m.kd_cooldown_epochs > 0 and m.kd_cooldown_epochs >= total and m.distils:
        given = f"method.kd_cooldown_epochs={m.kd_cooldown_epochs}"
        yield f"{given} leaves none of the {total} B-epochs for distillation: set it below {total}"
    start, stop = m.kd_two_view_start_epoch, m.kd_two_view_stop_epoch
    if start is None and stop is None:
        return
    if start is None or stop is None or start >= stop:
        yield (
            f"method.kd_two_view_start_epoch={written(start)}, kd_two_view_stop_epoch={written(stop)}: "
            "give both, the first below the second"
        )
    if not (config.augment.crop_flip or config.augment.randaugment):
        yield (
            "method.kd_two_view_start_epoch: without augmentation both views are the same; set augment.crop_flip=true"
        )
    if m.kd_view == "mixed":
        yield "method.kd_two_view_start_epoch averages clean views: use method.kd_view=clean"


def _models(config: Sections) -> Iterator[str]:
    teachers = {f"model.teachers.{i}": teacher for i, teacher in enumerate(config.model.teachers)}
    networks: dict[str, StudentConfig | TeacherConfig] = {"model.student": config.model.student, **teachers}
    for where, network in networks.items():
        if not network.name:
            yield f"{where}.name is empty: name a timm classifier or a cifar_* network"
        if len(network.name) > 200:
            given = f"{where}.name={network.name[:40]}… has {len(network.name)} letters"
            yield f"{given}: name a timm classifier or a cifar_* network"
        if network.pretrained and network.name.startswith("cifar_"):
            other = f" or give {where}.checkpoint" if where != "model.student" else ""
            yield f"{where}.pretrained=true: {network.name} has no published weights; set it to false{other}"
    for where, teacher in teachers.items():
        if config.finetune.epochs == 0 and not teacher.pretrained and not teacher.checkpoint:
            given = f"finetune.epochs=0: {where} ({teacher.name}) would stay untrained"
            yield f"{given}; give it epochs or {where}.checkpoint"


def _subsets(config: Sections) -> Iterator[str]:
    model, m = config.model, config.method
    for i, teacher in enumerate(model.teachers):
        where = f"model.teachers.{i}.classes"
        twice = [number for number in teacher.classes if teacher.classes.count(number) > 1]
        if twice:
            yield f"{where} names class {twice[0]} twice: give each once"
        if len(teacher.classes) == 1:
            yield f"{where}={list(teacher.classes)}: of one class there is nothing to learn; give two or more, or none"
        if teacher.classes and model.overlap is not None:
            yield f"model.overlap={model.overlap} and {where}: give one of them"
    if model.overlap is not None and len(model.teachers) < 2:
        yield (
            f"model.overlap={model.overlap} divides classes among teachers, and model.teachers has "
            f"{len(model.teachers)}: choose two or more, or set it to null"
        )
    if model.partly_taught and getattr(m, "use_teacher_finetuning", False):
        yield (
            "method.use_teacher_finetuning=true would teach all classes to teachers that know some of them "
            "(model.overlap, model.teachers.<k>.classes): set it to false"
        )
    if model.partly_taught and model.unseen == "masked" and m.standardise and m.distils:
        yield (
            "model.unseen=masked: method.standardise divides logits by their deviation, which masked ones dominate: "
            "use model.unseen=uniform"
        )


def _student_learns(config: Sections) -> Iterator[str]:
    m, teachers = config.method, config.model.teachers
    if m.ce_alpha == 0 and not m.distils:
        yield (
            "method.ce_alpha=0 and no distillation weight: the student would learn nothing; "
            "raise method.ce_alpha or method.kd_alpha"
        )
    if m.ce_alpha == 0 and m.kd_cooldown_epochs > 0:
        yield f"method.kd_cooldown_epochs={m.kd_cooldown_epochs} with method.ce_alpha=0: it would learn nothing then"
    if m.ce_alpha == 0 and m.kd_max_ratio is not None:
        yield f"method.kd_max_ratio={m.kd_max_ratio} bounds distillation by cross-entropy, and method.ce_alpha is 0"
    if m.ce_alpha == 0 and not m.compares_logits and not m.plus:
        yield (
            f"method.ce_alpha=0: method={m.name} alone trains the student's features and not its classifier: raise "
            "method.ce_alpha"
        )
    fewest, most = m.teachers
    at_once = config.continual.teachers_at_once(len(teachers))
    has = f"model.teachers has {len(teachers)}"
    if at_once != len(teachers):
        has = f"continual.{'past' if config.continual.past else 'teachers'} makes them {at_once}"
    if m.distils and at_once < fewest:
        yield (
            f"method={m.name} distils from {_teachers(fewest)}, and {has}: "
            "choose model/teacher=…, or method=asib method.kd_alpha=0 for the student alone"
        )
    if m.distils and most is not None and at_once > most:
        yield (
            f"method={m.name} distils from {_teachers(most)}, and {has}: "
            "give it one, or choose a method for several: asib, " + ", ".join(methods.for_several_teachers())
        )


def _teachers(count: int) -> str:
    return f"{count} teacher{'s' * (count != 1)}"


def _samples(config: Sections) -> Iterator[str]:
    m = config.method
    if m.use_disagree_weight and m.distils and m.disagree_lambda_high == m.disagree_lambda_low == 0:
        yield "method.disagree_lambda_high and disagree_lambda_low are both 0: no sample would be distilled; raise one"
    if m.kd_sample_min_ratio > m.kd_sample_max_ratio:
        yield (
            f"method.kd_sample_min_ratio={m.kd_sample_min_ratio} is above "
            f"method.kd_sample_max_ratio={m.kd_sample_max_ratio}"
        )
    if m.kd_sample_gate and (m.kd_sample_max_ratio == 0 or (m.kd_sample_thr == 0 and m.kd_sample_min_ratio == 0)):
        yield "method.kd_sample_gate would let no sample through: raise method.kd_sample_max_ratio or kd_sample_thr"
    for name in ("kd_sample_gate", "use_disagree_weight"):
        if getattr(m, name) and m.distils and not m.per_sample:
            yield f"method.{name}: method={m.name} compares whole batches, in which no sample has a weight of its own"
    if m.distils and not m.blends:
        if m.mixes and m.kd_view == "clean":
            yield (
                f"method.kd_view=clean: method={m.name} cannot blend what teachers say of two images; set "
                "method.kd_view=mixed, or mix no images"
            )
        if m.kd_two_view_start_epoch is not None:
            yield f"method.kd_two_view_start_epoch: method={m.name} cannot blend what teachers say of two views"
        if m.kd_sample_gate and m.maps:
            yield f"method.kd_sample_gate: method={m.name} compares feature maps of all samples; set it to false"


def _freezing(config: Sections) -> Iterator[str]:
    m = config.method
    levels = m.student_freeze_schedule
    if levels is not None and len(levels) != m.num_stages:
        yield (
            f"method.student_freeze_schedule={list(levels)} does not fit method.num_stages={m.num_stages}: "
            "give one level for each stage"
        )
    first, where = (m.student_freeze_level, "level") if levels is None else (levels[0], "schedule")
    if m.use_partial_freeze and first != -1 and not config.model.student.pretrained:
        yield (
            f"method.student_freeze_{where} freezes at level {first} in stage 1 a student without pretrained weights: "
            "begin with -1"
        )
    if config.optim.select_weights == "ema" and config.optim.ema_decay is None:
        yield "optim.select_weights=ema needs optim.ema_decay, e.g. 0.999"


def _schedules(config: Sections) -> Iterator[str]:
    fine, b_epochs = config.finetune, sum(config.method.student_epochs_per_stage)
    for where, schedule, epochs, lr, peak in (
        ("schedule", config.schedule, b_epochs, "optim.student_lr", config.optim.student_lr),
        ("finetune.schedule", fine.schedule, fine.epochs, "finetune.lr", fine.lr),
    ):
        if schedule.type == "step" and not schedule.milestones:
            yield f"{where}.type=step needs {where}.milestones, the epochs at which the learning rate falls"
        if list(schedule.milestones) != sorted(set(schedule.milestones)):
            yield f"{where}.milestones={list(schedule.milestones)} must rise"
        if 0 < epochs <= schedule.lr_warmup_epochs:
            given = f"{where}.lr_warmup_epochs={schedule.lr_warmup_epochs}"
            yield f"{given} leaves none of the {epochs} epochs after the warm-up: set it below {epochs}"
        if schedule.type == "cosine" and schedule.min_lr > peak:
            yield f"{where}.min_lr={schedule.min_lr} is above {lr}={peak}, from which the cosine falls"


def _surroundings(config: Sections) -> Iterator[str]:
    if not config.tracking.experiment.strip():
        yield "tracking.experiment is empty: name an experiment, such as asib"
    if config.dataset.name == "npz" and not config.dataset.path:
        yield "dataset.name=npz needs dataset.path, the file with x_train, y_train, x_test and y_test"
    prefix, slash, _ = (config.dataset.id or "").partition("/")
    if config.dataset.name == "timm" and not (slash and prefix in TIMM):
        known = ", ".join(f"{name}/…" for name in TIMM)
        yield f"dataset.id={written(config.dataset.id)}: dataset.name=timm needs one that begins with {known}"
    if config.dataset.name == "imagenet100" and (config.dataset.class_list is None) == (config.dataset.path is None):
        yield (
            "dataset.name=imagenet100 needs one of dataset.class_list (cmc, podnet or ucir, which have few classes in "
            "common) and dataset.path, a text file with a class's name in each line"
        )
    if config.dataset.normalisation == "published":
        yield from _published(config.dataset)
    if config.dataset.batch_size == 1:
        yield "dataset.batch_size=1: batch normalisation needs at least 2 images"
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", config.device) is None:
        yield f"device={config.device!r}: give auto, cpu, mps, cuda or cuda:<n>"
    if re.search(r"://[^/@:]*:[^@]*@", config.tracking.uri or "") is not None:
        yield (
            "tracking.uri holds a password, which the run's parameters would show to everybody: put it into "
            "MLFLOW_TRACKING_PASSWORD (a database's into PGPASSWORD), or the whole URI into MLFLOW_TRACKING_URI"
        )
    if config.register is not None:
        fault = registered_name_fault(config.register)
        if fault is not None:
            yield f"register={config.register}: {fault}"
        if not config.log_model:
            yield f"register={config.register} needs log_model=true: a version is made of the model that is logged"


def _published(dataset: DatasetConfig) -> Iterator[str]:
    if dataset.name not in PUBLISHED:
        yield (
            f"dataset.normalisation=published: the KD tables' code has no constants for {dataset.name}, only for "
            f"{', '.join(PUBLISHED)}; set it to exact, or give dataset.mean and dataset.std"
        )
    for name in ("mean", "std"):
        if getattr(dataset, name) is not None:
            yield f"dataset.normalisation=published and dataset.{name}: give one of them"


def registered_name_fault(name: str) -> str | None:
    """What is wrong with a registered model's name, by MLflow's rules, and what to do; None for a good one.

    Example:
        >>> registered_name_fault("cifar/student")
        'the registry allows no / or : in a name; give for example cifar-student'
    """
    if not name.strip():
        return "the name is empty; give for example cifar100-student"
    if "/" in name or ":" in name:
        return f"the registry allows no / or : in a name; give for example {name.replace('/', '-').replace(':', '-')}"
    if name != name.strip() or posixpath.normpath(name) != name or name == "." or name.startswith(".."):
        return "the registry allows no name that begins or ends with a space, is . or begins with .."
    if len(name) > MAX_REGISTERED_NAME:
        return f"a name has at most {MAX_REGISTERED_NAME} characters, this one {len(name)}"
    if not name.isprintable() or any(character in name for character in "'\"`%?#@"):
        # it becomes part of queries and of models:/<name>@<alias>
        return "quotes, %, ?, #, @ and control characters make models:/<name> ambiguous; use letters, digits, - and _"
    return None
