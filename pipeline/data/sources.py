"""Where images come from: the bundled sample, torchvision's data sets, a user's npz file, or folders of pictures.

Whatever the source, the result is one `ImageData`: checked images, and the digest that identifies them in results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import DatasetConfig
from pipeline.config.datasets import CIFAR100, DATASETS, PUBLISHED, Statistics, Torchvision
from pipeline.config.places import check_data
from pipeline.data import imagenet32, timm_readers, tiny_imagenet
from pipeline.data.arrays import Arrays, check, digest, read_npz, statistics
from pipeline.data.image_files import CROP_PCT, ImageFiles, Images, scan
from pipeline.data.kept import Kept, Source, kept
from pipeline.errors import UserError
from pipeline.paths import user_path

CLASS_LISTS = Path(__file__).parent / "class_lists"
SAMPLE = Path(__file__).parent / "sample" / "cifar100_sample.npz"


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set, in memory or as files.

    train_x, test_x: uint8 (N,C,H,W), H = W, in memory or mapped, or files of such; train_y, test_y: int64 (N,) in
    0..num_classes-1, every class occurring in training. mean, std: per channel, for images scaled to [0, 1].
    digest: SHA-256 (hex) over shapes, types and bytes of the four arrays and the class names, or over files.
    source: where it was read from, in words. crop_pct: the share of a picture's shorter side that its square shows;
    None: pictures are squeezed into a square.
    """

    name: str
    train_x: Images
    train_y: Tensor
    test_x: Images
    test_y: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    source: str
    crop_pct: float | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        return int(self.train_x.shape[-1])

    @property
    def in_chans(self) -> int:
        """3, or 1 for grey images, which stay grey."""
        return int(self.train_x.shape[1])


def load(config: DatasetConfig) -> ImageData:
    """The data set that `config` names, validated.

    Raises UserError when files are missing, damaged or not a classification data set, or where `mean` or `std` is for
    images of other channels.
    """
    row = DATASETS[config.name]
    data = _torchvision(config, row) if isinstance(row, Torchvision) else OWN[config.name](config)
    for key, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != data.in_chans:
            raise UserError(f"dataset.{key}={list(values)}: the images have {data.in_chans} channels; give one each")
    known = PUBLISHED[config.name] if config.normalisation == "published" else data
    return replace(data, mean=config.mean or known.mean, std=config.std or known.std)


def _sample(config: DatasetConfig) -> ImageData:
    """20 classes of CIFAR-100, 100 training and 25 test images each (sample/README.md)."""
    stored = read_npz(SAMPLE, "dataset.name=cifar100_sample, bundled file")
    for split in ("train", "test"):
        stored[f"x_{split}"] = _unpack(stored.pop(f"packed_{split}"))
    return image_data(config.name, check(stored, f"the bundled sample {SAMPLE}"), CIFAR100, "bundled")


