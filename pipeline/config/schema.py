"""The configuration schema: every key of docs/method.md section 10, with its type, range and default.

A `Config` is validated once, then immutable; it is the only configuration object that the code sees.
Descriptions are what `--help` prints.
"""

import warnings
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.datasets import DATASETS
from pipeline.config.numbers import (
    AtLeastOne,
    BatchSize,
    Epoch,
    Epochs,
    Exponent,
    Fraction,
    Gigabytes,
    Index,
    InputWidth,
    LogVariance,
    NonNegative,
    Pixels,
    Positive,
    Processes,
    Scale,
    Seconds,
    Seed,
    Stages,
    Threads,
    Width,
)
from pipeline.paths import is_plain

Deviation = Annotated[float, Field(gt=0, le=1)]
FreezeLevel = Annotated[int, Field(ge=-1, le=2)]


def key(default: Any, description: str) -> Any:
    """A field with its default and the sentence that `--help` prints."""
    return Field(default=default, description=description)


class Section(BaseModel):
    """One immutable group of keys; unknown keys are an error."""

    # a run name of digits is a text: YAML and overrides give it as a number
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is not the number 1, in a list neither: pydantic would take it for one."""
        if isinstance(value, str) and not is_plain(value):
            raise PydanticCustomError("no_text", "no text")
        items = value if isinstance(value, list | tuple) else (value,)
        annotation = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(item, bool) for item in items) and "bool" not in str(annotation):
            raise PydanticCustomError("bool_for_number", "true and false are no numbers")
        return value


class DatasetConfig(Section):
    """What is learned, and how it is split (docs/method.md section 3)."""

    name: Literal[*DATASETS] = key("cifar100_sample", "data set; the first is bundled")  # type: ignore[valid-type]
    root: str = key("data", "folder of the torchvision layout; of image_folder: with train/<class>/ and val/<class>/")
    path: str | None = key(None, "the file of dataset.name=npz (x_train, y_train, x_test, y_test; uint8 NHWC)")
    download: bool = key(False, "fetch a missing data set with torchvision")
    image_size: Pixels = key(224, "pixels of a side that image_folder is brought to")
    workers: Processes | None = key(None, "processes that decode image_folder; null: one a thread, at most 8; 0: none")
    mean: tuple[Fraction, ...] | None = key(
        None, "per channel, of images scaled to 0 … 1: what is subtracted; null: the data set's own"
    )
    std: tuple[Deviation, ...] | None = key(None, "per channel: what the rest is divided by; null: the data set's own")
    batch_size: BatchSize = key(128, "images per update, over all processes")
    eval_batch_size: BatchSize = key(500, "images per forward pass in evaluation")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = key(
        0.1, "share of the training images held out for validation; 0 for the published KD protocol"
    )
    split_seed: Seed = key(0, "with the data digest, fixes which images are validation images")
    small_input: Literal["auto"] | bool = key("auto", "adapt network stems to small images; auto: up to 64 px")


class StudentConfig(Section):
    """The network that is kept."""

    name: str = key("cifar_resnet8x4", "any timm classifier, cifar_* network or alias")
    pretrained: bool = key(False, "start from timm's pretrained weights")


class TeacherConfig(Section):
    """One teacher; without a checkpoint it is fine-tuned (or found among those already fine-tuned)."""

    name: str = key("cifar_resnet32x4", "any timm classifier, cifar_* network or alias")
    pretrained: bool = key(True, "fine-tuning starts from timm's pretrained weights")
    checkpoint: str | None = key(None, "weights to use as they are: a file or runs:/<id>")
    efficientnet_dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.3, "dropout before an EfficientNet's classifier")

    @model_validator(mode="before")
    @classmethod
    def _no_weights_of_cifar_networks(cls, data: Any) -> Any:
        """cifar_* networks have no published weights: unless asked for (and then refused), none are loaded."""
        if isinstance(data, dict) and str(data.get("name", cls.model_fields["name"].default)).startswith("cifar_"):
            return {"pretrained": False, **data}
        return data


def _number(index: Any) -> int:
    return int(index) if str(index).isdecimal() else -1


class ModelConfig(Section):
    """Student and teachers."""

    student: StudentConfig = key(StudentConfig(), "the student")
    teachers: tuple[TeacherConfig, ...] = key((), "the teachers, in order; empty: the student alone")

    @field_validator("teachers", mode="before")
    @classmethod
    def _teachers_by_index(cls, value: Any) -> Any:
        """`{0: {...}, 1: {...}}`, as overrides of single list items leave it, means the list."""
        if isinstance(value, dict) and sorted(map(str, value), key=_number) == [str(i) for i in range(len(value))]:
            return [value[k] for k in sorted(value, key=_number)]
        return value


class MethodConfig(Section):
    """ASIB: stages, fusion, targets, weights, gates (docs/method.md sections 1 to 4)."""

    name: str = key("asib", "the distillation method")
    # stages
    num_stages: Stages = key(1, "how often an A-step and a B-step follow each other")
    student_epochs_per_stage: tuple[Epochs, ...] = key((20,), "B-epochs of each stage")
    teacher_adapt_epochs: Epochs = key(5, "A-epochs of each stage; 0 skips A-steps")
    synergy_only_epochs: Epochs = key(0, "first A-epochs of the run with cross-entropy only")
    # weights and targets of the B-step
    ce_alpha: NonNegative = key(1.0, "weight of cross-entropy in the B-step")
    kd_alpha: NonNegative = key(0.0, "weight of distillation in the B-step (and in the A-step unless set there)")
    renorm_ce_kd: bool = key(False, "rescale ce_alpha + kd_alpha to 1 before the configuration is locked")
    kd_target: Literal["avg", "weighted_conf", "synergy", "auto", "auto_min"] = key(
        "synergy", "what the student learns"
    )
    kd_loss: Literal["kl", "dkd"] = key("kl", "form of the distillation loss")
    dkd_alpha: NonNegative = key(1.0, "weight of DKD's target-class part")
    dkd_beta: NonNegative = key(8.0, "weight of DKD's other-classes part")
    dkd_warmup_epochs: Epochs = key(0, "B-epochs in which DKD's weight rises to 1; 20 in its paper")
    kd_view: Literal["clean", "mixed"] = key("clean", "what teachers and fusion see of a mixed batch")
    tau: Positive = key(4.0, "temperature")
    tau_schedule: tuple[Positive, Positive] | None = key(None, "[start, end]: temperature linear over the run")
    tau_syn: Positive = key(4.0, "temperature of synergy targets")
    synergy_logit_scale: Positive = key(1.0, "factor on the synergy head's logits")
    use_mu_for_kd: bool = key(True, "synergy targets from the mean; false: from sampled z")
    teacher_weights: Literal["equal"] | tuple[NonNegative, ...] = key("equal", "weights of the averaged teachers")
    kd_ens_alpha: Fraction = key(0.0, "share of the averaged teachers in mixed targets")
    kd_ens_alpha_max: Fraction = key(0.8, "that share at the gate's threshold (kd_target=auto)")
    hybrid_beta: NonNegative = key(0.0, "weight of an additional distillation from the averaged teachers")
    kd_warmup_epochs: Epochs = key(0, "B-epochs in which the distillation weight rises to 1")
    teacher_adapt_kd_warmup: Epochs = key(0, "first B-epochs in which synergy targets are mixed with averaged ones")
    kd_max_ratio: Positive | None = key(None, "bound of the weighted distillation term relative to cross-entropy")
    kd_cooldown_epochs: Epochs = key(0, "last B-epochs without distillation")
    kd_uncertainty_weight: Fraction = key(0.0, "how much a target's entropy lowers a sample's weight")
    kd_sample_gate: bool = key(False, "distil only samples that the student is unsure of")
    kd_sample_thr: Fraction = key(0.85, "student confidence below which a sample is distilled")
    kd_sample_min_ratio: Fraction = key(0.1, "at least this share of a batch")
    kd_sample_max_ratio: Fraction = key(0.5, "at most this share of a batch")
    kd_sample_reweight: bool = key(True, "keep the scale of distillation when few samples get it")
    kd_two_view_start_epoch: Epochs | None = key(None, "first B-epoch whose target is the mean over two views")
    kd_two_view_stop_epoch: Epochs | None = key(None, "first B-epoch after those")
    enable_kd_after_syn_acc: float | str = key(
        0.0, "gate: synergy accuracy from which synergy targets are used, a fraction or avg-0.02"
    )
    gate_source: Literal["snapshot", "ema"] = key("snapshot", "the accuracy that the gate reads")
    use_disagree_weight: bool = key(False, "weight samples by the teachers' disagreement")
    disagree_mode: Literal["pred", "both_wrong"] = key("pred", "what counts as disagreement")
    disagree_lambda_high: NonNegative = key(1.0, "weight where teachers disagree")
    disagree_lambda_low: NonNegative = key(1.0, "weight where they agree")
    # fusion
    use_ib: bool = key(True, "information bottleneck; false: deterministic fusion")
    ib_beta: NonNegative = key(1e-3, "weight of the bottleneck's KL term")
    ib_beta_warmup_epochs: Epochs = key(0, "A-epochs in which that weight rises from 0")
    beta_schedule: tuple[NonNegative, NonNegative, Positive] | None = key(None, "[start, end, A-epochs] instead")
    ib_epochs_per_stage: Epochs | None = key(None, "A-epochs of a stage after which that weight is 0")
    ib_mbm_query_key: Literal["feat_2d", "distill_feat"] = key("feat_2d", "student feature that queries the fusion")
    ib_mbm_query_dim: InputWidth | None = key(None, "its width; null or 0: taken from the student")
    ib_mbm_out_dim: Width = key(512, "width of the fusion")
    ib_mbm_n_head: Width = key(4, "attention heads of the fusion")
    ib_mbm_feature_norm: Literal["none", "l2"] = key("none", "normalisation of the fusion's inputs")
    ib_mbm_logvar_clip: LogVariance = key(10.0, "bound of |log variance|")
    ib_mbm_min_std: NonNegative = key(1e-4, "floor of the standard deviation")
    ib_mbm_lr_factor: Positive = key(1.0, "fusion's learning rate relative to optim.a_step_lr")
    ib_mbm_reg_lambda: NonNegative = key(0.0, "weight of the fusion's mean-square penalty")
    learnable_q: bool = key(False, "one learned token queries the fusion instead of the student")
    synergy_head_dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "dropout of the synergy head")
    synergy_temp_learnable: bool = key(False, "the synergy head learns a temperature")
    synergy_temp_init: Exponent = key(0.0, "logarithm of its initial value")
    use_cccp: bool = key(False, "concave-convex procedure in the A-step")
    cccp_alpha: NonNegative = key(0.25, "its weight")
    cccp_nt: Stages = key(1, "fusion updates per A-batch")
    cccp_ns: Stages = key(1, "student updates per B-batch")
    # the A-step
    synergy_ce_alpha: NonNegative = key(0.6, "weight of the synergy's cross-entropy")
    teacher_adapt_alpha_kd: NonNegative | None = key(None, "weight of the A-step's KD term; null: kd_alpha")
    teacher_ce_alpha: NonNegative = key(0.0, "weight of each teacher's own cross-entropy when it is fine-tuned")
    min_cw: NonNegative = key(0.1, "lower bound of certainty weights")
    max_cw: Positive = key(1.0, "upper bound of certainty weights")
    reg_lambda: NonNegative = key(0.0, "weight of the mean-square penalty on trained teacher parameters")
    teacher_eval_every: Epoch = key(1, "A-epochs between synergy evaluations")
    synergy_ema_alpha: Annotated[float, Field(ge=0, lt=1)] = key(0.8, "smoothing of synergy accuracy")
    synergy_eval_teacher_indices: tuple[Index, ...] | None = key(None, "teachers that synergy evaluation uses")
    use_teacher_finetuning: bool = key(False, "the A-step also trains the teachers' unfrozen part")
    use_distillation_adapter: bool = key(True, "adapters bring the teachers' features to one width")
    distill_out_dim: Width = key(512, "that width; 256 for small students")
    # feature distillation
    feat_kd_alpha: NonNegative = key(0.0, "weight of feature distillation")
    feat_kd_key: Literal["feat_2d", "distill_feat"] = key("distill_feat", "student feature that is distilled")
    feat_kd_norm: Literal["none", "l2"] = key("none", "normalisation of both features")
    feat_kd_huber_beta: Positive = key(1.0, "width of the Huber loss's quadratic part")
    feat_kd_clip: Positive | None = key(None, "bound of a sample's feature loss")
    # partial freezing
    use_partial_freeze: bool = key(False, "train only parts of the networks")
    student_freeze_level: FreezeLevel = key(-1, "-1 nothing frozen, 0 head, 1 + last block, 2 + last two blocks")
    student_freeze_schedule: tuple[FreezeLevel, ...] | None = key(None, "a level for each stage")
    student_freeze_bn: bool = key(False, "freeze the student's normalisation layers too")
    teacher_freeze_level: FreezeLevel = key(0, "the same for the teachers")
    teacher_freeze_bn: bool = key(True, "freeze the teachers' normalisation layers too")
    teacher_bn_head_only: bool = key(False, "train normalisation layers and head only")
    teacher_freeze_scope: Literal["features_classifier"] | None = key(None, "named parts that train")
    # regularisation of the data
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "in the A-step")
    ce_label_smoothing: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "in the B-step")
    mixup_alpha: NonNegative = key(0.0, "MixUp in the B-step")
    cutmix_alpha_distill: NonNegative = key(0.0, "CutMix in the B-step; takes precedence over MixUp")
    use_loss_clamp: bool = key(False, "bound the total loss")
    loss_clamp_mode: Literal["hard", "soft"] = key("soft", "how")
    loss_clamp_max: Scale = key(1000.0, "the bound")
    loss_clamp_warmup_epochs: Epochs = key(0, "first B-epochs without it")
    disable_loss_clamp_in_a: bool = key(False, "not in A-steps")

    @field_validator("enable_kd_after_syn_acc", mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        from pipeline.config.rules import parse_gate

        return parse_gate(value)

    @model_validator(mode="after")
    def _renormalise(self) -> "MethodConfig":
        """`renorm_ce_kd`, before the lock; weights that already sum to 1 stay as they are, so that a dump is stable."""
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


class OptimConfig(Section):
    """Optimisers, precision and numerical safety (docs/method.md sections 2, 5 and 10)."""

    optimizer: Literal["sgd", "adam", "adamw"] = key("adamw", "the student's optimiser")
    momentum: Annotated[float, Field(ge=0, lt=1)] = key(0.9, "of sgd")
    student_lr: Positive = key(1e-3, "peak learning rate of the student")
    student_weight_decay: NonNegative = key(3e-4, "on all of the student's parameters")
    a_step_optimizer: Literal["sgd", "adam", "adamw"] = key("adamw", "the fusion's optimiser")
    a_step_lr: Positive = key(1e-4, "peak learning rate of the A-steps")
    a_step_weight_decay: NonNegative = key(3e-4, "on fusion, head and adapters")
    grad_clip_norm: NonNegative = key(0.0, "bound of the student's gradient norm in B-steps; 0: none")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = key(None, "moving average of the student's weights")
    ema_update_every: AtLeastOne = key(1, "updates between its updates")
    select_weights: Literal["raw", "ema"] = key("raw", "which weights are exported")
    use_amp: bool = key(False, "mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = key("bfloat16", "its type")
    grad_scaler_init_scale: Scale = key(1024.0, "first scale with float16")
    safe_retry_patience: AtLeastOne = key(10, "non-finite steps in a row that end the run")
    use_channels_last: bool = key(True, "memory format of images and convolutions")
    deterministic: bool = key(True, "only deterministic kernels")
    compile: Literal["auto", "graphs"] | bool = key(
        "auto", "torch.compile of the networks; auto: on a GPU, in long runs; graphs: CUDA graphs too, not measured yet"
    )


class ScheduleConfig(Section):
    """The student's learning rate over its updates (docs/method.md section 2)."""

    type: Literal["cosine", "step"] = key("cosine", "shape")
    lr_warmup_epochs: Epochs = key(0, "B-epochs of linear warm-up")
    min_lr: NonNegative = key(1e-6, "where the cosine ends")
    milestones: tuple[Epoch, ...] = key((), "B-epochs at which a step schedule falls")
    gamma: Annotated[float, Field(gt=0, le=1)] = key(0.1, "by this factor")


