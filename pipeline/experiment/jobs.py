"""What the steps do inside a tracked run: fine-tune, distil, train the student alone, evaluate, and all of it together."""

import json
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from models.weights import read_metadata, weights_hash
from pipeline.config import Config, config_hash
from pipeline.config.identity import Identity, computation, source_digest
from pipeline.data import sources
from pipeline.data.sources import ImageData
from pipeline.errors import UserError
from pipeline.experiment import export, networks, report, teachers
from pipeline.experiment.execute import stop
from pipeline.experiment.run import REPOSITORY, Run
from pipeline.training import distributed
from pipeline.training.checkpoint import require_space
from pipeline.training.evaluation import accuracy, outputs
from pipeline.training.finetune import FineTuning
from pipeline.training.loop import Loop, Precision, Task
from pipeline.training.stages import Distillation

logger = logging.getLogger("asib")
STUDENT = "checkpoints/student.safetensors"
FUSION = "checkpoints/fusion.safetensors"


def prepare(config: Config, threads: int | None = None) -> None:
    """Threads and determinism, before the first tensor."""
    torch.set_num_threads(threads or config.threads or os.cpu_count() or 1)
    if config.optim.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def load_data(run: Run) -> ImageData:
    """The run's images, stated in its record."""
    data = sources.load(run.config.dataset)
    run.journal.tags({"asib.data_digest": data.digest})
    profile = {"classes": data.num_classes, "train": len(data.train_y), "test": len(data.test_y)}
    for context in ("training", "test"):
        run.journal.dataset(data.name, data.digest, context, data.source, profile=profile)
    return data


def train(run: Run, task: Task, precision: Precision, data: ImageData, found: list[teachers.Teacher]) -> Loop:
    """Run the task to its end from where the run stands; its metrics and checkpoints are in the run's record."""
    config = run.config
    header = {
        "config_hash": config_hash(config),
        "computation": computation(config),
        "data_digest": data.digest,
        "teachers": [t.hash for t in found],
        "amp_dtype": precision.name,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
    }
    identity = Identity(
        header["config_hash"], precision.name, tuple(header["teachers"]), data.digest, source_digest(REPOSITORY)
    )
    run.journal.tags({"asib.identity": identity.digest(), "asib.teachers": ",".join(header["teachers"]) or "none"})
    device = networks.device_of(config)
    require_space(run.folder, [p.objective.trainable_module for p in task.phases.values()])
    loop = Loop(
        task,
        run.journal,
        None if run.follower else run.slots,
        header,
        precision,
        device,
        stop=stop,
        every_seconds=config.checkpoint.every_seconds,
    )
    if run.state is not None:
        check_continuation(run, header)
        loop.load_state_dict(run.state)
        loop.finished &= not config.extend
    run.ready()
    with stop.between_batches(), logging_redirect_tqdm([logger]):
        loop.run()
    return loop


def check_continuation(run: Run, header: dict[str, Any]) -> None:
    """A run continues with the same configuration, data and teachers. UserError names both hashes otherwise."""
    before = run.state["header"]
    extended = {"method.student_epochs_per_stage", "method.num_stages", "finetune.epochs"}
    changed = sorted(
        k
        for k in before["computation"].keys() | header["computation"].keys()
        if before["computation"].get(k) != header["computation"].get(k) and not (run.config.extend and k in extended)
    )
    if changed:
        raise UserError(
            f"resume={run.config.resume}: configuration {before['config_hash'][:12]} cannot be continued with "
            f"{header['config_hash'][:12]}; they differ in {', '.join(changed[:5])}"
        )
    for key, words in (("data_digest", "data"), ("teachers", "teachers")):
        if before[key] != header[key]:
            raise UserError(f"resume={run.config.resume}: {words} {before[key]} cannot be continued with {header[key]}")
    if (before["threads"], before["cpu"]) != (header["threads"], header["cpu"]):
        logger.warning(
            "continued with %d threads on %s after %d on %s: results agree within rounding only",
            header["threads"],
            header["cpu"],
            before["threads"],
            before["cpu"],
        )


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# fine-tuning ---------------------------------------------------------------------------------------------------------


