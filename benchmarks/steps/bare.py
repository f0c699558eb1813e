"""Networks as bare as they can be: logits and pooled feature, without wrapper, hooks and feature maps."""

import copy

import torch
from torch import nn

from models.features import FeatureNet
from models.fold import folded


class Bare(nn.Module):
    """(B, C, H, W) → (logits (B, N), feat_2d (B, C)); takes over the wrapped network and drops its hooks."""

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


def fastest(net: FeatureNet, dtype: torch.dtype | None, input_size: tuple[int, int, int]) -> Bare:
    """A frozen copy in eval mode, its batch norms folded as the pipeline folds them, its weights cast once.

    Args:
        dtype: what autocast computes in; the pipeline's weights are cast in every pass, since autocast keeps casts of
            weights that need a gradient only. None: float32.
        input_size: (in_chans, H, W).
    """
    made = Bare(folded(net, input_size)).eval().to(memory_format=torch.channels_last)
    if dtype is not None:
        for module in made.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
    return made
