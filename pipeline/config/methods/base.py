"""What all methods have in common: the keys of a B-step, and what a method declares that it needs.

A method's settings subclass `MethodConfig` in a file of their own here (CONTRIBUTING.md, «to add a method»); nothing
else in the configuration knows their names.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pipeline.config.base import Section, key, unless
from pipeline.config.numbers import (
    BelowOne,
    Epochs,
    Fraction,
    FreezeLevel,
    NonNegative,
    Positive,
    Scale,
    Stages,
)

PROTOCOL = ("num_stages", "student_epochs_per_stage", "ce_label_smoothing", "mixup_alpha", "cutmix_alpha_distill")
"""Keys that say how long and on what the student is trained: they stay when another method is chosen, or none."""
RESERVED = frozenset(
    ("ce", "loss", "output", "images", "nonfinite", "weight", "plus", "plus_kd", "sample_gate", "kd_clamped")
)
"""Names of the step's and the loop's own: a method's terms and the parts of its lessons have others."""


def distilled(method: Any, prefix: str) -> str | None:
    """Condition: some term of the B-step uses the teachers."""
    return None if method.distils else "nothing is distilled"


def _mixed_images(method: Any, prefix: str) -> str | None:
    return None if method.mixup_alpha or method.cutmix_alpha_distill else "nothing is mixed"


def _logits(method: Any, prefix: str) -> str | None:
    return None if method.compares_logits or method.plus else f"method={method.name} compares no logits"


