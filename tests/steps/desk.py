"""Students whose accuracies are known exactly, registered as training registers them, and promoted in this process.

They are one network that knows its task by heart, and copies of it that mistake classes for each other.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from models import weights, zoo
from pipeline.data.batches import EvalBatches
from pipeline.data.sources import ImageData
from pipeline.distill import export
from pipeline.evaluate import speed
from pipeline.training.evaluation import outputs
from tests import mlmodel
from tests.pipeline.promote.local import LocalDelivery, registered
from tests.steps.lab import CLASSES, Done, Lab, all_runs, client

NAME = "stripes"
SWAPPED = {"good": (0, 1, 2, 3), "half": (1, 0, 2, 3), "bad": (1, 0, 3, 2)}
"""Which row of the classifier each class gets: the accuracies are 100, 50 and 0 %."""
LAX = ("gate.max_latency_ratio=50", "gate.max_ece_increase=1")
"""Timings of a shared machine are no part of these tests."""
Students = dict[str, dict[str, bytes]]
"""Files of the logged models, by name."""


def make_students(data: ImageData, folder: Path) -> Students:
    """Teach the network its task, and swap its classes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = zoo.create_model("cifar_resnet8", len(CLASSES), image_size=data.image_size)
    batches = EvalBatches(data.train_x, data.train_y, None, 32, data.mean, data.std, "cpu")
    test = EvalBatches(data.test_x, data.test_y, None, 500, data.mean, data.std, "cpu")
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(30):
        net.train()
        for x, y in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x).logits, y).backward()
            optimizer.step()
        if bool((outputs(net, test).logits.argmax(dim=1) == test.labels).all()):
            break
    else:
        raise AssertionError("the students' network has not learned its task")
    meta = {"classes": list(data.classes), "image_size": data.image_size, "in_chans": 3, "mean": list(data.mean),
            "std": list(data.std), "architecture": "cifar_resnet8", "data_digest": data.digest}  # fmt: skip
    backbone: Any = net.net
    head = backbone.get_classifier()
    right = [p.detach().clone() for p in (head.weight, head.bias)]
    files = {}
    for name, rows in SWAPPED.items():
        with torch.no_grad():
            head.weight.copy_(right[0][list(rows)])
            head.bias.copy_(right[1][list(rows)])
        weights.save_weights(net, folder / f"{name}.safetensors", {})
        files[name] = {
            **{file: text.encode() for file, text in mlmodel.files().items()},
            "artifacts/student.safetensors": (folder / f"{name}.safetensors").read_bytes(),
            "artifacts/student.onnx": to_onnx(export.plain(net), data, folder / f"{name}.onnx"),
            "artifacts/meta.json": json.dumps(meta).encode(),
        }
    return files


def to_onnx(net: Any, data: ImageData, path: Path) -> bytes:
    """As `export.to_onnx`, by PyTorch's older exporter, which takes a fifth of a second instead of several."""
    images = torch.zeros((2, data.in_chans, data.image_size, data.image_size), dtype=torch.uint8).permute(0, 2, 3, 1)
    names = ["images", *export.OUTPUTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            export.Served(net, data.mean, data.std).eval(),  # else the network is left in training mode
            (images,),
            str(path),
            dynamo=False,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes={name: {0: "n"} for name in names},
        )
    return path.read_bytes()


@dataclass
class Desk:
    """A workplace with a registry; `step` promotes in this process, `client` is what its requests go through."""

    lab: Lab
    uri: str
    students: Students
    digest: str
    registry: Any = None
    runs: list[str] = field(default_factory=list)

    def register(self, *names: str, **tags: str) -> None:
        for name in names:
            folder = self.lab.folder / f"{len(self.runs)} {name}"
            given = {"asib.data_digest": self.digest, **{f"asib.{k}": v for k, v in tags.items()}}
            self.runs.append(registered(folder, self.uri, NAME, self.students[name], given))

    def promote(self, *own: str) -> Done:
        return self.lab.step("promote", f"name={NAME}", "tracking.mode=online", f"tracking.uri={self.uri}", *own)

    @property
    def aliases(self) -> dict[str, str]:
        return {a: str(v) for a, v in client(self.uri).get_registered_model(NAME).aliases.items()}

    def tags(self, number: int) -> dict[str, str]:
        return dict(client(self.uri).get_model_version(NAME, str(number)).tags)


def make_desk(lab: Lab, uri: str, data: ImageData, students: Students, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk whose steps have their delivery in this process; `lab` gets the data."""
    lab.data.write_bytes(Path(data.source).read_bytes())
    made = Desk(lab, uri, students, data.digest)

    def start(folder: Path, *, uri: str | None = None, **more: Any) -> LocalDelivery:
        return LocalDelivery(folder, str(uri), made.registry)

    monkeypatch.setattr("pipeline.tracking.start.start_delivery", start)
    monkeypatch.setattr(speed, "BATCHES", (1,))
    monkeypatch.setattr(speed, "BUDGET_S", {1: 0.05})
    return made


def runs_of(desk: Desk) -> set[str]:
    """Ids of all runs in the store."""
    return {*all_runs(desk.uri)}
