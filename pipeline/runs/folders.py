"""Folders of runs on this machine: new ones, by name, by a file they hold, and interrupted ones."""

import glob
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.config import Config
from pipeline.config.places import output_dir
from pipeline.errors import UserError
from pipeline.files import read_state, warn_once
from pipeline.journal import Entry, read_entries, read_header, writer_alive
from pipeline.paths import user_path

STUDENT = "checkpoints/student.safetensors"
FUSION = "checkpoints/fusion.safetensors"
CONFIG = "config.yaml"
DIFFERENCE = "git.diff"
"""Names in a run's folder and among its artifacts; the last two say what the run is."""
QUOTED = 8
"""Characters of an id by which people, and names of runs, quote a run."""


def fresh_folder(config: Config, step: str, mark: str | None = None) -> Path:
    """The folder of a new run, which is not created yet."""
    return output_dir(config) / f"{time.strftime('%Y%m%d-%H%M%S')}-{step}-{mark or secrets.token_hex(3)}"


@contextmanager
def writable(config: Config) -> Iterator[None]:
    """Turn an OSError about a new run folder into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output_dir={config.output_dir}: cannot write there ({error.strerror}); choose another folder"
        ) from error


def folders_with(root: Path, file: str) -> list[Path]:
    """Folders anywhere below `root` that hold `file`, sorted; deliveries may remove folders meanwhile."""
    return sorted((root / name).parent for name in glob.iglob(f"**/{file}", root_dir=root, recursive=True))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder, linked ones once; deliveries may remove some meanwhile."""
    inside = glob.iglob("**", root_dir=path, recursive=True) if path.is_dir() else [""]
    sizes = {}
    for name in inside:
        with suppress(FileNotFoundError):
            found = (path / name).lstat()
            if stat.S_ISREG(found.st_mode):
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def find_folder(root: Path, name: str, key: str = "resume") -> Path | None:
    """The local folder of a run: given as a path, by its MLflow run id or its journal id, or by how one of them begins.

    Raises UserError, which begins with `key`: the path is invalid, or the ids of several runs begin so.
    """
    given = user_path(name, key)
    if (given / "journal.jsonl").exists():
        return given
    near: dict[str, Path] = {}
    for folder in folders_with(root, "journal.jsonl"):
        header, state = header_of(folder), read_state(folder / "delivery.json") or {}
        ids = [str(state.get("run_id", "")), str(header.data["journal"]) if header else ""]
        if name in ids:
            return folder
        if len(name) >= QUOTED:
            near |= {known: folder for known in ids if known.startswith(name)}
    if len(near) > 1:
        raise UserError(f"{key}={name}: the ids of several runs begin so: give one of {', '.join(sorted(near)[:5])}")
    return next(iter(near.values()), None)


def header_of(folder: Path) -> Entry | None:
    """The header of a run's journal; None without a journal, or (with a warning) if it is damaged."""
    try:
        return read_header(folder)
    except UserError as error:
        warn_once(f"{error}: skipped")
        return None


def ended(folder: Path) -> bool:
    """Whether the run in `folder` has finished."""
    entries, _ = read_entries(folder / "journal.jsonl")
    return bool(entries) and entries[-1].kind == "end" and entries[-1].data["status"] == "FINISHED"


def interrupted(root: Path, step: str, tag: str, value: str) -> Path | None:
    """The newest unfinished run of `step` in `root` that has the tag and no live process."""
    return next((folder for folder in tagged(root, step, tag, value) if not ended(folder)), None)


def tagged(root: Path, step: str, tag: str, value: str, alive: bool = False) -> Iterator[Path]:
    """Runs of `step` in `root` with the tag, finished or not, newest first; `alive`: only those being written."""
    for folder in sorted((p.parent for p in root.glob("*/journal.jsonl")), reverse=True):
        header = header_of(folder)
        if header is None or header.data["tags"].get("asib.step") != step or writer_alive(folder) != alive:
            continue
        entries = read_entries(folder / "journal.jsonl")[0]
        values = [e.data["values"][tag] for e in entries if e.kind == "tags" and tag in e.data["values"]]
        if values[-1:] == [value]:
            yield folder
