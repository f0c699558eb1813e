"""All keys, before the rules between them: every key of docs/method.md section 10."""

import warnings
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.base import Section, key
from pipeline.config.continual import ContinualConfig
from pipeline.config.datasets import AugmentConfig, DatasetConfig
from pipeline.config.methods.asib.settings import AsibConfig
from pipeline.config.model import ModelConfig
from pipeline.config.numbers import Gigabytes, Seed, Threads
from pipeline.config.training import (
    CheckpointConfig,
    FinetuneConfig,
    LogConfig,
    OptimConfig,
    ScheduleConfig,
    TrackingConfig,
)

# abc gives every model class a method named register; an instance's key may safely hide it
warnings.filterwarnings("ignore", message='Field name "register" in')


class Sections(Section):
    """The keys outside any section, and the sections."""

    seed: Seed = key(0, "seed of every random stream of the run")
    device: str = key("auto", "auto, cpu, mps, cuda or cuda:<n>")
    threads: Threads | None = key(None, "processor threads; null: all cores (or OMP_NUM_THREADS)")
    output_dir: str = key("runs", "folder of run folders, fine-tuned teachers and the teacher bank")
    bank: Literal["auto", "ahead", "lazy", "off"] = key(
        "auto", "keep frozen teachers' outputs for other epochs and runs; auto: where that pays off"
    )
    bank_folder: str | None = key(None, "folder of the teacher bank; null: bank in output_dir")
    bank_gb: Gigabytes = key(20.0, "size limit of the teacher bank in GB; the least recently used goes first")
    run_name: str | None = key(None, "name of the run")
    rung: str | None = key(None, "name under which ablations compare the run")
    student: str | None = key(
        None, "student to evaluate: runs:/<id> or a weights file; null: model.student with its checkpoint"
    )
    resume: str | None = key(None, "run id (or run folder) to continue")
    extend: bool = key(False, "allow a finished run to be continued for more epochs", when="resume")
    log_model: bool = key(True, "log the student as a model that can be served")
    register: str | None = key(
        None, "registered model that gets the student as a new version, with the alias challenger"
    )
    debug: bool = key(False, "show tracebacks instead of one-line errors")

    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    if TYPE_CHECKING:
        method: Any = None  # a MethodConfig; code of one method reads keys of its own
    else:
        method: AsibConfig = AsibConfig()  # the schema of another method has that one's settings here
    continual: ContinualConfig = ContinualConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augment: AugmentConfig = AugmentConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    log: LogConfig = LogConfig()
