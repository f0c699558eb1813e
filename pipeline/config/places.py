"""The files and folders that a configuration names: checked before torch is imported."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline import urls
from pipeline.config.dataset import DatasetConfig
from pipeline.config.datasets import DATASETS
from pipeline.config.schema import Config
from pipeline.config.training import TrackingConfig
from pipeline.errors import UserError
from pipeline.paths import user_path

DISTILLING = ("main", "distill", "ablate", "sweep")
"""Steps that need their teachers."""


def check_there(config: Config, step: str) -> None:
    """Raise UserError for the first file or folder on this machine that a step will need and that is not there."""
    for key, text in _named(config):
        user_path(text, key)
    if config.tracking.mode == "online":
        check_tracking(config.tracking)
    if output_dir(config).is_file():
        raise UserError(f"output_dir={config.output_dir}: cannot write there (it is a file); choose another folder")
    check_data(config.dataset)
    needed = config.model.teachers if step in DISTILLING and config.method.distils else ()
    for index, teacher in enumerate(needed):
        given = teacher.checkpoint
        if given is not None and not given.startswith("runs:/"):
            check_file(given, f"model.teachers.{index}.checkpoint={given}")


def check_tracking(tracking: TrackingConfig) -> None:
    """Raise UserError for the address of a tracking store that cannot be one; whether it answers shows later."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if tracking.uri:
        urls.tracking(tracking.uri)
    elif given:
        urls.tracking(given, "MLFLOW_TRACKING_URI")


def output_dir(config: Config) -> Path:
    """Return the folder of run folders. Raises UserError if it cannot be one."""
    return user_path(config.output_dir, "output_dir")


def is_uri(text: str) -> bool:
    """Whether a text names something on a tracking server, such as runs:/<id>, rather than a file."""
    return re.match(r"[a-z]+:/", text) is not None


def _named(config: Config) -> Iterator[tuple[str, str]]:
    """Yield keys and values that name files or folders on this machine."""
    given = {
        "output_dir": config.output_dir,
        "bank_folder": config.bank_folder,
        "resume": config.resume,
        "student": config.student,
        "dataset.root": config.dataset.root,
        "dataset.path": config.dataset.path,
        **{f"model.teachers.{index}.checkpoint": t.checkpoint for index, t in enumerate(config.model.teachers)},
    }
    return ((key, text) for key, text in given.items() if text is not None and not is_uri(text))


def check_data(dataset: DatasetConfig) -> None:
    """Raise UserError if the data set is not there and `dataset.download` will not fetch it."""
    if dataset.name == "image_folder":
        _check_image_folder(dataset.root)
    place = DATASETS[dataset.name]
    if place is not None and not dataset.download and not place.below(dataset.root).is_dir():
        raise UserError(
            f"dataset.root={dataset.root}: {place.class_name} is not there (looked in {place.below(dataset.root)}); "
            "name the folder that holds it, or set dataset.download=true"
        )


def _check_image_folder(root: str) -> None:
    folder = user_path(root, "dataset.root")
    for names in (("train",), ("val", "test")):
        if not any((folder / name).is_dir() for name in names):
            raise UserError(
                f"dataset.root={root}: {' or '.join(f'{name}/' for name in names)} is not there (looked in "
                f"{folder.resolve()}); dataset.name=image_folder needs train/<class>/ and val/<class>/ with pictures"
            )


def check_file(given: str, key: str) -> Path:
    """Return the path of a weights file on this machine. Raises UserError, naming `key`, if it is not there."""
    path = user_path(given, key)
    if not path.is_file():
        raise UserError(f"{key}: no such file; give a weights file or runs:/<id>")
    return path
