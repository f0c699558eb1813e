"""Runs of this machine, found again: those that hold a file, and those that did not come to their end."""

import glob
from collections.abc import Iterator
from pathlib import Path

from pipeline.journal import read_entries, read_header, writer_alive


def folders_with(root: Path, file: str) -> list[Path]:
    """Folders anywhere below `root` that hold such a file, by path; deliveries may remove folders meanwhile."""
    return sorted((root / name).parent for name in glob.iglob(f"**/{file}", root_dir=root, recursive=True))


def interrupted(root: Path, step: str, tag: str, value: str) -> Path | None:
    """The newest run of `step` in `root` that has not finished, carries the tag, and that no process works on."""
    return next((folder for folder in tagged(root, step, tag, value) if not _finished(folder)), None)


def tagged(root: Path, step: str, tag: str, value: str, alive: bool = False) -> Iterator[Path]:
    """Runs of `step` in `root` that carry the tag, finished or not, the newest first; `alive`: those being written."""
    for folder in sorted((p.parent for p in root.glob("*/journal.jsonl")), reverse=True):
        header = read_header(folder)
        if header is None or header.data["tags"].get("asib.step") != step or writer_alive(folder) != alive:
            continue
        entries = read_entries(folder / "journal.jsonl")[0]
        values = [e.data["values"][tag] for e in entries if e.kind == "tags" and tag in e.data["values"]]
        if values[-1:] == [value]:
            yield folder


def _finished(folder: Path) -> bool:
    last = read_entries(folder / "journal.jsonl")[0][-1]
    return last.kind == "end" and bool(last.data["status"] == "FINISHED")
