"""Fetch a version from the registry, evaluate it on the test images, and time it."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.features import FeatureNet
from pipeline.config import Config
from pipeline.data.batches import EvalBatches
from pipeline.data.sources import ImageData
from pipeline.distill import networks
from pipeline.errors import UserError
from pipeline.evaluate import speed
from pipeline.evaluate.measures import evaluate_model
from pipeline.promote.gate import Measured
from pipeline.promote.registered_model import DIGEST, Registry, Version
from pipeline.served import bundle
from pipeline.served.pictures import Refused
from pipeline.served.student_pyfunc import BATCH, Classifier
from pipeline.training.evaluation import outputs

logger = logging.getLogger("asib")
TOLERANCE = 1e-4
"""Largest difference allowed between a served probability and that of the weights."""
LATENCY = "speed/latency_ms_1"
ROUNDS = 2
"""Rounds of timing; the networks take turns, so that a busy machine slows all of them alike."""


@dataclass(frozen=True)
class Contender:
    """A version: the part that is served, and the network with its weights.

    Attributes:
        meta: `meta.json` of the logged model.
        manifest: that of its files, if it was registered without one; else empty.
    """

    version: Version
    served: Classifier
    net: FeatureNet
    meta: dict[str, Any]
    manifest: str


def same_images(name: str, version: Version, data: ImageData, config: Config) -> None:
    """Raise UserError for a version that was trained on data other than `data`."""
    found = version.tags.get(DIGEST)
    if found == data.digest:
        return
    if found is None:
        raise UserError(
            f"version {version.number} of {name} has no tag {DIGEST}: the images it was trained on are unknown; "
            f"set the tag to the data's digest ({data.digest[:12]}… for dataset.name={config.dataset.name})"
        )
    cfg = f"cfg=runs:/{version.run_id}/config.yaml" if version.run_id else "the cfg that it was trained with"
    # a fetched configuration never says where data lie on this machine
    place = {"cifar100_sample": "", "npz": " dataset.path=<file>"}
    where = place.get(version.tags.get("asib.dataset", ""), " dataset.root=<folder>")
    raise UserError(
        f"dataset.name={config.dataset.name} has digest {data.digest[:12]}, and version {version.number} of {name} is "
        f"of data {found[:12]}: versions are compared on the same images; give {cfg}{where}"
    )


def fetch(registry: Registry, version: Version, data: ImageData, config: Config, to: Path) -> Contender:
    """Download a version, check it, load what is served, and build its network; then delete the download.

    Raises UserError: unregistered files, foreign code, not a student, or classes or images that differ from `data`.
    """
    where = f"version {version.number} of {registry.name}"
    folder = registry.fetch(version.number, to)
    try:
        student = bundle.read(folder, where)
        bundle.check_servable(student, where)
        meta = bundle.describe(student, where)
        _check(where, meta, data)
        served = bundle.load(student, where)
        net = networks.placed(networks.recorded(student.weights, where, meta, data), config)
        return Contender(version, served, net, meta, "" if student.bound else bundle.manifest(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(where: str, meta: dict[str, Any], data: ImageData) -> None:
    if list(meta["classes"]) != list(data.classes):
        raise UserError(
            f"{where} knows other classes ({', '.join(meta['classes'][:3])}, …) than the data "
            f"({', '.join(data.classes[:3])}, …)"
        )
    for key in ("image_size", "in_chans"):
        if meta[key] != getattr(data, key):
            raise UserError(f"{where} takes images of {key}={meta[key]}, and the data has {getattr(data, key)}")
    if meta.get("crop_pct") != data.crop_pct:
        raise UserError(f"{where} is served with crop_pct={meta.get('crop_pct')}, and the data has {data.crop_pct}")


def measure(contenders: list[Contender], data: ImageData, config: Config) -> list[Measured]:
    """Evaluate every contender on the test split, and time them in turns."""
    metrics: list[dict[str, float]] = []
    correct = []
    for one in contenders:
        logger.info("evaluating version %s (%s)", one.version.number, one.net.architecture)
        mean, std = one.meta["mean"], one.meta["std"]
        images = networks.eval_batches(config, data.test_x, data.test_y, None, mean, std)
        found = evaluate_model(data, served(one, images), images.labels, "test")
        metrics.append(found.metrics | speed.size(one.net, networks.blank(config, data)))
        correct.append(found.correct)
    times: list[list[float]] = [[] for _ in contenders]
    image = _sent(data.test_x[:1])
    for _ in range(ROUNDS):
        for one, measured, latencies in zip(contenders, metrics, times, strict=True):
            timed = speed.latency(Served(one.served), image)
            latencies.append(timed.get(LATENCY, np.nan))
            measured |= timed
    for measured, latencies in zip(metrics, times, strict=True):
        measured[LATENCY] = min(latencies)
    return [
        Measured(c, m["test/ece"], m[LATENCY], int(m["parameters/total"]), m)
        for c, m in zip(correct, metrics, strict=True)
    ]


class Served(torch.nn.Module):
    """What a server runs: ONNX through onnxruntime with its own threads: uint8 (n, H, W, C) -> probabilities (n, N)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._classifier.probabilities(images.numpy()))


def _sent(images: torch.Tensor) -> torch.Tensor:
    """Images (n, C, H, W) as they are sent to a server, uint8 (n, H, W, C), on the CPU."""
    return images.permute(0, 2, 3, 1).contiguous().cpu()


def served(one: Contender, images: EvalBatches) -> torch.Tensor:
    """Log-probabilities (n, N), on the CPU, that a server would answer.

    Raises UserError: they differ from those of the weights by more than `TOLERANCE`.
    """
    network = Served(one.served)
    try:
        starts = range(0, len(images.labels), BATCH)
        answers = torch.cat([network(_sent(images.images[i : i + BATCH])) for i in starts])
    except Refused as error:
        raise UserError(f"version {one.version.number}: test images {error}; not promoted") from error
    # TF32, cuDNN's default, has only three digits
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        expected = torch.softmax(outputs(one.net, images, f"version {one.version.number}").logits, dim=1).cpu()
    difference = (answers - expected).abs().max(dim=1).values
    wrong = ~(difference <= TOLERANCE)  # true for NaN, too
    if bool(wrong.any()):
        raise UserError(
            f"version {one.version.number}: what is served of it (ONNX) differs from its weights on "
            f"{int(wrong.sum())} of {len(wrong)} test images, by up to {float(difference.max()):.3g}; not promoted: "
            "register the student again"
        )
    return answers.clamp_min(torch.finfo(answers.dtype).tiny).log()
