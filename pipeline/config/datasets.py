"""The data sets that `dataset.name` knows, a row each; pipeline/data/sources.py reads them."""

from pathlib import Path
from typing import NamedTuple

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


CIFAR100 = Statistics((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))
CIFAR10 = Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

DATASETS: dict[str, Torchvision | None] = {
    "cifar100_sample": None,
    "cifar100": Torchvision("CIFAR100", "cifar-100-python", CIFAR100),
    "cifar10": Torchvision("CIFAR10", "cifar-10-batches-py", CIFAR10),
    "fashion_mnist": Torchvision("FashionMNIST", "FashionMNIST/raw", Statistics((0.2860,), (0.3530,))),
    "npz": None,
    "image_folder": None,
}
"""None: pipeline/data/sources.py has a function of its own for it."""
