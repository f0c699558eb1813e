"""What the schema's types cannot say: defaults that follow from other keys, and the rules between keys."""

import math
import posixpath
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from pydantic import BaseModel

from pipeline.config.methods.asib import FUSED_TARGETS
from pipeline.config.model import StudentConfig, TeacherConfig
from pipeline.config.sections import Sections
from pipeline.config.words import written

SMALL_STUDENTS = ("mobilenet_v2", "mobilenetv2", "efficientnet_b0", "shufflenet_v2", "shufflenetv2", "shufflev2")
"""Students whose distillation width defaults to 256 (docs/method.md section 1)."""

MIN_TEMPERATURE = 1e-4
"""Floor of the synergy head's learned temperature (models/ib_mbm.py)."""

MAX_REGISTERED_NAME = 256
"""Length of the column in the registry's database."""


def derive(data: Any) -> Any:
    """Fill in defaults that follow from other keys: distillation width 256 for small students, fusion aligned."""
    if not isinstance(data, dict):
        return data
    if data.get("bank") is False:  # YAML reads off as false
        data = {**data, "bank": "off"}
    method, model = _as_dict(data.get("method")), _as_dict(data.get("model"))
    student = _as_dict((model or {}).get("student"))
    name = str((student or {}).get("name", "")).lower()
    if method is None or not any(small in name for small in SMALL_STUDENTS):
        return data
    width = method.get("distill_out_dim", 256)
    return {**data, "method": {"distill_out_dim": width, "ib_mbm_out_dim": width, **method}}


def _as_dict(section: Any) -> dict[str, Any] | None:
    """Return a section that was omitted or given as YAML or an object; None if validation will refuse it."""
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    return {} if section is None else section if isinstance(section, dict) else None


def check(config: Sections) -> None:
    """Raise ValueError for the first broken rule; the message names the key and what to do."""
    groups = (_epochs, _models, _student_learns, _targets, _fusion, _freezing, _schedules, _surroundings)
    for message in chain.from_iterable(group(config) for group in groups):
        raise ValueError(message)


def _epochs(config: Sections) -> Iterator[str]:
    m = config.method
    total = sum(m.student_epochs_per_stage)
    if len(m.student_epochs_per_stage) != m.num_stages:
        yield (
            f"method.student_epochs_per_stage has {len(m.student_epochs_per_stage)} entries for "
            f"method.num_stages={m.num_stages}: give one number of B-epochs for each stage"
        )
    if m.kd_cooldown_epochs > 0 and m.kd_cooldown_epochs >= total and m.distils:
        yield f"method.kd_cooldown_epochs={m.kd_cooldown_epochs} leaves none of the {total} B-epochs for distillation"
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
    if m.ce_alpha == 0 and m.kd_alpha == 0 and m.hybrid_beta == 0:
        yield (
            f"method.feat_kd_alpha={m.feat_kd_alpha} alone trains the student's features and not its classifier: raise "
            "method.ce_alpha or method.kd_alpha"
        )
    weighted = m.use_disagree_weight and m.kd_alpha + m.feat_kd_alpha > 0
    if weighted and m.disagree_lambda_high == m.disagree_lambda_low == 0:
        yield "method.disagree_lambda_high and disagree_lambda_low are both 0: no sample would be distilled; raise one"
    if m.kd_loss == "dkd" and m.kd_alpha > 0 and m.dkd_alpha == 0 and m.dkd_beta == 0:
        yield "method.dkd_alpha and dkd_beta are both 0: kd_loss=dkd would distil nothing; raise one, or use kl"
    weight = next((k for k in ("kd_alpha", "hybrid_beta", "feat_kd_alpha") if getattr(m, k) > 0), "kd_alpha")
    if m.distils and not teachers:
        yield (
            f"method.{weight}={getattr(m, weight)} needs teachers, and model.teachers is empty: "
            f"choose model/teacher=… or set method.{weight}=0"
        )


