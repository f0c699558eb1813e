"""timm's readers: folders, tar files, shards and Hugging Face's with the same pictures are the same data; faults."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from pipeline.config import DatasetConfig
from pipeline.data.sources import ImageData, load
from pipeline.errors import UserError
from tests.disks import small_disk as small_disk
from tests.pipeline.data.fashion_mnist import write_fashion_mnist

SIZE = 16
NAMES = ("ash", "birch", "cedar")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def jpeg(seed: int) -> bytes:
    """Smooth colours, square or wide."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((48, 32) if seed % 2 else (32, 32), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


PICTURES = {
    "train": [(label, f"{label}{i}", jpeg(10 * label + i)) for label in range(3) for i in range(4)],
    "validation": [(label, f"{label}{i}", jpeg(100 + 10 * label + i)) for label in range(3) for i in range(2)],
}
"""Label, name and file of each, class by class."""


def packed(file: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def sample(label: int | str, name: str, content: bytes) -> list[tuple[str, bytes]]:
    """What a shard has of a picture."""
    return [(f"{name}.jpg", content), (f"{name}.cls", str(label).encode()), (f"{name}.json", b"{}")]


@pytest.fixture
def root(tmp_path: Path, cache_home: Path) -> Path:
    """The same pictures in folders, as tar files of these, and as shards that _info.json lists."""
    root = tmp_path / "data"
    (root / "shards").mkdir(parents=True)
    splits: dict[str, Any] = {}
    for split, pictures in PICTURES.items():
        half, names = len(pictures) // 2, [f"trees-{split}-000{i}.tar" for i in range(2)]
        for name, part in zip(names, (pictures[:half], pictures[half:]), strict=True):
            packed(root / "shards" / name, (member for each in part for member in sample(*each)))
        splits[split] = {"name": split, "filenames": names, "shard_lengths": [half] * 2, "num_samples": 2 * half}
        inside = [(f"{NAMES[label]}/{name}.jpg", content) for label, name, content in pictures]
        (root / "tars").mkdir(exist_ok=True)
        packed(root / "tars" / f"{split}.tar", inside)
        with tarfile.open(root / "tars" / f"{split}.tar") as tar:
            tar.extractall(root / "trees" / split, filter="data")
    (root / "shards" / "_info.json").write_text(json.dumps({"splits": splits}))
    (root / "names.txt").write_text("\n".join(NAMES))
    return root


def read(root: Path | str, given: str, **changes: Any) -> ImageData:
    return load(DatasetConfig(name="timm", id=given, root=str(root), **{"image_size": SIZE, **changes}))


def shown(content: bytes) -> torch.Tensor:
    """The square in the middle, by torchvision."""
    steps = [v2.Resize(SIZE, InterpolationMode.BICUBIC), v2.CenterCrop(SIZE), v2.PILToTensor()]
    return v2.Compose(steps)(Image.open(io.BytesIO(content)).convert("RGB"))


EVERY: dict[str, tuple[str, dict[str, str], tuple[pytest.MarkDecorator, ...]]] = {
    "folders": ("folder/trees", {}, ()),
    "tar files": ("folder/tars", {"train_split": "train.tar", "test_split": "validation.tar"}, ()),
    "torchvision's folders": ("torch/image_folder", {"root": "trees"}, ()),
    "shards of _info.json": ("wds/shards", {"path": "names.txt"}, (needs("webdataset"),)),
    "shards by name": (
        "wds/shards",
        {
            "path": "names.txt",
            "train_split": "trees-train-{0000..0001}.tar|12",
            "test_split": "trees-validation-{0000..0001}.tar",
        },
        (needs("webdataset"),),
    ),
    "Hugging Face's": ("hfds/trees", {}, (needs("datasets"), pytest.mark.slow)),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=row[2]) for kind, row in EVERY.items()])
def test_pixels_labels_and_names_are_the_same_whatever_reads_them(kind: str, root: Path) -> None:
    given, changes, _ = EVERY[kind]
    changed = {key: str(root / value) if key in ("root", "path") else value for key, value in changes.items()}
    data = read(Path(changed.pop("root", root)), given, **changed)
    for split, x, y in (("train", data.train_x, data.train_y), ("validation", data.test_x, data.test_y)):
        assert torch.equal(x[:], torch.stack([shown(content) for _, _, content in PICTURES[split]]))
        assert y.tolist() == [label for label, _, _ in PICTURES[split]]
    assert data.classes == NAMES
    assert data.crop_pct == 1


