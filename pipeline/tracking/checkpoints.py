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
from pipeline.journal import Entry
from pipeline.paths import inside

log = logging.getLogger("asib.delivery")

FOLDER, MANIFEST = "checkpoints", "manifest.json"


class CheckpointUpload:
    """The checkpoints of one run."""

    def __init__(self, client: MlflowClient, run_id: str, folder: Path, journal_id: str) -> None:
        self._client, self._run_id, self._folder, self._journal = client, run_id, folder, journal_id

    def on_server(self) -> dict[str, Any]:
        """The server's manifest; empty if missing."""
        listed = [file.path for file in self._client.list_artifacts(self._run_id, FOLDER)]
        if f"{FOLDER}/{MANIFEST}" not in listed:
            return {}
        with staging(self._folder) as stage:
            file = self._client.download_artifacts(self._run_id, f"{FOLDER}/{MANIFEST}", str(stage))
            try:
                found = dict(json.loads(Path(file).read_text()))
            except (ValueError, TypeError):
                return {}
            return found if isinstance(found.get("time"), int) else {}

    def bring(
        self, entries: Sequence[Entry], server: dict[str, Any], generation: str
    ) -> tuple[int, dict[str, Any]] | None:
        """Upload the newest of these checkpoints that is intact on disk, unless the server has it or a newer one.

        Args:
            entries: checkpoint entries, oldest first.
            server: the manifest that the server has.
            generation: the journal's, noted in the manifest.

        Returns:
            The offset behind the entry that is now on the server, and the server's manifest; None if no file is intact.
        """
        for entry in reversed(entries):
            if server.get("sha256") == entry.data["sha256"] or server.get("time", -1) >= entry.time:
                return entry.end, server
            with staging(self._folder) as stage:
                if not self._take(entry, stage / "taken"):
                    continue
                name = self._server_name(entry, server)
                (stage / "taken").rename(stage / name)
                self._client.log_artifact(self._run_id, str(stage / name), FOLDER)
                manifest = {
                    **entry.data.get("manifest", {}),
                    "file": name,
                    "slot": entry.data["slot"],
                    "sha256": entry.data["sha256"],
                    "time": entry.time,
                    "journal": self._journal,
                    "generation": generation,
                }
                (stage / MANIFEST).write_text(json.dumps(manifest, indent=1))
                self._client.log_artifact(self._run_id, str(stage / MANIFEST), FOLDER)
                return entry.end, manifest
        return None

    @staticmethod
    def _server_name(entry: Entry, server: dict[str, Any]) -> str:
        # When checkpoints were skipped the same slot comes twice running: the file in the manifest stays whole
        # until a newer one is complete.
        path = Path(entry.data["path"])
        return f"slot{1 - entry.data['slot']}{path.suffix}" if server.get("file") == path.name else path.name

    def _take(self, entry: Entry, to: Path) -> bool:
        """Whether the entry's file still exists; a hard link keeps it while it is sent."""
        try:
            source = inside(self._folder, entry.data["path"])
            if entry.data["slot"] not in (0, 1):
                raise UserError(f"{self._folder}: a checkpoint of slot {entry.data['slot']!r:.50}; refused")
        except UserError as error:  # not ours
            log.error("%s", error)
            return False
        try:
            try:
                os.link(source, to)
            except FileNotFoundError:
                return False
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
