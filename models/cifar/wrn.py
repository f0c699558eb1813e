"""Wide residual networks (Zagoruyko & Komodakis 2016): pre-activation blocks, depth 6n+4, widening factor k."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.cifar.base import CifarNet, conv1x1, conv3x3, register

__all__: list[str] = []  # filled by `register`


class PreActivation(nn.Module):
    """BN-ReLU-conv twice. Where the width changes, the shortcut too starts from the activated input."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = conv3x3(in_chs, out_chs, stride=stride)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = conv3x3(out_chs, out_chs)
        self.convShortcut = conv1x1(in_chs, out_chs, stride=stride) if in_chs != out_chs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, h, w) → (B, out_chs, h/stride, w/stride)."""
        active = F.relu(self.bn1(x))
        y: torch.Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    """A stage. The level `layer` exists because the published names have it."""

    def __init__(self, count: int, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        first = PreActivation(in_chs, out_chs, stride)
        self.layer = nn.Sequential(first, *(PreActivation(out_chs, out_chs, 1) for _ in range(count - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, h, w) → (B, out_chs, h/stride, w/stride)."""
        out: torch.Tensor = self.layer(x)
        return out


class CifarWideResNet(CifarNet):
    """WRN-depth-widen. Stage outputs are before BN and ReLU, as is usual for pre-activation networks."""

    stem_names = r"^conv1\."
    block_names = r"^block(\d+)"
    tail_names = ("bn1",)
    reductions = (1, 2, 4)

    def __init__(self, depth: int, widen: int, **common: Any) -> None:
        super().__init__(**common)
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = conv3x3(self.in_chans, widths[0])
        for i in range(3):
            group = Group((depth - 4) // 6, widths[i], widths[i + 1], stride=1 if i == 0 else 2)
            self.add_module(f"block{i + 1}", group)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.finish(widths[3], [(f"block{i + 1}", widths[i + 1]) for i in range(3)])

    def init_head(self, linear: nn.Linear) -> None:
        """Zero bias."""
        nn.init.zeros_(linear.bias)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → (B, 16, H, W)."""
        out: torch.Tensor = self.conv1(x)
        return out

    def stage_preact(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The map before a ReLU is the next BatchNorm's output; that layer's running statistics stay as they are."""
        x = self.stage(index, x)
        last = index + 1 == len(self.feature_info)
        norm = self.get_submodule("bn1" if last else f"block{index + 2}.layer.0.bn1")
        assert isinstance(norm, _BatchNorm)
        mean, var = (None, None) if norm.training else (norm.running_mean, norm.running_var)
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, norm.training, eps=norm.eps), x

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        """The activation that the last block leaves out."""
        return F.relu(self.bn1(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As the base, with blocks one level deeper."""
        return {"stem": self.stem_names, "blocks": self.block_names + ("" if coarse else r"\.layer\.(\d+)")}


register(
    __name__,
    CifarWideResNet,
    {f"cifar_wrn_{depth}_{widen}": {"depth": depth, "widen": widen} for depth in (16, 40) for widen in (1, 2)},
    first_conv="conv1",
)
