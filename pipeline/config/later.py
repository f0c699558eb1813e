"""Keys whose feature does not exist yet: refused, never accepted and ignored. Features that arrive leave this file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.schema import Config

ONLY_FOR_NOW: dict[str, tuple[Any, ...]] = {
    "method.name": ("asib",),
}
"""Keys whose other values are refused until their feature exists: never accepted and ignored."""

TEACHER_FREEZING = ("teacher_freeze_level", "teacher_freeze_bn", "teacher_bn_head_only", "teacher_freeze_scope")
DEPENDENTS = {
    "method.kd_loss": ("dkd_alpha", "dkd_beta", "dkd_warmup_epochs"),
    "method.kd_sample_gate": ("kd_sample_thr", "kd_sample_min_ratio", "kd_sample_max_ratio", "kd_sample_reweight"),
    "method.use_disagree_weight": ("disagree_mode", "disagree_lambda_high", "disagree_lambda_low"),
    "method.use_cccp": ("cccp_alpha",),  # nt and ns act without it too: CCCP's control has them
    "method.feat_kd_alpha": ("feat_kd_key", "feat_kd_norm", "feat_kd_huber_beta", "feat_kd_clip"),
    "method.use_partial_freeze": (
        "student_freeze_level",
        "student_freeze_schedule",
        "student_freeze_bn",
    ),
    "method.use_teacher_finetuning": ("teacher_ce_alpha", "reg_lambda", *TEACHER_FREEZING),
    "method.use_loss_clamp": (
        "loss_clamp_mode",
        "loss_clamp_max",
        "loss_clamp_warmup_epochs",
        "disable_loss_clamp_in_a",
    ),
    "method.kd_target": ("kd_ens_alpha_max",),
    "optim.ema_decay": ("ema_update_every",),
}
"""Keys that only their switch gives a meaning: with a switch of `ONLY_FOR_NOW` they too are refused."""


def check_later(config: Config) -> None:
    """Raise ValueError for the first key that asks for a feature which does not exist yet."""
    for name, allowed in ONLY_FOR_NOW.items():
        group, key = name.split(".")
        section = getattr(config, group)
        value = getattr(section, key)
        if value not in allowed:
            choices = " or ".join(map(_shown, allowed))
            raise ValueError(f"{name}={_shown(value)}: not implemented yet; for now {choices}")
        for dependent in DEPENDENTS.get(name, ()):
            value, default = getattr(section, dependent), type(section).model_fields[dependent].default
            if value != default:
                full = f"{group}.{dependent}"
                raise ValueError(f"{full}={_shown(value)}: not implemented yet; leave it at {_shown(default)}")


def _shown(value: Any) -> str:
    """As it is written in YAML and in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)
