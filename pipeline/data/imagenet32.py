"""Downsampled ImageNet (Chrabaszcz et al. 2017, arXiv 1707.08819) as image-net.org distributes it.

Ten training batches and one for validation, as npz files or as pickles of dictionaries: `data` uint8 (n,3072), each row
the red, green and blue plane of an image; `labels` 1 to 1000, in the authors' order of classes; `mean`, which is not
used.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.pickles import Name, Opaque, Reader
from pipeline.data.arrays import read_npz
from pipeline.errors import UserError

TRAIN = tuple(f"train_data_batch_{number}" for number in range(1, 11))
TEST = ("val_data",)
CLASSES = 1000
SIDE = 32


def find(root: Path, names: Sequence[str], key: str) -> list[Path]:
    """The files of some batches, in `root` or a folder in it. Raises UserError for the first that is missing."""
    found = []
    for name in names:
        places = (
            place for pattern in (f"{name}.npz", name) for depth in ("", "*/") for place in root.glob(depth + pattern)
        )
        file = next(filter(Path.is_file, places), None)
        if file is None:
            raise UserError(
                f"{key}: {name}.npz (or {name}, the pickle) is not there; all ten batches and val_data are needed"
            )
        found.append(file)
    return found


def blocks(files: Sequence[Path], key: str) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Images (n,3,32,32) and labels 0 to 999 of each file.

    Raises:
        UserError: a damaged file, other arrays, labels below 1 or above 1000.
    """
    for file in files:
        where = f"{key}: {file.name}"
        held = read_npz(file, "dataset.root") if file.suffix == ".npz" else _unpickled(file, where)
        data, labels = held.get("data"), held.get("labels")
        if (
            not isinstance(data, np.ndarray)
            or data.dtype != np.uint8
            or data.shape[1:] != (3 * SIDE**2,)
            or not len(data)
        ):
            raise UserError(
                f"{where}: data is {_told(data)}; it should be uint8 (n,{3 * SIDE**2}), images of 32 × 32 pixels"
            )
        numbers = _numbers(labels)
        if numbers.dtype.kind not in "iu" or numbers.shape != (len(data),):
            raise UserError(
                f"{where}: labels are {_told(labels)}; there should be {len(data)} whole numbers from 1 to {CLASSES}"
            )
        for extreme in (numbers.min(), numbers.max()):
            if not 1 <= extreme <= CLASSES:
                raise UserError(f"{where}: labels hold {extreme}; they should be 1 to {CLASSES}, as distributed")
        yield data.reshape(-1, 3, SIDE, SIDE), numbers.astype(np.int64) - 1


def _numbers(labels: Any) -> NDArray[Any]:
    """Labels as an array, of whatever type; empty where they are none."""
    with suppress(ValueError):  # lists of several lengths
        return np.asarray(labels if isinstance(labels, np.ndarray | list) else [])
    return np.empty(0)


def _told(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return "missing" if value is None else f"a {type(value).__name__}"


def _unpickled(file: Path, where: str) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            held = _Arrays().run(opened)
    except Exception as error:  # a damaged pickle fails anywhere: IndexError, KeyError, struct.error, …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: the file cannot be read ({reason}); copy it again") from error
    if not isinstance(held, dict):
        raise UserError(
            f"{where}: it holds {held.what if isinstance(held, Opaque) else _told(held)}, not a batch of images"
        )
    return held


class _Type(NamedTuple):
    """A dtype: a kind and a number of bytes."""

    code: str


class _Arrays(Reader):
    """Also makes numpy's arrays of plain numbers, views of the pickle's own bytes."""

    def made(self, called: Any, arguments: Any) -> Any:
        if isinstance(called, Name) and called.module.startswith("numpy"):
            if called.name == "_reconstruct":
                return Opaque("array")  # what it holds comes as its state
            if called.name == "dtype" and re.fullmatch("[iuf][1248]", str(arguments[0])):
                return _Type(arguments[0])
        return super().made(called, arguments)

    def built(self, target: Any, state: Any) -> Any:
        if isinstance(target, _Type) and state[1] == ">":
            raise ValueError("its numbers are big-endian")
        if target != Opaque("array"):
            return target
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Type) or not isinstance(content, bytes):
            raise ValueError("it has an array of something else than numbers")
        return np.frombuffer(content, kind.code).reshape(shape, order="F" if fortran else "C")
