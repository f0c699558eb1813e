"""The step that compares runs, read from the tracking server or, offline, from folders, and logs the report."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.compare import compare, pictures, report
from pipeline.compare.request import Request
from pipeline.config.places import output_dir
from pipeline.errors import UserError
from pipeline.journal import read_entries
from pipeline.paths import user_path
from pipeline.runs import records
from pipeline.runs.folders import find_folder
from pipeline.runs.run import Run

logger = logging.getLogger("asib")


def compare_runs(run: Run, request: Request) -> float | None:
    """Compare the nested runs of a parent, or the named runs; log the report to this run and to the parent."""
    parent = request.parent
    seen = _nested(run, parent) if parent else read(run, request.runs)
    found = compare.compare(seen, request.anyway, request.baseline)
    run.ready()
    everything = [r.id for g in found.groups for r in g.records]
    run.journal.tags({"asib.compared": ",".join(everything)})
    link = report.link(everything, run.delivery.wait_ready().experiment_id) if run.delivery else ""
    paths = report.log(run, found, link)
    if parent and run.delivery is not None and not _is_folder(parent):
        run.delivery.ask("log_files", run_id=parent, files=[str(p.absolute()) for p in paths], to="comparison")
    best = found.best()
    return None if best is None else best[0].validation


def _is_folder(name: str) -> bool:
    return (user_path(name, "runs") / "journal.jsonl").exists()


def read(run: Run, names: Sequence[str]) -> list[records.Record]:
    """Folders are read as they are; ids are looked up on the server, or offline in output_dir."""
    folders = {name: user_path(name, "runs") for name in names if _is_folder(name)}
    found: dict[str, records.Record] = {name: records.from_folder(folder) for name, folder in folders.items()}
    ids = [name for name in names if name not in found]
    if run.delivery is not None and ids:
        fetched = run.delivery.read_runs(ids, run.folder / "fetched", list(pictures.CURVES))
        found |= {name: records.from_server(folder) for name, folder in zip(ids, fetched, strict=True)}
    elif ids:
        for name in ids:
            folder = find_folder(output_dir(run.config), name, "runs")
            if folder is None:
                raise UserError(f"runs={name}: no such run in output_dir={run.config.output_dir}; tracking is offline")
            found[name] = records.from_folder(folder)
    return [found[name] for name in names]


def _nested(run: Run, parent: str) -> list[records.Record]:
    """The parent's own distillations and those that it reused; unfinished ones are named and left out."""
    if run.delivery is not None and not _is_folder(parent):
        others = reused(run.delivery.run_info(parent)["tags"])
        seen = read(run, [*run.delivery.ask("nested_runs", run_id=parent), *others])
    else:
        folder = find_folder(output_dir(run.config), parent, "parent")
        if folder is None:
            raise UserError(f"parent={parent}: no such run in output_dir={run.config.output_dir}")
        seen = [records.from_folder(f) for f in children(folder)]
        known = {r.id for r in seen}
        seen += read(run, [name for name in reused(records.from_folder(folder).tags) if name not in known])
    students = [r for r in seen if compare.ACCURACY in r.metrics and r.tags.get("asib.step") != "finetune"]
    for record in seen:
        if record.status != "FINISHED":
            logger.warning("%s (%s) is %s: left out", record.name, record.id, record.status)
    chosen = [r for r in students if r.status == "FINISHED"]
    if not chosen:
        raise UserError(f"parent={parent}: none of its {len(seen)} nested runs is a finished distillation")
    return chosen


def reused(tags: Mapping[str, str]) -> list[str]:
    """The finished runs that a parent with these tags took instead of training them again."""
    return [name for name in tags.get("asib.reused", "").split(",") if name not in ("", "none")]


def children(folder: Path) -> list[Path]:
    """The folders of the runs nested in one, those that are on this machine."""
    entries = read_entries(folder / "journal.jsonl")[0]
    paths = dict.fromkeys((folder / e.data["folder"]).resolve() for e in entries if e.kind == "child")
    return [path for path in paths if (path / "journal.jsonl").exists()]
