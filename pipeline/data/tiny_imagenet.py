"""Tiny-ImageNet (Stanford CS231n) as it is distributed: 200 classes of ImageNet in JPEG files of 64×64 pixels.

train/<wnid>/images/ holds the training images; those of val/images/, labelled by val/val_annotations.txt, are the test
split, since the labels of test/ are not public. wnids.txt lists the classes, words.txt names those of all of WordNet.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.served.picture_files import find
from pipeline.served.pictures import Refused, read

SIDE = 64
AT_ONCE = 1000
THREADS = 8
"""Decoding leaves Python's lock to the others."""


class Labelled(NamedTuple):
    """Files of one split, and their labels."""

    files: list[str]
    labels: list[int]


class Layout(NamedTuple):
    """Both splits, the classes' names in the order of their wnids (torchvision's), and the files that tell of them."""

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    told: list[Path]


def scan(root: Path, key: str) -> Layout:
    """The files and classes below `root`.

    Raises:
        UserError: a class without name or images, an image of the test split without label, or a label without image.
    """
    told = [root / "wnids.txt", root / "words.txt", root / "val" / "val_annotations.txt"]
    wnids, words, annotations = (_rows(path, key) for path in told)
    names = {row[0]: row[1] for row in words if len(row) > 1}
    number = {wnid: label for label, wnid in enumerate(sorted({row[0] for row in wnids}))}
    unnamed = next((wnid for wnid in number if wnid not in names), None)
    if unnamed is not None:
        raise UserError(f"{key}: words.txt has no name for {unnamed} of wnids.txt; copy both again")
    train = Labelled([], [])
    for wnid, label in number.items():
        files = _pictures(root / "train" / wnid / "images", key)
        train.files.extend(files)
        train.labels.extend([label] * len(files))
    given = {row[0]: row[1] for row in annotations if len(row) > 1}
    files = _pictures(root / "val" / "images", key)
    for name in [Path(file).name for file in files]:
        if given.get(name) not in number:
            raise UserError(f"{key}: val_annotations.txt gives {name} no class of wnids.txt; copy it again")
    if len(given) != len(files):
        gone = sorted(given.keys() - {Path(file).name for file in files})[0]
        raise UserError(f"{key}: val/images/ has no {gone}, which val_annotations.txt lists; copy it again")
    test = Labelled(files, [number[given[Path(file).name]] for file in files])
    return Layout(train, test, tuple(names[wnid] for wnid in number), told)


def _rows(path: Path, key: str) -> list[list[str]]:
    try:
        return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path.name} cannot be read ({error}); copy it again") from error


def _pictures(folder: Path, key: str) -> list[str]:
    try:
        files = find(folder).files
    except OSError as error:
        raise UserError(f"{key}: {error.filename}: {error.strerror}; copy the data set again") from error
    if not files:
        raise UserError(f"{key}: {folder} has no pictures; copy the data set again")
    return files


def blocks(split: Labelled, key: str) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Images (n,3,64,64) and labels, in order. Raises UserError for a file that is damaged or of another size."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(split.files), AT_ONCE):
            at = slice(start, start + AT_ONCE)
            images = list(pool.map(partial(_decoded, key=key), split.files[at]))
            yield np.stack(images), np.array(split.labels[at], dtype=np.int64)


def _decoded(file: str, key: str) -> NDArray[np.uint8]:
    try:
        picture = read(file)
    except (Refused, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}: {file} cannot be read ({reason}); copy it again") from error
    if picture.size != (SIDE, SIDE):
        raise UserError(f"{key}: {file} has {picture.width} × {picture.height} pixels; Tiny-ImageNet's have 64 × 64")
    return np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)