class MethodConfig(Section):
    """How the student is distilled: keys that all methods have."""

    step: ClassVar[str]
    """Where the computation is: `package.module:Class`, a `StudentStep`; imported when training begins."""
    task: ClassVar[str] = "pipeline.training.student:Distillation"
    """What drives its epochs: methods with phases of their own have their own."""
    teachers: ClassVar[tuple[int, int | None]] = (1, 1)
    """Fewest and most teachers; None: any number."""
    from_teachers: ClassVar[bool] = True
    """Whether it distils from the configuration's teachers."""
    past: ClassVar[bool] = False
    """Whether it distils from the student as it was before a task of continual learning, as its only teacher."""
    replays: ClassVar[bool] = False
    """Whether it needs what the student said of kept images when they were kept."""
    reads_data: ClassVar[bool] = False
    """Whether it reads the training data besides the batches that it is given."""
    maps: ClassVar[bool] = False
    """Whether it needs feature maps, which the teacher bank does not keep."""
    compares_logits: ClassVar[bool] = False
    """Whether it compares logits, which `standardise` acts on."""
    per_sample: ClassVar[bool] = True
    """Whether its terms are one value per sample, so that samples can be weighted or left out."""
    blends: ClassVar[bool] = False
    """Whether its lessons may be mixed as images are: probability vectors, linear in the share of each image."""

    name: str = key("", "distillation method")
    module: str | None = key(None, "Python module with a method from outside this repository, such as my_lab.my_kd")
    # stages
    num_stages: Stages = key(1, "stages, each with B-epochs of its own")
    student_epochs_per_stage: tuple[Epochs, ...] = key((20,), "B-epochs of each stage")
    # weights
    ce_alpha: NonNegative = key(1.0, "weight of cross-entropy in the B-step")
    kd_alpha: NonNegative = key(1.0, "weight of the method's main term in the B-step")
    plus: tuple[Literal["kd"], ...] = key((), "terms beside the method's own; kd: distillation from (averaged) logits")
    plus_alpha: NonNegative = key(1.0, "weight of the terms in plus", when="plus")
    plus_tau: Positive = key(4.0, "temperature of the terms in plus", when="plus")
    standardise: bool = key(False, "standardise logits before they are compared", when=(distilled, _logits))
    kd_view: Literal["clean", "mixed"] = key(
        "clean", "version of a mixed batch that teachers see", when=(distilled, _mixed_images)
    )
    kd_warmup_epochs: Epochs = key(0, "B-epochs over which the distillation weight rises to 1", when=distilled)
    kd_max_ratio: Positive | None = key(
        None, "upper bound of the weighted distillation term relative to cross-entropy", when=distilled
    )
    kd_cooldown_epochs: Epochs = key(0, "B-epochs without distillation at the end", when=distilled)
    # samples
    kd_sample_gate: bool = key(False, "distil only samples on which the student is unsure", when=distilled)
    kd_sample_thr: Fraction = key(0.85, "student confidence below which a sample is distilled", when="kd_sample_gate")
    kd_sample_min_ratio: Fraction = key(0.1, "smallest share of a batch to distil", when="kd_sample_gate")
    kd_sample_max_ratio: Fraction = key(0.5, "largest share of a batch to distil", when="kd_sample_gate")
    kd_sample_reweight: bool = key(
        True, "multiply distillation by the batch size over the number of samples distilled", when="kd_sample_gate"
    )
    kd_two_view_start_epoch: Epochs | None = key(
        None, "first B-epoch whose target is the mean over two views", when=distilled
    )
    kd_two_view_stop_epoch: Epochs | None = key(None, "first B-epoch that uses a single view again", when=distilled)
    use_disagree_weight: bool = key(False, "weight samples by the teachers' disagreement", when=distilled)
    disagree_mode: Literal["pred", "both_wrong"] = key(
        "pred", "when teachers disagree: their predictions differ, or all are wrong", when="use_disagree_weight"
    )
    disagree_lambda_high: NonNegative = key(
        1.0, "weight of samples on which teachers disagree", when="use_disagree_weight"
    )
    disagree_lambda_low: NonNegative = key(1.0, "weight of samples on which teachers agree", when="use_disagree_weight")
    # partial freezing
    use_partial_freeze: bool = key(False, "train only parts of the networks")
    student_freeze_level: FreezeLevel = key(
        -1, "what trains in the student: -1 everything, 0 the head, 1 also the last block, 2 also the last two",
        when=("use_partial_freeze", unless("student_freeze_schedule")),
    )  # fmt: skip
    student_freeze_schedule: tuple[FreezeLevel, ...] | None = key(
        None, "student_freeze_level of each stage", when="use_partial_freeze"
    )
    student_freeze_bn: bool = key(False, "freeze the student's normalisation layers too", when="use_partial_freeze")
    # regularisation
    ce_label_smoothing: BelowOne = key(0.0, "label smoothing in the B-step")
    mixup_alpha: NonNegative = key(0.0, "MixUp's alpha in the B-step; 0: no MixUp", when=unless("cutmix_alpha_distill"))
    cutmix_alpha_distill: NonNegative = key(
        0.0, "CutMix's alpha in the B-step, takes precedence over MixUp; 0: no CutMix"
    )
    use_loss_clamp: bool = key(False, "bound the total loss")
    loss_clamp_mode: Literal["hard", "soft"] = key(
        "soft",
        "how the total loss is bounded; hard: cut off, soft: logarithmic beyond the bound",
        when="use_loss_clamp",
    )
    loss_clamp_max: Scale = key(1000.0, "upper bound of the total loss", when="use_loss_clamp")
    loss_clamp_warmup_epochs: Epochs = key(
        0, "B-epochs at the start in which the total loss is not bounded", when="use_loss_clamp"
    )

    # what the rest of the code asks

    @classmethod
    def derived(cls, given: dict[str, Any], student: str) -> dict[str, Any]:
        """The given keys with defaults that follow from them and the student's name; the same dict if none do."""
        return given

    @property
    def distils(self) -> bool:
        """Whether any term of the B-step uses the teachers."""
        return self.kd_alpha > 0 or bool(self.plus)

    @property
    def taught(self) -> bool:
        """Whether it needs the configuration's teachers."""
        return self.distils and self.from_teachers

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each of its terms in the B-step, by the names that the terms are computed and logged under."""
        return {self.name: self.kd_alpha}

    @property
    def preacts(self) -> tuple[bool, bool]:
        """Whether it takes the student's and the teachers' maps before their ReLU, where the networks give them."""
        return False, False

    @property
    def b_epochs(self) -> int:
        """Epochs in which the student is trained."""
        return sum(self.student_epochs_per_stage)

    @property
    def a_epochs(self) -> int:
        """Epochs of phases of its own that run the teachers."""
        return 0

    @property
    def updates_per_batch(self) -> int:
        """Updates of the student per B-batch."""
        return 1

    @property
    def backward_beside_updates(self) -> float:
        """What going back through one of the student's forward passes outside updates costs, in forward passes."""
        return 0.0

    @property
    def teachers_change(self) -> bool:
        """Whether it trains the teachers too."""
        return False

    @property
    def adapter_dim(self) -> int | None:
        """Width of the adapter that the student needs; None: it needs none."""
        return None

    @property
    def averaging_weights(self) -> list[float] | None:
        """The weight of each teacher where they are averaged; None: equal."""
        return None

    @property
    def mixes(self) -> bool:
        """Whether B-batches are mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha_distill > 0

    def rules(self, config: Any) -> Iterator[str]:
        """One sentence for each rule of its own that a whole configuration breaks."""
        yield from ()

    def inactive(self, config: Any) -> Iterator[str]:
        """One sentence for each of its keys that cannot act, beside what the keys' conditions say."""
        yield from ()
