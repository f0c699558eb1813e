"""Keys that were changed from their default and cannot act in a configuration: named once, at the start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.config.later import DEPENDENTS, TEACHER_FREEZING

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pipeline.config.schema import Config

OFF: dict[str, Any] = {
    "method.kd_loss": "kl",
    "method.kd_sample_gate": False,
    "method.use_disagree_weight": False,
    "method.use_cccp": False,
    "method.feat_kd_alpha": 0.0,
    "method.use_partial_freeze": False,
    "method.use_teacher_finetuning": False,
    "method.use_loss_clamp": False,
    "optim.ema_decay": None,
}
"""The value at which a switch of `DEPENDENTS` leaves its dependents without meaning."""

ONLY_WITH_TEACHERS = (
    "kd_warmup_epochs",
    "kd_cooldown_epochs",
    "kd_max_ratio",
    "kd_uncertainty_weight",
    "kd_sample_gate",
    "kd_two_view_start_epoch",
    "kd_two_view_stop_epoch",
    "use_disagree_weight",
    "teacher_weights",
    "kd_loss",
    "kd_view",
    "tau",
    "tau_schedule",
)
ONLY_WITH_FUSION = (
    "enable_kd_after_syn_acc",
    "synergy_only_epochs",
    "teacher_adapt_kd_warmup",
    "beta_schedule",
    "ib_epochs_per_stage",
    "learnable_q",
    "use_cccp",
    "synergy_eval_teacher_indices",
    "tau_syn",
    "synergy_logit_scale",
    "use_mu_for_kd",
    "use_ib",
    "ib_beta",
    "ib_beta_warmup_epochs",
    "ib_mbm_query_key",
    "ib_mbm_query_dim",
    "ib_mbm_n_head",
    "ib_mbm_feature_norm",
    "ib_mbm_logvar_clip",
    "ib_mbm_min_std",
    "ib_mbm_lr_factor",
    "ib_mbm_reg_lambda",
    "synergy_head_dropout",
    "synergy_temp_learnable",
    "synergy_temp_init",
    "synergy_ce_alpha",
    "teacher_adapt_alpha_kd",
    "min_cw",
    "max_cw",
    "teacher_eval_every",
    "synergy_ema_alpha",
    "label_smoothing",
)


def inactive(config: Config) -> list[str]:
    """One sentence for each key that was changed and cannot act here; the key comes first."""
    return [*_switched_off(config), *_epochs(config), *_overruled(config)]


def _changed(section: BaseModel, name: str) -> bool:
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def _switched_off(config: Config) -> Iterator[str]:
    from pipeline.config.rules import is_gated, needs_distillation, uses_fusion

    m = config.method
    if not needs_distillation(config):
        yield from (f"method.{key}: nothing is distilled" for key in ONLY_WITH_TEACHERS if _changed(m, key))
    if not uses_fusion(config):
        yield from (f"method.{key}: nothing uses the fusion" for key in ONLY_WITH_FUSION if _changed(m, key))
    for switch, off in OFF.items():
        group, key = switch.split(".")
        section = getattr(config, group)
        if getattr(section, key) == off:
            shown = "null" if off is None else str(off).lower()
            for dependent in DEPENDENTS[switch]:
                if _changed(section, dependent):
                    yield f"{group}.{dependent}: {switch} is {shown}"
    if m.use_teacher_finetuning and not m.use_partial_freeze:
        yield from (f"method.{key}: method.use_partial_freeze is false" for key in TEACHER_FREEZING if _changed(m, key))
    if not m.use_ib:
        for key in (
            "ib_beta_warmup_epochs",
            "beta_schedule",
            "ib_epochs_per_stage",
            "min_cw",
            "max_cw",
            "use_mu_for_kd",
        ):
            if _changed(m, key):
                yield f"method.{key}: method.use_ib is false"
    if m.kd_target != "auto" and _changed(m, "kd_ens_alpha_max"):
        yield "method.kd_ens_alpha_max: method.kd_target is not auto"
    auto = m.kd_target == "auto"
    if auto and m.teacher_adapt_kd_warmup:
        yield "method.teacher_adapt_kd_warmup: method.kd_target=auto has its own share of the averaged teachers"
    if not auto and _changed(m, "kd_ens_alpha") and (m.kd_target != "synergy" or not m.teacher_adapt_kd_warmup):
        yield "method.kd_ens_alpha: nothing mixes synergy targets with averaged ones"
    if not m.synergy_temp_learnable and _changed(m, "synergy_temp_init"):
        yield "method.synergy_temp_init: method.synergy_temp_learnable is false"
    if not is_gated(config) and m.gate_source == "ema":
        yield "method.gate_source: method.enable_kd_after_syn_acc is 0"
    if not config.augment.crop_flip and config.augment.pad_mode != "zero":
        yield "augment.pad_mode: augment.crop_flip is false"
    if config.dataset.name == "image_folder":
        if config.augment.crop_flip and config.augment.pad_mode != "zero":
            yield "augment.pad_mode: dataset.name=image_folder crops without padding"
    else:
        for key in ("image_size", "workers"):
            if _changed(config.dataset, key):
                yield f"dataset.{key}: dataset.name is not image_folder"
    if _changed(config.optim, "grad_scaler_init_scale") and config.optim.amp_dtype != "float16":
        yield "optim.grad_scaler_init_scale: optim.amp_dtype is not float16"
    if config.extend and not config.resume:
        yield "extend: nothing is resumed"
    for i, teacher in enumerate(config.model.teachers):
        if _changed(teacher, "efficientnet_dropout") and "efficientnet" not in teacher.name:
            yield f"model.teachers.{i}.efficientnet_dropout: {teacher.name} is no EfficientNet"


def _epochs(config: Config) -> Iterator[str]:
    """Warm-ups past the end, and parts of the run that never come."""
    from pipeline.config.rules import needs_distillation, uses_fusion

    m = config.method
    b_epochs = sum(m.student_epochs_per_stage)
    a_epochs = m.num_stages * m.teacher_adapt_epochs if uses_fusion(config) else 0
    if needs_distillation(config):
        for key in ("kd_warmup_epochs", "teacher_adapt_kd_warmup", "kd_two_view_start_epoch"):
            value = getattr(m, key)
            if value is not None and value >= b_epochs:
                yield f"method.{key}={value}: the run has {b_epochs} B-epochs"
        if m.kd_max_ratio is not None and m.kd_warmup_epochs >= b_epochs:
            yield "method.kd_max_ratio: it begins after method.kd_warmup_epochs, past the end of the run"
    if m.use_loss_clamp and m.loss_clamp_warmup_epochs >= b_epochs:
        yield f"method.loss_clamp_warmup_epochs={m.loss_clamp_warmup_epochs}: the run has {b_epochs} B-epochs"
    if 0 < a_epochs <= m.synergy_only_epochs:
        yield f"method.synergy_only_epochs={m.synergy_only_epochs}: the run has {a_epochs} A-epochs, all CE only"
    ib_epochs = a_epochs - m.synergy_only_epochs
    if m.use_ib and m.beta_schedule is None and 0 < ib_epochs <= m.ib_beta_warmup_epochs:
        yield f"method.ib_beta_warmup_epochs={m.ib_beta_warmup_epochs}: {ib_epochs} A-epochs use method.ib_beta"
    if m.ib_epochs_per_stage == 0 and a_epochs:
        yield "method.ib_epochs_per_stage=0: method.ib_beta acts in no A-epoch"
    if m.use_cccp and m.cccp_alpha == 0 and a_epochs:
        yield "method.use_cccp: method.cccp_alpha is 0, and the A-step has no distillation term at all"
    if m.ib_epochs_per_stage is not None and a_epochs and m.ib_epochs_per_stage >= m.teacher_adapt_epochs:
        yield f"method.ib_epochs_per_stage={m.ib_epochs_per_stage}: a stage has {m.teacher_adapt_epochs} A-epochs"
    for where, schedule, epochs in (
        ("schedule", config.schedule, b_epochs),
        ("finetune.schedule", config.finetune.schedule, config.finetune.epochs),
    ):
        if schedule.type == "cosine" and schedule.milestones:
            yield f"{where}.milestones: {where}.type is cosine"
        past = [epoch for epoch in schedule.milestones if epoch >= epochs]
        if schedule.type == "step" and past and epochs:
            yield f"{where}.milestones: {past} lie past the {epochs} epochs"


def _overruled(config: Config) -> Iterator[str]:
    """Keys over which another key takes precedence."""
    m = config.method
    if m.cutmix_alpha_distill > 0 and m.mixup_alpha > 0:
        yield "method.mixup_alpha: CutMix takes precedence"
    if m.kd_view == "mixed" and m.cutmix_alpha_distill == 0 and m.mixup_alpha == 0:
        yield "method.kd_view: nothing is mixed"
    floor = math.exp(-m.ib_mbm_logvar_clip / 2)
    if m.use_ib and m.ib_mbm_min_std > floor:
        yield f"method.ib_mbm_logvar_clip: its smallest sigma {floor:.3g} lies below method.ib_mbm_min_std"
    if m.tau_schedule is not None and _changed(m, "tau"):
        yield "method.tau: method.tau_schedule takes precedence"
    if m.beta_schedule is not None:
        for key in ("ib_beta", "ib_beta_warmup_epochs"):
            if _changed(m, key):
                yield f"method.{key}: method.beta_schedule takes precedence"
    if m.teacher_adapt_kd_warmup and m.kd_ens_alpha == 0 and m.kd_target != "auto":
        yield "method.teacher_adapt_kd_warmup: method.kd_ens_alpha is 0"
    if m.learnable_q and (m.ib_mbm_query_key != "feat_2d" or m.ib_mbm_query_dim):
        yield "method.ib_mbm_query_key, ib_mbm_query_dim: method.learnable_q takes their place"
    if m.use_partial_freeze and m.student_freeze_schedule is not None and _changed(m, "student_freeze_level"):
        yield "method.student_freeze_level: method.student_freeze_schedule takes precedence"