def _unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undoes `pack` of sample/make_cifar100_sample.py: (N,3,H,W) differences -> (N,H,W,3) RGB; sums wrap mod 256."""
    planes = np.cumsum(packed, axis=3, dtype=np.uint8)
    green = planes[:, 0]
    return np.stack([planes[:, 1] + green, green, planes[:, 2] + green], axis=3)


def _npz(config: DatasetConfig) -> ImageData:
    if not config.path:
        raise UserError(
            "dataset.path is not set; dataset.name=npz needs the file with x_train, y_train, x_test, y_test"
        )
    path = user_path(config.path, "dataset.path")
    arrays = check(read_npz(path, "dataset.path"), f"dataset.path={path}")
    return image_data(config.name, arrays, statistics(arrays.x_train), str(path))


def _imagenet100(config: DatasetConfig) -> ImageData:
    """The classes of a list, of ImageNet; their labels are in the order of their names, as torchvision counts."""
    path = CLASS_LISTS / f"{config.class_list}.txt"
    if config.class_list is None:
        assert config.path is not None  # config/rules.py
        path = user_path(config.path, "dataset.path")
    return _image_folder(config, _names(path))


def _names(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line; # begins a comment. Raises UserError: no text, none, or one twice."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"dataset.path={path}: it cannot be read as text ({error}); name a list of classes") from error
    names = [line for line in lines if line and not line.startswith("#")]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not names:
        fault = "holds no name of a class" if twice is None else f"names {twice} twice"
        raise UserError(f"dataset.path={path}: it {fault}; give each class a line of its own")
    return tuple(names)


def _image_folder(config: DatasetConfig, only: Sequence[str] | None = None) -> ImageData:
    check_data(config)
    key, root = f"dataset.root={config.root}", user_path(config.root, "dataset.root")
    found = scan(root, key, only)
    return ImageData(
        name=config.name,
        train_x=ImageFiles(found.train, config.image_size, config.workers, key),
        train_y=torch.from_numpy(found.y_train),
        test_x=ImageFiles(found.test, config.image_size, config.workers, key),
        test_y=torch.from_numpy(found.y_test),
        classes=found.classes,
        mean=IMAGENET.mean,
        std=IMAGENET.std,
        digest=found.digest,
        source=str(root),
        crop_pct=CROP_PCT,
    )


def _imagenet32(config: DatasetConfig) -> ImageData:
    check_data(config)
    key, root = f"dataset.root={config.root}", user_path(config.root, "dataset.root")
    train, test = (imagenet32.find(root, names, key) for names in (imagenet32.TRAIN, imagenet32.TEST))
    read = {"train": lambda: imagenet32.blocks(train, key), "test": lambda: imagenet32.blocks(test, key)}
    names = tuple(map(str, range(imagenet32.CLASSES)))
    return _mapped(config, kept(root, [*train, *test], lambda: Source(read, names), key))


def _torchvision(config: DatasetConfig, row: Torchvision) -> ImageData:
    from torchvision import datasets  # late: its import takes a second, and the sample does not need it

    check_data(config)
    name, place, root = row.class_name, row.below(config.root), str(user_path(config.root, "dataset.root"))
    try:
        train, test = (getattr(datasets, name)(root, train=part, download=config.download) for part in (True, False))
    # torchvision's own RuntimeError, failed downloads (OSError), and anything that reading a truncated file raises
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError, LookupError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if config.download:
            raise UserError(
                f"dataset.download=true: {name} could not be fetched into {place} ({reason}); "
                "check the network, or put the unpacked files there"
            ) from error
        raise UserError(
            f"dataset.root={config.root}: the {name} files in {place} are incomplete or damaged; "
            "delete that folder and set dataset.download=true, or copy it again"
        ) from error
    arrays = {"x_train": train.data, "y_train": train.targets, "x_test": test.data, "y_test": test.targets}
    where = f"dataset.root={config.root}: {name} in {place}"
    checked = check({key: np.asarray(values) for key, values in arrays.items()}, where, tuple(train.classes))
    return image_data(config.name, checked, row.statistics, str(place))


def _tiny_imagenet(config: DatasetConfig) -> ImageData:
    check_data(config)
    key, root = f"dataset.root={config.root}", user_path(config.root, "dataset.root")
    train, test, classes, told = tiny_imagenet.scan(root, key)
    read = {"train": lambda: tiny_imagenet.blocks(train, key), "test": lambda: tiny_imagenet.blocks(test, key)}
    return _mapped(config, kept(root, [*told, *train.files, *test.files], lambda: Source(read, classes), key))


def _timm(config: DatasetConfig) -> ImageData:
    found = timm_readers.images(config, None if config.path is None else _names(user_path(config.path, "dataset.path")))
    return replace(_mapped(config, found), crop_pct=timm_readers.CROP_PCT)


def _mapped(config: DatasetConfig, found: Kept) -> ImageData:
    source = str(user_path(config.root, "dataset.root"))
    return image_data(config.name, found.arrays, found.statistics, source, found.digest)


def image_data(name: str, arrays: Arrays, known: Statistics, source: str, known_digest: str | None = None) -> ImageData:
    """Checked arrays as a data set with these statistics."""
    return ImageData(
        name=name,
        train_x=torch.from_numpy(arrays.x_train),
        train_y=torch.from_numpy(arrays.y_train),
        test_x=torch.from_numpy(arrays.x_test),
        test_y=torch.from_numpy(arrays.y_test),
        classes=arrays.classes,
        mean=known.mean,
        std=known.std,
        digest=known_digest or digest(arrays),
        source=source,
    )


OWN = {
    "cifar100_sample": _sample,
    "npz": _npz,
    "image_folder": _image_folder,
    "imagenet100": _imagenet100,
    "imagenet32": _imagenet32,
    "tiny_imagenet": _tiny_imagenet,
    "timm": _timm,
}
"""Readers of the data sets that torchvision does not have."""
