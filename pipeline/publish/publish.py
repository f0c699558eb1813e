"""The job of `-e publish`: one folder with a student's card, weights, timm's configuration and ONNX file.

Of the run only weights and descriptions are read, and all files are written anew from them: neither its ONNX file nor
its config.json reaches others.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.features import FeatureNet
from models.weights import weights_hash
from pipeline.data.sources import ImageData
from pipeline.distill import export, networks
from pipeline.distill.train import prepare
from pipeline.errors import UserError
from pipeline.files import explained
from pipeline.predict.predict import fetched
from pipeline.publish import hub
from pipeline.publish.card import Subject, card
from pipeline.publish.request import FILES, TRITON, Request
from pipeline.runs import records
from pipeline.served import bundle

if TYPE_CHECKING:
    from pipeline.runs.run import Run

logger = logging.getLogger("asib")
WEIGHTS = "asib.weights"
LARGEST = 4096
"""Pixels per side of the images that a published student may take."""
BATCH = 256
"""Images that Triton may classify together."""


@dataclass(frozen=True)
class Origin:
    """A student's record: that of its run, with the tags of its registered version over the run's."""

    record: records.Record
    tags: Mapping[str, str]


def publish(run: "Run", request: Request) -> None:
    """Write the folder, copy it to `to`, and upload it if `push` is given.

    Raises UserError: no such student, one that its run did not make, or a hub that does not take it.
    """
    prepare(run.config)
    where = f"model={request.model}"
    local = Path(request.model).expanduser() / "model"
    there = request.model if "models:/" in request.model or "runs:/" in request.model else str(local)
    student = bundle.read(fetched(there, run.fetch, run.folder / "fetched"), where)
    meta = bundle.describe(student, where)
    origin = _origin(run, request, student)
    data = blank(meta, where, origin.tags.get("asib.data_digest", ""))
    net = networks.recorded(student.weights, where, meta, data)
    _check_weights(net, origin.tags, where)
    run.ready()
    if student.run_id:
        run.journal.model_input(student.run_id)
    folder = run.folder / "published"
    folder.mkdir()
    _write(folder, net, data)
    if request.triton:
        _to_triton(folder, request.triton, data)
    subject = Subject(
        request.model, student.version, net.architecture, net.small_input, data, origin.record, origin.tags
    )
    (folder / "README.md").write_text(card(subject, request), encoding="utf-8")
    for name in ("README.md", "config.json"):
        run.journal.artifact(folder / name, "published")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    stated = {"asib.student": origin.record.id, "asib.model": student.version, "asib.published": json.dumps(sums)}
    run.journal.tags({name: value for name, value in stated.items() if value})
    target = _copied(folder, request)
    print(f"published: {target}", flush=True)
    if request.push:
        address = hub.push(target, request.push, request.public)
        run.journal.tags({"asib.pushed": address})
        print(f"uploaded: {address}", flush=True)


def _origin(run: "Run", request: Request, student: bundle.Student) -> Origin:
    """The record of the run that made the student, and its tags. Raises UserError: it cannot be read."""
    if run.delivery is None or not request.model.startswith(("runs:/", "models:/")):
        record = records.from_folder(Path(request.model).expanduser())
        return Origin(record, record.tags)
    asked = request.model.removeprefix("runs:").strip("/") if request.model.startswith("runs:/") else student.run_id
    if not asked:
        raise UserError(f"model={request.model}: it does not say which run made it; give runs:/<id>")
    (folder,) = run.delivery.read_runs([asked], run.folder / "fetched" / "run", ())
    record = records.from_server(folder)
    if not student.version:
        return Origin(record, record.tags)
    name, _, number = student.version.removeprefix("models:/").rpartition("/")
    version = run.delivery.ask("version", name=name, number=number)
    return Origin(record, {**record.tags, **version["tags"]})


def blank(meta: Mapping[str, Any], where: str, digest: str) -> ImageData:
    """What a student classifies, as its meta.json describes it, with noise in the place of images.

    Raises UserError: sizes that no student of this project has.
    """
    size, crop = meta["image_size"], meta.get("crop_pct")
    channels: Any = meta.get("in_chans")
    classes, mean, std = (tuple(meta[name]) for name in ("classes", "mean", "std"))
    good = (
        isinstance(size, int)
        and 1 <= size <= LARGEST
        and channels in (1, 3)
        and len(mean) == len(std) == channels
        and len(classes) >= 2
        and (crop is None or (isinstance(crop, int | float) and 0 < crop <= 1))
    )
    if not good:
        raise UserError(f"{where}: its meta.json is not that of a student of this project")
    shape = (export.CHECKED, channels, size, size)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(len(noise), dtype=torch.int64)
    return ImageData("", noise, labels, noise, labels, classes, mean, std, digest, "", crop)


def _check_weights(net: FeatureNet, tags: Mapping[str, str], where: str) -> None:
    noted, found = tags.get(WEIGHTS), weights_hash(net.net)
    if noted not in (None, found):
        raise UserError(
            f"{where}: its weights ({found[:12]}) are not those in the tag {WEIGHTS} of the run that made it "
            f"({noted[:12]}): log the student again"
        )


def _write(folder: Path, net: FeatureNet, data: ImageData) -> None:
    """model.safetensors, config.json and model.onnx, which is compared with the weights."""
    plain = export.plain(net)
    export.to_timm(plain, net, data, folder)
    export.to_onnx(plain, data, folder / "model.onnx")
    export.check_onnx(folder / "model.onnx", plain, data)


def _to_triton(folder: Path, name: str, data: ImageData) -> None:
    """The ONNX file in a model repository of Triton Inference Server, which may batch requests and name classes."""
    to = folder / TRITON / name
    (to / "1").mkdir(parents=True)
    shutil.copyfile(folder / "model.onnx", to / "1" / "model.onnx")
    (to / "labels.txt").write_text("".join(f"{' '.join(label.split())}\n" for label in data.classes))
    size, n = data.image_size, data.num_classes
    (to / "config.pbtxt").write_text(f"""name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: {BATCH}
dynamic_batching {{}}
input [
  {{ name: "images" data_type: TYPE_UINT8 dims: [ {size}, {size}, {data.in_chans} ] }}
]
output [
  {{ name: "probabilities" data_type: TYPE_FP32 dims: [ {n} ] label_filename: "labels.txt" }},
  {{ name: "logits" data_type: TYPE_FP32 dims: [ {n} ] }}
]
""")


def _copied(folder: Path, request: Request) -> Path:
    if request.to is None:
        return folder
    with explained(request.to, "to"):
        request.to.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copyfile(folder / name, request.to / name)
        if request.triton:
            of = request.to / TRITON / request.triton
            shutil.rmtree(of, ignore_errors=True)
            shutil.copytree(folder / TRITON / request.triton, of)
    return request.to
