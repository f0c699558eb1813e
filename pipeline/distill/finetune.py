"""Fine-tune the teachers of a configuration inside a tracked run."""

import logging

from pipeline.distill import networks, teachers
from pipeline.distill.train import prepare
from pipeline.errors import UserError
from pipeline.reporting import tables
from pipeline.runs.run import Run
from pipeline.training.compiling import check_device

logger = logging.getLogger("asib")


def finetune(run: Run) -> float | None:
    """Fine-tune every teacher that the configuration takes from no checkpoint, each in a nested run."""
    config = run.config
    todo = [k for k, t in enumerate(config.model.teachers) if t.checkpoint is None]
    if not config.model.teachers:
        raise UserError("model.teachers is empty: choose model/teacher=… to have something to fine-tune")
    if not todo or config.finetune.epochs == 0:
        logger.info("nothing to fine-tune: every teacher has a checkpoint, or finetune.epochs=0")
        return None
    prepare(config)
    check_device(config, networks.device_of(config))
    found = [teachers.finetune(run, k) for k in todo]
    means = {f"final/teacher_{k}_acc": r["final/acc_val_selected"] for k, r in zip(todo, found, strict=True)}
    run.journal.hold()  # written together with the end, so that a resume does not repeat them
    run.journal.metrics(means, 0)
    names = [config.model.teachers[k].name for k in todo]
    rows = [(name, f"{acc:.2f}") for name, acc in zip(names, means.values(), strict=True)]
    print(tables.text("fine-tuned teachers: test top-1 in %", rows), flush=True)
    return sum(means.values()) / len(means)
