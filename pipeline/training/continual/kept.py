"""All that is kept of past tasks beside the student: images, and what consolidates weights; as one file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from models.class_view import ClassView
from models.features import FeatureNet, undisturbed
from pipeline.config import Config
from pipeline.data.batches import EvalBatches
from pipeline.data.sources import ImageData
from pipeline.training.continual.fisher import Consolidation, fisher
from pipeline.training.continual.memory import Memory, balanced, herded, merged, reservoir
from pipeline.training.evaluation import outputs
from pipeline.training.rng import Streams
from pipeline.training.run_data import Scope


@dataclass(frozen=True)
class Kept:
    """What is kept after some tasks."""

    memory: Memory
    consolidation: Consolidation

    @classmethod
    def empty(cls, size: int) -> "Kept":
        """Before the first task, with room for `size` images."""
        return cls(Memory(size), Consolidation())

    # as a file -------------------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """As safetensors."""
        m, c = self.memory, self.consolidation
        tensors = {"memory.index": m.index, "memory.logits": m.logits, "memory.known": m.known}
        tensors |= {f"fisher.{name}": value for name, value in c.fisher.items()}
        tensors |= {f"anchor.{name}": value for name, value in c.anchor.items()}
        record = {"size": m.size, "seen": m.seen, "rest": c.rest}
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        return save(plain, metadata={"kept": json.dumps(record)})

    @classmethod
    def read(cls, path: Path) -> "Kept":
        """What `dump` wrote."""
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
            record = json.loads(file.metadata()["kept"])
        of = {
            kind: {name.removeprefix(kind): value for name, value in found.items() if name.startswith(kind)}
            for kind in ("fisher.", "anchor.")
        }
        images = (found["memory.index"], found["memory.logits"], found["memory.known"])
        memory = Memory(record["size"], *images, seen=record["seen"])
        return cls(memory, Consolidation(of["fisher."], of["anchor."], record["rest"]))

    def bytes(self, data: ImageData) -> int:
        """What it would take if the images were copied: one byte for each channel of a pixel."""
        m, c = self.memory, self.consolidation
        images = len(m.index) * data.in_chans * data.image_size**2
        weights = sum(value.nbytes for part in (c.fisher, c.anchor) for value in part.values())
        return images + m.logits.nbytes + weights

    # after a task ----------------------------------------------------------------------------------------------------

    def after(
        self, student: FeatureNet, new: EvalBatches, scope: Scope, config: Config, streams: Streams, last: bool
    ) -> "Kept":
        """What is kept once a task is over.

        Args:
            student: as it is at the task's end, of all classes.
            new: the task's training images, in order, with their labels in the data.
            scope: the task's.
            last: no task follows: weights need not be consolidated any more.
        """
        own, memory, consolidation = config.continual, self.memory, self.consolidation
        if own.buffer_size:
            memory = self._remember(student, new, scope, config, streams)
        if own.lambda_ewc and not last:
            net, view = student.net, ClassView(torch.tensor(scope.classes)).to(new.device)
            drawn = self._drawn(new, own.fisher_images, scope, streams)
            with undisturbed(net):
                found = fisher(net, view, drawn, own.fisher, streams.generator("fisher_labels"))
            consolidation = consolidation.to(new.device).with_task(found, dict(net.named_parameters()))
        return Kept(memory, consolidation)

    def _remember(
        self, student: FeatureNet, new: EvalBatches, scope: Scope, config: Config, streams: Streams
    ) -> Memory:
        m, labels, index = self.memory, new.labels.cpu(), new.indices.cpu()
        herding = config.continual.buffer_rule == "herding"
        out = outputs(student, new, "student") if herding or config.method.replays else None
        logits = out.logits.cpu() if out is not None and config.method.replays else torch.zeros(len(index), 0)
        order = torch.randperm(len(index), generator=streams.generator("memory_order"))
        if config.continual.buffer_rule == "reservoir":
            stream, logits = index[order], logits[order]
            rows = reservoir(m.index, m.seen, stream, m.size, streams.generator("memory"))
            return merged(m, *rows, stream, logits, len(scope.classes))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))

        def pick(rows: Tensor, count: int) -> Tensor:
            if herding:
                assert out is not None
                return rows[herded(out.feat_2d[rows.to(out.feat_2d.device)], count)]
            return rows[place[rows].argsort()][:count]

        rows = balanced(self._labels(new), labels, m.size, pick)
        return merged(m, *rows, index, logits, len(scope.classes))

    def _labels(self, new: EvalBatches) -> Tensor:
        """(m,), of the kept images."""
        return new.all_labels.cpu()[self.memory.index]

    def _drawn(
        self, new: EvalBatches, most: int | None, scope: Scope, streams: Streams
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The images on which the Fisher information is estimated, in batches, with their labels in the task."""
        order = torch.randperm(len(new.indices), generator=streams.generator("fisher_images"))
        chosen = new.taking(new.indices[order[:most].to(new.device)])
        for x, y in chosen:
            yield x, scope.numbered(y.cpu()).to(y.device)

    # classifying -----------------------------------------------------------------------------------------------------

    @staticmethod
    def nearest_mean(features: Tensor, kept: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Minus squared distances (n, N) of features (n, C) to the mean of each class's kept ones (m, C), all of unit
        length (Rebuffi et al. 2017, alg. 1); minus infinity for classes of which none is kept.
        """
        f, k = F.normalize(features.double(), dim=1), F.normalize(kept.double(), dim=1)
        member = F.one_hot(labels.to(k.device), num_classes).double()
        means = F.normalize(member.T @ k, dim=1)
        distance = torch.cdist(f, means) ** 2
        return (-distance).masked_fill(member.sum(dim=0) == 0, -torch.inf).float()
