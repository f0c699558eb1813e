"""What was learnt from files once is kept in the user's cache folder: digests, and images that were read or decoded.

Images lie there as one file that is mapped into memory. A start reads the labels; pixels come from the disk when they
are first used, stay as long as memory suffices, and are shared by all processes of a machine.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config.datasets import Statistics
from pipeline.data.arrays import Arrays, digest, known_classes, statistics
from pipeline.errors import UserError
from pipeline.files import explained, locked, replacing

logger = logging.getLogger("asib")
FOLDER = "XDG_CACHE_HOME"
"""The variable that sets the cache folder; without it, ~/.cache."""
SPLITS = ("train", "test")


class Kept(NamedTuple):
    """Arrays whose images are mapped, the digest of all four (`arrays.digest`), and the training images' statistics."""

    arrays: Arrays
    digest: str
    statistics: Statistics


Blocks = Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""Images (n,C,H,W) with their labels (n,), some at a time."""


class Source(NamedTuple):
    """A data set about to be read: both splits "train" and "test", the classes' names, all images' bytes."""

    read: Mapping[str, Callable[[], Blocks]]
    classes: tuple[str, ...] | None
    """None: they have numbers only."""
    nbytes: int = 0
    """0: not known before."""


def place(kind: str, root: Path, paths: Sequence[str | Path], variant: str = "") -> Path:
    """Where something about files below `root` is kept; another place when a name, size or time of change differs.

    `variant`: of several things about the same files, which.
    """
    seen = [(Path(path).relative_to(root).as_posix(), os.stat(path)) for path in paths]
    listing = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in seen]
    made_of = [str(root.resolve()), listing, *([variant] if variant else [])]
    known = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return Path(os.environ.get(FOLDER) or os.path.expanduser("~/.cache"), "asib", kind, known)


def kept(
    root: Path,
    paths: Sequence[str | Path],
    source: Callable[[], Source],
    where: str,
    variant: str = "",
) -> Kept:
    """The images of a data set, written at its first use, and mapped.

    Args:
        root: the data set's folder; `paths`: its files.
        source: called only where nothing is kept yet.
        where: opens messages about the data.
        variant: what was made of these files, where several things can be.

    Raises:
        UserError: a class without training images, no room in the cache folder, what `source` raises.
    """
    try:
        file = place("images", root, paths, variant)
    except OSError as error:  # a dangling link
        raise UserError(f"{where}: {error.filename}: {error.strerror}; repair or remove it") from error
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{file.parent} cannot be made ({error.strerror}); set {FOLDER} to a folder with room"
        ) from error
    with explained(file, FOLDER):
        if (found := _mapped(file)) is not None:
            return found
        with locked(file.with_suffix(".lock")):  # one of several processes writes, the others wait
            if _mapped(file) is None:
                made = source()
                _check_room(made.nbytes, file.parent, where)
                size = f" ({made.nbytes / 1e9:.1f} GB)" if made.nbytes else ""
                logger.info("%s: reading %d files, once, into %s%s", where, len(paths), file, size)
                with replacing(file, FOLDER) as temporary:
                    _write(temporary, made, where)
        found = _mapped(file)
    if found is None:
        raise UserError(f"{file}: what was written cannot be read; repair that disk, or set {FOLDER} to another")
    return found


def _check_room(nbytes: int, folder: Path, where: str) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(
            f"{where}: its images take {nbytes / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free: make room, "
            f"set {FOLDER} to another disk, or lower dataset.image_size"
        )


# the file: images of both splits, labels of both, a description in JSON and its length in eight bytes ----------------


def _write(file: Path, source: Source, where: str) -> None:
    labels: dict[str, NDArray[np.int64]] = {}
    shape: tuple[int, ...] = ()
    with file.open("wb") as out:
        for split in SPLITS:
            parts = []
            for images, numbers in source.read[split]():
                shape = images.shape[1:]
                out.write(np.ascontiguousarray(images).data)
                parts.append(numbers)
            labels[split] = np.concatenate(parts)
        classes = known_classes(labels["train"], labels["test"], source.classes, where)
        for split in SPLITS:
            out.write(labels[split].tobytes())
        out.flush()
        counts = [len(labels[split]) for split in SPLITS]
        about: dict[str, Any] = {"shape": shape, "counts": counts, "classes": classes}
        arrays = _arrays(file, about)
        told = statistics(arrays.x_train)
        about |= {"digest": digest(arrays), "mean": told.mean, "std": told.std}
        text = json.dumps(about).encode()
        out.write(text + len(text).to_bytes(8, "little"))


def _mapped(file: Path) -> Kept | None:
    """What the file holds; None if it is missing or damaged."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        with file.open("rb") as opened:
            about = json.loads(_last(opened, int.from_bytes(_last(opened, 8), "little") + 8)[:-8])
        told = Statistics(tuple(about["mean"]), tuple(about["std"]))
        return Kept(_arrays(file, about), about["digest"], told)
    return None


def _last(file: BinaryIO, count: int) -> bytes:
    file.seek(-min(count, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read()


def _arrays(file: Path, about: Mapping[str, Any]) -> Arrays:
    shapes = [(count, *about["shape"]) for count in about["counts"]] + [(count,) for count in about["counts"]]
    found, at = [], 0
    for shape in shapes:
        kind = np.dtype(np.uint8 if len(shape) > 1 else np.int64)
        # copy-on-write: torch takes no arrays that cannot be written to
        found.append(np.memmap(file, kind, "c", at, shape))
        at += found[-1].nbytes
    x_train, x_test, y_train, y_test = found
    return Arrays(x_train, np.array(y_train), x_test, np.array(y_test), tuple(about["classes"]))
