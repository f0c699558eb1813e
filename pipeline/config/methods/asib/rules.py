"""The rules between ASIB's keys, and what its keys cannot do (docs/method.md sections 1 to 4)."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

FUSED_TARGETS = ("synergy", "auto", "auto_min")
"""Targets that come from the fusion."""

MIN_TEMPERATURE = 1e-4
"""Floor of the synergy head's learned temperature (models/ib_mbm.py)."""


def broken(method: Any, config: Any) -> Iterator[str]:
    """One sentence for each rule that `method`, in this configuration, breaks."""
    return chain.from_iterable(group(method, config) for group in (_student_learns, _targets, _fusion, _freezing))


def _student_learns(m: Any, config: Any) -> Iterator[str]:
    teachers = config.model.teachers
    if m.ce_alpha == 0 and m.kd_alpha == 0 and m.hybrid_beta == 0:
        yield (
            f"method.feat_kd_alpha={m.feat_kd_alpha} alone trains the student's features and not its classifier: raise "
            "method.ce_alpha or method.kd_alpha"
        )
    if m.kd_loss == "dkd" and m.kd_alpha > 0 and m.dkd_alpha == 0 and m.dkd_beta == 0:
        yield "method.dkd_alpha and dkd_beta are both 0: kd_loss=dkd would distil nothing; raise one, or use kl"
    weight = next((k for k in ("kd_alpha", "hybrid_beta", "feat_kd_alpha") if getattr(m, k) > 0), "kd_alpha")
    if m.distils and not teachers:
        yield (
            f"method.{weight}={getattr(m, weight)} needs teachers, and model.teachers is empty: "
            f"choose model/teacher=… or set method.{weight}=0"
        )


def _targets(m: Any, config: Any) -> Iterator[str]:
    teachers = config.model.teachers
    if m.teacher_weights != "equal" and teachers:
        if len(m.teacher_weights) != len(teachers):
            given = f"method.teacher_weights={list(m.teacher_weights)}"
            yield f"{given} does not fit: give one for each of {len(teachers)} teachers"
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
    gate = m.enable_kd_after_syn_acc
    reads_accuracy = "method.kd_target=auto" if m.kd_target == "auto" else f"method.enable_kd_after_syn_acc={gate}"
    if (gate != 0 or m.kd_target == "auto") and config.dataset.val_fraction == 0:
        yield f"{reads_accuracy} reads validation accuracy: it needs dataset.val_fraction > 0"


def _fusion(m: Any, config: Any) -> Iterator[str]:
    teachers = config.model.teachers
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


def _freezing(m: Any, config: Any) -> Iterator[str]:
    levels = m.student_freeze_schedule
    trained = {m.student_freeze_level} if levels is None else set(levels)
    if m.use_partial_freeze and m.feat_kd_alpha > 0 and m.feat_kd_key == "feat_2d" and trained == {0}:
        yield (
            "method.feat_kd_key=feat_2d with student_freeze_level 0 throughout: the feature comes from what is frozen; "
            "use feat_kd_key=distill_feat, or train a block"
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


def inactive(m: Any, config: Any) -> Iterator[str]:
    """One sentence for each epoch key that acts in no epoch, or bound that nothing reaches."""
    a_epochs = m.a_epochs
    if m.distils and m.teacher_adapt_kd_warmup >= m.b_epochs:
        yield f"method.teacher_adapt_kd_warmup={m.teacher_adapt_kd_warmup}: the run has {m.b_epochs} B-epochs"
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
