"""Check that four arrays are a classification data set, and describe them; every fault has a one-line error of its own.

All sources go through the same checks: a user's npz file and files that torchvision has read.
"""

import hashlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config.datasets import Statistics
from pipeline.errors import UserError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
AT_ONCE = 10_000
"""Images that are counted at once."""
MAX_CHANNELS = 4  # beyond it, NCHW was meant, or something that is not an image


class Arrays(NamedTuple):
    """Checked arrays: images uint8 (N,C,H,W) contiguous with H = W, labels int64 (N,) in 0..len(classes)-1."""

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    classes: tuple[str, ...]


def read_npz(path: Path, key: str) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file by name; nothing is ever unpickled.

    Raises UserError, naming `key`, if the file is missing, is not an npz, is damaged or holds object arrays.
    """
    if not path.is_file():
        raise UserError(f"{key}={path}: there is no such file; it should be an .npz with {', '.join(ARRAYS)}")
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise UserError(f"{key}={path}: this is not an .npz file; write it with numpy.savez_compressed")
        with np.load(path, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
            return {name: array for name, array in stored.items() if isinstance(array, np.ndarray)}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{key}={path}: an array holds Python objects, which are never unpickled; save plain numeric arrays"
            ) from error
        raise UserError(f"{key}={path}: the file is damaged ({error}); write it again") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, MemoryError, RuntimeError, KeyError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{key}={path}: the file cannot be read ({reason}); write or copy it again") from error


def check(arrays: dict[str, NDArray[Any]], where: str, classes: tuple[str, ...] | None = None) -> Arrays:
    """Validates `arrays` (keys x_train, y_train, x_test, y_test and, optionally, class_names).

    Images are uint8 (N,H,W,C) or, grey, (N,H,W); labels are integers (N,). The training labels determine the number
    of classes. `where` opens every message (the key and its value); `classes` are names known from elsewhere.
    Raises UserError.
    """
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"{where}: {', '.join(missing)} missing (it holds {held}); needed are {', '.join(ARRAYS)}")
    x_train, x_test = (_images(arrays[name], name, where) for name in ("x_train", "x_test"))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(
            f"{where}: images of x_train are {_chw(x_train)} and of x_test {_chw(x_test)} (C,H,W); they must agree"
        )
    y_train, y_test = (_labels(arrays[name], name, where) for name in ("y_train", "y_test"))
    for split, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise UserError(
                f"{where}: x_{split} has {len(x)} images and y_{split} {len(y)} labels; the numbers must agree"
            )
    if "class_names" in arrays:
        classes = _names(arrays["class_names"], where)
    return Arrays(x_train, y_train, x_test, y_test, known_classes(y_train, y_test, classes, where))


def _chw(images: NDArray[Any]) -> str:
    return "×".join(map(str, images.shape[1:]))


def _images(array: NDArray[Any], name: str, where: str) -> NDArray[np.uint8]:
    """NHWC or NHW uint8 -> contiguous NCHW."""
    if array.dtype != np.uint8:
        raise UserError(f"{where}: {name} is {array.dtype}; images must be uint8 with values 0 to 255")
    if array.ndim == 3:
        array = array[..., None]
    shape = f"{where}: {name} has shape {tuple(array.shape)}"
    if array.ndim != 4:
        raise UserError(f"{shape}; images must be (N,H,W,C), or (N,H,W) when grey")
    if array.size == 0:
        raise UserError(f"{shape}: it is empty; at least one image is needed")
    if array.shape[3] > MAX_CHANNELS:
        raise UserError(f"{shape}, so {array.shape[3]} channels; images must be (N,H,W,C): transpose from (N,C,H,W)")
    if array.shape[1] != array.shape[2]:
        raise UserError(f"{shape}, so {array.shape[1]}×{array.shape[2]} pixels; images must be square (N,H,W,C)")
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def _labels(array: NDArray[Any], name: str, where: str) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu":
        raise UserError(f"{where}: {name} is {array.dtype}; labels must be integers 0 to N-1")
    if array.ndim != 1:
        raise UserError(f"{where}: {name} has shape {tuple(array.shape)}; labels must be (N,): one number per image")
    if array.size == 0:
        raise UserError(f"{where}: {name} is empty; at least one label is needed")
    for extreme in (array.min(), array.max()):
        if not 0 <= extreme <= np.iinfo(np.int64).max:
            raise UserError(f"{where}: {name} holds {extreme}; labels must be integers 0 to N-1")
    return array.astype(np.int64)


def _names(array: NDArray[Any], where: str) -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.ndim != 1:
        raise UserError(
            f"{where}: class_names is {array.dtype} of shape {tuple(array.shape)}; it must be a list of strings"
        )
    names = tuple(str(name) for name in array)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: class_names holds {twice!r} twice; each class needs its own name")
    return names


def known_classes(
    y_train: NDArray[np.int64], y_test: NDArray[np.int64], names: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """Names of the classes 0..N-1, which are exactly the labels that occur in training.

    Raises UserError, which begins with `where`.
    """
    present = np.unique(y_train)
    if names is not None and present[-1] >= len(names):
        raise UserError(f"{where}: y_train holds {present[-1]}, but there are {len(names)} class names")
    count = int(present[-1]) + 1 if names is None else len(names)
    if len(present) < count:
        gaps = present != np.arange(len(present))
        gap = int(np.argmax(gaps)) if gaps.any() else len(present)
        raise UserError(
            f"{where}: y_train lacks label {gap} of the labels 0 to {count - 1}; "
            "every class needs training images, and labels are 0 to N-1 without gaps"
        )
    if count < 2:
        raise UserError(f"{where}: y_train holds one class only; at least two are needed")
    if y_test.max() >= count:
        raise UserError(
            f"{where}: y_test holds {y_test.max()}, but training has the classes 0 to {count - 1}; "
            "a class must be known from training"
        )
    return names if names is not None else tuple(map(str, range(count)))


def digest(arrays: Arrays) -> str:
    """SHA-256 (hex) of the data set: shapes, types and bytes of the four arrays, and the class names."""
    hashed = hashlib.sha256()
    for name in ("x_train", "y_train", "x_test", "y_test"):
        array = getattr(arrays, name)
        hashed.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        hashed.update(np.ascontiguousarray(array).data)
    hashed.update(json.dumps(list(arrays.classes)).encode())
    return hashed.hexdigest()


def statistics(images: NDArray[np.uint8]) -> Statistics:
    """Per-channel mean and standard deviation of uint8 images (N,C,H,W), scaled to [0, 1].

    Exact, from histograms. A constant channel gets one grey level (1/255) as its deviation, so that dividing is safe.
    """
    levels = np.arange(256) / 255
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for start in range(0, len(images), AT_ONCE):  # bincount takes eight bytes of memory for each of its pixels
        for channel, part in enumerate(images[start : start + AT_ONCE].swapaxes(0, 1)):
            counts[channel] += np.bincount(part.reshape(-1), minlength=256)
    mean, std = [], []
    for share in counts / counts.sum(1, keepdims=True):
        mean.append(float(share @ levels))
        std.append(max(float(np.sqrt(share @ (levels - mean[-1]) ** 2)), 1 / 255))
    return Statistics(tuple(mean), tuple(std))
