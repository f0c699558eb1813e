"""The sweep's driver: one run for the study, workers that take its trials, and what is left of it at the end."""

import json
import logging
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.config import Config, config_hash
from pipeline.config.rules import needs_distillation
from pipeline.data.sources import ImageData
from pipeline.errors import Interrupted
from pipeline.experiment import compose, export, jobs, networks, records, teachers
from pipeline.experiment.execute import stop
from pipeline.experiment.launch.launcher import Launcher
from pipeline.experiment.registry import register
from pipeline.experiment.run import Run
from pipeline.experiment.session import load_data, prepare, threads_of
from pipeline.experiment.study import report as study_report
from pipeline.experiment.study.study import Counts, Study
from pipeline.experiment.sweep import estimate as sweep_estimate
from pipeline.experiment.sweep import plan as sweep_plan
from pipeline.experiment.sweep import reap as sweep_reap
from pipeline.experiment.sweep import space as sweep_space
from pipeline.experiment.sweep import worker as sweep_worker
from pipeline.experiment.sweep.plan import STUDY_TAG, Plan

logger = logging.getLogger("asib")
TICK_S = 1.0
BEST = "best.yaml"
OF_THE_RUN = ("parent_run", "parent_journal", "folder", "host", "teachers")
"""Facts that change when a study goes on in another run than it began in."""


def sweep(run: Run, plan: Plan) -> float | None:
    """Run the plan's study to its number of trials; the best trial's student gets the model.

    Returns:
        The best value; None with several objectives.

    Raises:
        RuntimeError: workers end without finishing any trial.
    """
    prepare(run.config, threads_of(run))
    data = load_data(run)
    run.journal.params(sweep_plan.params(plan))
    run.journal.tags({STUDY_TAG: plan.name})
    run.ready()
    base = _base(run.config)
    study, found = _study(run, plan, base, data)
    sweep_reap.reap(plan.storage, run.delivery, except_run=run.run_id)
    left = study.total - study.tend().ended
    if left > 0:
        estimate = sweep_estimate.estimate(
            base, data, [t.net for t in found], trials=left, workers=min(plan.workers, left)
        )
        logger.info("%s", sweep_estimate.words(estimate, Path(base.output_dir)))
    _Driver(run, plan, study).drive()
    return _finish(run, plan, study, base, data)


def _base(config: Config) -> Config:
    """What every trial starts from: the run's configuration without what belongs to the run itself."""
    return config.model_copy(update={"resume": None, "extend": False, "run_name": None})


def _study(run: Run, plan: Plan, base: Config, data: ImageData) -> tuple[Study, list[teachers.Teacher]]:
    """The study with all that a worker needs to know; teachers that are not there are fine-tuned first, once."""
    found: list[teachers.Teacher] = []
    if needs_distillation(base):
        found = teachers.obtain(run, data, networks.build_student(base, data))
    run.journal.tags({"asib.teachers": ",".join(t.hash for t in found) or "none"})
    facts = {
        "digest": plan.digest,
        "config": compose.dump(base),
        "config_hash": config_hash(base),
        "parent_run": run.run_id or "",
        "parent_journal": run.journal.id,
        "folder": str(run.folder.absolute()),
        "host": socket.gethostname(),
        "teachers": _made_teachers(run, base, data, found),
    }
    study = Study.create(plan.storage, plan.name, plan.sweep, facts)
    study.note(**{name: facts[name] for name in OF_THE_RUN})
    return study, found


def _made_teachers(
    run: Run, base: Config, data: ImageData, found: list[teachers.Teacher]
) -> list[dict[str, str | None]]:
    """Where workers on other machines find the teachers that were fine-tuned here."""
    made = []
    for index, teacher in enumerate(found):
        if base.model.teachers[index].checkpoint is None and base.finetune.epochs > 0:
            folder = run.folder / f"teacher_{index}"
            run_id = records.delivered_as(folder)
            if run_id is None and run.delivery is not None and (folder / "journal.jsonl").exists():
                run_id = run.delivery.child_ready(folder)
            made.append({"file": teachers.store(base, data, index).name, "run_id": run_id, "hash": teacher.hash})
    return made


