"""Tiny-ImageNet in its own layout: pixels of original JPEG files, labels by wnids and annotations, names by words."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import DatasetConfig
from pipeline.data.sources import ImageData, load
from pipeline.errors import UserError

SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "tiny_imagenet_sample.npz"
EACH, HELD_OUT = 3, 2


class Original(NamedTuple):
    """JPEG files by class, of training and validation, and the names of the classes."""

    train: dict[str, list[bytes]]
    val: dict[str, list[bytes]]
    words: dict[str, str]


def sampled(classes: int) -> Original:
    """Files of the data set itself where they are at hand, otherwise made ones; and one grey, as some of it are."""
    if SAMPLE.is_file():
        with np.load(SAMPLE) as held:
            wnids, words = held["wnids"][:classes].tolist(), held["words"].tolist()
            train, val = (files(held, split, count, wnids) for split, count in (("train", EACH), ("val", HELD_OUT)))
    else:
        wnids, words = [f"n{k:08}" for k in range(classes)], [f"thing {k}, object" for k in range(classes)]
        train = {wnid: [made(10 * k + i) for i in range(EACH)] for k, wnid in enumerate(wnids, 1)}
        val = {wnid: [made(1000 * k + i) for i in range(HELD_OUT)] for k, wnid in enumerate(wnids, 1)}
    train[wnids[0]].append(made(0, "L"))
    return Original(train, val, dict(zip(wnids, words, strict=False)))


def files(held: Any, split: str, count: int, wnids: list[str]) -> dict[str, list[bytes]]:
    content, offsets, y = held[f"{split}_jpeg"].tobytes(), held[f"{split}_offsets"], held[f"y_{split}"]
    rows = {wnid: np.flatnonzero(y == k)[:count] for k, wnid in enumerate(wnids)}
    return {wnid: [content[offsets[i] : offsets[i + 1]] for i in at] for wnid, at in rows.items()}


def made(seed: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    return file.getvalue()


def pixels(jpeg: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).transpose(2, 0, 1)


ORIGINAL = sampled(5)
WNIDS = sorted(ORIGINAL.train)


@pytest.fixture(autouse=True)
def cache(cache_home: Path) -> Path:
    return cache_home / "images"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The distributed layout, with its boxes, its unlabelled test/, and wnids in no order."""
    root = tmp_path / "tiny-imagenet-200"
    for wnid, pictures in ORIGINAL.train.items():
        folder = root / "train" / wnid
        (folder / "images").mkdir(parents=True)
        (folder / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        for i, content in enumerate(pictures):
            (folder / "images" / f"{wnid}_{i}.JPEG").write_bytes(content)
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "images" / "test_0.JPEG").write_bytes(ORIGINAL.train[WNIDS[0]][0])
    lines = []
    for number, (wnid, content) in enumerate(held_out()):
        (root / "val" / "images" / f"val_{number}.JPEG").write_bytes(content)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS[::-1]))
    words = {"n00001740": "entity", **ORIGINAL.words}
    (root / "words.txt").write_text("".join(f"{wnid}\t{name}\n" for wnid, name in words.items()))
    return root


def held_out() -> list[tuple[str, bytes]]:
    """Validation images with their classes, not sorted by class."""
    return [(wnid, ORIGINAL.val[wnid][i]) for i in range(HELD_OUT) for wnid in WNIDS]


def read(root: Path) -> ImageData:
    return load(DatasetConfig(name="tiny_imagenet", root=str(root)))


def test_pixels_labels_and_names_are_the_data_sets(root: Path, cache: Path) -> None:
    data = read(root)
    expected = [(k, pixels(content)) for k, wnid in enumerate(WNIDS) for content in ORIGINAL.train[wnid]]
    assert np.array_equal(np.asarray(data.train_x), np.stack([image for _, image in expected]))
    assert data.train_y.tolist() == [label for label, _ in expected]
    by_name = sorted(enumerate(held_out()), key=lambda item: f"val_{item[0]}.JPEG")
    assert np.array_equal(np.asarray(data.test_x), np.stack([pixels(content) for _, (_, content) in by_name]))
    assert data.test_y.tolist() == [WNIDS.index(wnid) for _, (wnid, _) in by_name]
    assert data.classes == tuple(ORIGINAL.words[wnid] for wnid in WNIDS)
    scaled = np.stack([image for _, image in expected]) / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-12)
    assert data.std == pytest.approx(scaled.std((0, 2, 3)), abs=1e-12)
    assert np.asarray(data.train_x).nbytes < next(path for path in cache.iterdir() if not path.suffix).stat().st_size


def test_pictures_are_decoded_once_until_a_file_changes(root: Path) -> None:
    first = read(root)
    file = root / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    content, times = file.read_bytes(), os.stat(file)
    file.write_bytes(bytes(len(content)))  # no picture, were it read
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read(root).digest == first.digest
    file.write_bytes(ORIGINAL.train[WNIDS[1]][0])
    assert read(root).digest != first.digest
    (root / "words.txt").write_text((root / "words.txt").read_text().replace(ORIGINAL.words[WNIDS[0]], "other"))
    file.write_bytes(content)
    assert read(root).classes[0] == "other"
    assert read(root).digest != first.digest


def shrink(root: Path) -> None:
    Image.new("RGB", (64, 60)).save(root / "val" / "images" / "val_3.JPEG")


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text(content)


def empty(root: Path) -> None:
    for file in (root / "train" / WNIDS[1] / "images").iterdir():
        file.unlink()


def unlisted(root: Path) -> None:
    (root / "val" / "images" / "val_99.JPEG").write_bytes(ORIGINAL.val[WNIDS[0]][0])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no words": (lambda root: (root / "words.txt").unlink(), "words.txt is not there (looked in"),
    "no annotations": (
        lambda root: (root / "val" / "val_annotations.txt").unlink(),
        "val/val_annotations.txt is not there (looked in",
    ),
    "no class folder": (write("wnids.txt", "n00001740\n"), "n00001740/images: No such file or directory; copy"),
    "no name": (write("words.txt", f"{WNIDS[0]}\tone\n"), f"words.txt has no name for {WNIDS[1]} of wnids.txt"),
    "an empty class": (empty, f"train/{WNIDS[1]}/images has no pictures"),
    "an image without label": (unlisted, "val_annotations.txt gives val_99.JPEG no class of wnids.txt"),
    "a label without image": (
        lambda root: (root / "val" / "images" / "val_2.JPEG").unlink(),
        "val/images/ has no val_2.JPEG, which val_annotations.txt lists",
    ),
    "a damaged picture": (write("val/images/val_1.JPEG", "no picture"), "val_1.JPEG cannot be read ("),
    "a dangling link": (
        lambda root: (root / "train" / WNIDS[0] / "images" / "z.JPEG").symlink_to("nowhere"),
        "z.JPEG: No such file or directory; repair or remove it",
    ),
    "another size": (shrink, "val_3.JPEG has 64 × 60 pixels; Tiny-ImageNet's have 64 × 64"),
    "no text": (lambda root: (root / "wnids.txt").write_bytes(b"\xff\xfe\0"), "wnids.txt cannot be read ("),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_layout_is_one_line(case: str, root: Path) -> None:
    harm, expected = BAD[case]
    harm(root)
    with pytest.raises(UserError) as caught:
        read(root)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"dataset.root={root}: ")
    assert "\n" not in str(caught.value)
