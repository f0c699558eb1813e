"""Contrastive representation distillation (Tian et al. 2020): a sample in both networks against other classes'."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import Features
from pipeline.data.batches import Batch
from pipeline.errors import UserError
from pipeline.training import distributed
from pipeline.training.objective import Moment
from pipeline.training.rng import Streams
from pipeline.training.step import Lesson, Setup, StudentStep


def nce(scores: Tensor, log_z: Tensor, noise: float) -> Tensor:
    """-log h_0 - sum_j log(1 - h_j), h = p / (p + noise), p = exp(score) / Z (Tian et al. 2020, eq. 18).

    Args:
        scores: (B, 1 + m), products of unit vectors over tau; the first is of the same sample, m are negatives.
        log_z: scalar, the logarithm of Z.
        noise: m / n, the density of negatives.

    Returns:
        (B,).
    """
    z = scores.float() - log_z - math.log(noise)
    return F.softplus(-z[:, 0]) + F.softplus(z[:, 1:]).sum(dim=1)


def counted_bits(seed: int, rows: slice, columns: int, device: torch.device) -> Tensor:
    """Uniform int64 in [0, 2^63) for these rows of a table: a hash (splitmix64) of the place, alike on all devices.

    A generator on the CPU takes longer to draw a million numbers and send them than a GPU takes for the whole step.
    """
    x = torch.arange(rows.start * columns + 1, rows.stop * columns + 1, device=device)
    x.mul_(-0x61C8864680B583EB).add_(seed)  # multiplied modulo 2^64
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x.bitwise_xor_((x >> shift) & ((1 << (64 - shift)) - 1)).mul_(factor)
    x.bitwise_xor_((x >> 31) & ((1 << 33) - 1)).bitwise_and_((1 << 63) - 1)
    return x.reshape(rows.stop - rows.start, columns)


class Others(nn.Module):
    """Draws images of other classes: the images sorted by class are all that is stored.

    Args:
        labels: int64 (n,), of the training images.
    """

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        counts = torch.bincount(labels)
        self.order: Tensor
        self.counts: Tensor
        self.starts: Tensor
        # from the data: not part of a checkpoint
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)

    def forward(self, y: Tensor, bits: Tensor) -> Tensor:
        """Rows (B, m) of training images whose class is not y (B,), uniform and independent for uniform `bits` (B, m).

        The remainder modulo the number n_o of other images favours none by more than n_o / 2^63.
        """
        start, count = self.starts[y, None], self.counts[y, None]
        place = bits % (len(self.order) - count)
        return self.order[place + (place >= start) * count]  # the label's own images are skipped


class Memory(nn.Module):
    """A unit vector for each training image and network, the normalisers Z, and the loss against them.

    Args:
        n: training images. m: negatives for each sample.
    """

    def __init__(self, n: int, m: int, width: int, tau: float, momentum: float, streams: Streams) -> None:
        super().__init__()
        self.tau, self.momentum, self.noise = tau, momentum, m / n
        self.student: Tensor
        self.teacher: Tensor
        self.log_z: Tensor
        self.begun: Tensor
        for name in ("student", "teacher"):
            self.register_buffer(name, F.normalize(streams.normal((n, width), "crd_memory", name), dim=1))
        self.register_buffer("log_z", torch.zeros(2))  # of student and teacher as anchors
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self._begun = False
        self.training = False

    def train(self, mode: bool = True) -> "Memory":
        """Stay in eval mode: the loop keeps copies of what modules in training mode change."""
        return super().train(False)

    def forward(self, student: Tensor, teacher: Tensor, rows: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Each network's embeddings against the other's memory.

        Args:
            student, teacher: (B, width), of unit length.
            rows: int64 (B,), the samples' places in memory.
            negatives: int64 (B, m), those of their negatives.

        Returns:
            The loss (B,), and log Z (2,), measured on this batch until it is fixed.
        """
        at = torch.cat([rows[:, None], negatives], dim=1)
        # scores with all n, of which 1 + m are picked: one product takes a fraction of the time of gathering
        # B (1 + m) vectors, and less memory for n < 128 m. Equal negatives have equal gradients, whose sum does not
        # depend on their order.
        scores = [
            (anchor @ bank.T / self.tau).gather(1, at)
            for anchor, bank in ((student, self.teacher), (teacher, self.student))
        ]
        log_z = self.log_z
        if not self._begun:  # a GPU is synchronised until then only
            self._begun = bool(self.begun)
            log_z = self.log_z if self._begun else self._measured(scores)
        return nce(scores[0], log_z[0], self.noise) + nce(scores[1], log_z[1], self.noise), log_z

    @torch.no_grad()
    def _measured(self, scores: Sequence[Tensor]) -> Tensor:
        """log of n times the mean of exp(score) over the global batch (2,)."""
        sums = [s.double().exp().sum() for s in scores]
        count = torch.tensor(scores[0].numel(), dtype=torch.float64, device=scores[0].device)
        *sums, count = distributed.total(torch.stack([*sums, count]))
        return (torch.stack(sums) / count * len(self.student)).log().float()

    @torch.no_grad()
    def write(
        self, student: Tensor, teacher: Tensor, rows: Tensor, taught: Tensor, log_z: Tensor, skipped: Tensor
    ) -> None:
        """Move the global batch's memory towards its embeddings (B, width), and fix Z; nothing where `skipped`.

        `taught`: (B,), 0 where the teacher has not seen the sample.
        """
        left = (skipped | (taught == 0))[:, None]
        for bank, new in ((self.student, student), (self.teacher, teacher)):
            old = bank[rows]
            moved = F.normalize(self.momentum * old + (1 - self.momentum) * new, dim=1)
            bank[rows] = torch.where(left, old, moved)
        self.log_z.copy_(torch.where(skipped | self.begun, self.log_z, log_z))
        self.begun.logical_or_(~skipped)


