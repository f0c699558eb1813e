"""Keys that differ from their default but cannot act in a configuration: named once, at the start."""

from collections.abc import Iterator

from pipeline.config.base import conditions, leaves
from pipeline.config.datasets import PICTURES
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
    if config.model.unseen != "uniform" and not (config.model.partly_taught or config.continual.divides_teachers):
        yield "model.unseen: every teacher is taught all classes"
    if config.dataset.name in PICTURES and config.augment.crop_flip and config.augment.pad_mode != "zero":
        yield f"augment.pad_mode: dataset.name={config.dataset.name} crops without padding"


def _epochs(config: Sections) -> Iterator[str]:
    """Keys for epochs that the run never reaches."""
    m = config.method
    if m.distils:
        start = m.kd_two_view_start_epoch
        if start is not None and start >= m.b_epochs:
            yield f"method.kd_two_view_start_epoch={start}: the run has {m.b_epochs} B-epochs"
        if m.kd_max_ratio is not None and m.kd_warmup_epochs >= m.b_epochs:
            yield "method.kd_max_ratio: it begins after method.kd_warmup_epochs, past the end of the run"
    if m.use_loss_clamp and m.loss_clamp_warmup_epochs >= m.b_epochs:
        yield f"method.loss_clamp_warmup_epochs={m.loss_clamp_warmup_epochs}: the run has {m.b_epochs} B-epochs"
    yield from m.inactive(config)
    for where, schedule, epochs in (
        ("schedule", config.schedule, m.b_epochs),
        ("finetune.schedule", config.finetune.schedule, config.finetune.epochs),
    ):
        past = [epoch for epoch in schedule.milestones if epoch >= epochs]
        if schedule.type == "step" and past and epochs:
            yield f"{where}.milestones: {past} lie past the {epochs} epochs"