class _Driver:
    """Keeps workers at work until every trial has ended, and the parent run up to date."""

    def __init__(self, run: Run, plan: Plan, study: Study) -> None:
        self.run, self.plan, self.study = run, plan, study
        self.launcher = Launcher(plan.cluster, run.folder / "launched", plan.workers)
        self.started = self.idle_starts = 0
        self._shown: Any = None

    def drive(self) -> None:
        """Raises Interrupted after a signal, when the workers have left their checkpoints."""
        with (
            stop.between_batches(),
            logging_redirect_tqdm([logger]),
            tqdm(total=self.study.total, unit="trial", disable=None, leave=False) as bar,
        ):
            counts = self.study.tend()
            results = counts.complete + counts.pruned
            next_tend = 0.0
            while counts.ended < self.study.total:
                if stop():
                    self._stop()
                self._start_missing(counts)
                time.sleep(TICK_S)
                if time.monotonic() > next_tend:
                    counts = self.study.tend()
                    next_tend = time.monotonic() + self.plan.sweep.heartbeat_seconds / 2
                else:
                    counts = self.study.counts()
                if counts.complete + counts.pruned > results:
                    results, self.idle_starts = counts.complete + counts.pruned, 0
                self._show(counts, bar)
            self._wait_for_workers()

    def _start_missing(self, counts: Counts) -> None:
        left = self.study.total - counts.ended
        missing = min(self.plan.workers, left) - max(self.launcher.alive(), counts.running)
        if missing <= 0:
            return
        if self.idle_starts >= 2 * self.plan.workers + 1:
            word = self.study.last_error() or "they left no word"
            raise RuntimeError(f"{self.idle_starts} workers ended without a result: {word}; see {self.launcher.folder}")
        os.environ[sweep_worker.STORAGE] = self.plan.storage
        self.launcher.start(sweep_worker.work, missing, study=self.plan.name)
        self.idle_starts += missing if self.started else 0
        self.started += missing

    def _stop(self) -> None:
        logger.warning("waiting for the workers to write their checkpoints; the same command goes on with the study")
        self.launcher.stop()
        self._state(self.study.tend())
        raise Interrupted(stop())

    def _wait_for_workers(self) -> None:
        """They bring what they have to the tracking server; those that cannot are not waited for."""
        until = time.monotonic() + self.run.config.tracking.finish_seconds + 5
        while self.launcher.alive() and time.monotonic() < until and not stop():
            time.sleep(0.2)

    def _show(self, counts: Counts, bar: Any) -> None:
        bar.n = counts.ended
        best = self.study.best()
        if best is not None:
            bar.set_postfix_str(f"best {best.values[0]:.4g} (trial {best.number})")
        bar.refresh()
        state = (counts, best.number if best else None)
        if state != self._shown:
            self._shown = state
            self._state(counts)

    def _state(self, counts: Counts) -> None:
        """What the parent shows while the sweep goes on."""
        self.study.note(driver_seen=time.time())
        numbers = {f"sweep/{name}": float(n) for name, n in asdict(counts).items()}
        best = self.study.best()
        if best is not None and len(self.plan.sweep.objectives) == 1:
            numbers["sweep/best_value"] = float(best.values[0])
            self.run.journal.tags(
                {"asib.best_trial": str(best.number), "asib.best_params": json.dumps(self.study.values_of(best))}
            )
        self.run.journal.metrics(numbers, counts.ended)
        self.run.journal.tags({"mlflow.note.content": _note(self.run, self.plan, self.study)})


# what is left at the end ---------------------------------------------------------------------------------------------


def _finish(run: Run, plan: Plan, study: Study, base: Config, data: ImageData) -> float | None:
    for path in study_report.write(study.optuna, run.folder / "study", plan.sweep):
        run.journal.artifact(path, "study")
    run.journal.tags({"mlflow.note.content": _note(run, plan, study)})
    _name_undelivered(run, study)
    best = study.best()
    print(study_report.text(study.optuna, plan.sweep), flush=True)
    if len(plan.sweep.objectives) > 1:
        _keep_front(run, study, base)
        return None
    if best is None:
        why = study.last_error() or "none is within the constraints"
        raise RuntimeError(f"no trial of {plan.name} can be taken: {why}")
    config = _config_of(study, best, base)
    run.write(BEST, compose.dump(config.model_copy(update={"log_model": base.log_model})))
    run.journal.metrics({plan.sweep.objectives[0].metric: float(best.values[0])}, 0)
    _keep_best(run, study, best, config, data)
    return float(best.values[0])


def _note(run: Run, plan: Plan, study: Study) -> str:
    """The parent's description."""
    where = run.delivery.wait_ready().experiment_id if run.delivery is not None else ""
    return study_report.note(study.optuna, plan.sweep, experiment=where, storage=plan.storage, parent=run.run_id or "")


def _config_of(study: Study, trial: optuna.trial.FrozenTrial, base: Config) -> Config:
    """A trial's configuration, with the threads that it ran with: they decide the last bits."""
    threads = study.source_of(trial).user_attrs.get("threads")
    return sweep_worker.trial_config(sweep_space.apply(base, study.values_of(trial)), threads)


def _keep_front(run: Run, study: Study, base: Config) -> None:
    """Each trial of the Pareto front as a configuration that can be run."""
    for trial in study.pareto():
        config = sweep_worker.trial_config(
            sweep_space.apply(base, study.values_of(trial)), trial.user_attrs.get("threads")
        )
        run.write(f"front_{trial.number:04d}.yaml", compose.dump(config), "front")


def _name_undelivered(run: Run, study: Study) -> None:
    """Trials whose runs are not on the server (off line, or it was away) are brought there with this run."""
    for trial in study.trials():
        folder = Path(trial.user_attrs.get("folder", "/nowhere"))
        if (folder / "journal.jsonl").exists() and records.delivered_as(folder) is None:
            run.journal.child(folder)


def _keep_best(run: Run, study: Study, best: optuna.trial.FrozenTrial, config: Config, data: ImageData) -> None:
    """The best trial's student as the sweep's model."""
    attrs = study.source_of(best).user_attrs
    weights = Path(attrs.get("folder", "")) / jobs.STUDENT
    if not weights.is_file():
        if run.delivery is None or not attrs.get("run_id"):
            logger.warning(
                "the best trial's weights are on %s: no model is logged", attrs.get("host", "another machine")
            )
            return
        weights = run.fetch(f"runs:/{attrs['run_id']}/{jobs.STUDENT}", run.folder / "fetched")
    net = networks.build_student(config, data)
    networks.load(net, weights, str(weights))
    kept = run.folder / jobs.STUDENT
    networks.save(net, kept, config, data)
    run.journal.artifact(kept, "checkpoints")
    if run.config.log_model:
        results = {"final/val_acc": float(best.values[0])}
        export.log_student(run, net, data, results)
        register.student(run, config, data, results)
