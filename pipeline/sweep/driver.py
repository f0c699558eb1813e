"""The sweep's driver: one run for the study, workers that take its trials, and the results at the end."""

import json
import logging
import math
import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline import urls
from pipeline.compose import compose
from pipeline.config import Config, config_hash
from pipeline.data.sources import ImageData
from pipeline.distill import export, networks, register, teachers
from pipeline.distill.train import load_data, prepare, threads_of
from pipeline.errors import Interrupted, UserError
from pipeline.files import read_state
from pipeline.launch.crew import Crew
from pipeline.launch.worker import free_memory
from pipeline.runs import records
from pipeline.runs.folders import STUDENT
from pipeline.runs.run import Run, tracking_uri
from pipeline.sweep import ahead, reap, request, worker
from pipeline.sweep.request import STUDY_TAG, Plan
from pipeline.sweep.space.changes import apply
from pipeline.sweep.study import report
from pipeline.sweep.study.retry import REPEATS, SEEDS, replaced
from pipeline.sweep.study.study import Counts, Study
from pipeline.training.compiling import check_device

logger = logging.getLogger("asib")
Made = Sequence[Mapping[str, Any]]
"""Fine-tuned teachers as a study's facts list them: file, run_id, hash."""
TICK_S = 1.0
BEST = "best.yaml"
OF_THE_RUN = ("config", "config_hash", "parent_run", "parent_journal", "folder", "host", "teachers", "parents")
"""Facts that may change when a study is continued: its run, its folder, the tracking server."""
KEPT = "asib.kept_trial"
"""Tag: the trial whose student is the sweep's model."""


def sweep(run: Run, plan: Plan) -> float | None:
    """Run the plan's study until all its trials have ended; log the best trial's student as the model.

    Return the best value; None with several objectives. Raises RuntimeError or HelperFailed: no result.
    """
    prepare(run.config, threads_of(run))
    if plan.workers.cluster.kind == "local":
        check_device(run.config, networks.device_of(run.config))
    data = load_data(run)
    run.journal.params(request.params(plan))
    run.journal.tags({STUDY_TAG: plan.name})
    run.ready()
    base = run.config.model_copy(update={"resume": None, "extend": False, "run_name": None})  # for the trials
    study, found = _study(run, plan, base, data)
    reap.reap(plan.storage, run.delivery, except_run=run.run_id)
    counts = study.requeue_stale()
    left = study.goal(counts) - counts.ended
    study.note(driver_seen=time.time())
    if found and ahead.pays(base, plan, left):
        for index in range(plan.sweep.seeds):
            ahead.build(worker.of_seed(base, index), data, found, run.stop)
    del found
    free_memory()  # the workers' GPUs are this process's
    _Driver(run, plan, study).drive()
    return _finish(run, plan, study, base, data)


def _study(run: Run, plan: Plan, base: Config, data: ImageData) -> tuple[Study, list[teachers.Teacher]]:
    """Create or continue the study, with everything a worker needs to know; fine-tune missing teachers first, once."""
    found: list[teachers.Teacher] = []
    before = Study.refuse_other(plan.storage, plan.name, plan.digest, plan.sweep)
    if before.get("data", data.digest) != data.digest:
        raise UserError(
            f"study {plan.name}: its trials were trained on other data (digest {before['data'][:12]} there, "
            f"{data.digest[:12]} here): give study=<another name>"
        )
    try:
        worker.fetch_teachers(before.get("teachers", ()), run)
    except UserError as error:
        logger.warning("%s: fine-tuning the teachers again", error)
    if base.method.taught:
        found = teachers.obtain(run, data, networks.build_student(base, data), test=False, config=base)
    run.journal.tags({"asib.teachers": ",".join(t.hash for t in found) or "none"})
    facts: dict[str, Any] = {
        "digest": plan.digest,
        "config": compose.dump(base),
        "config_hash": config_hash(base),
        "parent_run": run.run_id or "",
        "parent_journal": run.journal.id,
        "folder": str(run.folder.absolute()),
        "host": socket.gethostname(),
        "teachers": _made_teachers(run, base, data, found, before.get("teachers", ())),
        "data": data.digest,
        "parents": [*dict.fromkeys([*before.get("parents", ()), run.journal.id])],
        "driver_seen": time.time(),
    }
    _refuse_other_teachers(plan.name, before.get("teachers", ()), facts["teachers"])
    study = Study.create(plan.storage, plan.name, plan.sweep, facts)
    study.note(**{name: facts[name] for name in OF_THE_RUN})
    return study, found


def _refuse_other_teachers(name: str, before: Made, now: Made) -> None:
    """Refuse teachers that differ in a single bit from those of earlier trials."""
    hashes = {made["file"]: made["hash"] for made in before}
    for made in now:
        known = hashes.get(made["file"], made["hash"])
        if known != made["hash"]:
            raise UserError(
                f"study {name}: its trials learn from other weights of teachers/{made['file']} ({known} there, "
                f"{made['hash']} here): bring that file from where the study began, or give study=<another name>"
            )


