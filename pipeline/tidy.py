"""What ended runs have left on this machine that nothing needs any more: list it, or remove it."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.config.places import output_dir
from pipeline.files import explained
from pipeline.journal import SLOTS, Entry, read_entries, writer_alive
from pipeline.reporting import tables
from pipeline.runs.folders import FUSION, STUDENT, folders_with, header_of, size_of
from pipeline.runs.naming import COLLECTIONS

OWN = {
    "apply": "true: remove what is listed",
    "keep": "students of finished sweeps, ladders and tables that stay: all (default), best (their model), last (that "
    "of the run that ended last) or none",
}


def tidy(config: Config, command: cli.Command) -> int:
    """Print what can go, largest first, and remove it with `apply=true`; the exit code, 0."""
    apply, root = cli.flag(command.own, "apply"), output_dir(config)
    keep = cli.choice(command.own, "keep", ("all", "best", "last", "none"))
    found = sorted(((size_of(path), path, why) for path, why in superfluous(root, keep)), key=lambda item: -item[0])
    for _, path, _ in found if apply else ():
        with explained(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    rows = [(str(path.relative_to(root)), f"{size / 1e6:.1f} MB", why) for size, path, why in found]
    total = f"{sum(size for size, *_ in found) / 1e6:.1f} MB in {len(found)} places of {root}"
    print(tables.text(f"removed {total}" if apply else f"{total} can go: apply=true removes it", rows))
    return 0


def superfluous(root: Path, keep: str = "all") -> Iterator[tuple[Path, str]]:
    """Files and folders of runs below `root` that have ended, each with the reason why it can go."""
    for folder in folders_with(root, "journal.jsonl"):
        header = header_of(folder)
        if header is None or writer_alive(folder):
            continue
        entries = read_entries(folder / "journal.jsonl")[0]
        end = next((entry.data for entry in reversed(entries) if entry.kind == "end"), {})
        if end.get("outcome") == "pruned":
            yield from _there((folder / "checkpoints",), "of a pruned trial")
        elif end.get("status") == "FINISHED":
            if not _keeps(entries):
                yield from _there((folder / "checkpoints" / name for name in SLOTS), "checkpoint of a finished run")
            yield from _there((folder / "fetched",), "fetched by a finished run")
            step = header.data["tags"].get("asib.step")
            if keep != "all" and step in COLLECTIONS:
                yield from _there(_students(folder, keep), f"keep={keep}, of a finished {step}")


def _students(folder: Path, keep: str) -> Iterator[Path]:
    """Weights in a finished run's folder but those of the student that stays; nothing where that one is not there."""
    nested = sorted((p for p in folder.rglob(STUDENT) if p != folder / STUDENT), key=lambda path: path.stat().st_mtime)
    stays = {"best": [folder / STUDENT], "last": nested[-1:]}.get(keep, [])
    if keep == "none" or any(path.exists() for path in stays):
        beside = {path.parent for path in stays}
        for name in (STUDENT, FUSION):
            yield from (path for path in sorted(folder.rglob(name)) if path.parent not in beside)


def _there(paths: Iterator[Path] | tuple[Path, ...], why: str) -> Iterator[tuple[Path, str]]:
    yield from ((path, why) for path in paths if path.exists() and not path.is_symlink())


def _keeps(entries: Sequence[Entry]) -> bool:
    """Whether the run was told to keep its checkpoints."""
    stated = [e.data["values"] for e in entries if e.kind == "params"]
    return any(str(values.get("checkpoint.keep", "")).lower() == "true" for values in stated)
