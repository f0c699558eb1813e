"""ImageNet at 32×32 pixels: both layouts of the authors, read once and mapped, and pickles that run nothing."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import DatasetConfig
from pipeline.data.sources import ImageData, load
from pipeline.errors import UserError

Batch = dict[str, Any]
EACH, HELD_OUT = 100, 20
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10 * EACH + HELD_OUT, 32, 32, 3), dtype=np.uint8)
LABELS = np.concatenate([RNG.permutation(1000), RNG.integers(0, 1000, HELD_OUT)])


def batches() -> dict[str, Batch]:
    """What the authors' scripts write: planes one after the other, labels from 1, the mean of all images."""
    planes = np.stack([np.concatenate([image[..., c].flatten() for c in range(3)]) for image in PIXELS])
    starts = {**{f"train_data_batch_{i + 1}": i * EACH for i in range(10)}, "val_data": 10 * EACH}
    parts = {name: slice(start, start + EACH) for name, start in starts.items()}
    mean = planes[: 10 * EACH].mean(0)
    return {name: {"data": planes[at], "labels": (LABELS[at] + 1).tolist(), "mean": mean} for name, at in parts.items()}


def as_npz(path: Path, batch: Batch) -> None:
    np.savez(path.with_suffix(".npz"), **batch)


def as_compressed(path: Path, batch: Batch) -> None:
    np.savez_compressed(path.with_suffix(".npz"), **batch)


def pickled(protocol: int) -> Callable[[Path, Batch], None]:
    return lambda path, batch: path.write_bytes(pickle.dumps(batch, protocol))


def write(root: Path, how: Callable[[Path, Batch], None] = as_npz, **changed: Batch) -> Path:
    root.mkdir()
    for name, batch in {**BATCHES, **changed}.items():
        how(root / name, batch)
    return root


def read(root: Path) -> ImageData:
    return load(DatasetConfig(name="imagenet32", root=str(root)))


BATCHES = batches()


@pytest.fixture(autouse=True)
def cache(cache_home: Path) -> Path:
    return cache_home / "images"


@pytest.mark.parametrize("how", [as_npz, as_compressed, pickled(3), pickled(4)], ids=["npz", "packed", "3", "4"])
def test_pixels_and_labels_are_those_that_were_written(how: Callable[[Path, Batch], None], tmp_path: Path) -> None:
    data = read(write(tmp_path / "data", how))
    found = [np.asarray(part) for part in (data.train_x, data.train_y, data.test_x, data.test_y)]
    n = 10 * EACH
    expected: list[NDArray[Any]] = [PIXELS[:n], LABELS[:n], PIXELS[n:], LABELS[n:]]
    assert np.array_equal(found[0], expected[0].transpose(0, 3, 1, 2))
    assert np.array_equal(found[2], expected[2].transpose(0, 3, 1, 2))
    assert (found[1].tolist(), found[3].tolist()) == (expected[1].tolist(), expected[3].tolist())
    assert (data.num_classes, data.image_size, data.in_chans) == (1000, 32, 3)
    scaled = PIXELS[:n] / 255
    assert data.mean == pytest.approx(scaled.mean((0, 1, 2)), abs=1e-12)
    assert data.std == pytest.approx(scaled.std((0, 1, 2)), abs=1e-12)


def test_all_layouts_are_the_same_data(tmp_path: Path) -> None:
    """Also those of an npz data set: the digest is over pixels, labels and names."""
    n = 10 * EACH
    same = {"x_train": PIXELS[:n], "y_train": LABELS[:n], "x_test": PIXELS[n:], "y_test": LABELS[n:]}
    np.savez(tmp_path / "same.npz", **same)
    digest = load(DatasetConfig(name="npz", path=str(tmp_path / "same.npz"))).digest
    assert read(write(tmp_path / "a")).digest == digest
    assert read(write(tmp_path / "b", pickled(3))).digest == digest
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "Imagenet32_train_npz")  # as the archives unpack
    (tmp_path / "c" / "Imagenet32_val_npz").mkdir()
    shutil.move(tmp_path / "c" / "Imagenet32_train_npz" / "val_data.npz", tmp_path / "c" / "Imagenet32_val_npz")
    assert read(tmp_path / "c").digest == digest


