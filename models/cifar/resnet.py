"""Residual networks for CIFAR: the 6n+2 family (He et al. 2016, section 4.2), its wide ×4 members, and the
four-stage ResNet-18/50 with a 3×3 stem. Shortcuts are 1×1 projections wherever the shape changes (option B).
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from models.cifar.base import CifarNet, conv1x1, conv3x3, register

__all__: list[str] = []  # filled by `register`


class Residual(nn.Module):
    """relu(F(x) + shortcut(x)), F basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1 with ×4 channels).

    `shortcut` is the name of the projection: the published families disagree on it. (B, in_chs, h, w) →
    (B, width·expansion, h/stride, w/stride).
    """

    def __init__(self, in_chs: int, width: int, stride: int, bottleneck: bool, shortcut: str) -> None:
        super().__init__()
        out_chs = width * (4 if bottleneck else 1)
        if bottleneck:
            self.conv1 = conv1x1(in_chs, width)
            self.conv2 = conv3x3(width, width, stride=stride)
            self.conv3: nn.Conv2d | None = conv1x1(width, out_chs)
            self.bn3: nn.BatchNorm2d | None = nn.BatchNorm2d(out_chs)
        else:
            self.conv1 = conv3x3(in_chs, width, stride=stride)
            self.conv2 = conv3x3(width, width)
            self.conv3 = self.bn3 = None
        self.bn1 = nn.BatchNorm2d(width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut_name = shortcut
        same = stride == 1 and in_chs == out_chs
        projection = (
            nn.Sequential() if same else nn.Sequential(conv1x1(in_chs, out_chs, stride=stride), nn.BatchNorm2d(out_chs))
        )
        self.add_module(shortcut, projection)

    def preact(self, x: torch.Tensor) -> torch.Tensor:
        """The block without its last ReLU."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.conv3 is not None and self.bn3 is not None:
            y = self.bn3(self.conv3(F.relu(y)))
        out: torch.Tensor = y + getattr(self, self.shortcut_name)(x)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block; see the class."""
        return F.relu(self.preact(x))


class CifarResNet(CifarNet):
    """3×3 stem, then stages of `blocks[i]` residual blocks; every stage but the first halves the map.

    Args:
        blocks: residual blocks per stage.
        widths: channels of the stem, then of each stage (before the bottleneck's expansion).
        bottleneck: the kind of block.
    """

    shortcut_name: ClassVar[str] = "downsample"
    reductions: ClassVar[tuple[int, ...]] = (1, 2, 4)

    def __init__(
        self, blocks: tuple[int, ...], widths: tuple[int, ...], bottleneck: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        self.conv1 = conv3x3(self.in_chans, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        in_chs, stages = widths[0], []
        for i, (count, width) in enumerate(zip(blocks, widths[1:], strict=True)):
            layer = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(Residual(in_chs, width, stride, bottleneck, self.shortcut_name))
                in_chs = width * (4 if bottleneck else 1)
            self.add_module(f"layer{i + 1}", layer)
            stages.append((f"layer{i + 1}", in_chs))
        self.finish(in_chs, stages)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → (B, widths[0], H, W)."""
        return F.relu(self.bn1(self.conv1(x)))


class CifarResNetFourStage(CifarResNet):
    """ImageNet's stage widths on a CIFAR stem; its published checkpoints use the names `shortcut` and `linear`."""

    head_name = "linear"
    shortcut_name = "shortcut"
    reductions = (1, 2, 4, 8)


def _six_n_plus_two(depth: int, widths: tuple[int, ...]) -> dict[str, Any]:
    return {"blocks": ((depth - 2) // 6,) * 3, "widths": widths}


NARROW, WIDE, FOUR = (16, 16, 32, 64), (32, 64, 128, 256), (64, 64, 128, 256, 512)
register(
    __name__,
    CifarResNet,
    {f"cifar_resnet{depth}": _six_n_plus_two(depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)}
    | {f"cifar_resnet{depth}x4": _six_n_plus_two(depth, WIDE) for depth in (8, 32)},
    first_conv="conv1",
)
register(
    __name__,
    CifarResNetFourStage,
    {
        "cifar_resnet18": {"blocks": (2, 2, 2, 2), "widths": FOUR},
        "cifar_resnet50": {"blocks": (3, 4, 6, 3), "widths": FOUR, "bottleneck": True},
    },
    first_conv="conv1",
)