def _targets(config: Sections) -> Iterator[str]:
    m, teachers = config.method, config.model.teachers
    if m.teacher_weights != "equal" and teachers:
        if len(m.teacher_weights) != len(teachers):
            yield f"method.teacher_weights has {len(m.teacher_weights)} entries for {len(teachers)} teachers"
        if sum(m.teacher_weights) == 0:
            yield "method.teacher_weights are all 0: at least one must be above"
    if m.kd_target == "auto" and m.kd_ens_alpha > m.kd_ens_alpha_max:
        yield (
            f"method.kd_ens_alpha={m.kd_ens_alpha} is above method.kd_ens_alpha_max={m.kd_ens_alpha_max}, "
            "from which it falls (kd_target=auto)"
        )
    if m.kd_target == "auto" and m.kd_alpha > 0 and m.kd_ens_alpha == 1:
        yield (
            "method.kd_ens_alpha=1 with method.kd_target=auto teaches the averaged teachers only, and trains a fusion "
            "for nothing: use method.kd_target=avg"
        )
    if m.kd_sample_min_ratio > m.kd_sample_max_ratio:
        yield (
            f"method.kd_sample_min_ratio={m.kd_sample_min_ratio} is above "
            f"method.kd_sample_max_ratio={m.kd_sample_max_ratio}"
        )
    if m.kd_sample_gate and (m.kd_sample_max_ratio == 0 or (m.kd_sample_thr == 0 and m.kd_sample_min_ratio == 0)):
        yield "method.kd_sample_gate would let no sample through: raise method.kd_sample_max_ratio or kd_sample_thr"
    gate = m.enable_kd_after_syn_acc
    reads_accuracy = "method.kd_target=auto" if m.kd_target == "auto" else f"method.enable_kd_after_syn_acc={gate}"
    if (gate != 0 or m.kd_target == "auto") and config.dataset.val_fraction == 0:
        yield f"{reads_accuracy} reads validation accuracy: it needs dataset.val_fraction > 0"


def _fusion(config: Sections) -> Iterator[str]:
    m, teachers = config.method, config.model.teachers
    fusion = m.uses_fusion
    user, without = f"method.feat_kd_alpha={m.feat_kd_alpha}", "method.feat_kd_alpha=0"
    if m.kd_alpha > 0 and m.kd_target in FUSED_TARGETS:
        user, without = f"method.kd_target={m.kd_target}", "method.kd_target=avg"
    if fusion and len(teachers) < 2:
        yield f"{user} fuses teachers and needs two, model.teachers has {len(teachers)}: use {without}"
    if fusion and m.teacher_adapt_epochs == 0:
        given = f"{user} with method.teacher_adapt_epochs=0"
        yield f"{given}: nothing would train the fusion; use {without} or give it A-epochs"
    w_kd = m.kd_alpha if m.teacher_adapt_alpha_kd is None else m.teacher_adapt_alpha_kd
    if fusion and m.synergy_ce_alpha == 0 and (m.cccp_alpha if m.use_cccp else w_kd) == 0:
        yield "method.synergy_ce_alpha=0 without a KD weight: the A-step would learn nothing"
    if m.ib_mbm_out_dim % m.ib_mbm_n_head != 0:
        yield f"method.ib_mbm_out_dim={m.ib_mbm_out_dim} is not divisible by method.ib_mbm_n_head={m.ib_mbm_n_head}"
    if m.min_cw > m.max_cw:
        yield f"method.min_cw={m.min_cw} is above method.max_cw={m.max_cw}"
    if fusion and m.use_ib and m.ib_mbm_min_std >= math.exp(m.ib_mbm_logvar_clip / 2):
        yield (
            f"method.ib_mbm_min_std={m.ib_mbm_min_std} is the standard deviation wherever method.ib_mbm_logvar_clip="
            f"{m.ib_mbm_logvar_clip} lets it go: nothing trains it; lower the floor, or set method.use_ib=false"
        )
    if fusion and m.synergy_temp_learnable and m.synergy_temp_init <= math.log(MIN_TEMPERATURE):
        yield (
            f"method.synergy_temp_init={m.synergy_temp_init} is below the floor of the learned temperature, where "
            f"nothing trains it: give more than {math.log(MIN_TEMPERATURE):.2f}, the logarithm of {MIN_TEMPERATURE:g}"
        )
    indices = m.synergy_eval_teacher_indices
    if indices is not None:
        if len(indices) == 0:
            yield "method.synergy_eval_teacher_indices is empty: name teachers, or null for all"
        if teachers and (max(indices, default=0) >= len(teachers) or len(set(indices)) < len(indices)):
            yield (
                f"method.synergy_eval_teacher_indices={list(indices)}: "
                f"teachers are numbered 0 to {len(teachers) - 1}, each once"
            )
    if m.ib_mbm_query_key == "distill_feat" and not m.learnable_q:
        if m.feat_kd_alpha == 0:
            yield (
                "method.ib_mbm_query_key=distill_feat needs method.feat_kd_alpha > 0, "
                "else nothing trains the student's adapter"
            )
        if m.feat_kd_key != "distill_feat":
            yield (
                f"method.ib_mbm_query_key=distill_feat with method.feat_kd_key={m.feat_kd_key}: nothing trains the "
                "student's adapter; set feat_kd_key=distill_feat, or ib_mbm_query_key=feat_2d"
            )
        if m.ib_mbm_query_dim not in (None, 0, m.distill_out_dim):
            yield (
                f"method.ib_mbm_query_dim={m.ib_mbm_query_dim} is not method.distill_out_dim={m.distill_out_dim}, "
                "the width of distill_feat: set it to null"
            )
    if m.feat_kd_alpha > 0 and m.feat_kd_key == "distill_feat":
        if not m.use_distillation_adapter:
            yield "method.feat_kd_key=distill_feat needs method.use_distillation_adapter=true, or feat_kd_key=feat_2d"
        if m.distill_out_dim != m.ib_mbm_out_dim:
            yield (
                f"method.distill_out_dim={m.distill_out_dim} and method.ib_mbm_out_dim={m.ib_mbm_out_dim} differ: "
                "feature distillation compares vectors of these widths"
            )


