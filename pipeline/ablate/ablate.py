"""The ablation: a nested run for each rung and seed, reusing finished ones, and their comparison."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import urls
from pipeline.ablate.request import PLAN_TAG, Plan
from pipeline.compare import compare, job, report
from pipeline.compose import rungs
from pipeline.config import Config, Identity, config_hash, source_digest
from pipeline.config.places import output_dir
from pipeline.data.sources import ImageData
from pipeline.distill import distill, export, networks, register, teachers
from pipeline.distill.train import load_data, prepare, threads_of
from pipeline.errors import NonFinite, UserError
from pipeline.files import read_state, warn_once, write_atomically
from pipeline.journal import read_entries
from pipeline.paths import REPOSITORY
from pipeline.runs import opening, records
from pipeline.runs.folders import STUDENT, ended, folders_with, header_of
from pipeline.runs.run import Run, tracking_uri
from pipeline.training.bank.policy import bank_use
from pipeline.training.compiling import check_device, compiles
from pipeline.training.optim import Precision

logger = logging.getLogger("asib")


@dataclass
class Child:
    """One rung with one seed. `folder` and `run_id`: where its results are, once it has any."""

    config: Config
    identity: str
    folder: Path | None = None
    run_id: str | None = None
    reused: bool = False

    @property
    def name(self) -> str:
        return f"{self.config.rung} seed {self.config.seed}"

    @property
    def key(self) -> str:
        """The name of its folder: each identity has its own, so that stale results are never continued."""
        return f"{self.config.rung}-seed{self.config.seed}-{self.identity[:8]}"


def ablate(run: Run, plan: Plan) -> float | None:
    """Run the plan's rungs and seeds, reuse finished runs, compare, and log the best rung's student as the model."""
    prepare(run.config, threads_of(run))
    check_device(run.config, networks.device_of(run.config))
    data = load_data(run)
    run.journal.params({"rungs": ",".join(plan.names), "seeds": ",".join(map(str, plan.seeds))})
    run.journal.tags({PLAN_TAG: plan.digest})
    run.ready()
    children = _identified(run, plan, data)
    _find_finished(run, children, plan.force)
    failed: list[str] = []
    for number, child in enumerate(children, start=1):
        if child.reused:
            continue
        logger.info("%s (%d of %d)", child.name, number, len(children))
        try:
            _train(run, child)
        except NonFinite as error:  # the other rungs do not depend on it
            failed.append(f"{child.name}: {error}")
    _state_reuse(run, children)
    accuracy: float | None = None
    results = job.read(run, [str(c.folder or c.run_id) for c in children if c.folder or c.run_id])
    if results:
        accuracy = _keep_best(run, data, children, _report(run, children, results))
    if failed:
        raise NonFinite("; ".join(failed))
    return accuracy


# children ------------------------------------------------------------------------------------------------------------


def _identified(run: Run, plan: Plan, data: ImageData) -> list[Child]:
    """All children, each with the identity of its result; missing teachers are fine-tuned first."""
    config, hashes = run.config, tuple[str, ...]()
    device = networks.device_of(config)
    for child in plan.configs:
        check_device(child, device)
    if any(c.method.distils for c in plan.configs):
        student = networks.build_student(config, data)
        hashes = tuple(t.hash for t in teachers.obtain(run, data, student))
    sources = source_digest(REPOSITORY)
    return [
        Child(
            child,
            Identity(
                config_hash(child),
                Precision(child.optim, device).name,
                hashes if child.method.distils else (),
                data.digest,
                sources,
                bank=bank_use(child).on,
                compiled=compiles(child, device),
            ).digest(),
        )
        for child in plan.configs
    ]


def _find_finished(run: Run, children: Sequence[Child], force: bool) -> None:
    """Find finished results: in this run's folder, elsewhere on this machine, on the tracking server."""
    for child in children:
        if run.finished_child(child.key) is not None:
            child.folder, child.reused = run.folder / child.key, True
    if force:
        return
    here = _finished_here(output_dir(run.config), {c.identity for c in children if c.folder is None})
    for child in children:
        if child.folder is None and child.identity in here:
            child.folder, child.reused = here[child.identity], True
    missing = [c for c in children if c.folder is None]
    if missing and run.delivery is not None:
        try:
            there = run.delivery.ask("find_finished", identities=[c.identity for c in missing])
        except UserError as error:
            logger.warning("the server was not asked for finished runs: %s", error)
            there = {}
        for child in missing:
            child.run_id = there.get(child.identity)
            child.reused = child.run_id is not None


