"""Continual learning inside a tracked run: its tasks as nested runs, one after another, and what is kept between them.

Each task is a training like any other (`fit`), on a part of the data. Whatever the next one needs is in the files of
the one before, and is read from there whether it was written a moment or a week ago: a run that is continued therefore
does what an undisturbed one does.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.class_view import ClassView
from models.features import FeatureNet
from models.weights import weights_hash
from pipeline.config import for_nested
from pipeline.config.identity import computation
from pipeline.data.batches import EvalBatches
from pipeline.data.sources import ImageData
from pipeline.data.splits import split
from pipeline.data.tasks import class_tasks, seen_classes
from pipeline.distill import continual_report, export, networks, register, results, teachers
from pipeline.distill.fit import conclude, fit, keep_weights
from pipeline.distill.teachers import Teacher
from pipeline.distill.train import check_material, state_identity
from pipeline.errors import Pruned, UserError
from pipeline.files import read_state, write_atomically
from pipeline.runs import opening
from pipeline.runs.continuation import check_computation
from pipeline.runs.folders import STUDENT
from pipeline.runs.naming import method_of
from pipeline.runs.run import Run
from pipeline.training import distributed
from pipeline.training.compiling import compiles
from pipeline.training.continual.kept import Kept
from pipeline.training.continual.report import Probe, Row
from pipeline.training.evaluation import outputs
from pipeline.training.loop import Verdict, Watch
from pipeline.training.optim import Precision
from pipeline.training.rng import Streams
from pipeline.training.run_data import Scope
from pipeline.training.student import Distillation

logger = logging.getLogger("asib")
KEPT = "continual/kept.safetensors"
ROW = "continual/row.json"
"""Files of a task's run: what is kept for later tasks, and its row of the accuracy matrix."""
PROTOCOL = "continual/protocol.json"
"""A file of the outer run: what it computes."""


def distill(run: Run, data: ImageData) -> float | None:
    """Train the tasks, report, and log the student of the last one."""
    done = _Sequence(run, data, None)
    found, student = done.run()
    predicted = done.scores(student)["test"].argmax(dim=1)  # in all processes, which evaluation joins
    if not run.follower:
        keep_weights(run, data, student)
        results.predictions(run, predicted, data.test_y)
        continual_report.pictures(run, done.rows["test"], done.names)
        if run.config.log_model:
            export.log_student(run, student, data, found)
            register.student(run, run.config, data, found)
        if run.parent is None:
            method = method_of(run.config, run.command)
            continual_report.print_results(run.config, method, found, done.rows["test"], done.names)
    results.write_results(run, found)
    return found.get("final/val_acc", found["final/acc_last"])


def trial(run: Run, data: ImageData, watch: Watch) -> dict[str, float]:
    """Train the tasks without the test split. Returns the final metrics. Raises Pruned, Taken: as `watch` decided."""
    found, student = _Sequence(run, data, watch).run()
    if not run.follower:
        keep_weights(run, data, student)
    results.write_results(run, found)
    return found


@dataclass
class _Later:
    """A trial's watch that counts the epochs of all tasks."""

    watch: Watch
    before: int
    reason: str = ""

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> Verdict:
        verdict = self.watch(self.before + epoch, metrics)
        self.reason = self.watch.reason
        return verdict

    def still_ours(self) -> bool:
        return self.watch.still_ours()