def finetune(run: Run) -> float | None:
    """Fine-tune every teacher that the configuration does not take from a checkpoint; one: in this run itself."""
    config = run.config
    todo = [k for k, t in enumerate(config.model.teachers) if t.checkpoint is None]
    if not config.model.teachers:
        raise UserError("model.teachers is empty: choose model/teacher=… to have something to fine-tune")
    if not todo or config.finetune.epochs == 0:
        logger.info("nothing to fine-tune: every teacher has a checkpoint, or finetune.epochs=0")
        return None
    results = [finetune_teacher(run, k) for k in todo]
    means = {f"final/teacher_{k}_acc": r["final/acc_val_selected"] for k, r in zip(todo, results, strict=True)}
    run.journal.metrics(means, 0)
    report.print_table("fine-tuned teachers", [(config.model.teachers[k].name, v) for k, v in zip(todo, means.values(), strict=True)])
    return sum(means.values()) / len(means)


def finetune_teacher(parent: Run, index: int) -> dict[str, float]:
    """A nested run that fine-tunes one teacher, and keeps it for other runs on this machine."""
    key = f"teacher_{index}"
    done = parent.finished_child(key)
    if done is not None:
        return done
    run = parent.child("finetune", key, parent.config)
    with run.nested():
        prepare(run.config, threads_of(run))
        data = load_data(run)
        net = networks.build_teacher(run.config, data, index)
        device = networks.device_of(run.config)
        task = FineTuning(run.config, data, net, device)
        run.journal.tags({"asib.teacher": str(index), "asib.eval_split": task.data.eval_split})
        name = run.config.model.teachers[index].name
        logger.info("fine-tuning teacher %d, %s, for %d epochs", index, name, run.config.finetune.epochs)
        loop = train(run, task, Precision(run.config.optim, device), data, [])
        results = task.results()
        loop.finish(results)
        if not run.follower:
            path = run.folder / teachers.WEIGHTS
            networks.save(net, path, run.config, data)
            teachers.keep(net, run, run.config, data, index)
            run.journal.artifact(path, "checkpoints")
            run.journal.tags({"asib.weights": weights_hash(net.net)})
            run.journal.model(_weights_folder(run, path), name="teacher", kind="weights", metrics=results)
        report.write_results(run, results)
    distributed.barrier()
    return results


def _weights_folder(run: Run, path: Path) -> Path:
    folder = run.folder / "model"
    folder.mkdir(exist_ok=True)
    target = folder / path.name
    target.unlink(missing_ok=True)
    os.link(path, target)
    return folder


# distillation --------------------------------------------------------------------------------------------------------


def distill(run: Run) -> float | None:
    """Distil the student from the configuration's teachers."""
    config = run.config
    prepare(config, threads_of(run))
    data = load_data(run)
    distils = config.method.kd_alpha > 0
    found = teachers.obtain(run, data) if distils else []
    device = networks.device_of(config)
    student = networks.build_student(config, data)
    task = Distillation(config, data, student, [t.net for t in found], device)
    run.journal.tags({"asib.eval_split": task.data.eval_split})
    if any(t.saw_validation for t in found) and task.data.has_validation:
        run.journal.tags({"asib.val_contaminated": "true"})
    for teacher in found:
        if teacher.run_id is not None:
            run.journal.model_input(teacher.run_id)
    loop = train(run, task, Precision(config.optim, device), data, found)
    results = task.results()
    loop.finish(results)
    if not run.follower:
        _keep_student(run, data, task, results)
        report.print_results(config, results)
    report.write_results(run, results)
    return results.get("final/val_acc", results["final/acc_last"])


def _keep_student(run: Run, data: ImageData, task: Distillation, results: dict[str, float]) -> None:
    path = run.folder / STUDENT
    networks.save(task.student, path, run.config, data)
    run.journal.artifact(path, "checkpoints")
    if task.fusion is not None:
        fusion = run.folder / FUSION
        export.save_fusion(task.fusion, fusion)
        run.journal.artifact(fusion, "checkpoints")
    run.journal.tags({"asib.weights": weights_hash(task.student.net)})
    report.curves(run)
    test = task.data.test
    report.confusion(run, outputs(task.student, test).logits.argmax(dim=1), test.labels, data.classes)
    if run.config.log_model:
        export.log_student(run, task.student, data, results)


def baseline(run: Run) -> float | None:
    """The student alone: the same B-epochs with cross-entropy only, and without teachers."""
    return distill(run)


