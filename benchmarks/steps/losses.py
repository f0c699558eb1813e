"""What a method's loss takes at the least: its own modules and the arithmetic of its formula, as plainly as torch can.

Each is a module from the student's and the teachers' outputs to a scalar, with its own trained parts. Negatives and
memories are random and lie on the device: drawing negatives and writing a memory are the pipeline's business.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Out(NamedTuple):
    """A network's outputs: logits (B, N), feature (B, C), maps of the recorded stages (B, C_i, h_i, w_i)."""

    logits: Tensor
    feature: Tensor
    maps: tuple[Tensor, ...] = ()


class Sizes(NamedTuple):
    """What a loss is made for."""

    batch: int
    images: int
    """Of the training split: rows of a memory."""
    student: Out
    """For any number of images."""
    teachers: Sequence[Out]


def divergence(logits: Tensor, target: Tensor, tau: float) -> Tensor:
    """tau^2 KL(target || softmax(logits / tau)), the batch's mean; target (B, N) are probabilities."""
    return tau**2 * F.kl_div(F.log_softmax(logits.float() / tau, dim=1), target, reduction="batchmean")


class Kd(nn.Module):
    """KL divergence from the teacher's softened classes."""

    def __init__(self, method: Any, sizes: Sizes) -> None:
        super().__init__()
        self.tau = method.tau

    def forward(self, student: Out, teachers: Sequence[Out], y: Tensor, nets: Sequence[nn.Module]) -> Tensor:
        return divergence(student.logits, F.softmax(teachers[0].logits.float() / self.tau, dim=1), self.tau)


class At(nn.Module):
    """Maps pooled over channels, squared, at unit length; mean square differences."""

    def __init__(self, method: Any, sizes: Sizes) -> None:
        super().__init__()

    def forward(self, student: Out, teachers: Sequence[Out], y: Tensor, nets: Sequence[nn.Module]) -> Tensor:
        def attention(x: Tensor) -> Tensor:
            return F.normalize(x.square().mean(dim=1).flatten(1))

        pairs = zip(student.maps, teachers[0].maps, strict=True)
        return torch.stack([F.mse_loss(attention(s), attention(t)) for s, t in pairs]).sum()


class Crd(nn.Module):
    """Two embeddings, the scores of each with 1 + m rows of the other's memory, and the noise-contrastive loss.

    The scores come from the product with all rows, of which 1 + m are picked, as in the pipeline: 16,384 rows gathered
    for each of 64 samples are half a gigabyte.
    """

    def __init__(self, method: Any, sizes: Sizes) -> None:
        super().__init__()
        widths = (sizes.student.feature.shape[1], sizes.teachers[0].feature.shape[1])
        self.embed = nn.ModuleList(nn.Linear(width, method.embed_dim) for width in widths)
        self.tau, self.log_noise = method.tau, 1.0
        self.banks = [F.normalize(torch.randn(sizes.images, method.embed_dim)) for _ in range(2)]
        self.rows = torch.randint(sizes.images, (sizes.batch, 1 + method.negatives))

    def forward(self, student: Out, teachers: Sequence[Out], y: Tensor, nets: Sequence[nn.Module]) -> Tensor:
        embedded = [F.normalize(e(f)) for e, f in zip(self.embed, (student.feature, teachers[0].feature), strict=True)]
        total = torch.zeros((), device=y.device)
        for anchor, bank in zip(embedded, reversed(self.banks), strict=True):
            z = (anchor @ bank.to(y.device).T / self.tau).gather(1, self.rows.to(y.device)) - self.log_noise
            total = total + (F.softplus(-z[:, 0]) + F.softplus(z[:, 1:]).sum(dim=1)).mean()
        return total


class CaMkd(nn.Module):
    """Divergences and distances of projected maps, both weighted by cross-entropies; the projections' under the
    teachers' classifiers.
    """

    def __init__(self, method: Any, sizes: Sizes) -> None:
        super().__init__()
        self.tau, width = method.tau, sizes.student.maps[-1].shape[1]
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
            for channels in (teacher.maps[-1].shape[1] for teacher in sizes.teachers)
        )

    def forward(self, student: Out, teachers: Sequence[Out], y: Tensor, nets: Sequence[nn.Module]) -> Tensor:
        projected = [projector(student.maps[-1]) for projector in self.projectors]
        with torch.no_grad():
            heads = [net.get_classifier() for net in nets]  # type: ignore[operator]
            guesses = [head(p.mean((2, 3))) for head, p in zip(heads, projected, strict=True)]
            of_logits, of_maps = (
                1 - F.softmax(torch.stack([F.cross_entropy(z, y, reduction="none") for z in some]), dim=0)
                for some in ([t.logits for t in teachers], guesses)
            )
            targets = [F.softmax(t.logits.float() / self.tau, dim=1) for t in teachers]
        log_p = F.log_softmax(student.logits.float() / self.tau, dim=1)
        each = [self.tau**2 * F.kl_div(log_p, p, reduction="none").sum(dim=1) for p in targets]
        far = [(p - t.maps[-1]).square().mean((1, 2, 3)) for p, t in zip(projected, teachers, strict=True)]
        return (of_logits * torch.stack(each) + of_maps * torch.stack(far)).sum(dim=0).mean()


LOSSES: dict[str, Callable[[Any, Sizes], nn.Module]] = {"kd": Kd, "at": At, "crd": Crd, "ca_mkd": CaMkd}
"""By method; ASIB's are in `limit`, whose steps differ."""
