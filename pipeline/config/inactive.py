"""Keys that differ from their default but cannot act in a configuration: named once, at the start."""

import math
from collections.abc import Iterator

from pipeline.config.base import conditions, leaves
from pipeline.config.sections import Sections


def inactive(config: Sections) -> list[str]:
    """One sentence for each changed key that cannot act in this configuration, beginning with the key."""
    return [*_conditions_not_met(config), *_epochs(config)]


def _conditions_not_met(config: Sections) -> Iterator[str]:
    for prefix, section, name in leaves(config):
        field = type(section).model_fields[name]
        if getattr(section, name) != field.default:
            reasons = (condition(section, prefix) for condition in conditions(field))
            if reason := next(filter(None, reasons), None):
                yield f"{prefix}{name}: {reason}"
    if config.dataset.name == "image_folder" and config.augment.crop_flip and config.augment.pad_mode != "zero":
        yield "augment.pad_mode: dataset.name=image_folder crops without padding"


def _epochs(config: Sections) -> Iterator[str]:
    """Keys for warm-ups that outlast the run, or for epochs that it never reaches."""
    m = config.method
    b_epochs = sum(m.student_epochs_per_stage)
    a_epochs = m.num_stages * m.teacher_adapt_epochs if m.uses_fusion else 0
    if m.distils:
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
    floor = math.exp(-m.ib_mbm_logvar_clip / 2)
    if m.use_ib and m.ib_mbm_min_std > floor:
        yield f"method.ib_mbm_logvar_clip: its smallest sigma {floor:.3g} lies below method.ib_mbm_min_std"
    for where, schedule, epochs in (
        ("schedule", config.schedule, b_epochs),
        ("finetune.schedule", config.finetune.schedule, config.finetune.epochs),
    ):
        past = [epoch for epoch in schedule.milestones if epoch >= epochs]
        if schedule.type == "step" and past and epochs:
            yield f"{where}.milestones: {past} lie past the {epochs} epochs"
