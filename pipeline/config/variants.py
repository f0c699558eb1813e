"""Configurations that follow from another one."""

from pipeline.config.schema import Config

ALONE = ("num_stages", "student_epochs_per_stage", "ce_label_smoothing", "mixup_alpha", "cutmix_alpha_distill")
"""Keys of `method` that mean something without teachers."""


def student_alone(config: Config) -> Config:
    """The student without teachers: as many B-epochs with cross-entropy only, every other key of the method default."""
    method = {name: getattr(config.method, name) for name in ALONE} | {"kd_target": "avg", "teacher_adapt_epochs": 0}
    model = {"student": config.model.student.model_dump()}
    return Config.model_validate(config.model_dump() | {"method": method, "model": model})