class AugmentConfig(Section):
    """What happens to training images."""

    crop_flip: bool = key(True, "pad by 4, random crop, random horizontal flip")
    pad_mode: Literal["zero", "reflect"] = key("zero", "what the padding shows")
    randaugment: bool = key(False, "RandAugment")


class FinetuneConfig(Section):
    """How a teacher (and the baseline's student) is trained with cross-entropy (docs/method.md section 7)."""

    epochs: Epochs = key(20, "0: the teacher is used as it is")
    seed: Seed = key(0, "its own seed, so that all seeds of a study share their teachers")
    optimizer: Literal["sgd", "adam", "adamw"] = key("adamw", "optimiser")
    lr: Positive = key(1e-3, "peak learning rate")
    weight_decay: NonNegative = key(3e-4, "weight decay")
    schedule: ScheduleConfig = key(ScheduleConfig(), "learning rate over its updates")
    cutmix_alpha: NonNegative = key(0.0, "CutMix")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "label smoothing")


class CheckpointConfig(Section):
    """When the state is written."""

    every_seconds: Seconds = key(600.0, "also within long epochs")


class TrackingConfig(Section):
    """Where runs go."""

    mode: Literal["online", "offline"] = key("online", "offline: the journal only; deliver it later")
    uri: str | None = key(None, "tracking server; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db")
    experiment: str = key("asib", "experiment of the runs")
    git_diff: bool = key(True, "log what the sources differ in from their commit, lines that look like secrets masked")
    finish_seconds: Seconds = key(120.0, "how long the end of a run waits for a silent server")