class Crd(StudentStep):
    """Linear embeddings of both networks' pooled features, of unit length; both are trained."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        m, train = self.method, setup.data.train
        n, labels = len(train.indices), train.labels[train.indices]
        if m.negatives >= n:
            raise UserError(f"method.negatives={m.negatives} with {n} training images: set it to at most {n - 1}")
        if len(labels.unique()) < 2:
            raise UserError("method=crd contrasts classes, and all training images are of one: choose other data")
        self.own["embed_student"] = nn.Linear(setup.student.feature_dim, m.embed_dim)
        self.own["embed_teacher"] = nn.Linear(setup.teachers[0].feature_dim, m.embed_dim)
        memory = Memory(n, m.negatives, m.embed_dim, m.tau, m.momentum, setup.streams)
        self.own["memory"] = memory.to(setup.device)
        self._memory = (memory,)  # a tuple: not registered twice
        self._others = (Others(labels).to(setup.device),)
        self._row = torch.zeros(len(train.labels), dtype=torch.int64, device=setup.device)
        self._row[train.indices] = torch.arange(n, device=setup.device)
        self._seen: dict[str, Tensor] = {}

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        # where the sample gate is closed, a lesson is 0
        return {"feature": seen[0].feat_2d, "taught": torch.ones(len(y), device=self.device)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        s = F.normalize(self.own["embed_student"](student.feat_2d), dim=1)
        t = F.normalize(self.own["embed_teacher"](lesson["feature"]), dim=1)
        rows, seed = self._row[batch.index], self.streams.derive("crd_negatives", *moment)
        bits = counted_bits(seed, batch.rows, self.method.negatives, s.device)
        loss, log_z = self.own["memory"](s, t, rows, self._others[0](batch.y, bits))
        own = {"student": s.detach(), "teacher": t.detach(), "rows": rows, "taught": lesson["taught"]}
        everyone = {name: distributed.gather_rows(v, batch.rows, batch.global_size) for name, v in own.items()}
        self._seen = everyone | {"log_z": log_z}
        return {"crd": loss}

    def updated(self, skipped: Tensor, lr: float) -> None:
        if self._seen:
            self._memory[0].write(**self._seen, skipped=skipped.bool())
        self._seen = {}
