"""What the steps do inside a tracked run: fine-tune, distil, train the student alone, and all together."""

import logging
from collections.abc import Callable, Mapping

import torch

from models.weights import weights_hash
from pipeline.config import Config
from pipeline.config.bank import bank_use
from pipeline.config.rules import inactive, needs_distillation
from pipeline.config.variants import student_alone
from pipeline.data.sources import ImageData
from pipeline.errors import UserError
from pipeline.experiment import bank, export, networks, report, teachers
from pipeline.experiment.evaluation import source
from pipeline.experiment.registry import register
from pipeline.experiment.run import Run
from pipeline.experiment.session import images, load_data, prepare, threads_of, train
from pipeline.journal import read_header
from pipeline.training import costs, distributed
from pipeline.training.compiling import check_device
from pipeline.training.loop import Loop, Watch
from pipeline.training.stages import Distillation, query_width

logger = logging.getLogger("asib")
STUDENT, FUSION = source.STUDENT, source.FUSION


# fine-tuning ---------------------------------------------------------------------------------------------------------


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
    results = [teachers.finetune(run, k) for k in todo]
    means = {f"final/teacher_{k}_acc": r["final/acc_val_selected"] for k, r in zip(todo, results, strict=True)}
    run.journal.hold()  # they are written together with the end, so that a resume does not repeat them
    run.journal.metrics(means, 0)
    names = [config.model.teachers[k].name for k in todo]
    report.print_table("fine-tuned teachers: test top-1 in %", list(zip(names, means.values(), strict=True)))
    return sum(means.values()) / len(means)


# distillation --------------------------------------------------------------------------------------------------------


def distill(run: Run) -> float | None:
    """Distil the student from the configuration's teachers."""
    data, task, loop = _trained(run, None)
    results = _conclude(data, task, loop)
    if not run.follower:
        _keep_weights(run, data, task)
        _keep_pictures(run, data, task)
        if run.config.log_model:
            export.log_student(run, task.student, data, results)
            register.student(run, run.config, data, results)
        if run.parent is None:
            report.print_results(run.config, results)
    report.write_results(run, results)
    return results.get("final/val_acc", results["final/acc_last"])


def trial(run: Run, watch: Watch) -> dict[str, float]:
    """Distil as `distill` does, for a sweep: the test split stays unseen, and of the student only weights are kept.

    Returns:
        Every metric's last value.

    Raises:
        Pruned, Taken: as `watch` decided.
    """
    data, task, loop = _trained(run, watch)
    results = _conclude(data, task, loop, test=False)
    if not run.follower:
        _keep_weights(run, data, task)
    report.write_results(run, results)
    return {name: points[-1][1] for name, points in report.metrics_of(run).items()} | results


def _trained(run: Run, watch: Watch | None) -> tuple[ImageData, Distillation, Loop]:
    config = run.config
    prepare(config, threads_of(run))
    device = networks.device_of(config)
    check_device(config, device)  # before teachers are fine-tuned
    for sentence in inactive(config):
        logger.info("has no effect here: %s", sentence)
    data = load_data(run)
    student = networks.build_student(config, data)
    test = watch is None  # a sweep never looks at the test split
    found = teachers.obtain(run, data, student, test) if needs_distillation(config) else []
    task = Distillation(config, data, student, [t.net for t in found], device)
    run.journal.tags({"asib.eval_split": task.data.eval_split})
    if any(t.saw_validation for t in found) and task.data.has_validation:
        run.journal.tags({"asib.val_contaminated": "true"})
    for teacher in found:
        if teacher.made_by is not None:
            run.journal.model_input(teacher.made_by)
    hashes = [t.hash for t in found]
    banked = bank.attach(task, data, hashes)
    run.journal.tags({"asib.bank": "off" if banked is None else bank_use(config).mode})
    try:
        return data, task, train(run, task, data, hashes, watch=watch, bank=banked is not None)
    finally:
        if banked is not None:
            bank.conclude(banked)


def _conclude(data: ImageData, task: Distillation, loop: Loop, test: bool = True) -> dict[str, float]:
    """The final metrics, which are then in the run's record."""
    results = task.results(test)
    results |= macs_found(task, data, results)
    if "cost/compile_seconds" in results:
        logger.info("torch.compile took %.1f s", results["cost/compile_seconds"])
    loop.finish(results)
    return results


def _keep_weights(run: Run, data: ImageData, task: Distillation) -> None:
    path = run.folder / STUDENT
    networks.save(task.student, path, run.config, data)
    run.journal.artifact(path, "checkpoints")
    if task.fusion is not None:
        fusion = run.folder / FUSION
        export.save_fusion(task.fusion, fusion, data)
        run.journal.artifact(fusion, "checkpoints")
    run.journal.tags({"asib.weights": weights_hash(task.student.net)})


