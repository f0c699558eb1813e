"""What is evaluated, by mode: the model alone, teachers fused under its query, or the teachers' mean."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.features import FeatureNet
from models.weights import ADAPTER, read_state, weights_hash
from pipeline.config import Config
from pipeline.config.methods.asib.settings import AsibConfig
from pipeline.data.batches import EvalBatches
from pipeline.data.image_files import Images
from pipeline.data.sources import ImageData
from pipeline.data.splits import split as make_split
from pipeline.distill import networks, teachers
from pipeline.distill.teachers import Teacher
from pipeline.errors import UserError
from pipeline.evaluate import fusions
from pipeline.evaluate.request import Request
from pipeline.evaluate.source import Source, check_fits, find
from pipeline.runs.run import Run
from pipeline.training import samples
from pipeline.training.evaluation import outputs
from pipeline.training.methods.asib.fusion import Fusion
from pipeline.training.methods.asib.monitor import synergy_logits
from pipeline.training.methods.asib.task import query_width

logger = logging.getLogger("asib")


class Part(NamedTuple):
    """The images of a split: uint8 (m, C, H, W) or files, and labels (m,), of which `indices` (n,) take part."""

    name: str
    images: Images
    labels: Tensor
    indices: Tensor

    @property
    def y(self) -> Tensor:
        """(n,) labels."""
        return self.labels[self.indices]


def part(config: Config, data: ImageData, name: str) -> Part:
    """The test split, or the training images without (`train`) or of (`val`) the validation split."""
    if name == "test":
        return Part(name, data.test_x, data.test_y, torch.arange(len(data.test_y)))
    parts = make_split(data.train_y, config.dataset.val_fraction, data.digest, config.dataset.split_seed)
    return Part(name, data.train_x, data.train_y, parts.train if name == "train" else parts.val)


class Averaged(nn.Module):
    """Images (B, C, H, W) → log of the teachers' mean probabilities (B, N)."""

    def __init__(self, members: Sequence[FeatureNet], weights: list[float] | None) -> None:
        super().__init__()
        self.members, self.weights = nn.ModuleList(members), weights

    def forward(self, x: Tensor) -> Tensor:
        return _averaged([member(x).logits for member in self.members], self.weights)


class Fused(nn.Module):
    """Images (B, C, H, W) → synergy logits (B, N); the student runs where its feature is the query."""

    def __init__(self, student: FeatureNet, members: Sequence[FeatureNet], fusion: Fusion, method: AsibConfig) -> None:
        super().__init__()
        self.members, self.fusion, self.key = nn.ModuleList(members), fusion, method.ib_mbm_query_key
        self.student = None if method.learnable_q else student

    def forward(self, x: Tensor) -> Tensor:
        query = None if self.student is None else getattr(self.student(x), self.key)
        logits: Tensor = self.fusion(query, [member(x).feat_2d for member in self.members]).logits
        return logits


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        student: the model; in mode average, and with a learned query, a fresh network that is never run.
        source: the weights that the model comes from, or None.
        record: what travelled with the model's weights.
        teachers: in mode single only for comparison.
    """

    config: Config
    data: ImageData
    mode: str
    student: FeatureNet
    source: Source | None = None
    record: dict[str, Any] = field(default_factory=dict)
    teachers: list[Teacher] = field(default_factory=list)
    fusion: Fusion | None = None

    @property
    def nets(self) -> list[FeatureNet]:
        """The teachers' networks."""
        return [teacher.net for teacher in self.teachers]

    @property
    def module(self) -> nn.Module:
        """One module from normalised images to logits."""
        if self.mode == "average":
            return Averaged(self.nets, self.config.method.averaging_weights)
        if self.fusion is not None:
            return Fused(self.student, self.nets, self.fusion, self.config.method)
        return self.student.net

    @property
    def title(self) -> str:
        """What is evaluated, in words."""
        names = " + ".join(t.name for t in self.config.model.teachers)
        student = self.config.model.student.name
        return {"single": student, "synergy": f"synergy of {names}", "average": f"average of {names}"}[self.mode]

    def hash(self) -> str:
        """SHA-256 (hex) over all weights that take part."""
        return weights_hash(self.module)

    def answers(self, part: Part) -> tuple[Tensor, list[Tensor]]:
        """Logits (n, N) on a split and those of each teacher, on the CPU; every network runs once, in eval mode."""
        method, data = self.config.method, self.data
        batches = self._batches(part, data.mean, data.std)
        seen = [outputs(net, batches, f"teacher {k}") for k, net in enumerate(self.nets)]
        members = [out.logits.cpu() for out in seen]
        if self.mode == "average":
            return _averaged([out.logits for out in seen], method.averaging_weights).cpu(), members
        if self.fusion is not None and method.learnable_q:
            return synergy_logits(self.fusion, None, seen).cpu(), members
        # the model's own preprocessing, regardless of this data's statistics
        mean, std = self.record.get("mean", data.mean), self.record.get("std", data.std)
        student = outputs(self.student, self._batches(part, mean, std), "student")
        if self.fusion is None:
            return student.logits.cpu(), members
        query = getattr(student, method.ib_mbm_query_key)
        return synergy_logits(self.fusion, query, seen).cpu(), members

    def _batches(self, part: Part, mean: Sequence[float], std: Sequence[float]) -> EvalBatches:
        return networks.eval_batches(self.config, part.images, part.labels, part.indices, mean, std)


