"""Distil a student inside a tracked run: a step's own job, and a sweep's trial."""

import logging
import re

from pipeline.config import inactive
from pipeline.data.sources import ImageData
from pipeline.distill import continual, export, networks, register, results, teachers
from pipeline.distill.fit import conclude, fit, keep_weights
from pipeline.distill.train import load_data, prepare, threads_of
from pipeline.runs.run import Run
from pipeline.training.compiling import check_device
from pipeline.training.loop import Loop, Watch
from pipeline.training.student import Distillation

logger = logging.getLogger("asib")


def distill(run: Run) -> float | None:
    """Distil the student from the configuration's teachers, at once or task by task."""
    if run.config.continual.num_tasks is not None:
        return continual.distill(run, _begun(run))
    data, task, loop = _trained(run, None)
    found = conclude(data, task, loop)
    if not run.follower:
        keep_weights(run, data, task.student, task)
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
    if run.config.continual.num_tasks is not None:
        found = continual.trial(run, _begun(run), watch)
    else:
        data, task, loop = _trained(run, watch)
        found = conclude(data, task, loop, test=False)
        if not run.follower:
            keep_weights(run, data, task.student, task)
        results.write_results(run, found)
    return {name: points[-1][1] for name, points in results.metrics_of(run).items()} | found


def _begun(run: Run) -> ImageData:
    """The run's images, once the process is set up for its configuration."""
    tasks = run.config.continual.num_tasks is not None
    prepare(run.config, continual.threads_of(run) if tasks else threads_of(run))
    check_device(run.config, networks.device_of(run.config))  # checked before teachers are fine-tuned
    for sentence in inactive(run.config):
        if run.was_asked_for(re.split("[:=]", sentence)[0]):
            logger.info("has no effect here: %s", sentence)
    return load_data(run)


def _trained(run: Run, watch: Watch | None) -> tuple[ImageData, Distillation, Loop]:
    config, data = run.config, _begun(run)
    student = networks.build_student(config, data)
    test = watch is None  # a sweep never looks at the test split
    taught = teachers.obtain(run, data, student, test) if config.method.taught else []
    return data, *fit(run, data, student, taught, watch)