def test_files_are_read_once_until_they_change(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "data")
    first = read(root)
    file = root / "train_data_batch_3.npz"
    content, times = file.read_bytes(), os.stat(file)
    file.write_bytes(bytes(len(content)))  # unreadable, were it read
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = read(root)
    assert (again.digest, again.mean, again.std) == (first.digest, first.mean, first.std)
    assert np.array_equal(np.asarray(again.train_x), np.asarray(first.train_x))
    os.utime(file)
    with pytest.raises(UserError, match=r"not an \.npz file"):
        read(root)
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    kept = next(path for path in cache.iterdir() if not path.suffix)
    kept.write_bytes(kept.read_bytes()[:-100])  # damaged: written again
    assert read(root).digest == first.digest


def resident(file: Path) -> tuple[int, int]:
    """(bytes mapped, bytes in memory) of this process's largest mapping of a file."""
    found, ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            ours = line.endswith(str(file))
        elif ours and key in ("Size:", "Rss:"):
            found.append(int(rest[0]) * 1024)
    return max(zip(found[::2], found[1::2], strict=True))


def test_images_are_mapped_not_loaded(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "data")
    read(root)
    data = read(root)
    file = next(path for path in cache.iterdir() if not path.suffix)
    size, held = resident(file)
    assert size >= 1000 * 3072
    assert held < size / 4
    assert int(np.asarray(data.train_x).sum(dtype=np.int64)) == int(PIXELS[:1000].sum(dtype=np.int64))
    assert resident(file)[1] >= 1000 * 3072


class Malicious:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("part", ["whole", "data", "labels", "mean"])
def test_a_pickle_runs_nothing(part: str, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(tmp_path / "control")))
    assert (tmp_path / "control").exists()
    bad = Malicious(proof)
    root = write(tmp_path / "data", pickled(3))
    batch = bad if part == "whole" else BATCHES["train_data_batch_1"] | {part: bad}
    (root / "train_data_batch_1").write_bytes(pickle.dumps(batch, 3))
    if part == "mean":  # not looked at
        read(root)
    else:
        with pytest.raises(UserError) as caught:
            read(root)
        assert "\n" not in str(caught.value)
        assert "train_data_batch_1: " in str(caught.value)
    assert not proof.exists()


FIRST = BATCHES["train_data_batch_1"]
BAD: dict[str, tuple[Batch, str]] = {
    "labels from 0": ({"labels": [0, *FIRST["labels"][1:]]}, "labels hold 0; they should be 1 to 1000"),
    "labels past 1000": ({"labels": [1001, *FIRST["labels"][1:]]}, "labels hold 1001; they should be 1 to 1000"),
    "too few labels": ({"labels": FIRST["labels"][1:]}, "there should be 100 whole numbers"),
    "fractions": ({"labels": [0.5] * EACH}, "there should be 100 whole numbers"),
    "64 pixels": ({"data": np.zeros((EACH, 3 * 64 * 64), np.uint8)}, "data is uint8 of shape (100, 12288)"),
    "floats": ({"data": FIRST["data"] / 255}, "data is float64 of shape (100, 3072)"),
    "a class without images": ({"labels": [FIRST["labels"][1], *FIRST["labels"][1:]]}, "y_train lacks label"),
}


@pytest.mark.parametrize("how", [as_npz, pickled(3)], ids=["npz", "pickle"])
@pytest.mark.parametrize("case", BAD)
def test_other_arrays_are_refused_in_one_line(case: str, how: Callable[[Path, Batch], None], tmp_path: Path) -> None:
    change, expected = BAD[case]
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "data", how, train_data_batch_1=FIRST | change))
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"dataset.root={tmp_path / 'data'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("how", "suffix"), [(as_npz, ".npz"), (pickled(3), "")], ids=["npz", "pickle"])
def test_damaged_and_missing_files_are_named(
    how: Callable[[Path, Batch], None], suffix: str, tmp_path: Path, cache: Path
) -> None:
    root = write(tmp_path / "data", how)
    file = root / f"train_data_batch_7{suffix}"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(
        UserError, match=r"^[^\n]*train_data_batch_7[^\n]* the file cannot be read [^\n]*copy it again$"
    ):
        read(root)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]  # nothing half written is left
    file.unlink()
    with pytest.raises(UserError, match=r"^[^\n]*: train_data_batch_7\.npz \(or train_data_batch_7, the pickle\)"):
        read(root)
    with pytest.raises(
        UserError, match=r"^[^\n]* is not there \(looked in [^\n]*imagenet32 needs train_data_batch_1 to"
    ):
        read(cache)


def test_a_cache_folder_without_room_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^[^\n]*cannot be made \(Not a directory\); set XDG_CACHE_HOME to [^\n]*$"):
        read(write(tmp_path / "data"))