def _keep_pictures(run: Run, data: ImageData, task: Distillation) -> None:
    assert task.predicted is not None
    report.curves(run)
    report.predictions(run, task.predicted, task.data.test.labels)
    report.confusion(run, task.predicted, task.data.test.labels, data.classes)


def macs_found(task: Distillation, data: ImageData, results: Mapping[str, float]) -> dict[str, float]:
    """`cost/macs_per_image/<network>`, and `cost/gmacs`: 10⁹ multiply-accumulates of the whole training.

    A forward pass counts once, a training pass three times (forward, and backward for inputs and for weights); early
    ends of the backward pass under partial freezing are not taken off. Evaluation does not count, as for the images.
    """
    x = torch.zeros(1, data.in_chans, data.image_size, data.image_size, device=task.device)
    x = x.to(memory_format=torch.channels_last if task.optim.use_channels_last else torch.contiguous_format)
    nets = {"student": task.student} | {f"teacher_{k}": t for k, t in enumerate(task.teachers)}
    found = {name: costs.macs(net, x) for name, net in nets.items()}
    if task.fusion is not None:
        query = torch.zeros(1, query_width(task.method, task.student), device=task.device)
        features = [torch.zeros(1, t.feature_dim, device=task.device) for t in task.teachers]
        found["fusion"] = costs.macs(task.fusion, None if task.method.learnable_q else query, features)
    total = sum(found[name] * results[f"cost/forward_images/{name}"] for name in found)
    epochs = {phase: sum(e.phase == phase for e in task.plan) for phase in task.phases}
    images = len(task.data.train.indices)
    for phase, names in (("a", ["fusion"]), ("b", ["student"])):
        if phase in task.phases:
            if phase == "a" and task.method.use_teacher_finetuning:
                names += [f"teacher_{k}" for k in range(len(task.teachers))]
            passes = images * epochs[phase] * task.phases[phase].repeats
            total += 2 * passes * sum(found[name] for name in names)
    return {f"cost/macs_per_image/{name}": float(n) for name, n in found.items()} | {"cost/gmacs": total / 1e9}


# all together --------------------------------------------------------------------------------------------------------


def main(run: Run) -> float | None:
    """The main job: student alone, teachers, distillation, evaluation, as nested runs; one table at the end."""
    config = run.config
    if not config.model.teachers or not needs_distillation(config):
        raise UserError("the main job distils: it needs model.teachers and method.kd_alpha > 0, or use -e baseline")
    prepare(config)
    check_device(config, networks.device_of(config))
    teachers.foresee(config, images(config))
    run.ready()
    alone_config = student_alone(config).model_copy(update={"log_model": False, "register": None})
    alone = _nested(run, "baseline", "student_alone", alone_config, distill)
    for index, teacher in enumerate(config.model.teachers):
        if teacher.checkpoint is None and config.finetune.epochs > 0:
            teachers.finetune(run, index)
    distilled = _nested(run, "distill", "distill", config, distill)
    evaluated = _nested(run, "evaluate", "evaluate", config, _evaluate_distilled)
    summary = {k: v for k, v in distilled.items() if k.startswith("final/")}
    summary |= {"final/student_alone_acc": alone["final/acc_val_selected"], "test/acc": evaluated["test/acc"]}
    run.journal.hold()
    run.journal.metrics(summary, 0)
    report.write_results(run, summary)
    if not run.follower:
        report.print_results(config, summary)
    return distilled.get("final/val_acc")


def _evaluate_distilled(run: Run) -> float | None:
    # late: training alone needs neither pandas nor scikit-learn
    from pipeline.experiment.evaluation.evaluate import evaluate
    from pipeline.experiment.evaluation.request import Request

    assert run.parent is not None
    distilled = run.parent.folder / "distill"
    header = read_header(distilled)
    student = source.Source(distilled / STUDENT, header.data["journal"] if header else None)
    return evaluate(run, Request(teachers="false", speed=False), student)


def _nested(parent: Run, step: str, key: str, config: Config, job: Callable[[Run], float | None]) -> dict[str, float]:
    """Run a job as a nested run, unless an earlier, interrupted start has finished it; its results."""
    done = parent.finished_child(key)
    if done is None:
        run = parent.child(step, key, config)
        with run.nested():
            job(run)
        distributed.barrier()
        done = parent.finished_child(key)
        if done is None:
            raise RuntimeError(f"{parent.folder / key} holds no results after its step")
    return done
