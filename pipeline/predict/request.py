"""The request of `-e predict`: the step's own keys, checked before the model is fetched."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.compose import cli
from pipeline.compose.groups import STUDENTS
from pipeline.config import Config
from pipeline.config.places import is_uri
from pipeline.errors import UserError
from pipeline.paths import user_path
from pipeline.served.picture_files import SUFFIXES, find

OWN = {
    "model": STUDENTS,
    "images": "a folder with picture files, at any depth",
    "to": "the table to write, .csv or .parquet; predictions.csv in the run's folder by default",
}
TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class Request:
    """The step's own keys.

    Attributes:
        files: pictures below `images`, sorted.
        to: where the table goes; None: it stays in the run's folder.
        ignored: other files below `images`, sorted.
    """

    model: str
    images: Path
    files: tuple[Path, ...]
    to: Path | None
    ignored: tuple[str, ...] = ()

    def words(self) -> str:
        """What DRY_RUN=1 shows."""
        return f"classify {len(self.files)} pictures in {self.images} with {self.model}"


def read(config: Config, command: cli.Command) -> tuple[Config, Request]:
    """Read the step's own keys; the configuration gets the run's name.

    Raises UserError: a key is missing, or names what cannot be used.
    """
    model, images, to = (command.own.get(key, "") for key in OWN)
    if not model:
        raise UserError("model is not set: give model=models:/<name>@<alias>, runs:/<id>, or a logged model's folder")
    if not images:
        raise UserError("images is not set: give images=<folder> with picture files")
    folder = user_path(images, "images")
    if not folder.is_dir():
        raise UserError(f"images={images}: no such folder; give a folder with picture files")
    try:
        found, ignored = find(folder)
    except OSError as error:
        raise UserError(f"images={images}: {error.filename}: {error.strerror}; give another folder") from error
    if not found:
        raise UserError(f"images={images}: no {', '.join(SUFFIXES)} file in it, at any depth; give another folder")
    if not is_uri(model):
        model_folder(model)
    request = Request(model, folder, tuple(sorted(map(Path, found))), _target(to) if to else None, tuple(ignored))
    return config, request


def model_folder(given: str) -> Path:
    """The folder of a logged model that `model=` names. Raises UserError if it does not exist."""
    folder = user_path(given, "model")
    if not folder.is_dir():
        raise UserError(f"model={given}: no such folder; give {STUDENTS}")
    return folder


def _target(to: str) -> Path:
    path = user_path(to, "to")
    if path.suffix.lower() not in TABLES or path.is_dir():
        raise UserError(f"to={to}: give a file that ends with {' or '.join(TABLES)}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"to={to}: cannot write in {path.parent}; give a file in an existing folder")
    return path
