"""Elastic weight consolidation (Kirkpatrick et al. 2017): the diagonal of the Fisher information, and the penalty.

Squares are of single images' gradients, never of a batch's mean (van de Ven 2025, «On the computation of the Fisher
information in continual learning»).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from models.class_view import ClassView

Kind = Literal["sampled", "empirical", "exact"]
CHUNK = 16
"""Images whose gradients are held at once."""


def fisher(
    net: nn.Module, view: ClassView, images: Iterator[tuple[Tensor, Tensor]], kind: Kind, generator: torch.Generator
) -> dict[str, Tensor]:
    """The diagonal F_j = mean_x E_y (d log p(y | x) / d theta_j)^2 of a classifier, float32, by parameters' names.

    y is drawn once from p(. | x) (`sampled`), the label (`empirical`), or all classes weighted by p(y | x) (`exact`).

    Args:
        net: in eval mode, its logits (B, N) of all classes. view: those that are told apart.
        images: (b, C, H, W), normalised, with their labels among the view's (b,).
    """
    weights = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in net.named_parameters() if not p.requires_grad}
    rest |= dict(net.named_buffers())

    def log_p(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.log_softmax(view(functional_call(net, {**weights, **rest}, (x[None],))).float(), dim=1)[0]

    def of_label(weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return log_p(weights, x).gather(0, y[None])[0]

    per_image = vmap(grad(of_label), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    count = 0
    for batch, labels in images:
        for x, y in zip(batch.split(CHUNK), labels.split(CHUNK), strict=True):
            with torch.no_grad():
                p = F.softmax(view(net(x)).float(), dim=1)
            for shares, asked in _labels(p, y, kind, generator):
                for name, slope in per_image(weights, x, asked).items():
                    total[name] += torch.einsum("b,b...->...", shares, slope**2)
            count += len(x)
    return {name: value / count for name, value in total.items()}


def _labels(p: Tensor, y: Tensor, kind: Kind, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(weights (b,), classes (b,)) whose squared gradients are added up."""
    if kind == "empirical":
        yield torch.ones_like(p[:, 0]), y
    elif kind == "sampled":
        yield torch.ones_like(p[:, 0]), torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(p.device)
    else:
        for label in range(p.shape[1]):
            yield p[:, label], torch.full_like(y, label)


@dataclass(frozen=True)
class Consolidation:
    """sum_i F_i (theta - theta_i)^2 over past tasks i, in the memory of one.

    sum_i F_i (theta - theta_i)^2 = F (theta - a)^2 + c with F = sum F_i, a = sum F_i theta_i / F and
    c = sum F_i (theta_i - a)^2.
    """

    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    anchor: Mapping[str, Tensor] = field(default_factory=dict)
    rest: float = 0.0

    def with_task(self, found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> "Consolidation":
        """Add a task's Fisher information and the weights at its end."""
        if not self.fisher:
            return Consolidation(dict(found), {name: weights[name].detach().clone() for name in found})
        total, anchor, rest = {}, {}, self.rest
        for name, new in found.items():
            old, before, now = self.fisher[name], self.anchor[name], weights[name].detach()
            total[name] = old + new
            share = torch.where(total[name] > 0, new / total[name].clamp_min(torch.finfo(new.dtype).tiny), 0.5)
            anchor[name] = before + share * (now - before)
            rest += float((share * old.double() * (now - before).double() ** 2).sum())
        return Consolidation(total, anchor, rest)

    def to(self, device: torch.device) -> "Consolidation":
        """The same on another device."""
        fisher, anchor = ({name: t.to(device) for name, t in part.items()} for part in (self.fisher, self.anchor))
        return Consolidation(fisher, anchor, self.rest)

    def penalty(self, net: nn.Module, weight: float) -> Tensor:
        """weight / 2 * sum_i F_i (theta - theta_i)^2, a scalar with gradient on the net's parameters."""
        own = dict(net.named_parameters())
        terms = [(f * (own[name] - self.anchor[name]) ** 2).sum() for name, f in self.fisher.items()]
        return weight / 2 * (torch.stack(terms).sum() + self.rest)
