"""One training of a student inside a tracked run: from its teachers to its weights."""

import logging
from collections.abc import Mapping, Sequence

from models.features import FeatureNet
from models.weights import weights_hash
from pipeline.data.sources import ImageData
from pipeline.distill import bank, export, networks
from pipeline.distill.costs import macs_found
from pipeline.distill.teachers import Teacher
from pipeline.distill.train import train
from pipeline.runs.folders import FUSION, STUDENT
from pipeline.runs.run import Run
from pipeline.training.bank.policy import bank_use
from pipeline.training.loop import Loop, Watch
from pipeline.training.run_data import Scope
from pipeline.training.step import Penalty
from pipeline.training.student import Distillation, task_of

logger = logging.getLogger("asib")


def fit(
    run: Run,
    data: ImageData,
    student: FeatureNet,
    taught: Sequence[Teacher],
    watch: Watch | None = None,
    scope: Scope | None = None,
    penalties: Mapping[str, Penalty] | None = None,
) -> tuple[Distillation, Loop]:
    """Train the student to the end of the run's plan, from where the run stands.

    `scope`, `penalties`: as `Distillation` takes them; others as `train` does.
    """
    config, hashes = run.config, [t.hash for t in taught]
    task = task_of(config.method)(
        config,
        data,
        student,
        [t.net for t in taught],
        networks.device_of(config),
        bank.opener(config, data, hashes),
        scope,
        penalties or {},
    )
    run.journal.tags({"asib.eval_split": task.data.eval_split})
    saw = [f"teacher {k}" for k, t in enumerate(taught) if task.data.has_validation and t.saw_validation]
    if saw:
        run.journal.tags({"asib.val_contaminated": "true"})
    for teacher in taught:
        if teacher.made_by is not None:
            run.journal.model_input(teacher.made_by)
    run.journal.tags({"asib.bank": "off" if task.bank is None else bank_use(config).mode})
    part = "" if scope is None else scope.part
    try:
        bank.build_ahead(task, run.stop)
        loop = train(run, task, data, hashes, part, watch, task.bank is not None)
    finally:
        bank.conclude(task)
    if saw:  # beside the results, which it qualifies
        logger.warning(
            "not known to have been trained without the validation images: %s; what was measured, chosen or fitted on "
            "them may be too good to hold elsewhere",
            ", ".join(saw),
        )
    return task, loop


def conclude(data: ImageData, task: Distillation, loop: Loop, test: bool = True) -> dict[str, float]:
    """The final metrics, which are also written to the run's record."""
    found = task.results(test)
    found |= macs_found(task, data, found)
    if "cost/compile_seconds" in found:
        logger.info("torch.compile took %.1f s", found["cost/compile_seconds"])
    loop.finish(found)
    return found


def keep_weights(run: Run, data: ImageData, student: FeatureNet, task: Distillation | None = None) -> None:
    """The student's weights, and those of the task's fusion, as files of the run."""
    path = run.folder / STUDENT
    networks.save(student, path, run.config, data)
    run.journal.artifact(path, "checkpoints")
    if task is not None and task.fusion is not None:
        fusion = run.folder / FUSION
        export.save_fusion(task.fusion, fusion, data)
        run.journal.artifact(fusion, "checkpoints")
    run.journal.tags({"asib.weights": weights_hash(student.net)})
