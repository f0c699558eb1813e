"""Sources: the bundled sample, torchvision's layout, npz files, and one clear line for each way to be wrong."""

import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.config import DatasetConfig
from pipeline.data.arrays import Arrays, check, digest, statistics
from pipeline.data.sources import SAMPLE, load
from pipeline.errors import UserError
from tests.pipeline.data.fashion_mnist import write_fashion_mnist

SAMPLE_DIGEST = "15ad420b78fe6338cb933b09b33b1f67665ade3f1bc4b04d5500acaaad57fd69"


@pytest.fixture(scope="module")
def sample() -> Any:
    return load(DatasetConfig(name="cifar100_sample"))


def arrays(n: int = 12, classes: int = 3, shape: tuple[int, ...] = (8, 8, 3)) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, n, *shape), dtype=np.uint8)
    y = np.arange(n) % classes
    return {"x_train": x[0], "y_train": y, "x_test": x[1], "y_test": y.copy()}


def load_npz(folder: Path, values: dict[str, Any]) -> Any:
    path = folder / "data.npz"
    np.savez_compressed(path, **values)
    return load(DatasetConfig(name="npz", path=str(path)))


# the bundled sample


def test_sample_is_balanced_and_small(sample: Any) -> None:
    assert sample.train_x.shape == (2000, 3, 32, 32)
    assert sample.test_x.shape == (500, 3, 32, 32)
    assert sample.train_x.dtype == torch.uint8
    assert sample.train_y.dtype == torch.int64
    assert (sample.num_classes, sample.image_size, sample.in_chans) == (20, 32, 3)
    assert torch.bincount(sample.train_y).tolist() == [100] * 20
    assert torch.bincount(sample.test_y).tolist() == [25] * 20
    assert list(sample.classes) == sorted(sample.classes)
    assert SAMPLE.stat().st_size < 6_000_000


def test_sample_digest_is_the_same_for_ever(sample: Any) -> None:
    assert sample.digest == SAMPLE_DIGEST


def test_published_constants_are_those_of_the_KD_tables_code(sample: Any) -> None:
    published: Any = load(DatasetConfig(name="cifar100_sample", normalisation="published"))
    assert published.mean == (0.5071, 0.4867, 0.4408)
    assert published.std == (0.2675, 0.2565, 0.2761)
    assert (published.digest, torch.equal(published.train_x, sample.train_x)) == (sample.digest, True)
    assert published.mean == pytest.approx(sample.mean, abs=2.5e-4)
    assert published.std == pytest.approx(sample.std, abs=2.5e-4)
    assert (published.mean, published.std) != (sample.mean, sample.std)


def test_sample_shows_natural_images(sample: Any) -> None:
    """Neighbouring pixels agree, and means are near CIFAR-100's: a wrong unpacking would give noise."""
    x = sample.train_x.float() / 255
    assert (x[..., 1:] - x[..., :-1]).abs().mean() < 0.06
    assert (x[..., 1:, :] - x[..., :-1, :]).abs().mean() < 0.06
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.tensor(sample.mean), rtol=0, atol=0.05)


@pytest.mark.slow
def test_sample_is_the_stated_part_of_the_original(sample: Any, cifar100: Path, tmp_path: Path) -> None:
    script = SAMPLE.parent / "make_cifar100_sample.py"
    subprocess.run([sys.executable, script, cifar100, tmp_path / "again.npz"], check=True)
    stored = np.load(SAMPLE)
    with np.load(tmp_path / "again.npz") as again:
        assert set(again.files) == set(stored.files)
        assert all(np.array_equal(again[name], stored[name]) for name in again.files)

    whole: Any = load(DatasetConfig(name="cifar100", root=str(cifar100)))
    assert (whole.num_classes, len(whole.train_x), len(whole.test_x)) == (100, 50_000, 10_000)
    assert whole.mean == pytest.approx(statistics(whole.train_x.numpy()).mean, abs=1e-4)
    assert whole.std == pytest.approx(statistics(whole.train_x.numpy()).std, abs=1e-4)
    for split in ("train", "test"):
        rows = torch.from_numpy(stored[f"original_{split}"].astype(np.int64))
        assert torch.equal(getattr(whole, f"{split}_x")[rows], getattr(sample, f"{split}_x"))
        names = [whole.classes[label] for label in getattr(whole, f"{split}_y")[rows]]
        assert names == [sample.classes[label] for label in getattr(sample, f"{split}_y")]
        for old in {whole.classes.index(name) for name in sample.classes}:  # the first of each class
            all_rows = (getattr(whole, f"{split}_y") == old).nonzero().flatten()
            mine = rows[getattr(whole, f"{split}_y")[rows] == old]
            assert torch.equal(mine, all_rows[: len(mine)])

    with (cifar100 / "cifar-100-python" / "train").open("rb") as file:
        original = pickle.load(file, encoding="latin1")
    fine_to_coarse = dict(zip(original["fine_labels"], original["coarse_labels"], strict=True))
    chosen = [whole.classes.index(name) for name in sample.classes]
    assert sorted(fine_to_coarse[fine] for fine in chosen) == list(range(20))  # one of each super-class

    parts: list[Any] = [part.numpy() for part in (whole.train_x, whole.train_y, whole.test_x, whole.test_y)]
    held = Arrays._make([*parts, whole.classes])
    start = time.process_time()
    assert digest(held) == whole.digest
    assert time.process_time() - start < 1

    whole_files, damaged = cifar100 / "cifar-100-python", tmp_path / "cifar-100-python"
    damaged.mkdir()
    for name in ("meta", "test"):
        (damaged / name).symlink_to(whole_files / name)
    (damaged / "train").write_bytes((whole_files / "train").read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"CIFAR100 files in .* are incomplete or damaged.*dataset\.download=true"):
        load(DatasetConfig(name="cifar100", root=str(tmp_path)))