def _finished_here(root: Path, wanted: set[str]) -> dict[str, Path]:
    """Identity -> folder of a finished run on this machine, with results and predictions."""
    found: dict[str, Path] = {}
    for folder in folders_with(root, "results.json"):
        if not wanted or not (folder / records.PREDICTIONS).exists():
            continue
        if header_of(folder) is None or not ended(folder):
            continue
        entries, _ = read_entries(folder / "journal.jsonl")
        if any(entry.kind == "damaged" for entry in entries):
            warn_once(f"{folder}: its journal is damaged: not reused")
            continue
        for entry in entries:
            identity = entry.data["values"].get("asib.identity") if entry.kind == "tags" else None
            if identity in wanted:
                found[identity] = folder
    return found


def _train(run: Run, child: Child) -> None:
    nested = opening.child(run, "distill", child.key, child.config, child.name)
    parent = rungs.known()[str(child.config.rung)].parent
    nested.journal.tags({"asib.parent_rung": parent or "none"})
    with nested.nested():
        distill.distill(nested)
    child.folder = nested.folder


def _state_reuse(run: Run, children: Sequence[Child]) -> None:
    """Record which runs were reused, and deliver those that the server lacks."""
    elsewhere = [c for c in children if c.reused and (c.folder is None or c.folder.parent != run.folder)]
    for child in elsewhere:
        if child.folder is not None and records.delivered_as(child.folder, _shown_uri(run)) is None:
            run.journal.child(child.folder)
    run.journal.tags({"asib.reused": ",".join(_id(run, child) for child in elsewhere) or "none"})
    again = sum(c.reused for c in children)
    if again:
        logger.info("%d of %d runs had finished before: reused (force=true runs them again)", again, len(children))


def _id(run: Run, child: Child) -> str:
    """The child's MLflow run id, waiting until it is known; offline that of its journal."""
    if child.run_id is None:
        assert child.folder is not None
        if run.delivery is None:
            return records.from_folder(child.folder).id
        child.run_id = records.delivered_as(child.folder, _shown_uri(run)) or run.delivery.child_ready(child.folder)
    return child.run_id


def _shown_uri(run: Run) -> str:
    return urls.hidden(tracking_uri(run.config))


# the end ---------------------------------------------------------------------------------------------


def _report(run: Run, children: Sequence[Child], results: list[records.Record]) -> compare.Comparison:
    found = compare.compare(results)
    link = ""
    if run.delivery is not None:
        try:
            ids = [_id(run, c) for c in children if c.folder or c.run_id]
            link = report.link(ids, run.delivery.wait_ready().experiment_id)
        except UserError as error:
            logger.warning("no link for the comparison: %s", error)
    report.log(run, found, link)
    return found


def _keep_best(run: Run, data: ImageData, children: Sequence[Child], found: compare.Comparison) -> float | None:
    """Log the student of the rung with the best validation accuracy as the parent's model, once."""
    best = found.best()
    if best is None:
        logger.info("no validation split: no rung is preferred, and no model is logged")
        return None
    group, record = best
    run.journal.tags({"asib.best_rung": group.name})
    run.journal.metrics({k: v for k, v in record.metrics.items() if k in compare.BEST}, 0)
    child = next(c for c in children if (c.config.rung, c.config.seed) == (record.rung, record.seed))
    if not run.config.log_model or child.folder is None:
        return group.validation
    mark, where = child.folder / "logged_as_model.json", {"uri": _shown_uri(run) if run.delivery else "offline"}
    if (read_state(mark) or {}).get("to") == where and child.folder.parent != run.folder:
        return group.validation
    net = networks.build_student(child.config, data)
    networks.load(net, child.folder / STUDENT, str(child.folder / STUDENT), data)
    kept = run.folder / STUDENT
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(child.folder / STUDENT, kept)
    run.journal.artifact(kept, "checkpoints")
    export.log_student(run, net, data, dict(record.metrics))
    register.student(run, child.config, data, record.metrics)
    write_atomically(mark, json.dumps({"to": where, "time": time.time()}))
    return group.validation