def test_torchvisions_arrays_keep_their_pixels(tmp_path: Path, cache_home: Path) -> None:
    write_fashion_mnist(tmp_path, 20)
    data = read(tmp_path, "torch/fashion_mnist", image_size=28)
    plain = load(DatasetConfig(name="fashion_mnist", root=str(tmp_path)))
    for split in ("train", "test"):
        assert torch.equal(getattr(data, f"{split}_x")[:], getattr(plain, f"{split}_x").expand(-1, 3, -1, -1))
        assert torch.equal(getattr(data, f"{split}_y"), getattr(plain, f"{split}_y"))
    assert data.classes == plain.classes


def test_a_class_without_test_images_shifts_no_label(root: Path) -> None:
    shutil.rmtree(root / "trees" / "validation" / NAMES[0])
    assert read(root, "folder/trees").test_y.tolist() == [1, 1, 2, 2]


def test_another_size_or_split_is_another_copy(root: Path) -> None:
    assert read(root, "folder/trees").image_size == SIZE
    assert read(root, "folder/trees", image_size=8).image_size == 8
    assert len(read(root, "folder/trees", train_split="validation").train_x) == 6


@needs("webdataset")
def test_each_process_of_a_training_has_all_shards(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.data.readers.reader_wds as module

    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    assert len(read(root, "wds/shards").train_x) == 12


def overwritten(member: int) -> Callable[[Path], Any]:
    """The header of a member is no more."""

    def harm(root: Path) -> None:
        file = root / "shards" / LAST
        with tarfile.open(file) as tar:
            at = tar.getmembers()[member].offset
        content = bytearray(file.read_bytes())
        content[at : at + tarfile.BLOCKSIZE] = b"\xff" * tarfile.BLOCKSIZE
        file.write_bytes(content)

    return harm


def cut(member: int, place: int) -> Callable[[Path], Any]:
    """Nothing follows from this byte of a member on."""

    def harm(root: Path) -> None:
        file = root / "shards" / LAST
        with tarfile.open(file) as tar:
            at = tar.getmembers()[member].offset + place
        file.write_bytes(file.read_bytes()[:at])

    return harm


def ending(*members: tuple[str, bytes]) -> Callable[[Path], Any]:
    """The last training shard with another last picture."""
    others = [member for each in PICTURES["train"][6:-1] for member in sample(*each)]
    return lambda root: packed(root / "shards" / LAST, [*others, *members])


def unknown(root: Path) -> None:
    shutil.copytree(root / "trees/validation/ash", root / "trees/validation/oak")


def remove(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_bytes(content)


def nothing(root: Path) -> None:
    """The key is at fault."""


LAST = "trees-train-0001.tar"
CUT = jpeg(7)[:-60]
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
FOLDERS: dict[str, tuple[str, dict[str, Any], Callable[[Path], Any], str]] = {
    "no such folder": ("folder/trees", {"test_split": "held_out"}, nothing, "test_split=held_out: there is no such"),
    "no such root": ("folder/trees", {"root": "/nowhere"}, nothing, "dataset.root=/nowhere is no folder; name the"),
    "a class of test images": ("folder/trees", {}, unknown, "test images have a class 'oak' that the training"),
    "a picture of no class": (
        "folder/trees",
        {},
        write("trees/train/stray.jpg", jpeg(1)),
        "train_split=train: pictures lie beside the folders of classes",
    ),
    "a damaged picture": (
        "folder/trees",
        {},
        write("trees/train/ash/01.jpg", CUT),
        "=train: ash/01.jpg: not such a pi",
    ),
    "a damaged tar file": (
        "folder/tars",
        {"train_split": "train.tar", "test_split": "validation.tar"},
        write("tars/train.tar", bytes(10) + b"1"),
        "train_split=train.tar: ",
    ),
    "no torchvision set": ("torch/cifar1000", {}, nothing, "Unknown torchvision dataset cifar1000"),
    "no torchvision split": (
        "torch/cifar10",
        {"train_split": "trains"},
        nothing,
        "train_split=trains: there is no such",
    ),
    "no torchvision files": ("torch/cifar10", {}, nothing, "Dataset not found or corrupted"),
}
SHARDS: dict[str, tuple[str, dict[str, Any], Callable[[Path], Any], str]] = {
    "too few names": ("wds/shards", {"path": "names.txt"}, write("names.txt", b"a\nb"), "but there are 2 class names"),
    "no such split": ("wds/shards", {"test_split": "test"}, nothing, "test_split=test: split test not found in info"),
    "no list of shards": ("wds/shards", {}, remove("shards/_info.json"), "has no _info.json to list it; give its sh"),
    "a missing shard": ("wds/shards", {}, remove(f"shards/{LAST}"), f"{LAST} is not there (1 of 2 shards are missing)"),
    "a shard cut in a picture": ("wds/shards", {}, cut(6, 600), f"{LAST}: 20.jpg: unexpected end of data"),
    "a shard cut in its last picture": ("wds/shards", {}, cut(17, 513), f"{LAST}: unexpected end of data"),
    "a shard cut in a header": ("wds/shards", {}, cut(6, 100), f"{LAST}: it is cut or damaged at byte"),
    "a shard cut between two": ("wds/shards", {}, cut(6, 0), f"{LAST}: it is cut or damaged at byte"),
    "a shard that is no tar file": ("wds/shards", {}, write(f"shards/{LAST}", b"nothing" * 999), f"{LAST}: "),
    "a damaged header": ("wds/shards", {}, overwritten(6), f"{LAST}: it is cut or damaged at byte"),
    "a shard out of the folder": (
        "wds/shards",
        {"train_split": "../tars/train.tar"},
        nothing,
        "names '../tars/train.tar', which is not a file inside",
    ),
    "too few pictures": ("wds/shards", {}, ending(), "the shards hold 11 pictures, 12 are announced"),
    "a pickle": ("wds/shards", {}, ending(("z.jpg", jpeg(1)), ("z.state.PKL", b"")), "z.state.PKL may hold a program"),
    "PostScript": ("wds/shards", {}, ending(("z.jpg", POSTSCRIPT)), "z.jpg: cannot identify image file"),
    "a cut picture": ("wds/shards", {}, ending(*sample(2, "z", CUT)), "image file is truncated"),
    "no label": ("wds/shards", {}, ending(("z.jpg", jpeg(1))), "KeyError('cls')"),
    "a name as label": ("wds/shards", {}, ending(*sample("fir", "z", jpeg(1))), "invalid literal for int()"),
    "a negative label": ("wds/shards", {}, ending(*sample(-1, "z", jpeg(1))), "has label -1; labels must be whole"),
    "a gap in the labels": ("wds/shards", {}, ending(*sample(4, "z", jpeg(1))), "y_train lacks label 3 of the labels"),
}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], Callable[[Path], Any], str]] = {
    "not there": ("hfds/oaks/of", {}, nothing, "fetch the data set with `hf download oaks/of --repo-type dataset"),
    "no such split of it": (
        "hfds/trees",
        {"train_split": "trains"},
        nothing,
        'train_split=trains: Unknown split "trains"',
    ),
    "a damaged picture of it": ("hfds/trees", {}, write("trees/train/ash/01.jpg", CUT), "01.jpg: not such a picture"),
}
BAD = FOLDERS | SHARDS | HUGGING_FACE


