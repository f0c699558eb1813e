"""A grid of runs: a nested run for each cell of a ladder or a table, reusing finished ones, and their comparison."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipeline import urls
from pipeline.ablate import driver, worker
from pipeline.ablate.plan import PLAN_TAG, Cell, Child, Plan
from pipeline.compare import compare, job, report
from pipeline.config import Identity, ModelConfig, config_hash, sources_of
from pipeline.config.continual import ContinualConfig
from pipeline.config.places import output_dir
from pipeline.data.sources import ImageData
from pipeline.distill import export, networks, register, teachers
from pipeline.distill.train import load_data, prepare, threads_of
from pipeline.errors import NonFinite, UserError
from pipeline.files import read_state, warn_once, write_atomically
from pipeline.journal import read_entries
from pipeline.paths import REPOSITORY
from pipeline.runs import records
from pipeline.runs.folders import STUDENT, ended, folders_with, header_of
from pipeline.runs.run import Run, tracking_uri
from pipeline.training.bank.policy import bank_use
from pipeline.training.compiling import check_device, compiles
from pipeline.training.optim import Precision

logger = logging.getLogger("asib")


def ablate(run: Run, plan: Plan) -> float | None:
    """Run the plan's cells, reuse finished runs, compare them, and log the best one's student if the plan wants it."""
    prepare(run.config, threads_of(run))
    check_device(run.config, _device(run, plan))
    data = load_data(run)
    _validate_early(plan, data)
    run.journal.params(dict(plan.params))
    run.journal.tags({PLAN_TAG: plan.digest})
    run.ready()
    failed: list[str] = []
    children = _run(run, data, plan, plan.cells, failed)
    children += _run(run, data, plan, plan.more(_results(run, children)), failed)
    _state_reuse(run, children)
    accuracy: float | None = None
    results = _results(run, children)
    if results:
        found = compare.compare([record for _, record in results], plan.anyway, plan.baseline)
        _report(run, children, found)
        plan.report(run, data, results)
        accuracy = _keep_best(run, data, children, found) if plan.best else None
    if failed:
        raise NonFinite("; ".join(failed))
    return accuracy


def _validate_early(plan: Plan, data: ImageData) -> None:
    """Refuse now whatever a cell would be refused for after others have been trained. Raises UserError."""
    checked = set()
    for cell in plan.cells:
        networks.check_names(cell.config)
        if cell.pair and (cell.row not in checked) and cell.config.method.taught:
            teachers.validate_early(cell.config, data)
            checked.add(cell.row)


def _device(run: Run, plan: Plan) -> torch.device:
    """Where the cells are trained."""
    return torch.device("cuda") if plan.workers.on_gpus(run.config) else networks.device_of(run.config)


def _run(run: Run, data: ImageData, plan: Plan, cells: Sequence[Cell], failed: list[str]) -> list[Child]:
    """Find or make the result of every cell; those that failed are named in `failed`."""
    children = _identified(run, cells, data, _device(run, plan))
    _find_finished(run, children, plan.force)
    if again := sum(c.reused for c in children):
        logger.info("%d of %d runs had finished before: reused (force=true runs them again)", again, len(children))
    if not plan.workers.needless:
        failed += driver.train(run, plan.workers, [child for child in children if not child.reused])
        return children
    for number, child in enumerate(children, start=1):
        if child.reused:
            continue
        logger.info("%s (%d of %d)", child.name, number, len(children))
        try:
            _train(run, child)
        except NonFinite as error:  # the others do not depend on it
            failed.append(f"{child.name}: {error}")
    return children


def _results(run: Run, children: Sequence[Child]) -> list[tuple[Cell, records.Record]]:
    """Cells with their results, which are called as this grid calls them, whoever made them."""
    known = [c for c in children if c.folder or c.run_id]
    read = job.read(run, [str(c.folder or c.run_id) for c in known])
    return [
        (c.cell, replace(record, tags={**record.tags, "asib.rung": c.config.rung or "", **c.cell.tags}))
        for c, record in zip(known, read, strict=True)
    ]


# children ------------------------------------------------------------------------------------------------------------


def _identified(run: Run, cells: Sequence[Cell], data: ImageData, device: torch.device) -> list[Child]:
    """All children, each with the identity of its result; missing teachers are fine-tuned first."""
    hashes: dict[tuple[ModelConfig, ContinualConfig], tuple[str, ...]] = {}
    for cell in cells:
        check_device(cell.config, device)
    for cell in cells:
        taught_by = cell.config.model, cell.config.continual
        if cell.config.method.taught and taught_by not in hashes:
            student = networks.build_student(cell.config, data)
            nested = f"{cell.pair}-" if cell.pair else ""
            found = teachers.obtain(run, data, student, config=cell.config, nested=nested)
            hashes[taught_by] = tuple(t.hash for t in found)
    return [
        Child(
            cell,
            Identity(
                config_hash(cell.config),
                Precision(cell.config.optim, device).name,
                hashes[cell.config.model, cell.config.continual] if cell.config.method.taught else (),
                data.digest,
                sources_of(cell.config, REPOSITORY),
                bank=bank_use(cell.config).on,
                compiled=compiles(cell.config, device),
            ).digest(),
        )
        for cell in cells
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
    child.folder = worker.train(run, child.key, child.cell)


def _state_reuse(run: Run, children: Sequence[Child]) -> None:
    """Record which runs were reused, and deliver those that the server lacks."""
    elsewhere = [c for c in children if c.reused and (c.folder is None or c.folder.parent != run.folder)]
    for child in elsewhere:
        if child.folder is not None and records.delivered_as(child.folder, _shown_uri(run)) is None:
            run.journal.child(child.folder)
    run.journal.tags({"asib.reused": ",".join(_id(run, child) for child in elsewhere) or "none"})


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


def _report(run: Run, children: Sequence[Child], found: compare.Comparison) -> None:
    link = ""
    if run.delivery is not None:
        try:
            ids = [_id(run, c) for c in children if c.folder or c.run_id]
            link = report.link(ids, run.delivery.wait_ready().experiment_id)
        except UserError as error:
            logger.warning("no link for the comparison: %s", error)
    report.log(run, found, link)


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
    weights, kept = child.folder / STUDENT, run.folder / STUDENT
    if not weights.exists():
        logger.warning("%s keeps no weights any more (steps.tidy keep=…): no model is logged", child.folder)
        return group.validation
    net = networks.build_student(child.config, data)
    networks.load(net, weights, str(weights), data)
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(weights, kept)
    run.journal.artifact(kept, "checkpoints")
    export.log_student(run, net, data, dict(record.metrics))
    register.student(run, child.config, data, record.metrics)
    write_atomically(mark, json.dumps({"to": where, "time": time.time()}))
    return group.validation
