"""MobileNetV2 at half width for CIFAR (Sandler et al. 2018, in the form that the KD tables use)."""

from typing import Any

import torch
from torch import nn

from models.cifar.base import CifarNet, conv1x1, conv3x3, register

__all__: list[str] = []  # filled by `register`

# expansion, channels at full width, blocks, stride of the first
SETTING = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# The groups of SETTING whose output is the last at its resolution.
STAGE_ENDS = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise 3×3, linear 1×1; (B, in_chs, h, w) → (B, out_chs, h/stride, w/stride)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, expand: int) -> None:
        super().__init__()
        mid = in_chs * expand
        self.residual = stride == 1 and in_chs == out_chs
        self.conv = nn.Sequential(
            *_conv_bn_relu(conv1x1(in_chs, mid)),
            *_conv_bn_relu(conv3x3(mid, mid, stride=stride, groups=mid)),
            conv1x1(mid, out_chs),
            nn.BatchNorm2d(out_chs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block; see the class."""
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


class CifarMobileNetV2(CifarNet):
    """Stride-2 stem, seven groups of inverted residuals, 1×1 convolution to 1280; the last map is 2×2 at 32 pixels."""

    head_name = "classifier.0"
    stem_names = r"^conv1\."
    block_names = r"^blocks\.(\d+)"
    tail_names = ("conv2",)
    reductions = (2, 4, 8, 16)

    def __init__(self, width: float, **common: Any) -> None:
        super().__init__(**common)
        in_chs, stages = int(32 * width), []
        self.conv1 = _conv_bn_relu(conv3x3(self.in_chans, in_chs, stride=2))
        self.blocks = nn.ModuleList()
        for i, (expand, full, count, stride) in enumerate(SETTING):
            out_chs = int(full * width)
            group = nn.Sequential()
            for j in range(count):
                group.append(InvertedResidual(in_chs, out_chs, stride if j == 0 else 1, expand))
                in_chs = out_chs
            self.blocks.append(group)
            if i in STAGE_ENDS:
                stages.append((f"blocks.{i}", out_chs))
        features = max(1280, int(1280 * width))
        self.conv2 = _conv_bn_relu(conv1x1(in_chs, features))
        self.classifier = nn.Sequential(nn.Identity())
        self.finish(features, stages)

    def init_head(self, linear: nn.Linear) -> None:
        """N(0, 0.01²), zero bias."""
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → (B, 32·width, H/2, W/2)."""
        out: torch.Tensor = self.conv1(x)
        return out

    def parts(self, index: int) -> list[str]:
        """The groups between two entries of `feature_info`."""
        first = STAGE_ENDS[index - 1] + 1 if index else 0
        return [f"blocks.{i}" for i in range(first, STAGE_ENDS[index] + 1)]

    def stage_preact(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A stage's output is linear: it is its own pre-activation."""
        x = self.stage(index, x)
        return x, x

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 320·width, h, w) → (B, num_features, h, w)."""
        out: torch.Tensor = self.conv2(x)
        return out


def _conv_bn_relu(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True))


register(__name__, CifarMobileNetV2, {"cifar_mobilenetv2_half": {"width": 0.5}}, first_conv="conv1.0")