@pytest.mark.parametrize(
    "case",
    [
        *FOLDERS,
        *(pytest.param(case, marks=needs("webdataset")) for case in SHARDS),
        *(pytest.param(case, marks=(needs("datasets"), pytest.mark.slow)) for case in HUGGING_FACE),
    ],
)
def test_a_fault_is_one_line(case: str, root: Path) -> None:
    given, changes, harm, expected = BAD[case]
    harm(root)
    if "path" in changes:
        changes = {**changes, "path": str(root / changes["path"])}
    with pytest.raises(UserError) as caught:
        read(given=given, **{"root": root, **changes})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_disk_without_room_is_refused_before_it_is_filled(
    root: Path, small_disk: Callable[[float], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk(40)))
    with pytest.raises(UserError, match=r"its images take 0\.1 GB, and .* has 0\.0 GB free: make room"):
        read(root, "folder/trees", image_size=1024)


def test_a_missing_package_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for given, package in (("wds/shards", "webdataset"), ("hfds/trees", "datasets")):
        with pytest.raises(UserError, match=rf"needs {package}: pip install 'asib\[timm-data\]'"):
            read(root, given)
    (tmp_path / "datasets-3.6.0.dist-info").mkdir()
    (tmp_path / "datasets-3.6.0.dist-info" / "METADATA").write_text("Name: datasets\nVersion: 3.6.0\n")
    with pytest.raises(UserError, match=r"datasets 3\.6\.0 may run scripts of data sets: pip install 'datasets>=4'"):
        read(root, "hfds/trees")
