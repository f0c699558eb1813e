"""The files and folders that a configuration names: checked before torch is imported."""

import os
import re
from pathlib import Path

from pipeline import extras, urls
from pipeline.config.datasets import DATASETS, DatasetConfig, Folder, Torchvision
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.paths import user_path

DISTILLING = ("main", "distill", "ablate", "overlap", "continual", "sweep")
"""Steps that need their teachers."""


def check_there(config: Config, step: str) -> None:
    """Raise UserError for the first file or folder on this machine that a step will need and that is missing."""
    checkpoints = {f"model.teachers.{i}.checkpoint": t.checkpoint for i, t in enumerate(config.model.teachers)}
    given = {
        "output_dir": config.output_dir,
        "bank_folder": config.bank_folder,
        "resume": config.resume,
        "student": config.student,
        "dataset.root": config.dataset.root,
        "dataset.path": config.dataset.path,
        **checkpoints,
    }
    for key, text in given.items():
        if text is not None and not is_uri(text):
            user_path(text, key)
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if config.tracking.mode == "online" and config.tracking.uri:
        urls.tracking(config.tracking.uri)  # whether it answers is seen later
    elif config.tracking.mode == "online" and server:
        urls.tracking(server, "MLFLOW_TRACKING_URI")
    if config.tracking.system_metrics:
        extras.require("tracking.system_metrics=true", "psutil", "pynvml")
    if output_dir(config).is_file():
        raise UserError(f"output_dir={config.output_dir}: cannot write there (it is a file); choose another folder")
    check_data(config.dataset)
    for key, text in checkpoints.items() if step in DISTILLING and config.method.taught else ():
        if text is not None and not text.startswith("runs:/"):
            check_file(text, f"{key}={text}")


def output_dir(config: Config) -> Path:
    """Return the folder of run folders. Raises UserError if it cannot be one."""
    return user_path(config.output_dir, "output_dir")


def is_uri(text: str) -> bool:
    """Whether a text names something on a tracking server, such as runs:/<id>, rather than a file."""
    return re.match(r"[a-z]+:/", text) is not None


def check_data(dataset: DatasetConfig) -> None:
    """Raise UserError if the data set is missing and `dataset.download` will not fetch it."""
    place = DATASETS[dataset.name]
    if isinstance(place, Folder) and (missing := place.missing(dataset.root)):
        raise UserError(
            f"dataset.root={dataset.root}: {missing} is not there (looked in "
            f"{user_path(dataset.root, 'dataset.root').resolve()}); dataset.name={dataset.name} needs {place.layout}"
        )
    if isinstance(place, Torchvision) and not dataset.download and not place.below(dataset.root).is_dir():
        raise UserError(
            f"dataset.root={dataset.root}: {place.class_name} is not there (looked in {place.below(dataset.root)}); "
            "name the folder that holds it, or set dataset.download=true"
        )


def check_file(given: str, key: str) -> Path:
    """Return the path of a weights file on this machine. Raises UserError, naming `key`, if it is missing."""
    path = user_path(given, key)
    if not path.is_file():
        raise UserError(f"{key}: no such file; give a weights file or runs:/<id>")
    return path
