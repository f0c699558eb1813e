"""ShuffleNet V1 with three groups (Zhang et al. 2018) and V2 ×1 (Ma et al. 2018), with 1×1 stride-1 stems for CIFAR."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.cifar.base import CifarNet, conv1x1, conv3x3, register

__all__: list[str] = []  # filled by `register`

STEM = 24


def channel_shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, C, h, w): channel g·(C/groups) + c moves to c·groups + g."""
    return x if groups == 1 else F.channel_shuffle(x, groups)


class GroupedUnit(nn.Module):
    """ShuffleNet V1 unit: grouped 1×1, shuffle, depthwise 3×3, grouped 1×1.

    With stride 2 the average-pooled input is concatenated instead of added, so the branch has `out_chs` minus
    `in_chs` channels. (B, in_chs, h, w) → (B, out_chs, h/stride, w/stride).
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int) -> None:
        super().__init__()
        branch = out_chs - in_chs if stride == 2 else out_chs
        mid = branch // 4
        # The 24 channels of the stem are too few to be worth grouping.
        self.groups = 1 if in_chs == STEM else groups
        self.stride = stride
        self.conv1 = conv1x1(in_chs, mid, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv3x3(mid, mid, stride=stride, groups=mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv1x1(mid, branch, groups=groups)
        self.bn3 = nn.BatchNorm2d(branch)

    def preact(self, x: torch.Tensor) -> torch.Tensor:
        """The unit without its last ReLU. Published with one after the depthwise convolution, unlike the paper."""
        y = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride == 2:
            return torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        return y + x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One unit; see the class."""
        return F.relu(self.preact(x))


class SplitUnit(nn.Module):
    """ShuffleNet V2 unit at constant size: half of the channels pass by, both halves are shuffled."""

    def __init__(self, chs: int) -> None:
        super().__init__()
        half = chs // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, chs, h, w) → the half that passes by, and the other before its last ReLU; both (B, chs/2, h, w)."""
        passed, y = x.chunk(2, dim=1)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
        return passed, self.bn3(self.conv3(y))

    def preact(self, x: torch.Tensor) -> torch.Tensor:
        """The unit without its last ReLU; what passes by has had one. (B, chs, h, w) → the same shape."""
        return channel_shuffle(torch.cat(self.halves(x), dim=1), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, chs, h, w) → the same shape."""
        passed, y = self.halves(x)
        return channel_shuffle(torch.cat([passed, F.relu(y)], dim=1), 2)


class DownUnit(nn.Module):
    """ShuffleNet V2 unit that halves the map: two branches, (B, in_chs, h, w) → (B, out_chs, h/2, w/2)."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        half = out_chs // 2
        self.conv1 = conv3x3(in_chs, in_chs, stride=2, groups=in_chs)
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv2 = conv1x1(in_chs, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_chs, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv3x3(half, half, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One unit; see the class."""
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return channel_shuffle(torch.cat([left, right], dim=1), 2)


class _ShuffleNet(CifarNet):
    """Stem and three stages; `unit(in_chs, out_chs, first)` makes the units of a stage."""

    head_name = "linear"
    reductions = (2, 4, 8)

    def __init__(self, widths: tuple[int, ...], repeats: tuple[int, ...], **common: Any) -> None:
        super().__init__(**common)
        self.conv1 = conv1x1(self.in_chans, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        in_chs = STEM
        for i, (width, count) in enumerate(zip(widths, repeats, strict=True)):
            units = [self.unit(in_chs if j == 0 else width, width, first=j == 0) for j in range(count)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*units))
            in_chs = width
        self.stages = [(f"layer{i + 1}", width) for i, width in enumerate(widths)]

    def unit(self, in_chs: int, out_chs: int, first: bool) -> nn.Module:
        """A unit; the first of a stage halves the map."""
        raise NotImplementedError

    def init_layer(self, module: nn.Module) -> None:
        """torch's own initialisation, as the tables' ShuffleNets were trained from."""

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → (B, 24, H, W)."""
        return F.relu(self.bn1(self.conv1(x)))


class CifarShuffleNetV1(_ShuffleNet):
    """Stages of 4, 8, 4 grouped units; the last map is 4×4 at 32 pixels."""

    def __init__(self, widths: tuple[int, ...], groups: int, **common: Any) -> None:
        self.conv_groups = groups
        super().__init__(widths, (4, 8, 4), **common)
        self.finish(widths[-1], self.stages)

    def unit(self, in_chs: int, out_chs: int, first: bool) -> nn.Module:
        """Grouped units throughout."""
        return GroupedUnit(in_chs, out_chs, 2 if first else 1, self.conv_groups)


class CifarShuffleNetV2(_ShuffleNet):
    """Stages of 4, 8, 4 units and a 1×1 convolution to `features`; the last map is 4×4 at 32 pixels."""

    tail_names = ("conv2", "bn2")

    def __init__(self, widths: tuple[int, ...], features: int, **common: Any) -> None:
        super().__init__(widths, (4, 8, 4), **common)
        self.conv2 = conv1x1(widths[-1], features)
        self.bn2 = nn.BatchNorm2d(features)
        self.finish(features, self.stages)

    def unit(self, in_chs: int, out_chs: int, first: bool) -> nn.Module:
        """A two-branch unit, then split units."""
        return DownUnit(in_chs, out_chs) if first else SplitUnit(out_chs)

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        """(B, widths[-1], h, w) → (B, features, h, w)."""
        return F.relu(self.bn2(self.conv2(x)))


register(
    __name__, CifarShuffleNetV1, {"cifar_shufflenet_v1": {"widths": (240, 480, 960), "groups": 3}}, first_conv="conv1"
)
register(
    __name__,
    CifarShuffleNetV2,
    {"cifar_shufflenet_v2": {"widths": (116, 232, 464), "features": 1024}},
    first_conv="conv1",
)