# abc gives every model class a method of that name, which an instance's key may well hide
warnings.filterwarnings("ignore", message='Field name "register" in "Config" shadows')


class Config(Section):
    """The whole effective configuration."""

    seed: Seed = key(0, "of every random stream of the run")
    device: str = key("auto", "auto, cpu, cuda or cuda:<n>")
    threads: Threads | None = key(None, "of the processor; null: all cores (or OMP_NUM_THREADS)")
    output_dir: str = key("runs", "folder of run folders, fine-tuned teachers and the teacher bank")
    bank: Literal["auto", "ahead", "lazy", "off"] = key(
        "auto", "frozen teachers' outputs kept for other epochs and runs; auto: where that pays back"
    )
    bank_folder: str | None = key(None, "where they are kept; null: bank in output_dir")
    bank_gb: Gigabytes = key(20.0, "size limit of that folder; what was not used for longest goes first")
    run_name: str | None = key(None, "name of the run")
    rung: str | None = key(None, "name under which ablations compare the run")
    student: str | None = key(
        None, "evaluate: a student, runs:/<id> or a weights file; null: model.student with its checkpoint"
    )
    resume: str | None = key(None, "run id (or run folder) to continue")
    extend: bool = key(False, "allow to continue a finished run for more epochs")
    log_model: bool = key(True, "log the student as a model that can be served")
    register: str | None = key(
        None, "registered model of which the student becomes a new version, with the alias challenger"
    )
    debug: bool = key(False, "tracebacks instead of one-line errors")

    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augment: AugmentConfig = AugmentConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _derived_defaults(cls, data: Any) -> Any:
        """Values that follow from others, filled in before the lock."""
        from pipeline.config.rules import derive

        return derive(data)

    @model_validator(mode="after")
    def _rules(self) -> "Config":
        from pipeline.config.rules import check

        check(self)
        return self


def flatten(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The configuration as dotted keys: `{"method.kd_alpha": 0.5, "model.teachers.0.name": ...}`."""
    flat: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for i, item in enumerate(value):
                flat |= flatten(item, f"{prefix}{name}.{i}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
