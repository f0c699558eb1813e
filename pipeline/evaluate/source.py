"""Where what is evaluated comes from: a run, a registered model or a file, as weights on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import weights
from pipeline.config.places import is_uri
from pipeline.data.sources import ImageData
from pipeline.distill import networks
from pipeline.errors import UserError
from pipeline.evaluate.request import FORMS
from pipeline.paths import user_path
from pipeline.runs.folders import STUDENT, header_of
from pipeline.runs.run import Run
from pipeline.served import bundle

PREFERRED = ("student.safetensors", "teacher.safetensors")
"""Weights in a folder that holds several: a logged model's, a run's."""
PARTS = ("mbm.pth", "synergy_head.pth", "fusion.safetensors")
"""Files that hold a fusion, which is not a model by itself."""


@dataclass(frozen=True)
class Source:
    """Weights on this machine.

    Attributes:
        path: a file of safetensors or torch.save, under any name.
        made_by: the run that made them, by its MLflow or its journal's id; None if unknown.
        folder: that run's folder, if it is on this machine.
        version: `models:/<name>/<version>`, or `models:/<id>`, for a registered or logged model.
    """

    path: Path
    made_by: str | None = None
    folder: Path | None = None
    version: str | None = None


def find(run: Run, given: str, key: str) -> Source:
    """What `model=` names (`FORMS`), fetched if it is not on this machine.

    Raises UserError, which names `key`: it does not exist, or is not a model.
    """
    if given.startswith("models:/"):
        return _registered(run, given, key)
    if given.startswith("runs:/"):
        return _of_run(run, given, key)
    if is_uri(given):
        raise UserError(f"{key}: give {FORMS}")
    return local(user_path(given, key), key)


def local(path: Path, key: str) -> Source:
    """Weights in a file, a run's folder or a logged model's. Raises UserError."""
    if path.is_dir():
        own = path / STUDENT
        found = own if own.is_file() else weights_in(path, key)
        return Source(found, *_made_by(found))
    if not path.is_file():
        raise UserError(f"{key}: no such file; give {FORMS}")
    if path.name in PARTS:
        raise UserError(f"{key} is a fusion, not a model: give mode=synergy model=<the student> fusion={path.parent}")
    return Source(path, *_made_by(path))


def check_fits(source: Source, data: ImageData, key: str) -> dict[str, Any]:
    """The record that travels with the weights (empty for files of other code bases), if it belongs to this data.

    Raises UserError: a model of another number of classes, image size or channels.
    """
    with networks.user_error(key):
        record = weights.read_metadata(source.path)
    said = {"num_classes": "num_classes", "image_size": "image size", "in_chans": "number of channels"}
    for name, words in said.items():
        here = getattr(data, name)
        if record.get(name, here) != here:
            raise UserError(
                f"{key}: {words} is {record[name]} in the checkpoint, {here} here (dataset.name={data.name}); "
                "choose the data set that it was trained on"
            )
    return record


def weights_in(folder: Path, key: str) -> Path:
    """The weights in a folder, or in one below it. Raises UserError: it holds none, or no clear choice."""
    found = sorted(p for p in folder.rglob("*.safetensors") if p.name not in PARTS)
    for name in PREFERRED:
        chosen = [p for p in found if p.name == name]
        if len(chosen) == 1:
            return chosen[0]
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:3]) or "no .safetensors file"
        raise UserError(f"{key}: {names} in that folder; give {FORMS}")
    return found[0]


def fetch(run: Run, uri: str, key: str) -> Path:
    """A file or folder of the tracking server. Raises UserError, which names `key`."""
    to = run.folder / "fetched" / re.sub(r"[^\w.@-]+", "_", uri)
    try:
        found = run.fetch(uri, to)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(key) else f"{key}: {text.removeprefix(uri).lstrip(': ')}") from error
    return to if run.follower and not found.exists() else found  # not the process that fetched


def _of_run(run: Run, given: str, key: str) -> Source:
    run_id, _, path = given.removeprefix("runs:/").strip("/").partition("/")
    if not run_id:
        raise UserError(f"{key}: give runs:/<id>")
    found = fetch(run, f"runs:/{run_id}/{path or STUDENT}", key)
    return Source(weights_in(found, key) if found.is_dir() else found, run_id)


def _registered(run: Run, given: str, key: str) -> Source:
    if re.fullmatch(r"models:/[^/@]+(@[^/@]+|/[^/@]+)?", given) is None:
        raise UserError(f"{key}: give models:/<name>@<alias> or models:/<name>/<version>")
    folder = fetch(run, given, key)
    if (folder / "MLmodel").exists():
        student = bundle.read(folder, key)
        version, found, made_by = student.version, student.weights, student.run_id or None
    else:
        version, _ = bundle.check(folder, key)
        found, made_by = weights_in(folder, key), None
    if not found.is_file():
        raise UserError(f"{key}: no {found.name} in that model; give {FORMS}")
    return Source(found, made_by, None, version or given)


def _made_by(path: Path) -> tuple[str | None, Path | None]:
    """The run in whose folder a file lies: its journal's id, and the folder."""
    for folder in list(path.absolute().parents)[:2]:
        header = header_of(folder)
        if header is not None:
            return header.data["journal"], folder
    return None, None