def _freezing(config: Sections) -> Iterator[str]:
    m = config.method
    levels = m.student_freeze_schedule
    if levels is not None and len(levels) != m.num_stages:
        yield (
            f"method.student_freeze_schedule has {len(levels)} entries for method.num_stages={m.num_stages}: "
            "give one level for each stage"
        )
    trained = {m.student_freeze_level} if levels is None else set(levels)
    if m.use_partial_freeze and m.feat_kd_alpha > 0 and m.feat_kd_key == "feat_2d" and trained == {0}:
        yield (
            "method.feat_kd_key=feat_2d with student_freeze_level 0 throughout: the feature comes from what is frozen; "
            "use feat_kd_key=distill_feat, or train a block"
        )
    first, where = (m.student_freeze_level, "level") if levels is None else (levels[0], "schedule")
    if m.use_partial_freeze and first != -1 and not config.model.student.pretrained:
        yield (
            f"method.student_freeze_{where} freezes at level {first} in stage 1 a student without pretrained weights: "
            "begin with -1"
        )
    if m.teacher_bn_head_only and m.teacher_freeze_scope is not None:
        yield (
            f"method.teacher_bn_head_only and method.teacher_freeze_scope={m.teacher_freeze_scope} name different "
            "parts to train: give one"
        )
    if m.use_teacher_finetuning and m.teacher_ce_alpha == 0:
        yield "method.use_teacher_finetuning needs method.teacher_ce_alpha > 0, the teachers' own cross-entropy"
    if m.use_teacher_finetuning and not m.uses_fusion:
        yield (
            "method.use_teacher_finetuning trains teachers in A-steps, and here there are none: "
            "use method.kd_target=synergy or auto with method.kd_alpha > 0"
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
            yield f"{given} leaves none of the {epochs} epochs after the warm-up"
        if schedule.type == "cosine" and schedule.min_lr > peak:
            yield f"{where}.min_lr={schedule.min_lr} is above {lr}={peak}, from which the cosine falls"


def _surroundings(config: Sections) -> Iterator[str]:
    if not config.tracking.experiment.strip():
        yield "tracking.experiment is empty: name an experiment, such as asib"
    if config.dataset.name == "npz" and not config.dataset.path:
        yield "dataset.name=npz needs dataset.path, the file with x_train, y_train, x_test and y_test"
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
