"""How networks are trained: optimisers, precision, schedules, fine-tuning, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Section, key
from pipeline.config.numbers import AtLeastOne, BelowOne, Epoch, Epochs, NonNegative, Positive, Scale, Seconds, Seed


class OptimConfig(Section):
    """Optimisers, precision and numerical safety (docs/method.md sections 2, 5 and 10)."""

    optimizer: Literal["sgd", "adam", "adamw"] = key("adamw", "the student's optimiser")
    momentum: BelowOne = key(0.9, "momentum of SGD")
    student_lr: Positive = key(1e-3, "peak learning rate of the student")
    student_weight_decay: NonNegative = key(3e-4, "weight decay of all the student's parameters")
    a_step_optimizer: Literal["sgd", "adam", "adamw"] = key("adamw", "the fusion's optimiser")
    a_step_lr: Positive = key(1e-4, "peak learning rate of the A-steps")
    a_step_weight_decay: NonNegative = key(3e-4, "weight decay of fusion, synergy head and adapters")
    grad_clip_norm: NonNegative = key(0.0, "upper bound of the student's gradient norm in B-steps; 0: no bound")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = key(
        None, "decay of the moving average of the student's weights; null: no average"
    )
    ema_update_every: AtLeastOne = key(
        1, "updates of the student between updates of the moving average", when="ema_decay"
    )
    select_weights: Literal["raw", "ema"] = key("raw", "which of the student's weights are exported")
    use_amp: bool = key(False, "train in mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = key("bfloat16", "number format of mixed precision")
    grad_scaler_init_scale: Scale = key(1024.0, "initial loss scale with float16", when="amp_dtype=float16")
    safe_retry_patience: AtLeastOne = key(10, "consecutive non-finite steps after which a run stops")
    use_channels_last: bool = key(True, "store images and convolutions in channels-last memory format")
    deterministic: bool = key(True, "use deterministic kernels only")
    compile: Literal["auto", "graphs"] | bool = key(
        "auto", "compile the networks with torch.compile; auto: on a GPU, for long runs; graphs: with CUDA graphs"
        " (not measured yet)"
    )  # fmt: skip


class ScheduleConfig(Section):
    """The learning rate over a network's updates (docs/method.md section 2)."""

    type: Literal["cosine", "step"] = key("cosine", "shape of the learning-rate schedule")
    lr_warmup_epochs: Epochs = key(0, "epochs of linear warm-up")
    min_lr: NonNegative = key(1e-6, "learning rate at the end of a cosine schedule")
    milestones: tuple[Epoch, ...] = key((), "epochs at which a step schedule falls", when="type=step")
    gamma: Annotated[float, Field(gt=0, le=1)] = key(
        0.1, "factor by which a step schedule falls at each milestone", when="type=step"
    )


class FinetuneConfig(Section):
    """How a teacher (and the baseline's student) is trained with cross-entropy (docs/method.md section 7)."""

    epochs: Epochs = key(20, "epochs of fine-tuning; 0: use the teacher as it is")
    seed: Seed = key(0, "seed of fine-tuning, separate so that all seeds of a study share their teachers")
    optimizer: Literal["sgd", "adam", "adamw"] = key("adamw", "optimiser of fine-tuning")
    lr: Positive = key(1e-3, "peak learning rate of fine-tuning")
    weight_decay: NonNegative = key(3e-4, "weight decay in fine-tuning")
    schedule: ScheduleConfig = key(ScheduleConfig(), "learning-rate schedule of fine-tuning")
    cutmix_alpha: NonNegative = key(0.0, "CutMix's alpha in fine-tuning; 0: no CutMix")
    label_smoothing: BelowOne = key(0.0, "label smoothing in fine-tuning")


class CheckpointConfig(Section):
    """When checkpoints are written, and how long they stay."""

    every_seconds: Seconds = key(600.0, "seconds between checkpoints, also within long epochs")
    keep: bool = key(False, "keep what a finished run could be continued from (extend=true); weights stay anyway")


class LogConfig(Section):
    """What a step says beside its results."""

    level: Literal["debug", "info", "warning", "error"] = key("info", "the least serious lines that are shown")
    filename: str | None = key(None, "file that gets the lines of every run too, beside each run's own run.log")


class TrackingConfig(Section):
    """Where runs are recorded."""

    mode: Literal["online", "offline"] = key("online", "offline: write the journal only, to be delivered later")
    uri: str | None = key(None, "tracking server; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db")
    experiment: str = key("asib", "MLflow experiment of the runs")
    git_diff: bool = key(True, "log how the sources differ from their commit, masking lines that look like secrets")
    finish_seconds: Seconds = key(120.0, "seconds to wait for a silent server at the end of a run")
    system_metrics: bool = key(False, "log what processors, memory and the GPUs in use do, every 10 seconds")