def _made_teachers(
    run: Run, base: Config, data: ImageData, found: list[teachers.Teacher], before: Made
) -> list[dict[str, str | None]]:
    """Where workers on other machines find the fine-tuned teachers of this study."""
    made: list[dict[str, str | None]] = []
    uri = urls.hidden(tracking_uri(base))
    known = {there["file"]: there["run_id"] for there in before}
    for index, teacher in enumerate(found):
        if base.model.teachers[index].checkpoint is not None or base.finetune.epochs == 0:
            continue
        kept = teachers.store(base, data, index)
        folder = run.folder / f"teacher_{index}"
        if not (folder / "journal.jsonl").exists():
            folder = Path((read_state(kept.with_suffix(".json")) or {}).get("folder", folder))
        run_id = None
        if run.delivery is not None:
            run_id = records.delivered_as(folder, uri) or known.get(kept.name)
            if run_id is None and folder.parent == run.folder:
                run_id = run.delivery.child_ready(folder)
        made.append({"file": kept.name, "run_id": run_id, "hash": teacher.hash})
    return made


def time_left(trials: Sequence[FrozenTrial], left: int, workers: int) -> str | None:
    """Words such as "one trial took 23 s: about 6 min left with 2 workers"; None before the first has ended.

    Args:
        left: trials that have not ended yet.
    """
    ran = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and REPEATS not in t.user_attrs]
    seconds = [t.duration.total_seconds() for t in ran if t.duration is not None]
    if not seconds or left < 1:
        return None
    each, at_once = sum(seconds) / len(seconds), min(workers, left)
    took = f"one trial took {_duration(each)}" if len(seconds) == 1 else f"a trial takes {_duration(each)} on average"
    rest = _duration(math.ceil(left / workers) * each)
    return f"{took}: about {rest} left with {at_once} worker{'' if at_once == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _Driver:
    """Keep workers busy until every trial has ended, and keep the parent run up to date."""

    def __init__(self, run: Run, plan: Plan, study: Study) -> None:
        self.run, self.plan, self.study = run, plan, study
        self.crew = Crew(plan.launcher(run.folder / "launched"), plan.workers.number, worker.work, run.stop)
        self._shown: Counts | None = None
        self._said_time_left = False

    def drive(self) -> None:
        """Raise Interrupted after a signal, once the workers have written their checkpoints."""
        with (
            self.run.stop.between_batches(),
            logging_redirect_tqdm([logger]),
            tqdm(total=self.study.total, unit="trial", disable=None, leave=False) as bar,
        ):
            counts, progress = self.study.requeue_stale(), self.study.progress()
            next_requeue = 0.0
            while counts.ended < self.study.goal(counts):
                if self.run.stop():
                    self._stop()
                self._start_missing(counts)
                time.sleep(TICK_S)
                counts = self.study.counts()
                due = time.monotonic() > next_requeue
                over = counts.ended >= self.study.goal(counts)
                if due or over:  # a trial that is being requeued briefly looks failed
                    counts = self.study.requeue_stale()
                if due:
                    self.study.note(driver_seen=time.time())
                    next_requeue = time.monotonic() + self.plan.sweep.heartbeat_seconds / 2
                if (now := self.study.progress()) > progress:
                    progress = now
                    self.crew.progressed()
                self._show(counts, bar)
            self.crew.wait(self.run.config.tracking.finish_seconds + 5)
        if reason := self.study.stopped():
            logger.info("the study stops after %d of %d trials: %s", counts.used, self.study.total, reason)

    def _start_missing(self, counts: Counts) -> None:
        open_trials = max(0, self.study.goal(counts) - counts.used) + counts.waiting
        os.environ[worker.STORAGE] = self.plan.storage
        self.crew.fill(open_trials, counts.running, self.study.last_error, study=self.plan.name)

    def _stop(self) -> None:
        self.crew.leave("the same command continues the study")
        self._state(self.study.requeue_stale())
        raise Interrupted(self.run.stop())

    def _show(self, counts: Counts, bar: Any) -> None:
        bar.refresh()
        if counts == self._shown:
            return
        another = self._shown is not None and counts.ended > self._shown.ended
        self._shown, bar.n = counts, counts.ended
        best = self.study.best()
        if best is not None:
            reached = f"best {best.values[0]:.4g} (trial {best.number})"
            bar.set_postfix_str(reached)
            if another and bar.disable:  # no terminal
                logger.info("%d of %d trials: %s", counts.ended, self.study.goal(counts), reached)
        self._state(counts)
        left = self.study.goal(counts) - counts.ended
        if not self._said_time_left and (words := time_left(self.study.trials(), left, self.plan.workers.number)):
            self._said_time_left = True
            logger.info("%s", words)

    def _state(self, counts: Counts) -> None:
        """Bring the parent run up to date."""
        numbers = {f"sweep/{name}": float(n) for name, n in asdict(counts).items()}
        best = self.study.best()
        if best is not None:
            numbers["sweep/best_value"] = float(best.values[0])
            self.run.journal.tags(
                {"asib.best_trial": str(best.number), "asib.best_params": json.dumps(self.study.values_of(best))}
            )
        self.run.journal.metrics(numbers, counts.ended)
        self.run.journal.tags({"mlflow.note.content": _note(self.run, self.plan, self.study)})