# torchvision


@pytest.mark.parametrize(
    ("name", "folder"),
    [("cifar100", "cifar-100-python"), ("cifar10", "cifar-10-batches-py"), ("fashion_mnist", "FashionMNIST")],
)
def test_missing_data_set_names_folder_and_remedy(name: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(DatasetConfig(name=name, root=str(tmp_path)))
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / folder) in message
    assert "dataset.root" in message
    assert "dataset.download=true" in message


def test_damaged_cifar_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"CIFAR10 files in .* are incomplete or damaged"):
        load(DatasetConfig(name="cifar10", root=str(tmp_path)))


def test_fashion_mnist_stays_grey(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, 20)
    data = load(DatasetConfig(name="fashion_mnist", root=str(tmp_path)))
    assert data.train_x.shape == (20, 1, 28, 28)
    assert (data.in_chans, data.image_size, data.num_classes) == (1, 28, 10)
    assert (data.mean, data.std) == ((0.2860,), (0.3530,))
    assert data.classes[9] == "Ankle boot"


def test_cut_fashion_mnist_is_one_line(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, 20, cut=100)
    with pytest.raises(UserError, match=r"FashionMNIST files in .* are incomplete or damaged"):
        load(DatasetConfig(name="fashion_mnist", root=str(tmp_path)))


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets as datasets

    def no_network(*_args: object, **_kwargs: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(datasets, "CIFAR10", no_network)
    with pytest.raises(UserError, match=r"dataset\.download=true: CIFAR10 could not be fetched.*no route to host"):
        load(DatasetConfig(name="cifar10", root=str(tmp_path), download=True))


# npz


def test_npz_round_trip(tmp_path: Path) -> None:
    values = arrays()
    data = load_npz(tmp_path, values)
    assert np.array_equal(data.train_x.numpy(), values["x_train"].transpose(0, 3, 1, 2))
    assert data.train_y.tolist() == values["y_train"].tolist()
    assert data.classes == ("0", "1", "2")
    scaled = values["x_train"] / 255
    assert data.mean == pytest.approx(scaled.mean((0, 1, 2)), abs=1e-12)
    assert data.std == pytest.approx(scaled.std((0, 1, 2)), abs=1e-12)


def test_grey_npz_stays_grey_and_names_are_kept(tmp_path: Path) -> None:
    data = load_npz(tmp_path, arrays(shape=(8, 8)) | {"class_names": np.array(["a", "b", "c"])})
    assert data.train_x.shape == (12, 1, 8, 8)
    assert data.in_chans == len(data.mean) == 1
    assert data.classes == ("a", "b", "c")


def test_constant_channel_can_be_normalised(tmp_path: Path) -> None:
    data = load_npz(tmp_path, arrays() | {"x_train": np.full((12, 8, 8, 3), 7, np.uint8)})
    assert data.std == (1 / 255,) * 3


def test_digest_sees_every_part(tmp_path: Path) -> None:
    values = arrays()
    reference = load_npz(tmp_path, values).digest
    assert load_npz(tmp_path, values).digest == reference
    assert load_npz(tmp_path, {k: v.astype(np.uint8) for k, v in values.items()}).digest == reference  # same labels
    for name in ("x_train", "y_train", "x_test", "y_test"):
        changed = {k: v.copy() for k, v in values.items()}
        changed[name].reshape(-1)[0] = (int(changed[name].reshape(-1)[0]) + 1) % 3
        assert load_npz(tmp_path, changed).digest != reference, name
    assert load_npz(tmp_path, values | {"class_names": np.array(["a", "b", "c"])}).digest != reference


BASE = arrays()
BAD = {
    "float images": ({"x_train": BASE["x_train"] / 255}, "x_train is float64; images must be uint8"),
    "flat images": ({"x_test": BASE["x_test"].reshape(12, -1)}, "x_test has shape (12, 192); images must be (N,H,W,C)"),
    "NCHW": ({"x_train": np.zeros((12, 3, 8, 8), np.uint8)}, "so 8 channels; images must be (N,H,W,C): transpose"),
    "oblong": ({"x_train": np.zeros((12, 8, 9, 3), np.uint8)}, "so 8×9 pixels; images must be square"),
    "no images": ({"x_train": BASE["x_train"][:0], "y_train": BASE["y_train"][:0]}, "x_train has shape (0, 8, 8, 3)"),
    "other test size": ({"x_test": np.zeros((12, 6, 6, 3), np.uint8)}, "are 3×8×8 and of x_test 3×6×6"),
    "other test channels": ({"x_test": np.zeros((12, 8, 8), np.uint8)}, "are 3×8×8 and of x_test 1×8×8"),
    "float labels": ({"y_train": BASE["y_train"] * 1.0}, "y_train is float64; labels must be integers 0 to N-1"),
    "text labels": ({"y_train": BASE["y_train"].astype(str)}, "labels must be integers"),
    "boolean labels": ({"y_train": BASE["y_train"] > 0}, "y_train is bool; labels must be integers"),
    "one-hot labels": ({"y_train": np.eye(3, dtype=int)[BASE["y_train"]]}, "y_train has shape (12, 3); labels must be"),
    "no labels": ({"y_test": BASE["y_test"][:0]}, "y_test is empty"),
    "negative label": ({"y_train": BASE["y_train"] - 1}, "y_train holds -1; labels must be"),
    "negative test label": ({"y_test": BASE["y_test"] - 1}, "y_test holds -1; labels must be"),
    "huge label": ({"y_train": np.full(12, 2**64 - 1, np.uint64)}, "y_train holds 18446744073709551615"),
    "labels from one": ({"y_train": BASE["y_train"] + 1}, "y_train lacks label 0 of the labels 0 to 3"),
    "a gap": ({"y_train": BASE["y_train"] * 2}, "y_train lacks label 1 of the labels 0 to 4"),
    "one class": ({"y_train": BASE["y_train"] * 0, "y_test": BASE["y_test"] * 0}, "one class only"),
    "unknown test label": ({"y_test": BASE["y_test"] + 1}, "y_test holds 3, but training has the classes 0 to 2"),
    "lengths": ({"y_train": BASE["y_train"][:10]}, "x_train has 12 images and y_train 10 labels"),
    "test lengths": ({"x_test": BASE["x_test"][:7]}, "x_test has 7 images and y_test 12 labels"),
    "too few names": ({"class_names": np.array(["a", "b"])}, "y_train holds 2, but there are 2 class names"),
    "too many names": ({"class_names": np.array(list("abcd"))}, "y_train lacks label 3 of the labels 0 to 3"),
    "same name twice": ({"class_names": np.array(["a", "b", "a"])}, "class_names holds 'a' twice"),
    "numbers as names": ({"class_names": np.arange(3)}, "class_names is int64 of shape (3,); it must be"),
    "objects": ({"y_train": np.array([0, "x"] * 6, dtype=object)}, "Python objects, which are never unpickled"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_npz_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    change, expected = BAD[case]
    with pytest.raises(UserError) as caught:
        load_npz(tmp_path, BASE | change)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(f"dataset.path={tmp_path}")
    assert "\n" not in message


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"y_train, y_test missing \(it holds labels, x_test, x_train\)"):
        load_npz(tmp_path, {"x_train": BASE["x_train"], "x_test": BASE["x_test"], "labels": BASE["y_train"]})
    with pytest.raises(UserError, match="it holds nothing"):
        check({}, "here")


def test_unreadable_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    config = DatasetConfig(name="npz", path=str(path))

    def message() -> str:
        with pytest.raises(UserError) as caught:
            load(config)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"dataset.path={path}")
        return str(caught.value)

    assert "no such file" in message()
    for content in (b"", b"text", pickle.dumps({"x_train": 1})):
        path.write_bytes(content)
        assert "not an .npz file" in message()
    with path.open("wb") as file:
        np.save(file, BASE["x_train"])
    assert "not an .npz file" in message()
    with pytest.raises(UserError, match=r"dataset\.path is not set"):
        load(DatasetConfig(name="npz"))


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_npz_never_passes(compressed: bool, tmp_path: Path) -> None:
    """Cut anywhere, or with a byte changed: an error in one line, or (outside the arrays) the very same data."""
    path = tmp_path / "data.npz"
    values: dict[str, Any] = arrays(4, 2, (4, 4))
    (np.savez_compressed if compressed else np.savez)(path, **values)
    config = DatasetConfig(name="npz", path=str(path))
    whole, reference = path.read_bytes(), load(config).digest
    refused = 0
    damaged = [whole[:size] for size in range(2, len(whole), 41)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in range(2, len(whole), 7)]
    for content in damaged:
        path.write_bytes(content)
        try:
            assert load(config).digest == reference
        except UserError:
            refused += 1
    assert refused > len(damaged) / 3
