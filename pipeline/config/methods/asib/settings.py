"""ASIB's keys (docs/method.md sections 1 to 4)."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from pipeline.config.base import key, unless
from pipeline.config.methods.asib import rules
from pipeline.config.methods.asib.rules import FUSED_TARGETS
from pipeline.config.methods.base import MethodConfig, distilled
from pipeline.config.numbers import (
    BelowOne,
    Epoch,
    Epochs,
    Exponent,
    Fraction,
    FreezeLevel,
    Index,
    InputWidth,
    LogVariance,
    NonNegative,
    Positive,
    Stages,
    Width,
)
from pipeline.config.words import written

SMALL_STUDENTS = ("mobilenet_v2", "mobilenetv2", "efficientnet_b0", "shufflenet_v2", "shufflenetv2", "shufflev2")
"""Students whose distillation width defaults to 256 (docs/method.md section 1)."""

GATE = re.compile(r"avg([+-](?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)?", re.IGNORECASE)


def parse_gate(value: Any) -> Any:
    """Give each threshold one spelling, so that hashes agree: `"0.8"` -> 0.8, `"avg - .020"` -> `"avg-0.02"`."""
    text = value.replace(" ", "").lower() if isinstance(value, str) else ""
    with contextlib.suppress(ValueError):
        value = float(text)
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value <= 1:
        raise ValueError(
            f"method.enable_kd_after_syn_acc={written(value)[:80]} is a fraction: give a number in [0, 1] or avg-0.02"
        )
    if not isinstance(value, str):
        return value
    match = GATE.fullmatch(text)
    offset = float(match[1] or 0.0) if match else math.inf
    if abs(offset) > 1:
        raise ValueError(
            f"method.enable_kd_after_syn_acc={value!r} is neither a fraction in [0, 1] nor like avg-0.02 "
            "(relative to the averaged teachers)"
        )
    return f"avg{offset:+}" if offset else "avg"


def gate_offset(value: float | str) -> float | None:
    """`avg-0.02` -> -0.02 (relative to the averaged teachers); None for an absolute threshold."""
    value = parse_gate(value)
    return float(value[3:] or 0.0) if isinstance(value, str) else None


def fused(method: Any, prefix: str) -> str | None:
    """Condition: some term of the B-step uses the fusion."""
    return None if method.uses_fusion else "nothing uses the fusion"


def _mixed_targets(method: Any, prefix: str) -> str | None:
    acts = method.kd_target == "auto" or (method.kd_target == "synergy" and method.teacher_adapt_kd_warmup)
    return None if acts else "nothing mixes synergy targets with averaged ones"


def _own_share(method: Any, prefix: str) -> str | None:
    if method.kd_target == "auto":
        return "method.kd_target=auto has its own share of the averaged teachers"
    return None if method.kd_ens_alpha else "method.kd_ens_alpha is 0"


_TEACHERS_FROZEN = ("use_teacher_finetuning", "use_partial_freeze")
Feature = Literal["feat_2d", "distill_feat"]
Normalisation = Literal["none", "l2"]


class AsibConfig(MethodConfig):
    """ASIB: stages, fusion, targets, weights, gates."""

    step: ClassVar[str] = "pipeline.training.methods.asib.b_step:BStep"
    task: ClassVar[str] = "pipeline.training.methods.asib.task:AsibDistillation"
    teachers: ClassVar[tuple[int, int | None]] = (0, None)
    compares_logits: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    name: Literal["asib"] = key("asib", "distillation method")
    # stages
    num_stages: Stages = key(1, "stages, each an A-step followed by a B-step")
    teacher_adapt_epochs: Epochs = key(5, "A-epochs of each stage; 0: no A-steps")
    synergy_only_epochs: Epochs = key(0, "A-epochs at the start of the run that use cross-entropy only", when=fused)
    # weights and targets of the B-step
    kd_alpha: NonNegative = key(
        0.0, "weight of distillation in the B-step (and in the A-step unless teacher_adapt_alpha_kd is set)"
    )
    renorm_ce_kd: bool = key(False, "rescale ce_alpha and kd_alpha to sum to 1, before the configuration is locked")
    kd_target: Literal["avg", "weighted_conf", "synergy", "auto", "auto_min"] = key(
        "synergy", "target that the student learns from"
    )
    kd_loss: Literal["kl", "dkd"] = key("kl", "form of the distillation loss", when=distilled)
    dkd_alpha: NonNegative = key(1.0, "weight of DKD's target-class term", when="kd_loss=dkd")
    dkd_beta: NonNegative = key(8.0, "weight of DKD's non-target-class term", when="kd_loss=dkd")
    dkd_warmup_epochs: Epochs = key(
        0, "B-epochs over which DKD's weight rises to 1; 20 in its paper", when="kd_loss=dkd"
    )
    tau: Positive = key(4.0, "temperature of distillation", when=(distilled, unless("tau_schedule")))
    tau_schedule: tuple[Positive, Positive] | None = key(
        None, "[start, end] of a temperature that is linear over the run", when=distilled
    )
    tau_syn: Positive | None = key(4.0, "temperature of synergy targets; null: that of distillation", when=fused)
    synergy_logit_scale: Positive = key(1.0, "factor on the synergy head's logits", when=fused)
    use_mu_for_kd: bool = key(
        True, "compute synergy targets from the mean of z; false: from a sample of z", when=(fused, "use_ib")
    )
    teacher_weights: Literal["equal"] | tuple[NonNegative, ...] = key(
        "equal", "weight of each teacher in the average", when=distilled
    )
    kd_ens_alpha: Fraction = key(0.0, "share of the averaged teachers in mixed targets", when=_mixed_targets)
    kd_ens_alpha_max: Fraction = key(
        0.8, "share of the averaged teachers at the gate's threshold", when="kd_target=auto"
    )
    hybrid_beta: NonNegative = key(0.0, "weight of an additional distillation term from the averaged teachers")
    teacher_adapt_kd_warmup: Epochs = key(
        0, "B-epochs at the start in which averaged targets are mixed into synergy targets", when=(fused, _own_share)
    )
    kd_uncertainty_weight: Fraction = key(
        0.0, "how strongly a target's entropy lowers its sample's weight", when=distilled
    )
    enable_kd_after_syn_acc: float | str = key(
        0.0, "gate: synergy accuracy from which synergy targets are used, a fraction or like avg-0.02", when=fused
    )
    gate_source: Literal["snapshot", "ema"] = key(
        "snapshot", "synergy accuracy that the gate reads: the latest or its moving average",
        when="enable_kd_after_syn_acc",
    )  # fmt: skip
    # fusion
    use_ib: bool = key(True, "use an information bottleneck; false: a deterministic fusion", when=fused)
    ib_beta: NonNegative = key(1e-3, "weight of the bottleneck's KL term", when=(fused, unless("beta_schedule")))
    ib_beta_warmup_epochs: Epochs = key(
        0, "A-epochs over which ib_beta rises from 0", when=(fused, "use_ib", unless("beta_schedule"))
    )
    beta_schedule: tuple[NonNegative, NonNegative, Positive] | None = key(
        None, "[start, end, A-epochs] of a linear schedule in place of ib_beta", when=(fused, "use_ib")
    )
    ib_epochs_per_stage: Epochs | None = key(
        None, "A-epochs of a stage after which the KL term's weight is 0; null: never", when=(fused, "use_ib")
    )
    ib_mbm_query_key: Feature = key(
        "feat_2d", "student feature that queries the fusion", when=(fused, unless("learnable_q"))
    )
    ib_mbm_query_dim: InputWidth | None = key(
        None, "width of the query; null or 0: that of the student's feature", when=(fused, unless("learnable_q"))
    )
    ib_mbm_out_dim: Width = key(512, "width of the fusion")
    ib_mbm_n_head: Width = key(4, "attention heads of the fusion", when=fused)
    ib_mbm_feature_norm: Normalisation = key("none", "normalisation of the fusion's inputs", when=fused)
    ib_mbm_logvar_clip: LogVariance = key(10.0, "upper bound of the log variance's absolute value", when=fused)
    ib_mbm_min_std: NonNegative = key(1e-4, "lower bound of the standard deviation", when=fused)
    ib_mbm_lr_factor: Positive = key(1.0, "learning rate of the fusion relative to optim.a_step_lr", when=fused)
    ib_mbm_reg_lambda: NonNegative = key(0.0, "weight of a mean-square penalty on the fusion's parameters", when=fused)
    learnable_q: bool = key(False, "query the fusion with one learned token instead of the student", when=fused)
    synergy_head_dropout: BelowOne = key(0.0, "dropout of the synergy head", when=fused)
    synergy_temp_learnable: bool = key(False, "learn a temperature of the synergy head", when=fused)
    synergy_temp_init: Exponent = key(
        0.0, "logarithm of the learned temperature's initial value", when=(fused, "synergy_temp_learnable")
    )
    use_cccp: bool = key(False, "use the concave-convex procedure in the A-step", when=fused)
    cccp_alpha: NonNegative = key(0.25, "weight of the concave-convex procedure's term", when="use_cccp")
    # these two also act without use_cccp: CCCP's control has them
    cccp_nt: Stages = key(1, "updates of the fusion per A-batch")
    cccp_ns: Stages = key(1, "updates of the student per B-batch")
    # the A-step
    synergy_ce_alpha: NonNegative = key(0.6, "weight of the synergy head's cross-entropy", when=fused)
    teacher_adapt_alpha_kd: NonNegative | None = key(
        None, "weight of distillation in the A-step; null: kd_alpha", when=fused
    )
    teacher_ce_alpha: NonNegative = key(
        0.0, "weight of each fine-tuned teacher's own cross-entropy", when="use_teacher_finetuning"
    )
    min_cw: NonNegative = key(0.1, "lower bound of certainty weights", when=(fused, "use_ib"))
    max_cw: Positive = key(1.0, "upper bound of certainty weights", when=(fused, "use_ib"))
    reg_lambda: NonNegative = key(
        0.0, "weight of a mean-square penalty on trained teacher parameters", when="use_teacher_finetuning"
    )
    teacher_eval_every: Epoch = key(1, "A-epochs between synergy evaluations", when=fused)
    synergy_ema_alpha: BelowOne = key(0.8, "smoothing factor of the synergy accuracy's moving average", when=fused)
    synergy_eval_teacher_indices: tuple[Index, ...] | None = key(
        None, "indices of the teachers used in synergy evaluation; null: all", when=fused
    )
    use_teacher_finetuning: bool = key(False, "train the teachers' unfrozen parts in the A-step too")
    use_distillation_adapter: bool = key(True, "bring the teachers' features to one width with adapters")
    distill_out_dim: Width = key(512, "width of the adapters; 256 for small students")
    # feature distillation
    feat_kd_alpha: NonNegative = key(0.0, "weight of feature distillation")
    feat_kd_key: Feature = key("distill_feat", "student feature that is distilled", when="feat_kd_alpha")
    feat_kd_norm: Normalisation = key(
        "none", "normalisation of both features in feature distillation", when="feat_kd_alpha"
    )
    feat_kd_huber_beta: Positive = key(
        1.0, "width of the quadratic part of feature distillation's Huber loss", when="feat_kd_alpha"
    )
    feat_kd_clip: Positive | None = key(
        None, "upper bound of a sample's feature loss; null: no bound", when="feat_kd_alpha"
    )
    # partial freezing
    teacher_freeze_level: FreezeLevel = key(
        0, "what trains in the teachers: as student_freeze_level", when=_TEACHERS_FROZEN
    )
    teacher_freeze_bn: bool = key(True, "freeze the teachers' normalisation layers too", when=_TEACHERS_FROZEN)
    teacher_bn_head_only: bool = key(
        False, "train only the teachers' normalisation layers and head", when=_TEACHERS_FROZEN
    )
    teacher_freeze_scope: Literal["features_classifier"] | None = key(
        None, "named parts of the teachers that train; features_classifier: the whole network, not its adapter",
        when=_TEACHERS_FROZEN,
    )  # fmt: skip
    # regularisation of the data
    label_smoothing: BelowOne = key(0.0, "label smoothing in the A-step", when=fused)
    disable_loss_clamp_in_a: bool = key(False, "do not bound the total loss in A-steps", when="use_loss_clamp")

    @field_validator("enable_kd_after_syn_acc", mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        return parse_gate(value)

    @model_validator(mode="after")
    def _renormalise(self) -> "AsibConfig":
        """Apply `renorm_ce_kd` before the lock; weights that sum to 1 already stay, so that a dump is stable."""
        total = self.ce_alpha + self.kd_alpha
        if self.renorm_ce_kd and total > 0 and abs(total - 1) > 1e-9:
            for name in ("ce_alpha", "kd_alpha"):
                object.__setattr__(self, name, getattr(self, name) / total)
            self.__pydantic_fields_set__.update(("ce_alpha", "kd_alpha"))
        return self

    @property
    def averaging_weights(self) -> list[float] | None:
        """`teacher_weights` as numbers; None: equal."""
        return None if self.teacher_weights == "equal" else list(self.teacher_weights)

    @classmethod
    def derived(cls, given: dict[str, Any], student: str) -> dict[str, Any]:
        if not any(small in student for small in SMALL_STUDENTS):
            return given
        width = given.get("distill_out_dim", 256)
        return {"distill_out_dim": width, "ib_mbm_out_dim": width, **given}

    @property
    def distils(self) -> bool:
        return self.kd_alpha > 0 or self.hybrid_beta > 0 or self.feat_kd_alpha > 0

    @property
    def term_weights(self) -> dict[str, float]:
        return {"kd": self.kd_alpha, "feat": self.feat_kd_alpha, "hybrid": self.hybrid_beta}

    @property
    def uses_fusion(self) -> bool:
        """Whether any term of the B-step uses the fusion; otherwise there are no A-steps."""
        return (self.kd_alpha > 0 and self.kd_target in FUSED_TARGETS) or self.feat_kd_alpha > 0

    @property
    def a_epochs(self) -> int:
        return self.num_stages * self.teacher_adapt_epochs if self.uses_fusion else 0

    @property
    def updates_per_batch(self) -> int:
        return self.cccp_ns

    @property
    def teachers_change(self) -> bool:
        return self.use_teacher_finetuning

    @property
    def adapter_dim(self) -> int | None:
        adapts = self.feat_kd_alpha > 0 and self.feat_kd_key == "distill_feat"  # otherwise nothing would train it
        return self.distill_out_dim if adapts else None

    def rules(self, config: Any) -> Iterator[str]:
        return rules.broken(self, config)

    def inactive(self, config: Any) -> Iterator[str]:
        return rules.inactive(self, config)