# results --------------------------------------------------------------------------------------------------------------


def _finish(run: Run, plan: Plan, study: Study, base: Config, data: ImageData) -> float | None:
    for path in report.write(study.optuna, run.folder / "study", plan.sweep):
        run.journal.artifact(path, "study")
    run.journal.tags({"mlflow.note.content": _note(run, plan, study)})
    _name_undelivered(run, study)
    best = study.best()
    print(report.text(study.optuna, plan.sweep), flush=True)
    if len(plan.sweep.objectives) > 1 and study.front():
        for trial in study.front():
            config = _with_teachers(_config_of(study, trial, base), study, data)
            run.write(f"front_{trial.number:04d}.yaml", compose.dump(config), "front")
        return None
    if best is None:
        why = study.last_error() or "none satisfies the constraints"
        raise RuntimeError(f"{plan.name} has no best trial: {why}")
    config = _config_of(study, best, base)
    repeated = _with_teachers(config, study, data).model_copy(update={"log_model": base.log_model})
    run.write(BEST, compose.dump(repeated))
    logger.info("to repeat it: python -m steps.distill cfg=%s", shlex.quote(str(run.folder / BEST)))
    stated, metric = records.from_folder(run.folder), plan.sweep.objectives[0].metric
    if stated.metrics.get(metric) != best.values[0]:  # running the same command again duplicates nothing
        run.journal.metrics({metric: float(best.values[0])}, 0)
    if stated.tags.get(KEPT) != str(best.number):
        _keep_best(run, study, best, config, data)
    return float(best.values[0])


def _note(run: Run, plan: Plan, study: Study) -> str:
    """The parent's description."""
    where = run.delivery.wait_ready().experiment_id if run.delivery is not None else ""
    return report.note(
        study.optuna, plan.sweep, experiment=where, storage=plan.storage, parent=run.run_id or "", repeat=run.repeat
    )


def _config_of(study: Study, trial: FrozenTrial, base: Config) -> Config:
    """A trial's configuration, with the threads it ran with: they decide the last bits."""
    threads = study.source_of(trial).user_attrs.get("threads")
    return worker.trial_config(apply(base, study.values_of(trial)), threads)


def _with_teachers(config: Config, study: Study, data: ImageData) -> Config:
    """Name the study's own teachers as checkpoints: fine-tuned elsewhere, their bits would differ."""
    made = {there["file"]: there["run_id"] for there in study.facts["teachers"]}
    specs = []
    for index, spec in enumerate(config.model.teachers):
        run_id = made.get(teachers.store(config, data, index).name) if spec.checkpoint is None else None
        specs.append(spec.model_copy(update={"checkpoint": f"runs:/{run_id}"}) if run_id else spec)
    model = config.model.model_copy(update={"teachers": tuple(specs)})
    return config.model_copy(update={"model": model})


def _name_undelivered(run: Run, study: Study) -> None:
    """Hand trials that are not complete on the server (offline, or an outage) to this run's delivery."""
    trials = study.trials()
    old = replaced(trials)  # a later attempt may continue in a copy
    for trial in trials:
        folder = Path(trial.user_attrs.get("folder", "/nowhere"))
        folders = [folder, *(Path(seed["folder"]) for seed in trial.user_attrs.get(SEEDS, ()))]
        here = [found for found in folders if (found / "journal.jsonl").exists()]
        if trial.number not in old and folder in here and not all(map(records.delivered_whole, here)):
            run.journal.child(folder)


def _keep_best(run: Run, study: Study, best: FrozenTrial, config: Config, data: ImageData) -> None:
    """Log the best trial's student as the sweep's model; of several seeds the first, as `best.yaml` repeats it."""
    attrs = study.source_of(best).user_attrs
    trained, value = attrs, float(best.values[0])
    if SEEDS in attrs:
        trained = attrs[SEEDS][0]
        value = trained["metrics"][study.sweep.objectives[0].metric]
    weights = Path(trained.get("folder", "")) / STUDENT
    if not weights.is_file():
        if run.delivery is None or not trained.get("run_id"):
            where = attrs.get("host", "another machine")
            logger.warning("the best trial's weights are on %s: no model is logged", where)
            return
        try:
            weights = run.fetch(f"runs:/{trained['run_id']}/{STUDENT}", run.folder / "fetched")
        except UserError as error:
            logger.warning("%s: no model is logged; the same command tries again", error)
            return
    net = networks.build_student(config, data)
    networks.load(net, weights, str(weights), data)
    kept = run.folder / STUDENT
    networks.save(net, kept, config, data)
    run.journal.artifact(kept, "checkpoints")
    if run.config.log_model:
        results = {"final/val_acc": value}
        export.log_student(run, net, data, results, config_hash(config))
        register.student(run, config, data, results)
    run.journal.tags({KEPT: str(best.number)})
