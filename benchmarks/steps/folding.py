"""A teacher as bare as it can be: logits and pooled feature, batch norms folded into the convolutions before them."""

import copy

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from models.features import FeatureNet


class Bare(nn.Module):
    """(B, C, H, W) → (logits (B, N), feat_2d (B, C)): the network without wrapper, hooks and feature maps."""

    def __init__(self, net: FeatureNet) -> None:
        super().__init__()
        self.net = net.net
        for module in self.net.modules():
            module._forward_pre_hooks.clear()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raw = self.net.forward_features(x)  # type: ignore[operator]
        feature = self.net.forward_head(raw, pre_logits=True)  # type: ignore[operator]
        return self.net.get_classifier()(feature), feature  # type: ignore[operator]


def bare(net: FeatureNet) -> Bare:
    """A copy of the network; the original stays as it is."""
    return Bare(copy.deepcopy(net))


def folded(net: FeatureNet, dtype: torch.dtype | None) -> nn.Module:
    """A frozen copy in eval mode whose batch norms are part of the convolutions before them, where that is so.

    Args:
        dtype: what autocast computes in: the weights of convolutions and linear maps are cast once, not in every pass
            (autocast keeps casts of weights that need a gradient only). None: float32.
    """
    made = fuse(bare(net).requires_grad_(False).eval(), inplace=True).to(memory_format=torch.channels_last)
    if dtype is not None:
        for module in made.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
    return made


def batch_norms(net: nn.Module) -> int:
    """How many there are left."""
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