class _Sequence:
    """The tasks of a run. `watch`: of a sweep's trial, which does not see the test split; None: no trial."""

    def __init__(self, run: Run, data: ImageData, watch: Watch | None) -> None:
        self.outer, self.data, self.watch = run, data, watch
        self.config, self.own = run.config, run.config.continual
        everything = tuple(range(data.num_classes))
        stream = self.own.scenario == "teachers"
        self.tasks = [everything] * (self.own.num_tasks or 0) if stream else class_tasks(self.own, data.num_classes)
        if 0 < self.own.buffer_size < data.num_classes and self.own.buffer_rule != "reservoir":
            raise UserError(
                f"continual.buffer_size={self.own.buffer_size} keeps no image of some of the {data.num_classes} "
                "classes: raise it, or set continual.buffer_rule=reservoir"
            )
        named = self.config.model.teachers
        self.names = [f"task {t + 1}" for t in range(len(self.tasks))]
        if stream:  # teachers may be of one kind
            self.names = [f"{k} {teacher.name}" for k, teacher in enumerate(named)]
        parts = split(data.train_y, self.config.dataset.val_fraction, data.digest, self.config.dataset.split_seed)
        test, self.taught = watch is None, []
        if self.config.method.taught:
            self.taught = teachers.obtain(run, data, networks.build_student(self.config, data), test)
        self.splits = {"val": self._batches(data.train_x, data.train_y, parts.val)} if len(parts.val) else {}
        if test:
            self.splits["test"] = self._batches(data.test_x, data.test_y, None)
        self.probes = {
            name: Probe(batches.labels, self.tasks, self._answers(batches) if stream else None)
            for name, batches in self.splits.items()
        }
        for name, batches in self.splits.items():
            for number, task in enumerate(self.tasks):
                if not torch.isin(batches.labels.cpu(), torch.tensor(task)).any():
                    raise UserError(
                        f"continual.num_tasks={self.own.num_tasks}: task {number + 1} has no {name} images; give fewer "
                        "tasks, or raise dataset.val_fraction"
                    )
        self.rows: dict[str, list[Row]] = {name: [] for name in self.splits}

    def _batches(self, images: Any, labels: Tensor, indices: Tensor | None) -> EvalBatches:
        if indices is not None and isinstance(images, Tensor):  # what does not take part stays off the device
            images, labels, indices = images[indices], labels[indices], None
        return networks.eval_batches(self.config, images, labels, indices, self.data.mean, self.data.std)

    def _answers(self, batches: EvalBatches) -> list[Tensor]:
        """What each teacher of a stream predicts."""
        return [outputs(t.net, batches, f"teacher {k}").logits.argmax(dim=1) for k, t in enumerate(self.taught)]

    # the whole -------------------------------------------------------------------------------------------------------

    def run(self) -> tuple[dict[str, float], FeatureNet]:
        """All tasks: the final metrics, and the last student, its head unmasked."""
        run, config = self.outer, self.config
        hashes = [t.hash for t in self.taught]
        device = networks.device_of(config)
        made_of = {"config_hash": run.config_hash, "amp_dtype": Precision(config.optim, device).name, "bank": False}
        made_of |= {"teachers": hashes, "data_digest": self.data.digest, "compiled": compiles(config, device)}
        self._check_protocol(made_of)
        state_identity(run, made_of)
        run.journal.tags({"asib.eval_split": next(iter(self.splits)), "asib.bank": "off"})
        run.journal.tags({"asib.class_order": ",".join(str(c) for task in self.tasks for c in task)[:5000]})
        if any(t.saw_validation for t in self.taught) and "val" in self.splits:
            run.journal.tags({"asib.val_contaminated": "true"})
        run.ready()
        before: dict[str, Row] = {}  # before any task there are no kept images to classify by
        if self.own.classifier == "head":
            before = {name: self.probes[name].row(s, 0) for name, s in self.scores(self._before(0)[0]).items()}
        costs: list[Mapping[str, float]] = []
        stated = results.metrics_of(run) if not run.follower else {}
        for number in range(len(self.tasks)):
            costs.append(self._task(number))
            for name, row in self._row(number).items():
                self.rows[name].append(row)
                found = continual_report.after_task(self.rows[name], name, self.names, before.get(name))
                if number not in {step for step, _ in stated.get(next(iter(found)), ())}:
                    run.journal.metrics(found, number)
        student, _ = self._before(len(self.tasks))
        found = continual_report.final(self.rows, before) | continual_report.summed(costs)
        found["cost/memory_bytes"] = float(self._kept(len(self.tasks)).bytes(self.data) + self._past_bytes(student))
        if "cost/seconds" not in stated:  # what else there is was said after the last task
            run.journal.metrics({k: v for k, v in found.items() if not k.startswith("continual/")}, len(self.tasks) - 1)
        return found, student

    def _check_protocol(self, made_of: Mapping[str, Any]) -> None:
        """Refuse to continue a sequence with another configuration: its finished tasks are not trained again."""
        path = self.outer.folder / PROTOCOL
        before = read_state(path)
        if before is not None:
            check_computation(self.config, self.config.resume or self.outer.folder.name, before)
            check_material(self.outer, before, made_of)
        elif not self.outer.follower:
            path.parent.mkdir(parents=True, exist_ok=True)
            stated = {**made_of, "computation": computation(self.config), "threads": torch.get_num_threads()}
            write_atomically(path, json.dumps(stated))
            self.outer.journal.artifact(path, "continual")

    def scores(self, student: FeatureNet, kept: Kept | None = None) -> dict[str, Tensor]:
        """Of each split, scores (n, N) of all classes, the higher the likelier."""
        if self.own.classifier == "nearest_mean":
            kept = kept or self._kept(len(self.tasks))
            labels = self.data.train_y[kept.memory.index]
            features = outputs(student, self._batches(self.data.train_x, self.data.train_y, kept.memory.index)).feat_2d
            found = {name: outputs(student, batches).feat_2d for name, batches in self.splits.items()}
            return {name: kept.nearest_mean(f, features, labels, self.data.num_classes) for name, f in found.items()}
        return {name: outputs(student, batches, "student").logits for name, batches in self.splits.items()}

    @property
    def _past_teaches(self) -> bool:
        return (self.own.past or self.config.method.past) and bool(self.config.method.distils)

    def _past_bytes(self, student: FeatureNet) -> int:
        """What the copy of the past student takes while a task is trained."""
        return sum(value.nbytes for value in student.state_dict().values()) if self._past_teaches else 0

    # one task --------------------------------------------------------------------------------------------------------

    def _folder(self, number: int) -> Path:
        return self.outer.folder / _key(number)

    def _row(self, number: int) -> dict[str, Row]:
        found: dict[str, Row] = json.loads((self._folder(number) / ROW).read_text())
        return found

    def _kept(self, number: int) -> Kept:
        """What was kept of the tasks before this one."""
        return Kept.empty(self.own.buffer_size) if number == 0 else Kept.read(self._folder(number - 1) / KEPT)

    def _before(self, number: int) -> tuple[FeatureNet, str | None]:
        """The student as it was before a task, made anew, and the hash of its weights; None: untrained."""
        student = networks.build_student(self.config, self.data)
        if number == 0:
            return student, None
        path = self._folder(number - 1) / STUDENT
        networks.load(student, path, str(path), self.data)
        return student, weights_hash(student.net)

    def _task(self, number: int) -> Mapping[str, float]:
        """Train a task, unless it has ended before; its results."""
        done = self.outer.finished_child(_key(number))
        if done is not None:
            return done
        config, name = for_nested(self.config), f"task {number + 1} of {len(self.tasks)}"
        run = opening.child(self.outer, "distill", _key(number), config, name)
        run.journal.tags({"asib.task": str(number + 1), "asib.classes": _words(self.tasks[number], self.data)})
        with run.nested():
            logger.info("task %d of %d: %s", number + 1, len(self.tasks), self._said(number))
            found = self._train(run, number)
        distributed.barrier()  # the others read what the first process has written
        return found

    def _said(self, number: int) -> str:
        if self.own.scenario == "teachers":
            return f"teacher {self.names[number]}"
        return f"{len(self.tasks[number])} classes ({_words(self.tasks[number], self.data)})"

    def _train(self, run: Run, number: int) -> dict[str, float]:
        student, weights = self._before(number)
        kept = self._kept(number)
        seen = seen_classes(self.tasks, number + 1)
        scope = self._scope(number, seen, kept)
        taught = [*self._teachers(number, seen)]
        if number and self._past_teaches:
            past, _ = self._before(number)
            known = len(seen) - (0 if self.own.scenario == "teachers" else len(self.tasks[number]))
            rule = "masked" if self.config.method.past else self.config.model.unseen
            past.show(ClassView(torch.tensor(seen), torch.arange(len(seen)) < known, rule))
            taught.append(Teacher(past, str(weights), None, saw_validation=False))
        student.show(ClassView(torch.tensor(seen)))
        penalties = {}
        if kept.consolidation.fisher:
            at_home = kept.consolidation.to(networks.device_of(self.config))
            penalties["ewc"] = partial(at_home.penalty, weight=self.own.lambda_ewc)
        before = number * (self.config.method.a_epochs + self.config.method.b_epochs)
        watch = None if self.watch is None else _Later(self.watch, before)
        try:
            task, loop = fit(run, self.data, student, taught, watch, scope, penalties)
        except Pruned as error:
            raise Pruned(before + error.at, error.reason, error.unit) from error
        found = conclude(self.data, task, loop, self.watch is None)
        student.show(None)
        self._conclude(run, number, student, task, kept)
        results.write_results(run, found)
        return found

    def _scope(self, number: int, seen: Sequence[int], kept: Kept) -> Scope:
        first = len(seen) - len(self.tasks[number]) if self.own.ce_classes == "new" and number else 0
        return Scope(
            tuple(seen),
            None if self.own.joint else self.tasks[number],
            kept.memory.index,
            kept.memory.logits,
            kept.memory.known,
            self.own.replay_ratio,
            _key(number),
            selects=False,
            first_class=0 if self.own.scenario == "teachers" else first,
        )

    def _teachers(self, number: int, seen: Sequence[int]) -> Iterator[Teacher]:
        """The task's teachers, which answer about the classes seen so far as far as they know them."""
        of_task = len(self.config.model.teachers)
        if self.own.scenario == "teachers":
            chosen = self.taught[number : number + 1]
        elif self.own.teachers == "oracle":
            chosen = self.taught
        else:
            begin = number * of_task if self.own.teachers == "task" else 0
            chosen = self.taught[begin : (number + 1) * of_task]
        for teacher in chosen:
            net = copy.deepcopy(teacher.net) if self.config.method.teachers_change else teacher.net
            known = torch.isin(torch.tensor(seen), torch.tensor(teacher.classes)) if teacher.classes else None
            net.show(ClassView(torch.tensor(seen), known, self.config.model.unseen))
            yield replace(teacher, net=net)

    # after a task ----------------------------------------------------------------------------------------------------

    def _conclude(self, run: Run, number: int, student: FeatureNet, task: Distillation, kept: Kept) -> None:
        """Write what later tasks need, and the task's row of the matrix."""
        scope = task.data.scope
        assert scope is not None
        own = task.data.train.indices.cpu()
        images, mean, std = task.data.train.images, self.data.mean, self.data.std
        index = own[: len(own) - len(scope.memory)]
        new = networks.eval_batches(self.config, images, self.data.train_y, index, mean, std)
        streams = Streams(self.config.seed, _key(number))
        kept = kept.after(student, new, scope, self.config, streams, last=number == len(self.tasks) - 1)
        row = {name: self.probes[name].row(s, number + 1) for name, s in self.scores(student, kept).items()}
        if run.follower:
            return
        keep_weights(run, self.data, student, task)
        (run.folder / KEPT).parent.mkdir(exist_ok=True)
        write_atomically(run.folder / KEPT, kept.dump())
        write_atomically(run.folder / ROW, json.dumps(row))
        for name in (KEPT, ROW):
            run.journal.artifact(run.folder / name, "continual")


def threads_of(run: Run) -> int | None:
    """The threads that a continued sequence began with; None: it begins now, or they are set."""
    before = read_state(run.folder / PROTOCOL) if run.config.threads is None else None
    return None if before is None else int(before["threads"])


def _key(number: int) -> str:
    return f"task_{number + 1}"


def _words(classes: Sequence[int], data: ImageData, most: int = 10) -> str:
    return ", ".join(data.classes[c] for c in classes[:most]) + ("…" if len(classes) > most else "")