def subject(run: Run, data: ImageData, request: Request, source: Source | None = None) -> Subject:
    """Networks, weights and fusion that a request asks for; what does not fit is refused before teachers are sought.

    `source`: the model, if already known; by default what the configuration's `student` names.

    Raises UserError: something is missing, or does not belong to this data.
    """
    config, mode = run.config, request.mode
    key = f"{request.named}={config.student if source is None else source.path}"
    wanted = mode == "single" or (mode == "synergy" and not config.method.learnable_q)
    if wanted and source is None:
        assert config.student is not None
        source = find(run, config.student, key)
    student = networks.build_student(config, data)
    record: dict[str, Any] = {}
    members: list[Teacher] = []
    fusion = None
    if wanted and source is not None:
        record = check_fits(source, data, key)
        networks.load(student, source.path, key, networks.prepared_as(data, record))
    elif config.student is not None:
        logger.info("has no effect here: %s", key)
    if mode == "synergy":
        _check_query(config, source, key)
        place = fusions.find(run, request.fusion, source)
        members = teachers.obtain(run, data, student)
        widths, query = [member.net.feature_dim for member in members], query_width(config.method, student)
        with networks.user_error("fusion"):
            made = Fusion(config.method, widths, query, data.num_classes)
        fusion = made.to(networks.device_of(config)).eval()
        fusions.load(run, place, fusion, [member.hash for member in members], data)
    elif mode == "average" or request.teachers == "true":
        members = teachers.obtain(run, data, student)
    elif request.teachers == "auto":
        members = _at_hand(run, data, student)
    if wanted and not record.get("mean"):
        logger.info("%s: %s", key, networks.preparation(student, data))
    return Subject(config, data, mode, student, source if wanted else None, record, members, fusion)


def _check_query(config: Config, source: Source | None, key: str) -> None:
    """Refuse a query through the student's adapter if that was never trained."""
    if source is None or config.method.ib_mbm_query_key != "distill_feat":
        return
    with networks.user_error(key):
        if not any(name.startswith(ADAPTER) for name in read_state(source.path)):
            raise UserError(f"{key} has no {ADAPTER}*, through which method.ib_mbm_query_key=distill_feat queries")


def _at_hand(run: Run, data: ImageData, student: FeatureNet) -> list[Teacher]:
    """The configuration's teachers, if all can be had without fine-tuning; their absence is no error here."""
    config = run.config
    for index, spec in enumerate(config.model.teachers):
        ready = spec.checkpoint is not None or config.finetune.epochs == 0
        if not ready and not teachers.store(config, data, index).exists():
            logger.info(
                "not compared with teachers: no %s fine-tuned as finetune.* says is kept in %s (teachers=true does it)",
                spec.name,
                teachers.store(config, data, index).parent,
            )
            return []
    try:
        return teachers.obtain(run, data, student)
    except UserError as error:
        logger.warning("not compared with teachers: %s", error)
        return []


def _averaged(logits: Sequence[Tensor], weights: list[float] | None) -> Tensor:
    """Log of the mean probabilities (B, N) of logits (B, N); underflow stays finite."""
    p = samples.averaged(list(logits), weights, tau=1.0)
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()
