"""Networks of a run: built from the configuration, filled from checkpoints, saved with what identifies them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import weights, zoo
from models.features import FeatureNet
from pipeline.config import Config, TeacherConfig
from pipeline.data.batches import EvalBatches
from pipeline.data.image_files import Images
from pipeline.data.sources import ImageData
from pipeline.errors import UserError
from pipeline.training.devices import device_of as device_of
from pipeline.training.rng import Streams

PREPARED_ALIKE = 1e-3
"""Allowed difference of a recorded mean or deviation from the data's: a rounded one still counts as the same."""


@contextmanager
def user_error(key: str) -> Iterator[None]:
    """Turn a ValueError of the models into a one-line UserError that names the key."""
    try:
        yield
    except ValueError as error:
        given = key.partition("=")[2]  # a file that the error may begin with, too
        raise UserError(f"{key}: {str(error).removeprefix(f'{given}: ')}") from error


def check_names(config: Config) -> None:
    """Refuse unknown network names before anything is built. Raises UserError."""
    named = {"model.student.name": config.model.student.name}
    named |= {f"model.teachers.{k}.name": t.name for k, t in enumerate(config.model.teachers)}
    for key, name in named.items():
        with user_error(f"{key}={name}"):
            zoo.resolve(name)


def build(
    config: Config,
    data: ImageData,
    name: str,
    pretrained: bool,
    key: str,
    seed: int,
    drop_rate: float = 0.0,
    adapter_dim: int | None = None,
) -> FeatureNet:
    """A network for this data on its device; fresh weights depend on `seed` and the name only. Errors name `key`."""
    small = config.dataset.small_input
    with user_error(f"{key}={name}"), Streams(seed).initialising(name):
        net = zoo.create_model(
            name,
            data.num_classes,
            pretrained=pretrained,
            small_input=None if small == "auto" else small,
            image_size=data.image_size,
            in_chans=data.in_chans,
            drop_rate=drop_rate,
            adapter_dim=adapter_dim,
        )
    return placed(net, config)


def placed(net: FeatureNet, config: Config) -> FeatureNet:
    """A network on its configuration's device, in its memory format."""
    return net.to(device_of(config)).to(memory_format=_memory_format(config))


def blank(config: Config, data: ImageData) -> Tensor:
    """A black image (1, C, H, W), on the device and in the format of `placed`."""
    image = torch.zeros(1, data.in_chans, data.image_size, data.image_size, device=device_of(config))
    return image.contiguous(memory_format=_memory_format(config))


def _memory_format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.optim.use_channels_last else torch.contiguous_format


def eval_batches(
    config: Config, images: Images, labels: Tensor, indices: Tensor | None, mean: Sequence[float], std: Sequence[float]
) -> EvalBatches:
    """Batches of images prepared with this mean and deviation, on the configuration's device."""
    size, channels_last = config.dataset.eval_batch_size, config.optim.use_channels_last
    return EvalBatches(images, labels, indices, size, mean, std, device_of(config), channels_last)


def build_student(config: Config, data: ImageData) -> FeatureNet:
    """The student, fresh or pretrained; with an adapter where its method uses one."""
    s, width = config.model.student, config.method.adapter_dim
    return build(config, data, s.name, s.pretrained, "model.student.name", config.seed, adapter_dim=width)


def build_teacher(config: Config, data: ImageData, index: int) -> FeatureNet:
    """A teacher as fine-tuning starts from it; EfficientNets get their dropout."""
    t: TeacherConfig = config.model.teachers[index]
    dropout = t.efficientnet_dropout if "efficientnet" in t.name else 0.0
    pretrained = t.pretrained and t.checkpoint is None
    seed = config.finetune.seed + index
    return build(config, data, t.name, pretrained, f"model.teachers.{index}.name", seed, dropout)


def load(net: FeatureNet, path: Path, key: str, data: ImageData) -> dict[str, Any]:
    """Fill a network from a checkpoint file; return the file's metadata.

    Classes that the file records must be the data's, in its order; a recorded mean and deviation must equal those
    that the data is prepared with. Raises UserError, which names `key`.
    """
    with user_error(key):
        check_prepared(weights.read_metadata(path), data)
        return weights.load_weights(net, path, classes=data.classes)


def preparation(net: FeatureNet, data: ImageData) -> str:
    """What to say of weights without a record: how their images are prepared here, and whether the stem is timm's."""
    mean, std = (f"[{', '.join(f'{value:.4g}' for value in values)}]" for values in (data.mean, data.std))
    said = f"the file does not say how its images were prepared; here with mean {mean} and deviation {std}"
    if data.crop_pct is not None:
        said += f", {100 * data.crop_pct:g} % of a picture's shorter side"
    if net.small_input and not net.architecture.startswith("cifar_"):
        said += "; its stem is that for small images (dataset.small_input=false keeps timm's)"
    return said


def check_prepared(record: Mapping[str, Any], data: ImageData) -> None:
    """Raise ValueError for a recorded mean or deviation that is not the data's."""
    for name in ("mean", "std"):
        theirs, ours = record.get(name, []), getattr(data, name)
        alike = len(theirs) == len(ours) and np.allclose(theirs, ours, rtol=0, atol=PREPARED_ALIKE)
        if theirs and not alike:  # a NaN is not alike either
            told = ", ".join(f"{value:.6g}" for value in theirs)
            raise ValueError(
                f"it was trained on images prepared with {name} [{told}], and here it is "
                f"[{', '.join(f'{value:.6g}' for value in ours)}]; set dataset.{name}=[{told.replace(' ', '')}]"
            )


def recorded(path: Path, key: str, meta: Mapping[str, Any], data: ImageData) -> FeatureNet:
    """The network of a logged student: the architecture in its meta.json, filled from its weights; on the CPU.

    `data`: what it classifies; mean and deviation are the record's. Raises UserError, which names `key`.
    """
    with user_error(key):
        record = weights.read_metadata(path)
        net = zoo.create_model(
            str(meta["architecture"]),
            data.num_classes,
            small_input=record.get("small_input"),
            image_size=data.image_size,
            in_chans=data.in_chans,
        )
    load(net, path, key, prepared_as(data, meta))
    return net


def saw_validation(record: Mapping[str, Any], config: Config, data: ImageData) -> bool:
    """Whether a network may have been trained on this run's validation images: its record names another split."""
    d = config.dataset
    ours = {"data_digest": data.digest, "val_fraction": d.val_fraction, "split_seed": d.split_seed}
    return any(record.get(key) != value for key, value in ours.items())


def prepared_as(data: ImageData, record: Mapping[str, Any]) -> ImageData:
    """The data, prepared with the mean and deviation that a network's record names."""
    mean, std = (tuple(record.get(name) or getattr(data, name)) for name in ("mean", "std"))
    return replace(data, mean=mean, std=std)


def save(net: FeatureNet, path: Path, config: Config, data: ImageData) -> None:
    """Write a network with what identifies and prepares its inputs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.save_weights(
        net,
        path,
        {
            "classes": list(data.classes),
            "mean": list(data.mean),
            "std": list(data.std),
            "image_size": data.image_size,
            "in_chans": data.in_chans,
            "data_digest": data.digest,
            "val_fraction": config.dataset.val_fraction,
            "split_seed": config.dataset.split_seed,
        },
    )
