"""Removes what nobody needs to keep: checkpoints to resume from, of runs finished long ago, and old parts of the bank.

    python deploy/clean_up.py [--days 30] [--bank <folder>] [--apply]

Says what it would remove; removes it with `--apply`. Only `checkpoints/slot*` and `checkpoints/manifest.json` of runs
that are FINISHED, and whose parents are, are ever touched: weights, models, pictures, numbers and the runs stay. A run
without its checkpoint cannot be extended any more; it gets the tag `asib.checkpoint_removed`. The bank is recomputed
where it is missed. Needs MLflow alone; asks the server in MLFLOW_TRACKING_URI, as an administrator.

Runs that have made a champion are kept whole: those with the tag `asib.keep`, and those whose versions have an alias.
One that somebody has deleted is restored, so that `mlflow gc` after this leaves the champion's files.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

FOLDER = "checkpoints"
RESUME = re.compile(rf"{FOLDER}/(manifest\.json|slot\d+\.[a-z]+)")
"""What a resume reads, and nothing else does: the names of `pipeline/tracking/checkpoints.py`."""
TAG = "asib.checkpoint_removed"
KEEP = "asib.keep"
"""As a promotion sets it (`pipeline/tracking/model_tags.py`)."""
PARENT = "mlflow.parentRunId"
DAY_S = 86_400


@dataclass
class Found:
    """A run's files to resume from. `size` in bytes."""

    run: Any
    paths: list[str] = field(default_factory=list)
    size: int = 0


def champions(client: Any) -> set[str]:
    """Ids of the runs whose versions have an alias: champions, those before them, challengers."""
    found = set()
    for model in _pages(lambda token: client.search_registered_models(page_token=token)):
        for version in set(client.get_registered_model(model.name).aliases.values()):
            try:
                found.add(client.get_model_version(model.name, str(version)).run_id)
            except Exception as error:  # an alias without a version protects nothing
                if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                    raise
    return found


def deleted(client: Any, kept: set[str]) -> Iterator[Any]:
    """Deleted runs that have made a champion."""
    from mlflow.entities import ViewType

    everywhere = _pages(lambda token: client.search_experiments(view_type=ViewType.ACTIVE_ONLY, page_token=token))
    for experiment in everywhere:
        for run in _pages(
            lambda token, e=experiment: client.search_runs(
                [e.experiment_id], run_view_type=ViewType.DELETED_ONLY, page_token=token
            )
        ):
            if KEEP in run.data.tags or run.info.run_id in kept:
                yield run


def old_checkpoints(client: Any, days: float, kept: set[str]) -> Iterator[Found]:
    """Runs that ended more than `days` ago, FINISHED together with all above them, and still have checkpoints.

    Args:
        kept: ids of runs that are skipped, as are those with the tag `KEEP`.
    """
    before = int((time.time() - days * DAY_S) * 1000)
    query = f"attributes.status = 'FINISHED' and attributes.end_time < {before}"
    statuses: dict[str, bool] = {}
    for experiment in _pages(lambda token: client.search_experiments(page_token=token)):
        for run in _pages(lambda token, e=experiment: client.search_runs([e.experiment_id], query, page_token=token)):
            if (
                run.data.tags.keys() & {TAG, KEEP}
                or run.info.run_id in kept
                or not _finished_above(client, run, statuses)
            ):
                continue
            found = Found(run)
            for file in client.list_artifacts(run.info.run_id, FOLDER):
                if not file.is_dir and RESUME.fullmatch(file.path):
                    found.paths.append(file.path)
                    found.size += file.file_size or 0
            if found.paths:
                yield found


def remove(client: Any, found: Found) -> None:
    """The manifest goes first: it never names a file that is not there."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository = get_artifact_repository(found.run.info.artifact_uri, tracking_uri=client.tracking_uri)
    for path in sorted(found.paths):
        repository.delete_artifacts(path)
    client.set_tag(found.run.info.run_id, TAG, time.strftime("%Y-%m-%d"))


def old_bank(folder: Path, days: float) -> list[tuple[Path, int]]:
    """Entries of the bank's folder in which nothing was read or written for `days`, with their size in bytes."""
    before = time.time() - days * DAY_S
    found = []
    for entry in sorted(folder.iterdir()):
        files = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
        stats = [path.stat() for path in files]
        if all(max(stat.st_atime, stat.st_mtime) < before for stat in stats):
            found.append((entry, sum(stat.st_size for stat in stats)))
    return found


def _finished_above(client: Any, run: Any, known: dict[str, bool]) -> bool:
    """A main job resumed from the server alone still reads what its finished nested runs left."""
    above = run.data.tags.get(PARENT)
    if above is None:
        return True
    if above not in known:
        parent = _parent(client, above)
        if isinstance(parent, bool):
            known[above] = parent
        else:
            known[above] = parent.info.status == "FINISHED" and _finished_above(client, parent, known)
    return known[above]


def _parent(client: Any, run_id: str) -> Any:
    """The run; True for one that is gone for good, which nobody will continue, False for one that may not be read."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
        return error.error_code == "RESOURCE_DOES_NOT_EXIST"


def _pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=30.0, help="how old is old (default: 30)")
    parser.add_argument("--bank", type=Path, help="the bank's folder on this machine")
    parser.add_argument("--apply", action="store_true", help="remove it")
    options = parser.parse_args(arguments)
    if options.days < 1:
        parser.error("--days: give 1 or more, so that nothing of a run that has just ended goes")
    if options.bank is not None and not options.bank.is_dir():
        parser.error(f"--bank: {options.bank} is no folder")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    total, did = 0, "removed" if options.apply else "would remove"
    try:
        client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI"))
        kept = champions(client)
        for run in deleted(client, kept):
            if options.apply:
                client.restore_run(run.info.run_id)
            why = run.data.tags.get(KEEP, "its version has an alias")
            print(f"{'restored' if options.apply else 'would restore'} {run.info.run_id} {run.info.run_name}: {why}")
        for found in old_checkpoints(client, options.days, kept):
            if options.apply:
                remove(client, found)
            total += found.size
            print(f"{did} {found.run.info.run_id} {found.run.info.run_name}: {', '.join(found.paths)}")
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    for entry, size in old_bank(options.bank, options.days) if options.bank else ():
        if options.apply:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        total += size
        print(f"{did} {entry}")
    print(f"{did} {total / 1e6:.3f} MB" + ("" if options.apply else ": --apply does it"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
