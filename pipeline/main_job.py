"""The main job: student alone, teachers, distillation, evaluation, as nested runs of one."""

import logging
from collections.abc import Callable

from pipeline.config import Config, student_alone
from pipeline.distill import networks, results, teachers
from pipeline.distill.distill import distill
from pipeline.distill.train import images, prepare
from pipeline.errors import UserError
from pipeline.evaluate import source
from pipeline.journal import read_header
from pipeline.runs import opening
from pipeline.runs.folders import STUDENT
from pipeline.runs.run import Run
from pipeline.training import distributed
from pipeline.training.compiling import check_device

logger = logging.getLogger("asib")


def main(run: Run) -> float | None:
    """The main job: student alone, teachers, distillation, evaluation, as nested runs; one table at the end."""
    config = run.config
    if not config.model.teachers or not config.method.taught:
        raise UserError("the main job distils: it needs model.teachers and method.kd_alpha > 0, or use -e baseline")
    prepare(config)
    check_device(config, networks.device_of(config))
    teachers.validate_early(config, images(config))
    run.ready()
    alone_config = student_alone(config).model_copy(update={"log_model": False, "register": None})
    tuned = [k for k, t in enumerate(config.model.teachers) if t.checkpoint is None and config.finetune.epochs > 0]
    student, total = config.model.student.name, 3 + len(tuned)
    heading(1, total, f"student alone: {student}")
    alone = _nested(run, "baseline", "student_alone", alone_config, distill)
    for number, index in enumerate(tuned, 2):
        heading(number, total, f"teacher {index}: {config.model.teachers[index].name}")
        teachers.finetune(run, index)
    heading(total - 1, total, f"{student} from {len(config.model.teachers)} teachers, {config.method.name}")
    distilled = _nested(run, "distill", "distill", config, distill)
    heading(total, total, "evaluation of the distilled student")
    evaluated = _nested(run, "evaluate", "evaluate", config, _evaluate_distilled)
    summary = {k: v for k, v in distilled.items() if k.startswith("final/")}
    summary |= {"final/student_alone_acc": alone["final/acc_val_selected"], "test/acc": evaluated["test/acc"]}
    run.journal.hold()
    run.journal.metrics(summary, 0)
    results.write_results(run, summary)
    if not run.follower:
        results.print_results(config, summary)
    return distilled.get("final/val_acc")


def heading(number: int, total: int, words: str) -> None:
    """Say which part of the job begins."""
    logger.info("[%d/%d] %s", number, total, words)


def _evaluate_distilled(run: Run) -> float | None:
    # imported late: training alone needs neither pandas nor scikit-learn
    from pipeline.evaluate.evaluate import evaluate
    from pipeline.evaluate.request import Request

    assert run.parent is not None
    distilled = run.parent.folder / "distill"
    header = read_header(distilled)
    student = source.Source(distilled / STUDENT, header.data["journal"] if header else None)
    return evaluate(run, Request(teachers="false", speed=False), student)


def _nested(parent: Run, step: str, key: str, config: Config, job: Callable[[Run], float | None]) -> dict[str, float]:
    """Run a job as a nested run, unless it finished before an interruption; return its results."""
    done = parent.finished_child(key)
    if done is None:
        run = opening.child(parent, step, key, config)
        with run.nested():
            job(run)
        distributed.barrier()
        done = parent.finished_child(key)
        if done is None:
            raise RuntimeError(f"{parent.folder / key} holds no results after its step")
    return done
