"""Distil a student inside a tracked run: a step's own job, a sweep's trial, and the student alone."""

import logging

from models.weights import weights_hash
from pipeline.config import inactive
from pipeline.data.sources import ImageData
from pipeline.distill import bank, export, networks, register, results, teachers
from pipeline.distill.costs import macs_found
from pipeline.distill.train import load_data, prepare, threads_of, train
from pipeline.runs.folders import FUSION, STUDENT
from pipeline.runs.run import Run
from pipeline.training.bank.policy import bank_use
from pipeline.training.compiling import check_device
from pipeline.training.loop import Loop, Watch
from pipeline.training.student import Distillation, task_of

logger = logging.getLogger("asib")


def distill(run: Run) -> float | None:
    """Distil the student from the configuration's teachers."""
    data, task, loop = _trained(run, None)
    found = _conclude(data, task, loop)
    if not run.follower:
        _keep_weights(run, data, task)
        assert task.predicted is not None
        labels = task.data.test.labels
        results.curves(run)
        results.predictions(run, task.predicted, labels)
        results.confusion(run, task.predicted, labels, data.classes)
        if run.config.log_model:
            export.log_student(run, task.student, data, found)
            register.student(run, run.config, data, found)
        if run.parent is None:
            results.print_results(run.config, found)
    results.write_results(run, found)
    return found.get("final/val_acc", found["final/acc_last"])


def trial(run: Run, watch: Watch) -> dict[str, float]:
    """Distil as `distill` does, for a sweep: the test split stays unseen, and only the student's weights are kept.

    Returns every metric's last value. Raises Pruned, Taken: as `watch` decided.
    """
    data, task, loop = _trained(run, watch)
    found = _conclude(data, task, loop, test=False)
    if not run.follower:
        _keep_weights(run, data, task)
    results.write_results(run, found)
    return {name: points[-1][1] for name, points in results.metrics_of(run).items()} | found


def _trained(run: Run, watch: Watch | None) -> tuple[ImageData, Distillation, Loop]:
    config = run.config
    prepare(config, threads_of(run))
    device = networks.device_of(config)
    check_device(config, device)  # checked before teachers are fine-tuned
    for sentence in inactive(config):
        logger.info("has no effect here: %s", sentence)
    data = load_data(run)
    student = networks.build_student(config, data)
    test = watch is None  # a sweep never looks at the test split
    taught = teachers.obtain(run, data, student, test) if config.method.distils else []
    hashes = [t.hash for t in taught]
    task = task_of(config.method)(
        config, data, student, [t.net for t in taught], device, bank.opener(config, data, hashes)
    )
    run.journal.tags({"asib.eval_split": task.data.eval_split})
    if any(t.saw_validation for t in taught) and task.data.has_validation:
        run.journal.tags({"asib.val_contaminated": "true"})
    for teacher in taught:
        if teacher.made_by is not None:
            run.journal.model_input(teacher.made_by)
    run.journal.tags({"asib.bank": "off" if task.bank is None else bank_use(config).mode})
    try:
        bank.build_ahead(task, run.stop)
        return data, task, train(run, task, data, hashes, watch=watch, bank=task.bank is not None)
    finally:
        bank.conclude(task)


def _conclude(data: ImageData, task: Distillation, loop: Loop, test: bool = True) -> dict[str, float]:
    """The final metrics, which are also written to the run's record."""
    found = task.results(test)
    found |= macs_found(task, data, found)
    if "cost/compile_seconds" in found:
        logger.info("torch.compile took %.1f s", found["cost/compile_seconds"])
    loop.finish(found)
    return found


def _keep_weights(run: Run, data: ImageData, task: Distillation) -> None:
    path = run.folder / STUDENT
    networks.save(task.student, path, run.config, data)
    run.journal.artifact(path, "checkpoints")
    if task.fusion is not None:
        fusion = run.folder / FUSION
        export.save_fusion(task.fusion, fusion, data)
        run.journal.artifact(fusion, "checkpoints")
    run.journal.tags({"asib.weights": weights_hash(task.student.net)})
