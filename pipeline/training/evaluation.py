"""The one evaluation loop: a network's outputs on a fixed split, in eval mode, float32, AMP off."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import FeatureNet, undisturbed
from pipeline.data.batches import EvalBatches
from pipeline.training.nonfinite import require_finite


class Outputs(NamedTuple):
    """A network on a split, in the split's order: (n, N) and (n, .), float32 on the device."""

    logits: Tensor
    feat_2d: Tensor
    distill_feat: Tensor | None


def outputs(net: FeatureNet, batches: EvalBatches, name: str = "network") -> Outputs:
    """Run `net` over a split; its mode is restored. Raises NonFinite, with its `name`, unless all logits are finite."""
    with undisturbed(net), torch.autocast(batches.device.type, enabled=False):
        seen = [net(x) for x, _ in batches]
    logits = torch.cat([s.logits.float() for s in seen])
    require_finite(logits, name)
    adapted = [s.distill_feat.float() for s in seen if s.distill_feat is not None]
    return Outputs(logits, torch.cat([s.feat_2d.float() for s in seen]), torch.cat(adapted) if adapted else None)


def percent(right: Tensor) -> float:
    """The share of true ones among (n,), in percent: 38.8, where 100 times the share is 38.800000000000004.

    Of none: NaN.
    """
    return 100 * int(right.sum()) / len(right) if len(right) else math.nan


def accuracy(scores: Tensor, y: Tensor) -> float:
    """Top-1 in percent of scores (n, N) against labels (n,)."""
    return percent(scores.argmax(dim=1) == y)


def nll(logits: Tensor, y: Tensor, name: str = "network") -> float:
    """Mean negative log-likelihood, in nats. Raises NonFinite if it is not finite."""
    loss = F.cross_entropy(logits.float(), y)
    require_finite(loss[None], name, "mean losses")
    return loss.item()