def student_alone(config: Config) -> Config:
    """The configuration without teachers and distillation; the student still trains as many B-epochs."""
    method = config.method.model_dump() | {"ce_alpha": 1.0, "kd_alpha": 0.0, "renorm_ce_kd": False, "kd_target": "avg"}
    plain = config.model_dump() | {"method": method, "model": {"student": config.model.student.model_dump()}}
    return Config.model_validate(plain | {"log_model": False})


# evaluation ----------------------------------------------------------------------------------------------------------


def evaluate(run: Run) -> float | None:
    """Evaluate a student on the test split: `student`, a file or runs:/<id>."""
    config = run.config
    if config.student is None:
        raise UserError("student is not set: give student=runs:/<id> or a weights file")
    prepare(config)
    path, source_run = teachers.locate(run, config.student, STUDENT, f"student={config.student}")
    return _evaluate_file(run, path, source_run)["test/acc"]


def _evaluate_file(run: Run, path: Path, source_run: str | None) -> dict[str, float]:
    config, data = run.config, load_data(run)
    net = networks.build_student(config, data)
    metadata = networks.load(net, path, f"student={config.student}")
    if metadata.get("classes", list(data.classes)) != list(data.classes):
        raise UserError(
            f"student={config.student}: it was trained on other classes ({', '.join(metadata['classes'][:3])}, …) than "
            f"dataset.name={config.dataset.name} has ({', '.join(data.classes[:3])}, …)"
        )
    if source_run is not None:
        run.journal.model_input(source_run)
        run.journal.tags({"asib.student": source_run})
    run.journal.tags({"asib.eval_split": "test", "asib.weights": weights_hash(net.net)})
    run.ready()
    batches = sources_test(config, data)
    logits = outputs(net, batches).logits
    found = report.classification(logits, batches.labels)
    run.journal.metrics(found, 0)
    if not run.follower:
        report.confusion(run, logits.argmax(dim=1), batches.labels, data.classes)
        report.write_results(run, found)
        report.print_table(f"{config.model.student.name} on {data.name} (test, {len(data.test_y)} images)", list(found.items()))
    return found


def sources_test(config: Config, data: ImageData) -> Any:
    """The test split on the run's device."""
    from pipeline.data.batches import EvalBatches

    return EvalBatches(
        data.test_x,
        data.test_y,
        None,
        config.dataset.eval_batch_size,
        mean=data.mean,
        std=data.std,
        device=networks.device_of(config),
        channels_last=config.optim.use_channels_last,
    )


# all together --------------------------------------------------------------------------------------------------------


def main(run: Run) -> float | None:
    """The main job: student alone, teachers, distillation, evaluation, as nested runs; one table at the end."""
    config = run.config
    if not config.model.teachers or config.method.kd_alpha == 0:
        raise UserError("the main job distils: it needs model.teachers and method.kd_alpha > 0 (the student alone: -e baseline)")
    prepare(config)
    run.ready()
    alone = _nested(run, "baseline", "student_alone", student_alone(config), distill)
    for index, teacher in enumerate(config.model.teachers):
        if teacher.checkpoint is None and config.finetune.epochs > 0:
            finetune_teacher(run, index)
    distilled = _nested(run, "distill", "distill", config, distill)
    evaluated = _nested(run, "evaluate", "evaluate", config, _evaluate_distilled)
    summary = {k: v for k, v in distilled.items() if k.startswith("final/")}
    summary |= {"final/student_alone_acc": alone["final/acc_val_selected"], "test/acc": evaluated["test/acc"]}
    run.journal.metrics(summary, 0)
    report.write_results(run, summary)
    if not run.follower:
        report.print_results(config, summary)
    return distilled.get("final/val_acc")


def _evaluate_distilled(run: Run) -> float | None:
    assert run.parent is not None
    distilled = run.parent.folder / "distill"
    student = json.loads((distilled / "delivery.json").read_text())["run_id"] if run.delivery is not None else None
    return _evaluate_file(run, distilled / STUDENT, student)["test/acc"]


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


def threads_of(run: Run) -> int | None:
    """A continued run takes the threads it began with, so that it ends bit-identical."""
    return run.state["header"]["threads"] if run.state is not None and run.config.threads is None else None


__all__ = ["baseline", "distill", "evaluate", "finetune", "main", "read_metadata", "student_alone"]
