"""Data sets, a row each (pipeline/data/sources.py reads them), and the keys of `dataset` and `augment`
(docs/method.md section 3).
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.config.base import Section, key
from pipeline.config.numbers import BatchSize, BelowOne, Deviation, Fraction, Pixels, Processes, Seed
from pipeline.paths import user_path


class Statistics(NamedTuple):
    """Per-channel mean and standard deviation of training images scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Torchvision(NamedTuple):
    """A data set of torchvision's: its class there, its folder below dataset.root, its statistics."""

    class_name: str
    folder: str
    statistics: Statistics

    def below(self, root: str) -> Path:
        return (user_path(root, "dataset.root") / self.folder).resolve()


class Folder(NamedTuple):
    """A data set in a layout of its own below dataset.root."""

    layout: str
    """In words."""
    holds: tuple[tuple[str, ...], ...]
    """Patterns of what has to be there; of each group one suffices."""

    def missing(self, root: str) -> str | None:
        """The first group of which nothing is there, in words."""
        folder = user_path(root, "dataset.root")
        gone = (names for names in self.holds if not any(any(folder.glob(name)) for name in names))
        return next((" or ".join(name for name in names if not name.startswith("*/")) for names in gone), None)


CIFAR100 = Statistics((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))
CIFAR100_PUBLISHED = Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
CIFAR10 = Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

SPLITS = (("train/",), ("val/", "test/"))
DATASETS: dict[str, Torchvision | Folder | None] = {
    "cifar100_sample": None,
    "cifar100": Torchvision("CIFAR100", "cifar-100-python", CIFAR100),
    "cifar10": Torchvision("CIFAR10", "cifar-10-batches-py", CIFAR10),
    "fashion_mnist": Torchvision("FashionMNIST", "FashionMNIST/raw", Statistics((0.2860,), (0.3530,))),
    "npz": None,
    "image_folder": Folder("train/<class>/ and test/<class>/ (or val/<class>/) with pictures", SPLITS),
    "imagenet100": Folder("ImageNet's train/<class>/ and val/<class>/ with pictures", SPLITS),
    "imagenet32": Folder(
        "train_data_batch_1 to 10 and val_data, as pickles or .npz, there or in a folder within",
        tuple((f"{name}*", f"*/{name}*") for name in ("train_data_batch_", "val_data")),
    ),
    "tiny_imagenet": Folder(
        "train/<wnid>/images/, val/images/, val/val_annotations.txt, wnids.txt and words.txt, as distributed",
        tuple((name,) for name in ("train/", "val/images/", "val/val_annotations.txt", "wnids.txt", "words.txt")),
    ),
    "timm": None,
}
"""All but torchvision's have a function of their own in pipeline/data/sources.py."""
PICTURES = ("image_folder", "imagenet100")
"""Data sets whose images stay files, which workers decode."""
TIMM = {"folder": None, "torch": None, "wds": "webdataset", "hfds": "datasets"}
"""What dataset.id of dataset.name=timm begins with, and the package that this needs beside timm."""
PUBLISHED = {"cifar100": CIFAR100_PUBLISHED, "cifar100_sample": CIFAR100_PUBLISHED}
"""The constants of the published KD tables' code (RepDistiller, mdistiller), which differ in the fourth digit."""


def _pictures(section: Any, prefix: str) -> str | None:
    return None if section.name in PICTURES else f"{prefix}name is not {' or '.join(PICTURES)}"


def _resized(section: Any, prefix: str) -> str | None:
    return None if section.name in (*PICTURES, "timm") else f"{prefix}name is not {', '.join(PICTURES)} or timm"


class DatasetConfig(Section):
    """The data set and its split into training and validation images."""

    name: Literal[*DATASETS] = key("cifar100_sample", "data set; cifar100_sample is bundled")  # type: ignore[valid-type]
    root: str = key("data", "folder in torchvision's layout, or in that of the data set (docs/data.md)")
    path: str | None = key(
        None,
        "file of dataset.name=npz (x_train, y_train, x_test, y_test; uint8 NHWC); of imagenet100 and timm: names of "
        "classes, one a line",
    )
    id: str | None = key(
        None,
        "what timm's create_dataset reads: folder/<name>, torch/<name>, wds/<name> or hfds/<name>",
        when="name=timm",
    )
    train_split: str = key(
        "train", "training images, as timm's reader calls them; of wds/ also shards", when="name=timm"
    )
    test_split: str = key("validation", "test images, likewise", when="name=timm")
    class_list: Literal["cmc", "podnet", "ucir"] | None = key(
        None, "which of the published lists of 100 of ImageNet's classes; null: dataset.path", when="name=imagenet100"
    )
    download: bool = key(False, "fetch a missing data set with torchvision")
    image_size: Pixels = key(224, "side in pixels to which pictures are resized", when=_resized)
    workers: Processes | None = key(
        None,
        "processes that decode pictures in folders; null: one per thread, at most 8; 0: none",
        when=_pictures,
    )
    normalisation: Literal["exact", "published"] = key(
        "exact",
        "mean and deviation of images; exact: the data set's own (ImageNet's for pictures in folders), "
        "published: of the published KD tables' code",
    )
    mean: tuple[Fraction, ...] | None = key(
        None, "mean of each channel, subtracted from images scaled to 0 … 1; null: by normalisation"
    )
    std: tuple[Deviation, ...] | None = key(
        None, "standard deviation of each channel, by which images are divided; null: by normalisation"
    )
    batch_size: BatchSize = key(128, "images per update, over all processes")
    eval_batch_size: BatchSize = key(500, "images per forward pass in evaluation")
    val_fraction: BelowOne = key(
        0.1, "share of the training images held out for validation; 0 for the published KD protocol"
    )
    split_seed: Seed = key(0, "seed of the validation split; with the data's digest, it fixes the images held out")
    small_input: Literal["auto"] | bool = key("auto", "adapt network stems to small images; auto: up to 64 pixels")


class AugmentConfig(Section):
    """Augmentation of the training images."""

    crop_flip: bool = key(True, "pad by 4, crop at random, flip horizontally at random")
    pad_mode: Literal["zero", "reflect"] = key("zero", "what fills the padding", when="crop_flip")
    randaugment: bool = key(False, "apply RandAugment")
