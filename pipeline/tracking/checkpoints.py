"""Upload checkpoints to a run: always whole, never overwriting the one that the server's manifest names.

A resume from the server alone reads `checkpoints/manifest.json` and then the file that it names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import SLOTS, Entry
from pipeline.paths import inside
from pipeline.tracking._compat import artifact_store
from pipeline.tracking.state import State

log = logging.getLogger("asib.delivery")

FOLDER, MANIFEST = "checkpoints", "manifest.json"


def on_server(client: MlflowClient, run_id: str, folder: Path) -> dict[str, Any]:
    """The manifest of a run on the server; empty if missing. `folder`: the run's own."""
    listed = [file.path for file in client.list_artifacts(run_id, FOLDER)]
    if f"{FOLDER}/{MANIFEST}" not in listed:
        return {}
    with staging(folder) as stage:
        file = client.download_artifacts(run_id, f"{FOLDER}/{MANIFEST}", str(stage))
        try:
            found = dict(json.loads(Path(file).read_text()))
        except (ValueError, TypeError):
            return {}
        return found if isinstance(found.get("time"), int) else {}


def bring(
    client: MlflowClient, state: State, folder: Path, entries: Sequence[Entry]
) -> tuple[int, dict[str, Any]] | None:
    """Upload the newest of these checkpoints that is intact on disk, unless the server has it or a newer one.

    Args:
        state: of the run's delivery; its `checkpoint` is the server's manifest.
        entries: checkpoint entries, oldest first.

    Returns:
        The offset behind the entry that is now on the server, and the server's manifest; None if no file is intact.
    """
    known = state.checkpoint
    for entry in reversed(entries):
        if known.get("sha256") == entry.data["sha256"] or known.get("time", -1) >= entry.time:
            return entry.end, known
        with staging(folder) as stage:
            if not _take(folder, entry, stage / "taken"):
                continue
            # If checkpoints were skipped, the same slot comes twice in a row: the file in the manifest stays whole
            # until a newer one is complete.
            path = Path(entry.data["path"])
            name = f"slot{1 - entry.data['slot']}{path.suffix}" if known.get("file") == path.name else path.name
            (stage / "taken").rename(stage / name)
            client.log_artifact(state.run_id, str(stage / name), FOLDER)
            manifest = {
                **entry.data.get("manifest", {}),
                "file": name,
                "slot": entry.data["slot"],
                "sha256": entry.data["sha256"],
                "time": entry.time,
                "journal": state.journal,
                "generation": state.generation,
            }
            (stage / MANIFEST).write_text(json.dumps(manifest, indent=1))
            client.log_artifact(state.run_id, str(stage / MANIFEST), FOLDER)
            return entry.end, manifest
    return None


def remove(client: MlflowClient, state: State) -> None:
    """Delete a run's checkpoints on the server, the manifest first, as far as this user and the store allow it.

    Not worth a second try: where it fails they stay, which costs room and nothing else.
    """
    try:
        store = artifact_store(client, state.run_id)
        there = {file.path for file in client.list_artifacts(state.run_id, FOLDER)}
        for path in (f"{FOLDER}/{name}" for name in SLOTS):
            if path in there:
                store.delete_artifacts(path)
    except Exception as error:
        log.warning("checkpoints of the finished run %s stay on the server: %s", state.run_id, error)
    state.checkpoint = {}


def _take(folder: Path, entry: Entry, to: Path) -> bool:
    """Whether the entry's file still exists; a hard link preserves it while it is sent."""
    try:
        source = inside(folder, entry.data["path"])
        if entry.data["slot"] not in (0, 1):
            raise UserError(f"{folder}: a checkpoint of slot {entry.data['slot']!r:.50}; refused")
    except UserError as error:  # not ours
        log.error("%s", error)
        return False
    try:
        try:
            os.link(source, to)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            shutil.copyfile(source, to)
        with to.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.data["sha256"]
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder beside the run's files, so that hard links work, gone afterwards."""
    above = folder / "delivery"
    above.mkdir(exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=above))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        with contextlib.suppress(OSError):
            above.rmdir()
