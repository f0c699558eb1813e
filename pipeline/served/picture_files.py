"""Picture files below a folder, for training and for predict: hidden ones are skipped, and links that form a loop."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's, in either case."""
LEFT_BEHIND = ("__MACOSX", "@eaDir")
"""Folders of archives and file servers, besides those that begin with a dot (.ipynb_checkpoints, ._*, .AppleDouble)."""


class Found(NamedTuple):
    """Picture files, sorted by folder and name, and the paths that were skipped."""

    files: list[str]
    ignored: list[str]


def hidden(name: str) -> bool:
    return name.startswith(".") or name in LEFT_BEHIND


def folders(root: Path) -> Found:
    """The names of the folders in `root`, sorted, and the paths of those that are hidden or form a loop."""
    above = _above(root)
    entries = sorted((entry for entry in os.scandir(root) if _holds(entry.is_dir)), key=lambda entry: entry.name)
    passed = [entry.path for entry in entries if hidden(entry.name) or _identity(entry.path) in above]
    return Found([entry.name for entry in entries if entry.path not in passed], passed)


def find(root: Path) -> Found:
    """The picture files at any depth below `root`, by their suffix.

    Links to folders are followed, but not to one that they lie in. Links to nothing are files, which cannot be read.
    """
    files: list[tuple[str, str]] = []
    ignored: list[str] = []
    pending = [(str(root), _above(root))]
    while pending:
        folder, above = pending.pop()
        for entry in os.scandir(folder):
            if _holds(entry.is_dir):
                here = _identity(entry.path)
                if hidden(entry.name) or here in above:
                    ignored.append(entry.path)
                else:
                    pending.append((entry.path, above | {here}))
            elif entry.name.lower().endswith(SUFFIXES):
                if hidden(entry.name) or not (_holds(entry.is_file) or not os.path.exists(entry.path)):
                    ignored.append(entry.path)
                else:
                    files.append((folder, entry.name))
    return Found([os.path.join(*parts) for parts in sorted(files)], sorted(ignored))


def _holds(question: Callable[[], bool]) -> bool:
    """Whether a directory entry is a file, or a folder: a link that leads to itself is neither."""
    try:
        return question()
    except OSError:
        return False


def _above(folder: Path) -> frozenset[tuple[int, int]]:
    """A folder and all that it lies in."""
    real = Path(os.path.realpath(folder))
    return frozenset(_identity(path) for path in (real, *real.parents))


def _identity(path: str | Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def told(ignored: Sequence[str], root: Path) -> str:
    """One line about what was skipped."""
    shown = ", ".join(os.path.relpath(path, root) for path in ignored[:3])
    more = ", …" if len(ignored) > 3 else ""
    return f"{len(ignored)} ignored: hidden files and folders, or links that form a loop ({shown}{more})"
